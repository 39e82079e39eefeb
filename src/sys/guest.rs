//! [`GuestMemory`]: a guest's memory as this process maps it, and [`SharedArea`], a ring's place in it.
//!
//! The guest and its front end write this memory while it is read here. So nothing gives out a reference: a value is
//! read once, by copy, and it is the copy that gets checked and used. Knows nothing of what the bytes mean.
//!
//! A front end may cut off the file behind a region while it is mapped. What is copied from or to the pages that are gone is a [`Fault`];
//! of a ring's own memory, and of the tables that descriptors lie in, it is noted ([`guard::take_fault`]).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::FileType;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::buffers::{Buffer, Readable, Writable};
use super::guard::{self, Fault};

/// Where a region of guest memory lies: for the guest, for the front end, and in the file that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RegionPlace {
    /// Guest physical address of the first byte.
    pub guest_address: u64,
    /// The front end's own address of the first byte, which ring addresses refer to.
    pub user_address: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Offset of the first byte in the file.
    pub file_offset: u64,
}

/// Why a region cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The numbers make no sense by themselves.
    #[error("memory region {place:x?} is empty or ends past the last address")]
    Place { place: RegionPlace },
    /// Two regions claim the same guest addresses.
    #[error("memory regions {first:x?} and {second:x?} overlap")]
    Overlap { first: RegionPlace, second: RegionPlace },
    /// The file ends ahead of the region, so that there is nothing at its end.
    #[error("memory region {place:x?} ends behind its file, which has {file_bytes:#x} bytes")]
    Short { place: RegionPlace, file_bytes: u64 },
    /// The file cannot be mapped.
    #[error("cannot map memory region {place:x?}")]
    Map {
        place: RegionPlace,
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The file does not say what it is.
    #[error("cannot examine the file of memory region {place:x?}")]
    File {
        place: RegionPlace,
        #[source]
        source: io::Error,
    },
}

struct Region {
    place: RegionPlace,
    /// Address in this process of the region's first byte.
    host: *mut u8,
    /// Keeps the memory mapped.
    _mapping: MmapRegion<()>,
}

// SAFETY: `host` points into the mapping that the region owns; all access goes through guarded copies and numbers.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// All regions of a guest's memory, mapped.
#[derive(Default)]
pub struct GuestMemory {
    /// Sorted by guest address, without overlap.
    regions: Vec<Region>,
}

impl GuestMemory {
    /// Maps each region from its file.
    pub fn map(regions: Vec<(RegionPlace, File)>) -> Result<GuestMemory, MapError> {
        let mut mapped =
            regions.into_iter().map(|(place, file)| Region::map(place, file)).collect::<Result<Vec<_>, _>>()?;
        mapped.sort_by_key(|region| region.place.guest_address);
        for pair in mapped.windows(2) {
            let (first, second) = (pair[0].place, pair[1].place);
            if first.guest_address + first.bytes > second.guest_address {
                return Err(MapError::Overlap { first, second });
            }
        }
        Ok(GuestMemory { regions: mapped })
    }

    /// The host address of `guest_address`, and how many bytes of its region follow it.
    #[inline]
    fn find(&self, guest_address: u64) -> Option<(*mut u8, u64)> {
        // A handful of regions, the first of them with most of what a driver uses.
        self.regions.iter().find_map(|region| {
            let within = guest_address.wrapping_sub(region.place.guest_address);
            // SAFETY: `within` is less than the region's length.
            (within < region.place.bytes)
                .then(|| (unsafe { region.host.add(within as usize) }, region.place.bytes - within))
        })
    }

    /// Calls `piece` with the address and length of each part of the guest's `len` bytes at `guest_address`; `false` when not all of them are memory.
    #[inline]
    fn pieces(&self, mut guest_address: u64, mut len: u64, mut piece: impl FnMut(*mut u8, usize)) -> bool {
        while len > 0 {
            let Some((host, available)) = self.find(guest_address) else { return false };
            let part = available.min(len);
            piece(host, part as usize);
            len -= part;
            let Some(next) = guest_address.checked_add(part) else { return len == 0 };
            guest_address = next;
        }
        true
    }

