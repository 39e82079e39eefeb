//! The verbs of a file that the standard library lacks: vectored positional I/O, holes, extents, locks,
//! names, and how contents get to the disk.
//!
//! Each does all of what was asked or returns the error of the kernel; a short count never gets out. When it is the caller's memory that
//! cannot be accessed, and not the file, the error holds a [`Fault`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::buffers::{Buffer, Readable, Writable, total_len_readable};
use super::guard::Fault;

/// As many buffers as one system call takes.
const BUFFERS_MAX: usize = libc::UIO_MAXIOV as usize;

/// Reads the bytes at `offset` into `into`, all of it; what lies past the end of the file reads as zeros.
pub fn read_at(file: &File, into: Writable<'_>, offset: u64) -> io::Result<()> {
    read_all_at(file, &[into], offset)
}

/// As [`read_at`], into some buffers, one after another.
pub fn read_all_at(file: &File, into: &[Writable<'_>], offset: u64) -> io::Result<()> {
    let mut done = read_to_end_at(file, into, offset)?;
    for buffer in into {
        let filled = done.min(buffer.len() as u64);
        done -= filled;
        buffer.part(filled as usize, usize::MAX).fill_zero().map_err(io::Error::other)?;
    }
    Ok(())
}

/// As [`read_all_at`], of what the file has: says how many bytes these were.
pub fn read_to_end_at(file: &File, into: &[Writable<'_>], offset: u64) -> io::Result<u64> {
    move_all(into, offset, |buffers, at| {
        // SAFETY: a slice of `Writable`, each laid out as an iovec and writable for its length; at most `BUFFERS_MAX`.
        unsafe { libc::preadv(file.as_raw_fd(), buffers.as_ptr().cast(), buffers.len() as i32, at) }
    })
}

/// Reads bytes at `offset` by one system call, and says how many.
pub fn read_once(file: &File, into: Writable<'_>, offset: u64) -> io::Result<usize> {
    read_flagged(file, into, offset, 0)
}

/// As [`read_once`]; an error of kind `WouldBlock`, or fewer bytes, rather than waiting for the disk. An error (`EOPNOTSUPP`) where the file
/// system cannot do that.
pub fn read_at_once(file: &File, into: Writable<'_>, offset: u64) -> io::Result<usize> {
    read_flagged(file, into, offset, libc::RWF_NOWAIT)
}

fn read_flagged(file: &File, into: Writable<'_>, offset: u64, flags: i32) -> io::Result<usize> {
    let offset = to_off(offset, 0)?;
    // SAFETY: one `Writable`, laid out as an iovec and writable for its length.
    let count = unsafe { libc::preadv2(file.as_raw_fd(), (&raw const into).cast(), 1, offset, flags) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes the bytes of `from`, one buffer after another, at `offset`.
pub fn write_at(file: &File, from: &[Readable<'_>], offset: u64) -> io::Result<()> {
    let done = move_all(from, offset, |buffers, at| {
        // SAFETY: a slice of `Readable`, each laid out as an iovec and readable for its length; at most `BUFFERS_MAX`.
        unsafe { libc::pwritev(file.as_raw_fd(), buffers.as_ptr().cast(), buffers.len() as i32, at) }
    })?;
    if done < total_len_readable(from) { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
}

/// Has `call` move the bytes of some buffers, one after another, between them and a file from `offset` on, as often as it takes; how many it has moved when it first moves
/// none. It is given `BUFFERS_MAX` buffers at most, and an error of it is the system's last.
#[inline]
fn move_all<B: Buffer>(buffers: &[B], mut offset: u64, call: impl Fn(&[B], libc::off_t) -> isize) -> io::Result<u64> {
    let start = offset;
    for mut buffers in buffers.chunks(BUFFERS_MAX) {
        // How much of the first buffer a short call has already moved.
        let mut taken = 0;
        while let Some(first) = buffers.first() {
            if taken == first.len() {
                buffers = &buffers[1..];
                taken = 0;
                continue;
            }
            let at = to_off(offset, 0)?;
            let count = if taken == 0 { call(buffers, at) } else { call(&[first.part(taken, usize::MAX)], at) };
            let mut count = match count {
                0 => return Ok(offset - start),
                count if count > 0 => count as usize,
                _ => {
                    retry_interrupted().map_err(|error| with_fault(error, buffers))?;
                    continue;
                }
            };
            offset += count as u64;
            count += taken;
            while let Some(first) = buffers.first().filter(|first| first.len() <= count) {
                count -= first.len();
                buffers = &buffers[1..];
            }
            taken = count;
        }
    }
    Ok(offset - start)
}

fn to_off(offset: u64, further: usize) -> io::Result<libc::off_t> {
    offset
        .checked_add(further as u64)
        .and_then(|offset| libc::off_t::try_from(offset).ok())
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))
}

/// Nothing when the last call was only interrupted, its error when not.
fn retry_interrupted() -> io::Result<()> {
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}

/// The kernel says that memory cannot be accessed, and not which: then this does.
#[cold]
fn with_fault(error: io::Error, memory: &[impl Buffer]) -> io::Error {
    if error.raw_os_error() != Some(libc::EFAULT) {
        return error;
    }
    let mut memory = memory.iter().map(Buffer::as_readable);
    let Some(first) = memory.next() else { return error };
    let found = first.find_fault().or_else(|| memory.find_map(|buffer| buffer.find_fault()));
    // None is found in memory that can be read and not written, for which there is no room.
    io::Error::other(found.unwrap_or(Fault { address: first.address() }))
}

/// How many bytes a file has. As [`File::metadata`] says, without a system call that also takes paths.
pub fn len(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::fstat(file)?.st_size.cast_unsigned())
}

/// Gives the space of `len` bytes at `offset` back; they read as zeros afterwards. The length of the file stays.
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (to_off(offset, 0)?, to_off(len, 0)?);
    loop {
        // SAFETY: takes no pointers.
        let result = unsafe {
            libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len)
        };
        if result == 0 {
            return Ok(());
        }
        retry_interrupted()?;
    }
}

/// The next range at or after `from` for which the file system holds data, or `None` when there is no more.
/// A file system that cannot tell reports the whole file as data.
pub fn next_data(file: &File, from: u64) -> io::Result<Option<Range<u64>>> {
    let Some(start) = seek(file, from, libc::SEEK_DATA)? else { return Ok(None) };
    let end = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(start);
    Ok((end > start).then_some(start..end))
}

fn seek(file: &File, from: u64, whence: i32) -> io::Result<Option<u64>> {
    // SAFETY: takes no pointers. It moves the file's own offset, which nothing here uses: all I/O is positional.
    let at = unsafe { libc::lseek(file.as_raw_fd(), to_off(from, 0)?, whence) };
    match u64::try_from(at) {
        Ok(at) => Ok(Some(at)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// Takes the exclusive lock of an open file (`flock`), which is held until the last descriptor of this opening is
/// closed, in whichever process. `false` when another opening holds it.
pub fn try_lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(std::fs::TryLockError::WouldBlock) => Ok(false),
        Err(std::fs::TryLockError::Error(error)) => Err(error),
    }
}

/// The process that took the lock of the file with this device and inode, as the kernel lists it, if it does. A process
/// that cannot be seen from here (of another PID namespace) has no number.
pub fn lock_holder(file: &File) -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    let metadata = file.metadata().ok()?;
    let device = metadata.dev();
    let wanted = format!("{:02x}:{:02x}:{}", libc::major(device), libc::minor(device), metadata.ino());
    // Each line: "1: FLOCK  ADVISORY  WRITE 714 08:01:393 0 EOF"
    std::fs::read_to_string("/proc/locks").ok()?.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let kind = fields.next()?;
        let process = fields.nth(2)?;
        (kind == "FLOCK" && fields.next()? == wanted).then(|| process.parse().ok().filter(|process| *process != 0))?
    })
}

