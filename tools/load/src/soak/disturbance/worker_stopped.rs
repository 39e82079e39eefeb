//! A worker is stopped (SIGSTOP) for a while and goes on: no keeper takes it for dead so soon.

use std::time::Duration;

use anyhow::Result;

use crate::soak::conductor::Conductor;
use crate::soak::disturbance::{Begun, Disturbance};

/// A keeper replaces a worker that is stuck in a batch for ten.
const SECONDS_MAX: f64 = 5.0;

pub struct WorkerStopped;

impl Disturbance for WorkerStopped {
    fn name(&self) -> &'static str {
        "worker stopped and continued"
    }

    fn weight(&self) -> u32 {
        2
    }

    /// So that it gets on in between.
    fn spacing(&self) -> Duration {
        Duration::from_secs(8)
    }

    fn begin(&self, conductor: &mut Conductor, kind: usize, target: usize, mut random: fastrand::Rng) -> Result<Begun> {
        let machine = conductor.machines[target].clone();
        // Most are short.
        let time = Duration::from_secs_f64(SECONDS_MAX * random.f64().powi(2));
        machine.strike(|| {
            let worker = match conductor.worker(target) {
                Ok(worker) => worker,
                Err(missed) => return Ok(missed),
            };
            if worker.send(libc::SIGSTOP).is_err() {
                return Ok(Begun::Missed("its worker has just ended"));
            }
            let journal = conductor.journal.clone();
            let stopped = journal.begin(kind, Some(target));
            conductor.later(time, move || {
                // It may have been killed meanwhile.
                let _ = worker.send(libc::SIGCONT);
                journal.end(stopped);
                Ok(())
            });
            Ok(Begun::Done)
        })
    }
}
