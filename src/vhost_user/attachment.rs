//! [`Attachment`]: all that a backend is started with, as descriptors. Whoever starts a backend, from paths or as a
//! daemon, makes one of these, and there is one code path from here on.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use super::device::SERIAL_BYTES;
use super::handover::{DeltaState, HandoverError, Keeping, PartState};
use super::service::Equipment;

/// What to serve, and where.
pub struct Attachment {
    /// What is served.
    pub part: Part,
    /// Where front ends come from.
    pub endpoint: Endpoint,
    /// What is offered to them.
    pub offer: Offer,
    /// What its workers get besides.
    pub equipment: Equipment,
    /// What it is called in reports to a controller.
    pub name: String,
    /// A guest may be running from it already, whose past is not known.
    pub resumed: bool,
    /// The VMM loads the guest's kernel ([`super::boot`]).
    pub kernel_from_vmm: bool,
}

/// A volume, as files.
pub struct Part {
    /// What it is called in reports to a controller.
    pub tag: String,
    /// The image, open for reading; `None`: a blank volume.
    pub base: Option<AttachedBase>,
    /// The delta, open for writing and locked; `None`: a read-only volume.
    pub delta: Option<AttachedDelta>,
    /// What GET_ID answers; `None`: made of the delta's UUID.
    pub serial: Option<[u8; SERIAL_BYTES]>,
}

impl Part {
    /// Its files, in the order in which messages have them.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let base = self.base.as_ref().map(AsFd::as_fd);
        base.into_iter().chain(self.delta.as_ref().map(|delta| delta.file.as_fd()))
    }
}

impl Part {
    /// What another program needs to know of it.
    pub fn freeze(&self, keeping: &mut Keeping) -> PartState {
        PartState {
            tag: self.tag.clone(),
            base: self.base.as_ref().map(|base| (keeping.keep(base), base.label.clone())),
            delta: self.delta.as_ref().map(|delta| DeltaState {
                file: keeping.keep(&delta.file),
                label: delta.label.clone(),
                ephemeral: delta.ephemeral,
            }),
            serial: self.serial,
        }
    }

    /// The same in that program.
    pub fn thaw(state: PartState) -> Result<Part, HandoverError> {
        let delta = match state.delta {
            Some(DeltaState { file, label, ephemeral }) => {
                Some(AttachedDelta { file: file.take()?.into(), label, ephemeral })
            }
            None => None,
        };
        let base = match state.base {
            Some((file, label)) => Some(AttachedBase { file: file.take()?.into(), label }),
            None => None,
        };
        Ok(Part { tag: state.tag, base, delta, serial: state.serial })
    }
}

/// An image, open.
pub struct AttachedBase {
    /// The file.
    pub file: File,
    /// What to call it in messages.
    pub label: String,
}

impl AsFd for AttachedBase {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A delta, open and locked.
pub struct AttachedDelta {
    /// The file.
    pub file: File,
    /// What to call it in messages.
    pub label: String,
    /// Whether it goes with the backend: it has no name, and nothing in it is made durable.
    pub ephemeral: bool,
}

impl AttachedDelta {
    /// Whether both are of one file.
    pub fn is_same_file(&self, other: &AttachedDelta) -> bool {
        let identity = |delta: &AttachedDelta| delta.file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
        matches!((identity(self), identity(other)), (Ok(one), Ok(two)) if one == two)
    }
}

/// Where front ends come from.
pub enum Endpoint {
    /// One after another, from a bound socket.
    Listening(UnixListener),
    /// One, already connected.
    Connected(UnixStream),
}

/// What is offered to a front end.
#[derive(Clone, Debug)]
pub struct Offer {
    /// How many rings.
    pub queues: u16,
    /// The largest ring that is taken, in descriptors: a power of two.
    pub ring_size_max: u16,
    /// Whether account is kept of what is in flight. Without it, a worker that dies takes requests with it: for measuring.
    pub tracks_inflight: bool,
    /// How long a request waits while the delta's file system is full; zero: it fails at once.
    pub hold: Duration,
    /// How long a queue without work looks at its ring before it sleeps, at most; zero: it sleeps at once.
    pub poll: Duration,
    /// The guest comes from another backend, which has the delta until then: it is neither locked nor opened before a ring starts.
    pub incoming: bool,
}

/// How long a request waits for room, if nobody says otherwise.
pub const HOLD_DEFAULT: Duration = Duration::from_secs(60);
