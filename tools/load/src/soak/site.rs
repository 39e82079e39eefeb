//! [`Site`]: where a run has its files, and its daemon, who may be dead at the moment.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::host::api::{self, Answer};
use crate::soak::disk::Disk;
use crate::soak::room::Room;
use crate::soak::strikes::{Moment, Strikes};
use crate::soak::watch::Pulse;

/// How long it is asked again when nobody answers, or somebody who has an excuse.
const PATIENCE: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_millis(20);
/// What the daemon answers when there is no room for what it was to make.
const DISK_FULL: u16 = 507;

pub struct Site {
    pub directory: PathBuf,
    /// Where the daemon has its sockets.
    pub run: PathBuf,
    pub pando: PathBuf,
    /// What was done to the daemon.
    pub outages: Strikes,
    /// Where the deltas are, if that can be full.
    pub room: Option<Arc<Room>>,
    /// Whether what is written there can go past the page cache.
    pub has_direct: bool,
}

/// An answer to something that may have been asked before, without an answer.
pub struct Insisted {
    pub answer: Answer,
    pub was_repeated: bool,
}

impl Site {
    /// Now, among the times when the deltas' disk was full.
    pub fn fills(&self) -> Moment {
        self.room.as_ref().map(|room| room.fills.now()).unwrap_or_default()
    }

    /// Whether that disk has been full since then.
    pub fn was_full_since(&self, moment: Moment) -> bool {
        self.room.as_ref().is_some_and(|room| room.fills.since(moment))
    }

    /// Asks once.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Answer> {
        api::ask(&self.run.join("api.sock"), method, path, body)
    }

    /// Asks once, of a daemon that may be dead.
    pub fn try_ask(&self, method: &str, path: &str, body: Option<&Value>) -> Option<Answer> {
        self.ask(method, path, body).ok()
    }

    /// Asks until there is an answer. A failure of the daemon's is asked about again while there is an excuse for it.
    pub fn insist(
        &self,
        pulse: &Pulse,
        (method, path): (&str, &str),
        body: Option<&Value>,
        has_excuse: impl Fn() -> bool,
    ) -> Result<Insisted> {
        pulse.waits_for(format!("{method} {path}"));
        let ends = Instant::now() + PATIENCE;
        let mut was_repeated = false;
        loop {
            let (before, fills) = (self.outages.now(), self.fills());
            let answer = self.ask(method, path, body);
            let is_full = matches!(&answer, Ok(answer) if answer.status == DISK_FULL) && self.was_full_since(fills);
            let is_excused = self.outages.since(before) || is_full || has_excuse();
            match answer {
                Ok(answer) if answer.status < 500 => return Ok(Insisted { answer, was_repeated }),
                _ if is_excused && Instant::now() < ends => {}
                Ok(answer) => bail!("{method} {path}: {}, {}", answer.status, answer.reason()),
                Err(error) => return Err(error.context("the daemon does not answer, though nobody had killed it")),
            }
            was_repeated = true;
            thread::sleep(RETRY_INTERVAL);
        }
    }

    /// As [`Site::insist`], of what has to succeed: its answer.
    pub fn demand(
        &self,
        pulse: &Pulse,
        (method, path): (&str, &str),
        body: Option<&Value>,
        has_excuse: impl Fn() -> bool,
    ) -> Result<Value> {
        let Insisted { answer, .. } = self.insist(pulse, (method, path), body, has_excuse)?;
        ensure!(answer.is_success(), "{method} {path}: {}, {}", answer.status, answer.reason());
        Ok(answer.body)
    }

    /// Attaches a disk to its machine: where it is served.
    pub fn attach(&self, pulse: &Pulse, disk: &Disk, has_excuse: impl Fn() -> bool) -> Result<PathBuf> {
        let cache = if disk.direct && self.has_direct { "direct" } else { "writeback" };
        let request = json!({ "volume": disk.volume, "vm": disk.vm(), "delta_cache": cache });
        let Insisted { answer, was_repeated } =
            self.insist(pulse, ("POST", "/v1/attachments"), Some(&request), &has_excuse)?;
        let attachment = if answer.is_success() {
            answer.body
        } else if was_repeated {
            // It was done, and nobody lived to say so.
            self.demand(pulse, ("GET", &disk.attachment()), None, has_excuse)?
        } else {
            bail!("POST /v1/attachments of {}: {}, {}", disk.volume, answer.status, answer.reason());
        };
        Ok(attachment["socket"].as_str().context("an attachment has a socket")?.into())
    }

    /// Removes something, or detaches it.
    pub fn remove(&self, pulse: &Pulse, path: &str, has_excuse: impl Fn() -> bool) -> Result<()> {
        let Insisted { answer, was_repeated } = self.insist(pulse, ("DELETE", path), None, has_excuse)?;
        let was_done = was_repeated && answer.status == 404;
        ensure!(answer.is_success() || was_done, "DELETE {path}: {}, {}", answer.status, answer.reason());
        Ok(())
    }

    /// Sees that the delta of a disk that is detached is in good order. A leak of space is, after a death.
    pub fn check_delta(&self, disk: &Disk) -> Result<()> {
        let directory = self.directory.join("state/volumes");
        let prefix = format!("{}.", disk.volume);
        let is_its = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(&prefix);
        let entries = std::fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
        let files: Vec<PathBuf> = entries.flatten().filter(|it| is_its(&it.file_name())).map(|it| it.path()).collect();
        let [file] = files.as_slice() else { bail!("{}: expected one delta, found {files:?}", disk.volume) };
        let output = Command::new(&self.pando)
            .args(["delta", "check", "--json"])
            .arg(file)
            .output()
            .with_context(|| self.pando.display().to_string())?;
        let report: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("pando delta check: {}", String::from_utf8_lossy(&output.stderr)))?;
        let findings = report["findings"].as_array().context("findings")?;
        let bad: Vec<_> = findings.iter().filter(|finding| finding["kind"] != "leak").collect();
        ensure!(bad.is_empty() && report["faults"] == 0, "{}: pando delta check says {report}", file.display());
        Ok(())
    }
}
