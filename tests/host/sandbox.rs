//! How backends are closed in that a daemon starts.

use std::os::unix::process::CommandExt;
use std::process::Command;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use rustix::process::Signal;
use serde_json::json;

use crate::session::client::{Client, Profile};
use crate::session::guest::Guest;
use crate::session::harness::{SECTOR, Sleeper, children_of, program, send};
use crate::session::sandbox::{User, check_closed, is_open, user_of};

use super::daemon::{Daemon, wait_until};

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

/// Users whom nobody else is.
const FIRST: u32 = 61_100;
const LAST: u32 = 61_102;

/// Whom an attachment's backend runs as: somebody of the range, with a group of the same number and no other.
#[track_caller]
fn own_user(daemon: &Daemon, volume: &str) -> u32 {
    let [keeper, worker] = processes_of(daemon, "vm", volume);
    let uid = user_of(keeper).uid;
    assert_eq!([user_of(keeper), user_of(worker)], [(); 2].map(|()| User { uid, gid: uid, groups: String::new() }));
    assert!((FIRST..=LAST).contains(&uid), "{uid}");
    for process in [keeper, worker] {
        let limits = std::fs::read_to_string(format!("/proc/{process}/limits")).unwrap();
        let processes = limits.lines().find(|line| line.starts_with("Max processes")).expect("a limit");
        assert!(processes.contains(" 1024 "), "{processes}");
    }
    check_closed(keeper);
    check_closed(worker);
    uid
}

fn no_user_is_left(daemon: &Daemon, volume: &str) -> bool {
    let answer = daemon.ask("POST", "/v1/attachments", Some(&json!({ "volume": volume, "vm": "vm" })));
    answer.problem(409, "wrong-state").contains("--backend-uids 61100-61102 has no user left")
}

#[test]
fn backends_have_users_of_their_own_when_there_are_some() {
    let range = format!("{FIRST}-{LAST}");
    let can_execute =
        |uid| program().arg("--version").uid(uid).gid(uid).output().is_ok_and(|output| output.status.success());
    if !rustix::process::geteuid().is_root() || !can_execute(FIRST) {
        eprintln!("SKIPPED: only root can start others as other users, and these have to reach the program");
        return;
    }
    // Somebody is one of them already.
    let somebody = Sleeper::start(Command::new("sleep").arg("1000").uid(FIRST).gid(FIRST));
    assert_eq!(user_of(somebody.process()).uid, FIRST);
    // The daemon is in a group, as a thread's programs are in those that the thread is in.
    rustix::thread::set_thread_groups(&[rustix::process::Gid::from_raw(FIRST)]).unwrap();
    let mut daemon = Daemon::with(&["--backend-uids", &range]);
    let (contents, _) = daemon.import("os", IMAGE_BYTES, 1);
    for (name, kind) in [("a", "cow"), ("b", "read-only"), ("c", "blank"), ("d", "cow")] {
        let image = (kind != "blank").then_some("os");
        let bytes = image.is_none().then_some(IMAGE_BYTES);
        daemon.post("/v1/volumes", json!({ "name": name, "kind": kind, "image": image, "bytes": bytes }));
    }
    let attach = |daemon: &Daemon, volume: &str| {
        daemon.attach(volume, "vm");
        own_user(daemon, volume)
    };
    let (a, b) = (attach(&daemon, "a"), attach(&daemon, "b"));
    assert_ne!(a, b);
    assert!(![a, b].contains(&FIRST), "two run as {FIRST}");
    assert!(no_user_is_left(&daemon, "c"));
    // Whoever has ended is nobody any more, even while nobody has waited for that.
    send(somebody.process(), Signal::KILL);
    assert_eq!(attach(&daemon, "c"), FIRST);
    assert_eq!(user_of(somebody.process()).uid, FIRST);
    drop(somebody);
    assert!(no_user_is_left(&daemon, "d"));

    // They serve.
    let mut model = contents;
    let mut client = Client::start_on(daemon.connect(&daemon.path("run/vm/vm/a.sock")), &Profile::qemu(), Guest::new());
    client.queues[0].work(&mut model, 0..IMAGE_BYTES / SECTOR, &mut SmallRng::seed_from_u64(1), 4);

    // A daemon that returns knows them, and one that is started in the place of another is whom that was.
    daemon.kill();
    daemon.start();
    assert!(no_user_is_left(&daemon, "d"));
    client.queues[0].work(&mut model, 0..IMAGE_BYTES / SECTOR, &mut SmallRng::seed_from_u64(2), 4);
    drop(client);
    let [keeper, _] = processes_of(&daemon, "vm", "a");
    send(keeper, Signal::KILL);
    wait_until("another backend", || {
        let process = daemon.attachment("vm", "a")["process"].as_u64();
        process.is_some_and(|process| process != u64::from(keeper) && !children_of(process as u32).is_empty())
    });
    assert_eq!(own_user(&daemon, "a"), a);

    // Who is nobody's any more can be another's.
    daemon.detach("vm", "b");
    assert_eq!(attach(&daemon, "d"), b);

    // Without the range, the next are whom the daemon is.
    daemon.stop();
    daemon.arguments.clear();
    daemon.start();
    assert_eq!(own_user(&daemon, "a"), a);
    daemon.attach("b", "vm");
    let [keeper, worker] = processes_of(&daemon, "vm", "b");
    assert_eq!([keeper, worker].map(|process| user_of(process).uid), [0, 0]);
}
