//! [`Base`]: an image as a backend maps it, read-only and shared with every other backend through the page cache.

use std::fs::File;
use std::io;

use crate::sys::buffers::{Readable, Writable};
use crate::sys::guard::Fault;

use super::Error;
use super::cached::{CachedFile, Patience};

/// The bytes below a delta. Past its end there are zeros, without end; a blank volume's base has no bytes at all.
pub struct Base {
    file: CachedFile,
    /// What to call the file in messages.
    label: String,
}

impl Base {
    /// Maps all of an image, which messages call `label`.
    pub fn map(image: &File, label: String) -> io::Result<Base> {
        Ok(Base { file: CachedFile::new(image.try_clone()?)?, label })
    }

    /// The base of a blank volume.
    pub fn empty() -> Base {
        Base { file: CachedFile::empty(), label: String::new() }
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.file.bytes()
    }

    /// Fills `into` with the bytes at `offset`; `false`, and it holds anything, when that would wait and must not.
    #[inline]
    pub fn read(&self, into: Writable<'_>, offset: u64, patience: Patience) -> Result<bool, Error> {
        let read = self.file.read_with(into, offset, patience);
        let read = read.map_err(|source| Error::of_io("read", &self.label, offset, source))?;
        let Some(done) = read else { return Ok(false) };
        if done < into.len() {
            into.part(done, usize::MAX).fill_zero()?;
        }
        Ok(true)
    }

    /// The image, if there is one.
    pub fn file(&self) -> Option<&File> {
        self.file.file()
    }

    /// Notes that these bytes have been read from the file, and whether they were in memory already.
    pub fn note_read(&self, offset: u64, len: usize, found: bool) {
        self.file.note_read(offset, len, found);
    }

    /// As [`CachedFile::let_go`].
    pub fn let_go(&self, is_wanted: impl FnMut() -> bool) {
        self.file.let_go(is_wanted);
    }

    /// As [`CachedFile::fetch`].
    #[inline]
    pub fn fetch(&self, offset: u64) {
        self.file.fetch(offset);
    }

    /// Notes that nobody knows whether these bytes are in memory.
    pub fn forget(&self, offset: u64, len: usize) {
        self.file.forget(offset, len);
    }

    /// The error that a fault is, if it is of this image.
    pub fn error_of(&self, fault: Fault) -> Option<Error> {
        let offset = self.file.offset_of(fault)?;
        Some(Error::of_io("read", &self.label, offset, self.file.page_error(offset)))
    }

    /// The bytes at `offset`, `len` of them (at most one of the largest clusters), as two parts: what the image holds and the zeros behind it.
    pub fn parts(&self, offset: u64, len: usize) -> [Readable<'_>; 2] {
        let held = self.file.readable(offset, len);
        [held, Readable::zeros(len - held.len())]
    }
}
