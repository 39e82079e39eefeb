//! A ring in guest memory that holds anything: nothing panics, and what is taken is what the reference, `virtio-queue`, takes.
#![no_main]

use std::sync::{Arc, LazyLock};

use fuzz_targets::{Choices, unnamed_file};
use libfuzzer_sys::fuzz_target;
use pando::sys::guest::{GuestMemory, RegionPlace};
use pando::vhost_user::ring::{Chain, Ring, RingError, RingPlace};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Two regions that follow one another for the guest and nowhere else.
const REGION_BYTES: u64 = 64 << 10;
const USER: [u64; 2] = [0x7000_0000_0000, 0x6000_0000_0000];
const MEMORY_BYTES: u64 = 2 * REGION_BYTES;

/// The parts of the ring in the first region, and the reference's own used ring.
const DESCRIPTORS: u64 = 0x0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const USED_REFERENCE: u64 = 0x3000;
/// The largest ring that fits there.
const SIZE_MAX: u16 = 256;
/// An indirect table, across both regions.
const TABLE: u64 = REGION_BYTES - 1024 + 4;
const TABLE_ENTRIES: u64 = 128;

struct World {
    memory: Arc<GuestMemory>,
    mmap: GuestMemoryMmap,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let file = unnamed_file();
    file.set_len(MEMORY_BYTES).unwrap();
    // The second half of the file is the first region.
    let places = [0, 1].map(|index| RegionPlace {
        guest_address: index as u64 * REGION_BYTES,
        user_address: USER[index],
        bytes: REGION_BYTES,
        file_offset: (1 - index as u64) * REGION_BYTES,
    });
    let regions = places.map(|place| (place, file.try_clone().unwrap()));
    let ranges = places.map(|place| {
        let file = FileOffset::new(file.try_clone().unwrap(), place.file_offset);
        (GuestAddress(place.guest_address), REGION_BYTES as usize, Some(file))
    });
    World {
        memory: Arc::new(GuestMemory::map(regions.into()).unwrap()),
        mmap: GuestMemoryMmap::from_ranges_with_files(ranges).unwrap(),
    }
});

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    let mmap = &WORLD.mmap;
    mmap.write_slice(&[0; MEMORY_BYTES as usize], GuestAddress(0)).unwrap();
    let size = 1 << choices.below(9);
    let event_idx = choices.below(2) == 0;
    let index = choices.any::<u16>();
    let place =
        RingPlace { size, descriptors: USER[0] + DESCRIPTORS, available: USER[0] + AVAILABLE, used: USER[0] + USED };
    mmap.write_obj(index.to_le(), GuestAddress(AVAILABLE + 2)).unwrap();
    mmap.write_obj(index.to_le(), GuestAddress(USED + 2)).unwrap();
    mmap.write_obj(index.to_le(), GuestAddress(USED_REFERENCE + 2)).unwrap();
    write_descriptors(&mut choices, size);
    if choices.rarely() {
        return run_anywhere(&mut choices, place, index, event_idx);
    }
    let ring = Ring::new(&WORLD.memory, &place, index, event_idx).unwrap();
    let mut queue = Queue::new(SIZE_MAX).unwrap();
    queue.try_set_size(size).unwrap();
    queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED_REFERENCE)).unwrap();
    queue.set_event_idx(event_idx);
    queue.set_next_avail(index);
    queue.set_next_used(index);
    queue.set_ready(true);
    Pair { ring, queue, size, event_idx, available: index }.run(&mut choices);
});

/// Fills the ring's table and the indirect one, mostly with what a driver would write.
fn write_descriptors(choices: &mut Choices<'_>, size: u16) {
    for (table, entries, limit) in [(DESCRIPTORS, u64::from(size), size), (TABLE, TABLE_ENTRIES, TABLE_ENTRIES as u16)]
    {
        // Few enough that most of the input is left for what is done with them.
        for entry in 0..choices.up_to(entries.min(24)) {
            let descriptor = random_descriptor(choices, entry as u16, limit, table == DESCRIPTORS);
            WORLD.mmap.write_obj(descriptor, GuestAddress(table + entry * 16)).unwrap();
        }
    }
}

