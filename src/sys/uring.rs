//! Reads that the kernel carries out while this process does something else (io_uring).
//!
//! What goes through such a ring passes system call filters by. So rings are made ahead of a sandbox ([`RingFiles`]) and **restricted**: for ever they take nothing but
//! reads of files that were registered with them. They outlive the processes that use them, one after another, each by mapping a ring anew ([`Uring::adopt`]): a
//! sandbox that lets nobody make rings leaves a successor no other. What a dead process has left in a ring is cleared, or told from one's own and ignored.
//!
//! Invariant: memory that is read into stays mapped until the kernel is done with it: each read under way holds it, and dropping a [`Uring`] waits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use linux_raw_sys::io_uring as raw;
use serde::{Deserialize, Serialize};

use super::buffers::Writable;
use super::guest::GuestMemory;

/// Reads that are handed to the kernel at a time.
const SUBMISSIONS: u32 = 64;
/// Reads that can be under way.
const UNDER_WAY_MAX: u32 = 128;
/// Buffers of one read.
const BUFFERS_MAX: usize = libc::UIO_MAXIOV as usize;
/// Files that a ring reads from.
pub const FILES: usize = 2;
/// The only operation of io_uring_register(2) that a ring allows once it is made.
pub const UPDATE_FILES: libc::c_int = raw::io_uring_register_op::IORING_REGISTER_FILES_UPDATE as libc::c_int;
const SUBMISSION_BYTES: usize = size_of::<raw::io_uring_sqe>();
const COMPLETION_BYTES: usize = 16;

/// Rings as files, for processes to come.
pub struct RingFiles {
    files: Vec<OwnedFd>,
    shape: Shape,
}

/// Where the parts of a ring lie in its memory, in bytes. The same for all that one kernel makes with the same numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Shape {
    ring_bytes: u32,
    submissions: u32,
    submission_head: u32,
    submission_tail: u32,
    submission_flags: u32,
    submission_array: u32,
    completions: u32,
    completion_head: u32,
    completion_tail: u32,
    completion_entries: u32,
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