    /// Appends the guest's `len` bytes at `guest_address` to `to`, a piece for each region that they lie in.
    /// `false` when not all of them are memory; what was appended until then is of no use.
    #[inline]
    pub fn readable<'m>(&'m self, guest_address: u64, len: u64, to: &mut Vec<Readable<'m>>) -> bool {
        // SAFETY: `pieces` yields ranges within regions, which stay mapped as long as `self`.
        self.pieces(guest_address, len, |host, len| to.push(unsafe { Readable::new(host, len) }))
    }

    /// As [`GuestMemory::readable`], for memory to be written.
    #[inline]
    pub fn writable<'m>(&'m self, guest_address: u64, len: u64, to: &mut Vec<Writable<'m>>) -> bool {
        // SAFETY: as in `readable`; regions are mapped for writing, and no reference to them is ever made.
        self.pieces(guest_address, len, |host, len| to.push(unsafe { Writable::new(host, len) }))
    }

    /// Copies the guest's bytes at `guest_address` to `to`; `false` when not all of them are memory. A fault is noted.
    #[inline]
    pub fn read(&self, guest_address: u64, to: &mut [u8]) -> bool {
        let mut done = 0;
        self.pieces(guest_address, to.len() as u64, |host, len| {
            // SAFETY: a range within a mapped region.
            match unsafe { Readable::new(host, len) }.copy_to_slice(&mut to[done..]) {
                Ok(count) => done += count,
                Err(fault) => guard::note_fault(fault),
            }
        })
    }

    /// Has the processor fetch what is at a guest's address, if that is memory.
    #[inline]
    pub fn fetch(&self, guest_address: u64) {
        if let Some((host, _)) = self.find(guest_address) {
            super::fetch(host);
        }
    }

    /// As [`GuestMemory::read`], some eights of bytes that all lie in one region.
    #[inline]
    pub fn read_words(&self, guest_address: u64, to: &mut [u8]) -> bool {
        let Some((host, available)) = self.find(guest_address) else { return false };
        if available < to.len() as u64 {
            return false;
        }
        for (index, word) in to.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            // SAFETY: within the region, as many bytes of which are there as `to` has.
            *word = unsafe { guard::load_u64(host.add(8 * index).cast_const().cast()) }.to_ne_bytes();
        }
        true
    }

    /// Whether a buffer lies within one of the regions.
    pub(super) fn holds(&self, buffer: &impl Buffer) -> bool {
        let start = buffer.as_raw().iov_base.addr();
        self.regions.iter().any(|region| {
            let within = start.wrapping_sub(region.host.addr()) as u64;
            within < region.place.bytes && buffer.len() as u64 <= region.place.bytes - within
        })
    }

    /// The guest's address of a fault, if it is of the guest's memory.
    pub fn guest_address_of(&self, fault: Fault) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let within = fault.address.wrapping_sub(region.host.addr()) as u64;
            (within < region.place.bytes).then(|| region.place.guest_address + within)
        })
    }

    /// The `len` bytes at the front end's address `user_address`, or `None` unless they lie within one region and are
    /// aligned to `align` bytes here and there.
    pub fn area(self: &Arc<Self>, user_address: u64, len: usize, align: usize) -> Option<SharedArea> {
        self.regions.iter().find_map(|region| {
            let within = user_address.checked_sub(region.place.user_address)?;
            let end = within.checked_add(len as u64)?;
            if end > region.place.bytes {
                return None;
            }
            // SAFETY: `within` is at most the region's length.
            let start = unsafe { region.host.add(within as usize) };
            start.addr().is_multiple_of(align).then(|| SharedArea { start, len, memory: Arc::clone(self) })
        })
    }
}

impl Region {
    fn map(place: RegionPlace, file: File) -> Result<Region, MapError> {
        let ends =
            [place.guest_address, place.user_address, place.file_offset].map(|start| start.checked_add(place.bytes));
        if place.bytes == 0 || ends.contains(&None) || usize::try_from(place.bytes).is_err() {
            return Err(MapError::Place { place });
        }
        let stat = rustix::fs::fstat(&file).map_err(|source| MapError::File { place, source: source.into() })?;
        let file_bytes = stat.st_size.cast_unsigned();
        // The length of a device says nothing.
        if FileType::from_raw_mode(stat.st_mode).is_file() && file_bytes < place.file_offset + place.bytes {
            return Err(MapError::Short { place, file_bytes });
        }
        let page = page_bytes(&file).map_err(|source| MapError::File { place, source })?;
        // The kernel maps at multiples of the page, which on hugetlbfs is 2 MiB or 1 GiB; there, the length has to be a multiple as well, or unmapping fails.
        let ahead = place.file_offset % page.offset;
        let bytes = (place.bytes + ahead).next_multiple_of(page.length);
        let mapping = MmapRegionBuilder::<()>::new(bytes as usize)
            .with_file_offset(FileOffset::new(file, place.file_offset - ahead))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|source| MapError::Map { place, source })?;
        // SAFETY: `ahead` is less than the mapping's length.
        let host = unsafe { mapping.as_ptr().add(ahead as usize) };
        Ok(Region { place, host, _mapping: mapping })
    }
}

/// What offset and length of a file's mapping have to be multiples of.
struct PageBytes {
    offset: u64,
    length: u64,
}

