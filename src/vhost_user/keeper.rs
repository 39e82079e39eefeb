//! The keeper: the process that speaks vhost-user with front ends, one after another, and has a worker move the bytes.
//!
//! One thread, and never busy: it waits for a front end's message, a controller's, a signal to stop, or the worker's end.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use crate::sys::process::{self, StopSignals};
use crate::sys::sandbox::SandboxError;
use crate::sys::socket::{self, PacketListener};
use crate::sys::uring::RingFiles;

use super::attachment::{Attachment, Endpoint, Offer};
use super::boot::History;
use super::control::{self, Command, Controllers, Event, Reply, Said};
use super::conversation::Conversation;
use super::handover::{self, HandoverError, Keeping, State};
use super::sandbox;
use super::service::{Equipment, Management, Rest, Service, WorkerError, chain_of};
use super::session::Session;
use super::transfers::Io;

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
    /// The keeper before this one cannot be gone on with.
    #[error(transparent)]
    Handover(#[from] HandoverError),
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
    Keeper { service: &service, endpoint, stream: None }.serve()
}

/// As [`serve`], with a controller, and stopped by whatever makes `signals` readable: a fuzzer is all of a keeper's neighbours.
#[cfg(fuzzing)]
pub fn serve_controlled(
    attachment: Attachment,
    signals: &impl AsFd,
    controllers: Controllers,
) -> Result<(), KeeperError> {
    let (service, endpoint) = start(attachment, signals, controllers)?;
    Keeper { service: &service, endpoint, stream: None }.serve()
}

/// Serves what descriptor 0 says, until it or a later controller says to stop, or a signal does.
///
/// To be called first thing in the process.
pub fn serve_managed(signals: &StopSignals, io: Io, queues: u16) -> Result<(), KeeperError> {
    let system = |action| move |source| KeeperError::System { action, source };
    process::close_inherited_but(&[signals.as_fd().as_raw_fd()]).map_err(system("close what was left open"))?;
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
    let rings = io.rings(queues).map_err(system("make rings for reads"))?;
    sandbox::close_keeper(None)?;
    let (attachment, listener) = receive_attachment(&controller, rings).inspect_err(|error| {
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
    let keeper = Keeper { service: &service, endpoint, stream: None };
    keeper.service().report();
    keeper.serve()
}

/// Goes on as the keeper that executed this program in its place, and whose state is descriptor 0.
///
/// To be called first thing in the process.
pub fn resume(signals: &StopSignals) -> Result<(), KeeperError> {
    process::set_name(c"pando-keeper");
    let state = State::receive()?;
    process::note_boot_id(state.boot);
    if let Some(level) = log::LevelFilter::iter().nth(state.log_level.into()) {
        log::set_max_level(level);
    }
    let endpoint = match (state.endpoint.take()?, state.endpoint_listens) {
        (listener, true) => Endpoint::Listening(listener.into()),
        (stream, false) => Endpoint::Connected(stream.into()),
    };
    let signals = copy(signals.as_fd())?;
    let service = Mutex::new(Service::thaw(state.service, state.further, signals, front_ends_of(&endpoint)?)?);
    let mut keeper = Keeper { service: &service, endpoint, stream: None };
    let Some(session) = state.session else {
        let upgraded = keeper.service().prepare_successor();
        let upgraded = upgraded.and_then(|successor| keeper.service().succeed(successor));
        keeper.answer_upgrade(upgraded)?;
        return keeper.serve();
    };
    let (mut session, stream) = Session::thaw(session, &service)?;
    keeper.service().note_connected(true);
    let successor = keeper.service().prepare_successor();
    let has_begun = successor.is_ok();
    let upgraded = successor.and_then(|successor| session.hand_over(successor));
    // Without a successor the last worker goes on. Once there is one, no ring runs unless all goes well.
    let failed = upgraded.as_ref().err().filter(|_| has_begun).map(|error| chain_of(error));
    keeper.answer_upgrade(upgraded)?;
    let end = match failed {
        Some(reason) => {
            drop(stream);
            end_session(&mut session, End::Failed(reason))?
        }
        None => {
            let (agreed, session) = (session.agreed(), Arc::new(Mutex::new(session)));
            let handler = resumed_handler(&stream, &session, agreed)?;
            keeper.converse(stream, handler, session)?
        }
    };
    if keeper.conclude(end) { Ok(keeper.service().close()?) } else { keeper.serve() }
}

/// The protocol's code, for a connection on which another program has agreed on features with the front end.
///
/// It remembers them by messages alone, so it is sent those once more, from here.
fn resumed_handler<'k>(
    stream: &UnixStream,
    session: &Arc<Mutex<Session<'k>>>,
    [features, protocol_features]: [u64; 2],
) -> Result<Handler<'k>, KeeperError> {
    const GET_FEATURES: u32 = 1;
    const SET_FEATURES: u32 = 2;
    const SET_PROTOCOL_FEATURES: u32 = 16;
    let system = |source| KeeperError::System { action: "go on with the connection", source };
    let (mut ours, theirs) = UnixStream::pair().map_err(system)?;
    let mut handler = BackendReqHandler::from_stream(theirs, Arc::clone(session));
    let messages =
        [(GET_FEATURES, None), (SET_FEATURES, Some(features)), (SET_PROTOCOL_FEATURES, Some(protocol_features))];
    for (request, number) in messages.into_iter().filter(|(_, number)| *number != Some(0)) {
        let body = number.map_or(Vec::new(), |number| number.to_ne_bytes().to_vec());
        // Version 1, and no answer is asked for.
        let header = [request, 1, body.len() as u32].map(u32::to_ne_bytes).concat();
        ours.write_all(&[header, body].concat()).map_err(system)?;
        handler.handle_request().map_err(|error| system(io::Error::other(error)))?;
    }
    // From here on it is the front end's messages that it reads.
    socket::replace(handler.as_raw_fd(), stream).map_err(system)?;
    Ok(handler)
}

