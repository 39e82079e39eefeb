//! What guests are made of: kernels, the Debian image, small disks of known contents.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::backend::pando;

/// The directory that `tools/guest/build` keeps up to date, and the accelerator that works here.
struct Material {
    dir: PathBuf,
    accelerator: String,
}

fn material() -> &'static Material {
    static MATERIAL: OnceLock<Material> = OnceLock::new();
    MATERIAL.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .parent()
            .expect("cargo's own directory lies in its target directory");
        let dir = target.join("guest");
        tool("build", &dir);
        let accelerator = tool("accel", &dir).trim().to_owned();
        Material { dir, accelerator }
    })
}

fn tool(name: &str, dir: &Path) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/guest").join(name);
    let output = Command::new(&path)
        .arg(dir)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(output.status.success(), "{}: {}", path.display(), output.status);
    String::from_utf8(output.stdout).expect("the tool prints text")
}

pub fn file(name: &str) -> PathBuf {
    material().dir.join(name)
}

pub fn accelerator() -> &'static str {
    &material().accelerator
}

/// A base whose bytes must never change, whatever guests do.
pub struct Image {
    path: PathBuf,
    hash: blake3::Hash,
}

impl Image {
    /// The Debian disk. Read whole for its digest once per test run.
    pub fn debian() -> Self {
        static HASH: OnceLock<blake3::Hash> = OnceLock::new();
        let path = file("debian.raw");
        let hash = *HASH.get_or_init(|| hash(&path));
        Self { path, hash }
    }

    /// A disk of `mib` MiB of bytes that repeat nowhere and are the same for the same `seed`.
    pub fn noise(dir: &Path, mib: usize, seed: &str) -> Self {
        let path = dir.join(format!("{seed}.raw"));
        let mut bytes = vec![0; mib << 20];
        blake3::Hasher::new_derive_key("pando guest test noise")
            .update(seed.as_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        let mut out = File::create(&path).expect("the test's directory takes files");
        out.write_all(&bytes).expect("there is room for a small disk");
        let hash = blake3::hash(&bytes);
        Self { path, hash }
    }

    pub fn path(&self) -> &str {
        self.path.to_str().expect("the path is text")
    }

    /// Compares the contents themselves; what pando remembers about them proves nothing here. But
    /// what it says has to be true as well.
    pub fn assert_unchanged(&self) {
        assert_eq!(hash(&self.path), self.hash, "{} changed", self.path());
        let said = pando(&["image", "digest", self.path()]);
        assert!(
            said.contains(self.hash.to_hex().as_str()),
            "pando's digest of {} is {said}, and BLAKE3 of it {}",
            self.path(),
            self.hash
        );
    }
}

fn hash(path: &Path) -> blake3::Hash {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).expect("a disk can be read");
    hasher.finalize()
}

/// A directory of the test's own, on the file system of the build rather than in memory: deltas are
/// sparse files, and what they take on disk is looked at.
pub fn directory() -> TempDir {
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("cargo's directory takes files")
}

pub fn text(path: &Path) -> String {
    path.to_str().expect("the path is text").to_owned()
}

/// As the guest's sha256sum prints it.
pub fn sha256(path: &str) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum starts");
    assert!(output.status.success(), "sha256sum {path}");
    let text = String::from_utf8(output.stdout).expect("sha256sum prints text");
    let digest = text.split(' ').next().expect("a digest comes first");
    digest.to_owned()
}

pub fn disk_usage(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    const BLOCK_BYTES: u64 = 512;
    metadata.blocks() * BLOCK_BYTES
}
