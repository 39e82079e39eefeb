//! What keeper and worker say to each other: [`Order`]s with descriptors one way, an [`Answer`] to each the other way.
//!
//! An order says what is to be, not what to do: given twice, it changes nothing the second time, and a new worker that is given all
//! that there is ends up where the last one was. Knows nothing of vhost-user's messages or of where files come from.

use serde::{Deserialize, Serialize};

use crate::sys::guest::RegionPlace;
use crate::sys::socket::DESCRIPTORS_MAX;

use crate::sys::uring::Shape;

use super::device::SERIAL_BYTES;
use super::inflight::RegionShape;
use super::ring::RingPlace;

/// Regions of guest memory that fit into one message: each has a descriptor.
pub const REGIONS_MAX: usize = 128;
const _: () = assert!(REGIONS_MAX + 6 <= DESCRIPTORS_MAX);

/// What the worker is to be.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// The first: which volume. Descriptors: the counters, the vitals, what to write to be watched, the base if there is one, the delta if
    /// there is one.
    Open(VolumeOrder),
    /// Say that you are there. Nothing changes.
    Hello,
    /// How the guest's side stands now.
    Become(SessionOrder),
    /// Say how far the used rings at these places have come. Nothing changes.
    Look(Vec<RingPlace>),
    /// The last: complete what was taken, make all durable, and end.
    Close,
}

impl Order {
    /// Whether a ring is to run.
    pub fn runs_a_ring(&self) -> bool {
        matches!(self, Order::Become(order) if order.rings.iter().any(|ring| ring.run.is_some()))
    }
}

/// A volume, as descriptors.
#[derive(Debug, Serialize, Deserialize)]
pub struct VolumeOrder {
    /// What to call the base that comes with it, in messages.
    pub base: Option<String>,
    /// The delta that comes with it.
    pub delta: Option<DeltaOrder>,
    /// Whether another descriptor comes behind the delta's, by which its data goes past the page cache.
    pub direct: bool,
    /// How many rings are offered.
    pub queues: u16,
    /// What GET_ID answers; `None`: the worker makes one of the delta's UUID.
    pub serial: Option<[u8; SERIAL_BYTES]>,
    /// How long a request waits while the delta's file system is full, in milliseconds; 0: it fails at once.
    pub hold_ms: u64,
    /// How long a queue without work looks at its ring before it sleeps, at most, in microseconds.
    pub poll_us: u64,
    /// How much to log.
    pub log_level: u8,
    /// Where the parts of the rings lie that the worker was started with; `None`: it has none.
    pub kernel_rings: Option<Shape>,
    /// Which boot of the host this is ([`crate::sys::process::boot_id`]).
    pub boot: [u8; 16],
}

/// A delta, as a descriptor.
#[derive(Debug, Serialize, Deserialize)]
pub struct DeltaOrder {
    /// What to call it in messages.
    pub label: String,
    /// Whether it goes with the process.
    pub ephemeral: bool,
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
    /// Where to keep account of what is in flight, if that has changed. Descriptor: its memory.
    pub inflight: Option<RegionShape>,
    /// Where to note which pages of guest memory have been written, if that has changed. Descriptor: its memory. Used while the features say so.
    pub log: Option<LogPlace>,
    /// Rings that have changed. Descriptors: for each that runs, kick, then call and error if it has them.
    pub rings: Vec<RingOrder>,
}

/// Where a dirty log lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPlace {
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes: a bit for each page of 4 KiB.
    pub bytes: u64,
}

/// One ring.
#[derive(Debug, Serialize, Deserialize)]
pub struct RingOrder {
    /// Its number.
    pub index: u16,
    /// How it is to run; `None`: not at all, with all that it has taken complete but for what waits for room.
    pub run: Option<RingRun>,
}

/// How a ring runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RingRun {
    /// Where it lies.
    pub place: RingPlace,
    /// Which entry of the available ring comes next; `None`: the one that the used ring says, where all taken before is complete.
    pub next_available: Option<u16>,
    /// The guest address of the used ring, if writes to it are to be noted in the dirty log.
    pub used_in_log: Option<u64>,
    /// Whether there is somebody to notify of completions.
    pub has_call: bool,
    /// Whether there is somebody to tell when the ring breaks.
    pub has_error: bool,
}

/// What the worker says to an order. The first answer comes with the descriptor by which its death is noticed at once, if it has one.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// To [`Order::Open`]: what the volume turned out to be.
    Opened(Opened),
    /// Done. Where each ring stopped that was told to and ran.
    Done(Vec<RingStop>),
    /// To [`Order::Look`]: for each place its used index; none where there is no memory.
    Looked(Vec<Option<u16>>),
    /// Not done, and why; an error chain in one line.
    Failed(String),
}

/// Where a ring stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingStop {
    /// Its number.
    pub index: u16,
    /// Which entry of the available ring comes next.
    pub next_available: u16,
    /// Requests that wait for room in the delta's file system, and that its account still says are in flight.
    pub held: u16,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::conversation::Conversation;
    use std::os::fd::AsFd;

    #[test]
    fn the_largest_order_arrives_whole() {
        let (keeper, worker) = Conversation::with("worker").unwrap();
        let worker = Conversation::over(worker.into(), "keeper");
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
}
