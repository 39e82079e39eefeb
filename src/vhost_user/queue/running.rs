//! [`RunningQueue`]: a queue's thread, for who starts and stops it.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::sys::events::Epoll;
use crate::sys::process;
use crate::vhost_user::errands::Inbox;
use crate::vhost_user::order::RingStop;

use super::Queue;

/// A queue's thread.
pub struct RunningQueue {
    thread: JoinHandle<RingStop>,
    /// Disconnected when the thread ends.
    end: Receiver<Infallible>,
    stop: Arc<Stop>,
}

pub(super) struct Stop {
    pub(super) asked: AtomicBool,
    wake: EventFd,
    /// The thread writes to a descriptor of the front end's, who may see to it that this takes for ever.
    notifies: AtomicBool,
}

/// How long a thread that is to stop may take to notify the driver.
const NOTIFY_PATIENCE: Duration = Duration::from_millis(50);

impl RunningQueue {
    /// Starts the thread.
    pub fn start(queue: Queue) -> io::Result<RunningQueue> {
        let stop = Arc::new(Stop {
            asked: AtomicBool::new(false),
            wake: EventFd::new(libc::EFD_CLOEXEC)?,
            notifies: AtomicBool::new(false),
        });
        let epoll = Epoll::new()?;
        let inbox = Arc::new(Inbox::new()?);
        epoll.add_edge(&inbox.event)?;
        epoll.add_edge(&queue.kick)?;
        epoll.add_level(&stop.wake)?;
        let seen = Arc::clone(&stop);
        let (ends, end) = mpsc::channel();
        let thread = std::thread::Builder::new().name(format!("queue {}", queue.index)).stack_size(256 << 10).spawn(
            move || {
                let _ends: Sender<Infallible> = ends;
                queue.serve(&epoll, &seen, inbox)
            },
        )?;
        Ok(RunningQueue { thread, end, stop })
    }

    /// Stops the thread once all requests that it has taken are complete, but for those that wait for room.
    pub fn stop(self) -> io::Result<RingStop> {
        self.stop.asked.store(true, Ordering::Release);
        self.stop.wake.write(1)?;
        while self.end.recv_timeout(NOTIFY_PATIENCE) == Err(RecvTimeoutError::Timeout) {
            // Only there: an I/O is never interrupted.
            if self.stop.notifies.load(Ordering::Acquire) {
                process::interrupt(&self.thread);
            }
        }
        self.thread.join().map_err(|_| io::Error::other("the queue's thread panicked"))
    }
}

impl Stop {
    pub(super) fn while_notifying<T>(&self, notify: impl FnOnce() -> T) -> T {
        self.notifies.store(true, Ordering::Release);
        let result = notify();
        self.notifies.store(false, Ordering::Release);
        result
    }
}
