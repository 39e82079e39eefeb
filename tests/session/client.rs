//! [`Client`]: a whole front end, with a guest and its driver, after the manners of a VMM: [`Profile`].

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::guest::Guest;
use super::harness::{Backend, PATIENCE, SECTOR};
use super::queue::Queue;
use super::ring::Ring;

/// Virtio features.
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT_DESC: u64 = 1 << 28;
pub const RO: u64 = 1 << 5;
pub const BLK_SIZE: u64 = 1 << 6;
pub const BLK_FLUSH: u64 = 1 << 9;
pub const TOPOLOGY: u64 = 1 << 10;
pub const CONFIG_WCE: u64 = 1 << 11;
pub const BLK_MQ: u64 = 1 << 12;
pub const BLK_DISCARD: u64 = 1 << 13;
pub const BLK_WRITE_ZEROES: u64 = 1 << 14;
pub const SIZE_MAX: u64 = 1 << 1;
pub const SEG_MAX: u64 = 1 << 2;
pub const LOG_ALL: u64 = 1 << 26;
pub const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// A step of a ring's set-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Num,
    Base,
    Addr,
    Kick,
    Call,
    Err,
}

/// When memory is told of, and when rings are enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    First,
    Last,
    Never,
}

/// A VMM's manners.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Features that the guest's driver takes, of those that are offered.
    pub features: u64,
    /// Protocol features that the front end takes, of those that are offered.
    pub protocol: VhostUserProtocolFeatures,
    /// Whether every message asks for an answer.
    pub need_reply: bool,
    /// Whether memory is told of region by region.
    pub slots: bool,
    /// The steps of a ring's set-up, in order.
    pub steps: Vec<Step>,
    /// When rings are enabled.
    pub enable: When,
    /// When memory is told of.
    pub memory: When,
    /// How many rings.
    pub queues: usize,
    /// How many descriptors each has.
    pub ring_size: u16,
    /// Where the rings' indexes start.
    pub start: u16,
    /// Requests of each ring, and bytes of each.
    pub depth: usize,
    pub request_bytes: usize,
}

impl Profile {
    /// QEMU 10 with Linux in it.
    pub fn qemu() -> Profile {
        use Step::{Addr, Base, Call, Err, Kick, Num};
        Profile {
            features: u64::MAX,
            protocol: VhostUserProtocolFeatures::all(),
            need_reply: false,
            slots: true,
            steps: vec![Call, Num, Base, Addr, Kick, Err, Call],
            enable: When::Last,
            memory: When::First,
            queues: 1,
            ring_size: 128,
            start: 0,
            depth: 24,
            request_bytes: 64 << 10,
        }
    }

    /// Has every message answered, so that it has taken effect when the call returns.
    pub fn answered(self) -> Profile {
        Profile { need_reply: true, ..self }
    }

    /// Has so many rings.
    pub fn queues(self, queues: usize) -> Profile {
        Profile { queues, ..self }
    }
}

/// A front end, a guest and its driver.
pub struct Client {
    pub front_end: Frontend,
    pub guest: Arc<Guest>,
    pub queues: Vec<Queue>,
    /// What is offered, and what was taken.
    pub offered: u64,
    pub features: u64,
    pub profile: Profile,
}

impl Client {
    /// Connects and sets everything up.
    #[track_caller]
    pub fn start(backend: &Backend, profile: &Profile) -> Client {
        Client::start_on(backend.connect(), profile, Guest::new())
    }

    /// As [`Client::start`], on a connection and a guest of one's own.
    #[track_caller]
    pub fn start_on(stream: UnixStream, profile: &Profile, guest: Guest) -> Client {
        let mut client = Client::negotiate(stream, profile, guest);
        if client.profile.memory == When::First {
            client.tell_memory();
        }
        for index in 0..client.queues.len() {
            if client.profile.enable == When::First {
                client.enable(index, true);
            }
            client.set_up(index, client.profile.start);
        }
        if client.profile.memory == When::Last {
            client.tell_memory();
        }
        if client.profile.enable == When::Last {
            (0..client.queues.len()).for_each(|index| client.enable(index, true));
        }
        // A driver that starts earlier could be served before the ring's base is told, if that comes last.
        client.settle();
        client
    }

    /// Says all that comes before memory and rings. The rings exist in memory, and the backend knows nothing of them.
    #[track_caller]
    pub fn negotiate(stream: UnixStream, profile: &Profile, guest: impl Into<Arc<Guest>>) -> Client {
        let mut front_end = Frontend::from_stream(stream, profile.queues as u64);
        let offered = front_end.get_features().expect("GET_FEATURES");
        // Logging is the front end's to ask for, when its guest moves.
        let features = offered & profile.features & !LOG_ALL;
        front_end.set_owner().expect("SET_OWNER");
        if offered & PROTOCOL_FEATURES != 0 && !profile.protocol.is_empty() {
            let protocol = front_end.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
            front_end.set_protocol_features(protocol & profile.protocol).expect("SET_PROTOCOL_FEATURES");
        }
        if profile.need_reply {
            front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if profile.protocol.contains(VhostUserProtocolFeatures::MQ) {
            let queues = front_end.get_queue_num().expect("GET_QUEUE_NUM");
            assert!(queues >= profile.queues as u64, "{queues} queues are offered");
        }
        front_end.set_features(features).expect("SET_FEATURES");
        let guest = guest.into();
        let has_event_idx = features & EVENT_IDX != 0;
        let queue = |_| {
            let ring = Ring::new(&guest, profile.ring_size, has_event_idx, profile.start);
            Queue::new(ring, profile.depth, profile.request_bytes)
        };
        let queues = (0..profile.queues).map(queue).collect();
        Client { front_end, guest, queues, offered, features, profile: profile.clone() }
    }

    /// Tells of all memory.
    #[track_caller]
    pub fn tell_memory(&mut self) {
        let regions = self.guest.regions();
        if self.profile.slots && self.profile.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            assert!(self.front_end.get_max_mem_slots().expect("GET_MAX_MEM_SLOTS") >= regions.len() as u64);
            for region in &regions {
                self.front_end.add_mem_region(region).expect("ADD_MEM_REG");
            }
        } else {
            self.front_end.set_mem_table(&regions).expect("SET_MEM_TABLE");
        }
    }

