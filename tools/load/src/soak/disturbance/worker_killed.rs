//! A worker is killed: the front end and its guest notice nothing but a pause.

use std::time::Duration;

use anyhow::Result;

use crate::soak::conductor::Conductor;
use crate::soak::disturbance::{Begun, Disturbance};

pub struct WorkerKilled;

impl Disturbance for WorkerKilled {
    fn name(&self) -> &'static str {
        "worker killed"
    }

    fn weight(&self) -> u32 {
        4
    }

    /// Workers that die one after the other without having got any further are held after five.
    fn spacing(&self) -> Duration {
        Duration::from_millis(100)
    }

    fn begin(&self, conductor: &mut Conductor, kind: usize, target: usize, _random: fastrand::Rng) -> Result<Begun> {
        let machine = conductor.machines[target].clone();
        let (clerk, journal) = (conductor.clerk.clone(), conductor.journal.clone());
        let killed = machine.strike(|| {
            let worker = conductor.worker(target)?;
            journal.end(journal.begin(kind, Some(target)));
            let sent = worker.send(libc::SIGKILL);
            if sent.is_ok() {
                clerk.expect("worker.died", &machine.disk.object());
            }
            Some(sent)
        });
        match killed.flatten().transpose() {
            Ok(Some(())) => Ok(Begun::Done),
            Ok(None) => Ok(Begun::Missed),
            // It has ended by itself since: whoever ended it is told of elsewhere.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(Begun::Missed),
            Err(error) => Err(error.into()),
        }
    }
}
