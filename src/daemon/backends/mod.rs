//! The backends' processes: started, adopted, told what to do, and listened to. Knows no database and no name of an image but its digest.
//!
//! A backend goes on without the daemon. What the daemon has of one is a connection to its keeper ([`link`]), and what it may need to put
//! another in its place: the socket that front ends connect to, which therefore stays bound, and the counters.
//!
//! **Opened once**: an image's file is opened when the first backend needs it, and that very descriptor is given to every other; a daemon
//! that returns gets it back from the backends that it adopts.

mod link;
mod process;
mod users;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::mpsc::UnboundedSender;

use crate::digest::Digest;
use crate::sys::socket::{PacketListener, PacketSocket};
use crate::units::ByteCount;
use crate::vhost_user::attachment::AttachedDelta;
use crate::vhost_user::control::{Command, Event, Reply, Report, Serve, VolumeSpec};
use crate::vhost_user::counters::{self, Reader, Snapshot};
use crate::vhost_user::device::serial_from;

use link::Link;
pub use process::Manner;
use process::Starter;
pub use users::UidRange;

/// The largest ring that is taken, in descriptors.
const RING_SIZE_MAX: u16 = 32768;
/// Rings whose counters are read: as many as can be offered.
const QUEUES_COUNTED: u16 = 256;
/// How long a backend may take over an order that takes it no time.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to make everything durable.
const END_PATIENCE: Duration = Duration::from_secs(120);

/// What the daemon has open for each attachment for as long as it lasts: the connection to its keeper, the socket that front ends connect to,
/// and its counters.
pub const DESCRIPTORS_EACH: u64 = 3;
/// What is kept for all else: the database, images, clients of the API, and what is open for an instant while something is attached.
const DESCRIPTORS_KEPT: u64 = 512;

/// How many volumes can be attached at once by a daemon that may have so many descriptors.
fn attachments_max(descriptors_max: u64) -> u64 {
    (descriptors_max - DESCRIPTORS_KEPT.min(descriptors_max / 2)) / DESCRIPTORS_EACH
}

/// Why a backend did not do what it was to.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The system refused.
    #[error("cannot {action} {path}")]
    Io {
        action: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
    /// A socket's path is limited.
    #[error(
        "the socket {path} has a path of {found} bytes: expected at most 107; a shorter --run-dir, or shorter names"
    )]
    PathTooLong { path: String, found: usize },
    /// Each attachment takes descriptors, and clients of the API have to be answered as well.
    #[error(
        "{found} volumes are attached: expected fewer than {expected}, as many as {descriptors} open descriptors are enough for; detach something, or \
         start the daemon with a higher limit (LimitNOFILE= of its unit, ulimit -Hn of its shell)"
    )]
    TooMany { found: u64, expected: u64, descriptors: u64 },
    /// It said no.
    #[error("the backend refused: {reason}")]
    Refused { reason: String },
    /// It says nothing, or nothing that can be understood.
    #[error("the backend does not answer: {reason}")]
    Silent { reason: String },
    /// It has died. Whoever waits for that is told so, and starts another.
    #[error("the backend has died")]
    Gone,
    /// There is none.
    #[error("the backend is not there; it may be starting again")]
    Absent,
}

