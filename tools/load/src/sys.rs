//! What the load generator asks of the kernel and of raw memory: the only file here with `unsafe`.
//!
//! Owns shared memory (a mapped memfd that the backend maps too), a mapped file to copy from, the
//! CPU clocks, handles of processes, mounts, and a few calls that the standard library lacks. Knows nothing of rings or requests.
//!
//! Shared memory is only ever reached through atomics (for fields that the backend may touch at the
//! same time) and through raw copies (for data that nobody touches while a request is not in
//! flight); no reference to it is ever handed out.

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use vm_memory::VolatileSlice;

/// A mapping of `bytes` bytes, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping is an address and a length; it belongs to the process, not to a thread. Every
// access goes through the methods of the two owners below, which use atomics or raw copies.
unsafe impl Send for Mapping {}
// SAFETY: as above: no method hands out a reference into the mapping.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, bytes: usize, protection: i32) -> io::Result<Self> {
        // SAFETY: a null hint lets the kernel choose a free range, so no existing mapping is
        // replaced; the result is checked before it is used.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_SHARED | libc::MAP_POPULATE, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, bytes })
    }

    /// The address of `bytes` bytes at `offset`.
    ///
    /// Panics when they are not all inside the mapping: that is a bug of this program.
    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        assert!(
            offset <= self.bytes && bytes <= self.bytes - offset,
            "{bytes} bytes at {offset} in a mapping of {}",
            self.bytes
        );
        // SAFETY: `offset` is at most the mapping's length, as just checked.
        unsafe { self.start.as_ptr().add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this range was mapped in `new`, is unmapped once, and nobody holds a reference
        // into it because none is ever handed out.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// Memory that driver and backend share: the guest's memory, without a guest.
#[derive(Debug)]
pub struct SharedMemory {
    file: File,
    mapping: Mapping,
}

impl SharedMemory {
    /// Makes `bytes` bytes of zeroed shared memory, all of it resident.
    pub fn new(bytes: usize) -> io::Result<Self> {
        // SAFETY: the name is a C string literal; the result is checked.
        let fd = unsafe { libc::memfd_create(c"load-guest".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(bytes as u64)?;
        let mapping = Mapping::new(&file, bytes, libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(Self { file, mapping })
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub fn bytes(&self) -> usize {
        self.mapping.bytes
    }

    /// Where the memory lies in this process: a "user address" of the vhost-user protocol.
    pub fn address(&self) -> u64 {
        self.mapping.start.as_ptr() as u64
    }

    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        let at = self.mapping.at(offset, 2).cast::<u16>();
        assert!(at.is_aligned());
        // SAFETY: inside the mapping and aligned, as checked; zero-initialised by the kernel;
        // reached by atomics alone on both sides.
        unsafe { AtomicU16::from_ptr(at) }.load(order)
    }

    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        let at = self.mapping.at(offset, 2).cast::<u16>();
        assert!(at.is_aligned());
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(at) }.store(value, order);
    }

    pub fn load_u8(&self, offset: usize) -> u8 {
        // SAFETY: inside the mapping, as `at` checks; a byte is always aligned.
        unsafe { AtomicU8::from_ptr(self.mapping.at(offset, 1)) }.load(Ordering::Relaxed)
    }

    pub fn store_u8(&self, offset: usize, value: u8) {
        // SAFETY: as in `load_u8`.
        unsafe { AtomicU8::from_ptr(self.mapping.at(offset, 1)) }.store(value, Ordering::Relaxed);
    }

    pub fn load_u32(&self, offset: usize) -> u32 {
        let at = self.mapping.at(offset, 4).cast::<u32>();
        assert!(at.is_aligned());
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU32::from_ptr(at) }.load(Ordering::Relaxed)
    }

    pub fn store_u64(&self, offset: usize, value: u64) {
        let at = self.mapping.at(offset, 8).cast::<u64>();
        assert!(at.is_aligned());
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU64::from_ptr(at) }.store(value, Ordering::Relaxed);
    }

    /// Copies `data` to `offset`. Only for memory that no request in flight refers to.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let at = self.mapping.at(offset, data.len());
        // SAFETY: the destination is inside the mapping, as `at` checks, and `data` is not, since
        // no reference into the mapping exists.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), at, data.len()) };
    }

    /// Copies from `offset` to `data`. Only for memory that no request in flight refers to.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let at = self.mapping.at(offset, data.len());
        // SAFETY: as in `write`, the other way round.
        unsafe { ptr::copy_nonoverlapping(at, data.as_mut_ptr(), data.len()) };
    }

    /// Reads from `file` into the memory at `offset`, as a backend does that serves by `pread`.
    pub fn read_from(&self, offset: usize, bytes: usize, file: &File, at: u64) -> io::Result<()> {
        let start = self.mapping.at(offset, bytes);
        // SAFETY: `bytes` bytes at `start` are inside a writable mapping.
        unsafe { pread_exact(file.as_raw_fd(), start, bytes, at) }
    }

    /// Writes the memory at `offset` to `file`, as a backend does that serves by `pwrite`.
    pub fn write_to(&self, offset: usize, bytes: usize, file: &File, at: u64) -> io::Result<()> {
        let start = self.mapping.at(offset, bytes);
        // SAFETY: `bytes` bytes at `start` are readable. They may change while the kernel copies
        // them; then the file gets old or new bytes, and no reference ever saw them.
        unsafe { pwrite_exact(file.as_raw_fd(), start, bytes, at) }
    }
}

