//! What to ask of a disk: order, mix, sizes. A workload is data; `Walker` turns it into requests.
//!
//! Knows nothing of queues' workings or of backends.

use serde::Serialize;

use crate::drive::Client;
use crate::permutation::Permutation;
use crate::request::{Operation, Part, Request};

/// In which order blocks are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Any block, again and again.
    Random,
    /// Every block once, in a random order, then stop.
    Once,
    /// One after the other, from the start again after the end.
    Sequential,
    /// One after the other to the end, then stop.
    Pass,
    /// Every second block to the end, then stop.
    Alternate,
    /// Any block of the first eighth, and for every tenth request any of the rest, which is not timed.
    MostlyFront,
}

/// Which operations, in which proportion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mix {
    Read,
    Write,
    /// Seven reads to three writes.
    ReadWrite,
    /// A write, then a flush after it; the pair counts as one request.
    WriteFlush,
    Flush,
    Discard,
    WriteZeroes,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Workload {
    pub order: Order,
    pub mix: Mix,
    pub block_bytes: u32,
    /// Requests in flight in each queue.
    pub depth: usize,
    /// The part of the disk that is visited, from its start.
    pub range_bytes: u64,
    /// Stop after this many requests in each queue.
    pub requests_max: Option<u64>,
}

impl Workload {
    /// The requests of this workload, for `queues` queues together.
    pub fn walker(&self, queues: usize, seed: u64) -> Walker {
        let blocks = self.range_bytes / u64::from(self.block_bytes);
        assert!(blocks >= queues as u64, "a range of {blocks} blocks for {queues} queues");
        Walker {
            workload: *self,
            queues: queues as u64,
            blocks,
            permutation: Permutation::new(blocks, seed),
            random: fastrand::Rng::with_seed(seed),
            steps: vec![0; queues],
            flush_next: vec![vec![false; self.depth]; queues],
        }
    }
}

/// A workload on its way.
#[derive(Debug)]
pub struct Walker {
    workload: Workload,
    queues: u64,
    blocks: u64,
    permutation: Permutation,
    random: fastrand::Rng,
    /// Blocks that each queue has visited.
    steps: Vec<u64>,
    /// Whether a slot owes the second half of its pair.
    flush_next: Vec<Vec<bool>>,
}

impl Walker {
    fn front_blocks(&self) -> u64 {
        (self.blocks / 8).max(1)
    }

    /// The next block for a queue. Queues share the random orders, and split the others in parts.
    fn block(&mut self, queue: usize) -> Option<u64> {
        let step = self.steps[queue];
        if self.workload.requests_max.is_some_and(|max| step >= max) {
            return None;
        }
        self.steps[queue] += 1;
        let part = self.blocks / self.queues;
        let start = part * queue as u64;
        match self.workload.order {
            Order::Random => Some(self.random.u64(..self.blocks)),
            Order::Once => {
                let index = step * self.queues + queue as u64;
                (index < self.blocks).then(|| self.permutation.at(index))
            }
            Order::Sequential => Some(start + step % part),
            Order::Pass => (step < part).then_some(start + step),
            Order::Alternate => (step * 2 < part).then_some(start + step * 2),
            Order::MostlyFront => {
                let front = self.front_blocks();
                Some(if step % 10 == 9 { self.random.u64(front..self.blocks) } else { self.random.u64(..front) })
            }
        }
    }
}

impl Client for Walker {
    fn next(&mut self, queue: usize, slot: usize) -> Option<Request> {
        if self.workload.mix == Mix::WriteFlush && self.flush_next[queue][slot] {
            self.flush_next[queue][slot] = false;
            let operation = Operation::Flush;
            return Some(Request { operation, offset: 0, bytes: 0, part: Part::Last });
        }
        let block = self.block(queue)?;
        let (operation, part) = match self.workload.mix {
            Mix::Read => (Operation::Read, Part::Whole),
            Mix::Write => (Operation::Write, Part::Whole),
            Mix::ReadWrite if self.random.u8(..10) < 7 => (Operation::Read, Part::Whole),
            Mix::ReadWrite => (Operation::Write, Part::Whole),
            Mix::WriteFlush => {
                self.flush_next[queue][slot] = true;
                (Operation::Write, Part::First)
            }
            Mix::Flush => (Operation::Flush, Part::Whole),
            Mix::Discard => (Operation::Discard, Part::Whole),
            Mix::WriteZeroes => (Operation::WriteZeroes, Part::Whole),
        };
        let bytes = if operation == Operation::Flush { 0 } else { self.workload.block_bytes };
        let offset = block * u64::from(self.workload.block_bytes);
        Some(Request { operation, offset, bytes, part })
    }

