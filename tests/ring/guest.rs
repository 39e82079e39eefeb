//! [`Guest`]: memory and a ring as a driver sees them, with our [`Ring`] and the reference's [`Queue`] side by side.
//!
//! Both sides of a comparison read the same descriptors and the same available ring; each has a used ring of its own, so
//! that their bytes can be compared.

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};

use pando::sys::guest::{GuestMemory, RegionPlace};
use pando::vhost_user::ring::{Chain, Ring, RingPlace};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

const KIB: u64 = 1 << 10;

/// Regions of guest memory. The first three follow one another for the guest and for nobody else; the last, far off, has the rings.
const REGIONS: [RegionPlace; 4] = [
    region(0, 0x7000_0000_0000, 1024 * KIB, 512 * KIB),
    region(1024 * KIB, 0x7100_0000_0000, 512 * KIB, 0),
    region(1536 * KIB, 0x6000_0000_1000, 256 * KIB, 1536 * KIB),
    region(RINGS, RINGS_USER, 2048 * KIB, 2048 * KIB),
];
const FILE_BYTES: u64 = 4096 * KIB;

const RINGS: u64 = 4 << 30;
const RINGS_USER: u64 = 0x7200_0000_0000;
const DESCRIPTORS_AT: u64 = 0;
const AVAILABLE_AT: u64 = 640 * KIB;
const USED_AT: u64 = 768 * KIB;
const USED_REFERENCE_AT: u64 = 1152 * KIB;

/// Memory for buffers: one range within a region, and one across two.
pub const BUFFERS: [Range<u64>; 2] = [0..896 * KIB, 1152 * KIB..1792 * KIB];
/// Memory for indirect tables, across two regions.
pub const TABLES: Range<u64> = 896 * KIB..1152 * KIB;
/// The address behind the last byte of buffers, where there is no memory.
pub const NOWHERE: u64 = 1792 * KIB;

/// What is in the memory for buffers at first: random, so that no two parts of it are alike.
static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = vec![0; NOWHERE as usize];
    StdRng::seed_from_u64(0).fill_bytes(&mut bytes);
    bytes
});

const fn region(guest_address: u64, user_address: u64, bytes: u64, file_offset: u64) -> RegionPlace {
    RegionPlace { guest_address, user_address, bytes, file_offset }
}

/// A guest with one ring.
pub struct Guest {
    /// As the device maps it.
    pub memory: Arc<GuestMemory>,
    /// As the driver sees it.
    pub mmap: GuestMemoryMmap,
    /// The ring's size.
    pub size: u16,
    event_idx: bool,
    /// The available index that the driver has written last.
    available: u16,
}

impl Guest {
    /// A guest with random bytes in all of its buffers and a ring that has run up to `index`.
    pub fn new(size: u16, event_idx: bool, index: u16) -> Guest {
        let file = tempfile::tempfile().unwrap();
        file.set_len(FILE_BYTES).unwrap();
        let clone = |_| file.try_clone().unwrap();
        let regions = REGIONS.into_iter().map(|place| (place, clone(()))).collect::<Vec<(RegionPlace, File)>>();
        let ranges = REGIONS.map(|place| {
            let file = FileOffset::new(clone(()), place.file_offset);
            (GuestAddress(place.guest_address), place.bytes as usize, Some(file))
        });
        let guest = Guest {
            memory: Arc::new(GuestMemory::map(regions).unwrap()),
            mmap: GuestMemoryMmap::from_ranges_with_files(ranges).unwrap(),
            size,
            event_idx,
            available: index,
        };
        guest.mmap.write_slice(&CONTENT, GuestAddress(0)).unwrap();
        guest.store(AVAILABLE_AT + 2, index);
        for used in [USED_AT, USED_REFERENCE_AT] {
            guest.store(used + 2, index);
        }
        guest.set_used_event(index);
        guest
    }

    /// Where the ring lies, as a front end says it.
    pub fn place(&self) -> RingPlace {
        RingPlace {
            size: self.size,
            descriptors: RINGS_USER + DESCRIPTORS_AT,
            available: RINGS_USER + AVAILABLE_AT,
            used: RINGS_USER + USED_AT,
        }
    }

    /// Our side of the ring.
    pub fn ring(&self) -> Ring {
        Ring::new(&self.memory, &self.place(), self.available, self.event_idx).unwrap()
    }

