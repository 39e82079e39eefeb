//! A backend as the field's own crates make it: a raw file on `vhost-user-backend`, plain `pread`.
//!
//! It is there to be compared with: what a backend costs whose author writes the block part alone.
//! It serves one connection, one thread to a queue, and knows reads, writes and flushes.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

use anyhow::{Context, Result};
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryLoadGuard,
    GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::request::{SECTOR_BYTES, STATUS_OK};
use crate::sys;

const QUEUE_SIZE_MAX: usize = 1024;
const SEGMENTS_MAX: u32 = 254;
const CONFIG_BYTES: usize = 60;

type Guest = GuestMemoryLoadGuard<GuestMemoryMmap>;

struct Reference {
    file: File,
    bytes: u64,
    queues: usize,
    writable: bool,
    guest: RwLock<Option<GuestMemoryAtomic<GuestMemoryMmap>>>,
    event_idx: AtomicBool,
}

/// Serves `file` to one front end on `socket`, then returns.
pub fn serve(file: &Path, socket: &Path, queues: usize, writable: bool) -> Result<()> {
    let opened = OpenOptions::new().read(true).write(writable).open(file);
    let opened = opened.with_context(|| file.display().to_string())?;
    let reference = Arc::new(Reference {
        bytes: opened.metadata()?.len(),
        file: opened,
        queues,
        writable,
        guest: RwLock::default(),
        event_idx: AtomicBool::new(false),
    });
    let guest = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let daemon = VhostUserDaemon::new("reference".to_owned(), reference, guest);
    daemon.and_then(|mut daemon| daemon.serve(socket)).map_err(|error| anyhow::anyhow!("{error}"))
}

impl VhostUserBackend for Reference {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        self.queues
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE_MAX
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        let read_only = if self.writable { 0 } else { 1 << VIRTIO_BLK_F_RO };
        let always = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | read_only;
        bits.iter().fold(always, |all, bit| all | 1 << bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = [0; CONFIG_BYTES];
        config[..8].copy_from_slice(&(self.bytes / SECTOR_BYTES).to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        config[34..36].copy_from_slice(&(self.queues as u16).to_le_bytes());
        let start = offset as usize;
        let wanted = start.checked_add(size as usize).and_then(|end| config.get(start..end));
        wanted.map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&self, guest: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        *self.guest.write().map_err(|_| io::ErrorKind::Other)? = Some(guest);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(&self, _event: u16, _events: EventSet, vrings: &[VringRwLock], _thread: usize) -> io::Result<()> {
        let guest = self.guest.read().map_err(|_| io::ErrorKind::Other)?.clone();
        let guest = guest.ok_or(io::ErrorKind::InvalidInput)?;
        let Some(vring) = vrings.first() else { return Ok(()) };
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            self.serve_queue(vring, &guest)?;
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

impl Reference {
    fn serve_queue(&self, vring: &VringRwLock, guest: &GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        let mut used_any = false;
        loop {
            let memory = guest.memory();
            let chain = vring.get_mut().get_queue_mut().pop_descriptor_chain(memory.clone());
            let Some(chain) = chain else { break };
            let head = chain.head_index();
            let written = self.serve_chain(chain, &memory)?;
            vring.add_used(head, written).map_err(io::Error::other)?;
            used_any = true;
        }
        if used_any && vring.needs_notification().map_err(io::Error::other)? {
            vring.signal_used_queue()?;
        }
        Ok(())
    }

    /// Does what one chain asks for; returns the bytes written to the guest.
    fn serve_chain(&self, chain: DescriptorChain<Guest>, memory: &Guest) -> io::Result<u32> {
        let mut header = None;
        let mut data = [Descriptor::default(); SEGMENTS_MAX as usize];
        let mut segments = 0;
        let mut status = None;
        for descriptor in chain {
            if header.is_none() {
                header = Some(descriptor.addr());
            } else if let Some(last) = status.replace(descriptor) {
                *data.get_mut(segments).ok_or(io::ErrorKind::InvalidData)? = last;
                segments += 1;
            }
        }
        let (Some(header), Some(status)) = (header, status) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let code: u32 = memory.read_obj(header).map_err(io::Error::other)?;
        let sector: u64 = memory.read_obj(GuestAddress(header.0 + 8)).map_err(io::Error::other)?;
        let data = &data[..segments];
        let (answer, written) = match code {
            VIRTIO_BLK_T_IN => self.transfer(data, sector, memory, sys::pread_into_guest),
            VIRTIO_BLK_T_OUT => {
                let (answer, _) = self.transfer(data, sector, memory, sys::pwrite_from_guest);
                (answer, 0)
            }
            VIRTIO_BLK_T_FLUSH if self.file.sync_data().is_ok() => (STATUS_OK, 0),
            VIRTIO_BLK_T_FLUSH => (VIRTIO_BLK_S_IOERR as u8, 0),
            _ => (VIRTIO_BLK_S_UNSUPP as u8, 0),
        };
        memory.write_obj(answer, status.addr()).map_err(io::Error::other)?;
        Ok(written + 1)
    }

    /// Moves every segment; returns the status and the bytes moved.
    fn transfer(
        &self,
        data: &[Descriptor],
        sector: u64,
        memory: &Guest,
        step: impl Fn(&File, &vm_memory::VolatileSlice, u64) -> io::Result<()>,
    ) -> (u8, u32) {
        let mut at = sector * SECTOR_BYTES;
        for descriptor in data {
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let moved = slice.map_err(io::Error::other).and_then(|slice| {
                    step(&self.file, &slice, at)?;
                    Ok(slice.len() as u64)
                });
                match moved {
                    Ok(bytes) => at += bytes,
                    Err(_) => return (VIRTIO_BLK_S_IOERR as u8, 0),
                }
            }
        }
        (STATUS_OK, (at - sector * SECTOR_BYTES) as u32)
    }
}
