//! The driver's side of one split virtqueue in shared memory.
//!
//! Owns the descriptor table, the available and the used ring, and every decision to notify. Knows
//! nothing of what descriptors mean. Invariant: an index is stored after what it makes visible.
//! Layout and notification rules are those of the virtio 1.2 specification, section 2.7.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::sys::SharedMemory;

pub const DESCRIPTOR_BYTES: usize = 16;
const USED_ELEMENT_BYTES: usize = 8;
/// Where a ring's elements start, and what follows them: `flags` and `idx`, then one event index.
const RING_HEADER_BYTES: usize = 4;
const RING_EVENT_BYTES: usize = 2;

/// A descriptor's flags.
pub const FLAG_NEXT: u16 = 1;
pub const FLAG_WRITE: u16 = 2;
pub const FLAG_INDIRECT: u16 = 4;

const AVAILABLE_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub guest_address: u64,
    pub bytes: u32,
    pub flags: u16,
    pub next: u16,
}

/// One split virtqueue, seen from the driver.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<SharedMemory>,
    layout: Layout,
    event_idx: bool,
    /// The available index that the device sees, and the one that `push` has reached.
    available_published: u16,
    available_next: u16,
    used_next: u16,
}

/// Where a ring's parts lie in the shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub size: u16,
    pub descriptors: usize,
    pub available: usize,
    pub used: usize,
    pub end: usize,
}

impl Layout {
    /// A ring of `size` descriptors, a power of two, at `start`, which must be aligned to 16.
    pub fn new(start: usize, size: u16) -> Self {
        assert!(size.is_power_of_two() && start.is_multiple_of(DESCRIPTOR_BYTES));
        let entries = usize::from(size);
        let available = start + entries * DESCRIPTOR_BYTES;
        let available_end = available + RING_HEADER_BYTES + entries * 2 + RING_EVENT_BYTES;
        // A page of its own, as guests lay it out: the two sides write to different cache lines.
        let used = available_end.next_multiple_of(4096);
        let end = used + RING_HEADER_BYTES + entries * USED_ELEMENT_BYTES + RING_EVENT_BYTES;
        Self { size, descriptors: start, available, used, end }
    }

    /// How far the device has come.
    pub fn used_index(&self, memory: &SharedMemory) -> u16 {
        memory.load_u16(self.used + 2, Ordering::Acquire)
    }

    fn used_event(&self) -> usize {
        self.available + RING_HEADER_BYTES + usize::from(self.size) * 2
    }

    fn available_event(&self) -> usize {
        self.used + RING_HEADER_BYTES + usize::from(self.size) * USED_ELEMENT_BYTES
    }
}

impl Ring {
    /// An empty ring that starts from nothing, whatever lay in its place.
    pub fn new(memory: Arc<SharedMemory>, layout: Layout, event_idx: bool) -> Self {
        memory.write(layout.descriptors, &vec![0; layout.end - layout.descriptors]);
        Self { memory, layout, event_idx, available_published: 0, available_next: 0, used_next: 0 }
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Writes entry `index` of the table at `table`: the ring's own or an indirect one.
    pub fn write_descriptor(&self, table: usize, index: usize, descriptor: Descriptor) {
        let at = table + index * DESCRIPTOR_BYTES;
        let Descriptor { guest_address, bytes, flags, next } = descriptor;
        self.memory.store_u64(at, guest_address);
        self.memory.store_u64(at + 8, u64::from(bytes) | u64::from(flags) << 32 | u64::from(next) << 48);
    }

    /// Queues the chain that starts at descriptor `head`; the device sees it after `publish`.
    pub fn push(&mut self, head: u16) {
        let slot = usize::from(self.available_next % self.layout.size);
        let at = self.layout.available + RING_HEADER_BYTES + slot * 2;
        self.memory.store_u16(at, head, Ordering::Relaxed);
        self.available_next = self.available_next.wrapping_add(1);
    }

    /// Shows the device what was pushed; true when it wants to be kicked for it.
    pub fn publish(&mut self) -> bool {
        if self.available_next == self.available_published {
            return false;
        }
        let (old, new) = (self.available_published, self.available_next);
        self.memory.store_u16(self.layout.available + 2, new, Ordering::Release);
        self.available_published = new;
        // The index must be out before the device's wish is read: it does the same in reverse.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.memory.load_u16(self.layout.available_event(), Ordering::Relaxed);
            is_event_due(event, new, old)
        } else {
            self.memory.load_u16(self.layout.used, Ordering::Relaxed) & USED_NO_NOTIFY == 0
        }
    }

