//! Guests that move from one backend to another: every page that the device writes is noted, and the delta goes along with its guest.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::fs::MemfdFlags;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VringConfigData};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::client::{Client, LOG_ALL, Profile, Step};
use super::deaths::{kill_worker, profile, storms, work};
use super::guest::{Guest, memfd};
use super::harness::{Backend, Disk, PATIENCE, SECTOR, run, text, wait_until};
use super::lifecycle::contents;
use super::queue::{FLUSH, GET_ID, IN, OK, OUT};
use super::storm::Storm;

const DISK_BYTES: usize = 8 << 20;
const PAGE: u64 = 4096;
/// A bit for each page up to the end of the test's guest.
const LOG_BYTES: u64 = ((4 << 30) + (8 << 20)) / PAGE / 8;

/// A dirty log, as a front end has it.
struct Log(File);

impl Log {
    fn new() -> Log {
        Log(memfd(LOG_BYTES + PAGE, MemfdFlags::empty()).expect("memory"))
    }

    /// Has a backend note what it writes, from now on.
    fn begin(&self, client: &mut Client) {
        let region =
            VhostUserDirtyLogRegion { mmap_size: LOG_BYTES, mmap_offset: PAGE, mmap_handle: self.0.as_raw_fd() };
        client.front_end.set_log_base(0, Some(region)).expect("SET_LOG_BASE");
        client.front_end.set_features(client.features | LOG_ALL).expect("SET_FEATURES");
    }

    /// Has a ring's own writes noted too.
    fn include(&self, client: &Client, storm: &Storm, index: usize) {
        let ring = &storm.queue.ring;
        let config = VringConfigData { flags: 1, log_addr: Some(ring.used), ..ring.config() };
        client.front_end.set_vring_addr(index, &config).expect("SET_VRING_ADDR");
    }

    /// The pages that were noted since this was asked last.
    fn take(&self) -> HashSet<u64> {
        let mut bits = vec![0; LOG_BYTES as usize];
        self.0.read_exact_at(&mut bits, PAGE).expect("the log");
        self.0.write_all_at(&vec![0; LOG_BYTES as usize], PAGE).expect("the log");
        let pages = bits.iter().enumerate().filter(|(_, byte)| **byte != 0);
        pages
            .flat_map(|(at, byte)| (0..8).filter(move |bit| byte & (1 << bit) != 0).map(move |bit| at as u64 * 8 + bit))
            .collect()
    }
}

/// All pages of a guest, with their numbers.
fn pages(guest: &Guest) -> Vec<(u64, Vec<u8>)> {
    let of_region = |region: &vm_memory::GuestRegionMmap<()>| {
        let start = region.start_addr().raw_value();
        let bytes = guest.read(start, region.len() as usize);
        let numbered = bytes.chunks(PAGE as usize).map(<[u8]>::to_vec).enumerate();
        numbered.map(move |(at, page)| (start / PAGE + at as u64, page)).collect::<Vec<_>>()
    };
    guest.memory.iter().flat_map(of_region).collect()
}

#[test]
pub fn exactly_what_a_request_writes_is_noted() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve_with(&["--poll-us", "0"]);
    let mut client = Client::start(&backend, &Profile { request_bytes: 64 << 10, ..Profile::qemu().answered() });
    let log = Log::new();
    client.queues[0].write(0, &[1; SECTOR]);
    assert!(log.take().is_empty(), "nobody asked for it");
    log.begin(&mut client);
    let used = client.queues[0].ring.used;
    let config = VringConfigData { flags: 1, log_addr: Some(used), ..client.queues[0].ring.config() };
    client.front_end.set_vring_addr(0, &config).expect("SET_VRING_ADDR");
    log.take();
    let guest = std::sync::Arc::clone(client.queues[0].guest());
    let queue = &mut client.queues[0];
    for (kind, readable, writable) in
        [(IN, 0, 12 << 10), (IN, 0, SECTOR), (OUT, 8 << 10, 0), (FLUSH, 0, 0), (GET_ID, 0, 20)]
    {
        let before = pages(&guest);
        let head = queue.submit(kind, 8, &vec![3; readable], writable);
        let ours: HashSet<u64> = changed(&before, &pages(&guest));
        let before = pages(&guest);
        queue.ring.kick_anyway();
        wait_until("it is done", || queue.ring.used_index() != queue.ring.next_used);
        // The device goes to sleep afterwards, and says so in the used ring.
        std::thread::sleep(Duration::from_millis(20));
        let theirs = changed(&before, &pages(&guest));
        let noted = log.take();
        assert!(
            theirs.is_subset(&noted),
            "type {kind}: {theirs:?} were written, {noted:?} noted; the driver's: {ours:?}"
        );
        let (done, completed) = queue.wait(PATIENCE).expect("it is done");
        assert_eq!((done, completed.status), (head, OK));
        // Data, status, used ring: and no more than that.
        assert!(noted.len() <= writable / PAGE as usize + 4, "type {kind}: {noted:?}");
    }
    // Nobody asks any more.
    client.front_end.set_features(client.features).expect("SET_FEATURES");
    client.settle();
    log.take();
    client.queues[0].read(0, 4096);
    assert!(log.take().is_empty());
}

