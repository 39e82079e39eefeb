//! One virtio-blk request: what it asks for, and how it lies in shared memory.
//!
//! Owns the slots of a queue: each has a header, a status byte, a buffer and room for its
//! descriptors, all reused. Knows nothing of when or why a request is made.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::ring::{DESCRIPTOR_BYTES, Descriptor, FLAG_INDIRECT, FLAG_NEXT, FLAG_WRITE, Layout, Ring};
use crate::sys::SharedMemory;

pub const SECTOR_BYTES: u64 = 512;
/// Where the shared memory lies in the guest's address space: neither at zero nor where this
/// process has mapped it, so that a backend that mixes the three up is found out.
pub const GUEST_BASE: u64 = 1 << 30;

/// A header and a status byte share a cache line, as in a Linux guest.
const CELL_BYTES: usize = 64;
const HEADER_BYTES: u32 = 16;
const STATUS_OFFSET: usize = HEADER_BYTES as usize;
const STATUS_PENDING: u8 = 0xff;
pub const STATUS_OK: u8 = VIRTIO_BLK_S_OK as u8;
/// What DISCARD and WRITE_ZEROES carry: sector, count, flags.
const RANGE_BYTES: u32 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Operation {
    fn code(self) -> u32 {
        match self {
            Self::Read => VIRTIO_BLK_T_IN,
            Self::Write => VIRTIO_BLK_T_OUT,
            Self::Flush => VIRTIO_BLK_T_FLUSH,
            Self::Discard => VIRTIO_BLK_T_DISCARD,
            Self::WriteZeroes => VIRTIO_BLK_T_WRITE_ZEROES,
        }
    }
}

/// How a request counts: alone, or as one half of a pair that is measured as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Whole,
    First,
    Last,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub operation: Operation,
    /// In bytes from the disk's start; a multiple of a sector.
    pub offset: u64,
    /// A multiple of a sector; 0 for a flush.
    pub bytes: u32,
    pub part: Part,
}

/// How requests are described to the device.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The longest request.
    pub block_bytes: u32,
    /// The longest piece of its buffer that one descriptor names.
    pub segment_bytes: u32,
    /// Buffers to take turns with; at least one for each slot.
    pub buffers: usize,
    pub indirect: bool,
}

impl Default for Shape {
    /// One sector at a time.
    fn default() -> Self {
        let sector = SECTOR_BYTES as u32;
        Self { block_bytes: sector, segment_bytes: sector, buffers: 1, indirect: false }
    }
}

impl Shape {
    /// Descriptors that one request takes at most: header, segments, status.
    fn descriptors(&self) -> usize {
        2 + self.block_bytes.div_ceil(self.segment_bytes) as usize
    }

    /// Requests that fit into a ring of `size` at once.
    pub fn depth_max(&self, size: u16) -> usize {
        if self.indirect { usize::from(size) } else { usize::from(size) / self.descriptors() }
    }
}

/// The places of the requests that one queue can have in flight.
#[derive(Debug)]
pub struct Slots {
    memory: Arc<SharedMemory>,
    shape: Shape,
    cells: usize,
    tables: usize,
    data: usize,
    /// Where the buffer is that each slot has now, and which comes next.
    buffer_of: Vec<usize>,
    buffer_next: usize,
    /// Other buffers, one for each slot, that are used in place of these while they are there.
    spare: Option<usize>,
}

impl Slots {
    /// Bytes of shared memory for `depth` slots of this shape.
    pub fn bytes(shape: &Shape, depth: usize) -> usize {
        let tables = shape.descriptors() * DESCRIPTOR_BYTES;
        let buffers = shape.buffers.max(depth) * shape.block_bytes as usize;
        (depth * (CELL_BYTES + tables)).next_multiple_of(4096) + buffers
    }

    /// `depth` slots at `start`, aligned to a page.
    pub fn new(memory: Arc<SharedMemory>, start: usize, shape: Shape, depth: usize) -> Self {
        let tables = start + depth * CELL_BYTES;
        let tables_end = tables + depth * shape.descriptors() * DESCRIPTOR_BYTES;
        let shape = Shape { buffers: shape.buffers.max(depth), ..shape };
        let data = tables_end.next_multiple_of(4096);
        Self {
            memory,
            cells: start,
            tables,
            data,
            buffer_of: (0..depth).map(|slot| data + slot * shape.block_bytes as usize).collect(),
            buffer_next: 0,
            spare: None,
            shape,
        }
    }

    pub fn depth(&self) -> usize {
        self.buffer_of.len()
    }

    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    pub fn shared(&self) -> Arc<SharedMemory> {
        self.memory.clone()
    }

    /// Where a slot's buffer is in the shared memory.
    pub fn data(&self, slot: usize) -> usize {
        self.buffer_of[slot]
    }

