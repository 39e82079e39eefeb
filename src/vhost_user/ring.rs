//! [`Ring`]: a split virtqueue in guest memory, from the device's side (virtio 1.3, section 2.7).
//!
//! Works on the guest's bytes as they lie in memory: an index is read once, checked, and it is the copy that counts. Completions are
//! written one by one and published together, with one store and at most one notification. Knows nothing of what a
//! request says.

use std::sync::Arc;

use crate::sys::buffers::{Readable, Writable, total_len_readable, total_len_writable};
use crate::sys::guard;
use crate::sys::guest::{GuestMemory, SharedArea, full_barrier};

use super::inflight::{Inflight, InflightError, Recovered};
use super::steps::{self, Step};

/// The largest ring that virtio allows.
pub const RING_SIZE_MAX: u16 = 32768;

/// The longest chain that is taken. A ring's size does not bound it: Windows puts 131 descriptors into an indirect table
/// whatever the ring's size is. No request needs more than the kernel takes in one vectored call, a header and a status.
pub const CHAIN_DESCRIPTORS_MAX: usize = libc::UIO_MAXIOV as usize + 2;

pub(super) const DESCRIPTOR_BYTES: usize = 16;
const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;

const AVAILABLE_FLAG_NO_INTERRUPT: u16 = 1;
const USED_FLAG_NO_NOTIFY: u16 = 1;
const FLAGS_AT: usize = 0;
const INDEX_AT: usize = 2;
const ENTRIES_AT: usize = 4;
const AVAILABLE_ENTRY_BYTES: usize = 2;
const USED_ENTRY_BYTES: usize = 8;

/// Where a ring lies, as the front end says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RingPlace {
    /// How many descriptors it has: a power of two.
    pub size: u16,
    /// The front end's address of the descriptor table.
    pub descriptors: u64,
    /// The front end's address of the available ring.
    pub available: u64,
    /// The front end's address of the used ring.
    pub used: u64,
}

/// A part of a ring, as it has to lie in memory.
pub struct RingPart {
    /// What to call it.
    pub name: &'static str,
    /// The front end's address.
    pub address: u64,
    /// Length in bytes.
    pub bytes: usize,
    /// What its address has to be a multiple of.
    pub align: usize,
}

impl RingPlace {
    /// Descriptor table, available ring and used ring.
    pub fn parts(&self, event_idx: bool) -> [RingPart; 3] {
        let entries = usize::from(self.size);
        let event = if event_idx { 2 } else { 0 };
        let part = |name, address, bytes, align| RingPart { name, address, bytes, align };
        [
            part("descriptor table", self.descriptors, entries * DESCRIPTOR_BYTES, 16),
            part("available ring", self.available, ENTRIES_AT + entries * AVAILABLE_ENTRY_BYTES + event, 2),
            part("used ring", self.used, ENTRIES_AT + entries * USED_ENTRY_BYTES + event, 4),
        ]
    }

    /// Length of the used ring in bytes.
    pub fn used_bytes(&self, event_idx: bool) -> u64 {
        let [_, _, used] = self.parts(event_idx);
        used.bytes as u64
    }
}

/// Why a ring cannot be served, or not any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is none that virtio allows.
    #[error("ring size {size}: expected a power of two from 1 to {RING_SIZE_MAX}")]
    Size { size: u16 },
    /// A part of it is not guest memory.
    #[error(
        "the {part} at {address:#x}, {bytes} bytes, is not within one region of guest memory, aligned to {align} bytes"
    )]
    Outside { part: &'static str, address: u64, bytes: usize, align: usize },
    /// The driver claims more requests than the ring holds.
    #[error("the available index jumped from {from} to {to}, by more than the ring's size of {size}")]
    Jumped { from: u16, to: u16, size: u16 },
    /// The driver names a descriptor that does not exist.
    #[error("the available ring names descriptor {head}, and the ring has {size}")]
    Head { head: u16, size: u16 },
    /// The driver names a request that it has not got back yet.
    #[error("the available ring names descriptor {head} again, before its request is complete")]
    InFlight { head: u16 },
    /// Its past cannot be told.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// The front end has taken memory away that the ring needs, or the host has lost it.
    #[error("memory of the ring{} is gone: its file has become shorter, or the page is lost", at(guest_address))]
    Gone { guest_address: Option<u64> },
}

fn at(guest_address: &Option<u64>) -> String {
    guest_address.map_or(String::new(), |address| format!(" at guest address {address:#x}"))
}

