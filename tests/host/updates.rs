//! Images that change below volumes: at a guest's boot, and at nothing else.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::daemon::{Daemon, wait_until};
use crate::session::client::{BLK_FLUSH, Client, Profile, VERSION_1};
use crate::session::guest::Guest;
use crate::session::harness::{SECTOR, locked_openings};

const IMAGE_BYTES: usize = 1 << 20;

/// A guest with firmware: each start is a whole front end's, on a connection of its own or the last one.
struct Machine<'d> {
    daemon: &'d Daemon,
    socket: PathBuf,
    client: Option<Client>,
}

/// Drivers, by what they take.
fn firmware() -> Profile {
    Profile {
        features: VERSION_1 | BLK_FLUSH | crate::session::client::PROTOCOL_FEATURES,
        ..Profile::qemu().answered()
    }
}

fn kernel() -> Profile {
    Profile::qemu().answered()
}

impl Machine<'_> {
    /// A driver starts from nothing, as at a reset: on the connection that there is, as QEMU has it.
    fn start(&mut self, profile: &Profile) {
        let client = match self.client.take() {
            None => Client::start_on(self.daemon.connect(&self.socket), profile, Guest::new()),
            Some(mut client) => {
                client.base(0);
                client.restart(profile);
                client
            }
        };
        self.client = Some(client);
    }

    /// As a VMM does that ends, or that opens its disks anew at a reboot.
    fn start_anew(&mut self, profile: &Profile) {
        self.client = None;
        self.start(profile);
    }

    /// The first sector, which says what image it is of.
    fn reads(&mut self) -> Vec<u8> {
        self.client.as_mut().expect("a driver").queues[0].read(0, SECTOR)
    }

    /// QEMU's stop and cont: the ring stops, and goes on where it was.
    fn pause(&mut self) {
        let client = self.client.as_mut().expect("a driver");
        client.enable(0, false);
        let base = client.base(0);
        assert_ne!(base, 0, "the driver had done something");
        client.set_up(0, base);
        client.enable(0, true);
        client.settle();
    }

    /// The connection breaks, and the front end comes back with its driver where it was.
    fn reconnect(&mut self, profile: &Profile) {
        let client = self.client.take().expect("a driver");
        let stream = self.daemon.connect(&self.socket);
        self.client = Some(client.reconnect(stream, profile));
    }
}

struct Setup {
    daemon: Daemon,
    old: Vec<u8>,
    new: Vec<u8>,
}

fn setup(volumes: &[serde_json::Value]) -> Setup {
    let daemon = Daemon::new();
    let (old, _) = daemon.import("os-1", IMAGE_BYTES, 1);
    let (new, _) = daemon.import("os-2", IMAGE_BYTES, 2);
    daemon.set_channel("os/stable", "os-1");
    for volume in volumes {
        daemon.post("/v1/volumes", volume.clone());
    }
    Setup { daemon, old: old[..SECTOR].to_vec(), new: new[..SECTOR].to_vec() }
}

fn machine<'d>(daemon: &'d Daemon, volume: &str) -> Machine<'d> {
    Machine { daemon, socket: daemon.attach(volume, "vm"), client: None }
}

fn is_on(daemon: &Daemon, volume: &str, version: &str) -> bool {
    daemon.attachment("vm", volume)["image"]["versions"] == json!([version])
}

