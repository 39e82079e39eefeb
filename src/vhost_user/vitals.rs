//! [`Vitals`]: signs of a worker's life, in memory that it shares with its keeper and that outlives it.
//!
//! A worker whose queues serve batches has a pulse: each ring's number goes up as a batch begins and as it ends, and is odd in between. A keeper
//! that watches sees a queue that is stuck in a batch. Watching costs wake-ups, so it ends when nothing has happened for a while; the first
//! batch after that wakes the keeper. Nothing here is believed further than a number can be: a worker that lies is taken for a dead or a
//! living one, and no more.
//!
//! ```text
//! watched | latch | held | reserved (5) | pulse of ring 0 | pulse of ring 1 | ...
//! ```

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::sys::events;
use crate::sys::shared::{self, SharedNumbers};

/// How many requests wait for room. A queue whose requests do is not stuck.
const HELD: usize = 2;
/// The number that is not zero once a sync has failed.
pub const LATCH: usize = 1;
const WATCHED: usize = 0;
/// Where the pulses begin.
pub const PULSES: usize = 8;
/// Rings that have a pulse of their own; those beyond share the last one's, and are not watched.
const RINGS: usize = 256;
const COUNT: usize = PULSES + RINGS;

/// How long a queue may take over one batch before its worker counts as dead. Storage that is slower than this has its requests
/// given to another worker, which loses nothing: what the last one was at is waited for.
pub const WEDGED_AFTER: Duration = Duration::from_secs(10);
/// How often a keeper that watches looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// New memory for a backend's signs of life.
pub fn create() -> io::Result<File> {
    shared::create(c"pando-vitals", (COUNT * size_of::<u64>()) as u64)
}

/// Maps the numbers of the memory that [`create`] made.
pub fn numbers(file: &File) -> io::Result<SharedNumbers> {
    SharedNumbers::map(file, COUNT)
}

/// The worker's side.
pub struct Vitals {
    numbers: SharedNumbers,
    /// Written to have the keeper watch.
    wake: File,
}

impl Vitals {
    /// Maps the memory.
    pub fn map(file: &File, wake: File) -> io::Result<Vitals> {
        Ok(Vitals { numbers: numbers(file)?, wake })
    }

    fn pulse(&self, ring: u16) -> &AtomicU64 {
        self.numbers.at(PULSES + usize::from(ring).min(RINGS - 1))
    }

    /// A batch begins. One thread at a time serves a ring.
    #[inline]
    pub fn begin(&self, ring: u16) {
        let pulse = self.pulse(ring);
        pulse.store(pulse.load(Ordering::Relaxed) | 1, Ordering::Relaxed);
        if self.numbers.at(WATCHED).load(Ordering::Relaxed) == 0 {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        if self.numbers.at(WATCHED).swap(1, Ordering::AcqRel) == 0 {
            // A keeper that is gone watches nobody.
            let _ = events::signal(&self.wake);
        }
    }

    /// A batch has ended, and requests of it still wait for the disk.
    #[inline]
    pub fn go_on(&self, ring: u16) {
        let pulse = self.pulse(ring);
        pulse.store((pulse.load(Ordering::Relaxed) | 1).wrapping_add(2), Ordering::Relaxed);
    }

    /// A batch has ended, and so has all that was begun.
    #[inline]
    pub fn end(&self, ring: u16) {
        let pulse = self.pulse(ring);
        pulse.store((pulse.load(Ordering::Relaxed) | 1).wrapping_add(1), Ordering::Relaxed);
    }

    /// So many requests more, or fewer, wait for room.
    pub fn count_held(&self, more: i64) {
        self.numbers.at(HELD).fetch_add(more.cast_unsigned(), Ordering::AcqRel);
    }
}

/// The keeper's side.
pub struct Watch {
    numbers: SharedNumbers,
    memory: File,
    wake: File,
    /// Each ring's pulse as it was seen last, and since when.
    seen: Vec<(u64, Instant)>,
    /// When to look next; `None`: not watching.
    next: Option<Instant>,
    /// Nobody need watch any more, as far as is known: there is one more look.
    ends: bool,
    /// Of all pulses, when the worker took over.
    at_takeover: u64,
}

impl Watch {
    /// Over a new piece of memory.
    pub fn over(memory: File, rings: u16) -> io::Result<Watch> {
        let wake = vmm_sys_util::eventfd::EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
        let rings = usize::from(rings).min(RINGS);
        let numbers = numbers(&memory)?;
        Ok(Watch {
            numbers,
            memory,
            wake: events::into_file(wake),
            seen: vec![(0, Instant::now()); rings],
            next: None,
            ends: false,
            at_takeover: 0,
        })
    }

    /// Over the memory of a keeper before this one, whose worker still serves and would wake that one.
    pub fn resume(memory: File, rings: u16) -> io::Result<Watch> {
        let mut watch = Watch::over(memory, rings)?;
        watch.begin_watching();
        Ok(watch)
    }

    /// The memory, and what a worker writes to have the keeper watch.
    pub fn files(&self) -> [&File; 2] {
        [&self.memory, &self.wake]
    }

    /// Notes that another worker takes over.
    pub fn taken_over(&mut self) {
        self.numbers.at(HELD).store(0, Ordering::Release);
        for ring in 0..self.seen.len() {
            // What was begun will not end.
            let pulse = self.numbers.at(PULSES + ring);
            pulse.store(pulse.load(Ordering::Acquire) & !1, Ordering::Release);
        }
        self.at_takeover = self.pulses();
        self.begin_watching();
    }

