//! Exporting: an image's bytes into a file of the caller's, raw, and as sparse as they are stored.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::digest::Digest;
use crate::sys::buffers::Writable;
use crate::sys::file;

use super::incoming::{Incoming, Published, check_cancelled};
use super::{Progress, Store, StoreError, sparse};

const PART_BYTES: u64 = 1 << 20;
/// What the caller does with it is the caller's to say.
const EXPORT_MODE: u32 = 0o600;

impl Store {
    /// Writes an image to a new file, which has its name once it is whole and durable. A file that has the name is replaced
    /// in one step if `replace`, and otherwise left alone, with an error.
    pub fn export(
        &self,
        digest: &Digest,
        to: &Path,
        replace: bool,
        progress: &(dyn Fn(Progress) + Sync),
        cancelled: &AtomicBool,
    ) -> Result<(), StoreError> {
        let exists = || StoreError::Exists { path: to.to_owned() };
        if !replace && to.symlink_metadata().is_ok() {
            return Err(exists());
        }
        let directory = match to.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let incoming = Incoming::create(directory)?;
        self.export_into(digest, incoming.file(), to, progress, cancelled)?;
        incoming.sync(EXPORT_MODE, cancelled)?;
        if replace {
            return incoming.replace(to);
        }
        match incoming.publish(to)? {
            Published::New => Ok(()),
            Published::WasThere => Err(exists()),
        }
    }

    /// Writes an image to a file that is open for writing and empty; `path` is what messages call it. It is not synced.
    pub fn export_into(
        &self,
        digest: &Digest,
        to: &File,
        path: &Path,
        progress: &(dyn Fn(Progress) + Sync),
        cancelled: &AtomicBool,
    ) -> Result<(), StoreError> {
        let image = self.open_image(digest, None)?;
        let from = self.path(digest);
        let unreadable = || StoreError::io("read", &from);
        let unwritable = || StoreError::io("write to", path);
        let total_bytes = image.metadata().map_err(unreadable())?.len();
        if file::share_blocks(to, &image).is_ok() {
            progress(Progress { done_bytes: total_bytes, total_bytes });
            return Ok(());
        }
        to.set_len(total_bytes).map_err(unwritable())?;
        let mut buffer = vec![0; PART_BYTES as usize];
        let mut at = 0;
        while let Some(data) = file::next_data(&image, at).map_err(unreadable())? {
            at = data.start - data.start % sparse::BLOCK_BYTES as u64;
            while at < data.end {
                check_cancelled(cancelled)?;
                let bytes = &mut buffer[..PART_BYTES.min(data.end - at) as usize];
                file::read_at(&image, Writable::from_mut_slice(bytes), at).map_err(unreadable())?;
                sparse::write(to, bytes, at).map_err(unwritable())?;
                at += bytes.len() as u64;
                progress(Progress { done_bytes: at, total_bytes });
            }
        }
        progress(Progress { done_bytes: total_bytes, total_bytes });
        Ok(())
    }
}
