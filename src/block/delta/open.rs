//! From a path to a delta: create, open, lock, and see that it is for the right base.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::block::error::is_full;
use crate::block::storage::{FileStorage, Storage};
use crate::digest::Digest;
use crate::sys::buffers::Writable;
use crate::sys::{file, process};
use crate::units::{ByteCount, ClusterSize, is_whole_sectors};

use super::header::{BaseIdentity, HEADER_AT, Header, HeaderFault, SESSION_AT, Sector, Session};
use super::layout::{DISK_SECTOR_BYTES, Layout};

/// Why a delta could not be created or opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file system refused.
    #[error("cannot {action} {file}{}", place(*.offset))]
    Io {
        action: &'static str,
        file: String,
        offset: u64,
        #[source]
        source: io::Error,
    },
    /// The file is not a delta, or not one that this program can use.
    #[error("{file} cannot be used as a delta")]
    Header {
        file: String,
        #[source]
        fault: HeaderFault,
    },
    /// Metadata beyond the header does not check out.
    #[error(transparent)]
    Volume(#[from] crate::block::Error),
    /// Made on another base.
    #[error(
        "{file} was made on another base: it needs the image with digest {expected} ({}), and the given base has digest {found} ({}). \
         A delta means nothing over any other image; give the one that it was made on, or create a new delta",
        ByteCount(*.expected_bytes), ByteCount(*.found_bytes)
    )]
    OtherBase { file: String, expected: Digest, expected_bytes: u64, found: Digest, found_bytes: u64 },
    /// Made over a base, and none is given.
    #[error("{file} was made on a base, the image with digest {expected}: give that image with --base")]
    NeedsBase { file: String, expected: Digest },
    /// Made over nothing, and a base is given.
    #[error("{file} is a blank volume's delta, made over no base: leave --base out and say --blank")]
    NeedsBlank { file: String },
    /// Another size than the one asked for.
    #[error("{file} holds a volume of {} ({expected} bytes), and {} ({found} bytes) was asked for: leave the size out", ByteCount(*.expected), ByteCount(*.found))]
    OtherSize { file: String, expected: u64, found: u64 },
    /// A size that cannot be.
    #[error("a volume of {bytes} bytes cannot be made: {expected}")]
    Size { bytes: u64, expected: &'static str },
    /// A volume never becomes smaller.
    #[error("{file} holds a volume of {} ({found} bytes), which cannot become smaller ({asked} bytes)", ByteCount(*.found))]
    Shrink { file: String, found: u64, asked: u64 },
    /// The volume would be smaller than its base.
    #[error(
        "a volume of {bytes} bytes would cut off the end of its base of {base_bytes} bytes: expected at least as many"
    )]
    SmallerThanBase { bytes: u64, base_bytes: u64 },
    /// The file system has no files that long.
    #[error("the file system of {file} cannot hold a file for a volume of {}: a smaller --size, or a file system with larger files such as XFS", ByteCount(*.bytes))]
    TooLargeForFileSystem {
        file: String,
        bytes: u64,
        #[source]
        source: io::Error,
    },
    /// Something was cut off.
    #[error(
        "{file} is {found} bytes long, expected {expected}: something was cut off; 'pando delta check' tells what is affected"
    )]
    TooShort { file: String, expected: u64, found: u64 },
    /// Not on this file system.
    #[error(
        "the data of {file} cannot go past the page cache: its file system does not have O_DIRECT; expected one that does, or --delta-cache writeback"
    )]
    NotDirect {
        file: String,
        #[source]
        source: io::Error,
    },
    /// Somebody else has it open.
    #[error("{file} is in use by {holder}: a delta has one writer")]
    Locked { file: String, holder: Holder },
}

impl OpenError {
    /// Whether the file system has no room: the same may work later.
    pub fn is_full(&self) -> bool {
        match self {
            OpenError::Io { source, .. } => is_full(source),
            OpenError::Volume(error) => error.is_full(),
            _ => false,
        }
    }
}

/// Where in a file something went wrong; nothing for the file as a whole.
fn place(offset: u64) -> String {
    if offset == 0 { String::new() } else { format!(" at offset {offset}") }
}

/// Who holds a delta's lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    process: Option<u32>,
}

impl Holder {
    /// Its number, when the kernel tells.
    pub fn process(&self) -> Option<u32> {
        self.process
    }

    /// Whether it is known to run, and to have the lock for itself. The kernel names none that has ended and been waited for, and none of
    /// another PID namespace. This very process took its lock for somebody whom it has given the file, and who is gone or about to go.
    fn has_it(&self) -> bool {
        self.process.is_some_and(|process| process != std::process::id() && !command_of(process).is_empty())
    }
}

/// The command line of a process; empty when it has ended.
fn command_of(process: u32) -> String {
    let command = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&command).replace('\0', " ").trim_end().to_owned()
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(process) = self.process else { return f.write_str("another process") };
        match command_of(process).as_str() {
            "" => write!(f, "process {process}"),
            command => write!(f, "process {process} ({command})"),
        }
    }
}

