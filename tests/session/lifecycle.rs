//! Starts, ends, deaths and everything between connections.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pando::block::delta::header::Phase;
use pando::block::delta::open;
use pando::block::storage::FileStorage;
use pando::sys::buffers::Writable;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rustix::process::Signal;
use vhost::VhostBackend;

use super::client::{Client, Profile, check_served};
use super::guest::Guest;
use super::harness::{
    Backend, Disk, PATIENCE, SECTOR, descriptors_of, image_bytes, is_alive, private_bytes_of, run, send, text,
    wait_until,
};
use super::queue::{IN, OK, OUT, Queue};
use super::raw::{self, RawFrontEnd, message, state};

const DISK_BYTES: usize = 1 << 20;

/// The contents of the volume, by the library.
#[track_caller]
pub fn contents(disk: &Disk) -> Vec<u8> {
    contents_of(disk, &disk.delta())
}

/// The same, of a delta that lies elsewhere.
pub fn contents_of(disk: &Disk, delta: &Path) -> Vec<u8> {
    let volume = disk.open_volume(delta);
    let mut contents = vec![0; disk.contents.len()];
    volume.read(0, &[Writable::from_mut_slice(&mut contents)]).expect("the delta can be read");
    contents
}

/// Whether the delta was closed in good order.
fn phase(disk: &Disk) -> Phase {
    let (file, _) = open::open_to_look(&disk.delta()).expect("a delta");
    open::read_session(&FileStorage::new(file).expect("a storage"), "delta").expect("a session").phase
}

#[test]
fn reconnects_leave_nothing_behind() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let mut rng = SmallRng::seed_from_u64(1);
    let measure = || {
        drop(Client::start(&backend, &Profile::qemu()));
        // All that was the last connection's is closed when the next one is answered.
        let mut connection = RawFrontEnd { stream: backend.connect() };
        connection.ask(raw::GET_FEATURES);
        let processes = [backend.keeper(), backend.worker()];
        (processes.map(descriptors_of), processes.map(private_bytes_of))
    };
    let mut before = None;
    for number in 0..350 {
        // Until then, threads still come to have the memory that they will ever need.
        if number == 150 {
            before = Some(measure());
        }
        let profile = Profile { queues: 1 + number % 3, depth: 8, ..Profile::qemu() };
        let mut client = Client::start(&backend, &profile);
        client.queues[0].work(&mut model, 0..2048, &mut rng, 1);
        if number % 2 == 0 {
            // In good order: rings are stopped.
            for index in 0..client.queues.len() {
                client.base(index);
            }
        } else if number % 4 == 1 {
            // With requests running.
            client.queues[0].submit(OUT, 0, &model[..4096], 0);
            client.queues[0].ring.kick();
        } else {
            // In the middle of a message.
            let mut rude = RawFrontEnd { stream: backend.connect() };
            drop(client);
            rude.negotiate();
            let half = &message(raw::SET_VRING_NUM, raw::VERSION, &state(0, 128))[..15];
            rude.send_bytes(half, &[]).expect("the backend listens");
        }
    }
    let (descriptors, private) = before.expect("it was measured");
    let (descriptors_now, private_now) = measure();
    assert_eq!(descriptors_now, descriptors, "open descriptors of keeper and worker");
    for (before, now) in private.into_iter().zip(private_now) {
        // What an allocator may do; 200 connections that left a page each would show.
        assert!(now <= before + (512 << 10), "private memory grew from {before} to {now} bytes");
    }
    check_served(&backend, &mut model, 2);
}

