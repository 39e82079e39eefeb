//! [`Device`]: what a driver is told about its disk, the features offered and the configuration space.

use std::sync::atomic::{AtomicBool, Ordering};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::{virtio_blk, virtio_config, virtio_ring};

use crate::units::SECTOR_BYTES;

/// The feature bit by which a front end says that it knows protocol features, and that rings start disabled.
pub const PROTOCOL_FEATURES_BIT: u64 = 1 << 30;

/// The feature bit by which a front end has every write to guest memory logged (VHOST_F_LOG_ALL).
pub const LOG_ALL_BIT: u64 = 1 << 26;

/// Bytes of a serial number, which GET_ID answers.
pub const SERIAL_BYTES: usize = virtio_blk::VIRTIO_BLK_ID_BYTES as usize;

/// Segments of data in one request, as drivers are told. Two more descriptors make up a ring of 128, QEMU's default.
const SEGMENTS_MAX: u32 = 126;
/// Bytes in one such segment, as drivers are told.
const SEGMENT_BYTES_MAX: u32 = 1 << 20;
/// Segments in one discard or write-zeroes request.
pub const RANGES_MAX: u32 = 64;
/// Sectors in one such segment: 1 GiB. What a request does stays short enough for a pause to wait for it.
pub const RANGE_SECTORS_MAX: u32 = (1 << 30) / SECTOR_BYTES as u32;
/// The physical block: 4 KiB, as a power of two of logical ones.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// Where the write-cache byte lies in the configuration space.
const WRITEBACK_AT: usize = 32;
/// Older cloud-hypervisor asks for the configuration at the offset that it has in the registers of virtio-mmio.
const CONFIG_OFFSET_LEGACY: u32 = vhost::vhost_user::message::VHOST_USER_CONFIG_OFFSET;

/// What a driver gets to know, fixed while a volume is attached.
#[derive(Clone, Debug)]
pub struct Description {
    /// Size of the disk in bytes.
    pub bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Bytes of a cluster: what is discarded at less stays as it is.
    pub cluster_bytes: u64,
    /// How many rings are offered.
    pub queues: u16,
    /// What GET_ID answers: ASCII, padded with zeros.
    pub serial: [u8; SERIAL_BYTES],
}

/// What is offered, and what of it was taken.
pub struct Device {
    description: Description,
    /// The write cache is on, by the configuration space.
    writeback: AtomicBool,
}

impl Device {
    /// A device nobody has talked to.
    pub fn new(description: Description) -> Device {
        Device { description, writeback: AtomicBool::new(true) }
    }

    /// What it is.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The virtio features offered, with the bit of the protocol features.
    pub fn features(&self) -> u64 {
        let mut bits = vec![
            virtio_config::VIRTIO_F_VERSION_1,
            virtio_ring::VIRTIO_RING_F_EVENT_IDX,
            virtio_ring::VIRTIO_RING_F_INDIRECT_DESC,
            virtio_blk::VIRTIO_BLK_F_FLUSH,
            virtio_blk::VIRTIO_BLK_F_CONFIG_WCE,
            virtio_blk::VIRTIO_BLK_F_BLK_SIZE,
            virtio_blk::VIRTIO_BLK_F_TOPOLOGY,
            virtio_blk::VIRTIO_BLK_F_SEG_MAX,
            virtio_blk::VIRTIO_BLK_F_SIZE_MAX,
            virtio_blk::VIRTIO_BLK_F_MQ,
        ];
        if self.description.read_only {
            bits.push(virtio_blk::VIRTIO_BLK_F_RO);
        } else {
            bits.extend([virtio_blk::VIRTIO_BLK_F_DISCARD, virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.into_iter().fold(PROTOCOL_FEATURES_BIT | LOG_ALL_BIT, |features, bit| features | 1 << bit)
    }

    /// The vhost-user protocol features offered.
    pub fn protocol_features() -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::DEVICE_STATE
    }

    /// `size` bytes of the configuration space at `offset`; what lies past its end reads as zeros.
    pub fn config(&self, offset: u32, size: u32) -> Vec<u8> {
        let offset = if offset == CONFIG_OFFSET_LEGACY { 0 } else { offset as usize };
        let space = self.config_space();
        (offset..offset + size as usize).map(|at| space.get(at).copied().unwrap_or(0)).collect()
    }

    /// What a driver may change of the configuration space: the write-cache byte. The rest is ignored.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) {
        let offset = if offset == CONFIG_OFFSET_LEGACY { 0 } else { offset as usize };
        if let Some(value) = WRITEBACK_AT.checked_sub(offset).and_then(|at| bytes.get(at)) {
            self.set_writeback(*value != 0);
        }
    }

    /// Whether the configuration space says that the write cache is on.
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// Turns the write cache on or off.
    pub fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::Relaxed);
    }

    /// `struct virtio_blk_config` (virtio 1.3, section 5.2.4), each field behind the one before.
    fn config_space(&self) -> Vec<u8> {
        let Description { bytes, read_only, cluster_bytes, queues, .. } = &self.description;
        let ranges = if *read_only { [0; 2] } else { [RANGE_SECTORS_MAX, RANGES_MAX] };
        let cluster_sectors = (cluster_bytes / SECTOR_BYTES) as u32;
        let mut space = Vec::with_capacity(60);
        space.extend((bytes / SECTOR_BYTES).to_le_bytes()); // capacity
        space.extend(SEGMENT_BYTES_MAX.to_le_bytes()); // size_max
        space.extend(SEGMENTS_MAX.to_le_bytes()); // seg_max
        space.extend([0; 4]); // geometry: none
        space.extend((SECTOR_BYTES as u32).to_le_bytes()); // blk_size
        space.push(PHYSICAL_BLOCK_EXPONENT); // physical_block_exp
        space.push(0); // alignment_offset
        space.extend((1u16 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes()); // min_io_size, logical blocks
        space.extend(0u32.to_le_bytes()); // opt_io_size: none
        debug_assert_eq!(space.len(), WRITEBACK_AT);
        space.push(u8::from(self.writeback())); // writeback
        space.push(0); // unused
        space.extend(queues.to_le_bytes()); // num_queues
        space.extend(ranges[0].to_le_bytes()); // max_discard_sectors
        space.extend(ranges[1].to_le_bytes()); // max_discard_seg
        space.extend(cluster_sectors.to_le_bytes()); // discard_sector_alignment
        space.extend(ranges[0].to_le_bytes()); // max_write_zeroes_sectors
        space.extend(ranges[1].to_le_bytes()); // max_write_zeroes_seg
        space.push(u8::from(!read_only)); // write_zeroes_may_unmap
        space.extend([0; 3]); // unused
        space
    }
}

