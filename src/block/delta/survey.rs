//! [`Survey`]: a delta file as it stands, looked at without opening it for a volume.
//!
//! Changes nothing and believes nothing: what does not check out is handed on as a fault. It walks only what the file system has
//! data for, holds one group's states and the mark log at a time, and reads by system call, never through a mapping, so a
//! file that somebody cuts short meanwhile is zeros and no signal.
//!
//! A file in use can be surveyed; the result is then a snapshot in which each cluster is as it was at some moment of the survey.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::block::Error;
use crate::block::storage::Storage;
use crate::sys::buffers::{Readable, Writable};
use crate::sys::{file, process};

use super::header::{Header, HeaderFault, Phase, SESSION_AT};
use super::layout::{
    CLUSTERS_PER_GROUP, CLUSTERS_PER_WORD, DISK_SECTOR_BYTES, LOG_START, Layout, MAP_BLOCK_BYTES,
    MAP_SECTORS_PER_GROUP, WORDS_PER_MAP_SECTOR,
};
use super::map::{self, MapFault, State};
use super::marks::{self, Mark};
use super::open::{self, Holder, OpenError};

/// A delta file that is looked at.
pub struct Survey {
    file: File,
    label: String,
    header: Header,
    condition: Condition,
    /// The marks of the log that count, in the order of groups, those of one group in the order in which they were made.
    marks: Vec<Mark>,
}

/// How the last session stands.
#[derive(Debug, PartialEq, Eq)]
pub enum Condition {
    /// Closed in good order.
    Closed,
    /// Somebody has the file open.
    InUse(Holder),
    /// Its process died; the mark log counts.
    Died,
    /// The host went down under it; the file is as the last flush left it.
    HostWentDown,
    /// Its sector is corrupt, so that nobody knows whether the mark log counts. It is looked at as if not.
    Unknown(HeaderFault),
}

/// How many clusters are where.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Census {
    /// In the delta.
    pub delta: u64,
    /// Zero by a mark.
    pub zero: u64,
    /// Not in the delta: in the base, or nowhere and so zero.
    pub base: u64,
    /// Nobody knows where: their map is corrupt.
    pub unknown: u64,
}

/// The states of one group's clusters.
pub struct GroupStates {
    /// The clusters.
    pub clusters: Range<u64>,
    sectors: [Result<[u64; WORDS_PER_MAP_SECTOR], MapFault>; MAP_SECTORS_PER_GROUP],
}

/// Clusters, one after another, with the same state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Where they are, or `None` when their map is corrupt.
    pub state: Option<State>,
}

/// Clusters whose states one sector of the map holds.
pub const CLUSTERS_PER_MAP_SECTOR: u64 = WORDS_PER_MAP_SECTOR as u64 * CLUSTERS_PER_WORD;

/// How often a map sector that does not check out is read again while somebody writes to the file: the read may have met
/// the write half way.
const READS_MAX: usize = 4;

impl Survey {
    /// Looks at the delta file at `path`.
    pub fn of(path: &Path) -> Result<Survey, OpenError> {
        let label = path.display().to_string();
        let (file, header) = open::open_to_look(path)?;
        let holder = open::holder(&file).map_err(|source| OpenError::Io {
            action: "find out who uses",
            file: label.clone(),
            offset: 0,
            source,
        })?;
        Survey::new(file, header, label, holder)
    }

    /// Looks at a delta file whose lock the caller holds.
    pub fn of_locked(file: File, header: Header, label: String) -> Result<Survey, OpenError> {
        Survey::new(file, header, label, None)
    }