#[test]
fn a_read_only_volume_takes_the_new_image_at_the_next_boot_by_firmware() {
    let Setup { daemon, old, new } = setup(&[json!({ "name": "os", "kind": "read-only", "channel": "os/stable" })]);
    let mut machine = machine(&daemon, "os");
    machine.start(&firmware());
    assert_eq!(machine.reads(), old);
    // The channel moves while the boot loader runs: its kernel must find the image that it came from.
    daemon.set_channel("os/stable", "os-2");
    assert_eq!(daemon.attachment("vm", "os")["staged"]["versions"], json!(["os-2"]));
    machine.start(&kernel());
    assert_eq!(machine.reads(), old);
    machine.pause();
    assert_eq!(machine.reads(), old);
    machine.reconnect(&kernel());
    assert_eq!(machine.reads(), old);
    let volume = daemon.volume("os");
    assert_eq!((&volume["behind"], &volume["needs_rebuild"]), (&json!(["os-2"]), &json!(false)), "{volume}");

    // The guest reboots.
    machine.start(&firmware());
    assert_eq!(machine.reads(), new);
    machine.start(&kernel());
    assert_eq!(machine.reads(), new);
    wait_until("the switch to be known", || is_on(&daemon, "os", "os-2"));
    let attachment = daemon.attachment("vm", "os");
    assert_eq!(attachment["previous"]["versions"], json!(["os-1"]));
    assert_eq!(attachment["staged"], json!(null));
    assert_eq!(daemon.volume("os")["behind"], json!([]));

    // And back.
    daemon.ask("POST", "/v1/channels/os%2Fstable/rollback", None).ok();
    assert_eq!(machine.reads(), new);
    machine.start(&firmware());
    assert_eq!(machine.reads(), old);
    wait_until("the way back to be known", || is_on(&daemon, "os", "os-1"));
}

#[test]
fn an_ephemeral_volume_has_a_fresh_delta_on_the_new_image() {
    let Setup { daemon, old, new } =
        setup(&[json!({ "name": "os", "kind": "cow", "ephemeral": true, "channel": "os/stable" })]);
    let mut machine = machine(&daemon, "os");
    machine.start(&firmware());
    assert_eq!(machine.reads(), old);
    machine.start(&kernel());
    machine.client.as_mut().expect("a driver").queues[0].write(0, &[7; SECTOR]);
    assert_eq!(machine.reads(), [7; SECTOR]);
    daemon.set_channel("os/stable", "os-2");
    assert_eq!(machine.reads(), [7; SECTOR]);
    machine.start(&firmware());
    assert_eq!(machine.reads(), new);
    wait_until("the last delta to be gone", || daemon.delta_files().len() == 1);
    // Taken back before it was used: nothing of it stays.
    machine.start(&kernel());
    daemon.set_channel("os/stable", "os-1");
    assert_eq!(daemon.delta_files().len(), 2);
    daemon.set_channel("os/stable", "os-2");
    assert_eq!(daemon.delta_files().len(), 1);
    machine.start(&firmware());
    assert_eq!(machine.reads(), new);
    drop(machine);
    daemon.detach("vm", "os");
    assert!(daemon.delta_files().is_empty());
}

#[test]
fn a_persistent_volume_stays_until_it_is_rebuilt() {
    let Setup { daemon, old, new } = setup(&[json!({ "name": "os", "kind": "cow", "channel": "os/stable" })]);
    let mut machine = machine(&daemon, "os");
    machine.start(&firmware());
    assert_eq!(machine.reads(), old);
    machine.start(&kernel());
    machine.reads();
    daemon.set_channel("os/stable", "os-2");
    machine.start(&firmware());
    assert_eq!(machine.reads(), old);
    let volume = daemon.volume("os");
    assert_eq!((&volume["behind"], &volume["needs_rebuild"]), (&json!(["os-2"]), &json!(true)), "{volume}");
    assert!(daemon.ask("POST", "/v1/volumes/os/rebuild", None).problem(409, "in-use").contains("VM vm"));
    drop(machine);
    daemon.detach("vm", "os");
    // Attached again, it is still what it was.
    let mut machine = self::machine(&daemon, "os");
    machine.start(&firmware());
    assert_eq!(machine.reads(), old);
    drop(machine);
    daemon.detach("vm", "os");
    daemon.ask("POST", "/v1/volumes/os/rebuild", None).ok();
    assert_eq!(daemon.volume("os")["behind"], json!([]));
    let mut machine = self::machine(&daemon, "os");
    machine.start(&firmware());
    assert_eq!(machine.reads(), new);
}

