//! [`BegunWrite`]: a write whose bytes somebody else moves to the delta while its queue does something else.
//!
//! What the delta holds is written over where it is. What it does not hold is written whole, and marked when it has arrived; until then a share of its stretch keeps away
//! those that would fill in what they do not write, or make it zero. What is not whole is not begun: somebody who may wait does that.

use std::ops::RangeInclusive;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::sys::buffers::{Readable, Split, total_len_readable};

use super::delta::State;
use super::delta::layout::CLUSTERS_PER_STRETCH;
use super::storage::{FileStorage, Storage};
use super::volume::add_to;
use super::{Batch, Error, Places, Volume, VolumeFile};

/// A write that is under way. Dropped, it was none.
pub struct BegunWrite<S: Storage = FileStorage> {
    volume: Arc<Volume<S>>,
    /// Clusters of which there is a share: of each stretch that the delta did not hold.
    shares: SmallVec<[RangeInclusive<u64>; 2]>,
}

/// A write and where its bytes are to go.
pub type Begun<'m, S = FileStorage> = (BegunWrite<S>, Places<Readable<'m>>);

impl<S: Storage> BegunWrite<S> {
    /// Begins to write the buffers, one after another, at `offset`. None when that cannot be, or has to wait for somebody.
    pub fn new<'m>(volume: &Arc<Volume<S>>, offset: u64, from: &[Readable<'m>]) -> Result<Option<Begun<'m, S>>, Error> {
        let len = total_len_readable(from);
        volume.check_range(offset, len)?;
        let Some(delta) = volume.delta().filter(|_| len > 0) else { return Ok(None) };
        delta.check_latch()?;
        let cluster = delta.layout().cluster();
        let clusters = cluster.containing(offset)..=cluster.containing(offset + len - 1);
        let mut begun = BegunWrite { volume: Arc::clone(volume), shares: SmallVec::new() };
        let mut first = *clusters.start();
        while first <= *clusters.end() {
            let last = (first | (CLUSTERS_PER_STRETCH - 1)).min(*clusters.end());
            delta.load(first)?;
            if !(first..=last).all(|cluster| delta.state(cluster) == State::Delta) {
                if !volume.exclusion(first).try_share() {
                    return Ok(None);
                }
                begun.shares.push(first..=last);
            }
            first = last + 1;
        }
        // With a share, nobody takes away what is held.
        let is_whole = |number: u64| {
            let covered = offset <= cluster.start_of(number) && cluster.start_of(number + 1) <= offset + len;
            covered || matches!(delta.state(number), State::Delta | State::Fresh)
        };
        if !is_whole(*clusters.start()) || !is_whole(*clusters.end()) {
            return Ok(None);
        }
        let mut places = Places::new();
        let (mut at, mut from) = (offset, Split::new(from));
        while let Some(piece) =
            from.take(cluster.start_of((cluster.containing(at) | (CLUSTERS_PER_STRETCH - 1)) + 1) - at)
        {
            add_to(&mut places, VolumeFile::Delta, delta.layout().data_at(at), piece);
            at += piece.len() as u64;
        }
        Ok(Some((begun, places)))
    }

    /// Notes that all of it has arrived. It is complete once `batch` is committed.
    pub fn finish(self, batch: &mut Batch) {
        let Some(delta) = self.volume.delta() else { return };
        delta.note_written();
        // Of no others: what was held may have been made zero since, and is not to come back.
        self.shares.iter().cloned().flatten().for_each(|cluster| delta.mark(cluster, batch.marks()));
    }
}

impl<S: Storage> Drop for BegunWrite<S> {
    fn drop(&mut self) {
        self.shares.iter().for_each(|clusters| self.volume.exclusion(*clusters.start()).give_back());
    }
}
