//! The cluster map: for each cluster, whether it comes from the base, lies in the delta, or is zero.
//!
//! On disk, a group's map block is eight sectors of their own, so that a torn write of the block leaves each sector old
//! or new and never broken. A sector, all numbers little-endian:
//!
//! | field | bytes | meaning |
//! |---|---|---|
//! | checksum | 4 | CRC-32C of the other 508 bytes |
//! | place | 4 | low 32 bits of (group x 8 + index of the sector in its block), so that a misplaced sector is noticed |
//! | states | 504 | two bits a cluster, lowest first: 0 base, 1 delta, 2 zero; 3 is not valid |
//!
//! A sector of zeros, which is what a hole reads as, says "all from the base".
//!
//! In memory the states lie one after another, in an array that costs memory only where something is marked. A group's states are read when
//! it is first touched. In memory there is a fourth state, [`State::Fresh`]: the data is in the delta, but no mark of that
//! is safe yet from the death of this process; see [`super::marks`].

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::block::storage::Storage;
use crate::sys::array::ZeroedArray;
use crate::sys::buffers::Writable;

use super::layout::{
    CLUSTERS_PER_GROUP, CLUSTERS_PER_WORD, DISK_SECTOR_BYTES, Layout, MAP_BLOCK_BYTES, MAP_SECTOR_HEAD_BYTES,
    MAP_SECTORS_PER_GROUP, WORDS_PER_GROUP, WORDS_PER_MAP_SECTOR,
};

/// Where a cluster's contents are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// In the base (past its end: zeros).
    Base,
    /// In the delta.
    Delta,
    /// Nowhere: all zeros, whatever the file holds at its place.
    Zero,
    /// In the delta, but only this process knows. Never on disk.
    Fresh,
}

impl State {
    #[inline]
    fn from_bits(bits: u64) -> State {
        match bits & 3 {
            0 => State::Base,
            1 => State::Delta,
            2 => State::Zero,
            _ => State::Fresh,
        }
    }

    fn bits(self) -> u64 {
        match self {
            State::Base => 0,
            State::Delta => 1,
            State::Zero => 2,
            State::Fresh => 3,
        }
    }
}

/// What is wrong with a sector of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapFault {
    /// Bytes changed since they were written.
    #[error("checksum {computed:#010x} expected, {stored:#010x} found")]
    Checksum { computed: u32, stored: u32 },
    /// A sector of another place.
    #[error("the sector of place {expected} expected, that of {found} found")]
    Place { expected: u32, found: u32 },
    /// Two bits that no program writes.
    #[error("cluster {cluster} has no valid state")]
    State { cluster: u64 },
    /// A mark for a cluster that the volume does not have.
    #[error("cluster {cluster} is marked and lies past the end of the volume")]
    PastEnd { cluster: u64 },
}

/// Why a group's states could not be read.
#[derive(Debug)]
pub enum LoadError {
    /// The file system refused.
    Io { offset: u64, source: io::Error },
    /// They do not check out.
    Fault { offset: u64, fault: MapFault },
}

/// Bytes of a map sector.
pub type MapSector = [u8; DISK_SECTOR_BYTES as usize];

/// A sector that differs from the one on disk.
pub struct MapWrite {
    group: u64,
    index: usize,
    /// Where it lies in the file.
    pub offset: u64,
    /// What is to be there.
    pub sector: MapSector,
}

/// All states of a delta.
pub struct Map {
    layout: Layout,
    words: ZeroedArray<AtomicU64>,
    /// Per group: whether `words` holds its states.
    loaded: ZeroedArray<AtomicU8>,
    /// Per group: a bit for each sector that differs from the one on disk.
    dirty: ZeroedArray<AtomicU8>,
    /// Groups with a bit in `dirty`. Also the exclusion of loading.
    dirty_groups: Mutex<Vec<u64>>,
}

const _: () = assert!(MAP_SECTORS_PER_GROUP == 8, "a byte of `dirty` has a bit for each");

impl Map {
    /// A map of which nothing is loaded yet. Costs address space: 2 bits a cluster.
    pub fn new(layout: Layout) -> io::Result<Map> {
        let groups = usize::try_from(layout.group_count()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let words = groups.checked_mul(WORDS_PER_GROUP).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Map {
            layout,
            words: ZeroedArray::new(words)?,
            loaded: ZeroedArray::new(groups)?,
            dirty: ZeroedArray::new(groups)?,
            dirty_groups: Mutex::default(),
        })
    }

    /// Whether the states of `cluster`'s group are loaded.
    #[inline]
    pub fn is_loaded(&self, cluster: u64) -> bool {
        self.loaded[(cluster / CLUSTERS_PER_GROUP) as usize].load(Ordering::Acquire) != 0
    }