/// A whole file, mapped and resident, to copy from.
#[derive(Debug)]
pub struct MappedFile {
    mapping: Mapping,
}

impl MappedFile {
    pub fn new(file: &File) -> io::Result<Self> {
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let mapping = Mapping::new(file, bytes, libc::PROT_READ)?;
        Ok(Self { mapping })
    }

    /// Copies `bytes` bytes at `from` to `offset` in `memory`.
    pub fn copy(&self, from: usize, memory: &SharedMemory, offset: usize, bytes: usize) {
        let source = self.mapping.at(from, bytes);
        let destination = memory.mapping.at(offset, bytes);
        // SAFETY: both ranges are inside their mappings, which are distinct, so they cannot
        // overlap. The file is this program's own and is not truncated while it is mapped.
        unsafe { copy_bytes(source, destination, bytes) };
    }
}

/// The fastest copy there is: on x86 the string instruction, which from 64 KiB on takes half to
/// three quarters of the time of the C library's `memcpy`, and the same below.
///
/// # Safety
///
/// As for `ptr::copy_nonoverlapping`.
unsafe fn copy_bytes(source: *const u8, destination: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller vouches for both ranges; the direction flag is clear, as the ABI demands.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") bytes => _,
            inout("rsi") source => _,
            inout("rdi") destination => _,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller vouches for both ranges.
    unsafe {
        ptr::copy_nonoverlapping(source, destination, bytes);
    }
}

