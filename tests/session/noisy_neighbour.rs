//! Two guests over one image, one of which sends garbage without a pause: the other's verified work never notices. (`tools/bench --survive` does so for
//! minutes, and takes the time.)

use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::client::{Client, Profile, check_served};
use super::deaths::{check_all, profile, storms, work};
use super::harness::{Backend, Disk, SECTOR, text};
use super::queue::header;
use super::raw::{self, RawFrontEnd};
use super::ring::{Descriptor, INDIRECT, NEXT, WRITE};

const DISK_BYTES: usize = 8 << 20;
const CHUNK_BYTES: usize = 32 << 10;
/// Bytes of a guest's first region, and an address that none has.
const REGION_BYTES: u64 = 16 << 20;
const NOWHERE: u64 = 1 << 41;
/// Where headers of requests lie, nearly right ones, and how many.
const HEADERS: u64 = 8 << 20;
const HEADERS_COUNT: u64 = 256;
/// How long a ring may stand still before it counts as given up.
const RING_PATIENCE: Duration = Duration::from_millis(100);
/// For how long the neighbour works beside a guest that rests, and then beside garbage.
const AT_REST: Duration = Duration::from_secs(1);
const NOISE: Duration = Duration::from_secs(3);
/// What is no longer a processor that is shared, but a wait for the other guest: a time without any completion, and how many times slower.
const STANDSTILL: Duration = Duration::from_secs(1);
const SLOWED: u64 = 4;
/// What else a busy machine does may look the same, and passes; a wait for the other guest is there each time.
const TRIES: usize = 3;

/// What was sent.
#[derive(Debug, Default)]
struct Sent {
    sessions: usize,
    chains: usize,
    messages: usize,
    /// Rings that have been given up.
    given_up: usize,
}

/// One descriptor of garbage.
fn descriptor(rng: &mut SmallRng, size: u16) -> Descriptor {
    if rng.random_range(0..3) == 0 {
        let address = HEADERS + 16 * rng.random_range(0..HEADERS_COUNT);
        return Descriptor { address, len: 16, flags: NEXT, next: rng.random_range(0..size) };
    }
    let address = match rng.random_range(0..8) {
        0 => rng.random(),
        1 => NOWHERE,
        2 => REGION_BYTES - rng.random_range(0..64),
        _ => rng.random_range(0..REGION_BYTES),
    };
    let len = match rng.random_range(0..8) {
        0 => rng.random(),
        1 | 2 => 16 * rng.random_range(0..8),
        _ => rng.random_range(0..10_000),
    };
    let flags = [0, NEXT, NEXT | WRITE, WRITE, INDIRECT, rng.random()][rng.random_range(0..6)];
    Descriptor { address, len, flags, next: rng.random_range(0..size + size / 32) }
}

/// Garbage on a ring, until that is given up or a while has passed.
fn on_the_ring(client: &mut Client, rng: &mut SmallRng, sent: &mut Sent) {
    let ring = &mut client.queues[0].ring;
    for index in 0..HEADERS_COUNT {
        ring.guest.write(HEADERS + 16 * index, &header(rng.random_range(0..14), rng.random_range(0..3000)));
    }
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(300) {
        for _ in 0..rng.random_range(1..16) {
            for _ in 0..4 {
                ring.set_descriptor(rng.random_range(0..ring.size), descriptor(rng, ring.size));
            }
            let head = if rng.random_range(0..2000) == 0 { rng.random() } else { rng.random_range(0..ring.size) };
            ring.publish(head);
            sent.chains += 1;
        }
        if rng.random_range(0..500) == 0 {
            ring.guest.store(ring.available + 2, rng.random());
        }
        (0..rng.random_range(1..4)).for_each(|_| ring.kick_anyway());
        let standing = Instant::now();
        while ring.next_available.wrapping_sub(ring.used_index()) > ring.size / 2 {
            // What is being read meanwhile changes.
            ring.set_descriptor(rng.random_range(0..ring.size), descriptor(rng, ring.size));
            if standing.elapsed() > RING_PATIENCE {
                sent.given_up += 1;
                return;
            }
        }
    }
}

