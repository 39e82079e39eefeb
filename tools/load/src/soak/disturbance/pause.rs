//! A machine is paused and goes on: its device stops in the middle of whatever is in flight, completes what it has taken, and
//! touches nothing until it is told to go on.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::soak::conductor::Conductor;
use crate::soak::disk;
use crate::soak::disturbance::{Begun, Disturbance};
use crate::soak::front_end::FrontEnd;

const PAUSE_MAX: Duration = Duration::from_millis(400);

pub struct Pause;

impl Disturbance for Pause {
    fn name(&self) -> &'static str {
        "machine paused and continued"
    }

    fn weight(&self) -> u32 {
        3
    }

    fn begin(&self, conductor: &mut Conductor, kind: usize, target: usize, mut random: fastrand::Rng) -> Result<Begun> {
        let time = PAUSE_MAX.mul_f64(random.f64().powi(2));
        Ok(conductor.ask(kind, target, move |front_end| pause(front_end, time)))
    }
}

fn pause(front_end: &mut FrontEnd, time: Duration) -> Result<()> {
    let machine = front_end.machine.clone();
    // No processor of the machine runs.
    let _held = machine.seat.hold();
    match machine.disk.manner.pause {
        disk::Pause::Stop => {
            front_end.stop_rings()?;
            let stopped = front_end.standing.positions();
            thread::sleep(time);
            expect_still(&stopped, &front_end.standing.positions())?;
            front_end.start_rings()
        }
        disk::Pause::Disable => {
            if front_end.say("the rings to be disabled", |link, standing| link.enable(standing, false))?.is_none() {
                // They run again, on another backend.
                return Ok(());
            }
            let disabled = front_end.standing.positions();
            thread::sleep(time);
            expect_still(&disabled, &front_end.standing.positions())?;
            front_end.say("the rings to be enabled", |link, standing| link.enable(standing, true)).map(drop)
        }
    }
}

fn expect_still(before: &[u16], after: &[u16]) -> Result<()> {
    ensure!(before == after, "rings that were stopped at {before:?} are at {after:?}");
    Ok(())
}
