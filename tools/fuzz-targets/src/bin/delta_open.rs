//! A delta file that holds almost anything behind a valid header: opening, reading, writing, checking and repairing it never
//! panics and takes bounded time, and what was written since is read back, whatever the file held before.
#![no_main]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use fuzz_targets::{Choices, unnamed_file};
use libfuzzer_sys::fuzz_target;
use pando::block::base::Base;
use pando::block::delta::header::{HEADER_AT, Header, Phase, SESSION_AT, Session};
use pando::block::delta::layout::{
    CLUSTERS_PER_GROUP, LOG_HALF_BYTES, LOG_START, Layout, MAP_SECTOR_HEAD_BYTES, MAP_SECTORS_PER_GROUP,
};
use pando::block::delta::open::OpenError;
use pando::block::delta::survey::Survey;
use pando::block::delta::{Delta, Lifetime, check, repair};
use pando::block::storage::FileStorage;
use pando::block::{Batch, Volume};
use pando::sys::buffers::{Readable, Writable};
use pando::sys::{file, process};
use pando::units::ClusterSize;

const SECTOR: u64 = 512;

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    let header = random_header(&mut choices);
    let delta = unnamed_file();
    delta.set_len(header.layout.file_bytes()).unwrap();
    write(&delta, HEADER_AT, &header.encode());
    write_session(&mut choices, &delta);
    for _ in 0..choices.below(4) {
        write_map_sector(&mut choices, &delta, &header.layout);
    }
    for half in [0, 1] {
        write_log(&mut choices, &delta, half, &header.layout);
    }
    if choices.rarely() {
        let len = delta.metadata().unwrap().len();
        delta.set_len(choices.one_of(&[0, 512, 4096, len / 2, len - 1, len + 4096])).unwrap();
        write(&delta, HEADER_AT, &header.encode());
    }
    if choices.sometimes() {
        look(&delta, &header);
    }
    let mut known = Known::default();
    for _ in 0..3 {
        if choices.sometimes() {
            // Whatever a repair does, it does not touch what a guest can read.
            let _ = repair::repair(&path_of(&delta));
        }
        if serve(&mut choices, &delta, &header, &mut known).is_none() || choices.is_over() {
            break;
        }
    }
    if choices.sometimes() {
        look(&delta, &header);
    }
});

/// The sectors whose contents are known, because a write that completed put them there.
type Known = BTreeMap<u64, u8>;

fn write(delta: &File, at: u64, bytes: &[u8]) {
    file::write_at(delta, &[Readable::from_slice(bytes)], at).unwrap();
}

/// A name for a file that has none.
fn path_of(delta: &File) -> PathBuf {
    format!("/proc/self/fd/{}", delta.as_raw_fd()).into()
}

fn random_header(choices: &mut Choices<'_>) -> Header {
    let cluster = ClusterSize::from_bytes(choices.one_of(&[4096, 65536])).unwrap();
    let sectors = match choices.below(4) {
        0 => 1 + choices.below(1 << 12),
        1 => 1 + choices.below(1 << 20),
        // Just about the end of a group.
        2 => (CLUSTERS_PER_GROUP * cluster.bytes() / SECTOR).saturating_add(choices.below(64)) - 32,
        // Up to the largest volume there is.
        _ => {
            let end = choices.one_of(&[1 << 30, 1 << 36, Layout::VIRTUAL_BYTES_MAX / SECTOR + 1]);
            choices.below(end)
        }
    };
    Header { layout: Layout::new(cluster, sectors * SECTOR).unwrap(), uuid: [3; 16], base: None }
}

fn write_session(choices: &mut Choices<'_>, delta: &File) {
    let generation = random_generation(choices, 4);
    let boot = if choices.sometimes() { [9; 16] } else { process::boot_id().unwrap() };
    let phase = if choices.below(4) == 3 { Phase::Closed } else { Phase::Open };
    let mut sector = Session { phase, boot, generation }.encode();
    break_rarely(choices, &mut sector);
    write(delta, SESSION_AT, &sector);
}

/// Mostly below `end`, and now and then one that no counting reaches.
fn random_generation(choices: &mut Choices<'_>, end: u64) -> u64 {
    if choices.sometimes() {
        return choices.one_of(&[u64::MAX, u64::MAX - 1, 1 << 63, (1 << 63) + 1, 1 << 62, (1 << 62) - 3]);
    }
    choices.below(end)
}

fn break_rarely(choices: &mut Choices<'_>, bytes: &mut [u8]) {
    if choices.rarely() {
        let at = choices.below(bytes.len() as u64) as usize;
        bytes[at] = choices.any();
    }
}

fn write_map_sector(choices: &mut Choices<'_>, delta: &File, layout: &Layout) {
    if layout.group_count() == 0 {
        return;
    }
    let group = choices.below(layout.group_count().min(4));
    let index = choices.below(MAP_SECTORS_PER_GROUP as u64);
    let place = if choices.rarely() { choices.any() } else { group * MAP_SECTORS_PER_GROUP as u64 + index };
    let mut sector = [0; SECTOR as usize];
    sector[4..8].copy_from_slice(&(place as u32).to_le_bytes());
    let clusters_per_sector = CLUSTERS_PER_GROUP / MAP_SECTORS_PER_GROUP as u64;
    let first = group * CLUSTERS_PER_GROUP + index * clusters_per_sector;
    let marked = layout.cluster_count().saturating_sub(first).min(clusters_per_sector).min(64);
    for cluster in 0..marked {
        let state = choices.one_of(&[0u8, 1, 2]);
        sector[MAP_SECTOR_HEAD_BYTES + cluster as usize / 4] |= state << (cluster % 4 * 2);
    }
    if choices.rarely() {
        // A state that does not exist, or a cluster that does not.
        let at = MAP_SECTOR_HEAD_BYTES + choices.below(504) as usize;
        sector[at] = choices.any();
    }
    let checksum = crc32c::crc32c(&sector[4..]);
    sector[..4].copy_from_slice(&checksum.to_le_bytes());
    break_rarely(choices, &mut sector);
    write(delta, layout.map_block(group) + index * SECTOR, &sector);
}