#[test]
fn asked_to_stop_everything_is_on_disk() {
    let disk = Disk::new(DISK_BYTES);
    let mut model = disk.contents.clone();
    for (number, signal) in [Signal::TERM, Signal::INT].into_iter().enumerate() {
        let mut backend = disk.serve();
        assert_eq!(phase(&disk), Phase::Open);
        let mut client = Client::start(&backend, &Profile::qemu().queues(2));
        let mut rng = SmallRng::seed_from_u64(number as u64);
        client.queues.iter_mut().for_each(|queue| queue.work(&mut model, 0..2048, &mut rng, 20));
        // In the middle of a session, with requests that run.
        for sector in 0..8 {
            let bytes = image_bytes(4096, sector);
            client.queues[0].submit(OUT, sector * 8, &bytes, 0);
            model[sector as usize * 4096..][..4096].copy_from_slice(&bytes);
        }
        client.queues[0].ring.kick();
        (0..8).for_each(|_| assert!(client.queues[0].wait(PATIENCE).is_some_and(|(_, done)| done.status == OK)));
        let worker = backend.worker();
        send(backend.keeper(), signal);
        assert_eq!(backend.wait().code(), Some(0));
        assert!(!is_alive(worker), "the worker outlived the keeper");
        assert_eq!(phase(&disk), Phase::Closed);
        assert!(!backend.socket().exists(), "the socket is left behind");
        assert!(contents(&disk) == model);
        // No mark log needed, as after a boot of the host.
        let mut found = vec![0; model.len()];
        disk.after_power_loss().read(0, &[Writable::from_mut_slice(&mut found)]).expect("the delta can be read");
        assert!(found == model, "not all is durable");
    }
}

#[test]
fn an_idle_backend_stops_at_once() {
    let disk = Disk::new(DISK_BYTES);
    let mut backend = disk.serve();
    let begun = std::time::Instant::now();
    backend.stop();
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert_eq!(phase(&disk), Phase::Closed);
}

/// Processor time of all threads of a process, in nanoseconds.
fn running_time(process: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("a process");
    let times = tasks.map(|task| {
        let path = task.expect("a thread").path().join("schedstat");
        let text = std::fs::read_to_string(path).expect("its times");
        text.split(' ').next().and_then(|time| time.parse::<u64>().ok()).expect("a number")
    });
    times.sum()
}

#[test]
fn a_queue_that_has_polled_sleeps_when_nothing_comes() {
    let disk = Disk::new(DISK_BYTES);
    for arguments in [&["--poll-us", "0"][..], &[], &["--poll-us", "10000"]] {
        let backend = disk.serve_as(&[arguments, &["--read-only"]].concat());
        let mut client = Client::start(&backend, &Profile::qemu());
        let worker = backend.worker();
        for _ in 0..3 {
            // One at a time, so that the queue is left without work after each.
            for sector in 0..500 {
                let at = sector * SECTOR;
                assert_eq!(client.queues[0].read(sector as u64, SECTOR), disk.contents[at..at + SECTOR]);
            }
            let mut before = running_time(worker);
            let mut moments = 0;
            wait_until("the worker sleeps", || {
                std::thread::sleep(Duration::from_millis(100));
                moments += 1;
                let now = running_time(worker);
                now == std::mem::replace(&mut before, now)
            });
            assert!(moments < 10, "it takes {arguments:?} a second to fall asleep");
        }
    }
}

#[test]
fn ephemeral_writes_go_with_the_process() {
    let disk = Disk::new(DISK_BYTES);
    let directory = disk.path("");
    let argument = format!("--ephemeral={}", text(&directory));
    let entries = || std::fs::read_dir(&directory).expect("a directory").count();
    let before = entries();
    for _ in 0..2 {
        let mut backend = disk.serve_as(&[&argument]);
        let mut model = disk.contents.clone();
        check_served(&backend, &mut model, 3);
        check_served(&backend, &mut model, 4);
        assert_ne!(model, disk.contents);
        backend.stop();
        assert_eq!(entries(), before, "something has a name");
    }
    assert!(std::fs::read(disk.base()).expect("the image") == disk.contents);
}

