//! How backends are closed in that a daemon starts.

use serde_json::json;

use crate::session::harness::children_of;
use crate::session::sandbox::{check_closed, is_open};

use super::daemon::Daemon;

const IMAGE_BYTES: usize = 1 << 20;

/// The keeper and the worker of an attachment.
#[track_caller]
fn processes_of(daemon: &Daemon, vm: &str, volume: &str) -> [u32; 2] {
    let keeper = daemon.attachment(vm, volume)["process"].as_u64().expect("a process") as u32;
    let workers = children_of(keeper);
    assert_eq!(workers.len(), 1, "a keeper has one worker");
    [keeper, workers[0]]
}

#[track_caller]
fn attach(daemon: &Daemon, volume: &str, kind: &str) -> [u32; 2] {
    daemon.post("/v1/volumes", json!({ "name": volume, "kind": kind, "image": "os" }));
    daemon.attach(volume, "vm");
    processes_of(daemon, "vm", volume)
}

#[test]
fn backends_are_closed_in() {
    let daemon = Daemon::new();
    daemon.import("os", IMAGE_BYTES, 1);
    for kind in ["cow", "read-only"] {
        attach(&daemon, kind, kind).into_iter().for_each(check_closed);
    }
}

#[test]
fn backends_are_open_when_the_daemon_is_told_so_and_says_so() {
    let mut daemon = Daemon::with(&["--no-sandbox"]);
    daemon.import("os", IMAGE_BYTES, 1);
    for process in attach(&daemon, "one", "cow") {
        assert!(is_open(process));
    }
    let said = |daemon: &Daemon| daemon.log().matches("NO SANDBOX").count();
    assert_eq!(said(&daemon), 2, "the daemon and the keeper: {}", daemon.log());
    // A daemon that comes back starts others as it is told itself.
    daemon.stop();
    daemon.arguments.clear();
    daemon.start();
    attach(&daemon, "other", "cow").into_iter().for_each(check_closed);
    assert_eq!(said(&daemon), 2);
}
