//! The keeper: the process that speaks vhost-user with front ends, one after another, and has a worker move the bytes.
//!
//! One thread, and never busy: it waits for a front end's message, a controller's, a signal to stop, or the worker's end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use crate::sys::process::{self, StopSignals};
use crate::sys::sandbox::SandboxError;
use crate::sys::socket::{self, PacketListener};

use super::attachment::{Attachment, Endpoint, Offer};
use super::boot::History;
use super::control::{self, Command, Controllers, Event, Reply, Said};
use super::conversation::Conversation;
use super::sandbox;
use super::service::{Management, Rest, Service, WorkerError, chain_of};
use super::session::Session;

/// Bytes of a message's header, whose last four say how many follow.
const MESSAGE_HEADER_BYTES: usize = 12;
/// Bytes that may follow: what the protocol's largest message has.
const MESSAGE_BODY_BYTES_MAX: usize = vhost::vhost_user::message::MAX_MSG_SIZE;
/// Descriptors that a message may come with.
const MESSAGE_DESCRIPTORS_MAX: usize = vhost::vhost_user::message::MAX_ATTACHED_FD_ENTRIES;
/// The message that brings the descriptor at which the front end takes messages (VHOST_USER_SET_BACKEND_REQ_FD).
const SET_BACKEND_CHANNEL: u32 = 21;
/// How long a front end may take over one message.
const MESSAGE_PATIENCE: Duration = Duration::from_secs(10);

/// Why a backend ends.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The worker said no, or is gone.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// It would serve without its sandbox.
    #[error("cannot close the sandbox (--no-sandbox goes without one, for debugging)")]
    Sandbox(#[from] SandboxError),
    /// The system said no.
    #[error("cannot {action}")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Why a front end's connection ended.
#[derive(Debug)]
enum End {
    /// The front end closed it.
    Closed,
    /// We were asked to stop.
    Stopped,
    /// Something was wrong with what the front end sent.
    Failed(String),
}

/// Serves front ends until asked to stop by a signal, or, when the endpoint is one connection, until that ends.
///
/// `ready` is called once, when front ends can be served.
pub fn serve(attachment: Attachment, signals: &StopSignals, ready: impl FnOnce()) -> Result<(), KeeperError> {
    let (service, endpoint) = start(attachment, signals, Controllers::none())?;
    ready();
    Keeper { service: &service, endpoint }.serve()
}

/// Serves what descriptor 0 says, until it or a later controller says to stop, or a signal does.
///
/// To be called first thing in the process.
pub fn serve_managed(signals: &StopSignals) -> Result<(), KeeperError> {
    let system = |action| move |source| KeeperError::System { action, source };
    process::close_inherited_but(signals).map_err(system("close what was left open"))?;
    process::set_name(c"pando-keeper");
    process::leave_session().map_err(system("leave the daemon's session"))?;
    let controller = process::take_standard_input().map_err(system("take the controller's connection"))?;
    let controller = Conversation::over(controller.into(), "controller");
    // Who says to stop while there is nothing to serve yet has changed its mind.
    let [stop, _] = socket::wait_readable([Some(signals.as_fd()), Some(controller.as_fd())], -1)
        .map_err(system("wait for the controller"))?;
    if stop {
        return Ok(());
    }
    sandbox::close_keeper(None)?;
    let (attachment, listener) = receive_attachment(&controller).inspect_err(|error| {
        // It may be gone as well.
        let _ = controller.send(&Said::Reply(Reply::Failed(chain_of(error))), &[]);
    })?;
    let told = controller.try_clone().map_err(system("talk to the controller"))?;
    let controllers = Controllers::new(controller, listener).map_err(system("talk to the controller"))?;
    let (service, endpoint) = match start(attachment, signals, controllers) {
        Ok(started) => started,
        Err(error) => {
            told.send(&Said::Reply(Reply::Failed(chain_of(&error))), &[]).map_err(WorkerError::from)?;
            return Err(error);
        }
    };
    drop(told);
    let keeper = Keeper { service: &service, endpoint };
    keeper.service().report();
    keeper.serve()
}

fn receive_attachment(controller: &Conversation) -> Result<(Attachment, PacketListener), KeeperError> {
    let (command, mut descriptors) = controller.receive::<Command>().map_err(WorkerError::from)?;
    let Command::Serve(serve) = command else { return Err(WorkerError::Answer.into()) };
    let mut take = || descriptors.take().map_err(WorkerError::from);
    let (front_ends, listener, counters) = (take()?, take()?, take()?);
    let part = control::take_volume(serve.volume, &mut descriptors).map_err(WorkerError::from)?;
    descriptors.finish().map_err(WorkerError::from)?;
    if let Some(level) = log::LevelFilter::iter().nth(serve.log_level.into()) {
        log::set_max_level(level);
    }
    let attachment = Attachment {
        part,
        endpoint: Endpoint::Listening(UnixListener::from(front_ends)),
        offer: Offer {
            queues: serve.queues,
            ring_size_max: serve.ring_size_max,
            tracks_inflight: true,
            hold: Duration::from_millis(serve.hold_ms),
            incoming: false,
        },
        counters: File::from(counters),
        name: serve.name,
        resumed: serve.resumed,
        kernel_from_vmm: serve.kernel_from_vmm,
    };
    Ok((attachment, listener.into()))
}

fn start(
    attachment: Attachment,
    signals: &StopSignals,
    controllers: Controllers,
) -> Result<(Mutex<Service>, Endpoint), KeeperError> {
    let Attachment { part, endpoint, offer, counters, name, resumed, kernel_from_vmm } = attachment;
    let copy = |descriptor: BorrowedFd<'_>| {
        let system = |source| KeeperError::System { action: "copy a descriptor", source };
        descriptor.try_clone_to_owned().map_err(system)
    };
    let front_ends = match &endpoint {
        Endpoint::Listening(listener) => Some(copy(listener.as_fd())?),
        Endpoint::Connected(_) => None,
    };
    let management = Management {
        controllers,
        signals: copy(signals.as_fd())?,
        name,
        front_ends,
        connected: false,
        stops: false,
        stop_is_awaited: false,
    };
    let service = Service::start(part, offer, counters, History::new(resumed, kernel_from_vmm), management)?;
    Ok((Mutex::new(service), endpoint))
}

