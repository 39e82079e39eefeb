//! Staged volumes and the boots that they wait for: what a guest finds on its disk over starts, pauses, reconnects and
//! reboots, by the rules of [`pando::vhost_user::boot`].

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use pando::vhost_user::control::{Command, Event, Reply, Serve};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, vhost_user::Frontend};

use super::client::{self, Client, Profile};
use super::guest::Guest;
use super::harness::{Disk, SECTOR, image_bytes};
use super::managed::{Managed, Volume, manner};
use super::queue::Queue;
use super::ring::Ring;

const DISK_BYTES: usize = 1 << 20;
const RING_SIZE: u16 = 16;

/// What OVMF takes, and what Linux takes.
const FIRMWARE: u64 = client::VERSION_1 | client::PROTOCOL_FEATURES | client::BLK_FLUSH | client::BLK_SIZE | client::RO;
const KERNEL: u64 = FIRMWARE | client::CONFIG_WCE | client::BLK_MQ | client::INDIRECT_DESC;

/// Two versions of an image, the second perhaps of another size.
struct Images {
    disk: Disk,
    next: PathBuf,
    next_contents: Vec<u8>,
}

impl Images {
    fn new(next_bytes: usize) -> Images {
        let disk = Disk::new(DISK_BYTES);
        let (next, next_contents) = (disk.path("next.raw"), image_bytes(next_bytes, 77));
        std::fs::write(&next, &next_contents).expect("an image");
        Images { disk, next, next_contents }
    }

    fn first(&self) -> Volume {
        Volume::read_only("first", &self.disk.base())
    }

    fn second(&self) -> Volume {
        Volume::read_only("second", &self.next)
    }

    /// Serves the first, with the second staged.
    fn staged(&self, manner: Serve) -> Managed {
        let mut managed = Managed::serve(&self.disk, &self.first(), manner);
        managed.watcher.stage(&self.second());
        managed
    }

    #[track_caller]
    fn is_first(&self, machine: &mut Machine) {
        assert!(machine.sector() == self.disk.contents[SECTOR..2 * SECTOR], "not the first image");
    }

    #[track_caller]
    fn is_second(&self, machine: &mut Machine) {
        assert!(machine.sector() == self.next_contents[SECTOR..2 * SECTOR], "not the second image");
    }
}

/// A machine whose drivers come and go. They use the first of two queues, unless a test has them use both.
struct Machine {
    client: Client,
}

impl Machine {
    /// A new connection on which no ring has been set up, of a new process of the VMM.
    fn connect(managed: &Managed) -> Machine {
        Machine::connect_as(managed, Guest::new())
    }

    fn connect_as(managed: &Managed, guest: Guest) -> Machine {
        let profile = Profile {
            features: FIRMWARE,
            ring_size: RING_SIZE,
            depth: 2,
            request_bytes: 4096,
            slots: false,
            ..Profile::qemu().answered().queues(2)
        };
        let mut client = Client::negotiate(managed.backend.connect(), &profile, guest);
        client.tell_memory();
        Machine { client }
    }

    fn front_end(&mut self) -> &mut Frontend {
        &mut self.client.front_end
    }

    /// A driver resets the device and sets its ring up anew.
    fn start(&mut self, features: u64) {
        let features = features & self.client.offered;
        self.client.front_end.set_features(features).expect("SET_FEATURES");
        self.client.queues[0] = Queue::new(Ring::new(&self.client.guest, RING_SIZE, false, 0), 2, 4096);
        self.go_on(0);
    }

    /// A ring starts at an entry, or goes on.
    fn go_on(&mut self, base: u16) {
        self.client.set_up(0, base);
        self.client.enable(0, true);
    }

    /// The device stops: which entry comes next.
    fn stop(&mut self) -> u16 {
        self.client.enable(0, false);
        self.client.base(0)
    }

    /// What it finds in a sector.
    #[track_caller]
    fn sector(&mut self) -> Vec<u8> {
        self.client.queues[0].read(1, SECTOR)
    }
}

