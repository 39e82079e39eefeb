//! [`FileMapping`]: a file's bytes as memory, read-only and shared with the page cache.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::buffers::Readable;

/// A read-only shared mapping of the first bytes of a file.
///
/// Reading a page whose file has become shorter, or whose device fails, is a signal (SIGBUS) and not an error code.
pub struct FileMapping {
    start: *const u8,
    len: usize,
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
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
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

    /// The bytes from `offset`, `len` of them, or as many as the mapping has.
    #[inline]
    pub fn readable(&self, offset: u64, len: usize) -> Readable<'_> {
        let offset = offset.min(self.len as u64) as usize;
        // SAFETY: `offset` is at most the length and the end is cut to it, so this lies within the mapping, which lives
        // as long as `self`.
        unsafe { Readable::new(self.start.add(offset), len.min(self.len - offset)) }
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: exactly the mapping that `new` made; no `Readable` outlives `self`.
            unsafe { libc::munmap(self.start as *mut _, self.len) };
        }
    }
}
