//! One connection to a backend: what a front end says on it, message by message.
//!
//! Owns the socket and what was negotiated. Knows nothing of requests, nor of when a ring is to run. Asks for no more than
//! the backend offers.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail, ensure};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use crate::request::{GUEST_BASE, SECTOR_BYTES};
use crate::ring::Layout;
use crate::sys::SharedMemory;

const QUEUES_MAX: u64 = 64;
/// The configuration space up to and including the write-zeroes fields (virtio 1.2, 5.2.4).
const CONFIG_BYTES: usize = 60;
const CAPACITY_AT: usize = 0;
const SEGMENTS_MAX_AT: usize = 12;
const DISCARD_ALIGNMENT_AT: usize = 44;

/// A connection on which features are known.
pub struct Connection {
    frontend: Frontend,
    offered: u64,
    protocol: VhostUserProtocolFeatures,
}

/// What the configuration space says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Config {
    pub capacity_bytes: u64,
    /// Data segments that a request may have.
    pub segments_max: u32,
    pub read_only: bool,
    pub flush: bool,
    pub discard: bool,
    pub write_zeroes: bool,
    /// What a discard does away with is a multiple of this.
    pub discard_alignment_bytes: u64,
}

/// Whose features a driver takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// None that save work, as OVMF and SeaBIOS.
    Firmware,
    /// As Linux does, which always takes indirect descriptors.
    Kernel { indirect: bool },
}

impl Driver {
    /// The features that it takes of those that are offered.
    pub fn takes(self, offered: u64) -> u64 {
        let plain = [VIRTIO_F_VERSION_1, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH];
        let more = [
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_MQ,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ];
        let (more, indirect) = match self {
            Self::Firmware => (&[][..], false),
            Self::Kernel { indirect } => (&more[..], indirect),
        };
        let mut wanted = plain.iter().chain(more).fold(0, |all, bit| all | 1 << bit);
        wanted |= VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if indirect {
            wanted |= 1 << VIRTIO_RING_F_INDIRECT_DESC;
        }
        offered & wanted
    }

    /// What it makes of a disk: requests that it has not asked for do not exist.
    pub fn sees(self, config: Config) -> Config {
        match self {
            Self::Firmware => Config { discard: false, write_zeroes: false, ..config },
            Self::Kernel { .. } => config,
        }
    }
}

/// A part of the shared memory, as a backend is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// In the shared memory, and behind `GUEST_BASE` for the guest.
    pub start: usize,
    pub bytes: usize,
}

impl Region {
    fn info(self, memory: &SharedMemory) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE + self.start as u64,
            memory_size: self.bytes as u64,
            userspace_addr: memory.address() + self.start as u64,
            mmap_offset: self.start as u64,
            mmap_handle: memory.fd(),
        }
    }
}

/// Where a ring is, and how its two sides notify each other.
#[derive(Debug)]
pub struct Wiring {
    pub layout: Layout,
    pub kick: EventFd,
    pub call: EventFd,
}

/// Memory for what is in flight, which a backend makes and a front end keeps.
pub struct InflightRegion {
    shape: VhostUserInflight,
    file: File,
}

impl Connection {
    /// Greets the backend on `socket`, and takes what it offers of the protocol features `wanted`.
    ///
    /// `answered`: every message is to be answered, if the backend can do that.
    pub fn new(socket: UnixStream, wanted: VhostUserProtocolFeatures, answered: bool) -> Result<Self> {
        let mut frontend = Frontend::from_stream(socket, QUEUES_MAX);
        frontend.set_owner().context("SET_OWNER")?;
        let offered = frontend.get_features().context("GET_FEATURES")?;
        let has_protocol = offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        ensure!(has_protocol, "the backend offers no protocol features, so no configuration");
        let protocol = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")? & wanted;
        frontend.set_protocol_features(protocol).context("SET_PROTOCOL_FEATURES")?;
        if answered && protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        Ok(Self { frontend, offered, protocol })
    }

    /// What the configuration space says now.
    pub fn config(&mut self) -> Result<Config> {
        let (_, bytes) = self
            .frontend
            .get_config(0, CONFIG_BYTES as u32, VhostUserConfigFlags::WRITABLE, &[0; CONFIG_BYTES])
            .context("GET_CONFIG")?;
        Config::parse(&bytes, self.offered)
    }

    /// The features that the backend offers.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Sees that there are so many queues.
    pub fn check_queues(&mut self, wanted: usize) -> Result<()> {
        let offered = if self.protocol.contains(VhostUserProtocolFeatures::MQ) {
            self.frontend.get_queue_num().context("GET_QUEUE_NUM")?
        } else {
            1
        };
        ensure!(wanted as u64 <= offered, "{wanted} queues wanted, the backend offers {offered}");
        Ok(())
    }

    pub fn set_features(&mut self, features: u64) -> Result<()> {
        self.frontend.set_features(features).context("SET_FEATURES")
    }

