//! Messages of front ends that mean harm, or are broken: cut off, too long, in no order, with descriptors that do not belong.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use rustix::fs::MemfdFlags;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::client::{Client, Profile};
use super::guest::{Guest, memfd};
use super::harness::{Disk, PATIENCE};
use super::raw::{self, RawFrontEnd, message, region, state};
use super::ring::Event;
use super::target::{DISK_BYTES, Target};

#[test]
fn messages_that_make_no_sense_end_the_session() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    let ended: &[&str] = &["the connection is ended"];
    let number = |number: u64| number.to_ne_bytes();
    let simple: Vec<(&str, u32, Vec<u8>)> = vec![
        ("a ring that does not exist, its size", raw::SET_VRING_NUM, state(16, 128).into()),
        ("a ring that does not exist, its base", raw::SET_VRING_BASE, state(u32::MAX, 0).into()),
        ("a ring that does not exist, asked for its base", raw::GET_VRING_BASE, state(16, 0).into()),
        ("a ring that does not exist, enabled", raw::SET_VRING_ENABLE, state(256, 1).into()),
        ("enabled with 2", raw::SET_VRING_ENABLE, state(0, 2).into()),
        ("a size of 0", raw::SET_VRING_NUM, state(0, 0).into()),
        ("a size of 3", raw::SET_VRING_NUM, state(0, 3).into()),
        ("a size of 65536", raw::SET_VRING_NUM, state(0, 65536).into()),
        ("a size of 2^31", raw::SET_VRING_NUM, state(0, 1 << 31).into()),
        ("a base of 65536", raw::SET_VRING_BASE, state(0, 65536).into()),
        ("a body for what has none", raw::RESET_OWNER, vec![0; 8]),
        ("all features", raw::SET_FEATURES, number(u64::MAX).into()),
        ("a feature that is not offered", raw::SET_FEATURES, number(1 << 34).into()),
        ("all protocol features", raw::SET_PROTOCOL_FEATURES, number(u64::MAX).into()),
        ("half a number", raw::SET_FEATURES, vec![0; 4]),
        ("two numbers", raw::SET_FEATURES, vec![0; 16]),
        ("a body where none belongs", raw::GET_FEATURES, vec![0; 8]),
        ("a body of nothing", raw::SET_VRING_ADDR, vec![]),
        ("the largest body", raw::SET_VRING_NUM, vec![0; 4096]),
        ("memory of no regions", raw::SET_MEM_TABLE, vec![0; 8]),
        ("memory of 2^32 regions", raw::SET_MEM_TABLE, [[0xff; 4], [0; 4]].concat()),
        ("memory of a region that is not there", raw::SET_MEM_TABLE, [[1, 0, 0, 0], [0; 4]].concat()),
        (
            "memory without a file",
            raw::SET_MEM_TABLE,
            [&[1, 0, 0, 0, 0, 0, 0, 0][..], &region(0, 4096, 0, 0)[8..]].concat(),
        ),
        ("a region without a file", raw::ADD_MEM_REG, region(0, 4096, 0, 0)),
        ("a kick without a descriptor", raw::SET_VRING_KICK, number(0).into()),
        ("no kick at all", raw::SET_VRING_KICK, number(0x100).into()),
        ("a call without a descriptor", raw::SET_VRING_CALL, number(0).into()),
        ("a call for a ring that does not exist, and none", raw::SET_VRING_CALL, number(0x1ff).into()),
        (
            "flags of an address that do not exist",
            raw::SET_VRING_ADDR,
            [&[0, 0, 0, 0, 0xff, 0, 0, 0][..], &[0; 32]].concat(),
        ),
        ("a configuration of nothing", raw::GET_CONFIG, vec![0; 12]),
        ("a configuration larger than the message", raw::GET_CONFIG, [[0; 4], [0, 1, 0, 0], [0; 4]].concat()),
        (
            "a configuration at the end of all numbers",
            raw::GET_CONFIG,
            [[0xff; 4], [8, 0, 0, 0], [0; 4], [0; 4], [0; 4]].concat(),
        ),
        ("an inflight region, which is not offered", raw::GET_INFLIGHT_FD, vec![0; 24]),
        ("request 0", 0, vec![]),
        ("a request that does not exist", 99, vec![]),
        ("the largest request", u32::MAX, vec![0; 100]),
    ];
    for (name, request, body) in simple {
        target.front_end(name, ended, |front_end| {
            front_end.negotiate();
            front_end.send(request, &body, &[]);
            assert!(front_end.is_ended_within(PATIENCE), "{name}: the connection goes on");
        });
    }
    target.same_worker(worker);
}

