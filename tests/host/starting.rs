//! What backends are started with, how many there can be, and what is left of those that have ended.

use std::fs;

use rustix::process::Signal;
use serde_json::json;

use super::daemon::{Daemon, wait_until};
use crate::session::harness::send;

const IMAGE_BYTES: usize = 1 << 20;

/// A daemon that has so many descriptors and may give itself so many, and a volume that any number of VMs may have.
fn with_descriptors(current: u64, maximum: u64) -> Daemon {
    let mut daemon = Daemon::new();
    daemon.import("os", IMAGE_BYTES, 1);
    daemon.post("/v1/volumes", json!({ "name": "v", "kind": "read-only", "image": "os" }));
    restart(&mut daemon, current, maximum);
    daemon
}

fn restart(daemon: &mut Daemon, current: u64, maximum: u64) {
    daemon.stop();
    daemon.descriptors = Some((current, maximum));
    daemon.start();
}

/// A line of what the kernel says of a process, from its second word on.
#[track_caller]
fn said_of(process: u32, file: &str, line: &str) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{process}/{file}")).expect("what the kernel says");
    let found = text.lines().find_map(|found| found.strip_prefix(line)).unwrap_or_else(|| panic!("{line}: {text}"));
    found.split_ascii_whitespace().map(str::to_owned).collect()
}

fn keeper_of(daemon: &Daemon, vm: &str) -> u32 {
    daemon.attachment(vm, "v")["process"].as_u64().expect("a process") as u32
}

/// Kills a backend, and waits for the one that takes its place.
#[track_caller]
fn replace_backend(daemon: &Daemon, vm: &str) {
    let process = keeper_of(daemon, vm);
    send(process, Signal::KILL);
    wait_until("another backend", || {
        daemon.attachment(vm, "v")["process"].as_u64().is_some_and(|it| it != u64::from(process))
    });
}

#[test]
fn the_daemon_gives_itself_all_descriptors_that_it_may_have() {
    let daemon = with_descriptors(100, 500);
    daemon.attach("v", "a");
    for process in [daemon.process(), keeper_of(&daemon, "a")] {
        assert_eq!(said_of(process, "limits", "Max open files")[..2], ["500", "500"]);
    }
}

#[test]
fn a_backend_holds_no_signals_back_but_its_own() {
    let daemon = with_descriptors(1000, 1000);
    daemon.attach("v", "a");
    // Those that ask it to stop. The thread that has started it holds all of them back.
    let held = 1 << (Signal::TERM.as_raw() - 1) | 1 << (Signal::INT.as_raw() - 1);
    assert_eq!(said_of(keeper_of(&daemon, "a"), "status", "SigBlk:"), [format!("{held:016x}")]);
}

#[test]
fn what_there_are_no_descriptors_for_is_refused_by_number_and_all_else_goes_on() {
    // Half of 64 are kept, and each attachment takes three.
    let mut daemon = with_descriptors(64, 64);
    let vm = |number: usize| format!("vm{number}");
    (0..10).for_each(|number| _ = daemon.attach("v", &vm(number)));
    let refused = |daemon: &Daemon| {
        let request = json!({ "volume": "v", "vm": "refused" });
        daemon.ask("POST", "/v1/attachments", Some(&request)).problem(409, "wrong-state")
    };
    let detail = refused(&daemon);
    assert!(
        detail.contains("10 volumes are attached: expected fewer than 10, as many as 64 open descriptors"),
        "{detail}"
    );
    assert_eq!(daemon.get("/v1/attachments").as_array().map(Vec::len), Some(10), "nothing is left of what was refused");
    daemon.detach(&vm(0), "v");
    daemon.attach("v", "further");
    refused(&daemon);
    // A backend that dies is none more.
    replace_backend(&daemon, "further");

    // One that comes back with fewer leaves the rest as it is.
    restart(&mut daemon, 56, 56);
    let count = |daemon: &Daemon, state: &str| {
        let attachments = daemon.get("/v1/attachments");
        attachments.as_array().expect("a list").iter().filter(|attachment| attachment["state"] == state).count()
    };
    assert_eq!((count(&daemon, "running"), count(&daemon, "restarting")), (9, 1));
    assert_eq!(daemon.keepers().len(), 10);
    assert!(
        daemon.log().contains("9 volumes are attached: expected fewer than 9, as many as 56 open"),
        "{}",
        daemon.log()
    );
    // And whoever goes needs none.
    (1..10).for_each(|number| daemon.detach(&vm(number), "v"));
    daemon.detach("further", "v");
    assert!(daemon.keepers().is_empty());
}

#[test]
fn nothing_is_left_of_backends_that_have_ended() {
    let daemon = with_descriptors(1000, 1000);
    let starter = daemon.thread("starter");
    let children = || {
        let found = fs::read_to_string(starter.join("children")).expect("its children");
        found.split_ascii_whitespace().count()
    };
    let vms = ["a", "b", "c"];
    vms.iter().for_each(|vm| _ = daemon.attach("v", vm));
    assert_eq!(children(), 3);
    replace_backend(&daemon, "a");
    wait_until("the end of the first", || children() == 3);
    vms.iter().for_each(|vm| daemon.detach(vm, "v"));
    wait_until("the end of all", || children() == 0);
}
