//! A front end closes its connection in good order, with nothing in flight, and comes back.

use std::thread;
use std::time::Duration;

use anyhow::Result;

use crate::soak::conductor::Conductor;
use crate::soak::disturbance::{Begun, Disturbance};
use crate::soak::front_end::FrontEnd;

const AWAY_MAX: Duration = Duration::from_millis(200);

pub struct Reconnect;

impl Disturbance for Reconnect {
    fn name(&self) -> &'static str {
        "front end disconnected and back"
    }

    fn weight(&self) -> u32 {
        2
    }

    fn begin(&self, conductor: &mut Conductor, kind: usize, target: usize, mut random: fastrand::Rng) -> Result<Begun> {
        let away = AWAY_MAX.mul_f64(random.f64());
        Ok(conductor.ask(kind, target, move |front_end| reconnect(front_end, away)))
    }
}

fn reconnect(front_end: &mut FrontEnd, away: Duration) -> Result<()> {
    let machine = front_end.machine.clone();
    let mut held = machine.seat.hold();
    front_end.drain(&mut held)?;
    front_end.stop_rings()?;
    front_end.disconnect(false);
    thread::sleep(away);
    front_end.connect()?;
    front_end.start_rings()
}