fn page_bytes(file: &File) -> io::Result<PageBytes> {
    // SAFETY: all-zero bytes are a valid `statfs`, and the call fills it.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and a structure to fill.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if stat.f_type == libc::HUGETLBFS_MAGIC as libc::__fsword_t {
        let page = (stat.f_bsize as u64).max(1);
        return Ok(PageBytes { offset: page, length: page });
    }
    // SAFETY: takes no pointers.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    Ok(PageBytes { offset: u64::try_from(page).unwrap_or(4096), length: 1 })
}

/// A range of guest memory that both sides read and write as a ring: single values, in a definite order.
///
/// Offsets are bytes from the start of the area, even, and checked: the layout of a ring is fixed when it is set up, so
/// one outside the area is a bug of the caller, and reads as zero and writes nothing. So does memory that is gone, which is noted
/// ([`guard::take_fault`]).
#[derive(Clone)]
pub struct SharedArea {
    start: *mut u8,
    len: usize,
    /// Keeps the memory mapped.
    memory: Arc<GuestMemory>,
}

// SAFETY: access is by guarded copies and numbers alone, into memory that `memory` keeps mapped.
unsafe impl Send for SharedArea {}

impl SharedArea {
    /// The guest's memory that it is a part of.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    #[inline]
    fn at<const LEN: usize>(&self, offset: usize) -> Option<*mut u8> {
        // SAFETY: `LEN` bytes from `offset` lie within the area.
        (offset <= self.len && LEN <= self.len - offset).then(|| unsafe { self.start.add(offset) })
    }

    /// Two bytes at an even offset, from a start that is at least 2-aligned: `GuestMemory::area` checked it.
    #[inline]
    fn number(&self, offset: usize) -> Option<*mut u16> {
        self.at::<2>(offset & !1).map(|at| at.cast())
    }

    /// Reads the 16-bit number at `offset`, before anything that is read after it.
    #[inline]
    pub fn load_acquire(&self, offset: usize) -> u16 {
        // SAFETY: two bytes within the area, aligned.
        self.number(offset).map_or(0, |at| u16::from_le(unsafe { guard::load_u16(at) }))
    }

    /// Reads the 16-bit number at `offset`.
    #[inline]
    pub fn load(&self, offset: usize) -> u16 {
        self.load_acquire(offset)
    }

    /// Writes the 16-bit number at `offset`, after everything that was written before it.
    #[inline]
    pub fn store_release(&self, offset: usize, value: u16) {
        if let Some(at) = self.number(offset) {
            // SAFETY: two bytes within the area, aligned, to which there are no references.
            unsafe { guard::store_u16(at, value.to_le()) };
        }
    }

    /// Has the processor fetch what is at `offset`.
    #[inline]
    pub fn fetch(&self, offset: usize) {
        if let Some(at) = self.at::<1>(offset) {
            super::fetch(at);
        }
    }

    /// Copies the bytes at `offset` out: a multiple of eight.
    #[inline]
    pub fn read<const LEN: usize>(&self, offset: usize) -> [u8; LEN] {
        const { assert!(LEN.is_multiple_of(8)) };
        let mut bytes = [0; LEN];
        if let Some(at) = self.at::<LEN>(offset) {
            for (index, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                // SAFETY: eight of the `LEN` bytes within the area.
                *word = unsafe { guard::load_u64(at.cast::<u64>().add(index)) }.to_ne_bytes();
            }
        }
        bytes
    }

    /// Copies bytes in at `offset`: a multiple of eight.
    #[inline]
    pub fn write<const LEN: usize>(&self, offset: usize, bytes: [u8; LEN]) {
        const { assert!(LEN.is_multiple_of(8)) };
        if let Some(at) = self.at::<LEN>(offset) {
            for (index, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
                // SAFETY: eight of the `LEN` bytes within the area, to which there are no references.
                unsafe { guard::store_u64(at.cast::<u64>().add(index), u64::from_ne_bytes(*word)) };
            }
        }
    }
}

/// A bitmap of the pages of guest memory that have been written, which the front end reads and clears while it is written here.
///
/// Bit `n` stands for the page of 4 KiB at guest address `n * 4096` (vhost's `VHOST_LOG_PAGE`). Pages behind the bitmap's end are not noted:
/// the front end has no memory there.
pub struct DirtyLog {
    bits: Region,
}

impl DirtyLog {
    const PAGE_BYTES: u64 = 4096;

    /// Maps a bitmap of `bytes` bytes at `offset` of a file.
    pub fn map(file: File, offset: u64, bytes: u64) -> Result<DirtyLog, MapError> {
        let place = RegionPlace { guest_address: 0, user_address: 0, bytes, file_offset: offset };
        Ok(DirtyLog { bits: Region::map(place, file)? })
    }

