//! [`SharedNumbers`]: numbers in memory that several processes map.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::AtomicU64;

use super::file;

/// A new piece of memory as a file without a name, `bytes` long for good: no one who maps it can be hurt by whoever else has it.
pub fn create(name: &std::ffi::CStr, bytes: u64) -> io::Result<File> {
    // SAFETY: a string that ends.
    let descriptor = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it is an open descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(descriptor) };
    file.set_len(bytes)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: takes no pointers.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A copy of a program in memory, which nobody can change and which can be executed.
pub fn copy_of_program(program: &File) -> io::Result<File> {
    /// To be executed, which a kernel may have to be told (since 6.3).
    const MFD_EXEC: libc::c_uint = 0x10;
    let create = |flags| {
        // SAFETY: a string that ends.
        let descriptor =
            unsafe { libc::memfd_create(c"pando-blk".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so it is an open descriptor that nobody else owns.
        Ok(unsafe { File::from_raw_fd(descriptor) })
    };
    let mut copy = create(MFD_EXEC).or_else(|_| create(0))?;
    io::copy(&mut &*program, &mut copy)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE | libc::F_SEAL_SEAL;
    // SAFETY: takes no pointers.
    match unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(copy),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Numbers that others may read and write at any time. Zero until somebody writes them, and without memory until then.
pub struct SharedNumbers {
    start: *mut AtomicU64,
    count: usize,
}

// SAFETY: owns its mapping, which holds atomics and nothing else.
unsafe impl Send for SharedNumbers {}
// SAFETY: as above.
unsafe impl Sync for SharedNumbers {}

impl SharedNumbers {
    /// Maps the first `count` numbers of a file that [`create`] made.
    ///
    /// # Errors
    /// When the file is shorter, or could become so while it is mapped.
    pub fn map(file: &File, count: usize) -> io::Result<SharedNumbers> {
        let bytes = count * size_of::<AtomicU64>();
        // SAFETY: takes no pointers.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 || file::len(file)? < bytes as u64 {
            let expected = format!("expected memory of {bytes} bytes that cannot shrink");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, expected));
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(SharedNumbers { start: start.cast(), count })
    }

    /// The number at `index`, which is less than the count.
    #[inline]
    pub fn at(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.count);
        // SAFETY: within the mapping by the check, aligned as its start is, and all bytes are a valid number. The file cannot shrink.
        unsafe { &*self.start.add(index) }
    }
}

impl Drop for SharedNumbers {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `map` made; no reference outlives `self`.
        unsafe { libc::munmap(self.start.cast(), self.count * size_of::<AtomicU64>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_one_writes_the_other_reads() {
        let file = create(c"numbers", 4096).unwrap();
        let (one, other) = (SharedNumbers::map(&file, 512).unwrap(), SharedNumbers::map(&file, 10).unwrap());
        one.at(9).store(7, Ordering::Relaxed);
        assert_eq!(other.at(9).load(Ordering::Relaxed), 7);
        assert!(file.set_len(0).is_err(), "it could be cut off");
        assert!(SharedNumbers::map(&file, 513).is_err());
        assert!(SharedNumbers::map(&tempfile::tempfile().unwrap(), 0).is_err());
    }
}
