//! Waiting for a socket among the tasks of an executor. Only the daemon has one; the data path waits by itself ([`super::events`]).

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use tokio::io::unix::AsyncFd;

use super::socket::PacketSocket;

/// A socket that others have, too.
pub struct Watched(Arc<PacketSocket>);

impl AsRawFd for Watched {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// What tells tasks of the current executor whether a socket can be read.
pub fn watch(socket: Arc<PacketSocket>) -> io::Result<AsyncFd<Watched>> {
    // SAFETY: a socket has one descriptor for as long as it is there, which is until the registration is dropped at least.
    Ok(unsafe { AsyncFd::register(Watched(socket)) }?)
}
