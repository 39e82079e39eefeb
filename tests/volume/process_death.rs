//! Process death: every write that was committed is there, flushed or not, and every other is there or not.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use pando::block::base::Base;
use pando::block::delta::layout::{CLUSTERS_PER_GROUP, CLUSTERS_PER_STRETCH, LOG_HALF_BYTES};
use pando::block::delta::open::NewDelta;
use pando::block::delta::{self, Delta, Lifetime, Marks};
use pando::block::storage::Storage;
use pando::block::{Batch, Volume};
use pando::sys::buffers::{Readable, Writable};
use pando::units::{ClusterSize, SECTOR_BYTES};
use rand::RngExt;
use rand::rngs::StdRng;

use super::disk::{Call, Disk, Done, Loss, Plan, Then};
use super::history::{self, Context, Step, seeded, seeds};
use super::machine::{Machine, WATCHED};
use super::stamps::Stamp;

/// Runs the history with the process dying at each of its calls, in the middle of it and behind it, and some more deaths in
/// what follows. In the end a flush and a power loss.
fn check(history: &[Step], rng: &mut StdRng) {
    let new = Machine::new();
    for call in 0.. {
        let mut is_reached = false;
        for done in [Done::FirstHalf, Done::All] {
            let _context = Context(format!("death at call {call}, done {done:?}, of {history:?}"));
            let mut machine = new.fork(new.disk.after_process_death());
            machine.disk.plan(Plan { call: Call::Change(call), done, then: Then::Stop });
            let result = machine.start().and_then(|()| machine.run(history));
            if !machine.disk.is_reached() {
                result.unwrap();
                continue;
            }
            is_reached = true;
            let mut survivor = machine.after_process_death();
            let deaths = if rng.random_range(0..4) == 0 { 3 } else { 0 };
            for _ in 0..deaths {
                survivor = die_again(survivor, rng);
            }
            survivor.step(&Step::Flush).unwrap();
            survivor.after_power_loss(Loss::All, rng);
        }
        if !is_reached {
            break;
        }
    }
}

/// Goes on and dies at a random call.
fn die_again(mut machine: Machine, rng: &mut StdRng) -> Machine {
    let steps = history::random(rng, &WATCHED, 12);
    let _context = Context(format!("then {steps:?}"));
    let call = rng.random_range(0..25);
    machine.disk.plan(Plan { call: Call::Change(call), done: Done::All, then: Then::Stop });
    if let Err(error) = machine.run(&steps) {
        assert!(machine.disk.is_reached(), "{error}");
    }
    machine.after_process_death()
}

#[test]
fn at_every_call_of_a_script() {
    let group_end = CLUSTERS_PER_GROUP * 8;
    let script = [
        Step::Write(3..5),
        Step::Write(0..20),
        Step::Commit,
        Step::Write(1..2),
        Step::Commit,
        // Zero, with the rest of the batch not committed yet.
        Step::Write(24..40),
        Step::Discard(24..32),
        Step::Commit,
        Step::Write(25..26),
        Step::Commit,
        Step::Flush,
        // In the log's other half: the same clusters with other states.
        Step::Zeroes { range: 0..16, give_back: true },
        Step::Commit,
        Step::Write(4..6),
        Step::Commit,
        Step::Discard(0..8),
        Step::Flush,
        Step::Write(8..9),
        Step::Commit,
        Step::Flush,
        Step::Write(group_end - 20..group_end + 43),
        Step::Commit,
        Step::Discard(group_end..group_end + 43),
        Step::Reopen,
        Step::Write(group_end + 1..group_end + 2),
        Step::Commit,
        Step::Discard(group_end - 8..group_end),
    ];
    let (mut rng, _context) = seeded(1);
    check(&script, &mut rng);
}

#[test]
fn at_every_call_of_random_histories() {
    for seed in seeds(0..6) {
        let (mut rng, _context) = seeded(seed);
        let history = history::random(&mut rng, &WATCHED, 30);
        check(&history, &mut rng);
    }
}

#[test]
fn many_deaths_in_a_row() {
    for seed in seeds(100..115) {
        let (mut rng, _context) = seeded(seed);
        let mut machine = Machine::new();
        machine.start().unwrap();
        for _ in 0..20 {
            machine = die_again(machine, &mut rng);
        }
    }
}

