//! The store, through its API: what is imported is there, whole and unchanged, and what is refused leaves nothing.

mod formats;
mod hostile;
mod images;
mod limits;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use pando::digest::Digest;
use pando::store::{Format, Imported, Source, Store, StoreError};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use tempfile::TempDir;

/// A store in a directory of its own, with room beside it.
struct Site {
    store: Store,
    directory: TempDir,
}

impl Site {
    fn new() -> Site {
        let directory = tempfile::tempdir().unwrap();
        Site { store: Store::open(&directory.path().join("store")).unwrap(), directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().write_all(bytes).unwrap();
        path
    }

    fn import(&self, path: &Path, format: Option<Format>) -> Result<Imported, StoreError> {
        import(&self.store, path, format)
    }

    /// Nothing is in the store but these images.
    #[track_caller]
    fn holds(&self, images: &[Digest]) {
        let mut names: Vec<String> = std::fs::read_dir(self.directory.path().join("store/images"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let mut expected: Vec<String> = images.iter().map(|digest| format!("{digest}.raw")).collect();
        expected.sort();
        assert_eq!(names, expected);
    }
}

fn import(store: &Store, path: &Path, format: Option<Format>) -> Result<Imported, StoreError> {
    let source = Source::file(File::open(path).unwrap(), path.display().to_string()).with_format(format);
    store.import(source, &|_| (), &AtomicBool::new(false), |_| Ok(()))
}

fn digest_of(bytes: &[u8]) -> Digest {
    Digest(*blake3::hash(bytes).as_bytes())
}

/// A disk with runs of random data and of zeros, of all kinds of lengths.
fn patchy(seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut disk = vec![0; bytes];
    let mut at = 0;
    while at < bytes {
        let len = (512 << random.random_range(0..12)).min(bytes - at);
        match random.random_range(0..4) {
            0 | 1 => random.fill_bytes(&mut disk[at..at + len]),
            // What compresses well.
            2 => disk[at..at + len].fill(random.random()),
            _ => (),
        }
        at += len;
    }
    disk
}

/// An error with all its causes, as a person sees it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Whether `program` is there; says so when it is not.
fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        println!("skipped: {program} is not installed (tools/setup test)");
    }
    found
}

/// Runs a program to its success.
#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
