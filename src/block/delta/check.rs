//! [`check`]: validates every structure of a delta file and names each fault. Changes nothing.
//!
//! A *fault* is something that no death of a process and no power loss leaves behind: bytes have changed or gone. A *note* is
//! something that they do leave, or that is waste and no more.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use crate::units::ByteCount;

use super::header::{HEADER_AT, HeaderFault, SESSION_AT};
use super::layout::{Layout, MAP_BLOCK_BYTES};
use super::map::{MapFault, State};
use super::open::{Holder, OpenError};
use super::survey::{Condition, GroupStates, Survey};

/// Faults of the map that a report holds; more are only counted. A file of any size thus takes bounded memory.
pub const MAP_FINDINGS_MAX: usize = 1000;

/// What a check has found.
#[derive(Debug, Default)]
pub struct Report {
    /// In the order of the check; of corrupt sectors of the map, the first [`MAP_FINDINGS_MAX`].
    pub findings: Vec<Finding>,
    /// How many faults there are.
    pub faults: u64,
    /// How many notes there are.
    pub notes: u64,
    /// Who has the file open. Space held for nothing cannot be told then, and is not looked for;
    /// neither is it when the session is corrupt.
    pub in_use: Option<Holder>,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The file is damaged.
    Fault,
    /// Harmless.
    Note,
}

/// One thing that is not as in a file that was closed in good order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The header is corrupt; nothing else can be checked.
    Header { fault: HeaderFault },
    /// The session sector is corrupt.
    Session { fault: HeaderFault },
    /// The last session's process died; the mark log has this many marks that count.
    ProcessDied { marks: u64 },
    /// The host went down during the last session.
    HostWentDown,
    /// A sector of the cluster map, at `offset` of the file, is corrupt.
    Map {
        offset: u64,
        fault: MapFault,
        /// Bytes of the volume of which nobody knows where they are.
        lost: Range<u64>,
        /// Bytes of the volume that are refused because of it.
        refused: Range<u64>,
    },
    /// Clusters are marked as in the delta and lie past the end of the file, the first at `offset`.
    PastEnd { offset: u64, clusters: u64, lost: Range<u64> },
    /// The file is shorter than it was made. When parts of the cluster map were cut off too, nobody knows what else was.
    TooShort {
        found: u64,
        expected: u64,
        /// Bytes of the volume whose map was cut off, if any.
        lost: Option<Range<u64>>,
    },
    /// The file is longer than it was made.
    TooLong { found: u64, expected: u64 },
    /// The file holds space for clusters that are not in the delta, the first at `offset`.
    Leak { offset: u64, bytes: u64, ranges: u64 },
}

impl Finding {
    /// How bad it is.
    pub fn severity(&self) -> Severity {
        match self {
            Finding::Header { .. }
            | Finding::Session { .. }
            | Finding::Map { .. }
            | Finding::PastEnd { .. }
            | Finding::TooShort { .. } => Severity::Fault,
            Finding::ProcessDied { .. } | Finding::HostWentDown | Finding::TooLong { .. } | Finding::Leak { .. } => {
                Severity::Note
            }
        }
    }

