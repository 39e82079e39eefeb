//! What a guest notices of a neighbour: one that rests, one that works as hard as it can, and one that means harm.
//!
//! Three backends on this host. The first is the client's, who compares what it reads with what it wrote, and whose latencies are
//! measured; the second has a client that polls and reads without a pause; the third is that of [`super::noise`]. They take turns, in cycles of a
//! few seconds, so that what else the machine does strikes all of them alike. The neighbours are processes, stopped when it is not their turn.
//!
//! Processors are shared in two ways ([`Share`]). A neighbour takes what it can get of them, as any process does, whatever it does there: only where
//! each virtual machine has its own does a latency tell what else neighbours do to each other.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::arguments::SurviveOptions;
use crate::content;
use crate::device::{Device, Greeting, Setup};
use crate::drive::{Drive, Tally};
use crate::process::Backend;
use crate::suite::contestants::{CONTESTANTS, Volume};
use crate::suite::progress;
use crate::suite::rows::BASE_BYTES;
use crate::suite::site::Site;
use crate::survive::noise::Counts;
use crate::sys::{self, ProcessHandle};
use crate::verify::{Base, Verifier};

const BLOCK_BYTES: u32 = 4 << 10;
const QUEUE_SIZE: u16 = 256;
const DEPTH: usize = 4;
const RANGE_BYTES: u64 = 128 << 20;
/// How long a neighbour has its turn, and how long before it counts.
const TURN: Duration = Duration::from_secs(1);
const TURN_OF_NOISE: Duration = Duration::from_secs(4);
const SETTLE: Duration = Duration::from_millis(100);
/// How long a backend may take over what its guest has left it when that is stopped.
const PATIENCE: Duration = Duration::from_secs(30);

/// Who is next door.
pub const KINDS: [&str; 3] = ["at rest", "reading as fast as it can", "sending garbage"];
const NOISE: usize = 2;

/// Who has which processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Share {
    /// Each virtual machine has its own: client and backend one, each neighbour's driver and backend another.
    Own,
    /// All have all of them.
    All,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Figures {
    pub depth: usize,
    pub shares: Vec<(Share, Vec<Cycle>)>,
    /// How long there was noise, in seconds.
    pub noise_seconds: f64,
    pub noise: Counts,
    /// Workers of the hostile guest's backend that have died.
    pub deaths: usize,
    /// What has completed for the client, all of it as it should.
    pub requests: u64,
}

/// One turn of each kind of neighbour.
pub type Cycle = [Turn; KINDS.len()];

/// What the client saw in it.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Turn {
    pub iops: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    pub longest_us: f64,
}

impl Turn {
    fn new(tally: &Tally, time: Duration) -> Self {
        let quantile = |quantile| tally.latency.quantile_ns(quantile) as f64 / 1e3;
        Self {
            iops: tally.requests as f64 / time.as_secs_f64(),
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
            p999_us: quantile(0.999),
            longest_us: tally.longest.as_secs_f64() * 1e6,
        }
    }
}

pub fn measure(options: &SurviveOptions, site: &Site) -> Result<Figures> {
    let processors = sys::processors()?;
    let mut figures = Figures {
        depth: DEPTH,
        shares: Vec::new(),
        noise_seconds: 0.0,
        noise: Counts::default(),
        deaths: 0,
        requests: 0,
    };
    let shares = if processors.len() > 1 { &[Share::Own, Share::All][..] } else { &[Share::All] };
    let time = Duration::from_secs_f64(options.minutes * 60.0 / shares.len() as f64);
    for share in shares {
        let (ours, theirs) = match share {
            Share::Own => (&processors[..1], &processors[1..2]),
            Share::All => (&processors[..], &processors[..]),
        };
        let street = Street::start(site, ours, theirs);
        let measured = street.and_then(|street| street.measure(*share, time, &mut figures));
        sys::run_on(&processors)?;
        measured?;
    }
    Ok(figures)
}

/// The client and its neighbours.
struct Street<'s> {
    site: &'s Site,
    backend: Backend,
    device: Device,
    neighbours: [Neighbour; 2],
    hostile_log: PathBuf,
}

/// A driver in a process of its own, and its backend.
struct Neighbour {
    backend: Backend,
    driver: Child,
    output: PathBuf,
}

impl<'s> Street<'s> {
    fn start(site: &'s Site, ours: &[usize], theirs: &[usize]) -> Result<Self> {
        let log = |index: usize| site.log().with_extension(index.to_string());
        let start = |index: usize| {
            let volume = site.volume(index, 1);
            let backend = start_backend(site, &volume, log(index))?;
            Ok::<_, anyhow::Error>((volume, backend))
        };
        // Who is started runs where this thread runs.
        sys::run_on(theirs)?;
        let neighbour = |index: usize, arguments: &[&str]| {
            let (volume, backend) = start(index)?;
            let output = site.directory().join(format!("driver-{index}"));
            let driver = Command::new(&site.programs.load)
                .args(arguments)
                .arg("--socket-path")
                .arg(&volume.socket)
                .stdin(Stdio::null())
                .stdout(File::create(&output)?)
                .spawn()?;
            Ok::<_, anyhow::Error>(Neighbour { backend, driver, output })
        };
        let mut neighbours = [neighbour(1, &["run", "--seconds", "1e9"])?, neighbour(2, &["noise"])?];
        for neighbour in &mut neighbours {
            neighbour.rest()?;
        }
        sys::run_on(ours)?;
        let (_, mut backend) = start(0)?;
        let (stream, _) = backend.connect()?;
        let area_bytes = crate::run::area_bytes(BLOCK_BYTES, DEPTH, 0, BLOCK_BYTES);
        let setup = Setup { queues: 1, queue_size: QUEUE_SIZE, area_bytes, segment_bytes: None, indirect: true };
        let mut device = Greeting::new(stream)?.start(&setup)?;
        device.queues[0].reshape(BLOCK_BYTES, DEPTH, 0)?;
        Ok(Self { site, backend, device, neighbours, hostile_log: log(2) })
    }

