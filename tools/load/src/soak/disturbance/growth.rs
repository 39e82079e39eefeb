//! A volume is made larger under its guest, which is told, and works with the new part too.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use crate::soak::conductor::Conductor;
use crate::soak::disk::Disk;
use crate::soak::disturbance::{Begun, Disturbance};
use crate::soak::front_end::FrontEnd;

/// Of what a volume may yet grow, it grows by one part in so many.
const PARTS: u64 = 16;
/// How long the new size may take to be seen once it is so.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

pub struct Growth;

impl Disturbance for Growth {
    fn name(&self) -> &'static str {
        "volume grown"
    }

    fn weight(&self) -> u32 {
        1
    }

    fn fits(&self, disk: &Disk) -> bool {
        disk.is_writable()
    }

    fn begin(&self, conductor: &mut Conductor, kind: usize, target: usize, _random: fastrand::Rng) -> Result<Begun> {
        Ok(conductor.ask(kind, target, |front_end| {
            let (clerk, object) = (front_end.clerk.clone(), front_end.disk().object());
            // A worker may die in it that was about to go.
            clerk.change(&object, || grow(front_end))
        }))
    }
}

fn grow(front_end: &mut FrontEnd) -> Result<()> {
    let machine = front_end.machine.clone();
    let before = machine.disk.bytes_on(front_end.image, front_end.grown);
    let step = (machine.disk.bytes_max.saturating_sub(before) / PARTS).next_multiple_of(4096);
    // At its largest it is grown to the size that it has, which is allowed.
    let bytes = (before + step).min(machine.disk.bytes_max.max(before));
    front_end.grown = Some(bytes);
    // A backend that was struck a moment ago may be found dead only by this.
    let since = front_end.connected_since();
    let path = format!("/v1/volumes/{}/grow", machine.disk.volume);
    let has_excuse = || machine.keeper_strikes.since(since);
    front_end.site.demand(&front_end.pulse, ("POST", &path), Some(&json!({ "bytes": bytes })), has_excuse)?;
    let ends = Instant::now() + PATIENCE;
    loop {
        let config = front_end.read_config()?;
        if config.capacity_bytes == bytes {
            front_end.config = config;
            machine.seat.hold().verifier().grow(bytes);
            return Ok(());
        }
        let found = config.capacity_bytes;
        ensure!(Instant::now() < ends, "the volume was grown to {bytes} bytes, and its disk has {found}");
        thread::sleep(LOOK_INTERVAL);
    }
}
