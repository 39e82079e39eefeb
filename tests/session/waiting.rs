//! Requests that wait for the disk, which others than the ring's own thread carry out: here nothing counts as being in memory, so that all reads
//! are such. What holds of requests otherwise holds of them.

use std::collections::BTreeMap;
use std::time::Duration;

use pando::vhost_user::vitals::WEDGED_AFTER;
use rustix::fs::Advice;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::client::{Client, Profile, check_served};
use super::deaths::{kill_meanwhile, kill_worker};
use super::harness::{Backend, Disk, SECTOR, cold, cold_by, text, wait_until};
use super::queue::{FLUSH, IN, OK, header};
use super::requests::Chain;
use super::{drain, gone, hostile, migration, requests};

const DISK_BYTES: usize = 8 << 20;

#[test]
fn workers_that_are_killed_meanwhile_are_never_noticed() {
    cold(|| kill_meanwhile(31, 40));
}

#[test]
fn a_worker_at_rest_keeps_no_threads_for_them() {
    let threads_of = |process| std::fs::read_dir(format!("/proc/{process}/task")).expect("it lives").count();
    cold_by("threads", || {
        let disk = Disk::new(DISK_BYTES);
        let backend = disk.serve();
        let mut client = Client::start(&backend, &Profile::qemu());
        let before = threads_of(backend.worker());
        assert!(client.queues[0].read(0, SECTOR) == disk.contents[..SECTOR]);
        assert!(threads_of(backend.worker()) > before, "another than the ring's thread has read");
        wait_until("they have ended", || threads_of(backend.worker()) == before);
    });
}

/// As on hosts that forbid io_uring by a filter of system calls, and by a setting: the call fails.
#[test]
fn where_io_uring_is_forbidden_threads_read_and_that_is_said_once() {
    let forbidden = BTreeMap::from([(libc::SYS_io_uring_setup, Vec::new())]);
    let answer = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let architecture = TargetArch::try_from(std::env::consts::ARCH).expect("a known one");
    let filter = SeccompFilter::new(forbidden, SeccompAction::Allow, answer, architecture).expect("a filter");
    let filter = BpfProgram::try_from(filter).expect("a program");
    // Of this thread, and of those that it starts.
    let forbids = std::thread::spawn(move || {
        seccompiler::apply_filter(&filter).expect("the kernel filters");
        let disk = Disk::new(DISK_BYTES);
        cold_by("auto", || {
            let backend = disk.serve();
            let mut client = Client::start(&backend, &Profile::qemu());
            assert!(client.queues[0].read(0, SECTOR) == disk.contents[..SECTOR]);
            let said = backend.log().text();
            assert_eq!(said.matches("no io_uring here (Operation not permitted").count(), 1, "{said}");
        });
        let (base, socket) = (disk.base(), disk.path("socket"));
        let asks = ["--base", text(&base), "--read-only", "--socket-path", text(&socket), "--io", "io_uring"];
        let mut backend = Backend::start(&asks, &socket);
        assert_eq!(backend.wait().code(), Some(1));
        backend.log().expect_after(0, &["--io io_uring: cannot make a ring", "Operation not permitted"]);
    });
    forbids.join().expect("it went well");
}

/// Where there are rings, and nothing is in memory, no thread waits for the disk.
#[test]
fn the_kernel_reads_where_it_can() {
    let threads_of = |process| std::fs::read_dir(format!("/proc/{process}/task")).expect("it lives").count();
    let disk = Disk::new(DISK_BYTES);
    cold_by("auto", || {
        let backend = disk.serve_with(&["--queues", "6"]);
        if backend.log().text().contains("no io_uring here") {
            println!("skipped: no io_uring here");
            return;
        }
        let mut client = Client::start(&backend, &Profile { queues: 6, ..Profile::qemu() });
        let before = threads_of(backend.worker());
        for round in 0..3 {
            for index in 0..6 {
                let sector = 8 * (6 * round + index) as u64;
                let expected = &disk.contents[sector as usize * SECTOR..][..8 * SECTOR];
                assert!(client.queues[index].read(sector, 8 * SECTOR) == *expected, "queue {index}");
                // Of the six queues, four get rings.
                assert_eq!(threads_of(backend.worker()) > before, (round, index) >= (0, 4), "round {round}, {index}");
            }
        }
        kill_worker(&backend);
        assert!(client.queues[5].read(0, SECTOR) == disk.contents[..SECTOR]);
        let worker = backend.worker();
        let at_rest = threads_of(worker);
        for index in 0..3 {
            assert!(client.queues[index].read(0, SECTOR) == disk.contents[..SECTOR]);
        }
        assert_eq!(threads_of(worker), at_rest, "the next worker has the rings of the last");
    });
}