/// A sector's write through a batch of its own.
fn write(machine: &Machine, sector: u64, stamp: Stamp, batch: &mut Batch) {
    machine.volume().write(sector * SECTOR_BYTES, &[Readable::from_slice(&stamp.bytes())], batch).unwrap();
}

fn found_after_death(machine: &Machine, sector: u64) -> Option<Stamp> {
    let volume = machine.open(&machine.disk.after_process_death()).unwrap();
    let mut bytes = [0; SECTOR_BYTES as usize];
    volume.read(sector * SECTOR_BYTES, &[Writable::from_mut_slice(&mut bytes)]).unwrap();
    Stamp::of(&bytes)
}

#[test]
fn a_write_to_a_cluster_that_another_batch_marked_does_not_depend_on_that_batch() {
    let mut machine = Machine::new();
    machine.start().unwrap();
    let (mut first, mut second) = (Batch::default(), Batch::default());
    write(&machine, 0, Stamp::new(2, 0), &mut first);
    write(&machine, 1, Stamp::new(3, 1), &mut second);
    machine.volume().commit(&mut second).unwrap();
    assert_eq!(found_after_death(&machine, 1), Some(Stamp::new(3, 1)));
    machine.volume().commit(&mut first).unwrap();
    assert_eq!(found_after_death(&machine, 0), Some(Stamp::new(2, 0)));
}

#[test]
fn a_discard_that_overtakes_a_batch_stays() {
    let mut machine = Machine::new();
    machine.start().unwrap();
    let mut batch = Batch::default();
    write(&machine, 0, Stamp::new(2, 0), &mut batch);
    machine.volume().discard(0, 4096).unwrap();
    machine.volume().commit(&mut batch).unwrap();
    assert_eq!(found_after_death(&machine, 0), Some(Stamp::ZERO));
    assert_eq!(found_after_death(&machine, 1), Some(Stamp::ZERO));
}

/// Two threads write and commit batches of their own that meet in every cluster. At some time the process dies; whatever a
/// thread had committed by then is there.
#[test]
fn batches_of_two_threads_that_meet() {
    for round in 0..30 {
        let mut machine = Machine::new();
        machine.start().unwrap();
        machine.disk.plan(Plan { call: Call::Change(20 + 7 * round), done: Done::All, then: Then::Stop });
        let clusters = 0..10;
        let committed = std::thread::scope(|scope| {
            let volume = machine.volume();
            let threads = [0, 1].map(|thread| {
                let clusters = clusters.clone();
                scope.spawn(move || {
                    let (mut committed, mut batch) = (Vec::new(), Batch::default());
                    for write in 2.. {
                        let mut in_batch = Vec::new();
                        for cluster in clusters.clone().filter(|cluster| (cluster + write) % 3 != 0) {
                            let sector = cluster * 8 + thread;
                            let bytes = Stamp::new(write, sector).bytes();
                            let (offset, from) = (sector * SECTOR_BYTES, [Readable::from_slice(&bytes)]);
                            if volume.write(offset, &from, &mut batch).is_err() {
                                return committed;
                            }
                            in_batch.push((sector, write));
                        }
                        if volume.commit(&mut batch).is_err() {
                            return committed;
                        }
                        committed.extend(in_batch);
                    }
                    committed
                })
            });
            threads.map(|thread| thread.join().unwrap())
        });
        let last: std::collections::BTreeMap<u64, u64> = committed.into_iter().flatten().collect();
        for (sector, write) in last {
            let found = found_after_death(&machine, sector).expect("a sector is of one write").0 >> 32;
            // The write after the last committed one may have happened, and the one after that, as not every batch has all.
            assert!((write..=write + 2).contains(&found), "sector {sector}: {found}, committed {write}, round {round}");
        }
    }
}

/// Takes a copy of the disk behind every third call that changes something, with the number of requests that were complete.
#[derive(Clone, Default)]
struct Filmed {
    disk: Disk,
    completed: Arc<AtomicU64>,
    copies: Arc<Mutex<Vec<(u64, Disk)>>>,
}