/// What is wrong with one chain of descriptors. The ring itself goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It has no end, or none within reason.
    #[error("the chain loops, or has more than {CHAIN_DESCRIPTORS_MAX} descriptors")]
    TooLong,
    /// It goes on with a descriptor that does not exist.
    #[error("descriptor {next} follows, and the table has {len}")]
    Next { next: u16, len: usize },
    /// A buffer is not guest memory.
    #[error("a buffer of {len} bytes at {address:#x} is not guest memory")]
    Outside { address: u64, len: u32 },
    /// The device may read after it may write.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// An indirect table that is no table.
    #[error(
        "an indirect table of {len} bytes at {address:#x}: expected whole descriptors of 16 bytes, at least one, in guest memory"
    )]
    Table { address: u64, len: u32 },
    /// An indirect descriptor where none may be.
    #[error("an indirect descriptor within an indirect table, or with another one behind it")]
    Nested,
}

/// The buffers of one request, in order.
#[derive(Default)]
pub struct Chain<'m> {
    /// What the device may read.
    pub readable: Vec<Readable<'m>>,
    /// What the device may write.
    pub writable: Vec<Writable<'m>>,
    /// The guest's addresses and lengths of what the device may write, if they are wanted.
    pub written: Option<Vec<(u64, u32)>>,
}

/// Where a ring's requests are described.
#[derive(Clone)]
pub struct Table {
    size: u16,
    descriptors: SharedArea,
}

/// A ring that runs.
pub struct Ring {
    size: u16,
    table: Table,
    available: SharedArea,
    used: SharedArea,
    /// Index of the next entry of the available ring to take. Indexes run over 16 bits, a ring's entries over its size.
    next_available: u16,
    /// Index of the next entry of the used ring to write.
    next_used: u16,
    /// The used index as the driver last saw it.
    published: u16,
    /// Whether the sides tell each other at which index to be notified (VIRTIO_F_EVENT_IDX).
    event_idx: bool,
    /// Whether the driver has to be notified of the next completion whatever it asks for: after a start, nobody knows
    /// what the last device has told it.
    notify_next: bool,
    /// What is in flight, kept for a successor.
    inflight: Option<Inflight>,
}

/// How far the used ring at a place has come; `None` where there is none.
pub fn used_index(memory: &Arc<GuestMemory>, place: &RingPlace) -> Option<u16> {
    Ring::new(memory, place, 0, false).ok().map(|ring| ring.next_used)
}

impl Ring {
    /// The ring at `place`, of which the entries before `next_available` have been taken.
    pub fn new(
        memory: &Arc<GuestMemory>,
        place: &RingPlace,
        next_available: u16,
        event_idx: bool,
    ) -> Result<Ring, RingError> {
        let size = place.size;
        if !size.is_power_of_two() || size > RING_SIZE_MAX {
            return Err(RingError::Size { size });
        }
        let area = |RingPart { name, address, bytes, align }: RingPart| {
            memory.area(address, bytes, align).ok_or(RingError::Outside { part: name, address, bytes, align })
        };
        let [descriptors, available, used] = place.parts(event_idx);
        let (descriptors, available, used) = (area(descriptors)?, area(available)?, area(used)?);
        let next_used = used.load(INDEX_AT);
        let ring = Ring {
            size,
            table: Table { size, descriptors },
            available,
            used,
            next_available,
            next_used,
            published: next_used,
            event_idx,
            notify_next: true,
            inflight: None,
        };
        ring.check_memory()?;
        Ok(ring)
    }

    /// Sees that all memory was there that this thread has used the ring with since it last asked. What is gone has been read as zeros.
    #[inline]
    pub fn check_memory(&self) -> Result<(), RingError> {
        match guard::take_fault() {
            None => Ok(()),
            Some(fault) => Err(RingError::Gone { guest_address: self.used.memory().guest_address_of(fault) }),
        }
    }

    /// Keeps account of what is in flight in `slot`, which may tell of requests that another has taken and not completed: they are to be carried
    /// out again, in this order. The next entry to take then follows from the slot.
    pub fn track(&mut self, slot: SharedArea) -> Result<Vec<u16>, RingError> {
        let started = Inflight::start(slot, self.size, self.next_used, self.next_available);
        self.check_memory()?;
        let (inflight, Recovered { next_available, in_flight }) = started?;
        self.inflight = Some(inflight);
        self.next_available = next_available;
        Ok(in_flight)
    }

    /// Takes as the next entry the one that the used ring says: all before it is complete.
    pub fn go_on_from_used(&mut self) {
        self.next_available = self.next_used;
    }

