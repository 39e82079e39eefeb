//! A delta that a guest has written to, damaged in a few places, and repaired: what could be read before is read after, whatever it is; what was
//! repaired opens and is found whole, or a reason is given and stays the same; and nothing panics.
#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::LazyLock;

use fuzz_targets::{Choices, unnamed_file};
use libfuzzer_sys::fuzz_target;
use pando::block::base::Base;
use pando::block::delta::check::{Report, Severity};
use pando::block::delta::header::{BaseIdentity, HEADER_AT, Header, SESSION_AT};
use pando::block::delta::layout::{LOG_HALF_BYTES, LOG_START, Layout, MAP_SECTORS_PER_GROUP};
use pando::block::delta::{self, Delta, Lifetime, check, open, repair};
use pando::block::storage::FileStorage;
use pando::block::{Batch, Volume};
use pando::digest::Digest;
use pando::sys::buffers::{Readable, Writable};
use pando::sys::file;
use pando::units::ClusterSize;

const SECTOR: u64 = 512;
/// The volume ends within a cluster, and the base within the volume.
const VOLUME_BYTES: u64 = (300 << 10) + SECTOR;
const BASE_BYTES: u64 = 100 << 10;

static BASE: LazyLock<File> = LazyLock::new(|| {
    let base = unnamed_file();
    file::write_at(&base, &[Readable::from_slice(&[0xba; BASE_BYTES as usize])], 0).unwrap();
    base
});

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    let delta = unnamed_file();
    let cluster = ClusterSize::from_bytes(choices.one_of(&[4096, 16384])).unwrap();
    let layout = Layout::new(cluster, VOLUME_BYTES).unwrap();
    let base = BaseIdentity { digest: Digest([1; 32]), bytes: BASE_BYTES };
    let header = Header { layout, uuid: [5; 16], base: Some(base) };
    delta.set_len(layout.file_bytes()).unwrap();
    delta::format(&FileStorage::new(delta.try_clone().unwrap()).unwrap(), &header).unwrap();
    for _ in 0..1 + choices.below(3) {
        use_as_guest(&mut choices, &delta);
    }
    for _ in 0..choices.below(4) {
        damage(&mut choices, &delta, &layout);
    }
    let before = contents(&copy_of(&delta));
    let path: PathBuf = format!("/proc/self/fd/{}", delta.as_raw_fd()).into();
    let checked = check::check(&path);
    let repaired = repair::repair(&path);
    if let (Ok(report), true) = (&checked, repaired.is_ok()) {
        see(report);
    }
    let after = contents(&copy_of(&delta));
    for (sector, found) in before.iter().enumerate() {
        if let Some(found) = found {
            assert!(after.get(sector).is_some_and(|after| after.as_ref() == Some(found)), "sector {sector} was good");
        }
    }
    match repaired {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok((repairs, report)) => {
            repairs.iter().for_each(|repair| assert!(!repair.to_string().is_empty()));
            see(&report);
            let again = check::check(&path).expect("it was looked at");
            assert_eq!(again.findings, report.findings, "the report is of what there is now");
            if report.faults == 0 {
                assert_eq!(report.findings, [], "nothing is left to be put right");
                assert!(after.len() as u64 == VOLUME_BYTES / SECTOR && !after.contains(&None), "all of it can be read");
            }
            let (repairs, last) = repair::repair(&path).expect("it was repaired once");
            assert_eq!(repairs, [], "all was repaired at once");
            assert_eq!(last.findings, report.findings);
        }
    }
});

/// Sees that a report's findings can be told to a person, and are counted.
fn see(report: &Report) {
    for finding in &report.findings {
        assert!(!finding.to_string().is_empty() && !finding.advice().is_empty());
        assert!(finding.lost().is_none_or(|lost| lost.start <= lost.end && lost.end <= VOLUME_BYTES));
    }
    let faults = report.findings.iter().filter(|finding| finding.severity() == Severity::Fault).count() as u64;
    assert_eq!((report.faults, report.notes), (faults, report.findings.len() as u64 - faults));
}

fn open_volume(delta: &File) -> Option<Volume> {
    let header = open::read_header(delta, "fuzz").ok()?;
    open::check_length(delta, &header, "fuzz").ok()?;
    let storage = FileStorage::new(delta.try_clone().unwrap()).ok()?;
    let delta = Delta::start(storage, "fuzz".into(), header, Lifetime::Persistent).ok()?;
    Some(Volume::cow(Base::map(&BASE, "base".to_owned()).unwrap(), delta))
}