/// What backends have to say by themselves.
#[derive(Debug)]
pub enum Notice {
    /// The connection has ended.
    Gone { attachment: i64 },
    /// What was staged is served now.
    Switched { attachment: i64, tag: String, bytes: u64 },
    /// What was staged cannot be served.
    SwitchFailed { attachment: i64, reason: String },
    /// A front end has come or gone.
    Connected { attachment: i64, connected: bool, detail: String },
    /// The worker died, and the keeper has another.
    WorkerDied { attachment: i64, status: String },
    /// Something else has happened that an operator wants to know of.
    Incident { attachment: i64, kind: &'static str, detail: String },
}

impl Notice {
    /// Whose backend it is.
    pub fn attachment(&self) -> i64 {
        match *self {
            Notice::Gone { attachment }
            | Notice::Switched { attachment, .. }
            | Notice::SwitchFailed { attachment, .. }
            | Notice::Connected { attachment, .. }
            | Notice::WorkerDied { attachment, .. }
            | Notice::Incident { attachment, .. } => attachment,
        }
    }
}

/// What a backend is to serve, open.
pub struct Part {
    /// What it is to call it.
    pub tag: String,
    /// The image.
    pub image: Option<Digest>,
    /// Its file.
    pub base: Option<Arc<File>>,
    /// The delta, locked.
    pub delta: Option<AttachedDelta>,
    /// What GET_ID answers.
    pub serial: String,
}

/// All that a backend is started with.
pub struct Launch {
    /// Number of the attachment.
    pub attachment: i64,
    /// What to call it in logs.
    pub name: String,
    /// Where front ends are to find it.
    pub socket: PathBuf,
    /// Where a daemon is to find it.
    pub control: PathBuf,
    /// What to serve.
    pub part: Part,
    /// How many rings to offer.
    pub queues: u16,
    /// How long a write waits while the file system of the delta is full, in milliseconds; 0: not at all.
    pub hold_ms: u64,
    /// Whether a guest may be running from it.
    pub resumed: bool,
    /// Whether the VMM loads the guest's kernel.
    pub kernel_from_vmm: bool,
    /// Whom it runs as, if not as this process does.
    pub uid: Option<u32>,
}

/// What is known of a backend that runs.
#[derive(Clone, Debug)]
pub struct Live {
    /// Size of the volume.
    pub bytes: u64,
    /// Whether a front end is connected.
    pub connected: bool,
    /// The keeper.
    pub process: u32,
}

/// What an adopted backend serves.
pub struct Adopted {
    /// What it calls that.
    pub tag: String,
    /// Whether something is staged.
    pub staged: bool,
}

/// A backend that runs.
struct Backend {
    link: Arc<Link>,
    live: Mutex<Live>,
    counters: Reader,
    /// What is served, kept open for the next backend.
    image: Mutex<Option<(Digest, Arc<File>)>>,
    /// What is to be served next.
    staged: Mutex<Option<(Digest, Arc<File>)>>,
}

/// All backends of this host.
pub struct Backends {
    manner: Manner,
    starter: Starter,
    /// How many descriptors this process may have.
    descriptors_max: u64,
    runtime: Handle,
    notices: UnboundedSender<Notice>,
    running: Mutex<BTreeMap<i64, Arc<Backend>>>,
    images: Mutex<HashMap<Digest, Arc<File>>>,
    /// Front ends' sockets, bound for as long as a volume is attached.
    listeners: Mutex<HashMap<i64, UnixListener>>,
    deaths: Mutex<HashMap<i64, Vec<Instant>>>,
    /// Counters of attachments, which outlive their backends.
    counters: Mutex<HashMap<i64, File>>,
    is_ending: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Backends {
    /// None yet. `descriptors_max`: how many this process may have.
    pub fn new(
        manner: Manner,
        descriptors_max: u64,
        runtime: Handle,
        notices: UnboundedSender<Notice>,
    ) -> io::Result<Backends> {
        Ok(Backends {
            manner,
            starter: Starter::new(&runtime)?,
            descriptors_max,
            runtime,
            notices,
            running: Mutex::default(),
            images: Mutex::default(),
            listeners: Mutex::default(),
            deaths: Mutex::default(),
            counters: Mutex::default(),
            is_ending: AtomicBool::new(false),
        })
    }

    /// Notes that this process is about to end: whoever talks to backends is cut off from them.
    pub fn note_end(&self) {
        self.is_ending.store(true, Ordering::Release);
    }

    /// Whether it is.
    pub fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::Acquire)
    }

    /// Whom backends run as, each as another, if not as this process does.
    pub fn users(&self) -> Option<UidRange> {
        self.manner.users
    }