/// At first others flush, and then, as nothing else ever comes meanwhile, the ring's own thread.
#[test]
fn each_flush_of_many_makes_what_was_written_durable() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &Profile::qemu());
    for number in 1..=30 {
        client.queues[0].write(8 * u64::from(number), &[number; SECTOR]);
        client.queues[0].flush();
        assert!(requests::survives_power_loss(&disk, 8 * u64::from(number), &[number; SECTOR]), "write {number}");
    }
}

#[test]
fn however_many_queues_flush_one_thread_does_it_for_all() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve_with(&["--queues", "4", "--delta-cache", "writeback"]);
    let mut client = Client::start(&backend, &Profile { queues: 4, ..Profile::qemu() });
    let threads = || std::fs::read_dir(format!("/proc/{}/task", backend.worker())).expect("it lives").count();
    let before = threads();
    std::thread::scope(|scope| {
        for (queue, first) in client.queues.iter_mut().zip((8..).step_by(8)) {
            scope.spawn(move || {
                for number in 0..100 {
                    queue.write(first, &[number; SECTOR]);
                    queue.flush();
                }
            });
        }
    });
    assert_eq!(threads(), before + 1);
    for sector in (8..40).step_by(8) {
        assert!(requests::survives_power_loss(&disk, sector, &[99; SECTOR]), "sector {sector}");
    }
}

/// Page tables are for pages that are mapped, so it is those that are counted.
#[test]
fn a_worker_at_rest_lets_go_of_what_it_has_mapped_and_reads_on() {
    let disk = Disk::new(96 << 20);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &Profile::qemu());
    let (mut queue, worker) = (client.queues.remove(0), backend.worker());
    let mapped = || -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{worker}/status")).expect("it lives");
        let line = status.lines().find_map(|line| line.strip_prefix("RssFile:")).expect("the kernel counts them");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    };
    let at_first = mapped();
    // What is read for the second time comes from the mapping.
    let mut read_all = || {
        for sector in (0..2 * disk.contents.len() / SECTOR).step_by(128) {
            let at = sector * SECTOR % disk.contents.len();
            assert!(queue.read((at / SECTOR) as u64, 128 * SECTOR) == disk.contents[at..][..128 * SECTOR], "at {at}");
        }
    };
    read_all();
    let afterwards = mapped();
    assert!(afterwards > at_first + (64 << 10), "{at_first} KiB, and {afterwards} after all was read");
    wait_until("it has let go", || mapped() < at_first + (1 << 10));
    read_all();
    assert!(mapped() > at_first + (64 << 10), "and maps again what is read again");
}

/// Whether others make it or, after some, the ring's own thread, which reads the header twice.
#[test]
fn a_flush_may_have_more_than_a_header() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &Profile::qemu());
    let queue = &mut client.queues[0];
    let mut bytes = header(FLUSH, 0).to_vec();
    bytes.extend_from_slice(&[1; 9]);
    for number in 1..=20 {
        queue.write(8, &[number; SECTOR]);
        assert_eq!(Chain::new(queue).reads(&bytes).writes(1).execute(queue), (1, vec![OK]), "flush {number}");
    }
}

