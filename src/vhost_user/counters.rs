//! What a worker has done, counted in memory that it shares with whoever wants to know.
//!
//! No call and no lock: each ring's thread adds to numbers of its own, and a reader adds up those of all rings whenever it
//! likes. Numbers go on over a worker's death, for they lie in the memory and nowhere else. A reader believes nothing: whatever
//! stands there is a number.
//!
//! ```text
//! block of ring 0 | block of ring 1 | ...          a block: 2048 bytes, 256 numbers
//!
//! block: for each kind: requests | bytes | failed | nanoseconds | 24 buckets
//!                           then bytes read from base | delta | zeros, and requests that had to wait for room
//! ```
//!
//! A request's time is that of its batch, from when the batch was taken to when all of it was shown to the driver: that is what its driver
//! waits for, and two looks at the clock are enough for a whole batch.

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::block::Sources;
use crate::sys::shared::{self, SharedNumbers};

/// Rings that have numbers of their own; those beyond share the last one's, and may then lose some.
const RINGS: usize = 256;
/// Numbers in a ring's block.
const BLOCK: usize = 256;

/// Kinds of requests that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    /// GET_ID, and what was refused.
    Other,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 6] = [Kind::Read, Kind::Write, Kind::Flush, Kind::Discard, Kind::WriteZeroes, Kind::Other];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Flush => "flush",
            Kind::Discard => "discard",
            Kind::WriteZeroes => "write_zeroes",
            Kind::Other => "other",
        }
    }
}

/// Buckets of times: the first holds those below 1.024 µs, each other one those up to twice as long, the last all that are longer.
pub const BUCKETS: usize = 24;
/// The first bucket's limit is two to this power, in nanoseconds.
const FIRST_BUCKET_EXPONENT: u32 = 10;

/// The times that bucket `index` holds are below this many nanoseconds; `None`: without limit.
pub const fn bucket_limit_ns(index: usize) -> Option<u64> {
    if index + 1 < BUCKETS { Some(1 << (FIRST_BUCKET_EXPONENT as usize + index)) } else { None }
}

fn bucket_of(ns: u64) -> usize {
    let above = (u64::BITS - ns.leading_zeros()).saturating_sub(FIRST_BUCKET_EXPONENT) as usize;
    above.min(BUCKETS - 1)
}

const OF_KIND: usize = 4 + BUCKETS;
const SOURCES_AT: usize = Kind::ALL.len() * OF_KIND;
const HELD_AT: usize = SOURCES_AT + 3;
const _: () = assert!(HELD_AT < BLOCK);
const _: () = assert!(RINGS * BLOCK * 8 <= 1 << 20);

/// A new piece of memory for counters, all of them zero. What is not counted in takes no memory.
pub fn create() -> io::Result<File> {
    shared::create(c"pando-counters", (RINGS * BLOCK * size_of::<u64>()) as u64)
}

/// Counters, mapped to count in.
pub struct Counters {
    numbers: SharedNumbers,
}

impl Counters {
    /// Maps the memory that [`create`] made.
    pub fn map(file: &File) -> io::Result<Counters> {
        Ok(Counters { numbers: SharedNumbers::map(file, RINGS * BLOCK)? })
    }

    /// Adds to a ring's number. One thread at a time counts for a ring.
    #[inline]
    fn add(&self, ring: u16, index: usize, more: u64) {
        let number = self.numbers.at(usize::from(ring).min(RINGS - 1) * BLOCK + index);
        // Not `fetch_add`: nobody else writes here, and this is no locked instruction.
        number.store(number.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }
}

impl Counters {
    /// A request has to wait for room.
    pub fn count_held(&self, ring: u16) {
        self.add(ring, HELD_AT, 1);
    }
}

/// What a batch has done, until it is counted.
#[derive(Default)]
pub struct Tally {
    kinds: [Counted; Kind::ALL.len()],
    /// Bytes that were read, by where they came from.
    pub sources: Sources,
}

#[derive(Clone, Copy, Default)]
struct Counted {
    requests: u64,
    bytes: u64,
    failed: u64,
}

impl Tally {
    /// Notes a request.
    #[inline]
    pub fn note(&mut self, kind: Kind, bytes: u64, failed: bool) {
        let counted = &mut self.kinds[kind as usize];
        counted.requests += 1;
        counted.bytes += bytes;
        counted.failed += u64::from(failed);
    }

