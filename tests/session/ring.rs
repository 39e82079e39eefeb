//! [`Ring`]: a split virtqueue from the driver's side.
//!
//! As drivers do it: kicks when the device asks for it, and otherwise waits for its calls, so that a notification that
//! is lost on either side shows as a request that never ends. Knows nothing of disks. Tests of hostile guests reach
//! into it.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::VringConfigData;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::guest::Guest;

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    /// As it lies in memory.
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A buffer of a request.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    /// Whether it is the device that writes it.
    pub writable: bool,
}

impl Buffer {
    /// For the device to read.
    pub fn readable(address: u64, len: usize) -> Buffer {
        Buffer { address, len: len as u32, writable: false }
    }

    /// For the device to write.
    pub fn writable(address: u64, len: usize) -> Buffer {
        Buffer { address, len: len as u32, writable: true }
    }
}

/// A virtqueue.
pub struct Ring {
    pub guest: Arc<Guest>,
    /// How many descriptors it has.
    pub size: u16,
    /// Guest addresses of its parts.
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    event_idx: bool,
    /// Index of the next available entry to fill.
    pub next_available: u16,
    /// Index of the next used entry to look at.
    pub next_used: u16,
    /// Where available stood at the last kick or decision not to.
    kicked: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    pub kick: Event,
    pub call: Event,
}

/// An event descriptor that can be waited for with a limit.
pub struct Event {
    pub descriptor: EventFd,
    epoll: Epoll,
}

impl Event {
    /// One that has not happened.
    pub fn new() -> Event {
        let descriptor = EventFd::new(EFD_NONBLOCK).expect("an event descriptor");
        let epoll = Epoll::new().expect("an epoll descriptor");
        let fd = descriptor.as_raw_fd();
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0)).expect("epoll takes it");
        Event { descriptor, epoll }
    }

    /// Makes it happen.
    pub fn signal(&self) {
        self.descriptor.write(1).expect("an event descriptor");
    }

    /// Whether it has happened since the last time that this was asked.
    pub fn take(&self) -> bool {
        self.descriptor.read().is_ok()
    }

    /// Waits until it happens; `false` when it did not in time.
    pub fn wait(&self, limit: Duration) -> bool {
        let begun = Instant::now();
        let mut events = [EpollEvent::default()];
        while let Some(left) = limit.checked_sub(begun.elapsed()) {
            // Rounded up: what is left below a millisecond is not a busy loop.
            match self.epoll.wait(left.as_millis() as i32 + 1, &mut events) {
                Ok(_) if self.take() => return true,
                Ok(_) => {}
                // A debugger, or the machine's being put to sleep.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => panic!("an event descriptor cannot be waited for: {error}"),
            }
        }
        self.take()
    }
}

impl Ring {
    /// An empty ring whose indexes start at `index`.
    pub fn new(guest: &Arc<Guest>, size: u16, event_idx: bool, index: u16) -> Ring {
        let entries = u64::from(size);
        let descriptors = guest.allocate(16 * entries, 16);
        let available = guest.allocate(6 + 2 * entries, 2);
        let used = guest.allocate(6 + 8 * entries, 4);
        let ring = Ring {
            guest: Arc::clone(guest),
            size,
            descriptors,
            available,
            used,
            event_idx,
            next_available: index,
            next_used: index,
            kicked: index,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            kick: Event::new(),
            call: Event::new(),
        };
        guest.store(available + 2, index);
        guest.store(used + 2, index);
        ring.ask_for_call();
        ring
    }