/// What a new delta is to be.
#[derive(Clone, Copy, Debug)]
pub struct NewDelta {
    /// What it lies over, or `None` for a blank volume.
    pub base: Option<BaseIdentity>,
    /// Bytes of the volume; the base's own when `None`.
    pub virtual_bytes: Option<u64>,
    /// The copy-on-write unit.
    pub cluster: ClusterSize,
}

impl NewDelta {
    /// The header of such a delta, with a new UUID.
    pub fn header(&self) -> Result<Header, OpenError> {
        let base_bytes = self.base.map_or(0, |base| base.bytes);
        let bytes = self.virtual_bytes.unwrap_or(base_bytes);
        if !is_whole_sectors(bytes) || bytes == 0 {
            return Err(OpenError::Size {
                bytes,
                expected: "the size has to be a multiple of 512, the sector, and not zero",
            });
        }
        if bytes < base_bytes {
            return Err(OpenError::SmallerThanBase { bytes, base_bytes });
        }
        let layout = Layout::new(self.cluster, bytes)
            .ok_or(OpenError::Size { bytes, expected: "the size has to be at most 64 TiB" })?;
        Ok(Header { layout, uuid: process::random_uuid(), base: self.base })
    }
}

/// Creates a delta file at a path where there is none. The file and its name are durable when this returns; when it fails, there is no
/// file.
pub fn create(path: &Path, new: &NewDelta) -> Result<Header, OpenError> {
    let header = new.header()?;
    let io = |action| move |source| OpenError::Io { action, file: path.display().to_string(), offset: 0, source };
    let created = options().create_new(true).open(path).map_err(io("create"))?;
    let result = format(created, &path.display().to_string(), &header).and_then(|_| {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(io("make durable the name of"))
    });
    if let Err(error) = result {
        // Nothing is left of a creation that failed; that this fails too adds nothing to the error.
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(header)
}

/// Creates a delta that has no name, in `directory`.
pub fn create_unnamed(directory: &Path, new: &NewDelta) -> Result<(File, Header), OpenError> {
    let header = new.header()?;
    let label = format!("{} (unnamed)", directory.display());
    let file = file::open_unnamed(directory).map_err(|source| OpenError::Io {
        action: "create a file without a name in",
        file: directory.display().to_string(),
        offset: 0,
        source,
    })?;
    format(
        file.try_clone().map_err(|source| OpenError::Io { action: "open", file: label.clone(), offset: 0, source })?,
        &label,
        &header,
    )?;
    Ok((file, header))
}

fn options() -> std::fs::OpenOptions {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.read(true).write(true).mode(0o600);
    options
}

fn format(file: File, label: &str, header: &Header) -> Result<(), OpenError> {
    let file_bytes = header.layout.file_bytes();
    file.set_len(file_bytes).map_err(|source| match source.raw_os_error() {
        Some(libc::EFBIG | libc::EINVAL) => {
            OpenError::TooLargeForFileSystem { file: label.to_owned(), bytes: header.layout.virtual_bytes(), source }
        }
        _ => OpenError::Io { action: "make room for", file: label.to_owned(), offset: file_bytes, source },
    })?;
    FileStorage::new(file).and_then(|storage| super::format(&storage, header)).map_err(|source| OpenError::Io {
        action: "write",
        file: label.to_owned(),
        offset: 0,
        source,
    })
}

/// How long to wait for the lock of a process that is dead or may be: what it had started and given the file to is about to end too.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Opens the delta file at `path` for writing and takes its lock.
pub fn open_locked(path: &Path) -> Result<(File, Header), OpenError> {
    let label = path.display().to_string();
    let io = |action| {
        let file = label.clone();
        move |source| OpenError::Io { action, file, offset: 0, source }
    };
    let file = options().open(path).map_err(io("open"))?;
    let patience_ends = Instant::now() + LOCK_PATIENCE;
    while !file::try_lock(&file).map_err(io("lock"))? {
        let holder = Holder { process: file::lock_holder(&file) };
        if holder.has_it() || Instant::now() > patience_ends {
            return Err(OpenError::Locked { file: label, holder });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let header = read_header(&file, &label)?;
    Ok((file, header))
}

/// Opens the delta file at `path` for writing, and leaves its lock to whoever has it until [`lock`] is called.
pub fn open_unlocked(path: &Path) -> Result<(File, Header), OpenError> {
    let label = path.display().to_string();
    let io = |source| OpenError::Io { action: "open", file: label.clone(), offset: 0, source };
    let file = options().open(path).map_err(io)?;
    let header = read_header(&file, &label)?;
    Ok((file, header))
}

/// Opens an open delta once more, for its data to go past the page cache. That one has the lock then, if `file` has it: what a dead backend has under way
/// keeps it open until it is done, so that nobody opens the delta before.
pub fn open_direct(file: &File, label: &str, is_locked: bool) -> Result<File, OpenError> {
    let label = || label.to_owned();
    let io = |action| move |source| OpenError::Io { action, file: label(), offset: 0, source };
    let direct = file::reopen_direct(file).map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL) => OpenError::NotDirect { file: label(), source },
        _ => io("open")(source),
    })?;
    if is_locked {
        file.unlock().map_err(io("unlock"))?;
        if !file::try_lock(&direct).map_err(io("lock"))? {
            // In that very moment.
            return Err(OpenError::Locked { file: label(), holder: Holder { process: file::lock_holder(file) } });
        }
    }
    Ok(direct)
}

