//! What a guest notices of what it is to survive: killed workers, upgrades, the account of what is in flight, a hostile neighbour.
//!
//! Every client compares all that it reads with what it wrote, and a wrong byte or a failed request ends the run. Owns the order of events:
//! [`pauses`], [`account`] and [`neighbour`] measure, [`report`] prints what was found.

mod account;
mod neighbour;
pub mod noise;
mod pauses;
mod report;

use std::fs::File;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::arguments::{Part, SurviveOptions};
use crate::suite::contestants::Programs;
use crate::suite::record::{Machine, RowRecord};
use crate::suite::site::Site;
use crate::suite::{machine, progress};

/// What was found, as far as it was asked for.
#[derive(Debug, Serialize)]
struct Record {
    machine: Machine,
    pauses: Vec<pauses::Pauses>,
    /// With and without the account.
    account: Vec<RowRecord>,
    neighbour: Option<neighbour::Figures>,
}

pub fn run(options: &SurviveOptions) -> Result<()> {
    let beside = |name| options.pando.with_file_name(name);
    let programs = Programs {
        pando_blk: beside("pando-blk"),
        // Nobody else takes part.
        qemu_storage_daemon: "qemu-storage-daemon".into(),
        qemu_img: "qemu-img".into(),
        load: std::env::current_exe()?,
    };
    progress("making an image");
    let site = Site::new(&options.work_dir, programs)?;
    let wanted = |part| options.only.is_empty() || options.only.contains(&part);
    let mut record = Record { machine: machine::describe()?, pauses: Vec::new(), account: Vec::new(), neighbour: None };
    if wanted(Part::Pauses) {
        record.pauses = pauses::measure(options, &site)?;
    }
    if wanted(Part::Account) {
        record.account = account::measure(options, &site)?;
    }
    if wanted(Part::Neighbour) {
        record.neighbour = Some(neighbour::measure(options, &site)?);
    }
    progress("");
    if let Some(path) = &options.json {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        serde_json::to_writer_pretty(file, &record)?;
    }
    print!("{}", report::report(options, &record));
    Ok(())
}
