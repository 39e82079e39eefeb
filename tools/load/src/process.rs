//! A backend as processes: started, timed, weighed and ended.
//!
//! A backend may be several processes; every figure is a sum over the one that was started and all
//! that descend from it ([`tree`]). Knows nothing of what a backend serves.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::sys;

/// How long a backend may take to listen, and to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether a backend listens: the resolution of the start-up figure.
const LOOK_INTERVAL: Duration = Duration::from_micros(50);

/// A running backend; ended when dropped.
#[derive(Debug)]
pub struct Backend {
    child: Child,
    started: Instant,
    socket: PathBuf,
    log: PathBuf,
}

/// What a backend holds, summed over its processes.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Weight {
    pub processes: u64,
    pub threads: u64,
    pub descriptors: u64,
    /// Memory that is mapped and there, whoever else maps it.
    pub resident_kib: u64,
    /// Resident memory that no other process maps.
    pub private_kib: u64,
    /// The part of it that is not a file's: what would remain if the page cache were dropped.
    pub anonymous_kib: u64,
    /// Resident memory that is a file's on a disk.
    pub file_kib: u64,
    pub page_tables_kib: u64,
}

impl Backend {
    /// Starts `command`, which is to listen on `socket`; what it prints goes to `log`.
    pub fn start(command: &[OsString], socket: &Path, log: &Path) -> Result<Self> {
        let Some((program, arguments)) = command.split_first() else {
            bail!("an empty command");
        };
        let output = File::create(log).with_context(|| log.display().to_string())?;
        let _ = fs::remove_file(socket);
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        command.stdout(output.try_clone()?).stderr(output);
        let started = Instant::now();
        let child = command.spawn().with_context(|| format!("cannot run {program:?}"))?;
        Ok(Self { child, started, socket: socket.to_owned(), log: log.to_owned() })
    }

    /// Connects as soon as the backend listens; also says how long after its start that was.
    pub fn connect(&mut self) -> Result<(UnixStream, Duration)> {
        loop {
            if let Ok(stream) = UnixStream::connect(&self.socket) {
                return Ok((stream, self.started.elapsed()));
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the backend ended before it listened: {status}\n{}", self.said());
            }
            if self.started.elapsed() > PATIENCE {
                bail!("the backend does not listen after {PATIENCE:?}\n{}", self.said());
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Time since the backend was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// What the backend has printed.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The process that was started, and all that descend from it.
    pub fn processes(&self) -> Vec<u32> {
        tree(self.child.id())
    }

    /// CPU time used so far by all its processes.
    pub fn cpu_ns(&self) -> Result<u64> {
        cpu_ns(&self.processes())
    }

    pub fn weight(&self) -> Result<Weight> {
        weight(&self.processes())
    }

    /// How often any of its threads has gone to sleep or been preempted so far.
    pub fn switches(&self) -> Result<u64> {
        switches(&self.processes())
    }

    /// Ends the backend with SIGTERM, and waits for it.
    pub fn stop(mut self) -> Result<()> {
        sys::terminate(self.child.id()).context("SIGTERM")?;
        let since = Instant::now();
        while self.child.try_wait()?.is_none() {
            if since.elapsed() > PATIENCE {
                bail!("the backend is still there {PATIENCE:?} after SIGTERM\n{}", self.said());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // After `stop` both fail, and there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process and its descendants.
pub fn tree(root: u32) -> Vec<u32> {
    let mut pids = vec![root];
    let mut at = 0;
    while let Some(pid) = pids.get(at) {
        pids.extend(children(*pid));
        at += 1;
    }
    pids
}

/// The child that was started last: others may have died and still be there.
pub fn youngest_child(pid: u32) -> Option<u32> {
    children(pid).last().copied()
}

/// CPU time used so far by these processes.
pub fn cpu_ns(pids: &[u32]) -> Result<u64> {
    let clocks = pids.iter().map(|pid| sys::process_cpu_ns(*pid));
    clocks.sum::<std::io::Result<u64>>().context("CPU time of a process")
}

/// What these processes hold.
pub fn weight(pids: &[u32]) -> Result<Weight> {
    let mut sum = Weight::default();
    for &pid in pids {
        let rollup = Fields::read(pid, "smaps_rollup")?;
        let status = Fields::read(pid, "status")?;
        sum.processes += 1;
        sum.threads += status.number("Threads");
        sum.descriptors += fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        sum.resident_kib += rollup.number("Rss");
        sum.private_kib += rollup.number("Private_Clean") + rollup.number("Private_Dirty");
        sum.anonymous_kib += rollup.number("Anonymous");
        sum.file_kib += status.number("RssFile");
        sum.page_tables_kib += status.number("VmPTE");
    }
    Ok(sum)
}

/// How often any of these processes' threads has gone to sleep or been preempted so far.
pub fn switches(pids: &[u32]) -> Result<u64> {
    let mut sum = 0;
    for &pid in pids {
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.file_name();
            let status = Fields::read(pid, &format!("task/{}/status", task.display()))?;
            sum += status.number("voluntary_ctxt_switches");
            sum += status.number("nonvoluntary_ctxt_switches");
        }
    }
    Ok(sum)
}

/// The children of all of a process's threads.
fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    let parse = |list: String| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>();
    lists.flat_map(parse).collect()
}

/// A file of `/proc` with lines `name: number unit`.
struct Fields(String);

impl Fields {
    fn read(pid: u32, name: &str) -> Result<Self> {
        let path = format!("/proc/{pid}/{name}");
        Ok(Self(fs::read_to_string(&path).context(path)?))
    }

    /// The number of a field; 0 when it is not there.
    fn number(&self, name: &str) -> u64 {
        let mut lines = self.0.lines().filter_map(|line| line.split_once(':'));
        let value = lines.find(|(key, _)| *key == name).map(|(_, value)| value);
        value.and_then(|value| value.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_of_processes_is_summed() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let script = "sleep 60 & i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo ready; wait";
        let command = ["sh", "-c", script].map(OsString::from);
        let backend = Backend::start(&command, &directory.path().join("socket"), &log).unwrap();
        while backend.said() != "ready\n" {
            thread::sleep(Duration::from_millis(1));
        }
        let weight = backend.weight().unwrap();
        assert_eq!((weight.processes, weight.threads), (2, 2));
        assert!(weight.private_kib > 0 && weight.descriptors >= 6, "{weight:?}");
        assert!(backend.cpu_ns().unwrap() > 1_000_000);
        let children = tree(backend.child.id());
        backend.stop().unwrap();
        sys::terminate(children[1]).unwrap();
    }

    #[test]
    fn a_backend_that_fails_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let command = ["sh", "-c", "echo no such base >&2; exit 1"].map(OsString::from);
        let socket = directory.path().join("socket");
        let mut backend = Backend::start(&command, &socket, &directory.path().join("log")).unwrap();
        let error = backend.connect().unwrap_err().to_string();
        assert!(error.contains("no such base"), "{error}");
    }
}
