//! [`Delta`]: one VM's private, sparse file over one base.
//!
//! Knows which clusters it holds and keeps that knowledge safe; what lies below it, and when a cluster has to be copied up,
//! is [`super::Volume`]'s affair.
//!
//! # What the file promises, and how
//!
//! - **Power loss.** A flush makes data durable, then the marks that speak of it, then returns: `sync`, map sectors, `sync`.
//!   The map sectors are copied *before* the first sync, so they never speak of data that came later. A sector of data
//!   therefore holds its old contents until its mark is durable, and its new ones afterwards.
//! - **Process death.** A mark is in the mark log ([`marks`]) before the write that made it completes.
//! - **Failed sync.** The kernel reports a lost write once and forgets; so the first failed sync latches, and no later write or flush
//!   reports success.
//! - **One writer.** The file is locked while it is open ([`open::open_locked`]).

pub mod check;
pub mod extents;
pub mod grow;
pub mod header;
mod latch;
pub mod layout;
mod map;
mod marks;
pub mod open;
pub mod repair;
pub mod survey;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys::buffers::{Readable, Writable};
use crate::sys::process;

use super::Error;
use super::cached::Patience;
use super::error::is_full;
use super::storage::Storage;
use header::{HEADER_AT, Header, Phase, SESSION_AT, Session};
use layout::{CLUSTERS_PER_STRETCH, Layout};
use map::{LoadError, Map, MapWrite};
use marks::{AppendError, Mark, MarkLog};

pub use latch::Latch;
pub use map::{MapFault, State};
pub use open::OpenError;

/// Whether what is written has to outlive the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// The file stays, with every promise above.
    Persistent,
    /// The file has no name and goes with the last process that has it open: what was written survives the death of one of them, and a
    /// flush costs nothing.
    Ephemeral,
}

/// An open delta. Shared by all queue threads.
pub struct Delta<S> {
    storage: S,
    /// What to call the file in messages.
    label: String,
    header: Header,
    map: Map,
    lifetime: Lifetime,
    log: Mutex<MarkLog>,
    /// Held during a flush.
    flush: Mutex<FlushState>,
    /// Whether data was written since the last sync.
    written: AtomicBool,
    latch: Latch,
    session: Session,
}

struct FlushState {
    /// Whether the log's other half is free to be turned to.
    other_half_free: bool,
}

/// The marks that the writes of one batch of requests have made and that are not in the log yet.
///
/// Whoever writes through a delta commits the batch before it reports any of its writes as complete.
#[derive(Default)]
pub struct Marks {
    runs: Vec<(u64, u64)>,
    log: Vec<Mark>,
}

impl Marks {
    /// Notes a cluster; neighbours join.
    fn push(&mut self, cluster: u64) {
        match self.runs.last_mut() {
            Some((first, count)) if *first + *count == cluster => *count += 1,
            _ => self.runs.push((cluster, 1)),
        }
    }

    /// Whether there is nothing to commit.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

impl<S: Storage> Delta<S> {
    /// Opens a delta whose `header` has been read from `storage` and found to be for the right base.
    ///
    /// Takes the same time for any size. After the death of an earlier session of this boot, its marks are taken over.
    pub fn start(storage: S, label: String, header: Header, lifetime: Lifetime) -> Result<Delta<S>, OpenError> {
        let io = |action, offset| {
            let file = label.clone();
            move |source| OpenError::Io { action, file, offset, source }
        };
        let layout = header.layout;
        let found = open::read_session(&storage, &label)?;
        let boot = process::boot_id().map_err(io("find the boot id for", SESSION_AT))?;
        let map = Map::new(layout).map_err(io("make room in memory for the map of", 0))?;
        let died = found.phase == Phase::Open && found.boot == boot;
        let (session, log, other_half_free) = if died {
            let replay = marks::replay(&storage, found.generation, layout.cluster_count())
                .map_err(io("read the mark log of", layout::LOG_START))?;
            replay.check().map_err(|fault| OpenError::Header { file: label.clone(), fault })?;
            apply(&map, &replay.marks, &storage, &label)?;
            log::info!(
                "{label}: the last session was not closed; took over its mark log with {} entries",
                replay.marks.len()
            );
            (found, replay.log, !replay.other_half_counts)
        } else {
            if found.phase == Phase::Open {
                log::warn!("{label}: the host went down while it was open; going on from the last flush");
            }
            let highest = marks::highest_generation(&storage, layout.cluster_count())
                .map_err(io("read the mark log of", layout::LOG_START))?;
            let generation = match marks::generation_above(found.generation.max(highest)) {
                Some(generation) => generation,
                None => {
                    // Nothing counts so far. It is void, and once it holds nothing, any will do.
                    let voided = storage.punch_hole(layout::LOG_START, 2 * layout::LOG_HALF_BYTES);
                    voided.and_then(|()| storage.sync()).map_err(io("clear the mark log of", layout::LOG_START))?;
                    marks::generation_above(0).unwrap_or(1)
                }
            };
            (Session { phase: Phase::Open, boot, generation }, MarkLog::new(generation), true)
        };
        let delta = Delta {
            map,
            log: Mutex::new(log),
            flush: Mutex::new(FlushState { other_half_free }),
            // What a dead session wrote may not be durable yet.
            written: AtomicBool::new(died),
            latch: Latch::default(),
            session,
            storage,
            label,
            header,
            lifetime,
        };
        if !died {
            delta.write_session(Phase::Open).map_err(OpenError::from)?;
        }
        Ok(delta)
    }

