//! Power loss: what a completed flush covers is there, and every other sector is old or new.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use pando::block::delta::layout::{CLUSTERS_PER_GROUP, GROUPS_START, LOG_HALF_BYTES, LOG_START};
use pando::block::storage::Storage;
use pando::block::{Batch, Volume};
use pando::sys::buffers::{Readable, Writable};
use pando::units::SECTOR_BYTES;
use rand::RngExt;
use rand::rngs::StdRng;

use super::disk::{Call, Disk, Done, Loss, Plan, Then};
use super::history::{self, Context, Step, seeded, seeds};
use super::machine::{Machine, WATCHED, reboot};
use super::stamps::Stamp;

/// Runs the history with the power lost at each of its calls, and looks at what each kind of loss may leave. From some of the states
/// goes on for a while, to lose power once more.
fn check(history: &[Step], rng: &mut StdRng) {
    let new = Machine::new();
    for call in 0.. {
        let _context = Context(format!("power lost at call {call} of {history:?}"));
        let mut machine = new.fork(new.disk.after_process_death());
        machine.disk.plan(Plan { call: Call::Change(call), done: Done::All, then: Then::Stop });
        let result = machine.start().and_then(|()| machine.run(history));
        if !machine.disk.is_reached() {
            result.unwrap();
            break;
        }
        for loss in Loss::KINDS {
            let _context = Context(format!("loss {loss:?}"));
            let mut survivor = machine.after_power_loss(loss, rng);
            if rng.random_range(0..4) == 0 {
                go_on(&mut survivor, rng);
            }
        }
    }
}

/// Goes on after a power loss: a second one at a random call, then the death of the process.
fn go_on(machine: &mut Machine, rng: &mut StdRng) {
    let steps = history::random(rng, &WATCHED, 12);
    let _context = Context(format!("then {steps:?}"));
    let call = rng.random_range(0..40);
    machine.disk.plan(Plan { call: Call::Change(call), done: Done::All, then: Then::Stop });
    if let Err(error) = machine.run(&steps) {
        assert!(machine.disk.is_reached(), "{error}");
    }
    machine.after_process_death();
    machine.after_power_loss(Loss::SomeSectors, rng);
}

#[test]
fn at_every_call_of_a_script() {
    let group_end = CLUSTERS_PER_GROUP * 8;
    let script = [
        // Part of a cluster, then the rest of it, then a flush.
        Step::Write(3..5),
        Step::Commit,
        Step::Write(0..3),
        Step::Write(5..8),
        Step::Commit,
        Step::Flush,
        // Over again in place, and a new one beside it.
        Step::Write(2..12),
        Step::Commit,
        Step::Flush,
        // Gone, and part of it written again, with and without a flush between.
        Step::Discard(0..8),
        Step::Write(4..6),
        Step::Commit,
        Step::Flush,
        Step::Zeroes { range: 0..24, give_back: false },
        Step::Commit,
        Step::Flush,
        Step::Write(17..18),
        Step::Commit,
        // Two groups and the end of the base and of the volume.
        Step::Write(group_end - 20..group_end + 43),
        Step::Commit,
        Step::Discard(group_end - 8..group_end + 43),
        Step::Flush,
        Step::Write(group_end + 40..group_end + 41),
        Step::Commit,
        Step::Reopen,
        Step::Write(group_end + 2..group_end + 3),
        Step::Commit,
        Step::Flush,
    ];
    let (mut rng, _context) = seeded(1);
    check(&script, &mut rng);
}

#[test]
fn at_every_call_of_random_histories() {
    for seed in seeds(0..8) {
        let (mut rng, _context) = seeded(seed);
        let history = history::random(&mut rng, &WATCHED, 30);
        check(&history, &mut rng);
    }
}

