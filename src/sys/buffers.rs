//! Pieces of memory that bytes are moved between: [`Readable`] and [`Writable`].
//!
//! The memory may be shared with a guest, a front end or the page cache, so it can change at any time: nothing here
//! gives out a Rust reference to it, only copies. Its pages can also be gone: then a copy is a [`Fault`]. Both types have the layout of
//! the kernel's `iovec`, so a slice of them goes to `preadv` and `pwritev` as it is.

use std::marker::PhantomData;

use super::guard::{self, Fault};

/// Memory that may be read, for as long as `'m`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Readable<'m> {
    raw: libc::iovec,
    memory: PhantomData<&'m ()>,
}

/// Memory that may be written, for as long as `'m`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Writable<'m> {
    raw: libc::iovec,
    memory: PhantomData<&'m ()>,
}

// SAFETY: an address and a length; the memory behind them is only ever copied from or to, by code that expects others
// to change it meanwhile, so which thread does it makes no difference.
unsafe impl Send for Readable<'_> {}
// SAFETY: as above.
unsafe impl Sync for Readable<'_> {}
// SAFETY: as above.
unsafe impl Send for Writable<'_> {}
// SAFETY: as above.
unsafe impl Sync for Writable<'_> {}

static ZEROS: [u8; crate::units::ClusterSize::BYTES_MAX as usize] = [0; crate::units::ClusterSize::BYTES_MAX as usize];

impl<'m> Readable<'m> {
    /// # Safety
    /// `address..address + len` is mapped readable for `'m`.
    pub(super) unsafe fn new(address: *const u8, len: usize) -> Readable<'m> {
        Readable { raw: libc::iovec { iov_base: address as *mut _, iov_len: len }, memory: PhantomData }
    }

    /// The bytes of a slice.
    pub fn from_slice(bytes: &'m [u8]) -> Readable<'m> {
        // SAFETY: a slice is readable for its lifetime.
        unsafe { Readable::new(bytes.as_ptr(), bytes.len()) }
    }

    /// `len` zero bytes, at most one of the largest clusters.
    pub fn zeros(len: usize) -> Readable<'static> {
        Readable::from_slice(&ZEROS[..len])
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.raw.iov_len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it begins and ends at multiples of `block`.
    pub fn is_aligned(&self, block: usize) -> bool {
        self.raw.iov_base.addr().is_multiple_of(block) && self.len().is_multiple_of(block)
    }

    /// The bytes from `start` (at most the length), `len` of them at most.
    pub fn part(&self, start: usize, len: usize) -> Readable<'m> {
        let start = start.min(self.len());
        // SAFETY: `start` is at most the length, so this stays within (or at the end of) the same memory.
        unsafe { Readable::new(self.raw.iov_base.cast::<u8>().add(start), len.min(self.len() - start)) }
    }

    /// Copies the first bytes into `to`, as many as both have, and says how many. After a fault, `to` holds some of them.
    #[inline]
    pub fn copy_to_slice(&self, to: &mut [u8]) -> Result<usize, Fault> {
        let len = self.len().min(to.len());
        // SAFETY: both sides are valid for `len`; `to` is ours alone, so they do not overlap.
        unsafe { guard::copy(self.raw.iov_base.cast::<u8>(), to.as_mut_ptr(), len) }.map(|()| len)
    }

    /// Where it lies in this process.
    pub(super) fn address(&self) -> usize {
        self.raw.iov_base.addr()
    }

    /// The first page that is gone, if there is one. Reads a byte of each.
    pub(super) fn find_fault(&self) -> Option<Fault> {
        // SAFETY: readable for its length.
        unsafe { guard::find_fault(self.raw.iov_base.cast::<u8>(), self.len()) }
    }

    /// How far from the start a fault is, if it is of this memory.
    pub(super) fn offset_of(&self, fault: Fault) -> Option<usize> {
        let start = self.address();
        // Of memory that has failed, the kernel names the page and not the byte.
        let page = start - start % guard::PAGE_BYTES_MIN;
        (page..start + self.len()).contains(&fault.address).then(|| fault.address.saturating_sub(start))
    }
}

