//! [`Standing`]: how a machine's device is to stand, whoever serves it; and [`Link`], on which one backend is told of it.
//!
//! A standing outlives connections and backends: memory, rings, features, and account of what is in flight. What is said about it
//! follows QEMU. Knows nothing of why any of it changes.

use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::{Context, Result};
use vhost::vhost_user::VhostUserProtocolFeatures;

use crate::connection::{Config, Connection, Driver, InflightRegion, Region, Wiring};
use crate::device::{Places, Queue, Setup};
use crate::run;
use crate::soak::disk::{Manner, Memory};
use crate::soak::guest::{BLOCK_BYTES, DEPTH};
use crate::sys::SharedMemory;

pub struct Standing {
    manner: Manner,
    setup: Setup,
    places: Places,
    memory: Arc<SharedMemory>,
    /// Memory that is always there, and memory that is plugged and unplugged.
    main: Region,
    spare: Region,
    pub is_plugged: bool,
    features: u64,
    rings: Vec<Wiring>,
    /// Whether the rings are to run.
    pub runs: bool,
    /// Of a front end that keeps account over its backend's death.
    pub inflight: Option<InflightRegion>,
}

impl Standing {
    /// No driver yet.
    pub fn new(manner: Manner) -> Result<Self> {
        let setup = Setup {
            queues: manner.queues,
            queue_size: manner.queue_size,
            area_bytes: run::area_bytes(BLOCK_BYTES, DEPTH, 0, manner.segment_bytes.unwrap_or(BLOCK_BYTES)),
            segment_bytes: manner.segment_bytes,
            indirect: manner.indirect,
        };
        let places = Places::new(&setup);
        let main = Region { start: 0, bytes: places.bytes };
        let spare_bytes = (manner.queues * DEPTH * BLOCK_BYTES as usize).next_multiple_of(2 << 20);
        let spare = Region { start: main.bytes, bytes: spare_bytes };
        Ok(Self {
            manner,
            setup,
            places,
            memory: Arc::new(SharedMemory::new(main.bytes + spare.bytes).context("a guest's memory")?),
            main,
            spare,
            is_plugged: false,
            features: 0,
            rings: Vec::new(),
            runs: false,
            inflight: None,
        })
    }

    /// A driver resets the device and makes its queues, which start from nothing. The rings do not run.
    pub fn driver_starts(&mut self, driver: Driver, offered: u64, config: &Config) -> Result<Vec<Queue>> {
        self.features = driver.takes(offered);
        let setup = match driver {
            Driver::Firmware => Setup { queues: 1, segment_bytes: None, ..self.setup },
            Driver::Kernel { .. } => self.setup,
        };
        let mut queues = self.places.queues(&self.memory, &setup, config, self.features)?;
        for queue in &mut queues {
            queue.reshape(BLOCK_BYTES, DEPTH.min(queue.depth_max(BLOCK_BYTES)), 0)?;
        }
        self.rings = queues.iter().map(Queue::wiring).collect::<Result<_>>()?;
        // The next start makes another: a reset forgets what was in flight.
        self.inflight = None;
        Ok(queues)
    }

    /// Where buffers may lie besides, while it is plugged.
    pub fn spare(&self) -> Range<usize> {
        self.spare.start..self.spare.start + self.spare.bytes
    }

    pub fn rings(&self) -> usize {
        self.rings.len()
    }

    /// How far the device has come with a ring.
    pub fn position(&self, ring: usize) -> u16 {
        self.rings[ring].layout.used_index(&self.memory)
    }

    pub fn positions(&self) -> Vec<u16> {
        (0..self.rings.len()).map(|ring| self.position(ring)).collect()
    }

    fn regions(&self) -> Vec<Region> {
        if self.is_plugged { vec![self.main, self.spare] } else { vec![self.main] }
    }
}

/// A connection, and what was said on it that is not to be said twice.
pub struct Link {
    pub connection: Connection,
    /// Where the backend's own messages arrive.
    pub channel: UnixStream,
    told: Vec<Region>,
}

impl Link {
    /// Greets a backend.
    pub fn new(socket: UnixStream, manner: &Manner) -> Result<Self> {
        let mut wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::RESET_DEVICE;
        if manner.keeps_inflight {
            wanted |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        }
        if manner.memory == Memory::Slots {
            wanted |= VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        }
        let mut connection = Connection::new(socket, wanted, manner.answered)?;
        connection.check_queues(manner.queues)?;
        let channel = connection.open_channel()?;
        connection.settle()?;
        Ok(Self { connection, channel, told: Vec::new() })
    }

    /// Has the rings run from where they are.
    pub fn start(&mut self, standing: &Standing) -> Result<()> {
        if let Some(inflight) = &standing.inflight {
            self.connection.give_inflight(inflight)?;
        }
        self.connection.set_features(standing.features)?;
        self.tell_memory(standing)?;
        for (index, wiring) in standing.rings.iter().enumerate() {
            self.connection.set_up_ring(index, &standing.memory, wiring, standing.position(index))?;
        }
        self.enable(standing, true)
    }

    /// Enables or disables all rings, and waits until that is so.
    pub fn enable(&mut self, standing: &Standing, enable: bool) -> Result<()> {
        for index in 0..standing.rings() {
            self.connection.enable(index, enable)?;
        }
        self.connection.settle()
    }

    /// Stops all rings: where each is to go on.
    pub fn stop(&mut self, standing: &Standing) -> Result<Vec<u16>> {
        self.enable(standing, false)?;
        (0..standing.rings()).map(|index| self.connection.stop_ring(index)).collect()
    }

    /// Tells of the memory as it is now, also while rings run.
    pub fn tell_memory(&mut self, standing: &Standing) -> Result<()> {
        let regions = standing.regions();
        match standing.manner.memory {
            Memory::Table => self.connection.set_memory(&standing.memory, &regions)?,
            Memory::Slots => {
                for gone in self.told.iter().filter(|told| !regions.contains(told)) {
                    self.connection.remove_memory(&standing.memory, *gone)?;
                }
                for new in regions.iter().filter(|region| !self.told.contains(region)) {
                    self.connection.add_memory(&standing.memory, *new)?;
                }
            }
        }
        self.told = regions;
        self.connection.settle()
    }
}
