//! Where things lie in a delta file: the one place that turns clusters into offsets.
//!
//! ```text
//! header block | mark log, half 0 | mark log, half 1 | group 0 | group 1 | ...
//!     4 KiB          16 MiB             16 MiB
//!
//! group: map block | 16128 clusters of data
//!          4 KiB      63 MiB with clusters of 4 KiB
//! ```
//!
//! A cluster's place in the file follows from its number alone: there is no table that could point two clusters at one
//! place, and the file system's own extents say what is allocated. Each group carries the states of its own clusters,
//! so a volume grows by adding groups, and creating and opening take the same time for any size.

use std::ops::Range;

use crate::units::ClusterSize;

/// The unit that a disk writes whole or not at all: what is written over in place never spans two.
pub const DISK_SECTOR_BYTES: u64 = crate::units::SECTOR_BYTES;

/// The header block: sector 0 the header, sector 1 the session (see [`super::header`]), the rest reserved.
pub const HEADER_BLOCK_BYTES: u64 = 4096;

/// One half of the mark log (see [`super::marks`]): room for the first writes to about 4 GiB scattered, between two flushes.
pub const LOG_HALF_BYTES: u64 = 16 << 20;

/// Where the mark log starts.
pub const LOG_START: u64 = HEADER_BLOCK_BYTES;

/// Where group 0 starts.
pub const GROUPS_START: u64 = LOG_START + 2 * LOG_HALF_BYTES;

/// A group's map block (see [`super::map`]).
pub const MAP_BLOCK_BYTES: u64 = 4096;

/// Sectors in a map block. Each stands for itself: one that is torn off from its neighbours by a power loss is as valid
/// as they are.
pub const MAP_SECTORS_PER_GROUP: usize = (MAP_BLOCK_BYTES / DISK_SECTOR_BYTES) as usize;

/// Bytes ahead of the states in a map sector.
pub const MAP_SECTOR_HEAD_BYTES: usize = 8;

/// Words of 64 bits, each with the states of 32 clusters, in a map sector.
pub const WORDS_PER_MAP_SECTOR: usize = (DISK_SECTOR_BYTES as usize - MAP_SECTOR_HEAD_BYTES) / 8;

/// Clusters whose states one word holds, two bits each.
pub const CLUSTERS_PER_WORD: u64 = 32;

/// Words of states in a group.
pub const WORDS_PER_GROUP: usize = WORDS_PER_MAP_SECTOR * MAP_SECTORS_PER_GROUP;

/// Clusters in a group.
pub const CLUSTERS_PER_GROUP: u64 = WORDS_PER_GROUP as u64 * CLUSTERS_PER_WORD;

/// Clusters in a stretch, the unit of exclusion among writers: 1 MiB with clusters of 4 KiB. A request of usual size
/// lies in one or two.
pub const CLUSTERS_PER_STRETCH: u64 = 256;

const _: () = assert!(MAP_SECTOR_HEAD_BYTES + WORDS_PER_MAP_SECTOR * 8 == DISK_SECTOR_BYTES as usize);
const _: () = assert!(CLUSTERS_PER_GROUP.is_multiple_of(CLUSTERS_PER_STRETCH), "a stretch lies in one group");
const _: () = assert!(CLUSTERS_PER_STRETCH.is_multiple_of(CLUSTERS_PER_WORD));
const _: () = assert!(GROUPS_START.is_multiple_of(ClusterSize::BYTES_MIN), "data lies at multiples of a page");

/// The shape of one delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    cluster: ClusterSize,
    virtual_bytes: u64,
}

impl Layout {
    /// The largest volume, 64 TiB: all of its delta is mapped, and a process has addresses for 128 TiB.
    pub const VIRTUAL_BYTES_MAX: u64 = 64 << 40;

    /// The shape of a delta of `virtual_bytes`, at most [`Layout::VIRTUAL_BYTES_MAX`].
    pub fn new(cluster: ClusterSize, virtual_bytes: u64) -> Option<Layout> {
        (virtual_bytes <= Self::VIRTUAL_BYTES_MAX).then_some(Layout { cluster, virtual_bytes })
    }

    /// The size of a cluster.
    pub fn cluster(&self) -> ClusterSize {
        self.cluster
    }

    /// The size of the volume in bytes.
    pub fn virtual_bytes(&self) -> u64 {
        self.virtual_bytes
    }

    /// How many clusters there are, the last perhaps only in part within the volume.
    pub fn cluster_count(&self) -> u64 {
        self.cluster.count_for(self.virtual_bytes)
    }

    /// How many groups there are.
    pub fn group_count(&self) -> u64 {
        self.cluster_count().div_ceil(CLUSTERS_PER_GROUP)
    }

    fn group_bytes(&self) -> u64 {
        MAP_BLOCK_BYTES + CLUSTERS_PER_GROUP * self.cluster.bytes()
    }

    /// Offset of a group's map block in the file.
    pub fn map_block(&self, group: u64) -> u64 {
        GROUPS_START + group * self.group_bytes()
    }

    /// The group that a byte of the file belongs to; group 0 for what lies ahead of the groups, and a number that is no
    /// group's for what lies behind them.
    pub fn group_at(&self, file_offset: u64) -> u64 {
        file_offset.saturating_sub(GROUPS_START) / self.group_bytes()
    }

    /// Offset of a cluster's data in the file.
    #[inline]
    pub fn data(&self, cluster: u64) -> u64 {
        let (group, within) = (cluster / CLUSTERS_PER_GROUP, cluster % CLUSTERS_PER_GROUP);
        self.map_block(group) + MAP_BLOCK_BYTES + self.cluster.start_of(within)
    }

    /// Offset in the file of the byte at `offset` of the volume.
    #[inline]
    pub fn data_at(&self, offset: u64) -> u64 {
        self.data(self.cluster.containing(offset)) + self.cluster.offset_within(offset)
    }

    /// The clusters of a group.
    pub fn clusters_of(&self, group: u64) -> Range<u64> {
        let start = group * CLUSTERS_PER_GROUP;
        start..(start + CLUSTERS_PER_GROUP).min(self.cluster_count())
    }

    /// The length of the file: up to the end of the last cluster's data.
    pub fn file_bytes(&self) -> u64 {
        match self.cluster_count().checked_sub(1) {
            Some(last) => self.data(last) + self.cluster.bytes(),
            None => GROUPS_START,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_lie_one_after_another_and_never_on_a_map_block() {
        for bytes in [4096, 65536] {
            let cluster = ClusterSize::from_bytes(bytes).unwrap();
            let layout = Layout::new(cluster, 1 << 40).unwrap();
            for group in [0, 1, 5] {
                let clusters = layout.clusters_of(group);
                assert_eq!(layout.data(clusters.start), layout.map_block(group) + MAP_BLOCK_BYTES);
                assert_eq!(layout.data(clusters.end - 1) + bytes, layout.map_block(group + 1));
            }
        }
    }

    #[test]
    fn the_file_ends_with_the_last_cluster() {
        let layout = |bytes| Layout::new(ClusterSize::DEFAULT, bytes).unwrap();
        assert_eq!(layout(0).file_bytes(), GROUPS_START);
        assert_eq!(layout(512).file_bytes(), GROUPS_START + MAP_BLOCK_BYTES + 4096);
        assert_eq!(layout(4097).file_bytes(), GROUPS_START + MAP_BLOCK_BYTES + 8192);
        assert!(Layout::new(ClusterSize::DEFAULT, u64::MAX).is_none());
    }
}