fn random_descriptor(choices: &mut Choices<'_>, entry: u16, limit: u16, may_be_indirect: bool) -> Descriptor {
    let next = if choices.rarely() { choices.any() } else { (entry + 1) % limit };
    if (may_be_indirect && choices.sometimes()) || choices.rarely() {
        let skipped = choices.below(TABLE_ENTRIES);
        let len = if choices.rarely() { choices.any() } else { 16 * (TABLE_ENTRIES - skipped) as u32 };
        let address = if choices.rarely() { choices.any() } else { TABLE + 16 * skipped };
        let flags = if choices.rarely() { choices.any() } else { INDIRECT };
        return Descriptor::new(address, len, flags, next);
    }
    let address = if choices.rarely() { choices.any() } else { choices.below(MEMORY_BYTES - 4096) };
    let len = if choices.rarely() { choices.any() } else { choices.up_to(4096) as u32 };
    // The later a descriptor, the likelier the device may write it, as in a request.
    let write = if choices.below(8) < u64::from(entry % 8) { WRITE } else { 0 };
    let flags = if choices.rarely() { choices.any() } else { write | choices.one_of(&[NEXT, NEXT, 0]) };
    Descriptor::new(address, len, flags, next)
}

/// A ring whose parts may lie anywhere, also upon each other: there is no reference for that. Nothing panics and everything ends.
fn run_anywhere(choices: &mut Choices<'_>, usual: RingPlace, index: u16, event_idx: bool) {
    let mut somewhere = |usual: u64| match choices.below(4) {
        0 => usual,
        1 => USER[choices.below(2) as usize] + choices.below(REGION_BYTES),
        2 => USER[choices.below(2) as usize] + choices.below(REGION_BYTES / 16) * 16,
        _ => choices.any(),
    };
    let (descriptors, available, used) =
        (somewhere(usual.descriptors), somewhere(usual.available), somewhere(usual.used));
    let size = if choices.sometimes() { choices.any() } else { usual.size };
    let place = RingPlace { size, descriptors, available, used };
    let Ok(mut ring) = Ring::new(&WORLD.memory, &place, index, event_idx) else { return };
    let mut chain = Chain::default();
    for _ in 0..64 {
        match ring.waiting() {
            Ok(0) => {
                if !ring.resume_kicks() {
                    return;
                }
            }
            Ok(_) => {}
            Err(error) => return check_error(&error, size),
        }
        let Ok(head) = ring.take() else { return };
        let _ = ring.chain(head, &WORLD.memory, &mut chain);
        // Here the device may well write upon the ring itself.
        if choices.below(4) == 0 {
            chain.writable.iter().for_each(|buffer| buffer.fill_zero().unwrap());
        }
        ring.complete(head, choices.any());
        ring.publish();
    }
}

fn check_error(error: &RingError, size: u16) {
    match error {
        RingError::Jumped { from, to, .. } => assert!(to.wrapping_sub(*from) > size),
        RingError::Head { head, .. } => assert!(*head >= size),
        error => panic!("a running ring failed with: {error}"),
    }
}

/// Both sides of one ring.
struct Pair {
    ring: Ring,
    queue: Queue,
    size: u16,
    event_idx: bool,
    available: u16,
}

impl Pair {
    fn run(mut self, choices: &mut Choices<'_>) {
        let mmap = &WORLD.mmap;
        let mut first = true;
        let mut rounds = 0;
        while !choices.is_over() && rounds < 16 {
            rounds += 1;
            self.offer(choices);
            if choices.rarely() {
                // A guest may change what it likes at any time; only the used rings are written by us.
                let at = choices.below(MEMORY_BYTES - 2);
                if !(USED - 1..USED_REFERENCE + 0x1000).contains(&at) {
                    mmap.write_obj(choices.any::<u16>(), GuestAddress(at)).unwrap();
                }
            }
            let waiting = match (self.ring.waiting(), self.queue.iter(mmap).map(|_| ())) {
                (Ok(waiting), Ok(())) => waiting,
                (Err(error), Err(_)) => return check_error(&error, self.size),
                (ours, reference) => panic!("{ours:?}, and the reference has {reference:?}"),
            };
            let mut heads = Vec::new();
            for _ in 0..waiting {
                let expected = self.queue.pop_descriptor_chain(mmap).expect("as many wait in the reference");
                match self.ring.take() {
                    Ok(head) => assert_eq!(head, expected.head_index()),
                    Err(error) => return check_error(&error, self.size),
                }
                heads.push(expected.head_index());
                self.check_chain(expected.head_index(), &expected.collect::<Vec<_>>());
            }
            for head in &heads {
                let len = choices.any();
                self.ring.complete(*head, len);
                self.queue.add_used(mmap, *head, len).unwrap();
            }
            let (ours, reference) = (self.ring.publish(), self.queue.needs_notification(mmap).unwrap());
            if heads.is_empty() {
                assert!(!ours);
            } else if first {
                assert!(ours, "the first completions are always notified");
                first = false;
            } else if self.event_idx {
                assert_eq!(ours, reference);
            }
            let suspends = choices.below(2) == 0;
            if suspends {
                self.ring.suspend_kicks();
                self.queue.disable_notification(mmap).unwrap();
            } else {
                let missed = self.ring.resume_kicks();
                assert_eq!(missed, self.queue.enable_notification(mmap).unwrap());
            }
            self.check_used(suspends);
        }
    }

