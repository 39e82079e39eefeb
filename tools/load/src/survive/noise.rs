//! A guest and a front end that mean harm: garbage on rings and as messages, without a pause, and a new connection whenever one ends.
//!
//! A process of its own, as a virtual machine is. What it has done stands in its output, a line each time ([`Counts`]); it goes on until it is
//! told to end. Nothing that its backend does to it is an error.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use fastrand::Rng;
use serde::{Deserialize, Serialize};
use vhost::vhost_user::VhostUserProtocolFeatures;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::arguments::NoiseOptions;
use crate::connection::{Connection, Driver, Region, Wiring};
use crate::request::{GUEST_BASE, SECTOR_BYTES};
use crate::ring::{Descriptor, FLAG_INDIRECT, FLAG_NEXT, FLAG_WRITE, Layout, Ring};
use crate::sys::{self, SharedMemory};

const MEMORY_BYTES: usize = 64 << 20;
const QUEUES_MAX: usize = 4;
/// Where a queue's ring lies, and behind it what its descriptors name if they name anything that is right.
const QUEUE_BYTES: usize = 4 << 20;
const CELLS_AT: usize = 1 << 20;
const CELLS: usize = 1024;
const CELL_BYTES: usize = 64;
const TABLES_AT: usize = 2 << 20;
const TABLE_BYTES: usize = 4096;
/// How long a ring may stand still before it counts as given up.
const RING_PATIENCE: Duration = Duration::from_millis(100);
const SESSION: Duration = Duration::from_secs(1);
const SAY_INTERVAL: Duration = Duration::from_millis(200);

/// What has been done.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Connections, and those of them that the backend has ended or whose ring it has given up.
    pub sessions: u64,
    pub refused: u64,
    /// Chains that were made available, kicks, and messages of garbage.
    pub chains: u64,
    pub kicks: u64,
    pub messages: u64,
}

impl Counts {
    pub fn add(&mut self, other: &Self) {
        let Self { sessions, refused, chains, kicks, messages } = other;
        self.sessions += sessions;
        self.refused += refused;
        self.chains += chains;
        self.kicks += kicks;
        self.messages += messages;
    }
}