    /// Index of the next entry of the available ring to take.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// How many requests wait.
    #[inline]
    pub fn waiting(&self) -> Result<u16, RingError> {
        let index = self.available.load_acquire(INDEX_AT);
        self.check_memory()?;
        let count = index.wrapping_sub(self.next_available);
        if count > self.size {
            return Err(RingError::Jumped { from: self.next_available, to: index, size: self.size });
        }
        Ok(count)
    }

    /// Takes the next request, of which there is one: the first descriptor of its chain.
    ///
    /// # Errors
    /// [`RingError::InFlight`] for a request that was taken and is not complete: not before it is.
    #[inline]
    pub fn take(&mut self) -> Result<u16, RingError> {
        let entry = usize::from(self.next_available % self.size);
        let head = self.available.load(ENTRIES_AT + entry * AVAILABLE_ENTRY_BYTES);
        self.check_memory()?;
        if head >= self.size {
            return Err(RingError::Head { head, size: self.size });
        }
        if let Some(inflight) = &mut self.inflight
            && !inflight.take(head)
        {
            return Err(RingError::InFlight { head });
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(head)
    }

    /// The head of a request that waits, so many behind the next, as a hint.
    #[inline]
    pub fn upcoming(&self, ahead: u16) -> u16 {
        let entry = usize::from(self.next_available.wrapping_add(ahead) % self.size);
        self.available.load(ENTRIES_AT + entry * AVAILABLE_ENTRY_BYTES)
    }

    /// Where its requests are described.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// As [`Table::chain`].
    #[inline]
    pub fn chain<'m>(&self, head: u16, memory: &'m GuestMemory, chain: &mut Chain<'m>) -> Result<(), ChainError> {
        self.table.chain(head, memory, chain)
    }

    /// Writes the completion of the request `head`, of which the device wrote `len` bytes. The driver does not see it yet.
    #[inline]
    pub fn complete(&mut self, head: u16, len: u32) {
        if let Some(inflight) = &mut self.inflight {
            inflight.complete(head);
        }
        let entry = usize::from(self.next_used % self.size);
        let mut bytes = [0; USED_ENTRY_BYTES];
        bytes[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        bytes[4..].copy_from_slice(&len.to_le_bytes());
        self.used.write(ENTRIES_AT + entry * USED_ENTRY_BYTES, bytes);
        self.next_used = self.next_used.wrapping_add(1);
        steps::reach(Step::UsedElement);
    }

    /// Shows all completions to the driver, and says whether it wants to be notified of them. Shows none when memory was gone that they
    /// were written to, which the next check says.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let before = self.published;
        if self.next_used == before || guard::has_fault() {
            return false;
        }
        steps::reach(Step::Unpublished);
        self.used.store_release(INDEX_AT, self.next_used);
        self.published = self.next_used;
        steps::reach(Step::Published);
        if let Some(inflight) = &mut self.inflight {
            inflight.shown(self.next_used);
        }
        // The driver first says what it waits for and then looks at the index; here it is the other way round.
        full_barrier();
        if std::mem::take(&mut self.notify_next) {
            return true;
        }
        if self.event_idx {
            let event = self.available.load(ENTRIES_AT + usize::from(self.size) * AVAILABLE_ENTRY_BYTES);
            self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(before)
        } else {
            self.available.load(FLAGS_AT) & AVAILABLE_FLAG_NO_INTERRUPT == 0
        }
    }

    /// Tells the driver that it need not kick for a while.
    pub fn suspend_kicks(&self) {
        if !self.event_idx {
            self.used.store_release(FLAGS_AT, USED_FLAG_NO_NOTIFY);
        } else if self.used.load(self.kick_event_at()) == self.next_available {
            // The request for which a kick is asked has not come. Once it has, that lies behind, and says as much as this.
            self.used.store_release(self.kick_event_at(), self.next_available.wrapping_sub(1));
        }
    }

    /// Asks the driver to kick for the next request, and says whether there is no waiting for that: one has come meanwhile, for which no
    /// kick may come, or memory is gone.
    pub fn resume_kicks(&self) -> bool {
        if self.event_idx {
            self.used.store_release(self.kick_event_at(), self.next_available);
        } else {
            self.used.store_release(FLAGS_AT, 0);
        }
        full_barrier();
        self.has_waiting()
    }

    fn kick_event_at(&self) -> usize {
        ENTRIES_AT + usize::from(self.size) * USED_ENTRY_BYTES
    }

