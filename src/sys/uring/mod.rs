//! Reads and writes that the kernel carries out while this process does something else (io_uring).
//!
//! What goes through such a ring passes system call filters by. So rings are made ahead of a sandbox ([`RingFiles`]) and **restricted**: for ever they take nothing but
//! reads and writes of files that were registered with them. They outlive the processes that use them, one after another, each by mapping a ring anew ([`Uring::adopt`]): a
//! sandbox that lets nobody make rings leaves a successor no other. What a dead process has left in a ring is cleared, or told from one's own and ignored.
//!
//! Invariant: memory stays mapped until the kernel is done with it: each transfer under way holds it, and dropping a [`Uring`] waits.

mod memory;
mod rings;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use linux_raw_sys::io_uring as raw;

use super::buffers::{Buffer, Readable, Writable};
use super::guest::GuestMemory;
use memory::{RingMemory, Submission};
use rings::register_files;

pub use rings::{FILES, RingFiles, Shape, UPDATE_FILES};

/// Transfers that are handed to the kernel at a time.
const SUBMISSIONS: u32 = 64;
/// Transfers that can be under way.
const UNDER_WAY_MAX: u32 = 128;
/// Buffers of one transfer.
const BUFFERS_MAX: usize = libc::UIO_MAXIOV as usize;

/// Waits until the kernel is done with all that earlier processes have submitted to a ring, which nobody uses any more. A process that dies leaves behind what the disk
/// moves to or from memory by itself.
pub fn wait_for_last(ring: &impl AsFd, shape: &Shape) -> io::Result<()> {
    let memory = RingMemory::map(ring, shape)?;
    let number = |offset| memory.number(offset).load(Ordering::Acquire);
    let mut before = None;
    loop {
        // Each submission that has been taken ends in one completion.
        let ended = number(shape.completion_tail);
        let under_way = number(shape.submission_head).wrapping_sub(ended);
        if under_way == 0 {
            return Ok(());
        }
        let unseen = ended.wrapping_sub(number(shape.completion_head));
        if under_way > UNDER_WAY_MAX || unseen > UNDER_WAY_MAX || before.replace(ended) == Some(ended) {
            return Err(no_order());
        }
        enter(ring, 0, unseen + under_way, raw::IORING_ENTER_GETEVENTS)?;
    }
}

fn no_order() -> io::Error {
    io::Error::other("the ring is in no order")
}

fn enter(ring: &impl AsFd, submit: u32, wait_for: u32, flags: u32) -> io::Result<u32> {
    let ring = ring.as_fd().as_raw_fd();
    loop {
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

/// A read or write that has ended.
#[derive(Debug)]
pub struct Ended {
    /// What it was given along.
    pub tag: u32,
    /// How many bytes were moved. Fewer than were wanted where the file ends, and at the kernel's pleasure.
    pub result: io::Result<usize>,
}

/// A ring, in use by this process.
pub struct Uring {
    /// Others know by this count that it is in use.
    ring: Arc<OwnedFd>,
    shape: Shape,
    memory: RingMemory,
    /// Tells this process's transfers from those of earlier ones.
    mark: u32,
    /// Index of the next submission to write; it runs over 32 bits.
    tail: u32,
    /// Submissions that the kernel has not been told of.
    unsubmitted: u32,
    slots: Vec<Slot>,
    free: Vec<u16>,
}

/// A transfer under way.
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
    /// Makes a ring one's own, which nobody uses any more, to read and write `files` alone. An error when that cannot be done, and then it is of no use to anybody.
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
        // Each of these is refused, as none of the two. More than the ring holds are there only if somebody has written nonsense.
        for _ in 0..8 {
            if self.enter(submissions, 0, 0)? == 0 {
                break;
            }
        }
        let head = self.memory.number(self.shape.submission_head).load(Ordering::Acquire);
        if self.memory.number(self.shape.submission_tail).load(Ordering::Acquire) != head {
            return Err(no_order());
        }
        self.tail = head;
        let completed = self.memory.number(self.shape.completion_tail).load(Ordering::Acquire);
        self.memory.number(self.shape.completion_head).store(completed, Ordering::Release);
        Ok(())
    }

    /// How many further transfers can be made.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// How many transfers are under way, submitted or not.
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
        self.begin(raw::io_uring_op::IORING_OP_READV, file, offset, into, memory, tag)
    }

    /// The other way: writes them.
    pub fn write(
        &mut self,
        file: usize,
        offset: u64,
        from: &[Readable<'_>],
        memory: &Arc<GuestMemory>,
        tag: u32,
    ) -> bool {
        self.begin(raw::io_uring_op::IORING_OP_WRITEV, file, offset, from, memory, tag)
    }

    fn begin(
        &mut self,
        operation: raw::io_uring_op,
        file: usize,
        offset: u64,
        buffers: &[impl Buffer],
        memory: &Arc<GuestMemory>,
        tag: u32,
    ) -> bool {
        let fits = (1..=BUFFERS_MAX).contains(&buffers.len()) && file < FILES;
        if !fits || !buffers.iter().all(|buffer| memory.holds(buffer)) {
            return false;
        }
        if self.unsubmitted == self.shape.submissions && (self.submit().is_err() || self.unsubmitted > 0) {
            return false;
        }
        let Some(number) = self.free.pop() else { return false };
        let slot = &mut self.slots[usize::from(number)];
        slot.tag = tag;
        slot.buffers.clear();
        slot.buffers.extend(buffers.iter().map(Buffer::as_raw));
        slot.memory = Some(Arc::clone(memory));
        let submission = Submission {
            operation: operation as u8,
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

    /// Tells the kernel of all transfers. What it does not take is tried again with the next call.
    pub fn submit(&mut self) -> io::Result<()> {
        if self.unsubmitted > 0 {
            let taken = self.enter(self.unsubmitted, 0, 0)?;
            self.unsubmitted -= taken.min(self.unsubmitted);
        }
        Ok(())
    }

    /// How many transfers the kernel has not been told of.
    #[inline]
    pub fn unsubmitted(&self) -> u32 {
        self.unsubmitted
    }

    /// Takes back a transfer that the kernel has not been told of: the last one, and its tag.
    pub fn withdraw(&mut self) -> Option<u32> {
        self.unsubmitted = self.unsubmitted.checked_sub(1)?;
        self.tail = self.tail.wrapping_sub(1);
        self.memory.number(self.shape.submission_tail).store(self.tail, Ordering::Release);
        let mark = self.memory.mark_of(self.tail % self.shape.submissions);
        self.release(mark)
    }

    /// Whether a transfer may have ended.
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

    /// The next transfer that has ended, if there is one.
    pub fn next_ended(&mut self) -> Option<Ended> {
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
                return Some(Ended { tag, result });
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

    /// Waits until a transfer has ended, of those that the kernel knows.
    pub fn wait(&mut self) -> io::Result<()> {
        while !self.has_ended() && self.under_way() > self.unsubmitted as usize {
            self.enter(self.unsubmitted, 1, raw::IORING_ENTER_GETEVENTS).map(|taken| {
                self.unsubmitted -= taken.min(self.unsubmitted);
            })?;
        }
        Ok(())
    }

    fn enter(&self, submit: u32, wait_for: u32, flags: u32) -> io::Result<u32> {
        enter(&self.ring, submit, wait_for, flags)
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
    /// Readable when a transfer has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}
