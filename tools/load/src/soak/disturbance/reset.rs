//! A guest is reset, in the middle of whatever is in flight or with nothing, and boots. If its disk follows a channel, that may be moved
//! ahead of it: then the guest finds the new image, whole, at a boot that can be told from everything else, and the old one otherwise.

use std::time::Duration;

use anyhow::Result;

use crate::soak::boot::Through;
use crate::soak::conductor::Conductor;
use crate::soak::disk::Disk;
use crate::soak::disturbance::{Begun, Disturbance};

pub struct Reset {
    /// Whether the channel moves.
    pub moves: bool,
}

impl Disturbance for Reset {
    fn name(&self) -> &'static str {
        if self.moves { "image updated, guest reset" } else { "guest reset" }
    }

    fn weight(&self) -> u32 {
        if self.moves { 1 } else { 2 }
    }

    fn fits(&self, disk: &Disk) -> bool {
        !self.moves || disk.channel().is_some()
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
        let moves = self.moves.then(|| random.fork());
        Ok(conductor.ask(kind, target, move |front_end| {
            let (clerk, object) = (front_end.clerk.clone(), front_end.disk().object());
            // A worker may die in it that was about to go.
            clerk.change(&object, || front_end.reset(through, drains, moves))
        }))
    }
}
