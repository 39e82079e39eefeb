//! Processes and signals: the worker as a child, the requests to stop, the identity of this boot.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
#[cfg(not(fuzzing))]
use std::os::unix::process::ExitStatusExt;
use std::os::unix::thread::JoinHandleExt;
#[cfg(not(fuzzing))]
use std::process::ExitStatus;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::JoinHandle;
#[cfg(not(fuzzing))]
use std::time::{Duration, Instant};

use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Uid, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

#[cfg(fuzzing)]
pub use super::stand_in::Running;

/// Lets panics tell where they were and no more, here and in programs that are executed: for a backtrace, files would be opened.
///
/// To be called while the process has one thread.
pub fn forgo_backtraces() {
    // SAFETY: nobody else reads or changes the environment meanwhile, by this function's condition.
    unsafe { std::env::set_var("RUST_BACKTRACE", "0") };
}

/// As below, but a thread. Numbers among the arguments are of descriptors that a process would have by them.
#[cfg(fuzzing)]
pub fn execute_self(_name: &str, arguments: &[&str], standard_input: OwnedFd) -> io::Result<Running> {
    // SAFETY: whoever starts it has these open, and does meanwhile.
    let copy = |number: RawFd| unsafe { BorrowedFd::borrow_raw(number) }.try_clone_to_owned();
    let inherited = arguments.iter().filter_map(|argument| argument.parse().ok()).map(copy);
    Running::start(standard_input, inherited.collect::<io::Result<_>>()?)
}

/// Starts this very program again, under the name `name`, with these arguments alone and `standard_input` as its descriptor 0.
#[cfg(not(fuzzing))]
pub fn execute_self(name: &str, arguments: &[&str], standard_input: OwnedFd) -> io::Result<Running> {
    // The file that this process runs, also when another has been installed at its path meanwhile.
    let mut command = Command::new("/proc/self/exe");
    let child = command.arg0(name).args(arguments).stdin(Stdio::from(standard_input)).spawn()?;
    Ok(Running::from_number(child.id()))
}

/// Has this process, which has one thread, be another user's from here on, with the group of the same number and no other, and with at most so many processes
/// and threads of that user's. Only root can.
pub fn become_user(uid: u32, processes_max: u64) -> io::Result<()> {
    setrlimit(Resource::Nproc, Rlimit { current: Some(processes_max), maximum: Some(processes_max) })?;
    set_thread_groups(&[])?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    set_thread_res_gid(group, group, group)?;
    // All rights of root's go with this.
    set_thread_res_uid(user, user, user)?;
    // What /proc has of this process would be root's until it executes a program.
    set_dumpable_behavior(DumpableBehavior::Dumpable)?;
    Ok(())
}

/// Waits for all children of the calling thread that have ended, and for none that has not. Other threads' children are theirs.
pub fn reap_ended() {
    // SAFETY: how they ended is not asked for.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG | libc::__WNOTHREAD) } > 0 {}
}

/// Lets this process, and programs that it starts, have as many descriptors as it may give itself; says how many that is.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    Ok(maximum.unwrap_or(u64::MAX))
}

/// Whether there is any process of a user: one that runs, or one that has ended and that its parent has not waited for.
pub fn is_any_of(uid: u32) -> bool {
    // SAFETY: takes no pointers. Of the processes of this user it gives the highest priority, and fails when there are none; what else may go
    // wrong does not say that there are none.
    let found = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_USER, uid) };
    found >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
}

/// Whom processes run as that have not ended. Reads a file for each process of the machine.
pub fn users_running() -> io::Result<HashSet<u32>> {
    let mut users = HashSet::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        if !path.file_name().is_some_and(|name| name.as_bytes().iter().all(u8::is_ascii_digit)) {
            continue;
        }
        match std::fs::read(path.join("status")) {
            Ok(status) => users.extend(users_of(&status)),
            // It is gone; to say so is the kernel's choice of errors.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(users)
}

/// Whom a process runs as by its `status` of /proc; nobody when it has ended.
fn users_of(status: &[u8]) -> Vec<u32> {
    // Its name may be any bytes but the end of a line.
    let status = String::from_utf8_lossy(status);
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    // A first thread that has ended says so of itself alone.
    let has_ended = field("State:").starts_with(['Z', 'X']) && matches!(field("Threads:"), "0" | "1");
    if has_ended { Vec::new() } else { field("Uid:").split('\t').filter_map(|number| number.parse().ok()).collect() }
}

/// Starts the program that is open as `program`, as [`execute_self`] does.
pub fn execute_program(
    program: BorrowedFd<'_>,
    name: &str,
    arguments: &[&str],
    standard_input: OwnedFd,
) -> io::Result<Child> {
    Command::new(path_of(program)).arg0(name).args(arguments).stdin(Stdio::from(standard_input)).spawn()
}

/// Has this process execute the program that is open as `program` in place of this one. Returns only when that fails.
///
/// Signals that are held back are not any more in the new program.
pub fn become_program(program: BorrowedFd<'_>, name: &str, arguments: &[&str], standard_input: OwnedFd) -> io::Error {
    Command::new(path_of(program)).arg0(name).args(arguments).stdin(Stdio::from(standard_input)).exec()
}

fn path_of(descriptor: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd())
}

