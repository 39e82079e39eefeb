//! [`StoreError`]: why the store refused or failed.
//!
//! A variant for each thing that a caller answers in its own way; the paths, what was expected and what was found are inside.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;

use super::Format;
use super::qcow2::Fault;
use super::vmdk::VmdkFault;

/// Why the store refused or failed. It leaves nothing half-made behind.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("cannot {action} {path}", path = .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// No space, no quota, or a file larger than the process may write.
    #[error("{path} has no space for this: free some there, and try again", path = .path.display())]
    Full {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// What is to be imported cannot be read.
    #[error("cannot read {label}")]
    Unreadable {
        label: String,
        #[source]
        source: io::Error,
    },
    /// What is to be imported is a directory, a pipe or a device.
    #[error("{label} is no regular file: write its bytes to 'pando' through a pipe instead")]
    NotAFile { label: String },
    /// Its size is none that a disk can have.
    #[error(
        "{label} has {found} bytes: expected one or more whole sectors of 512 bytes, so something is missing or too much"
    )]
    BadSize { label: String, found: u64 },
    /// It is larger than any disk that the store takes.
    #[error("{label} has {found} bytes as a disk: expected {limit} at most")]
    TooLarge { label: String, found: u64, limit: u64 },
    /// Its contents are not of the format that the caller named.
    #[error("{label} was to be of the format {expected}, and is {found}")]
    OtherFormat { label: String, expected: Format, found: &'static str },
    /// Its format is known, and none that the store reads.
    #[error("{label} is {found}, which is not read here: {advice}")]
    UnknownFormat { label: String, found: &'static str, advice: &'static str },
    /// It is not all of the disk: the rest is in another file, which is not followed, because whoever wrote the image could
    /// name any file of this host.
    #[error(
        "{label} refers to another file, as its {what} ({name:?}): that is never followed; \
         make it whole first, with 'qemu-img convert -O qcow2', where that file is"
    )]
    Refers { label: String, what: &'static str, name: String },
    /// Its metadata are damaged, lie, or ask for what is not supported.
    #[error("{label} cannot be taken as qcow2")]
    Qcow2 {
        label: String,
        #[source]
        fault: Fault,
    },
    /// The same, of the other format.
    #[error("{label} cannot be taken as VMDK")]
    Vmdk {
        label: String,
        #[source]
        fault: VmdkFault,
    },
    /// Somebody wrote to it meanwhile.
    #[error("{label} changed while it was read: stop what writes to it, and try again")]
    Changed { label: String },
    /// The caller said so.
    #[error("cancelled")]
    Cancelled,
    /// The store does not have the image.
    #[error("the image {digest} is not in the store: there is no {path}", path = .path.display())]
    Absent { digest: Digest, path: PathBuf },
    /// What is stored under a digest has other contents.
    #[error(
        "{path} is corrupt: its contents are {found}, expected {expected}; remove the image and import it again",
        path = .path.display()
    )]
    Corrupt { path: PathBuf, expected: Digest, found: Digest },
    /// What is stored under a digest is shorter or longer than the image.
    #[error(
        "{path} is corrupt: it has {found} bytes, expected {expected}; remove the image and import it again",
        path = .path.display()
    )]
    WrongLength { path: PathBuf, expected: u64, found: u64 },
}

impl StoreError {
    /// For `map_err` after a call of the file system; tells a full disk from other errors.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
        move |source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                    StoreError::Full { path, source }
                }
                _ => StoreError::Io { action, path, source },
            }
        }
    }
}