fn changed(before: &[(u64, Vec<u8>)], after: &[(u64, Vec<u8>)]) -> HashSet<u64> {
    before.iter().zip(after).filter(|(before, after)| before.1 != after.1).map(|(before, _)| before.0).collect()
}

#[test]
pub fn what_is_written_is_noted_whoever_dies() {
    let disk = Disk::new(DISK_BYTES);
    // A queue that polls serves what is prepared before it is kicked, and so before the pages are looked at.
    let backend = disk.serve_with(&["--poll-us", "0"]);
    let mut client = Client::start(&backend, &profile().answered());
    let log = Log::new();
    log.begin(&mut client);
    let mut storms = storms(&mut client, &disk.contents, 11);
    storms.iter().enumerate().for_each(|(index, storm)| log.include(&client, storm, index));
    for round in 0..60 {
        // Ahead of all: a queue that has not got to sleep since the last round serves what is prepared before it is kicked.
        log.take();
        storms.iter_mut().for_each(Storm::prepare);
        let before = pages(&client.guest);
        storms.iter().for_each(|storm| storm.queue.ring.kick_anyway());
        if round % 2 == 1 {
            std::thread::sleep(Duration::from_micros(50 * round));
            kill_worker(&backend);
        }
        for storm in &storms {
            wait_until("all is done", || storm.queue.ring.used_index() == storm.queue.ring.next_available);
        }
        std::thread::sleep(Duration::from_millis(20));
        let (theirs, noted) = (changed(&before, &pages(&client.guest)), log.take());
        assert!(!theirs.is_empty() && theirs.is_subset(&noted), "{:?} were not noted", theirs.difference(&noted));
        storms.iter_mut().for_each(Storm::settle);
    }
}

/// A backend for a guest that comes from elsewhere.
fn serve_incoming(disk: &Disk, name: &str) -> Backend {
    let delta = disk.delta();
    disk.serve_at(&disk.path(name), &["--delta", text(&delta), "--incoming"])
}

#[test]
pub fn a_guest_moves_back_and_forth_with_its_delta() {
    let disk = Disk::new(DISK_BYTES);
    let steps = profile().steps;
    let mut here = disk.serve();
    let mut client = Client::start(&here, &profile().answered());
    let mut storms = storms(&mut client, &disk.contents, 12);
    for round in 0..10 {
        let mut there = serve_incoming(&disk, &format!("socket{round}"));
        // The other front end says all that it can ahead of the guest.
        let manner = Profile { depth: 0, ..profile().answered() };
        let mut next = Client::negotiate(there.connect(), &manner, std::sync::Arc::clone(&client.guest));
        next.tell_memory();
        assert_eq!(next.capacity(), (DISK_BYTES / SECTOR) as u64);
        let log = Log::new();
        work(&mut storms, || {
            std::thread::sleep(Duration::from_millis(30));
            log.begin(&mut client);
            std::thread::sleep(Duration::from_millis(30));
            if round % 3 == 2 {
                kill_worker(&here);
            }
        });
        let bases: Vec<u16> = (0..storms.len())
            .map(|index| {
                client.enable(index, false);
                client.base(index)
            })
            .collect();
        let (mut state, mut ours) = (Vec::new(), UnixStream::pair().expect("a pair"));
        let (direction, phase) = (VhostTransferStateDirection::SAVE, VhostTransferStatePhase::STOPPED);
        let file = std::os::fd::OwnedFd::from(ours.1);
        client.front_end.set_device_state_fd(direction, phase, file).expect("SET_DEVICE_STATE_FD");
        ours.0.read_to_end(&mut state).expect("the state");
        client.front_end.check_device_state().expect("CHECK_DEVICE_STATE");
        ours = UnixStream::pair().expect("a pair");
        let file = std::os::fd::OwnedFd::from(ours.1);
        next.front_end
            .set_device_state_fd(VhostTransferStateDirection::LOAD, phase, file)
            .expect("SET_DEVICE_STATE_FD");
        ours.0.write_all(&state).expect("the state");
        drop(ours.0);
        next.front_end.check_device_state().expect("CHECK_DEVICE_STATE");
        for (index, (storm, base)) in storms.iter().zip(bases).enumerate() {
            steps
                .iter()
                .filter(|step| **step != Step::Err)
                .for_each(|step| next.step_of(&storm.queue.ring, index, *step, base));
            next.enable(index, true);
        }
        storms.iter_mut().for_each(|storm| storm.run_for(200));
        // Who had it before does not get it back while the guest is there, and ends in good order.
        if round == 4 {
            let index = 0;
            let ring = &storms[index].queue.ring;
            let _ = client.front_end.set_vring_kick(index, &ring.kick.descriptor);
            let _ = client.front_end.set_vring_enable(index, true);
            here.log().expect_after(0, &["is in use by"]);
        }
        drop(client);
        here.stop();
        client = next;
        std::mem::swap(&mut here, &mut there);
    }
    let model = Storm::merge(&storms);
    drop(client);
    here.stop();
    assert!(contents(&disk) == model);
}