#[test]
fn a_staged_volume_waits_for_the_firmware_of_the_next_boot() {
    let images = Images::new(DISK_BYTES);
    let mut managed = Managed::serve(&images.disk, &images.first(), manner());
    let mut machine = Machine::connect(&managed);
    machine.start(FIRMWARE);
    images.is_first(&mut machine);
    // Between the firmware's start and the kernel's.
    managed.watcher.stage(&images.second());
    machine.stop();
    machine.start(FIRMWARE);
    images.is_first(&mut machine);
    machine.stop();
    machine.start(KERNEL);
    images.is_first(&mut machine);
    // A pause, as QEMU does it and as cloud-hypervisor does.
    let base = machine.stop();
    assert_eq!(base, 1);
    machine.go_on(base);
    images.is_first(&mut machine);
    machine.client.enable(0, false);
    machine.client.enable(0, true);
    images.is_first(&mut machine);
    // A reconnect in the middle of it all.
    let (queue, guest) = (machine.client.queues.remove(0), (*machine.client.guest).clone());
    let used = queue.ring.used_index();
    drop(machine);
    let mut machine = Machine::connect_as(&managed, guest);
    machine.client.front_end.set_features(KERNEL & machine.client.offered).expect("SET_FEATURES");
    machine.client.queues[0] = queue;
    machine.go_on(used);
    images.is_first(&mut machine);
    assert!(managed.watcher.switches().is_empty());
    assert_eq!(managed.watcher.report().0.staged.as_deref(), Some("second"));
    // A reboot.
    machine.stop();
    machine.start(FIRMWARE);
    images.is_second(&mut machine);
    machine.stop();
    machine.start(KERNEL);
    images.is_second(&mut machine);
    match managed.watcher.switches().as_slice() {
        [Event::Switched { tag, bytes }] => assert_eq!((tag.as_str(), *bytes), ("second", DISK_BYTES as u64)),
        events => panic!("{events:?}"),
    }
    let (report, _) = managed.watcher.report();
    assert_eq!((report.tag.as_str(), report.staged), ("second", None));
}

#[test]
fn before_the_first_start_nothing_was_read() {
    let images = Images::new(DISK_BYTES);
    for features in [FIRMWARE, KERNEL] {
        let managed = images.staged(manner());
        let mut machine = Machine::connect(&managed);
        machine.start(features);
        images.is_second(&mut machine);
        std::fs::remove_file(managed.backend.socket()).expect("a socket");
        std::fs::remove_file(&managed.control).expect("a socket");
    }
}

#[test]
fn after_another_keeper_a_boot_has_to_be_seen() {
    let images = Images::new(DISK_BYTES);
    let managed = images.staged(Serve { resumed: true, ..manner() });
    let mut machine = Machine::connect(&managed);
    // It may have read anything from the keeper before.
    machine.start(KERNEL);
    images.is_first(&mut machine);
    machine.stop();
    machine.start(FIRMWARE);
    images.is_second(&mut machine);
}

#[test]
fn kernels_that_follow_each_other_are_boots_where_that_is_known() {
    let images = Images::new(DISK_BYTES);
    for kernel_from_vmm in [false, true] {
        let mut managed = Managed::serve(&images.disk, &images.first(), Serve { kernel_from_vmm, ..manner() });
        let mut machine = Machine::connect(&managed);
        machine.start(KERNEL);
        images.is_first(&mut machine);
        managed.watcher.stage(&images.second());
        machine.stop();
        machine.start(KERNEL);
        if kernel_from_vmm {
            images.is_second(&mut machine);
        } else {
            // It may be a kexec. A new connection is a new life.
            images.is_first(&mut machine);
            drop(machine);
            let mut machine = Machine::connect(&managed);
            machine.start(KERNEL);
            images.is_second(&mut machine);
        }
        std::fs::remove_file(managed.backend.socket()).expect("a socket");
        std::fs::remove_file(&managed.control).expect("a socket");
    }
}

#[test]
fn a_reset_device_has_still_run() {
    let images = Images::new(DISK_BYTES);
    let mut managed = Managed::serve(&images.disk, &images.first(), manner());
    let mut machine = Machine::connect(&managed);
    machine.start(KERNEL);
    images.is_first(&mut machine);
    managed.watcher.stage(&images.second());
    machine.front_end().reset_device().expect("RESET_DEVICE");
    machine.start(KERNEL);
    images.is_first(&mut machine);
    machine.front_end().reset_device().expect("RESET_DEVICE");
    machine.start(FIRMWARE);
    images.is_second(&mut machine);
}

#[test]
fn a_ring_that_the_next_driver_does_not_use_has_no_say() {
    let images = Images::new(DISK_BYTES);
    let mut managed = Managed::serve(&images.disk, &images.first(), manner());
    let mut machine = Machine::connect(&managed);
    machine.start(KERNEL);
    images.is_first(&mut machine);
    machine.client.set_up(1, 0);
    machine.client.enable(1, true);
    machine.client.queues[1].read(0, SECTOR);
    managed.watcher.stage(&images.second());
    // Both stop behind their first request, and a firmware knows one.
    machine.client.enable(1, false);
    assert_eq!((machine.client.base(1), machine.stop()), (1, 1));
    machine.start(FIRMWARE);
    images.is_second(&mut machine);
}