/// Writes, zeros, discards and flushes, and then closes, or dies.
fn use_as_guest(choices: &mut Choices<'_>, delta: &File) {
    let volume = open_volume(delta).expect("it is whole");
    let mut batch = Batch::default();
    for number in 0..choices.below(12) as u8 {
        let sectors = VOLUME_BYTES / SECTOR;
        let count = 1 + choices.below(40);
        let (offset, len) = (choices.below(sectors - count + 1) * SECTOR, count * SECTOR);
        match choices.below(6) {
            0 | 1 => {
                let bytes = vec![number + 1; len as usize];
                volume.write(offset, &[Readable::from_slice(&bytes)], &mut batch).unwrap();
            }
            2 => volume.discard(offset, len).unwrap(),
            3 => volume.write_zeroes(offset, len, choices.below(2) == 0, &mut batch).unwrap(),
            4 => volume.commit(&mut batch).unwrap(),
            _ => volume.flush().unwrap(),
        }
    }
    volume.commit(&mut batch).unwrap();
    if choices.below(2) == 0 {
        volume.close().unwrap();
    }
}

/// What can be read of each sector; nothing of a delta that is refused. Changes the file, as whoever opens it does.
fn contents(delta: &File) -> Vec<Option<[u8; SECTOR as usize]>> {
    let Some(volume) = open_volume(delta) else { return Vec::new() };
    let read = |sector| {
        let mut found = [0; SECTOR as usize];
        volume.read(sector * SECTOR, &[Writable::from_mut_slice(&mut found)]).ok().map(|()| found)
    };
    (0..volume.bytes() / SECTOR).map(read).collect()
}

/// The same file once more, with its holes.
fn copy_of(delta: &File) -> File {
    let copy = unnamed_file();
    copy.set_len(delta.metadata().unwrap().len()).unwrap();
    let mut from = 0;
    while let Some(data) = file::next_data(delta, from).unwrap() {
        let mut bytes = vec![0; (data.end - data.start) as usize];
        file::read_at(delta, Writable::from_mut_slice(&mut bytes), data.start).unwrap();
        file::write_at(&copy, &[Readable::from_slice(&bytes)], data.start).unwrap();
        from = data.end;
    }
    copy
}

/// Changes something that others than the program have changed.
fn damage(choices: &mut Choices<'_>, delta: &File, layout: &Layout) {
    let len = delta.metadata().unwrap().len();
    let place = match choices.below(8) {
        0 => HEADER_AT,
        1 => SESSION_AT,
        2..5 => layout.map_block(0) + choices.below(MAP_SECTORS_PER_GROUP as u64) * SECTOR,
        5 => LOG_START + choices.below(2) * LOG_HALF_BYTES,
        6 => {
            // Space for nothing.
            let cluster = choices.below(layout.cluster_count());
            return put(delta, layout.data(cluster), &[0x11]);
        }
        _ => {
            let lens = [
                len + 4096,
                len + 1,
                len.saturating_sub(1),
                len.saturating_sub(4096),
                layout.data(1),
                layout.map_block(0),
                5000,
                100,
            ];
            return delta.set_len(choices.one_of(&lens)).unwrap();
        }
    };
    let mut sector = [0; SECTOR as usize];
    file::read_at(delta, Writable::from_mut_slice(&mut sector), place).unwrap();
    // A header that is another volume's is no damage.
    match choices.below(if place == HEADER_AT { 2 } else { 4 }) {
        0 => {
            let at = choices.below(128) as usize;
            sector[at] ^= 1 << choices.below(8);
        }
        1 => sector.fill(choices.one_of(&[0, 0xff])),
        kind => {
            // A number that is changed, with a checksum that says that it is right.
            let at = choices.below(60) as usize;
            sector[at] = if kind == 2 { choices.any() } else { sector[at].wrapping_add(1) };
            let (fields, sum_at) = if place == SESSION_AT { (0..40, 40) } else { (4..512, 0) };
            let sum = crc32c::crc32c(&sector[fields]);
            sector[sum_at..sum_at + 4].copy_from_slice(&sum.to_le_bytes());
        }
    }
    put(delta, place, &sector);
}

fn put(delta: &File, at: u64, bytes: &[u8]) {
    file::write_at(delta, &[Readable::from_slice(bytes)], at).unwrap();
}
