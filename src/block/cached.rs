//! [`CachedFile`]: a file of which most is in the page cache, read without a system call where it is, and never waited for where whoever reads must not
//! wait.
//!
//! A copy from a mapping waits for the disk when its page is not there, and nothing says so beforehand. So account is kept of the pages that were there
//! when they were last read. A page that is not among them is left to who reads it meanwhile, or read by a system call that gives up rather than wait. Where that finds page after page, it
//! is believed of their neighbours too: an image that is all in memory is soon read without such calls. The account is a
//! hint: the kernel may have dropped a page since, and then a copy waits after all, once; whoever notices that says so
//! ([`CachedFile::forget`]).

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::sys::array::ZeroedArray;
use crate::sys::buffers::{Readable, Writable};
use crate::sys::file;
use crate::sys::guard::Fault;
use crate::sys::mapping::FileMapping;

/// What the account is kept by. Where the kernel's pages are larger, several of these are in memory or out of it together.
const PAGE_BYTES: u64 = 4096;

/// So many pages in a row have to be found before others about them are believed to be in memory too: at first as many as readahead brings at once at
/// least, later as many as lie in a page table.
const FOUND_BEFORE_MANY: u32 = 32;
const FOUND_BEFORE_ALL: u32 = 256;
const MANY_BYTES: u64 = 64 << 10;
const ALL_BYTES: u64 = 2 << 20;

/// So much of a mapping is let go of at a time, which takes a fraction of a millisecond.
const PART_BYTES: u64 = 64 << 20;

/// The range of whole pieces of this size that has all of these bytes.
fn widened(offset: u64, len: usize, piece: u64) -> (u64, u64) {
    let start = offset / piece * piece;
    let end = offset.saturating_add(len as u64);
    (start, end.checked_next_multiple_of(piece).unwrap_or(u64::MAX))
}

/// Tests name this in the environment of a backend, and its reads all wait, whatever is in memory; in builds with debug assertions, and nowhere
/// else.
pub const COLD_VARIABLE: &str = "PANDO_ALWAYS_COLD";

/// Finds out whether nothing is to count as being in memory.
pub fn choose() {
    #[cfg(debug_assertions)]
    pretend_cold(std::env::var_os(COLD_VARIABLE).is_some());
}

/// From now on nothing counts as being in memory, or what is.
#[cfg(debug_assertions)]
pub fn pretend_cold(cold: bool) {
    COLD.store(cold, Ordering::Relaxed);
}

#[cfg(debug_assertions)]
static COLD: AtomicBool = AtomicBool::new(false);

#[inline(always)]
fn is_always_cold() -> bool {
    #[cfg(debug_assertions)]
    return COLD.load(Ordering::Relaxed);
    #[cfg(not(debug_assertions))]
    false
}

/// Whether a read may wait for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// It waits.
    Waits,
    /// What is not in memory is not read.
    AtOnce,
    /// What is not known to be in memory is not read: somebody else reads it, and finds out.
    Known,
}

/// A file, mapped as it was long when it was opened here.
pub struct CachedFile {
    /// None: a file without bytes.
    file: Option<File>,
    mapping: FileMapping,
    /// A bit for each page that was in memory.
    seen: ZeroedArray<AtomicU64>,
    /// A bit for each part that has been read through the mapping since it was let go of.
    mapped: ZeroedArray<AtomicU64>,
    /// How many in a row were, that were not known to be.
    found: AtomicU32,
    /// Whether the file system can give up rather than wait.
    gives_up: AtomicBool,
}

impl CachedFile {
    /// Takes over a file.
    pub fn new(file: File) -> io::Result<CachedFile> {
        let len = file::len(&file)?;
        let words = len.div_ceil(PAGE_BYTES).div_ceil(u64::from(u64::BITS));
        Ok(CachedFile {
            mapped: ZeroedArray::new(len.div_ceil(PART_BYTES * u64::from(u64::BITS)) as usize)?,
            mapping: FileMapping::new(&file, len)?,
            seen: ZeroedArray::new(usize::try_from(words).map_err(|_| io::ErrorKind::OutOfMemory)?)?,
            found: AtomicU32::new(0),
            file: Some(file),
            gives_up: AtomicBool::new(true),
        })
    }

    /// A file without bytes.
    pub fn empty() -> CachedFile {
        CachedFile {
            file: None,
            mapping: FileMapping::empty(),
            seen: ZeroedArray::empty(),
            mapped: ZeroedArray::empty(),
            found: AtomicU32::new(0),
            gives_up: AtomicBool::new(false),
        }
    }

    /// The file.
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// Its length in bytes when it was opened here.
    pub fn bytes(&self) -> u64 {
        self.mapping.len()
    }

    /// Has the processor fetch what is at `offset`, if that is in memory.
    #[inline]
    pub fn fetch(&self, offset: u64) {
        if self.has_seen(offset, 1) {
            self.mapping.fetch(offset);
        }
    }

    /// Copies the bytes at `offset` to the start of `into`, as many as both have, and says how many; waits for what is not in memory.
    ///
    /// # Errors
    /// Holds a [`Fault`] when it is `into` that cannot be accessed.
    #[inline]
    pub fn read(&self, into: Writable<'_>, offset: u64) -> io::Result<usize> {
        self.mapping.read(into, offset)
    }

