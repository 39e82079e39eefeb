//! The processes of a run: the daemon, keepers and workers, all of which descend from this one, whoever of them has died.
//!
//! This process is made the parent of orphans ([`adopt`]), so nothing that a run has started can be overlooked, and nothing has to
//! be looked for by its name among what others run.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::process::tree;
use crate::sys::{self, ProcessHandle};

const KEEPER: &str = "pando-keeper";
const WORKER: &str = "pando-worker";
/// What either is called until it has said what it is.
const NEITHER_YET: &str = "pando-blk";

/// Has orphans become children of this process.
pub fn adopt() -> Result<()> {
    sys::adopt_orphans().context("cannot become the parent of orphans")
}

/// What either is called, until then, of which a keeper has executed the open file.
fn is_number(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_digit())
}

/// A process's name and whether it has ended without anybody's having taken note.
fn look(pid: u32) -> Option<(String, bool)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let (start, end) = (stat.find('(')?, stat.rfind(')')?);
    Some((stat[start + 1..end].to_owned(), stat[end + 1..].trim_start().starts_with('Z')))
}

fn is_running(pid: u32, name: &str) -> bool {
    look(pid).is_some_and(|(found, has_ended)| found == name && !has_ended)
}

fn handle(pid: u32, name: &str) -> Option<ProcessHandle> {
    let handle = ProcessHandle::open(pid).ok()?;
    // Looked at afterwards: now the number is known to be that of what the handle is for.
    is_running(pid, name).then_some(handle)
}

/// A keeper, if it still is one.
pub fn keeper(pid: u32) -> Option<ProcessHandle> {
    handle(pid, KEEPER)
}

/// The workers of a keeper: one, but for moments.
pub fn workers(keeper: u32) -> Vec<ProcessHandle> {
    tree(keeper).into_iter().skip(1).filter_map(|pid| handle(pid, WORKER)).collect()
}

/// Takes note of the end of keepers and workers that were left to this process.
pub fn bury_orphans() {
    for pid in tree(std::process::id()).into_iter().skip(1) {
        let is_ours = |name: &str| [KEEPER, WORKER, NEITHER_YET].contains(&name) || is_number(name);
        if look(pid).is_some_and(|(name, has_ended)| has_ended && is_ours(&name)) {
            sys::bury(pid);
        }
    }
}

fn others() -> Vec<(u32, String)> {
    let others = tree(std::process::id()).into_iter().skip(1);
    others.filter_map(|pid| look(pid).filter(|(_, has_ended)| !has_ended).map(|(name, _)| (pid, name))).collect()
}

/// Sees that nothing of the run is left, within so long.
pub fn expect_none(patience: Duration) -> Result<()> {
    let ends = Instant::now() + patience;
    loop {
        bury_orphans();
        let left = others();
        if left.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < ends, "these processes are left: {left:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Ends all that is left, at once.
pub fn kill_all() {
    // Those that were started meanwhile have lost who did so by the second time.
    for _ in 0..3 {
        for (pid, name) in others() {
            if let Some(process) = handle(pid, &name) {
                // It may have ended by itself.
                let _ = process.send(libc::SIGKILL);
                let _ = process.wait_for_end(Duration::from_secs(5));
            }
        }
        bury_orphans();
    }
}
