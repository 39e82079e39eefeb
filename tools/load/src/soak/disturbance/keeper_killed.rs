//! A keeper is killed, together with its worker or alone: the connection ends, and the front end comes back with its account of what
//! is in flight. The daemon, or the next one, puts another backend in its place. A worker that is left alone may be stopped.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::soak::conductor::Conductor;
use crate::soak::disk::{Disk, Kind};
use crate::soak::disturbance::{Begun, Disturbance};
use crate::soak::household;

/// How long a process may take to end once it is killed.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct KeeperKilled {
    pub with_worker: bool,
}

impl Disturbance for KeeperKilled {
    fn name(&self) -> &'static str {
        if self.with_worker { "keeper and worker killed" } else { "keeper killed" }
    }

    fn weight(&self) -> u32 {
        if self.with_worker { 2 } else { 1 }
    }

    /// Only a front end that keeps account of what is in flight survives it.
    fn fits(&self, disk: &Disk) -> bool {
        disk.manner.keeps_inflight
    }

    /// A backend that dies more than five times within ten seconds is given up by the daemon: these are four at most, of both kinds.
    fn spacing(&self) -> Duration {
        Duration::from_secs(6)
    }

    fn begin(&self, conductor: &mut Conductor, kind: usize, target: usize, _random: fastrand::Rng) -> Result<Begun> {
        let machine = conductor.machines[target].clone();
        let (clerk, journal, object) = (conductor.clerk.clone(), conductor.journal.clone(), machine.disk.object());
        machine.strike(|| {
            // A boot that no daemon has heard of is forgotten with the keeper; of a disk without a delta nobody can find out, so the machine is given up.
            if machine.disk.kind == Kind::ReadOnly {
                let answer = conductor.site.try_ask("GET", &machine.disk.attachment(), None);
                if answer.is_none_or(|answer| !answer.body["staged"].is_null()) {
                    return Ok(Begun::Missed("no daemon knows which image its guest is on"));
                }
            }
            let (pid, keeper) = match conductor.keeper(target) {
                Ok(found) => found,
                Err(missed) => return Ok(missed),
            };
            let workers = if self.with_worker { household::workers(pid) } else { Vec::new() };
            journal.end(journal.begin(kind, Some(target)));
            let has_ended = machine.keeper_strikes.strike(|| {
                clerk.death(&object, || {
                    clerk.expect("backend.died", &object);
                    clerk.expect("backend.restarted", &object);
                    // A daemon that dies over it may have another start it once more.
                    clerk.allow("backend.restarted", &object);
                    // The keeper first: nobody is left to start another worker.
                    keeper.send(libc::SIGKILL)?;
                    for worker in &workers {
                        // It may have ended with its keeper.
                        let _ = worker.send(libc::SIGKILL);
                    }
                    keeper.wait_for_end(PATIENCE)
                })
            })?;
            ensure!(has_ended, "{object}: the keeper lives on after SIGKILL");
            Ok(Begun::Done)
        })
    }
}
