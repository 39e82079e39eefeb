//! [`Attachment`]: all that a backend is started with, as descriptors. Whoever starts a backend, from paths or as a
//! daemon, makes one of these, and there is one code path from here on.

use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};

use super::device::SERIAL_BYTES;

/// What to serve, and where.
pub struct Attachment {
    /// The image, open for reading; `None`: a blank volume.
    pub base: Option<File>,
    /// The delta, open for writing and locked; `None`: a read-only volume.
    pub delta: Option<AttachedDelta>,
    /// Where front ends come from.
    pub endpoint: Endpoint,
    /// What is offered to them.
    pub offer: Offer,
}

/// A delta, open and locked.
pub struct AttachedDelta {
    /// The file.
    pub file: File,
    /// What to call it in messages.
    pub label: String,
    /// Whether it goes with the process: it has no name, and nothing in it is made durable.
    pub ephemeral: bool,
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
    /// What GET_ID answers; `None`: made of the delta's UUID.
    pub serial: Option<[u8; SERIAL_BYTES]>,
}
