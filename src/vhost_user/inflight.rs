//! [`Inflight`]: which requests of a ring were taken and are not complete, kept where the death of the worker cannot reach it.
//!
//! A region of memory has a slot for each ring. It is the keeper's own, or the front end's when it offers one (`INFLIGHT_SHMFD`); both are
//! laid out as the protocol says for split rings, so a region can come from another backend and go to one. A slot, all numbers
//! little-endian:
//!
//! | field | bytes | meaning |
//! |---|---|---|
//! | features | 8 | by how much the available index was ahead of the used one when the ring was first served: 0 but for odd front ends |
//! | version | 2 | 1; 0: not used yet |
//! | size | 2 | entries that follow: the ring's size |
//! | last | 2 | head of the request that was completed last |
//! | used | 2 | the used index as of the last batch whose entries below are all cleared |
//! | entries | 16 each | for each head: in flight (1), padding (5), the head completed before it (2), when it was taken (8) |
//!
//! The order of the steps is what makes it safe to die between any two of them:
//!
//! - **Take**: note when, then "in flight". Before the second, the request was never taken.
//! - **Complete a batch**: chain the heads, write the used elements, show them with one store of the used index; only then clear "in flight",
//!   then note the used index. A successor that finds the used index ahead of the noted one knows that as many heads, from the last one on,
//!   are complete, whatever their entries say.
//! - **Recover**: clear those, note the used index. What is still in flight was taken and never shown as complete: it is carried out again, in
//!   the order of taking. The next request to take follows from the used index and their number.
//!
//! A front end writes what it likes into a region of its own: every number is checked.

use std::fs::File;
use std::io;

use crate::sys::guest::SharedArea;
use crate::sys::shared;

use super::ring::RING_SIZE_MAX;
use super::steps::{self, Step};

const SKEW_AT: usize = 0;
const VERSION_AT: usize = 8;
const SIZE_AT: usize = 10;
const LAST_AT: usize = 12;
const USED_AT: usize = 14;
const ENTRIES_AT: usize = 16;
const ENTRY_BYTES: usize = 16;
const IN_FLIGHT_AT: usize = 0;
const BEFORE_AT: usize = 6;
const TAKEN_AT: usize = 8;

const VERSION: u16 = 1;
/// What a slot's place is a multiple of.
const SLOT_ALIGN: u64 = 64;

/// Where the slots of a region lie in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RegionShape {
    /// Offset of the first slot, in bytes.
    pub offset: u64,
    /// Length of all slots, in bytes.
    pub bytes: u64,
    /// How many there are: one for each ring.
    pub slots: u16,
    /// The largest ring that fits into a slot, in descriptors.
    pub ring_size: u16,
}

/// Why a region, or a slot of it, cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InflightError {
    /// A region that cannot be.
    #[error(
        "an inflight region of {bytes} bytes at {offset} for {slots} rings of {ring_size}: expected at least {expected} bytes"
    )]
    Region { offset: u64, bytes: u64, slots: u16, ring_size: u16, expected: u64 },
    /// The ring has none.
    #[error(
        "the inflight region has {slots} slots for rings of up to {ring_size}, and none for ring {index} of {size}"
    )]
    NoSlot { index: u16, size: u16, slots: u16, ring_size: u16 },
    /// Written by something else.
    #[error(
        "the inflight slot has version {version} and features {features:#x}, expected version 1 and none that are not known"
    )]
    Version { version: u16, features: u64 },
    /// Of another ring.
    #[error("the inflight slot is for a ring of {found} descriptors, and this one has {size}")]
    Size { found: u16, size: u16 },
    /// It tells of a past that the ring does not have.
    #[error("the inflight slot was left at used index {noted}, and the ring is at {used}: that is not its past")]
    Past { noted: u16, used: u16 },
    /// It names a head that cannot be.
    #[error("the inflight slot names head {head}, and the ring has {size} descriptors")]
    Head { head: u16, size: u16 },
}

impl RegionShape {
    /// Room for so many rings of such a size, from the start of a file.
    pub fn new(slots: u16, ring_size: u16) -> RegionShape {
        let mut shape = RegionShape { offset: 0, bytes: 0, slots, ring_size };
        shape.bytes = shape.expected();
        shape
    }

    /// Bytes from one slot to the next.
    fn stride(&self) -> u64 {
        // As other backends have it. Two bytes stand for the sixteen of the head; with the rounding it is enough for every size.
        (u64::from(self.ring_size) * ENTRY_BYTES as u64 + 2).next_multiple_of(SLOT_ALIGN)
    }

    fn expected(&self) -> u64 {
        self.stride() * u64::from(self.slots)
    }

    /// Sees that the numbers can be.
    pub fn check(&self) -> Result<(), InflightError> {
        let RegionShape { offset, bytes, slots, ring_size } = *self;
        let is_size = (1..=RING_SIZE_MAX).contains(&ring_size);
        if !is_size || slots == 0 || bytes < self.expected() || !offset.is_multiple_of(SLOT_ALIGN) {
            return Err(InflightError::Region { offset, bytes, slots, ring_size, expected: self.expected() });
        }
        Ok(())
    }

    /// Offset in the region of ring `index`'s slot, and its length for a ring of `size`.
    pub fn slot(&self, index: u16, size: u16) -> Result<(u64, usize), InflightError> {
        let RegionShape { slots, ring_size, .. } = *self;
        if index >= slots || size > ring_size {
            return Err(InflightError::NoSlot { index, size, slots, ring_size });
        }
        Ok((u64::from(index) * self.stride(), ENTRIES_AT + usize::from(size) * ENTRY_BYTES))
    }

