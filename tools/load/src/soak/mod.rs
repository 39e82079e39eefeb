//! A soak: machines whose work is verified all the time, and everything that can happen to them, at random, for as long as asked.
//!
//! A run has a daemon of its own ([`warden`]), and machines ([`machine`]) with a disk of each kind ([`disk`]). A machine is two
//! threads: a [`guest`], which writes and compares, and a [`front_end`], which speaks with the backend and comes back when that has
//! died. A [`conductor`] carries a seeded [`plan`] of disturbances out ([`disturbance`] has a file for each). The [`clerk`] compares
//! what the daemon tells with what was done, the [`watch`] sees that nobody waits for ever, and at the [`finish`] all is read back
//! and nothing may be left. Knows nothing of the inside of what it tests.

mod autopsy;
mod boot;
mod clerk;
mod conductor;
mod disk;
mod disturbance;
mod finish;
mod front_end;
mod guest;
mod household;
mod journal;
mod machine;
mod operator;
mod plan;
mod report;
mod room;
mod site;
mod standing;
mod strikes;
mod warden;
mod watch;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::arguments::SoakOptions;
use crate::host::daemon::{self, Daemon};
use crate::suite::progress;
use crate::sys;

use clerk::Clerk;
use conductor::Conductor;
use disk::{Disk, IMAGES, fleet};
use front_end::FrontEnd;
use guest::Guest;
use journal::Journal;
use machine::Machine;
use operator::Operator;
use report::Summary;
use room::Room;
use site::Site;
use warden::Warden;
use watch::Watch;

/// What the daemon is for.
const PURPOSE: &str = "soak";
/// How often it is looked whether all is well.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// What the deltas' file system has for each disk: more than the largest and what is staged for it.
const ROOM_BYTES: u64 = 64 << 20;

pub fn run(options: &SoakOptions) -> Result<()> {
    // Of a size that people can copy from one terminal to another.
    let seed = options.seed.unwrap_or_else(|| fastrand::u32(..).into());
    println!("seed {seed}");
    sys::note_interrupts();
    household::adopt()?;
    let directory = make_directory(&options.work_dir, seed)?;
    let disks = options.cow_volumes as u64 + 3;
    let room = match options.deltas_on_disk {
        true => None,
        false => Room::mount(&directory.join("state"), disks * ROOM_BYTES)?.map(Arc::new),
    };
    let watch = Arc::new(Watch::default());
    let (sender, done) = channel();
    let time = Duration::from_secs_f64(options.minutes * 60.0);
    let soak = Soak {
        seed,
        time,
        cow_volumes: options.cow_volumes,
        pando: options.pando.clone(),
        directory: directory.clone(),
        room: room.clone(),
        watch: watch.clone(),
    };
    watch.spawn("run", move || {
        let report = soak.run()?;
        // Whoever waits for it does so until it comes.
        let _ = sender.send(report);
        Ok(())
    })?;
    let report = loop {
        match done.recv_timeout(LOOK_INTERVAL) {
            Ok(report) => break Some(report),
            Err(RecvTimeoutError::Disconnected) => break None,
            Err(RecvTimeoutError::Timeout) => {}
        }
        household::bury_orphans();
        watch.look();
        if sys::is_interrupted() {
            watch.fail("soak", &anyhow::anyhow!("interrupted"));
        }
        if watch.failure().is_some() {
            break None;
        }
    };
    progress("");
    match (report, watch.failure()) {
        (Some(report), None) => {
            print!("{report}");
            room.map_or(Ok(()), |room| room.unmount())?;
            fs::remove_dir_all(&directory).with_context(|| directory.display().to_string())
        }
        (_, failure) => {
            // It is no reason to leave anything behind that this cannot be told.
            if let Err(error) = autopsy::write(&directory, &watch) {
                eprintln!("how all stood is not known: {error:#}");
            }
            household::kill_all();
            // Nobody listens there any more. What matters is told below.
            let _ = fs::remove_dir_all(daemon::run_directory(PURPOSE));
            if let Some(Err(error)) = room.map(|room| room.rescue(&directory.join("volumes"))) {
                eprintln!("the deltas are lost: {error:#}");
            }
            let failure = failure.unwrap_or_else(|| "it ended without a word".to_owned());
            bail!(
                "seed {seed}: {failure}\nthe journal, the daemon's log, how all stood, and its files are in {}",
                directory.display()
            )
        }
    }
}

fn make_directory(parent: &Path, seed: u64) -> Result<PathBuf> {
    let directory = parent.join(format!("{seed}-{}", std::process::id()));
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    Ok(fs::canonicalize(directory)?)
}

