//! Pages that are taken away from under the worker: those of the image, of the delta and of guest memory. Requests that need them fail, a ring
//! that lies in them ends, and the worker serves on.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use pando::vhost_user::control::{Command, Reply};
use rustix::fs::MemfdFlags;
use rustix::process::Signal;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

use super::client::{Client, LOG_ALL, Profile, check_served};
use super::guest::{Guest, memfd};
use super::harness::{Disk, PATIENCE, SECTOR, image_bytes, send, text};
use super::managed::{Managed, Volume, manner};
use super::queue::{DISCARD, GET_ID, IN, IOERR, NO_STATUS, OK, OUT, Queue, WRITE_ZEROES, header, range_bytes};
use super::ring::{Buffer, Event};
use super::target::Target;

const CLUSTER: usize = 4096;
const DISK_BYTES: usize = 1 << 20;
/// What is left of an image that is cut off.
const LEFT: usize = 512 << 10;

/// Log lines about requests come at most once a second.
fn let_complaints_pass() {
    std::thread::sleep(std::time::Duration::from_millis(1100));
}

fn cut(path: &std::path::Path, bytes: usize) {
    File::options()
        .write(true)
        .open(path)
        .and_then(|file| file.set_len(bytes as u64))
        .expect("the file becomes shorter");
}

#[track_caller]
fn status(queue: &mut Queue, kind: u32, at: usize, readable: &[u8], writable: usize) -> u8 {
    queue.execute(kind, (at / SECTOR) as u64, readable, writable).status
}

#[test]
pub fn an_image_that_is_cut_off_fails_the_reads_of_what_is_missing() {
    let disk = Disk::new(DISK_BYTES);
    for arguments in [&["--read-only"][..], &["--delta", text(&disk.delta()), "--create"]] {
        std::fs::write(disk.base(), &disk.contents).expect("the image");
        let mut backend = disk.serve_as(arguments);
        let worker = backend.worker();
        let mut client = Client::start(&backend, &Profile::qemu());
        let queue = &mut client.queues[0];
        assert!(queue.read(0, 4096) == disk.contents[..4096]);
        cut(&disk.base(), LEFT);
        let mark = backend.log().mark();
        for at in [LEFT, LEFT + SECTOR, DISK_BYTES - SECTOR] {
            assert_eq!(status(queue, IN, at, &[], SECTOR), IOERR, "reading at {at}");
        }
        backend.log().expect_after(mark, &["cannot read", text(&disk.base()), &format!("offset {LEFT}"), "shorter"]);
        // In part, and all of it.
        assert_eq!(status(queue, IN, LEFT - 32768, &[], 65536), IOERR);
        for at in (0..LEFT).step_by(65536) {
            assert!(queue.read((at / SECTOR) as u64, 65536) == disk.contents[at..][..65536], "reading at {at}");
        }
        drop(client);
        let mut client = Client::start(&backend, &Profile::qemu());
        assert_eq!(status(&mut client.queues[0], IN, LEFT, &[], SECTOR), IOERR, "it is still missing");
        drop(client);
        assert_eq!(backend.worker(), worker, "the worker died");
        backend.stop();
    }
}

#[test]
fn a_write_that_needs_what_is_missing_of_the_image_fails_and_no_other() {
    let disk = Disk::new(DISK_BYTES);
    let mut backend = disk.serve();
    let worker = backend.worker();
    let mut client = Client::start(&backend, &Profile::qemu());
    let queue = &mut client.queues[0];
    let new = image_bytes(2 * CLUSTER, 1);
    let (held, whole, part) = (LEFT + 10 * CLUSTER, LEFT + 20 * CLUSTER, LEFT + 30 * CLUSTER);
    queue.write((held / SECTOR) as u64, &new);
    cut(&disk.base(), LEFT);
    // What the delta has needs no image, nor do whole clusters.
    assert!(queue.read((held / SECTOR) as u64, new.len()) == new);
    queue.write((held / SECTOR) as u64 + 1, &new[..SECTOR]);
    queue.write((whole / SECTOR) as u64, &new);
    assert!(queue.read((whole / SECTOR) as u64, new.len()) == new);
    let mark = backend.log().mark();
    for at in [part + SECTOR, part + CLUSTER - SECTOR] {
        assert_eq!(status(queue, OUT, at, &new[..SECTOR], 0), IOERR, "writing at {at}");
    }
    let page = format!("offset {part}");
    backend.log().expect_after(mark, &["cannot read", text(&disk.base()), &page]);
    assert_eq!(status(queue, WRITE_ZEROES, 0, &range_bytes(&[(part as u64 / 512 + 1, 1, 0)]), 0), IOERR);
    // The cluster has not come into the delta by that.
    assert_eq!(status(queue, IN, part + SECTOR, &[], SECTOR), IOERR);
    // Nor has the disk got an error of its own.
    queue.flush();
    queue.write(0, &new[..SECTOR]);
    queue.flush();
    assert_eq!(status(queue, WRITE_ZEROES, 0, &range_bytes(&[(part as u64 / 512, 8, 0)]), 0), OK);
    assert!(queue.read((part / SECTOR) as u64, CLUSTER).iter().all(|byte| *byte == 0));
    drop(client);
    assert_eq!(backend.worker(), worker, "the worker died");
    backend.stop();
}