    fn pulses(&self) -> u64 {
        (0..self.seen.len()).fold(0u64, |sum, ring| sum.wrapping_add(self.pulse(ring) >> 1))
    }

    fn pulse(&self, ring: usize) -> u64 {
        self.numbers.at(PULSES + ring).load(Ordering::Acquire)
    }

    /// Whether the worker that took over last has completed a batch.
    pub fn has_got_further(&self) -> bool {
        self.pulses() != self.at_takeover
    }

    /// Whether a queue is at a batch.
    pub fn is_busy(&self) -> bool {
        (0..self.seen.len()).any(|ring| self.pulse(ring) & 1 != 0)
    }

    /// How many requests wait for room.
    pub fn held(&self) -> u64 {
        self.numbers.at(HELD).load(Ordering::Acquire)
    }

    /// Whether a sync has failed.
    pub fn is_latched(&self) -> bool {
        self.numbers.at(LATCH).load(Ordering::Acquire) != 0
    }

    fn begin_watching(&mut self) {
        let now = Instant::now();
        self.seen.iter_mut().for_each(|(_, since)| *since = now);
        self.numbers.at(WATCHED).store(1, Ordering::Release);
        self.next = Some(now + LOOK_INTERVAL);
        self.ends = false;
    }

    /// A worker has asked to be watched.
    pub fn woken(&mut self) {
        // Its count says nothing.
        let _ = events::drain(&self.wake);
        self.begin_watching();
    }

    /// How long to wait at most until [`Watch::look`] is called, in milliseconds; -1: it need not be.
    pub fn timeout_ms(&self) -> i32 {
        let left = |next: Instant| next.saturating_duration_since(Instant::now()).as_millis() as i32 + 1;
        self.next.map_or(-1, left)
    }

    /// Looks, if it is time to. Which ring's queue has been stuck in one batch for too long, if any is.
    pub fn look(&mut self) -> Option<usize> {
        let now = Instant::now();
        if self.next.is_none_or(|next| now < next) {
            return None;
        }
        self.next = Some(now + LOOK_INTERVAL);
        let is_held = self.held() != 0;
        let mut is_quiet = true;
        for ring in 0..self.seen.len() {
            let pulse = self.pulse(ring);
            let (seen, since) = &mut self.seen[ring];
            if *seen != pulse || is_held {
                (*seen, *since) = (pulse, now);
                is_quiet = false;
            } else if pulse & 1 != 0 {
                is_quiet = false;
                if now - *since >= WEDGED_AFTER {
                    return Some(ring);
                }
            }
        }
        if is_quiet && self.ends {
            // What has begun since a worker could see that nobody watches has woken the keeper; what began before has shown by now.
            self.next = None;
        } else if is_quiet {
            self.ends = true;
            self.numbers.at(WATCHED).store(0, Ordering::Release);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_wakes_the_keeper_once_and_quiet_ends_the_watch() {
        let memory = create().unwrap();
        let mut watch = Watch::over(memory.try_clone().unwrap(), 2).unwrap();
        let vitals = Vitals::map(&memory, watch.wake.try_clone().unwrap()).unwrap();
        assert_eq!(watch.timeout_ms(), -1);
        vitals.begin(1);
        vitals.end(1);
        vitals.begin(1);
        assert_eq!(events::drain(&watch.wake).unwrap(), 1, "woken once");
        watch.woken();
        assert!(watch.timeout_ms() > 0);
        vitals.end(1);
        let look = |watch: &mut Watch| {
            watch.next = Some(Instant::now());
            watch.look()
        };
        assert_eq!(look(&mut watch), None);
        assert!(watch.timeout_ms() > 0, "something has happened");
        assert_eq!(look(&mut watch), None);
        assert!(watch.timeout_ms() > 0, "nothing has, and one more look");
        assert_eq!(look(&mut watch), None);
        assert_eq!(watch.timeout_ms(), -1, "nothing has");
        vitals.begin(0);
        assert_eq!(events::drain(&watch.wake).unwrap(), 1, "woken again");
    }

    /// As a processor may have it that shows what it writes later than it reads.
    #[test]
    fn a_batch_that_begins_as_the_watch_ends_is_watched() {
        let memory = create().unwrap();
        let mut watch = Watch::resume(memory.try_clone().unwrap(), 2).unwrap();
        let vitals = Vitals::map(&memory, watch.wake.try_clone().unwrap()).unwrap();
        let look = |watch: &mut Watch| {
            assert!(watch.timeout_ms() >= 0, "nobody looks any more");
            watch.next = Some(Instant::now());
            watch.look()
        };
        assert_eq!(look(&mut watch), None);
        vitals.pulse(1).fetch_or(1, Ordering::Relaxed);
        assert_eq!(look(&mut watch), None);
        watch.seen[1].1 -= WEDGED_AFTER;
        assert_eq!(look(&mut watch), Some(1), "nobody was woken, and it is found");
    }

    #[test]
    fn a_queue_that_is_stuck_is_found_and_a_takeover_starts_over() {
        let memory = create().unwrap();
        let mut watch = Watch::over(memory.try_clone().unwrap(), 2).unwrap();
        let vitals = Vitals::map(&memory, watch.wake.try_clone().unwrap()).unwrap();
        watch.taken_over();
        assert!(!watch.has_got_further());
        vitals.begin(1);
        watch.next = Some(Instant::now());
        assert_eq!(watch.look(), None);
        watch.seen[1].1 -= WEDGED_AFTER;
        watch.next = Some(Instant::now());
        assert_eq!(watch.look(), Some(1));
        vitals.end(1);
        assert!(watch.has_got_further());
        watch.taken_over();
        assert!(!watch.has_got_further());
    }
}
