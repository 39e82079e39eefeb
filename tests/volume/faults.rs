//! Faults: a storage call that fails is an error of its request, and nothing else is lost by it.

use pando::block::base::Base;
use pando::block::delta::open::NewDelta;
use pando::block::delta::{self, Delta, Latch, Lifetime};
use pando::block::{Batch, Error, Volume};
use pando::sys::buffers::Readable;
use pando::sys::shared::{self, SharedNumbers};
use pando::units::ClusterSize;
use rand::rngs::StdRng;

use super::disk::{Call, Disk, Done, Loss, Plan, Then};
use super::history::{self, Context, Step, seeded, seeds};
use super::machine::{Machine, WATCHED};

const EIO: i32 = 5;
const EFBIG: i32 = 27;
const ENOSPC: i32 = 28;

/// Goes through the history whatever fails.
fn run(machine: &mut Machine, history: &[Step]) {
    let mut is_latched = false;
    for step in history {
        // Opening may have failed; this is the next try.
        if machine.volume.is_none() {
            machine.start().unwrap();
        }
        let result = machine.step(step);
        if is_latched && matches!(step, Step::Write(_) | Step::Flush) {
            let error = result.as_ref().expect_err("a sync has failed").downcast_ref::<Error>();
            assert!(matches!(error, Some(Error::Latched { .. })), "{step:?} is refused: {error:?}");
        }
        let Err(error) = result else { continue };
        match error.downcast_ref::<Error>() {
            Some(Error::Latched { .. }) => assert!(is_latched),
            // A map that finds no room is written by the next flush; whatever else goes wrong in one is not known to be safe.
            Some(error @ Error::Io { action, .. }) => {
                is_latched |= matches!(step, Step::Flush) && !(error.is_full() && action.contains("map"));
            }
            _ => assert!(matches!(step, Step::Reopen | Step::Kill | Step::HandOver), "{step:?}: {error}"),
        }
        if matches!(step, Step::Reopen | Step::Kill | Step::HandOver) {
            *machine = machine.after_process_death();
            is_latched = false;
        }
    }
}

/// Lets each call of the history fail, one at a time.
fn check(history: &[Step], call: fn(u64) -> Call, rng: &mut StdRng) {
    let new = Machine::new();
    let codes = [(EIO, Done::Nothing), (ENOSPC, Done::FirstHalf), (EFBIG, Done::Nothing)];
    for (number, (code, done)) in (0..).flat_map(|number| codes.map(|how| (number, how))) {
        let call = call(number);
        let _context = Context(format!("{call:?} failing with {code}, done {done:?}, in {history:?}"));
        let mut machine = new.fork(new.disk.after_process_death());
        let disk = machine.disk.clone();
        disk.plan(Plan { call, done, then: Then::Fail(code) });
        if machine.start().is_err() {
            assert!(disk.is_reached());
        }
        run(&mut machine, history);
        if !disk.is_reached() {
            break;
        }
        if machine.volume.is_some() {
            machine.check_running().unwrap();
        }
        // The next process goes on, whatever this one came to.
        let mut survivor = machine.after_process_death();
        survivor.run(&[Step::Write(0..9), Step::Commit, Step::Flush]).unwrap();
        survivor.after_power_loss(Loss::All, rng);
        machine.after_power_loss(Loss::All, rng);
        machine.after_power_loss(Loss::SomeSectors, rng);
    }
}

fn script() -> [Step; 17] {
    [
        Step::Write(3..5),
        Step::Write(WATCHED[2].end - 30..WATCHED[2].end - 1),
        Step::Commit,
        Step::Flush,
        Step::Write(4..20),
        Step::Commit,
        Step::Discard(0..16),
        Step::Flush,
        Step::Write(1..2),
        Step::Commit,
        Step::Flush,
        Step::Zeroes { range: 0..24, give_back: true },
        Step::Commit,
        Step::Reopen,
        Step::Write(9..12),
        Step::Commit,
        Step::Flush,
    ]
}