    /// Sets a ring up, by the steps of the profile.
    #[track_caller]
    pub fn set_up(&mut self, index: usize, base: u16) {
        for step in self.profile.steps.clone() {
            self.step(index, step, base);
        }
    }

    /// One step of a ring's set-up.
    #[track_caller]
    pub fn step(&mut self, index: usize, step: Step, base: u16) {
        self.step_of(&self.queues[index].ring, index, step, base);
    }

    /// One step of the set-up of a ring that is elsewhere.
    #[track_caller]
    pub fn step_of(&self, ring: &Ring, index: usize, step: Step, base: u16) {
        let front_end = &self.front_end;
        let result = match step {
            Step::Num => front_end.set_vring_num(index, ring.size),
            Step::Base => front_end.set_vring_base(index, base),
            Step::Addr => front_end.set_vring_addr(index, &ring.config()),
            Step::Kick => front_end.set_vring_kick(index, &ring.kick.descriptor),
            Step::Call => front_end.set_vring_call(index, &ring.call.descriptor),
            Step::Err => front_end.set_vring_err(index, &ring.call.descriptor),
        };
        result.unwrap_or_else(|error| panic!("{step:?} of ring {index}: {error}"));
    }

    /// Enables or disables a ring.
    #[track_caller]
    pub fn enable(&mut self, index: usize, enable: bool) {
        self.front_end.set_vring_enable(index, enable).expect("SET_VRING_ENABLE");
    }

    /// Stops a ring: which entry comes next.
    #[track_caller]
    pub fn base(&mut self, index: usize) -> u16 {
        self.front_end.get_vring_base(index).expect("GET_VRING_BASE") as u16
    }

    /// Has another driver start from nothing on the same connection, as a guest's reset does. The rings have been stopped.
    #[track_caller]
    pub fn restart(&mut self, profile: &Profile) {
        self.features = self.offered & profile.features & !LOG_ALL;
        self.front_end.set_features(self.features).expect("SET_FEATURES");
        let has_event_idx = self.features & EVENT_IDX != 0;
        for index in 0..self.queues.len() {
            let ring = Ring::new(&self.guest, profile.ring_size, has_event_idx, 0);
            self.queues[index] = Queue::new(ring, profile.depth, profile.request_bytes);
            self.set_up(index, 0);
        }
        (0..self.queues.len()).for_each(|index| self.enable(index, true));
        self.settle();
    }

    /// Loses the connection, and goes on over another with the driver where it was, as QEMU does.
    #[track_caller]
    pub fn reconnect(self, stream: UnixStream, profile: &Profile) -> Client {
        let Client { front_end, guest, queues, .. } = self;
        drop(front_end);
        let mut client = Client::negotiate(stream, profile, guest);
        client.queues = queues;
        client.tell_memory();
        for index in 0..client.queues.len() {
            let base = client.queues[index].ring.next_used;
            client.set_up(index, base);
            client.enable(index, true);
        }
        client.settle();
        client
    }

    /// Tells the backend where the front end takes messages, and listens there.
    #[track_caller]
    pub fn listen_on_channel(&mut self) -> Channel {
        let (ours, theirs) = UnixStream::pair().expect("two ends");
        self.front_end.set_backend_request_fd(&theirs).expect("SET_BACKEND_REQ_FD");
        ours.set_read_timeout(Some(PATIENCE)).expect("a limit");
        Channel { stream: ours }
    }

    /// How many sectors the disk has.
    #[track_caller]
    pub fn capacity(&mut self) -> u64 {
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) = self.front_end.get_config(0, 8, flags, &[0; 8]).expect("GET_CONFIG");
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }

    /// Waits until the backend has seen all messages so far.
    #[track_caller]
    pub fn settle(&self) {
        self.front_end.get_features().expect("GET_FEATURES");
    }
}

/// Where a front end takes the backend's messages.
pub struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// The number of the next message, which asks for no answer and has nothing behind its header.
    #[track_caller]
    pub fn next_request(&self) -> u32 {
        let mut header = [0; 12];
        (&self.stream).read_exact(&mut header).expect("a message");
        let part = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes"));
        assert_eq!((part(4), part(8)), (1, 0), "version 1, no answer, no payload");
        part(0)
    }
}

/// Sees that a backend serves a front end that means well: some verified work over a disk with these contents.
#[track_caller]
pub fn check_served(backend: &Backend, model: &mut [u8], seed: u64) {
    let mut client = Client::start(backend, &Profile::qemu());
    let sectors = 0..model.len() / SECTOR;
    client.queues[0].work(model, sectors, &mut SmallRng::seed_from_u64(seed), 4);
}
