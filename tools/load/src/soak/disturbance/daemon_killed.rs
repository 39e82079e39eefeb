//! The daemon is killed, and another started after a while: machines notice nothing, and what is asked for meanwhile is done by the
//! next one.

use std::time::Duration;

use anyhow::Result;

use crate::soak::conductor::Conductor;
use crate::soak::disturbance::{Begun, Disturbance};

const SECONDS_MAX: f64 = 2.0;

pub struct DaemonKilled;

impl Disturbance for DaemonKilled {
    fn name(&self) -> &'static str {
        "daemon killed and replaced"
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
        let after = Duration::from_secs_f64(SECONDS_MAX * random.f64().powi(2));
        let is_replaced = conductor.warden.replace(kind, after);
        Ok(if is_replaced { Begun::Done } else { Begun::Missed })
    }
}
