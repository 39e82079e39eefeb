//! Guests and front ends that mean harm, or are broken: the request or the session ends with a clear line in the log, and the
//! next front end is served.

use std::cell::Cell;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rustix::fs::MemfdFlags;
use vhost::VhostUserMemoryRegionInfo;
use vhost::{VhostBackend, VringConfigData};

use super::client::{Client, Profile};
use super::guest::{Guest, memfd};
use super::harness::{PATIENCE, SECTOR};
use super::queue::{IN, NO_STATUS, OK, header};
use super::raw::{self, RawFrontEnd};
use super::ring::{Buffer, Descriptor, Event, INDIRECT, NEXT, WRITE};

use super::target::{DISK_BYTES, Target};

/// Puts one chain on the ring that the test has laid out itself, and expects it back with this length.
#[track_caller]
fn offer(client: &mut Client, head: u16, len: u32) {
    let ring = &mut client.queues[0].ring;
    ring.publish(head);
    ring.kick_anyway();
    assert_eq!(ring.wait_used(PATIENCE), Some((head, len)));
}

/// A place with a header that asks for sector 0, and a status behind it.
fn request(client: &Client) -> (u64, u64) {
    let place = client.guest.allocate(32, 16);
    client.guest.write(place, &header(IN, 0));
    client.guest.write(place + 16, &[NO_STATUS]);
    (place, place + 16)
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, len, flags, next }
}

#[test]
pub fn a_chain_that_is_wrong_is_one_request_that_fails() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    let chain = |target: &mut Target, name: &str, words: &[&str], descriptors: &[Descriptor]| {
        target.guest(name, words, |client| {
            for (index, descriptor) in descriptors.iter().enumerate() {
                client.queues[0].ring.set_descriptor(index as u16, *descriptor);
            }
            offer(client, 0, 0);
            // The ring goes on.
            assert_eq!(client.queues[0].read(0, SECTOR).len(), SECTOR);
        });
    };
    let place = 8 << 20;
    let outside = 1 << 40;
    chain(&mut target, "a loop of one", &["loops"], &[descriptor(place, 16, NEXT, 0)]);
    let two = [descriptor(place, 16, NEXT, 1), descriptor(place, 16, NEXT, 0)];
    chain(&mut target, "a loop of two", &["loops"], &two);
    let late = [descriptor(place, 16, NEXT, 1), descriptor(place, 16, NEXT, 2), descriptor(place, 1, NEXT | WRITE, 1)];
    chain(&mut target, "a loop behind a start", &["readable", "writable"], &late);
    chain(&mut target, "a next that does not exist", &["descriptor 128"], &[descriptor(place, 16, NEXT, 128)]);
    chain(&mut target, "a next far out", &["descriptor 65535"], &[descriptor(place, 16, NEXT, 65535)]);
    chain(&mut target, "a buffer outside memory", &["not guest memory"], &[descriptor(outside, 16, 0, 0)]);
    chain(
        &mut target,
        "a buffer at the end of all addresses",
        &["not guest memory"],
        &[descriptor(u64::MAX, 16, 0, 0)],
    );
    chain(&mut target, "a length past the end", &["not guest memory"], &[descriptor((24 << 20) - 8, 16, 0, 0)]);
    chain(&mut target, "4 GiB", &["not guest memory"], &[descriptor(place, u32::MAX, WRITE, 0)]);
    let table = |len, flags| [descriptor(place, len, INDIRECT | flags, 1)];
    chain(&mut target, "an indirect table of nothing", &["indirect table"], &table(0, 0));
    chain(&mut target, "an indirect table of 8 bytes", &["indirect table"], &table(8, 0));
    chain(&mut target, "an indirect table of 24 bytes", &["indirect table"], &table(24, 0));
    chain(&mut target, "an indirect table and more", &["indirect"], &table(16, NEXT));
    let far = [descriptor(outside, 32, INDIRECT, 0)];
    chain(&mut target, "an indirect table outside memory", &["indirect table"], &far);
    chain(
        &mut target,
        "an indirect table of 4 GiB",
        &["indirect table"],
        &[descriptor(u64::MAX - 64, 0xffff_fff0, INDIRECT, 0)],
    );
    target.same_worker(worker);
}

