//! A daemon that is killed again and again, at any instruction, in the middle of whatever it does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use super::daemon::{Daemon, Site, wait_until};
use crate::session::client::{Client, Profile};
use crate::session::guest::Guest;
use crate::session::harness::SECTOR;

const KILLS: usize = 100;
const IMAGE_BYTES: usize = 1 << 20;
/// Volumes that come and go. Each belongs to a VM of the same name.
const NAMES: usize = 6;

/// What is known of a volume that comes and goes, by what was answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Known {
    There,
    Gone,
    /// The daemon died before it answered.
    Either,
}

/// One random request, and what its answer says of which volumes there are.
fn act(daemon: &Site, rng: &mut SmallRng, known: &mut BTreeMap<String, Known>) {
    let name = format!("v{}", rng.random_range(0..NAMES));
    let answered = |method: &str, path: &str, body: Option<Value>| {
        daemon.try_ask(method, path, body.as_ref()).map(|answer| answer.status)
    };
    match rng.random_range(0..9) {
        0 | 1 => {
            let mut request =
                json!({ "name": name, "kind": "cow", "channel": "os/stable", "ephemeral": rng.random::<bool>() });
            if rng.random() {
                request = json!({ "name": name, "kind": "blank", "bytes": IMAGE_BYTES });
            }
            let before = known[&name];
            known.insert(name.clone(), Known::Either);
            match answered("POST", "/v1/volumes", Some(request)) {
                Some(201) => _ = known.insert(name, Known::There),
                Some(_) => _ = known.insert(name, before),
                None => {}
            }
        }
        2 | 3 => _ = answered("POST", "/v1/attachments", Some(json!({ "volume": name, "vm": name }))),
        4 => _ = answered("DELETE", &format!("/v1/attachments/{name}/{name}"), None),
        5 => {
            let before = known[&name];
            known.insert(name.clone(), Known::Either);
            match answered("DELETE", &format!("/v1/volumes/{name}"), None) {
                Some(204) => _ = known.insert(name, Known::Gone),
                Some(_) => _ = known.insert(name, before),
                None => {}
            }
        }
        6 => {
            let image = ["os-1", "os-2"][rng.random_range(0..2)];
            _ = answered("POST", "/v1/deployments", Some(json!({ "image": image, "group": "all" })));
        }
        7 => {
            let image = ["os-1", "os-2"][rng.random_range(0..2)];
            _ = answered("PUT", "/v1/channels/os%2Fstable", Some(json!({ "image": image })));
        }
        _ => {
            let verb = ["reset", "rebuild"][rng.random_range(0..2)];
            _ = answered("POST", &format!("/v1/volumes/{name}/{verb}"), None);
        }
    }
}

/// Random verified I/O until it is enough: how much that was.
fn work(daemon: &Site, volume: &str, image: &[u8], writes: bool, enough: &AtomicBool) -> usize {
    let socket = daemon.path(&format!("run/vm/steady/{volume}.sock"));
    let mut client = Client::start_on(daemon.connect(&socket), &Profile::qemu(), Guest::new());
    let mut model = image.to_vec();
    let mut rng = SmallRng::seed_from_u64(image.len() as u64);
    let mut rounds = 0;
    while !enough.load(Ordering::Relaxed) {
        if writes {
            client.queues[0].work(&mut model, 0..IMAGE_BYTES / SECTOR, &mut rng, 1);
        } else {
            let sector = rng.random_range(0..IMAGE_BYTES / SECTOR);
            assert_eq!(client.queues[0].read(sector as u64, SECTOR), image[sector * SECTOR..][..SECTOR]);
        }
        rounds += 1;
        std::thread::sleep(Duration::from_millis(1));
    }
    rounds
}

