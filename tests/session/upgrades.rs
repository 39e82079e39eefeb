//! Keepers that execute a newer program in their place, and whose workers are replaced, under a guest that notices nothing.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pando::sys::shared;
use pando::vhost_user::boot::{Driver, History, RingStart, Start};
use pando::vhost_user::control::{Command, Reply};
use pando::vhost_user::handover::{HandoverError, State};
use pando::vhost_user::vitals;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use vhost::VhostBackend;

use super::client::{Client, Profile, check_served};
use super::deaths::{kill_worker, profile, storms, vitals_of, work};
use super::harness::{Disk, SECTOR, children_of, descriptors_of, is_stopped, send, wait_until};
use super::lifecycle::contents;
use super::managed::{Managed, Volume, Watcher, manner};
use super::storm::Storm;

const DISK_BYTES: usize = 8 << 20;

/// The program, as it is installed by an upgrade.
fn next_program() -> File {
    let program = File::open(env!("CARGO_BIN_EXE_pando-blk")).expect("the program");
    shared::copy_of_program(&program).expect("a copy")
}

/// Has a keeper execute the program in its place.
#[track_caller]
pub fn upgrade(watcher: &mut Watcher) {
    let reply = watcher.ask(&Command::Upgrade, &[next_program().as_fd()]).0;
    assert!(matches!(reply, Reply::Done), "{reply:?}");
}

fn program_of(process: u32) -> String {
    fs::read_link(format!("/proc/{process}/exe")).expect("a process").to_string_lossy().into_owned()
}

fn serve(disk: &Disk) -> Managed {
    Managed::serve(disk, &Volume::cow("one", &disk.base(), &disk.delta(), false), manner())
}

#[test]
pub fn upgrades_under_load_are_never_noticed() {
    let disk = Disk::new(DISK_BYTES);
    let mut managed = serve(&disk);
    let mut client = Client::start(&managed.backend, &profile().answered());
    let mut storms = storms(&mut client, &disk.contents, 21);
    let progress: Vec<_> = storms.iter().map(|storm| Arc::clone(&storm.progress)).collect();
    let keeper = managed.backend.keeper();
    let mut descriptors = 0;
    work(&mut storms, || {
        let mut rng = SmallRng::seed_from_u64(21);
        for round in 0..30 {
            std::thread::sleep(Duration::from_micros(rng.random_range(0..40_000)));
            let before: u64 = progress.iter().map(|completed| completed.load(Ordering::Relaxed)).sum();
            if round % 5 == 4 {
                kill_worker(&managed.backend);
            }
            upgrade(&mut managed.watcher);
            let after = || progress.iter().map(|completed| completed.load(Ordering::Relaxed)).sum::<u64>();
            wait_until("the guest goes on", || after() > before);
            assert!(program_of(keeper).contains("memfd:pando-blk"), "{}", program_of(keeper));
            // The last one may still be there for a moment.
            let worker = managed.backend.worker();
            assert!(program_of(worker).contains("memfd:pando-blk"), "{}", program_of(worker));
            if round == 9 {
                // It answers when it has come to rest; the upgrade it answers a little earlier.
                managed.watcher.report();
                descriptors = descriptors_of(keeper);
            }
        }
    });
    let (report, _) = managed.watcher.report();
    assert_eq!(descriptors_of(keeper), descriptors, "no descriptor is left over");
    assert!(report.connected && !report.held && report.process == keeper && report.name == "vm-1", "{report:?}");
    // The front end is still understood: what it agreed on with the first program, its rings, and its end.
    for (index, storm) in storms.iter_mut().enumerate() {
        let base = client.base(index);
        profile().steps.iter().for_each(|step| client.step_of(&storm.queue.ring, index, *step, base));
        storm.run_for(50);
    }
    let model = Storm::merge(&storms);
    drop(client);
    assert!(matches!(managed.watcher.ask(&Command::Grow { bytes: 2 * DISK_BYTES as u64 }, &[]).0, Reply::Done));
    upgrade(&mut managed.watcher);
    assert_eq!(managed.watcher.report().0.bytes, 2 * DISK_BYTES as u64);
    assert!(matches!(managed.watcher.ask(&Command::Stop, &[]).0, Reply::Done));
    assert!(managed.backend.wait().success());
    assert!(contents(&disk) == model);
}

/// Stops a worker within a batch of its first ring's.
fn stop_within_a_batch(managed: &Managed) {
    let vitals = vitals_of(managed.backend.keeper());
    let worker = managed.backend.worker();
    let mut pulse = [0; 8];
    wait_until("the worker is at a batch as it is stopped", || {
        send(worker, Signal::STOP);
        wait_until("it has stopped", || is_stopped(worker));
        vitals.read_exact_at(&mut pulse, vitals::PULSES as u64 * 8).expect("memory");
        let is_odd = u64::from_le_bytes(pulse) & 1 != 0;
        if !is_odd {
            send(worker, Signal::CONT);
        }
        is_odd
    });
}

#[test]
fn a_worker_that_is_stuck_holds_no_upgrade_up() {
    let disk = Disk::new(DISK_BYTES);
    let mut managed = serve(&disk);
    let mut client = Client::start(&managed.backend, &profile());
    let mut storms = storms(&mut client, &disk.contents, 24);
    work(&mut storms, || {
        std::thread::sleep(Duration::from_millis(50));
        stop_within_a_batch(&managed);
        // Nobody but the last program has been woken to watch it.
        upgrade(&mut managed.watcher);
        assert!(managed.backend.log().text().contains("is stuck in a batch"));
        std::thread::sleep(Duration::from_millis(50));
    });
    let model = Storm::merge(&storms);
    drop(client);
    managed.backend.stop();
    assert!(contents(&disk) == model);
}