    fn is_timed(&self, request: &Request) -> bool {
        let front = self.front_blocks() * u64::from(self.workload.block_bytes);
        self.workload.order != Order::MostlyFront || request.offset < front
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKLOAD: Workload = Workload {
        order: Order::Once,
        mix: Mix::Write,
        block_bytes: 4096,
        depth: 2,
        range_bytes: 1000 * 4096,
        requests_max: None,
    };

    fn blocks(workload: &Workload, queues: usize, limit: usize) -> Vec<u64> {
        let mut walker = workload.walker(queues, 1);
        let mut blocks = Vec::new();
        for queue in 0..queues {
            while let Some(request) = walker.next(queue, 0) {
                blocks.push(request.offset / 4096);
                if blocks.len() == limit {
                    return blocks;
                }
            }
        }
        blocks
    }

    #[test]
    fn once_visits_every_block_once_over_all_queues() {
        for queues in 1..5 {
            let mut seen = blocks(&WORKLOAD, queues, usize::MAX);
            assert_ne!(seen[..3], [0, 1, 2]);
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..1000), "{queues} queues");
        }
        let limited = Workload { requests_max: Some(10), ..WORKLOAD };
        assert_eq!(blocks(&limited, 2, usize::MAX).len(), 20);
    }

    #[test]
    fn sequential_orders() {
        let pass = Workload { order: Order::Pass, ..WORKLOAD };
        assert!(blocks(&pass, 2, usize::MAX).into_iter().eq(0..1000));
        let alternate = Workload { order: Order::Alternate, ..WORKLOAD };
        assert!(blocks(&alternate, 1, usize::MAX).into_iter().eq((0..1000).step_by(2)));
        let sequential = Workload { order: Order::Sequential, ..WORKLOAD };
        assert_eq!(blocks(&sequential, 1, 1002)[998..], [998, 999, 0, 1]);
    }

    #[test]
    fn nine_in_ten_are_of_the_front_and_timed() {
        let mut walker = Workload { order: Order::MostlyFront, ..WORKLOAD }.walker(1, 1);
        let requests: Vec<_> = (0..100).filter_map(|_| walker.next(0, 0)).collect();
        assert!(requests.iter().all(|request| (request.offset < 125 * 4096) == walker.is_timed(request)));
        assert_eq!(requests.iter().filter(|request| walker.is_timed(request)).count(), 90);
    }

    #[test]
    fn pairs_belong_to_their_slot() {
        let mut walker = Workload { mix: Mix::WriteFlush, ..WORKLOAD }.walker(1, 1);
        let mut next = |slot| walker.next(0, slot).map(|request| (request.operation, request.part));
        assert_eq!(next(0), Some((Operation::Write, Part::First)));
        assert_eq!(next(1), Some((Operation::Write, Part::First)));
        assert_eq!(next(0), Some((Operation::Flush, Part::Last)));
        assert_eq!(next(0), Some((Operation::Write, Part::First)));
        assert_eq!(next(1), Some((Operation::Flush, Part::Last)));
    }

    #[test]
    fn the_mix_is_seven_to_three() {
        let workload = Workload { mix: Mix::ReadWrite, order: Order::Random, ..WORKLOAD };
        let mut walker = workload.walker(1, 1);
        let reads = (0..10_000).filter(|_| walker.next(0, 0).is_some_and(|it| it.operation == Operation::Read)).count();
        assert!((6_800..7_200).contains(&reads), "{reads}");
    }
}