fn copy(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, KeeperError> {
    let system = |source| KeeperError::System { action: "copy a descriptor", source };
    descriptor.try_clone_to_owned().map_err(system)
}

fn front_ends_of(endpoint: &Endpoint) -> Result<Option<OwnedFd>, KeeperError> {
    match endpoint {
        Endpoint::Listening(listener) => copy(listener.as_fd()).map(Some),
        Endpoint::Connected(_) => Ok(None),
    }
}

type Handler<'k> = BackendReqHandler<Mutex<Session<'k>>>;

fn receive_attachment(
    controller: &Conversation,
    rings: Option<RingFiles>,
) -> Result<(Attachment, PacketListener), KeeperError> {
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
            poll: Duration::from_micros(serve.poll_us),
            incoming: false,
        },
        equipment: Equipment { counters: File::from(counters), rings },
        name: serve.name,
        resumed: serve.resumed,
        kernel_from_vmm: serve.kernel_from_vmm,
    };
    Ok((attachment, listener.into()))
}

fn start(
    attachment: Attachment,
    signals: &impl AsFd,
    controllers: Controllers,
) -> Result<(Mutex<Service>, Endpoint), KeeperError> {
    let Attachment { part, endpoint, offer, equipment, name, resumed, kernel_from_vmm } = attachment;
    let front_ends = front_ends_of(&endpoint)?;
    let management = Management {
        controllers,
        signals: copy(signals.as_fd())?,
        name,
        front_ends,
        connected: false,
        stops: false,
        stop_is_awaited: false,
    };
    let history = History::new(resumed, kernel_from_vmm);
    let service = Service::start(part, offer, equipment, history, management)?;
    Ok((Mutex::new(service), endpoint))
}

/// The process.
struct Keeper<'k> {
    service: &'k Mutex<Service>,
    endpoint: Endpoint,
    /// The connection, while there is one.
    stream: Option<Arc<UnixStream>>,
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
    /// The connection, and the same once more for the protocol's code.
    Connection {
        stream: UnixStream,
        copy: UnixStream,
        last: bool,
    },
    Stopped,
}