/// Has a program that is executed in place of this one get descriptor `number`, or not.
pub fn keep_on_exec(number: RawFd, keep: bool) -> io::Result<()> {
    // SAFETY: takes no pointers.
    match unsafe { libc::fcntl(number, libc::F_SETFD, if keep { 0 } else { libc::FD_CLOEXEC }) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A child of this process, whichever program it was started by.
#[cfg(not(fuzzing))]
pub struct Running {
    process: u32,
}

#[cfg(not(fuzzing))]
impl Running {
    /// The child with this number, which nobody else waits for.
    pub fn from_number(process: u32) -> Running {
        Running { process }
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.process
    }

    /// Ends it at once.
    pub fn kill(&self) {
        // SAFETY: takes no pointers. Nobody else has this number before `wait` has returned; it fails for nobody then.
        unsafe { libc::kill(self.process.cast_signed(), libc::SIGKILL) };
    }

    /// Waits for an end that is near, and brings it about if it is not: how it ended by itself is worth to know.
    pub fn end_soon(self) -> io::Result<ExitStatus> {
        const PATIENCE: Duration = Duration::from_millis(200);
        let ends = Instant::now() + PATIENCE;
        let mut pause = Duration::from_micros(50);
        let mut process = self;
        loop {
            process = match process.wait_no_longer() {
                Ok(status) => return status,
                Err(process) => process,
            };
            if Instant::now() > ends {
                process.kill();
                return process.wait();
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }

    /// How it ended, or it as it was when it has not.
    pub fn wait_no_longer(self) -> Result<io::Result<ExitStatus>, Running> {
        self.wait_as(libc::WNOHANG).transpose().ok_or(self)
    }

    /// Waits for its end.
    pub fn wait(self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.wait_as(0)? {
                return Ok(status);
            }
        }
    }

    fn wait_as(&self, options: libc::c_int) -> io::Result<Option<ExitStatus>> {
        let mut status = 0;
        // SAFETY: `status` is ours.
        match unsafe { libc::waitpid(self.process.cast_signed(), &raw mut status, options) } {
            -1 => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => Ok(None),
                error => Err(error),
            },
            0 => Ok(None),
            _ => Ok(Some(ExitStatus::from_raw(status))),
        }
    }
}

/// Sets the name that `ps` and `top` show for this process; what is longer than 15 bytes is cut off.
pub fn set_name(name: &std::ffi::CStr) {
    // SAFETY: a string that ends; the call copies at most 16 bytes of it. It cannot fail.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Descriptor 0 itself, for a process that is given nothing else and opens nothing.
///
/// To be called once in a process, which does not read from standard input by any other way.
pub fn standard_input() -> OwnedFd {
    // SAFETY: nobody else's, by this function's condition; and open, for the standard library opens the first three descriptors
    // before `main` if nobody else has.
    unsafe { OwnedFd::from_raw_fd(libc::STDIN_FILENO) }
}

/// Descriptor 0 as this process's own.
pub fn take_standard_input() -> io::Result<OwnedFd> {
    let descriptor = io::stdin().as_fd().try_clone_to_owned()?;
    // So that nothing holds the other copy: descriptor 0 becomes /dev/null.
    let null = File::open("/dev/null")?;
    // SAFETY: both are open; descriptor 0 is replaced in one step.
    if unsafe { libc::dup2(null.as_raw_fd(), 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(descriptor)
}

/// Closes every descriptor but the first three and those of these numbers.
///
/// To be called first thing in a process, while it owns no others: whoever started it may have left some open.
pub fn close_inherited_but(kept: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<u32> = kept.iter().filter_map(|number| u32::try_from(*number).ok()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for last in kept.into_iter().filter(|number| *number >= 3).map(Some).chain([None]) {
        let end = last.map_or(u32::MAX, |kept| kept - 1);
        // SAFETY: nothing in this process owns a descriptor above 2 but those that are kept, by this function's condition.
        if first <= end && unsafe { libc::close_range(first, end, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        first = last.map_or(u32::MAX, |kept| kept + 1);
    }
    Ok(())
}

/// Has this process killed when the thread that has started it ends, whatever it is at then: also while it is stopped.
pub fn die_with_parent() -> io::Result<()> {
    // SAFETY: takes two numbers.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the process the first of a session of its own: what is typed at the terminal of whoever started it is not meant for it.
pub fn leave_session() -> io::Result<()> {
    // SAFETY: takes no pointers.
    match unsafe { libc::setsid() } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The signals that ask a process to stop (SIGTERM, SIGINT), held back and readable.
///
/// Threads and programs started afterwards hold them back too.
pub struct StopSignals {
    descriptor: File,
}

impl StopSignals {
    /// Holds these signals back from now on, and no others, whatever was held back by whoever started this process.
    pub fn hold() -> io::Result<StopSignals> {
        // SAFETY: all-zero bytes are a valid signal set, and the calls below only fill it and read it.
        let descriptor = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            if libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so it is an open descriptor that nobody else owns.
        Ok(StopSignals { descriptor: unsafe { File::from_raw_fd(descriptor) } })
    }
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Lets threads of this process be [`interrupt`]ed.
pub fn allow_interrupts() -> io::Result<()> {
    extern "C" fn nothing(_signal: libc::c_int) {}
    // SAFETY: all-zero bytes are a valid action with no flags, so that interrupted system calls are not restarted; the
    // handler does nothing.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(INTERRUPT, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The signal by which threads are interrupted.
const INTERRUPT: libc::c_int = libc::SIGUSR1;

/// Ends the system call that a thread waits in, if it waits in one. [`allow_interrupts`] comes first.
pub fn interrupt<T>(thread: &JoinHandle<T>) {
    // SAFETY: the number of a thread that has not been joined is valid. Fails only for a thread that has ended.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), INTERRUPT) };
}

/// The identity of this boot, once it is known.
static BOOT_ID: OnceLock<[u8; 16]> = OnceLock::new();

/// An identity of this boot of the host's kernel: what the page cache held is lost once it changes. No process sees it change.
pub fn boot_id() -> io::Result<[u8; 16]> {
    if let Some(known) = BOOT_ID.get() {
        return Ok(*known);
    }
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let id = uuid::Uuid::parse_str(text.trim()).map(uuid::Uuid::into_bytes).map_err(io::Error::other)?;
    Ok(*BOOT_ID.get_or_init(|| id))
}

/// Tells a process that cannot ask what [`boot_id`] is.
pub fn note_boot_id(id: [u8; 16]) {
    BOOT_ID.get_or_init(|| id);
}

/// Keeps the C library's allocator from opening files when threads use it: to find out how many processors there are, and whether memory that is given back is.
pub fn settle_allocator() {
    /// Threads that may allocate at the same time without waiting for each other.
    #[cfg(target_env = "gnu")]
    const ARENAS: libc::c_int = 8;
    // SAFETY: takes no pointers. What it fails to set stays as it is.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
    }
}

/// How often the calling thread has waited for the disk because a page that it touched was not in memory; never, if nobody says.
pub fn major_faults() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: there is room for the answer.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
    // SAFETY: integers alone, for which zeros are valid.
    unsafe { usage.assume_init() }.ru_majflt.cast_unsigned()
}

/// How many processors this process may use; one if nobody says.
pub fn processors() -> u32 {
    rustix::thread::sched_getaffinity(None).map_or(1, |set| set.count())
}

/// Gives a number that nobody else's delta has.
pub fn random_uuid() -> [u8; 16] {
    uuid::Uuid::new_v4().into_bytes()
}

/// Whether two descriptors, each of a process, are of the same opening of a file (`kcmp`).
pub fn is_same_opening(one: (u32, i32), other: (u32, i32)) -> io::Result<bool> {
    const KCMP_FILE: libc::c_int = 0;
    // SAFETY: takes no pointers.
    match unsafe { libc::syscall(libc::SYS_kcmp, one.0, other.0, KCMP_FILE, one.1, other.1) } {
        0 => Ok(true),
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_ended_runs_as_nobody() {
        let status = |state: &str, threads: u32| {
            let rest = format!("\nState:\t{state}\nUid:\t7\t8\t9\t10\nGid:\t1\t1\t1\t1\nThreads:\t{threads}\n");
            [b"Name:\t\xffpando", rest.as_bytes()].concat()
        };
        for (state, threads) in [("R (running)", 1), ("S (sleeping)", 1), ("D (disk sleep)", 3), ("Z (zombie)", 2)] {
            assert_eq!(users_of(&status(state, threads)), [7, 8, 9, 10], "{state}");
        }
        for state in ["Z (zombie)", "X (dead)"] {
            assert!(users_of(&status(state, 1)).is_empty(), "{state}");
        }
        assert!(users_running().unwrap().contains(&rustix::process::geteuid().as_raw()));
    }
}