    /// As [`CachedFile::read`]; `None`, and `into` holds anything, when that would wait and must not.
    #[inline]
    pub fn read_with(&self, into: Writable<'_>, offset: u64, patience: Patience) -> io::Result<Option<usize>> {
        let into = into.part(0, self.mapping.len().saturating_sub(offset).min(usize::MAX as u64) as usize);
        if self.has_seen(offset, into.len()) && !is_always_cold() {
            self.note_mapped(offset);
            return self.mapping.read(into, offset).map(Some);
        }
        self.read_unseen(into, offset, patience)
    }

    #[cold]
    fn read_unseen(&self, into: Writable<'_>, offset: u64, patience: Patience) -> io::Result<Option<usize>> {
        let Some(file) = &self.file else { return Ok(Some(0)) };
        let reads = match patience {
            Patience::Waits => file::read_once,
            Patience::Known => return Ok(None),
            Patience::AtOnce if is_always_cold() => return Ok(None),
            Patience::AtOnce if self.gives_up.load(Ordering::Relaxed) => file::read_at_once,
            Patience::AtOnce => return self.mapping.read(into, offset).map(Some),
        };
        match (reads(file, into, offset), patience) {
            (Ok(count), _) if count == into.len() => {
                self.note_read(offset, count, patience == Patience::AtOnce);
                Ok(Some(count))
            }
            (Err(error), Patience::AtOnce) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                log::debug!("the file system cannot give up rather than wait for its disk, so all reads wait");
                self.gives_up.store(false, Ordering::Relaxed);
                self.mapping.read(into, offset).map(Some)
            }
            (_, Patience::AtOnce) => {
                self.found.store(0, Ordering::Relaxed);
                Ok(None)
            }
            // The mapping tells whether it is the file or the memory, and where.
            (_, Patience::Waits | Patience::Known) => self.mapping.read(into, offset).map(Some),
        }
    }

    /// Notes that this byte is read through the mapping. What lies around it, and in another part by accident, is kept for longer or let go of too early.
    #[inline]
    fn note_mapped(&self, offset: u64) {
        let part = offset / PART_BYTES;
        let (word, bit) = ((part / 64) as usize, 1 << (part % 64));
        if let Some(word) = self.mapped.get(word)
            && word.load(Ordering::Relaxed) & bit == 0
        {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// Lets go of what it takes of memory to have the file mapped, a part at a time, until `is_wanted`. Whatever is read next takes some longer, once.
    pub fn let_go(&self, mut is_wanted: impl FnMut() -> bool) {
        let Some(file) = &self.file else { return };
        for (index, word) in self.mapped.iter().enumerate() {
            while word.load(Ordering::Relaxed) != 0 && !is_wanted() {
                let bit = word.load(Ordering::Relaxed).trailing_zeros();
                // Ahead of letting go: who reads meanwhile notes it again.
                word.fetch_and(!1u64.checked_shl(bit).unwrap_or(0), Ordering::Relaxed);
                let start = (index as u64 * u64::from(u64::BITS) + u64::from(bit)) * PART_BYTES;
                if let Err(error) = self.mapping.let_go(file, start..self.bytes().min(start + PART_BYTES)) {
                    log::debug!("what a mapping takes is not given back: {error}");
                    return;
                }
            }
        }
    }

    /// Notes that the pages of these bytes are in memory.
    pub fn note(&self, offset: u64, len: usize) {
        self.words(offset, len, |word, bits| {
            if word.load(Ordering::Relaxed) & bits != bits {
                word.fetch_or(bits, Ordering::Relaxed);
            }
            true
        });
    }

    /// Notes that these bytes have been read from the file, and whether they were in memory already. The more in a row were, the more of their neighbours are
    /// believed to be too; but not of those that follow on what was read before: the kernel has read them ahead.
    pub fn note_read(&self, offset: u64, len: usize, found: bool) {
        if !found {
            self.found.store(0, Ordering::Relaxed);
        }
        if !found || offset.checked_sub(1).is_some_and(|before| self.has_seen(before, 1)) {
            self.note(offset, len);
        } else {
            self.note_found(offset, len);
        }
    }

    fn note_found(&self, offset: u64, len: usize) {
        let around = match self.found.fetch_add(1, Ordering::Relaxed) {
            ..FOUND_BEFORE_MANY => PAGE_BYTES,
            FOUND_BEFORE_MANY..FOUND_BEFORE_ALL => MANY_BYTES,
            FOUND_BEFORE_ALL.. => ALL_BYTES,
        };
        let (start, end) = widened(offset, len, around);
        self.note(start, end.min(self.bytes()).saturating_sub(start) as usize);
    }

    /// Notes that nobody knows whether they are, nor of any that may have been believed to be for theirs.
    pub fn forget(&self, offset: u64, len: usize) {
        self.found.store(0, Ordering::Relaxed);
        let (start, end) = widened(offset, len, ALL_BYTES);
        let (offset, len) = (start, end.min(self.bytes()).saturating_sub(start) as usize);
        self.words(offset, len, |word, bits| {
            word.fetch_and(!bits, Ordering::Relaxed);
            true
        });
    }

    #[inline]
    fn has_seen(&self, offset: u64, len: usize) -> bool {
        self.words(offset, len, |word, bits| word.load(Ordering::Relaxed) & bits == bits)
    }

    /// Calls `each` with the words and bits of the pages of these bytes, until it says that it is enough. Whether it never did.
    #[inline]
    fn words(&self, offset: u64, len: usize, mut each: impl FnMut(&AtomicU64, u64) -> bool) -> bool {
        if len == 0 {
            return true;
        }
        let (first, last) = (offset / PAGE_BYTES, (offset + len as u64 - 1) / PAGE_BYTES);
        let mut page = first;
        while page <= last {
            let (word, bit) = ((page / 64) as usize, page % 64);
            let count = (64 - bit).min(last - page + 1);
            let bits = (u64::MAX >> (64 - count)) << bit;
            // What was added to the file since is not accounted for.
            let Some(word) = self.seen.get(word) else { return false };
            if !each(word, bits) {
                return false;
            }
            page += count;
        }
        true
    }

    /// The bytes from `offset`, `len` of them, or as many as there are.
    pub fn readable(&self, offset: u64, len: usize) -> Readable<'_> {
        self.mapping.readable(offset, len)
    }

    /// The offset of a fault, if it is of this file.
    pub fn offset_of(&self, fault: Fault) -> Option<u64> {
        self.mapping.offset_of(fault)
    }

    /// What a fault at an offset means.
    pub fn page_error(&self, offset: u64) -> io::Error {
        self.mapping.page_error(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written is in memory; a file system that cannot give up rather than wait has no account to test.
    #[test]
    fn what_readahead_brings_says_nothing_of_what_lies_behind_it() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * ALL_BYTES).unwrap();
        let cached = CachedFile::new(file).unwrap();
        for page in 1..2 * u64::from(FOUND_BEFORE_ALL) {
            cached.note_read(page * PAGE_BYTES, PAGE_BYTES as usize, true);
        }
        assert!(cached.has_seen(PAGE_BYTES, PAGE_BYTES as usize) && !cached.has_seen(0, 1));
        assert!(!cached.has_seen(2 * u64::from(FOUND_BEFORE_ALL) * PAGE_BYTES, 1), "none of these has been read");
        assert!(cached.read_with(Writable::from_mut_slice(&mut [0; 9]), 0, Patience::Known).unwrap().is_none());
    }

    #[test]
    fn neighbours_are_believed_to_be_in_memory_after_many_finds_and_forgotten_with_one() {
        let file = tempfile::tempfile().unwrap();
        let bytes = 4 * ALL_BYTES + 3 * PAGE_BYTES;
        let contents: Vec<u8> = (0..bytes).map(|at| (at / 512) as u8).collect();
        file::write_at(&file, &[Readable::from_slice(&contents)], 0).unwrap();
        let cached = CachedFile::new(file).unwrap();
        let read = |page: u64| {
            let mut found = vec![0; PAGE_BYTES as usize];
            let count = cached.read_with(Writable::from_mut_slice(&mut found), page * PAGE_BYTES, Patience::AtOnce);
            let expected = &contents[(page * PAGE_BYTES) as usize..][..PAGE_BYTES as usize];
            assert!(count.unwrap() == Some(PAGE_BYTES as usize) && found == expected, "page {page}");
            cached.gives_up.load(Ordering::Relaxed)
        };
        let has_seen = |start: u64, end: u64| cached.has_seen(start, (end - start) as usize);
        if !read(0) {
            return;
        }
        assert!(has_seen(0, PAGE_BYTES) && !has_seen(PAGE_BYTES, 2 * PAGE_BYTES), "that page alone");
        for count in 1..FOUND_BEFORE_ALL {
            // From the last one down, so that none follows on another.
            read(u64::from(FOUND_BEFORE_ALL - count));
            // Those that were believed to be there are not found.
            cached.found.store(count + 1, Ordering::Relaxed);
        }
        assert!(has_seen(32 * PAGE_BYTES, 48 * PAGE_BYTES), "as many as readahead brings");
        assert!(!has_seen(2 * ALL_BYTES, 2 * ALL_BYTES + PAGE_BYTES));
        read(3 * 512 + 7);
        assert!(has_seen(3 * ALL_BYTES, 4 * ALL_BYTES), "a page table's");
        read(4 * 512 + 1);
        assert!(has_seen(4 * ALL_BYTES, bytes), "and no more than there are");
        cached.forget(3 * ALL_BYTES + 100, 1);
        assert!(has_seen(4 * ALL_BYTES, bytes) && has_seen(0, PAGE_BYTES));
        assert!((0..512).all(|page| {
            let start = 3 * ALL_BYTES + page * PAGE_BYTES;
            !has_seen(start, start + PAGE_BYTES)
        }));
        read(3 * 512);
        assert!(!has_seen(3 * ALL_BYTES, 3 * ALL_BYTES + 2 * PAGE_BYTES), "from the start again");
    }
}
