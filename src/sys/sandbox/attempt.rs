//! What a process that has been taken over would try, so that tests see what comes of it. In debug builds alone.

use std::ffi::CString;
use std::io;

use libc::c_long;

/// Tries something, once, and logs what came of it, if the process is still there. What is to be tried is a word, and what it is to be tried
/// on: a path, or the number of a process.
pub fn make(what: &str) {
    let (verb, object) = what.split_once(' ').unwrap_or((what, ""));
    let result = match verb {
        "read" => open(object, libc::O_RDONLY),
        "write" => open(object, libc::O_WRONLY),
        "create" => open(object, libc::O_RDONLY | libc::O_CREAT),
        "remove" => with_path(object, |path| {
            // SAFETY: a string that ends, and lives for the call.
            unsafe { libc::unlink(path.as_ptr()) }.into()
        }),
        "execute" => execute(object),
        // SAFETY: takes no pointers.
        "socket" => number(unsafe { libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0) }),
        // SAFETY: takes a structure that is not there, which it refuses where it can be called.
        "ring" => number(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, std::ptr::null::<u8>()) }),
        // SAFETY: as above. The operation is that which gives a ring other buffers.
        "ring-buffers" => {
            number(unsafe { libc::syscall(libc::SYS_io_uring_register, 3, 0, std::ptr::null::<u8>(), 1) })
        }
        "fork" => fork(0),
        "namespace" => fork(libc::CLONE_NEWUSER),
        // SAFETY: takes no pointers.
        "interrupt" => {
            number(unsafe { libc::syscall(libc::SYS_tgkill, process(object), process(object), libc::SIGUSR1) })
        }
        // SAFETY: takes no pointers. There is no such group.
        "kill-group" => number(unsafe { libc::syscall(libc::SYS_kill, i32::MIN + 1, libc::SIGKILL) }),
        // SAFETY: takes no pointers. No signal is sent; whether one could be is told.
        "signal" => number(unsafe { libc::syscall(libc::SYS_kill, process(object), 0) }),
        // SAFETY: takes no pointers. No process traces itself.
        "trace" => number(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_SEIZE, std::process::id(), 0, 0) }),
        "code" => map(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC),
        "anonymous-code" => map(libc::PROT_READ | libc::PROT_EXEC),
        "later-code" => make_code_later(),
        // SAFETY: takes arguments of no length, which it refuses where it exists.
        "clone3" => number(unsafe { libc::syscall(libc::SYS_clone3, std::ptr::null::<u8>(), 0) }),
        "abort" => std::process::abort(),
        "panic" => panic!("attempted"),
        _ => Err(io::Error::other("no such attempt")),
    };
    match result {
        Ok(_) => log::error!("attempted to {what}: done"),
        Err(error) => log::error!("attempted to {what}: {error}"),
    }
}

fn number(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn process(object: &str) -> c_long {
    object.parse().unwrap_or(0)
}

fn with_path(path: &str, call: impl FnOnce(&CString) -> c_long) -> io::Result<c_long> {
    number(call(&CString::new(path)?))
}

fn open(path: &str, flags: i32) -> io::Result<c_long> {
    with_path(path, |path| {
        // SAFETY: a string that ends, and lives for the call.
        unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0o600) }
    })
}

fn execute(path: &str) -> io::Result<c_long> {
    let nothing = [std::ptr::null::<libc::c_char>()];
    with_path(path, |path| {
        let arguments = [path.as_ptr(), std::ptr::null()];
        // SAFETY: a string that ends, and two lists that end; all live for the call.
        unsafe { libc::syscall(libc::SYS_execve, path.as_ptr(), arguments.as_ptr(), nothing.as_ptr()) }
    })
}

fn fork(flags: i32) -> io::Result<c_long> {
    // SAFETY: the child has a copy of everything, and ends before it does anything with it.
    let child = number(unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) })?;
    if child == 0 {
        // SAFETY: does not return, and does nothing but end the process.
        unsafe { libc::_exit(0) };
    }
    Ok(child)
}

fn map(protection: i32) -> io::Result<c_long> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    number(unsafe { libc::syscall(libc::SYS_mmap, 0, 4096, protection, flags, -1, 0) })
}

fn make_code_later() -> io::Result<c_long> {
    let start = map(libc::PROT_READ | libc::PROT_WRITE)?;
    // SAFETY: a mapping that was just made, and that nobody else knows.
    number(unsafe { libc::syscall(libc::SYS_mprotect, start, 4096, libc::PROT_READ | libc::PROT_EXEC) })
}