/// A power loss may keep the log's later sectors without the first and without the session that says whose they are. A
/// later session that dies must not take them for its own: their data is lost.
#[test]
fn marks_of_a_lost_session_do_not_come_back() {
    let mut machine = Machine::new();
    machine.start().unwrap();
    // Each commit is an entry of 32 bytes, so that the first sector of the log holds 16.
    let commits = |clusters: std::ops::Range<u64>| -> Vec<Step> {
        clusters.flat_map(|cluster| [Step::Write(cluster * 8..cluster * 8 + 1), Step::Commit]).collect()
    };
    let (first, second) = (WATCHED[1].start / 8, WATCHED[2].start / 8);
    let all: Vec<Step> = [commits(0..10), commits(first..first + 12), commits(second..second + 6)].concat();
    let per_sector = 2 * 16;
    machine.run(&all[..per_sector + 2]).unwrap();
    let kept = machine.disk.after_power_loss_of(|sector, changes| {
        let offset = sector * SECTOR_BYTES;
        let is_first =
            (LOG_START..GROUPS_START).contains(&offset) && (offset - LOG_START).is_multiple_of(LOG_HALF_BYTES);
        if (LOG_START..GROUPS_START).contains(&offset) && !is_first { changes.len().checked_sub(1) } else { None }
    });
    let mut machine = machine.after_power_loss_with(kept);
    // As many entries as the lost sector held, and then the process dies.
    machine.run(&all[..per_sector]).unwrap();
    machine.after_process_death();
}

/// Reads of one place in the file wait until they are let through.
#[derive(Clone)]
struct Gated {
    disk: Disk,
    offset: u64,
    /// Whether somebody waits, and whether the gate is open.
    gate: Arc<(Mutex<(bool, bool)>, Condvar)>,
}

impl Storage for Gated {
    fn read_at(&self, into: Writable<'_>, offset: u64) -> std::io::Result<()> {
        if offset == self.offset {
            let (state, changed) = &*self.gate;
            let mut state = state.lock().unwrap();
            state.0 = true;
            changed.notify_all();
            drop(changed.wait_while(state, |state| !state.1).unwrap());
        }
        self.disk.read_at(into, offset)
    }

    fn write_at(&self, from: &[Readable<'_>], offset: u64) -> std::io::Result<()> {
        self.disk.write_at(from, offset)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.disk.punch_hole(offset, len)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.disk.set_len(len)
    }

    fn sync(&self) -> std::io::Result<()> {
        self.disk.sync()
    }
}

/// Two threads make their first marks in one group. Whichever of them flushes first must not lose its mark because the
/// other had not yet come to say that the group has any: it waits, for the loading of another group is exclusive with that.
#[test]
fn a_flush_covers_marks_beside_those_of_another_thread() {
    for round in 0..60 {
        let machine = Machine::new();
        let gate = Arc::new((Mutex::new((false, false)), Condvar::new()));
        let storage = Gated { disk: machine.disk.clone(), offset: machine.layout().map_block(1), gate: gate.clone() };
        let volume: Volume<Gated> = machine.open(&storage).unwrap();
        let read = |sector: u64| volume.read(sector * SECTOR_BYTES, &[Writable::from_mut_slice(&mut [0; 512])]);
        // So that the group of the two is loaded.
        read(0).unwrap();
        let write = |sector: u64| {
            let bytes = Stamp::new(2, sector).bytes();
            let mut batch = Batch::default();
            volume.write(sector * SECTOR_BYTES, &[Readable::from_slice(&bytes)], &mut batch).unwrap();
            volume.commit(&mut batch).unwrap();
        };
        let (state, changed) = &*gate;
        let (first, second) = (WATCHED[0].start, WATCHED[1].start);
        let left = std::thread::scope(|scope| {
            scope.spawn(|| read(WATCHED[2].end - 1).unwrap());
            drop(changed.wait_while(state.lock().unwrap(), |state| !state.0).unwrap());
            scope.spawn(|| write(first));
            // Time to come to where it waits.
            std::thread::sleep(Duration::from_millis(2));
            let flusher = scope.spawn(|| {
                write(second);
                drop(changed.wait_while(state.lock().unwrap(), |state| !state.1).unwrap());
                let arrival = Instant::now() + Duration::from_micros(10 * round);
                while Instant::now() < arrival {}
                volume.flush().unwrap();
                machine.disk.after_power_loss_of(|_, _| None)
            });
            std::thread::sleep(Duration::from_millis(2));
            state.lock().unwrap().1 = true;
            changed.notify_all();
            flusher.join().unwrap()
        });
        reboot(&left);
        let mut bytes = [0; SECTOR_BYTES as usize];
        let volume = machine.open(&left).unwrap();
        volume.read(second * SECTOR_BYTES, &[Writable::from_mut_slice(&mut bytes)]).unwrap();
        assert_eq!(Stamp::of(&bytes), Some(Stamp::new(2, second)), "it was flushed, in round {round}");
    }
}