/// Its rings have stopped by then, and a guest whose connection stays would wait for ever.
#[test]
fn an_upgrade_that_cannot_go_on_with_a_guest_ends_its_connection() {
    let disk = Disk::new(1 << 20);
    let mut managed = serve(&disk);
    let mut client = Client::start(&managed.backend, &Profile::qemu());
    client.queues[0].read(0, SECTOR);
    client.guest.file_of(0).set_len(0).expect("the memfd shrinks");
    let mark = managed.backend.log().mark();
    managed.watcher.refused(&Command::Upgrade, &[next_program().as_fd()], "ends behind its file");
    managed.backend.log().expect_after(mark, &["not upgraded", "ends behind its file"]);
    managed.backend.log().expect_after(mark, &["the connection is ended", "ends behind its file"]);
    assert!(client.front_end.get_features().is_err(), "it is still connected");
    drop(client);
    let keeper = managed.backend.keeper();
    wait_until("one worker is left", || children_of(keeper).len() == 1);
    let mut model = disk.contents.clone();
    check_served(&managed.backend, &mut model, 25);
    upgrade(&mut managed.watcher);
    check_served(&managed.backend, &mut model, 26);
}

#[test]
fn a_keeper_without_a_front_end_is_upgraded_and_serves_the_next() {
    let disk = Disk::new(1 << 20);
    let mut managed = serve(&disk);
    let mut model = disk.contents.clone();
    for round in 0..3 {
        check_served(&managed.backend, &mut model, round);
        upgrade(&mut managed.watcher);
    }
    check_served(&managed.backend, &mut model, 9);
    managed.backend.stop();
    assert!(contents(&disk) == model);
}

#[test]
fn a_program_that_cannot_take_over_leaves_the_old_one_running() {
    let disk = Disk::new(DISK_BYTES);
    let mut managed = serve(&disk);
    let mut client = Client::start(&managed.backend, &profile());
    let mut storms = storms(&mut client, &disk.contents, 22);
    let keeper = managed.backend.keeper();
    let program = program_of(keeper);
    let (shell, text) = (shared::copy_of_program(&File::open("/bin/false").expect("a program")), disk.path("text"));
    fs::write(&text, "no program").expect("a file");
    let files = [shell.expect("a copy"), shared::copy_of_program(&File::open(text).expect("a file")).expect("a copy")];
    work(&mut storms, || {
        for (file, words) in files.iter().zip(["cannot take over", "cannot execute"]) {
            managed.watcher.refused(&Command::Upgrade, &[file.as_fd()], words);
        }
        managed.watcher.refused(&Command::Upgrade, &[], "too few");
        let file = File::open(disk.base()).expect("an image");
        managed.watcher.refused(&Command::Upgrade, &[file.as_fd()], "cannot execute");
        std::thread::sleep(Duration::from_millis(50));
    });
    assert_eq!(program_of(keeper), program);
    assert!(managed.watcher.report().0.connected);
    let model = Storm::merge(&storms);
    drop(client);
    managed.backend.stop();
    assert!(contents(&disk) == model);
}

#[test]
fn what_is_staged_and_what_boots_have_been_seen_is_handed_over() {
    let disk = Disk::new(1 << 20);
    let image = disk.path("second.raw");
    fs::write(&image, vec![0x22; 1 << 20]).expect("an image");
    let mut managed = Managed::serve(&disk, &Volume::read_only("first", &disk.base()), manner());
    let mut client = Client::start(&managed.backend, &Profile { features: u64::MAX, ..Profile::qemu() });
    client.queues[0].read(0, SECTOR);
    managed.watcher.stage(&Volume::read_only("second", &image));
    upgrade(&mut managed.watcher);
    let (report, _) = managed.watcher.report();
    assert_eq!((report.tag.as_str(), report.staged.as_deref()), ("first", Some("second")));
    assert_eq!(client.queues[0].read(0, SECTOR), disk.contents[..SECTOR]);
    // The next boot, by its firmware.
    client.base(0);
    let firmware = super::client::VERSION_1 | super::client::PROTOCOL_FEATURES;
    client.restart(&Profile { features: firmware, ..Profile::qemu() });
    assert_eq!(client.queues[0].read(0, SECTOR), [0x22; SECTOR]);
}

/// States as earlier versions wrote them: whatever programs come, these are understood by those that know the version.
#[test]
fn frozen_states_of_this_version_and_the_one_before_are_read() {
    let frozen = include_bytes!("../frozen/keeper-state-4");
    let oldest = State::decode(include_bytes!("../frozen/keeper-state-2"));
    assert!(matches!(oldest, Err(HandoverError::Version { found: 2 })));
    let before = State::decode(include_bytes!("../frozen/keeper-state-3")).expect("a state of version 3");
    assert_eq!(before.further.directs, (None, None), "what version 3 does not have there is none of");
    let state = State::decode(frozen).expect("a state of version 4");
    assert_eq!(state.further.poll_us, 77);
    assert_eq!(state.further.rings.as_ref().map(|rings| rings.files.len()), Some(2));
    assert!(matches!(state.further.directs, (Some(_), None)));
    let mut without = State::decode(frozen).expect("the same");
    without.further.directs = (None, None);
    assert_eq!(without, before);
    assert_eq!(state.service.name, "vm-1/os");
    assert_eq!(state.session.as_ref().map(|session| (session.rings.len(), session.regions.len())), Some((2, 2)));
    let mut history = History::new(false, false);
    let rings = vec![RingStart { index: 0, base: Some(0), used: Some(0) }];
    history.start(&Start { driver: Driver::OperatingSystem, new_connection: true, rings });
    history.stopped(0, 77);
    assert_eq!(state.service.history, history);
    assert_eq!(state.encode().expect("a state"), frozen, "this program writes version 4");
}
