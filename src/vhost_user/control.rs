//! What a keeper and who started it say to each other: [`Command`]s with descriptors one way, what is [`Said`] the other way.
//!
//! A keeper that was started with [`MANAGED_ARGUMENT`] has the first controller as its descriptor 0. It outlives that one: another may
//! connect to the keeper's own socket at any time, takes the place of the last, and asks for a report. A controller that goes, or does not
//! listen, changes nothing for the guest. Knows nothing of where files come from, or what their names mean.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use serde::{Deserialize, Serialize};

use crate::sys::socket::PacketListener;

use super::attachment::{AttachedBase, AttachedDelta, Part};
use super::conversation::{Conversation, ConversationError, Descriptors};
use super::device::SERIAL_BYTES;
use super::order::DeltaOrder;

/// The argument by which the program knows that its descriptor 0 says what to serve.
pub const MANAGED_ARGUMENT: &str = "--managed";
/// The argument that comes ahead of the number of the user that the program, which root has started, is to run as.
pub const RUN_AS_ARGUMENT: &str = "--run-as";

/// What a keeper is told to do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// The first, once: serve. Descriptors: the listener of front ends, the listener of controllers, the counters, and the volume's.
    Serve(Serve),
    /// Say how things stand. Descriptors with the report: the listener of front ends, the counters, the base if there is one.
    Report,
    /// Serve this from the first start of the guest's next boot on. Descriptors: the volume's.
    Stage(VolumeSpec),
    /// Forget what was staged.
    Unstage,
    /// Try another worker at once, if too many have died and none is tried for a while.
    Resume,
    /// Make the volume larger, now, and tell the guest.
    Grow { bytes: u64 },
    /// Execute another program in place of this one, and have its workers serve. Descriptor: the program. Answered by whichever program goes on.
    Upgrade,
    /// End in good order: everything is durable when this is answered.
    Stop,
}

/// What to serve, and how.
#[derive(Debug, Serialize, Deserialize)]
pub struct Serve {
    /// The volume.
    pub volume: VolumeSpec,
    /// How many rings are offered.
    pub queues: u16,
    /// The largest ring that is taken, in descriptors.
    pub ring_size_max: u16,
    /// How much to log.
    pub log_level: u8,
    /// What the attachment is called, in reports and in logs.
    pub name: String,
    /// A guest may be running from the volume already, whose past is not known.
    pub resumed: bool,
    /// How long a request waits while the delta's file system is full, in milliseconds; 0: it fails at once.
    pub hold_ms: u64,
    /// How long a queue without work looks at its ring before it sleeps, at most, in microseconds.
    pub poll_us: u64,
    /// The VMM loads the guest's kernel, so that every driver that starts from nothing is a boot.
    pub kernel_from_vmm: bool,
}

/// A volume, as descriptors: the base if there is one, then the delta if there is one.
#[derive(Debug, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// What it is called, in reports.
    pub tag: String,
    /// What to call the base that comes with it, in messages.
    pub base: Option<String>,
    /// The delta that comes with it.
    pub delta: Option<DeltaOrder>,
    /// What GET_ID answers; `None`: made of the delta's UUID.
    pub serial: Option<[u8; SERIAL_BYTES]>,
    /// Whether another descriptor comes behind the delta's, by which its data goes past the page cache. The last: keepers that know nothing of it read a message without that as
    /// they always have.
    pub direct: bool,
}

/// What a keeper says.
#[derive(Debug, Serialize, Deserialize)]
pub enum Said {
    /// To the last command.
    Reply(Reply),
    /// By itself.
    Event(Event),
}

/// What a keeper says to a command.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Command::Serve`], [`Command::Report`] and [`Command::Grow`].
    Report(Report),
    /// To the others.
    Done,
    /// Not done, and why; an error chain in one line.
    Failed(String),
}