#[test]
fn indirect_tables_that_are_wrong_are_requests_that_fail() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    let table = |target: &mut Target, name: &str, words: &[&str], entries: &[Descriptor]| {
        target.guest(name, words, |client| {
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.bytes()).collect();
            let place = client.guest.allocate(bytes.len() as u64, 16);
            client.guest.write(place, &bytes);
            client.queues[0].ring.set_descriptor(0, descriptor(place, bytes.len() as u32, INDIRECT, 0));
            offer(client, 0, 0);
            assert_eq!(client.queues[0].read(0, SECTOR).len(), SECTOR);
        });
    };
    let place = 8 << 20;
    let chain: Vec<Descriptor> = (1..=65535).map(|next| descriptor(place, 1, NEXT, next)).collect();
    table(&mut target, "65535 entries without an end", &["loops"], &chain);
    let mut chain = chain;
    chain[65534].flags = 0;
    table(&mut target, "65535 entries with an end", &["descriptors"], &chain);
    let large: Vec<Descriptor> = (1..=65535).map(|next| descriptor(0, 24 << 20, NEXT | WRITE, next)).collect();
    table(&mut target, "65535 times all of memory", &["descriptors"], &large);
    table(&mut target, "a loop", &["loops"], &[descriptor(place, 1, NEXT, 1), descriptor(place, 1, NEXT, 0)]);
    table(
        &mut target,
        "a next behind the table",
        &["descriptor 2"],
        &[descriptor(place, 1, NEXT, 1), descriptor(place, 1, NEXT, 2)],
    );
    table(&mut target, "a table in a table", &["indirect"], &[descriptor(place, 16, INDIRECT, 0)]);
    table(
        &mut target,
        "a table at the end",
        &["indirect"],
        &[descriptor(place, 16, NEXT, 1), descriptor(place, 16, INDIRECT, 0)],
    );
    target.same_worker(worker);
}

#[test]
fn requests_that_ask_for_too_much_fail() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    // The same memory, again and again: gigabytes in one request.
    target.guest("8 GiB of the same memory", &["at most 256 MiB"], |client| {
        let (head, status) = request(client);
        let mut buffers = vec![Buffer::readable(head, 16)];
        buffers.extend([Buffer::writable(1 << 20, 8 << 20); 1000]);
        buffers.push(Buffer::writable(status, 1));
        let table = client.guest.allocate(16 * 1100, 16);
        client.queues[0].ring.submit_indirect(table, &buffers);
        client.queues[0].ring.kick();
        assert_eq!(client.queues[0].ring.wait_used(PATIENCE).map(|(_, len)| len), Some(1));
    });
    // No place for a status.
    target.guest("a status in a buffer that is not to be written", &["no writable byte"], |client| {
        let (head, status) = request(client);
        client.queues[0].ring.submit(&[Buffer::readable(head, 16), Buffer::readable(status, 1)]);
        client.queues[0].ring.kick();
        assert_eq!(client.queues[0].ring.wait_used(PATIENCE).map(|(_, len)| len), Some(0));
        assert_eq!(client.guest.read(status, 1), [NO_STATUS]);
    });
    // Data over the request's own header, over the ring, over the status.
    target.guest("data over everything", &[], |client| {
        let (head, status) = request(client);
        let ring = &mut client.queues[0].ring;
        let over_status = Buffer::writable(status - 16, SECTOR);
        ring.submit(&[Buffer::readable(head, 16), over_status, Buffer::writable(status, 1)]);
        ring.kick();
        assert_eq!(ring.wait_used(PATIENCE).map(|(_, len)| len), Some(1 + SECTOR as u32));
        assert_eq!(client.guest.read(status, 1), [OK]);
        // Random bytes of the image as descriptors, indexes and all.
        let whole = Buffer::writable(client.queues[0].ring.descriptors, 4096 + 2048);
        let (head, status) = request(client);
        let ring = &mut client.queues[0].ring;
        ring.submit(&[Buffer::readable(head, 16), whole, Buffer::writable(status, 1)]);
        ring.kick_anyway();
        std::thread::sleep(Duration::from_millis(50));
    });
    target.same_worker(worker);
}