#[test]
pub fn a_delta_that_is_cut_off_fails_the_reads_of_what_is_missing() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let worker = backend.worker();
    let mut client = Client::start(&backend, &Profile::qemu());
    let queue = &mut client.queues[0];
    let new = image_bytes(CLUSTER, 1);
    queue.write(8, &new);
    // Longer than what is written first, and shorter than where the first data lies.
    cut(&disk.delta(), 8192);
    let mark = backend.log().mark();
    assert_eq!(status(queue, IN, CLUSTER, &[], CLUSTER), IOERR);
    backend.log().expect_after(mark, &["cannot read", text(&disk.delta()), "offset", "shorter"]);
    assert!(queue.read(0, CLUSTER) == disk.contents[..CLUSTER], "the image is whole");
    assert_eq!(backend.worker(), worker, "the worker died");
}

/// Guest memory of which the second region is for the data of one request, and then made shorter.
const DATA: u64 = 16 << 20;
/// Where it ends afterwards.
const CUT: u64 = DATA + (1 << 20);

/// A request whose data lies at an address: kind, sector, data and whether the device writes it.
fn submit(client: &mut Client, kind: u32, sector: u64, data: Buffer) -> u64 {
    let place = client.guest.allocate(32, 16);
    client.guest.write(place, &header(kind, sector));
    client.guest.write(place + 16, &[NO_STATUS]);
    let buffers = [Buffer::readable(place, 16), data, Buffer::writable(place + 16, 1)];
    client.queues[0].ring.submit(&buffers);
    client.queues[0].ring.kick_anyway();
    place + 16
}

#[track_caller]
fn fails(client: &mut Client, kind: u32, sector: u64, data: Buffer) {
    let status = submit(client, kind, sector, data);
    assert_eq!(client.queues[0].ring.wait_used(PATIENCE).map(|(_, len)| len), Some(1), "request type {kind}");
    assert_eq!(client.guest.read(status, 1), [IOERR], "request type {kind}");
}

