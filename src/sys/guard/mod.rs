//! Guarded access to memory whose pages may not be there: copies, fills and single numbers that end in a [`Fault`], and not
//! in the death of the process.
//!
//! A page of a mapped file cannot be had when its disk fails, or when somebody has made the file shorter: a base, a
//! delta, the memory that a front end shares. The processor then stops in the midst of an instruction, with a signal
//! (SIGBUS). The accesses here are the ones that come out of that. Whatever else faults is a bug, and ends the process as ever.
//!
//! Copies and fills say so themselves. Single numbers, of which a ring needs several for each request, are read as zero
//! and not written, and what happened is noted for the thread: whoever used them asks [`take_fault`], and must do so ahead of
//! acting on what was read.
//!
//! How an access comes out of a fault depends on the processor, and lies in `x86_64` for that one. All others have `portable`, by
//! system calls, which costs far more. Knows nothing of what the memory is.

use std::sync::atomic::{AtomicUsize, Ordering, compiler_fence};

#[cfg(any(test, not(target_arch = "x86_64")))]
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(not(target_arch = "x86_64"))]
use portable as machine;
#[cfg(target_arch = "x86_64")]
use x86_64 as machine;

/// Makes faults of guarded accesses survivable in this process, from now on. To be called before there are threads that
/// make them; twice is as good as once. Without it a fault ends the process.
pub use machine::install;

pub(super) use machine::{copy, fill_zero, load_u16, load_u64, or_u8, store_u16, store_u64};

/// No page is smaller.
pub(super) const PAGE_BYTES_MIN: usize = 4096;

/// Memory that cannot be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory at {address:#x} of this process cannot be accessed")]
#[must_use]
pub struct Fault {
    /// Where, in this process: the first byte that could not be accessed, or one that is lost with it.
    pub address: usize,
}

thread_local! {
    /// Address of the last fault that nobody has asked for; 0: none. Atomic, because a signal handler writes it. Without a destructor and with
    /// a constant to start from, it is a place at a fixed distance from the thread's own register, which may be used there.
    static NOTED: AtomicUsize = const { AtomicUsize::new(0) };
}

/// The last fault of this thread that an access of a single number has noted; forgets it.
#[inline]
pub fn take_fault() -> Option<Fault> {
    if !has_fault() {
        return None;
    }
    NOTED.with(|noted| Some(Fault { address: noted.swap(0, Ordering::Relaxed) }))
}

/// Whether there is something for [`take_fault`].
#[inline]
pub fn has_fault() -> bool {
    // A handler on this very thread has written it, so what the processor does about order is of no concern.
    compiler_fence(Ordering::SeqCst);
    NOTED.with(|noted| noted.load(Ordering::Relaxed)) != 0
}

/// Leaves a fault for [`take_fault`].
#[inline]
pub fn note_fault(fault: Fault) {
    // The kernel does not name an address for every fault, and zero says that there was none.
    NOTED.with(|noted| noted.store(fault.address.max(1), Ordering::Relaxed));
}

/// The first page of `len` bytes at `address` that cannot be read, if there is one. Reads a byte of each.
///
/// # Safety
/// The range is mapped readable, whether or not its pages can be had.
pub(super) unsafe fn find_fault(address: *const u8, len: usize) -> Option<Fault> {
    let first_page_end = PAGE_BYTES_MIN - address.addr() % PAGE_BYTES_MIN;
    let mut starts = (len > 0).then_some(0).into_iter().chain((first_page_end..len).step_by(PAGE_BYTES_MIN));
    let mut byte = 0;
    // SAFETY: one byte within the range, to one that is our own.
    starts.find_map(|start| unsafe { copy(address.add(start), &raw mut byte, 1) }.err())
}

#[cfg(test)]
mod tests;
