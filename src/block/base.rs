//! [`Base`]: an image as a backend maps it, read-only and shared with every other backend through the page cache.

use std::fs::File;
use std::io;

use crate::sys::buffers::{Readable, Writable};
use crate::sys::file;
use crate::sys::guard::Fault;
use crate::sys::mapping::FileMapping;

use super::Error;

/// The bytes below a delta. Past its end there are zeros, without end; a blank volume's base has no bytes at all.
pub struct Base {
    mapping: FileMapping,
    /// What to call the file in messages.
    label: String,
}

impl Base {
    /// Maps all of an image, which messages call `label`.
    pub fn map(image: &File, label: String) -> io::Result<Base> {
        Ok(Base { mapping: FileMapping::new(image, file::len(image)?)?, label })
    }

    /// The base of a blank volume.
    pub fn empty() -> Base {
        Base { mapping: FileMapping::empty(), label: String::new() }
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.len()
    }

    /// Fills `into` with the bytes at `offset`.
    #[inline]
    pub fn read(&self, into: Writable<'_>, offset: u64) -> Result<(), Error> {
        let read = self.mapping.read(into, offset);
        let done = read.map_err(|source| Error::of_io("read", &self.label, offset, source))?;
        if done < into.len() {
            into.part(done, usize::MAX).fill_zero()?;
        }
        Ok(())
    }

    /// The error that a fault is, if it is of this image.
    pub fn error_of(&self, fault: Fault) -> Option<Error> {
        let offset = self.mapping.offset_of(fault)?;
        Some(Error::of_io("read", &self.label, offset, self.mapping.page_error(offset)))
    }

    /// The bytes at `offset`, `len` of them (at most one of the largest clusters), as two parts: what the image holds and the zeros behind it.
    pub fn parts(&self, offset: u64, len: usize) -> [Readable<'_>; 2] {
        let held = self.mapping.readable(offset, len);
        [held, Readable::zeros(len - held.len())]
    }
}
