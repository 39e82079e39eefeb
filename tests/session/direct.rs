//! Deltas whose data goes past the page cache: what holds of others holds of them, whether the kernel moves it or threads do.

use std::collections::HashMap;
use std::fs::File;

use pando::sys::file;
use pando::vhost_user::steps::Step;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::client::{Client, Profile, check_served};
use super::deaths::{die_at, kill_meanwhile};
use super::harness::{Disk, PATIENCE, SECTOR, direct, direct_by, image_bytes, is_alive, locked_openings, run, text};
use super::queue::{IN, OK, OUT};
use super::{deaths, full, gone, migration, requests, upgrades};

const DISK_BYTES: usize = 8 << 20;

#[test]
fn workers_that_are_killed_meanwhile_are_never_noticed() {
    direct(|| kill_meanwhile(51, 60));
}

#[test]
fn a_death_between_a_write_and_its_mark_is_survived() {
    direct(|| [1, 2, 57].into_iter().for_each(|count| die_at(Step::Executed, count, None)));
}

#[test]
fn its_data_is_not_in_the_page_cache() {
    direct(|| {
        let disk = Disk::new(DISK_BYTES);
        let backend = disk.serve();
        let mut client = Client::start(&backend, &Profile::qemu());
        let new = image_bytes(DISK_BYTES, 9);
        // Twice: where there was nothing, and over that.
        for _ in 0..2 {
            for (piece, bytes) in new.chunks(64 << 10).enumerate() {
                client.queues[0].write(128 * piece as u64, bytes);
                assert!(client.queues[0].read(128 * piece as u64, bytes.len()) == bytes, "piece {piece}");
            }
            client.queues[0].flush();
        }
        let delta = File::open(disk.delta()).expect("a delta");
        match (file::cached_bytes(&delta), on_disk(&delta)) {
            (Ok(cached), true) => assert!(cached < DISK_BYTES as u64 / 4, "{cached} bytes are in memory"),
            (cached, on_disk) => println!("skipped: {cached:?}, and on a disk: {on_disk}"),
        }
    });
}

/// Whether a file is anywhere else than in memory.
fn on_disk(file: &File) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    rustix::fs::fstatfs(file).expect("a file").f_type != TMPFS_MAGIC
}

/// Large ones are copied piece by piece, and the memory for that comes and goes.
#[test]
fn a_guest_may_have_its_data_anywhere() {
    direct(|| {
        let disk = Disk::new(DISK_BYTES);
        let backend = disk.serve();
        let worker = backend.worker();
        let profile = Profile { depth: 2, request_bytes: 1 << 20, ..Profile::qemu() };
        let mut client = Client::start(&backend, &profile);
        let (queue, mut model) = (&mut client.queues[0], disk.contents.clone());
        let mut rng = SmallRng::seed_from_u64(52);
        for round in 0..100 {
            let len = SECTOR * [1, 7, 8, 511, 512, 513, 1025, 2048][rng.random_range(0..8)];
            let at = SECTOR * rng.random_range(0..=(DISK_BYTES - len) / SECTOR);
            let new = image_bytes(len, round);
            queue.write((at / SECTOR) as u64, &new);
            model[at..][..len].copy_from_slice(&new);
            let at = SECTOR * rng.random_range(0..=(DISK_BYTES - len) / SECTOR);
            assert!(queue.read((at / SECTOR) as u64, len) == model[at..][..len], "{len} bytes at {at}, round {round}");
        }
        assert_eq!(backend.worker(), worker, "the worker died");
    });
    direct(requests::buffers_may_be_laid_out_in_any_way);
    direct(requests::requests_longer_than_the_ring_come_through_indirect_tables);
}

/// What threads copy them by comes and goes as well, for many at a time.
#[test]
fn many_large_requests_may_be_under_way() {
    const BYTES: usize = 256 << 10;
    direct(|| {
        let disk = Disk::new(DISK_BYTES);
        let backend = disk.serve();
        let worker = backend.worker();
        let profile = Profile { ring_size: 128, depth: 32, request_bytes: BYTES, ..Profile::qemu() };
        let mut client = Client::start(&backend, &profile);
        let queue = &mut client.queues[0];
        for round in 0..8 {
            let new = image_bytes(DISK_BYTES, round);
            for (kind, readable, writable) in [(OUT, BYTES, 0), (IN, 0, BYTES)] {
                let pieces: HashMap<u16, usize> = (0..DISK_BYTES / BYTES)
                    .map(|piece| {
                        let sector = (piece * BYTES / SECTOR) as u64;
                        (queue.submit(kind, sector, &new[piece * BYTES..][..readable], writable), piece)
                    })
                    .collect();
                queue.ring.kick();
                for _ in 0..pieces.len() {
                    let (head, completed) = queue.wait(PATIENCE).expect("all complete");
                    assert_eq!(completed.status, OK);
                    assert!(completed.data == new[pieces[&head] * BYTES..][..writable], "round {round}");
                }
            }
        }
        assert_eq!(backend.worker(), worker, "the worker died");
    });
}