    /// A word for programs.
    pub fn kind(&self) -> &'static str {
        match self {
            Finding::Header { .. } => "header",
            Finding::Session { .. } => "session",
            Finding::ProcessDied { .. } => "process-died",
            Finding::HostWentDown => "host-went-down",
            Finding::Map { .. } => "map",
            Finding::PastEnd { .. } => "past-end",
            Finding::TooShort { .. } => "too-short",
            Finding::TooLong { .. } => "too-long",
            Finding::Leak { .. } => "leak",
        }
    }

    /// Where in the file, in bytes.
    pub fn offset(&self) -> u64 {
        match self {
            Finding::Header { .. } => HEADER_AT,
            Finding::Session { .. } | Finding::ProcessDied { .. } | Finding::HostWentDown => SESSION_AT,
            Finding::Map { offset, .. } | Finding::PastEnd { offset, .. } | Finding::Leak { offset, .. } => *offset,
            Finding::TooShort { found, .. } => *found,
            Finding::TooLong { expected, .. } => *expected,
        }
    }

    /// The bytes of the volume whose contents are in doubt, when that can be said.
    pub fn lost(&self) -> Option<Range<u64>> {
        match self {
            Finding::Map { lost, .. } | Finding::PastEnd { lost, .. } => Some(lost.clone()),
            Finding::TooShort { lost, .. } => lost.clone(),
            _ => None,
        }
    }

    /// What to do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Finding::Header { .. } => {
                "what the delta is cannot be known without its header, so nothing is repaired: bring the file back from a backup"
            }
            Finding::Session { .. } => {
                "whether the last session was closed, and so whether its mark log counts, cannot be known, so it is not \
                 repaired: bring the file back from a backup, or save what 'pando delta map' lists, which is the state at the last flush"
            }
            Finding::ProcessDied { .. } | Finding::HostWentDown => {
                "nothing is lost: the next backend finishes it, and so does --repair"
            }
            Finding::Map { .. } => {
                "it is not repaired, for that would be a guess: bring the file back from a backup, or save what the rest of the volume holds"
            }
            Finding::PastEnd { .. } => "their contents are gone: bring the file back from a backup",
            Finding::TooShort { lost: None, .. } => "--repair makes it as long as it has to be, if nothing was cut off",
            Finding::TooShort { lost: Some(_), .. } => {
                "it is not repaired, for that would hide what was cut off: bring the file back from a backup; or, when it is \
                 certain that there was only a hole, make it as long as it has to be with 'truncate'"
            }
            Finding::TooLong { .. } => "nothing that a volume reads lies there; --repair cuts it off",
            Finding::Leak { .. } => {
                "harmless: a power loss leaves it, and so does a guest that asks for zeros and to keep the space; --repair gives it back"
            }
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::Header { fault } => write!(f, "the header cannot be used: {fault}"),
            Finding::Session { fault } => write!(f, "the session cannot be used: {fault}"),
            Finding::ProcessDied { marks } => {
                write!(f, "the last session's process died without closing it; marks of its log that count: {marks}")
            }
            Finding::HostWentDown => f.write_str(
                "the host went down during the last session; the contents are those of its last flush or later",
            ),
            Finding::Map { fault, lost, refused, .. } => write!(
                f,
                "a sector of the cluster map is corrupt: {fault}; where bytes {} to {} of the volume are is not known, and \
                 requests for bytes {} to {} are refused",
                lost.start, lost.end, refused.start, refused.end
            ),
            Finding::PastEnd { clusters, lost, .. } => write!(
                f,
                "{clusters} clusters in the delta lie past the end of the file; they are of bytes {} to {} of the volume",
                lost.start, lost.end
            ),
            Finding::TooShort { found, expected, lost } => {
                write!(f, "the file is {found} bytes long, expected {expected}")?;
                let Some(lost) = lost else { return Ok(()) };
                write!(
                    f,
                    "; the cluster map of bytes {} to {} of the volume was cut off, and with it whatever of them was in the delta",
                    lost.start, lost.end
                )
            }
            Finding::TooLong { found, expected } => {
                write!(f, "the file is {found} bytes long, expected {expected}: the rest belongs to nothing")
            }
            Finding::Leak { bytes, ranges, .. } => write!(
                f,
                "{} ({bytes} bytes in {ranges} {}) are held for clusters that are not in the delta",
                ByteCount(*bytes),
                if *ranges == 1 { "range" } else { "ranges" }
            ),
        }
    }
}

impl Report {
    fn add(&mut self, finding: Finding) {
        match finding.severity() {
            Severity::Fault => self.faults += 1,
            Severity::Note => self.notes += 1,
        }
        if !matches!(finding, Finding::Map { .. }) || self.findings.len() < MAP_FINDINGS_MAX {
            self.findings.push(finding);
        }
    }
}

/// Checks the delta file at `path`. An error when the file is no delta, or one of a later version, or cannot be read.
pub fn check(path: &Path) -> Result<Report, OpenError> {
    match Survey::of(path) {
        Ok(survey) => check_survey(&survey),
        Err(OpenError::Header {
            fault: fault @ (HeaderFault::Checksum { .. } | HeaderFault::Field { .. }), ..
        }) => {
            let mut report = Report::default();
            report.add(Finding::Header { fault });
            Ok(report)
        }
        Err(error) => Err(error),
    }
}