/// The process.
struct Keeper<'k> {
    service: &'k Mutex<Service>,
    endpoint: Endpoint,
}

/// What ended a wait.
struct Woken {
    stop: bool,
    /// Something can be read from what else was waited for.
    other: bool,
    /// What the front end has given is of no use to another worker.
    failed: Option<String>,
}

enum Next {
    Connection { stream: UnixStream, last: bool },
    Stopped,
}

impl<'k> Keeper<'k> {
    fn service(&self) -> MutexGuard<'k, Service> {
        self.service.lock().expect("no holder of this lock panics")
    }

    fn serve(mut self) -> Result<(), KeeperError> {
        loop {
            let (stream, last) = match self.next_connection()? {
                Next::Connection { stream, last } => (stream, last),
                Next::Stopped => break,
            };
            log::info!("a front end has connected");
            self.service().note_connected(true);
            self.service().tell(Event::Connected);
            let end = self.serve_connection(stream)?;
            let reason = match &end {
                End::Closed => "the front end has closed the connection".to_owned(),
                End::Stopped => "asked to stop".to_owned(),
                End::Failed(reason) => format!("the connection is ended: {reason}"),
            };
            let level = if matches!(end, End::Failed(_)) { log::Level::Error } else { log::Level::Info };
            log::log!(level, "{reason}");
            self.service().note_connected(false);
            self.service().tell(Event::Disconnected { reason });
            if matches!(end, End::Stopped) || last {
                break;
            }
        }
        Ok(self.service().close()?)
    }

    /// Waits until something can be read from `other`, or there is something else to do. What controllers say is done meanwhile, and a worker that
    /// has died is replaced; `session`: the front end that is connected.
    fn wait(
        &mut self,
        other: Option<BorrowedFd<'_>>,
        session: Option<&Mutex<Session<'k>>>,
        timeout_ms: i32,
    ) -> Result<Woken, KeeperError> {
        let session = || session.map(|session| session.lock().expect("no holder of this lock panics"));
        let woken = self.service().wait(other, timeout_ms)?;
        let mut failed = None;
        if let Rest::Grow { bytes } = woken.rest {
            let grown = match session() {
                Some(mut session) => session.grow(bytes),
                None => self.service().grow(bytes),
            };
            self.service().answer_growth(grown);
        } else if woken.worker_gone && !woken.stop {
            let revived = match session() {
                Some(session) => session.revive(),
                None => self.service().replace_dead(),
            };
            match revived {
                Ok(()) | Err(WorkerError::Stopped) => {}
                Err(error @ WorkerError::Refused { .. }) => failed = Some(chain_of(&error)),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Woken { stop: self.service().stops(), other: woken.other, failed })
    }

    fn next_connection(&mut self) -> Result<Next, KeeperError> {
        let system = |source| KeeperError::System { action: "use the connection", source };
        let listener = match &self.endpoint {
            Endpoint::Connected(stream) => {
                return Ok(Next::Connection { stream: stream.try_clone().map_err(system)?, last: true });
            }
            Endpoint::Listening(listener) => listener.try_clone().map_err(system)?,
        };
        loop {
            let woken = self.wait(Some(listener.as_fd()), None, -1)?;
            if woken.stop {
                return Ok(Next::Stopped);
            }
            if !woken.other {
                continue;
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).map_err(system)?;
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

    fn serve_connection(&mut self, stream: UnixStream) -> Result<End, KeeperError> {
        let session = Arc::new(Mutex::new(Session::new(self.service)));
        let looked_at =
            stream.try_clone().map_err(|source| KeeperError::System { action: "use the connection", source })?;
        let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&session));
        let end = loop {
            if let Some(end) = self.wait_for_message(&looked_at, &session)? {
                break end;
            }
            match handler.handle_request() {
                Ok(()) => {}
                Err(ProtocolError::Disconnected) => break End::Closed,
                Err(error) => break End::Failed(describe(&error)),
            }
        };
        match session.lock().expect("no holder of this lock panics").end() {
            Ok(()) => Ok(end),
            // There is no worker, and so no ring that runs.
            Err(WorkerError::Stopped) => Ok(End::Stopped),
            // Of no use to the worker that came last, which knows no more of it than that.
            Err(error @ WorkerError::Refused { .. }) => Ok(End::Failed(chain_of(&error))),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until all of a message is there and there is room for its answer, so that handling it never waits for the front end.
    /// `Some`: there will be none.
    fn wait_for_message(
        &mut self,
        stream: &UnixStream,
        session: &Mutex<Session<'k>>,
    ) -> Result<Option<End>, KeeperError> {
        let mut begun: Option<Instant> = None;
        loop {
            let woken = self.wait(Some(stream.as_fd()), Some(session), -1)?;
            if woken.stop {
                return Ok(Some(End::Stopped));
            }
            if let Some(reason) = woken.failed {
                return Ok(Some(End::Failed(reason)));
            }
            if !woken.other {
                continue;
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
            let number = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let body = number(8) as usize;
            // One that is too long is the protocol's to refuse, by its header.
            let expected = MESSAGE_HEADER_BYTES + if body > MESSAGE_BODY_BYTES_MAX { 0 } else { body };
            let is_whole = found == MESSAGE_HEADER_BYTES && waiting >= expected;
            if is_whole {
                let (mut descriptors, has_more) =
                    socket::peek_descriptors(stream, expected, MESSAGE_DESCRIPTORS_MAX).map_err(broken)?;
                if has_more {
                    // The protocol's code would take the message, call the error a passing one, and wait for what it has taken.
                    return Ok(Some(End::Failed(format!(
                        "a message came with descriptors: expected at most {MESSAGE_DESCRIPTORS_MAX}, found more"
                    ))));
                }
                // The protocol's code keeps it to itself, and has no word for what is said there.
                if number(0) == SET_BACKEND_CHANNEL && descriptors.len() == 1 {
                    let mut session = session.lock().expect("no holder of this lock panics");
                    descriptors.drain(..).for_each(|channel| session.set_channel(channel));
                }
            }
            if is_whole && socket::is_writable(stream).map_err(broken)?
                || socket::is_peer_gone(stream).map_err(broken)?
            {
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
            self.wait(None, Some(session), 2)?;
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
