//! The files of a run: made at its start, removed at its end.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::content;
use crate::suite::contestants::{Programs, Volume};
use crate::suite::machine;
use crate::suite::rows::BASE_BYTES;
use crate::sys::{self, MappedFile};

const GIB: u64 = 1 << 30;
/// For start-up: a base and a disk that would take long to read or to index.
const LARGE_BASE_BYTES: u64 = 10 * GIB;
const LARGE_DISK_BYTES: u64 = 1 << 40;

/// A directory with the bases, and names for all that comes and goes.
pub struct Site {
    directory: PathBuf,
    pub programs: Programs,
    pub base: File,
    pub base_mapped: MappedFile,
    /// As large, and mapped by nobody, so that it can be dropped from memory.
    cold_base: File,
}

impl Site {
    /// Makes the directory and the bases, in the page cache.
    pub fn new(directory: &Path, programs: Programs) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        let directory = fs::canonicalize(directory)?;
        // A run that was killed has left what would be served now.
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(|name| name.starts_with("private-")) {
                remove(&entry.path())?;
            }
        }
        let base = make_base(&directory.join("base"), BASE_BYTES)?;
        File::create(directory.join("large-base"))?.set_len(LARGE_BASE_BYTES)?;
        // In the page cache as on a host that has read it, in whatever pieces its readahead makes, and not
        // in those in which it was just written.
        sys::drop_cache(&base)?;
        sys::fill_cache(&base)?;
        let base_mapped = MappedFile::new(&base)?;
        let cold_base = make_base(&directory.join("cold-base"), BASE_BYTES)?;
        Ok(Self { directory, programs, base, base_mapped, cold_base })
    }

    /// The volume that is measured where nothing of the base is to be in memory, from which it is dropped.
    pub fn cold_volume(&self, queues: usize) -> Result<Volume> {
        sys::drop_cache(&self.cold_base)?;
        Ok(self.named("cold-base", BASE_BYTES, 0, queues))
    }

    /// Reads its base past the page cache. The disk of a virtual machine has a cache below it that other lines push it out of, and whoever came first would
    /// read for all who come next.
    pub fn read_cold_base(&self) -> Result<()> {
        let path = self.directory.join("cold-base");
        sys::read_past_cache(&path).with_context(|| path.display().to_string())
    }

    /// Has the disk done with all that was written and removed before.
    pub fn settle(&self) -> Result<()> {
        Ok(sys::sync_file_system(&self.base)?)
    }

    /// The volume that is measured; `index` tells several apart.
    pub fn volume(&self, index: usize, queues: usize) -> Volume {
        self.named("base", BASE_BYTES, index, queues)
    }

    /// Has the large base in memory from its start, in pages of the least size, as far as there is room for it, and says how far: whole
    /// gibibytes.
    pub fn fill_large_base(&self) -> Result<u64> {
        // Something is left to those who read it, and to whoever else is here.
        let room = machine::memory_available_bytes()? / 5 * 3;
        let bytes = LARGE_BASE_BYTES.min(room) & !(GIB - 1);
        ensure!(bytes > 0, "{room} bytes of memory for an image of at least 1 GiB");
        sys::fill_cache_by_pages(&File::open(self.directory.join("large-base"))?, bytes)?;
        Ok(bytes)
    }

    /// Takes it out of memory again.
    pub fn drop_large_base(&self) -> Result<()> {
        Ok(sys::drop_cache(&File::open(self.directory.join("large-base"))?)?)
    }

    pub fn large_volume(&self, index: usize) -> Volume {
        self.named("large-base", LARGE_DISK_BYTES, index, 1)
    }

    fn named(&self, base: &str, bytes: u64, index: usize, queues: usize) -> Volume {
        Volume {
            base: self.directory.join(base),
            bytes,
            private: self.directory.join(format!("private-{index}")),
            socket: self.directory.join(format!("socket-{index}")),
            queues,
            direct: false,
        }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// Removes what is a volume's own, whatever of it there is.
    pub fn clean(&self, volume: &Volume) -> Result<()> {
        remove(&volume.private)?;
        remove(&volume.socket)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("{} is left behind: {error}", self.directory.display());
        }
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| path.display().to_string())
        }
        _ => Ok(()),
    }
}

/// A file of incompressible bytes that can be checked wherever they turn up, on the disk already so
/// that nothing is written back while others are measured.
fn make_base(path: &Path, bytes: u64) -> Result<File> {
    let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(path);
    let file = file.with_context(|| path.display().to_string())?;
    let mut block = vec![0; 1 << 20];
    for offset in (0..bytes).step_by(block.len()) {
        content::fill(&mut block, offset, content::BASE);
        file.write_all_at(&block, offset)?;
    }
    file.sync_all()?;
    Ok(file)
}
