//! Overlap: requests that come in the middle of a flush, and a power loss or the death of the process behind them; and writes that come in
//! the middle of another.

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pando::block::delta::layout::{LOG_HALF_BYTES, LOG_START};
use pando::block::storage::Storage;
use pando::block::{Batch, Error, Volume};
use pando::sys::buffers::{Readable, Writable};
use pando::units::SECTOR_BYTES;

use super::disk::{Call, Disk, Done, Loss, Plan, Then};
use super::history::{Step, seeded};
use super::machine::{Machine, WATCHED};
use super::stamps::Stamp;

/// A disk whose next sync, once its work is done, waits for somebody to act before it returns; or whose next write does before it begins.
#[derive(Clone)]
struct Paused {
    disk: Disk,
    /// Where the sync says that it is done, and what it waits for.
    pause: Arc<Mutex<Option<Pause>>>,
    /// The same of the write that is to begin.
    write_pause: Arc<Mutex<Option<Pause>>>,
}

type Pause = (Sender<()>, Receiver<()>);

impl Paused {
    fn new(disk: &Disk) -> Paused {
        Paused { disk: disk.clone(), pause: Arc::default(), write_pause: Arc::default() }
    }

    /// Writes, and acts when the first write to the disk of that has all that it is going to write. What it acts with is waited for, for a
    /// while: it may have to wait for the write.
    fn write_during(&self, write: impl FnOnce() + Send, act: impl FnOnce() + Send) {
        let (begun, has_begun) = channel();
        let (acted, has_acted) = channel();
        *self.write_pause.lock().unwrap() = Some((begun, has_acted));
        std::thread::scope(|scope| {
            scope.spawn(write);
            has_begun.recv().unwrap();
            let (done, is_done) = channel::<()>();
            scope.spawn(move || {
                let _done = done;
                act();
            });
            let _ = is_done.recv_timeout(Duration::from_millis(100));
            drop(acted);
        });
    }

    /// Flushes, and acts when the first sync of that is done.
    fn flush_during(&self, volume: &Volume<Paused>, act: impl FnOnce()) -> Result<(), Error> {
        let (synced, is_synced) = channel();
        let (acted, has_acted) = channel();
        *self.pause.lock().unwrap() = Some((synced, has_acted));
        std::thread::scope(|scope| {
            let flush = scope.spawn(|| volume.flush());
            is_synced.recv().unwrap();
            act();
            drop(acted);
            flush.join().unwrap()
        })
    }
}

impl Storage for Paused {
    fn read_at(&self, into: Writable<'_>, offset: u64) -> std::io::Result<()> {
        self.disk.read_at(into, offset)
    }