    /// The one opening of an image, made by `open` when there is none.
    pub fn image<E>(&self, digest: Digest, open: impl FnOnce() -> Result<File, E>) -> Result<Arc<File>, E> {
        let mut images = lock(&self.images);
        if let Some(image) = images.get(&digest) {
            return Ok(Arc::clone(image));
        }
        let image = Arc::new(open()?);
        images.insert(digest, Arc::clone(&image));
        Ok(image)
    }

    /// The one opening of an image, if there is one.
    pub fn open_image(&self, digest: Digest) -> Option<Arc<File>> {
        lock(&self.images).get(&digest).cloned()
    }

    /// Closes the images that nothing is served from and nothing will be.
    pub fn release_images(&self, is_served: impl Fn(Digest) -> bool) {
        lock(&self.images).retain(|digest, image| Arc::strong_count(image) > 1 || is_served(*digest));
    }

    /// Starts a backend; front ends can connect when this returns.
    pub fn start(&self, launch: Launch) -> Result<(), BackendError> {
        let id = launch.attachment;
        let io = |action, path: &Path| {
            let path = path.display().to_string();
            move |source| BackendError::Io { action, path, source }
        };
        let listener = self.front_end_listener(id, &launch.socket)?;
        // Nobody is behind it any more: whoever was has ended.
        remove_socket(&launch.control)?;
        check_path(&launch.control)?;
        let controllers = PacketListener::bind(&launch.control).map_err(io("listen at", &launch.control))?;
        let counters = self.counters_of(id).map_err(io("make counters for", &launch.socket))?;

        let (socket, process) =
            self.starter.start(&self.manner, launch.queues, launch.uid).map_err(io("execute", &self.manner.program))?;
        let link = self.link(id, socket).map_err(io("talk to", &self.manner.program))?;
        link.note_process(process);
        let command = Command::Serve(Serve {
            volume: spec_of(&launch.part),
            queues: launch.queues,
            ring_size_max: RING_SIZE_MAX,
            log_level: log::max_level() as u8,
            name: launch.name.clone(),
            resumed: launch.resumed,
            hold_ms: launch.hold_ms,
            poll_us: self.manner.poll_us,
            kernel_from_vmm: launch.kernel_from_vmm,
        });
        let mut descriptors = vec![listener.as_fd(), controllers.as_fd(), counters.as_fd()];
        descriptors.extend(files_of(&launch.part));
        let report = match link.ask(&command, &descriptors, PATIENCE) {
            Ok((Reply::Report(report), _)) => report,
            other => {
                // It may have ended by itself.
                link.kill();
                return Err(other.err().unwrap_or(BackendError::Silent { reason: "another answer came".to_owned() }));
            }
        };
        let image = launch.part.image.zip(launch.part.base);
        self.note(id, link, &report, &counters, image).map_err(io("read the counters of", &launch.socket))
    }