    /// Notes that the guest's `len` bytes at `guest_address` have been written.
    pub fn note(&self, guest_address: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|ahead| guest_address.saturating_add(ahead)) else { return };
        for page in guest_address / Self::PAGE_BYTES..=last / Self::PAGE_BYTES {
            if page / 8 >= self.bits.place.bytes {
                return;
            }
            // SAFETY: within the mapping by the check; no references to it are ever made, and others' accesses are atomic on their side.
            unsafe { guard::or_u8(self.bits.host.add((page / 8) as usize), 1 << (page % 8)) };
        }
    }
}

/// Makes everything written so far visible to the other side before anything is read after this: the one barrier that
/// a ring needs between saying "wake me" and looking once more.
#[inline]
pub fn full_barrier() {
    std::sync::atomic::fence(Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::file;

    const PAGE: u64 = 4096;
    const GUEST: u64 = 1 << 30;
    const USER: u64 = 1 << 40;

    /// Four pages of memory, of which the last two are gone.
    fn memory() -> Arc<GuestMemory> {
        guard::install().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE).unwrap();
        let place = RegionPlace { guest_address: GUEST, user_address: USER, bytes: 4 * PAGE, file_offset: 0 };
        let memory = GuestMemory::map(vec![(place, file.try_clone().unwrap())]).unwrap();
        file.set_len(2 * PAGE).unwrap();
        Arc::new(memory)
    }

    fn writable(memory: &GuestMemory, address: u64, len: u64) -> Writable<'_> {
        let mut buffers = Vec::new();
        assert!(memory.writable(address, len, &mut buffers));
        buffers[0]
    }

    #[test]
    fn memory_that_is_gone_has_the_guests_address() {
        let memory = memory();
        let fault = writable(&memory, GUEST + 2 * PAGE + 9, 1).copy_from_slice(b"x").unwrap_err();
        assert_eq!(memory.guest_address_of(fault), Some(GUEST + 2 * PAGE + 9));
        let fault = writable(&memory, GUEST + PAGE, 3 * PAGE).fill_zero().unwrap_err();
        let address = memory.guest_address_of(fault).unwrap();
        assert!((GUEST + 2 * PAGE..GUEST + 4 * PAGE).contains(&address), "{address:#x}");
        assert_eq!(memory.guest_address_of(Fault { address: 1 }), None);

        // What is read in one go is noted, as a ring's own memory is.
        assert!(memory.read(GUEST + PAGE, &mut [0; 16]));
        assert_eq!(guard::take_fault(), None);
        assert!(memory.read(GUEST + 2 * PAGE - 8, &mut [0; 16]));
        assert!(memory.guest_address_of(guard::take_fault().unwrap()) >= Some(GUEST + 2 * PAGE));
    }

    #[test]
    fn an_area_that_is_gone_in_part_reads_as_zeros_there_and_says_so() {
        let memory = memory();
        let area = memory.area(USER, 4 * PAGE as usize, 16).unwrap();
        area.store_release(8, 7);
        area.write(16, [9; 16]);
        assert_eq!((area.load(8), area.load_acquire(8), area.read(16)), (7, 7, [9; 16]));
        assert_eq!(guard::take_fault(), None);
        let gone = 3 * PAGE as usize;
        let is_noted = || memory.guest_address_of(guard::take_fault().unwrap()).unwrap() >= GUEST + 3 * PAGE;
        assert_eq!(area.load(gone), 0);
        assert!(is_noted());
        assert_eq!(area.read(gone), [0; 16]);
        assert!(is_noted());
        area.store_release(gone, 7);
        assert!(is_noted());
        area.write(gone, [7; 8]);
        assert!(is_noted());
    }

    #[test]
    fn memory_that_a_system_call_does_not_find_is_told_from_a_file_that_fails() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        file::write_at(&file, &[Readable::from_slice(&[5; 4 * PAGE as usize])], 0).unwrap();
        let is_gone = |error: io::Error| {
            let address = memory.guest_address_of(error.downcast::<Fault>().unwrap()).unwrap();
            assert!((GUEST + 2 * PAGE..GUEST + 4 * PAGE).contains(&address), "{address:#x}");
        };
        is_gone(file::read_at(&file, writable(&memory, GUEST + PAGE, 3 * PAGE), 0).unwrap_err());
        // Zeros past the end are not the kernel's.
        is_gone(file::read_at(&file, writable(&memory, GUEST + 2 * PAGE, PAGE), 4 * PAGE).unwrap_err());
        // The first buffer is whole, and of the second a part.
        let mut buffers = vec![Readable::from_slice(&[6; 100])];
        assert!(memory.readable(GUEST + PAGE, 2 * PAGE, &mut buffers));
        is_gone(file::write_at(&file, &buffers, 0).unwrap_err());
        let error = file::write_at(&File::open("/dev/null").unwrap(), &buffers[..1], 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF), "what else fails is the kernel's error");
    }
}
