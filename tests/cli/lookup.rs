//! `info` and `map` against what was written.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use super::disk::{CLUSTER, Disk};
use super::holds;

const BASE_BYTES: u64 = 100 * CLUSTER + 512;
const BYTES: u64 = 150 * CLUSTER + 1536;

/// A disk with a history, its contents as a byte vector, and how many clusters are in the delta and zero.
fn disk_with_history(seed: u64) -> (Disk, Vec<u8>, super::disk::Session) {
    let mut random = StdRng::seed_from_u64(seed);
    let disk = Disk::new(BASE_BYTES, BYTES);
    let mut model = disk.bytes_at("base.raw", 0, BASE_BYTES);
    model.resize(BYTES as usize, 0);
    let session = disk.session();
    for step in 0..60u64 {
        let start = random.random_range(0..BYTES / 512);
        let len = random.random_range(1..=(BYTES / 512 - start).min(64));
        let (offset, len) = (start * 512, len * 512);
        match random.random_range(0..10) {
            0 => {
                session.zero(offset, len);
                model[offset as usize..][..len as usize].fill(0);
            }
            1 => {
                // Whole clusters only, so that what becomes of the rest is no question.
                let (start, end) = (offset.next_multiple_of(CLUSTER), (offset + len) / CLUSTER * CLUSTER);
                if start < end {
                    session.discard(start, end - start);
                    model[start as usize..end as usize].fill(0);
                }
            }
            2 => session.flush(),
            _ => {
                let bytes = vec![(step + 100) as u8; len as usize];
                session.write(offset, &bytes);
                model[offset as usize..][..len as usize].copy_from_slice(&bytes);
            }
        }
    }
    (disk, model, session)
}

/// Puts the volume together from what `map --json` says, and checks that its extents are all of it and as few as there are.
fn contents(disk: &Disk) -> Vec<u8> {
    let extents = disk.pando("map", &["--json", "--base", "base.raw"]).json();
    let delta = disk.delta();
    let mut bytes = Vec::new();
    let mut last: Option<Value> = None;
    for extent in extents.as_array().unwrap() {
        let number = |name: &str| extent[name].as_u64().unwrap();
        assert_eq!(number("start"), bytes.len() as u64, "{extent}");
        assert!(number("length") > 0);
        assert_ne!(extent["zero"], extent["data"], "{extent}");
        if extent["data"] == true {
            let file = if number("depth") == 0 { delta.to_str().unwrap() } else { "base.raw" };
            assert_eq!(extent["file"], file);
            assert_eq!(extent["present"], true);
            bytes.extend(disk.bytes_at(
                if number("depth") == 0 { "vm.delta" } else { file },
                number("offset"),
                number("length"),
            ));
        } else {
            assert!(extent["offset"].is_null() && extent["depth"] == 0, "{extent}");
            bytes.resize(bytes.len() + number("length") as usize, 0);
        }
        if let Some(last) = last {
            let same = ["depth", "present", "data"].iter().all(|name| last[name] == extent[name]);
            let follows = extent["data"] == false
                || last["offset"].as_u64().unwrap_or(u64::MAX - BYTES) + last["length"].as_u64().unwrap()
                    == number("offset");
            assert!(!(same && follows), "{last} and {extent} are one extent");
        }
        last = Some(extent.clone());
    }
    bytes
}

#[test]
fn the_map_leads_to_what_was_written() {
    for seed in 0..8 {
        let (disk, model, session) = disk_with_history(seed);
        assert!(contents(&disk) == model, "seed {seed}, while a session runs");
        session.close();
        assert!(contents(&disk) == model, "seed {seed}, closed");
    }
}

