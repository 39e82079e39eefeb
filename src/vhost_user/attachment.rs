//! [`Attachment`]: all that a backend is started with, as descriptors. Whoever starts a backend, from paths or as a
//! daemon, makes one of these, and there is one code path from here on.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use crate::block::delta::{OpenError, open};

use super::conversation::{ConversationError, Descriptors};
use super::device::SERIAL_BYTES;
use super::handover::{DeltaState, HandoverError, Keeping, Kept, PartState};
use super::order::DeltaOrder;
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
    /// Whether there is a delta whose data goes past the page cache.
    pub fn is_direct(&self) -> bool {
        self.delta.as_ref().is_some_and(AttachedDelta::is_direct)
    }

    /// Its files, in the order in which messages have them.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let base = self.base.as_ref().map(AsFd::as_fd);
        base.into_iter().chain(self.delta.iter().flat_map(AttachedDelta::descriptors))
    }

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

    /// What earlier versions of that do not have.
    pub fn freeze_direct(&self, keeping: &mut Keeping) -> Option<Kept> {
        self.delta.as_ref()?.direct.as_ref().map(|direct| keeping.keep(direct))
    }

    /// The same in that program.
    pub fn thaw(state: PartState, direct: Option<Kept>) -> Result<Part, HandoverError> {
        let direct = direct.map(Kept::take).transpose()?.map(File::from);
        let delta = match state.delta {
            Some(DeltaState { file, label, ephemeral }) => {
                Some(AttachedDelta { file: file.take()?.into(), direct, label, ephemeral })
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
    /// The same file, opened for its data to go past the page cache, if that is to be.
    pub direct: Option<File>,
    /// What to call it in messages.
    pub label: String,
    /// Whether it goes with the backend: it has no name, and nothing in it is made durable.
    pub ephemeral: bool,
}

impl AttachedDelta {
    /// Its files, in the order in which messages have them.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [Some(&self.file), self.direct.as_ref()].into_iter().flatten().map(AsFd::as_fd)
    }

    /// Whether its data goes past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Which of them has the lock.
    pub fn locked(&self) -> &File {
        self.direct.as_ref().unwrap_or(&self.file)
    }

    /// What to say of it, beside its files.
    pub fn order(&self) -> DeltaOrder {
        DeltaOrder { label: self.label.clone(), ephemeral: self.ephemeral }
    }

    /// The delta that a message says and came with.
    pub fn receive(
        order: DeltaOrder,
        direct: bool,
        descriptors: &mut Descriptors,
    ) -> Result<AttachedDelta, ConversationError> {
        let DeltaOrder { label, ephemeral } = order;
        let file = descriptors.take()?.into();
        Ok(AttachedDelta { file, direct: descriptors.take_if(direct)?.map(File::from), label, ephemeral })
    }

    /// The same, with its data to go past the page cache. Its lock, if it has it, goes along.
    pub fn past_page_cache(self, is_locked: bool) -> Result<AttachedDelta, OpenError> {
        let direct = open::open_direct(&self.file, &self.label, is_locked)?;
        Ok(AttachedDelta { direct: Some(direct), ..self })
    }

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