/// Whether a write has to be durable before it completes: the driver has not said that it will flush, or has turned the write cache off.
pub fn is_write_through(features: u64, writeback: bool) -> bool {
    let has = |bit: u32| features & (1 << bit) != 0;
    if has(virtio_blk::VIRTIO_BLK_F_CONFIG_WCE) { !writeback } else { !has(virtio_blk::VIRTIO_BLK_F_FLUSH) }
}

/// Whether the driver has taken the event indexes.
pub fn has_event_idx(features: u64) -> bool {
    features & (1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX) != 0
}

/// Takes text as a serial number: what does not fit is cut off.
pub fn serial_from(text: &str) -> [u8; SERIAL_BYTES] {
    let mut serial = [0; SERIAL_BYTES];
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    serial
}

/// A serial number that no other volume has: as much of the UUID as fits.
pub fn serial_of_uuid(uuid: [u8; 16]) -> [u8; SERIAL_BYTES] {
    serial_from(&uuid[..7].iter().fold("pando-".to_owned(), |text, byte| format!("{text}{byte:02x}")))
}

/// Whether the front end has every write to guest memory logged, because the guest is on its way to another host.
pub fn logs_writes(features: u64) -> bool {
    features & LOG_ALL_BIT != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(read_only: bool) -> Device {
        let serial = serial_from("pando");
        Device::new(Description { bytes: 3 << 20, read_only, cluster_bytes: 4096, queues: 5, serial })
    }

    #[test]
    fn any_part_of_the_configuration_space_can_be_asked_for() {
        let device = device(false);
        let all = device.config(0, 256);
        assert_eq!(all[..8], (3u64 << 11).to_le_bytes());
        assert_eq!(all[34..36], 5u16.to_le_bytes());
        assert_eq!(all[60..], [0; 196], "past the end are zeros");
        for offset in 0..70 {
            for size in 1..70 {
                assert_eq!(device.config(offset, size), all[offset as usize..][..size as usize]);
            }
        }
        assert_eq!(device.config(0x100, 60), all[..60], "the offset of older front ends");
    }

    #[test]
    fn only_the_write_cache_can_be_set() {
        let device = device(false);
        let before = device.config(0, 60);
        device.set_config(0, &[0xff; 32]);
        device.set_config(33, &[0xff; 27]);
        assert_eq!(device.config(0, 60), before);
        device.set_config(30, &[1, 1, 0, 1]);
        assert!(!device.writeback());
        assert_eq!(device.config(32, 1), [0]);
    }

    #[test]
    fn limits_of_discards_are_never_zero_when_offered() {
        let field = |device: &Device, at: u32| u32::from_le_bytes(device.config(at, 4).try_into().unwrap());
        let writable = device(false);
        assert!(writable.features() & (1 << virtio_blk::VIRTIO_BLK_F_DISCARD) != 0);
        assert!([36, 40, 44, 48, 52].into_iter().all(|at| field(&writable, at) > 0));
        let read_only = device(true);
        assert_eq!(read_only.features() & (1 << virtio_blk::VIRTIO_BLK_F_DISCARD), 0);
        assert!(read_only.features() & (1 << virtio_blk::VIRTIO_BLK_F_RO) != 0);
    }

    #[test]
    fn writes_go_through_unless_the_driver_flushes() {
        let (flush, wce) = (1 << virtio_blk::VIRTIO_BLK_F_FLUSH, 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE);
        assert!(is_write_through(0, true));
        assert!(!is_write_through(flush, true));
        assert!(!is_write_through(flush, false), "the byte means nothing without CONFIG_WCE");
        assert!(!is_write_through(flush | wce, true));
        assert!(is_write_through(flush | wce, false));
    }
}