#[test]
fn a_vmm_that_opens_its_disk_anew_boots() {
    let Setup { daemon, old, new } = setup(&[json!({ "name": "os", "kind": "read-only", "channel": "os/stable" })]);
    let mut machine = machine(&daemon, "os");
    // No firmware: the VMM loads the kernel.
    machine.start(&kernel());
    assert_eq!(machine.reads(), old);
    daemon.set_channel("os/stable", "os-2");
    // On the same connection it may be another kernel of the same boot.
    machine.start(&kernel());
    assert_eq!(machine.reads(), old);
    machine.start_anew(&kernel());
    assert_eq!(machine.reads(), new);
}

#[test]
fn an_image_of_another_size_is_told_of() {
    let daemon = Daemon::new();
    daemon.import("os-1", IMAGE_BYTES, 1);
    let (new, _) = daemon.import("os-2", 2 * IMAGE_BYTES, 2);
    daemon.set_channel("os/stable", "os-1");
    daemon.post("/v1/volumes", json!({ "name": "os", "kind": "read-only", "channel": "os/stable" }));
    let mut machine = machine(&daemon, "os");
    machine.start(&firmware());
    machine.reads();
    machine.start(&kernel());
    machine.reads();
    daemon.set_channel("os/stable", "os-2");
    machine.start(&firmware());
    let last = new.len() - SECTOR;
    let sector = machine.client.as_mut().expect("a driver").queues[0].read((last / SECTOR) as u64, SECTOR);
    assert_eq!(sector, new[last..]);
    wait_until("the size to be known", || daemon.attachment("vm", "os")["bytes"] == 2 * IMAGE_BYTES);
}

#[test]
fn a_volume_that_grows_is_as_large_on_its_next_image() {
    let Setup { daemon, old, new } =
        setup(&[json!({ "name": "os", "kind": "cow", "ephemeral": true, "channel": "os/stable" })]);
    let mut machine = machine(&daemon, "os");
    machine.start(&kernel());
    assert_eq!(machine.reads(), old);
    daemon.set_channel("os/stable", "os-2");
    let bytes = 4 * IMAGE_BYTES;
    daemon.post("/v1/volumes/os/grow", json!({ "bytes": bytes }));
    assert_eq!(daemon.attachment("vm", "os")["staged"]["versions"], json!(["os-2"]));
    assert_eq!(machine.reads(), old);
    machine.start(&firmware());
    assert_eq!(machine.reads(), new);
    let client = machine.client.as_mut().expect("a driver");
    assert_eq!(client.capacity(), (bytes / SECTOR) as u64);
    assert_eq!(client.queues[0].read((bytes / SECTOR - 1) as u64, SECTOR), [0; SECTOR]);
    wait_until("the last delta to be gone", || daemon.delta_files().len() == 1);
}

/// Also while others want something of the volume, so that what is heard of it has to wait.
#[test]
fn an_image_that_a_guest_has_booted_into_stays_whoever_dies_then() {
    let Setup { daemon, old, new } =
        setup(&[json!({ "name": "os", "kind": "cow", "ephemeral": true, "channel": "os/stable" })]);
    let mut machine = machine(&daemon, "os");
    machine.start(&kernel());
    assert!(machine.reads() == old);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Acquire) {
                    daemon.ask("POST", "/v1/volumes/os/grow", Some(&json!({ "bytes": 1 }))).problem(422, "invalid");
                }
            });
        }
        let _over = Over(&is_over);
        for round in 0..3 {
            let before = daemon.attachment("vm", "os")["process"].clone();
            let process = Pid::from_raw(before.as_i64().expect("a process") as i32).expect("a process");
            let (version, expected) = if round % 2 == 0 { ("os-2", &new) } else { ("os-1", &old) };
            daemon.set_channel("os/stable", version);
            machine.start(&firmware());
            kill_process(process, Signal::KILL).expect("it is killed");
            wait_until("another backend", || {
                let now = daemon.attachment("vm", "os");
                now["state"] == "running" && now["process"] != before
            });
            machine.reconnect(&firmware());
            assert!(machine.reads() == *expected, "round {round}, by the next backend");
            machine.start(&kernel());
            assert!(machine.reads() == *expected, "round {round}, the kernel");
        }
    });
}