/// Takes the lock of an open delta, for which another backend may take so long to make room.
pub fn lock(file: &File, label: &str, patience: Duration) -> Result<(), OpenError> {
    let ends = Instant::now() + patience;
    let io = |source| OpenError::Io { action: "lock", file: label.to_owned(), offset: 0, source };
    while !file::try_lock(file).map_err(io)? {
        if Instant::now() > ends {
            let holder = Holder { process: file::lock_holder(file) };
            return Err(OpenError::Locked { file: label.to_owned(), holder });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Opens the delta file at `path` to look at it. Nothing is locked and nothing will be changed.
pub fn open_to_look(path: &Path) -> Result<(File, Header), OpenError> {
    let label = path.display().to_string();
    let file =
        File::open(path).map_err(|source| OpenError::Io { action: "open", file: label.clone(), offset: 0, source })?;
    let header = read_header(&file, &label)?;
    Ok((file, header))
}

/// Who has the delta open for writing, if anybody has.
pub fn holder(file: &File) -> io::Result<Option<Holder>> {
    // The kernel's list first: asking it disturbs nobody, and the lock below could refuse a backend that starts right now.
    if let Some(process) = file::lock_holder(file) {
        return Ok(Some(Holder { process: Some(process) }));
    }
    if file::try_lock(file)? {
        file.unlock()?;
        return Ok(None);
    }
    Ok(Some(Holder { process: None }))
}

/// Reads and checks the header of a delta.
pub fn read_header(file: &File, label: &str) -> Result<Header, OpenError> {
    let mut sector: Sector = [0; DISK_SECTOR_BYTES as usize];
    file::read_at(file, Writable::from_mut_slice(&mut sector), HEADER_AT).map_err(|source| OpenError::Io {
        action: "read",
        file: label.to_owned(),
        offset: HEADER_AT,
        source,
    })?;
    Header::decode(&sector).map_err(|fault| OpenError::Header { file: label.to_owned(), fault })
}

/// Reads and checks what the last session of a delta left.
pub fn read_session(storage: &impl Storage, label: &str) -> Result<Session, OpenError> {
    let mut sector: Sector = [0; DISK_SECTOR_BYTES as usize];
    storage.read_alone_at(Writable::from_mut_slice(&mut sector), SESSION_AT).map_err(|source| OpenError::Io {
        action: "read",
        file: label.to_owned(),
        offset: SESSION_AT,
        source,
    })?;
    Session::decode(&sector).map_err(|fault| OpenError::Header { file: label.to_owned(), fault })
}

/// Whether the delta at `path` has ever been served.
pub fn was_used(path: &Path) -> Result<bool, OpenError> {
    let label = path.display().to_string();
    let (file, _) = open_to_look(path)?;
    let storage = FileStorage::new(file).map_err(|source| OpenError::Io {
        action: "examine",
        file: label.clone(),
        offset: 0,
        source,
    })?;
    Ok(read_session(&storage, &label)? != Session::NONE)
}

/// Sees that no part of a delta with this header was cut off.
pub fn check_length(file: &File, header: &Header, label: &str) -> Result<(), OpenError> {
    let io = |source| OpenError::Io { action: "examine", file: label.to_owned(), offset: 0, source };
    let (found, expected) = (file.metadata().map_err(io)?.len(), header.layout.file_bytes());
    if found < expected {
        return Err(OpenError::TooShort { file: label.to_owned(), expected, found });
    }
    Ok(())
}

/// Sees that a delta with this header is for this base (`None`: a blank volume) and, when a size is asked for, of this size.
pub fn check_matches(
    header: &Header,
    label: &str,
    base: Option<BaseIdentity>,
    virtual_bytes: Option<u64>,
) -> Result<(), OpenError> {
    let file = label.to_owned();
    match (header.base, base) {
        (Some(expected), Some(found)) if expected != found => Err(OpenError::OtherBase {
            file,
            expected: expected.digest,
            expected_bytes: expected.bytes,
            found: found.digest,
            found_bytes: found.bytes,
        }),
        (Some(expected), None) => Err(OpenError::NeedsBase { file, expected: expected.digest }),
        (None, Some(_)) => Err(OpenError::NeedsBlank { file }),
        _ => match virtual_bytes {
            Some(found) if found != header.layout.virtual_bytes() => {
                Err(OpenError::OtherSize { file, expected: header.layout.virtual_bytes(), found })
            }
            _ => Ok(()),
        },
    }
}
