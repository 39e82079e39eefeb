//! Many volumes from one image, at once.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

use pando::sys::process::is_same_opening;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde_json::json;

use super::daemon::Daemon;
use crate::session::client::{Client, Profile};
use crate::session::guest::{Backing, Guest};
use crate::session::harness::{SECTOR, private_bytes_of};

const IMAGE_BYTES: usize = 4 << 20;
const VOLUMES: usize = 100;

/// The descriptors of a process that are open on a file.
fn descriptors_on(process: u32, file: &fs::Metadata) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{process}/fd")).expect("its descriptors").flatten();
    let is_on = |entry: &fs::DirEntry| {
        fs::metadata(entry.path()).is_ok_and(|found| (found.dev(), found.ino()) == (file.dev(), file.ino()))
    };
    entries
        .filter(is_on)
        .map(|entry| entry.file_name().to_str().expect("a number").parse().expect("a number"))
        .collect()
}

fn children_of(process: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).expect("its children");
    children.split_ascii_whitespace().map(|child| child.parse().expect("a number")).collect()
}

#[test]
fn a_hundred_volumes_share_one_image_that_is_opened_once() {
    let mut daemon = Daemon::new();
    let (contents, digest) = daemon.import("os", IMAGE_BYTES, 1);
    daemon.set_channel("os/stable", "os");
    let attach = |daemon: &Daemon, number: usize| {
        let name = format!("v{number}");
        daemon.post("/v1/volumes", json!({ "name": name, "kind": "cow", "channel": "os/stable" }));
        daemon.attach(&name, &format!("vm{number}"))
    };
    let mut sockets: Vec<_> = (0..VOLUMES / 2).map(|number| attach(&daemon, number)).collect();
    // The second half by another daemon, which gets the image back from the backends of the first.
    daemon.kill();
    daemon.start();
    sockets.extend((VOLUMES / 2..VOLUMES).map(|number| attach(&daemon, number)));

    let keepers = daemon.keepers();
    assert_eq!(keepers.len(), VOLUMES);
    // Three for each attachment, and some for all else.
    let descriptors = fs::read_dir(format!("/proc/{}/fd", daemon.process())).expect("its descriptors").count();
    assert!(descriptors < 3 * VOLUMES + VOLUMES / 2, "{descriptors} descriptors");
    // What is started is started from where hardly any is, and so takes as long with all of them as with none.
    let starter = daemon.thread("starter");
    let descriptors = fs::read_dir(starter.join("fd")).expect("its descriptors").count();
    assert!(descriptors < 10, "{descriptors} descriptors of the thread that starts backends");
    let image = fs::metadata(daemon.path(&format!("state/images/{digest}.raw"))).expect("the image");
    let processes: BTreeSet<u32> =
        keepers.iter().flat_map(|keeper| [vec![*keeper], children_of(*keeper)].concat()).collect();
    assert_eq!(processes.len(), 2 * VOLUMES, "keepers and workers");
    let first = (keepers[0], descriptors_on(keepers[0], &image)[0]);
    let mut compared = 0;
    for process in processes.iter().copied().chain([daemon.process()]) {
        for descriptor in descriptors_on(process, &image) {
            assert!(
                is_same_opening(first, (process, descriptor)).expect("kcmp"),
                "process {process} opened the image itself"
            );
            compared += 1;
        }
    }
    assert!(compared > VOLUMES, "{compared} descriptors");

    // All at once, each with writes of its own that are read again.
    std::thread::scope(|scope| {
        for (number, socket) in sockets.iter().enumerate() {
            let (daemon, contents) = (&daemon, &contents);
            scope.spawn(move || {
                let guest = Guest::with_regions(&[(0, 1 << 20)], Backing::Memfd).expect("memory");
                let profile = Profile { depth: 8, request_bytes: 16 << 10, ..Profile::qemu() };
                let mut client = Client::start_on(daemon.connect(socket), &profile, guest);
                let mut model = contents.clone();
                let mut rng = SmallRng::seed_from_u64(number as u64);
                client.queues[0].work(&mut model, 0..IMAGE_BYTES / SECTOR, &mut rng, 12);
                client.queues[0].flush();
            });
        }
    });
    // A private copy of the image for each would be four megabytes more.
    for keeper in &keepers {
        let private: u64 = [vec![*keeper], children_of(*keeper)].concat().into_iter().map(private_bytes_of).sum();
        assert!(private < IMAGE_BYTES as u64, "{private} bytes are private");
    }
    assert_eq!(fs::read(daemon.path(&format!("state/images/{digest}.raw"))).expect("the image"), contents);
    let metrics = daemon.ask("GET", "/metrics", None).ok();
    let metrics = metrics.as_str().expect("text");
    let wanted = format!("pando_image_attachments{{image=\"{digest}\",version=\"os\"}} {VOLUMES}");
    assert!(metrics.contains(&wanted), "{metrics}");
    let line = "pando_volume_requests_total{volume=\"v7\",vm=\"vm7\",type=\"flush\"} 1";
    assert!(metrics.lines().any(|found| found == line), "{metrics}");
}
