//! One vhost-user-blk session from the front end's side: memory and queues, set up and running.
//!
//! Owns the shared memory and what lies where in it. Knows nothing of workloads. What is said to the backend is
//! [`Connection`]'s business, and in QEMU's order.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::connection::{Connection, Driver, Region, Wiring};
use crate::request::{Shape, Slots};
use crate::ring::{Layout, Ring};
use crate::sys::SharedMemory;

pub use crate::connection::Config;

/// A page of 2 MiB, so that memory of whole ones can be mapped by them.
const MEMORY_ALIGN: usize = 2 << 20;

/// A greeted backend: features known, nothing set up yet.
pub struct Greeting {
    connection: Connection,
    pub config: Config,
}

/// What the driver wants of the device.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub queues: usize,
    pub queue_size: u16,
    /// Shared memory of each queue for requests and their buffers.
    pub area_bytes: usize,
    /// The longest piece of a buffer that one descriptor names; without it, the whole buffer.
    pub segment_bytes: Option<u32>,
    pub indirect: bool,
}

/// A running device.
pub struct Device {
    connection: Connection,
    pub config: Config,
    pub queues: Vec<Queue>,
}

/// A queue with all that it takes to drive it.
#[derive(Debug)]
pub struct Queue {
    pub ring: Ring,
    pub slots: Slots,
    pub kick: EventFd,
    pub call: EventFd,
    /// Where its slots' part of the shared memory starts.
    area: usize,
    setup: Setup,
    segments_max: u32,
}

/// Where the queues of a device lie in its memory.
#[derive(Clone, Debug)]
pub struct Places {
    /// Each queue's ring, and the area of its slots.
    queues: Vec<(Layout, usize)>,
    pub bytes: usize,
}

impl Places {
    pub fn new(setup: &Setup) -> Self {
        let mut end = 0;
        let mut place = |bytes: usize| {
            let start = end;
            end = (start + bytes).next_multiple_of(4096);
            start
        };
        let ring_bytes = Layout::new(0, setup.queue_size).end;
        let queues = (0..setup.queues)
            .map(|_| (Layout::new(place(ring_bytes), setup.queue_size), place(setup.area_bytes)))
            .collect();
        Self { queues, bytes: end.next_multiple_of(MEMORY_ALIGN) }
    }

    /// The first so many queues, empty, for a driver that has taken `features`.
    pub fn queues(
        &self,
        memory: &Arc<SharedMemory>,
        setup: &Setup,
        config: &Config,
        features: u64,
    ) -> Result<Vec<Queue>> {
        let has = |bit: u32| features & 1 << bit != 0;
        let setup = Setup { indirect: has(VIRTIO_RING_F_INDIRECT_DESC), ..*setup };
        let queue = |(layout, area): &(Layout, usize)| {
            Ok(Queue {
                ring: Ring::new(memory.clone(), *layout, has(VIRTIO_RING_F_EVENT_IDX)),
                slots: Slots::new(memory.clone(), *area, Shape::default(), 1),
                kick: EventFd::new(EFD_NONBLOCK)?,
                call: EventFd::new(EFD_NONBLOCK)?,
                area: *area,
                setup,
                segments_max: config.segments_max,
            })
        };
        self.queues.iter().take(setup.queues).map(queue).collect()
    }
}

impl Greeting {
    /// Speaks with the backend on `socket` up to its configuration.
    pub fn new(socket: UnixStream) -> Result<Self> {
        let wanted =
            VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        let mut connection = Connection::new(socket, wanted, true)?;
        let config = connection.config()?;
        Ok(Self { connection, config })
    }

    /// Sets up memory and queues and starts them.
    pub fn start(self, setup: &Setup) -> Result<Device> {
        let Self { mut connection, config } = self;
        let features = Driver::Kernel { indirect: setup.indirect }.takes(connection.offered());
        connection.check_queues(setup.queues)?;
        connection.set_features(features)?;
        let places = Places::new(setup);
        let memory = Arc::new(SharedMemory::new(places.bytes).context("memory")?);
        connection.set_memory(&memory, &[Region { start: 0, bytes: memory.bytes() }])?;
        let queues = places.queues(&memory, setup, &config, features)?;
        for (index, queue) in queues.iter().enumerate() {
            connection.set_up_ring(index, &memory, &queue.wiring()?, 0)?;
            connection.enable(index, true)?;
        }
        Ok(Device { connection, config, queues })
    }
}

impl Device {
    /// Stops every queue and says goodbye, as a guest does when it is shut down.
    pub fn stop(mut self) -> Result<()> {
        for index in 0..self.queues.len() {
            self.connection.enable(index, false)?;
            self.connection.stop_ring(index)?;
        }
        Ok(())
    }
}

impl Queue {
    /// Makes the slots for `depth` requests of at most `block_bytes`, with their buffers spread over
    /// at least `buffer_bytes`. Only while nothing is in flight.
    pub fn reshape(&mut self, block_bytes: u32, depth: usize, buffer_bytes: usize) -> Result<()> {
        let shape = self.shape(block_bytes, buffer_bytes);
        let segments = block_bytes.div_ceil(shape.segment_bytes);
        ensure!(
            segments <= self.segments_max,
            "{segments} segments in a request, the device takes {}",
            self.segments_max
        );
        let size = self.setup.queue_size;
        let depth_max = shape.depth_max(size);
        ensure!(depth <= depth_max, "depth {depth}, a queue of {size} has room for {depth_max}");
        let (bytes, room) = (Slots::bytes(&shape, depth), self.setup.area_bytes);
        ensure!(bytes <= room, "{bytes} bytes of requests and buffers, room for {room}");
        self.slots = Slots::new(self.slots.shared(), self.area, shape, depth);
        Ok(())
    }

    fn shape(&self, block_bytes: u32, buffer_bytes: usize) -> Shape {
        Shape {
            block_bytes,
            segment_bytes: self.setup.segment_bytes.unwrap_or(block_bytes).min(block_bytes),
            buffers: buffer_bytes / block_bytes as usize,
            indirect: self.setup.indirect,
        }
    }

    /// How many requests of `block_bytes` fit into its ring at once.
    pub fn depth_max(&self, block_bytes: u32) -> usize {
        self.shape(block_bytes, 0).depth_max(self.setup.queue_size)
    }

    /// What the backend has to know of its ring.
    pub fn wiring(&self) -> Result<Wiring> {
        Ok(Wiring { layout: self.ring.layout(), kick: self.kick.try_clone()?, call: self.call.try_clone()? })
    }

    pub fn call_fd(&self) -> i32 {
        self.call.as_raw_fd()
    }
}
