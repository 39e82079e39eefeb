//! What each message of the front end does to its [`Session`], as the protocol's code calls it.
//!
//! An error ends the connection.

use std::fs::File;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, GpuBackend, VhostUserBackendReqHandlerMut};

use crate::sys::guest::RegionPlace;
use crate::vhost_user::device::{Device, PROTOCOL_FEATURES_BIT};
use crate::vhost_user::inflight::{self, RegionShape};
use crate::vhost_user::order::{LogPlace, REGIONS_MAX};
use crate::vhost_user::ring::RingPlace;
use crate::vhost_user::service::chain_of;

use super::{Refusal, Result, Session};

impl VhostUserBackendReqHandlerMut for Session<'_> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.service().device().features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let offered = self.service().device().features();
        if features & !offered != 0 {
            return Err(Refusal::Features { features, offered }.into());
        }
        self.features = features;
        self.ask(self.order(), &[]).map_err(Refusal::from)?;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(Device::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = Device::protocol_features().bits();
        if features & !offered != 0 {
            return Err(Refusal::Features { features, offered }.into());
        }
        self.protocol_features = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let place = |region: &VhostUserMemoryRegion| {
            // Copied field by field: the crate's structure is packed.
            let VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, mmap_offset } = *region;
            place_of(guest_phys_addr, memory_size, user_addr, mmap_offset)
        };
        let places: Vec<RegionPlace> = regions.iter().map(place).collect();
        self.stop_outside(&places)?;
        self.regions = places.into_iter().zip(files).collect();
        self.tell_memory().map(|()| None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        let place = place_of(region.guest_phys_addr, region.memory_size, region.user_addr, region.mmap_offset);
        self.regions.push((place, file));
        self.tell_memory().map(|()| None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let place = place_of(region.guest_phys_addr, region.memory_size, region.user_addr, region.mmap_offset);
        // The offset in the file is not compared: the protocol identifies a region by its addresses and size.
        let is_it = |found: &RegionPlace| RegionPlace { file_offset: place.file_offset, ..*found } == place;
        let Some(index) = self.regions.iter().position(|(found, _)| is_it(found)) else {
            return Err(Refusal::UnknownRegion { place }.into());
        };
        let mut places = self.places();
        places.remove(index);
        self.stop_outside(&places)?;
        self.regions.remove(index);
        self.tell_memory()
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let ring = self.index(index)?;
        let max = self.service().offer().ring_size_max;
        match u16::try_from(size) {
            Ok(size) if size.is_power_of_two() && size <= max => self.change(ring, |ring| ring.place.size = size),
            _ => Err(Refusal::RingSize { index, size, max }.into()),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let index = self.index(index)?;
        let place = RingPlace { descriptors, available, used, ..self.rings[index].place };
        let used_in_log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let ring = &self.rings[index];
        if ring.placed && (ring.place, ring.used_in_log) == (place, used_in_log) {
            return Ok(());
        }
        self.change(index, |ring| (ring.place, ring.used_in_log, ring.placed) = (place, used_in_log, true))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let ring = self.index(index)?;
        let base = u16::try_from(base).map_err(|_| Refusal::RingBase { index, base })?;
        if self.rings[ring].runs {
            // It has gone on from where it was since it started; going back would serve requests twice.
            log::debug!("ring {index} runs already: not moved to entry {base}");
        } else {
            self.rings[ring].next_available = Some(base);
            self.rings[ring].has_base = true;
        }
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let found = self.index(index)?;
        self.stop(found)?;
        let ring = &mut self.rings[found];
        // Started again by a new kick descriptor alone.
        ring.started = false;
        ring.has_base = false;
        ring.kick = None;
        let next_available = ring.next_available.unwrap_or(0);
        self.release_if_moving()?;
        Ok(VhostUserVringState::new(index, next_available.into()))
    }

    fn set_vring_kick(&mut self, index: u8, kick: Option<File>) -> Result<()> {
        let ring = self.index(index.into())?;
        if kick.is_none() {
            return Err(Refusal::NoKick { index: index.into() }.into());
        }
        let starts_enabled = self.features & PROTOCOL_FEATURES_BIT == 0;
        self.change(ring, |ring| {
            ring.kick = kick;
            ring.started = true;
            ring.enabled |= starts_enabled;
        })
    }

    fn set_vring_call(&mut self, index: u8, call: Option<File>) -> Result<()> {
        let ring = self.index(index.into())?;
        self.change(ring, |ring| ring.call = call)
    }

    fn set_vring_err(&mut self, index: u8, error: Option<File>) -> Result<()> {
        let ring = self.index(index.into())?;
        self.change(ring, |ring| ring.error = error)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let ring = self.index(index)?;
        if self.rings[ring].enabled == enable {
            return Ok(());
        }
        self.change(ring, |ring| ring.enabled = enable)?;
        self.release_if_moving()
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(self.service().device().config(offset, size))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.service().device().set_config(offset, bytes);
        self.ask(self.order(), &[]).map_err(Refusal::from)?;
        Ok(())
    }

    fn set_backend_req_fd(&mut self, channel: Backend) {
        self._channel = Some(channel);
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        not_offered("a GPU socket")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered("a shared object")
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let VhostUserInflight { num_queues, queue_size, .. } = *asked;
        let shape = RegionShape::new(num_queues, queue_size);
        shape.check().map_err(Refusal::from)?;
        let system = |source| Refusal::System { action: "make memory for what is in flight", source };
        let file = inflight::create(&shape).map_err(system)?;
        Ok((VhostUserInflight { mmap_size: shape.bytes, mmap_offset: 0, num_queues, queue_size }, file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *given;
        let shape = RegionShape { offset: mmap_offset, bytes: mmap_size, slots: num_queues, ring_size: queue_size };
        shape.check().map_err(Refusal::from)?;
        self.inflight = Some((shape, file));
        // The worker gets it with the memory, at the latest.
        if self.regions.is_empty() { Ok(()) } else { self.tell_memory() }
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        match direction {
            VhostTransferStateDirection::SAVE => {
                // Closed afterwards, by which the front end knows that it has all.
                self.state().send(&file).map_err(Refusal::from)?;
                self.incoming = None;
            }
            VhostTransferStateDirection::LOAD => self.incoming = Some(file),
        }
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        match self.incoming.take() {
            Some(file) => Ok(self.state().check(&file).map_err(|error| {
                // The front end is told that it is refused, and not why.
                log::error!("{}", chain_of(&error));
                Refusal::from(error)
            })?),
            None => Ok(()),
        }
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered("shared memory")
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let VhostUserLog { mmap_size: bytes, mmap_offset: offset } = *log;
        self.log = Some((LogPlace { offset, bytes }, file));
        // The worker gets it with the memory, at the latest.
        if self.regions.is_empty() { Ok(()) } else { self.tell_memory() }
    }
}

fn place_of(guest_address: u64, bytes: u64, user_address: u64, file_offset: u64) -> RegionPlace {
    RegionPlace { guest_address, user_address, bytes, file_offset }
}

fn not_offered<T>(what: &'static str) -> Result<T> {
    Err(Refusal::NotOffered { what }.into())
}