    /// Makes a ring's slot one that was never used. What it held is of no use any more.
    pub fn clear(&self, file: &File, index: u16) -> io::Result<()> {
        crate::sys::file::punch_hole(file, self.offset + u64::from(index) * self.stride(), self.stride())
    }
}

/// New memory for a region. It takes memory only where rings are served.
pub fn create(shape: &RegionShape) -> io::Result<File> {
    shared::create(c"pando-inflight", shape.offset + shape.bytes)
}

/// The account of a ring that is served.
pub struct Inflight {
    slot: SharedArea,
    size: u16,
    /// Numbers the requests in the order in which they are taken.
    taken: u64,
    /// The head that was completed last.
    last: u16,
    /// Heads that are complete and not shown yet.
    complete: Vec<u16>,
}

/// Where a ring goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Index of the next entry of the available ring to take.
    pub next_available: u16,
    /// Heads that were taken and are not complete, in the order of taking.
    pub in_flight: Vec<u16>,
}

impl Inflight {
    /// Takes over the slot of a ring of `size` whose used index is `used`. One that was never used starts at `next_available`.
    pub fn start(
        slot: SharedArea,
        size: u16,
        used: u16,
        next_available: u16,
    ) -> Result<(Inflight, Recovered), InflightError> {
        let mut inflight = Inflight { slot, size, taken: 0, last: 0, complete: Vec::new() };
        let version = inflight.slot.load(VERSION_AT);
        let recovered = if version == 0 {
            inflight.begin(used, next_available);
            Recovered { next_available, in_flight: Vec::new() }
        } else {
            inflight.recover(version, used)?
        };
        Ok((inflight, recovered))
    }

    fn begin(&self, used: u16, next_available: u16) {
        for head in 0..self.size {
            self.set_in_flight(head, 0);
        }
        self.slot.write(SKEW_AT, u64::from(next_available.wrapping_sub(used)).to_le_bytes());
        self.slot.store_release(SIZE_AT, self.size);
        self.slot.store_release(LAST_AT, 0);
        self.slot.store_release(USED_AT, used);
        steps::reach(Step::Begin);
        self.slot.store_release(VERSION_AT, VERSION);
    }

    fn recover(&mut self, version: u16, used: u16) -> Result<Recovered, InflightError> {
        let features = u64::from_le_bytes(self.slot.read(SKEW_AT));
        let Some(skew) = u16::try_from(features).ok().filter(|_| version == VERSION) else {
            return Err(InflightError::Version { version, features });
        };
        let found = self.slot.load(SIZE_AT);
        if found != self.size {
            return Err(InflightError::Size { found, size: self.size });
        }
        self.last = self.slot.load(LAST_AT);
        let noted = self.slot.load(USED_AT);
        let shown = used.wrapping_sub(noted);
        if shown > self.size {
            return Err(InflightError::Past { noted, used });
        }
        let mut head = self.last;
        for _ in 0..shown {
            if head >= self.size {
                return Err(InflightError::Head { head, size: self.size });
            }
            self.set_in_flight(head, 0);
            steps::reach(Step::RecoverClear);
            head = self.slot.load(self.entry(head) + BEFORE_AT);
        }
        self.slot.store_release(USED_AT, used);
        steps::reach(Step::RecoverUsed);
        let mut in_flight: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.is_in_flight(*head))
            .map(|head| (u64::from_le_bytes(self.slot.read(self.entry(head) + TAKEN_AT)), head))
            .collect();
        in_flight.sort_unstable();
        self.taken = in_flight.last().map_or(0, |(taken, _)| taken.wrapping_add(1));
        Ok(Recovered {
            next_available: used.wrapping_add(skew).wrapping_add(in_flight.len() as u16),
            in_flight: in_flight.into_iter().map(|(_, head)| head).collect(),
        })
    }

    /// Where a head's entry lies. The head is less than the size.
    #[inline]
    fn entry(&self, head: u16) -> usize {
        ENTRIES_AT + usize::from(head) * ENTRY_BYTES
    }

    #[inline]
    fn is_in_flight(&self, head: u16) -> bool {
        self.slot.load(self.entry(head) + IN_FLIGHT_AT) & 0xff != 0
    }

    /// Two bytes: the flag, and one of padding.
    #[inline]
    fn set_in_flight(&self, head: u16, value: u16) {
        self.slot.store_release(self.entry(head) + IN_FLIGHT_AT, value);
    }

    /// Notes that a request was taken; `false`, and nothing noted, when it is in flight already.
    #[inline]
    pub fn take(&mut self, head: u16) -> bool {
        if self.is_in_flight(head) {
            return false;
        }
        self.slot.write(self.entry(head) + TAKEN_AT, self.taken.to_le_bytes());
        self.taken = self.taken.wrapping_add(1);
        steps::reach(Step::TakeNumber);
        self.set_in_flight(head, 1);
        steps::reach(Step::TakeFlag);
        true
    }

    /// Notes that a request is complete, ahead of its used element.
    #[inline]
    pub fn complete(&mut self, head: u16) {
        self.slot.store_release(self.entry(head) + BEFORE_AT, self.last);
        steps::reach(Step::CompleteBefore);
        self.slot.store_release(LAST_AT, head);
        steps::reach(Step::CompleteLast);
        self.last = head;
        self.complete.push(head);
    }

    /// Notes that all that is complete has been shown to the driver, by the used index `used`.
    #[inline]
    pub fn shown(&mut self, used: u16) {
        for head in &self.complete {
            self.set_in_flight(*head, 0);
            steps::reach(Step::ShownClear);
        }
        self.complete.clear();
        self.slot.store_release(USED_AT, used);
        steps::reach(Step::ShownUsed);
    }
}