/// Opens the file that `file` is once more, to be read and written past the page cache (`O_DIRECT`). An error where the file system cannot do that.
pub fn reopen_direct(file: &File) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(own)
}

/// Opens a file that has no name in `directory` and is gone when its last descriptor is closed.
pub fn open_unnamed(directory: &std::path::Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(directory)
}

/// Makes `file` share the blocks of `from`, so that it has all the same contents without a copy. An error where the file
/// system cannot do that, or where the two lie on different ones.
pub fn share_blocks(file: &File, from: &File) -> io::Result<()> {
    // SAFETY: takes two descriptors that are open for the whole call, and no pointers.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Tells the kernel to start writing the bytes at `offset` to the disk, without waiting for it.
pub fn start_writing(file: &File, offset: u64, len: u64) -> io::Result<()> {
    sync_range(file, offset, len, libc::SYNC_FILE_RANGE_WRITE)
}

/// Waits until the bytes at `offset` have been written to the disk. That does not make them durable: a sync still has to,
/// and has less to do then. An error is reported here or there, but not in both places.
pub fn wait_written(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let before_and_after = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    sync_range(file, offset, len, before_and_after | libc::SYNC_FILE_RANGE_WRITE)
}

fn sync_range(file: &File, offset: u64, len: u64, flags: u32) -> io::Result<()> {
    let (offset, len) = (to_off(offset, 0)?, to_off(len, 0)?);
    loop {
        // SAFETY: takes no pointers.
        if unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, flags) } == 0 {
            return Ok(());
        }
        retry_interrupted()?;
    }
}

