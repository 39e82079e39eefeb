//! Opening: what is refused and how it says so, one writer, the same few calls for any size, and damage that stays where it is.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use pando::block::base::Base;
use pando::block::delta::header::{BaseIdentity, HEADER_AT, Header, Phase, SESSION_AT, Session};
use pando::block::delta::layout::{CLUSTERS_PER_GROUP, GROUPS_START, LOG_HALF_BYTES, LOG_START};
use pando::block::delta::open::{self, NewDelta, OpenError};
use pando::block::delta::{self, Delta, Lifetime, MapFault};
use pando::block::storage::{FileStorage, Storage};
use pando::block::{Batch, Error, Volume};
use pando::digest::Digest;
use pando::sys::buffers::{Readable, Writable};
use pando::sys::process;
use pando::units::ClusterSize;
use rand::Rng;

use super::disk::{Counts, Disk};
use super::history::{Step, seeded};
use super::machine::{Machine, WATCHED};

fn blank(virtual_bytes: u64) -> NewDelta {
    NewDelta { base: None, virtual_bytes: Some(virtual_bytes), cluster: ClusterSize::DEFAULT }
}

fn identity(byte: u8, bytes: u64) -> BaseIdentity {
    BaseIdentity { digest: Digest([byte; 32]), bytes }
}

/// An error with all its causes, as a person sees it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

#[test]
fn another_base_is_refused_with_both_digests() {
    let over = |base| NewDelta { base, ..blank(1 << 30) }.header().unwrap();
    let refused = |header: &Header, base, bytes| open::check_matches(header, "vm.delta", base, bytes).unwrap_err();

    let header = over(Some(identity(0xaa, 1 << 20)));
    open::check_matches(&header, "vm.delta", Some(identity(0xaa, 1 << 20)), Some(1 << 30)).unwrap();
    let message = chain(&refused(&header, Some(identity(0xbb, 1 << 20)), None));
    for part in ["vm.delta", &"aa".repeat(32), &"bb".repeat(32)] {
        assert!(message.contains(part), "{part} in: {message}");
    }
    assert!(matches!(refused(&header, Some(identity(0xaa, 2 << 20)), None), OpenError::OtherBase { .. }), "its size");
    let needs_base = refused(&header, None, None);
    assert!(matches!(needs_base, OpenError::NeedsBase { .. }));
    assert!(chain(&needs_base).contains(&"aa".repeat(32)));
    let other_size = refused(&header, Some(identity(0xaa, 1 << 20)), Some(2 << 30));
    assert!(matches!(other_size, OpenError::OtherSize { expected: 0x4000_0000, found: 0x8000_0000, .. }));

    let header = over(None);
    open::check_matches(&header, "vm.delta", None, None).unwrap();
    assert!(matches!(refused(&header, Some(identity(0xaa, 1 << 20)), None), OpenError::NeedsBlank { .. }));
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    for bytes in [0, 1, 513, u64::MAX, u64::MAX - 511, 1 << 60] {
        assert!(matches!(blank(bytes).header(), Err(OpenError::Size { .. })), "{bytes}");
    }
    let smaller = NewDelta { base: Some(identity(1, 1 << 20)), ..blank(512) };
    assert!(matches!(smaller.header(), Err(OpenError::SmallerThanBase { bytes: 512, base_bytes: 0x10_0000 })));
}

/// What opening the file at `path` says, after `damage` was done to it.
fn message_after(path: &Path, damage: impl Fn(&File)) -> String {
    let original = fs::read(path).unwrap();
    damage(&File::options().write(true).open(path).unwrap());
    let error = open::open_locked(path).expect_err("it is damaged");
    fs::write(path, original).unwrap();
    chain(&error)
}