/// Checks a delta file that is looked at.
pub fn check_survey(survey: &Survey) -> Result<Report, OpenError> {
    let layout = survey.header().layout;
    let mut report = Report::default();
    match survey.condition() {
        Condition::Closed => {}
        Condition::InUse(holder) => report.in_use = Some(*holder),
        Condition::Died => report.add(Finding::ProcessDied { marks: survey.marks() }),
        Condition::HostWentDown => report.add(Finding::HostWentDown),
        Condition::Unknown(fault) => report.add(Finding::Session { fault: fault.clone() }),
    }
    // Not while it is in use, nor as long as the log may speak of it.
    let space_can_be_told = !matches!(survey.condition(), Condition::InUse(_) | Condition::Unknown(_));
    let (found, expected) = (survey.file_and_disk_bytes()?.0, layout.file_bytes());
    if found < expected {
        report.add(Finding::TooShort { found, expected, lost: bytes_without_map(&layout, found) });
    }
    let mut past_end: Option<(u64, u64, Range<u64>)> = None;
    let mut leaks = Leaks::new(survey);
    let mut leak: Option<(u64, u64, u64)> = None;
    for group in survey.groups() {
        let group = group?;
        for (offset, fault, clusters) in group.faults(&layout) {
            report.add(Finding::Map {
                offset,
                fault,
                lost: volume_bytes(&layout, &clusters),
                refused: volume_bytes(&layout, &group.clusters),
            });
        }
        if let Some((count, clusters)) = held_past(&group, &layout, found) {
            let bytes = volume_bytes(&layout, &clusters);
            let (_, clusters, lost) = past_end.get_or_insert_with(|| (layout.data(clusters.start), 0, bytes.clone()));
            *clusters += count;
            lost.end = bytes.end;
        }
        if space_can_be_told {
            leaks.of(&group, |range| {
                let (_, bytes, ranges) = leak.get_or_insert((range.start, 0, 0));
                *bytes += range.end - range.start;
                *ranges += 1;
                Ok(())
            })?;
        }
    }
    if let Some((offset, clusters, lost)) = past_end {
        report.add(Finding::PastEnd { offset, clusters, lost });
    }
    if found > expected {
        report.add(Finding::TooLong { found, expected });
    }
    if let Some((offset, bytes, ranges)) = leak {
        report.add(Finding::Leak { offset, bytes, ranges });
    }
    Ok(report)
}

/// The clusters of a group that are in the delta and of which something lies past the end of the file: how many, and from the first to the last.
fn held_past(group: &GroupStates, layout: &Layout, file_bytes: u64) -> Option<(u64, Range<u64>)> {
    let cluster_bytes = layout.cluster().bytes();
    if layout.data(group.clusters.end - 1) + cluster_bytes <= file_bytes {
        return None;
    }
    let mut held: Option<(u64, Range<u64>)> = None;
    for run in group.runs().filter(|run| matches!(run.state, Some(State::Delta | State::Fresh))) {
        let whole = (file_bytes.saturating_sub(layout.data(run.first)) / cluster_bytes).min(run.count);
        let (first, end) = (run.first + whole, run.first + run.count);
        if first < end {
            let (count, clusters) = held.get_or_insert((0, first..end));
            *count += end - first;
            clusters.end = end;
        }
    }
    held
}

/// The bytes of the volume whose cluster map lies, in whole or in part, past the end of the file.
fn bytes_without_map(layout: &Layout, file_bytes: u64) -> Option<Range<u64>> {
    let group = layout.group_at(file_bytes);
    let has_map = file_bytes >= layout.map_block(group) + MAP_BLOCK_BYTES;
    let first = if has_map { group + 1 } else { group };
    (first < layout.group_count())
        .then(|| volume_bytes(layout, &(layout.clusters_of(first).start..layout.cluster_count())))
}

/// The bytes of the volume that some clusters stand for.
fn volume_bytes(layout: &Layout, clusters: &Range<u64>) -> Range<u64> {
    let end = |cluster| layout.cluster().start_of(cluster).min(layout.virtual_bytes());
    end(clusters.start)..end(clusters.end)
}

/// Finds the space that the file holds for clusters that are not in the delta.
pub(super) struct Leaks<'s> {
    survey: &'s Survey,
    /// The range of data that was found last, so that many runs of clusters in one hole cost one question to the file system.
    data: Range<u64>,
    /// From here up to `data` there is a hole.
    hole_from: u64,
}

impl<'s> Leaks<'s> {
    pub(super) fn new(survey: &'s Survey) -> Leaks<'s> {
        Leaks { survey, data: 0..0, hole_from: 0 }
    }

    /// Gives `each` the ranges of the file that hold space for clusters of `group` that are not in the delta. Groups come in order.
    pub(super) fn of(
        &mut self,
        group: &GroupStates,
        mut each: impl FnMut(Range<u64>) -> Result<(), OpenError>,
    ) -> Result<(), OpenError> {
        let layout = self.survey.header().layout;
        for run in group.runs().filter(|run| matches!(run.state, Some(State::Base | State::Zero))) {
            let mut at = layout.data(run.first);
            let end = at + run.count * layout.cluster().bytes();
            while at < end {
                let data = self.data_from(at)?;
                if data.start < end {
                    each(data.start.max(at)..data.end.min(end))?;
                }
                at = data.end;
            }
        }
        Ok(())
    }

    /// The first range of data that ends behind `offset`; an empty one at the end of all offsets when there is none.
    fn data_from(&mut self, offset: u64) -> Result<Range<u64>, OpenError> {
        if !(self.hole_from..self.data.end).contains(&offset) {
            self.data = self.survey.data_from(offset)?.unwrap_or(u64::MAX..u64::MAX);
            self.hole_from = offset;
        }
        Ok(self.data.clone())
    }
}