    /// Sees to it that the states of `cluster`'s group are loaded.
    #[inline]
    pub fn load(&self, cluster: u64, storage: &impl Storage) -> Result<(), LoadError> {
        if self.is_loaded(cluster) { Ok(()) } else { self.load_group(cluster / CLUSTERS_PER_GROUP, storage) }
    }

    #[cold]
    fn load_group(&self, group: u64, storage: &impl Storage) -> Result<(), LoadError> {
        let _exclusive = self.dirty_groups.lock().expect("no holder of this lock panics");
        if self.loaded[group as usize].load(Ordering::Acquire) != 0 {
            return Ok(());
        }
        let mut block = [0; MAP_BLOCK_BYTES as usize];
        let offset = self.layout.map_block(group);
        storage
            .read_alone_at(Writable::from_mut_slice(&mut block), offset)
            .map_err(|source| LoadError::Io { offset, source })?;
        // All sectors are checked before any is believed, so that a group is loaded as a whole or not at all.
        let sectors = block.as_chunks::<{ DISK_SECTOR_BYTES as usize }>().0;
        let mut states = [[0; WORDS_PER_MAP_SECTOR]; MAP_SECTORS_PER_GROUP];
        for (index, sector) in sectors.iter().enumerate() {
            states[index] = decode_sector(&self.layout, group, index, sector)
                .map_err(|fault| LoadError::Fault { offset: offset + index as u64 * DISK_SECTOR_BYTES, fault })?;
        }
        for (index, word) in states.as_flattened().iter().enumerate().filter(|(_, word)| **word != 0) {
            self.words[group as usize * WORDS_PER_GROUP + index].store(*word, Ordering::Relaxed);
        }
        self.loaded[group as usize].store(1, Ordering::Release);
        Ok(())
    }

    /// The state of a cluster whose group is loaded.
    #[inline]
    pub fn state(&self, cluster: u64) -> State {
        // Acquire: who sees a mark sees the data that was written ahead of it.
        let word = self.words[(cluster / CLUSTERS_PER_WORD) as usize].load(Ordering::Acquire);
        State::from_bits(word >> ((cluster % CLUSTERS_PER_WORD) * 2))
    }

    /// Sets the state of a cluster whose group is loaded.
    pub fn set(&self, cluster: u64, state: State) {
        let shift = (cluster % CLUSTERS_PER_WORD) * 2;
        let word = &self.words[(cluster / CLUSTERS_PER_WORD) as usize];
        let old = word
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| {
                Some((old & !(3 << shift)) | (state.bits() << shift))
            })
            .unwrap_or_else(|unchanged| unchanged);
        // Only what differs on disk is to be written: a fresh cluster is on disk as one in the delta.
        if on_disk(State::from_bits(old >> shift)) != on_disk(state) {
            self.mark_dirty(cluster);
        }
    }

    fn mark_dirty(&self, cluster: u64) {
        let group = cluster / CLUSTERS_PER_GROUP;
        let sector = (cluster % CLUSTERS_PER_GROUP) / (WORDS_PER_MAP_SECTOR as u64 * CLUSTERS_PER_WORD);
        self.mark_sector_dirty(group, sector as usize);
    }

    fn mark_sector_dirty(&self, group: u64, index: usize) {
        let bit = 1u8 << index;
        // The bit and the list change together: whoever finds the bit set may rely on the next flush to find the group.
        let mut dirty_groups = self.dirty_groups.lock().expect("no holder of this lock panics");
        // A read-modify-write even when the bit is set already: it is what orders the new state ahead of the copy that a
        // flush takes, or this bit after it.
        if self.dirty[group as usize].fetch_or(bit, Ordering::AcqRel) == 0 {
            dirty_groups.push(group);
        }
    }

    /// Whether some sector differs from the one on disk.
    pub fn is_dirty(&self) -> bool {
        !self.dirty_groups.lock().expect("no holder of this lock panics").is_empty()
    }

    /// Takes a copy of every sector that differs from the one on disk, with its offset in the file. They count as
    /// written from now on: should writing them fail, they are to be given back, or the map must not be used any more.
    pub fn take_dirty(&self) -> Vec<MapWrite> {
        let groups = std::mem::take(&mut *self.dirty_groups.lock().expect("no holder of this lock panics"));
        let mut sectors = Vec::with_capacity(groups.len());
        for group in groups {
            // Cleared ahead of the copy: a mark that comes later sets it anew, and goes out with the next flush.
            let bits = self.dirty[group as usize].swap(0, Ordering::AcqRel);
            for index in (0..MAP_SECTORS_PER_GROUP).filter(|index| bits & (1 << index) != 0) {
                let offset = self.layout.map_block(group) + index as u64 * DISK_SECTOR_BYTES;
                sectors.push(MapWrite { group, index, offset, sector: self.encode_sector(group, index) });
            }
        }
        sectors
    }

    /// Counts sectors as not written after all.
    pub fn give_back(&self, sectors: &[MapWrite]) {
        sectors.iter().for_each(|MapWrite { group, index, .. }| self.mark_sector_dirty(*group, *index));
    }

    fn encode_sector(&self, group: u64, index: usize) -> MapSector {
        let mut sector = [0; DISK_SECTOR_BYTES as usize];
        sector[4..8].copy_from_slice(&place(group, index).to_le_bytes());
        let start = group as usize * WORDS_PER_GROUP + index * WORDS_PER_MAP_SECTOR;
        let states = &mut sector[MAP_SECTOR_HEAD_BYTES..];
        for (bytes, word) in states.as_chunks_mut::<8>().0.iter_mut().zip(&self.words[start..]) {
            let word = word.load(Ordering::Acquire);
            // Where both bits are set, the cluster is fresh; clearing the upper one makes it "in the delta".
            let fresh = word & (word >> 1) & LOWER_BITS;
            *bytes = (word & !(fresh << 1)).to_le_bytes();
        }
        let checksum = crc32c::crc32c(&sector[4..]);
        sector[..4].copy_from_slice(&checksum.to_le_bytes());
        sector
    }
}

