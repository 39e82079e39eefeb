//! A guest is reset, in the middle of whatever is in flight or with nothing, and boots. If its disk follows a channel, that may have
//! moved: then the guest finds the new image, whole, at a boot that can be told from everything else, and the old one otherwise.

use std::time::Duration;

use anyhow::Result;

use crate::soak::boot::Through;
use crate::soak::conductor::Conductor;
use crate::soak::disturbance::{Begun, Disturbance};

pub struct Reset;

impl Disturbance for Reset {
    fn name(&self) -> &'static str {
        "guest reset"
    }

    fn weight(&self) -> u32 {
        3
    }

    fn spacing(&self) -> Duration {
        Duration::from_millis(200)
    }

    fn begin(&self, conductor: &mut Conductor, kind: usize, target: usize, mut random: fastrand::Rng) -> Result<Begun> {
        let through = match random.u8(..5) {
            0 => Through::Kernel,
            1 => Through::Firmware(2),
            _ => Through::Firmware(1),
        };
        let drains = random.bool();
        let moves = (conductor.machines[target].disk.channel().is_some() && random.u8(..3) > 0).then(|| random.fork());
        Ok(conductor.ask(kind, target, move |front_end| {
            let (clerk, object) = (front_end.clerk.clone(), front_end.disk().object());
            // A worker may die in it that was about to go.
            clerk.change(&object, || front_end.reset(through, drains, moves))
        }))
    }
}
