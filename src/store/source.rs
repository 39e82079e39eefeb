//! [`Source`]: what an image is imported from, and its bytes as those of a disk, whatever its format.
//!
//! Knows nothing of where they go.

use std::fs::File;

use crate::digest::Stamp;
use crate::sys::buffers::Writable;
use crate::sys::file;
use crate::units;

use super::StoreError;
use super::format::{self, Format, Found};
use super::qcow2::Qcow2;
use super::spool::Spooled;
use super::vmdk::Vmdk;

/// What an image is imported from.
pub struct Source {
    pub(super) contents: Contents,
    label: String,
    format: Option<Format>,
}

pub(super) enum Contents {
    File(File),
    Spooled(Spooled),
}

impl Source {
    /// A regular file that is open for reading; `label` is what messages call it.
    pub fn file(file: File, label: impl Into<String>) -> Source {
        Source { contents: Contents::File(file), label: label.into(), format: None }
    }

    /// What was written to a spool; `label` is what messages call it.
    pub fn spooled(spooled: Spooled, label: impl Into<String>) -> Source {
        Source { contents: Contents::Spooled(spooled), label: label.into(), format: None }
    }

    /// Refuses any other format; without this, it is told from the contents. Said to be raw, the bytes are taken as they are,
    /// whatever they look like.
    pub fn with_format(self, format: Option<Format>) -> Source {
        Source { format, ..self }
    }

    fn open(&self) -> &File {
        match &self.contents {
            Contents::File(file) => file,
            Contents::Spooled(spooled) => spooled.file(),
        }
    }

    /// Opens it as a disk of `bytes_max` bytes at most.
    pub(super) fn disk(&self, bytes_max: u64) -> Result<Disk, StoreError> {
        let unreadable = |source| StoreError::Unreadable { label: self.label.clone(), source };
        let file = self.open().try_clone().map_err(unreadable)?;
        if !file.metadata().map_err(unreadable)?.is_file() {
            return Err(StoreError::NotAFile { label: self.label.clone() });
        }
        let stamp = Stamp::of(&file).map_err(unreadable)?;
        let bytes = stamp.size();
        let format = match (self.format, format::probe(&file, bytes).map_err(unreadable)?) {
            (Some(Format::Raw), _) => Format::Raw,
            (Some(expected), found) if found != Found::Known(expected) => {
                return Err(StoreError::OtherFormat { label: self.label.clone(), expected, found: found.name() });
            }
            (_, Found::Known(format)) => format,
            (_, Found::Foreign { name: found, advice }) => {
                return Err(StoreError::UnknownFormat { label: self.label.clone(), found, advice });
            }
        };
        let reader = match format {
            Format::Raw => {
                check_disk_bytes(&self.label, bytes, bytes_max)?;
                Reader::Raw { bytes }
            }
            Format::Qcow2 => {
                let file = file.try_clone().map_err(unreadable)?;
                Reader::Qcow2(Qcow2::open(file, &self.label, bytes, bytes_max)?)
            }
            Format::Vmdk => {
                let file = file.try_clone().map_err(unreadable)?;
                Reader::Vmdk(Vmdk::open(file, &self.label, bytes, bytes_max)?)
            }
        };
        Ok(Disk { file, label: self.label.clone(), stamp, reader })
    }
}

/// A source that is being read as a disk.
pub(super) struct Disk {
    file: File,
    label: String,
    /// What it was when it was opened.
    stamp: Stamp,
    reader: Reader,
}

enum Reader {
    Raw { bytes: u64 },
    Qcow2(Qcow2),
    Vmdk(Vmdk),
}

impl Disk {
    /// Bytes of the disk.
    pub(super) fn bytes(&self) -> u64 {
        match &self.reader {
            Reader::Raw { bytes } => *bytes,
            Reader::Qcow2(image) => image.virtual_bytes(),
            Reader::Vmdk(image) => image.virtual_bytes(),
        }
    }

    pub(super) fn format(&self) -> Format {
        match &self.reader {
            Reader::Raw { .. } => Format::Raw,
            Reader::Qcow2(_) => Format::Qcow2,
            Reader::Vmdk(_) => Format::Vmdk,
        }
    }

    /// Reads the bytes at `offset`; `false` when they are all zeros without having been read.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> Result<bool, StoreError> {
        match &self.reader {
            Reader::Raw { .. } => read_sparse(&self.file, offset, into)
                .map_err(|source| StoreError::Unreadable { label: self.label.clone(), source }),
            Reader::Qcow2(image) => image.read(offset, into),
            Reader::Vmdk(image) => image.read(offset, into),
        }
    }

    /// Has `file`, which is new, share the blocks of a raw source.
    pub(super) fn share_with(&self, file: &File) -> std::io::Result<()> {
        file::share_blocks(file, &self.file)
    }

    /// Checks that nobody has written to it since it was opened, as far as its size and times tell.
    pub(super) fn check_unchanged(&self) -> Result<(), StoreError> {
        let now =
            Stamp::of(&self.file).map_err(|source| StoreError::Unreadable { label: self.label.clone(), source })?;
        if now == self.stamp { Ok(()) } else { Err(StoreError::Changed { label: self.label.clone() }) }
    }
}

/// Reads the bytes of a file at `offset`, except when they all lie in a hole: that is only looked up, and gives `false`.
pub(super) fn read_sparse(file: &File, offset: u64, into: &mut [u8]) -> std::io::Result<bool> {
    let end = offset + into.len() as u64;
    let any = file::next_data(file, offset)?.is_some_and(|data| data.start < end);
    if any {
        file::read_at(file, Writable::from_mut_slice(into), offset)?;
    } else {
        into.fill(0);
    }
    Ok(any)
}

/// Checks the size of a disk.
pub(super) fn check_disk_bytes(label: &str, found: u64, limit: u64) -> Result<(), StoreError> {
    if found > limit {
        return Err(StoreError::TooLarge { label: label.to_owned(), found, limit });
    }
    if found == 0 || !units::is_whole_sectors(found) {
        return Err(StoreError::BadSize { label: label.to_owned(), found });
    }
    Ok(())
}
