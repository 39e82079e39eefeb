//! [`Volume`]: what a guest sees as one disk, the union of a base and a delta.
//!
//! Every read splits into runs of clusters that come from one place. A write to clusters that are all in the delta goes
//! straight to the file, without exclusion. Any other write copies up: under the exclusion of its stretch, one write puts
//! into the file the whole of each cluster that it touches, the guest's bytes between those of the base, and only then is
//! the cluster marked. So two queues that write different sectors of one cluster both win, and a reader sees a cluster
//! before or after, never between.

use std::fs::File;

use smallvec::SmallVec;

use crate::sys::buffers::{Buffer, Readable, Split, Writable, total_len_readable, total_len_writable};
use crate::units::ClusterSize;

use super::Error;
use super::base::Base;
use super::cached::Patience;
use super::delta::layout::{CLUSTERS_PER_GROUP, CLUSTERS_PER_STRETCH};
use super::delta::{Delta, Marks, State};
use super::exclusion::Exclusion;
use super::storage::{FileStorage, Storage};

/// Exclusions among writers. More than queues, so that two rarely meet by chance.
const EXCLUSIONS: usize = 64;

/// A disk. Shared by all queue threads.
pub struct Volume<S = FileStorage> {
    base: Base,
    delta: Option<Delta<S>>,
    bytes: u64,
    /// The exclusion of stretch `s` is number `s % EXCLUSIONS`. One at a time is held.
    exclusions: [Exclusion; EXCLUSIONS],
}

/// What the requests of one batch have in common until they complete: each queue has one and uses it again and again.
#[derive(Default)]
pub struct Batch {
    marks: Marks,
    sources: Sources,
}

/// Bytes that were read, by where they came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// From the base.
    pub base: u64,
    /// From the delta.
    pub delta: u64,
    /// From nowhere.
    pub zero: u64,
}

impl Sources {
    #[inline]
    fn add(&mut self, more: &Sources) {
        self.base += more.base;
        self.delta += more.delta;
        self.zero += more.zero;
    }
}

impl Batch {
    /// The marks that have been made in the batch.
    pub(super) fn marks(&mut self) -> &mut Marks {
        &mut self.marks
    }

    /// Where the bytes came from that were read in the batch until now; forgets it.
    #[inline]
    pub fn take_sources(&mut self) -> Sources {
        std::mem::take(&mut self.sources)
    }
}

/// Buffers of one piece of a request; more than these are rare and cost an allocation.
type Pieces<'m> = SmallVec<[Readable<'m>; 32]>;

/// A file below a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VolumeFile {
    Base,
    Delta,
}

/// A part of a read or write: bytes that lie together in one file.
pub struct Place<B> {
    pub file: VolumeFile,
    /// Offset in that file, and how many bytes there are.
    pub offset: u64,
    pub len: u64,
    /// What they are to fill or to come from, one buffer after another.
    pub buffers: SmallVec<[B; 16]>,
}

/// All of a read or write.
pub type Places<B> = SmallVec<[Place<B>; 4]>;

/// Adds the next buffer of a read or write, whose bytes lie at an offset of a file.
pub(super) fn add_to<B: Buffer>(places: &mut Places<B>, file: VolumeFile, offset: u64, buffer: B) {
    let len = buffer.len() as u64;
    match places.last_mut() {
        Some(last) if last.file == file && last.offset + last.len == offset => {
            last.len += len;
            last.buffers.push(buffer);
        }
        _ => places.push(Place { file, offset, len, buffers: SmallVec::from_iter([buffer]) }),
    }
}

/// Where a run of bytes comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Base,
    Delta,
    Zero,
}

impl<S: Storage> Volume<S> {
    /// A volume of a base and a delta over it.
    pub fn cow(base: Base, delta: Delta<S>) -> Volume<S> {
        let bytes = delta.layout().virtual_bytes();
        Volume { base, delta: Some(delta), bytes, exclusions: [const { Exclusion::new() }; EXCLUSIONS] }
    }

    /// A volume of a base alone, which refuses writes.
    pub fn read_only(base: Base) -> Volume<S> {
        let bytes = base.bytes();
        Volume { base, delta: None, bytes, exclusions: [const { Exclusion::new() }; EXCLUSIONS] }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.delta.is_none()
    }

