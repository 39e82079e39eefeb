//! `pando upgrade`: backends go on with the installed program, under a daemon that may be another one by then.

use serde_json::json;

use super::daemon::Daemon;
use crate::session::client::{Client, Profile};
use crate::session::guest::Guest;

const IMAGE_BYTES: usize = 1 << 20;

#[test]
fn all_backends_are_upgraded_and_their_guests_go_on() {
    let mut daemon = Daemon::new();
    daemon.import("debian-1", IMAGE_BYTES, 1);
    let mut clients = Vec::new();
    for number in 0..4 {
        let name = format!("web-{number}");
        daemon.post("/v1/volumes", json!({ "name": name, "kind": "cow", "image": "debian-1" }));
        let socket = daemon.attach(&name, &name);
        let mut client = Client::start_on(daemon.connect(&socket), &Profile::qemu(), Guest::new());
        client.queues[0].write(8, &[number; 4096]);
        clients.push(client);
    }
    let programs = |daemon: &Daemon| -> Vec<String> {
        let link = |process: u32| std::fs::read_link(format!("/proc/{process}/exe")).expect("a process");
        daemon.keepers().into_iter().map(|process| link(process).to_string_lossy().into_owned()).collect()
    };
    for _ in 0..2 {
        let upgraded = daemon.post("/v1/upgrade", json!(null));
        assert_eq!(upgraded.as_array().map(Vec::len), Some(4), "{upgraded}");
        assert!(upgraded.as_array().into_iter().flatten().all(|one| one["error"].is_null()), "{upgraded}");
        assert!(programs(&daemon).iter().all(|program| program.contains("memfd:pando-blk")), "{:?}", programs(&daemon));
        for (number, client) in clients.iter_mut().enumerate() {
            assert_eq!(client.queues[0].read(8, 4096), [number as u8; 4096]);
        }
        let events = daemon.get("/v1/events");
        assert!(events.as_array().into_iter().flatten().any(|event| event["kind"] == "backend.upgraded"), "{events}");
        // The next daemon finds them as it would have found the others.
        daemon.kill();
        daemon.start();
    }
    let images: Vec<_> =
        (0..4).map(|number| daemon.attachment(&format!("web-{number}"), &format!("web-{number}"))).collect();
    assert!(
        images.iter().all(|attachment| attachment["connected"] == true && attachment["restarts"] == 0),
        "{images:?}"
    );
    drop(clients);
    for number in 0..4 {
        let name = format!("web-{number}");
        daemon.post(&format!("/v1/attachments/{name}/{name}/resume"), json!(null));
        daemon.detach(&name, &name);
    }
    assert_eq!(daemon.post("/v1/upgrade", json!(null)), json!([]));
}
