//! All backends go on with the program that is installed now, keepers and workers, under running guests.

use anyhow::Result;

use crate::soak::conductor::Conductor;
use crate::soak::disturbance::{Begun, Disturbance};

pub struct Upgraded;

impl Disturbance for Upgraded {
    fn name(&self) -> &'static str {
        "all backends upgraded"
    }

    fn weight(&self) -> u32 {
        1
    }

    fn begin(&self, conductor: &mut Conductor, kind: usize, _target: usize, _random: fastrand::Rng) -> Result<Begun> {
        let is_asked = conductor.operator.upgrade(kind);
        Ok(if is_asked { Begun::Asked } else { Begun::Missed("the last upgrade is not over yet") })
    }
}