/// Garbage as messages, which the backend may end at any of them.
fn as_messages(front_end: &RawFrontEnd, rng: &mut SmallRng, sent: &mut Sent) {
    front_end.stream.set_write_timeout(Some(RING_PATIENCE)).expect("a time limit");
    for _ in 0..rng.random_range(1..100) {
        let body: Vec<u8> = (0..rng.random_range(0..10) * 8).map(|_| rng.random_range(0..4)).collect();
        let flags = if rng.random() { raw::VERSION } else { raw::VERSION | raw::NEED_REPLY };
        if front_end.send_bytes(&raw::message(rng.random_range(0..45), flags, &body), &[]).is_err() {
            return;
        }
        sent.messages += 1;
    }
}

fn send_garbage(backend: &Backend, rng: &mut SmallRng, sent: &mut Sent) {
    let begun = Instant::now();
    while begun.elapsed() < NOISE {
        sent.sessions += 1;
        if rng.random_range(0..4) == 0 {
            as_messages(&RawFrontEnd { stream: backend.connect() }, rng, sent);
        } else {
            on_the_ring(&mut Client::start(backend, &Profile::qemu()), rng, sent);
        }
    }
}

#[test]
fn garbage_next_door_is_never_noticed() {
    let disk = Disk::new(DISK_BYTES);
    // Over the same image, which is all that the guests of a host share.
    let delta = disk.path("hostile-delta");
    let mut hostile = disk.serve_at(&disk.path("hostile-socket"), &["--delta", text(&delta), "--create"]);
    let (hostile_worker, backend) = (hostile.worker(), disk.serve());
    let worker = backend.worker();
    let mut client = Client::start(&backend, &profile());
    let mut storms = storms(&mut client, &disk.contents, 31);
    let progress: Vec<_> = storms.iter().map(|storm| Arc::clone(&storm.progress)).collect();
    let progress = || progress.iter().map(|completed| completed.load(Ordering::Relaxed)).sum::<u64>();
    let (mut sent, mut rng) = (Sent::default(), SmallRng::seed_from_u64(31));
    // The best of all tries: the hostile guest may still be at the last one's garbage.
    let mut at_rest = 0;
    for tries in 1.. {
        storms.iter_mut().for_each(|storm| storm.longest = Duration::ZERO);
        let (rested, beside) = work(&mut storms, || {
            let begun = progress();
            std::thread::sleep(AT_REST);
            let rested = progress();
            send_garbage(&hostile, &mut rng, &mut sent);
            (rested - begun, progress() - rested)
        });
        at_rest = at_rest.max(rested * NOISE.as_millis() as u64 / AT_REST.as_millis() as u64);
        let longest = storms.iter().map(|storm| storm.longest).max().unwrap_or_default();
        let found = format!("{beside} requests where {at_rest} are made at rest; the longest wait was {longest:?}");
        println!("{sent:?}; {found}");
        if longest < STANDSTILL && beside > at_rest / SLOWED {
            break;
        }
        assert!(tries < TRIES, "the other guest waits for this one: {found}");
    }
    assert!(sent.sessions > 5 && sent.chains > 1000 && sent.messages > 10, "{sent:?}");
    assert_eq!(backend.worker(), worker);
    check_all(&disk, backend, client, &mut storms);
    assert!(fs::read(disk.base()).expect("the image") == disk.contents, "the image has changed");
    // All of that was requests that fail, rings and connections that end.
    assert_eq!(hostile.worker(), hostile_worker, "the worker died");
    // What of it was a write that is right is the hostile guest's own affair.
    let mut model = vec![0; DISK_BYTES];
    let mut client = Client::start(&hostile, &Profile::qemu());
    for (at, bytes) in model.chunks_mut(CHUNK_BYTES).enumerate() {
        bytes.copy_from_slice(&client.queues[0].read((at * CHUNK_BYTES / SECTOR) as u64, CHUNK_BYTES));
    }
    drop(client);
    assert!(hostile.is_running(), "the backend ended");
    check_served(&hostile, &mut model, 31);
}
