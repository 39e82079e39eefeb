//! What keeper and worker say to each other: [`Order`]s with descriptors one way, an [`Answer`] to each the other way.
//!
//! An order says what is to be, not what to do: given twice, it changes nothing the second time, and a new worker that is given all
//! that there is ends up where the last one was. Knows nothing of vhost-user's messages or of where files come from.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use serde::{Deserialize, Serialize};

use crate::block::delta::Lifetime;
use crate::sys::guest::RegionPlace;
use crate::sys::socket::{DESCRIPTORS_MAX, PacketSocket};

use super::device::SERIAL_BYTES;
use super::ring::RingPlace;

/// Both sides are of one binary; this tells when they are not.
const VERSION: u32 = 1;

/// Bytes in a message. Far above the largest, which has a region for every descriptor.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Regions of guest memory that fit into one message: each has a descriptor.
pub const REGIONS_MAX: usize = 128;
const _: () = assert!(REGIONS_MAX + 3 <= DESCRIPTORS_MAX);

/// What the worker is to be.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// The first: which volume. Descriptors: the base if there is one, the delta if there is one.
    Open(VolumeOrder),
    /// How the guest's side stands now.
    Become(SessionOrder),
    /// The last: complete what was taken, make all durable, and end.
    Close,
}

/// A volume, as descriptors.
#[derive(Debug, Serialize, Deserialize)]
pub struct VolumeOrder {
    /// Whether a base comes with it.
    pub has_base: bool,
    /// The delta that comes with it.
    pub delta: Option<DeltaOrder>,
    /// How many rings are offered.
    pub queues: u16,
    /// What GET_ID answers; `None`: the worker makes one of the delta's UUID.
    pub serial: Option<[u8; SERIAL_BYTES]>,
    /// How much to log.
    pub log_level: u8,
}

/// A delta, as a descriptor.
#[derive(Debug, Serialize, Deserialize)]
pub struct DeltaOrder {
    /// What to call it in messages.
    pub label: String,
    /// Whether it goes with the process.
    pub ephemeral: bool,
}

impl DeltaOrder {
    /// Whether what is written has to outlive the process.
    pub fn lifetime(&self) -> Lifetime {
        if self.ephemeral { Lifetime::Ephemeral } else { Lifetime::Persistent }
    }
}

/// The guest's side. What is left out stays as it is.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct SessionOrder {
    /// The features that the driver took.
    pub features: u64,
    /// Whether the driver has the write cache on.
    pub writeback: bool,
    /// All regions of the guest's memory, if they have changed. Descriptors: one for each.
    pub memory: Option<Vec<RegionPlace>>,
    /// Rings that have changed. Descriptors: for each that runs, kick, then call and error if it has them.
    pub rings: Vec<RingOrder>,
}

/// One ring.
#[derive(Debug, Serialize, Deserialize)]
pub struct RingOrder {
    /// Its number.
    pub index: u16,
    /// How it is to run; `None`: not at all, with all that it has taken complete.
    pub run: Option<RingRun>,
}

/// How a ring runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RingRun {
    /// Where it lies.
    pub place: RingPlace,
    /// Which entry of the available ring comes next; `None`: the one that the used ring says, where all taken before is complete.
    pub next_available: Option<u16>,
    /// Whether there is somebody to notify of completions.
    pub has_call: bool,
    /// Whether there is somebody to tell when the ring breaks.
    pub has_error: bool,
}

/// What the worker says to an order.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// To [`Order::Open`]: what the volume turned out to be.
    Opened(Opened),
    /// Done. For each ring that was told to stop and ran: which entry of the available ring comes next.
    Done(Vec<(u16, u16)>),
    /// Not done, and why; an error chain in one line.
    Failed(String),
}

/// What a volume is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Opened {
    /// Size in bytes.
    pub bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Bytes of a cluster.
    pub cluster_bytes: u64,
    /// What GET_ID answers.
    pub serial: [u8; SERIAL_BYTES],
}