#[test]
pub fn data_in_memory_that_is_gone_fails_its_request() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    let mark = target.backend.log().mark();
    let mut client = Client::start(&target.backend, &Profile::qemu());
    // A cluster of each kind: of the image, of the delta, of zeros.
    let new = image_bytes(CLUSTER, 1);
    client.queues[0].write(8, &new);
    assert_eq!(status(&mut client.queues[0], DISCARD, 0, &range_bytes(&[(16, 8, 0)]), 0), OK);
    target.model[CLUSTER..2 * CLUSTER].copy_from_slice(&new);
    target.model[2 * CLUSTER..3 * CLUSTER].fill(0);
    client.guest.file_of(1).set_len(CUT - DATA).expect("the memfd shrinks");
    // From here on this process must not touch what is behind it either.
    for sector in [0, 8, 16] {
        fails(&mut client, IN, sector, Buffer::writable(CUT + 100, SECTOR));
        fails(&mut client, IN, sector, Buffer::writable(CUT - SECTOR as u64, CLUSTER));
    }
    target.backend.log().expect_after(mark, &["guest memory at 0x1100", "gone"]);
    fails(&mut client, GET_ID, 0, Buffer::writable(CUT, 20));
    for kind in [DISCARD, WRITE_ZEROES] {
        fails(&mut client, kind, 0, Buffer::readable(CUT + 64, 16));
    }
    client.guest.write(CUT - CLUSTER as u64, &[7; CLUSTER]);
    // Whole clusters and parts of them, of the image and of the delta, with a source that is gone and one that ends in the midst.
    for (sector, bytes) in [(24, CLUSTER), (33, SECTOR), (40, 2 * CLUSTER)] {
        fails(&mut client, OUT, sector, Buffer::readable(CUT, bytes));
    }
    fails(&mut client, OUT, 48, Buffer::readable(CUT - CLUSTER as u64, 2 * CLUSTER));
    fails(&mut client, OUT, 65, Buffer::readable(CUT - SECTOR as u64, 2 * SECTOR));
    // Of this one the half that was there may have been written: it says that it failed, and nothing else is harmed.
    fails(&mut client, OUT, 8, Buffer::readable(CUT - SECTOR as u64, 2 * SECTOR));
    let half = client.queues[0].read(8, SECTOR);
    assert!(half == target.model[CLUSTER..][..SECTOR] || half == [7; SECTOR]);
    target.model[CLUSTER..][..SECTOR].copy_from_slice(&half);
    let_complaints_pass();
    let mark = target.backend.log().mark();
    fails(&mut client, OUT, 24, Buffer::readable(CUT, SECTOR));
    target.backend.log().expect_after(mark, &["guest memory at 0x1100000", "gone"]);
    // None of it counts as an error of the disk, and the disk holds what it held.
    client.queues[0].flush();
    for at in (0..target.model.len()).step_by(65536) {
        assert!(client.queues[0].read((at / SECTOR) as u64, 65536) == target.model[at..][..65536], "reading at {at}");
    }
    // The header is not data, and as gone as that. Zeros would be one: of a read at the start.
    let place = client.guest.allocate(1024, 16);
    client.guest.write(place, &[NO_STATUS; 1024]);
    let data = Buffer::writable(place + 512, SECTOR);
    client.queues[0].ring.submit(&[Buffer::readable(CUT, 16), data, Buffer::writable(place, 1)]);
    client.queues[0].ring.kick_anyway();
    assert_eq!(client.queues[0].ring.wait_used(PATIENCE).map(|(_, len)| len), Some(1));
    assert_eq!(client.guest.read(place, 1), [IOERR]);
    assert_eq!(client.guest.read(place + 512, SECTOR), [NO_STATUS; SECTOR]);
    drop(client);
    target.check("data in memory that is gone");
    target.same_worker(worker);
}

/// A part of a ring, or of a request, that is put into the memory that goes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Descriptors,
    Available,
    /// Of the available ring, all but its index.
    AvailableEntries,
    Used,
    Status,
    IndirectTable,
}

/// A ring that runs and has served one request, with a part of it where memory will go.
fn ring_with(target: &Target, part: Part) -> Client {
    let mut client = Client::negotiate(target.backend.connect(), &Profile::qemu().answered(), Guest::new());
    let ring = &mut client.queues[0].ring;
    match part {
        Part::Descriptors => ring.descriptors = CUT,
        Part::Available => ring.available = CUT,
        Part::AvailableEntries => ring.available = CUT - 4,
        Part::Used => ring.used = CUT,
        Part::Status | Part::IndirectTable => {}
    }
    client.tell_memory();
    client.set_up(0, 0);
    client.enable(0, true);
    assert!(client.queues[0].read(0, SECTOR) == target.model[..SECTOR]);
    client
}

#[test]
fn a_ring_in_memory_that_is_gone_ends() {
    use Part::{Available, AvailableEntries, Descriptors, IndirectTable, Status, Used};
    let mut target = Target::new();
    let worker = target.backend.worker();
    for part in [Descriptors, Available, AvailableEntries, Used, Status, IndirectTable] {
        eprintln!("{part:?}");
        let mark = target.backend.log().mark();
        let mut client = ring_with(&target, part);
        let broken = Event::new();
        client.front_end.set_vring_err(0, &broken.descriptor).expect("SET_VRING_ERR");
        // A write, of which nobody may hear that it was done.
        let place = client.guest.allocate(32, 16);
        client.guest.write(place, &header(OUT, 64));
        client.guest.write(place + 16, &[NO_STATUS]);
        let data = client.guest.allocate(CLUSTER as u64, 16);
        client.guest.write(data, &[9; CLUSTER]);
        let status = if part == Status { CUT } else { place + 16 };
        let buffers = [Buffer::readable(place, 16), Buffer::readable(data, CLUSTER), Buffer::writable(status, 1)];
        match part {
            IndirectTable => client.queues[0].ring.submit_indirect(CUT, &buffers),
            _ => client.queues[0].ring.submit(&buffers),
        };
        client.guest.file_of(1).set_len(CUT - DATA).expect("the memfd shrinks");
        // From here on this process must not touch what is behind it either.
        client.queues[0].ring.kick_anyway();
        target.backend.log().expect_after(mark, &["ring 0", "gone", "0x1100", "served no further"]);
        assert!(broken.wait(PATIENCE), "the front end is not told");
        let said = target.backend.log().text()[mark..].to_owned();
        assert!(!said.contains("warn"), "what was read as zeros was taken for a request: {said}");
        if part != Used {
            assert_eq!(client.queues[0].ring.used_index(), 1, "a completion was shown");
        }
        // The front end is still talked to.
        let next = client.base(0);
        assert!(next == 1 || ![Available, AvailableEntries].contains(&part), "what cannot be read was taken");
        client.settle();
        drop(client);
        // Whether that write was carried out nobody has been told; whether it is there, the disk says.
        let mut client = Client::start(&target.backend, &Profile::qemu());
        let found = client.queues[0].read(64, CLUSTER);
        let done = [Used, Status].contains(&part);
        assert!(found == target.model[64 * SECTOR..][..CLUSTER] || (done && found == [9; CLUSTER]));
        client.queues[0].write(64, &target.model[64 * SECTOR..][..CLUSTER]);
        drop(client);
        target.check("a ring in memory that is gone");
        target.same_worker(worker);
    }
}

