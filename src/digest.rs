//! [`Digest`]: the name of an image, BLAKE3 of its contents, and the record beside the image that saves computing it again.
//!
//! The record, `IMAGE.digest`, is believed while the image's size, modification time and inode are those that it was made for.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use blake3::hazmat::{self, HasherExt};

use crate::sys::buffers::Writable;
use crate::sys::file;

/// BLAKE3 of an image's contents.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Text that is no digest.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{typed}' is not a digest: expected 64 hexadecimal digits")]
pub struct DigestTextError {
    typed: String,
}

impl std::str::FromStr for Digest {
    type Err = DigestTextError;

    fn from_str(typed: &str) -> Result<Digest, DigestTextError> {
        blake3::Hash::from_hex(typed)
            .map(|hash| Digest(*hash.as_bytes()))
            .map_err(|_| DigestTextError { typed: typed.to_owned() })
    }
}

/// Why a digest could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum DigestError {
    /// The file system refused.
    #[error("cannot read {path}", path = .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Somebody writes to the image.
    #[error("{path} changed while its digest was computed: an image must not be written to", path = .path.display())]
    Changed { path: PathBuf },
}

/// Where a digest came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From the record beside the image, which fits it.
    Record,
    /// From reading all of the image.
    Computed,
}

/// The digest of an image that is open as `image`: from its record when that fits, and otherwise computed and recorded.
///
/// `progress` is told, from several threads, how many bytes more have been read.
pub fn of_image(image: &File, path: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<(Digest, Origin), DigestError> {
    let io = |source| DigestError::Io { path: path.to_owned(), source };
    let stamp = Stamp::of(image).map_err(io)?;
    if let Some(digest) = read_record(path, &stamp) {
        return Ok((digest, Origin::Record));
    }
    let digest = compute(image, stamp.size, progress).map_err(io)?;
    if Stamp::of(image).map_err(io)? != stamp {
        return Err(DigestError::Changed { path: path.to_owned() });
    }
    if let Err(error) = write_record(path, digest, &stamp) {
        log::warn!(
            "the digest of {} will be computed again next time: cannot write {}: {error}",
            path.display(),
            record_path(path).display()
        );
    }
    Ok((digest, Origin::Computed))
}

/// What changes when somebody writes to a file: what an image's record is good for.
#[derive(PartialEq, Eq)]
pub struct Stamp {
    size: u64,
    modified_s: i64,
    modified_ns: i64,
    inode: u64,
}

impl Stamp {
    /// The stamp of an open file.
    pub fn of(image: &File) -> io::Result<Stamp> {
        let metadata = image.metadata()?;
        Ok(Stamp {
            size: metadata.len(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
            inode: metadata.ino(),
        })
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The record of a digest, as it stands in the file.
    fn record(&self, digest: Digest) -> String {
        let Stamp { size, modified_s, modified_ns, inode } = self;
        format!("blake3 {digest}\nsize {size}\nmodified {modified_s}.{modified_ns:09}\ninode {inode}\n")
    }
}

fn record_path(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".digest");
    name.into()
}

fn read_record(image: &Path, stamp: &Stamp) -> Option<Digest> {
    let mut record = [0; 512];
    let file = File::open(record_path(image)).ok()?;
    file::read_at(&file, Writable::from_mut_slice(&mut record), 0).ok()?;
    let text = std::str::from_utf8(&record).ok()?.trim_end_matches('\0');
    let digest = text.strip_prefix("blake3 ")?.lines().next()?.parse().ok()?;
    // Believed only when it says the very same as would be written now.
    (text == stamp.record(digest)).then_some(digest)
}

fn write_record(image: &Path, digest: Digest, stamp: &Stamp) -> io::Result<()> {
    let path = record_path(image);
    let mut temporary = path.clone().into_os_string();
    temporary.push(format!(".{}", std::process::id()));
    let result = File::create(&temporary)
        .and_then(|mut file| file.write_all(stamp.record(digest).as_bytes()))
        .and_then(|()| std::fs::rename(&temporary, &path));
    if result.is_err() {
        // Nothing half-made stays; the error that matters is the one above.
        let _ = std::fs::remove_file(&temporary);
    }
    result
}

/// What one thread takes at a time; a power of two, as the subtrees of BLAKE3 have to be.
const PART_BYTES: u64 = 1 << 20;

/// BLAKE3 of the first `size` bytes, on all processors.
fn compute(image: &File, size: u64, progress: &(dyn Fn(u64) + Sync)) -> io::Result<Digest> {
    of_parts(size, |offset, bytes| {
        file::read_at(image, Writable::from_mut_slice(bytes), offset)?;
        progress(bytes.len() as u64);
        Ok(())
    })
}

/// BLAKE3 of `size` bytes that come in parts, on all processors.
///
/// `part` is called from several threads, once for each part, in no definite order but roughly from the first to the last.
/// It fills the buffer with the bytes at the offset, and may do more with them: what it does is done in the same pass.
/// After an error no further parts are begun.
pub fn of_parts<E: Send>(size: u64, part: impl Fn(u64, &mut [u8]) -> Result<(), E> + Sync) -> Result<Digest, E> {
    if size <= PART_BYTES {
        let mut bytes = vec![0; size as usize];
        part(0, &mut bytes)?;
        return Ok(Digest(*blake3::hash(&bytes).as_bytes()));
    }
    let parts = size.div_ceil(PART_BYTES);
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let tree = Mutex::new(Tree::default());
    let work = || -> Result<(), E> {
        let mut bytes = vec![0; PART_BYTES as usize];
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= parts {
                break;
            }
            let offset = index * PART_BYTES;
            let bytes = &mut bytes[..PART_BYTES.min(size - offset) as usize];
            part(offset, bytes).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            let mut hasher = blake3::Hasher::new();
            hasher.set_input_offset(offset).update(bytes);
            let value = hasher.finalize_non_root();
            // What it guards is whole between any two calls, so that a panic elsewhere does not matter.
            tree.lock().unwrap_or_else(PoisonError::into_inner).add(index, value);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let count = std::thread::available_parallelism().map_or(1, |count| (count.get() as u64).min(parts));
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(work)).collect();
        let mut result = Ok(());
        for thread in threads {
            match thread.join() {
                Ok(found) => result = result.and(found),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        result
    })?;
    Ok(tree.into_inner().unwrap_or_else(PoisonError::into_inner).root())
}

/// The subtrees of BLAKE3 over parts that come almost in order: few at any time, however many parts there are.
#[derive(Default)]
struct Tree {
    /// How many parts are in `left`.
    count: u64,
    /// The subtrees to the left, from the largest to the smallest: one for each bit of `count`, except that the last two of
    /// one size are not joined before more follows. They might be the root's, which is joined in another way.
    left: Vec<hazmat::ChainingValue>,
    /// Parts that came too early.
    early: HashMap<u64, hazmat::ChainingValue>,
}

impl Tree {
    fn add(&mut self, index: u64, value: hazmat::ChainingValue) {
        self.early.insert(index, value);
        while let Some(value) = self.early.remove(&self.count) {
            while self.left.len() > self.count.count_ones() as usize {
                self.join();
            }
            self.left.push(value);
            self.count += 1;
        }
    }

    /// Joins the last two subtrees.
    fn join(&mut self) {
        if let (Some(right), Some(left)) = (self.left.pop(), self.left.pop()) {
            self.left.push(hazmat::merge_subtrees_non_root(&left, &right, hazmat::Mode::Hash));
        }
    }

    /// The digest of at least two parts, which all are there.
    fn root(mut self) -> Digest {
        while self.left.len() > 2 {
            self.join();
        }
        Digest(*hazmat::merge_subtrees_root(&self.left[0], &self.left[1], hazmat::Mode::Hash).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Seek;

    fn image(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn parts_add_up_to_blake3_of_the_whole() {
        let part = PART_BYTES as usize;
        for len in [0, 1, part - 1, part, part + 1, 2 * part, 3 * part, 3 * part + 5, 4 * part, 7 * part + 1, 8 * part]
        {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 31 % 251) as u8).collect();
            let file = image(&bytes);
            let read = AtomicU64::new(0);
            let progress = |more| _ = read.fetch_add(more, Ordering::Relaxed);
            let digest = compute(file.as_file(), len as u64, &progress).unwrap();
            assert_eq!(digest.to_string(), blake3::hash(&bytes).to_hex().as_str(), "{len} bytes");
            assert_eq!(read.into_inner(), len as u64);
        }
    }

    #[test]
    fn a_record_is_believed_until_the_image_changes() {
        let mut file = image(b"root");
        let of = |file: &tempfile::NamedTempFile| of_image(file.as_file(), file.path(), &|_| ()).unwrap();
        let (digest, origin) = of(&file);
        assert_eq!(origin, Origin::Computed);
        assert_eq!(of(&file), (digest, Origin::Record));

        let record = record_path(file.path());
        let text = std::fs::read_to_string(&record).unwrap();
        std::fs::write(&record, text.replace("size 4", "size 5")).unwrap();
        assert_eq!(of(&file), (digest, Origin::Computed));

        file.as_file_mut().seek(io::SeekFrom::Start(0)).unwrap();
        file.write_all(b"trunk").unwrap();
        let (changed, origin) = of(&file);
        assert_eq!(origin, Origin::Computed);
        assert_ne!(changed, digest);
        std::fs::remove_file(record).unwrap();
    }

    #[test]
    fn digests_are_read_as_they_are_written() {
        let digest = Digest([0xa5; 32]);
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert!("a5".parse::<Digest>().is_err());
        assert!("g".repeat(64).parse::<Digest>().is_err());
    }
}
