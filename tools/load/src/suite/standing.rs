//! What a backend costs that stands and waits: its start, its memory, its rest, and what it keeps after work ([`residue`]).
//!
//! Several run at once, each with a volume of its own on the same base, because that is how they are
//! used and because pages that all of them map are nobody's private memory.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::device::{Greeting, Setup};
use crate::process::{Backend, Weight};
use crate::suite::contestants::Contestant;
use crate::suite::record::{StandingRecord, StandingSample};
use crate::suite::{Suite, progress, residue};

/// What this part is called among the lines.
pub const NAME: &str = "start-up and memory";
const BACKENDS: usize = 8;
/// For a backend to come to rest after it was attached.
const SETTLE: Duration = Duration::from_millis(500);

struct Started {
    backend: Backend,
    listening: Duration,
    greeted: Duration,
    greeting: Greeting,
}

pub fn measure(suite: &Suite) -> Result<Vec<StandingRecord>> {
    let mut records: Vec<_> = suite
        .contestants
        .iter()
        .map(|contestant| StandingRecord { name: contestant.name.to_owned(), samples: Vec::new(), residue: None })
        .collect();
    for round in 0..suite.manner.rounds {
        for (contestant, record) in suite.contestants.iter().zip(&mut records) {
            progress(&format!("round {}: {NAME}: {}", round + 1, contestant.name));
            let samples = sample(suite, contestant).with_context(|| contestant.name)?;
            record.samples.extend(samples);
        }
    }
    for (record, residue) in records.iter_mut().zip(residue::measure(suite)?) {
        record.residue = Some(residue);
    }
    Ok(records)
}

/// A sample for each of the backends that run at once.
fn sample(suite: &Suite, contestant: &Contestant) -> Result<Vec<StandingSample>> {
    let programs = &suite.site.programs;
    let volumes: Vec<_> = (0..BACKENDS).map(|index| suite.site.large_volume(index)).collect();
    for volume in &volumes {
        (contestant.prepare)(programs, volume).context("making the private file")?;
    }
    let mut alone = Vec::new();
    for volume in &volumes {
        let command = (contestant.command)(programs, volume);
        let mut backend = Backend::start(&command, &volume.socket, &suite.site.log())?;
        // Connecting is how it is found out that it listens, and this connection is then used.
        let (stream, listening) = backend.connect()?;
        let greeting = Greeting::new(stream)?;
        let greeted = backend.age();
        alone.push(Started { backend, listening, greeted, greeting });
    }
    thread::sleep(SETTLE);
    let weights = alone.iter().map(|it| it.backend.weight()).collect::<Result<Vec<_>>>()?;

    let setup =
        Setup { queues: 1, queue_size: super::QUEUE_SIZE, area_bytes: 2 << 20, segment_bytes: None, indirect: true };
    let mut attached = Vec::new();
    for (started, weight) in alone.into_iter().zip(weights) {
        let device = started.greeting.start(&setup)?;
        attached.push((started.backend, device, started.listening, started.greeted, weight));
    }
    thread::sleep(SETTLE);
    let before: Vec<_> = attached.iter().map(|it| rest(&it.0)).collect::<Result<_>>()?;
    let idle = suite.manner.time.max(Duration::from_secs(1));
    thread::sleep(idle);
    let after: Vec<_> = attached.iter().map(|it| rest(&it.0)).collect::<Result<_>>()?;

    let mut samples = Vec::new();
    for (index, (backend, device, listening, greeted, alone)) in attached.into_iter().enumerate() {
        let (cpu_ns, switches) = (after[index].0 - before[index].0, after[index].1 - before[index].1);
        let attached: Weight = backend.weight()?;
        samples.push(StandingSample {
            listening_ms: listening.as_secs_f64() * 1e3,
            greeted_ms: greeted.as_secs_f64() * 1e3,
            alone,
            attached,
            idle_cpu_us_per_s: cpu_ns as f64 / 1e3 / idle.as_secs_f64(),
            idle_switches_per_s: switches as f64 / idle.as_secs_f64(),
        });
        device.stop()?;
        backend.stop()?;
        suite.site.clean(&volumes[index])?;
    }
    Ok(samples)
}

/// CPU time and context switches of a backend so far.
fn rest(backend: &Backend) -> Result<(u64, u64)> {
    Ok((backend.cpu_ns()?, backend.switches()?))
}
