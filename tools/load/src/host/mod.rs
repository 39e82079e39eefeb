//! What the daemon of a host costs: attaching a volume, importing an image, and standing with many of them.
//!
//! Everything is asked for as any client does, over the API's socket ([`api`]) or by the command line; what it takes is seen from
//! outside. Owns the order of events; [`report`] prints what was found.

pub mod api;
pub mod daemon;
mod import;
mod report;

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::arguments::HostOptions;
use crate::device::{Device, Greeting, Setup};
use crate::process::{self, Weight};
use crate::suite::{machine, progress};

use daemon::Daemon;
use import::Imports;

/// The image below attached volumes: large, and nothing of it is ever read.
const SPARSE_BYTES: u64 = 10 << 30;
/// For processes to come to rest: longer than threads are kept that may be needed again.
const SETTLE: Duration = Duration::from_secs(3);

/// What was found.
struct Figures {
    imports: Imports,
    sparse_import_ms: f64,
    /// From the call to the answer and a connection to the socket that it names.
    attach_ms: Vec<f64>,
    /// The same by the command line, from its start to its end.
    attach_by_command_ms: Vec<f64>,
    many: Many,
}

/// Many volumes attached at once.
struct Many {
    count: usize,
    /// To attach all of them, one after the other.
    attach_seconds: f64,
    /// Both processes of each backend, before a front end comes.
    waiting: Vec<Weight>,
    /// And with its one queue running.
    attached: Vec<Weight>,
    /// CPU time and context switches of all backends while the daemon was watched.
    backends_rest: Rest,
    daemon: Weight,
    daemon_rest: Rest,
    idle_seconds: f64,
}

/// CPU time and context switches.
#[derive(Clone, Copy, Debug)]
struct Rest {
    cpu_ns: u64,
    switches: u64,
}

/// The files of a run, removed at its end.
struct Site(PathBuf);

impl Site {
    fn new(options: &HostOptions) -> Result<Self> {
        let directory = &options.work_dir;
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        Ok(Self(fs::canonicalize(directory)?))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{} is left behind: {error}", self.0.display());
        }
    }
}

pub fn run(options: &HostOptions) -> Result<()> {
    let site = Site::new(options)?;
    let mut daemon = Daemon::start(&options.pando, &site.0, "bench")?;
    let measured = measure(options, &site, &daemon);
    let figures = measured.with_context(|| format!("the daemon said:\n{}", daemon.said()))?;
    daemon.stop()?;
    progress("");
    print!("{}", report::report(&machine::describe()?, options, &figures));
    Ok(())
}

fn measure(options: &HostOptions, site: &Site, daemon: &Daemon) -> Result<Figures> {
    let imports = import::measure(options, &site.0, daemon)?;

    progress("importing a sparse image");
    let sparse = site.0.join("sparse.raw");
    File::create(&sparse)?.set_len(SPARSE_BYTES)?;
    let (image, took) = daemon.import(&sparse)?;

    progress("attaching");
    let mut attach_ms = Vec::new();
    for index in 0..options.attaches {
        let volume = format!("api-{index}");
        create(daemon, &volume, &image)?;
        let since = Instant::now();
        let socket = attach(daemon, &volume)?;
        UnixStream::connect(&socket).with_context(|| socket.clone())?;
        attach_ms.push(milliseconds(since.elapsed()));
    }
    let mut attach_by_command_ms = Vec::new();
    for index in 0..options.attaches {
        let volume = format!("command-{index}");
        create(daemon, &volume, &image)?;
        let since = Instant::now();
        let status = Command::new(&options.pando)
            .args(["attach", &volume, "--vm", &volume])
            .env("PANDO_API", daemon.socket())
            .stdout(Stdio::null())
            .status()
            .with_context(|| options.pando.display().to_string())?;
        attach_by_command_ms.push(milliseconds(since.elapsed()));
        ensure!(status.success(), "pando attach: {status}");
    }
    daemon.detach_all()?;

    let many = measure_many(options, daemon, &image)?;
    Ok(Figures { imports, sparse_import_ms: milliseconds(took), attach_ms, attach_by_command_ms, many })
}

fn create(daemon: &Daemon, volume: &str, image: &str) -> Result<()> {
    daemon.call("POST", "/v1/volumes", Some(&json!({ "name": volume, "kind": "cow", "image": image })))?;
    Ok(())
}

/// Attaches a volume to a VM of the same name, and says where.
fn attach(daemon: &Daemon, volume: &str) -> Result<String> {
    let request = json!({ "volume": volume, "vm": volume });
    let answer = daemon.call("POST", "/v1/attachments", Some(&request))?;
    Ok(answer["socket"].as_str().context("an attachment has a socket")?.to_owned())
}

fn measure_many(options: &HostOptions, daemon: &Daemon, image: &str) -> Result<Many> {
    let volumes: Vec<_> = (0..options.attachments).map(|index| format!("many-{index}")).collect();
    progress(&format!("attaching {} volumes", volumes.len()));
    for volume in &volumes {
        create(daemon, volume, image)?;
    }
    let since = Instant::now();
    let sockets = volumes.iter().map(|volume| attach(daemon, volume)).collect::<Result<Vec<_>>>()?;
    let attach_seconds = since.elapsed().as_secs_f64();

    thread::sleep(SETTLE);
    let backends = daemon.backends()?;
    ensure!(backends.len() == volumes.len(), "{} backends for {} volumes", backends.len(), volumes.len());
    let trees: Vec<_> = backends.iter().map(|keeper| process::tree(*keeper)).collect();
    let waiting = trees.iter().map(|tree| process::weight(tree)).collect::<Result<Vec<_>>>()?;

    let devices = sockets.iter().map(|socket| connect(socket)).collect::<Result<Vec<_>>>()?;
    thread::sleep(SETTLE);
    let trees: Vec<_> = backends.iter().map(|keeper| process::tree(*keeper)).collect();
    let attached = trees.iter().map(|tree| process::weight(tree)).collect::<Result<Vec<_>>>()?;

    progress("watching the daemon at rest");
    let all = trees.concat();
    let before = (rest(&[daemon.id()])?, rest(&all)?);
    let since = Instant::now();
    thread::sleep(Duration::from_secs_f64(options.idle_seconds));
    let idle_seconds = since.elapsed().as_secs_f64();
    let after = (rest(&[daemon.id()])?, rest(&all)?);
    let weight = process::weight(&[daemon.id()])?;

    for device in devices {
        device.stop()?;
    }
    daemon.detach_all()?;
    Ok(Many {
        count: volumes.len(),
        attach_seconds,
        waiting,
        attached,
        backends_rest: difference(after.1, before.1),
        daemon: weight,
        daemon_rest: difference(after.0, before.0),
        idle_seconds,
    })
}

fn connect(socket: &str) -> Result<Device> {
    let setup = Setup { queues: 1, queue_size: 256, area_bytes: 2 << 20, segment_bytes: None, indirect: true };
    Greeting::new(UnixStream::connect(socket)?)?.start(&setup)
}

fn rest(pids: &[u32]) -> Result<Rest> {
    Ok(Rest { cpu_ns: process::cpu_ns(pids)?, switches: process::switches(pids)? })
}

fn difference(after: Rest, before: Rest) -> Rest {
    // What a thread counted that has ended since is in one and not in the other.
    Rest { cpu_ns: after.cpu_ns - before.cpu_ns, switches: after.switches.saturating_sub(before.switches) }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