impl Filmed {
    fn take(&self) {
        if self.disk.counts().changes().is_multiple_of(3) {
            let copy = (self.completed.load(Ordering::Relaxed), self.disk.after_process_death());
            self.copies.lock().unwrap().push(copy);
        }
    }
}

impl Storage for Filmed {
    fn read_at(&self, into: Writable<'_>, offset: u64) -> std::io::Result<()> {
        self.disk.read_at(into, offset)
    }

    fn write_at(&self, from: &[Readable<'_>], offset: u64) -> std::io::Result<()> {
        self.disk.write_at(from, offset)?;
        self.take();
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.disk.punch_hole(offset, len)?;
        self.take();
        Ok(())
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.disk.set_len(len)
    }

    fn sync(&self) -> std::io::Result<()> {
        self.disk.sync()?;
        self.take();
        Ok(())
    }
}

/// So many marks that the log is full: a flush turns it, and nothing is lost, whenever the process dies.
#[test]
fn a_full_log_turns() {
    const MARKS_PER_COMMIT: u64 = 4096;
    let film = Filmed { disk: Disk::without_power_loss(), ..Filmed::default() };
    let stretches = 2 * MARKS_PER_COMMIT / CLUSTERS_PER_STRETCH;
    let virtual_bytes = Some(stretches * CLUSTERS_PER_STRETCH * 4096);
    let header = NewDelta { base: None, virtual_bytes, cluster: ClusterSize::DEFAULT }.header().unwrap();
    delta::format(&film.disk, &header).unwrap();
    let open = |disk: Disk| Delta::start(disk, "disk".to_owned(), header.clone(), Lifetime::Persistent).unwrap();
    let delta = open(film.disk.clone());
    delta.load(0).unwrap();

    // Clusters are marked without being written, every other one so that none join, and made zero to be marked again.
    let entry_bytes = |marks: u64| 16 + 16 * marks;
    let mut room = LOG_HALF_BYTES;
    let mut marks = Marks::default();
    for _ in 0..LOG_HALF_BYTES / (entry_bytes(MARKS_PER_COMMIT) + stretches * entry_bytes(1)) {
        for stretch in 0..stretches {
            delta.zero(stretch * CLUSTERS_PER_STRETCH, CLUSTERS_PER_STRETCH, false).unwrap();
        }
        (0..MARKS_PER_COMMIT).for_each(|index| delta.mark(index * 2, &mut marks));
        delta.commit(&mut marks).unwrap();
        room -= entry_bytes(MARKS_PER_COMMIT) + stretches * entry_bytes(1);
    }
    while room > 5 * entry_bytes(1) {
        delta.zero(0, 1, false).unwrap();
        delta.mark(0, &mut marks);
        delta.commit(&mut marks).unwrap();
        room -= 2 * entry_bytes(1);
    }
    assert_eq!(film.disk.counts().syncs, 1, "the one of the creation: all of it fits");
    // The same session, taken over, now with the film running.
    drop(delta);
    let delta = Delta::start(film.clone(), "disk".to_owned(), header.clone(), Lifetime::Persistent).unwrap();
    let volume = Volume::cow(Base::empty(), delta);

    const WRITES: u64 = 6;
    let sector_of = |index: u64| index * 16 + 3;
    let bytes_of = |index: u64| Stamp::new(2, sector_of(index)).bytes();
    for index in 0..WRITES {
        let mut batch = Batch::default();
        volume.discard(index * 8192, 4096).unwrap();
        volume.write(sector_of(index) * SECTOR_BYTES, &[Readable::from_slice(&bytes_of(index))], &mut batch).unwrap();
        volume.commit(&mut batch).unwrap();
        film.completed.store(index + 1, Ordering::Relaxed);
    }
    assert!(film.disk.counts().syncs > 1, "the log was full");
    for (completed, disk) in film.copies.lock().unwrap().drain(..) {
        let volume = Volume::cow(Base::empty(), open(disk));
        for index in 0..completed {
            let mut bytes = [0; SECTOR_BYTES as usize];
            volume.read(sector_of(index) * SECTOR_BYTES, &[Writable::from_mut_slice(&mut bytes)]).unwrap();
            assert_eq!(bytes, bytes_of(index), "write {index} of {completed}");
        }
    }
}