#[test]
fn what_is_no_delta_or_a_later_one_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.delta");
    open::create(&path, &blank(1 << 20)).unwrap();
    let put = |at: u64, bytes: &'static [u8]| move |file: &File| file.write_all_at(bytes, HEADER_AT + at).unwrap();
    for (damage, expected) in [
        (&put(0, b"QFI\xfb") as &dyn Fn(&File), "not a Pando delta"),
        (&put(8, &[9]), "format version 9"),
        (&put(40, &[9]), "header is corrupt: checksum"),
        (&|file: &File| file.set_len(0).unwrap(), "not a Pando delta"),
        (&|file: &File| file.set_len(60).unwrap(), "header is corrupt: checksum"),
    ] {
        let message = message_after(&path, damage);
        assert!(message.contains(expected) && message.contains("vm.delta"), "{expected} in: {message}");
    }
    // A feature of a later version, in a header that is sound.
    let message = message_after(&path, |file| {
        let mut header = [0; 512];
        header[..104].copy_from_slice(&fs::read(&path).unwrap()[..104]);
        header[16] = 4;
        let checksum = crc32c::crc32c(&header[..104]);
        header[104..108].copy_from_slice(&checksum.to_le_bytes());
        file.write_all_at(&header, HEADER_AT).unwrap();
    });
    assert!(message.contains("features that this program does not know (bits 0x4)"), "{message}");

    let missing = directory.path().join("missing");
    assert!(chain(&open::open_locked(&missing).unwrap_err()).contains("missing"));
    assert!(open::create(&path, &blank(1 << 20)).is_err(), "there is one already");
    open::open_locked(&path).unwrap();
}

#[test]
fn a_session_that_cannot_be_is_refused() {
    let header = blank(1 << 20).header().unwrap();
    let start = |sector: &[u8]| {
        let disk = Disk::default();
        delta::format(&disk, &header).unwrap();
        disk.overwrite(SESSION_AT, sector);
        Delta::start(disk, "disk".to_owned(), header.clone(), Lifetime::Persistent).map(|_| ())
    };
    let boot = process::boot_id().unwrap();
    let session = |phase, generation| Session { phase, boot, generation }.encode();
    start(&session(Phase::Closed, 1 << 40)).unwrap();
    let mut changed = session(Phase::Closed, 1);
    changed[20] ^= 1;
    for sector in [[0; 512], [0xff; 512], changed, session(Phase::Closed, u64::MAX), session(Phase::Open, u64::MAX)] {
        assert!(matches!(start(&sector), Err(OpenError::Header { .. })), "{:?}", &sector[..40]);
    }
}

#[test]
fn a_second_opener_is_told_who_holds_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.delta");
    open::create(&path, &blank(1 << 20)).unwrap();
    let held = open::open_locked(&path).unwrap();
    let error = open::open_locked(&path).unwrap_err();
    let message = chain(&error);
    assert!(matches!(error, OpenError::Locked { .. }), "{message}");
    assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
    open::open_to_look(&path).unwrap();
    drop(held);
    open::open_locked(&path).unwrap();
}

#[test]
fn a_lock_that_was_taken_for_somebody_who_goes_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.delta");
    open::create(&path, &blank(1 << 20)).unwrap();
    // As by a daemon that took it, and gave it to a backend that has died and is not quite gone.
    let held = open::open_locked(&path).unwrap();
    let goes = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(200));
        drop(held);
    });
    open::open_locked(&path).unwrap();
    goes.join().unwrap();
}

/// What creating and opening a delta of this size, and a request at its end, asks of the storage.
fn calls_for(virtual_bytes: u64) -> Counts {
    let disk = Disk::default();
    let header = blank(virtual_bytes).header().unwrap();
    delta::format(&disk, &header).unwrap();
    let delta = Delta::start(disk.clone(), "disk".to_owned(), header, Lifetime::Persistent).unwrap();
    let volume = Volume::cow(Base::empty(), delta);
    write_and_read(&volume, virtual_bytes - 512);
    volume.close().unwrap();
    disk.counts()
}