#[test]
pub fn a_ring_that_is_wrong_is_served_no_further() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    for (name, index) in [("far", 129), ("backwards", u16::MAX), ("half round", 32768)] {
        target.guest(&format!("an available index that jumps {name}"), &["jumped", "served no further"], |client| {
            let broken = Event::new();
            client.front_end.set_vring_err(0, &broken.descriptor).expect("SET_VRING_ERR");
            client.settle();
            client.guest.store(client.queues[0].ring.available + 2, index);
            client.queues[0].ring.kick_anyway();
            assert!(broken.wait(PATIENCE), "the front end is not told");
            assert_eq!(client.queues[0].ring.used_index(), 0);
            // It can be stopped, set right and started again.
            assert_eq!(client.base(0), 0);
            client.guest.store(client.queues[0].ring.available + 2, 0);
            client.set_up(0, 0);
            client.settle();
            assert_eq!(client.queues[0].read(0, SECTOR).len(), SECTOR);
        });
    }
    for head in [128, 65535] {
        target.guest(&format!("a head of {head}"), &["names descriptor", "served no further"], |client| {
            // One that is right goes ahead of it, and is completed.
            let (place, status) = request(client);
            let ring = &mut client.queues[0].ring;
            ring.submit(&[Buffer::readable(place, 16), Buffer::writable(8 << 20, SECTOR), Buffer::writable(status, 1)]);
            ring.publish(head);
            ring.kick_anyway();
            assert!(ring.wait_used(PATIENCE).is_some());
            assert_eq!(client.guest.read(status, 1), [OK]);
            assert_eq!(client.base(0), 1, "what is wrong was not taken");
        });
    }
    target.same_worker(worker);
}

#[test]
fn a_ring_that_changes_while_it_is_read_does_no_harm() {
    // Nothing may be named again that is still in flight, and nothing is here when the next batch comes, unless a read has to wait after all.
    let mut target = Target::with(&["--delta-cache", "writeback", "--io", "threads"]);
    let (worker, mark) = (target.backend.worker(), target.backend.log().mark());
    let given_up = Cell::new(false);
    target.guest("noise", &[], |client| {
        let mut rng = SmallRng::seed_from_u64(1);
        let (descriptors, available) = (client.queues[0].ring.descriptors, client.queues[0].ring.available);
        // Chains that are mostly right, whose numbers change all the time.
        let (head, status) = request(client);
        let begun = Instant::now();
        // The index goes round, and a machine that is busy may take its time.
        let (mut index, mut served) = (0u16, 0u64);
        while begun.elapsed() < Duration::from_millis(1500) || served < 1000 {
            for _ in 0..16 {
                let slot = rng.random_range(0..8u16);
                let kinds = [
                    descriptor(head, 16, NEXT, rng.random_range(0..8)),
                    descriptor(8 << 20, rng.random_range(0..9000), NEXT | WRITE, rng.random_range(0..8)),
                    descriptor(status, 1, WRITE, 0),
                    descriptor(descriptors, 128, INDIRECT, 0),
                    descriptor(rng.random(), rng.random(), rng.random_range(0..8), rng.random_range(0..200)),
                ];
                let written = kinds[rng.random_range(0..kinds.len())].bytes();
                client.guest.write(descriptors + 16 * u64::from(slot), &written);
                client.guest.store(available + 4 + 2 * u64::from(index % 128), rng.random_range(0..8));
                index = index.wrapping_add(1);
            }
            served += 16;
            client.guest.store(available + 2, index);
            client.queues[0].ring.kick_anyway();
            // Never so far ahead that it counts as a jump, for then the ring would be served no further.
            let asked = Instant::now();
            while index.wrapping_sub(client.queues[0].ring.used_index()) > 100 {
                if asked.elapsed() > Duration::from_secs(5) {
                    given_up.set(true);
                    return;
                }
                std::thread::yield_now();
            }
        }
    });
    if given_up.get() {
        target.backend.log().expect_after(mark, &["names descriptor", "before its request is complete"]);
    }
    target.same_worker(worker);
    let size = std::fs::metadata(target.disk.base()).expect("the image").len();
    assert_eq!(size, DISK_BYTES as u64);
}