    /// The head and the length written of the next chain that the device has finished with.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.used_next {
            return None;
        }
        let slot = usize::from(self.used_next % self.layout.size);
        let at = self.layout.used + RING_HEADER_BYTES + slot * USED_ELEMENT_BYTES;
        let head = self.memory.load_u32(at) as u16;
        let bytes = self.memory.load_u32(at + 4);
        self.used_next = self.used_next.wrapping_add(1);
        Some((head, bytes))
    }

    /// Where both sides stand, in words, for whoever has to find out why a ring stands still.
    pub fn standing(&self) -> String {
        let Self { memory, layout, event_idx, available_published, available_next, used_next } = self;
        let at = |offset| memory.load_u16(offset, Ordering::Relaxed);
        format!(
            "available {available_next}, shown up to {available_published}; used up to {}, taken up to {used_next}; \
             event indexes {}: kick at {}, call at {}; flags: kicks {:#x}, calls {:#x}",
            self.used_index(),
            if *event_idx { "count" } else { "do not count" },
            at(layout.available_event()),
            at(layout.used_event()),
            at(layout.used),
            at(layout.available)
        )
    }

    /// Asks for a call at the next completion; true when there is one already.
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            self.set_used_event(self.used_next);
        } else {
            self.memory.store_u16(self.layout.available, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.used_index() != self.used_next
    }

    /// Asks for no call. With event indexes to be said again after each `pop`, before the index
    /// that was said has gone round.
    pub fn disarm(&mut self) {
        if self.event_idx {
            self.set_used_event(self.used_next.wrapping_sub(1));
        } else {
            self.memory.store_u16(self.layout.available, AVAILABLE_NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    fn used_index(&self) -> u16 {
        self.layout.used_index(&self.memory)
    }

    fn set_used_event(&self, index: u16) {
        self.memory.store_u16(self.layout.used_event(), index, Ordering::Relaxed);
    }
}

/// Whether moving an index from `old` to `new` passes the one that the other side waits for.
fn is_event_due(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

    const SIZE: u16 = 8;

    /// A ring, and rust-vmm's queue as the device on its other side.
    fn pair(event_idx: bool) -> (Ring, Queue, GuestMemoryMmap) {
        let memory = Arc::new(SharedMemory::new(1 << 16).unwrap());
        let file = std::fs::File::open(format!("/proc/self/fd/{}", memory.fd()));
        let file = file.and_then(|_| {
            std::fs::OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", memory.fd()))
        });
        let range = (GuestAddress(0), 1 << 16, Some(FileOffset::new(file.unwrap(), 0)));
        let guest = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let layout = Layout::new(0, SIZE);
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(GuestAddress(layout.descriptors as u64)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(layout.available as u64)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(layout.used as u64)).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        (Ring::new(memory, layout, event_idx), queue, guest)
    }

    fn put(ring: &mut Ring, head: u16, bytes: u32) {
        let flags = FLAG_WRITE;
        let descriptor = Descriptor { guest_address: 0x8000, bytes, flags, next: 0 };
        ring.write_descriptor(ring.layout().descriptors, usize::from(head), descriptor);
        ring.push(head);
    }

    #[test]
    fn indexes_go_round_with_a_device_that_no_one_here_wrote() {
        for event_idx in [false, true] {
            let (mut ring, mut queue, guest) = pair(event_idx);
            for round in 0..20_000_u32 {
                let batch = (round % u32::from(SIZE)) as u16 + 1;
                for head in 0..batch {
                    put(&mut ring, head, round + 1);
                }
                ring.publish();
                for head in 0..batch {
                    let chain = queue.pop_descriptor_chain(&guest).unwrap();
                    assert_eq!(chain.head_index(), head);
                    let descriptor = chain.clone().next().unwrap();
                    assert_eq!(descriptor.len(), round + 1);
                    assert!(descriptor.is_write_only());
                    queue.add_used(&guest, head, round + u32::from(head)).unwrap();
                }
                assert!(queue.pop_descriptor_chain(&guest).is_none());
                for head in 0..batch {
                    assert_eq!(ring.pop(), Some((head, round + u32::from(head))));
                }
                assert_eq!(ring.pop(), None);
            }
        }
    }

    #[test]
    fn kicks_are_asked_for_exactly_when_the_device_sleeps() {
        let (mut ring, mut queue, guest) = pair(true);
        for _ in 0..10_000 {
            assert!(!queue.enable_notification(&guest).unwrap());
            put(&mut ring, 0, 1);
            assert!(ring.publish(), "the device sleeps");
            put(&mut ring, 1, 1);
            assert!(!ring.publish(), "it has been kicked once already");
            for head in 0..2 {
                queue.pop_descriptor_chain(&guest).unwrap();
                queue.add_used(&guest, head, 0).unwrap();
                ring.pop().unwrap();
            }
            assert!(!ring.publish(), "nothing was pushed");
        }
    }

    #[test]
    fn calls_are_asked_for_exactly_when_the_driver_sleeps() {
        for event_idx in [true, false] {
            let (mut ring, mut queue, guest) = pair(event_idx);
            for round in 0..70_000 {
                put(&mut ring, 0, 1);
                put(&mut ring, 1, 1);
                ring.publish();
                let asleep = round % 3 == 0;
                if asleep {
                    assert!(!ring.arm());
                } else {
                    ring.disarm();
                }
                queue.pop_descriptor_chain(&guest).unwrap();
                queue.add_used(&guest, 0, 0).unwrap();
                if event_idx {
                    assert_eq!(queue.needs_notification(&guest).unwrap(), asleep, "{round}");
                }
                assert!(ring.arm(), "one is there already");
                ring.pop().unwrap();
                queue.pop_descriptor_chain(&guest).unwrap();
                queue.add_used(&guest, 1, 0).unwrap();
                ring.pop().unwrap();
                // The reference's first answer is always yes, so let it forget this round.
                if event_idx {
                    queue.needs_notification(&guest).unwrap();
                }
            }
        }
    }
}