pub fn run(options: &NoiseOptions) -> Result<()> {
    sys::note_interrupts();
    let memory = Arc::new(SharedMemory::new(MEMORY_BYTES)?);
    let mut noise =
        Noise { random: Rng::with_seed(options.seed), memory, counts: Counts::default(), said: Instant::now() };
    while !sys::is_interrupted() {
        match UnixStream::connect(&options.socket_path) {
            Ok(socket) => {
                noise.counts.sessions += 1;
                let ended = if noise.random.u8(..8) == 0 { noise.babble(&socket) } else { noise.drive(socket) };
                noise.counts.refused += u64::from(ended.is_err());
            }
            // Its listener is there as long as the backend is.
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
        noise.say()?;
    }
    noise.said -= SAY_INTERVAL;
    noise.say()
}

struct Noise {
    random: Rng,
    memory: Arc<SharedMemory>,
    counts: Counts,
    said: Instant,
}

impl Noise {
    fn say(&mut self) -> Result<()> {
        if self.said.elapsed() >= SAY_INTERVAL {
            self.said = Instant::now();
            println!("{}", serde_json::to_string(&self.counts)?);
            std::io::stdout().flush()?;
        }
        Ok(())
    }

    /// Messages of garbage, more or less in the form of messages.
    fn babble(&mut self, socket: &UnixStream) -> Result<()> {
        const VERSION: u32 = 1;
        const NEED_REPLY: u32 = 1 << 3;
        socket.set_write_timeout(Some(RING_PATIENCE))?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        for _ in 0..self.random.u32(1..200) {
            let len = if self.random.u8(..32) == 0 { self.random.usize(..5000) } else { self.random.usize(..10) * 8 };
            let mut body: Vec<u8> = (0..len).map(|_| self.random.u8(..)).collect();
            // Mostly small numbers, which mean something to most messages.
            for word in body.chunks_exact_mut(4) {
                if self.random.u8(..4) > 0 {
                    word.copy_from_slice(&self.random.u32(..4).to_ne_bytes());
                }
            }
            let flags = if self.random.u8(..4) == 0 { VERSION | NEED_REPLY } else { VERSION };
            let said_len = if self.random.u8(..32) == 0 { self.random.u32(..) } else { len as u32 };
            let header = [self.random.u32(..45), flags, said_len].map(u32::to_ne_bytes).concat();
            let message = [header, body].concat();
            let event = std::os::fd::AsRawFd::as_raw_fd(&event);
            let descriptors = [event, self.memory.fd(), event][..self.random.usize(..4)].to_vec();
            socket.send_with_fds(&[&message[..]], &descriptors)?;
            self.counts.messages += 1;
        }
        Ok(())
    }

    /// Garbage on the rings of a session that is set up as it should be. Fails when the backend has had enough.
    fn drive(&mut self, socket: UnixStream) -> Result<()> {
        let mut connection = Connection::new(socket, VhostUserProtocolFeatures::all(), true)?;
        let queues = self.random.usize(1..=QUEUES_MAX);
        let size = 1 << self.random.u32(1..=10);
        connection.set_features(Driver::Kernel { indirect: true }.takes(connection.offered()))?;
        connection.set_memory(&self.memory, &[Region { start: 0, bytes: MEMORY_BYTES }])?;
        let event_idx = self.random.bool();
        let mut rings = Vec::new();
        for index in 0..queues {
            let layout = Layout::new(index * QUEUE_BYTES, size);
            let wiring = Wiring { layout, kick: EventFd::new(EFD_NONBLOCK)?, call: EventFd::new(EFD_NONBLOCK)? };
            let ring = Ring::new(self.memory.clone(), layout, event_idx);
            connection.set_up_ring(index, &self.memory, &wiring, 0)?;
            connection.enable(index, true)?;
            rings.push((ring, wiring));
        }
        let since = Instant::now();
        let mut published = vec![0_u16; queues];
        while since.elapsed() < SESSION && !sys::is_interrupted() {
            let index = self.random.usize(..queues);
            let (ring, wiring) = &mut rings[index];
            for _ in 0..self.random.u16(1..=size.min(32)) {
                self.chain(ring, index);
                published[index] = published[index].wrapping_add(1);
            }
            ring.publish();
            if self.random.u16(..2000) == 0 {
                // More than there can be.
                self.memory.store_u16(wiring.layout.available + 2, self.random.u16(..), Ordering::Release);
            }
            for _ in 0..self.random.u8(1..4) {
                // Full only when nobody listens.
                let _ = wiring.kick.write(1);
                self.counts.kicks += 1;
            }
            let standing = Instant::now();
            while published[index].wrapping_sub(wiring.layout.used_index(&self.memory)) > size / 2 {
                // What is being read meanwhile changes.
                self.descriptor(ring, index, 0);
                anyhow::ensure!(standing.elapsed() < RING_PATIENCE, "ring {index} stands still");
            }
            self.say()?;
        }
        for index in 0..queues {
            connection.stop_ring(index)?;
        }
        Ok(())
    }

    /// An address: mostly one of this queue's, and now and then one that is not.
    fn address(&mut self, index: usize) -> u64 {
        let memory = MEMORY_BYTES as u64;
        match self.random.u8(..16) {
            0 => self.random.u64(..),
            1 => GUEST_BASE + memory - self.random.u64(..64),
            2 => GUEST_BASE + (index * QUEUE_BYTES) as u64 + self.random.u64(..QUEUE_BYTES as u64 / 8),
            _ => GUEST_BASE + (QUEUES_MAX * QUEUE_BYTES) as u64 + self.random.u64(..memory / 2) / 512 * 512,
        }
    }

    fn bytes(&mut self) -> u32 {
        match self.random.u8(..64) {
            0 => self.random.u32(..),
            1 => self.random.u32(..16 << 20),
            2..10 => self.random.u32(..64 << 10),
            10..20 => self.random.u32(..20),
            _ => SECTOR_BYTES as u32 * self.random.u32(1..=8),
        }
    }

    /// One descriptor of garbage, somewhere in a ring's table or in an indirect one.
    fn descriptor(&mut self, ring: &Ring, index: usize, table: usize) {
        let size = ring.layout().size;
        let at = self.random.usize(..usize::from(size));
        let descriptor = Descriptor {
            guest_address: self.address(index),
            bytes: self.bytes(),
            flags: self.random.u16(..8),
            next: if self.random.u8(..32) == 0 { self.random.u16(..) } else { self.random.u16(..size) },
        };
        let table = if table == 0 { ring.layout().descriptors } else { table };
        ring.write_descriptor(table, at % (TABLE_BYTES / 16), descriptor);
    }

    /// A chain that is nearly a request, or nothing like one.
    fn chain(&mut self, ring: &mut Ring, index: usize) {
        self.counts.chains += 1;
        let size = ring.layout().size;
        let head = self.random.u16(..size);
        let queue = index * QUEUE_BYTES;
        let table = queue + TABLES_AT + self.random.usize(..64) * TABLE_BYTES;
        let cell = queue + CELLS_AT + self.random.usize(..CELLS) * CELL_BYTES;
        let guest = |at: usize| GUEST_BASE + at as u64;
        // A header: mostly of a type that there is, mostly of sectors that there are.
        let kind = if self.random.u8(..16) == 0 { self.random.u64(..) } else { self.random.u64(..14) };
        self.memory.store_u64(cell, kind);
        let sector = if self.random.u8(..16) == 0 { self.random.u64(..) } else { self.random.u64(..1 << 19) };
        self.memory.store_u64(cell + 8, sector);
        let is_indirect = self.random.u8(..3) == 0;
        let (place, first) = if is_indirect { (table, 0) } else { (ring.layout().descriptors, usize::from(head)) };
        let buffers = self.random.usize(1..=3);
        let position = |at: usize| if is_indirect { at } else { (first + at) % usize::from(size) };
        for at in 0..buffers + 2 {
            let flags = if at > buffers {
                FLAG_WRITE
            } else {
                FLAG_NEXT | if at > 0 { self.random.u16(..2) * FLAG_WRITE } else { 0 }
            };
            let descriptor = Descriptor {
                guest_address: match at {
                    0 => guest(cell),
                    at if at > buffers => guest(cell + 16),
                    _ => self.address(index),
                },
                bytes: match at {
                    0 => 16,
                    at if at > buffers => 1,
                    _ => self.bytes(),
                },
                flags,
                next: position(at + 1) as u16,
            };
            ring.write_descriptor(place, position(at), descriptor);
        }
        if is_indirect {
            let bytes = if self.random.u8(..8) == 0 { self.random.u32(..) } else { 16 * (buffers as u32 + 2) };
            let descriptor = Descriptor { guest_address: guest(table), bytes, flags: FLAG_INDIRECT, next: 0 };
            ring.write_descriptor(ring.layout().descriptors, usize::from(head), descriptor);
        }
        // And then something is wrong with it, more often than not.
        for _ in 0..self.random.u8(..3) {
            self.descriptor(ring, index, if is_indirect { table } else { 0 });
        }
        ring.push(if self.random.u16(..5000) == 0 { self.random.u16(..) } else { head });
    }
}