    /// Counts all that was noted, in a batch that took so long, and forgets it.
    #[inline]
    pub fn count(&mut self, counters: &Counters, ring: u16, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let bucket = bucket_of(ns);
        for (kind, counted) in self.kinds.iter().enumerate().filter(|(_, counted)| counted.requests > 0) {
            let at = kind * OF_KIND;
            counters.add(ring, at, counted.requests);
            counters.add(ring, at + 1, counted.bytes);
            if counted.failed > 0 {
                counters.add(ring, at + 2, counted.failed);
            }
            counters.add(ring, at + 3, ns.saturating_mul(counted.requests));
            counters.add(ring, at + 4 + bucket, counted.requests);
        }
        let Sources { base, delta, zero } = self.sources;
        for (source, bytes) in [base, delta, zero].into_iter().enumerate().filter(|(_, bytes)| *bytes > 0) {
            counters.add(ring, SOURCES_AT + source, bytes);
        }
        *self = Tally::default();
    }
}

/// What was counted for one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OfKind {
    pub requests: u64,
    pub bytes: u64,
    pub failed: u64,
    /// How long they took in all.
    pub ns: u64,
    /// How many of them took how long ([`bucket_limit_ns`]).
    pub buckets: [u64; BUCKETS],
}

/// What was counted until now, over all rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    kinds: [OfKind; Kind::ALL.len()],
    pub sources: Sources,
    /// Requests that had to wait for room.
    pub held: u64,
}

impl Snapshot {
    /// What was counted for a kind of request.
    pub fn of(&self, kind: Kind) -> &OfKind {
        &self.kinds[kind as usize]
    }
}

/// Counters, mapped to read.
pub struct Reader {
    numbers: SharedNumbers,
    rings: usize,
}

impl Reader {
    /// Maps the memory in which `rings` rings are counted.
    pub fn open(file: &File, rings: u16) -> io::Result<Reader> {
        let rings = usize::from(rings).clamp(1, RINGS);
        Ok(Reader { numbers: SharedNumbers::map(file, rings * BLOCK)?, rings })
    }

    /// Adds up all rings.
    pub fn snapshot(&self) -> Snapshot {
        let sum = |index: usize| {
            let of_rings = (0..self.rings).map(|ring| self.numbers.at(ring * BLOCK + index).load(Ordering::Relaxed));
            of_rings.fold(0, u64::wrapping_add)
        };
        let mut snapshot = Snapshot::default();
        for (kind, of) in snapshot.kinds.iter_mut().enumerate() {
            let at = kind * OF_KIND;
            *of = OfKind {
                requests: sum(at),
                bytes: sum(at + 1),
                failed: sum(at + 2),
                ns: sum(at + 3),
                buckets: std::array::from_fn(|bucket| sum(at + 4 + bucket)),
            };
        }
        snapshot.sources = Sources { base: sum(SOURCES_AT), delta: sum(SOURCES_AT + 1), zero: sum(SOURCES_AT + 2) };
        snapshot.held = sum(HELD_AT);
        snapshot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rings_count_adds_up() {
        let file = create().unwrap();
        let reader = Reader::open(&file, 4).unwrap();
        for ring in [0, 3] {
            // Two workers, one after the other.
            for _ in 0..2 {
                let counters = Counters::map(&file).unwrap();
                let mut tally = Tally::default();
                tally.note(Kind::Read, 4096, false);
                tally.note(Kind::Read, 0, true);
                tally.sources = Sources { base: 4000, delta: 96, zero: 0 };
                tally.count(&counters, ring, Duration::from_nanos(1500));
                tally.count(&counters, ring, Duration::from_nanos(1500));
            }
        }
        let snapshot = reader.snapshot();
        let read = snapshot.of(Kind::Read);
        assert_eq!((read.requests, read.bytes, read.failed, read.ns), (8, 4 * 4096, 4, 8 * 1500));
        assert_eq!((read.buckets[1], read.buckets.iter().sum::<u64>()), (8, 8));
        assert_eq!(snapshot.sources, Sources { base: 16000, delta: 384, zero: 0 });
        assert_eq!(*snapshot.of(Kind::Write), OfKind::default());
    }

    #[test]
    fn times_fall_into_buckets_by_their_limits() {
        for ns in [0, 1, 1023, 1024, 1_000_000, 1 << 33, u64::MAX] {
            let bucket = bucket_of(ns);
            assert!(bucket_limit_ns(bucket).is_none_or(|limit| ns < limit), "{ns}");
            assert!(bucket == 0 || bucket_limit_ns(bucket - 1).is_some_and(|limit| ns >= limit), "{ns}");
        }
    }
}