    /// Whether requests wait, or memory is gone, as the next check says.
    pub fn has_waiting(&self) -> bool {
        self.available.load_acquire(INDEX_AT) != self.next_available || guard::has_fault()
    }
}

impl Table {
    /// Has the processor fetch a descriptor.
    #[inline]
    pub fn fetch(&self, head: u16) {
        self.descriptors.fetch(usize::from(head) * DESCRIPTOR_BYTES);
    }

    /// The guest address that a chain begins with, and whether that is an indirect table, as a hint.
    #[inline]
    pub fn first(&self, head: u16) -> (u64, bool) {
        let descriptor = Descriptor::from_bytes(self.descriptors.read(usize::from(head) * DESCRIPTOR_BYTES));
        (descriptor.address, descriptor.flags & FLAG_INDIRECT != 0)
    }

    /// Collects the buffers of the chain that starts at `head` into `chain`, which is emptied first.
    #[inline]
    pub fn chain<'m>(&self, head: u16, memory: &'m GuestMemory, chain: &mut Chain<'m>) -> Result<(), ChainError> {
        chain.readable.clear();
        chain.writable.clear();
        let mut next = head;
        // A chain longer than the table visits a descriptor twice.
        for _ in 0..self.size {
            let descriptor = Descriptor::from_bytes(self.descriptors.read(usize::from(next) * DESCRIPTOR_BYTES));
            if descriptor.flags & FLAG_INDIRECT != 0 {
                if descriptor.flags & FLAG_NEXT != 0 {
                    return Err(ChainError::Nested);
                }
                return indirect(descriptor, memory, chain);
            }
            chain.add(descriptor, memory)?;
            if descriptor.flags & FLAG_NEXT == 0 {
                return Ok(());
            }
            if descriptor.next >= self.size {
                return Err(ChainError::Next { next: descriptor.next, len: usize::from(self.size) });
            }
            next = descriptor.next;
        }
        Err(ChainError::TooLong)
    }
}

/// A descriptor, copied.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[inline]
    fn from_bytes(bytes: [u8; DESCRIPTOR_BYTES]) -> Descriptor {
        let value = u128::from_le_bytes(bytes);
        Descriptor {
            address: value as u64,
            len: (value >> 64) as u32,
            flags: (value >> 96) as u16,
            next: (value >> 112) as u16,
        }
    }
}

impl<'m> Chain<'m> {
    /// Bytes of all its buffers.
    pub fn bytes(&self) -> u64 {
        total_len_readable(&self.readable) + total_len_writable(&self.writable)
    }

    #[inline]
    fn add(&mut self, descriptor: Descriptor, memory: &'m GuestMemory) -> Result<(), ChainError> {
        let Descriptor { address, len, flags, .. } = descriptor;
        let found = if flags & FLAG_WRITE != 0 {
            if let Some(written) = &mut self.written {
                written.push((address, len));
            }
            memory.writable(address, u64::from(len), &mut self.writable)
        } else if self.writable.is_empty() {
            memory.readable(address, u64::from(len), &mut self.readable)
        } else {
            return Err(ChainError::Order);
        };
        if found { Ok(()) } else { Err(ChainError::Outside { address, len }) }
    }
}

/// Collects the buffers of an indirect table.
fn indirect<'m>(table: Descriptor, memory: &'m GuestMemory, chain: &mut Chain<'m>) -> Result<(), ChainError> {
    let Descriptor { address, len, .. } = table;
    let entries = len as usize / DESCRIPTOR_BYTES;
    if entries == 0 || !(len as usize).is_multiple_of(DESCRIPTOR_BYTES) {
        return Err(ChainError::Table { address, len });
    }
    let mut next = 0;
    for _ in 0..entries.min(CHAIN_DESCRIPTORS_MAX) {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        let at = address.checked_add(next as u64 * DESCRIPTOR_BYTES as u64);
        if !at.is_some_and(|at| memory.read(at, &mut bytes)) {
            return Err(ChainError::Table { address, len });
        }
        let descriptor = Descriptor::from_bytes(bytes);
        if descriptor.flags & FLAG_INDIRECT != 0 {
            return Err(ChainError::Nested);
        }
        chain.add(descriptor, memory)?;
        if descriptor.flags & FLAG_NEXT == 0 {
            return Ok(());
        }
        next = usize::from(descriptor.next);
        if next >= entries {
            return Err(ChainError::Next { next: descriptor.next, len: entries });
        }
    }
    Err(ChainError::TooLong)
}