    /// Tells of all memory at once.
    pub fn set_memory(&mut self, memory: &SharedMemory, regions: &[Region]) -> Result<()> {
        let regions: Vec<_> = regions.iter().map(|region| region.info(memory)).collect();
        self.frontend.set_mem_table(&regions).context("SET_MEM_TABLE")?;
        Ok(())
    }

    pub fn add_memory(&mut self, memory: &SharedMemory, region: Region) -> Result<()> {
        self.frontend.add_mem_region(&region.info(memory)).context("ADD_MEM_REG")?;
        Ok(())
    }

    pub fn remove_memory(&mut self, memory: &SharedMemory, region: Region) -> Result<()> {
        self.frontend.remove_mem_region(&region.info(memory)).context("REM_MEM_REG")
    }

    /// Sets a ring up in QEMU's order, to go on at entry `base`; it runs once it is enabled.
    pub fn set_up_ring(&mut self, index: usize, memory: &SharedMemory, wiring: &Wiring, base: u16) -> Result<()> {
        self.tell_ring(index, memory, wiring, base).with_context(|| format!("the set-up of ring {index}"))
    }

    fn tell_ring(
        &mut self,
        index: usize,
        memory: &SharedMemory,
        wiring: &Wiring,
        base: u16,
    ) -> Result<(), vhost::Error> {
        let layout = wiring.layout;
        self.frontend.set_vring_num(index, layout.size)?;
        self.frontend.set_vring_base(index, base)?;
        let address = |offset: usize| memory.address() + offset as u64;
        self.frontend.set_vring_addr(
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
        self.frontend.set_vring_call(index, &wiring.call)?;
        self.frontend.set_vring_kick(index, &wiring.kick)
    }

    pub fn enable(&mut self, index: usize, enable: bool) -> Result<()> {
        self.frontend.set_vring_enable(index, enable).with_context(|| format!("SET_VRING_ENABLE of ring {index}"))
    }

    /// Stops a ring: the entry at which it is to go on.
    pub fn stop_ring(&mut self, index: usize) -> Result<u16> {
        let base = self.frontend.get_vring_base(index).with_context(|| format!("GET_VRING_BASE of ring {index}"))?;
        u16::try_from(base).with_context(|| format!("ring {index} stops at entry {base}"))
    }

    /// Has the backend make memory for what is in flight on so many rings of that size.
    pub fn ask_inflight(&mut self, queues: usize, ring_size: u16) -> Result<InflightRegion> {
        let num_queues = u16::try_from(queues)?;
        let asked = VhostUserInflight { num_queues, queue_size: ring_size, ..Default::default() };
        let (shape, file) = self.frontend.get_inflight_fd(&asked).context("GET_INFLIGHT_FD")?;
        Ok(InflightRegion { shape, file })
    }

    /// Gives the backend the memory for what is in flight, with all that an earlier one has noted there.
    pub fn give_inflight(&mut self, region: &InflightRegion) -> Result<()> {
        self.frontend.set_inflight_fd(&region.shape, region.file.as_raw_fd()).context("SET_INFLIGHT_FD")
    }

    pub fn reset_device(&mut self) -> Result<()> {
        self.frontend.reset_device().context("RESET_DEVICE")
    }

    /// Gives the backend a channel for messages of its own: the end at which they arrive.
    pub fn open_channel(&mut self) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.frontend.set_backend_request_fd(&theirs).context("SET_BACKEND_REQ_FD")?;
        Ok(ours)
    }

    /// Waits until all that was said has been heard.
    pub fn settle(&mut self) -> Result<()> {
        self.frontend.get_features().context("GET_FEATURES")?;
        Ok(())
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.frontend.as_raw_fd()
    }
}

impl Config {
    fn parse(bytes: &[u8], features: u64) -> Result<Self> {
        let Some((capacity, _)) = bytes[CAPACITY_AT..].split_first_chunk() else {
            bail!("the configuration has {} bytes, too few for a capacity", bytes.len());
        };
        let has = |bit: u32| features & 1 << bit != 0;
        let number =
            |at: usize| bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map(|it| u32::from_le_bytes(*it));
        let alignment = number(DISCARD_ALIGNMENT_AT).filter(|_| has(VIRTIO_BLK_F_DISCARD)).unwrap_or(1);
        Ok(Self {
            capacity_bytes: u64::from_le_bytes(*capacity) * SECTOR_BYTES,
            segments_max: number(SEGMENTS_MAX_AT).filter(|_| has(VIRTIO_BLK_F_SEG_MAX)).unwrap_or(1),
            read_only: has(VIRTIO_BLK_F_RO),
            flush: has(VIRTIO_BLK_F_FLUSH),
            discard: has(VIRTIO_BLK_F_DISCARD),
            write_zeroes: has(VIRTIO_BLK_F_WRITE_ZEROES),
            discard_alignment_bytes: u64::from(alignment.max(1)) * SECTOR_BYTES,
        })
    }
}
