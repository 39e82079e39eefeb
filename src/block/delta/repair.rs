//! [`repair`]: brings a delta file into the state of one that was closed in good order, as far as that takes no guess.
//!
//! In this order, because each step relies on the ones ahead of it: the length, the session, the space. A repair that is
//! interrupted at any point leaves a file that the next one goes on with.

use std::fmt;
use std::path::Path;

use crate::block::Error;
use crate::block::storage::FileStorage;
use crate::sys::file;
use crate::units::{ByteCount, ClusterSize};

use super::check::{Finding, Leaks, Report, check_survey};
use super::header::HeaderFault;
use super::open::{self, OpenError};
use super::survey::{Condition, Survey};
use super::{Delta, Lifetime};

/// Something that was put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// The file has the length that it was made with again.
    Length { from: u64, to: u64 },
    /// The last session was finished; so many marks of its log went into the map.
    Session { marks: u64 },
    /// Space held for nothing was given back.
    Space { bytes: u64 },
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Repair::Length { from, to } => write!(f, "made the file {to} bytes long, from {from}"),
            Repair::Session { marks } => write!(f, "finished the last session; marks taken from its log: {marks}"),
            Repair::Space { bytes } => write!(f, "gave back {} ({bytes} bytes) held for nothing", ByteCount(*bytes)),
        }
    }
}

/// Repairs the delta file at `path`; refused while it is in use. What cannot be repaired stays as it is, and the report, made after the repair,
/// has it.
pub fn repair(path: &Path) -> Result<(Vec<Repair>, Report), OpenError> {
    let label = path.display().to_string();
    let (file, header) = match open::open_locked(path) {
        Err(OpenError::Header { fault: HeaderFault::Checksum { .. } | HeaderFault::Field { .. }, .. }) => {
            // Nothing can be known of such a file, and so nothing repaired.
            return Ok((Vec::new(), super::check::check(path)?));
        }
        opened => opened?,
    };
    let io = |action, offset| {
        let file = label.clone();
        move |source| OpenError::Io { action, file, offset, source }
    };
    let survey = || {
        let file = file.try_clone().map_err(io("open", 0))?;
        Survey::of_locked(file, header.clone(), label.clone())
    };
    let mut repairs = Vec::new();

    let found = survey()?;
    let report = check_survey(&found)?;
    let cut_off = report
        .findings
        .iter()
        .any(|finding| matches!(finding, Finding::PastEnd { .. } | Finding::TooShort { lost: Some(_), .. }));
    let (from, to) = (found.file_and_disk_bytes()?.0, header.layout.file_bytes());
    if from != to && !cut_off {
        file.set_len(to).and_then(|()| file.sync_all()).map_err(io("change the length of", to))?;
        repairs.push(Repair::Length { from, to });
    }

    if matches!(found.condition(), Condition::Died | Condition::HostWentDown) && finish_session(&file, &header, &label)?
    {
        repairs.push(Repair::Session { marks: found.marks() });
    }

    let found = survey()?;
    // Only with nothing in the log: what a mark in it speaks of is no leak.
    if *found.condition() == Condition::Closed {
        let mut bytes = 0;
        let mut leaks = Leaks::new(&found);
        for group in found.groups() {
            leaks.of(&group?, |range| {
                bytes += range.end - range.start;
                // A file that was cut off may end within a block, which goes only as a whole.
                let end = range.end.next_multiple_of(ClusterSize::BYTES_MIN);
                file::punch_hole(&file, range.start, end - range.start).map_err(io("give space back of", range.start))
            })?;
        }
        if bytes > 0 {
            file.sync_all().map_err(io("sync", 0))?;
            repairs.push(Repair::Space { bytes });
        }
    }
    Ok((repairs, check_survey(&survey()?)?))
}

/// Opens and closes the delta, as the next backend would. `false` when a corrupt map does not let it.
fn finish_session(file: &std::fs::File, header: &super::header::Header, label: &str) -> Result<bool, OpenError> {
    let io = |source| OpenError::Io { action: "open", file: label.to_owned(), offset: 0, source };
    let storage = file.try_clone().and_then(FileStorage::new).map_err(io)?;
    let delta = match Delta::start(storage, label.to_owned(), header.clone(), Lifetime::Persistent) {
        Err(OpenError::Volume(Error::Corrupt { .. })) => return Ok(false),
        started => started?,
    };
    delta.close()?;
    Ok(true)
}