/// It waits for nothing any more, and is not taken for one that does.
#[test]
fn a_ring_that_breaks_while_others_read_is_not_stuck() {
    let disk = Disk::new(DISK_BYTES);
    cold_by("auto", || {
        let backend = disk.serve();
        let (worker, mark) = (backend.worker(), backend.log().mark());
        let mut client = Client::start(&backend, &Profile::qemu());
        let queue = &mut client.queues[0];
        let head = queue.submit(IN, 0, &[], SECTOR);
        queue.ring.publish(head);
        queue.ring.kick_anyway();
        backend.log().expect_after(mark, &["again, before its request is complete", "served no further"]);
        std::thread::sleep(WEDGED_AFTER + Duration::from_secs(2));
        assert_eq!(backend.worker(), worker, "the worker was killed");
    });
}

/// Where the tests' files can be dropped from memory; elsewhere they are read as ever.
#[test]
fn what_is_not_in_memory_is_read_right() {
    let disk = Disk::new(DISK_BYTES);
    let base = std::fs::File::open(disk.base()).expect("an image");
    base.sync_all().expect("room");
    rustix::fs::fadvise(&base, 0, None, Advice::DontNeed).expect("a file");
    let backend = disk.serve_as(&["--delta", text(&disk.delta()), "--create"]);
    let mut model = disk.contents.clone();
    check_served(&backend, &mut model, 33);
    let mut client = Client::start(&backend, &Profile::qemu());
    for at in (0..DISK_BYTES).step_by(128 << 10).rev() {
        assert!(client.queues[0].read((at / SECTOR) as u64, 64 << 10) == model[at..at + (64 << 10)], "at byte {at}");
    }
}

#[test]
fn an_image_that_is_cut_off_fails_the_reads_of_what_is_missing() {
    cold(gone::an_image_that_is_cut_off_fails_the_reads_of_what_is_missing);
}

#[test]
fn a_delta_that_is_cut_off_fails_the_reads_of_what_is_missing() {
    cold(gone::a_delta_that_is_cut_off_fails_the_reads_of_what_is_missing);
}

#[test]
fn data_in_memory_that_is_gone_fails_its_request() {
    cold(gone::data_in_memory_that_is_gone_fails_its_request);
}

#[test]
fn memory_that_goes_under_load_costs_the_session_alone() {
    cold(gone::memory_that_goes_under_load_costs_the_session_alone);
}

#[test]
fn buffers_may_be_laid_out_in_any_way() {
    cold(requests::buffers_may_be_laid_out_in_any_way);
}

#[test]
fn requests_longer_than_the_ring_come_through_indirect_tables() {
    cold(requests::requests_longer_than_the_ring_come_through_indirect_tables);
}

#[test]
fn a_volume_may_be_larger_than_its_image() {
    cold(requests::a_volume_may_be_larger_than_its_image);
}

#[test]
fn a_chain_that_is_wrong_is_one_request_that_fails() {
    cold(hostile::a_chain_that_is_wrong_is_one_request_that_fails);
}

/// Those that it has taken before are completed.
#[test]
fn a_ring_that_is_wrong_is_served_no_further() {
    cold(hostile::a_ring_that_is_wrong_is_served_no_further);
}

#[test]
fn exactly_what_a_request_writes_is_noted() {
    cold(migration::exactly_what_a_request_writes_is_noted);
}

#[test]
fn what_is_written_is_noted_whoever_dies() {
    cold(migration::what_is_written_is_noted_whoever_dies);
}

#[test]
fn a_guest_moves_back_and_forth_with_its_delta() {
    cold(migration::a_guest_moves_back_and_forth_with_its_delta);
}

#[test]
fn disabling_a_ring_waits_for_what_it_has_taken() {
    cold(drain::disabling_a_ring_waits_for_what_it_has_taken);
}

#[test]
fn the_base_of_a_ring_waits_for_what_it_has_taken() {
    cold(drain::the_base_of_a_ring_waits_for_what_it_has_taken);
}

#[test]
fn the_end_of_a_connection_waits_for_what_was_taken() {
    cold(drain::the_end_of_a_connection_waits_for_what_was_taken);
}

#[test]
fn a_reset_device_starts_afresh() {
    cold(drain::a_reset_device_starts_afresh);
}

#[test]
fn memory_may_come_and_go_under_load() {
    cold(drain::memory_may_come_and_go_under_load);
}
