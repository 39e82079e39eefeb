//! `pando delta check`.

use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;

use crate::block::delta::check::{Finding, Report, Severity, check};
use crate::block::delta::repair::{Repair, repair};
use crate::cli::Outcome;
use crate::cli::output::{counted, print, print_json};

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pando delta check vm1.delta
  pando delta check vm1.delta --repair

Exit codes:
  0  nothing to tell
  1  not checked; standard error says why
  2  faults: the file is damaged
  3  no faults, but space held for nothing, or a session that was not closed: both harmless
With --repair they are about what is left afterwards.

--repair finishes a session that was not closed, gives back space held for nothing and brings the file to its length. What
only a guess could fix (a damaged header, session or map) it leaves as it is. It is refused while the delta is in use.")]
pub struct Check {
    /// The delta
    file: PathBuf,
    /// Fix what takes no guess
    #[arg(long)]
    repair: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Check {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let (repairs, report) = if self.repair { repair(&self.file)? } else { (Vec::new(), check(&self.file)?) };
        let file = self.file.display().to_string();
        if self.json {
            print_json(&ReportJson::of(file, &repairs, &report))?;
        } else {
            print(|out| Ok(write(out, &file, &repairs, &report)?))?;
        }
        Ok(match report {
            Report { faults: 1.., .. } => Outcome::Faults,
            Report { notes: 1.., .. } => Outcome::NotesOnly,
            _ => Outcome::Done,
        })
    }
}

fn severity(finding: &Finding) -> &'static str {
    match finding.severity() {
        Severity::Fault => "fault",
        Severity::Note => "note",
    }
}

fn write(out: &mut dyn Write, file: &str, repairs: &[Repair], report: &Report) -> std::io::Result<()> {
    for repair in repairs {
        writeln!(out, "{file}: repaired: {repair}")?;
    }
    for finding in &report.findings {
        writeln!(out, "{file}: {} at offset {}: {finding}", severity(finding), finding.offset())?;
        writeln!(out, "    {}", finding.advice())?;
    }
    if let Some(holder) = &report.in_use {
        writeln!(out, "{file}: in use by {holder}; space held for nothing cannot be told meanwhile")?;
    }
    let told = report.findings.len() as u64;
    let found = report.faults + report.notes;
    if told < found {
        writeln!(out, "{file}: {} more faults of the cluster map", found - told)?;
    }
    if found == 0 {
        writeln!(out, "{file}: no faults")
    } else {
        writeln!(out, "{file}: {}, {}", counted(report.faults, "fault"), counted(report.notes, "note"))
    }
}

#[derive(Serialize)]
struct ReportJson {
    file: String,
    faults: u64,
    notes: u64,
    findings: Vec<FindingJson>,
    repairs: Vec<String>,
    in_use_by: Option<String>,
}

#[derive(Serialize)]
struct FindingJson {
    severity: &'static str,
    kind: &'static str,
    /// In the file, bytes.
    offset: u64,
    /// Bytes of the volume whose contents are in doubt.
    lost: Option<RangeJson>,
    message: String,
    advice: &'static str,
}

#[derive(Serialize)]
struct RangeJson {
    start: u64,
    length: u64,
}

impl ReportJson {
    fn of(file: String, repairs: &[Repair], report: &Report) -> ReportJson {
        let finding = |finding: &Finding| FindingJson {
            severity: severity(finding),
            kind: finding.kind(),
            offset: finding.offset(),
            lost: finding.lost().map(|range| RangeJson { start: range.start, length: range.end - range.start }),
            message: finding.to_string(),
            advice: finding.advice(),
        };
        ReportJson {
            file,
            faults: report.faults,
            notes: report.notes,
            findings: report.findings.iter().map(finding).collect(),
            repairs: repairs.iter().map(Repair::to_string).collect(),
            in_use_by: report.in_use.map(|holder| holder.to_string()),
        }
    }
}
