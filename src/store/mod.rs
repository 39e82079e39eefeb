//! [`Store`]: images at rest, each a read-only file named by the digest of its contents.
//!
//! It knows no running virtual machine, no database and no channel. Everything here blocks.
//!
//! A store is a directory:
//!
//! ```text
//! <root>/images/<digest, 64 hexadecimal digits>.raw     mode 0444; directories 0700
//! ```
//!
//! What has such a name is whole, durable and never changes: images are written to files without a name and get it last
//! (`incoming`). So there is nothing to repair after a crash, and no record beside the files that could contradict them.

mod error;
mod format;
mod import;
mod incoming;
mod qcow2;
mod source;
mod sparse;
mod spool;
mod vmdk;
mod warm;

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::digest::{self, Digest};
use crate::units::SECTOR_BYTES;

pub use error::StoreError;
pub use format::Format;
pub use qcow2::Fault;
pub use source::Source;
pub use spool::{Spool, Spooled};
pub use vmdk::VmdkFault;

/// The largest disk there is: as large as the largest delta.
pub const IMAGE_BYTES_MAX: u64 = 64 << 40;

const DIRECTORY_MODE: u32 = 0o700;
const NAME_END: &str = ".raw";

/// Images at rest, in a directory.
#[derive(Clone, Debug)]
pub struct Store {
    images: PathBuf,
    bytes_max: u64,
}

/// How far something has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// An image that is about to appear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Announcement {
    pub digest: Digest,
    /// Bytes of the disk.
    pub bytes: u64,
    /// What it was imported from.
    pub format: Format,
}

/// What was imported.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Imported {
    pub digest: Digest,
    /// Bytes of the disk.
    pub bytes: u64,
    /// Bytes that the file system gave it: less, for what is zeros.
    pub stored_bytes: u64,
    /// What it was imported from.
    pub format: Format,
    /// Whether the file system checks its blocks when they are read.
    pub verity: bool,
    /// Whether the store had it before.
    pub was_there: bool,
}

/// What is in a store.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Listing {
    /// In the order of their digests.
    pub images: Vec<Digest>,
    /// Names of what the store did not put there.
    pub foreign: Vec<OsString>,
}

impl Store {
    /// Opens the store at `root`, and creates it if it is not there. What a killed process left half-made is removed.
    pub fn open(root: &Path) -> Result<Store, StoreError> {
        let images = root.join("images");
        for directory in [root, &images] {
            match DirBuilder::new().mode(DIRECTORY_MODE).create(directory) {
                Ok(()) => {
                    let parent = directory.parent().filter(|parent| *parent != Path::new(""));
                    incoming::sync_directory(parent.unwrap_or(Path::new(".")))?;
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (),
                Err(error) => return Err(StoreError::io("create", directory)(error)),
            }
        }
        incoming::remove_abandoned(&images)?;
        Ok(Store { images, bytes_max: IMAGE_BYTES_MAX })
    }

    /// Takes no disk that is larger than this from now on.
    pub fn with_bytes_max(self, bytes_max: u64) -> Store {
        Store { bytes_max: bytes_max.min(IMAGE_BYTES_MAX), ..self }
    }

    /// Where an image is, or would be.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.images.join(format!("{digest}{NAME_END}"))
    }

    /// Begins an upload.
    pub fn spool(&self) -> Result<Spool, StoreError> {
        Spool::create(&self.images, self.bytes_max)
    }

    /// Opens an image for reading, and checks its length when it is known. Its contents are not read: [`Store::verify`]
    /// does that.
    pub fn open_image(&self, digest: &Digest, bytes: Option<u64>) -> Result<File, StoreError> {
        let path = self.path(digest);
        let image = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::Absent { digest: *digest, path });
            }
            result => result.map_err(StoreError::io("open", &path))?,
        };
        let found = image.metadata().map_err(StoreError::io("look at", &path))?.len();
        match bytes {
            Some(expected) if expected != found => Err(StoreError::WrongLength { path, expected, found }),
            _ => Ok(image),
        }
    }

    /// Bytes that the file system gave an image.
    pub fn stored_bytes(&self, digest: &Digest) -> Result<u64, StoreError> {
        let image = self.open_image(digest, None)?;
        allocated_bytes(&image).map_err(StoreError::io("look at", &self.path(digest)))
    }

    /// Reads all of an image, and checks that its contents are what its name says.
    pub fn verify(
        &self,
        digest: &Digest,
        progress: &(dyn Fn(Progress) + Sync),
        cancelled: &AtomicBool,
    ) -> Result<(), StoreError> {
        let path = self.path(digest);
        let image = self.open_image(digest, None)?;
        let total_bytes = image.metadata().map_err(StoreError::io("look at", &path))?.len();
        let done = AtomicU64::new(0);
        let found = digest::of_parts(total_bytes, |offset, bytes| {
            incoming::check_cancelled(cancelled)?;
            source::read_sparse(&image, offset, bytes).map_err(StoreError::io("read", &path))?;
            let done_bytes = done.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
            progress(Progress { done_bytes, total_bytes });
            Ok(())
        })?;
        if found == *digest { Ok(()) } else { Err(StoreError::Corrupt { path, expected: *digest, found }) }
    }

    /// Removes an image, durably. Who has it open keeps what is open.
    pub fn remove(&self, digest: &Digest) -> Result<(), StoreError> {
        let path = self.path(digest);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(StoreError::Absent { digest: *digest, path }),
            result => {
                result.map_err(StoreError::io("remove", &path))?;
                incoming::sync_directory(&self.images)
            }
        }
    }

    /// Lists what is there, by name alone.
    pub fn digests(&self) -> Result<Listing, StoreError> {
        let cannot = || StoreError::io("look into", &self.images);
        let mut listing = Listing::default();
        for entry in std::fs::read_dir(&self.images).map_err(cannot())? {
            let name = entry.map_err(cannot())?.file_name();
            let digest = name.to_str().and_then(|name| name.strip_suffix(NAME_END)).and_then(|name| name.parse().ok());
            match digest {
                // Only as it would be written: a digest has one name.
                Some(digest) if self.path(&digest).file_name() == Some(&name) => listing.images.push(digest),
                _ if incoming::is_incoming(&name) => (),
                _ => listing.foreign.push(name),
            }
        }
        listing.images.sort_unstable_by_key(|digest| digest.0);
        listing.foreign.sort_unstable();
        Ok(listing)
    }
}

fn allocated_bytes(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * SECTOR_BYTES)
}
