//! Importing: from a [`Source`] to an image that has its name, in one pass over the bytes.
//!
//! Each part is read, hashed, searched for zeros and written by one of several threads while it is in the processor's
//! cache; the kernel is told to begin writing early, so that the sync at the end has little left to wait for. An image has
//! its name only when all of it, permissions included, is durable.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::digest::{self, Digest};
use crate::sys::file;

use super::incoming::{Incoming, Published, check_cancelled};
use super::source::{self, Contents, Disk, Source};
use super::{Announcement, Format, Imported, Progress, Store, StoreError, sparse};

/// How much is written to the page cache before the kernel is told to begin writing it to the disk.
const WRITE_BEHIND_BYTES: u64 = 8 << 20;
/// Nobody writes to an image, not even its owner.
const IMAGE_MODE: u32 = 0o444;

impl Store {
    /// Imports an image. Blocks until it is durable; `progress` is told, from several threads, how far it has come.
    ///
    /// `announce` is called once, just before the image appears under its name: an error of it is the import's. After an error, or when
    /// `cancelled` became true, nothing is left of it.
    pub fn import(
        &self,
        source: Source,
        progress: &(dyn Fn(Progress) + Sync),
        cancelled: &AtomicBool,
        announce: impl FnOnce(Announcement) -> io::Result<()>,
    ) -> Result<Imported, StoreError> {
        let disk = source.disk(self.bytes_max)?;
        let (bytes, format) = (disk.bytes(), disk.format());
        let pass = Pass { bytes, done: AtomicU64::new(0), progress, cancelled };
        let (incoming, digest) = match (source.contents, format) {
            // It is in a file of its own already, which only wants its name.
            (Contents::Spooled(spooled), Format::Raw) => {
                let digest = pass.hash(&spooled.incoming, |_, _| Ok(()))?;
                (spooled.incoming, digest)
            }
            (_, Format::Raw) => match pass.share(&disk, &self.images)? {
                Some(incoming) => {
                    // Written zeros came along.
                    let digest = pass.hash(&incoming, |bytes, offset| sparse::punch(incoming.file(), bytes, offset))?;
                    (incoming, digest)
                }
                None => pass.copy(&disk, &self.images)?,
            },
            // The spool, or the file, is only read.
            (_contents, Format::Qcow2 | Format::Vmdk) => pass.copy(&disk, &self.images)?,
        };
        drop(disk);
        incoming.sync(IMAGE_MODE, cancelled)?;
        announce(Announcement { digest, bytes, format }).map_err(StoreError::io("name", &self.path(&digest)))?;
        self.name(incoming, digest, bytes, format)
    }

    /// Gives an image its name, and whatever else an image has.
    fn name(&self, incoming: Incoming, digest: Digest, bytes: u64, format: Format) -> Result<Imported, StoreError> {
        let path = self.path(&digest);
        let published = incoming.publish(&path)?;
        // Open for reading only: as long as anything is open for writing, there is no verity.
        let image = self.open_image(&digest, Some(bytes))?;
        if published == Published::New
            && let Err(error) = file::enable_verity(&image)
        {
            log::debug!("{} is without fs-verity: {error}", path.display());
        }
        Ok(Imported {
            digest,
            bytes,
            stored_bytes: super::allocated_bytes(&image).map_err(StoreError::io("look at", &path))?,
            format,
            verity: file::has_verity(&image),
            was_there: published == Published::WasThere,
        })
    }
}

/// One pass over all bytes of a disk.
struct Pass<'a> {
    bytes: u64,
    done: AtomicU64,
    progress: &'a (dyn Fn(Progress) + Sync),
    cancelled: &'a AtomicBool,
}

impl Pass<'_> {
    fn advance(&self, bytes: &[u8]) {
        let done_bytes = self.done.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        (self.progress)(Progress { done_bytes, total_bytes: self.bytes });
    }

    /// Copies the disk to a new file in `directory`, without the zeros.
    fn copy(&self, disk: &Disk, directory: &Path) -> Result<(Incoming, Digest), StoreError> {
        let incoming = Incoming::create(directory)?;
        let file = incoming.file();
        let cannot = || StoreError::io("write to a file in", directory);
        file.set_len(self.bytes).map_err(cannot())?;
        // The kernel lets one thread at a time write to a file, and the others spin until it is their turn: here they sleep.
        let turn = Mutex::new(());
        let digest = digest::of_parts(self.bytes, |offset, bytes| {
            check_cancelled(self.cancelled)?;
            if disk.read(offset, bytes)? {
                let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
                sparse::write(file, bytes, offset).map_err(cannot())?;
            }
            let end = offset + bytes.len() as u64;
            if end.is_multiple_of(WRITE_BEHIND_BYTES) {
                // Only a hint: what it would have reported, the sync does.
                let _ = file::start_writing(file, end - WRITE_BEHIND_BYTES, WRITE_BEHIND_BYTES);
            }
            self.advance(bytes);
            Ok(())
        })?;
        disk.check_unchanged()?;
        Ok((incoming, digest))
    }

    /// A new file in `directory` that shares the blocks of the disk's file, where the file system can do that.
    fn share(&self, disk: &Disk, directory: &Path) -> Result<Option<Incoming>, StoreError> {
        let incoming = Incoming::create(directory)?;
        if disk.share_with(incoming.file()).is_err() {
            return Ok(None);
        }
        // From here on it is a file of its own; it has to be what was looked at.
        disk.check_unchanged()?;
        Ok(Some(incoming))
    }

    /// The digest of a file that is not copied; `with_data` sees what is not in holes, and where.
    fn hash(
        &self,
        incoming: &Incoming,
        with_data: impl Fn(&[u8], u64) -> io::Result<()> + Sync,
    ) -> Result<Digest, StoreError> {
        let directory = incoming.directory();
        digest::of_parts(self.bytes, |offset, bytes| {
            check_cancelled(self.cancelled)?;
            if source::read_sparse(incoming.file(), offset, bytes)
                .map_err(StoreError::io("read a file in", directory))?
            {
                with_data(bytes, offset).map_err(StoreError::io("write to a file in", directory))?;
            }
            self.advance(bytes);
            Ok(())
        })
    }
}