#[test]
fn a_delta_goes_from_one_cache_to_the_other_and_back() {
    let disk = Disk::new(DISK_BYTES);
    let mut model = disk.contents.clone();
    for round in 0..6 {
        let cache = ["direct", "writeback", "direct"][round % 3];
        let mut backend = disk.serve_with(&["--delta-cache", cache]);
        check_served(&backend, &mut model, round as u64);
        // In good order, or not.
        if round % 2 == 0 {
            backend.stop();
        } else {
            let worker = backend.worker();
            backend.kill();
            super::harness::wait_until("the worker is gone", || !is_alive(worker));
        }
    }
}

#[test]
fn it_has_one_writer() {
    let disk = Disk::new(DISK_BYTES);
    let (base, delta, socket) = (disk.base(), disk.delta(), disk.path("other"));
    for (first, second) in [("direct", "writeback"), ("writeback", "direct"), ("direct", "direct")] {
        let mut backend = disk.serve_with(&["--delta-cache", first]);
        let others = ["--base", text(&base), "--delta", text(&delta), "--socket-path", text(&socket)];
        let (code, _, said) = run(&[&others[..], &["--delta-cache", second]].concat());
        assert_eq!(code, 1, "{first}, then {second}: {said}");
        assert!(said.contains(&format!("in use by process {}", backend.keeper())), "{said}");
        assert_eq!(
            locked_openings(backend.keeper()),
            [first == "direct"],
            "what the kernel still moves holds the lock"
        );
        let mut model = disk.contents.clone();
        check_served(&backend, &mut model, 7);
        backend.stop();
        std::fs::remove_file(&delta).expect("a delta");
    }
}

#[test]
fn what_cannot_be_is_said() {
    let disk = Disk::new(DISK_BYTES);
    let (base, delta, socket) = (disk.base(), disk.delta(), disk.path("socket"));
    let common = ["--base", text(&base), "--socket-path", text(&socket), "--delta-cache"];
    let (code, _, said) = run(&[&common[..], &["direct", "--read-only"]].concat());
    assert!(code == 2 && said.contains("--delta-cache is for --delta or --ephemeral"), "{code}: {said}");
    let (code, _, said) = run(&[&common[..], &["none", "--delta", text(&delta), "--create"]].concat());
    assert!(code == 2 && said.contains("--delta-cache none: expected writeback or direct"), "{code}: {said}");
    // A file system that has nothing but the page cache.
    let place = disk.path("ramfs");
    std::fs::create_dir(&place).expect("a directory");
    let mounted = std::process::Command::new("mount").args(["-t", "ramfs", "none", text(&place)]).status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("skipped: no file system can be mounted here");
        return;
    }
    let delta = place.join("delta");
    let (code, _, said) = run(&[&common[..], &["direct", "--delta", text(&delta), "--create"]].concat());
    let unmounted = std::process::Command::new("umount").arg(&place).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    assert!(
        code == 1 && said.contains("cannot go past the page cache") && said.contains("writeback"),
        "{code}: {said}"
    );
}

#[test]
fn an_ephemeral_volume_survives_its_worker() {
    direct(deaths::an_ephemeral_volume_survives_its_worker);
}

#[test]
fn a_front_end_that_keeps_the_region_survives_the_whole_backend() {
    direct(deaths::a_front_end_that_keeps_the_region_survives_the_whole_backend);
}

#[test]
fn writes_wait_for_room_and_reads_do_not() {
    direct_by("threads", full::writes_wait_for_room_and_reads_do_not);
}

#[test]
fn a_file_system_that_is_full_again_and_again_loses_nothing() {
    direct_by("auto", full::a_file_system_that_is_full_again_and_again_loses_nothing);
}

#[test]
fn upgrades_under_load_are_never_noticed() {
    direct_by("auto", upgrades::upgrades_under_load_are_never_noticed);
}

#[test]
fn a_delta_that_is_cut_off_fails_the_reads_of_what_is_missing() {
    direct(gone::a_delta_that_is_cut_off_fails_the_reads_of_what_is_missing);
}

#[test]
fn data_in_memory_that_is_gone_fails_its_request() {
    direct(gone::data_in_memory_that_is_gone_fails_its_request);
}

#[test]
fn exactly_what_a_request_writes_is_noted() {
    direct(migration::exactly_what_a_request_writes_is_noted);
}

#[test]
fn a_guest_moves_back_and_forth_with_its_delta() {
    direct_by("auto", migration::a_guest_moves_back_and_forth_with_its_delta);
}
