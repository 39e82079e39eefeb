//! Memory is plugged into a machine while requests run, and their buffers are moved there; or it is unplugged again, once no buffer
//! is left in it, while requests run elsewhere.

use std::thread;
use std::time::Duration;

use anyhow::Result;

use crate::soak::conductor::Conductor;
use crate::soak::disturbance::{Begun, Disturbance};
use crate::soak::front_end::FrontEnd;

const LOOK_INTERVAL: Duration = Duration::from_millis(2);

pub struct MemoryHotplug;

impl Disturbance for MemoryHotplug {
    fn name(&self) -> &'static str {
        "memory plugged or unplugged"
    }

    fn weight(&self) -> u32 {
        3
    }

    fn begin(&self, conductor: &mut Conductor, kind: usize, target: usize, _random: fastrand::Rng) -> Result<Begun> {
        Ok(conductor.ask(kind, target, |front_end| match front_end.standing.is_plugged {
            false => plug(front_end),
            true => unplug(front_end),
        }))
    }
}

fn plug(front_end: &mut FrontEnd) -> Result<()> {
    front_end.standing.is_plugged = true;
    tell(front_end)?;
    let spare = front_end.standing.spare();
    let machine = front_end.machine.clone();
    machine.seat.hold().set_spare(Some(&spare));
    Ok(())
}

fn unplug(front_end: &mut FrontEnd) -> Result<()> {
    let spare = front_end.standing.spare();
    let machine = front_end.machine.clone();
    machine.seat.hold().set_spare(None);
    front_end.pulse.waits_for("requests whose buffers are in memory that is to go");
    while machine.seat.hold().uses(&spare) {
        // They may be at a backend that has died.
        front_end.listen_for_end()?;
        thread::sleep(LOOK_INTERVAL);
    }
    front_end.standing.is_plugged = false;
    tell(front_end)
}

fn tell(front_end: &mut FrontEnd) -> Result<()> {
    // Should the backend die over it, the next one is told all of it.
    front_end.say("a change of memory", |link, standing| link.tell_memory(standing)).map(drop)
}
