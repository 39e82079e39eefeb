//! [`Incoming`]: a file that becomes an image once it is whole, and otherwise never was.
//!
//! It has no name until then (`O_TMPFILE`), so that whatever ends this process leaves nothing behind. Where the file system
//! has no such files, it has a name that says so, and a lock for as long as it is being written: a name without one is
//! what a dead process left, and [`remove_abandoned`] removes it.
//!
//! Knows nothing of digests or formats.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys::file;

use super::StoreError;

/// How the names of files begin that are being written.
const NAME_START: &str = ".incoming-";
/// How much to wait for at a time: short enough to notice soon that the work was cancelled.
const SYNC_BYTES: u64 = 8 << 20;

/// A new file in a directory.
pub(super) struct Incoming {
    file: File,
    directory: PathBuf,
    /// The name that it has in the meantime, where it cannot be without.
    name: Option<PathBuf>,
}

/// What [`Incoming::publish`] found under the name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Published {
    New,
    /// There was a file of that name; the new one is gone.
    WasThere,
}

impl Incoming {
    /// A new, empty file that will have a name in `directory`.
    pub(super) fn create(directory: &Path) -> Result<Incoming, StoreError> {
        match file::open_unnamed(directory) {
            Ok(file) => Ok(Incoming { file, directory: directory.to_owned(), name: None }),
            // What kernels and file systems say that have no such files.
            Err(error)
                if [libc::EOPNOTSUPP, libc::EISDIR, libc::EINVAL, libc::ENOENT]
                    .contains(&error.raw_os_error().unwrap_or(0)) =>
            {
                Incoming::create_named(directory)
            }
            Err(error) => Err(StoreError::io("create a file in", directory)(error)),
        }
    }

    fn create_named(directory: &Path) -> Result<Incoming, StoreError> {
        loop {
            let name = directory.join(format!("{NAME_START}{}", uuid::Uuid::new_v4()));
            let cannot = |error| StoreError::io("create", &name)(error);
            let file =
                File::options().read(true).write(true).create_new(true).mode(0o600).open(&name).map_err(cannot)?;
            // Another opening of the store may have seen it before it was locked, and taken it for abandoned.
            if file::try_lock(&file).map_err(cannot)? && name.exists() {
                return Ok(Incoming { file, directory: directory.to_owned(), name: Some(name) });
            }
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The directory, for messages.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the contents durable, and `mode`, which are its permissions from now on. Gives up soon when `cancelled`.
    pub(super) fn sync(&self, mode: u32, cancelled: &AtomicBool) -> Result<(), StoreError> {
        let cannot = |source| StoreError::io("make durable a file in", &self.directory)(source);
        self.file.set_permissions(Permissions::from_mode(mode)).map_err(cannot)?;
        let len = self.file.metadata().map_err(cannot)?.len();
        for offset in (0..len).step_by(SYNC_BYTES as usize) {
            check_cancelled(cancelled)?;
            match file::wait_written(&self.file, offset, SYNC_BYTES) {
                // Not something that this file system can do by parts.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ESPIPE | libc::ENOSYS)) => break,
                result => result.map_err(cannot)?,
            }
        }
        check_cancelled(cancelled)?;
        self.file.sync_all().map_err(cannot)
    }

    /// Gives the file its name, for good: the name is durable too, as all else is since [`Incoming::sync`].
    pub(super) fn publish(mut self, path: &Path) -> Result<Published, StoreError> {
        let cannot = |source| StoreError::io("create", path)(source);
        let named = match &self.name {
            None => file::give_name(&self.file, path),
            Some(name) => std::fs::hard_link(name, path),
        };
        let published = match named {
            Ok(()) => Published::New,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Published::WasThere,
            Err(error) => return Err(cannot(error)),
        };
        self.remove_name();
        // When it was there, whoever named it may not have come as far as this.
        if let Err(error) = sync_directory(&self.directory) {
            if published == Published::New {
                // Nobody was told of it yet; the error that matters is the one above.
                let _ = std::fs::remove_file(path);
            }
            return Err(error);
        }
        Ok(published)
    }

    fn remove_name(&mut self) {
        if let Some(name) = self.name.take() {
            // Left there, it goes with the next opening of the store.
            let _ = std::fs::remove_file(name);
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.remove_name();
    }
}

/// Whether a name is one that only files have which are being written.
pub(super) fn is_incoming(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().starts_with(NAME_START.as_bytes())
}

/// Removes what processes left in `directory` that died while they wrote there.
pub(super) fn remove_abandoned(directory: &Path) -> Result<(), StoreError> {
    let cannot = |source| StoreError::io("look into", directory)(source);
    for entry in std::fs::read_dir(directory).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        if !is_incoming(&entry.file_name()) {
            continue;
        }
        let path = entry.path();
        let removed = match File::open(&path) {
            Ok(file) => file::try_lock(&file).and_then(|free| if free { std::fs::remove_file(&path) } else { Ok(()) }),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::io("remove", &path)(error));
            }
            _ => (),
        }
    }
    Ok(())
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(directory: &Path) -> Result<(), StoreError> {
    File::open(directory)
        .and_then(|open| open.sync_all())
        .map_err(StoreError::io("make durable the names in", directory))
}

/// An error when the caller no longer wants the result.
pub(super) fn check_cancelled(cancelled: &AtomicBool) -> Result<(), StoreError> {
    if cancelled.load(Ordering::Relaxed) { Err(StoreError::Cancelled) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn either_kind_has_its_name_when_it_is_whole_and_none_before() {
        for create in [Incoming::create, Incoming::create_named] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("whole");
            drop(create(directory.path()).unwrap());
            assert!(names(directory.path()).is_empty(), "dropped");

            for expected in [Published::New, Published::WasThere] {
                let incoming = create(directory.path()).unwrap();
                incoming.file().write_all(b"root").unwrap();
                remove_abandoned(directory.path()).unwrap();
                incoming.sync(0o444, &AtomicBool::new(false)).unwrap();
                assert_eq!(incoming.publish(&path).unwrap(), expected);
                assert_eq!(names(directory.path()), ["whole"]);
            }
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o444);
        }
    }

    #[test]
    fn what_a_dead_process_left_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let alive = Incoming::create_named(directory.path()).unwrap();
        std::fs::write(directory.path().join(format!("{NAME_START}dead")), b"half").unwrap();
        std::fs::write(directory.path().join("other"), b"whole").unwrap();
        remove_abandoned(directory.path()).unwrap();
        assert!(alive.name.as_ref().unwrap().exists());
        assert_eq!(names(directory.path()).len(), 2);
    }
}
