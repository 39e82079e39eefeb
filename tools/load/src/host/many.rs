//! Many volumes attached at once, each with a guest that does nothing: what it takes to attach one more, and what all of them take at rest.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::host::daemon::Daemon;
use crate::host::{milliseconds, volumes};
use crate::process::{self, Weight};
use crate::suite::progress;

/// For processes to come to rest: longer than threads are kept that may be needed again.
const SETTLE: Duration = Duration::from_secs(6);

/// What was found.
pub struct Many {
    /// To make each volume, and to attach it, one after the other.
    pub creations: Vec<Call>,
    pub attaches: Vec<Call>,
    /// Each backend before a front end comes.
    pub waiting: Vec<Pair>,
    /// And with its one queue running.
    pub attached: Vec<Pair>,
    /// CPU time and context switches of all backends while they were watched at rest.
    pub backends_rest: Rest,
    pub daemon: Weight,
    pub daemon_rest: Rest,
    pub idle_seconds: f64,
    pub detach_seconds: f64,
}

/// One call of the daemon's API.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Until its answer.
    pub ms: f64,
    /// CPU time of the daemon, in which nobody else has a part.
    pub daemon_cpu_ms: f64,
}

/// The two processes of a backend.
pub struct Pair {
    pub keeper: Weight,
    pub worker: Weight,
}

impl Pair {
    fn weigh(tree: &[u32]) -> Result<Self> {
        let (keeper, workers) = tree.split_at(1);
        Ok(Self { keeper: process::weight(keeper)?, worker: process::weight(workers)? })
    }

    /// A figure of both together.
    pub fn sum(&self, figure: fn(&Weight) -> u64) -> u64 {
        figure(&self.keeper) + figure(&self.worker)
    }
}

/// CPU time and context switches.
#[derive(Clone, Copy, Debug)]
pub struct Rest {
    pub cpu_ns: u64,
    pub switches: u64,
}

impl Rest {
    fn so_far(pids: &[u32]) -> Result<Self> {
        Ok(Self { cpu_ns: process::cpu_ns(pids)?, switches: process::switches(pids)? })
    }

    fn since(self, before: Self) -> Self {
        // What a thread counted that has ended since is in one and not in the other.
        Self { cpu_ns: self.cpu_ns - before.cpu_ns, switches: self.switches.saturating_sub(before.switches) }
    }
}

/// Attaches `count` volumes over `image`, watches all of them do nothing for so long, and detaches them.
pub fn measure(daemon: &Daemon, image: &str, count: usize, idle: Duration) -> Result<Many> {
    let names: Vec<_> = (0..count).map(|index| format!("many-{index}")).collect();
    progress(&format!("making {count} volumes"));
    let (_, creations) = timed(daemon, &names, |volume| volumes::create(daemon, volume, image, None))?;
    progress(&format!("attaching {count} volumes"));
    let (sockets, attaches) = timed(daemon, &names, |volume| volumes::attach(daemon, volume))?;

    thread::sleep(SETTLE);
    progress(&format!("weighing {count} backends"));
    let keepers = daemon.backends()?;
    ensure!(keepers.len() == count, "{} backends for {count} volumes", keepers.len());
    let trees = || keepers.iter().map(|keeper| process::tree(*keeper)).collect::<Vec<_>>();
    let weigh = |trees: &[Vec<u32>]| trees.iter().map(|tree| Pair::weigh(tree)).collect::<Result<Vec<_>>>();
    let waiting = weigh(&trees())?;

    let devices = sockets.iter().map(|socket| volumes::connect(socket)).collect::<Result<Vec<_>>>()?;
    thread::sleep(SETTLE);
    let trees = trees();
    let attached = weigh(&trees)?;

    progress("watching the daemon and all backends at rest");
    let all = trees.concat();
    let before = (Rest::so_far(&[daemon.id()])?, Rest::so_far(&all)?);
    let since = Instant::now();
    thread::sleep(idle);
    let idle_seconds = since.elapsed().as_secs_f64();
    let after = (Rest::so_far(&[daemon.id()])?, Rest::so_far(&all)?);
    let weight = process::weight(&[daemon.id()])?;

    progress(&format!("detaching {count} volumes"));
    for device in devices {
        device.stop()?;
    }
    let since = Instant::now();
    daemon.detach_all()?;
    Ok(Many {
        creations,
        attaches,
        waiting,
        attached,
        backends_rest: after.1.since(before.1),
        daemon: weight,
        daemon_rest: after.0.since(before.0),
        idle_seconds,
        detach_seconds: since.elapsed().as_secs_f64(),
    })
}

/// Does something for each volume; gives what came of it, and what each took.
fn timed<T>(daemon: &Daemon, names: &[String], act: impl Fn(&str) -> Result<T>) -> Result<(Vec<T>, Vec<Call>)> {
    let timed = names.iter().map(|name| {
        let cpu_before = process::cpu_ns(&[daemon.id()])?;
        let since = Instant::now();
        let done = act(name)?;
        let ms = milliseconds(since.elapsed());
        let daemon_cpu_ms = (process::cpu_ns(&[daemon.id()])? - cpu_before) as f64 / 1e6;
        Ok((done, Call { ms, daemon_cpu_ms }))
    });
    Ok(timed.collect::<Result<Vec<_>>>()?.into_iter().unzip())
}
