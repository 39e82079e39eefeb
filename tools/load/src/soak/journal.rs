//! [`Journal`]: what was done to whom and when, and how long clients had to wait because of it.
//!
//! Every disturbance is a line in a file too, for whoever has to find out what led to a failure.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Disturbances that a stall can be put down to.
const RECENT_MAX: usize = 256;
/// A disturbance this long before a stall may still be its cause: the last completions ahead of it were on their way.
const BEFORE: Duration = Duration::from_millis(100);

/// What is known of one kind of disturbance.
#[derive(Debug, Default)]
struct Counts {
    done: AtomicU64,
    missed: AtomicU64,
    longest_stall_us: AtomicU64,
}

/// The same, for a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    pub done: u64,
    /// How often there was nothing there to disturb.
    pub missed: u64,
    pub longest_stall: Duration,
}

/// A disturbance that has begun.
#[derive(Clone, Copy, Debug)]
struct Begun {
    at: Instant,
    kind: usize,
    /// None: all machines suffer from it.
    machine: Option<usize>,
}

pub struct Journal {
    started: Instant,
    recent: Mutex<VecDeque<Begun>>,
    counts: Vec<Counts>,
    longest_otherwise_us: AtomicU64,
    file: Mutex<File>,
}

impl Journal {
    /// For so many kinds of disturbances.
    pub fn new(path: &Path, kinds: usize) -> Result<Self> {
        Ok(Self {
            started: Instant::now(),
            recent: Mutex::default(),
            counts: (0..kinds).map(|_| Counts::default()).collect(),
            longest_otherwise_us: AtomicU64::new(0),
            file: Mutex::new(File::create(path).with_context(|| path.display().to_string())?),
        })
    }

    /// Writes a line.
    pub fn say(&self, line: &str) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // The journal is for people; a run does not depend on it.
        let _ = writeln!(file, "{:10.3} {line}", self.started.elapsed().as_secs_f64());
    }

    /// A disturbance begins, of one machine or of all.
    pub fn begin(&self, kind: usize, machine: Option<usize>) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() == RECENT_MAX {
            recent.pop_front();
        }
        recent.push_back(Begun { at: Instant::now(), kind, machine });
    }

    pub fn done(&self, kind: usize) {
        self.counts[kind].done.fetch_add(1, Ordering::Relaxed);
    }

    pub fn missed(&self, kind: usize) {
        self.counts[kind].missed.fetch_add(1, Ordering::Relaxed);
    }

    /// A machine's client has waited for a completion all this time: because of all that began meanwhile.
    pub fn stall(&self, machine: usize, from: Instant, to: Instant) {
        let us = u64::try_from(to.duration_since(from).as_micros()).unwrap_or(u64::MAX);
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let causes = recent.iter().filter(|begun| {
            begun.machine.is_none_or(|other| other == machine) && begun.at + BEFORE >= from && begun.at <= to
        });
        let mut has_cause = false;
        for cause in causes {
            has_cause = true;
            self.counts[cause.kind].longest_stall_us.fetch_max(us, Ordering::Relaxed);
        }
        if !has_cause {
            self.longest_otherwise_us.fetch_max(us, Ordering::Relaxed);
        }
    }

    /// What there is to tell of a kind.
    pub fn row(&self, kind: usize) -> Row {
        let counts = &self.counts[kind];
        Row {
            done: counts.done.load(Ordering::Relaxed),
            missed: counts.missed.load(Ordering::Relaxed),
            longest_stall: Duration::from_micros(counts.longest_stall_us.load(Ordering::Relaxed)),
        }
    }

    /// The longest stall without any disturbance.
    pub fn longest_otherwise(&self) -> Duration {
        Duration::from_micros(self.longest_otherwise_us.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_put_down_to_what_began_meanwhile_to_that_machine() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::new(&directory.path().join("journal"), 3).unwrap();
        let start = Instant::now();
        journal.begin(0, Some(1));
        journal.begin(1, None);
        journal.begin(2, Some(7));
        let second = Duration::from_secs(1);
        journal.stall(1, start, start + second);
        assert_eq!([0, 1, 2].map(|kind| journal.row(kind).longest_stall), [second, second, Duration::ZERO]);
        journal.stall(1, start + 5 * second, start + 8 * second);
        assert_eq!((journal.longest_otherwise(), journal.row(0).longest_stall), (3 * second, second));
    }
}