#[test]
fn of_every_change_of_a_script() {
    let (mut rng, _context) = seeded(1);
    check(&script(), Call::Change, &mut rng);
}

#[test]
fn of_every_read_of_a_script() {
    let (mut rng, _context) = seeded(1);
    check(&script(), Call::Read, &mut rng);
}

#[test]
fn of_every_change_of_random_histories() {
    for seed in seeds(0..4) {
        let (mut rng, _context) = seeded(seed);
        let history = history::random(&mut rng, &WATCHED, 30);
        check(&history, Call::Change, &mut rng);
    }
}

#[test]
fn a_failed_sync_latches() {
    for sync in 0..2 {
        let mut machine = Machine::new();
        machine.start().unwrap();
        machine.run(&[Step::Write(0..1), Step::Commit]).unwrap();
        // The flush: a sync, one sector of the map, a sync.
        machine.disk.plan(Plan { call: Call::Change(2 * sync), done: Done::Nothing, then: Then::Fail(EIO) });
        let volume = machine.volume();
        let message = volume.flush().unwrap_err();
        assert!(matches!(message, Error::Io { action: "sync", .. }), "{message}");
        let is_latched = |result: Result<(), Error>| matches!(result, Err(Error::Latched { .. }));
        let mut batch = Batch::default();
        for _ in 0..2 {
            assert!(is_latched(volume.flush()));
            assert!(is_latched(volume.write(0, &[Readable::from_slice(&[1; 512])], &mut batch)));
            assert!(is_latched(volume.write_zeroes(0, 8192, true, &mut batch)));
            assert!(is_latched(volume.discard(8192, 8192)));
            assert!(is_latched(volume.close()));
        }
        machine.check_running().unwrap();
        machine.after_process_death().step(&Step::Flush).unwrap();
    }
}

/// Only the space is not given back; the contents are zero all the same.
#[test]
fn a_hole_that_cannot_be_punched_is_no_error() {
    let mut machine = Machine::new();
    machine.start().unwrap();
    machine.run(&[Step::Write(0..8), Step::Commit]).unwrap();
    // The mark of the discard, then the hole.
    machine.disk.plan(Plan { call: Call::Change(1), done: Done::Nothing, then: Then::Fail(EIO) });
    machine.step(&Step::Discard(0..8)).unwrap();
    assert!(machine.disk.is_reached() && machine.disk.counts().punches == 1);
    machine.check_running().unwrap();
    machine.after_process_death();
}

/// The next worker of the same backend goes on with the page cache, which has forgotten what it lost.
#[test]
fn a_failed_sync_latches_the_next_process_too() {
    let numbers = shared::create(c"numbers", 4096).unwrap();
    let latch = || Latch::shared(SharedNumbers::map(&numbers, 2).unwrap(), 1);
    let header = NewDelta { base: None, virtual_bytes: Some(1 << 20), cluster: ClusterSize::DEFAULT }.header().unwrap();
    let disk = Disk::default();
    delta::format(&disk, &header).unwrap();
    let open = || {
        let delta = Delta::start(disk.clone(), "disk".to_owned(), header.clone(), Lifetime::Persistent).unwrap();
        Volume::cow(Base::empty(), delta.latching_in(latch()))
    };
    let write = |volume: &Volume<Disk>| {
        let mut batch = Batch::default();
        volume.write(0, &[Readable::from_slice(&[1; 512])], &mut batch)?;
        volume.commit(&mut batch)
    };
    let volume = open();
    write(&volume).unwrap();
    volume.flush().unwrap();
    drop(volume);
    let volume = open();
    write(&volume).unwrap();
    disk.plan(Plan { call: Call::Change(0), done: Done::Nothing, then: Then::Fail(EIO) });
    assert!(matches!(volume.flush(), Err(Error::Io { .. })));
    drop(volume);
    let volume = open();
    let is_latched = |result: Result<(), Error>| matches!(result, Err(Error::Latched { .. }));
    assert!(is_latched(volume.flush()) && is_latched(write(&volume)) && is_latched(volume.close()));
}
