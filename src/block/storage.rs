//! [`Storage`]: the five verbs that a delta needs of the file below it (reading has two ways), and [`FileStorage`], which
//! has them of a file.
//!
//! Everything that a delta reads and writes passes here, so a simulated disk in place of the file sees every step.

use std::fs::File;
use std::io;

use crate::sys::buffers::{Readable, Writable, total_len_readable};
use crate::sys::file;

use super::cached::{CachedFile, Patience};

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

/// A file, written by system call and read from a shared mapping of it.
///
/// Writes go by system call so that a full disk is an error code; reads of mapped bytes are copies without a system call.
pub struct FileStorage {
    file: File,
    /// The same, as it was long when opened.
    cached: CachedFile,
}

impl FileStorage {
    /// Takes over `file`, which has to be open for reading and, unless it is only looked at, writing.
    pub fn new(file: File) -> io::Result<FileStorage> {
        let cached = CachedFile::new(file.try_clone()?)?;
        Ok(FileStorage { file, cached })
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
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
        let Some(done) = self.cached.read_with(into, offset, patience)? else { return Ok(false) };
        self.read_rest(into, offset, done)?;
        Ok(true)
    }

    fn note_read(&self, offset: u64, len: usize, found: bool) {
        self.cached.note_read(offset, len, found);
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
