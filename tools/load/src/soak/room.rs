//! [`Room`]: the file system that the deltas are in: a small one in memory, which can be made full and roomy again.
//!
//! Mounted where this process and what it has started alone see it, so that it goes with them, whatever becomes of them. Without the
//! rights to, deltas lie where everything else does, and no disk is ever full.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};

use crate::soak::strikes::Strikes;
use crate::sys;

/// How often it is made as small as what it holds, which may have become more meanwhile.
const TRIES: usize = 1000;
const PAGE_BYTES: u64 = 4096;

pub struct Room {
    place: PathBuf,
    /// Size while it is roomy.
    bytes: u64,
    is_full: AtomicBool,
    /// The times when it was full.
    pub fills: Strikes,
}

impl Room {
    /// Mounts one of so many bytes where a daemon that keeps its state below `state` has its deltas. To be called by the only thread.
    /// None, and a word to whoever watches: there are no rights to.
    pub fn mount(state: &Path, bytes: u64) -> Result<Option<Self>> {
        let place = state.join("volumes");
        fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
        if let Err(error) = sys::keep_mounts_private().and_then(|()| sys::mount_memory(&place, bytes, false)) {
            println!("no disk is going to be full: a small file system cannot be mounted: {error}");
            return Ok(None);
        }
        Ok(Some(Self { place, bytes, is_full: AtomicBool::new(false), fills: Strikes::default() }))
    }

    /// Leaves no room but what is given back; false when that is so already.
    pub fn fill(&self) -> Result<bool> {
        if self.is_full.swap(true, Ordering::AcqRel) {
            return Ok(false);
        }
        self.fills.begin();
        for _ in 0..TRIES {
            let bytes = sys::held_bytes(&self.place)?.max(PAGE_BYTES);
            match sys::mount_memory(&self.place, bytes, true) {
                Ok(()) => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                Err(error) => return Err(error).context("make the deltas' file system small"),
            }
        }
        bail!("the deltas' file system grows too fast to be filled");
    }

    /// Makes it roomy again.
    pub fn relieve(&self) -> Result<()> {
        sys::mount_memory(&self.place, self.bytes, true).context("make the deltas' file system large")?;
        self.fills.end();
        self.is_full.store(false, Ordering::Release);
        Ok(())
    }

    /// Takes it away, with all that is left in it.
    pub fn unmount(&self) -> Result<()> {
        sys::unmount(&self.place).with_context(|| self.place.display().to_string())
    }

    /// Copies what it holds to where it outlives this process.
    pub fn rescue(&self, to: &Path) -> Result<()> {
        let copied = Command::new("cp").args(["-a", "--sparse=always"]).args([&self.place, to]).status()?;
        ensure!(copied.success(), "cp: {copied}");
        Ok(())
    }
}

/// Whether files in a directory can be read and written past the page cache.
pub fn takes_direct(directory: &Path) -> Result<bool> {
    let path = directory.join(".direct");
    let opened = OpenOptions::new().create(true).truncate(true).write(true).custom_flags(libc::O_DIRECT).open(&path);
    if path.exists() {
        fs::remove_file(&path).with_context(|| path.display().to_string())?;
    }
    Ok(opened.is_ok())
}
