//! [`Spool`]: bytes that come one after another, from a pipe or over the network, until they are a [`Source`](super::Source).
//!
//! They go to a file without a name in the store's own directory: a raw image that comes this way is never copied again.

use std::fs::File;
use std::path::Path;

use crate::sys::file;

use super::StoreError;
use super::incoming::Incoming;
use super::sparse;

/// How much is gathered before it is written: whole blocks, so that runs of zeros are found.
const GATHERED_BYTES: usize = 1 << 20;
const _: () = assert!(GATHERED_BYTES.is_multiple_of(sparse::BLOCK_BYTES));

/// What an upload is written to. Dropped, it leaves nothing behind.
pub struct Spool {
    incoming: Incoming,
    gathered: Vec<u8>,
    /// How much was written to the file.
    written: u64,
    bytes_max: u64,
}

/// All of an upload.
pub struct Spooled {
    pub(super) incoming: Incoming,
}

impl Spool {
    pub(super) fn create(directory: &Path, bytes_max: u64) -> Result<Spool, StoreError> {
        let incoming = Incoming::create(directory)?;
        Ok(Spool { incoming, gathered: Vec::with_capacity(GATHERED_BYTES), written: 0, bytes_max })
    }

    /// How many bytes have come.
    pub fn bytes(&self) -> u64 {
        self.written + self.gathered.len() as u64
    }

    /// Takes the bytes that follow.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), StoreError> {
        let found = self.bytes().saturating_add(bytes.len() as u64);
        if found > self.bytes_max {
            return Err(StoreError::TooLarge { label: "the upload".to_owned(), found, limit: self.bytes_max });
        }
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(GATHERED_BYTES - self.gathered.len()));
            self.gathered.extend_from_slice(now);
            bytes = later;
            if self.gathered.len() == GATHERED_BYTES {
                self.put()?;
            }
        }
        Ok(())
    }

    /// Says that this was all.
    pub fn finish(mut self) -> Result<Spooled, StoreError> {
        self.put()?;
        // The last of it may have been zeros, which are not written.
        let directory = self.incoming.directory();
        self.incoming.file().set_len(self.written).map_err(StoreError::io("extend a file in", directory))?;
        Ok(Spooled { incoming: self.incoming })
    }

    fn put(&mut self) -> Result<(), StoreError> {
        let file = self.incoming.file();
        sparse::write(file, &self.gathered, self.written)
            .map_err(StoreError::io("write to a file in", self.incoming.directory()))?;
        // Only a hint: what it would have reported, the sync does.
        let _ = file::start_writing(file, self.written, self.gathered.len() as u64);
        self.written += self.gathered.len() as u64;
        self.gathered.clear();
        Ok(())
    }
}

impl Spooled {
    pub(super) fn file(&self) -> &File {
        self.incoming.file()
    }
}
