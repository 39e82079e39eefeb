//! Waiting for a descriptor among the tasks of an executor. Only the daemon has one; the data path waits by itself ([`super::events`]).

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use tokio::io::unix::AsyncFd;

/// What tells tasks of the current executor whether a descriptor can be read: a copy of it, with its readiness.
pub fn watch(descriptor: BorrowedFd<'_>) -> io::Result<AsyncFd<OwnedFd>> {
    let copy = descriptor.try_clone_to_owned()?;
    // SAFETY: `copy` has its descriptor for itself, and keeps the same one open until it is dropped, with its registration.
    Ok(unsafe { AsyncFd::register(copy) }?)
}