/// Lets the others end, also when who holds it panics.
struct End<'e>(&'e AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_daemon_that_is_killed_a_hundred_times_loses_nothing_and_leaves_nothing() {
    let mut daemon = Daemon::new();
    let (image, _) = daemon.import("os-1", IMAGE_BYTES, 1);
    daemon.import("os-2", IMAGE_BYTES, 2);
    daemon.set_channel("os/stable", "os-1");
    daemon.ask("PUT", "/v1/groups/all", None).ok();
    for number in 0..NAMES {
        daemon.post("/v1/groups/all/members", json!({ "member": format!("vm:v{number}") }));
    }
    for (name, kind) in [("steady-cow", "cow"), ("steady-read", "read-only")] {
        daemon.post("/v1/volumes", json!({ "name": name, "kind": kind, "image": "os-1" }));
        daemon.attach(name, "steady");
    }
    let known: BTreeMap<String, Known> = (0..NAMES).map(|number| (format!("v{number}"), Known::Gone)).collect();
    let known = Mutex::new(known);
    let enough = AtomicBool::new(false);
    let seed: u64 = rand::random::<u32>().into();
    println!("seed {seed}");
    let site = daemon.site();
    std::thread::scope(|scope| {
        let workers = [("steady-cow", true), ("steady-read", false)].map(|(volume, writes)| {
            let (site, image, enough) = (&site, &image, &enough);
            scope.spawn(move || work(site, volume, image, writes, enough))
        });
        for number in 0..2u64 {
            let (site, known, enough) = (&site, &known, &enough);
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(seed + number);
                while !enough.load(Ordering::Relaxed) {
                    // One at a time, or what is known would depend on who came first.
                    act(site, &mut rng, &mut known.lock().expect("no panic"));
                }
            });
        }
        let end = End(&enough);
        let mut rng = SmallRng::seed_from_u64(seed);
        for _ in 0..KILLS {
            std::thread::sleep(Duration::from_millis(rng.random_range(1..120)));
            daemon.kill();
            daemon.start();
        }
        drop(end);
        for worker in workers {
            let rounds = worker.join().expect("verified I/O goes on through all of it");
            assert!(rounds > KILLS, "{rounds} rounds");
        }
    });
    daemon.kill();
    daemon.start();
    agrees(&daemon, &known.into_inner().expect("no panic"));
}

/// Sees that catalog, files and processes agree, with each other and with what was answered.
fn agrees(daemon: &Site, known: &BTreeMap<String, Known>) {
    let names = |list: &Value, of: &dyn Fn(&Value) -> String| -> BTreeSet<String> {
        list.as_array().expect("a list").iter().map(of).collect()
    };
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let volumes = daemon.get("/v1/volumes");
    let there = names(&volumes, &|volume| text(&volume["name"]));
    for (name, known) in known {
        match known {
            Known::There => assert!(there.contains(name), "{name} was created and is lost"),
            Known::Gone => assert!(!there.contains(name), "{name} was removed and is there"),
            Known::Either => {}
        }
    }
    let attachments = daemon.get("/v1/attachments");
    let attached = names(&attachments, &|attachment| text(&attachment["volume"]));
    for attachment in attachments.as_array().expect("a list") {
        assert_eq!((&attachment["state"], &attachment["error"]), (&json!("running"), &json!(null)), "{attachment}");
    }
    // A delta for each volume that has one, and nothing else.
    let has_delta = |volume: &&Value| {
        let name = text(&volume["name"]);
        volume["kind"] != "read-only" && (volume["ephemeral"] == false || attached.contains(&name))
    };
    let with_delta: BTreeSet<String> =
        volumes.as_array().expect("a list").iter().filter(has_delta).map(|volume| text(&volume["name"])).collect();
    let staged = |attachment: &&Value| attachment["staged"] != json!(null) && attachment["read_only"] == false;
    let staged = attachments.as_array().expect("a list").iter().filter(staged).count();
    let files = daemon.delta_files();
    let of_files: BTreeSet<String> =
        files.iter().map(|file| file.split('.').next().expect("a name").to_owned()).collect();
    assert_eq!(of_files, with_delta);
    assert_eq!(files.len(), with_delta.len() + staged, "{files:?}");
    assert_eq!(daemon.image_files().len(), 2);

    let processes: BTreeSet<u64> = attachments
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|attachment| attachment["process"].as_u64())
        .collect();
    wait_until("backends that nobody knows to be gone", || {
        let running: BTreeSet<u64> = daemon.keepers().into_iter().map(u64::from).collect();
        running == processes && processes.len() == attached.len()
    });
    let controls = fs::read_dir(daemon.path("run/control")).expect("the directory").count();
    assert_eq!(controls, attached.len());
    let of_vms = fs::read_dir(daemon.path("run/vm")).expect("the directory").flatten();
    let sockets: usize = of_vms.map(|vm| fs::read_dir(vm.path()).expect("a directory").count()).sum();
    assert_eq!(sockets, attached.len());
    assert!(daemon.get("/v1/events").as_array().expect("events").iter().all(|event| event["kind"] != "file.unknown"));
    // All of it can still be used.
    for name in &attached {
        let vm = text(
            &attachments.as_array().expect("a list").iter().find(|found| found["volume"] == *name).expect("it")["vm"],
        );
        daemon.detach(&vm, name);
    }
    for name in &there {
        daemon.delete(&format!("/v1/volumes/{name}"));
    }
    assert!(daemon.delta_files().is_empty() && daemon.keepers().is_empty());
}