#[test]
fn an_idle_ring_in_memory_that_is_gone_ends_when_it_is_touched() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    // By a kick for nothing, and by being stopped.
    type Touch = fn(&mut Client);
    let touches: [Touch; 2] = [|client| client.queues[0].ring.kick_anyway(), |client| _ = client.base(0)];
    for touch in touches {
        let mark = target.backend.log().mark();
        let mut client = ring_with(&target, Part::Used);
        // It goes to sleep with all of its memory there.
        std::thread::sleep(std::time::Duration::from_millis(50));
        client.guest.file_of(1).set_len(CUT - DATA).expect("the memfd shrinks");
        touch(&mut client);
        target.backend.log().expect_after(mark, &["ring 0", "gone", "0x1100", "served no further"]);
        drop(client);
        target.check("an idle ring in memory that is gone");
        target.same_worker(worker);
    }
}

/// Memory of the front end's that is not the guest's: where account is kept of requests, and where writes are noted.
const BOOK_BYTES: u64 = 64 << 10;

/// Has the backend keep account of requests in memory that can be taken away.
fn offer_account(client: &mut Client) -> File {
    let file = memfd(BOOK_BYTES, MemfdFlags::empty()).expect("memory");
    let (num_queues, queue_size) = (client.queues.len() as u16, client.profile.ring_size);
    let inflight = VhostUserInflight { mmap_size: BOOK_BYTES, mmap_offset: 0, num_queues, queue_size };
    client.front_end.set_inflight_fd(&inflight, file.as_raw_fd()).expect("SET_INFLIGHT_FD");
    file
}

#[test]
fn a_ring_whose_account_or_log_is_gone_ends() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    for of_log in [false, true] {
        let mark = target.backend.log().mark();
        let profile = Profile::qemu().answered();
        let mut client = Client::negotiate(target.backend.connect(), &profile, Guest::new());
        let account = offer_account(&mut client);
        client.tell_memory();
        client.set_up(0, 0);
        client.enable(0, true);
        let log = memfd(BOOK_BYTES, MemfdFlags::empty()).expect("memory");
        if of_log {
            let region =
                VhostUserDirtyLogRegion { mmap_size: BOOK_BYTES, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
            client.front_end.set_log_base(0, Some(region)).expect("SET_LOG_BASE");
            client.front_end.set_features(client.features | LOG_ALL).expect("SET_FEATURES");
        }
        assert!(client.queues[0].read(0, SECTOR) == target.model[..SECTOR]);
        let gone = if of_log { log } else { account };
        gone.set_len(0).expect("the memfd shrinks");
        client.queues[0].submit(IN, 8, &[], SECTOR);
        client.queues[0].ring.kick_anyway();
        target.backend.log().expect_after(mark, &["ring 0", "gone", "served no further"]);
        assert_eq!(client.queues[0].ring.used_index(), 1, "a completion was shown that nobody has noted");
        drop(client);
        target.check("a ring whose account or log is gone");
        target.same_worker(worker);
    }
}

