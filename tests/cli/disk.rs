//! [`Disk`]: an image and a delta in a directory of their own, and what a guest has made of them.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pando::block::base::Base;
use pando::block::delta::header::{BaseIdentity, Header};
use pando::block::delta::open::{self, NewDelta};
use pando::block::delta::{Delta, Lifetime};
use pando::block::storage::FileStorage;
use pando::block::{Batch, Volume};
use pando::digest::Digest;
use pando::sys::buffers::Readable;
use pando::units::ClusterSize;
use tempfile::TempDir;

use super::pando;

pub const CLUSTER: u64 = 4096;

/// Clusters of [`CLUSTER`] bytes that one sector of the map speaks of, as the format says.
pub const CLUSTERS_PER_MAP_SECTOR: u64 = 504 * 4;

pub struct Disk {
    directory: TempDir,
    pub header: Header,
}

/// A session of a backend in this process.
pub struct Session {
    volume: Volume<FileStorage>,
    delta: PathBuf,
}

/// Waits until the lock of a delta that this process has closed is free: what another test's thread starts holds a copy
/// of every descriptor for the moment between fork and exec.
pub fn wait_unlocked(delta: &Path) {
    let file = File::open(delta).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while open::holder(&file).unwrap().is_some() {
        assert!(Instant::now() < deadline, "{} stays locked", delta.display());
        std::thread::yield_now();
    }
}

impl Disk {
    /// An image of `base_bytes` bytes, none of them zero, and an empty delta over it.
    pub fn new(base_bytes: u64, virtual_bytes: u64) -> Disk {
        let directory = tempfile::tempdir().unwrap();
        let image: Vec<u8> = (0..base_bytes).map(|i| (i / 512 % 251 + 1) as u8).collect();
        std::fs::write(directory.path().join("base.raw"), &image).unwrap();
        let base = BaseIdentity { digest: Digest(*blake3::hash(&image).as_bytes()), bytes: base_bytes };
        Disk::create(directory, Some(base), virtual_bytes)
    }

    /// A delta over nothing.
    pub fn blank(virtual_bytes: u64) -> Disk {
        Disk::create(tempfile::tempdir().unwrap(), None, virtual_bytes)
    }

    fn create(directory: TempDir, base: Option<BaseIdentity>, virtual_bytes: u64) -> Disk {
        let new =
            NewDelta { base, virtual_bytes: Some(virtual_bytes), cluster: ClusterSize::from_bytes(CLUSTER).unwrap() };
        let header = open::create(&directory.path().join("vm.delta"), &new).unwrap();
        Disk { directory, header }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn delta(&self) -> PathBuf {
        self.path("vm.delta")
    }

    /// Runs `pando delta COMMAND DELTA ARGUMENTS`.
    #[track_caller]
    pub fn pando(&self, command: &str, arguments: &[&str]) -> super::Ran {
        let delta = self.delta();
        let mut all = vec!["delta", command, delta.to_str().unwrap()];
        all.extend(arguments);
        pando(all)
    }

    pub fn session(&self) -> Session {
        let (file, header) = open::open_locked(&self.delta()).unwrap();
        let base = match header.base {
            Some(_) => Base::map(&File::open(self.path("base.raw")).unwrap(), "base".into()).unwrap(),
            None => Base::empty(),
        };
        let storage = FileStorage::new(file).unwrap();
        let delta = Delta::start(storage, "vm.delta".to_owned(), header, Lifetime::Persistent).unwrap();
        Session { volume: Volume::cow(base, delta), delta: self.delta() }
    }

    /// Bytes allocated for the delta file.
    pub fn disk_bytes(&self) -> u64 {
        let file = File::open(self.delta()).unwrap();
        // So that what was written counts.
        file.sync_all().unwrap();
        file.metadata().unwrap().blocks() * 512
    }

    /// Writes to the delta file behind every session's back.
    pub fn scribble(&self, bytes: &[u8], offset: u64) {
        let file = File::options().write(true).open(self.delta()).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    /// Flips a byte of the delta file.
    pub fn flip(&self, offset: u64) {
        let mut byte = [0];
        File::open(self.delta()).unwrap().read_exact_at(&mut byte, offset).unwrap();
        self.scribble(&[!byte[0]], offset);
    }

    pub fn set_len(&self, len: u64) {
        File::options().write(true).open(self.delta()).unwrap().set_len(len).unwrap();
    }

    pub fn bytes_at(&self, name: &str, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        File::open(self.path(name)).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

impl Session {
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let mut batch = Batch::default();
        self.volume.write(offset, &[Readable::from_slice(bytes)], &mut batch).unwrap();
        self.volume.commit(&mut batch).unwrap();
    }

    pub fn discard(&self, offset: u64, len: u64) {
        self.volume.discard(offset, len).unwrap();
    }

    /// Zeros that keep their space.
    pub fn zero(&self, offset: u64, len: u64) {
        let mut batch = Batch::default();
        self.volume.write_zeroes(offset, len, false, &mut batch).unwrap();
        self.volume.commit(&mut batch).unwrap();
    }

    pub fn flush(&self) {
        self.volume.flush().unwrap();
    }

    pub fn close(self) {
        self.volume.close().unwrap();
        self.kill();
    }

    /// Ends as a process does that is killed.
    pub fn kill(self) {
        drop(self.volume);
        wait_unlocked(&self.delta);
    }
}
