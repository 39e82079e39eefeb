//! [`Operator`]: has all backends upgraded, in a thread of its own, because that takes until the last of them has been.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::soak::clerk::Clerk;
use crate::soak::disturbance::ALL;
use crate::soak::journal::Journal;
use crate::soak::machine::Machine;
use crate::soak::site::Site;
use crate::soak::watch::{Pulse, Watch};

/// How soon it is tried again after the daemon has died over it.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
const UPGRADED: &str = "backend.upgraded";
const NOT_UPGRADED: &str = "backend.upgrade-failed";

pub struct Operator {
    /// Kinds of disturbance, each of which is an upgrade.
    orders: Sender<usize>,
    is_busy: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Operator {
    pub fn start(
        machines: &[Arc<Machine>],
        site: &Arc<Site>,
        clerk: &Arc<Clerk>,
        journal: &Arc<Journal>,
        watch: &Arc<Watch>,
    ) -> Result<Self> {
        let (orders, taken) = channel::<usize>();
        let is_busy = Arc::new(AtomicBool::new(false));
        let (site, clerk, journal) = (site.clone(), clerk.clone(), journal.clone());
        let (machines, pulse, busy) = (machines.to_vec(), watch.pulse("operator"), is_busy.clone());
        let thread = watch.spawn("operator", move || {
            while let Ok(kind) = taken.recv() {
                let name = ALL[kind].name();
                let begun = journal.begin(kind, None);
                let count = loop {
                    match upgrade(&machines, &site, &clerk, &pulse).context(name)? {
                        Some(count) => break count,
                        // As whoever is told that the connection broke: some have been upgraded, and are once more.
                        None => journal.say(&format!("{name}: cut off with the daemon")),
                    }
                    thread::sleep(RETRY_INTERVAL);
                };
                journal.end(begun);
                journal.done(kind);
                journal.say(&format!("{name}: {count} of {}: done", machines.len()));
                busy.store(false, Ordering::Release);
            }
            Ok(())
        })?;
        Ok(Self { orders, is_busy, thread })
    }

    /// Has all backends upgraded, which is a disturbance of that kind; false when that is being done already.
    pub fn upgrade(&self, kind: usize) -> bool {
        let is_free = !self.is_busy.swap(true, Ordering::AcqRel);
        is_free && self.orders.send(kind).is_ok()
    }

    /// Returns when all that it was to do is done.
    pub fn end(self) -> Result<()> {
        drop(self.orders);
        self.thread.join().map_err(|_| anyhow!("the operator's thread panicked"))
    }
}

/// How many go on with the program that is installed; none: the daemon died over it. Who does not must have died or left meanwhile.
fn upgrade(machines: &[Arc<Machine>], site: &Site, clerk: &Clerk, pulse: &Pulse) -> Result<Option<usize>> {
    pulse.waits_for("backends to be upgraded");
    let before = site.outages.now();
    let moments = |machine: &Machine| (machine.keeper_strikes.now(), machine.absences.now());
    // Whoever is served now has a backend that the daemon knows, and keeps it unless something happens.
    let all: Vec<_> = machines.iter().map(|machine| (machine, moments(machine), machine.is_served())).collect();
    let answer = site.ask("POST", "/v1/upgrade", None);
    pulse.rests();
    let answer = match answer {
        Ok(answer) if answer.is_success() => answer,
        _ if site.outages.since(before) => {
            for machine in machines {
                clerk.allow(UPGRADED, &machine.disk.object());
                clerk.allow(NOT_UPGRADED, &machine.disk.object());
            }
            return Ok(None);
        }
        Ok(answer) => bail!("{}, {}", answer.status, answer.reason()),
        Err(error) => return Err(error.context("the daemon does not answer, though nobody had killed it")),
    };
    let mut count = 0;
    for (machine, (strikes, absences), was_served) in all {
        let object = machine.disk.object();
        let is_its = |one: &&serde_json::Value| one["volume"] == machine.disk.volume.as_str();
        let found = answer.body.as_array().context("a list")?.iter().find(is_its);
        let is_excused = !was_served || machine.keeper_strikes.since(strikes) || machine.absences.since(absences);
        match found.map(|one| one["error"].as_str()) {
            Some(None) => {
                clerk.expect(UPGRADED, &object);
                count += 1;
            }
            Some(Some(_)) if is_excused => clerk.allow(NOT_UPGRADED, &object),
            // A daemon that has just begun may not have found it again yet.
            None if is_excused || site.outages.since(before) => {}
            Some(Some(error)) => bail!("{object}: {error}"),
            None => bail!("{object} was left out"),
        }
    }
    Ok(Some(count))
}
