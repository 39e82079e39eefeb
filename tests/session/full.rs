//! A full file system: writes wait for room, reads go on, and nothing is lost.
//!
//! Each test has a file system of its own in memory, which takes the rights to mount one; without them the tests say so, and are skipped.

use std::path::PathBuf;
use std::process::Command as Program;
use std::time::{Duration, Instant};

use pando::vhost_user::control::Event;

use super::client::{Client, Profile};
use super::deaths::{kill_worker, storms};
use super::harness::{Backend, Disk, PATIENCE, SECTOR, text, wait_until};
use super::lifecycle::contents_of;
use super::managed::{Managed, Volume, manner};
use super::queue::{DISCARD, FLUSH, IOERR, OK, OUT, range_bytes};
use super::storm::Storm;

const DISK_BYTES: usize = 8 << 20;

/// A small file system, mounted for as long as this lives.
struct SmallDisk {
    place: PathBuf,
}

impl SmallDisk {
    /// One of so many MiB; `None` without the rights to mount it.
    fn mount(disk: &Disk, mib: usize) -> Option<SmallDisk> {
        let place = disk.path("small");
        std::fs::create_dir(&place).expect("a directory");
        let options = format!("size={mib}m");
        let mounted = Program::new("mount").args(["-t", "tmpfs", "-o", &options, "none", text(&place)]).status();
        if !mounted.is_ok_and(|status| status.success()) {
            println!("skipped: no rights to mount a file system");
            return None;
        }
        Some(SmallDisk { place })
    }

    fn resize(&self, mib: usize) {
        let options = format!("remount,size={mib}m");
        let status = Program::new("mount").args(["-o", &options, text(&self.place)]).status().expect("mount");
        assert!(status.success(), "mount: {status}");
    }

    fn delta(&self) -> PathBuf {
        self.place.join("delta")
    }

    fn serve(&self, disk: &Disk, more: &[&str]) -> Backend {
        let delta = self.delta();
        disk.serve_as(&[&["--delta", text(&delta), "--create"], more].concat())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a backend of a test that has failed may still have files open there.
        let _ = Program::new("umount").args(["-l", text(&self.place)]).status();
    }
}

fn profile() -> Profile {
    Profile { ring_size: 128, depth: 32, request_bytes: 64 << 10, ..Profile::qemu() }
}

/// Has writes wait for room: puts as many on the ring as fit, over all of the disk, and waits until they are stuck.
fn fill(client: &mut Client, model: &mut [u8], backend: &Backend) -> usize {
    let queue = &mut client.queues[0];
    let mark = backend.log().mark();
    let mut sector = 0;
    while !backend.log().text()[mark..].contains("is full") {
        assert!(sector * SECTOR < model.len(), "it never was full");
        // Room is left on the ring for what is to go on meanwhile.
        while queue.running() < 16 && sector * SECTOR < model.len() {
            let bytes = &mut model[sector * SECTOR..][..64 << 10];
            bytes.fill(sector as u8 | 1);
            queue.submit(OUT, sector as u64, bytes, 0);
            sector += 128;
        }
        queue.ring.kick();
        while let Some((_, completed)) = queue.wait(Duration::from_millis(50)) {
            assert_eq!(completed.status, OK);
        }
    }
    queue.running()
}

#[test]
pub fn writes_wait_for_room_and_reads_do_not() {
    let disk = Disk::new(DISK_BYTES);
    let Some(small) = SmallDisk::mount(&disk, 4) else { return };
    let mut backend = small.serve(&disk, &[]);
    let mut client = Client::start(&backend, &profile());
    let mut model = disk.contents.clone();
    let waiting = fill(&mut client, &mut model, &backend);
    assert!(waiting > 0);
    // Others go on: what needs no room is done, and done right.
    let end = DISK_BYTES - (64 << 10);
    let queue = &mut client.queues[0];
    for _ in 0..3 {
        let head = queue.submit(super::queue::IN, (end / SECTOR) as u64, &[], 64 << 10);
        queue.ring.kick();
        let (done, completed) = queue.wait(PATIENCE).expect("a read that needs no room");
        assert_eq!((done, completed.status), (head, OK));
        assert!(completed.data == model[end..]);
    }
    // Not even a death, a pause or another worker's start ends the wait.
    kill_worker(&backend);
    // One that comes upon the rest of another's room may be done.
    while let Some((_, completed)) = queue.wait(Duration::from_millis(500)) {
        assert_eq!(completed.status, OK);
    }
    let base = client.base(0);
    client.set_up(0, base);
    let queue = &mut client.queues[0];
    while let Some((_, completed)) = queue.wait(Duration::from_millis(500)) {
        assert_eq!(completed.status, OK);
    }
    let waiting = queue.running();
    assert!(waiting > 0);
    let mark = backend.log().mark();
    small.resize(64);
    for _ in 0..waiting {
        assert_eq!(queue.wait(PATIENCE).expect("there is room").1.status, OK);
    }
    backend.log().expect_after(mark, &["there is room again"]);
    for at in (0..DISK_BYTES).step_by(64 << 10) {
        assert!(queue.read((at / SECTOR) as u64, 64 << 10) == model[at..at + (64 << 10)], "at byte {at}");
    }
    queue.flush();
    drop(client);
    backend.stop();
    assert!(contents_of(&disk, &small.delta()) == model);
}