#[test]
fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
    let disk = Disk::new(DISK_BYTES);
    let socket = disk.path("socket");
    drop(UnixListener::bind(&socket).expect("a socket"));
    let mut backend = disk.serve();
    backend.log().expect_after(0, &["replacing", "dead"]);
    let mut model = disk.contents.clone();
    check_served(&backend, &mut model, 1);

    let (base, other) = (disk.base(), disk.path("other"));
    let arguments = ["--base", text(&base), "--delta", text(&other), "--create", "--socket-path", text(&socket)];
    let (code, _, errors) = run(&arguments);
    assert!(code == 1 && errors.contains("another process listens"), "{code}: {errors}");
    check_served(&backend, &mut model, 2);

    // Killed, it leaves its socket, and the next one takes the place.
    backend.kill();
    assert!(socket.exists());
    let mut backend = disk.serve();
    check_served(&backend, &mut model, 3);
    backend.stop();

    std::fs::write(&socket, "precious").expect("a file");
    let (code, _, errors) = run(&arguments);
    assert!(code == 1 && errors.contains("not a socket"), "{code}: {errors}");
    assert_eq!(std::fs::read(&socket).expect("the file"), b"precious");
}

/// Starts the program with a socket as its descriptor 3.
#[track_caller]
fn start_with_descriptor(disk: &Disk, socket: OwnedFd) -> Backend {
    let (base, delta) = (disk.base(), disk.delta());
    // A shell moves the descriptor from where the standard library can put it, and then is the program.
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" 3<&0 </dev/null", env!("CARGO_BIN_EXE_pando-blk")]);
    command.args(["--base", text(&base), "--delta", text(&delta), "--create", "--fd", "3"]);
    let mut backend = Backend::start_command(command.stdin(socket), &disk.path("socket"));
    backend.wait_until_ready();
    backend
}

#[test]
fn an_open_descriptor_is_served() {
    let disk = Disk::new(DISK_BYTES);
    let mut model = disk.contents.clone();

    let listener = UnixListener::bind(disk.path("socket")).expect("a socket");
    let mut backend = start_with_descriptor(&disk, listener.into());
    check_served(&backend, &mut model, 1);
    check_served(&backend, &mut model, 2);
    backend.stop();
    assert!(disk.path("socket").exists(), "a socket that was handed over is not the backend's to remove");

    let (ours, theirs) = UnixStream::pair().expect("a pair");
    ours.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    let mut backend = start_with_descriptor(&disk, theirs.into());
    let mut client = Client::start_on(ours, &Profile::qemu(), Guest::new());
    client.queues[0].work(&mut model, 0..2048, &mut SmallRng::seed_from_u64(3), 4);
    drop(client);
    // The one connection there is has ended, and so has the backend.
    assert_eq!(backend.wait().code(), Some(0));
    assert_eq!(phase(&disk), Phase::Closed);
    assert!(contents(&disk) == model);
}

#[test]
fn a_descriptor_that_is_no_socket_is_refused() {
    let disk = Disk::new(DISK_BYTES);
    let base = disk.base();
    for number in ["0", "1", "99", "-1"] {
        let (code, _, errors) = run(&["--base", text(&base), "--read-only", "--fd", number]);
        assert!(code == 1 && errors.contains("--fd"), "{number}, {code}: {errors}");
    }
}

#[test]
fn capabilities_are_printed_as_qemu_asks() {
    for more in [&[][..], &["--nonsense", "--fd", "77"]] {
        let (code, output, errors) = run(&[&["--print-capabilities"], more].concat());
        assert_eq!((code, errors.as_str()), (0, ""));
        let json: serde_json::Value = serde_json::from_str(&output).expect("JSON");
        assert_eq!(json, serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]}));
    }
}

#[test]
fn a_missing_kind_is_explained() {
    let disk = Disk::new(DISK_BYTES);
    let (base, socket) = (disk.base(), disk.path("socket"));
    let (code, _, errors) = run(&["--blk-file", text(&base), "--socket-path", text(&socket)]);
    assert_eq!(code, 2);
    assert!(["--delta", "--ephemeral", "--read-only"].into_iter().all(|kind| errors.contains(kind)), "{errors}");
    assert!(!socket.exists());
}