    fn new(file: File, header: Header, label: String, holder: Option<Holder>) -> Result<Survey, OpenError> {
        let io = |action, offset| {
            let file = label.clone();
            move |source| OpenError::Io { action, file, offset, source }
        };
        let (mut condition, mut lowest_generation) = (Condition::Closed, None);
        match open::read_session(&Looked(&file), &label) {
            Ok(session) if session.phase == Phase::Open => {
                if session.boot == process::boot_id().map_err(io("find the boot id for", SESSION_AT))? {
                    condition = Condition::Died;
                    lowest_generation = Some(session.generation);
                } else {
                    condition = Condition::HostWentDown;
                }
            }
            Ok(_) => {}
            Err(OpenError::Header { fault, .. }) => condition = Condition::Unknown(fault),
            Err(error) => return Err(error),
        }
        if let Some(holder) = holder
            && !matches!(condition, Condition::Unknown(_))
        {
            condition = Condition::InUse(holder);
        }
        // Ahead of the map: a flush meanwhile moves marks from the log to the map, so that no mark is missed.
        let marks = match lowest_generation {
            Some(generation) => {
                let clusters = header.layout.cluster_count();
                let replay = marks::replay(&Looked(&file), generation, clusters);
                let replay = replay.map_err(io("read the mark log of", LOG_START))?;
                if let (Err(fault), Condition::Died) = (replay.check(), &condition) {
                    condition = Condition::Unknown(fault);
                }
                by_group(replay.marks)
            }
            None => Vec::new(),
        };
        Ok(Survey { file, label, header, condition, marks })
    }

    /// What the file is called in messages.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// What the delta is.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How the last session stands.
    pub fn condition(&self) -> &Condition {
        &self.condition
    }

    /// Runs of clusters in the mark log that count on top of the map on disk.
    pub fn marks(&self) -> u64 {
        self.marks.len() as u64
    }

    /// Length of the file, and bytes that the file system has allocated for it.
    pub fn file_and_disk_bytes(&self) -> Result<(u64, u64), OpenError> {
        let metadata = self.file.metadata().map_err(|source| self.io_error("look at", 0, source))?;
        // `st_blocks` counts in units of 512 bytes, whatever the file system's own.
        Ok((metadata.len(), metadata.blocks().saturating_mul(512)))
    }

    /// Counts the clusters.
    pub fn census(&self) -> Result<Census, OpenError> {
        let mut census = Census { base: self.layout().cluster_count(), ..Census::default() };
        for group in self.groups() {
            for run in group?.runs() {
                let counter = match run.state {
                    Some(State::Base) => continue,
                    Some(State::Delta | State::Fresh) => &mut census.delta,
                    Some(State::Zero) => &mut census.zero,
                    None => &mut census.unknown,
                };
                *counter += run.count;
                census.base -= run.count;
            }
        }
        Ok(census)
    }

    /// The groups that may have other clusters than such of the base, in order: those with any data, and those with marks in the log.
    pub fn groups(&self) -> impl Iterator<Item = Result<GroupStates, OpenError>> {
        let mut next = 0;
        let mut marks = &self.marks[..];
        std::iter::from_fn(move || {
            let group = match self.next_group(next, marks) {
                Ok(group) => group?,
                Err(error) => {
                    next = self.layout().group_count();
                    marks = &[];
                    return Some(Err(error));
                }
            };
            let (of_group, rest) = marks.split_at(marks.partition_point(|mark| group_of(mark) <= group));
            (next, marks) = (group + 1, rest);
            Some(self.states(group, of_group))
        })
    }

    /// The first group from `from` on that has data or a mark.
    fn next_group(&self, from: u64, marks: &[Mark]) -> Result<Option<u64>, OpenError> {
        if from >= self.layout().group_count() {
            return Ok(None);
        }
        let data = self.data_from(self.layout().map_block(from))?;
        let with_data = data.map(|range| self.layout().group_at(range.start));
        let next = [with_data, marks.first().map(group_of)].into_iter().flatten().min();
        Ok(next.filter(|group| *group < self.layout().group_count()))
    }

    fn states(&self, group: u64, marks: &[Mark]) -> Result<GroupStates, OpenError> {
        let offset = self.layout().map_block(group);
        let mut reads = 0;
        let mut sectors = loop {
            let mut block = [0; MAP_BLOCK_BYTES as usize];
            file::read_at(&self.file, Writable::from_mut_slice(&mut block), offset)
                .map_err(|source| self.io_error("read the cluster map of", offset, source))?;
            let block = block.as_chunks::<{ DISK_SECTOR_BYTES as usize }>().0;
            let sectors =
                std::array::from_fn(|index| map::decode_sector(&self.header.layout, group, index, &block[index]));
            reads += 1;
            let again = matches!(self.condition, Condition::InUse(_)) && reads < READS_MAX;
            if !again || sectors.iter().all(Result::is_ok) {
                break sectors;
            }
        };
        let clusters = self.layout().clusters_of(group);
        for mark in marks {
            for cluster in mark.first..mark.first + mark.count {
                let within = cluster - clusters.start;
                if let Ok(words) = &mut sectors[(within / CLUSTERS_PER_MAP_SECTOR) as usize] {
                    map::set_in(words, (within % CLUSTERS_PER_MAP_SECTOR) as usize, mark.state());
                }
            }
        }
        Ok(GroupStates { clusters, sectors })
    }

