//! [`Backend`]: a keeper in a thread of this process, whose workers are threads as well ([`pando::sys::stand_in`]), and its controller.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{LazyLock, Once};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pando::block::base::Base;
use pando::block::delta::check::{self, Finding};
use pando::block::delta::header::{BaseIdentity, Header};
use pando::block::delta::layout::Layout;
use pando::block::delta::{self, Delta, Lifetime};
use pando::block::storage::FileStorage;
use pando::block::{DeltaCache, Error, Volume};
use pando::digest::Digest;
use pando::sys::buffers::{Readable, Writable};
use pando::sys::{events, file, socket, stand_in};
use pando::units::ClusterSize;
use pando::vhost_user::attachment::{AttachedBase, AttachedDelta, Attachment, Endpoint, HOLD_DEFAULT, Offer, Part};
use pando::vhost_user::control::{Command, Controllers, Event, Reply, Report, Said, VolumeSpec};
use pando::vhost_user::conversation::Conversation;
use pando::vhost_user::keeper::{self, KeeperError};
use pando::vhost_user::order::DeltaOrder;
use pando::vhost_user::polling::POLL_DEFAULT;
use pando::vhost_user::service::Equipment;
use pando::vhost_user::transfers::Io;
use pando::vhost_user::{counters, worker};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::disk::{Disk, SECTOR, pattern};
use super::guest::RINGS;
use crate::unnamed_file;

/// Sectors of the image, which ends within a cluster.
pub const BASE_SECTORS: u64 = 100;
/// How long the keeper may take over a command.
const PATIENCE: Duration = Duration::from_secs(15);

static BASE: LazyLock<File> = LazyLock::new(|| {
    let bytes: Vec<u8> = (0..BASE_SECTORS).flat_map(|sector| pattern(0, sector)).collect();
    let base = unnamed_file();
    file::write_at(&base, &[Readable::from_slice(&bytes)], 0).expect("room");
    base
});

/// What a backend serves, and what it may hold.
pub struct Volumed {
    pub tag: String,
    /// None: read-only.
    delta: Option<File>,
    /// The same, opened for its data to go past the page cache, if it does and the host's files in memory can be.
    direct: Option<File>,
    has_base: bool,
    pub disk: Disk,
}

impl Volumed {
    /// One to which nothing was written; of an image alone, without `sectors`.
    pub fn new(tag: &str, has_base: bool, sectors: Option<u64>, cache: DeltaCache) -> Volumed {
        let base_sectors = if has_base { BASE_SECTORS } else { 0 };
        let delta = sectors.map(|sectors| {
            let layout = Layout::new(ClusterSize::DEFAULT, sectors * SECTOR as u64).expect("a size");
            let identity = BaseIdentity { digest: Digest([1; 32]), bytes: base_sectors * SECTOR as u64 };
            let header = Header { layout, uuid: [7; 16], base: has_base.then_some(identity) };
            let delta = unnamed_file();
            delta.set_len(layout.file_bytes()).expect("room");
            delta::format(&FileStorage::new(delta.try_clone().expect("a copy")).expect("a mapping"), &header)
                .expect("room");
            delta
        });
        let disk = Disk::new(base_sectors, sectors.unwrap_or(base_sectors));
        let direct = delta.as_ref().filter(|_| cache == DeltaCache::Direct);
        let direct = direct.and_then(|delta| delta::open::open_direct(delta, tag, false).ok());
        Volumed { tag: tag.to_owned(), delta, direct, has_base, disk }
    }

    fn part(&self) -> Part {
        let copy = |file: &File| file.try_clone().expect("a copy");
        Part {
            tag: self.tag.clone(),
            base: self.has_base.then(|| AttachedBase { file: copy(&BASE), label: "base".to_owned() }),
            delta: self.delta.as_ref().map(|delta| AttachedDelta {
                file: copy(delta),
                direct: self.direct.as_ref().map(copy),
                label: self.tag.clone(),
                ephemeral: false,
            }),
            serial: None,
        }
    }