/// Writes, each to a place of its own and with bytes of its own, until the queue stops answering: which were completed.
fn write_until_dead(queue: &mut Queue, sectors: usize, begun: &AtomicBool, stop: &AtomicBool) -> Vec<usize> {
    let mut running = std::collections::HashMap::new();
    let mut completed = Vec::new();
    let mut places = (0..sectors).step_by(3);
    loop {
        while queue.has_room() && !stop.load(Ordering::Acquire) {
            let Some(sector) = places.next() else { break };
            let head = queue.submit(OUT, sector as u64, &image_bytes(SECTOR, 1000 + sector as u64), 0);
            running.insert(head, sector);
        }
        queue.ring.kick_anyway();
        let limit = if stop.load(Ordering::Acquire) { Duration::from_millis(50) } else { Duration::from_millis(500) };
        match queue.wait(limit) {
            Some((head, done)) => {
                assert_eq!(done.status, OK);
                completed.extend(running.remove(&head));
                begun.store(true, Ordering::Release);
            }
            None if stop.load(Ordering::Acquire) || running.is_empty() => return completed,
            None => {}
        }
    }
}

/// Has some writes completed while `kill` happens in the midst of them, and gives the disk's contents as they have to be:
/// the second has the sectors whose write had not completed, which may be there or not.
fn kill_under_load(disk: &Disk, backend: &mut Backend, delay: Duration, kill: impl FnOnce(&mut Backend)) -> Vec<u8> {
    let profile = Profile { depth: 16, request_bytes: SECTOR, ..Profile::qemu() };
    let mut client = Client::start(backend, &profile);
    let mut queue = client.queues.remove(0);
    let (begun, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let sectors = disk.contents.len() / SECTOR;
    let completed = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_until_dead(&mut queue, sectors, &begun, &stop));
        wait_until("the first writes complete", || begun.load(Ordering::Acquire));
        std::thread::sleep(delay);
        kill(backend);
        stop.store(true, Ordering::Release);
        writer.join().expect("all that completed was written")
    });
    assert!(client.front_end.get_features().is_err(), "the connection goes on");
    let mut model = disk.contents.clone();
    for sector in &completed {
        model[sector * SECTOR..][..SECTOR].copy_from_slice(&image_bytes(SECTOR, 1000 + *sector as u64));
    }
    eprintln!("{} writes of {} had completed", completed.len(), sectors.div_ceil(3));
    assert!(!completed.is_empty(), "no write had completed");
    model
}

/// Sees that the contents are `model`, but for sectors whose write had not completed.
#[track_caller]
fn check_contents(found: &[u8], model: &[u8], before: &[u8]) {
    for (sector, (found, expected)) in found.chunks(SECTOR).zip(model.chunks(SECTOR)).enumerate() {
        let was_running = expected == &before[sector * SECTOR..][..SECTOR]
            && sector % 3 == 0
            && found == image_bytes(SECTOR, 1000 + sector as u64);
        assert!(found == expected || was_running, "sector {sector} is not what was written, and not what was there");
    }
}

#[test]
fn a_worker_killed_between_sessions_is_replaced() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    for round in 0..3 {
        check_served(&backend, &mut model, round);
        let worker = backend.worker();
        send(worker, Signal::KILL);
        wait_until("there is another worker", || {
            super::harness::children_of(backend.keeper()).last().is_some_and(|other| *other != worker)
        });
    }
    check_served(&backend, &mut model, 9);
}

#[test]
fn a_killed_keeper_takes_its_worker_and_no_write_with_it() {
    for round in 0..6 {
        let disk = Disk::new(4 * DISK_BYTES);
        let mut backend = disk.serve();
        let worker = backend.worker();
        let delay = Duration::from_micros(2000 * round);
        let model = kill_under_load(&disk, &mut backend, delay, Backend::kill);
        // At once: the next backend of this delta.
        let mut next = disk.serve_at(&disk.path("next"), &["--delta", text(&disk.delta())]);
        assert!(!is_alive(worker), "two workers had the delta");
        let mut client = Client::start(&next, &Profile::qemu());
        let mut found = Vec::new();
        for at in (0..model.len()).step_by(65536) {
            found.extend(client.queues[0].read((at / SECTOR) as u64, 65536));
        }
        check_contents(&found, &model, &disk.contents);
        next.stop();
        check_contents(&contents(&disk), &model, &disk.contents);
    }
}

