//! Attachments and the lives of their backends and their daemon.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::daemon::{Daemon, wait_until};
use crate::session::client::{Client, Profile};
use crate::session::guest::Guest;
use crate::session::harness::SECTOR;

const IMAGE_BYTES: usize = 1 << 20;

fn with_volume() -> (Daemon, Vec<u8>) {
    let daemon = Daemon::new();
    let (contents, _) = daemon.import("os", IMAGE_BYTES, 1);
    daemon.post("/v1/volumes", json!({ "name": "v", "kind": "cow", "image": "os" }));
    (daemon, contents)
}

fn kill(process: &serde_json::Value) {
    let process = Pid::from_raw(process.as_i64().expect("a process") as i32).expect("a process");
    kill_process(process, Signal::KILL).expect("it is killed");
}

#[test]
fn a_volume_has_one_writer_and_an_image_any_number_of_readers() {
    let (daemon, _) = with_volume();
    daemon.post("/v1/volumes", json!({ "name": "shared", "kind": "read-only", "image": "os" }));
    daemon.attach("v", "a");
    let again = |volume: &str, vm: &str| {
        daemon.ask("POST", "/v1/attachments", Some(&json!({ "volume": volume, "vm": vm }))).problem(409, "in-use")
    };
    assert!(again("v", "b").contains("in use by VM a"));
    assert!(again("v", "a").contains("in use by VM a"));
    for vm in ["a", "b", "c"] {
        daemon.attach("shared", vm);
    }
    again("shared", "b");
    // What uses what is said by whoever would take it away.
    let detail = daemon.ask("DELETE", "/v1/images/os", None).problem(409, "in-use");
    assert!(detail.contains("VM c") && detail.contains("volume shared"), "{detail}");
    daemon.ask("DELETE", "/v1/volumes/shared", None).problem(409, "in-use");
    let image = daemon.get("/v1/images/os");
    assert_eq!((&image["vms"], &image["volumes"]), (&json!(["a", "b", "c"]), &json!(["shared", "v"])));
    for (vm, volume) in [("a", "v"), ("a", "shared"), ("b", "shared"), ("c", "shared")] {
        daemon.detach(vm, volume);
    }
    daemon.delete("/v1/volumes/v");
    daemon.delete("/v1/volumes/shared");
    daemon.delete("/v1/images/os");
    assert!(daemon.image_files().is_empty() && daemon.delta_files().is_empty() && daemon.keepers().is_empty());
}

#[test]
fn serial_numbers_say_what_a_disk_is_to_its_vm() {
    let (daemon, _) = with_volume();
    daemon.post("/v1/volumes", json!({ "name": "w", "kind": "read-only", "image": "os" }));
    let serial = |volume: &str, vm: &str, role: serde_json::Value| {
        let request = json!({ "volume": volume, "vm": vm, "role": role });
        daemon.post("/v1/attachments", request)["serial"].as_str().expect("a serial number").to_owned()
    };
    assert_eq!(serial("v", "a", json!("os")), "os");
    assert_eq!(serial("w", "a", json!({ "addon": "drivers" })), "addon-drivers");
    assert_eq!(serial("w", "b", json!("private")), "private");
    let plain = serial("w", "c", json!(null));
    assert!(plain.starts_with("pando-") && plain.len() == 20, "{plain}");
    let mut client = Client::start_on(daemon.connect(&daemon.path("run/vm/a/w.sock")), &Profile::qemu(), Guest::new());
    const GET_ID: u32 = 8;
    let answer = client.queues[0].execute(GET_ID, 0, &[], 20);
    assert_eq!(&answer.data[..13], b"addon-drivers");
}

#[test]
fn a_backend_that_dies_is_started_again_on_the_same_socket() {
    let (daemon, mut model) = with_volume();
    let socket = daemon.attach("v", "a");
    let mut rng = SmallRng::seed_from_u64(1);
    for death in 1..=3u64 {
        let mut client = Client::start_on(daemon.connect(&socket), &Profile::qemu(), Guest::new());
        client.queues[0].work(&mut model, 0..IMAGE_BYTES / SECTOR, &mut rng, 5);
        let before = daemon.attachment("a", "v");
        assert_eq!((&before["connected"], &before["state"]), (&json!(true), &json!("running")));
        kill(&before["process"]);
        wait_until("another backend", || {
            let now = daemon.attachment("a", "v");
            now["state"] == "running" && now["process"] != before["process"] && now["restarts"] == death
        });
    }
    let mut client = Client::start_on(daemon.connect(&socket), &Profile::qemu(), Guest::new());
    client.queues[0].work(&mut model, 0..IMAGE_BYTES / SECTOR, &mut rng, 5);
    let events = daemon.events_of("attachment:a/v");
    assert_eq!(events.iter().filter(|kind| *kind == "backend.died").count(), 3, "{events:?}");
    // One that dies over and over is held.
    drop(client);
    wait_until("the backend to be held", || {
        let now = daemon.attachment("a", "v");
        if now["state"] == "running" {
            kill(&now["process"]);
        }
        now["state"] == "failed"
    });
    assert_eq!(daemon.volume("v")["state"], "failed");
    daemon.detach("a", "v");
    let socket = daemon.attach("v", "a");
    let mut client = Client::start_on(daemon.connect(&socket), &Profile::qemu(), Guest::new());
    client.queues[0].work(&mut model, 0..IMAGE_BYTES / SECTOR, &mut rng, 5);
}