    /// Where it lies, as a front end says it.
    pub fn config(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: self.guest.user_address(self.descriptors),
            used_ring_addr: self.guest.user_address(self.used),
            avail_ring_addr: self.guest.user_address(self.available),
            log_addr: None,
        }
    }

    /// How many descriptors are free.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Writes a descriptor.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.guest.write(self.descriptors + 16 * u64::from(index), &descriptor.bytes());
    }

    /// Puts a chain on the ring, with a descriptor for each buffer. The device may see it, but is not kicked.
    #[track_caller]
    pub fn submit(&mut self, buffers: &[Buffer]) -> u16 {
        assert!(self.free.len() >= buffers.len(), "the ring has no room for {} buffers", buffers.len());
        let chain = self.free.split_off(self.free.len() - buffers.len());
        for (at, buffer) in buffers.iter().enumerate() {
            self.set_descriptor(chain[at], link(buffer, chain.get(at + 1).copied()));
        }
        let head = chain[0];
        self.chains.insert(head, chain);
        self.publish(head);
        head
    }

    /// Puts a chain on the ring as an indirect table, which is written to `table`.
    pub fn submit_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        for (at, buffer) in buffers.iter().enumerate() {
            let next = (at + 1 < buffers.len()).then_some(at as u16 + 1);
            self.guest.write(table + 16 * at as u64, &link(buffer, next).bytes());
        }
        let head = self.free.pop().expect("room on the ring");
        let len = 16 * buffers.len() as u32;
        self.set_descriptor(head, Descriptor { address: table, len, flags: INDIRECT, next: 0 });
        self.chains.insert(head, vec![head]);
        self.publish(head);
        head
    }

    /// Names a head in the available ring, whatever it is.
    pub fn publish(&mut self, head: u16) {
        let entry = u64::from(self.next_available % self.size);
        self.guest.store(self.available + 4 + 2 * entry, head);
        self.next_available = self.next_available.wrapping_add(1);
        self.guest.store(self.available + 2, self.next_available);
    }

    /// Kicks, if the device wants to be.
    pub fn kick(&mut self) {
        let before = std::mem::replace(&mut self.kicked, self.next_available);
        let wanted = if self.event_idx {
            let event = self.guest.load(self.used + 4 + 8 * u64::from(self.size));
            let since = self.next_available.wrapping_sub(event).wrapping_sub(1);
            since < self.next_available.wrapping_sub(before)
        } else {
            self.guest.load(self.used) & 1 == 0
        };
        if wanted {
            self.kick_anyway();
        }
    }

    /// Kicks.
    pub fn kick_anyway(&self) {
        self.kick.signal();
    }

    /// The index of the used ring, as the device has it.
    pub fn used_index(&self) -> u16 {
        self.guest.load(self.used + 2)
    }

    /// Takes a completion, if there is one: head and length.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.next_used {
            return None;
        }
        let entry = u64::from(self.next_used % self.size);
        let bytes = self.guest.read(self.used + 4 + 8 * entry, 8);
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let (head, len) = (number(0), number(4));
        self.next_used = self.next_used.wrapping_add(1);
        self.ask_for_call();
        let head = u16::try_from(head).expect("a completion of a head that exists");
        if let Some(chain) = self.chains.remove(&head) {
            self.free.extend(chain);
        }
        Some((head, len))
    }

    /// Has the device call at the next completion.
    fn ask_for_call(&self) {
        if self.event_idx {
            self.guest.store(self.available + 4 + 2 * u64::from(self.size), self.next_used);
        } else {
            self.guest.store(self.available, 0);
        }
    }

    /// Waits for a completion, by the device's calls alone; `None` when none came in time.
    pub fn wait_used(&mut self, limit: Duration) -> Option<(u16, u32)> {
        let begun = Instant::now();
        loop {
            if let Some(found) = self.take_used() {
                return Some(found);
            }
            let left = limit.checked_sub(begun.elapsed())?;
            // A call may be old: its completion was taken before it came. A completion without a call is a lost one.
            if !self.call.wait(left) {
                return None;
            }
        }
    }
}

fn link(buffer: &Buffer, next: Option<u16>) -> Descriptor {
    let flags = if buffer.writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
    Descriptor { address: buffer.address, len: buffer.len, flags, next: next.unwrap_or(0) }
}
