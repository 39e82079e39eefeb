//! [`GuestMemory`]: a guest's memory as this process maps it, and [`SharedArea`], a ring's place in it.
//!
//! The guest and its front end write this memory while it is read here. So nothing gives out a reference: a value is
//! read once, by copy, and it is the copy that gets checked and used. Knows nothing of what the bytes mean.
//!
//! Nothing here guards against a front end that truncates the file behind a region while it is mapped: the processor
//! then gets SIGBUS, and this process, which serves that front end alone, ends.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use rustix::fs::FileType;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::buffers::{Readable, Writable};

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
    /// The file ends ahead of the region, so that using its end would end this process.
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

// SAFETY: `host` points into the mapping that the region owns; all access goes through copies and atomics.
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

    /// Copies the guest's bytes at `guest_address` to `to`; `false` when not all of them are memory.
    #[inline]
    pub fn read(&self, guest_address: u64, to: &mut [u8]) -> bool {
        let mut done = 0;
        self.pieces(guest_address, to.len() as u64, |host, len| {
            // SAFETY: a range within a mapped region.
            done += unsafe { Readable::new(host, len) }.copy_to_slice(&mut to[done..]);
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
            start.addr().is_multiple_of(align).then(|| SharedArea { start, len, _memory: Arc::clone(self) })
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
/// one outside the area is a bug of the caller, and reads as zero and writes nothing.
pub struct SharedArea {
    start: *mut u8,
    len: usize,
    /// Keeps the memory mapped.
    _memory: Arc<GuestMemory>,
}

// SAFETY: access is by copies and atomics alone, into memory that `_memory` keeps mapped.
unsafe impl Send for SharedArea {}

impl SharedArea {
    #[inline]
    fn at<const LEN: usize>(&self, offset: usize) -> Option<*mut u8> {
        // SAFETY: `LEN` bytes from `offset` lie within the area.
        (offset <= self.len && LEN <= self.len - offset).then(|| unsafe { self.start.add(offset) })
    }

    #[inline]
    fn atomic(&self, offset: usize) -> Option<&AtomicU16> {
        // SAFETY: two bytes within the area, at an even offset from a start that is at least 2-aligned (`GuestMemory::area`
        // checked it), which are mapped as long as `self`; the guest's own accesses are atomic on its side.
        self.at::<2>(offset & !1).map(|at| unsafe { AtomicU16::from_ptr(at.cast()) })
    }

    /// Reads the 16-bit number at `offset`, before anything that is read after it.
    #[inline]
    pub fn load_acquire(&self, offset: usize) -> u16 {
        self.atomic(offset).map_or(0, |value| u16::from_le(value.load(Ordering::Acquire)))
    }

    /// Reads the 16-bit number at `offset`.
    #[inline]
    pub fn load(&self, offset: usize) -> u16 {
        self.atomic(offset).map_or(0, |value| u16::from_le(value.load(Ordering::Relaxed)))
    }

    /// Writes the 16-bit number at `offset`, after everything that was written before it.
    #[inline]
    pub fn store_release(&self, offset: usize, value: u16) {
        if let Some(place) = self.atomic(offset) {
            place.store(value.to_le(), Ordering::Release);
        }
    }

    /// Copies the bytes at `offset` out.
    #[inline]
    pub fn read<const LEN: usize>(&self, offset: usize) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        if let Some(at) = self.at::<LEN>(offset) {
            // SAFETY: `LEN` bytes within the area.
            unsafe { std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), LEN) };
        }
        bytes
    }

    /// Copies bytes in at `offset`.
    #[inline]
    pub fn write<const LEN: usize>(&self, offset: usize, bytes: [u8; LEN]) {
        if let Some(at) = self.at::<LEN>(offset) {
            // SAFETY: `LEN` bytes within the area.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, LEN) };
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
            // SAFETY: within the mapping by the check; any byte is a valid number, and others' accesses to it are atomic on their side.
            let byte = unsafe { AtomicU8::from_ptr(self.bits.host.add((page / 8) as usize)) };
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}

/// Makes everything written so far visible to the other side before anything is read after this: the one barrier that
/// a ring needs between saying "wake me" and looking once more.
#[inline]
pub fn full_barrier() {
    std::sync::atomic::fence(Ordering::SeqCst);
}