#[test]
fn space_that_the_guest_gives_back_is_room() {
    let disk = Disk::new(DISK_BYTES);
    let Some(small) = SmallDisk::mount(&disk, 4) else { return };
    let backend = small.serve(&disk, &[]);
    let mut client = Client::start(&backend, &profile());
    let mut model = disk.contents.clone();
    let waiting = fill(&mut client, &mut model, &backend);
    let queue = &mut client.queues[0];
    let head = queue.submit(DISCARD, 0, &range_bytes(&[(0, 4096, 0)]), 0);
    queue.ring.kick();
    let mut statuses = Vec::new();
    for _ in 0..=waiting {
        let (done, completed) = queue.wait(PATIENCE).expect("there is room");
        statuses.push((done == head, completed.status));
    }
    assert!(statuses.iter().all(|(_, status)| *status == OK) && statuses.iter().any(|(is_discard, _)| *is_discard));
}

#[test]
fn writes_fail_when_their_time_is_up_or_at_once() {
    for (arguments, least, most) in [(&["--hold-timeout", "1s"][..], 1000, 5000), (&["--on-full", "error"], 0, 900)] {
        let disk = Disk::new(DISK_BYTES);
        let Some(small) = SmallDisk::mount(&disk, 2) else { return };
        let backend = small.serve(&disk, arguments);
        let mut client = Client::start(&backend, &profile());
        let queue = &mut client.queues[0];
        let mut found = None;
        for sector in (0..DISK_BYTES / SECTOR).step_by(128) {
            let begun = Instant::now();
            let completed = queue.execute(OUT, sector as u64, &[7; 64 << 10], 0);
            if completed.status != OK {
                found = Some((completed.status, begun.elapsed().as_millis()));
                break;
            }
        }
        let (status, ms) = found.expect("it is full at some time");
        assert_eq!(status, IOERR, "{arguments:?}");
        assert!((least..most).contains(&ms), "{arguments:?}: after {ms} ms");
        // What was there before is there still, and a flush of it works or says that it does not, and nothing is latched.
        assert_eq!(queue.read(0, SECTOR), [7; SECTOR]);
        small.resize(64);
        assert_eq!(queue.execute(FLUSH, 0, &[], 0).status, OK);
        queue.write(8192, &[9; SECTOR]);
    }
}

#[test]
fn controllers_are_told_ahead_and_when_it_is_full_and_when_it_is_over() {
    let disk = Disk::new(DISK_BYTES);
    let Some(small) = SmallDisk::mount(&disk, 4) else { return };
    let volume = Volume::cow("one", &disk.base(), &small.delta(), false);
    let mut managed = Managed::serve(&disk, &volume, manner());
    let mut client = Client::start(&managed.backend, &profile());
    let mut model = disk.contents.clone();
    fill(&mut client, &mut model, &managed.backend);
    small.resize(64);
    let queue = &mut client.queues[0];
    while queue.running() > 0 {
        assert_eq!(queue.wait(PATIENCE).expect("there is room").1.status, OK);
    }
    let mut seen = |wanted: fn(&Event) -> bool| {
        managed.watcher.report();
        managed.watcher.events.iter().any(wanted)
    };
    wait_until("it is told that it is over", || seen(|event| matches!(event, Event::SpaceBack)));
    assert!(seen(|event| matches!(event, Event::Full { held } if *held > 0)));
    // A file system of 4 MiB has little left when it has less than a twentieth of that.
    assert!(seen(|event| matches!(event, Event::LowSpace { bytes } if *bytes < 1 << 18)));
}

#[test]
pub fn a_file_system_that_is_full_again_and_again_loses_nothing() {
    let disk = Disk::new(DISK_BYTES);
    let Some(small) = SmallDisk::mount(&disk, 2) else { return };
    let mut backend = small.serve(&disk, &[]);
    let mut client = Client::start(&backend, &super::deaths::profile());
    let mut storms = storms(&mut client, &disk.contents, 8);
    super::deaths::work(&mut storms, || {
        for mib in [3, 4, 5, 6, 7, 8, 9, 64] {
            std::thread::sleep(Duration::from_millis(250));
            kill_worker(&backend);
            std::thread::sleep(Duration::from_millis(250));
            small.resize(mib);
        }
    });
    drop(client);
    backend.stop();
    assert!(contents_of(&disk, &small.delta()) == Storm::merge(&storms));
}
