//! The keeper: the process that speaks vhost-user with front ends, one after another, and has a worker move the bytes.
//!
//! One thread, and never busy: it waits for a front end's message, a signal to stop, or the worker's end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use crate::sys::process::{self, StopSignals};
use crate::sys::socket;

use super::attachment::{Attachment, Endpoint};
use super::device::Device;
use super::order::{Answer, Conversation, DeltaOrder, Opened, Order, OrderError, VolumeOrder};
use super::session::Session;
use super::worker::WORKER_ARGUMENT;

/// Bytes of a message's header, whose last four say how many follow.
const MESSAGE_HEADER_BYTES: usize = 12;
/// Bytes that may follow: what the protocol's largest message has.
const MESSAGE_BODY_BYTES_MAX: usize = vhost::vhost_user::message::MAX_MSG_SIZE;
/// Descriptors that a message may come with.
const MESSAGE_DESCRIPTORS_MAX: usize = vhost::vhost_user::message::MAX_ATTACHED_FD_ENTRIES;
/// How long a front end may take over one message.
const MESSAGE_PATIENCE: Duration = Duration::from_secs(10);

/// Why a backend ends.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The worker could not be started.
    #[error("cannot start the worker")]
    Start(#[source] io::Error),
    /// The worker said no, or is gone.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The system said no.
    #[error("cannot {action}")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Why the worker did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The conversation failed; most often because the worker is gone.
    #[error("the worker did not answer")]
    Conversation(#[from] OrderError),
    /// It said why.
    #[error("{reason}")]
    Refused { reason: String },
    /// It answered something else.
    #[error("the worker answered another question")]
    Answer,
}

/// Why a front end's connection ended.
#[derive(Debug)]
enum End {
    /// The front end closed it.
    Closed,
    /// We were asked to stop.
    Stopped,
    /// The worker is gone.
    WorkerGone,
    /// Something was wrong with what the front end sent.
    Failed(String),
}

/// The keeper's side of a worker process.
pub struct Worker {
    conversation: Conversation,
    process: Mutex<Child>,
}

impl Worker {
    /// Starts a worker for the attachment's volume.
    fn start(attachment: &Attachment) -> Result<(Worker, Opened), KeeperError> {
        let (conversation, theirs) = Conversation::new().map_err(KeeperError::Start)?;
        let process = process::execute_self("pando-blk", WORKER_ARGUMENT, theirs).map_err(KeeperError::Start)?;
        let worker = Worker { conversation, process: Mutex::new(process) };
        let delta = attachment.delta.as_ref();
        let order = VolumeOrder {
            has_base: attachment.base.is_some(),
            delta: delta.map(|delta| DeltaOrder { label: delta.label.clone(), ephemeral: delta.ephemeral }),
            queues: attachment.offer.queues,
            serial: attachment.offer.serial,
            log_level: log::max_level() as u8,
        };
        let files = attachment.base.iter().chain(delta.map(|delta| &delta.file));
        let descriptors: Vec<BorrowedFd> = files.map(AsFd::as_fd).collect();
        match worker.exchange(&Order::Open(order), &descriptors)? {
            Answer::Opened(opened) => Ok((worker, opened)),
            _ => Err(WorkerError::Answer.into()),
        }
    }

    /// Has the worker carry out an order. For each ring that it stopped: which entry of the available ring comes next.
    pub fn ask(&self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Result<Vec<(u16, u16)>, WorkerError> {
        match self.exchange(order, descriptors)? {
            Answer::Done(stopped) => Ok(stopped),
            _ => Err(WorkerError::Answer),
        }
    }

    fn exchange(&self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Result<Answer, WorkerError> {
        self.conversation.send(order, descriptors)?;
        let (answer, descriptors) = self.conversation.receive()?;
        descriptors.finish()?;
        match answer {
            Answer::Failed(reason) => Err(WorkerError::Refused { reason }),
            answer => Ok(answer),
        }
    }

    /// Waits for the process's end, which is near: it closed its side of the conversation.
    fn wait(&self) -> io::Result<ExitStatus> {
        self.process.lock().expect("no holder of this lock panics").wait()
    }
}

/// Serves front ends until asked to stop by a signal, or, when the endpoint is one connection, until that ends.
///
/// `ready` is called once, when front ends can be served.
pub fn serve(mut attachment: Attachment, signals: &StopSignals, ready: impl FnOnce()) -> Result<(), KeeperError> {
    let (mut worker, opened) = Worker::start(&attachment)?;
    let device = Device::new(opened.description(attachment.offer.queues));
    ready();
    loop {
        let (stream, last) = match next_connection(&mut attachment.endpoint, &worker, signals)? {
            Next::Connection { stream, last } => (stream, last),
            Next::Stopped => break,
            Next::WorkerGone => {
                worker = replace(&worker, &attachment)?;
                continue;
            }
        };
        log::info!("a front end has connected");
        let end = serve_connection(stream, &worker, &device, &attachment, signals)?;
        match &end {
            End::Closed => log::info!("the front end has closed the connection"),
            End::Stopped => log::info!("asked to stop"),
            End::WorkerGone => log::error!("the connection is ended, because its worker has died"),
            End::Failed(reason) => log::error!("the connection is ended: {reason}"),
        }
        if matches!(end, End::WorkerGone) {
            worker = replace(&worker, &attachment)?;
        }
        if matches!(end, End::Stopped) || last {
            break;
        }
    }
    worker.ask(&Order::Close, &[])?;
    worker.wait().map_err(|source| KeeperError::System { action: "wait for the worker", source })?;
    Ok(())
}

/// Starts a worker in place of one that has died.
fn replace(dead: &Worker, attachment: &Attachment) -> Result<Worker, KeeperError> {
    let status = dead.wait().map_err(|source| KeeperError::System { action: "wait for the worker", source })?;
    log::error!("the worker has died ({status}); starting another");
    Worker::start(attachment).map(|(worker, _)| worker)
}

enum Next {
    Connection { stream: UnixStream, last: bool },
    Stopped,
    WorkerGone,
}

fn next_connection(endpoint: &mut Endpoint, worker: &Worker, signals: &StopSignals) -> Result<Next, KeeperError> {
    let listener: &UnixListener = match endpoint {
        Endpoint::Connected(stream) => {
            let stream =
                stream.try_clone().map_err(|source| KeeperError::System { action: "use the connection", source })?;
            return Ok(Next::Connection { stream, last: true });
        }
        Endpoint::Listening(listener) => listener,
    };
    loop {
        let [stop, gone, _] = wait([signals.as_fd(), worker.conversation.as_fd(), listener.as_fd()], -1)?;
        if stop {
            return Ok(Next::Stopped);
        }
        if gone {
            return Ok(Next::WorkerGone);
        }
        match listener.accept() {
            Ok((stream, _)) => {
                stream
                    .set_nonblocking(false)
                    .map_err(|source| KeeperError::System { action: "use the connection", source })?;
                return Ok(Next::Connection { stream, last: false });
            }
            // It has gone again, or this process has no room for it right now: there will be another.
            Err(error) => {
                log::warn!("a front end could not be accepted: {error}");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn wait<const N: usize>(descriptors: [BorrowedFd<'_>; N], timeout_ms: i32) -> Result<[bool; N], KeeperError> {
    socket::wait_readable(descriptors, timeout_ms).map_err(|source| KeeperError::System { action: "wait", source })
}

fn serve_connection(
    stream: UnixStream,
    worker: &Worker,
    device: &Device,
    attachment: &Attachment,
    signals: &StopSignals,
) -> Result<End, KeeperError> {
    let session = Arc::new(Mutex::new(Session::new(worker, device, &attachment.offer)));
    let looked_at =
        stream.try_clone().map_err(|source| KeeperError::System { action: "use the connection", source })?;
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&session));
    let end = loop {
        if let Some(end) = wait_for_message(&looked_at, worker, signals)? {
            break end;
        }
        match handler.handle_request() {
            Ok(()) => {}
            Err(ProtocolError::Disconnected) => break End::Closed,
            Err(error) => break End::Failed(describe(&error)),
        }
    };
    // A worker that is gone has stopped all rings by that.
    let end = match session.lock().expect("no holder of this lock panics").end() {
        Ok(()) => end,
        Err(WorkerError::Conversation(OrderError::Gone(_))) => End::WorkerGone,
        Err(error) => return Err(error.into()),
    };
    Ok(end)
}

/// Waits until all of a message is there and there is room for its answer, so that handling it never waits for the front end.
/// `Some`: there will be none.
fn wait_for_message(stream: &UnixStream, worker: &Worker, signals: &StopSignals) -> Result<Option<End>, KeeperError> {
    let mut begun: Option<Instant> = None;
    loop {
        let [stop, gone, _] = wait([signals.as_fd(), worker.conversation.as_fd(), stream.as_fd()], -1)?;
        if stop {
            return Ok(Some(End::Stopped));
        }
        if gone {
            return Ok(Some(End::WorkerGone));
        }
        let mut header = [0; MESSAGE_HEADER_BYTES];
        let found = match socket::peek(stream, &mut header) {
            Ok(0) => return Ok(Some(End::Closed)),
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            // The front end is gone without a word.
            Err(error) => return Ok(Some(End::Failed(format!("it broke: {error}")))),
        };
        let broken = |source| KeeperError::System { action: "look at the connection", source };
        let waiting = socket::bytes_waiting(stream).map_err(broken)?;
        let body = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]) as usize;
        // One that is too long is the protocol's to refuse, by its header.
        let expected = MESSAGE_HEADER_BYTES + if body > MESSAGE_BODY_BYTES_MAX { 0 } else { body };
        let is_whole = found == MESSAGE_HEADER_BYTES && waiting >= expected;
        if is_whole && socket::has_more_descriptors(stream, expected, MESSAGE_DESCRIPTORS_MAX).map_err(broken)? {
            // The protocol's code would take the message, call the error a passing one, and wait for what it has taken.
            return Ok(Some(End::Failed(format!(
                "a message came with descriptors: expected at most {MESSAGE_DESCRIPTORS_MAX}, found more"
            ))));
        }
        if is_whole && socket::is_writable(stream).map_err(broken)? || socket::is_peer_gone(stream).map_err(broken)? {
            return Ok(None);
        }
        if begun.get_or_insert_with(Instant::now).elapsed() > MESSAGE_PATIENCE {
            return Ok(Some(End::Failed(if is_whole {
                "the front end does not read the answers to its messages".to_owned()
            } else {
                format!("the front end sent {waiting} bytes of a message of {expected} and no more")
            })));
        }
        // What is there already would end any wait at once.
        if wait([signals.as_fd(), worker.conversation.as_fd()], 2)?.contains(&true) {
            continue;
        }
    }
}

fn describe(error: &ProtocolError) -> String {
    let inner: &dyn std::error::Error = match error {
        ProtocolError::ReqHandlerError(inner) => inner,
        other => other,
    };
    let causes = std::iter::successors(inner.source(), |error| error.source());
    causes.fold(inner.to_string(), |text, cause| text + ": " + &cause.to_string())
}