impl<'k> Keeper<'k> {
    fn service(&self) -> MutexGuard<'k, Service> {
        self.service.lock().expect("no holder of this lock panics")
    }

    fn serve(mut self) -> Result<(), KeeperError> {
        loop {
            let (stream, copy, last) = match self.next_connection()? {
                Next::Connection { stream, copy, last } => (stream, copy, last),
                Next::Stopped => break,
            };
            log::info!("a front end has connected");
            self.service().note_connected(true);
            self.service().tell(Event::Connected);
            let session = Arc::new(Mutex::new(Session::new(self.service)));
            let handler = BackendReqHandler::from_stream(copy, Arc::clone(&session));
            let end = self.converse(stream, handler, session)?;
            if self.conclude(end) || last {
                break;
            }
        }
        Ok(self.service().close()?)
    }

    /// Notes the end of a connection. Whether it is the last one.
    fn conclude(&mut self, end: End) -> bool {
        let reason = match &end {
            End::Closed => "the front end has closed the connection".to_owned(),
            End::Stopped => "asked to stop".to_owned(),
            End::Failed(reason) => format!("the connection is ended: {reason}"),
        };
        let level = if matches!(end, End::Failed(_)) { log::Level::Error } else { log::Level::Info };
        log::log!(level, "{reason}");
        self.service().note_connected(false);
        self.service().tell(Event::Disconnected { reason });
        matches!(end, End::Stopped) || matches!(self.endpoint, Endpoint::Connected(_))
    }

    /// Tells the controller what came of an upgrade. An error that ends the keeper is one of the worker's that nothing can be done about.
    fn answer_upgrade(&self, upgraded: Result<(), WorkerError>) -> Result<(), KeeperError> {
        match upgraded {
            Ok(()) => {
                log::info!("upgraded to version {}", env!("CARGO_PKG_VERSION"));
                self.service().answer_upgrade(Ok(()));
            }
            Err(error) => self.service().answer_upgrade(Err(&error)),
        }
        Ok(())
    }

    /// Executes another program in place of this one. Returns only when that fails.
    fn upgrade(&self, program: &OwnedFd, session: Option<&Session<'k>>) -> Result<HandoverError, KeeperError> {
        let mut keeping = Keeping::default();
        let boot = process::boot_id().map_err(|source| KeeperError::System { action: "find the boot id", source })?;
        let (endpoint, endpoint_listens) = match &self.endpoint {
            Endpoint::Listening(listener) => (keeping.keep(listener), true),
            Endpoint::Connected(stream) => (keeping.keep(stream), false),
        };
        let session = match (session, &self.stream) {
            (Some(session), Some(stream)) => Some(session.freeze(stream.as_ref(), &mut keeping)),
            _ => None,
        };
        let mut service = self.service();
        service.bury()?;
        let further = service.freeze_further(&mut keeping);
        let state = State {
            sandbox: sandbox::is_closed(),
            log_level: log::max_level() as u8,
            boot,
            endpoint,
            endpoint_listens,
            service: service.freeze(&mut keeping),
            session,
            further,
        };
        drop(service);
        Ok(handover::execute(program.as_fd(), &state, &keeping, sandbox::further_arguments()))
    }

    /// Waits until something can be read from `other`, or there is something else to do. What controllers say is done meanwhile, and a worker that
    /// has died is replaced; `session`: the front end that is connected.
    fn wait(
        &self,
        other: Option<BorrowedFd<'_>>,
        session: Option<&Mutex<Session<'k>>>,
        timeout_ms: i32,
    ) -> Result<Woken, KeeperError> {
        let session = || session.map(|session| session.lock().expect("no holder of this lock panics"));
        let woken = self.service().wait(other, timeout_ms)?;
        let mut failed = None;
        if let Rest::Grow { bytes } = woken.rest {
            let (grown, resumed) = match session() {
                Some(mut session) => session.grow(bytes),
                None => (self.service().grow(bytes), Ok(())),
            };
            self.service().answer_growth(grown);
            failed = resumed.err().map(|error| describe(&error));
        } else if let Rest::Upgrade { program } = &woken.rest {
            let error = self.upgrade(program, session().as_deref())?;
            self.service().answer_upgrade(Err(&error));
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

    fn next_connection(&self) -> Result<Next, KeeperError> {
        let system = |source| KeeperError::System { action: "use the connection", source };
        let listener = match &self.endpoint {
            Endpoint::Connected(stream) => {
                let copy = || stream.try_clone().map_err(system);
                return Ok(Next::Connection { stream: copy()?, copy: copy()?, last: true });
            }
            Endpoint::Listening(listener) => listener,
        };
        loop {
            let woken = self.wait(Some(listener.as_fd()), None, -1)?;
            if woken.stop {
                return Ok(Next::Stopped);
            }
            if !woken.other {
                continue;
            }
            match listener.accept().and_then(|(stream, _)| stream.try_clone().map(|copy| (stream, copy))) {
                Ok((stream, copy)) => {
                    stream.set_nonblocking(false).map_err(system)?;
                    return Ok(Next::Connection { stream, copy, last: false });
                }
                // It has gone again, or this process has no room for it right now: there will be another.
                Err(error) => {
                    log::warn!("a front end could not be accepted: {error}");
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// Answers a front end's messages until there are no more.
    fn converse(
        &mut self,
        stream: UnixStream,
        mut handler: Handler<'k>,
        session: Arc<Mutex<Session<'k>>>,
    ) -> Result<End, KeeperError> {
        let stream = Arc::new(stream);
        self.stream = Some(Arc::clone(&stream));
        let end = loop {
            if let Some(end) = self.wait_for_message(&stream, &session)? {
                break end;
            }
            match handler.handle_request() {
                Ok(()) => {}
                Err(ProtocolError::Disconnected) => break End::Closed,
                Err(error) => break End::Failed(describe(&error)),
            }
        };
        self.stream = None;
        end_session(&mut session.lock().expect("no holder of this lock panics"), end)
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

/// Ends what a front end has begun whose connection ends so, and says how it does.
fn end_session(session: &mut Session<'_>, end: End) -> Result<End, KeeperError> {
    match session.end() {
        Ok(()) => Ok(end),
        // There is no worker, and so no ring that runs.
        Err(WorkerError::Stopped) => Ok(End::Stopped),
        // Of no use to the worker that came last, which knows no more of it than that.
        Err(error @ WorkerError::Refused { .. }) => Ok(End::Failed(chain_of(&error))),
        Err(error) => Err(error.into()),
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