    /// Has a failed sync remembered in `latch`, which may know of one already.
    pub fn latching_in(self, latch: Latch) -> Delta<S> {
        if latch.is_closed() {
            log::error!("{}: an earlier sync failed, so no write or flush will report success", self.label);
        }
        Delta { latch, ..self }
    }

    /// Cluster size and size of the volume.
    pub fn layout(&self) -> Layout {
        self.header.layout
    }

    /// The number that no other delta has.
    pub fn uuid(&self) -> [u8; 16] {
        self.header.uuid
    }

    /// Sees to it that the states of the cluster's group can be asked for. Clusters of one stretch are of one group.
    #[inline]
    pub fn load(&self, cluster: u64) -> Result<(), Error> {
        self.map.load(cluster, &self.storage).map_err(|error| map_error(error, &self.label))
    }

    /// Whether the state of a cluster can be asked for.
    #[inline]
    pub fn is_loaded(&self, cluster: u64) -> bool {
        self.map.is_loaded(cluster)
    }

    /// Where a cluster's contents are. Its group must be loaded.
    #[inline]
    pub fn state(&self, cluster: u64) -> State {
        self.map.state(cluster)
    }

    /// Reads bytes of clusters that are all in the delta and all of one stretch; `false`, and `into` holds anything, when that would wait and must
    /// not.
    #[inline]
    pub fn read(&self, into: Writable<'_>, offset: u64, patience: Patience) -> Result<bool, Error> {
        let at = self.layout().data_at(offset);
        self.storage.read_with(into, at, patience).map_err(|source| self.io_error("read", at, source))
    }