/// The lower bit of each state.
const LOWER_BITS: u64 = 0x5555_5555_5555_5555;

fn on_disk(state: State) -> State {
    if state == State::Fresh { State::Delta } else { state }
}

fn place(group: u64, index: usize) -> u32 {
    (group * MAP_SECTORS_PER_GROUP as u64 + index as u64) as u32
}

/// Reads and checks the states of sector `index` of `group`'s map block.
pub fn decode_sector(
    layout: &Layout,
    group: u64,
    index: usize,
    sector: &MapSector,
) -> Result<[u64; WORDS_PER_MAP_SECTOR], MapFault> {
    let mut words = [0; WORDS_PER_MAP_SECTOR];
    if sector.iter().all(|byte| *byte == 0) {
        return Ok(words);
    }
    let number = |at: usize| u32::from_le_bytes([sector[at], sector[at + 1], sector[at + 2], sector[at + 3]]);
    let (stored, computed) = (number(0), crc32c::crc32c(&sector[4..]));
    if stored != computed {
        return Err(MapFault::Checksum { computed, stored });
    }
    let (found, expected) = (number(4), place(group, index));
    if found != expected {
        return Err(MapFault::Place { expected, found });
    }
    for (word, bytes) in words.iter_mut().zip(sector[MAP_SECTOR_HEAD_BYTES..].as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    let first = group * CLUSTERS_PER_GROUP + (index * WORDS_PER_MAP_SECTOR) as u64 * CLUSTERS_PER_WORD;
    let count = layout.cluster_count();
    for (word, first) in words.iter().zip((first..).step_by(CLUSTERS_PER_WORD as usize)) {
        let invalid = word & (word >> 1) & LOWER_BITS;
        if invalid != 0 {
            return Err(MapFault::State { cluster: first + u64::from(invalid.trailing_zeros() / 2) });
        }
        let within = count.saturating_sub(first).min(CLUSTERS_PER_WORD);
        let past = if within == CLUSTERS_PER_WORD { 0 } else { word >> (within * 2) };
        if past != 0 {
            return Err(MapFault::PastEnd { cluster: first + within + u64::from(past.trailing_zeros() / 2) });
        }
    }
    Ok(words)
}

/// The state of cluster number `index` of the words of a sector, and how many clusters from there on in the same word have it.
pub fn run_in(words: &[u64; WORDS_PER_MAP_SECTOR], index: usize) -> (State, u64) {
    let (word, within) = (words[index / CLUSTERS_PER_WORD as usize], index as u64 % CLUSTERS_PER_WORD);
    let rest = word >> (within * 2);
    let state = State::from_bits(rest);
    let differing = rest ^ (LOWER_BITS * state.bits());
    (state, u64::from(differing.trailing_zeros() / 2).min(CLUSTERS_PER_WORD - within))
}

/// Sets the state of cluster number `index` of the words of a sector.
pub fn set_in(words: &mut [u64; WORDS_PER_MAP_SECTOR], index: usize, state: State) {
    let shift = (index as u64 % CLUSTERS_PER_WORD) * 2;
    let word = &mut words[index / CLUSTERS_PER_WORD as usize];
    *word = (*word & !(3 << shift)) | (state.bits() << shift);
}