    /// The next range of the file from `offset` on that the file system has data for.
    pub(super) fn data_from(&self, offset: u64) -> Result<Option<Range<u64>>, OpenError> {
        file::next_data(&self.file, offset).map_err(|source| self.io_error("find the data of", offset, source))
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.header.layout
    }

    fn io_error(&self, action: &'static str, offset: u64, source: io::Error) -> OpenError {
        OpenError::Io { action, file: self.label.clone(), offset, source }
    }

    /// The error of a volume that meets a corrupt sector of the map, if one holds the states of `run`.
    pub(super) fn corrupt(&self, group: &GroupStates, run: Run) -> Option<OpenError> {
        let (offset, fault) = group
            .faults(self.layout())
            .find(|(_, _, clusters)| clusters.contains(&run.first))
            .map(|(offset, fault, _)| (offset, fault))?;
        Some(OpenError::Volume(Error::Corrupt { file: self.label.clone(), offset, fault }))
    }
}

impl GroupStates {
    /// The states, as few runs as there are.
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        let mut at = self.clusters.start;
        std::iter::from_fn(move || {
            let first = at;
            let mut state = None;
            while at < self.clusters.end {
                let (here, count) = self.run_at(at);
                if at == first {
                    state = here;
                } else if here != state {
                    break;
                }
                at = (at + count).min(self.clusters.end);
            }
            (at > first).then_some(Run { first, count: at - first, state })
        })
    }

    /// The state of a cluster, and how many from there on certainly have the same.
    fn run_at(&self, cluster: u64) -> (Option<State>, u64) {
        let within = cluster - self.clusters.start;
        let (sector, index) = (within / CLUSTERS_PER_MAP_SECTOR, within % CLUSTERS_PER_MAP_SECTOR);
        match &self.sectors[sector as usize] {
            Ok(words) => {
                let (state, count) = map::run_in(words, index as usize);
                (Some(state), count)
            }
            Err(_) => (None, CLUSTERS_PER_MAP_SECTOR - index),
        }
    }

    /// The sectors of the map that are corrupt: offset in the file, what is wrong, and whose states they held.
    pub fn faults(&self, layout: &Layout) -> impl Iterator<Item = (u64, MapFault, Range<u64>)> {
        let offset = layout.map_block(self.clusters.start / CLUSTERS_PER_GROUP);
        self.sectors.iter().enumerate().filter_map(move |(index, sector)| {
            let fault = sector.err()?;
            let first = self.clusters.start + index as u64 * CLUSTERS_PER_MAP_SECTOR;
            let end = (first + CLUSTERS_PER_MAP_SECTOR).min(self.clusters.end);
            Some((offset + index as u64 * DISK_SECTOR_BYTES, fault, first.min(end)..end))
        })
    }
}

fn group_of(mark: &Mark) -> u64 {
    mark.first / CLUSTERS_PER_GROUP
}

/// The marks in the order of groups, none of them in two.
fn by_group(marks: Vec<Mark>) -> Vec<Mark> {
    let mut split = Vec::with_capacity(marks.len());
    for mark in marks {
        let boundary = (group_of(&mark) + 1) * CLUSTERS_PER_GROUP;
        let here = mark.count.min(boundary - mark.first);
        split.push(Mark { count: here, ..mark });
        // The log holds no mark that is longer than a group.
        split.push(Mark { first: boundary, count: mark.count - here, ..mark });
    }
    split.retain(|mark| mark.count > 0);
    // Stable, so that of two marks for one cluster the later one stays the later one.
    split.sort_by_key(group_of);
    split
}

const _: () = assert!(marks::CLUSTERS_MAX <= CLUSTERS_PER_GROUP, "a mark lies in at most two groups");

/// A file that is only read.
struct Looked<'f>(&'f File);

impl Storage for Looked<'_> {
    fn read_at(&self, into: Writable<'_>, offset: u64) -> io::Result<()> {
        file::read_at(self.0, into, offset)
    }

    fn write_at(&self, _: &[Readable<'_>], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn punch_hole(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn sync(&self) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}
