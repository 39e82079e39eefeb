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
use super::control::{self, Command, Controllers, Event, Reply, Report, Said};
use super::conversation::{Conversation, ConversationError, Descriptors};
use super::sandbox;
use super::service::{Service, WorkerError, chain_of};
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
    /// The worker is gone.
    WorkerGone,
    /// Something was wrong with what the front end sent.
    Failed(String),
}

/// Serves front ends until asked to stop by a signal, or, when the endpoint is one connection, until that ends.
///
/// `ready` is called once, when front ends can be served.
pub fn serve(attachment: Attachment, signals: &StopSignals, ready: impl FnOnce()) -> Result<(), KeeperError> {
    let (service, endpoint, name) = start(attachment)?;
    ready();
    Keeper { service: &service, endpoint, controllers: Controllers::none(), signals, name, stops: false }.serve()
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
    sandbox::close_keeper(None)?;
    let (attachment, listener) = receive_attachment(&controller)?;
    let (service, endpoint, name) = match start(attachment) {
        Ok(started) => started,
        Err(error) => {
            controller.send(&Said::Reply(Reply::Failed(chain_of(&error))), &[]).map_err(WorkerError::from)?;
            return Err(error);
        }
    };
    let controllers = Controllers::new(controller, listener).map_err(system("talk to the controller"))?;
    let mut keeper = Keeper { service: &service, endpoint, controllers, signals, name, stops: false };
    keeper.report(false);
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
        offer: Offer { queues: serve.queues, ring_size_max: serve.ring_size_max },
        counters: File::from(counters),
        name: serve.name,
        resumed: serve.resumed,
        kernel_from_vmm: serve.kernel_from_vmm,
    };
    Ok((attachment, listener.into()))
}

fn start(attachment: Attachment) -> Result<(Mutex<Service>, Endpoint, String), KeeperError> {
    let Attachment { part, endpoint, offer, counters, name, resumed, kernel_from_vmm } = attachment;
    let service = Service::start(part, offer, counters, History::new(resumed, kernel_from_vmm))?;
    Ok((Mutex::new(service), endpoint, name))
}

/// The process.
struct Keeper<'k> {
    service: &'k Mutex<Service>,
    endpoint: Endpoint,
    controllers: Controllers,
    signals: &'k StopSignals,
    name: String,
    /// A controller has said to stop.
    stops: bool,
}

/// What ended a wait.
struct Woken {
    stop: bool,
    worker_gone: bool,
    /// Something can be read from what else was waited for.
    other: bool,
}

