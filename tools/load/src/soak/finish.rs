//! The end of a run: everybody comes to rest, all is read back and compared, and nothing is left.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::drive::Tally;
use crate::host::daemon::Daemon;
use crate::soak::clerk::{Clerk, NO_ROOM};
use crate::soak::disk::{IMAGES, Kind};
use crate::soak::front_end::FrontEnd;
use crate::soak::household;
use crate::soak::machine::Machine;
use crate::soak::site::Site;
use crate::soak::watch::Watch;

/// How long what was done may take to be told, and what has ended to be gone.
const PATIENCE: Duration = Duration::from_secs(20);

/// A machine as it should be known to the daemon.
struct Known {
    image: Option<String>,
    bytes: u64,
}

/// Has all front ends do something, at the same time, and waits for what comes of it, in their order.
fn all<T: Send + 'static>(
    machines: &[Arc<Machine>],
    watch: &Watch,
    task: impl Fn(&mut FrontEnd) -> Result<T> + Clone + Send + 'static,
) -> Result<Vec<T>> {
    let answers: Vec<_> = machines
        .iter()
        .map(|machine| {
            let (sender, answer) = channel();
            let task = task.clone();
            machine.insist(Box::new(move |front_end| {
                // Nobody waits any more only after a failure.
                let _ = sender.send(task(front_end)?);
                Ok(())
            }));
            answer
        })
        .collect();
    let answers = answers.into_iter().map(|answer| answer.recv().ok()).collect::<Option<Vec<T>>>();
    answers.with_context(|| watch.failure().unwrap_or_else(|| "a front end has ended".to_owned()))
}

/// All of it: what all guests did, and how much was read back.
pub fn finish(
    machines: &[Arc<Machine>],
    site: &Site,
    clerk: &Clerk,
    watch: &Watch,
    daemon: &mut Daemon,
) -> Result<(Tally, u64)> {
    settle(machines, site, clerk, watch)?;
    let read = read_back(machines, watch)?;
    leave(machines, site, clerk, daemon)?;
    Ok(read)
}

/// Brings everybody to rest, and compares what the daemon knows with what was done.
fn settle(machines: &[Arc<Machine>], site: &Site, clerk: &Clerk, watch: &Watch) -> Result<()> {
    let known = all(machines, watch, |front_end| {
        let machine = front_end.machine.clone();
        // Not before: what its front end was asked for ahead of this may wait for the guest to get on.
        machine.seat.end();
        let mut held = machine.seat.hold();
        front_end.drain(&mut held)?;
        if front_end.disk().kind == Kind::Ephemeral {
            // It is gone with the attachment.
            front_end.read_back(&mut held)?;
        }
        let bytes = front_end.disk().bytes_on(front_end.image, front_end.grown);
        Ok(Known { image: front_end.image.map(|image| image.version()), bytes })
    })?;
    clerk.finish(site, PATIENCE)?;
    let answer = site.try_ask("GET", "/v1/attachments", None).context("the daemon does not answer")?;
    let attachments = answer.body.as_array().context("attachments are a list")?;
    ensure!(attachments.len() == machines.len(), "{} attachments, expected {}", attachments.len(), machines.len());
    for (machine, known) in machines.iter().zip(known) {
        let name = &machine.disk.volume;
        let found = attachments.iter().find(|found| found["volume"] == name.as_str());
        check_attachment(found.with_context(|| format!("{name} is not attached"))?, &known)
            .with_context(|| name.clone())?;
    }
    Ok(())
}

fn check_attachment(found: &Value, known: &Known) -> Result<()> {
    let version = &found["image"]["versions"][0];
    // What could not be staged while there was no room is not tried again by itself.
    let is_untroubled = found["error"].as_str().is_none_or(|error| error.contains(NO_ROOM));
    let is_right = found["state"] == "running"
        && is_untroubled
        && found["connected"] == true
        && found["bytes"] == known.bytes
        && version.as_str() == known.image.as_deref();
    ensure!(
        is_right,
        "expected to be running without an error, connected, with {} bytes on image {:?}, found {found}",
        known.bytes,
        known.image
    );
    Ok(())
}

/// Reads every disk back through a fresh attach, and removes it: what all guests did, and how much was read.
fn read_back(machines: &[Arc<Machine>], watch: &Watch) -> Result<(Tally, u64)> {
    let read = all(machines, watch, |front_end| {
        let machine = front_end.machine.clone();
        let mut held = machine.seat.hold();
        let tally = held.tally().clone();
        front_end.switch_off(&mut held)?;
        front_end.switch_on(&mut held)?;
        front_end.read_back(&mut held)?;
        let bytes = held.verifier().bytes();
        front_end.switch_off(&mut held)?;
        let path = format!("/v1/volumes/{}", front_end.disk().volume);
        front_end.site.remove(&front_end.pulse, &path, || false)?;
        front_end.end();
        Ok((tally, bytes))
    })?;
    let mut tally = Tally::default();
    read.iter().for_each(|(of_one, _)| tally.add(of_one));
    Ok((tally, read.iter().map(|(_, bytes)| bytes).sum()))
}

/// Removes what is left on purpose, stops the daemon, and sees that nothing else was left.
fn leave(machines: &[Arc<Machine>], site: &Site, clerk: &Clerk, daemon: &mut Daemon) -> Result<()> {
    for channel in machines.iter().filter_map(|machine| machine.disk.channel()) {
        daemon.call("DELETE", &format!("/v1/channels/{}", channel.replace('/', "%2F")), None)?;
    }
    for image in IMAGES {
        daemon.call("DELETE", &format!("/v1/images/{}", image.version()), None)?;
    }
    for list in ["attachments", "volumes", "images", "vms"] {
        let left = daemon.call("GET", &format!("/v1/{list}"), None)?;
        ensure!(left.as_array().is_some_and(Vec::is_empty), "{list} are left: {left}");
    }
    clerk.finish_reading(site)?;
    daemon.stop()?;
    household::expect_none(PATIENCE)?;
    for directory in [site.run.clone(), site.directory.join("state/images"), site.directory.join("state/volumes")] {
        expect_no_files(&directory)?;
    }
    let said = daemon.said();
    if let Some(line) = said.lines().find(|line| line.contains("panicked")) {
        bail!("something panicked: {line}");
    }
    Ok(())
}

/// Sees that there are no files in a directory or below it, sockets among them, nor directories of VMs.
fn expect_no_files(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        let is_place = entry.file_type()?.is_dir() && ["vm", "control"].iter().any(|name| entry.file_name() == *name);
        ensure!(is_place, "{} is left", entry.path().display());
        expect_no_files(&entry.path())?;
    }
    Ok(())
}
