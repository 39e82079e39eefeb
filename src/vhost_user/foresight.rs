//! What the next requests of a ring are about, fetched into the processor's caches before it is needed.
//!
//! A request's descriptors, its header and the place of its status were last written by another processor, and the page that it reads lies anywhere: each has to
//! be fetched from afar, and one by one a request waits for all of them. Here, of a batch of requests, all descriptors are asked for, then all headers, then all pages. Nothing
//! that is read here is believed or kept: it says where to look, and is read again by who acts upon it.

use smallvec::SmallVec;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use crate::block::Volume;
use crate::sys::guard;
use crate::sys::guest::GuestMemory;
use crate::units::sectors_to_bytes;

use super::request::HEADER_BYTES;
use super::ring::{DESCRIPTOR_BYTES, Ring};

/// Requests that are looked at together.
const AHEAD: usize = 16;
/// Below this many there is nothing to do meanwhile.
const WORTH: u16 = 4;
/// Most indirect tables have so many: of the header, of one buffer, of the status.
const DESCRIPTORS: usize = 3;

/// Looks at the next `count` requests that wait.
#[inline]
pub fn look_ahead(ring: &Ring, count: u16, memory: &GuestMemory, volume: &Volume) {
    if count >= WORTH {
        look_at(ring, usize::from(count).min(AHEAD), memory, volume);
    }
}

fn look_at(ring: &Ring, count: usize, memory: &GuestMemory, volume: &Volume) {
    let table = ring.table();
    let heads: SmallVec<[u16; AHEAD]> = (0..count as u16).map(|ahead| ring.upcoming(ahead)).collect();
    heads.iter().for_each(|head| table.fetch(*head));
    // Of each the header, or an indirect table.
    let firsts: SmallVec<[(u64, bool); AHEAD]> = heads.iter().map(|head| table.first(*head)).collect();
    firsts.iter().for_each(|(address, _)| memory.fetch(*address));
    let mut headers = SmallVec::<[u64; AHEAD]>::new();
    for (address, is_table) in firsts {
        let mut bytes = [0; DESCRIPTORS * DESCRIPTOR_BYTES];
        if !is_table {
            headers.push(address);
        } else if memory.read_words(address, &mut bytes) {
            let [header, _, status] = bytes.as_chunks::<DESCRIPTOR_BYTES>().0 else { continue };
            let [header, status] = [header, status].map(|bytes| u128::from_le_bytes(*bytes) as u64);
            memory.fetch(header);
            memory.fetch(status);
            headers.push(header);
        }
    }
    for header in headers {
        let mut bytes = [0; HEADER_BYTES];
        if memory.read_words(header, &mut bytes) {
            let value = u128::from_le_bytes(bytes);
            if value as u32 == VIRTIO_BLK_T_IN
                && let Some(offset) = sectors_to_bytes((value >> 64) as u64)
            {
                volume.fetch(offset);
            }
        }
    }
    // What is gone is found again, by who has to know.
    let _ = guard::take_fault();
}
