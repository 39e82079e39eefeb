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
/// A disturbance that was over so long before a stall may still be its cause: what it has undone shows a little later.
const AFTERWARDS: Duration = Duration::from_millis(100);

/// What is known of one kind of disturbance.
#[derive(Debug, Default)]
struct Counts {
    done: AtomicU64,
    missed: AtomicU64,
    longest_alone_us: AtomicU64,
    longest_us: AtomicU64,
}

/// The same, for a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    pub done: u64,
    /// How often there was nothing there to disturb.
    pub missed: u64,
    /// The longest stall of a client that had no other cause, and of any.
    pub longest_alone: Duration,
    pub longest: Duration,
}

/// A disturbance that has begun.
#[derive(Clone, Copy, Debug)]
struct Begun {
    number: u64,
    kind: usize,
    /// None: all machines suffer from it.
    machine: Option<usize>,
    from: Instant,
    /// None: it goes on.
    to: Option<Instant>,
}

/// The disturbances of late, the oldest first.
#[derive(Debug, Default)]
struct Recent {
    begun: VecDeque<Begun>,
    count: u64,
}

/// A disturbance that goes on until [`Journal::end`].
#[derive(Clone, Copy, Debug)]
pub struct Ongoing(u64);

pub struct Journal {
    started: Instant,
    recent: Mutex<Recent>,
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
    pub fn begin(&self, kind: usize, machine: Option<usize>) -> Ongoing {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.begun.len() == RECENT_MAX {
            recent.begun.pop_front();
        }
        recent.count += 1;
        let number = recent.count;
        recent.begun.push_back(Begun { number, kind, machine, from: Instant::now(), to: None });
        Ongoing(number)
    }

    /// It ends.
    pub fn end(&self, ongoing: Ongoing) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(begun) = recent.begun.iter_mut().find(|begun| begun.number == ongoing.0) {
            begun.to = Some(Instant::now());
        }
    }

    pub fn done(&self, kind: usize) {
        self.counts[kind].done.fetch_add(1, Ordering::Relaxed);
    }

    pub fn missed(&self, kind: usize) {
        self.counts[kind].missed.fetch_add(1, Ordering::Relaxed);
    }

    /// A machine's client has waited for a completion all this time: because of all that went on meanwhile.
    pub fn stall(&self, machine: usize, from: Instant, to: Instant) {
        let us = u64::try_from(to.duration_since(from).as_micros()).unwrap_or(u64::MAX);
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let is_cause = |begun: &&Begun| {
            let is_its = begun.machine.is_none_or(|other| other == machine);
            is_its && begun.from <= to && begun.to.is_none_or(|end| end + AFTERWARDS >= from)
        };
        let causes: Vec<_> = recent.begun.iter().filter(is_cause).collect();
        for cause in &causes {
            self.counts[cause.kind].longest_us.fetch_max(us, Ordering::Relaxed);
        }
        match causes.as_slice() {
            [] => self.longest_otherwise_us.fetch_max(us, Ordering::Relaxed),
            [cause] => self.counts[cause.kind].longest_alone_us.fetch_max(us, Ordering::Relaxed),
            _ => 0,
        };
    }

    /// What there is to tell of a kind.
    pub fn row(&self, kind: usize) -> Row {
        let counts = &self.counts[kind];
        Row {
            done: counts.done.load(Ordering::Relaxed),
            missed: counts.missed.load(Ordering::Relaxed),
            longest_alone: Duration::from_micros(counts.longest_alone_us.load(Ordering::Relaxed)),
            longest: Duration::from_micros(counts.longest_us.load(Ordering::Relaxed)),
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
    fn a_stall_is_put_down_to_what_went_on_meanwhile_with_that_machine() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::new(&directory.path().join("journal"), 3).unwrap();
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let one = journal.begin(0, Some(1));
        let all = journal.begin(1, None);
        journal.begin(2, Some(7));
        journal.stall(1, start, start + second);
        let rows = || [0, 1, 2].map(|kind| (journal.row(kind).longest, journal.row(kind).longest_alone));
        let none = Duration::ZERO;
        assert_eq!(rows(), [(second, none), (second, none), (none, none)]);
        journal.end(one);
        journal.stall(1, start + 5 * second, start + 7 * second);
        assert_eq!(rows(), [(second, none), (2 * second, 2 * second), (none, none)]);
        journal.end(all);
        journal.stall(1, start + 5 * second, start + 8 * second);
        assert_eq!((rows()[1].0, journal.longest_otherwise()), (2 * second, 3 * second));
    }
}