/// Why the two do not understand each other.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// The socket failed.
    #[error("the socket between keeper and worker failed")]
    Socket(#[source] io::Error),
    /// The other process is gone.
    #[error("the {0} is gone")]
    Gone(&'static str),
    /// Bytes that are no message.
    #[error("a message between keeper and worker cannot be read")]
    Decode(#[source] postcard::Error),
    /// Of another build.
    #[error(
        "a message between keeper and worker has version {found}, expected {VERSION}: they are of different builds"
    )]
    Version { found: u32 },
    /// Descriptors missing or left over.
    #[error("a message between keeper and worker came with {found} descriptors too {direction}")]
    Descriptors { found: usize, direction: &'static str },
}

/// The descriptors of a message, to be taken in the order in which they were put.
pub struct Descriptors(VecDeque<OwnedFd>);

impl Descriptors {
    /// The next one.
    pub fn take(&mut self) -> Result<OwnedFd, OrderError> {
        self.0.pop_front().ok_or(OrderError::Descriptors { found: 1, direction: "few" })
    }

    /// The next one, if `wanted`.
    pub fn take_if(&mut self, wanted: bool) -> Result<Option<OwnedFd>, OrderError> {
        if wanted { self.take().map(Some) } else { Ok(None) }
    }

    /// Sees that all have been taken.
    pub fn finish(self) -> Result<(), OrderError> {
        match self.0.len() {
            0 => Ok(()),
            found => Err(OrderError::Descriptors { found, direction: "many" }),
        }
    }
}

/// One end of the conversation.
pub struct Conversation {
    socket: PacketSocket,
    /// Who is at the other end.
    peer: &'static str,
}

impl Conversation {
    /// Both ends: the keeper's, and what the worker gets.
    pub fn new() -> io::Result<(Conversation, OwnedFd)> {
        let (ours, theirs) = PacketSocket::pair()?;
        Ok((Conversation { socket: ours, peer: "worker" }, theirs.into()))
    }

    /// The worker's end.
    pub fn of_worker(descriptor: OwnedFd) -> Conversation {
        Conversation { socket: descriptor.into(), peer: "keeper" }
    }

    /// Says something.
    pub fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<(), OrderError> {
        let bytes = postcard::to_stdvec(&(VERSION, message)).map_err(OrderError::Decode)?;
        let descriptors: Vec<RawFd> = descriptors.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
        self.socket.send(&bytes, &descriptors).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => OrderError::Gone(self.peer),
            _ => OrderError::Socket(error),
        })
    }

    /// Waits for what the other says.
    pub fn receive<M: for<'de> Deserialize<'de>>(&self) -> Result<(M, Descriptors), OrderError> {
        let packet = match self.socket.receive(MESSAGE_BYTES_MAX) {
            Ok(Some(packet)) => packet,
            Ok(None) => return Err(OrderError::Gone(self.peer)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(OrderError::Gone(self.peer)),
            Err(error) => return Err(OrderError::Socket(error)),
        };
        // The version first: what follows may be laid out in another way.
        let (version, rest): (u32, _) = postcard::take_from_bytes(&packet.bytes).map_err(OrderError::Decode)?;
        if version != VERSION {
            return Err(OrderError::Version { found: version });
        }
        let message = postcard::from_bytes(rest).map_err(OrderError::Decode)?;
        Ok((message, Descriptors(packet.descriptors.into())))
    }
}

impl AsFd for Conversation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends() -> (Conversation, Conversation) {
        let (keeper, worker) = Conversation::new().unwrap();
        (keeper, Conversation::of_worker(worker))
    }

    #[test]
    fn the_largest_order_arrives_whole() {
        let (keeper, worker) = ends();
        let place =
            RegionPlace { guest_address: u64::MAX, user_address: u64::MAX, bytes: u64::MAX, file_offset: u64::MAX };
        let order = SessionOrder { memory: Some(vec![place; REGIONS_MAX]), ..SessionOrder::default() };
        let null = std::fs::File::open("/dev/null").unwrap();
        keeper.send(&Order::Become(order), &[null.as_fd(); REGIONS_MAX]).unwrap();
        let (order, mut descriptors) = worker.receive::<Order>().unwrap();
        let Order::Become(SessionOrder { memory: Some(memory), .. }) = order else { panic!("{order:?}") };
        assert_eq!(memory, vec![place; REGIONS_MAX]);
        (0..REGIONS_MAX).for_each(|_| drop(descriptors.take().unwrap()));
        assert!(descriptors.take().is_err());
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let (keeper, worker) = ends();
        for bytes in [&[1u8, 200, 3][..], &[99, 2], &[0xff; 40]] {
            keeper.socket.send(bytes, &[]).unwrap();
            assert!(worker.receive::<Order>().is_err());
        }
        keeper.socket.send(&vec![0; MESSAGE_BYTES_MAX + 100], &[]).unwrap();
        assert!(matches!(worker.receive::<Order>(), Err(OrderError::Socket(_))));
        drop(keeper);
        assert!(matches!(worker.receive::<Order>(), Err(OrderError::Gone("keeper"))));
    }
}