    /// As a controller says it.
    fn spec(&self) -> VolumeSpec {
        let delta = self.delta.as_ref().map(|_| DeltaOrder { label: self.tag.clone(), ephemeral: false });
        let base = self.has_base.then(|| "base".to_owned());
        VolumeSpec { tag: self.tag.clone(), base, delta, serial: None, direct: self.direct.is_some() }
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.delta.is_none()
    }

    /// Sees that the delta is whole, and that the volume holds what it may.
    pub fn check(&self) {
        let Some(delta) = &self.delta else { return };
        let path: PathBuf = format!("/proc/self/fd/{}", delta.as_raw_fd()).into();
        let report = check::check(&path).expect("it is a delta");
        // Space that is held for zeros is none of its faults.
        let is_fine = |finding: &Finding| matches!(finding, Finding::Leak { .. });
        assert!(report.findings.iter().all(is_fine), "it was closed in good order: {:?}", report.findings);
        let header = delta::open::read_header(delta, "fuzz").expect("it is a delta");
        let storage = FileStorage::new(delta.try_clone().expect("a copy")).expect("a mapping");
        let delta = Delta::start(storage, "fuzz".into(), header, Lifetime::Persistent).expect("it opens");
        let base = if self.has_base { Base::map(&BASE, "base".to_owned()).expect("a mapping") } else { Base::empty() };
        let volume: Volume = Volume::cow(base, delta);
        let sectors = self.disk.sectors();
        let mut found = vec![0; sectors as usize * SECTOR];
        let read: Result<(), Error> = volume.read(0, &[Writable::from_mut_slice(&mut found)]);
        read.expect("all of it can be read");
        self.disk.check(0, &found, &self.disk.contents(0..sectors));
    }
}

/// A keeper, and its controller.
pub struct Backend {
    keeper: JoinHandle<Result<(), KeeperError>>,
    stop: File,
    /// In an abstract place of its own, so that nothing is left in a file system.
    listener: UnixListener,
    controller: Conversation,
    /// Nobody connects here.
    _quiet: File,
    pub served: Volumed,
    pub staged: Option<Volumed>,
}

fn quiet() -> File {
    events::into_file(EventFd::new(EFD_CLOEXEC).expect("an event descriptor"))
}

/// Shows what the keeper and its workers log, for who looks into one input.
struct Log;

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        eprintln!("{}: {}", record.level(), record.args());
    }

    fn flush(&self) {}
}

/// Makes all that is made once, so that it is no leak.
pub fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if std::env::var_os("FUZZ_LOG").is_some() {
            log::set_logger(&Log).expect("there is none yet");
            log::set_max_level(log::LevelFilter::Trace);
        }
        stand_in::prepare(worker::stand_in).expect("the manners of a backend");
        LazyLock::force(&BASE);
        Backend::start(Volumed::new("first", true, Some(BASE_SECTORS), DeltaCache::Writeback), Io::Auto).stop();
    });
}

