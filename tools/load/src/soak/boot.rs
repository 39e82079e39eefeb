//! Boots: a [`FrontEnd`] whose guest starts from nothing, and the image that it must then find.
//!
//! A guest boots by firmware and then by its kernel, each with a driver that resets the device. At the first of these starts a
//! volume that follows a channel may be on another image than before; at every other one it must be on the same
//! (`src/vhost_user/boot.rs` of pando says how that is told). Which image it is the first sector tells, which nobody writes.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::connection::Driver;
use crate::soak::disk::{IMAGES, Image, Kind};
use crate::soak::front_end::FrontEnd;
use crate::soak::guest::{DEPTH, Held};
use crate::soak::strikes::Moment;

/// What firmware reads before it starts the kernel, at most, and how much of it at once.
const FIRMWARE_REQUESTS: u64 = 40;
const FIRMWARE_DEPTH: usize = 4;

/// How long the daemon may take to know what a guest has found.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// How a guest comes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    /// So many starts of firmware or a boot loader, and then the kernel's.
    Firmware(usize),
    /// The kernel's alone: it may be another one (kexec), and is no boot that could be told.
    Kernel,
}

/// On which image a start may find the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finds {
    /// The same as before.
    Same,
    /// That, or the one that its channel points to, or one that it pointed to since.
    Either,
    /// The one that its channel points to, unless somebody has struck at the backend since then, or there was no room for a delta.
    Next { undisturbed: Moment, roomy: Moment },
    /// That one too, and nothing of what was written is left on a volume that does not keep it.
    Fresh,
}

impl FrontEnd {
    /// Attaches the disk, connects to it and boots, as a machine that is switched on.
    pub fn switch_on(&mut self, held: &mut Held) -> Result<()> {
        let (machine, since) = (self.machine.clone(), self.machine.keeper_strikes.now());
        let has_excuse = || machine.keeper_strikes.since(since);
        self.socket = self.site.attach(&self.pulse, &machine.disk, has_excuse)?;
        self.connect()?;
        self.config = self.read_config()?;
        self.boot(held, Through::Firmware(1), Finds::Fresh)
    }

    /// Shuts the guest down, detaches its disk, and sees that the delta was left in good order.
    pub fn switch_off(&mut self, held: &mut Held) -> Result<()> {
        self.drain(held)?;
        self.stop_rings()?;
        // From here on nobody strikes at the backend, which is told to end.
        self.disconnect(true);
        let disk = &self.machine.disk;
        self.site.remove(&self.pulse, &disk.attachment(), || false)?;
        match disk.kind {
            Kind::Cow | Kind::Blank => self.site.check_delta(disk),
            Kind::Ephemeral | Kind::ReadOnly => Ok(()),
        }
    }

    /// Reads all of the disk and compares it with what was written.
    pub fn read_back(&mut self, held: &mut Held) -> Result<()> {
        held.verifier().start_pass();
        self.drive(held, |held| held.submit(DEPTH))
    }

    /// A guest that has been reset comes up. The rings do not run.
    pub fn boot(&mut self, held: &mut Held, through: Through, finds: Finds) -> Result<()> {
        let kernel = Driver::Kernel { indirect: self.disk().manner.indirect };
        let mut finds = finds;
        if let Through::Firmware(starts) = through {
            for _ in 0..starts {
                self.start_driver(held, Driver::Firmware, finds).context("firmware")?;
                let requests = held.random().u64(1..=FIRMWARE_REQUESTS);
                held.verifier().start_random(requests);
                self.drive(held, |held| held.submit(FIRMWARE_DEPTH))?;
                self.stop_rings()?;
                finds = Finds::Same;
            }
        }
        self.start_driver(held, kernel, finds).context("kernel")?;
        held.verifier().start_random(u64::MAX);
        Ok(())
    }

    /// A driver takes the device over, from nothing, and looks at what disk it has.
    fn start_driver(&mut self, held: &mut Held, driver: Driver, finds: Finds) -> Result<()> {
        let queues = self.standing.driver_starts(driver, self.offered()?, &self.config)?;
        held.take_queues(queues);
        self.started = self.site.fills();
        let spare = self.standing.is_plugged.then(|| self.standing.spare());
        held.set_spare(spare.as_ref());
        self.start_rings()?;
        // After the start: what was staged has its own size.
        self.config = self.read_config()?;
        self.settle_image(held, driver, finds)
    }