/// Says at its end that it is over.
struct Over<'b>(&'b AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// By whatever process it comes to be served, and whatever delta that is by then.
#[test]
fn data_goes_past_the_page_cache_for_as_long_as_it_is_attached() {
    let Setup { mut daemon, old, new } = setup(&[
        json!({ "name": "os", "kind": "cow", "ephemeral": true, "channel": "os/stable" }),
        json!({ "name": "image", "kind": "read-only", "channel": "os/stable" }),
    ]);
    let request = |volume: &str, cache: &str| json!({ "volume": volume, "vm": "vm", "delta_cache": cache });
    let attach = |daemon: &Daemon, volume, cache| daemon.ask("POST", "/v1/attachments", Some(&request(volume, cache)));
    let detail = attach(&daemon, "image", "direct").problem(422, "invalid");
    assert!(detail.contains("a 'read-only' volume has no delta"), "{detail}");
    let detail = attach(&daemon, "os", "none").problem(400, "malformed");
    assert!(detail.contains("writeback"), "{detail}");
    let answer = attach(&daemon, "os", "direct").ok();
    assert_eq!(answer["delta_cache"], "direct");
    let socket = PathBuf::from(answer["socket"].as_str().expect("a socket"));
    let goes_past = |daemon: &Daemon| {
        let process = daemon.attachment("vm", "os")["process"].as_u64().expect("a process") as u32;
        locked_openings(process) == [true]
    };
    assert!(goes_past(&daemon));
    {
        let mut machine = Machine { daemon: &daemon, socket: socket.clone(), client: None };
        machine.start(&kernel());
        assert_eq!(machine.reads(), old);
        daemon.set_channel("os/stable", "os-2");
        machine.start(&firmware());
        assert_eq!(machine.reads(), new);
    }
    wait_until("the last delta to be gone", || daemon.delta_files().len() == 1);
    assert!(goes_past(&daemon), "the next image's");
    daemon.stop();
    daemon.start();
    let before = daemon.attachment("vm", "os");
    assert_eq!(before["delta_cache"], "direct");
    let process = Pid::from_raw(before["process"].as_i64().expect("a process") as i32).expect("a process");
    kill_process(process, Signal::KILL).expect("it is killed");
    wait_until("another backend", || {
        let now = daemon.attachment("vm", "os");
        now["state"] == "running" && now["process"] != before["process"]
    });
    assert!(goes_past(&daemon), "the next keeper's");
    daemon.detach("vm", "os");
    daemon.attach("os", "vm");
    assert!(!goes_past(&daemon), "unless it is asked for");
    assert_eq!(daemon.attachment("vm", "os")["delta_cache"], "writeback");
}

#[test]
fn a_backend_that_dies_over_an_instruction_hands_it_on() {
    let Setup { daemon, old, new } = setup(&[json!({ "name": "os", "kind": "read-only", "channel": "os/stable" })]);
    let mut machine = machine(&daemon, "os");
    machine.start(&kernel());
    assert_eq!(machine.reads(), old);
    let number = daemon.attachment("vm", "os")["process"].as_i64().expect("a process");
    let keeper = Pid::from_raw(number as i32).expect("a process");
    // It hears nothing, and dies over what it has not heard.
    kill_process(keeper, Signal::STOP).expect("it is stopped");
    let site = daemon.site();
    let moving = std::thread::spawn(move || site.set_channel("os/stable", "os-2"));
    wait_until("the instruction to be noted", || daemon.attachment("vm", "os")["staged"] != json!(null));
    kill_process(keeper, Signal::KILL).expect("it is killed");
    moving.join().expect("the channel moves");
    wait_until("another backend with the instruction", || {
        let now = daemon.attachment("vm", "os");
        now["state"] == "running" && now["process"] != number && now["staged"]["versions"] == json!(["os-2"])
    });
    assert_eq!(daemon.attachment("vm", "os")["error"], json!(null));
    assert!(!daemon.events_of("attachment:vm/os").contains(&"image.failed".to_owned()));
    // One that takes another's place takes no start for a boot that could be the same guest's.
    machine.start_anew(&kernel());
    assert_eq!(machine.reads(), old);
    machine.start_anew(&firmware());
    assert_eq!(machine.reads(), new);
}

