//! [`Storage`]: the five verbs that a delta needs of the file below it (reading has some ways), and [`FileStorage`], which
//! has them of a file.
//!
//! Everything that a delta reads and writes passes here, so a simulated disk in place of the file sees every step.

use std::fmt;
use std::fs::File;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::sys::buffers::{Readable, Writable, total_len_readable};
use crate::sys::file;

use super::cached::{CachedFile, Patience};
use super::direct::DirectFile;

/// A sparse file as a delta uses it. Called from many threads at once.
///
/// Until `sync` returns, a write may be lost by a power failure, in whole or in any of its 512-byte sectors, and writes
/// may become durable in any order. A write that has returned is seen by every later read and survives the death of the process.
///
/// An error that holds a [`Fault`](crate::sys::guard::Fault) is about the memory that was given, and not about the file.
pub trait Storage: Send + Sync {
    /// Fills `into` with the bytes at `offset`. Holes, and what lies past the end, read as zeros.
    fn read_at(&self, into: Writable<'_>, offset: u64) -> io::Result<()>;

    /// As `read_at`, for a few bytes with nothing around them that will be read next.
    fn read_alone_at(&self, into: Writable<'_>, offset: u64) -> io::Result<()> {
        self.read_at(into, offset)
    }

    /// As `read_at`; `false`, and `into` holds anything, when that would wait for the disk and must not.
    fn read_with(&self, into: Writable<'_>, offset: u64, _patience: Patience) -> io::Result<bool> {
        self.read_at(into, offset).map(|()| true)
    }

    /// As `read_at`, of what clusters hold, into some buffers, one after another.
    fn read_data_at(&self, into: &[Writable<'_>], mut offset: u64) -> io::Result<()> {
        for buffer in into {
            self.read_at(*buffer, offset)?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    /// As `write_at`, of what clusters hold.
    fn write_data_at(&self, from: &[Readable<'_>], offset: u64) -> io::Result<()> {
        self.write_at(from, offset)
    }

    /// Whether what clusters hold is never in memory, so that reading and writing it always waits for the disk.
    fn is_direct(&self) -> bool {
        false
    }

    /// Notes that somebody else has read these bytes from the file, and whether they were in memory already.
    fn note_read(&self, _offset: u64, _len: usize, _found: bool) {}

    /// Notes that nobody knows whether these bytes are in memory.
    fn forget(&self, _offset: u64, _len: usize) {}

    /// Writes the buffers, one after another, at `offset`.
    fn write_at(&self, from: &[Readable<'_>], offset: u64) -> io::Result<()>;

    /// Turns `len` bytes at `offset` into a hole. The file's length stays.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the file `len` bytes long; what is new is a hole.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes everything durable that was written before the call.
    fn sync(&self) -> io::Result<()>;
}

/// By what a delta's data goes to the disk and comes from there. Its marks and maps go through the page cache either way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeltaCache {
    /// Through the page cache.
    #[default]
    Writeback,
    /// Past it: guests that have a cache of their own then do not fill the host's as well.
    Direct,
}

/// What is none of these.
#[derive(Debug, thiserror::Error)]
#[error("expected writeback or direct")]
pub struct DeltaCacheError;

impl FromStr for DeltaCache {
    type Err = DeltaCacheError;

    fn from_str(text: &str) -> Result<DeltaCache, DeltaCacheError> {
        match text {
            "writeback" => Ok(DeltaCache::Writeback),
            "direct" => Ok(DeltaCache::Direct),
            _ => Err(DeltaCacheError),
        }
    }
}

impl fmt::Display for DeltaCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeltaCache::Writeback => "writeback",
            DeltaCache::Direct => "direct",
        })
    }
}

/// A file, written by system call and read from a shared mapping of it.
///
/// Writes go by system call so that a full disk is an error code; reads of mapped bytes are copies without a system call. What clusters hold can go past the page cache
/// instead.
pub struct FileStorage {
    file: File,
    /// The same, as it was long when opened.
    cached: CachedFile,
    /// The same, opened for what clusters hold.
    direct: Option<DirectFile>,
}

impl FileStorage {
    /// Takes over `file`, which has to be open for reading and, unless it is only looked at, writing.
    pub fn new(file: File) -> io::Result<FileStorage> {
        FileStorage::with(file, None)
    }

    /// As [`FileStorage::new`]; `direct` is the same file, opened for what clusters hold ([`file::reopen_direct`]).
    pub fn with(file: File, direct: Option<File>) -> io::Result<FileStorage> {
        let cached = CachedFile::new(file.try_clone()?)?;
        Ok(FileStorage { file, cached, direct: direct.map(DirectFile::new).transpose()? })
    }

    /// The file to read what clusters hold from.
    pub fn data_file(&self) -> &File {
        self.direct.as_ref().map_or(&self.file, DirectFile::file)
    }

    /// As [`CachedFile::fetch`].
    #[inline]
    pub fn fetch(&self, offset: u64) {
        self.cached.fetch(offset);
    }

    /// As [`CachedFile::let_go`].
    pub fn let_go(&self, is_wanted: impl FnMut() -> bool) {
        self.cached.let_go(is_wanted);
    }

    /// What lies behind the mapping of a file that has grown.
    #[inline]
    fn read_rest(&self, into: Writable<'_>, offset: u64, done: usize) -> io::Result<()> {
        if done < into.len() {
            file::read_at(&self.file, into.part(done, usize::MAX), offset + done as u64)?;
        }
        Ok(())
    }
}

impl Storage for FileStorage {
    #[inline]
    fn read_at(&self, into: Writable<'_>, offset: u64) -> io::Result<()> {
        let done = self.cached.read(into, offset)?;
        self.read_rest(into, offset, done)
    }

    #[inline]
    fn read_with(&self, into: Writable<'_>, offset: u64, patience: Patience) -> io::Result<bool> {
        if let Some(direct) = &self.direct {
            return if patience == Patience::Waits {
                direct.read_at(&[into], offset).map(|()| true)
            } else {
                Ok(false)
            };
        }
        let Some(done) = self.cached.read_with(into, offset, patience)? else { return Ok(false) };
        self.read_rest(into, offset, done)?;
        Ok(true)
    }

    fn read_data_at(&self, into: &[Writable<'_>], offset: u64) -> io::Result<()> {
        match &self.direct {
            Some(direct) => direct.read_at(into, offset),
            None => file::read_all_at(&self.file, into, offset),
        }
    }

    fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    fn note_read(&self, offset: u64, len: usize, found: bool) {
        if self.direct.is_none() {
            self.cached.note_read(offset, len, found);
        }
    }

    fn forget(&self, offset: u64, len: usize) {
        self.cached.forget(offset, len);
    }

    /// By system call: the fault of a mapping reads ahead, megabytes around a few bytes and into holes too.
    fn read_alone_at(&self, into: Writable<'_>, offset: u64) -> io::Result<()> {
        file::read_at(&self.file, into, offset)
    }

    fn write_at(&self, from: &[Readable<'_>], offset: u64) -> io::Result<()> {
        file::write_at(&self.file, from, offset)?;
        // Which is where it stays until the kernel needs the room.
        self.cached.note(offset, total_len_readable(from) as usize);
        Ok(())
    }

    fn write_data_at(&self, from: &[Readable<'_>], offset: u64) -> io::Result<()> {
        match &self.direct {
            Some(direct) if direct.write_at(from, offset)? => Ok(()),
            // A disk whose blocks are larger than sectors: the kernel has the rest of them.
            Some(_) => file::write_at(&self.file, from, offset),
            None => self.write_at(from, offset),
        }
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        file::punch_hole(&self.file, offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