impl<'m> Writable<'m> {
    /// # Safety
    /// `address..address + len` is mapped writable for `'m`, and no Rust reference to it is live.
    pub(super) unsafe fn new(address: *mut u8, len: usize) -> Writable<'m> {
        Writable { raw: libc::iovec { iov_base: address.cast(), iov_len: len }, memory: PhantomData }
    }

    /// The bytes of a slice that nobody else sees.
    pub fn from_mut_slice(bytes: &'m mut [u8]) -> Writable<'m> {
        // SAFETY: a unique borrow is writable for its lifetime, and kept for as long.
        unsafe { Writable::new(bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.raw.iov_len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it begins and ends at multiples of `block`.
    pub fn is_aligned(&self, block: usize) -> bool {
        self.raw.iov_base.addr().is_multiple_of(block) && self.len().is_multiple_of(block)
    }

    /// The bytes from `start` (at most the length), `len` of them at most.
    pub fn part(&self, start: usize, len: usize) -> Writable<'m> {
        let start = start.min(self.len());
        // SAFETY: `start` is at most the length, so this stays within (or at the end of) the same memory.
        unsafe { Writable::new(self.raw.iov_base.cast::<u8>().add(start), len.min(self.len() - start)) }
    }

    /// Copies as many bytes as both have, and says how many. After a fault, which may be of either, some of them are copied.
    #[inline]
    pub fn copy_from(&self, from: Readable<'_>) -> Result<usize, Fault> {
        let len = self.len().min(from.len());
        // SAFETY: both sides are valid for `len`. A `Writable` is guest memory or a unique borrow and a `Readable` a file
        // mapping or a borrow, so that the address ranges do not overlap.
        unsafe { guard::copy(from.raw.iov_base.cast::<u8>(), self.raw.iov_base.cast::<u8>(), len) }.map(|()| len)
    }

    /// Copies the first bytes of `from` in, as many as both have, and says how many.
    #[inline]
    pub fn copy_from_slice(&self, from: &[u8]) -> Result<usize, Fault> {
        self.copy_from(Readable::from_slice(from))
    }

    /// Writes zeros to all of it.
    #[inline]
    pub fn fill_zero(&self) -> Result<(), Fault> {
        // SAFETY: valid for writing for the whole length.
        unsafe { guard::fill_zero(self.raw.iov_base.cast::<u8>(), self.len()) }
    }

    /// The same memory, to look at what is in it.
    pub(super) fn as_readable(&self) -> Readable<'m> {
        // SAFETY: what may be written may be read: guest memory is mapped for both, and a unique borrow is too.
        unsafe { Readable::new(self.raw.iov_base.cast::<u8>(), self.len()) }
    }
}

/// Either of the two.
pub(crate) trait Buffer: Copy {
    /// Length in bytes.
    fn len(&self) -> usize;
    /// The bytes from `start` (at most the length), `len` of them at most.
    fn part(&self, start: usize, len: usize) -> Self;
    /// The same memory, to look at what is in it.
    fn as_readable(&self) -> Readable<'_>;
    /// Where it lies in this process, and how long it is.
    fn as_raw(&self) -> libc::iovec {
        self.as_readable().raw
    }
}

impl Buffer for Readable<'_> {
    #[inline]
    fn len(&self) -> usize {
        Readable::len(self)
    }

    #[inline]
    fn part(&self, start: usize, len: usize) -> Self {
        Readable::part(self, start, len)
    }

    fn as_readable(&self) -> Readable<'_> {
        *self
    }
}

impl Buffer for Writable<'_> {
    #[inline]
    fn len(&self) -> usize {
        Writable::len(self)
    }

    #[inline]
    fn part(&self, start: usize, len: usize) -> Self {
        Writable::part(self, start, len)
    }

    fn as_readable(&self) -> Readable<'_> {
        Writable::as_readable(self)
    }
}

/// Some buffers, one after another, from which pieces are taken.
pub(crate) struct Split<'b, B> {
    rest: &'b [B],
    /// How much of the first is gone.
    taken: usize,
}

impl<'b, B: Buffer> Split<'b, B> {
    /// All of it.
    pub fn new(buffers: &'b [B]) -> Split<'b, B> {
        Split { rest: buffers, taken: 0 }
    }

    /// The next bytes that lie together, at most `limit`, which is not zero. None when there are no more.
    pub fn take(&mut self, limit: u64) -> Option<B> {
        loop {
            let (first, rest) = self.rest.split_first()?;
            if self.taken < first.len() {
                let piece = first.part(self.taken, limit.min(usize::MAX as u64) as usize);
                self.taken += piece.len();
                return Some(piece);
            }
            (self.rest, self.taken) = (rest, 0);
        }
    }
}

/// The total length of some buffers, in bytes.
pub fn total_len_readable(buffers: &[Readable<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

/// The total length of some buffers, in bytes.
pub fn total_len_writable(buffers: &[Writable<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

/// Copies the bytes of some buffers, one after another, to `to`: from byte `start` of them on, as many as both have.
pub fn gather(from: &[Readable<'_>], mut start: u64, to: &mut [u8]) -> Result<(), Fault> {
    let mut done = 0;
    for buffer in from {
        let skipped = start.min(buffer.len() as u64);
        start -= skipped;
        done += buffer.part(skipped as usize, usize::MAX).copy_to_slice(&mut to[done..])?;
    }
    Ok(())
}

/// The other way.
pub fn scatter(from: &[u8], to: &[Writable<'_>], mut start: u64) -> Result<(), Fault> {
    let mut done = 0;
    for buffer in to {
        let skipped = start.min(buffer.len() as u64);
        start -= skipped;
        done += buffer.part(skipped as usize, usize::MAX).copy_from_slice(&from[done..])?;
    }
    Ok(())
}