    /// The reference's side of it.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(RINGS + DESCRIPTORS_AT)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(RINGS + AVAILABLE_AT)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(RINGS + USED_REFERENCE_AT)).unwrap();
        queue.set_event_idx(self.event_idx);
        queue.set_next_avail(self.available);
        queue.set_next_used(self.available);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.mmap));
        queue
    }

    /// Writes a descriptor of the ring's own table.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.write_table(RINGS + DESCRIPTORS_AT, index, descriptor);
    }

    /// Writes a descriptor of an indirect table.
    pub fn write_table(&self, table: u64, index: u16, descriptor: Descriptor) {
        self.mmap.write_obj(descriptor, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }

    /// Puts the chain that starts at `head` into the available ring, for the device to see at once.
    pub fn offer(&mut self, head: u16) {
        self.store(AVAILABLE_AT + 4 + u64::from(self.available % self.size) * 2, head);
        self.claim(self.available.wrapping_add(1));
    }

    /// Writes the available index.
    pub fn claim(&mut self, index: u16) {
        self.available = index;
        self.mmap.store(index.to_le(), GuestAddress(RINGS + AVAILABLE_AT + 2), Ordering::Release).unwrap();
    }

    /// The available index that the driver has written last.
    pub fn available(&self) -> u16 {
        self.available
    }

    /// Asks to be notified of completions, or not, where there are no event indexes.
    pub fn set_available_flags(&self, flags: u16) {
        self.store(AVAILABLE_AT, flags);
    }

    /// Asks to be notified once the used index passes `index`, where there are event indexes.
    pub fn set_used_event(&self, index: u16) {
        self.store(AVAILABLE_AT + 4 + u64::from(self.size) * 2, index);
    }

    /// Whether the device asks for a kick when the available index has moved from `before` to where it is now.
    pub fn needs_kick(&self, before: u16) -> bool {
        if !self.event_idx {
            return self.load(USED_AT) & 1 == 0;
        }
        let event = self.load(USED_AT + 4 + u64::from(self.size) * 8);
        self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(before)
    }

    /// The used index, as our side shows it.
    pub fn used(&self) -> u16 {
        self.load(USED_AT + 2)
    }

    /// All bytes of our used ring, and of the reference's.
    pub fn used_rings(&self) -> [Vec<u8>; 2] {
        [USED_AT, USED_REFERENCE_AT].map(|at| {
            let mut bytes = vec![0; 4 + usize::from(self.size) * 8 + 2];
            self.mmap.read_slice(&mut bytes, GuestAddress(RINGS + at)).unwrap();
            bytes
        })
    }

    fn load(&self, at: u64) -> u16 {
        u16::from_le(self.mmap.load(GuestAddress(RINGS + at), Ordering::Acquire).unwrap())
    }

    fn store(&self, at: u64, value: u16) {
        self.mmap.store(value.to_le(), GuestAddress(RINGS + at), Ordering::Release).unwrap();
    }

    /// Sees that `chain` has buffers as long as those of `descriptors`, in their order. Gives those to read, and those to write.
    pub fn check_lengths(&self, chain: &Chain<'_>, descriptors: &[Descriptor]) -> [Vec<(GuestAddress, usize)>; 2] {
        let pieces = [false, true].map(|writable| {
            let of_kind = descriptors.iter().filter(|descriptor| descriptor.is_write_only() == writable);
            of_kind.flat_map(pieces_of).collect::<Vec<_>>()
        });
        let readable = chain.readable.iter().map(|buffer| buffer.len());
        let writable = chain.writable.iter().map(|buffer| buffer.len());
        assert!(readable.eq(pieces[0].iter().map(|piece| piece.1)), "lengths of readable buffers");
        assert!(writable.eq(pieces[1].iter().map(|piece| piece.1)), "lengths of writable buffers");
        pieces
    }

    /// Sees that `chain` has exactly the buffers of `descriptors`, in their order.
    pub fn check_buffers(&self, chain: &Chain<'_>, descriptors: &[Descriptor]) {
        let [readable, writable] = self.check_lengths(chain, descriptors);
        for (buffer, (address, len)) in chain.readable.iter().zip(readable) {
            let (mut found, mut expected) = (vec![0; len], vec![0; len]);
            buffer.copy_to_slice(&mut found).unwrap();
            self.mmap.read_slice(&mut expected, address).unwrap();
            assert!(found == expected, "the bytes of the readable buffer of {len} at {address:x?}");
        }
        for (number, (buffer, (address, len))) in chain.writable.iter().zip(writable).enumerate() {
            let pattern = &CONTENT[number..number + len];
            buffer.copy_from_slice(pattern).unwrap();
            let mut found = vec![0; len];
            self.mmap.read_slice(&mut found, address).unwrap();
            assert!(found == pattern, "the bytes of the writable buffer of {len} at {address:x?}");
        }
    }
}

/// The parts of a descriptor's buffer that lie in one region each.
fn pieces_of(descriptor: &Descriptor) -> Vec<(GuestAddress, usize)> {
    let (mut at, end) = (descriptor.addr().0, descriptor.addr().0 + u64::from(descriptor.len()));
    let mut pieces = Vec::new();
    while at < end {
        let region =
            REGIONS.iter().find(|region| (region.guest_address..region.guest_address + region.bytes).contains(&at));
        let region = region.expect("a valid chain's buffers are memory");
        let stop = end.min(region.guest_address + region.bytes);
        pieces.push((GuestAddress(at), (stop - at) as usize));
        at = stop;
    }
    pieces
}

/// Says which seeds to run: some that are always the same, and one that nobody has tried. A failing test shows the last one printed.
pub fn each_seed(count: u64, mut run: impl FnMut(&mut StdRng)) {
    for seed in (0..count).chain([rand::random()]) {
        println!("seed {seed}");
        run(&mut StdRng::seed_from_u64(seed));
    }
}
