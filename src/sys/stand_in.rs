//! [`Running`]: a thread in place of a child process, in builds for fuzzers (`cfg(fuzzing)`) alone: what a sanitizer and the coverage of a
//! run see is one process.
//!
//! It has one end of a conversation, as the process has, and is killed by ending that. A thread cannot be made to end where it is: what
//! stands in for the process ends itself, and all that it has started, once it finds its conversation ended.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What the thread is to do with its end of the conversation, and with what else it has inherited.
pub type Work = fn(OwnedFd, Vec<OwnedFd>);

/// What is started in place of processes.
static WORK: Mutex<Option<Work>> = Mutex::new(None);
/// The conversations of those that have not been waited for, and how many there have been.
static LIVING: Mutex<(u64, BTreeMap<u64, OwnedFd>)> = Mutex::new((0, BTreeMap::new()));

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says what is started in place of processes from now on, and gives this process the manners of a backend's: a pipe that nobody reads is
/// an error, and waits can be interrupted.
pub fn prepare(work: Work) -> io::Result<()> {
    *lock(&WORK) = Some(work);
    // SAFETY: takes no pointers, and installs no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    super::process::allow_interrupts()
}

/// A thread in place of a child process.
pub struct Running {
    number: u64,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts it.
    pub fn start(conversation: OwnedFd, inherited: Vec<OwnedFd>) -> io::Result<Running> {
        let work = (*lock(&WORK)).ok_or_else(|| io::Error::other("nothing is to stand in for a process"))?;
        let kept = conversation.try_clone()?;
        let thread =
            std::thread::Builder::new().name("stand-in".to_owned()).spawn(move || work(conversation, inherited))?;
        let mut living = lock(&LIVING);
        living.0 += 1;
        let number = living.0;
        living.1.insert(number, kept);
        Ok(Running { number, thread: Some(thread) })
    }

    /// Has it end.
    pub fn kill(&self) {
        if let Some(conversation) = lock(&LIVING).1.get(&self.number) {
            end(conversation);
        }
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.number as u32
    }

    /// The one with this number, which nobody else waits for.
    pub fn from_number(number: u32) -> Running {
        Running { number: number.into(), thread: None }
    }

    /// As a process: it has ended its conversation, or is told to.
    pub fn end_soon(mut self) -> io::Result<ExitStatus> {
        self.kill();
        self.join()
    }

    /// As a process that has been killed: its end takes no time.
    pub fn wait_no_longer(self) -> Result<io::Result<ExitStatus>, Running> {
        Ok(self.wait())
    }

    /// Waits for its end.
    pub fn wait(mut self) -> io::Result<ExitStatus> {
        self.join()
    }

    fn join(&mut self) -> io::Result<ExitStatus> {
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| io::Error::other("the stand-in panicked"))?;
            lock(&LIVING).1.remove(&self.number);
        }
        Ok(ExitStatus::from_raw(0))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // As a process that is not waited for: of no further concern. Its descriptors are this process's own, though.
        self.kill();
        let _ = self.join();
    }
}

/// Ends all conversations, ahead of an unwinding that stands for the death of them all: nothing that they say from now on is heard.
pub fn fall() {
    lock(&LIVING).1.values().for_each(end);
}

fn end(conversation: &OwnedFd) {
    // SAFETY: takes no pointers. Fails only when the other side is gone.
    unsafe { libc::shutdown(conversation.as_raw_fd(), libc::SHUT_RDWR) };
}
