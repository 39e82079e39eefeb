//! [`ZeroedArray`]: a long array of atomic integers that costs memory only where it has been written.

use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicU8, AtomicU64};

/// An integer of which all-zero bytes are a valid value.
///
/// # Safety
/// Zeroed memory, suitably aligned, must be a valid value, and dropping one must do nothing.
pub unsafe trait Zeroable {}
// SAFETY: an atomic integer has the layout of the integer and no drop glue.
unsafe impl Zeroable for AtomicU8 {}
// SAFETY: as above.
unsafe impl Zeroable for AtomicU64 {}

/// `len` integers, zero until written, in pages that exist only once they are written.
pub struct ZeroedArray<T: Zeroable> {
    start: *const T,
    len: usize,
}

// SAFETY: owns its memory, and gives out only shared references to atomics.
unsafe impl<T: Zeroable + Sync> Send for ZeroedArray<T> {}
// SAFETY: as above.
unsafe impl<T: Zeroable + Sync> Sync for ZeroedArray<T> {}

impl<T: Zeroable> ZeroedArray<T> {
    /// No integers.
    pub fn empty() -> ZeroedArray<T> {
        ZeroedArray { start: std::ptr::NonNull::dangling().as_ptr(), len: 0 }
    }

    /// An array of `len` zeros. Costs address space now, and memory page by page as it is written.
    pub fn new(len: usize) -> io::Result<ZeroedArray<T>> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or(io::ErrorKind::OutOfMemory)?;
        if bytes == 0 {
            return Ok(ZeroedArray::empty());
        }
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(ZeroedArray { start: start.cast(), len })
    }
}

impl<T: Zeroable> Deref for ZeroedArray<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: page-aligned memory of `len` elements that lives as long as `self`; zeros are valid (`Zeroable`), and
        // atomics may be changed through shared references.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T: Zeroable> Drop for ZeroedArray<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: exactly the mapping that `new` made; no reference into it outlives `self`.
            unsafe { libc::munmap(self.start as *mut _, self.len * size_of::<T>()) };
        }
    }
}