    fn offer(&mut self, choices: &mut Choices<'_>) {
        for _ in 0..choices.up_to(self.size.min(8).into()) {
            let head: u16 = if choices.rarely() { choices.any() } else { choices.below(self.size.into()) as u16 };
            let at = AVAILABLE + 4 + u64::from(self.available % self.size) * 2;
            WORLD.mmap.write_obj(head.to_le(), GuestAddress(at)).unwrap();
            self.available = self.available.wrapping_add(1);
        }
        if choices.rarely() {
            self.available = choices.any();
        }
        WORLD.mmap.write_obj(self.available.to_le(), GuestAddress(AVAILABLE + 2)).unwrap();
        let event = self.available.wrapping_sub(choices.below(12) as u16);
        WORLD.mmap.write_obj(event.to_le(), GuestAddress(AVAILABLE + 4 + u64::from(self.size) * 2)).unwrap();
    }

    /// Sees that a chain that is taken has the bytes of the reference's descriptors.
    fn check_chain(&self, head: u16, expected: &[Descriptor]) {
        let mut chain = Chain::default();
        match self.ring.chain(head, &WORLD.memory, &mut chain) {
            Err(error) => return assert!(!error.to_string().is_empty()),
            // The reference takes no table of more than 65535 descriptors.
            Ok(()) if self.has_huge_table() => return,
            Ok(()) => {}
        }
        let len = |writable| {
            let of_kind = expected.iter().filter(|descriptor| descriptor.is_write_only() == writable);
            of_kind.map(|descriptor| u64::from(descriptor.len())).sum::<u64>()
        };
        assert_eq!(chain.writable.iter().map(|buffer| buffer.len() as u64).sum::<u64>(), len(true));
        let mut found = Vec::new();
        for buffer in &chain.readable {
            let mut bytes = vec![0; buffer.len()];
            buffer.copy_to_slice(&mut bytes).unwrap();
            found.extend(bytes);
        }
        let mut bytes = Vec::new();
        for descriptor in expected.iter().filter(|descriptor| !descriptor.is_write_only() && descriptor.len() > 0) {
            let start = bytes.len();
            bytes.resize(start + descriptor.len() as usize, 0);
            WORLD.mmap.read_slice(&mut bytes[start..], descriptor.addr()).unwrap();
        }
        assert!(found == bytes, "the readable bytes differ");
    }

    fn has_huge_table(&self) -> bool {
        (0..self.size).any(|index| {
            let at = GuestAddress(DESCRIPTORS + u64::from(index) * 16);
            let descriptor: Descriptor = WORLD.mmap.read_obj(at).unwrap();
            descriptor.refers_to_indirect_table() && descriptor.len() / 16 > 65535
        })
    }

    fn check_used(&self, suspended: bool) {
        let [(ours, our_event), (reference, event)] = [USED, USED_REFERENCE].map(|at| {
            let mut bytes = vec![0; 4 + usize::from(self.size) * 8];
            WORLD.mmap.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            let event: u16 = WORLD.mmap.read_obj(GuestAddress(at + bytes.len() as u64)).unwrap();
            (bytes, event)
        });
        assert!(ours == reference, "the used rings differ");
        // The reference goes on asking for a kick that it has asked for.
        assert!(our_event == event || suspended && our_event == event.wrapping_sub(1), "{our_event}, {event}");
        assert!(!(self.event_idx && suspended) || our_event != self.ring.next_available(), "asks for a kick");
    }
}