fn write_and_read(volume: &Volume<impl Storage>, offset: u64) {
    let mut batch = Batch::default();
    volume.write(offset, &[Readable::from_slice(&[7; 512])], &mut batch).unwrap();
    volume.commit(&mut batch).unwrap();
    let mut bytes = [0; 512];
    volume.read(offset, &[Writable::from_mut_slice(&mut bytes)]).unwrap();
    assert_eq!(bytes, [7; 512]);
}

#[test]
fn a_size_costs_nothing() {
    assert_eq!(calls_for(64 << 40), calls_for(1 << 30));
    // On a file system that has files this long.
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let path = directory.path().join("vm.delta");
    match open::create(&path, &blank(64 << 40)) {
        Err(error @ OpenError::TooLargeForFileSystem { .. }) => {
            assert!(chain(&error).contains("64 TiB"), "{}", chain(&error));
            assert!(!path.exists(), "nothing is left behind");
        }
        created => {
            created.unwrap();
            let (file, header) = open::open_locked(&path).unwrap();
            let storage = FileStorage::new(file).unwrap();
            let delta = Delta::start(storage, "delta".to_owned(), header, Lifetime::Persistent).unwrap();
            write_and_read(&Volume::cow(Base::empty(), delta), (64 << 40) - 512);
        }
    }
}

/// A machine that holds clusters in both groups, closed.
fn closed_machine() -> Machine {
    let mut machine = Machine::new();
    machine.start().unwrap();
    let steps = WATCHED.map(|range| Step::Write(range.start..range.start + 3));
    machine.run(&steps).unwrap();
    machine.run(&[Step::Write(WATCHED[2].end - 5..WATCHED[2].end - 1), Step::Commit, Step::Reopen]).unwrap();
    machine
}

#[test]
fn a_corrupt_map_sector_fails_requests_of_its_group_only() {
    let closed = closed_machine();
    let layout = closed.layout();
    let [first, second] = [layout.map_block(0), layout.map_block(1)];
    let sector_at = |offset| {
        let mut sector = [0; 512];
        closed.disk.peek(offset, &mut sector);
        sector
    };
    // A sector with a checksum that fits whatever else it has.
    let sealed = |mut sector: [u8; 512]| {
        let checksum = crc32c::crc32c(&sector[4..]);
        sector[..4].copy_from_slice(&checksum.to_le_bytes());
        sector
    };
    let mut changed = sector_at(first);
    changed[100] ^= 0x10;
    let mut of_no_state = sector_at(first);
    of_no_state[8 + 5] |= 0b1100;
    type IsFault = fn(MapFault) -> bool;
    let damages: [([u8; 512], IsFault); 3] = [
        (changed, |fault| matches!(fault, MapFault::Checksum { .. })),
        (sector_at(second), |fault| matches!(fault, MapFault::Place { expected: 0, found: 8 })),
        (sealed(of_no_state), |fault| matches!(fault, MapFault::State { cluster: 21 })),
    ];
    for (sector, is_fault) in damages {
        let disk = closed.disk.after_process_death();
        disk.overwrite(first, &sector);
        let volume = closed.open(&disk).unwrap();
        let mut batch = Batch::default();
        let is_corrupt = |result: Result<(), Error>| match result {
            Err(Error::Corrupt { offset, fault, .. }) => offset == first && is_fault(fault),
            _ => false,
        };
        for offset in [0, 50 << 20] {
            let mut bytes = [1; 512];
            assert!(is_corrupt(volume.read(offset, &[Writable::from_mut_slice(&mut bytes)])));
            assert!(is_corrupt(volume.write(offset, &[Readable::from_slice(&bytes)], &mut batch)));
            assert!(is_corrupt(volume.write_zeroes(offset, 512, true, &mut batch)));
            assert!(is_corrupt(volume.discard(offset, 8192)));
        }
        write_and_read(&volume, CLUSTERS_PER_GROUP * 4096);
        volume.commit(&mut batch).unwrap();
        volume.close().unwrap();
        let mut left = [0; 512];
        disk.peek(first, &mut left);
        assert_eq!(left, sector, "nobody made it worse");
    }

    // The second group has clusters past the end of the volume.
    let mut past_end = sector_at(second);
    past_end[8 + 100] = 1;
    let disk = closed.disk.after_process_death();
    disk.overwrite(second, &sealed(past_end));
    let volume = closed.open(&disk).unwrap();
    write_and_read(&volume, 0);
    let result = volume.discard(CLUSTERS_PER_GROUP * 4096, 4096);
    assert!(matches!(result, Err(Error::Corrupt { fault: MapFault::PastEnd { .. }, .. })), "{result:?}");
}

