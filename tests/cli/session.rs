//! `check` and `--repair` while a session runs, and after one that was not closed.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::disk::{CLUSTER, Disk};
use super::holds;

/// A backend that serves a disk's delta, killed when dropped.
struct Backend(Child);

impl Backend {
    fn serve(disk: &Disk) -> Backend {
        let socket = disk.path("socket");
        let child = Command::new(env!("CARGO_BIN_EXE_pando"))
            .arg("serve")
            .arg("--base")
            .arg(disk.path("base.raw"))
            .arg("--delta")
            .arg(disk.delta())
            .arg("--socket-path")
            .arg(&socket)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let backend = Backend(child);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "the backend does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        backend
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_delta_in_use_is_not_repaired_and_its_holder_is_named() {
    let disk = Disk::new(64 * CLUSTER, 64 * CLUSTER);
    let backend = Backend::serve(&disk);
    let process = backend.0.id();
    // The keeper became what `pando` was: the same process.
    let holder = format!("process {process} (");
    holds(disk.pando("check", &["--repair"]).refused(), &["vm.delta is in use by", &holder, "pando-blk", "one writer"]);
    let check = disk.pando("check", &[]);
    holds(check.ok(), &["in use by", &holder, "no faults"]);
    assert_eq!(disk.pando("info", &["--json"]).json()["session"]["holder"]["process"], process);
}

#[test]
fn space_is_not_judged_while_a_session_runs() {
    let disk = Disk::new(64 * CLUSTER, 64 * CLUSTER);
    let session = disk.session();
    session.write(0, &[1; 3 * CLUSTER as usize]);
    session.zero(CLUSTER, CLUSTER);
    session.flush();
    let check = disk.pando("check", &["--json"]);
    check.ok();
    holds(check.json()["in_use_by"].as_str().unwrap(), &[&std::process::id().to_string()]);
    session.close();
    assert_eq!(disk.pando("check", &[]).code, 3);
}

#[test]
fn a_mark_counts_where_the_file_has_no_data() {
    let group = 16128;
    let disk = Disk::new(2 * group * CLUSTER, 5 * group * CLUSTER);
    let session = disk.session();
    session.discard((group + 7) * CLUSTER, 2 * CLUSTER);
    session.kill();
    let info = disk.pando("info", &["--json"]).json();
    assert_eq!((&info["clusters"]["zero"], &info["session"]["marks"]), (&2.into(), &1.into()));
}

#[test]
fn a_session_whose_process_died_is_finished_by_a_repair() {
    let disk = Disk::new(64 * CLUSTER, 64 * CLUSTER);
    let session = disk.session();
    session.write(0, &[1; 3 * CLUSTER as usize]);
    session.flush();
    session.write(20 * CLUSTER, &[2; 2 * CLUSTER as usize]);
    session.discard(CLUSTER, CLUSTER);
    session.kill();

    let check = disk.pando("check", &["--json"]);
    assert_eq!(check.code, 3, "{check:?}");
    let json = check.json();
    assert_eq!((&json["faults"], &json["notes"]), (&0.into(), &1.into()), "logged data is no leak: {json}");
    assert_eq!(json["findings"][0]["kind"], "process-died");

    holds(disk.pando("check", &["--repair"]).ok(), &["repaired: finished the last session"]);
    let info = disk.pando("info", &["--json"]).json();
    assert_eq!((&info["session"]["state"], &info["session"]["marks"]), (&"closed".into(), &0.into()));
    assert_eq!((&info["clusters"]["delta"], &info["clusters"]["zero"]), (&4.into(), &1.into()));
    assert_eq!(disk.bytes_at("vm.delta", disk.header.layout.data(20), 2 * CLUSTER), vec![2; 2 * CLUSTER as usize]);
}

#[test]
fn after_the_host_went_down_the_log_does_not_count() {
    let disk = Disk::new(64 * CLUSTER, 64 * CLUSTER);
    let session = disk.session();
    session.write(0, &[1; 3 * CLUSTER as usize]);
    session.flush();
    session.write(20 * CLUSTER, &[2; 2 * CLUSTER as usize]);
    session.kill();
    // The same session as if of another boot.
    let mut sector = disk.bytes_at("vm.delta", 512, 512);
    sector[16..32].fill(0x77);
    let end = 40;
    let checksum = crc32c::crc32c(&sector[..end]).to_le_bytes();
    sector[end..end + 4].copy_from_slice(&checksum);
    disk.scribble(&sector, 512);

    let info = disk.pando("info", &["--json"]).json();
    assert_eq!((&info["session"]["state"], &info["clusters"]["delta"]), (&"host-went-down".into(), &3.into()));
    let check = disk.pando("check", &["--json"]);
    assert_eq!(check.code, 3);
    let kinds: Vec<_> =
        check.json()["findings"].as_array().unwrap().iter().map(|found| found["kind"].clone()).collect();
    assert_eq!(kinds, ["host-went-down", "leak"]);
    let before = disk.disk_bytes();
    holds(disk.pando("check", &["--repair"]).ok(), &["finished the last session", "gave back 8 KiB"]);
    // Two clusters, and a block of either half of the mark log.
    assert_eq!(disk.disk_bytes() + 4 * CLUSTER, before);
    assert_eq!(disk.pando("info", &["--json"]).json()["clusters"]["delta"], 3);
}

#[test]
fn a_dead_session_over_a_corrupt_map_keeps_its_log() {
    let disk = Disk::new(64 * CLUSTER, 4000 * CLUSTER);
    let session = disk.session();
    session.write(0, &[1; CLUSTER as usize]);
    session.flush();
    session.write(20 * CLUSTER, &[2; 512]);
    session.kill();
    // Space held for nothing, of a sector of the map that is whole.
    disk.scribble(&[9; CLUSTER as usize], disk.header.layout.data(3000));
    let sector = disk.header.layout.map_block(0);
    disk.flip(sector + 9);
    let before = disk.disk_bytes();
    let repair = disk.pando("check", &["--repair"]);
    assert_eq!(repair.code, 2);
    assert!(!repair.out.contains("vm.delta: repaired:"), "{repair:?}");
    assert_eq!(disk.disk_bytes(), before);
    disk.flip(sector + 9);
    assert_eq!(disk.pando("info", &["--json"]).json()["clusters"]["delta"], 2, "with the map back, the log counts");
}

#[test]
fn what_a_log_may_speak_of_is_not_given_back() {
    let disk = Disk::new(64 * CLUSTER, 64 * CLUSTER);
    let session = disk.session();
    session.write(20 * CLUSTER, &[2; CLUSTER as usize]);
    session.kill();
    disk.flip(512 + 12);
    for arguments in [&["--json"][..], &["--json", "--repair"]] {
        let check = disk.pando("check", arguments);
        assert_eq!(check.code, 2);
        let json = check.json();
        assert_eq!((&json["faults"], &json["notes"]), (&1.into(), &0.into()), "nothing is called a leak: {json}");
        assert_eq!(json["repairs"].as_array().unwrap().len(), 0);
    }
    disk.flip(512 + 12);
    assert_eq!(disk.pando("info", &["--json"]).json()["clusters"]["delta"], 1);
    assert_eq!(disk.bytes_at("vm.delta", disk.header.layout.data(20), CLUSTER), vec![2; CLUSTER as usize]);
}
