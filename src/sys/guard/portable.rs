//! Guarded access on any processor: the kernel copies, from this process to this process, and says when it could not.
//!
//! Costs a system call for each access. Single numbers are asked of the kernel first, and then read or written as atomics, so that their
//! order and wholeness are the processor's: between the two a page may still go, and take the process with it.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use super::{Fault, note_fault};

/// Sees that the kernel does this here.
pub fn install() -> io::Result<()> {
    let (from, mut to) = (1, 0);
    // SAFETY: a byte of our own, to another.
    match unsafe { copy_some(&raw const from, &raw mut to, 1) } {
        1 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Copies bytes. After a fault some of them may have been copied.
///
/// # Safety
/// `len` bytes are mapped readable at `from` and writable at `to`, whether or not their pages can be had. They do not overlap, and no
/// reference to those at `to` is live.
pub unsafe fn copy(from: *const u8, to: *mut u8, len: usize) -> Result<(), Fault> {
    let mut done = 0;
    while done < len {
        // SAFETY: both ranges are what the caller vouches for, less what has been done.
        let (from, to) = unsafe { (from.add(done), to.add(done)) };
        // SAFETY: as above.
        let count = unsafe { copy_some(from, to, len - done) };
        if count > 0 {
            done += count as usize;
        } else {
            // Nothing more can be copied: one side's next byte cannot be accessed. Which, a byte of our own tells.
            let mut byte = 0;
            // SAFETY: the next byte of the source, and one that is our own.
            let is_source = unsafe { copy_some(from, &raw mut byte, 1) } != 1;
            return Err(Fault { address: if is_source { from.addr() } else { to.addr() } });
        }
    }
    Ok(())
}

/// Copies as many bytes as the kernel does at once: their number, or -1.
///
/// # Safety
/// As [`copy`].
unsafe fn copy_some(from: *const u8, to: *mut u8, len: usize) -> isize {
    let from = libc::iovec { iov_base: from.cast_mut().cast(), iov_len: len };
    let to = libc::iovec { iov_base: to.cast(), iov_len: len };
    // SAFETY: one range each, which are what the caller vouches for; the kernel only reads the one and writes the other.
    unsafe { libc::process_vm_readv(libc::getpid(), &raw const to, 1, &raw const from, 1, 0) }
}

/// Writes zeros. After a fault some may have been written.
///
/// # Safety
/// `len` bytes at `to` are mapped writable, whether or not their pages can be had, and no reference to them is live.
pub unsafe fn fill_zero(to: *mut u8, len: usize) -> Result<(), Fault> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    for start in (0..len).step_by(ZEROS.len()) {
        // SAFETY: a part of the range, and a static that is nowhere in it.
        unsafe { copy(ZEROS.as_ptr(), to.add(start), ZEROS.len().min(len - start))? };
    }
    Ok(())
}

/// Whether bytes can be read; a note of it when not.
///
/// # Safety
/// They are mapped readable, whether or not their pages can be had.
unsafe fn is_there<const LEN: usize>(at: *const u8) -> bool {
    let mut bytes = [0; LEN];
    // SAFETY: what the caller vouches for, and an array of our own of the same length.
    unsafe { copy(at, bytes.as_mut_ptr(), LEN) }.map_err(note_fault).is_ok()
}

/// Reads a number, before anything that is read after it; 0, and a note of it, when that faults.
///
/// # Safety
/// Two bytes at `at` are mapped readable, whether or not their page can be had, and aligned to two.
pub unsafe fn load_u16(at: *const u16) -> u16 {
    // SAFETY: what the caller vouches for; others access these bytes only as atomics, or from outside of this process.
    unsafe { if is_there::<2>(at.cast()) { AtomicU16::from_ptr(at.cast_mut()).load(Ordering::Acquire) } else { 0 } }
}

/// Writes a number, after everything that was written before it; a note of it when that faults.
///
/// # Safety
/// Two bytes at `at` are mapped for reading and writing, whether or not their page can be had, and aligned to two; no reference to them is live.
pub unsafe fn store_u16(at: *mut u16, value: u16) {
    // SAFETY: what the caller vouches for; others access these bytes only as atomics, or from outside of this process.
    unsafe {
        if is_there::<2>(at.cast()) {
            AtomicU16::from_ptr(at).store(value, Ordering::Release);
        }
    }
}

/// Sets bits of a byte in one step, after everything that was written before it; a note of it when that faults.
///
/// # Safety
/// A byte at `at` is mapped for reading and writing, whether or not its page can be had, and no reference to it is live.
pub unsafe fn or_u8(at: *mut u8, bits: u8) {
    // SAFETY: what the caller vouches for; others access this byte only as an atomic, or from outside of this process.
    unsafe {
        if is_there::<1>(at) {
            AtomicU8::from_ptr(at).fetch_or(bits, Ordering::Release);
        }
    }
}

/// As [`load_u16`], eight bytes at any address, without an order among others.
///
/// # Safety
/// As there, without the alignment.
pub unsafe fn load_u64(at: *const u64) -> u64 {
    let mut value = 0;
    // SAFETY: what the caller vouches for, and a number of our own.
    match unsafe { copy(at.cast(), (&raw mut value).cast(), size_of::<u64>()) } {
        Ok(()) => value,
        Err(fault) => {
            note_fault(fault);
            0
        }
    }
}

/// As [`store_u16`], eight bytes at any address, without an order among others.
///
/// # Safety
/// As there, without the alignment.
pub unsafe fn store_u64(at: *mut u64, value: u64) {
    // SAFETY: what the caller vouches for, and a number of our own.
    if let Err(fault) = unsafe { copy((&raw const value).cast(), at.cast(), size_of::<u64>()) } {
        note_fault(fault);
    }
}
