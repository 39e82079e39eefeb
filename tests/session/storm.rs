//! [`Storm`]: verified work on one of several queues of a disk, without a pause: as many requests run as fit, of all kinds.
//!
//! Each queue has sectors of its own. In the disk's first half they lie among those of the others, so that queues write to the same
//! clusters; its second half is divided among the queues, and there requests are larger, and whole clusters are discarded.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};

use super::harness::{PATIENCE, SECTOR};
use super::queue::{Completed, DISCARD, FLUSH, IN, OK, OUT, Queue, WRITE_ZEROES, range_bytes};

/// Sectors of a cluster.
const CLUSTER: usize = 8;

/// Work on one queue.
pub struct Storm {
    pub queue: Queue,
    number: usize,
    of: usize,
    /// What the disk holds, where it is this queue's.
    model: Vec<u8>,
    rng: SmallRng,
    running: HashMap<u16, (u32, Range<usize>)>,
    /// How many requests have completed.
    pub completed: u64,
    /// The same, for others to see while it works.
    pub progress: Arc<AtomicU64>,
    /// The longest time without a completion.
    pub longest: Duration,
}

impl Storm {
    /// Work for queue `number` of `of` (at most 4), over a disk with these contents.
    pub fn new(queue: Queue, number: usize, of: usize, contents: &[u8], seed: u64) -> Storm {
        Storm {
            queue,
            number,
            of,
            model: contents.to_vec(),
            rng: SmallRng::seed_from_u64(seed ^ (number as u64) << 32),
            running: HashMap::new(),
            completed: 0,
            progress: Arc::default(),
            longest: Duration::ZERO,
        }
    }

    /// The queue that a sector belongs to.
    fn owner(sector: usize, of: usize, sectors: usize) -> usize {
        let half = sectors / 2;
        if sector < half { (sector % CLUSTER) * of / CLUSTER } else { (sector - half) * of / (sectors - half) }
    }

    fn own_range(&mut self) -> (u32, Range<usize>) {
        let sectors = self.model.len() / SECTOR;
        let half = sectors / 2;
        if self.rng.random() {
            let per_cluster = CLUSTER / self.of;
            let start = self.rng.random_range(0..half / CLUSTER) * CLUSTER + self.number * per_cluster;
            let len = self.rng.random_range(1..=per_cluster);
            let kind = if self.rng.random_range(0..3) == 0 { IN } else { OUT };
            return (kind, start..start + len);
        }
        let share = (sectors - half) / self.of;
        let first = half + self.number * share;
        let len = self.rng.random_range(1..=64.min(share));
        let start = first + self.rng.random_range(0..=share - len);
        match self.rng.random_range(0..16) {
            0..=5 => (IN, start..start + len),
            6..=12 => (OUT, start..start + len),
            13 => (WRITE_ZEROES, start..start + len),
            _ => {
                // Whole clusters: what is left of others keeps its contents.
                let (start, end) = (start.next_multiple_of(CLUSTER), (start + len) / CLUSTER * CLUSTER);
                if start < end { (DISCARD, start..end) } else { (FLUSH, 0..0) }
            }
        }
    }

    /// Puts another request on the ring, unless what it would touch is in use.
    fn submit(&mut self) {
        let (kind, range) = if self.rng.random_range(0..24) == 0 { (FLUSH, 0..0) } else { self.own_range() };
        let overlaps = |(_, other): &(u32, Range<usize>)| range.start < other.end && other.start < range.end;
        if self.running.values().any(overlaps) {
            return;
        }
        let bytes = range.start * SECTOR..range.end * SECTOR;
        let ranges = range_bytes(&[(range.start as u64, range.len() as u32, 0)]);
        let head = match kind {
            IN => self.queue.submit(IN, range.start as u64, &[], bytes.len()),
            OUT => {
                self.rng.fill_bytes(&mut self.model[bytes.clone()]);
                self.queue.submit(OUT, range.start as u64, &self.model[bytes], 0)
            }
            FLUSH => self.queue.submit(FLUSH, 0, &[], 0),
            kind => {
                self.model[bytes].fill(0);
                self.queue.submit(kind, 0, &ranges, 0)
            }
        };
        self.running.insert(head, (kind, range));
    }

    #[track_caller]
    fn take(&mut self) {
        let begun = Instant::now();
        let Some((head, Completed { status, len, data })) = self.queue.wait(PATIENCE) else {
            panic!("queue {}: {} requests never complete", self.number, self.running.len())
        };
        self.longest = self.longest.max(begun.elapsed());
        let (kind, range) = self.running.remove(&head).expect("a completion of a request that runs");
        assert_eq!(status, OK, "queue {}: a request of type {kind} over {range:?}", self.number);
        if kind == IN {
            let bytes = range.start * SECTOR..range.end * SECTOR;
            assert_eq!(len as usize, bytes.len() + 1);
            assert!(
                data == self.model[bytes],
                "queue {}: what is read at {range:?} is not what was written",
                self.number
            );
        }
        self.completed += 1;
        self.progress.store(self.completed, Ordering::Relaxed);
    }

    /// Works until told to stop, and then until all is complete.
    #[track_caller]
    pub fn run(&mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Acquire) {
            for _ in 0..4 {
                if self.queue.has_room() {
                    self.submit();
                }
            }
            self.queue.ring.kick();
            if !self.running.is_empty() {
                self.take();
            }
        }
        self.settle();
    }

    /// Works for so many requests, and until all of them are complete.
    #[track_caller]
    pub fn run_for(&mut self, requests: usize) {
        let ends = self.completed + requests as u64;
        while self.completed < ends {
            while self.queue.has_room() && self.running.len() < 8 {
                self.submit();
            }
            self.queue.ring.kick();
            self.take();
        }
        self.settle();
    }

    /// Puts as many requests on the ring as fit, and does not wait for them.
    pub fn fill(&mut self) {
        for _ in 0..64 {
            if self.queue.has_room() {
                self.submit();
            }
        }
        self.queue.ring.kick();
    }

    /// As [`Storm::fill`], without a kick: whoever sleeps goes on doing so.
    pub fn prepare(&mut self) {
        for _ in 0..16 {
            if self.queue.has_room() {
                self.submit();
            }
        }
    }

    /// Waits until all is complete.
    #[track_caller]
    pub fn settle(&mut self) {
        while !self.running.is_empty() {
            self.take();
        }
    }

    /// What the whole disk holds, by the work on all its queues.
    pub fn merge(storms: &[Storm]) -> Vec<u8> {
        let mut contents = storms[0].model.clone();
        let sectors = contents.len() / SECTOR;
        for sector in 0..sectors {
            let bytes = sector * SECTOR..(sector + 1) * SECTOR;
            let owner = &storms[Storm::owner(sector, storms.len(), sectors)];
            contents[bytes.clone()].copy_from_slice(&owner.model[bytes]);
        }
        contents
    }
}
