//! [`RingFiles`]: rings as they are made and restricted, ahead of a sandbox.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use linux_raw_sys::io_uring as raw;
use serde::{Deserialize, Serialize};

use super::memory::COMPLETION_BYTES;
use super::{SUBMISSIONS, UNDER_WAY_MAX};

/// Files that a ring reads and writes.
pub const FILES: usize = 2;
/// The only operation of io_uring_register(2) that a ring allows once it is made.
pub const UPDATE_FILES: libc::c_int = raw::io_uring_register_op::IORING_REGISTER_FILES_UPDATE as libc::c_int;

/// Rings as files, for processes to come.
pub struct RingFiles {
    files: Vec<OwnedFd>,
    shape: Shape,
}

/// Where the parts of a ring lie in its memory, in bytes. The same for all that one kernel makes with the same numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Shape {
    pub(super) ring_bytes: u32,
    pub(super) submissions: u32,
    pub(super) submission_head: u32,
    pub(super) submission_tail: u32,
    pub(super) submission_flags: u32,
    pub(super) submission_array: u32,
    pub(super) completions: u32,
    pub(super) completion_head: u32,
    pub(super) completion_tail: u32,
    pub(super) completion_entries: u32,
}

impl RingFiles {
    /// Makes `count` rings. An error where the kernel has none such (before Linux 5.19), or the host's settings forbid them.
    pub fn create(count: usize) -> io::Result<RingFiles> {
        let mut files = Vec::with_capacity(count);
        let mut shape = None;
        for _ in 0..count {
            let (file, found) = create()?;
            if *shape.get_or_insert(found) != found {
                return Err(io::Error::other("two rings differ"));
            }
            files.push(file);
        }
        let shape = shape.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(RingFiles { files, shape })
    }

    /// Those of an earlier program of this process.
    pub fn resume(files: Vec<OwnedFd>, shape: Shape) -> RingFiles {
        RingFiles { files, shape }
    }

    /// Their descriptors, which a process gets by inheriting them: sockets do not carry them.
    pub fn files(&self) -> &[OwnedFd] {
        &self.files
    }

    /// What a process has to know besides.
    pub fn shape(&self) -> Shape {
        self.shape
    }
}

fn create() -> io::Result<(OwnedFd, Shape)> {
    // SAFETY: integers alone, for which zeros are valid.
    let mut parameters: raw::io_uring_params = unsafe { std::mem::zeroed() };
    // A thread that is busy is not interrupted for a completion: it sees in the flags that there is one to be collected.
    parameters.flags = raw::IORING_SETUP_CQSIZE
        | raw::IORING_SETUP_R_DISABLED
        | raw::IORING_SETUP_SUBMIT_ALL
        | raw::IORING_SETUP_COOP_TASKRUN
        | raw::IORING_SETUP_TASKRUN_FLAG;
    parameters.cq_entries = UNDER_WAY_MAX;
    // SAFETY: the kernel reads and fills one structure of this layout, which is ours.
    let descriptor = unsafe { libc::syscall(libc::SYS_io_uring_setup, SUBMISSIONS, &raw mut parameters) };
    let descriptor = RawFd::try_from(descriptor).ok().filter(|descriptor| *descriptor >= 0);
    let descriptor = descriptor.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the call succeeded, so it is an open descriptor that nobody else owns.
    let ring = unsafe { OwnedFd::from_raw_fd(descriptor) };
    if parameters.features & raw::IORING_FEAT_SINGLE_MMAP == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    restrict(&ring)?;
    let none: [RawFd; FILES] = [-1; FILES];
    // SAFETY: as many numbers as is said, which the kernel copies.
    unsafe { register(&ring, raw::io_uring_register_op::IORING_REGISTER_FILES, none.as_ptr().cast(), FILES as u32)? };
    // SAFETY: takes no pointer.
    unsafe { register(&ring, raw::io_uring_register_op::IORING_REGISTER_ENABLE_RINGS, std::ptr::null(), 0)? };
    let (sq, cq) = (parameters.sq_off, parameters.cq_off);
    let ring_bytes = (sq.array + parameters.sq_entries * size_of::<u32>() as u32)
        .max(cq.cqes + parameters.cq_entries * COMPLETION_BYTES as u32);
    let shape = Shape {
        ring_bytes,
        submissions: parameters.sq_entries,
        submission_head: sq.head,
        submission_tail: sq.tail,
        submission_flags: sq.flags,
        submission_array: sq.array,
        completions: parameters.cq_entries,
        completion_head: cq.head,
        completion_tail: cq.tail,
        completion_entries: cq.cqes,
    };
    Ok((ring, shape))
}

/// Reads and writes, and which files they are of: nothing else is ever to be done through the ring.
fn restrict(ring: &OwnedFd) -> io::Result<()> {
    use raw::io_uring_register_restriction_op as kind;
    let fixed = 1 << raw::io_uring_sqe_flags_bit::IOSQE_FIXED_FILE_BIT as u8;
    let numbers = [
        (kind::IORING_RESTRICTION_SQE_OP, raw::io_uring_op::IORING_OP_READV as u8),
        (kind::IORING_RESTRICTION_SQE_OP, raw::io_uring_op::IORING_OP_WRITEV as u8),
        (kind::IORING_RESTRICTION_SQE_FLAGS_ALLOWED, fixed),
        (kind::IORING_RESTRICTION_SQE_FLAGS_REQUIRED, fixed),
        (kind::IORING_RESTRICTION_REGISTER_OP, raw::io_uring_register_op::IORING_REGISTER_FILES_UPDATE as u8),
    ];
    let restrictions = numbers.map(|(kind, number)| raw::io_uring_restriction {
        opcode: kind as u16,
        __bindgen_anon_1: raw::io_uring_restriction__bindgen_ty_1 { sqe_op: number },
        resv: 0,
        resv2: [0; 3],
    });
    let (start, count) = (restrictions.as_ptr().cast(), restrictions.len() as u32);
    // SAFETY: as many structures of this layout as is said, which the kernel copies.
    unsafe { register(ring, raw::io_uring_register_op::IORING_REGISTER_RESTRICTIONS, start, count) }
}

/// Has a ring read and write these files and no others.
pub(super) fn register_files(ring: &impl AsFd, files: [Option<BorrowedFd<'_>>; FILES]) -> io::Result<()> {
    let numbers: [RawFd; FILES] = files.map(|file| file.map_or(-1, |file| file.as_raw_fd()));
    let update = raw::io_uring_files_update { offset: 0, resv: 0, fds: numbers.as_ptr().addr() as u64 };
    let operation = raw::io_uring_register_op::IORING_REGISTER_FILES_UPDATE;
    // SAFETY: one structure of this layout, which says where as many numbers are.
    unsafe { register(ring, operation, (&raw const update).cast(), FILES as u32) }
}

/// # Safety
/// `argument` is what the operation takes, `count` times.
pub(super) unsafe fn register(
    ring: &impl AsFd,
    operation: raw::io_uring_register_op,
    argument: *const libc::c_void,
    count: u32,
) -> io::Result<()> {
    let ring = ring.as_fd().as_raw_fd();
    // SAFETY: by this function's condition.
    match unsafe { libc::syscall(libc::SYS_io_uring_register, ring, operation as u32, argument, count) } {
        result if result >= 0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