/// A guest boots into what was staged while there is no daemon, and then its backend dies too: nobody who lives was told of it.
#[test]
fn a_guest_that_booted_unheard_finds_its_image_again_or_none() {
    for ephemeral in [true, false] {
        let kind = if ephemeral { "cow" } else { "read-only" };
        let mut volume = json!({ "name": "os", "kind": kind, "channel": "os/stable" });
        if ephemeral {
            volume["ephemeral"] = json!(true);
        }
        let Setup { mut daemon, old, new } = setup(&[volume]);
        let socket = daemon.attach("os", "vm");
        let mut client = Client::start_on(daemon.connect(&socket), &kernel(), Guest::new());
        assert_eq!(client.queues[0].read(0, SECTOR), old);
        daemon.set_channel("os/stable", "os-2");
        let [keeper] = daemon.keepers()[..] else { panic!("one backend") };
        daemon.kill();
        for profile in [firmware(), kernel()] {
            client.base(0);
            client.restart(&profile);
            assert_eq!(client.queues[0].read(0, SECTOR), new);
        }
        if ephemeral {
            client.queues[0].write(8, &[7; SECTOR]);
        }
        kill_process(Pid::from_raw(keeper as i32).expect("a process"), Signal::KILL).expect("it is killed");
        daemon.start();
        let state = |daemon: &Daemon| daemon.attachment("vm", "os")["state"].clone();
        if ephemeral {
            wait_until("another backend", || state(&daemon) == "running");
            let mut client = client.reconnect(daemon.connect(&socket), &kernel());
            assert_eq!(client.queues[0].read(0, SECTOR), new);
            assert_eq!(client.queues[0].read(8, SECTOR), [7; SECTOR]);
        } else {
            wait_until("it to be given up", || state(&daemon) == "failed");
            assert!(daemon.attachment("vm", "os")["error"].as_str().is_some_and(|why| why.contains("cannot be told")));
            assert!(std::os::unix::net::UnixStream::connect(&socket).is_err(), "nobody serves it");
            drop(client);
            daemon.detach("vm", "os");
            let mut machine = machine(&daemon, "os");
            machine.start(&firmware());
            assert_eq!(machine.reads(), new);
        }
        assert!(is_on(&daemon, "os", "os-2"));
    }
}

