//! One vhost-user-blk session from the front end's side: negotiation, memory, queues.
//!
//! Owns the connection and the shared memory. Knows nothing of workloads. The set-up follows QEMU's
//! order, and asks for no more than the backend offers.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::request::{GUEST_BASE, SECTOR_BYTES, Shape, Slots};
use crate::ring::{Layout, Ring};
use crate::sys::SharedMemory;

const QUEUES_MAX: u64 = 64;
/// The configuration space up to and including the write-zeroes fields (virtio 1.2, 5.2.4).
const CONFIG_BYTES: usize = 60;
const CAPACITY_AT: usize = 0;
const SEGMENTS_MAX_AT: usize = 12;

/// A greeted backend: features known, nothing set up yet.
pub struct Greeting {
    frontend: Frontend,
    offered: u64,
    protocol: VhostUserProtocolFeatures,
    pub config: Config,
}

/// What the configuration space says.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub capacity_bytes: u64,
    /// Data segments that a request may have.
    pub segments_max: u32,
    pub read_only: bool,
    pub flush: bool,
    pub discard: bool,
    pub write_zeroes: bool,
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
    frontend: Frontend,
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

impl Greeting {
    /// Speaks with the backend on `socket` up to its configuration.
    pub fn new(socket: UnixStream) -> Result<Self> {
        let mut frontend = Frontend::from_stream(socket, QUEUES_MAX);
        frontend.set_owner().context("SET_OWNER")?;
        let offered = frontend.get_features().context("GET_FEATURES")?;
        let has_protocol = offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        ensure!(has_protocol, "the backend offers no protocol features, so no configuration");
        let wanted =
            VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        let protocol = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")? & wanted;
        frontend.set_protocol_features(protocol).context("SET_PROTOCOL_FEATURES")?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let (_, bytes) = frontend
            .get_config(0, CONFIG_BYTES as u32, VhostUserConfigFlags::WRITABLE, &[0; CONFIG_BYTES])
            .context("GET_CONFIG")?;
        let config = Config::parse(&bytes, offered)?;
        Ok(Self { frontend, offered, protocol, config })
    }

    /// Sets up memory and queues and starts them.
    pub fn start(mut self, setup: &Setup) -> Result<Device> {
        let acknowledged = self.acknowledged(setup);
        let event_idx = acknowledged & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let indirect = acknowledged & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0;
        let setup = Setup { indirect, ..*setup };
        let queues_offered = if self.protocol.contains(VhostUserProtocolFeatures::MQ) {
            self.frontend.get_queue_num().context("GET_QUEUE_NUM")?
        } else {
            1
        };
        ensure!(
            setup.queues as u64 <= queues_offered,
            "{} queues wanted, the backend offers {queues_offered}",
            setup.queues
        );
        self.frontend.set_features(acknowledged).context("SET_FEATURES")?;

        let mut end = 0;
        let mut place = |bytes: usize| {
            let start = end;
            end = (start + bytes).next_multiple_of(4096);
            start
        };
        let mut places = Vec::new();
        for _ in 0..setup.queues {
            let ring_bytes = Layout::new(0, setup.queue_size).end;
            let layout = Layout::new(place(ring_bytes), setup.queue_size);
            places.push((layout, place(setup.area_bytes)));
        }
        let memory = Arc::new(SharedMemory::new(end.next_multiple_of(2 << 20)).context("memory")?);
        self.frontend
            .set_mem_table(&[VhostUserMemoryRegionInfo {
                guest_phys_addr: GUEST_BASE,
                memory_size: memory.bytes() as u64,
                userspace_addr: memory.address(),
                mmap_offset: 0,
                mmap_handle: memory.fd(),
            }])
            .context("SET_MEM_TABLE")?;
        let mut queues = Vec::new();
        for (index, (layout, area)) in places.into_iter().enumerate() {
            let queue = Queue {
                ring: Ring::new(memory.clone(), layout, event_idx),
                slots: Slots::new(memory.clone(), area, Shape::default(), 1),
                kick: EventFd::new(EFD_NONBLOCK)?,
                call: EventFd::new(EFD_NONBLOCK)?,
                area,
                setup,
                segments_max: self.config.segments_max,
            };
            start_queue(&mut self.frontend, index, &memory, &queue)
                .with_context(|| format!("start of queue {index}"))?;
            queues.push(queue);
        }
        Ok(Device { frontend: self.frontend, config: self.config, queues })
    }

