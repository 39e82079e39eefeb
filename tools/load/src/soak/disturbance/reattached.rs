//! A machine is switched off, its volume detached, the delta looked at, and all of it is attached and switched on again.

use anyhow::Result;

use crate::soak::conductor::Conductor;
use crate::soak::disturbance::{Begun, Disturbance};

pub struct Reattached;

impl Disturbance for Reattached {
    fn name(&self) -> &'static str {
        "volume detached and attached"
    }

    fn weight(&self) -> u32 {
        1
    }

    fn begin(&self, conductor: &mut Conductor, kind: usize, target: usize, _random: fastrand::Rng) -> Result<Begun> {
        Ok(conductor.ask(kind, target, |front_end| {
            let (machine, clerk) = (front_end.machine.clone(), front_end.clerk.clone());
            let mut held = machine.seat.hold();
            machine.absences.strike(|| {
                clerk.change(&machine.disk.object(), || {
                    front_end.switch_off(&mut held)?;
                    front_end.switch_on(&mut held)
                })
            })
        }))
    }
}
