//! [`Queue`]: disk requests on a [`Ring`], with memory for each, and verified work over them.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, RngExt};

use super::guest::Guest;
use super::harness::{PATIENCE, SECTOR};
use super::ring::{Buffer, Ring};

/// Request types.
pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

/// Answers.
pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
/// What a status byte holds until the device writes it.
pub const NO_STATUS: u8 = 0xee;

/// What a request's header, status and data take in memory.
const HEADER_BYTES: usize = 16;
const DATA_AT: u64 = 512;

/// The bytes of a request's header.
pub fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// The bytes of a discard's or write-zeroes' ranges: sector, sectors, flags of each.
pub fn range_bytes(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let bytes =
        |range: &(u64, u32, u32)| [&range.0.to_le_bytes()[..], &range.1.to_le_bytes(), &range.2.to_le_bytes()].concat();
    ranges.iter().flat_map(bytes).collect()
}

/// A request that the device has completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completed {
    /// The status byte.
    pub status: u8,
    /// The length in the used ring.
    pub len: u32,
    /// The memory that the device could write, without the status.
    pub data: Vec<u8>,
}

/// A place in guest memory for one request, and what it is used for.
#[derive(Clone, Copy)]
struct Slot {
    address: u64,
    /// Bytes that the device may write.
    writable: usize,
}

/// A ring, and memory for requests on it.
pub struct Queue {
    pub ring: Ring,
    slot_bytes: usize,
    free: Vec<u64>,
    running: HashMap<u16, Slot>,
}

impl Queue {
    /// Room for `depth` requests of `bytes` bytes of data each.
    pub fn new(ring: Ring, depth: usize, bytes: usize) -> Queue {
        // The data of every other one is where a disk could move it to.
        let place = |slot| ring.guest.allocate(DATA_AT + 64 + bytes as u64, DATA_AT) + 64 * (slot as u64 % 2);
        let free = (0..depth).map(place).collect();
        Queue { ring, slot_bytes: bytes, free, running: HashMap::new() }
    }

    /// How many requests run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Where the statuses of the requests that run are.
    pub fn status_places(&self) -> Vec<u64> {
        self.running.values().map(|slot| slot.address + HEADER_BYTES as u64).collect()
    }

    /// Whether another request has room.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty() && self.ring.free() >= 3
    }

    /// Puts a request on the ring, without a kick: its bytes for the device to read, and room for the device to write.
    #[track_caller]
    pub fn submit(&mut self, kind: u32, sector: u64, readable: &[u8], writable: usize) -> u16 {
        assert!(readable.len().max(writable) <= self.slot_bytes, "the test's queue has smaller requests");
        let address = self.free.pop().expect("the test's queue has room");
        let guest = Arc::clone(&self.ring.guest);
        guest.write(address, &header(kind, sector));
        let status = address + HEADER_BYTES as u64;
        guest.write(status, &[NO_STATUS]);
        let mut buffers = vec![Buffer::readable(address, HEADER_BYTES)];
        let data = address + DATA_AT;
        if !readable.is_empty() {
            guest.write(data, readable);
            buffers.push(Buffer::readable(data, readable.len()));
        }
        if writable > 0 {
            buffers.push(Buffer::writable(data, writable));
        }
        buffers.push(Buffer::writable(status, 1));
        let head = self.ring.submit(&buffers);
        self.running.insert(head, Slot { address, writable });
        head
    }

    /// Takes a completion of the ring, if there is one.
    pub fn take(&mut self) -> Option<(u16, Completed)> {
        let (head, len) = self.ring.take_used()?;
        Some((head, self.finish(head, len)))
    }

    /// Waits for a completion.
    pub fn wait(&mut self, limit: Duration) -> Option<(u16, Completed)> {
        let (head, len) = self.ring.wait_used(limit)?;
        Some((head, self.finish(head, len)))
    }

    #[track_caller]
    fn finish(&mut self, head: u16, len: u32) -> Completed {
        let slot = self.running.remove(&head).expect("a completion of a request that runs");
        let guest = &self.ring.guest;
        let status = guest.read(slot.address + HEADER_BYTES as u64, 1)[0];
        let data = guest.read(slot.address + DATA_AT, slot.writable);
        self.free.push(slot.address);
        Completed { status, len, data }
    }

    /// Carries out one request.
    #[track_caller]
    pub fn execute(&mut self, kind: u32, sector: u64, readable: &[u8], writable: usize) -> Completed {
        let head = self.submit(kind, sector, readable, writable);
        self.ring.kick();
        let Some((done, completed)) = self.wait(PATIENCE) else { panic!("a request of type {kind} never completes") };
        assert_eq!(done, head, "the only request is what completes");
        completed
    }

    /// Reads, which has to work.
    #[track_caller]
    pub fn read(&mut self, sector: u64, bytes: usize) -> Vec<u8> {
        let Completed { status, len, data } = self.execute(IN, sector, &[], bytes);
        assert_eq!((status, len as usize), (OK, bytes + 1), "reading {bytes} bytes at sector {sector}");
        data
    }

    /// Writes, which has to work.
    #[track_caller]
    pub fn write(&mut self, sector: u64, bytes: &[u8]) {
        let completed = self.execute(OUT, sector, bytes, 0);
        assert_eq!((completed.status, completed.len), (OK, 1), "writing {} bytes at sector {sector}", bytes.len());
    }

    /// Flushes, which has to work.
    #[track_caller]
    pub fn flush(&mut self) {
        assert_eq!(self.execute(FLUSH, 0, &[], 0).status, OK);
    }

    /// Random reads and writes within some sectors, several at once, each read compared with `model`, the whole disk's contents.
    #[track_caller]
    pub fn work(&mut self, model: &mut [u8], sectors: Range<usize>, rng: &mut SmallRng, batches: usize) {
        for _ in 0..batches {
            self.work_once(model, sectors.clone(), rng);
        }
    }

    #[track_caller]
    fn work_once(&mut self, model: &mut [u8], sectors: Range<usize>, rng: &mut SmallRng) {
        let mut taken: Vec<Range<usize>> = Vec::new();
        let mut reads = HashMap::new();
        for _ in 0..rng.random_range(1..=16) {
            if !self.has_room() {
                break;
            }
            let len = rng.random_range(1..=(self.slot_bytes / SECTOR).min(sectors.len()));
            let start = rng.random_range(sectors.start..=sectors.end - len);
            // Requests that run at the same time have no order.
            if taken.iter().any(|other| start < other.end && other.start < start + len) {
                continue;
            }
            taken.push(start..start + len);
            let bytes = start * SECTOR..(start + len) * SECTOR;
            if rng.random() {
                rng.fill_bytes(&mut model[bytes.clone()]);
                self.submit(OUT, start as u64, &model[bytes], 0);
            } else {
                let head = self.submit(IN, start as u64, &[], bytes.len());
                reads.insert(head, bytes);
            }
        }
        self.ring.kick();
        for _ in 0..taken.len() {
            let Some((head, completed)) = self.wait(PATIENCE) else { panic!("a request never completes") };
            assert_eq!(completed.status, OK);
            if let Some(bytes) = reads.remove(&head) {
                assert_eq!(completed.len as usize, bytes.len() + 1);
                let at = bytes.start;
                assert!(completed.data == model[bytes], "what is read at byte {at} is not what was written there");
            }
        }
    }

    /// The memory of the ring.
    pub fn guest(&self) -> &Arc<Guest> {
        &self.ring.guest
    }
}