    fn acknowledged(&self, setup: &Setup) -> u64 {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_RO,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_MQ,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ];
        let mut wanted = bits.iter().fold(0, |all, bit| all | 1 << bit);
        wanted |= VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if setup.indirect {
            wanted |= 1 << VIRTIO_RING_F_INDIRECT_DESC;
        }
        self.offered & wanted
    }
}

fn start_queue(frontend: &mut Frontend, index: usize, memory: &SharedMemory, queue: &Queue) -> vhost::Result<()> {
    let layout = queue.ring.layout();
    frontend.set_vring_num(index, layout.size)?;
    frontend.set_vring_base(index, 0)?;
    let address = |offset: usize| memory.address() + offset as u64;
    frontend.set_vring_addr(
        index,
        &VringConfigData {
            queue_max_size: layout.size,
            queue_size: layout.size,
            flags: 0,
            desc_table_addr: address(layout.descriptors),
            used_ring_addr: address(layout.used),
            avail_ring_addr: address(layout.available),
            log_addr: None,
        },
    )?;
    frontend.set_vring_call(index, &queue.call)?;
    frontend.set_vring_kick(index, &queue.kick)?;
    frontend.set_vring_enable(index, true)
}

impl Config {
    fn parse(bytes: &[u8], features: u64) -> Result<Self> {
        let Some((capacity, _)) = bytes[CAPACITY_AT..].split_first_chunk() else {
            bail!("the configuration has {} bytes, too few for a capacity", bytes.len());
        };
        let has = |bit: u32| features & 1 << bit != 0;
        let segments = bytes.get(SEGMENTS_MAX_AT..).and_then(|bytes| bytes.first_chunk());
        let segments_max = match segments {
            Some(segments) if has(VIRTIO_BLK_F_SEG_MAX) => u32::from_le_bytes(*segments),
            _ => 1,
        };
        Ok(Self {
            capacity_bytes: u64::from_le_bytes(*capacity) * SECTOR_BYTES,
            segments_max,
            read_only: has(VIRTIO_BLK_F_RO),
            flush: has(VIRTIO_BLK_F_FLUSH),
            discard: has(VIRTIO_BLK_F_DISCARD),
            write_zeroes: has(VIRTIO_BLK_F_WRITE_ZEROES),
        })
    }
}

impl Device {
    /// Stops every queue and says goodbye, as a guest does when it is shut down.
    pub fn stop(mut self) -> Result<()> {
        for index in 0..self.queues.len() {
            self.frontend.set_vring_enable(index, false).context("SET_VRING_ENABLE(0)")?;
            self.frontend.get_vring_base(index).context("GET_VRING_BASE")?;
        }
        Ok(())
    }
}

impl Queue {
    /// Makes the slots for `depth` requests of at most `block_bytes`, with their buffers spread over
    /// at least `buffer_bytes`. Only while nothing is in flight.
    pub fn reshape(&mut self, block_bytes: u32, depth: usize, buffer_bytes: usize) -> Result<()> {
        let shape = Shape {
            block_bytes,
            segment_bytes: self.setup.segment_bytes.unwrap_or(block_bytes).min(block_bytes),
            buffers: buffer_bytes / block_bytes as usize,
            indirect: self.setup.indirect,
        };
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

    pub fn call_fd(&self) -> i32 {
        self.call.as_raw_fd()
    }
}