#[test]
fn headers_that_make_no_sense_end_the_session() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    let ended: &[&str] = &["the connection is ended"];
    let mut noise = vec![0; 4096];
    SmallRng::seed_from_u64(2).fill_bytes(&mut noise);
    let cases: [(&str, Vec<u8>); 6] = [
        ("version 0", message(raw::GET_FEATURES, 0, &[])),
        ("version 3", message(raw::GET_FEATURES, 3, &[])),
        ("an answer", message(raw::GET_FEATURES, raw::VERSION | 4, &[])),
        (
            "a body of 4 GiB",
            [raw::SET_FEATURES, raw::VERSION, u32::MAX].iter().flat_map(|part| part.to_ne_bytes()).collect(),
        ),
        ("a body of 5000 bytes", [&message(raw::SET_FEATURES, raw::VERSION, &[0; 5000])[..]].concat()),
        ("noise", noise),
    ];
    for (name, bytes) in cases {
        target.front_end(name, ended, |front_end| {
            front_end.send_bytes(&bytes, &[]).expect("the backend listens");
            assert!(front_end.is_ended_within(PATIENCE), "{name}: the connection goes on");
        });
    }
    // Random messages, mostly of requests that exist and with bodies of the right size.
    let mut rng = SmallRng::seed_from_u64(3);
    let file = memfd(1 << 20, MemfdFlags::empty()).expect("a memfd");
    for round in 0..60 {
        target.front_end(&format!("random messages, round {round}"), &[], |front_end| {
            front_end.stream.set_nonblocking(true).expect("a mode");
            for _ in 0..30 {
                let request = rng.random_range(1..44);
                let mut body = vec![0; [0, 8, 12, 16, 20, 24, 32, 40, 48][rng.random_range(0..9)]];
                for byte in &mut body {
                    *byte = if rng.random_range(0..4) == 0 { rng.random() } else { 0 };
                }
                let descriptors = vec![file.as_raw_fd(); [0, 0, 1, 2][rng.random_range(0..4)]];
                let flags = raw::VERSION | if rng.random() { raw::NEED_REPLY } else { 0 };
                if front_end.send_bytes(&message(request, flags, &body), &descriptors).is_err() {
                    break;
                }
            }
        });
    }
    target.same_worker(worker);
}

#[test]
fn messages_in_no_order_or_twice_do_no_harm() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    // Nothing but pieces of a set-up, in random order, many of them twice; then one in order on the same connection.
    let mut rng = SmallRng::seed_from_u64(4);
    for round in 0..40 {
        eprintln!("round {round}");
        let mut client =
            Client::negotiate(target.backend.connect(), &Profile::qemu().queues(2).answered(), Guest::new());
        client.tell_memory();
        let mut told = true;
        for _ in 0..40 {
            use super::client::Step;
            let ring = rng.random_range(0..2);
            match rng.random_range(0..10) {
                0 => client.step(ring, Step::Num, 0),
                1 => client.step(ring, Step::Base, rng.random_range(0..2)),
                2 => client.step(ring, Step::Addr, 0),
                3 => client.step(ring, Step::Kick, 0),
                4 => client.step(ring, Step::Call, 0),
                5 => client.step(ring, Step::Err, 0),
                6 => client.enable(ring, rng.random()),
                7 => {
                    client.base(ring);
                }
                8 => client.front_end.set_features(client.features).expect("SET_FEATURES"),
                _ => {
                    let regions = client.guest.regions();
                    for region in &regions {
                        use vhost::vhost_user::VhostUserFrontend;
                        if told {
                            client.front_end.remove_mem_region(region).expect("REM_MEM_REG");
                        } else {
                            client.front_end.add_mem_region(region).expect("ADD_MEM_REG");
                        }
                    }
                    told = !told;
                }
            }
        }
        if !told {
            client.tell_memory();
        }
        for ring in 0..2 {
            client.base(ring);
            client.set_up(ring, 0);
            client.enable(ring, true);
            client.queues[ring].work(&mut target.model, 0..2048, &mut rng, 2);
        }
    }
    target.check("messages in no order");
    target.same_worker(worker);
}