    /// The size of a cluster; what is discarded at less than that stays as it is.
    pub fn cluster(&self) -> ClusterSize {
        self.delta.as_ref().map_or(ClusterSize::DEFAULT, |delta| delta.layout().cluster())
    }

    /// Reads the bytes at `offset` into `into`, one buffer after another.
    pub fn read(&self, offset: u64, into: &[Writable<'_>]) -> Result<(), Error> {
        self.read_in_batch(offset, into, &mut Batch::default(), Patience::Waits).map(|_| ())
    }

    /// As [`Volume::read`], and notes in `batch` where the bytes came from; `false`, and the buffers hold anything, when that would wait for the disk
    /// and must not.
    #[inline]
    pub fn read_in_batch(
        &self,
        offset: u64,
        into: &[Writable<'_>],
        batch: &mut Batch,
        patience: Patience,
    ) -> Result<bool, Error> {
        self.check_range(offset, total_len_writable(into))?;
        if patience == Patience::Waits && self.is_direct() {
            return self.read_places(offset, into, batch).map(|()| true);
        }
        let mut sources = Sources::default();
        let mut at = offset;
        for buffer in into {
            let mut done = 0;
            while done < buffer.len() {
                let (source, len) = self.run_at(at, (buffer.len() - done) as u64)?;
                let part = buffer.part(done, len as usize);
                match (source, &self.delta) {
                    (Source::Delta, Some(delta)) => {
                        if !delta.read(part, at, patience)? {
                            return Ok(false);
                        }
                        sources.delta += len;
                    }
                    (Source::Zero, _) => {
                        part.fill_zero()?;
                        sources.zero += len;
                    }
                    (Source::Base | Source::Delta, _) => {
                        if !self.base.read(part, at, patience)? {
                            return Ok(false);
                        }
                        sources.base += len;
                    }
                }
                done += len as usize;
                at += len;
            }
        }
        batch.sources.add(&sources);
        Ok(true)
    }

    /// Where the bytes are that a read at `offset` is to fill `into` with, for somebody else to read them, and noted in `batch` as read. Those that are nowhere are zero
    /// when this returns.
    pub fn places<'m>(
        &self,
        offset: u64,
        into: &[Writable<'m>],
        batch: &mut Batch,
    ) -> Result<Places<Writable<'m>>, Error> {
        let len = total_len_writable(into);
        self.check_range(offset, len)?;
        let mut places = Places::new();
        let mut sources = Sources::default();
        let mut into = Split::new(into);
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let (source, len) = self.run_at(at, end - at)?;
            let (file, file_offset, held) = match (source, &self.delta) {
                (Source::Delta, Some(delta)) => (Some(VolumeFile::Delta), delta.layout().data_at(at), len),
                (Source::Zero, _) => (None, at, 0),
                // Behind its end there are zeros.
                (Source::Base | Source::Delta, _) => {
                    (Some(VolumeFile::Base), at, self.base.bytes().saturating_sub(at).min(len))
                }
            };
            match source {
                Source::Base => sources.base += len,
                Source::Delta => sources.delta += len,
                Source::Zero => sources.zero += len,
            }
            let mut done = 0;
            while done < len {
                // The buffers are as long as the range that is split here.
                let Some(part) = into.take((if done < held { held } else { len }) - done) else { break };
                match file {
                    Some(file) if done < held => add_to(&mut places, file, file_offset + done, part),
                    _ => part.fill_zero()?,
                }
                done += part.len() as u64;
            }
            at += len;
        }
        batch.sources.add(&sources);
        Ok(places)
    }

