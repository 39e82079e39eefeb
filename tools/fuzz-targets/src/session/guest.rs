//! [`Guest`]: memory that a backend maps, with two rings in it, and a driver that uses them as it should.
//!
//! The memory is two regions, which follow one another for the guest and nowhere else, each in a file of its own between two pages that no backend
//! may touch. The rings and what belongs to their requests lie in the first, their data in the second.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pando::sys::guest::{GuestMemory, RegionPlace, SharedArea, full_barrier};
use pando::sys::{events, shared, socket};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::disk::{Content, Contents, Disk, SECTOR, pattern};
use crate::Choices;

/// Bytes of a region.
pub const REGION_BYTES: u64 = 64 << 10;
/// Where they are for the front end.
pub const USER: [u64; 2] = [0x7000_0000_0000, 0x6000_0000_0000];
/// Bytes ahead of a region and behind it that are not part of it.
const MARGIN_BYTES: u64 = 4096;
const MARGIN: u8 = 0xa5;

/// How many rings, and how many descriptors each has.
pub const RINGS: usize = 2;
pub const RING_SIZE: u16 = 32;
/// Requests of a ring at once, each with three descriptors.
pub const SLOTS: usize = 8;

const RING_BYTES: u64 = 0x2000;
const AVAILABLE: u64 = 0x800;
const USED: u64 = 0x1000;
/// Each slot's header and status, and its indirect table.
const HEADERS: u64 = 0x8000;
const HEADER_STRIDE: u64 = 64;
const TABLES: u64 = 0xc000;
const TABLE_STRIDE: u64 = 128;
/// Each slot's data.
const DATA_BYTES: u64 = REGION_BYTES / (RINGS * SLOTS) as u64;
/// The most sectors of a request.
pub const SECTORS_MAX: u64 = DATA_BYTES / SECTOR as u64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What is asked for.
pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

/// How long a request may take. One that takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(15);

/// Memory and rings.
pub struct Guest {
    files: [File; 2],
    memory: Arc<GuestMemory>,
    pub rings: [Ring; RINGS],
    event_idx: bool,
}

/// A ring, from its driver's side.
pub struct Ring {
    pub kick: File,
    pub call: File,
    /// All of its parts.
    area: SharedArea,
    next_available: u16,
    next_used: u16,
    /// Where available stood at the last kick.
    kicked: u16,
    pending: [Option<Request>; SLOTS],
}

/// What a driver is to ask for.
pub struct Wish {
    pub kind: u32,
    pub sectors: Range<u64>,
    /// Of the write, if it is one.
    pub number: u16,
    /// How its descriptors lie: one bit for an indirect table, one for data in two pieces.
    pub form: u64,
}

/// A request that the device has not given back.
#[derive(Clone)]
struct Request {
    kind: u32,
    sectors: Range<u64>,
    content: Option<Content>,
    /// What may have been written since it was submitted, besides by itself.
    rivals: Vec<(Range<u64>, Content)>,
    /// What its sectors may have held then.
    before: Vec<Contents>,
}

fn place_of(region: usize) -> [u64; 4] {
    [region as u64 * REGION_BYTES, REGION_BYTES, USER[region], MARGIN_BYTES]
}

