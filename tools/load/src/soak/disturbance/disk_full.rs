//! The file system of all deltas is full for a while: writes that need room wait for it, reads go on, and nothing fails.

use std::time::Duration;

use anyhow::Result;

use crate::soak::conductor::Conductor;
use crate::soak::disturbance::{Begun, Disturbance};

/// Far less than a write waits for before it fails.
const SECONDS_MAX: f64 = 4.0;

pub struct DiskFull;

impl Disturbance for DiskFull {
    fn name(&self) -> &'static str {
        "disk full and relieved"
    }

    fn weight(&self) -> u32 {
        1
    }

    fn begin(
        &self,
        conductor: &mut Conductor,
        kind: usize,
        _target: usize,
        mut random: fastrand::Rng,
    ) -> Result<Begun> {
        let Some(room) = conductor.site.room.clone() else {
            return Ok(Begun::Missed("no small file system could be mounted"));
        };
        let time = Duration::from_secs_f64(SECONDS_MAX * random.f64().powi(2));
        if !room.fill()? {
            return Ok(Begun::Missed("it is full already"));
        }
        let journal = conductor.journal.clone();
        let filled = journal.begin(kind, None);
        conductor.later(time, move || {
            room.relieve()?;
            journal.end(filled);
            journal.say("there is room again");
            Ok(())
        });
        Ok(Begun::Done)
    }
}