/// # Safety
///
/// `bytes` bytes at `start` must be mapped and writable.
unsafe fn pread_exact(fd: RawFd, start: *mut u8, bytes: usize, at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes {
        // SAFETY: `done` is less than `bytes`, so the rest lies inside the caller's range.
        let count = unsafe {
            let at = (at + done as u64).cast_signed();
            libc::pread(fd, start.add(done).cast(), bytes - done, at)
        };
        match count {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            1.. => done += count.cast_unsigned(),
            _ => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

/// # Safety
///
/// `bytes` bytes at `start` must be mapped and readable.
unsafe fn pwrite_exact(fd: RawFd, start: *const u8, bytes: usize, at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes {
        // SAFETY: `done` is less than `bytes`, so the rest lies inside the caller's range.
        let count = unsafe {
            let at = (at + done as u64).cast_signed();
            libc::pwrite(fd, start.add(done).cast(), bytes - done, at)
        };
        match count {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            1.. => done += count.cast_unsigned(),
            _ => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

/// Reads from `file` straight into guest memory: one `pread`, no copy in between.
pub fn pread_into_guest(file: &File, guest: &VolatileSlice, at: u64) -> io::Result<()> {
    let guard = guest.ptr_guard_mut();
    // SAFETY: the guard keeps `guest.len()` writable bytes mapped until it is dropped.
    unsafe { pread_exact(file.as_raw_fd(), guard.as_ptr(), guest.len(), at) }
}

/// Writes guest memory straight to `file`: one `pwrite`, no copy in between.
pub fn pwrite_from_guest(file: &File, guest: &VolatileSlice, at: u64) -> io::Result<()> {
    let guard = guest.ptr_guard();
    // SAFETY: the guard keeps `guest.len()` readable bytes mapped until it is dropped.
    unsafe { pwrite_exact(file.as_raw_fd(), guard.as_ptr(), guest.len(), at) }
}

fn clock_ns(clock: libc::clockid_t) -> io::Result<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned())
}

/// CPU time that this thread has used, user and system.
pub fn thread_cpu_ns() -> io::Result<u64> {
    clock_ns(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU time that a process has used, user and system, all its threads including those that ended.
///
/// The scheduler's own sum in nanoseconds: what `utime` and `stime` in `/proc` are rounded from.
pub fn process_cpu_ns(pid: u32) -> io::Result<u64> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let mut clock = 0;
    // SAFETY: `clock` is a valid place for the result.
    match unsafe { libc::clock_getcpuclockid(pid, &mut clock) } {
        0 => clock_ns(clock),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Waits until one of `fds` can be read; false when `timeout` passes first.
pub fn wait_readable(fds: &mut [libc::pollfd], timeout: Duration) -> io::Result<bool> {
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    let count = fds.len() as libc::nfds_t;
    // SAFETY: `fds` is a valid array of `count` elements for the time of the call.
    match unsafe { libc::poll(fds.as_mut_ptr(), count, timeout_ms) } {
        0.. if fds.iter().any(|fd| fd.revents != 0) => Ok(true),
        0.. => Ok(false),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            error => Err(error),
        },
    }
}

/// Lets this process, and those that it starts, have as many descriptors as they ever may.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the result.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is valid and is only read.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Asks a process to end.
pub fn terminate(pid: u32) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: a signal to a child of ours that has not been waited for, so the id is still its own.
    if unsafe { libc::kill(pid, libc::SIGTERM) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A process that stays the one that it is: its number may become another's, this does not.
#[derive(Debug)]
pub struct ProcessHandle(OwnedFd);

impl ProcessHandle {
    pub fn open(pid: u32) -> io::Result<Self> {
        let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
        // SAFETY: takes two numbers; the result is checked.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and has no other owner.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub fn send(&self, signal: i32) -> io::Result<()> {
        let no_details = ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is open, and null stands for a signal without details.
        match unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal, no_details, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Waits until the process has ended; false when `timeout` passes first.
    pub fn wait_for_end(&self, timeout: Duration) -> io::Result<bool> {
        wait_readable(&mut [libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 }], timeout)
    }
}

/// Makes this process the parent of descendants whose own parent has ended, so that it can find all of them.
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: takes two numbers.
    match unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes note of the end of a child, if it has ended.
pub fn bury(pid: u32) {
    if let Ok(pid) = libc::pid_t::try_from(pid) {
        // SAFETY: null stands for a status that nobody wants. For what is no child that has ended, nothing happens.
        unsafe { libc::waitpid(pid, ptr::null_mut(), libc::WNOHANG) };
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Has SIGINT and SIGTERM noted, and nothing else done about them in this process.
pub fn note_interrupts() {
    extern "C" fn note(_signal: i32) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler does nothing but store to an atomic, which a signal may interrupt anything for.
        unsafe { libc::signal(signal, note as extern "C" fn(i32) as libc::sighandler_t) };
    }
}

pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// The processors that this thread may run on.
pub fn processors() -> io::Result<Vec<usize>> {
    // SAFETY: all-zero bytes are an empty set, and the call fills it.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return Err(io::Error::last_os_error());
        }
        set
    };
    // SAFETY: no number reaches behind the set.
    Ok((0..libc::CPU_SETSIZE as usize).filter(|number| unsafe { libc::CPU_ISSET(*number, &set) }).collect())
}

/// Has this thread, and the processes that it starts from now on, run on these processors alone.
pub fn run_on(processors: &[usize]) -> io::Result<()> {
    // SAFETY: all-zero bytes are an empty set; what does not fit into one is left out.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        for number in processors.iter().filter(|number| **number < libc::CPU_SETSIZE as usize) {
            libc::CPU_SET(*number, &mut set);
        }
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives this process, which has one thread, and all that it starts a view of mounts of their own: what is mounted in it nobody else sees, and it
/// goes with the last of them. Who is not root has the right to in a user namespace of its own, in which everybody stays who they are.
pub fn keep_mounts_private() -> io::Result<()> {
    // SAFETY: both only return numbers.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    // SAFETY: takes a number, and parts this process from others' views alone.
    let unshare = |what| check(unsafe { libc::unshare(what) });
    // A root without the right would have less of it in a namespace that it may not give its users to.
    if let Err(error) = unshare(libc::CLONE_NEWNS) {
        if user == 0 {
            return Err(error);
        }
        unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS)?;
        std::fs::write("/proc/self/setgroups", "deny")?;
        std::fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
        std::fs::write("/proc/self/gid_map", format!("{group} {group} 1"))?;
    }
    mount(None, c"/", libc::MS_REC | libc::MS_PRIVATE, None)
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn mount(kind: Option<&CStr>, place: &CStr, flags: libc::c_ulong, options: Option<&CStr>) -> io::Result<()> {
    let kind = kind.map_or(ptr::null(), CStr::as_ptr);
    let options = options.map_or(ptr::null(), |options| options.as_ptr().cast());
    // SAFETY: every string ends with a zero and lives until the call returns; null stands for what the flags have no use for.
    check(unsafe { libc::mount(kind, place.as_ptr(), kind, flags, options) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Mounts a file system in memory, of so many bytes, or has the one that is there have so many from now on: no less than it holds.
pub fn mount_memory(place: &Path, bytes: u64, again: bool) -> io::Result<()> {
    let options = CString::new(if again { format!("size={bytes}") } else { format!("size={bytes},mode=700") })?;
    mount(Some(c"tmpfs"), &c_path(place)?, if again { libc::MS_REMOUNT } else { 0 }, Some(&options))
}

pub fn unmount(place: &Path) -> io::Result<()> {
    // SAFETY: the path ends with a zero and lives until the call returns.
    check(unsafe { libc::umount2(c_path(place)?.as_ptr(), libc::MNT_DETACH) })
}

/// The bytes that the file system of `place` holds.
pub fn held_bytes(place: &Path) -> io::Result<u64> {
    let mut found = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends with a zero, and there is room for the answer.
    check(unsafe { libc::statvfs(c_path(place)?.as_ptr(), found.as_mut_ptr()) })?;
    // SAFETY: filled in by the call, which has succeeded.
    let found = unsafe { found.assume_init() };
    Ok((found.f_blocks - found.f_bfree) * found.f_frsize)
}

/// Waits until all that was written to a file's file system is on its disk, and what was removed from it is given back there.
pub fn sync_file_system(file: &File) -> io::Result<()> {
    // SAFETY: no memory is passed; the descriptor is open.
    check(unsafe { libc::syncfs(file.as_raw_fd()) })
}

/// Drops a file's clean pages from the page cache.
pub fn drop_cache(file: &File) -> io::Result<()> {
    advise(file, libc::POSIX_FADV_DONTNEED)
}

/// Reads a whole file from its disk, whatever of it is in the page cache, and leaves nothing there. Where the file system cannot, nothing is read.
pub fn read_past_cache(path: &Path) -> io::Result<()> {
    const PIECE_BYTES: usize = 1 << 20;
    /// What any disk asks of a buffer's address.
    const ALIGNMENT: usize = 4096;
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
        file => file?,
    };
    let mut buffer = vec![0; PIECE_BYTES + ALIGNMENT];
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    let piece = &mut buffer[start..start + PIECE_BYTES];
    let mut at = 0;
    loop {
        let count = file.read_at(piece, at)?;
        if count < PIECE_BYTES {
            return Ok(());
        }
        at += count as u64;
    }
}

/// Tells the kernel something about all of a file.
fn advise(file: &File, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is passed; the descriptor is open.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Writes to so many bytes of memory that nobody uses, and gives them back. What the kernel hands out next is then there: a hypervisor that takes back what has been
/// free for some seconds (free page reporting) has to find it again otherwise, page by page, when somebody first writes to it.
pub fn warm_free_memory(bytes: usize) -> io::Result<()> {
    /// The kernel tells a hypervisor of what is free two seconds after some of it has become so. By the end of this time it has told of all that was free before, and tells
    /// of these bytes two seconds later at the earliest.
    const UNTIL_TOLD: Duration = Duration::from_millis(2300);
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping that was just made, which nobody else knows of.
    unsafe {
        // In large pages where there are any: of memory given back in small ones, some is still not there.
        libc::madvise(start, bytes, libc::MADV_HUGEPAGE);
        let written = check(libc::madvise(start, bytes, libc::MADV_POPULATE_WRITE));
        thread::sleep(UNTIL_TOLD);
        libc::munmap(start, bytes);
        written
    }
}

/// Reads a whole file once, so that it is in the page cache.
pub fn fill_cache(file: &File) -> io::Result<()> {
    fill_cache_to(file, u64::MAX)
}

/// The same up to an offset, in pages of the least size: as reads at random bring them, and no readahead.
pub fn fill_cache_by_pages(file: &File, end: u64) -> io::Result<()> {
    advise(file, libc::POSIX_FADV_RANDOM)?;
    fill_cache_to(file, end)
}

fn fill_cache_to(file: &File, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < end {
        match file.read_at(&mut buffer, at)? {
            0 => break,
            count => at += count as u64,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zeroed_shared_and_bounded() {
        let memory = SharedMemory::new(8192).unwrap();
        assert_eq!(memory.load_u16(0, Ordering::Relaxed), 0);
        memory.write(8190, &[1, 2]);
        let mut seen = [0; 2];
        memory.file.read_exact_at(&mut seen, 8190).unwrap();
        assert_eq!(seen, [1, 2]);
        let outside = std::panic::catch_unwind(|| memory.load_u8(8192));
        assert!(outside.is_err());
    }

    #[test]
    fn what_is_read_past_the_cache_leaves_nothing_there() {
        const BYTES: usize = 3 << 20;
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&vec![1; BYTES], 0).unwrap();
        file.as_file().sync_all().unwrap();
        let mapping = Mapping::new(file.as_file(), BYTES, libc::PROT_READ).unwrap();
        // What is mapped cannot be dropped.
        // SAFETY: the range is mapped, and has the file's bytes again when it is next read.
        check(unsafe { libc::madvise(mapping.start.as_ptr().cast(), BYTES, libc::MADV_DONTNEED) }).unwrap();
        drop_cache(file.as_file()).unwrap();
        let is_cached = || {
            let mut pages = vec![0_u8; BYTES / 4096];
            // SAFETY: the range is mapped, and there is a byte for each of its pages.
            check(unsafe { libc::mincore(mapping.start.as_ptr().cast(), BYTES, pages.as_mut_ptr()) }).unwrap();
            pages.iter().any(|page| page & 1 == 1)
        };
        if is_cached() {
            // A file system in memory.
            return;
        }
        read_past_cache(file.path()).unwrap();
        assert!(!is_cached());
        fill_cache(file.as_file()).unwrap();
        assert!(is_cached(), "or this shows nothing");
    }

    #[test]
    fn a_process_has_a_handle_until_after_its_end() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let handle = ProcessHandle::open(child.id()).unwrap();
        assert!(!handle.wait_for_end(Duration::ZERO).unwrap());
        handle.send(libc::SIGKILL).unwrap();
        assert!(handle.wait_for_end(Duration::from_secs(30)).unwrap());
        child.wait().unwrap();
        assert_eq!(handle.send(libc::SIGKILL).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        assert!(ProcessHandle::open(child.id()).is_err());
    }

    #[test]
    fn a_thread_keeps_to_its_processors() {
        std::thread::spawn(|| {
            let all = processors().unwrap();
            run_on(&all[..1]).unwrap();
            assert_eq!(processors().unwrap(), all[..1]);
            run_on(&all).unwrap();
            assert_eq!(processors().unwrap(), all);
            assert!(run_on(&[]).is_err());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn cpu_clocks_advance() {
        let (thread, process) = (thread_cpu_ns().unwrap(), process_cpu_ns(std::process::id()).unwrap());
        let mut sum = 0_u64;
        for i in 0..1_000_000_u64 {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(i));
        }
        assert!(thread_cpu_ns().unwrap() > thread);
        assert!(process_cpu_ns(std::process::id()).unwrap() > process);
    }
}