#[test]
fn half_messages_end_the_session_with_their_front_end() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    let whole = message(raw::SET_VRING_NUM, raw::VERSION, &state(0, 128));
    for len in [1, 4, 11, 12, 13, whole.len() - 1] {
        target.front_end(&format!("{len} bytes, and gone"), &["front end"], |front_end| {
            front_end.negotiate();
            front_end.send_bytes(&whole[..len], &[]).expect("the backend listens");
        });
    }
    // Byte by byte is slow, and right.
    let mut front_end = RawFrontEnd { stream: target.backend.connect() };
    for byte in message(raw::GET_FEATURES, raw::VERSION, &[]) {
        front_end.stream.write_all(&[byte]).expect("the backend listens");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(front_end.receive().len(), 8);
    drop(front_end);
    // A descriptor with the first half of a message, which then is too old to mean anything.
    let event = Event::new();
    target.front_end("a descriptor with half a message", &["front end"], |front_end| {
        front_end.negotiate();
        let kick = message(raw::SET_VRING_KICK, raw::VERSION, &0u64.to_ne_bytes());
        front_end.send_bytes(&kick[..6], &[event.descriptor.as_raw_fd()]).expect("the backend listens");
    });
    // Many descriptors with a message that takes none.
    let many = vec![event.descriptor.as_raw_fd(); 100];
    let open = |target: &Target| {
        // All that was the last connection's is closed when the next one is answered.
        let mut connection = RawFrontEnd { stream: target.backend.connect() };
        connection.ask(raw::GET_FEATURES);
        super::harness::descriptors_of(target.backend.keeper())
    };
    let before = open(&target);
    for count in [1, 2, 32, 33, 100] {
        let name = format!("{count} descriptors with a message of none");
        target.front_end(&name, &["the connection is ended"], |front_end| {
            front_end.send(raw::GET_FEATURES, &[], &many[..count]);
            assert!(front_end.is_ended_within(PATIENCE));
        });
        target.front_end(&name, &["the connection is ended"], |front_end| {
            let message = message(raw::SET_FEATURES, raw::VERSION, &[0; 8]);
            front_end.send_bytes(&message[..5], &[]).expect("the backend listens");
            front_end.send_bytes(&message[5..12], &many[..count]).expect("the backend listens");
            front_end.send_bytes(&message[12..], &many[..count]).expect("the backend listens");
            assert!(front_end.is_ended_within(PATIENCE));
        });
    }
    assert_eq!(open(&target), before, "descriptors are left open");
    target.same_worker(worker);
}

#[test]
fn a_front_end_that_stalls_does_not_keep_the_next_waiting_for_ever() {
    let mut target = Target::new();
    target.front_end("half a message, and nothing more", &["and no more"], |front_end| {
        front_end.negotiate();
        let half = &message(raw::SET_VRING_NUM, raw::VERSION, &state(0, 128))[..13];
        front_end.send_bytes(half, &[]).expect("the backend listens");
        assert!(front_end.is_ended_within(PATIENCE), "the connection goes on");
    });
}

#[test]
fn a_front_end_that_never_reads_does_not_keep_the_next_waiting_for_ever() {
    let mut target = Target::new();
    target.front_end("answers that nobody reads", &["does not read"], ask_without_reading);
}

/// Fills the connection with answers.
fn ask_without_reading(front_end: &mut RawFrontEnd) {
    front_end.stream.set_nonblocking(true).expect("a mode");
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(500) {
        if front_end.send_bytes(&message(raw::GET_FEATURES, raw::VERSION, &[]), &[]).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_stalled_front_end_does_not_hold_up_the_end() {
    let disk = Disk::new(DISK_BYTES);
    let stalls: [fn(&mut RawFrontEnd); 2] = [ask_without_reading, |front_end| {
        front_end.negotiate();
        let half = &message(raw::SET_VRING_NUM, raw::VERSION, &[0; 8])[..15];
        front_end.send_bytes(half, &[]).expect("the backend listens");
    }];
    for stall in stalls {
        let mut backend = disk.serve();
        let mut front_end = RawFrontEnd { stream: backend.connect() };
        stall(&mut front_end);
        let begun = Instant::now();
        backend.stop();
        assert!(begun.elapsed() < Duration::from_secs(5), "it took {:?} to end", begun.elapsed());
    }
}

#[test]
fn all_protocol_features_but_none_of_the_rest() {
    // A front end that takes nothing, and then wants what it has not taken.
    let mut target = Target::new();
    let taken = VhostUserProtocolFeatures::empty().bits();
    for (request, body) in
        [(raw::GET_CONFIG, vec![0; 20]), (raw::SET_CONFIG, vec![0; 20]), (raw::ADD_MEM_REG, region(0, 4096, 0, 0))]
    {
        target.front_end(&format!("request {request}, not negotiated"), &["the connection is ended"], |front_end| {
            front_end.ask(raw::GET_FEATURES);
            front_end.send(raw::SET_PROTOCOL_FEATURES, &taken.to_ne_bytes(), &[]);
            front_end.send(request, &body, &[]);
            assert!(front_end.is_ended_within(PATIENCE));
        });
    }
}