/// An entry of the mark log with a checksum that fits.
fn entry(count: u32, generation: u64, marks: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = [&[0; 4], &count.to_le_bytes()[..], &generation.to_le_bytes()].concat();
    bytes.extend(marks.iter().flat_map(|(first, count)| [first.to_le_bytes(), count.to_le_bytes()].concat()));
    let checksum = crc32c::crc32c(&bytes[4..]);
    bytes[..4].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

#[test]
fn a_log_that_cannot_be_is_ignored() {
    let closed = closed_machine();
    let (mut rng, _context) = seeded(1);
    let mut noise = vec![0; 100_000];
    rng.fill_bytes(&mut noise);
    let clusters = closed.layout().cluster_count();
    let boot = process::boot_id().unwrap();
    let generation = 4;
    let mut changed = entry(1, generation, &[(2, 1)]);
    changed[16] ^= 1;
    let logs = [
        noise,
        vec![0xff; 100_000],
        entry(u32::MAX, generation, &[(0, 1)]),
        entry(2, generation, &[(0, 1)]),
        entry(0, generation, &[]),
        entry(1, generation, &[(2, u64::MAX)]),
        entry(1, generation, &[(clusters, 1)]),
        entry(1, generation, &[(clusters - 1, 2)]),
        entry(1, generation, &[(u64::MAX >> 1, 1)]),
        entry(1, generation, &[(u64::MAX, 0)]),
        entry(1, generation, &[(2, 257)]),
        changed,
        entry(1, generation - 1, &[(2, 1)]),
        entry(1, generation + 1, &[(2, 1)]),
        entry(1, u64::MAX - 1, &[(2, 1)]),
        // The first is sound and says nothing new; what is behind it is of another generation.
        [entry(1, generation, &[(0, 1)]), entry(1, generation + 2, &[(2, 1)])].concat(),
    ];
    for (index, log) in logs.into_iter().enumerate() {
        for (phase, boot) in [(Phase::Open, boot), (Phase::Open, [1; 16]), (Phase::Closed, boot)] {
            let machine = closed.fork(closed.disk.after_process_death());
            machine.disk.overwrite(SESSION_AT, &Session { phase, boot, generation }.encode());
            machine.disk.overwrite(LOG_START, &log);
            // The half of odd generations is empty, and ends with something.
            machine.disk.overwrite(LOG_START + LOG_HALF_BYTES, &[0; 64]);
            machine.disk.overwrite(GROUPS_START - 64, &log[..log.len().min(64)]);
            let mut machine = machine.after_process_death();
            machine.run(&[Step::Write(20..22), Step::Commit]).unwrap_or_else(|error| panic!("{index}: {error}"));
            let mut machine = machine.after_process_death();
            machine.run(&[Step::Flush, Step::Write(27..28), Step::Commit, Step::Flush, Step::Reopen]).unwrap();
        }
    }
    // And one that counts, so that what is above was not ignored for another reason.
    let disk = closed.disk.after_process_death();
    disk.overwrite(SESSION_AT, &Session { phase: Phase::Open, boot, generation }.encode());
    disk.overwrite(LOG_START, &entry(1, generation, &[(2, 1)]));
    let mut bytes = [1; 512];
    closed.open(&disk).unwrap().read(8192, &[Writable::from_mut_slice(&mut bytes)]).unwrap();
    assert_eq!(bytes, [0; 512], "a cluster that the log puts in the delta, where it is a hole");
}