enum Next {
    Connection { stream: UnixStream, last: bool },
    Stopped,
    WorkerGone,
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
                Next::WorkerGone => {
                    self.replace_dead()?;
                    continue;
                }
            };
            log::info!("a front end has connected");
            self.controllers.say(&Said::Event(Event::Connected), &[]);
            let end = self.serve_connection(stream)?;
            let reason = match &end {
                End::Closed => "the front end has closed the connection".to_owned(),
                End::Stopped => "asked to stop".to_owned(),
                End::WorkerGone => "the connection is ended, because its worker has died".to_owned(),
                End::Failed(reason) => format!("the connection is ended: {reason}"),
            };
            let level = if matches!(end, End::Closed | End::Stopped) { log::Level::Info } else { log::Level::Error };
            log::log!(level, "{reason}");
            self.controllers.say(&Said::Event(Event::Disconnected { reason }), &[]);
            if matches!(end, End::WorkerGone) {
                self.replace_dead()?;
            }
            if matches!(end, End::Stopped) || last {
                break;
            }
        }
        self.service().close()?;
        if self.stops {
            self.controllers.say(&Said::Reply(Reply::Done), &[]);
        }
        Ok(())
    }

    fn replace_dead(&mut self) -> Result<(), KeeperError> {
        self.service().replace_dead()?;
        self.tell_events();
        Ok(())
    }

    /// Tells the controller what has happened.
    fn tell_events(&mut self) {
        for event in self.service().take_events() {
            self.controllers.say(&Said::Event(event), &[]);
        }
    }

    /// Waits until something can be read from `other`, or there is something else to do. What controllers say is done meanwhile; `session`:
    /// the front end that is connected.
    fn wait(
        &mut self,
        other: Option<BorrowedFd<'_>>,
        session: Option<&Mutex<Session<'k>>>,
        timeout_ms: i32,
    ) -> Result<Woken, KeeperError> {
        let service = self.service();
        let [listener, controller] = self.controllers.descriptors();
        let watched = [Some(self.signals.as_fd()), Some(service.worker_end()), listener, controller, other];
        let found = socket::wait_readable(watched, timeout_ms)
            .map_err(|source| KeeperError::System { action: "wait", source })?;
        drop(service);
        let [stop, worker_gone, connects, says, other] = found;
        if connects {
            self.controllers.accept();
        }
        if says
            && !worker_gone
            && let Some((command, descriptors)) = self.controllers.receive()
        {
            self.obey(command, descriptors, session)?;
        }
        Ok(Woken { stop: stop || self.stops, worker_gone, other })
    }

    /// Does what a controller says.
    fn obey(
        &mut self,
        command: Command,
        mut descriptors: Descriptors,
        session: Option<&Mutex<Session<'k>>>,
    ) -> Result<(), KeeperError> {
        let reply = match command {
            Command::Serve(_) => Reply::Failed("it serves already".to_owned()),
            Command::Report => {
                self.report(session.is_some());
                return Ok(());
            }
            Command::Stage(spec) => match control::take_volume(spec, &mut descriptors) {
                Ok(part) => {
                    self.service().stage(Some(part));
                    Reply::Done
                }
                Err(error) => Reply::Failed(error.to_string()),
            },
            Command::Unstage => {
                self.service().stage(None);
                Reply::Done
            }
            Command::Grow { bytes } => {
                let grown = match session {
                    Some(session) => session.lock().expect("no holder of this lock panics").grow(bytes)?,
                    None => self.service().grow(bytes)?,
                };
                match grown {
                    Ok(()) => Reply::Done,
                    Err(error) => Reply::Failed(chain_of(&error)),
                }
            }
            Command::Stop => {
                // Answered when all is durable.
                self.stops = true;
                return Ok(());
            }
        };
        self.controllers.say(&Said::Reply(reply), &[]);
        Ok(())
    }

    /// Tells the controller how things stand.
    fn report(&mut self, connected: bool) {
        let service = self.service();
        let Endpoint::Listening(front_ends) = &self.endpoint else { return };
        let report = Report {
            process: std::process::id(),
            name: self.name.clone(),
            tag: service.part().tag.clone(),
            staged: service.staged().map(|part| part.tag.clone()),
            bytes: service.device().description().bytes,
            connected,
        };
        let base = service.part().base.as_ref().map(AsFd::as_fd);
        let descriptors: Vec<BorrowedFd> =
            [Some(front_ends.as_fd()), Some(service.counters().as_fd()), base].into_iter().flatten().collect();
        self.controllers.say(&Said::Reply(Reply::Report(report)), &descriptors);
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
            if woken.worker_gone {
                return Ok(Next::WorkerGone);
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
            let handled = handler.handle_request();
            self.tell_events();
            match handled {
                Ok(()) => {}
                Err(ProtocolError::Disconnected) => break End::Closed,
                Err(error) => break End::Failed(describe(&error)),
            }
        };
        // A worker that is gone has stopped all rings by that.
        let end = match session.lock().expect("no holder of this lock panics").end() {
            Ok(()) => end,
            Err(WorkerError::Conversation(ConversationError::Gone(_))) => End::WorkerGone,
            Err(error) => return Err(error.into()),
        };
        Ok(end)
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
            if woken.worker_gone {
                return Ok(Some(End::WorkerGone));
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