/// A run, from its start to its end.
struct Soak {
    seed: u64,
    time: Duration,
    cow_volumes: usize,
    pando: PathBuf,
    directory: PathBuf,
    room: Option<Arc<Room>>,
    watch: Arc<Watch>,
}

impl Soak {
    fn run(self) -> Result<String> {
        let mut random = fastrand::Rng::with_seed(self.seed);
        let disks = fleet(self.cow_volumes, &mut random);
        let journal = Arc::new(Journal::new(&self.directory.join("journal"), disturbance::ALL.len())?);
        progress("making images");
        let daemon = Daemon::start(&self.pando, &self.directory, PURPOSE)?;
        self.prepare(&daemon, &disks)?;
        let site = Arc::new(Site {
            directory: self.directory.clone(),
            run: daemon::run_directory(PURPOSE),
            pando: self.pando.clone(),
            outages: Default::default(),
            room: self.room.clone(),
            has_direct: room::takes_direct(&self.directory.join("state/volumes"))?,
        });
        let clerk = Arc::new(Clerk::default());
        clerk.start(&site, &self.watch)?;
        for channel in disks.iter().filter_map(Disk::channel) {
            // By its making.
            clerk.allow("channel.moved", &format!("channel:{channel}"));
        }
        let warden = Warden::start(daemon, &site, &clerk, &journal, &self.watch)?;
        let mut machines = Vec::new();
        for (number, disk) in disks.into_iter().enumerate() {
            journal.say(&format!("{disk:?}"));
            machines.push(self.switch_on(number, disk, random.u64(..), &site, &clerk, &journal)?);
        }
        progress(&format!("disturbing {} machines for {:.0} s", machines.len(), self.time.as_secs_f64()));
        let (watch, journal_of) = (self.watch.clone(), journal.clone());
        let operator = Operator::start(&machines, &site, &clerk, &journal, &self.watch)?;
        let mut conductor =
            Conductor::new(machines.clone(), site.clone(), clerk.clone(), journal_of, warden, operator, watch);
        conductor.run(random.u64(..), self.time)?;
        progress("comparing");
        let mut daemon = conductor.warden.end()?;
        conductor.operator.end()?;
        let finished = finish::finish(&machines, &site, &clerk, &self.watch, &mut daemon);
        if let Err(error) = &finished {
            // Ahead of what becomes of everybody when the daemon is let go.
            self.watch.fail("run", error);
        }
        let (tally, read_back_bytes) = finished?;
        let (disks, (events, waits)) = (machines.len(), clerk.events());
        let summary = Summary { seed: self.seed, disks, time: self.time, tally, read_back_bytes, events, waits };
        Ok(report::report(&summary, &journal))
    }

    /// Imports the images, and makes channels and volumes.
    fn prepare(&self, daemon: &Daemon, disks: &[Disk]) -> Result<()> {
        for image in IMAGES {
            let path = self.directory.join("image.raw");
            image.write(&path)?;
            daemon.import_as(&path, Some(&image.version()))?;
            fs::remove_file(&path)?;
        }
        for disk in disks {
            if let (Some(channel), Some(image)) = (disk.channel(), disk.image) {
                let path = format!("/v1/channels/{}", channel.replace('/', "%2F"));
                daemon.call("PUT", &path, Some(&json!({ "image": image.version() })))?;
            }
            daemon.call("POST", "/v1/volumes", Some(&disk.request()))?;
        }
        Ok(())
    }

    /// Has a machine's two threads begin.
    fn switch_on(
        &self,
        number: usize,
        disk: Disk,
        seed: u64,
        site: &Arc<Site>,
        clerk: &Arc<Clerk>,
        journal: &Arc<Journal>,
    ) -> Result<Arc<Machine>> {
        let name = disk.volume.clone();
        let guest_name = format!("guest of {name}");
        let guest = Guest::new(number, &disk, seed, journal.clone(), self.watch.pulse(&guest_name));
        let tasks = Machine::with_tasks(number, disk, guest)?;
        let machine = tasks.machine.clone();
        let guest = machine.clone();
        self.watch.spawn(&guest_name, move || guest.seat.run())?;
        let witness = machine.clone();
        self.watch.call_witness(&guest_name, move || witness.seat.standing());
        let front_end_name = format!("front end of {name}");
        let pulse = self.watch.pulse(&front_end_name);
        let front_end = FrontEnd::new(machine.clone(), site.clone(), clerk.clone(), pulse)?;
        self.watch.spawn(&front_end_name, move || front_end.run(&tasks))?;
        Ok(machine)
    }
}
