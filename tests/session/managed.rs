//! [`Managed`]: the program as a controller starts it, and [`Watcher`], that controller.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use pando::block::DeltaCache;
use pando::block::delta::header::BaseIdentity;
use pando::block::delta::open::{self, NewDelta};
use pando::digest::Digest;
use pando::sys::socket::{self, PacketListener};
use pando::units::ClusterSize;
use pando::vhost_user::control::{Command, Event, MANAGED_ARGUMENT, Reply, Report, Said, Serve, VolumeSpec};
use pando::vhost_user::conversation::{Conversation, Descriptors};
use pando::vhost_user::counters;
use pando::vhost_user::order::DeltaOrder;

use super::harness::{Backend, Disk, PATIENCE, delta_cache, program};

/// A volume, as a controller has it.
pub struct Volume {
    pub spec: VolumeSpec,
    pub base: Option<File>,
    pub delta: Option<File>,
    pub direct: Option<File>,
}

impl Volume {
    /// An image alone.
    pub fn read_only(tag: &str, image: &Path) -> Volume {
        let base = Some("the image".to_owned());
        let spec = VolumeSpec { tag: tag.to_owned(), base, delta: None, serial: None, direct: false };
        Volume { spec, base: Some(File::open(image).expect("an image")), delta: None, direct: None }
    }

    /// An image under a new delta, which stays or goes with the process.
    pub fn cow(tag: &str, image: &Path, delta: &Path, ephemeral: bool) -> Volume {
        let contents = std::fs::read(image).expect("an image");
        let digest = Digest(*blake3::hash(&contents).as_bytes());
        let identity = BaseIdentity { digest, bytes: contents.len() as u64 };
        let new = NewDelta { base: Some(identity), virtual_bytes: None, cluster: ClusterSize::DEFAULT };
        let file = if ephemeral {
            open::create_unnamed(delta.parent().expect("a directory"), &new).expect("a delta").0
        } else {
            open::create(delta, &new).expect("a delta");
            open::open_locked(delta).expect("nobody has it").0
        };
        let label = delta.display().to_string();
        let mut volume = Volume::read_only(tag, image);
        if delta_cache() == DeltaCache::Direct {
            volume.direct = Some(open::open_direct(&file, &label, !ephemeral).expect("a file system that has that"));
            volume.spec.direct = true;
        }
        volume.spec.delta = Some(DeltaOrder { label, ephemeral });
        volume.delta = Some(file);
        volume
    }

    fn files(&self) -> Vec<BorrowedFd<'_>> {
        [&self.base, &self.delta, &self.direct].into_iter().flatten().map(AsFd::as_fd).collect()
    }
}

/// A controller that has nothing else to do.
pub struct Watcher {
    pub controller: Conversation,
    pub events: VecDeque<Event>,
}

impl Watcher {
    pub fn new(controller: Conversation) -> Watcher {
        Watcher { controller, events: VecDeque::new() }
    }