    /// As [`Volume::read_in_batch`], with as few calls as there are places: each of them waits for the disk.
    fn read_places(&self, offset: u64, into: &[Writable<'_>], batch: &mut Batch) -> Result<(), Error> {
        for Place { file, mut offset, buffers, .. } in self.places(offset, into, batch)? {
            match (file, &self.delta) {
                (VolumeFile::Delta, Some(delta)) => delta.read_data(&buffers, offset)?,
                _ => {
                    for buffer in buffers {
                        self.base.read(buffer, offset, Patience::Waits)?;
                        offset += buffer.len() as u64;
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether what the delta holds is never in memory, so that reading and writing it always waits for the disk.
    #[inline]
    pub fn is_direct(&self) -> bool {
        self.delta.as_ref().is_some_and(|delta| delta.storage().is_direct())
    }

    /// Notes that a file has been read there, and whether it was in memory already.
    pub fn note_read(&self, file: VolumeFile, offset: u64, len: u64, found: bool) {
        match (file, &self.delta) {
            (VolumeFile::Delta, Some(delta)) => delta.note_read(offset, len as usize, found),
            (VolumeFile::Base, _) => self.base.note_read(offset, len as usize, found),
            (VolumeFile::Delta, None) => {}
        }
    }

    /// Notes that nobody knows whether these bytes are in memory, after a read of them that was to take no time and took some.
    pub fn forget(&self, offset: u64, len: u64) {
        let (mut at, end) = (offset, offset.saturating_add(len).min(self.bytes));
        while at < end {
            let Ok((source, len)) = self.run_at(at, end - at) else { return };
            match (source, &self.delta) {
                (Source::Delta, Some(delta)) => delta.forget(at, len as usize),
                (Source::Base, _) => self.base.forget(at, len as usize),
                _ => {}
            }
            at += len;
        }
    }

    /// Where the byte at `offset` comes from, and how many of the `len` bytes from there on come from the same place and
    /// lie together in it.
    #[inline]
    fn run_at(&self, offset: u64, len: u64) -> Result<(Source, u64), Error> {
        let Some(delta) = &self.delta else { return Ok((Source::Base, len)) };
        let cluster = delta.layout().cluster();
        let first = cluster.containing(offset);
        delta.load(first)?;
        let source = source_of(delta.state(first));
        let limit = cluster.containing(offset + len - 1).min(first | (CLUSTERS_PER_STRETCH - 1));
        let mut last = first;
        while last < limit && source_of(delta.state(last + 1)) == source {
            last += 1;
        }
        Ok((source, len.min(cluster.start_of(last + 1) - offset)))
    }

    /// Writes the buffers, one after another, at `offset`. The write is complete once `batch` is committed.
    pub fn write(&self, offset: u64, from: &[Readable<'_>], batch: &mut Batch) -> Result<(), Error> {
        let Some(delta) = &self.delta else { return Err(Error::ReadOnly) };
        let len = total_len_readable(from);
        self.check_range(offset, len)?;
        let stretch_bytes = CLUSTERS_PER_STRETCH * delta.layout().cluster().bytes();
        if offset / stretch_bytes == (offset + len).saturating_sub(1) / stretch_bytes {
            return if len == 0 { Ok(()) } else { self.write_in_stretch(delta, offset, len, from, batch) };
        }
        let (mut at, end) = (offset, offset + len);
        let mut from = Split::new(from);
        while at < end {
            let piece_end = (at / stretch_bytes + 1).saturating_mul(stretch_bytes).min(end);
            let mut pieces = Pieces::new();
            let mut missing = piece_end - at;
            while missing > 0 {
                // There is one: the buffers are as long as the range that is split here.
                let Some(piece) = from.take(missing) else { break };
                missing -= piece.len() as u64;
                pieces.push(piece);
            }
            self.write_in_stretch(delta, at, piece_end - at, &pieces, batch)?;
            at = piece_end;
        }
        Ok(())
    }

    fn write_in_stretch(
        &self,
        delta: &Delta<S>,
        offset: u64,
        len: u64,
        from: &[Readable<'_>],
        batch: &mut Batch,
    ) -> Result<(), Error> {
        let cluster = delta.layout().cluster();
        let (first, last) = (cluster.containing(offset), cluster.containing(offset + len - 1));
        delta.load(first)?;
        if (first..=last).all(|cluster| delta.state(cluster) == State::Delta) {
            return delta.write(from, offset);
        }
        let _exclusive = self.exclusion(first).take();
        let (ahead, behind) = (cluster.offset_within(offset), cluster.start_of(last + 1) - (offset + len));
        let (fill_ahead, fill_behind) =
            (ahead > 0 && !is_held(delta.state(first)), behind > 0 && !is_held(delta.state(last)));
        if fill_ahead || fill_behind {
            let mut pieces = Pieces::new();
            if fill_ahead {
                pieces.extend(self.below(delta.state(first), offset - ahead, ahead));
            }
            pieces.extend(from.iter().copied());
            if fill_behind {
                pieces.extend(self.below(delta.state(last), offset + len, behind));
            }
            let written = delta.write(&pieces, if fill_ahead { offset - ahead } else { offset });
            written.map_err(|error| self.blame(error))?;
        } else {
            delta.write(from, offset)?;
        }
        (first..=last).for_each(|cluster| delta.mark(cluster, &mut batch.marks));
        Ok(())
    }

    /// What a cluster that is not in the delta reads as, for `len` bytes of it at `offset`.
    fn below(&self, state: State, offset: u64, len: u64) -> [Readable<'_>; 2] {
        match state {
            State::Base => self.base.parts(offset, len as usize),
            _ => [Readable::zeros(0), Readable::zeros(len as usize)],
        }
    }

    /// Of memory that could not be written from, says whether it is the base's.
    #[cold]
    fn blame(&self, error: Error) -> Error {
        match error {
            Error::Memory(fault) => self.base.error_of(fault).unwrap_or(error),
            error => error,
        }
    }

    /// Whether the delta holds all of these bytes, for a few clusters at most of one stretch.
    pub(super) fn holds(&self, offset: u64, len: u64) -> bool {
        let Some(delta) = &self.delta else { return false };
        let cluster = delta.layout().cluster();
        let (first, last) = (cluster.containing(offset), cluster.containing(offset + len.max(1) - 1));
        let is_held = |number: u64| delta.load(number).is_ok() && delta.state(number) == State::Delta;
        first / CLUSTERS_PER_STRETCH == last / CLUSTERS_PER_STRETCH && (first..=last).all(is_held)
    }

    /// The exclusion of a cluster's stretch.
    pub(super) fn exclusion(&self, cluster: u64) -> &Exclusion {
        let stretch = (cluster / CLUSTERS_PER_STRETCH) as usize;
        &self.exclusions[stretch % EXCLUSIONS]
    }

    /// The delta, if there is one.
    pub(super) fn delta(&self) -> Option<&Delta<S>> {
        self.delta.as_ref()
    }

    /// Makes `len` bytes at `offset` zero; with `give_back`, whole clusters also give their space back.
    /// The change is complete once `batch` is committed.
    pub fn write_zeroes(&self, offset: u64, len: u64, give_back: bool, batch: &mut Batch) -> Result<(), Error> {
        let Some(delta) = &self.delta else { return Err(Error::ReadOnly) };
        self.check_range(offset, len)?;
        let (inner_start, inner_end) = self.whole_clusters(delta, offset, len);
        if inner_start >= inner_end {
            return self.zero_edge(delta, offset, offset + len, batch);
        }
        self.zero_edge(delta, offset, inner_start, batch)?;
        self.zero_clusters(delta, inner_start, inner_end, give_back)?;
        self.zero_edge(delta, inner_end.min(offset + len), offset + len, batch)
    }

    /// Makes the whole clusters among `len` bytes at `offset` zero and gives their space back. The rest stays as it is.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        let Some(delta) = &self.delta else { return Err(Error::ReadOnly) };
        self.check_range(offset, len)?;
        let (start, end) = self.whole_clusters(delta, offset, len);
        if start >= end { Ok(()) } else { self.zero_clusters(delta, start, end, true) }
    }

    /// The range of whole clusters within a range. The volume's last cluster is whole where the volume ends.
    fn whole_clusters(&self, delta: &Delta<S>, offset: u64, len: u64) -> (u64, u64) {
        let cluster = delta.layout().cluster();
        let start = cluster.start_of(cluster.count_for(offset));
        let end = offset + len;
        let end = if end == self.bytes { cluster.count_for(end) } else { cluster.containing(end) };
        (start, cluster.start_of(end))
    }

    fn zero_clusters(&self, delta: &Delta<S>, start: u64, end: u64, give_back: bool) -> Result<(), Error> {
        let cluster = delta.layout().cluster();
        let (mut first, end) = (cluster.containing(start), cluster.containing(end));
        // From here on the base has nothing, so that a cluster that is not held is zero without a mark.
        let below_end = cluster.count_for(self.base.bytes());
        while first < end {
            let stop = end.min((first | (CLUSTERS_PER_STRETCH - 1)) + 1);
            delta.load(first)?;
            let is_zero = |cluster: u64| match delta.state(cluster) {
                State::Zero => true,
                State::Base => cluster >= below_end,
                State::Delta | State::Fresh => false,
            };
            let exclusive = self.exclusion(first).take();
            if !(first..stop).all(is_zero) {
                delta.zero(first, stop - first, give_back)?;
            }
            drop(exclusive);
            first = stop;
        }
        Ok(())
    }

    /// Makes part of one cluster zero.
    fn zero_edge(&self, delta: &Delta<S>, start: u64, end: u64, batch: &mut Batch) -> Result<(), Error> {
        // A range within two clusters, neither of them whole, is two edges.
        let cluster = delta.layout().cluster();
        let mut at = start;
        while at < end {
            let stop = end.min(cluster.start_of(cluster.containing(at) + 1));
            delta.load(cluster.containing(at))?;
            let is_zero = match delta.state(cluster.containing(at)) {
                State::Zero => true,
                State::Base => at >= self.base.bytes(),
                State::Delta | State::Fresh => false,
            };
            if !is_zero {
                self.write(at, &[Readable::zeros((stop - at) as usize)], batch)?;
            }
            at = stop;
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn delta_storage(&self) -> &S {
        self.delta.as_ref().expect("a delta").storage()
    }

    /// Makes the writes of a batch safe from the death of the process. When this fails, none of them may be reported as complete.
    pub fn commit(&self, batch: &mut Batch) -> Result<(), Error> {
        match &self.delta {
            Some(delta) => delta.commit(&mut batch.marks),
            None => Ok(()),
        }
    }

    /// Makes durable everything that was written and committed before the call.
    pub fn flush(&self) -> Result<(), Error> {
        self.delta.as_ref().map_or(Ok(()), Delta::flush)
    }

    /// Whether a flush is under way.
    pub fn is_flushing(&self) -> bool {
        self.delta.as_ref().is_some_and(Delta::is_flushing)
    }

    /// Whether a flush now would have to wait for the disk.
    #[inline]
    pub fn has_to_sync(&self) -> bool {
        self.delta.as_ref().is_some_and(Delta::has_to_sync)
    }

    /// Flushes, and notes that the delta was closed in good order. Nothing may be written afterwards.
    pub fn close(&self) -> Result<(), Error> {
        self.delta.as_ref().map_or(Ok(()), Delta::close)
    }

    /// Sees that the range is part of the volume.
    pub fn check_range(&self, offset: u64, len: u64) -> Result<(), Error> {
        match offset.checked_add(len) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(Error::OutOfRange { offset, len, bytes: self.bytes }),
        }
    }
}

impl Volume<FileStorage> {
    /// Has the processor fetch what is at `offset`, if it is in memory and that is known.
    #[inline]
    pub fn fetch(&self, offset: u64) {
        let Some(delta) = &self.delta else { return self.base.fetch(offset) };
        let cluster = delta.layout().cluster().containing(offset);
        if offset < self.bytes && delta.is_loaded(cluster) {
            match source_of(delta.state(cluster)) {
                Source::Base => self.base.fetch(offset),
                Source::Delta => delta.storage().fetch(delta.layout().data_at(offset)),
                Source::Zero => {}
            }
        }
    }

    /// Lets go of what it takes of memory to have the files mapped, until `is_wanted`. Whatever is read next takes some longer, once.
    pub fn let_go(&self, mut is_wanted: impl FnMut() -> bool) {
        self.base.let_go(&mut is_wanted);
        if let Some(delta) = &self.delta {
            delta.storage().let_go(is_wanted);
        }
    }

    /// One of the files below, if there is one.
    pub fn file(&self, which: VolumeFile) -> Option<&File> {
        match which {
            VolumeFile::Base => self.base.file(),
            VolumeFile::Delta => self.delta.as_ref().map(|delta| delta.storage().data_file()),
        }
    }
}

const _: () = assert!(CLUSTERS_PER_STRETCH.is_power_of_two());
const _: () = assert!(CLUSTERS_PER_GROUP.is_multiple_of(CLUSTERS_PER_STRETCH), "a run within a stretch lies together");

fn source_of(state: State) -> Source {
    match state {
        State::Base => Source::Base,
        State::Delta | State::Fresh => Source::Delta,
        State::Zero => Source::Zero,
    }
}

fn is_held(state: State) -> bool {
    matches!(state, State::Delta | State::Fresh)
}
