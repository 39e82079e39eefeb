//! Waiting: [`Epoll`] over descriptors, and event descriptors written without reading them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

/// A set of descriptors to wait for.
pub struct Epoll {
    descriptor: OwnedFd,
}

impl Epoll {
    /// An empty set.
    pub fn new() -> io::Result<Epoll> {
        let descriptor = epoll::create(true)?;
        // SAFETY: the call succeeded, so it is an open descriptor that nobody else owns.
        Ok(Epoll { descriptor: unsafe { OwnedFd::from_raw_fd(descriptor) } })
    }

    /// Adds a descriptor that wakes a waiter each time that something is written to it.
    ///
    /// Edge-triggered, so an event descriptor need not be read: nothing can block on it, and a wake-up costs one system
    /// call less.
    pub fn add_edge(&self, descriptor: &impl AsRawFd) -> io::Result<()> {
        self.add(descriptor, epoll::Events::EPOLLIN | epoll::Events::EPOLLET)
    }

    /// Adds a descriptor that wakes a waiter for as long as it can be read.
    pub fn add_level(&self, descriptor: &impl AsRawFd) -> io::Result<()> {
        self.add(descriptor, epoll::Events::EPOLLIN)
    }

    fn add(&self, descriptor: &impl AsRawFd, events: epoll::Events) -> io::Result<()> {
        let event = epoll::Event::new(events, 0);
        let fd = descriptor.as_raw_fd();
        epoll::ctl(self.descriptor.as_raw_fd(), epoll::ControlOptions::EPOLL_CTL_ADD, fd, event)
    }

    /// Waits until a descriptor of the set wakes it, at most so long. Whether anything did.
    pub fn wait(&self, limit: Option<Duration>) -> io::Result<bool> {
        let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 4];
        // Rounded up: what is left below a millisecond is not a busy loop.
        let timeout_ms = limit.map_or(-1, |limit| i32::try_from(limit.as_millis() + 1).unwrap_or(i32::MAX));
        match epoll::wait(self.descriptor.as_raw_fd(), timeout_ms, &mut events) {
            Ok(count) => Ok(count > 0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(error),
        }
    }
}

/// Adds one to an event descriptor, which wakes whoever waits for it.
///
/// Waits while the descriptor takes no more, and gives up when [`super::process::interrupt`]ed.
pub fn signal(event: &File) -> io::Result<()> {
    // Not `write_all`, which goes on after an interrupt.
    match (&*event).write(&1u64.to_ne_bytes())? {
        8 => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// An event descriptor as any other file.
pub fn into_file(event: EventFd) -> File {
    // SAFETY: it is open, and nobody else owns it from here on.
    unsafe { File::from_raw_fd(event.into_raw_fd()) }
}

/// Takes what has been added to an event descriptor; an error of kind `WouldBlock` when nothing has, if it does not wait.
pub fn drain(event: &File) -> io::Result<u64> {
    let mut count = [0; 8];
    (&*event).read_exact(&mut count)?;
    Ok(u64::from_ne_bytes(count))
}