/// The space of a file system, in bytes.
pub struct Space {
    /// All of it.
    pub all: u64,
    /// What an ordinary user may still take.
    pub free: u64,
}

/// The space of the file system that a file lies in.
pub fn space(file: &File) -> io::Result<Space> {
    let found = rustix::fs::fstatvfs(file)?;
    let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    Ok(Space { all: bytes(found.f_blocks), free: bytes(found.f_bavail) })
}

/// Gives a file from [`open_unnamed`] a name. An error when the name is taken.
pub fn give_name(file: &File, path: &std::path::Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let own = std::ffi::CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: two strings that end with a zero byte and live for the whole call.
    let result =
        unsafe { libc::linkat(libc::AT_FDCWD, own.as_ptr(), libc::AT_FDCWD, path.as_ptr(), libc::AT_SYMLINK_FOLLOW) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `struct fsverity_enable_arg` of linux/fsverity.h.
#[repr(C)]
struct VerityArgument {
    version: u32,
    hash_algorithm: u32,
    block_size: u32,
    salt_size: u32,
    salt_ptr: u64,
    sig_size: u32,
    reserved1: u32,
    sig_ptr: u64,
    reserved2: [u64; 11],
}

const _: () = assert!(size_of::<VerityArgument>() == 128);

/// `FS_IOC_ENABLE_VERITY`: `_IOW('f', 133, struct fsverity_enable_arg)`.
const ENABLE_VERITY: libc::Ioctl = libc::_IOW::<VerityArgument>(b'f' as u32, 133);
const _: () = assert!(ENABLE_VERITY == 0x4080_6685);
const VERITY_SHA256: u32 = 1;
const VERITY_BLOCK_BYTES: u32 = 4096;

/// Has the file system check every block of `file` when it is read from now on (fs-verity), and refuse every write for
/// good. `file` is open for reading, and nobody has it open for writing. An error where the file system cannot do that.
pub fn enable_verity(file: &File) -> io::Result<()> {
    let argument = VerityArgument {
        version: 1,
        hash_algorithm: VERITY_SHA256,
        block_size: VERITY_BLOCK_BYTES,
        salt_size: 0,
        salt_ptr: 0,
        sig_size: 0,
        reserved1: 0,
        sig_ptr: 0,
        reserved2: [0; 11],
    };
    // SAFETY: the request reads one structure of this very layout (its size is checked above, and is part of the request's
    // number), which lives for the whole call. Salt and signature are null with a length of zero.
    match unsafe { libc::ioctl(file.as_raw_fd(), ENABLE_VERITY, &raw const argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether [`enable_verity`] has been done to the file.
pub fn has_verity(file: &File) -> bool {
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path that ends with a zero byte, and a structure that the kernel fills; both live for the call.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_BASIC_STATS, found.as_mut_ptr())
    };
    // SAFETY: integers only, for which the zeros that it began with are valid, whatever the call did.
    let found = unsafe { found.assume_init() };
    result == 0 && found.stx_attributes & libc::STATX_ATTR_VERITY as u64 != 0
}

/// Takes what nobody has mapped or changed of a file out of the page cache.
pub fn drop_cached(file: &File) -> io::Result<()> {
    Ok(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?)
}

/// How many bytes of a file are in the page cache.
pub fn cached_bytes(file: &File) -> io::Result<u64> {
    /// `cachestat`, which libc does not know by name everywhere.
    const SYS_CACHESTAT: libc::c_long = 451;
    #[repr(C)]
    struct Range {
        offset: u64,
        len: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Found {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    // All of it.
    let range = Range { offset: 0, len: 0 };
    let mut found = Found::default();
    // SAFETY: both are laid out as the kernel's structures, and ours.
    match unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut found, 0) } {
        0 => Ok(found.cached * rustix::param::page_size() as u64),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectored_writes_land_one_after_another() {
        let file = tempfile::tempfile().unwrap();
        let parts: Vec<Vec<u8>> = (0..3000usize).map(|i| vec![i as u8; i % 7]).collect();
        let buffers: Vec<Readable> = parts.iter().map(|part| Readable::from_slice(part)).collect();
        write_at(&file, &buffers, 13).unwrap();
        let expected = parts.concat();
        let mut found = vec![1; expected.len() + 5];
        read_at(&file, Writable::from_mut_slice(&mut found), 13).unwrap();
        assert_eq!(found[..expected.len()], expected);
        assert_eq!(found[expected.len()..], [0; 5], "past the end are zeros");
    }

    #[test]
    fn offsets_past_the_largest_file_are_errors() {
        let file = tempfile::tempfile().unwrap();
        let error = write_at(&file, &[Readable::from_slice(b"x")], u64::MAX).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
    }

    #[test]
    fn a_file_without_a_name_gets_one_that_is_free() {
        let directory = tempfile::tempdir().unwrap();
        let Ok(file) = open_unnamed(directory.path()) else {
            println!("skipped: the file system has no files without a name");
            return;
        };
        write_at(&file, &[Readable::from_slice(b"root")], 0).unwrap();
        let (path, taken) = (directory.path().join("name"), directory.path().join("taken"));
        std::fs::write(&taken, b"trunk").unwrap();
        assert_eq!(give_name(&file, &taken).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        give_name(&file, &path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"root");
        assert_eq!(std::fs::read(&taken).unwrap(), b"trunk");
        wait_written(&file, 0, 4).unwrap();
    }

    #[test]
    fn verity_is_there_when_it_was_enabled() {
        let file = tempfile::NamedTempFile::new().unwrap();
        write_at(file.as_file(), &[Readable::from_slice(b"root")], 0).unwrap();
        assert!(!has_verity(file.as_file()));
        let path = file.into_temp_path();
        let file = File::open(&path).unwrap();
        match enable_verity(&file) {
            Ok(()) => assert!(has_verity(&file)),
            Err(error) => {
                println!("skipped: no fs-verity here: {error}");
                let known = [libc::ENOTTY, libc::EOPNOTSUPP];
                assert!(known.contains(&error.raw_os_error().unwrap()), "{error}");
            }
        }
    }

    #[test]
    fn a_lock_names_its_holder() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(try_lock(file.as_file()).unwrap());
        let second = File::open(file.path()).unwrap();
        assert!(!try_lock(&second).unwrap());
        assert_eq!(lock_holder(&second), Some(std::process::id()));
    }
}
