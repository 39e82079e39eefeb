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
        machine.strike(|| {
            let worker = match conductor.worker(target) {
                Ok(worker) => worker,
                Err(missed) => return Ok(missed),
            };
            journal.end(journal.begin(kind, Some(target)));
            match worker.send(libc::SIGKILL) {
                // By itself: whoever has ended it is told of elsewhere.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                    Ok(Begun::Missed("its worker has just ended"))
                }
                sent => {
                    sent?;
                    clerk.expect("worker.died", &machine.disk.object());
                    Ok(Begun::Done)
                }
            }
        })
    }
}
