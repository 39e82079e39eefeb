//! Changes to what runs: rings that stop and go on, memory that comes and goes, descriptors that are replaced, all under load.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use super::client::{Client, Profile, Step};
use super::guest::{Backing, Guest};
use super::harness::{Disk, PATIENCE, SECTOR, image_bytes};
use super::queue::{IN, NO_STATUS, OK, OUT, Queue};
use super::ring::Event;

const DISK_BYTES: usize = 8 << 20;

/// Big writes, and a read now and then, enough to be in the middle of them when a message arrives.
const WRITES: usize = 192;
const WRITE_BYTES: usize = 16 << 10;

fn busy() -> Profile {
    Profile { ring_size: 1024, depth: WRITES, request_bytes: WRITE_BYTES, ..Profile::qemu().answered() }
}

fn is_read(number: usize) -> bool {
    number % 4 == 3
}

/// Room for the requests of [`busy`].
fn large_guest() -> Guest {
    Guest::with_regions(&[(0, 24 << 20)], Backing::Memfd).expect("guest memory")
}

/// Stops a ring in the middle of many writes, in different ways: all that was taken is complete when the answer comes, nothing
/// completes afterwards, and the rest is served when the ring goes on.
fn check_stops(stop: impl Fn(&mut Client) -> Option<u16>, go_on: impl Fn(&mut Client, u16)) {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut in_the_middle = 0;
    let (mut model, mut attempts) = (disk.contents.clone(), 0);
    while in_the_middle < 3 {
        attempts += 1;
        assert!(attempts < 200, "never in the middle of anything: {in_the_middle} times");
        let mut client = Client::start_on(backend.connect(), &busy(), large_guest());
        let queue = &mut client.queues[0];
        // A first one shows that the ring is being served.
        for number in 0..WRITES {
            if is_read(number) {
                queue.submit(IN, (number * WRITE_BYTES / SECTOR) as u64, &[], WRITE_BYTES);
                continue;
            }
            let bytes = image_bytes(WRITE_BYTES, (attempts * 1000 + number) as u64);
            model[number * WRITE_BYTES..][..WRITE_BYTES].copy_from_slice(&bytes);
            queue.submit(OUT, (number * WRITE_BYTES / SECTOR) as u64, &bytes, 0);
        }
        queue.ring.kick_anyway();
        std::thread::sleep(Duration::from_micros(attempts as u64 % 20 * 100));
        let base = stop(&mut client);
        let queue = &mut client.queues[0];
        let done = queue.ring.used_index();
        let mut completed = 0;
        while let Some((_, request)) = queue.take() {
            assert_eq!(request.status, OK, "what is in the used ring is complete");
            completed += 1;
        }
        if let Some(base) = base {
            assert_eq!(base, done, "the base is where the taken requests end");
        }
        if 0 < completed && completed < WRITES {
            in_the_middle += 1;
            std::thread::sleep(Duration::from_millis(30));
            assert_eq!(queue.ring.used_index(), done, "something completed after the ring had stopped");
        }
        // No call is owed from before, so that those of the rest are seen.
        go_on(&mut client, done);
        let queue = &mut client.queues[0];
        for _ in completed..WRITES {
            let (_, request) = queue.wait(PATIENCE).expect("the rest is served");
            assert_eq!(request.status, OK);
        }
        assert_eq!(queue.running(), 0);
        for number in 0..WRITES {
            let found = queue.read((number * WRITE_BYTES / SECTOR) as u64, WRITE_BYTES);
            assert!(found == model[number * WRITE_BYTES..][..WRITE_BYTES], "write {number} is not there");
        }
    }
    eprintln!("{attempts} attempts");
}

#[test]
pub fn disabling_a_ring_waits_for_what_it_has_taken() {
    let stop = |client: &mut Client| {
        client.enable(0, false);
        None
    };
    check_stops(stop, |client, _| client.enable(0, true));
}

#[test]
pub fn the_base_of_a_ring_waits_for_what_it_has_taken() {
    check_stops(|client| Some(client.base(0)), |client, base| client.set_up(0, base));
}

#[test]
fn a_ring_disabled_and_then_asked_for_its_base_knows_it() {
    let stop = |client: &mut Client| {
        client.enable(0, false);
        Some(client.base(0))
    };
    let go_on = |client: &mut Client, base| {
        client.set_up(0, base);
        client.enable(0, true);
    };
    check_stops(stop, go_on);
}