    /// Says something, and waits for the answer.
    #[track_caller]
    pub fn ask(&mut self, command: &Command, files: &[BorrowedFd<'_>]) -> (Reply, Descriptors) {
        self.controller.send(command, files).expect("the keeper listens");
        self.answer()
    }

    /// Waits for an answer.
    #[track_caller]
    pub fn answer(&mut self) -> (Reply, Descriptors) {
        loop {
            let found = socket::wait_readable([Some(self.controller.as_fd())], PATIENCE.as_millis() as i32);
            assert!(found.expect("a wait") == [true], "the keeper does not answer");
            match self.controller.receive::<Said>().expect("the keeper answers") {
                (Said::Reply(reply), descriptors) => return (reply, descriptors),
                (Said::Event(event), _) => self.events.push_back(event),
            }
        }
    }

    /// Says something that has to be refused, for a reason with these words.
    #[track_caller]
    pub fn refused(&mut self, command: &Command, files: &[BorrowedFd<'_>], words: &str) {
        match self.ask(command, files).0 {
            Reply::Failed(reason) => assert!(reason.contains(words), "{reason}"),
            reply => panic!("{command:?} was answered with {reply:?}"),
        }
    }

    #[track_caller]
    pub fn stage(&mut self, volume: &Volume) {
        let spec = clone_spec(&volume.spec);
        assert!(matches!(self.ask(&Command::Stage(spec), &volume.files()).0, Reply::Done));
    }

    #[track_caller]
    pub fn report(&mut self) -> (Report, Descriptors) {
        match self.ask(&Command::Report, &[]) {
            (Reply::Report(report), descriptors) => (report, descriptors),
            (reply, _) => panic!("asked for a report, it said {reply:?}"),
        }
    }

    /// The events of boots so far.
    #[track_caller]
    pub fn switches(&mut self) -> Vec<Event> {
        // Whatever has happened before the answer was told before it.
        self.report();
        let events = std::mem::take(&mut self.events);
        events
            .into_iter()
            .filter(|event| matches!(event, Event::Switched { .. } | Event::SwitchFailed { .. }))
            .collect()
    }
}

/// A keeper that a controller has started.
pub struct Managed {
    pub backend: Backend,
    pub watcher: Watcher,
    pub control: PathBuf,
}

/// How a guest's disk is served, but for the volume.
pub fn manner() -> Serve {
    Serve {
        volume: VolumeSpec { tag: String::new(), base: None, delta: None, serial: None, direct: false },
        queues: 4,
        ring_size_max: 1024,
        log_level: 5,
        name: "vm-1".to_owned(),
        resumed: false,
        hold_ms: 60_000,
        poll_us: 50,
        kernel_from_vmm: false,
    }
}

/// A process that waits for a command, and its controller.
pub fn start(disk: &Disk) -> (Backend, Watcher) {
    start_command(disk, program())
}

/// As [`start`], from a command that lacks its argument.
pub fn start_command(disk: &Disk, mut command: std::process::Command) -> (Backend, Watcher) {
    let (controller, theirs) = Conversation::with("keeper").expect("a pair");
    let backend = Backend::start_command(command.arg(MANAGED_ARGUMENT).stdin(theirs), &disk.path("socket"));
    (backend, Watcher::new(controller))
}

impl Managed {
    /// Serves a volume.
    #[track_caller]
    pub fn serve(disk: &Disk, volume: &Volume, manner: Serve) -> Managed {
        Managed::serve_on(start(disk), disk, volume, manner)
    }

    /// As [`Managed::serve`], by a process that waits for a command.
    #[track_caller]
    pub fn serve_on(started: (Backend, Watcher), disk: &Disk, volume: &Volume, manner: Serve) -> Managed {
        let (backend, mut watcher) = started;
        let control = disk.path("control");
        let counters = counters::create().expect("counters");
        let front_ends = UnixListener::bind(backend.socket()).expect("a socket");
        let controllers = PacketListener::bind(&control).expect("a socket");
        let mut files = vec![front_ends.as_fd(), controllers.as_fd(), counters.as_fd()];
        files.extend(volume.files());
        let name = manner.name.clone();
        match watcher.ask(&Command::Serve(Serve { volume: clone_spec(&volume.spec), ..manner }), &files).0 {
            Reply::Report(report) => assert_eq!((report.name, report.tag), (name, volume.spec.tag.clone())),
            reply => panic!("told to serve, it said {reply:?}"),
        }
        Managed { backend, watcher, control }
    }
}

/// The same words, once more.
fn clone_spec(spec: &VolumeSpec) -> VolumeSpec {
    let delta = spec.delta.as_ref().map(|delta| DeltaOrder { label: delta.label.clone(), ephemeral: delta.ephemeral });
    VolumeSpec { tag: spec.tag.clone(), base: spec.base.clone(), delta, serial: spec.serial, direct: spec.direct }
}
