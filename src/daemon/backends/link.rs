//! [`Link`]: the daemon's connection to one keeper. Orders go one at a time and wait for their replies; events come by themselves.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use crate::sys::socket::PacketSocket;
use crate::sys::watch::{Watched, watch};
use crate::vhost_user::control::{Command, Event, Reply, Said};
use crate::vhost_user::conversation::{Conversation, ConversationError, Descriptors};

use super::BackendError;

/// A connection to a keeper.
pub struct Link {
    conversation: Arc<Conversation>,
    /// Replies, and with them whoever waits for one.
    replies: Mutex<Receiver<(Reply, Descriptors)>>,
    listening: AbortHandle,
    ended: Arc<AtomicBool>,
    /// Whether a front end is connected, by what the keeper has said last.
    has_front_end: Arc<AtomicBool>,
    /// The keeper's process, as it says.
    process: Mutex<Option<Pid>>,
}

impl Link {
    /// Takes a connection over. `said` is told of events, and, with `None`, of the end.
    pub fn new(
        socket: PacketSocket,
        runtime: &Handle,
        said: impl Fn(Option<Event>) + Send + Sync + 'static,
    ) -> io::Result<Arc<Link>> {
        socket.set_nonblocking(true)?;
        let conversation = Arc::new(Conversation::over(socket, "backend"));
        let _entered = runtime.enter();
        let watched = watch(conversation.socket())?;
        let (replies, receiver) = channel();
        let (heard, ended) = (Arc::clone(&conversation), Arc::new(AtomicBool::new(false)));
        let (end, has_front_end) = (Arc::clone(&ended), Arc::new(AtomicBool::new(false)));
        let front_end = Arc::clone(&has_front_end);
        let listening = runtime.spawn(async move {
            listen(&watched, &heard, &replies, &front_end, &said).await;
            end.store(true, Ordering::Release);
            drop(replies);
            said(None);
        });
        let listening = listening.abort_handle();
        Ok(Arc::new(Link {
            conversation,
            replies: Mutex::new(receiver),
            listening,
            ended,
            has_front_end,
            process: Mutex::default(),
        }))
    }

    /// Gives an order and waits for the reply to it.
    pub fn ask(
        &self,
        command: &Command,
        descriptors: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<(Reply, Descriptors), BackendError> {
        let silent = |reason: String| BackendError::Silent { reason };
        let replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
        // What came too late for the last one who asked is nobody's.
        while replies.try_recv().is_ok() {}
        let deadline = Instant::now() + patience;
        loop {
            match self.conversation.send(command, descriptors) {
                Ok(()) => break,
                Err(error) if error.would_block() && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(ConversationError::Gone(_)) => return Err(BackendError::Gone),
                Err(error) => return Err(silent(error.to_string())),
            }
        }
        match replies.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((Reply::Failed(reason), _)) => Err(BackendError::Refused { reason }),
            Ok(reply) => Ok(reply),
            Err(RecvTimeoutError::Timeout) => Err(silent(format!("no reply within {} s", patience.as_secs()))),
            Err(RecvTimeoutError::Disconnected) => Err(BackendError::Gone),
        }
    }
}

impl Link {
    /// Whether the connection has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Whether a front end is connected to the backend.
    pub fn has_front_end(&self) -> bool {
        self.has_front_end.load(Ordering::Acquire)
    }

    /// Notes which process the keeper is.
    pub fn note_process(&self, process: u32) {
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = Pid::from_raw(process.cast_signed());
    }

    /// Kills the keeper, and its worker with it. What it has completed is not lost.
    pub fn kill(&self) {
        let process = *self.process.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(process) = process.filter(|_| !self.has_ended()) {
            // Its connection is open, so the number is still its own.
            let _ = kill_process(process, Signal::KILL);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

async fn listen(
    watched: &AsyncFd<Watched>,
    conversation: &Conversation,
    replies: &Sender<(Reply, Descriptors)>,
    has_front_end: &AtomicBool,
    said: &(impl Fn(Option<Event>) + Sync),
) {
    // Here, where reports and events come in the order in which they were said: a front end may connect before whoever asked for the
    // report has seen it.
    let note = |said: &Said| match said {
        Said::Reply(Reply::Report(report)) => has_front_end.store(report.connected, Ordering::Release),
        Said::Event(Event::Connected) => has_front_end.store(true, Ordering::Release),
        Said::Event(Event::Disconnected { .. }) => has_front_end.store(false, Ordering::Release),
        Said::Reply(_) | Said::Event(_) => {}
    };
    loop {
        let Ok(mut ready) = watched.readable().await else { return };
        // Until nothing is left, so that the next wake-up is for something new.
        let received = conversation.receive::<Said>();
        if let Ok((said, _)) = &received {
            note(said);
        }
        match received {
            Ok((Said::Reply(reply), descriptors)) => _ = replies.send((reply, descriptors)),
            Ok((Said::Event(event), _)) => said(Some(event)),
            Err(error) if error.would_block() => ready.clear_ready(),
            Err(ConversationError::Gone(_)) => return,
            Err(error) => {
                log::error!("a backend says what cannot be understood: {error}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::control::Report;

    #[test]
    fn a_front_end_that_comes_as_the_backend_starts_is_known() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (ours, theirs) = PacketSocket::pair().unwrap();
        let link = Link::new(ours, runtime.handle(), |_| {}).unwrap();
        let keeper = std::thread::spawn(move || {
            let daemon = Conversation::over(theirs, "daemon");
            let hear = || drop(daemon.receive::<Command>().unwrap());
            let say = |said| daemon.send(&said, &[]).unwrap();
            hear();
            say(Said::Reply(Reply::Report(Report {
                process: 1,
                name: "vm/volume".to_owned(),
                tag: "none.0".to_owned(),
                staged: None,
                bytes: 512,
                connected: false,
                held: false,
                version: String::new(),
            })));
            say(Said::Event(Event::Connected));
            hear();
            say(Said::Reply(Reply::Done));
            hear();
            say(Said::Event(Event::Disconnected { reason: String::new() }));
            say(Said::Reply(Reply::Done));
        });
        let ask = |command| link.ask(&command, &[], Duration::from_secs(60)).unwrap();
        ask(Command::Report);
        ask(Command::Unstage);
        assert!(link.has_front_end());
        ask(Command::Unstage);
        assert!(!link.has_front_end());
        keeper.join().unwrap();
    }
}