#[test]
fn a_daemon_that_stops_as_a_backend_dies_leaves_that_to_the_next() {
    let (mut daemon, mut model) = with_volume();
    let socket = daemon.attach("v", "a");
    let mut rng = SmallRng::seed_from_u64(2);
    for round in 0..12 {
        kill(&daemon.attachment("a", "v")["process"]);
        // At some moment of what follows from that.
        std::thread::sleep(std::time::Duration::from_micros(rng.random_range(0..6_000)));
        daemon.stop();
        daemon.start();
        wait_until("a backend", || daemon.attachment("a", "v")["state"] != "restarting");
        let now = daemon.attachment("a", "v");
        assert_eq!((&now["state"], &now["error"]), (&json!("running"), &json!(null)), "round {round}");
    }
    let mut client = Client::start_on(daemon.connect(&socket), &Profile::qemu(), Guest::new());
    client.queues[0].work(&mut model, 0..IMAGE_BYTES / SECTOR, &mut rng, 5);
}

#[test]
fn a_daemon_that_stops_leaves_backends_running_and_finds_what_has_become_of_them() {
    let (mut daemon, mut model) = with_volume();
    daemon.post("/v1/volumes", json!({ "name": "w", "kind": "blank", "bytes": IMAGE_BYTES }));
    let socket = daemon.attach("v", "a");
    daemon.attach("w", "b");
    let mut client = Client::start_on(daemon.connect(&socket), &Profile::qemu(), Guest::new());
    let mut rng = SmallRng::seed_from_u64(1);
    let before = daemon.attachment("a", "v");
    let of_w = daemon.attachment("b", "w")["process"].clone();
    daemon.stop();
    client.queues[0].work(&mut model, 0..IMAGE_BYTES / SECTOR, &mut rng, 20);
    kill(&of_w);
    daemon.start();
    let after = daemon.attachment("a", "v");
    assert_eq!(
        (&after["process"], &after["connected"], &after["restarts"]),
        (&before["process"], &json!(true), &json!(0))
    );
    let of_w_now = daemon.attachment("b", "w");
    assert_eq!((&of_w_now["state"], &of_w_now["restarts"]), (&json!("running"), &json!(1)));
    client.queues[0].work(&mut model, 0..IMAGE_BYTES / SECTOR, &mut rng, 5);
    // Counted over both daemons.
    let load = daemon.get("/v1/load");
    assert!(load[0]["writes"].as_u64().expect("a number") > 20, "{load}");
    // Another daemon on the same state is refused.
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_pando"))
        .arg("daemon")
        .args([
            "--state-dir".as_ref(),
            daemon.path("state").as_os_str(),
            "--run-dir".as_ref(),
            daemon.path("other").as_os_str(),
        ])
        .output()
        .expect("it starts");
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another daemon has"), "{second:?}");
}

#[test]
fn long_operations_are_jobs_that_can_be_cancelled() {
    let daemon = Daemon::new();
    let path = daemon.path("large.raw");
    let file = std::fs::File::create(&path).expect("a file");
    // All of it a hole: cheap to have, and long to hash.
    file.set_len(40 << 30).expect("a large file");
    let job = daemon.post("/v1/images", json!({ "path": path, "version": "large" }));
    let at = format!("/v1/jobs/{}", job["id"]);
    wait_until("progress", || daemon.get(&at)["done_bytes"].as_u64().is_some_and(|done| done > 0));
    let running = daemon.get(&at);
    assert_eq!((&running["total_bytes"], &running["state"]), (&json!(40u64 << 30), &json!("running")));
    daemon.ask("DELETE", &at, None).ok();
    assert_eq!(daemon.end_of(&job)["state"], "cancelled");
    assert!(daemon.image_files().is_empty());
    // One that the daemon's death ends is told of by the next one.
    let mut daemon = daemon;
    let job = daemon.post("/v1/images", json!({ "path": path, "version": "large" }));
    daemon.kill();
    daemon.start();
    let job = daemon.end_of(&job);
    assert_eq!(job["state"], "failed");
    assert!(job["error"].as_str().expect("a reason").contains("daemon ended"), "{job}");
    assert!(daemon.image_files().is_empty());
}