/// The reads, and which files they are of: nothing else is ever to be done through the ring.
fn restrict(ring: &OwnedFd) -> io::Result<()> {
    use raw::io_uring_register_restriction_op as kind;
    let fixed = 1 << raw::io_uring_sqe_flags_bit::IOSQE_FIXED_FILE_BIT as u8;
    let numbers = [
        (kind::IORING_RESTRICTION_SQE_OP, raw::io_uring_op::IORING_OP_READV as u8),
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

/// Has a ring read from these files and from no others.
fn register_files(ring: &impl AsFd, files: [Option<BorrowedFd<'_>>; FILES]) -> io::Result<()> {
    let numbers: [RawFd; FILES] = files.map(|file| file.map_or(-1, |file| file.as_raw_fd()));
    let update = raw::io_uring_files_update { offset: 0, resv: 0, fds: numbers.as_ptr().addr() as u64 };
    let operation = raw::io_uring_register_op::IORING_REGISTER_FILES_UPDATE;
    // SAFETY: one structure of this layout, which says where as many numbers are.
    unsafe { register(ring, operation, (&raw const update).cast(), FILES as u32) }
}

/// # Safety
/// `argument` is what the operation takes, `count` times.
unsafe fn register(
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

/// A read that has ended.
#[derive(Debug)]
pub struct Read {
    /// What it was given along.
    pub tag: u32,
    /// How many bytes were read. Fewer than were wanted where the file ends, and at the kernel's pleasure.
    pub result: io::Result<usize>,
}

/// A ring, in use by this process.
pub struct Uring {
    /// Others know by this count that it is in use.
    ring: Arc<OwnedFd>,
    shape: Shape,
    memory: RingMemory,
    /// Tells this process's reads from those of earlier ones.
    mark: u32,
    /// Index of the next submission to write; it runs over 32 bits.
    tail: u32,
    /// Submissions that the kernel has not been told of.
    unsubmitted: u32,
    slots: Vec<Slot>,
    free: Vec<u16>,
}

/// A read under way.
#[derive(Default)]
struct Slot {
    tag: u32,
    buffers: Vec<libc::iovec>,
    /// Keeps them mapped; none: the slot is free.
    memory: Option<Arc<GuestMemory>>,
}

// SAFETY: the buffers lie in memory that the slot keeps mapped, and are never accessed here.
unsafe impl Send for Uring {}

impl Uring {
    /// Makes a ring one's own, which nobody uses any more, to read from `files` alone. An error when that cannot be done, and then it is of no use to anybody.
    pub fn adopt(ring: Arc<OwnedFd>, shape: Shape, files: [Option<BorrowedFd<'_>>; FILES]) -> io::Result<Uring> {
        let memory = RingMemory::map(&ring, &shape)?;
        register_files(&ring, files)?;
        let mut uring = Uring {
            ring,
            shape,
            memory,
            mark: std::process::id(),
            tail: 0,
            unsubmitted: 0,
            slots: (0..UNDER_WAY_MAX).map(|_| Slot::default()).collect(),
            free: (0..UNDER_WAY_MAX as u16).collect(),
        };
        uring.clear()?;
        Ok(uring)
    }

    /// Has the kernel take whatever an earlier process has not submitted, as nothing, and passes over what has completed.
    fn clear(&mut self) -> io::Result<()> {
        let Shape { submissions, submission_array, .. } = self.shape;
        for index in 0..submissions {
            self.memory.write_submission(index, None);
            self.memory.number(submission_array + index * 4).store(index, Ordering::Relaxed);
        }
        // Each of these is refused, as no read. More than the ring holds are there only if somebody has written nonsense.
        for _ in 0..8 {
            if self.enter(submissions, 0, 0)? == 0 {
                break;
            }
        }
        let head = self.memory.number(self.shape.submission_head).load(Ordering::Acquire);
        if self.memory.number(self.shape.submission_tail).load(Ordering::Acquire) != head {
            return Err(io::Error::other("the ring is in no order"));
        }
        self.tail = head;
        let completed = self.memory.number(self.shape.completion_tail).load(Ordering::Acquire);
        self.memory.number(self.shape.completion_head).store(completed, Ordering::Release);
        Ok(())
    }

    /// How many further reads can be made.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// How many reads are under way, submitted or not.
    pub fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Reads the bytes at `offset` of a file into buffers, which lie in `memory`. Whether it does: it does not when there is no room or too many buffers. The kernel is told by
    /// the next [`Uring::submit`], or before.
    pub fn read(
        &mut self,
        file: usize,
        offset: u64,
        into: &[Writable<'_>],
        memory: &Arc<GuestMemory>,
        tag: u32,
    ) -> bool {
        let fits = (1..=BUFFERS_MAX).contains(&into.len()) && file < FILES;
        if !fits || !into.iter().all(|buffer| memory.holds(buffer)) {
            return false;
        }
        if self.unsubmitted == self.shape.submissions && (self.submit().is_err() || self.unsubmitted > 0) {
            return false;
        }
        let Some(number) = self.free.pop() else { return false };
        let slot = &mut self.slots[usize::from(number)];
        slot.tag = tag;
        slot.buffers.clear();
        slot.buffers.extend(into.iter().map(Writable::as_raw));
        slot.memory = Some(Arc::clone(memory));
        let submission = Submission {
            file: file as i32,
            offset,
            buffers: slot.buffers.as_ptr().addr() as u64,
            count: slot.buffers.len() as u32,
            mark: u64::from(self.mark) << 32 | u64::from(number),
        };
        self.memory.write_submission(self.tail % self.shape.submissions, Some(submission));
        self.tail = self.tail.wrapping_add(1);
        self.memory.number(self.shape.submission_tail).store(self.tail, Ordering::Release);
        self.unsubmitted += 1;
        true
    }

    /// Tells the kernel of all reads. What it does not take is tried again with the next call.
    pub fn submit(&mut self) -> io::Result<()> {
        if self.unsubmitted > 0 {
            let taken = self.enter(self.unsubmitted, 0, 0)?;
            self.unsubmitted -= taken.min(self.unsubmitted);
        }
        Ok(())
    }

    /// How many reads the kernel has not been told of.
    #[inline]
    pub fn unsubmitted(&self) -> u32 {
        self.unsubmitted
    }

    /// Takes back a read that the kernel has not been told of: the last one, and its tag.
    pub fn withdraw(&mut self) -> Option<u32> {
        self.unsubmitted = self.unsubmitted.checked_sub(1)?;
        self.tail = self.tail.wrapping_sub(1);
        self.memory.number(self.shape.submission_tail).store(self.tail, Ordering::Release);
        let mark = self.memory.mark_of(self.tail % self.shape.submissions);
        self.release(mark)
    }

    /// Whether a read may have ended.
    #[inline]
    pub fn has_some(&self) -> bool {
        self.has_ended() || self.has_to_collect()
    }

    fn has_ended(&self) -> bool {
        let head = self.memory.number(self.shape.completion_head).load(Ordering::Relaxed);
        head != self.memory.number(self.shape.completion_tail).load(Ordering::Acquire)
    }

    fn has_to_collect(&self) -> bool {
        let flags = self.memory.number(self.shape.submission_flags).load(Ordering::Relaxed);
        flags & (raw::IORING_SQ_TASKRUN | raw::IORING_SQ_CQ_OVERFLOW) != 0
    }

    /// The next read that has ended, if there is one.
    pub fn next_ended(&mut self) -> Option<Read> {
        loop {
            if !self.has_ended() {
                if !self.has_to_collect() || self.enter(0, 0, raw::IORING_ENTER_GETEVENTS).is_err() {
                    return None;
                }
                if !self.has_ended() {
                    return None;
                }
            }
            let head = self.memory.number(self.shape.completion_head).load(Ordering::Relaxed);
            let (mark, result) = self.memory.completion(&self.shape, head % self.shape.completions);
            self.memory.number(self.shape.completion_head).store(head.wrapping_add(1), Ordering::Release);
            if let Some(tag) = self.release(mark) {
                let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
                return Some(Read { tag, result });
            }
        }
    }

    /// Frees the slot that a mark names, if it is this process's and in use.
    fn release(&mut self, mark: u64) -> Option<u32> {
        if (mark >> 32) as u32 != self.mark {
            return None;
        }
        let number = mark as u32 as u16;
        let slot = self.slots.get_mut(usize::from(number))?;
        slot.memory.take()?;
        self.free.push(number);
        Some(slot.tag)
    }

    /// Waits until a read has ended, of those that the kernel knows.
    pub fn wait(&mut self) -> io::Result<()> {
        while !self.has_ended() && self.under_way() > self.unsubmitted as usize {
            self.enter(self.unsubmitted, 1, raw::IORING_ENTER_GETEVENTS).map(|taken| {
                self.unsubmitted -= taken.min(self.unsubmitted);
            })?;
        }
        Ok(())
    }

    fn enter(&self, submit: u32, wait_for: u32, flags: u32) -> io::Result<u32> {
        loop {
            let ring = self.ring.as_raw_fd();
            // SAFETY: no signal set is passed. What is submitted says where buffers are that their slots keep.
            let result = unsafe {
                libc::syscall(libc::SYS_io_uring_enter, ring, submit, wait_for, flags, std::ptr::null::<u8>(), 0usize)
            };
            match u32::try_from(result) {
                Ok(count) => return Ok(count),
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }

    fn finish(&mut self) {
        while self.withdraw().is_some() {}
        while self.under_way() > 0 {
            if self.wait().is_err() {
                // Nobody knows what the kernel still does: the memory stays mapped for good, and the ring in use.
                self.slots.drain(..).for_each(std::mem::forget);
                std::mem::forget(Arc::clone(&self.ring));
                return;
            }
            while self.next_ended().is_some() {}
        }
        // Whoever has it next names others. Until then, none is kept open.
        let _ = register_files(&self.ring, [None; FILES]);
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.finish();
    }
}

impl AsFd for Uring {
    /// Readable when a read has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

/// The memory of a ring that this process and the kernel have in common.
struct RingMemory {
    numbers: *mut u8,
    numbers_bytes: usize,
    submissions: *mut raw::io_uring_sqe,
    submissions_bytes: usize,
}

/// What the kernel is to do.
struct Submission {
    file: i32,
    offset: u64,
    buffers: u64,
    count: u32,
    mark: u64,
}

impl RingMemory {
    fn map(ring: &OwnedFd, shape: &Shape) -> io::Result<RingMemory> {
        let map = |bytes: usize, offset: u32| {
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
            // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
            let start = unsafe {
                libc::mmap(std::ptr::null_mut(), bytes, protection, flags, ring.as_raw_fd(), libc::off_t::from(offset))
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
    fn number(&self, offset: u32) -> &AtomicU32 {
        let offset = offset as usize;
        assert!(offset + size_of::<u32>() <= self.numbers_bytes && offset.is_multiple_of(size_of::<u32>()));
        // SAFETY: within the mapping and aligned by the check; the kernel accesses it as one number too.
        unsafe { &*self.numbers.add(offset).cast::<AtomicU32>() }
    }

    /// Writes a submission that the kernel does not read at the moment; none: one that is no read.
    fn write_submission(&self, index: u32, what: Option<Submission>) {
        // SAFETY: integers alone, for which zeros are valid.
        let mut submission: raw::io_uring_sqe = unsafe { std::mem::zeroed() };
        if let Some(Submission { file, offset, buffers, count, mark }) = what {
            submission.opcode = raw::io_uring_op::IORING_OP_READV as u8;
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

    fn mark_of(&self, index: u32) -> u64 {
        // SAFETY: as above; integers alone.
        unsafe { self.submission(index).read_volatile() }.user_data
    }

    fn submission(&self, index: u32) -> *mut raw::io_uring_sqe {
        assert!((index as usize) < self.submissions_bytes / SUBMISSION_BYTES);
        // SAFETY: within the mapping by the check.
        unsafe { self.submissions.add(index as usize) }
    }

    /// The mark and the result of a completion that the kernel has written.
    fn completion(&self, shape: &Shape, index: u32) -> (u64, i32) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::guest::RegionPlace;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    const PAGE: usize = 4096;

    fn guest() -> Arc<GuestMemory> {
        let file = tempfile::tempfile().unwrap();
        let bytes = 64 * PAGE as u64;
        file.set_len(bytes).unwrap();
        let place = RegionPlace { guest_address: 0, user_address: 0, bytes, file_offset: 0 };
        Arc::new(GuestMemory::map(vec![(place, file)]).unwrap())
    }

    fn buffers(memory: &GuestMemory, at: u64, len: u64) -> Vec<Writable<'_>> {
        let mut found = Vec::new();
        assert!(memory.writable(at, len, &mut found));
        found
    }

    /// A ring, or none where there are none to be had.
    fn ring() -> Option<(Arc<OwnedFd>, Shape)> {
        match RingFiles::create(1) {
            Ok(mut rings) => Some((Arc::new(rings.files.remove(0)), rings.shape)),
            Err(error) => {
                println!("skipped: no io_uring here: {error}");
                None
            }
        }
    }

    fn image() -> File {
        let file = tempfile::tempfile().unwrap();
        let contents: Vec<u8> = (0..8 * PAGE).map(|at| (at / 512) as u8 + 1).collect();
        file.write_all_at(&contents, 0).unwrap();
        file
    }

    #[test]
    fn reads_arrive_whole_and_by_their_tags() {
        let Some((ring, shape)) = ring() else { return };
        let (image, memory) = (image(), guest());
        let mut uring = Uring::adopt(ring, shape, [Some(image.as_fd()), None]).unwrap();
        let mut scattered = buffers(&memory, 0, 512);
        scattered.extend(buffers(&memory, 4 * PAGE as u64, 512));
        assert!(uring.read(0, 512, &scattered, &memory, 7));
        assert!(uring.read(0, 8 * PAGE as u64 - 512, &buffers(&memory, 8 * PAGE as u64, 1024), &memory, 8));
        assert!(uring.read(1, 0, &buffers(&memory, 0, 512), &memory, 9), "there is no such file, as is seen later");
        let mut own = vec![0; 512];
        assert!(!uring.read(0, 0, &[Writable::from_mut_slice(&mut own)], &memory, 1), "nobody keeps that mapped");
        uring.submit().unwrap();
        let mut ended = Vec::new();
        while ended.len() < 3 {
            uring.wait().unwrap();
            ended.extend(std::iter::from_fn(|| uring.next_ended()).map(|read| (read.tag, read.result.ok())));
        }
        ended.sort_unstable();
        assert_eq!(ended, [(7, Some(1024)), (8, Some(512)), (9, None)]);
        let mut found = [0; 512];
        for (at, expected) in [(0, 2), (4 * PAGE as u64, 3), (8 * PAGE as u64, 64)] {
            assert!(memory.read(at, &mut found));
            assert_eq!(found, [expected; 512]);
        }
        assert_eq!((uring.under_way(), uring.room()), (0, UNDER_WAY_MAX as usize));
    }

    #[test]
    fn there_is_room_for_so_many_reads_and_those_that_nobody_was_told_of_can_be_taken_back() {
        let Some((ring, shape)) = ring() else { return };
        let (image, memory) = (image(), guest());
        let mut uring = Uring::adopt(ring, shape, [Some(image.as_fd()), None]).unwrap();
        let buffer = buffers(&memory, 0, 512);
        for tag in 0..10 {
            assert!(uring.read(0, 0, &buffer, &memory, tag));
        }
        assert_eq!(std::iter::from_fn(|| uring.withdraw()).collect::<Vec<_>>(), (0..10).rev().collect::<Vec<_>>());
        for round in 0..5 {
            for tag in 0..UNDER_WAY_MAX {
                assert!(uring.read(0, 0, &buffer, &memory, tag), "round {round}, read {tag}");
            }
            assert!(!uring.read(0, 0, &buffer, &memory, 0));
            uring.submit().unwrap();
            let mut ended = Vec::new();
            while ended.len() < UNDER_WAY_MAX as usize {
                uring.wait().unwrap();
                ended.extend(std::iter::from_fn(|| uring.next_ended()).map(|read| read.tag));
            }
            ended.sort_unstable();
            assert_eq!(ended, (0..UNDER_WAY_MAX).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_the_last_one_has_left_in_a_ring_is_nothing_to_the_next() {
        let Some((ring, shape)) = ring() else { return };
        let (image, memory) = (image(), guest());
        let mut dead = Uring::adopt(Arc::clone(&ring), shape, [Some(image.as_fd()), None]).unwrap();
        // As if it were another process's.
        dead.mark = !std::process::id();
        for tag in 0..30 {
            assert!(dead.read(0, 0, &buffers(&memory, 0, 512), &memory, tag));
            if tag == 9 {
                dead.submit().unwrap();
            }
        }
        std::mem::forget(dead);
        let other = image_of(9);
        let mut uring = Uring::adopt(ring, shape, [Some(other.as_fd()), None]).unwrap();
        assert!(uring.next_ended().is_none());
        assert!(uring.read(0, 0, &buffers(&memory, 0, 512), &memory, 1));
        uring.submit().unwrap();
        uring.wait().unwrap();
        let read = uring.next_ended().unwrap();
        assert_eq!((read.tag, read.result.unwrap()), (1, 512));
        assert!(uring.next_ended().is_none());
        let mut found = [0; 512];
        assert!(memory.read(0, &mut found));
        assert_eq!(found, [9; 512], "from its own file");
    }

    fn image_of(byte: u8) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[byte; PAGE], 0).unwrap();
        file
    }

    #[test]
    fn a_ring_does_nothing_but_reads_of_its_files() {
        let Some((ring, shape)) = ring() else { return };
        let (image, memory) = (image(), guest());
        let mut uring = Uring::adopt(Arc::clone(&ring), shape, [Some(image.as_fd()), None]).unwrap();
        assert!(uring.read(0, 0, &buffers(&memory, 0, 512), &memory, 1));
        // SAFETY: a submission that is there, and that the kernel has not been told of.
        let submission = unsafe { &mut *uring.memory.submission(uring.tail.wrapping_sub(1) % shape.submissions) };
        submission.opcode = raw::io_uring_op::IORING_OP_WRITEV as u8;
        uring.submit().unwrap();
        uring.wait().unwrap();
        assert_eq!(
            uring.next_ended().unwrap().result.unwrap_err().raw_os_error(),
            Some(libc::EACCES),
            "it would write"
        );

        assert!(uring.read(0, 0, &buffers(&memory, 0, 512), &memory, 1));
        // SAFETY: as above.
        let submission = unsafe { &mut *uring.memory.submission(uring.tail.wrapping_sub(1) % shape.submissions) };
        (submission.flags, submission.fd) = (0, image.as_raw_fd());
        uring.submit().unwrap();
        uring.wait().unwrap();
        assert_eq!(uring.next_ended().unwrap().result.unwrap_err().raw_os_error(), Some(libc::EACCES), "any open file");

        let operation = raw::io_uring_register_op::IORING_UNREGISTER_FILES;
        // SAFETY: takes no pointer.
        let error = unsafe { register(&ring, operation, std::ptr::null(), 0) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES), "others could be registered in place of them");
    }
}