    /// Reads bytes of clusters by where they lie in its file, into some buffers, one after another.
    pub fn read_data(&self, into: &[Writable<'_>], file_offset: u64) -> Result<(), Error> {
        let result = self.storage.read_data_at(into, file_offset);
        result.map_err(|source| self.io_error("read", file_offset, source))
    }

    /// What it lies in.
    pub fn storage(&self) -> &S {
        &self.storage
    }

    /// Notes that bytes at an offset of its file have been read by somebody else, and whether they were in memory already.
    pub fn note_read(&self, file_offset: u64, len: usize, found: bool) {
        self.storage.note_read(file_offset, len, found);
    }

    /// Notes that nobody knows whether these bytes, of clusters of one stretch, are in memory.
    pub fn forget(&self, offset: u64, len: usize) {
        self.storage.forget(self.layout().data_at(offset), len);
    }

    /// Writes bytes to clusters of one stretch. Whoever writes to a cluster that is not in the delta yet holds the
    /// stretch, writes all of the cluster, and calls [`Delta::mark`] before letting go.
    pub fn write(&self, from: &[Readable<'_>], offset: u64) -> Result<(), Error> {
        self.check_latch()?;
        let at = self.layout().data_at(offset);
        let result = self.storage.write_data_at(from, at).map_err(|source| self.io_error("write", at, source));
        // Also when it failed, for part of it may have happened.
        self.note_written();
        result
    }

    /// Notes that something has been written. After the write: a flush that clears this ahead of its sync then covers it.
    pub fn note_written(&self) {
        self.written.store(true, Ordering::Release);
    }

    /// Notes that all of a cluster is in the file now, which is seen at once, and safe once `marks` is committed.
    /// The caller holds the stretch.
    pub fn mark(&self, cluster: u64, marks: &mut Marks) {
        match self.map.state(cluster) {
            State::Delta => {}
            // Another batch has marked it and may not have logged that yet: this batch's write depends on it too.
            State::Fresh => marks.push(cluster),
            State::Base | State::Zero => {
                self.map.set(cluster, State::Fresh);
                marks.push(cluster);
            }
        }
    }

    /// Makes the marks of a batch safe from the death of the process. When this fails, no write of the batch may be reported as
    /// complete; `marks` is empty afterwards in any case.
    pub fn commit(&self, marks: &mut Marks) -> Result<(), Error> {
        if marks.is_empty() {
            return Ok(());
        }
        let result = self.commit_runs(marks);
        marks.runs.clear();
        result
    }

    fn commit_runs(&self, marks: &mut Marks) -> Result<(), Error> {
        loop {
            let mut log = self.log.lock().expect("no holder of this lock panics");
            // Only what is still fresh: another batch may have logged a cluster meanwhile, or a discard have overtaken it.
            // States leave `Fresh` only under this lock, so the log has them in the order in which they change.
            marks.log.clear();
            'runs: for &(first, count) in &marks.runs {
                for cluster in (first..first + count).filter(|cluster| self.map.state(*cluster) == State::Fresh) {
                    if marks.log.len() == marks::APPEND_MARKS_MAX {
                        break 'runs;
                    }
                    match marks.log.last_mut() {
                        Some(last) if last.first + last.count == cluster && last.count < marks::CLUSTERS_MAX => {
                            last.count += 1;
                        }
                        _ => marks.log.push(Mark { first: cluster, count: 1, zero: false }),
                    }
                }
            }
            if marks.log.is_empty() {
                return Ok(());
            }
            match log.append(&marks.log, &self.storage) {
                Ok(()) => {
                    for mark in &marks.log {
                        (mark.first..mark.first + mark.count).for_each(|cluster| self.map.set(cluster, State::Delta));
                    }
                    if marks.log.len() < marks::APPEND_MARKS_MAX {
                        return Ok(());
                    }
                    // What is left is still fresh.
                }
                Err(AppendError::Full) => {
                    drop(log);
                    self.flush_and_turn()?;
                }
                Err(AppendError::Io { offset, source }) => {
                    return Err(self.io_error("write the mark log of", offset, source));
                }
            }
        }
    }

    /// Makes whole clusters of one stretch zero and, when `give_back` is set, gives their space back. The caller holds the stretch. Safe from
    /// the death of the process when this returns.
    pub fn zero(&self, first: u64, count: u64, give_back: bool) -> Result<(), Error> {
        debug_assert_eq!(first / CLUSTERS_PER_STRETCH, (first + count - 1) / CLUSTERS_PER_STRETCH);
        self.check_latch()?;
        let clusters = first..first + count;
        let held = clusters.clone().any(|cluster| matches!(self.state(cluster), State::Delta | State::Fresh));
        if !clusters.clone().all(|cluster| self.state(cluster) == State::Zero) {
            self.mark_zero(Mark { first, count, zero: true })?;
        }
        if give_back && held {
            let (at, len) = (self.layout().data(first), count * self.layout().cluster().bytes());
            match self.storage.punch_hole(at, len) {
                Ok(()) => self.written.store(true, Ordering::Release),
                // The contents are zero by their marks, whatever becomes of the space.
                Err(error) => log::debug!("{}: space at offset {at} not given back: {error}", self.label),
            }
        }
        Ok(())
    }

    fn mark_zero(&self, mark: Mark) -> Result<(), Error> {
        let clusters = mark.first..mark.first + mark.count;
        loop {
            let mut log = self.log.lock().expect("no holder of this lock panics");
            match log.append(&[mark], &self.storage) {
                Ok(()) => {}
                Err(AppendError::Full) => {
                    drop(log);
                    self.flush_and_turn()?;
                    continue;
                }
                Err(AppendError::Io { offset, source }) => {
                    return Err(self.io_error("write the mark log of", offset, source));
                }
            }
            clusters.for_each(|cluster| self.map.set(cluster, State::Zero));
            return Ok(());
        }
    }

    /// Makes durable everything that was written and committed before the call. Costs no sync when there is nothing.
    pub fn flush(&self) -> Result<(), Error> {
        if self.lifetime == Lifetime::Ephemeral {
            return Ok(());
        }
        // Flushes that wait here share the sync of the next one: it leaves nothing for the others to do.
        let mut state = self.flush.lock().expect("no holder of this lock panics");
        self.check_latch()?;
        if !self.written.load(Ordering::Acquire) && !self.map.is_dirty() {
            return Ok(());
        }
        self.flush_locked(&mut state)
    }

    /// Whether a flush is under way.
    pub fn is_flushing(&self) -> bool {
        self.flush.try_lock().is_err()
    }

    /// Whether a flush now would have to wait for the disk.
    #[inline]
    pub fn has_to_sync(&self) -> bool {
        self.lifetime == Lifetime::Persistent && (self.written.load(Ordering::Acquire) || self.map.is_dirty())
    }

    /// Flushes because the log is full. Enough times that it has turned.
    fn flush_and_turn(&self) -> Result<(), Error> {
        let mut state = self.flush.lock().expect("no holder of this lock panics");
        self.check_latch()?;
        if !state.other_half_free {
            self.flush_locked(&mut state)?;
        }
        self.flush_locked(&mut state)
    }

    fn flush_locked(&self, state: &mut FlushState) -> Result<(), Error> {
        let turned = state.other_half_free && {
            let mut log = self.log.lock().expect("no holder of this lock panics");
            let turn = !log.is_empty();
            if turn {
                log.turn();
            }
            turn
        };
        if turned {
            state.other_half_free = false;
        }
        // Copied ahead of the sync, so that what these sectors speak of is durable when they are written.
        let sectors = self.map.take_dirty();
        self.written.store(false, Ordering::Release);
        self.sync()?;
        if !sectors.is_empty() {
            for MapWrite { offset, sector, .. } in &sectors {
                let written = self.storage.write_at(&[Readable::from_slice(sector)], *offset);
                match written {
                    Err(source) if is_full(&source) => {
                        // Nothing is lost: the log still has these marks, and the next flush writes them all.
                        self.map.give_back(&sectors);
                        self.written.store(true, Ordering::Release);
                        return Err(self.io_error("write the cluster map of", *offset, source));
                    }
                    written => self.latching("write the cluster map of", *offset, written)?,
                }
            }
            self.sync()?;
        }
        state.other_half_free = true;
        Ok(())
    }

    /// Flushes and notes on disk that the delta was closed in good order. Nothing may be written afterwards.
    pub fn close(&self) -> Result<(), Error> {
        if self.lifetime == Lifetime::Ephemeral {
            return Ok(());
        }
        self.flush()?;
        self.write_session(Phase::Closed)?;
        // Void from here on, and as large as the longest time between two flushes has made it.
        if let Err(error) = self.storage.punch_hole(layout::LOG_START, 2 * layout::LOG_HALF_BYTES) {
            log::debug!("{}: the space of its mark log is not given back: {error}", self.label);
        }
        self.sync()
    }

    fn sync(&self) -> Result<(), Error> {
        match self.lifetime {
            Lifetime::Persistent => self.latching("sync", 0, self.storage.sync()),
            Lifetime::Ephemeral => Ok(()),
        }
    }

    fn write_session(&self, phase: Phase) -> Result<(), Error> {
        let generation = self.log.lock().expect("no holder of this lock panics").generation();
        let session = match phase {
            Phase::Open => self.session,
            Phase::Closed => Session { phase, generation, ..self.session },
        };
        self.storage
            .write_at(&[Readable::from_slice(&session.encode())], SESSION_AT)
            .map_err(|source| self.io_error("write the session of", SESSION_AT, source))
    }

    /// Sees that no sync has failed.
    pub fn check_latch(&self) -> Result<(), Error> {
        if self.latch.is_closed() { Err(Error::Latched { file: self.label.clone() }) } else { Ok(()) }
    }

    /// Latches when `result` is an error.
    fn latching(&self, action: &'static str, offset: u64, result: std::io::Result<()>) -> Result<(), Error> {
        result.map_err(|source| {
            self.latch.close();
            log::error!(
                "{}: cannot {action} it, so no further write or flush will report success: {source}",
                self.label
            );
            self.io_error(action, offset, source)
        })
    }

    fn io_error(&self, action: &'static str, offset: u64, source: std::io::Error) -> Error {
        Error::of_io(action, &self.label, offset, source)
    }
}

/// Sets the states that a log speaks of.
fn apply(map: &Map, marks: &[Mark], storage: &impl Storage, label: &str) -> Result<(), OpenError> {
    for mark in marks {
        for cluster in mark.first..mark.first + mark.count {
            map.load(cluster, storage).map_err(|error| OpenError::from(map_error(error, label)))?;
            map.set(cluster, mark.state());
        }
    }
    Ok(())
}

fn map_error(error: LoadError, label: &str) -> Error {
    let file = label.to_owned();
    match error {
        LoadError::Io { offset, source } => Error::Io { action: "read the cluster map of", file, offset, source },
        LoadError::Fault { offset, fault } => Error::Corrupt { file, offset, fault },
    }
}

/// Writes an empty delta to `storage`: a header, no session yet, and the length.
pub fn format(storage: &impl Storage, header: &Header) -> std::io::Result<()> {
    storage.set_len(header.layout.file_bytes())?;
    storage.write_at(&[Readable::from_slice(&Session::NONE.encode())], SESSION_AT)?;
    storage.write_at(&[Readable::from_slice(&header.encode())], HEADER_AT)?;
    storage.sync()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::storage::FileStorage;
    use crate::units::ClusterSize;

    /// A guest can make a batch's marks more than the log has room for: requests of 256 MiB to every other cluster.
    #[test]
    fn a_batch_of_more_marks_than_the_log_holds_is_committed() {
        let count = layout::LOG_HALF_BYTES / 16 + 10;
        let layout = Layout::new(ClusterSize::DEFAULT, count * 2 * 4096).unwrap();
        let header = Header { layout, uuid: [0; 16], base: None };
        let file = tempfile::tempfile().unwrap();
        file.set_len(layout.file_bytes()).unwrap();
        format(&FileStorage::new(file.try_clone().unwrap()).unwrap(), &header).unwrap();
        let open = || {
            let storage = FileStorage::new(file.try_clone().unwrap()).unwrap();
            Delta::start(storage, "test".into(), header.clone(), Lifetime::Persistent).unwrap()
        };
        let delta = open();
        let mut marks = Marks::default();
        for index in 0..count {
            delta.load(index * 2).unwrap();
            delta.mark(index * 2, &mut marks);
        }
        delta.commit(&mut marks).unwrap();
        drop(delta);
        let delta = open();
        for index in 0..count {
            delta.load(index * 2).unwrap();
            assert_eq!(delta.state(index * 2), State::Delta, "survives the death of the process");
        }
    }

    /// A file can hold a log that has counted as far as entries are believed. The next turn must not put entries behind that.
    #[test]
    fn a_log_without_room_to_count_is_refused() {
        let layout = Layout::new(ClusterSize::DEFAULT, 1 << 20).unwrap();
        let header = Header { layout, uuid: [0; 16], base: None };
        let file = tempfile::tempfile().unwrap();
        let storage = || FileStorage::new(file.try_clone().unwrap()).unwrap();
        let start = || Delta::start(storage(), "test".into(), header.clone(), Lifetime::Persistent);
        let last = 2 * marks::GENERATION_MAX;
        let logs = [
            (Phase::Open, 7, true),
            (Phase::Open, last - 2, false),
            (Phase::Open, last, false),
            // It is void, whatever it holds.
            (Phase::Closed, last, true),
        ];
        for (phase, generation, is_taken) in logs {
            file.set_len(0).unwrap();
            file.set_len(layout.file_bytes()).unwrap();
            format(&storage(), &header).unwrap();
            let session = Session { phase, boot: process::boot_id().unwrap(), generation: 3 };
            storage().write_at(&[Readable::from_slice(&session.encode())], SESSION_AT).unwrap();
            let entry = [Mark { first: 0, count: 1, zero: true }];
            MarkLog::new(generation).append(&entry, &storage()).unwrap();
            let Ok(delta) = start() else {
                assert!(!is_taken, "a log of generation {generation} is refused");
                continue;
            };
            // Each flush turns the log.
            for cluster in 1..8 {
                let mut marks = Marks::default();
                delta.load(cluster).unwrap();
                delta.mark(cluster, &mut marks);
                delta.commit(&mut marks).unwrap();
                delta.flush().unwrap();
            }
            let mut marks = Marks::default();
            delta.mark(9, &mut marks);
            delta.commit(&mut marks).unwrap();
            drop(delta);
            let delta = start().unwrap();
            delta.load(9).unwrap();
            assert_eq!(delta.state(9), State::Delta, "a mark behind a log of generation {generation} is gone");
            assert!(is_taken, "a log of generation {generation} is taken over");
        }
    }
}