    fn measure(mut self, share: Share, time: Duration, figures: &mut Figures) -> Result<()> {
        let base = Base::Content { generation: content::BASE, bytes: BASE_BYTES };
        let mut verifier = Verifier::new(self.device.config, base, RANGE_BYTES, BLOCK_BYTES, 1).plain();
        verifier.start_random(u64::MAX);
        let mut drive = Drive::new(std::mem::take(&mut self.device.queues), verifier);
        // Most of it is in the delta then, and stays there.
        work(&mut drive, TURN * 3)?;
        let mut cycles = Vec::new();
        let mut noise = Duration::ZERO;
        while noise < time {
            let mut cycle = Cycle::default();
            for (kind, turn) in cycle.iter_mut().enumerate() {
                progress(&format!(
                    "{share:?} processors, {:.0} s of noise so far: {}",
                    noise.as_secs_f64(),
                    KINDS[kind]
                ));
                let neighbour = kind.checked_sub(1).map(|index| &mut self.neighbours[index]);
                if let Some(neighbour) = &neighbour {
                    neighbour.send(libc::SIGCONT)?;
                }
                work(&mut drive, SETTLE)?;
                let length = if kind == NOISE { TURN_OF_NOISE } else { TURN };
                let tally = work(&mut drive, length)?;
                figures.requests += tally.requests;
                *turn = Turn::new(&tally, length);
                if let Some(neighbour) = neighbour {
                    neighbour.rest()?;
                }
                if kind == NOISE {
                    noise += length + SETTLE;
                }
            }
            cycles.push(cycle);
        }
        figures.shares.push((share, cycles));
        figures.noise_seconds += noise.as_secs_f64();
        progress("reading all of it back");
        drain(&mut drive)?;
        drive.client.start_pass();
        let tally = work(&mut drive, PATIENCE)?;
        ensure!(tally.bytes == RANGE_BYTES && drive.in_flight() == 0, "{} bytes were read back", tally.bytes);
        self.device.queues = drive.into_queues();
        self.device.stop()?;
        self.backend.stop()?;
        for neighbour in self.neighbours {
            if let Some(counts) = neighbour.end()? {
                figures.noise.add(&counts);
            }
        }
        figures.deaths += fs::read_to_string(&self.hostile_log)?.matches("the worker has died").count();
        (0..3).try_for_each(|index| self.site.clean(&self.site.volume(index, 1)))
    }
}

fn start_backend(site: &Site, volume: &Volume, log: PathBuf) -> Result<Backend> {
    let pando = &CONTESTANTS[0];
    (pando.prepare)(&site.programs, volume)?;
    let mut backend = Backend::start(&(pando.command)(&site.programs, volume), &volume.socket, &log)?;
    // One connection that says nothing, to see that it listens.
    backend.connect()?;
    Ok(backend)
}

impl Neighbour {
    fn send(&self, signal: i32) -> Result<()> {
        ProcessHandle::open(self.driver.id())?.send(signal).context("a signal to a neighbour's driver")
    }

    /// Stops the driver, and waits until the backend has done what it was left with.
    fn rest(&mut self) -> Result<()> {
        const SLICE: Duration = Duration::from_millis(20);
        self.send(libc::SIGSTOP)?;
        let since = Instant::now();
        loop {
            let before = self.backend.cpu_ns();
            thread::sleep(SLICE);
            // One of its processes may have been replaced meanwhile.
            if let (Ok(before), Ok(after)) = (before, self.backend.cpu_ns())
                && after.saturating_sub(before) < SLICE.as_nanos() as u64 / 100
            {
                return Ok(());
            }
            ensure!(
                since.elapsed() < PATIENCE,
                "a neighbour's backend is busy {PATIENCE:?} after its driver was stopped"
            );
        }
    }

    /// Ends the driver and then the backend, which has to end as it should. What the driver has counted, if it has.
    fn end(mut self) -> Result<Option<Counts>> {
        self.send(libc::SIGCONT)?;
        thread::sleep(SETTLE);
        self.send(libc::SIGTERM)?;
        thread::sleep(SETTLE * 5);
        self.driver.kill()?;
        self.driver.wait()?;
        self.backend.stop()?;
        let said = fs::read_to_string(&self.output)?;
        Ok(said.lines().filter_map(|line| serde_json::from_str(line).ok()).next_back())
    }
}

/// Works for so long, or until there is no more to ask for: what was counted in that time.
fn work(drive: &mut Drive<Vec<crate::device::Queue>, Verifier>, time: Duration) -> Result<Tally> {
    drive.tally = Tally::default();
    let since = Instant::now();
    let mut now = since;
    drive.fill(0, usize::MAX, now);
    drive.publish(0)?;
    while now.duration_since(since) < time && drive.in_flight() > 0 {
        if drive.harvest(0, &mut now, |_| true)? == 0 {
            now = Instant::now();
            drive.sleep(PATIENCE, None)?;
            ensure!(now.elapsed() < PATIENCE, "no completion in {PATIENCE:?}");
        }
    }
    Ok(std::mem::take(&mut drive.tally))
}

fn drain(drive: &mut Drive<Vec<crate::device::Queue>, Verifier>) -> Result<()> {
    let mut now = Instant::now();
    while drive.in_flight() > 0 {
        if drive.harvest(0, &mut now, |_| false)? == 0 {
            drive.sleep(PATIENCE, None)?;
        }
    }
    Ok(())
}
