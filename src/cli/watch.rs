//! `pando status`, `job`, `events` and `audit`: what goes on, and what has.

use std::io::Write;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use serde_json::Value;

use crate::daemon::api::types::{AuditRecord, Event, Job as JobAnswer, JobState, Status as StatusAnswer};

use super::Outcome;
use super::asking::Asking;
use super::client::query;
use super::output::print;
use super::progress::follow;
use super::table::{ago, fields, size, table};

/// Show how the daemon and its host are
#[derive(clap::Args)]
pub struct Status {
    #[command(flatten)]
    asking: Asking,
}

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Job {
    #[command(flatten)]
    asking: Asking,
    #[command(subcommand)]
    verb: JobVerb,
}

#[derive(clap::Subcommand)]
enum JobVerb {
    /// List long operations, the newest first
    List,
    /// Wait for a job's end, and print what came of it
    Wait {
        /// The job
        id: i64,
    },
    /// Stop a job; nothing is left of it
    Cancel {
        /// The job
        id: i64,
    },
}

/// List what has happened
#[derive(clap::Args)]
pub struct Events {
    #[command(flatten)]
    asking: Asking,
    /// Go on, with what happens from now on (or from --after on)
    #[arg(long, short)]
    follow: bool,
    /// Only what came behind the event with this number
    #[arg(long)]
    after: Option<i64>,
    /// The newest so many
    #[arg(long, conflicts_with = "follow")]
    limit: Option<u32>,
}

/// List who asked for what, and what was decided
#[derive(clap::Args)]
pub struct Audit {
    #[command(flatten)]
    asking: Asking,
    /// Only what came behind the record with this number
    #[arg(long)]
    after: Option<i64>,
    /// So many records at most
    #[arg(long)]
    limit: Option<u32>,
}

impl Status {
    pub fn run(self) -> anyhow::Result<Outcome> {
        self.asking.show(self.asking.client()?.get("/v1/status")?, |status: StatusAnswer| {
            fields([
                ("version", status.version),
                (
                    "running",
                    format!("since {}, process {}, start {}", ago(status.started_at), status.process, status.starts),
                ),
                ("memory", size(status.memory_bytes)),
                ("images", status.images.to_string()),
                ("volumes", format!("{}, {} of them behind", status.volumes, status.volumes_behind)),
                ("attachments", status.attachments.to_string()),
                ("jobs", status.jobs_running.to_string()),
            ])
        })?;
        Ok(Outcome::Done)
    }
}

impl Job {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let client = self.asking.client()?;
        match self.verb {
            JobVerb::List => self.asking.show(client.get("/v1/jobs")?, jobs_text)?,
            JobVerb::Wait { id } => {
                let job = client.get(&format!("/v1/jobs/{id}"))?;
                let result = follow(&client, job, "job")?;
                print(|out| Ok(writeln!(out, "{result}")?))?;
            }
            JobVerb::Cancel { id } => _ = client.delete(&format!("/v1/jobs/{id}"))?,
        }
        Ok(Outcome::Done)
    }
}

fn jobs_text(jobs: Vec<JobAnswer>) -> String {
    let row = |job: JobAnswer| {
        let state = match job.state {
            JobState::Running if job.total_bytes > 0 => format!(
                "{} of {}, {} s left",
                size(job.done_bytes),
                size(job.total_bytes),
                job.eta_seconds.map_or("?".to_owned(), |seconds| seconds.to_string())
            ),
            JobState::Running => "running".to_owned(),
            JobState::Done => "done".to_owned(),
            JobState::Cancelled => "cancelled".to_owned(),
            JobState::Failed => format!("failed: {}", job.error.as_deref().unwrap_or("no reason is known")),
        };
        [job.id.to_string(), job.kind, job.object, state, ago(job.started_at), job.started_by]
    };
    table(["ID", "KIND", "OF", "STATE", "STARTED", "BY"], jobs.into_iter().map(row), "there were no jobs")
}

/// A time as logs have it: in UTC, so that lines of several hosts can be put side by side.
fn utc(at: i64) -> String {
    let since_1970 = Duration::from_secs(u64::try_from(at).unwrap_or(0));
    humantime::format_rfc3339_seconds(UNIX_EPOCH + since_1970).to_string()
}

fn event_line(event: &Event) -> String {
    format!("{:>6}  {}  {:22} {}  {}", event.id, utc(event.at), event.kind, event.object, event.detail)
        .trim_end()
        .to_owned()
}

impl Events {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let client = self.asking.client()?;
        let after = self.after.map(|after| after.to_string());
        if !self.follow {
            let limit = self.limit.map(|limit| limit.to_string());
            let path = format!("/v1/events{}", query(&[("after", after), ("limit", limit)]));
            self.asking.show(client.get(&path)?, |events: Vec<Event>| {
                events.iter().map(|event| event_line(event) + "\n").collect()
            })?;
            return Ok(Outcome::Done);
        }
        let path = format!("/v1/events{}", query(&[("follow", Some("true".to_owned())), ("after", after)]));
        let mut waiting = Vec::new();
        client.download(&path, |bytes| {
            waiting.extend_from_slice(bytes);
            while let Some(end) = waiting.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = waiting.drain(..=end).collect();
                let event: Event = serde_json::from_slice(&line).context("an event cannot be read")?;
                let text = if self.asking.json {
                    serde_json::to_string(&event).context("cannot write JSON")?
                } else {
                    event_line(&event)
                };
                let mut out = std::io::stdout().lock();
                if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
                    // Nobody reads any more.
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        Ok(Outcome::Done)
    }
}

impl Audit {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let parts = [
            ("after", self.after.map(|after| after.to_string())),
            ("limit", self.limit.map(|limit| limit.to_string())),
        ];
        let answer: Value = self.asking.client()?.get(&format!("/v1/audit{}", query(&parts)))?;
        self.asking.show(answer, |records: Vec<AuditRecord>| {
            let row = |record: AuditRecord| {
                [
                    record.id.to_string(),
                    utc(record.at),
                    record.principal,
                    record.action,
                    record.object,
                    record.outcome,
                    record.detail,
                ]
            };
            let headings = ["ID", "WHEN", "WHO", "ACTION", "OBJECT", "OUTCOME", "DETAIL"];
            table(headings, records.into_iter().map(row), "nobody has asked for anything")
        })?;
        Ok(Outcome::Done)
    }
}