#[test]
fn the_table_lists_what_holds_data() {
    let disk = Disk::new(8 * CLUSTER, 16 * CLUSTER);
    let session = disk.session();
    session.write(CLUSTER, &[1; 2 * CLUSTER as usize]);
    session.discard(4 * CLUSTER, CLUSTER);
    session.write(10 * CLUSTER, &[1; 512]);
    session.close();
    let at = disk.header.layout.data(0);
    let delta = disk.delta();
    let delta = delta.to_str().unwrap();
    let mut expected = format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to");
    for (start, length, offset, file) in [
        (0, 0x1000, 0, "base"),
        (0x1000, 0x2000, at + 0x1000, delta),
        (0x3000, 0x1000, 0x3000, "base"),
        (0x5000, 0x3000, 0x5000, "base"),
        (0xa000, 0x1000, at + 0xa000, delta),
    ] {
        let hex = |number: u64| if number == 0 { "0".to_owned() } else { format!("{number:#x}") };
        expected += &format!("{:<16}{:<16}{:<16}{file}\n", hex(start), hex(length), hex(offset));
    }
    assert_eq!(disk.pando("map", &[]).ok(), expected);
    let extents = disk.pando("map", &["--output", "json"]).json();
    let kinds: Vec<_> =
        extents.as_array().unwrap().iter().map(|extent| (extent["present"] == true, extent["zero"] == true)).collect();
    let (data, zero, absent) = ((true, false), (true, true), (false, true));
    assert_eq!(kinds, [data, data, data, zero, data, absent, data, absent]);
}

#[test]
fn extents_break_where_the_file_does() {
    // A group of clusters ends, and the next one starts behind its map.
    let group = 16128 * CLUSTER;
    let disk = Disk::blank(2 * group);
    let session = disk.session();
    session.write(group - CLUSTER, &[1; 2 * CLUSTER as usize]);
    session.close();
    let extents = disk.pando("map", &["--json"]).json();
    let starts: Vec<_> = extents.as_array().unwrap().iter().map(|extent| extent["start"].as_u64().unwrap()).collect();
    assert_eq!(starts, [0, group - CLUSTER, group, group + CLUSTER]);
    assert_eq!(extents[2]["offset"].as_u64().unwrap(), extents[1]["offset"].as_u64().unwrap() + 2 * CLUSTER);
}

#[test]
fn info_counts_clusters_flushed_or_not() {
    let disk = Disk::new(8 * CLUSTER, 100 * CLUSTER);
    let counts = |delta: u64, zero: u64| {
        let info = disk.pando("info", &["--json"]).json();
        let clusters = &info["clusters"];
        assert_eq!((&clusters["delta"], &clusters["zero"]), (&delta.into(), &zero.into()), "{info}");
        assert_eq!((&clusters["base"], &clusters["unknown"]), (&(100 - delta - zero).into(), &0.into()), "{info}");
        assert!(info["disk_bytes"].as_u64().unwrap() <= info["file_bytes"].as_u64().unwrap());
        info["session"].clone()
    };
    counts(0, 0);
    let session = disk.session();
    session.write(0, &[1; 3 * CLUSTER as usize]);
    session.flush();
    session.write(50 * CLUSTER, &[1; 512]);
    session.discard(CLUSTER, CLUSTER);
    let running = counts(3, 1);
    assert_eq!((&running["state"], &running["snapshot"]), (&"in-use".into(), &true.into()));
    assert_eq!(running["holder"]["process"], std::process::id());
    holds(disk.pando("info", &[]).ok(), &[&format!("in use by process {}", std::process::id()), "snapshot"]);
    session.kill();
    assert_eq!(counts(3, 1)["state"], "process-died");
    holds(disk.pando("info", &[]).ok(), &["its process died"]);
    disk.session().close();
    let closed = counts(3, 1);
    assert_eq!((&closed["state"], &closed["snapshot"]), (&"closed".into(), &false.into()));
}

#[test]
fn huge_volumes_take_neither_time_nor_memory() {
    let bytes = 8 << 40;
    let disk = Disk::blank(bytes);
    let session = disk.session();
    session.write(0, &[1; 512]);
    session.write(bytes - CLUSTER, &[1; 512]);
    session.close();
    for (arguments, expected) in [
        (&["delta", "info"][..], "2 clusters, 8 KiB"),
        (&["delta", "check"], "no faults"),
        (&["delta", "map"], "0x7fffffff000"),
    ] {
        // Less address space than a map of all clusters takes.
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "ulimit -v 131072 && ulimit -t 5 && exec \"$@\"", "sh", env!("CARGO_BIN_EXE_pando")]);
        holds(super::run(command.args(arguments).arg(disk.delta())).ok(), &[expected]);
    }
}