    fn link(&self, attachment: i64, socket: PacketSocket) -> io::Result<Arc<Link>> {
        let notices = self.notices.clone();
        Link::new(socket, &self.runtime, move |event| {
            let notice = match event {
                None => Notice::Gone { attachment },
                Some(Event::Switched { tag, bytes }) => Notice::Switched { attachment, tag, bytes },
                Some(Event::SwitchFailed { tag: _, reason }) => Notice::SwitchFailed { attachment, reason },
                Some(Event::Connected) => Notice::Connected { attachment, connected: true, detail: String::new() },
                Some(Event::Disconnected { reason }) => {
                    Notice::Connected { attachment, connected: false, detail: reason }
                }
                Some(Event::WorkerDied { status }) => Notice::WorkerDied { attachment, status },
                Some(Event::WorkerHeld { seconds }) => {
                    let detail = format!(
                        "too many died one after another; the next is tried after {seconds} s, or when told to"
                    );
                    Notice::Incident { attachment, kind: "worker.held", detail }
                }
                Some(Event::Full { held }) => {
                    let detail = format!("{held} requests wait for room in the delta's file system");
                    Notice::Incident { attachment, kind: "volume.full", detail }
                }
                Some(Event::SpaceBack) => {
                    Notice::Incident { attachment, kind: "volume.space-back", detail: "no request waits".to_owned() }
                }
                Some(Event::LowSpace { bytes }) => {
                    let detail = format!("the delta's file system has {} left", ByteCount(bytes));
                    Notice::Incident { attachment, kind: "volume.low-space", detail }
                }
                Some(Event::WorkerResumed) => {
                    Notice::Incident { attachment, kind: "worker.resumed", detail: String::new() }
                }
                Some(Event::Latched { file }) => {
                    let detail =
                        format!("a sync of {file} failed: writes and flushes are refused until it is attached anew");
                    Notice::Incident { attachment, kind: "volume.latched", detail }
                }
            };
            // Nobody listens any more when the daemon ends.
            let _ = notices.send(notice);
        })
    }

    fn note(
        &self,
        id: i64,
        link: Arc<Link>,
        report: &Report,
        counters: &File,
        image: Option<(Digest, Arc<File>)>,
    ) -> io::Result<()> {
        link.note_process(report.process);
        let live = Live { bytes: report.bytes, connected: report.connected, process: report.process };
        let counters = Reader::open(counters, QUEUES_COUNTED)?;
        let backend =
            Backend { link, live: Mutex::new(live), counters, image: Mutex::new(image), staged: Mutex::default() };
        lock(&self.running).insert(id, Arc::new(backend));
        Ok(())
    }

    /// The socket that front ends connect to: bound once, for as long as the volume is attached.
    fn front_end_listener(&self, id: i64, path: &Path) -> Result<UnixListener, BackendError> {
        let io = |source| BackendError::Io { action: "listen at", path: path.display().to_string(), source };
        let mut listeners = lock(&self.listeners);
        if let Some(listener) = listeners.get(&id) {
            return listener.try_clone().map_err(io);
        }
        self.check_room(listeners.len())?;
        check_path(path)?;
        remove_socket(path)?;
        let listener = UnixListener::bind(path).map_err(io)?;
        listener.set_nonblocking(true).map_err(io)?;
        let copy = listener.try_clone().map_err(io)?;
        listeners.insert(id, listener);
        Ok(copy)
    }

    /// Sees that one more can be attached where so many are.
    fn check_room(&self, attached: usize) -> Result<(), BackendError> {
        let (found, expected) = (attached as u64, attachments_max(self.descriptors_max));
        if found < expected {
            return Ok(());
        }
        Err(BackendError::TooMany { found, expected, descriptors: self.descriptors_max })
    }

    /// An attachment's counters, which go on over its backends' deaths.
    fn counters_of(&self, id: i64) -> io::Result<File> {
        let mut counters = lock(&self.counters);
        if let Some(file) = counters.get(&id) {
            return file.try_clone();
        }
        let file = counters::create()?;
        let copy = file.try_clone()?;
        counters.insert(id, file);
        Ok(copy)
    }

