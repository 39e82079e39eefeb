//! [`Error`]: why a request to a volume failed.

use std::io;

use crate::sys::guard::Fault;

/// Why a request to a volume failed. Whether it is the guest's fault, the file system's or the file's is what callers
/// tell apart; the rest is for people.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused: no space, an I/O error, the largest file size.
    #[error("cannot {action} {file} at offset {offset}")]
    Io {
        action: &'static str,
        file: String,
        offset: u64,
        #[source]
        source: io::Error,
    },
    /// Metadata of the delta does not check out. Nothing was changed.
    #[error(
        "{file}: the cluster map at offset {offset} is corrupt: {fault}; 'pando delta check' tells what is affected"
    )]
    Corrupt { file: String, offset: u64, fault: super::delta::MapFault },
    /// An earlier sync failed, so nobody knows what the disk holds: no further write or flush may report success.
    #[error("{file}: refused, because an earlier sync failed: see to the disk, and then start the backend again")]
    Latched { file: String },
    /// The volume has no delta to write to.
    #[error("the volume is read-only")]
    ReadOnly,
    /// The range is not part of the volume.
    #[error("bytes {offset} to {offset} + {len} lie outside the volume of {bytes} bytes")]
    OutOfRange { offset: u64, len: u64, bytes: u64 },
    /// The memory that was to be read from or written to is gone, which is its owner's affair: the files are as good as before.
    #[error(transparent)]
    Memory(#[from] Fault),
}

impl Error {
    /// What it means that something could not be done with a file. Also tells when it was not the file's fault, but that of the memory.
    #[cold]
    pub(super) fn of_io(action: &'static str, file: &str, offset: u64, source: io::Error) -> Error {
        match source.downcast() {
            Ok(fault) => Error::Memory(fault),
            Err(source) => Error::Io { action, file: file.to_owned(), offset, source },
        }
    }
}

impl Error {
    /// Whether the file system has no room: nothing is broken, and the same request may work later.
    pub fn is_full(&self) -> bool {
        matches!(self, Error::Io { source, .. } if is_full(source))
    }
}

/// Whether an error says that the file system, or somebody's share of it, is full.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