    fn write_at(&self, from: &[Readable<'_>], offset: u64) -> std::io::Result<()> {
        let pause = self.write_pause.lock().unwrap().take();
        if let Some((begun, has_acted)) = pause {
            begun.send(()).unwrap();
            has_acted.recv().unwrap_err();
        }
        self.disk.write_at(from, offset)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.disk.punch_hole(offset, len)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.disk.set_len(len)
    }

    fn sync(&self) -> std::io::Result<()> {
        let result = self.disk.sync();
        if let Some((synced, has_acted)) = self.pause.lock().unwrap().take() {
            synced.send(()).unwrap();
            // An error once the other end is gone, which is the word.
            has_acted.recv().unwrap_err();
        }
        result
    }
}

/// Writes to a sector and commits that.
fn write(machine: &mut Machine, volume: &Volume<Paused>, sector: u64) {
    let stamp = Stamp::new(2, sector);
    let mut batch = Batch::default();
    machine.expected.begin(sector, stamp);
    volume.write(sector * SECTOR_BYTES, &[Readable::from_slice(&stamp.bytes())], &mut batch).unwrap();
    volume.commit(&mut batch).unwrap();
    machine.expected.complete(sector, stamp);
}

/// ubicloud#3972: what a write left of a part of the disk was filled up from the image more than once, and a fill that came late overwrote
/// what had been written there since. Here one write has read what it fills a cluster up with, and others write to that cluster.
#[test]
fn ubicloud_3972_a_late_fill_overwrites_no_newer_write() {
    let machine = Machine::new();
    let storage = Paused::new(&machine.disk);
    let volume = machine.open(&storage).unwrap();
    let put = |sectors: Range<u64>, write: u64| {
        let bytes: Vec<u8> = sectors.clone().flat_map(|sector| Stamp::new(write, sector).bytes()).collect();
        let mut batch = Batch::default();
        volume.write(sectors.start * SECTOR_BYTES, &[Readable::from_slice(&bytes)], &mut batch).unwrap();
        volume.commit(&mut batch).unwrap();
    };
    // In the first cluster of a pair: next to it, behind it, all but it, into the next cluster, into it and from within it.
    for (number, other) in [4..5, 7..8, 4..8, 5..16, 0..3].into_iter().enumerate() {
        let first = 16 * number as u64;
        let (one, other) = (first + 3..first + 4, first + other.start..first + other.end);
        storage.write_during(|| put(one.clone(), 2), || put(other.clone(), 3));
        for sector in first..first + 16 {
            let mut found = [0; SECTOR_BYTES as usize];
            volume.read(sector * SECTOR_BYTES, &[Writable::from_mut_slice(&mut found)]).unwrap();
            let write = if one.contains(&sector) {
                2
            } else if other.contains(&sector) {
                3
            } else {
                Stamp::BASE
            };
            assert_eq!(
                Stamp::of(&found),
                Some(Stamp::new(write, sector)),
                "sector {sector}, the other write {other:?}"
            );
        }
    }
}

/// A flush makes durable the marks of the data that it has synced, and not of data that came to lie beside them since.
#[test]
fn a_flush_marks_no_data_that_it_has_not_synced() {
    let (mut rng, _context) = seeded(1);
    let new = Machine::new();
    // The flush: a sync, then data and its mark in the log of somebody else, then a sector of the map, and a sync.
    for (call, done) in [(3, Done::All), (4, Done::Nothing), (5, Done::Nothing)] {
        let mut machine = new.fork(new.disk.after_process_death());
        let storage = Paused::new(&machine.disk);
        let volume = machine.open(&storage).unwrap();
        write(&mut machine, &volume, 1);
        storage.disk.plan(Plan { call: Call::Change(call), done, then: Then::Stop });
        let result = storage.flush_during(&volume, || write(&mut machine, &volume, 12));
        assert_eq!(result.is_err(), storage.disk.is_reached());
        // What came meanwhile may be durable or not; it counts as written since.
        if result.is_ok() {
            machine.expected.flushed_except(12);
        }
        for loss in Loss::KINDS.into_iter().cycle().take(60) {
            machine.after_power_loss(loss, &mut rng);
        }
    }
}

/// Processes that die in a flush, one after another, while others fill the log's other half: the half that the flush has turned
/// from counts until the flush is done, in the next process too.
#[test]
fn deaths_in_flushes_lose_no_half_of_the_log() {
    let mut machine = Machine::new();
    for cluster in 0..6 {
        let storage = Paused::new(&machine.disk);
        let volume = machine.open(&storage).unwrap();
        write(&mut machine, &volume, cluster * 8);
        // The sync, data, its mark in the log, and death.
        storage.disk.plan(Plan { call: Call::Change(3), done: Done::Nothing, then: Then::Stop });
        let sector = WATCHED[1].start + cluster * 8;
        storage.flush_during(&volume, || write(&mut machine, &volume, sector)).unwrap_err();
        drop(volume);
        machine = machine.after_process_death();
        machine.volume = None;
    }
    machine.start().unwrap();
    machine.step(&Step::Flush).unwrap();
    machine.after_power_loss(Loss::All, &mut seeded(1).0);
}

#[test]
fn the_log_is_used_again() {
    let mut machine = Machine::new();
    machine.start().unwrap();
    for _ in 0..40 {
        machine.run(&[Step::Write(0..1), Step::Commit, Step::Flush, Step::Discard(0..8), Step::Flush]).unwrap();
    }
    for half in [LOG_START, LOG_START + LOG_HALF_BYTES] {
        let mut bytes = [1; 4096];
        machine.disk.peek(half, &mut bytes);
        assert!(bytes[..32].iter().any(|byte| *byte != 0), "the half is in use");
        assert!(bytes[32..].iter().all(|byte| *byte == 0), "and from its start each time");
    }
}