    /// Sees which image the disk is on, and that it may be.
    fn settle_image(&mut self, held: &mut Held, driver: Driver, finds: Finds) -> Result<()> {
        let seen = self.look(held)?;
        let (same, next) = (self.image, self.wanted);
        let is_older = seen == same || seen.is_some_and(|image| self.passed.contains(&image));
        let is_allowed = match finds {
            Finds::Same => seen == same,
            Finds::Either => seen == next || is_older,
            Finds::Next { undisturbed, roomy } => {
                let is_excused = self.undisturbed_since() != Some(undisturbed) || self.site.was_full_since(roomy);
                seen == next || is_older && is_excused
            }
            Finds::Fresh => seen == next,
        };
        let names = |image: Option<Image>| image.map_or("none".to_owned(), |image| image.version());
        ensure!(
            is_allowed,
            "the guest finds image {}, where it had {} and its channel has {} ({finds:?})",
            names(seen),
            names(same),
            names(next)
        );
        let disk = &self.machine.disk;
        let expected = disk.bytes_on(seen, self.grown);
        let found = self.config.capacity_bytes;
        ensure!(found == expected, "the disk has {found} bytes on image {}, expected {expected}", names(seen));
        ensure!(
            !self.config.discard || self.config.discard_alignment_bytes == disk.cluster_bytes,
            "discards are aligned to {} bytes, the clusters have {}",
            self.config.discard_alignment_bytes,
            disk.cluster_bytes
        );
        held.verifier().take_config(driver.sees(self.config));
        let is_new = held.verifier().bytes() == 0;
        if is_new || seen != same || finds == Finds::Fresh && disk.kind == Kind::Ephemeral {
            let base = disk.base_on(seen);
            held.verifier().start_over(base);
        }
        if seen != same && finds != Finds::Fresh {
            self.clerk.expect("image.active", &disk.object());
        }
        self.image = seen;
        if seen == next {
            self.passed.clear();
        }
        Ok(())
    }

    /// The image whose first sector the disk has.
    fn look(&mut self, held: &mut Held) -> Result<Option<Image>> {
        if self.image.is_none() {
            return Ok(None);
        }
        held.verifier().start_look();
        self.drive(held, |held| held.submit(DEPTH))?;
        let number = held.verifier().end_look().filter(|number| (1..=IMAGES.len() as u32).contains(number));
        number.map(Image::numbered).context("the first sector is no image's").map(Some)
    }

    /// Waits until the daemon knows which image the guest is on, of which it is told after the guest has found it.
    fn wait_until_known(&mut self) -> Result<()> {
        let ends = Instant::now() + PATIENCE;
        let disk = self.machine.disk.clone();
        let expected = self.image.map(|image| image.version());
        loop {
            let found = self.site.demand(&self.pulse, ("GET", &disk.attachment()), None, || false)?;
            if found["image"]["versions"][0].as_str() == expected.as_deref() {
                return Ok(());
            }
            let has_time = Instant::now() < ends;
            ensure!(
                has_time,
                "the guest is on image {expected:?}, and the daemon still says after {PATIENCE:?}: {found}"
            );
            thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Points the disk's channel to another image.
    pub fn move_channel(&mut self, random: &mut fastrand::Rng) -> Result<()> {
        let disk = self.machine.disk.clone();
        let Some(channel) = disk.channel() else { return Ok(()) };
        let others: Vec<Image> = IMAGES.into_iter().filter(|image| Some(*image) != self.wanted).collect();
        let next = others[random.usize(..others.len())];
        let path = format!("/v1/channels/{}", channel.replace('/', "%2F"));
        self.clerk.expect("channel.moved", &format!("channel:{channel}"));
        self.clerk.allow("channel.moved", &format!("channel:{channel}"));
        self.site.demand(&self.pulse, ("PUT", &path), Some(&json!({ "image": next.version() })), || false)?;
        self.passed.extend(self.wanted.replace(next));
        Ok(())
    }

    /// Resets the guest, with what is in flight or without, and has it boot.
    pub fn reset(&mut self, through: Through, drains: bool, moves: Option<fastrand::Rng>) -> Result<()> {
        let mut staged = None;
        let roomy = self.site.fills();
        if let Some(mut random) = moves {
            self.wait_until_known()?;
            // Whom the move has reached is known only while nobody strikes at the backend.
            staged = self.undisturbed_since();
            self.move_channel(&mut random)?;
        }
        let machine = self.machine.clone();
        let mut held = machine.seat.hold();
        if drains {
            self.drain(&mut held)?;
        }
        let positions = self.stop_rings()?;
        // What is complete counts. The rest was never taken, unless it waits for room, and the guest forgets it.
        held.harvest()?;
        if self.has_been_full() {
            held.verifier().doubt_in_flight();
        }
        if machine.disk.manner.tells_reset {
            // Should the backend die over it, the next one has nothing to reset.
            self.say("a reset", |link, _| link.connection.reset_device())?;
        }
        let finds = match (through, staged) {
            (Through::Kernel, _) => Finds::Same,
            // Rings that stopped where they began tell nothing.
            (Through::Firmware(_), Some(undisturbed)) if positions.iter().any(|position| *position != 0) => {
                Finds::Next { undisturbed, roomy }
            }
            (Through::Firmware(_), _) => Finds::Either,
        };
        self.boot(&mut held, through, finds)
    }
}
