//! [`FileMapping`]: a file's bytes as memory, read-only and shared with the page cache.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::buffers::{Readable, Writable};
use super::guard::{self, Fault};

/// A read-only shared mapping of the first bytes of a file.
///
/// The page of a file that has become shorter, or whose disk fails, cannot be had. [`FileMapping::read`] says so.
pub struct FileMapping {
    start: *const u8,
    len: usize,
}

/// A page of a mapped file cannot be had. The kernel does not say why.
#[derive(Debug, thiserror::Error)]
#[error("the page at offset {offset} cannot be had: the file has become shorter, or its disk fails")]
struct PageError {
    offset: u64,
}

// SAFETY: owns its mapping; what it gives out is `Readable`, which any thread may copy from.
unsafe impl Send for FileMapping {}
// SAFETY: as above.
unsafe impl Sync for FileMapping {}

impl FileMapping {
    /// Maps the first `len` bytes of `file`. No page is read, so this takes the same time for any length.
    pub fn new(file: &File, len: u64) -> io::Result<FileMapping> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if len == 0 {
            return Ok(FileMapping::empty());
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { map(file, std::ptr::null_mut(), len, 0, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(FileMapping { start: start.cast_const().cast(), len })
    }

    /// A mapping without bytes, of no file.
    pub fn empty() -> FileMapping {
        FileMapping { start: std::ptr::NonNull::dangling().as_ptr(), len: 0 }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether the mapping has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Asks the kernel to read what is not in memory in pieces as large as one entry of a page table maps, where the file system and the
    /// kernel's settings (transparent huge pages) let it.
    pub fn prefer_large_pages(&self) -> io::Result<()> {
        self.advise(0, self.len as u64, libc::MADV_HUGEPAGE)
    }

    /// Reads the bytes of a range into the page cache, and has page tables map them. An error, too, where the kernel cannot (before Linux 5.14).
    pub fn populate(&self, range: Range<u64>) -> io::Result<()> {
        self.advise(range.start, range.end.saturating_sub(range.start), libc::MADV_POPULATE_READ)
    }

    /// Maps a range anew, of the `file` that this is a mapping of, so that the kernel gives back the page tables that it took to map its pages. All is as it was, but
    /// that the next access to a page finds it first.
    pub fn let_go(&self, file: &File, range: Range<u64>) -> io::Result<()> {
        let part = self.readable(range.start, usize::try_from(range.end - range.start).unwrap_or(usize::MAX));
        if part.is_empty() {
            return Ok(());
        }
        let offset = libc::off_t::try_from(range.start).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a part of this mapping is replaced in one step by another of the same bytes, with the same rights.
        let start = unsafe { map(file, part.address() as *mut _, part.len(), libc::MAP_FIXED, offset) };
        if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// `offset` is a multiple of a page.
    fn advise(&self, offset: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
        let part = self.readable(offset, usize::try_from(len).unwrap_or(usize::MAX));
        // SAFETY: a part of this mapping; neither advice changes what it holds.
        match unsafe { libc::madvise(part.address() as *mut _, part.len(), advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The bytes from `offset`, `len` of them, or as many as the mapping has.
    #[inline]
    pub fn readable(&self, offset: u64, len: usize) -> Readable<'_> {
        let offset = offset.min(self.len as u64) as usize;
        // SAFETY: `offset` is at most the length and the end is cut to it, so this lies within the mapping, which lives
        // as long as `self`.
        unsafe { Readable::new(self.start.add(offset), len.min(self.len - offset)) }
    }

    /// Has the processor fetch the first of the bytes at `offset`.
    #[inline]
    pub fn fetch(&self, offset: u64) {
        /// Of a processor's caches. It fetches by itself what follows, once it has noticed.
        const LINE_BYTES: usize = 64;
        const LINES: usize = 8;
        let bytes = self.readable(offset, LINES * LINE_BYTES);
        (0..bytes.len()).step_by(LINE_BYTES).for_each(|at| super::fetch((bytes.address() + at) as *const u8));
    }

    /// Copies the bytes from `offset` to the start of `into`, as many as both have, and says how many.
    ///
    /// # Errors
    /// Holds a [`Fault`] when it is `into` that cannot be accessed.
    #[inline]
    pub fn read(&self, into: Writable<'_>, offset: u64) -> io::Result<usize> {
        into.copy_from(self.readable(offset, into.len())).map_err(|fault| match self.offset_of(fault) {
            Some(offset) => self.page_error(offset),
            None => io::Error::other(fault),
        })
    }

    /// The offset of a fault, if it is of this mapping.
    pub fn offset_of(&self, fault: Fault) -> Option<u64> {
        self.readable(0, self.len).offset_of(fault).map(|offset| offset as u64)
    }

    /// What a fault at an offset means: nobody has the page.
    #[cold]
    pub fn page_error(&self, offset: u64) -> io::Error {
        // A copy need not begin at its start, so the byte itself means nothing.
        io::Error::other(PageError { offset: offset - offset % guard::PAGE_BYTES_MIN as u64 })
    }
}

/// # Safety
/// As for `mmap` with these arguments.
unsafe fn map(
    file: &File,
    place: *mut libc::c_void,
    len: usize,
    flags: libc::c_int,
    offset: libc::off_t,
) -> *mut libc::c_void {
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | flags;
    // SAFETY: by this function's condition.
    unsafe { libc::mmap(place, len, libc::PROT_READ, flags, file.as_raw_fd(), offset) }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: exactly the mapping that `new` made; no `Readable` outlives `self`.
            unsafe { libc::munmap(self.start as *mut _, self.len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_gone_is_an_error_that_names_it() {
        guard::install().unwrap();
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[3; 4 * 4096], 0).unwrap();
        let mapping = FileMapping::new(&file, 4 * 4096).unwrap();
        file.set_len(2 * 4096).unwrap();
        let mut bytes = [0; 8192];
        assert_eq!(mapping.read(Writable::from_mut_slice(&mut bytes[..4096]), 4096).unwrap(), 4096);
        assert!(bytes[..4096].iter().all(|byte| *byte == 3));
        let error = mapping.read(Writable::from_mut_slice(&mut bytes[..10]), 3 * 4096 + 5).unwrap_err();
        assert!(error.to_string().contains("offset 12288 "), "{error}");
        let error = mapping.read(Writable::from_mut_slice(&mut bytes), 4096).unwrap_err();
        assert!(error.downcast::<Fault>().is_err(), "the file is at fault, and not the memory");

        let memory = tempfile::tempfile().unwrap();
        memory.set_len(4096).unwrap();
        let place = crate::sys::guest::RegionPlace { guest_address: 0, user_address: 0, bytes: 4096, file_offset: 0 };
        let guest = crate::sys::guest::GuestMemory::map(vec![(place, memory.try_clone().unwrap())]).unwrap();
        memory.set_len(0).unwrap();
        let mut buffers = Vec::new();
        assert!(guest.writable(0, 100, &mut buffers));
        let fault = mapping.read(buffers[0], 0).unwrap_err().downcast::<Fault>().unwrap();
        assert_eq!(mapping.offset_of(fault), None, "the memory is at fault, and not the file");
        assert!(guest.guest_address_of(fault).is_some());
        // What lies behind the mapping is none of it.
        assert_eq!(mapping.read(Writable::from_mut_slice(&mut bytes), 4 * 4096).unwrap(), 0);
    }
}