#[test]
pub fn the_end_of_a_connection_waits_for_what_was_taken() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    for attempt in 0..5u64 {
        let mut client = Client::start_on(backend.connect(), &busy(), large_guest());
        let queue = &mut client.queues[0];
        for number in 0..WRITES {
            queue.submit(OUT, (number * WRITE_BYTES / SECTOR) as u64, &image_bytes(WRITE_BYTES, attempt), 0);
        }
        queue.ring.kick_anyway();
        std::thread::sleep(Duration::from_micros(attempt * 300));
        let guest = client.guest.clone();
        let used = client.queues[0].ring.used;
        let slots = client.queues[0].status_places();
        drop(client);
        // The next one is served only when the last one's rings have stopped.
        drop(Client::start(&backend, &Profile::qemu()));
        let done = guest.load(used + 2);
        let told = slots.iter().filter(|slot| guest.read(**slot, 1)[0] != NO_STATUS).count();
        assert_eq!(told, usize::from(done), "a request was answered and not completed, or the other way round");
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(guest.load(used + 2), done, "something completed after the connection had ended");
    }
}

/// Verified work on the first ring in one thread, while the front end does something in this one.
fn under_load(profile: &Profile, guest: Guest, disrupt: impl FnOnce(&mut Client)) {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let mut client = Client::start_on(backend.connect(), profile, guest);
    let mut queue = client.queues.remove(0);
    let stop = AtomicBool::new(false);
    let batches = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let _stop = SetOnDrop(&stop);
            let mut rng = SmallRng::seed_from_u64(3);
            let mut batches = 0;
            while !stop.load(Ordering::Relaxed) {
                queue.work(&mut model, 0..DISK_BYTES / SECTOR, &mut rng, 1);
                batches += 1;
            }
            batches
        });
        let disrupted = SetOnDrop(&stop);
        disrupt(&mut client);
        std::thread::sleep(Duration::from_millis(50));
        drop(disrupted);
        load.join().expect("the load found nothing wrong")
    });
    assert!(batches > 10, "only {batches} batches of work were done meanwhile");
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How often a disruption is repeated.
const TIMES: usize = 60;

fn pause() {
    std::thread::sleep(Duration::from_millis(1));
}

/// A guest with regions that its driver does not use: 1 MiB each at 1 GiB and above.
fn guest_with_spare_regions() -> Guest {
    let spare = (0..6).map(|number| ((1 << 30) + (number << 24), 1 << 20));
    Guest::with_regions(&[(0, 16 << 20)].into_iter().chain(spare).collect::<Vec<_>>(), Backing::Memfd)
        .expect("guest memory")
}

#[test]
pub fn memory_may_come_and_go_under_load() {
    under_load(&Profile::qemu().answered(), guest_with_spare_regions(), |client| {
        let regions = client.guest.regions();
        for number in 0..TIMES {
            let region = &regions[1 + number % 6];
            client.front_end.remove_mem_region(region).expect("REM_MEM_REG");
            pause();
            client.front_end.add_mem_region(region).expect("ADD_MEM_REG");
        }
    });
}

#[test]
fn the_memory_table_may_come_again_under_load() {
    under_load(&Profile { slots: false, ..Profile::qemu().answered() }, guest_with_spare_regions(), |client| {
        let regions = client.guest.regions();
        for number in 0..TIMES {
            client.front_end.set_mem_table(&regions[..1 + number % 7]).expect("SET_MEM_TABLE");
            pause();
        }
    });
}

#[test]
fn a_ring_may_lose_its_memory_for_a_while() {
    // As QEMU does when the memory's layout changes: it removes what has changed and then adds it again.
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let mut rng = SmallRng::seed_from_u64(8);
    let mut client = Client::start_on(backend.connect(), &Profile::qemu().queues(2).answered(), large_guest());
    let whole = client.guest.regions()[0];
    let half = whole.memory_size / 2;
    let first = VhostUserMemoryRegionInfo { memory_size: half, ..whole };
    let second = VhostUserMemoryRegionInfo {
        guest_phys_addr: whole.guest_phys_addr + half,
        userspace_addr: whole.userspace_addr + half,
        mmap_offset: whole.mmap_offset + half,
        memory_size: half,
        ..whole
    };
    for number in 0..10 {
        for (queue, sectors) in client.queues.iter_mut().zip([0..8192, 8192..16384]) {
            queue.work(&mut model, sectors, &mut rng, 2);
        }
        let (remove, add) =
            if number % 2 == 0 { (vec![whole], vec![first, second]) } else { (vec![second, first], vec![whole]) };
        remove.iter().for_each(|region| client.front_end.remove_mem_region(region).expect("REM_MEM_REG"));
        // The driver goes on meanwhile.
        let head = client.queues[0].submit(IN, 0, &[], SECTOR);
        client.queues[0].ring.kick_anyway();
        for region in &add {
            client.front_end.add_mem_region(region).expect("ADD_MEM_REG");
        }
        let (done, completed) = client.queues[0].wait(PATIENCE).expect("the ring goes on");
        assert_eq!((done, completed.status), (head, OK));
        assert!(completed.data == model[..SECTOR]);
    }
}