impl Backend {
    /// Starts one that serves a volume, and reads as it is told what is not in memory.
    pub fn start(served: Volumed, io: Io) -> Backend {
        let name = format!("pando-fuzz-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("a name");
        let listener = UnixListener::bind_addr(&address).expect("nobody else has it");
        let (controller, theirs) = Conversation::with("keeper").expect("a pair");
        controller.set_nonblocking(true).expect("a socket");
        let (stop, nobody) = (quiet(), quiet());
        let attachment = Attachment {
            part: served.part(),
            endpoint: Endpoint::Listening(listener.try_clone().expect("a copy")),
            offer: Offer {
                queues: RINGS as u16,
                ring_size_max: 256,
                tracks_inflight: true,
                hold: HOLD_DEFAULT,
                poll: POLL_DEFAULT,
                incoming: false,
            },
            equipment: Equipment {
                counters: counters::create().expect("memory"),
                rings: io.rings(RINGS as u16).expect("none has to be had"),
            },
            name: "fuzz".to_owned(),
            resumed: false,
            kernel_from_vmm: true,
        };
        let (stopped, listens) = (stop.try_clone().expect("a copy"), nobody.try_clone().expect("a copy"));
        let keeper = std::thread::spawn(move || {
            let first = Conversation::over(theirs.into(), "controller");
            let controllers = Controllers::new(first, OwnedFd::from(listens).into()).expect("a socket");
            keeper::serve_controlled(attachment, &stopped, controllers)
        });
        Backend { keeper, stop, listener, controller, _quiet: nobody, served, staged: None }
    }

    /// A new connection of a front end.
    pub fn connect(&self) -> UnixStream {
        let address = self.listener.local_addr().expect("it is bound");
        UnixStream::connect_addr(&address).expect("the keeper listens")
    }

    /// Says something and waits for what is said back, noting what else is said.
    fn command(&mut self, command: &Command, parts: Option<&Part>) -> Reply {
        let descriptors: Vec<_> = parts.into_iter().flat_map(Part::descriptors).collect();
        self.controller.send(command, &descriptors).expect("the keeper listens");
        let begun = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(begun.elapsed()).as_millis() as i32;
            let said = socket::wait_readable([Some(self.controller.as_fd())], left).expect("a socket")[0];
            assert!(said, "the keeper does not answer {command:?}");
            if let Some(reply) = self.hear() {
                return reply;
            }
        }
    }

    /// Hears one thing that the keeper has said.
    fn hear(&mut self) -> Option<Reply> {
        match self.controller.receive::<Said>() {
            Ok((Said::Reply(reply), _)) => Some(reply),
            Ok((Said::Event(Event::Switched { tag, .. }), _)) => {
                let staged = self.staged.take().expect("something was staged");
                assert_eq!(staged.tag, tag);
                self.served = staged;
                None
            }
            Ok((Said::Event(Event::SwitchFailed { tag, .. }), _)) => {
                assert_eq!(self.staged.take().map(|staged| staged.tag), Some(tag));
                None
            }
            Ok((Said::Event(Event::Latched { file }), _)) => panic!("{file} cannot be synced"),
            Ok((Said::Event(Event::WorkerHeld { .. }), _)) => panic!("too many workers have died"),
            Ok(_) => None,
            Err(error) if error.would_block() => None,
            Err(error) => panic!("the keeper says nothing that can be understood: {error}"),
        }
    }

    /// Hears all that the keeper has said by itself.
    pub fn catch_up(&mut self) {
        while socket::wait_readable([Some(self.controller.as_fd())], 0).expect("a socket")[0] {
            assert!(self.hear().is_none(), "nothing was asked");
        }
    }

    /// Has the volume become larger, or not; why not.
    pub fn grow(&mut self, sectors: u64) -> Result<(), String> {
        let bytes = sectors.saturating_mul(SECTOR as u64);
        match self.command(&Command::Grow { bytes }, None) {
            Reply::Done => {
                self.served.disk.grow(sectors);
                Ok(())
            }
            Reply::Failed(reason) => Err(reason),
            other => panic!("{other:?}"),
        }
    }

    /// Has another volume served from the next boot on.
    pub fn stage(&mut self, volume: Volumed) {
        let reply = self.command(&Command::Stage(volume.spec()), Some(&volume.part()));
        assert!(matches!(reply, Reply::Done), "{reply:?}");
        self.staged = Some(volume);
    }

    /// Has what was staged forgotten.
    pub fn unstage(&mut self) {
        let reply = self.command(&Command::Unstage, None);
        assert!(matches!(reply, Reply::Done), "{reply:?}");
        self.staged = None;
    }

    /// How things stand.
    pub fn report(&mut self) -> Report {
        match self.command(&Command::Report, None) {
            Reply::Report(report) => report,
            other => panic!("{other:?}"),
        }
    }

    /// Ends it in good order, and gives what it served.
    pub fn stop(mut self) -> Volumed {
        self.catch_up();
        events::signal(&self.stop).expect("an event descriptor");
        self.keeper.join().expect("it does not panic").expect("it ends in good order");
        self.served
    }
}
