//! [`Base`]: an image as a backend maps it, read-only and shared with every other backend through the page cache.

use std::fs::File;
use std::io;

use crate::sys::buffers::{Readable, Writable};
use crate::sys::file;
use crate::sys::mapping::FileMapping;

/// The bytes below a delta. Past its end there are zeros, without end; a blank volume's base has no bytes at all.
pub struct Base {
    mapping: FileMapping,
}

impl Base {
    /// Maps all of an image.
    pub fn map(image: &File) -> io::Result<Base> {
        Ok(Base { mapping: FileMapping::new(image, file::len(image)?)? })
    }

    /// The base of a blank volume.
    pub fn empty() -> Base {
        Base { mapping: FileMapping::empty() }
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.len()
    }

    /// Fills `into` with the bytes at `offset`.
    #[inline]
    pub fn read(&self, into: Writable<'_>, offset: u64) {
        let done = into.copy_from(self.mapping.readable(offset, into.len()));
        if done < into.len() {
            into.part(done, usize::MAX).fill_zero();
        }
    }

    /// The bytes at `offset`, `len` of them (at most one of the largest clusters), as two parts: what the image holds and the zeros behind it.
    pub fn parts(&self, offset: u64, len: usize) -> [Readable<'_>; 2] {
        let held = self.mapping.readable(offset, len);
        [held, Readable::zeros(len - held.len())]
    }
}