fn write_log(choices: &mut Choices<'_>, delta: &File, half: u64, layout: &Layout) {
    let mut at = LOG_START + half * LOG_HALF_BYTES;
    let generation = random_generation(choices, 3).saturating_mul(2).saturating_add(half);
    for _ in 0..choices.below(4) {
        let generation = if choices.rarely() { random_generation(choices, 8) } else { generation };
        let marks = 1 + choices.below(8);
        let mut entry = vec![0; 4];
        let count = if choices.rarely() { choices.any() } else { marks as u32 };
        entry.extend(count.to_le_bytes());
        entry.extend(generation.to_le_bytes());
        for _ in 0..marks {
            let first = choices.below(layout.cluster_count().clamp(1, 70_000));
            let len = choices.below(layout.cluster_count().saturating_sub(first).clamp(1, 257));
            let first = if choices.rarely() { choices.any() } else { first | choices.below(2) << 63 };
            let len = if choices.rarely() { choices.any() } else { len };
            entry.extend(first.to_le_bytes());
            entry.extend(len.to_le_bytes());
        }
        let checksum = crc32c::crc32c(&entry[4..]);
        entry[..4].copy_from_slice(&checksum.to_le_bytes());
        break_rarely(choices, &mut entry);
        write(delta, at, &entry);
        at += entry.len() as u64;
    }
}

/// Does everything that only looks.
fn look(delta: &File, header: &Header) {
    if let Ok(report) = check::check(&path_of(delta)) {
        for finding in &report.findings {
            assert!(!finding.to_string().is_empty() && !finding.advice().is_empty());
            assert!(finding.lost().is_none_or(|lost| lost.start <= lost.end));
        }
    }
    let Ok(survey) = Survey::of_locked(delta.try_clone().unwrap(), header.clone(), "fuzz".into()) else { return };
    if let Ok(census) = survey.census() {
        let all = census.delta + census.zero + census.base + census.unknown;
        assert_eq!(all, header.layout.cluster_count(), "every cluster is counted once");
    }
    let mut at = 0;
    let listed = survey.extents::<OpenError>(|extent| {
        assert_eq!(extent.start, at, "extents follow one another");
        assert!(extent.len > 0);
        at += extent.len;
        Ok(())
    });
    assert!(listed.is_err() || at == header.layout.virtual_bytes(), "and cover the volume");
}

/// Opens the delta as a backend does and uses it; `None` when it is refused.
fn serve(choices: &mut Choices<'_>, delta: &File, header: &Header, known: &mut Known) -> Option<()> {
    // A volume of more than the processor can address cannot be mapped.
    let storage = FileStorage::new(delta.try_clone().unwrap()).ok()?;
    let delta = Delta::start(storage, "fuzz".into(), header.clone(), Lifetime::Persistent).ok()?;
    let volume = Volume::cow(Base::empty(), delta);
    let mut batch = Batch::default();
    let sectors = volume.bytes() / SECTOR;
    check_known(&volume, known);
    for number in 0..24u8 {
        if choices.is_over() || sectors == 0 {
            break;
        }
        let near = [0, sectors, sectors / 2, CLUSTERS_PER_GROUP * volume.cluster().bytes() / SECTOR];
        let count = choices.below(40).min(sectors);
        let place = choices.one_of(&near);
        let sector = (place + choices.below(100)).saturating_sub(50).min(sectors - count);
        let (offset, len) = (sector * SECTOR, count * SECTOR);
        let range = sector..sector + count;
        match choices.below(5) {
            0 => {
                let bytes: Vec<u8> = (0..len).map(|_| number + 1).collect();
                if volume.write(offset, &[Readable::from_slice(&bytes)], &mut batch).is_ok() {
                    known.extend(range.map(|sector| (sector, number + 1)));
                } else {
                    // Part of it may have happened.
                    known.retain(|sector, _| !range.contains(sector));
                }
            }
            1 => {
                if volume.write_zeroes(offset, len, choices.below(2) == 0, &mut batch).is_ok() {
                    known.extend(range.map(|sector| (sector, 0)));
                } else {
                    // Part of it may have happened.
                    known.retain(|sector, _| !range.contains(sector));
                }
            }
            2 => {
                // Only whole clusters, so what is known of the rest stays.
                let _ = volume.discard(offset, len);
                known.retain(|sector, _| !range.contains(sector));
            }
            3 => drop(volume.read(offset, &[Writable::from_mut_slice(&mut vec![0; len as usize])])),
            _ => drop(volume.flush()),
        }
    }
    if volume.commit(&mut batch).is_err() {
        known.clear();
    }
    check_known(&volume, known);
    if choices.below(2) == 0 {
        let _ = volume.close();
    }
    Some(())
}

fn check_known(volume: &Volume, known: &Known) {
    for (sector, expected) in known {
        let mut found = [0xee; SECTOR as usize];
        volume.read(sector * SECTOR, &[Writable::from_mut_slice(&mut found)]).expect("what was written can be read");
        assert!(found == [*expected; SECTOR as usize], "sector {sector} holds {:#x}, expected {expected:#x}", found[0]);
    }
}