fn event() -> File {
    events::into_file(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an event descriptor"))
}

impl Guest {
    /// Memory of zeros, with rings that have never been used.
    pub fn new(event_idx: bool) -> Guest {
        let files = [0, 1].map(|_| {
            let file = shared::create(c"pando-fuzz-guest", REGION_BYTES + 2 * MARGIN_BYTES).expect("memory");
            for at in [0, MARGIN_BYTES + REGION_BYTES] {
                file.write_all_at(&[MARGIN; MARGIN_BYTES as usize], at).expect("memory");
            }
            file
        });
        let regions = [0, 1].map(|region| {
            let [guest_address, bytes, user_address, file_offset] = place_of(region);
            let place = RegionPlace { guest_address, user_address, bytes, file_offset };
            (place, files[region].try_clone().expect("a copy"))
        });
        let memory = Arc::new(GuestMemory::map(regions.into()).expect("a mapping"));
        let rings = [0, 1].map(|index| Ring {
            kick: event(),
            call: event(),
            area: memory.area(USER[0] + index * RING_BYTES, RING_BYTES as usize, 16).expect("it lies in memory"),
            next_available: 0,
            next_used: 0,
            kicked: 0,
            pending: Default::default(),
        });
        Guest { files, memory, rings, event_idx }
    }

    /// The file that a region is in.
    pub fn file(&self, region: usize) -> BorrowedFd<'_> {
        self.files[region].as_fd()
    }

    /// A region as messages have it: guest address, bytes, the front end's address, offset in the file.
    pub fn region(&self, region: usize) -> [u64; 4] {
        place_of(region)
    }

    /// A ring's place as SET_VRING_ADDR has it: descriptors, used, available.
    pub fn place(&self, ring: usize) -> [u64; 3] {
        let start = USER[0] + ring as u64 * RING_BYTES;
        [start, start + USED, start + AVAILABLE]
    }

    /// Writes to the guest's memory; what lies outside of it goes nowhere.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        let (mut pieces, mut done) = (Vec::new(), 0);
        self.memory.writable(address, bytes.len() as u64, &mut pieces);
        pieces.iter().for_each(|piece| done += piece.copy_from_slice(&bytes[done..]).expect("memory that stays"));
    }

    /// All of the memory, and what lies about it.
    pub fn snapshot(&self) -> [Vec<u8>; 2] {
        [0, 1].map(|region| {
            let mut bytes = vec![0; (REGION_BYTES + 2 * MARGIN_BYTES) as usize];
            self.files[region].read_exact_at(&mut bytes, 0).expect("memory");
            bytes
        })
    }

    /// Sees that nobody has touched what lies about a snapshot's regions.
    #[track_caller]
    pub fn check_margins(snapshot: &[Vec<u8>; 2]) {
        const UNTOUCHED: [u8; MARGIN_BYTES as usize] = [MARGIN; MARGIN_BYTES as usize];
        for bytes in snapshot {
            let (ahead, rest) = bytes.split_at(MARGIN_BYTES as usize);
            let behind = &rest[REGION_BYTES as usize..];
            assert!(ahead == UNTOUCHED && behind == UNTOUCHED, "memory outside the guest's was written");
        }
    }

    fn start_of(&self, ring: usize) -> u64 {
        ring as u64 * RING_BYTES
    }

    /// The index of the used ring, as the device has it.
    pub fn used_index(&self, ring: usize) -> u16 {
        self.rings[ring].area.load_acquire(USED as usize + 2)
    }

    /// Whether a ring has nothing pending.
    pub fn is_idle(&self, ring: usize) -> bool {
        self.rings[ring].pending.iter().all(Option::is_none)
    }

    /// Puts a request on a ring, if it has room: mostly one for data, of sectors that the disk has.
    pub fn submit(&mut self, ring: usize, choices: &mut Choices<'_>, disk: &mut Disk, number: u16) {
        let end = disk.sectors();
        let Some(slot) = self.rings[ring].pending.iter().position(Option::is_none).filter(|_| end > 0) else { return };
        let kind = choices.one_of(&[IN, OUT, OUT, WRITE_ZEROES, DISCARD, FLUSH]);
        let count = 1 + choices.below(SECTORS_MAX.min(end));
        let start = choices.below(end - count + 1);
        let sectors = match kind {
            FLUSH => 0..0,
            // Whole clusters of 4 KiB, so that it is known what becomes of each.
            DISCARD => start / 8 * 8..(start / 8 * 8 + 8).min(end),
            _ => start..start + count,
        };
        self.put(ring, slot, Wish { kind, sectors, number, form: choices.below(4) }, disk);
    }

    /// Puts a request into a slot that is free.
    pub fn put(&mut self, ring: usize, slot: usize, wish: Wish, disk: &mut Disk) {
        let Wish { kind, sectors, number, form } = wish;
        let data_at = REGION_BYTES + (ring * SLOTS + slot) as u64 * DATA_BYTES;
        let header_at = HEADERS + (ring * SLOTS + slot) as u64 * HEADER_STRIDE;
        let len = (sectors.end - sectors.start) * SECTOR as u64;
        let (content, data) = match kind {
            OUT => {
                let bytes: Vec<u8> = sectors.clone().flat_map(|sector| pattern(number, sector)).collect();
                self.write(data_at, &bytes);
                (Some(Content::Written(number)), Some((data_at, len, 0)))
            }
            IN => {
                self.write(data_at, &vec![0xee; len as usize]);
                (None, Some((data_at, len, WRITE)))
            }
            DISCARD | WRITE_ZEROES => {
                let mut range = sectors.start.to_le_bytes().to_vec();
                range.extend((sectors.end - sectors.start).to_le_bytes());
                self.write(data_at, &range);
                (Some(Content::Zero), Some((data_at, 16, 0)))
            }
            _ => (None, None),
        };
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(if kind == IN || kind == OUT { sectors.start } else { 0 }.to_le_bytes());
        // The status, which the device is to write.
        header.push(0xff);
        self.write(header_at, &header);
        let mut buffers = vec![(header_at, 16, 0)];
        match data {
            Some((at, len, flags)) if form & 2 != 0 && len > 64 => {
                buffers.extend([(at, 48, flags), (at + 48, len - 48, flags)]);
            }
            other => buffers.extend(other),
        }
        buffers.push((header_at + 16, 1, WRITE));
        let head = self.describe(ring, slot, &buffers, form & 1 != 0);

        let request = Request {
            kind,
            sectors: sectors.clone(),
            content,
            rivals: self
                .rings
                .iter()
                .flat_map(|ring| ring.pending.iter().flatten())
                .filter_map(Request::effect)
                .collect(),
            before: disk.contents(sectors.clone()),
        };
        if let Some(content) = content {
            disk.begin(sectors.clone(), content);
            let others = self.rings.iter_mut().flat_map(|ring| ring.pending.iter_mut().flatten());
            others.for_each(|other| other.rivals.push((sectors.clone(), content)));
        }
        let ring = &mut self.rings[ring];
        ring.pending[slot] = Some(request);
        let entry = usize::from(ring.next_available % RING_SIZE);
        ring.area.store_release(AVAILABLE as usize + 4 + 2 * entry, head);
        ring.next_available = ring.next_available.wrapping_add(1);
        ring.area.store_release(AVAILABLE as usize + 2, ring.next_available);
    }

    /// Writes a chain of descriptors, and gives its head.
    fn describe(&self, ring: usize, slot: usize, buffers: &[(u64, u64, u16)], indirect: bool) -> u16 {
        let table = self.start_of(ring);
        let first = slot as u16 * 3;
        let descriptor = |address: u64, len: u64, flags: u16, next: u16| {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend((len as u32).to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            bytes
        };
        let is_indirect = indirect || buffers.len() > 3;
        let (at, index) = match is_indirect {
            true => (TABLES + (ring * SLOTS + slot) as u64 * TABLE_STRIDE, 0),
            false => (table + u64::from(first) * 16, first),
        };
        let mut chain = Vec::new();
        for (position, (address, len, flags)) in buffers.iter().enumerate() {
            let next = if position + 1 < buffers.len() { NEXT } else { 0 };
            chain.extend(descriptor(*address, *len, flags | next, index + position as u16 + 1));
        }
        self.write(at, &chain);
        if is_indirect {
            self.write(table + u64::from(first) * 16, &descriptor(at, chain.len() as u64, INDIRECT, 0));
        }
        first
    }

    /// Kicks a ring, if the device wants to be.
    pub fn kick(&mut self, ring: usize) {
        let is_event_idx = self.event_idx;
        let Ring { area, next_available, kicked, .. } = &mut self.rings[ring];
        let (next, before) = (*next_available, std::mem::replace(kicked, *next_available));
        full_barrier();
        let wanted = if is_event_idx {
            let event = area.load(USED as usize + 4 + 8 * usize::from(RING_SIZE));
            next.wrapping_sub(event).wrapping_sub(1) < next.wrapping_sub(before)
        } else {
            area.load(USED as usize) & 1 == 0
        };
        if wanted {
            self.kick_anyway(ring);
        }
    }

    /// Kicks a ring.
    pub fn kick_anyway(&self, ring: usize) {
        events::signal(&self.rings[ring].kick).expect("an event descriptor");
    }

    /// Takes what the device has given back, and sees that it is right.
    pub fn collect(&mut self, ring: usize, disk: &mut Disk) {
        while self.rings[ring].next_used != self.used_index(ring) {
            let entry = usize::from(self.rings[ring].next_used % RING_SIZE);
            let element: [u8; 8] = self.rings[ring].area.read(USED as usize + 4 + 8 * entry);
            self.rings[ring].next_used = self.rings[ring].next_used.wrapping_add(1);
            self.ask_for_call(ring);
            let head = u32::from_le_bytes([element[0], element[1], element[2], element[3]]);
            let len = u32::from_le_bytes([element[4], element[5], element[6], element[7]]);
            assert!(head.is_multiple_of(3) && head < 3 * SLOTS as u32, "descriptor {head} is given back");
            let slot = head as usize / 3;
            let request = self.rings[ring].pending[slot].take().expect("what is given back was pending");
            self.check(ring, slot, &request, len, disk);
        }
    }

    fn check(&self, ring: usize, slot: usize, request: &Request, len: u32, disk: &mut Disk) {
        let mut status = [0];
        self.memory.read(HEADERS + (ring * SLOTS + slot) as u64 * HEADER_STRIDE + 16, &mut status);
        assert_eq!(status, [0], "{} of sectors {:?} fails", request.kind, request.sectors);
        let bytes = (request.sectors.end - request.sectors.start) as usize * SECTOR;
        let data = if request.kind == IN { bytes } else { 0 };
        assert_eq!(len as usize, data + 1);
        if request.kind == IN {
            let mut found = vec![0; bytes];
            self.memory.read(REGION_BYTES + (ring * SLOTS + slot) as u64 * DATA_BYTES, &mut found);
            let mut contents = request.before.clone();
            for (sector, contents) in request.sectors.clone().zip(&mut contents) {
                let rivals = request.rivals.iter().filter(|(range, _)| range.contains(&sector));
                contents.extend(rivals.map(|(_, content)| *content));
            }
            disk.check(request.sectors.start, &found, &contents);
        }
        if let Some((sectors, content)) = request.effect() {
            disk.complete(sectors, content, &request.rivals);
        }
    }

    /// Has the device call at the next completion.
    fn ask_for_call(&self, ring: usize) {
        let Ring { area, next_used, .. } = &self.rings[ring];
        if self.event_idx {
            area.store_release(AVAILABLE as usize + 4 + 2 * usize::from(RING_SIZE), *next_used);
            full_barrier();
        }
    }

    /// Waits, by the device's calls alone, until a ring has nothing pending.
    #[track_caller]
    pub fn finish(&mut self, ring: usize, disk: &mut Disk) {
        let begun = Instant::now();
        loop {
            self.collect(ring, disk);
            if self.is_idle(ring) {
                return;
            }
            let left = PATIENCE.saturating_sub(begun.elapsed()).as_millis() as i32;
            let call = [Some(self.rings[ring].call.as_fd())];
            let called = socket::wait_readable(call, left).expect("an event descriptor")[0];
            assert!(
                called,
                "requests of ring {ring} are lost: {} of {}",
                self.rings[ring].next_used, self.rings[ring].next_available
            );
            events::drain(&self.rings[ring].call).expect("an event descriptor");
        }
    }
}

impl Request {
    /// What it writes, and where.
    fn effect(&self) -> Option<(Range<u64>, Content)> {
        self.content.map(|content| (self.sectors.clone(), content))
    }
}