#[test]
fn kick_and_call_may_be_replaced_on_a_live_ring() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let mut rng = SmallRng::seed_from_u64(4);
    for profile in [Profile::qemu(), Profile::qemu().answered()] {
        let mut client = Client::start(&backend, &profile);
        for number in 0..TIMES {
            client.queues[0].work(&mut model, 0..2048, &mut rng, 1);
            // Requests run while their event descriptors are replaced.
            let heads: Vec<u16> = (0..8).map(|sector| client.queues[0].submit(IN, sector, &[], SECTOR)).collect();
            client.queues[0].ring.kick_anyway();
            if number % 3 != 0 {
                client.queues[0].ring.call = Event::new();
                client.step(0, Step::Call, 0);
            }
            if number % 3 != 1 {
                client.queues[0].ring.kick = Event::new();
                client.step(0, Step::Kick, 0);
            }
            // Those that wait for the disk may be overtaken.
            for _ in 0..heads.len() {
                let (done, completed) = client.queues[0].wait(PATIENCE).expect("no request and no call is lost");
                let sector = heads.iter().position(|head| *head == done).expect("one of these");
                assert_eq!(completed.status, OK);
                assert!(completed.data == model[sector * SECTOR..][..SECTOR]);
            }
            // The old kick is no longer listened to.
            client.settle();
        }
    }
}

/// One that only calls when a completion that the driver waits for is there would never tell.
#[test]
fn a_driver_may_wait_without_a_call() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let profile = Profile { steps: vec![Step::Num, Step::Base, Step::Addr, Step::Kick], ..Profile::qemu() };
    let mut client = Client::start(&backend, &profile);
    let queue = &mut client.queues[0];
    queue.submit(IN, 0, &[], SECTOR);
    queue.ring.kick();
    super::harness::wait_until("the request is complete", || queue.ring.used_index() == 1);
    let (_, completed) = queue.take().expect("it is");
    assert!(completed.status == OK && completed.data == disk.contents[..SECTOR]);
}

#[test]
fn the_same_things_may_be_said_again_under_load() {
    under_load(&Profile::qemu().queues(2).answered(), Guest::new(), |client| {
        // The ring under load is gone from the client; the second one is set up like it, at the same addresses of its own.
        let config = client.queues[0].ring.config();
        for number in 0..TIMES {
            client.front_end.set_features(client.features).expect("SET_FEATURES");
            client.front_end.set_vring_addr(1, &config).expect("SET_VRING_ADDR");
            client.front_end.set_vring_enable(0, true).expect("SET_VRING_ENABLE");
            if number % 10 == 0 {
                client.front_end.set_owner().expect("SET_OWNER");
            }
            pause();
        }
    });
}

#[test]
fn addresses_may_be_said_again_on_a_live_ring() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let mut rng = SmallRng::seed_from_u64(5);
    let mut client = Client::start(&backend, &Profile::qemu().answered());
    for _ in 0..TIMES {
        let queue: &mut Queue = &mut client.queues[0];
        let head = queue.submit(IN, 5, &[], SECTOR);
        queue.ring.kick_anyway();
        // As QEMU does when it starts and ends logging what is written for a migration.
        client.step(0, Step::Addr, 0);
        client.front_end.set_features(client.features).expect("SET_FEATURES");
        let (done, completed) = client.queues[0].wait(PATIENCE).expect("the ring goes on");
        assert_eq!((done, completed.status), (head, OK));
        client.queues[0].work(&mut model, 0..4096, &mut rng, 1);
    }
}

#[test]
fn one_rings_stop_leaves_the_others_running() {
    under_load(&Profile::qemu().queues(3).answered(), Guest::new(), |client| {
        for _ in 0..TIMES {
            client.enable(1, false);
            let base = client.base(2);
            client.enable(1, true);
            client.front_end.set_vring_base(2, base).expect("SET_VRING_BASE");
            let kick = &client.queues[1].ring.kick.descriptor;
            client.front_end.set_vring_kick(2, kick).expect("SET_VRING_KICK");
        }
    });
}

#[test]
pub fn a_reset_device_starts_afresh() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let mut client = Client::start(&backend, &Profile::qemu().answered());
    client.queues[0].work(&mut model, 0..4096, &mut SmallRng::seed_from_u64(6), 4);
    client.front_end.reset_device().expect("RESET_DEVICE");
    client.queues[0].submit(IN, 0, &[], SECTOR);
    client.queues[0].ring.kick_anyway();
    let used = client.queues[0].ring.used_index();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(client.queues[0].ring.used_index(), used, "a ring is served after a reset");
    // The driver makes new rings in the same memory.
    let profile = Profile::qemu();
    let ring = super::ring::Ring::new(&client.guest, profile.ring_size, true, 0);
    client.queues[0] = Queue::new(ring, 4, 4096);
    client.set_up(0, 0);
    client.enable(0, true);
    client.queues[0].work(&mut model, 0..4096, &mut SmallRng::seed_from_u64(7), 8);
}