/// Sets a ring up somewhere, without what [`Client`] would do.
fn set_up_at(client: &mut Client, change: impl FnOnce(&mut VringConfigData)) {
    let mut config = client.queues[0].ring.config();
    change(&mut config);
    let kick = &client.queues[0].ring.kick.descriptor;
    let front_end = &client.front_end;
    // What the backend refuses ends the connection, and the rest finds it closed.
    let _ = front_end
        .set_vring_num(0, config.queue_size)
        .and_then(|()| front_end.set_vring_base(0, 0))
        .and_then(|()| front_end.set_vring_addr(0, &config))
        .and_then(|()| front_end.set_vring_kick(0, kick));
}

#[test]
fn rings_that_are_not_in_guest_memory_end_the_session() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    type Change = fn(&mut VringConfigData);
    let cases: [(&str, &[&str], Change); 9] = [
        ("a table nowhere", &["descriptor table", "not within"], |config| config.desc_table_addr = 0x1000),
        ("an available ring nowhere", &["available ring", "not within"], |config| config.avail_ring_addr = 0x1000),
        ("a used ring nowhere", &["used ring", "not within"], |config| config.used_ring_addr = 0x1000),
        ("a table at the end of all addresses", &["not within"], |config| config.desc_table_addr = u64::MAX - 15),
        ("a used ring at the end of all addresses", &["not within"], |config| config.used_ring_addr = u64::MAX - 3),
        ("a table out of line", &["ended"], |config| config.desc_table_addr += 8),
        ("an available ring out of line", &["ended"], |config| config.avail_ring_addr += 1),
        ("a used ring out of line", &["ended"], |config| config.used_ring_addr += 2),
        ("a table that ends outside", &["not within"], |config| config.queue_size = 32768),
    ];
    for (name, words, change) in cases {
        eprintln!("{name}");
        let mark = target.backend.log().mark();
        let guest = Guest::with_regions(&[(0, 256 << 10)], super::guest::Backing::Memfd).expect("guest memory");
        let profile = Profile { depth: 1, request_bytes: 512, ..Profile::qemu() };
        let mut client = Client::negotiate(target.backend.connect(), &profile, guest);
        client.tell_memory();
        client.enable(0, true);
        set_up_at(&mut client, change);
        target.backend.log().expect_after(mark, words);
        drop(client);
        target.check(name);
    }
    target.same_worker(worker);
}