    /// Finds a backend again that an earlier daemon has started; `None` when there is none.
    pub fn adopt(
        &self,
        id: i64,
        name: &str,
        control: &Path,
        image: Option<Digest>,
    ) -> Result<Option<Adopted>, BackendError> {
        let io = |source| BackendError::Io { action: "connect to", path: control.display().to_string(), source };
        let socket = match PacketSocket::connect(control) {
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
                return Ok(None);
            }
            socket => socket.map_err(io)?,
        };
        let attached = {
            let listeners = lock(&self.listeners);
            listeners.len() - usize::from(listeners.contains_key(&id))
        };
        self.check_room(attached)?;
        let link = self.link(id, socket).map_err(io)?;
        let (Reply::Report(report), descriptors) = link.ask(&Command::Report, &[], PATIENCE)? else {
            return Err(BackendError::Silent { reason: "another answer came".to_owned() });
        };
        if report.name != name {
            let reason = format!("{} is the backend of {}, expected {name}", control.display(), report.name);
            return Err(BackendError::Silent { reason });
        }
        let mut descriptors = descriptors;
        let (Ok(listener), Ok(counters)) = (descriptors.take(), descriptors.take()) else {
            return Err(BackendError::Silent { reason: "its descriptors did not come".to_owned() });
        };
        let counters = File::from(counters);
        let served = read_image(&report.tag).or(image);
        // The very opening that other backends have, unless another one is known already.
        let base = served.zip(descriptors.take().ok()).map(|(digest, base)| {
            let known = self.image(digest, || Ok::<_, std::convert::Infallible>(File::from(base)));
            (digest, known.unwrap_or_else(|never| match never {}))
        });
        lock(&self.listeners).insert(id, UnixListener::from(listener));
        self.note(id, link, &report, &counters, base).map_err(io)?;
        lock(&self.counters).insert(id, counters);
        Ok(Some(Adopted { tag: report.tag, staged: report.staged.is_some() }))
    }

    fn running(&self, id: i64) -> Result<Arc<Backend>, BackendError> {
        lock(&self.running).get(&id).cloned().ok_or(BackendError::Absent)
    }

    /// What is known of a backend; `None` when it does not run.
    pub fn view(&self, id: i64) -> Option<Live> {
        let backend = self.running(id).ok()?;
        let live = lock(&backend.live).clone();
        Some(Live { connected: backend.link.has_front_end(), ..live })
    }

    /// Whether a backend is at the other end of its connection.
    pub fn is_connected(&self, id: i64) -> bool {
        self.running(id).is_ok_and(|backend| !backend.link.has_ended())
    }

    /// Whether a backend has said how it stands, so that whatever it has said since was heard too.
    pub fn was_heard(&self, id: i64) -> bool {
        self.running(id).is_ok()
    }

    /// Notes that a backend's connection has ended.
    pub fn forget(&self, id: i64) {
        lock(&self.running).remove(&id);
    }

    /// Notes that what was staged is served.
    pub fn note_switched(&self, id: i64, bytes: u64) {
        if let Ok(backend) = self.running(id) {
            lock(&backend.live).bytes = bytes;
            if let Some(staged) = lock(&backend.staged).take() {
                *lock(&backend.image) = Some(staged);
            }
        }
    }

    /// Has a backend serve something else from its guest's next boot on.
    pub fn stage(&self, id: i64, part: Part) -> Result<(), BackendError> {
        let backend = self.running(id)?;
        let descriptors: Vec<BorrowedFd> = files_of(&part).collect();
        backend.link.ask(&Command::Stage(spec_of(&part)), &descriptors, PATIENCE)?;
        *lock(&backend.staged) = part.image.zip(part.base);
        Ok(())
    }

    /// Has a backend forget what was staged.
    pub fn unstage(&self, id: i64) -> Result<(), BackendError> {
        let backend = self.running(id)?;
        backend.link.ask(&Command::Unstage, &[], PATIENCE)?;
        Ok(())
    }

    /// What a backend serves.
    pub fn report(&self, id: i64) -> Result<Report, BackendError> {
        match self.running(id)?.link.ask(&Command::Report, &[], PATIENCE)? {
            (Reply::Report(report), _) => Ok(report),
            _ => Err(BackendError::Silent { reason: "another answer came".to_owned() }),
        }
    }

    /// The backend's program.
    pub fn program(&self) -> &Path {
        &self.manner.program
    }

    /// Has a backend go on with another program.
    pub fn upgrade(&self, id: i64, program: &File) -> Result<(), BackendError> {
        self.running(id)?.link.ask(&Command::Upgrade, &[program.as_fd()], END_PATIENCE)?;
        Ok(())
    }

    /// Has a backend try another worker at once.
    pub fn resume(&self, id: i64) -> Result<(), BackendError> {
        self.running(id)?.link.ask(&Command::Resume, &[], PATIENCE)?;
        Ok(())
    }

    /// Makes a volume larger under its guest.
    pub fn grow(&self, id: i64, bytes: u64) -> Result<(), BackendError> {
        let backend = self.running(id)?;
        backend.link.ask(&Command::Grow { bytes }, &[], END_PATIENCE)?;
        lock(&backend.live).bytes = bytes;
        Ok(())
    }

    /// Ends a backend in good order, wherever it is; nothing when there is none. What the guest wrote is durable then.
    pub fn stop(&self, id: i64, control: &Path) -> Result<(), BackendError> {
        let io = |source| BackendError::Io { action: "connect to", path: control.display().to_string(), source };
        let known = lock(&self.running).remove(&id);
        let link = match known {
            Some(backend) => Some(Arc::clone(&backend.link)),
            None => match PacketSocket::connect(control) {
                Ok(socket) => Some(self.link(id, socket).map_err(io)?),
                Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
                    None
                }
                Err(error) => return Err(io(error)),
            },
        };
        if let Some(link) = &link
            && let Ok((Reply::Report(report), _)) = link.ask(&Command::Report, &[], PATIENCE)
        {
            link.note_process(report.process);
        }
        if let Some(link) = link
            && let Err(error) = link.ask(&Command::Stop, &[], END_PATIENCE)
        {
            // Completed writes survive its death; that it cannot say goodbye is for the log.
            log::warn!("{}: {error}; it is killed", control.display());
            link.kill();
        }
        lock(&self.listeners).remove(&id);
        lock(&self.counters).remove(&id);
        lock(&self.deaths).remove(&id);
        Ok(())
    }

    /// Counts a death, and says how many there were in the last `window`.
    pub fn count_death(&self, id: i64, window: Duration) -> usize {
        let mut deaths = lock(&self.deaths);
        let deaths = deaths.entry(id).or_default();
        deaths.retain(|death| death.elapsed() < window);
        deaths.push(Instant::now());
        deaths.len()
    }

    /// What backends have counted, by attachment.
    pub fn snapshots(&self) -> Vec<(i64, Snapshot)> {
        let running: Vec<_> = lock(&self.running).iter().map(|(id, backend)| (*id, Arc::clone(backend))).collect();
        running.into_iter().map(|(id, backend)| (id, backend.counters.snapshot())).collect()
    }
}

