//! The pause that a guest notices when its worker is killed, and when its backend is upgraded.
//!
//! A client with requests in flight all the time compares what it reads with what it wrote, and sleeps until it is called, as guests do.
//! Another thread strikes, through a daemon as on any host, and then asks what the client has seen ([`Seen`]) from the strike until all
//! went on as before.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use serde_json::json;

use crate::arguments::SurviveOptions;
use crate::content;
use crate::device::{Device, Greeting, Queue, Setup};
use crate::drive::Drive;
use crate::host::daemon::Daemon;
use crate::process;
use crate::suite::progress;
use crate::suite::rows::BASE_BYTES;
use crate::suite::site::Site;
use crate::sys::ProcessHandle;
use crate::verify::{Base, Verifier};

const BLOCK_BYTES: u32 = 4 << 10;
const QUEUE_SIZE: u16 = 256;
/// The part of the disk that is written and read.
const RANGE_BYTES: u64 = 256 << 20;
/// Each queue's buffers are spread over this much memory, of which a new worker has to map every page that it uses.
const BUFFER_BYTES: usize = 64 << 20;
/// Before the first strike, so that most of what is read comes from the delta.
const WARM_UP: Duration = Duration::from_secs(2);
/// How long the client is watched after a strike, at least, and how much it has to complete.
const WINDOW: Duration = Duration::from_millis(150);
const COMPLETIONS: usize = 1000;
/// How long all may take to go on, and nothing to complete.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// How the client works.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Load {
    pub queues: usize,
    pub depth: usize,
}

const LOADS: [Load; 2] = [Load { queues: 4, depth: 32 }, Load { queues: 1, depth: 1 }];

/// What one client has seen.
#[derive(Debug, Serialize)]
pub struct Pauses {
    pub load: Load,
    /// Without any strike, over the same time: what the machine does to it by itself.
    pub none: Vec<Seen>,
    pub kills: Vec<Seen>,
    pub upgrades: Vec<Seen>,
    /// What has completed, all of it as it should.
    pub requests: u64,
}

/// What the client has seen in a window of time.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Seen {
    /// The longest time without any completion, on any queue.
    pub silence_ms: f64,
    /// The longest that a request took.
    pub wait_ms: f64,
    #[serde(skip)]
    completed: usize,
}

/// What the client's thread and the one that strikes share.
#[derive(Default)]
struct Shared {
    seen: Mutex<Seen>,
    ends: AtomicBool,
    /// The client has failed, and completes nothing any more.
    failed: AtomicBool,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the client sees from a strike on until all goes on as before.
    fn watch(&self, strike: impl FnOnce() -> Result<()>) -> Result<Seen> {
        *self.seen() = Seen::default();
        strike()?;
        let since = Instant::now();
        thread::sleep(WINDOW);
        loop {
            let seen = *self.seen();
            if seen.completed >= COMPLETIONS {
                return Ok(seen);
            }
            ensure!(!self.failed.load(Ordering::Acquire), "the client has failed");
            ensure!(since.elapsed() < PATIENCE, "{} completions in {PATIENCE:?}", seen.completed);
            thread::sleep(LOOK_INTERVAL);
        }
    }
}

pub fn measure(options: &SurviveOptions, site: &Site) -> Result<Vec<Pauses>> {
    let mut daemon = Daemon::start(&options.pando, site.directory(), "survive")?;
    progress("importing the image");
    let (image, _) = daemon.import(&site.volume(0, 1).base)?;
    let measured = LOADS.iter().map(|load| measure_load(options, &daemon, &image, *load)).collect::<Result<Vec<_>>>();
    let pauses = measured.with_context(|| format!("the daemon said:\n{}", daemon.said()))?;
    daemon.stop()?;
    Ok(pauses)
}

fn measure_load(options: &SurviveOptions, daemon: &Daemon, image: &str, load: Load) -> Result<Pauses> {
    let name = format!("depth-{}", load.depth);
    daemon.call("POST", "/v1/volumes", Some(&json!({ "name": name, "kind": "cow", "image": image })))?;
    let attachment = daemon.call("POST", "/v1/attachments", Some(&json!({ "volume": name, "vm": name })))?;
    let socket = attachment["socket"].as_str().context("an attachment has a socket")?;
    let mut device = connect(Path::new(socket), load)?;
    let base = Base::Content { generation: content::BASE, bytes: BASE_BYTES };
    let mut verifier = Verifier::new(device.config, base, RANGE_BYTES, BLOCK_BYTES, 1).plain();
    verifier.start_random(u64::MAX);
    let shared = Shared::default();
    let drive = Drive::new(std::mem::take(&mut device.queues), verifier);
    let (mut drive, mut pauses) = thread::scope(|scope| {
        let client = scope.spawn(|| {
            let worked = work(drive, &shared);
            shared.failed.store(worked.is_err(), Ordering::Release);
            worked
        });
        let struck = strike(options, daemon, load, &shared);
        shared.ends.store(true, Ordering::Release);
        let drive = client.join().map_err(|_| anyhow!("the client panicked"))??;
        Ok::<_, anyhow::Error>((drive, struck?))
    })?;
    pauses.requests = drive.tally.requests;
    progress("reading all of it back");
    drive.client.start_pass();
    shared.ends.store(false, Ordering::Release);
    drive = work(drive, &shared)?;
    ensure!(drive.tally.requests - pauses.requests == RANGE_BYTES / u64::from(BLOCK_BYTES), "not all was read back");
    device.queues = drive.into_queues();
    device.stop()?;
    daemon.detach_all()?;
    Ok(pauses)
}