#[test]
fn memory_that_cannot_be_ends_the_session() {
    let mut target = Target::new();
    let worker = target.backend.worker();
    let profile = Profile { depth: 1, request_bytes: 512, ..Profile::qemu() };
    let file = memfd(1 << 20, MemfdFlags::empty()).expect("a memfd");
    let null = File::open("/dev/null").expect("/dev/null");
    let directory = File::open("/").expect("/");
    let (reader, _writer) = rustix::pipe::pipe().expect("a pipe");
    let read_only = File::open(target.disk.base()).expect("the image");
    let event = Event::new();
    let place = VhostUserMemoryRegionInfo {
        guest_phys_addr: 1 << 40,
        memory_size: 1 << 20,
        userspace_addr: 1 << 44,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    let with = |handle: RawFd| VhostUserMemoryRegionInfo { mmap_handle: handle, ..place };
    let cases = [
        ("a file that is shorter", VhostUserMemoryRegionInfo { memory_size: (1 << 20) + 1, ..place }),
        ("an offset behind the file", VhostUserMemoryRegionInfo { mmap_offset: 1 << 20, ..place }),
        ("an offset that leaves less", VhostUserMemoryRegionInfo { mmap_offset: 4096, ..place }),
        ("a region of all addresses", VhostUserMemoryRegionInfo { memory_size: u64::MAX / 4, ..place }),
        ("the same guest addresses again", VhostUserMemoryRegionInfo { guest_phys_addr: 0, ..place }),
        ("guest addresses in part again", VhostUserMemoryRegionInfo { guest_phys_addr: (16 << 20) - 4096, ..place }),
        ("/dev/null", with(null.as_raw_fd())),
        ("a directory", with(directory.as_raw_fd())),
        ("a pipe", with(reader.as_raw_fd())),
        ("an event descriptor", with(event.descriptor.as_raw_fd())),
        ("a file that may not be written", with(read_only.as_raw_fd())),
    ];
    for (name, wrong) in cases {
        eprintln!("{name}");
        let mark = target.backend.log().mark();
        let mut client = Client::start(&target.backend, &profile.clone().answered());
        let result = vhost::vhost_user::VhostUserFrontend::add_mem_region(&mut client.front_end, &wrong);
        assert!(result.is_err(), "{name} is taken");
        target.backend.log().expect_after(mark, &["ended", "region"]);
        drop(client);
        target.check(name);
    }
    target.guest("a region that is not there is removed", &["does not exist"], |client| {
        vhost::vhost_user::VhostUserFrontend::remove_mem_region(&mut client.front_end, &place).expect("it is sent");
    });
    target.guest("more regions than fit", &["memory regions: expected at most"], |client| {
        for number in 0..200 {
            let region = VhostUserMemoryRegionInfo { guest_phys_addr: (1 << 40) + (number << 20), ..place };
            // The backend ends the connection in the midst of them.
            if vhost::vhost_user::VhostUserFrontend::add_mem_region(&mut client.front_end, &region).is_err() {
                break;
            }
        }
    });
    target.same_worker(worker);
}

/// Descriptors for the device to write to that it can only wait on: a full pipe, and an event descriptor at its limit.
#[test]
fn a_call_that_cannot_be_written_keeps_nobody_waiting() {
    let mut target = Target::new();
    let (_reader, full) = rustix::pipe::pipe().expect("a pipe");
    let mut full = File::from(full);
    while full.metadata().is_ok() && rustix::io::ioctl_fionread(&full).is_ok_and(|waiting| waiting < 65536) {
        full.write_all(&[0; 4096]).expect("a pipe takes 64 KiB");
    }
    let limit = vmm_sys_util::eventfd::EventFd::new(0).expect("an event descriptor");
    limit.write(u64::MAX - 1).expect("an event descriptor");
    for (name, call) in [("a full pipe", full.as_raw_fd()), ("an event descriptor at its limit", limit.as_raw_fd())] {
        eprintln!("{name}");
        let stream = target.backend.connect();
        let mark = target.backend.log().mark();
        let raw = RawFrontEnd { stream: stream.try_clone().expect("a descriptor") };
        let mut client = Client::start_on(stream, &Profile::qemu(), Guest::new());
        raw.send(raw::SET_VRING_CALL, &0u64.to_ne_bytes(), &[call]);
        client.queues[0].submit(IN, 0, &[], SECTOR);
        client.queues[0].ring.kick_anyway();
        drop((client, raw));
        target.check(name);
        target.backend.log().expect_after(mark, &["cannot be notified"]);
    }
    target.backend.stop();
}
