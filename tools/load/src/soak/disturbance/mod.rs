//! What can happen to a machine: a file for each, and [`ALL`] of them.
//!
//! One that is to be added is a file here and a line in `ALL`. It says how often it comes, whom it fits, and how it begins;
//! whatever it may cost events or connections it tells the clerk or strikes through [`crate::soak::machine::Machine::strike`].

mod daemon_killed;
mod disk_full;
mod growth;
mod keeper_killed;
mod memory_hotplug;
mod pause;
mod reattached;
mod reconnect;
mod reset;
mod upgraded;
mod worker_killed;
mod worker_stopped;

use std::time::Duration;

use anyhow::Result;

use crate::soak::conductor::Conductor;
use crate::soak::disk::Disk;

/// All of them, in the order of the report.
pub const ALL: [&dyn Disturbance; 14] = [
    &worker_killed::WorkerKilled,
    &worker_stopped::WorkerStopped,
    &keeper_killed::KeeperKilled { with_worker: true },
    &keeper_killed::KeeperKilled { with_worker: false },
    &daemon_killed::DaemonKilled,
    &upgraded::Upgraded,
    &disk_full::DiskFull,
    &reconnect::Reconnect,
    &pause::Pause,
    &reset::Reset { moves: false },
    &reset::Reset { moves: true },
    &memory_hotplug::MemoryHotplug,
    &growth::Growth,
    &reattached::Reattached,
];

/// How far one has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// It is done.
    Done,
    /// Somebody else does it, and says when it is done.
    Asked,
    /// It cannot be done now, and why.
    Missed(&'static str),
}

pub trait Disturbance: Sync {
    /// What it is called.
    fn name(&self) -> &'static str;

    /// How often it comes, as against the others.
    fn weight(&self) -> u32;

    /// Whether a machine with this disk takes it.
    fn fits(&self, _disk: &Disk) -> bool {
        true
    }

    /// How much time there is between two of them on one machine, at least.
    fn spacing(&self) -> Duration {
        Duration::ZERO
    }

    /// Begins it, in the conductor's thread, which must not wait. `kind`: its number in `ALL`.
    fn begin(&self, conductor: &mut Conductor, kind: usize, target: usize, random: fastrand::Rng) -> Result<Begun>;
}