#[test]
fn a_migration_that_fails_goes_on_where_it_was() {
    let disk = Disk::new(DISK_BYTES);
    let mut here = disk.serve();
    let mut client = Client::start(&here, &profile().answered());
    let mut storms = storms(&mut client, &disk.contents, 13);
    let log = Log::new();
    for _ in 0..5 {
        log.begin(&mut client);
        storms.iter_mut().for_each(|storm| storm.run_for(100));
        let bases: Vec<u16> = (0..storms.len()).map(|index| client.base(index)).collect();
        here.log().expect_after(0, &["left to whoever the guest comes to"]);
        client.front_end.set_features(client.features).expect("SET_FEATURES");
        for (index, (storm, base)) in storms.iter().zip(bases).enumerate() {
            profile().steps.iter().for_each(|step| client.step_of(&storm.queue.ring, index, *step, base));
        }
        storms.iter_mut().for_each(|storm| storm.run_for(100));
    }
    let model = Storm::merge(&storms);
    drop(client);
    here.stop();
    assert!(contents(&disk) == model);
}

#[test]
fn states_of_other_disks_are_refused() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut state = Vec::new();
    state.extend(b"PANDODEV");
    state.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    state.extend((DISK_BYTES as u64 * 2).to_le_bytes());
    state.extend([b'x'; 20]);
    for (bytes, words) in [
        (state, "a disk of 16777216 bytes"),
        (b"QEMU".to_vec(), "not one of a Pando device"),
        (vec![7; 100_000], "not one of"),
    ] {
        let mark = backend.log().mark();
        let client = Client::start(&backend, &Profile::qemu().answered());
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let (direction, phase) = (VhostTransferStateDirection::LOAD, VhostTransferStatePhase::STOPPED);
        let file = std::os::fd::OwnedFd::from(theirs);
        client.front_end.set_device_state_fd(direction, phase, file).expect("SET_DEVICE_STATE_FD");
        let writer = std::thread::spawn(move || {
            // It may be closed before all is written.
            let _ = (&ours).write_all(&bytes);
        });
        assert!(client.front_end.check_device_state().is_err());
        backend.log().expect_after(mark, &[words]);
        writer.join().expect("a writer");
    }
}

#[test]
fn what_is_incoming_exists_and_is_a_delta() {
    let disk = Disk::new(DISK_BYTES);
    let (base, delta, socket) = (disk.base(), disk.delta(), disk.path("socket"));
    let place = ["--base", text(&base), "--socket-path", text(&socket)];
    let (code, _, errors) = run(&[&place[..], &["--delta", text(&delta), "--incoming"]].concat());
    assert!(code == 1 && errors.contains("does not exist"), "{errors}");
    let (code, _, errors) = run(&[&place[..], &["--read-only", "--incoming"]].concat());
    assert!(code == 2 && errors.contains("--incoming goes with --delta"), "{errors}");
    let (code, _, errors) = run(&[&place[..], &["--delta", text(&delta), "--incoming", "--create"]].concat());
    assert!(code == 2 && errors.contains("leave --create out"), "{errors}");
}