fn connect(socket: &Path, load: Load) -> Result<Device> {
    let area_bytes = crate::run::area_bytes(BLOCK_BYTES, load.depth, BUFFER_BYTES, BLOCK_BYTES);
    let setup = Setup { queues: load.queues, queue_size: QUEUE_SIZE, area_bytes, segment_bytes: None, indirect: true };
    let stream = std::os::unix::net::UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    let mut device = Greeting::new(stream)?.start(&setup)?;
    for queue in &mut device.queues {
        queue.reshape(BLOCK_BYTES, load.depth, BUFFER_BYTES)?;
    }
    Ok(device)
}

/// Strikes again and again, of each kind in turn, so that what else the machine does strikes all of them alike.
fn strike(options: &SurviveOptions, daemon: &Daemon, load: Load, shared: &Shared) -> Result<Pauses> {
    let [keeper] = daemon.backends()?[..] else { return Err(anyhow!("expected one backend")) };
    weigh_like_us(keeper);
    thread::sleep(WARM_UP);
    let mut random = fastrand::Rng::with_seed(7);
    let (mut none, mut kills, mut upgrades) = (Vec::new(), Vec::new(), Vec::new());
    let count = options.kills.max(options.upgrades);
    for round in 0..count {
        progress(&format!("{} queues, depth {}: strike {} of {count}", load.queues, load.depth, round + 1));
        none.push(shared.watch(|| Ok(()))?);
        thread::sleep(Duration::from_micros(random.u64(..20_000)));
        if round < options.kills {
            kills.push(shared.watch(|| kill_worker(keeper))?);
        }
        thread::sleep(Duration::from_micros(random.u64(..20_000)));
        if round < options.upgrades {
            upgrades.push(shared.watch(|| upgrade(daemon))?);
        }
    }
    Ok(Pauses { load, none, kills, upgrades, requests: 0 })
}

/// Has a process in a session of its own get as much of the processors as this one, where the kernel shares them among sessions first.
fn weigh_like_us(process: u32) {
    // Where it does not, or only root may say so, `nice` alone counts, which is inherited.
    let ours = fs::read_to_string("/proc/self/autogroup").unwrap_or_default();
    if let Some((_, nice)) = ours.trim().rsplit_once(' ') {
        let _ = fs::write(format!("/proc/{process}/autogroup"), nice);
    }
}

fn kill_worker(keeper: u32) -> Result<()> {
    let worker = process::youngest_child(keeper).context("a keeper has a worker")?;
    let worker = ProcessHandle::open(worker)?;
    worker.send(libc::SIGKILL).context("SIGKILL")
}

fn upgrade(daemon: &Daemon) -> Result<()> {
    let upgraded = daemon.call("POST", "/v1/upgrade", None)?;
    let is_done = |one: &serde_json::Value| one["error"].is_null();
    ensure!(upgraded.as_array().is_some_and(|all| all.len() == 1 && all.iter().all(is_done)), "upgraded: {upgraded}");
    Ok(())
}

/// Keeps requests in flight until told to end and all is complete, or until there is no more to ask for.
fn work(mut drive: Drive<Vec<Queue>, Verifier>, shared: &Shared) -> Result<Drive<Vec<Queue>, Verifier>> {
    let mut last = Instant::now();
    for queue in 0..drive.queues() {
        drive.fill(queue, usize::MAX, last);
        drive.publish(queue)?;
    }
    while drive.in_flight() > 0 {
        let (mut now, mut completed) = (last, 0);
        let goes_on = !shared.ends.load(Ordering::Acquire);
        for queue in 0..drive.queues() {
            completed += drive.harvest(queue, &mut now, |_| goes_on)?;
        }
        if completed == 0 {
            ensure!(last.elapsed() < PATIENCE, "no completion in {PATIENCE:?} with {} in flight", drive.in_flight());
            drive.sleep(PATIENCE, None)?;
            continue;
        }
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        let mut seen = shared.seen();
        seen.silence_ms = seen.silence_ms.max(milliseconds(now.duration_since(last)));
        seen.wait_ms = seen.wait_ms.max(milliseconds(std::mem::take(&mut drive.tally.longest)));
        seen.completed += completed;
        last = now;
    }
    Ok(drive)
}
