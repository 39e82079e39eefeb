//! [`Digest`]: the name of an image, BLAKE3 of its contents, and the record beside the image that saves computing it again.
//!
//! The record, `IMAGE.digest`, is believed while the image's size, modification time and inode are those that it was made for.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

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

/// What an image's record is good for.
#[derive(PartialEq, Eq)]
struct Stamp {
    size: u64,
    modified_s: i64,
    modified_ns: i64,
    inode: u64,
}

impl Stamp {
    fn of(image: &File) -> io::Result<Stamp> {
        let metadata = image.metadata()?;
        Ok(Stamp {
            size: metadata.len(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
            inode: metadata.ino(),
        })
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
    if size <= PART_BYTES {
        let mut bytes = vec![0; size as usize];
        file::read_at(image, Writable::from_mut_slice(&mut bytes), 0)?;
        progress(size);
        return Ok(Digest(*blake3::hash(&bytes).as_bytes()));
    }
    let parts = size.div_ceil(PART_BYTES);
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(parts as usize);
    let found = std::thread::scope(|scope| {
        let work = || -> io::Result<Vec<(u64, hazmat::ChainingValue)>> {
            let mut found = Vec::new();
            let mut bytes = vec![0; PART_BYTES as usize];
            loop {
                let part = next.fetch_add(1, Ordering::Relaxed);
                if part >= parts {
                    return Ok(found);
                }
                let offset = part * PART_BYTES;
                let len = PART_BYTES.min(size - offset) as usize;
                file::read_at(image, Writable::from_mut_slice(&mut bytes[..len]), offset)?;
                let mut hasher = blake3::Hasher::new();
                hasher.set_input_offset(offset).update(&bytes[..len]);
                found.push((part, hasher.finalize_non_root()));
                progress(len as u64);
            }
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut found = Vec::with_capacity(parts as usize);
        for thread in threads {
            match thread.join() {
                Ok(part) => found.extend(part?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok::<_, io::Error>(found)
    })?;
    let mut values = vec![[0; 32]; parts as usize];
    for (part, value) in found {
        values[part as usize] = value;
    }
    let (left, right) = values.split_at(left_parts(size) as usize);
    let left = subtree(left, left_parts(size) * PART_BYTES);
    let right = subtree(right, size - left_parts(size) * PART_BYTES);
    Ok(Digest(*hazmat::merge_subtrees_root(&left, &right, hazmat::Mode::Hash).as_bytes()))
}

/// How many parts the left subtree of `bytes` bytes has.
fn left_parts(bytes: u64) -> u64 {
    hazmat::left_subtree_len(bytes) / PART_BYTES
}

/// The chaining value of a subtree of `bytes` bytes from those of its parts.
fn subtree(parts: &[hazmat::ChainingValue], bytes: u64) -> hazmat::ChainingValue {
    if let [value] = parts {
        return *value;
    }
    let left_bytes = left_parts(bytes) * PART_BYTES;
    let (left, right) = parts.split_at(left_parts(bytes) as usize);
    hazmat::merge_subtrees_non_root(&subtree(left, left_bytes), &subtree(right, bytes - left_bytes), hazmat::Mode::Hash)
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
        for len in [0, 1, part - 1, part, part + 1, 2 * part, 3 * part, 3 * part + 5, 4 * part, 7 * part + 1] {
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