fn spec_of(part: &Part) -> VolumeSpec {
    VolumeSpec {
        tag: part.tag.clone(),
        base: part.base.as_ref().and(part.image).map(|image| format!("the image {image}")),
        delta: part.delta.as_ref().map(AttachedDelta::order),
        serial: Some(serial_from(&part.serial)),
        direct: part.delta.as_ref().is_some_and(AttachedDelta::is_direct),
    }
}

fn files_of(part: &Part) -> impl Iterator<Item = BorrowedFd<'_>> {
    let base = part.base.as_ref().map(|base| base.as_fd());
    base.into_iter().chain(part.delta.iter().flat_map(AttachedDelta::descriptors))
}

/// The image that a tag names.
fn read_image(tag: &str) -> Option<Digest> {
    tag.split('.').next()?.parse().ok()
}

fn check_path(path: &Path) -> Result<(), BackendError> {
    const PATH_BYTES_MAX: usize = 107;
    let found = path.as_os_str().len();
    if found <= PATH_BYTES_MAX {
        Ok(())
    } else {
        Err(BackendError::PathTooLong { path: path.display().to_string(), found })
    }
}

/// Removes a socket that nobody is behind any more.
fn remove_socket(path: &Path) -> Result<(), BackendError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(BackendError::Io { action: "remove", path: path.display().to_string(), source })
        }
        _ => Ok(()),
    }
}
