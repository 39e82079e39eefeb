//! A keeper is killed together with its worker: the connection ends, and the front end comes back with its account of what is in
//! flight. The daemon, or the next one, puts another backend in its place.

use std::time::Duration;

use anyhow::Result;

use crate::soak::conductor::Conductor;
use crate::soak::disk::Disk;
use crate::soak::disturbance::{Begun, Disturbance};
use crate::soak::household;

/// How long a process may take to end once it is killed.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct KeeperKilled;

impl Disturbance for KeeperKilled {
    fn name(&self) -> &'static str {
        "keeper and worker killed"
    }

    fn weight(&self) -> u32 {
        2
    }

    /// Only a front end that keeps account of what is in flight survives it.
    fn fits(&self, disk: &Disk) -> bool {
        disk.manner.keeps_inflight
    }

    /// A backend that dies more than five times within ten seconds is given up by the daemon.
    fn spacing(&self) -> Duration {
        Duration::from_secs(3)
    }

    fn begin(&self, conductor: &mut Conductor, kind: usize, target: usize, mut random: fastrand::Rng) -> Result<Begun> {
        let machine = conductor.machines[target].clone();
        let (clerk, journal, object) = (conductor.clerk.clone(), conductor.journal.clone(), machine.disk.object());
        let killed = machine.strike(|| {
            let (pid, keeper) = conductor.keeper(target)?;
            let workers = household::workers(pid);
            journal.end(journal.begin(kind, Some(target)));
            let killed = machine.keeper_strikes.strike(|| {
                clerk.death(&object, || {
                    clerk.expect("backend.died", &object);
                    clerk.expect("backend.restarted", &object);
                    // A daemon that dies over it may have another start it once more.
                    clerk.allow("backend.restarted", &object);
                    // The keeper first: nobody is left to start another worker.
                    keeper.send(libc::SIGKILL)?;
                    for worker in workers.iter().filter(|_| random.u8(..3) > 0) {
                        // It may have ended with its keeper.
                        let _ = worker.send(libc::SIGKILL);
                    }
                    keeper.wait_for_end(PATIENCE)
                })
            });
            Some(killed)
        });
        match killed.flatten().transpose()? {
            Some(true) => Ok(Begun::Done),
            Some(false) => anyhow::bail!("{object}: the keeper lives on after SIGKILL"),
            None => Ok(Begun::Missed),
        }
    }
}