    /// Gives a slot its next buffer. With as many buffers as slots each keeps its own.
    pub fn turn_buffer(&mut self, slot: usize) {
        let block_bytes = self.shape.block_bytes as usize;
        if let Some(spare) = self.spare {
            self.buffer_of[slot] = spare + slot * block_bytes;
        } else if self.shape.buffers > self.buffer_of.len() {
            self.buffer_of[slot] = self.data + self.buffer_next * block_bytes;
            self.buffer_next = (self.buffer_next + 1) % self.shape.buffers;
        } else {
            self.buffer_of[slot] = self.data + slot * block_bytes;
        }
    }

    /// Has requests from now on use buffers that lie from `spare` on, or their own again.
    pub fn set_spare(&mut self, spare: Option<usize>) {
        self.spare = spare;
    }

    /// Describes `request` in a slot's descriptors and pushes its chain.
    pub fn push(&self, slot: usize, request: &Request, ring: &mut Ring) {
        let cell = self.cells + slot * CELL_BYTES;
        self.memory.store_u64(cell, u64::from(request.operation.code()));
        let sector = match request.operation {
            Operation::Read | Operation::Write => request.offset / SECTOR_BYTES,
            Operation::Flush | Operation::Discard | Operation::WriteZeroes => 0,
        };
        self.memory.store_u64(cell + 8, sector);
        self.memory.store_u8(cell + STATUS_OFFSET, STATUS_PENDING);

        let data_bytes = match request.operation {
            Operation::Read | Operation::Write => request.bytes,
            Operation::Flush => 0,
            Operation::Discard | Operation::WriteZeroes => {
                let data = self.data(slot);
                self.memory.store_u64(data, request.offset / SECTOR_BYTES);
                self.memory.store_u64(data + 8, u64::from(request.bytes) / SECTOR_BYTES);
                RANGE_BYTES
            }
        };
        let mut table = self.start_chain(slot, &ring.layout());
        table.add(ring, cell, HEADER_BYTES, 0);
        let data_flags = if request.operation == Operation::Read { FLAG_WRITE } else { 0 };
        let mut done = 0;
        while done < data_bytes {
            let bytes = self.shape.segment_bytes.min(data_bytes - done);
            table.add(ring, self.data(slot) + done as usize, bytes, data_flags);
            done += bytes;
        }
        table.end(ring, cell + STATUS_OFFSET);
        if self.shape.indirect {
            let descriptor = Descriptor {
                guest_address: guest_address(table.offset),
                bytes: (table.index * DESCRIPTOR_BYTES) as u32,
                flags: FLAG_INDIRECT,
                next: 0,
            };
            ring.write_descriptor(ring.layout().descriptors, slot, descriptor);
        }
        ring.push(self.head(slot));
    }

    /// The slot whose chain starts at `head`; none when no chain does.
    pub fn slot_of(&self, head: u16) -> Option<usize> {
        let stride = if self.shape.indirect { 1 } else { self.shape.descriptors() };
        let (slot, rest) = (usize::from(head) / stride, usize::from(head) % stride);
        (rest == 0 && slot < self.depth()).then_some(slot)
    }

    pub fn status(&self, slot: usize) -> u8 {
        self.memory.load_u8(self.cells + slot * CELL_BYTES + STATUS_OFFSET)
    }

    fn head(&self, slot: usize) -> u16 {
        let stride = if self.shape.indirect { 1 } else { self.shape.descriptors() };
        (slot * stride) as u16
    }

    fn start_chain(&self, slot: usize, layout: &Layout) -> Chain {
        if self.shape.indirect {
            let bytes = self.shape.descriptors() * DESCRIPTOR_BYTES;
            Chain { offset: self.tables + slot * bytes, index: 0 }
        } else {
            Chain { offset: layout.descriptors, index: usize::from(self.head(slot)) }
        }
    }
}

/// A chain of descriptors that is being written into consecutive entries of a table.
struct Chain {
    offset: usize,
    index: usize,
}

impl Chain {
    fn add(&mut self, ring: &Ring, at: usize, bytes: u32, flags: u16) {
        let descriptor = Descriptor {
            guest_address: guest_address(at),
            bytes,
            flags: flags | FLAG_NEXT,
            next: (self.index + 1) as u16,
        };
        ring.write_descriptor(self.offset, self.index, descriptor);
        self.index += 1;
    }

    fn end(&mut self, ring: &Ring, status: usize) {
        let guest_address = guest_address(status);
        let descriptor = Descriptor { guest_address, bytes: 1, flags: FLAG_WRITE, next: 0 };
        ring.write_descriptor(self.offset, self.index, descriptor);
        self.index += 1;
    }
}

fn guest_address(offset: usize) -> u64 {
    GUEST_BASE + offset as u64
}
