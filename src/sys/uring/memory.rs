//! [`RingMemory`]: the numbers and entries by which a process and the kernel talk.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::AtomicU32;

use linux_raw_sys::io_uring as raw;

use super::rings::Shape;

const SUBMISSION_BYTES: usize = size_of::<raw::io_uring_sqe>();
pub(super) const COMPLETION_BYTES: usize = 16;

/// The memory of a ring that this process and the kernel have in common.
pub(super) struct RingMemory {
    numbers: *mut u8,
    numbers_bytes: usize,
    submissions: *mut raw::io_uring_sqe,
    submissions_bytes: usize,
}

/// What the kernel is to do.
pub(super) struct Submission {
    pub(super) operation: u8,
    pub(super) file: i32,
    pub(super) offset: u64,
    pub(super) buffers: u64,
    pub(super) count: u32,
    pub(super) mark: u64,
}

impl RingMemory {
    pub(super) fn map(ring: &impl AsFd, shape: &Shape) -> io::Result<RingMemory> {
        let map = |bytes: usize, offset: u32| {
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
            // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
            let start = unsafe {
                let ring = ring.as_fd().as_raw_fd();
                libc::mmap(std::ptr::null_mut(), bytes, protection, flags, ring, libc::off_t::from(offset))
            };
            if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(start) }
        };
        let (numbers_bytes, submissions_bytes) =
            (shape.ring_bytes as usize, shape.submissions as usize * SUBMISSION_BYTES);
        let numbers = map(numbers_bytes, raw::IORING_OFF_SQ_RING)?.cast();
        match map(submissions_bytes, raw::IORING_OFF_SQES) {
            Ok(submissions) => {
                Ok(RingMemory { numbers, numbers_bytes, submissions: submissions.cast(), submissions_bytes })
            }
            Err(error) => {
                // SAFETY: the mapping that was just made.
                unsafe { libc::munmap(numbers.cast(), numbers_bytes) };
                Err(error)
            }
        }
    }

    /// The number that lies at `offset`, as the shape says.
    #[inline]
    pub(super) fn number(&self, offset: u32) -> &AtomicU32 {
        let offset = offset as usize;
        assert!(offset + size_of::<u32>() <= self.numbers_bytes && offset.is_multiple_of(size_of::<u32>()));
        // SAFETY: within the mapping and aligned by the check; the kernel accesses it as one number too.
        unsafe { &*self.numbers.add(offset).cast::<AtomicU32>() }
    }

    /// Writes a submission that the kernel does not read at the moment; none: one that is refused.
    pub(super) fn write_submission(&self, index: u32, what: Option<Submission>) {
        // SAFETY: integers alone, for which zeros are valid.
        let mut submission: raw::io_uring_sqe = unsafe { std::mem::zeroed() };
        if let Some(Submission { operation, file, offset, buffers, count, mark }) = what {
            submission.opcode = operation;
            submission.flags = 1 << raw::io_uring_sqe_flags_bit::IOSQE_FIXED_FILE_BIT as u8;
            submission.fd = file;
            submission.__bindgen_anon_1.off = offset;
            submission.__bindgen_anon_2.addr = buffers;
            submission.len = count;
            submission.user_data = mark;
        }
        // SAFETY: within the mapping by the check of `submission`. Nobody else writes there.
        unsafe { self.submission(index).write_volatile(submission) };
    }

    pub(super) fn mark_of(&self, index: u32) -> u64 {
        // SAFETY: as above; integers alone.
        unsafe { self.submission(index).read_volatile() }.user_data
    }

    pub(super) fn submission(&self, index: u32) -> *mut raw::io_uring_sqe {
        assert!((index as usize) < self.submissions_bytes / SUBMISSION_BYTES);
        // SAFETY: within the mapping by the check.
        unsafe { self.submissions.add(index as usize) }
    }

    /// The mark and the result of a completion that the kernel has written.
    pub(super) fn completion(&self, shape: &Shape, index: u32) -> (u64, i32) {
        let at = shape.completion_entries as usize + index as usize * COMPLETION_BYTES;
        assert!(at + COMPLETION_BYTES <= self.numbers_bytes && at.is_multiple_of(size_of::<u64>()));
        // SAFETY: within the mapping and aligned by the check. The kernel has written it ahead of the tail that was read, and does not until the head passes it.
        unsafe {
            let entry = self.numbers.add(at);
            (entry.cast::<u64>().read_volatile(), entry.add(size_of::<u64>()).cast::<i32>().read_volatile())
        }
    }
}

impl Drop for RingMemory {
    fn drop(&mut self) {
        // SAFETY: exactly the mappings that `map` made; no reference outlives `self`.
        unsafe {
            libc::munmap(self.numbers.cast(), self.numbers_bytes);
            libc::munmap(self.submissions.cast(), self.submissions_bytes);
        }
    }
}

// SAFETY: owns its mappings; what is in them is accessed by one thread, and by the kernel.
unsafe impl Send for RingMemory {}