#[test]
fn a_ring_in_memory_that_was_gone_already_is_not_started() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    for of_account in [false, true] {
        let mark = target.backend.log().mark();
        let profile = Profile::qemu();
        let mut client = Client::negotiate(target.backend.connect(), &profile, Guest::new());
        let account = offer_account(&mut client);
        client.tell_memory();
        client.settle();
        let gone = if of_account { account } else { client.guest.file_of(0) };
        gone.set_len(0).expect("the memfd shrinks");
        let ring = &client.queues[0].ring;
        let (config, kick) = (ring.config(), &ring.kick.descriptor);
        // What the backend refuses ends the connection, and the rest finds it closed.
        let _ = (client.front_end.set_vring_num(0, profile.ring_size))
            .and_then(|()| client.front_end.set_vring_base(0, 0))
            .and_then(|()| client.front_end.set_vring_addr(0, &config))
            .and_then(|()| client.front_end.set_vring_kick(0, kick))
            .and_then(|()| client.front_end.set_vring_enable(0, true));
        target.backend.log().expect_after(mark, &["ring 0 cannot be served", "gone"]);
        drop(client);
        target.check("a ring in memory that was gone");
        target.same_worker(worker);
    }
}

#[test]
fn a_volume_grows_though_its_guest_has_spoilt_its_memory() {
    let disk = Disk::new(DISK_BYTES);
    let volume = Volume::cow("one", &disk.base(), &disk.delta(), false);
    let Managed { backend, mut watcher, .. } = Managed::serve(&disk, &volume, manner());
    let mark = backend.log().mark();
    let client = Client::start(&backend, &Profile::qemu());
    client.guest.file_of(0).set_len(0).expect("the memfd shrinks");
    // It dies at the order to stop the rings, and no other can take them over.
    let worker = backend.worker();
    send(worker, Signal::STOP);
    let bytes = 2 * DISK_BYTES as u64;
    watcher.controller.send(&Command::Grow { bytes }, &[]).expect("the keeper listens");
    std::thread::sleep(Duration::from_millis(100));
    send(worker, Signal::KILL);
    match watcher.answer().0 {
        Reply::Done => {}
        reply => panic!("{reply:?}"),
    }
    backend.log().expect_after(mark, &["the connection is ended", "ends behind its file"]);
    drop(client);
    let mut client = Client::start(&backend, &Profile::qemu());
    assert_eq!(client.capacity(), bytes / SECTOR as u64);
    client.queues[0].write(1, &[7; SECTOR]);
    assert_eq!(client.queues[0].read(1, SECTOR), [7; SECTOR]);
}

#[test]
fn a_session_that_ends_as_its_worker_dies_leaves_no_ring_behind() {
    let mut target = Target::new();
    let mark = target.backend.log().mark();
    let mut client = Client::negotiate(target.backend.connect(), &Profile::qemu().queues(2).answered(), Guest::new());
    let account = offer_account(&mut client);
    client.tell_memory();
    for index in [0, 1] {
        client.set_up(index, 0);
        client.enable(index, true);
    }
    // The second ring's account is spoilt, so no successor can serve all that the last one did.
    let slot_bytes = (16 + u64::from(client.profile.ring_size) * 16).next_multiple_of(64);
    account.write_all_at(&[0xff; 2], slot_bytes + 8).expect("the front end has it too");
    let worker = target.backend.worker();
    send(worker, Signal::STOP);
    let Client { front_end, mut queues, guest, .. } = client;
    drop(front_end);
    std::thread::sleep(Duration::from_millis(100));
    send(worker, Signal::KILL);
    target.backend.log().expect_after(mark, &["the connection is ended", "version 65535"]);
    queues[0].submit(IN, 0, &[], SECTOR);
    queues[0].ring.kick_anyway();
    target.check("a session that ends as its worker dies");
    assert_eq!(queues[0].ring.used_index(), 0, "a ring of a session that has ended is served");
    drop(guest);
}

/// All of guest memory at once, while it is used.
#[test]
pub fn memory_that_goes_under_load_costs_the_session_alone() {
    let disk = Disk::new(DISK_BYTES);
    let mut backend = disk.serve();
    let worker = backend.worker();
    let mut model = disk.contents.clone();
    for round in 0..20 {
        let mut client = Client::start(&backend, &Profile::qemu());
        for number in 0..20 {
            client.queues[0].submit(IN, number * 8, &[], 65536);
        }
        client.queues[0].ring.kick_anyway();
        std::thread::sleep(std::time::Duration::from_micros(round * 10));
        for region in 0..3 {
            client.guest.file_of(region).set_len(0).expect("the memfd shrinks");
        }
        drop(client);
        check_served(&backend, &mut model, round);
        assert_eq!(backend.worker(), worker, "the worker died");
    }
    backend.stop();
}