#[test]
fn a_ring_whose_driver_goes_on_has_one() {
    let images = Images::new(DISK_BYTES);
    let mut managed = Managed::serve(&images.disk, &images.first(), manner());
    let mut machine = Machine::connect(&managed);
    machine.start(KERNEL);
    images.is_first(&mut machine);
    managed.watcher.stage(&images.second());
    machine.stop();
    // Said to start from nothing, over a used ring that says otherwise.
    machine.client.set_up(0, 0);
    machine.client.front_end.set_features(FIRMWARE & machine.client.offered).expect("SET_FEATURES");
    machine.client.enable(0, true);
    machine.client.settle();
    assert!(managed.watcher.switches().is_empty());
}

#[test]
fn an_ephemeral_volume_starts_each_boot_afresh() {
    let images = Images::new(DISK_BYTES);
    let (base, delta) = (images.disk.base(), images.disk.delta());
    let ephemeral = |tag: &str| Volume::cow(tag, &base, &delta, true);
    let mut managed = Managed::serve(&images.disk, &ephemeral("one"), manner());
    let mut machine = Machine::connect(&managed);
    machine.start(KERNEL);
    machine.client.queues[0].write(1, &[7; SECTOR]);
    managed.watcher.stage(&ephemeral("two"));
    let position = machine.stop();
    machine.go_on(position);
    assert_eq!(machine.sector(), [7; SECTOR], "a pause forgets nothing");
    machine.stop();
    machine.start(FIRMWARE);
    images.is_first(&mut machine);
}

#[test]
fn another_size_is_told_to_the_front_end() {
    let images = Images::new(2 * DISK_BYTES);
    let mut managed = Managed::serve(&images.disk, &images.first(), manner());
    let mut machine = Machine::connect(&managed);
    let (mut channel, theirs) = UnixStream::pair().expect("a pair");
    channel.set_read_timeout(Some(super::harness::PATIENCE)).expect("a time limit");
    machine.front_end().set_backend_request_fd(&theirs).expect("a channel");
    machine.start(KERNEL);
    images.is_first(&mut machine);
    managed.watcher.stage(&images.second());
    machine.stop();
    machine.start(FIRMWARE);
    images.is_second(&mut machine);
    let mut message = [0; 12];
    channel.read_exact(&mut message).expect("a message");
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let flags = VhostUserConfigFlags::empty();
    let (_, bytes) = machine.front_end().get_config(0, 8, flags, &[0; 8]).expect("GET_CONFIG");
    assert_eq!(bytes[..8], (2 * DISK_BYTES as u64 / SECTOR as u64).to_le_bytes());
    // The same size again is nothing to tell of.
    managed.watcher.stage(&images.second());
    machine.stop();
    machine.start(KERNEL);
    machine.sector();
    machine.stop();
    machine.start(FIRMWARE);
    machine.sector();
    assert_eq!(managed.watcher.switches().len(), 2);
    channel.set_nonblocking(true).expect("a socket");
    let nothing = channel.read(&mut message).expect_err("nothing more is told");
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn growth_of_an_ephemeral_volume_keeps_what_was_written() {
    let images = Images::new(DISK_BYTES);
    let volume = Volume::cow("one", &images.disk.base(), &images.disk.delta(), true);
    let mut managed = Managed::serve(&images.disk, &volume, manner());
    let mut machine = Machine::connect(&managed);
    machine.start(KERNEL);
    machine.client.queues[0].write(1, &[7; SECTOR]);
    assert!(matches!(managed.watcher.ask(&Command::Grow { bytes: 2 << 20 }, &[]).0, Reply::Done));
    assert_eq!(machine.sector(), [7; SECTOR], "a completed write is gone");
    assert_eq!(machine.client.capacity(), (2 << 20) / SECTOR as u64);
}

#[test]
fn a_migrated_guest_keeps_its_volume() {
    let images = Images::new(DISK_BYTES);
    let mut managed = images.staged(manner());
    let mut machine = Machine::connect(&managed);
    machine.client.front_end.set_features(KERNEL & machine.client.offered).expect("SET_FEATURES");
    machine.client.queues[0] = Queue::new(Ring::new(&machine.client.guest, RING_SIZE, false, 5), 2, 4096);
    machine.go_on(5);
    images.is_first(&mut machine);
    assert!(managed.watcher.switches().is_empty());
}

#[test]
fn a_volume_of_another_kind_is_not_switched_to() {
    let images = Images::new(DISK_BYTES);
    let volume = Volume::cow("one", &images.disk.base(), &images.disk.delta(), false);
    let mut managed = Managed::serve(&images.disk, &volume, manner());
    let mut machine = Machine::connect(&managed);
    machine.start(KERNEL);
    machine.client.queues[0].write(1, &[3; SECTOR]);
    machine.stop();
    managed.watcher.stage(&images.second());
    machine.start(FIRMWARE);
    assert_eq!(machine.sector(), [3; SECTOR]);
    match managed.watcher.switches().as_slice() {
        [Event::SwitchFailed { tag, reason }] => assert!(tag == "second" && reason.contains("read-only"), "{reason}"),
        events => panic!("{events:?}"),
    }
}