#[test]
fn a_killed_keeper_without_a_session_takes_its_worker_with_it() {
    let disk = Disk::new(DISK_BYTES);
    let mut backend = disk.serve();
    let worker = backend.worker();
    backend.kill();
    wait_until("the worker ends", || !is_alive(worker));
    let mut model = disk.contents.clone();
    check_served(&disk.serve(), &mut model, 1);
}

#[test]
fn a_delta_has_one_backend() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let (base, delta, socket) = (disk.base(), disk.delta(), disk.path("other"));
    let (code, _, errors) = run(&["--base", text(&base), "--delta", text(&delta), "--socket-path", text(&socket)]);
    assert_eq!(code, 1);
    let names_one =
        [backend.keeper(), backend.worker()].into_iter().any(|process| errors.contains(&process.to_string()));
    assert!(errors.contains("in use") && names_one, "{errors}");
    let mut model = disk.contents.clone();
    check_served(&backend, &mut model, 1);
}

#[test]
fn two_backends_share_one_image() {
    let disk = Disk::new(DISK_BYTES);
    let one = disk.serve();
    let other_delta = disk.path("other-delta");
    let other = disk.serve_at(&disk.path("other"), &["--delta", text(&other_delta), "--create"]);
    let read_only = disk.serve_at(&disk.path("third"), &["--read-only"]);
    let (mut model_one, mut model_other) = (disk.contents.clone(), disk.contents.clone());
    let mut client_one = Client::start(&one, &Profile::qemu());
    let mut client_other = Client::start(&other, &Profile::qemu());
    let (mut rng_one, mut rng_other) = (SmallRng::seed_from_u64(1), SmallRng::seed_from_u64(2));
    for _ in 0..10 {
        client_one.queues[0].work(&mut model_one, 0..2048, &mut rng_one, 2);
        client_other.queues[0].work(&mut model_other, 0..2048, &mut rng_other, 2);
    }
    assert_ne!(model_one, model_other);
    let mut client = Client::start(&read_only, &Profile::qemu());
    assert_eq!(client.queues[0].execute(IN, 0, &[], 65536).data, disk.contents[..65536]);
    assert!(std::fs::read(disk.base()).expect("the image") == disk.contents, "the image was written");
}

#[test]
fn another_image_is_refused() {
    let disk = Disk::new(DISK_BYTES);
    drop(disk.serve());
    let mut changed = disk.contents.clone();
    changed[77] ^= 1;
    std::fs::write(disk.path("changed.raw"), &changed).expect("an image");
    let (image, delta, socket) = (disk.path("changed.raw"), disk.delta(), disk.path("other"));
    let (code, _, errors) = run(&["--base", text(&image), "--delta", text(&delta), "--socket-path", text(&socket)]);
    let [ours, theirs] = [&disk.contents, &changed].map(|contents| blake3::hash(contents).to_hex());
    assert!(code == 1 && errors.contains(ours.as_str()) && errors.contains(theirs.as_str()), "{code}: {errors}");
}

#[test]
fn a_blank_volume_is_zeros_until_it_is_written() {
    let disk = Disk::new(DISK_BYTES);
    let (delta, socket) = (disk.path("blank"), disk.path("socket"));
    let arguments = ["--blank", "--delta", text(&delta), "--create", "--size", "1M", "--socket-path", text(&socket)];
    let mut backend = Backend::start(&arguments, &socket);
    backend.wait_until_ready();
    let mut model = vec![0; DISK_BYTES];
    let mut client = Client::start(&backend, &Profile::qemu());
    assert!(client.queues[0].read(0, 65536) == model[..65536]);
    client.queues[0].work(&mut model, 0..2048, &mut SmallRng::seed_from_u64(5), 20);
}
