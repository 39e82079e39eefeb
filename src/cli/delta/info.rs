//! `pando delta info`.

use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;

use crate::block::delta::survey::{Census, Condition, Survey};
use crate::cli::output::{counted, print, print_json};
use crate::units::ByteCount;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pando delta info vm1.delta
  pando delta info vm1.delta --json

A file in use can be looked at: the numbers are then a snapshot, with what the running session has not flushed yet.")]
pub struct Info {
    /// The delta
    file: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Info {
    pub fn run(self) -> anyhow::Result<()> {
        let survey = Survey::of(&self.file)?;
        let facts = Facts::of(&survey)?;
        if self.json { print_json(&facts) } else { print(|out| Ok(facts.write(out)?)) }
    }
}

/// What there is to tell, named as in JSON.
#[derive(Serialize)]
struct Facts {
    file: String,
    uuid: String,
    virtual_bytes: u64,
    cluster_bytes: u64,
    /// `null`: a blank volume.
    base: Option<BaseFacts>,
    clusters: ClusterFacts,
    file_bytes: u64,
    disk_bytes: u64,
    session: SessionFacts,
}

#[derive(Serialize)]
struct BaseFacts {
    digest: String,
    bytes: u64,
}

#[derive(Serialize)]
struct ClusterFacts {
    delta: u64,
    zero: u64,
    base: u64,
    unknown: u64,
}

#[derive(Serialize)]
struct SessionFacts {
    state: &'static str,
    /// Marks of the log that count on top of the map.
    marks: u64,
    /// Whether the numbers are a snapshot of a file in use.
    snapshot: bool,
    holder: Option<HolderFacts>,
    #[serde(skip)]
    text: String,
}

#[derive(Serialize)]
struct HolderFacts {
    process: Option<u32>,
    description: String,
}

impl Facts {
    fn of(survey: &Survey) -> anyhow::Result<Facts> {
        let header = survey.header();
        let Census { delta, zero, base, unknown } = survey.census()?;
        let (file_bytes, disk_bytes) = survey.file_and_disk_bytes()?;
        Ok(Facts {
            file: survey.label().to_owned(),
            uuid: uuid::Uuid::from_bytes(header.uuid).to_string(),
            virtual_bytes: header.layout.virtual_bytes(),
            cluster_bytes: header.layout.cluster().bytes(),
            base: header.base.map(|base| BaseFacts { digest: base.digest.to_string(), bytes: base.bytes }),
            clusters: ClusterFacts { delta, zero, base, unknown },
            file_bytes,
            disk_bytes,
            session: SessionFacts::of(survey),
        })
    }

    fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let size = |bytes| format!("{} ({bytes} bytes)", ByteCount(bytes));
        let clusters = |count: u64| {
            format!("{}, {}", counted(count, "cluster"), ByteCount(count.saturating_mul(self.cluster_bytes)))
        };
        writeln!(out, "file           {}", self.file)?;
        writeln!(out, "uuid           {}", self.uuid)?;
        writeln!(out, "volume         {}", size(self.virtual_bytes))?;
        match &self.base {
            Some(base) => writeln!(out, "base           {}, digest {}", size(base.bytes), base.digest)?,
            None => writeln!(out, "base           none: a blank volume")?,
        }
        writeln!(out, "cluster size   {}", size(self.cluster_bytes))?;
        writeln!(out, "in the delta   {}", clusters(self.clusters.delta))?;
        writeln!(out, "zero           {}", clusters(self.clusters.zero))?;
        let below = if self.base.is_some() { "the base's, and zeros behind its end" } else { "zeros" };
        writeln!(out, "untouched      {}: {below}", clusters(self.clusters.base))?;
        if self.clusters.unknown > 0 {
            let unknown = clusters(self.clusters.unknown);
            writeln!(out, "unknown        {unknown}: the cluster map is corrupt; see 'pando delta check'")?;
        }
        writeln!(out, "disk usage     {}", size(self.disk_bytes))?;
        writeln!(out, "session        {}", self.session.text)
    }
}

impl SessionFacts {
    fn of(survey: &Survey) -> SessionFacts {
        let marks = survey.marks();
        let (state, text) = match survey.condition() {
            Condition::Closed => ("closed", "closed in good order".to_owned()),
            Condition::InUse(holder) => (
                "in-use",
                format!("in use by {holder}; the numbers are a snapshot, with {} of its log", counted(marks, "mark")),
            ),
            Condition::Died => (
                "process-died",
                format!(
                    "not closed: its process died; {} of its log counted here will be taken over at the next start",
                    counted(marks, "mark")
                ),
            ),
            Condition::HostWentDown => (
                "host-went-down",
                "not closed: the host went down; the next start goes on from the last flush".to_owned(),
            ),
            Condition::Unknown(fault) => (
                "unknown",
                format!("unknown, and the numbers are those of the last flush: {fault}; see 'pando delta check'"),
            ),
        };
        let holder = match survey.condition() {
            Condition::InUse(holder) => {
                Some(HolderFacts { process: holder.process(), description: holder.to_string() })
            }
            _ => None,
        };
        SessionFacts { state, marks, snapshot: holder.is_some(), holder, text }
    }
}