/// What a keeper says by itself.
#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    /// A front end has connected.
    Connected,
    /// It has gone.
    Disconnected { reason: String },
    /// What was staged is served.
    Switched { tag: String, bytes: u64 },
    /// What was staged could not be served, and is forgotten.
    SwitchFailed { tag: String, reason: String },
    /// The worker died; there is another.
    WorkerDied { status: String },
    /// Too many workers died one after another: none is started for so many seconds, or until told to resume.
    WorkerHeld { seconds: u64 },
    /// Another worker is tried.
    WorkerResumed,
    /// The delta's file system is full: so many requests wait for room.
    Full { held: u64 },
    /// None waits any more.
    SpaceBack,
    /// The delta's file system has only so many bytes left.
    LowSpace { bytes: u64 },
    /// A sync of the delta has failed: no write or flush is reported as done from now on.
    Latched { file: String },
}

/// How things stand.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The keeper.
    pub process: u32,
    /// What the attachment is called.
    pub name: String,
    /// What the volume is called.
    pub tag: String,
    /// What is staged is called.
    pub staged: Option<String>,
    /// Size of the volume in bytes.
    pub bytes: u64,
    /// Whether a front end is connected.
    pub connected: bool,
    /// Whether there is no worker, because too many have died.
    pub held: bool,
    /// The version of the program.
    pub version: String,
}

/// The controllers of a keeper: one at a time.
pub struct Controllers {
    listener: Option<PacketListener>,
    current: Option<Conversation>,
}

impl Controllers {
    /// None, for a keeper that nobody manages.
    pub fn none() -> Controllers {
        Controllers { listener: None, current: None }
    }

    /// The first one, and where others come from.
    pub fn new(first: Conversation, listener: PacketListener) -> io::Result<Controllers> {
        first.set_nonblocking(true)?;
        Ok(Controllers { listener: Some(listener), current: Some(first) })
    }

    /// Those that a program before this one had: where others come from, and the one that talks.
    pub fn resumed(listener: Option<PacketListener>, current: Option<Conversation>) -> Controllers {
        Controllers { listener, current }
    }

    /// What to wait for.
    pub fn descriptors(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [self.listener.as_ref().map(AsFd::as_fd), self.current.as_ref().map(AsFd::as_fd)]
    }

    /// Lets a controller that waits take the place of the last one.
    pub fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match listener.accept() {
            Ok(socket) => self.current = Some(Conversation::over(socket, "controller")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => log::warn!("a controller could not be accepted: {error}"),
        }
    }

    /// The next command, if there is one. A controller that is gone or talks nonsense is none any more.
    pub fn receive(&mut self) -> Option<(Command, Descriptors)> {
        match self.current.as_ref()?.receive() {
            Ok(received) => Some(received),
            Err(error) if error.would_block() => None,
            Err(error) => {
                self.drop_current(&error);
                None
            }
        }
    }

    /// Says something, unless nobody listens. Never waits.
    pub fn say(&mut self, said: &Said, descriptors: &[BorrowedFd<'_>]) {
        if let Some(controller) = &self.current
            && let Err(error) = controller.send(said, descriptors)
        {
            self.drop_current(&error);
        }
    }

    fn drop_current(&mut self, error: &ConversationError) {
        if !matches!(error, ConversationError::Gone(_)) {
            log::warn!("the controller is ignored from now on: {error}");
        }
        self.current = None;
    }
}

/// The files of a volume that a message came with.
pub fn take_volume(spec: VolumeSpec, descriptors: &mut Descriptors) -> Result<Part, ConversationError> {
    let base = descriptors.take_if(spec.base.is_some())?.map(File::from);
    let base = spec.base.zip(base).map(|(label, file)| AttachedBase { file, label });
    let delta = spec.delta.map(|order| AttachedDelta::receive(order, spec.direct, descriptors)).transpose()?;
    Ok(Part { tag: spec.tag, base, delta, serial: spec.serial })
}