#[test]
fn a_deployment_reaches_each_vm_at_its_next_boot_and_can_be_taken_back() {
    let Setup { daemon, old, new } = setup(&[
        json!({ "name": "os", "kind": "read-only", "channel": "os/stable" }),
        json!({ "name": "data", "kind": "blank", "bytes": IMAGE_BYTES }),
        json!({ "name": "kept", "kind": "cow", "image": "os-1" }),
    ]);
    for (vm, volume) in [("a", "os"), ("b", "os"), ("c", "os"), ("a", "data"), ("c", "kept")] {
        daemon.attach(volume, vm);
    }
    daemon.ask("PUT", "/v1/groups/canary", None).ok();
    for vm in ["a", "c", "nobody"] {
        daemon.post("/v1/groups/canary/members", json!({ "member": format!("vm:{vm}") }));
    }
    let deployment = daemon.post("/v1/deployments", json!({ "image": "os-2", "group": "canary" }));
    let state = |deployment: &serde_json::Value, vm: &str, volume: &str| {
        let targets = deployment["targets"].as_array().expect("targets").clone();
        let target = targets.into_iter().find(|target| target["vm"] == vm && target["volume"] == volume);
        target.map(|target| target["state"].as_str().expect("a state").to_owned())
    };
    let states = |deployment: &serde_json::Value| {
        [("a", "os"), ("c", "os"), ("c", "kept")].map(|(vm, volume)| state(deployment, vm, volume).expect("a target"))
    };
    assert_eq!(states(&deployment), ["staged", "staged", "needs-rebuild"]);
    assert_eq!(deployment["targets"].as_array().map(Vec::len), Some(3), "{deployment}");
    assert_eq!(daemon.attachment("b", "os")["staged"], json!(null), "it is in another group");

    // Detached and attached again is a start.
    daemon.detach("a", "os");
    let mut daemon = daemon;
    daemon.kill();
    daemon.start();
    let path = format!("/v1/deployments/{}", deployment["id"]);
    assert_eq!(states(&daemon.get(&path)), ["staged", "staged", "needs-rebuild"], "counted over a restart");
    let reads = |daemon: &Daemon, volume: &str, vm: &str| {
        let socket = daemon.attach(volume, vm);
        let mut client = Client::start_on(daemon.connect(&socket), &kernel(), Guest::new());
        client.queues[0].read(0, SECTOR)
    };
    assert_eq!(reads(&daemon, "os", "a"), new);
    assert_eq!(states(&daemon.get(&path)), ["active", "staged", "needs-rebuild"]);
    daemon.detach("c", "kept");
    daemon.ask("POST", "/v1/volumes/kept/rebuild", None).ok();
    assert_eq!(states(&daemon.get(&path)), ["active", "staged", "active"]);
    assert_eq!(daemon.get(&path)["state"], "rolling");

    let back = daemon.ask("POST", &format!("{path}/rollback"), None).ok();
    assert_eq!(back["state"], "rolled-back");
    assert_eq!(daemon.attachment("c", "os")["staged"], json!(null));
    assert_eq!(daemon.attachment("a", "os")["staged"]["versions"], json!(["os-1"]));
    daemon.detach("a", "os");
    assert_eq!(reads(&daemon, "os", "a"), old);
    daemon.ask("POST", &format!("{path}/rollback"), None).problem(409, "wrong-state");
}

#[test]
fn a_volume_that_grows_says_so_to_its_guest() {
    let Setup { daemon, old, .. } = setup(&[json!({ "name": "os", "kind": "cow", "channel": "os/stable" })]);
    let socket = daemon.attach("os", "vm");
    let mut client = Client::start_on(daemon.connect(&socket), &kernel(), Guest::new());
    let told = client.listen_on_channel();
    client.queues[0].write(3, &[9; SECTOR]);
    let bytes = 4 * IMAGE_BYTES;
    daemon.post("/v1/volumes/os/grow", json!({ "bytes": bytes }));
    assert_eq!(told.next_request(), 2, "the configuration has changed");
    assert_eq!(client.capacity(), (bytes / SECTOR) as u64);
    let last = (bytes / SECTOR - 1) as u64;
    assert_eq!(client.queues[0].read(last, SECTOR), [0; SECTOR]);
    client.queues[0].write(last, &[8; SECTOR]);
    assert_eq!(client.queues[0].read(0, SECTOR), old);
    assert_eq!(client.queues[0].read(3, SECTOR), [9; SECTOR]);
    drop(client);
    daemon.detach("vm", "os");
    daemon.post("/v1/volumes/os/grow", json!({ "bytes": 2 * bytes }));
    assert_eq!(daemon.volume("os")["bytes"], 2 * bytes);
    let smaller = Some(json!({ "bytes": bytes }));
    daemon.ask("POST", "/v1/volumes/os/grow", smaller.as_ref()).problem(422, "invalid");
    let socket = daemon.attach("os", "vm");
    let mut client = Client::start_on(daemon.connect(&socket), &kernel(), Guest::new());
    assert_eq!(client.queues[0].read(last, SECTOR), [8; SECTOR]);
}
