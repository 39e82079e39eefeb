//! Workers that die under a guest: the front end notices nothing, and no request is lost or done twice.

use std::collections::VecDeque;
use std::fs;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pando::vhost_user::control::{Command, Event, Reply};
use pando::vhost_user::inflight::RegionShape;
use pando::vhost_user::steps::{ABORT_VARIABLE, ALL, Step};
use pando::vhost_user::vitals;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

use super::client::{Client, Profile, check_served};
use super::guest::{Backing, Guest};
use super::harness::{Backend, Disk, PATIENCE, SECTOR, children_of, is_alive, program, send, text, wait_until};
use super::lifecycle::contents;
use super::managed::{Managed, Volume, manner};
use super::queue::{FLUSH, GET_ID, IN, IOERR, OK, OUT, Queue, header};
use super::ring::Buffer;
use super::storm::Storm;

const DISK_BYTES: usize = 8 << 20;
const QUEUES: usize = 4;

/// Four queues, 32 requests of each.
pub fn profile() -> Profile {
    Profile { ring_size: 128, depth: 32, request_bytes: 32 << 10, ..Profile::qemu().queues(QUEUES) }
}

pub fn storms(client: &mut Client, contents: &[u8], seed: u64) -> Vec<Storm> {
    let queues = std::mem::take(&mut client.queues).into_iter().enumerate();
    queues.map(|(number, queue)| Storm::new(queue, number, QUEUES, contents, seed)).collect()
}

/// Works on all queues while `meanwhile` runs.
pub fn work<T>(storms: &mut [Storm], meanwhile: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = storms.iter_mut().map(|storm| scope.spawn(|| storm.run(&stop))).collect();
        let result = meanwhile();
        stop.store(true, Ordering::Release);
        workers.into_iter().for_each(|worker| worker.join().expect("all that is read is what was written"));
        result
    })
}

/// The worker, once there is one: the youngest child, as one that has died may still be there.
fn any_worker(keeper: u32) -> Option<u32> {
    children_of(keeper).last().copied()
}

/// Ends the worker, if there is one right now. Whether there was.
pub fn kill_worker(backend: &Backend) -> bool {
    any_worker(backend.keeper()).inspect(|worker| send(*worker, Signal::KILL)).is_some()
}

/// Sees that the disk holds what the work has written, through the backend and in its files.
#[track_caller]
pub fn check_all(disk: &Disk, mut backend: Backend, client: Client, storms: &mut [Storm]) {
    let model = Storm::merge(storms);
    for at in (0..model.len()).step_by(32 << 10) {
        let found = storms[0].queue.read((at / SECTOR) as u64, 32 << 10);
        assert!(found == model[at..at + (32 << 10)], "what is read at byte {at} is not what was written there");
    }
    drop(client);
    backend.stop();
    assert!(contents(disk) == model, "the files do not hold what was written");
}

/// Who kills workers, and lets one get further in between: too many that get nowhere would be held, and on a busy machine any may. So would too many
/// in too short a time.
pub struct Killer<'b> {
    backend: &'b Backend,
    guest: Arc<Guest>,
    /// Where the used indexes of all rings lie: what a driver has seen of them may be older than the worker.
    indexes: Vec<u64>,
    /// What they were at the last strike, and how many strikes in a row have found them so.
    before: Vec<u16>,
    in_vain: u32,
    /// The last strikes.
    recent: VecDeque<Instant>,
}

impl Killer<'_> {
    /// Some less than what is too many within ten seconds.
    const RECENT_MAX: usize = 250;

    pub fn of<'b>(backend: &'b Backend, storms: &[Storm]) -> Killer<'b> {
        let indexes = storms.iter().map(|storm| storm.queue.ring.used + 2).collect();
        let guest = Arc::clone(storms[0].queue.guest());
        Killer { backend, guest, indexes, before: Vec::new(), in_vain: 0, recent: VecDeque::new() }
    }

    /// Kills the worker, if there is one that may be killed. Whether there was.
    pub fn strike(&mut self) -> bool {
        assert!(is_alive(self.backend.keeper()), "the keeper is dead");
        let is_in_vain = self.used() == self.before;
        self.recent.retain(|strike| strike.elapsed() < Duration::from_secs(11));
        let are_many = self.recent.len() >= Self::RECENT_MAX;
        if is_in_vain && self.in_vain >= 2 || are_many || !kill_worker(self.backend) {
            return false;
        }
        self.recent.push_back(Instant::now());
        // Not as they were at first: what was completed until now is none of the next one's.
        (self.before, self.in_vain) = (self.used(), if is_in_vain { self.in_vain + 1 } else { 0 });
        true
    }

    fn used(&self) -> Vec<u16> {
        self.indexes.iter().map(|index| self.guest.load(*index)).collect()
    }
}

/// Kills so many workers under verified work.
pub fn kill_meanwhile(seed: u64, kills: usize) {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &profile());
    let mut storms = storms(&mut client, &disk.contents, seed);
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut killer = Killer::of(&backend, &storms);
    work(&mut storms, || {
        let mut killed = 0;
        while killed < kills {
            std::thread::sleep(Duration::from_micros(rng.random_range(0..60_000)));
            killed += usize::from(killer.strike());
        }
    });
    check_all(&disk, backend, client, &mut storms);
}

#[test]
fn five_hundred_killed_workers_are_never_noticed() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &profile());
    let mut storms = storms(&mut client, &disk.contents, 1);
    let mut rng = SmallRng::seed_from_u64(500);
    let mut killer = Killer::of(&backend, &storms);
    let killed = work(&mut storms, || {
        let mut killed = 0;
        while killed < 500 {
            std::thread::sleep(Duration::from_micros(rng.random_range(0..120_000)));
            killed += usize::from(killer.strike());
        }
        killed
    });
    let completed: u64 = storms.iter().map(|storm| storm.completed).sum();
    let longest = storms.iter().map(|storm| storm.longest).max();
    println!("{killed} killed, {completed} requests completed, the longest wait was {longest:?}");
    assert!(completed > 10_000, "{completed}");
    check_all(&disk, backend, client, &mut storms);
}

#[test]
pub fn an_ephemeral_volume_survives_its_worker() {
    let disk = Disk::new(DISK_BYTES);
    let directory = disk.path("");
    let backend = disk.serve_as(&[&format!("--ephemeral={}", text(&directory))]);
    let mut client = Client::start(&backend, &profile());
    let mut storms = storms(&mut client, &disk.contents, 2);
    let mut killer = Killer::of(&backend, &storms);
    work(&mut storms, || {
        let mut killed = 0;
        while killed < 20 {
            std::thread::sleep(Duration::from_millis(30));
            killed += usize::from(killer.strike());
        }
    });
    let model = Storm::merge(&storms);
    for at in (0..model.len()).step_by(32 << 10) {
        assert!(storms[0].queue.read((at / SECTOR) as u64, 32 << 10) == model[at..at + (32 << 10)], "at byte {at}");
    }
}

/// Sets a flag when it is dropped, also by a panic: whoever waits for the flag in another thread would be waited for.
struct Sets<'f>(&'f AtomicBool);

impl Drop for Sets<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn messages_that_wait_for_a_worker_that_dies_are_answered() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &profile().answered());
    let mut storms = storms(&mut client, &disk.contents, 3);
    let steps = profile().steps;
    let ended = AtomicBool::new(false);
    let (mut rng, mut told) = (SmallRng::seed_from_u64(3), 0);
    std::thread::scope(|scope| {
        let _ends = Sets(&ended);
        let mut killer = Killer::of(&backend, &storms);
        let ended = &ended;
        scope.spawn(move || {
            while !ended.load(Ordering::Acquire) {
                killer.strike();
                std::thread::sleep(Duration::from_millis(25));
            }
        });
        for round in 0..150 {
            for storm in &mut storms {
                storm.run_for(20);
            }
            // What a front end says while a guest waits: pauses, another call descriptor, the memory once more.
            let index = round % QUEUES;
            match rng.random_range(0..4) {
                0 => {
                    let base = client.front_end.get_vring_base(index).expect("GET_VRING_BASE") as u16;
                    assert_eq!(base, storms[index].queue.ring.next_used, "it stops where it was");
                    for step in &steps {
                        client.step_of(&storms[index].queue.ring, index, *step, base);
                    }
                }
                1 => {
                    client.enable(index, false);
                    client.enable(index, true);
                }
                2 => drop(client.front_end.set_mem_table(&client.guest.regions()).expect("SET_MEM_TABLE")),
                _ => {
                    let call = &storms[index].queue.ring.call.descriptor;
                    client.front_end.set_vring_call(index, call).expect("SET_VRING_CALL");
                }
            }
            told += 1;
        }
    });
    assert_eq!(told, 150);
    check_all(&disk, backend, client, &mut storms);
}

/// Has the worker touch all of a guest's second region, so that it takes the kernel some time to unmap it.
fn touch_all(queue: &mut Queue, region: Range<u64>) {
    const REQUEST_BYTES: u64 = 1 << 20;
    let guest = Arc::clone(queue.guest());
    let (head, status) = (guest.allocate(16, 16), guest.allocate(1, 1));
    guest.write(head, &header(IN, 0));
    for at in region.step_by(REQUEST_BYTES as usize) {
        let buffers =
            [Buffer::readable(head, 16), Buffer::writable(at, REQUEST_BYTES as usize), Buffer::writable(status, 1)];
        queue.ring.submit(&buffers);
        queue.ring.kick();
        assert!(queue.ring.wait_used(PATIENCE).is_some(), "a request never completes");
    }
}

#[test]
fn nobody_waits_until_the_memory_of_a_dead_worker_is_unmapped() {
    const REGION: Range<u64> = 16 << 20..(16 + 256) << 20;
    const DEATHS: usize = 20;
    let disk = Disk::new(1 << 20);
    let volume = Volume::cow("one", &disk.base(), &disk.delta(), false);
    let mut managed = Managed::serve(&disk, &volume, manner());
    let regions = [(0, 16 << 20), (REGION.start, REGION.end - REGION.start)];
    let guest = Guest::with_regions(&regions, Backing::Memfd).expect("memory");
    let mut client = Client::start_on(managed.backend.connect(), &Profile::qemu(), guest);
    let is_there = |process: u32| Path::new(&format!("/proc/{process}")).exists();
    let (mut served, mut answered, mut deaths) = (0, 0, 0);
    while answered == 0 && deaths < DEATHS {
        touch_all(&mut client.queues[0], REGION);
        let worker = managed.backend.worker();
        send(worker, Signal::KILL);
        deaths += 1;
        assert!(client.queues[0].read(0, 4096) == disk.contents[..4096]);
        served += usize::from(is_there(worker));
        client.settle();
        managed.watcher.report();
        answered += usize::from(is_there(worker));
        wait_until("it is waited for", || !is_there(worker));
    }
    println!("{deaths} deaths; the guest was served beside {served}, and messages were answered beside {answered}");
    // A kernel before 6.11 tells only when all is unmapped.
    assert!(answered > 0 || served == 0, "who says something to the keeper waits, where the guest does not");
    // Of one that is dead when the backend is to stop, nothing is left.
    touch_all(&mut client.queues[0], REGION);
    let worker = managed.backend.worker();
    send(worker, Signal::KILL);
    assert!(client.queues[0].read(0, 4096) == disk.contents[..4096]);
    assert!(matches!(managed.watcher.ask(&Command::Stop, &[]).0, Reply::Done));
    assert!(!is_there(worker), "the delta is said to be left, and a dead worker has it open");
    assert!(managed.backend.wait().success());
    let told = managed.watcher.events.iter().filter(|event| matches!(event, Event::WorkerDied { .. })).count();
    assert_eq!(told, deaths + 1, "{:?}", managed.watcher.events);
}

/// However soon they die behind that: of what they take over they do not.
#[test]
fn workers_that_each_complete_something_are_not_held() {
    let disk = Disk::new(1 << 20);
    let backend = serve_dying(&disk, "Notified 1000");
    let mut client = Client::start(&backend, &Profile::qemu());
    let file = disk.path("abort");
    // The first time is when a ring starts.
    let next_dies = || fs::write(&file, "Notified 2").expect("a file");
    next_dies();
    kill_worker(&backend);
    for _ in 0..8 {
        wait_until("there is another worker", || !file.exists());
        next_dies();
        // It waits for nothing, and is over in one batch.
        assert_eq!(client.queues[0].execute(GET_ID, 0, &[], 20).status, OK);
    }
    wait_until("the last has died", || backend.log().text().matches("the worker has died").count() == 9);
    assert!(!backend.log().text().contains("held"), "{}", backend.log().text());
}

/// A backend whose first worker dies at a step.
fn serve_dying(disk: &Disk, first: &str) -> Backend {
    let file = disk.path("abort");
    fs::write(&file, first).expect("a file");
    let (base, delta, socket) = (disk.base(), disk.delta(), disk.path("socket"));
    let mut command = program();
    // A sandbox keeps it from the file.
    command.args([
        "--base",
        text(&base),
        "--delta",
        text(&delta),
        "--create",
        "--socket-path",
        text(&socket),
        "--no-sandbox",
    ]);
    let mut backend = Backend::start_command(command.env(ABORT_VARIABLE, &file), &socket);
    backend.wait_until_ready();
    backend
}

/// Works with a worker that dies at a step, reached so many times, and, if there is another, with one that dies at that.
pub fn die_at(step: Step, count: u32, then: Option<(Step, u32)>) {
    println!("{step:?} {count}, then {then:?}");
    let disk = Disk::new(1 << 20);
    let backend = serve_dying(&disk, &format!("{step:?} {count}"));
    if let Some((step, count)) = then {
        fs::write(disk.path("abort"), format!("{step:?} {count}")).expect("a file");
    }
    let mark = backend.log().mark();
    let mut client = Client::start(&backend, &profile());
    let mut storms = storms(&mut client, &disk.contents, u64::from(count));
    storms.iter_mut().for_each(|storm| storm.run_for(100));
    let deaths = 1 + usize::from(then.is_some());
    let died = || backend.log().text()[mark..].matches("the worker has died").count();
    wait_until("all have died that were to", || {
        storms.iter_mut().for_each(|storm| storm.run_for(20));
        died() >= deaths
    });
    assert_eq!(died(), deaths, "and no other");
    check_all(&disk, backend, client, &mut storms);
}

#[test]
fn a_death_at_any_step_is_survived() {
    for step in ALL {
        match step {
            // Reached once or twice for a ring.
            Step::Begin | Step::Recovered => die_at(step, 2, None),
            Step::RecoverClear | Step::RecoverUsed => {}
            // The first is what a start-up waits for, which fails then.
            Step::Unanswered => (2..=9).for_each(|count| die_at(step, count, None)),
            _ => [1, 2, 57].into_iter().for_each(|count| die_at(step, count, None)),
        }
    }
    // A successor that dies as it recovers what a death at another step has left.
    for first in [Step::Published, Step::ShownClear, Step::TakeFlag] {
        let shown = matches!(first, Step::Published | Step::ShownClear);
        for then in [Step::RecoverClear, Step::RecoverUsed, Step::Recovered, Step::Executed, Step::Published] {
            if then != Step::RecoverClear || shown {
                die_at(first, 41, Some((then, 1)));
            }
        }
    }
}

/// The front end's region for what is in flight, as QEMU asks for one and gives it back.
fn offer_inflight(client: &mut Client) -> (VhostUserInflight, fs::File) {
    let profile = &client.profile;
    let asked =
        VhostUserInflight { num_queues: profile.queues as u16, queue_size: profile.ring_size, ..Default::default() };
    let (inflight, file) = client.front_end.get_inflight_fd(&asked).expect("GET_INFLIGHT_FD");
    let shape = RegionShape::new(asked.num_queues, asked.queue_size);
    assert_eq!((inflight.mmap_size, inflight.mmap_offset), (shape.bytes, 0));
    (inflight, file)
}

#[test]
pub fn a_front_end_that_keeps_the_region_survives_the_whole_backend() {
    let disk = Disk::new(DISK_BYTES);
    let profile = profile();
    let mut backend = disk.serve();
    // Indexes that are not zero, as after some time: a region that is new then starts from the ring's (spdk#3766).
    let mut client = Client::negotiate(backend.connect(), &Profile { start: 700, ..profile.clone() }, Guest::new());
    let (inflight, region) = offer_inflight(&mut client);
    let mut storms = storms(&mut client, &disk.contents, 4);
    let mut rng = SmallRng::seed_from_u64(4);
    let set_up = |client: &mut Client, storms: &[Storm], wrong: u16| {
        client.front_end.set_inflight_fd(&inflight, region.as_raw_fd()).expect("SET_INFLIGHT_FD");
        client.tell_memory();
        for (index, storm) in storms.iter().enumerate() {
            // Whatever the base says, the region knows better.
            let base = if wrong == 0 { 700 } else { storm.queue.ring.next_used.wrapping_add(wrong) };
            profile.steps.iter().for_each(|step| client.step_of(&storm.queue.ring, index, *step, base));
            client.enable(index, true);
        }
    };
    set_up(&mut client, &storms, 0);
    // Of a ring that has not run yet the region knows nothing, and the base is believed.
    storms.iter_mut().for_each(Storm::fill);
    storms.iter_mut().for_each(Storm::settle);
    for round in 1..40 {
        storms.iter_mut().for_each(Storm::fill);
        std::thread::sleep(Duration::from_micros(rng.random_range(0..3_000)));
        let worker = any_worker(backend.keeper());
        backend.kill();
        worker.into_iter().for_each(|worker| wait_until("the worker is gone", || !is_alive(worker)));
        backend = disk.serve();
        // Its rings are where they were; those of the new client are of no use.
        client = Client::negotiate(backend.connect(), &Profile { depth: 0, ..profile.clone() }, client.guest);
        set_up(&mut client, &storms, round);
        storms.iter_mut().for_each(Storm::settle);
    }
    check_all(&disk, backend, client, &mut storms);
}

#[test]
fn regions_that_cannot_be_are_refused_and_cost_the_session_alone() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let profile = Profile { ring_size: 64, ..profile() };
    // Each: a change to the region, and what is said of it.
    let shape = RegionShape::new(QUEUES as u16, 64);
    let cases = [
        ("version", &[(8, 7)][..], shape.bytes, "version 7"),
        ("size", &[(8, 1), (10, 9)], shape.bytes, "ring of 9 descriptors"),
        ("past", &[(8, 1), (10, 64), (14, 5000)], shape.bytes, "not its past"),
        ("head", &[(8, 1), (10, 64), (12, 64), (14, 65535)], shape.bytes, "names head 64"),
        ("length", &[], 100, "0x64 bytes"),
    ];
    for (round, (name, numbers, bytes, words)) in cases.into_iter().enumerate() {
        let mark = backend.log().mark();
        let mut client = Client::negotiate(backend.connect(), &profile, Guest::new());
        let file = super::guest::memfd(shape.bytes, rustix::fs::MemfdFlags::empty()).expect("memory");
        for (at, value) in numbers {
            file.write_all_at(&u16::to_le_bytes(*value), *at).expect("a region");
        }
        file.set_len(bytes).expect("memory");
        let inflight =
            VhostUserInflight { mmap_size: shape.bytes, mmap_offset: 0, num_queues: QUEUES as u16, queue_size: 64 };
        client.front_end.set_inflight_fd(&inflight, file.as_raw_fd()).expect("SET_INFLIGHT_FD");
        // The connection may end at any of these.
        let _ = client.front_end.set_mem_table(&client.guest.regions());
        let ring = &client.queues[0].ring;
        let _ = client.front_end.set_vring_num(0, ring.size);
        let _ = client.front_end.set_vring_base(0, 0);
        let _ = client.front_end.set_vring_addr(0, &ring.config());
        let _ = client.front_end.set_vring_kick(0, &ring.kick.descriptor);
        let _ = client.front_end.set_vring_enable(0, true);
        backend.log().expect_after(mark, &[words]);
        assert!(client.front_end.get_features().is_err(), "{name}: the connection goes on");
        check_served(&backend, &mut model, round as u64);
    }
    // Numbers that make no region.
    for (mmap_size, mmap_offset, num_queues, queue_size) in [
        (0, 0, 4, 64),
        (1 << 20, 0, 0, 64),
        (1 << 20, 0, 4, 0),
        (1 << 20, 7, 4, 64),
        (100, 0, 4, 64),
        (u64::MAX, 64, 4, 64),
    ] {
        let mut client = Client::negotiate(backend.connect(), &profile.clone().answered(), Guest::new());
        let file = super::guest::memfd(1 << 20, rustix::fs::MemfdFlags::empty()).expect("memory");
        let inflight = VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size };
        let told = client.front_end.set_inflight_fd(&inflight, file.as_raw_fd());
        let told = told.and_then(|()| client.front_end.set_mem_table(&client.guest.regions()));
        assert!(told.is_err(), "{mmap_size} {mmap_offset} {num_queues} {queue_size}");
    }
    check_served(&backend, &mut model, 99);
}

/// Kills each worker as soon as it is there, until there is none for a while.
fn kill_until_held(backend: &Backend) {
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_secs(1) {
        if kill_worker(backend) {
            last = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn workers_that_die_again_and_again_are_held_until_an_operator_acts() {
    let disk = Disk::new(DISK_BYTES);
    let volume = Volume::cow("one", &disk.base(), &disk.delta(), false);
    let mut managed = Managed::serve(&disk, &volume, manner());
    let mut client = Client::start(&managed.backend, &profile());
    let mut storms = storms(&mut client, &disk.contents, 5);
    storms.iter_mut().for_each(|storm| storm.run_for(50));
    let mark = managed.backend.log().mark();
    kill_until_held(&managed.backend);
    managed.backend.log().expect_after(mark, &["held for 60 s"]);
    // Requests wait, and who asks is told how things stand.
    storms.iter_mut().for_each(Storm::fill);
    let (report, _) = managed.watcher.report();
    assert!(report.held && report.connected);
    managed.watcher.refused(&Command::Grow { bytes: 1 << 30 }, &[], "held");
    assert!(any_worker(managed.backend.keeper()).is_none());
    assert!(matches!(managed.watcher.ask(&Command::Resume, &[]).0, Reply::Done));
    storms.iter_mut().for_each(Storm::settle);
    assert!(!managed.watcher.report().0.held);
    let is =
        |wanted: &str| managed.watcher.events.iter().filter(|event| format!("{event:?}").starts_with(wanted)).count();
    assert_eq!((is("WorkerHeld"), is("WorkerResumed")), (1, 1), "{:?}", managed.watcher.events);
    assert!(is("WorkerDied") >= 5);
    // Asked to stop while held, it leaves the delta in good order.
    kill_until_held(&managed.backend);
    assert!(matches!(managed.watcher.ask(&Command::Stop, &[]).0, Reply::Done));
    assert!(managed.backend.wait().success());
    let model = Storm::merge(&storms);
    drop((volume, client));
    assert!(contents(&disk) == model);
}

/// The memory in which a keeper's workers show that they live.
pub fn vitals_of(keeper: u32) -> fs::File {
    let is_vitals = |entry: &fs::DirEntry| {
        fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().contains("pando-vitals"))
    };
    let entries = fs::read_dir(format!("/proc/{keeper}/fd")).expect("its descriptors").flatten();
    let memory = entries.into_iter().find(is_vitals).expect("memory for signs of life").path();
    fs::File::options().read(true).write(true).open(memory).expect("memory")
}

#[test]
fn a_worker_that_is_stuck_is_replaced() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &profile());
    let mut storms = storms(&mut client, &disk.contents, 6);
    let mark = backend.log().mark();
    work(&mut storms, || {
        std::thread::sleep(Duration::from_millis(100));
        // Until one is stopped within a batch: one that is stopped between two is not seen to be stuck, and a message finds out.
        send(any_worker(backend.keeper()).expect("a worker"), Signal::STOP);
        let begun = Instant::now();
        while !backend.log().text()[mark..].contains("the worker has died") {
            assert!(begun.elapsed() < PATIENCE, "a worker that is stuck is not replaced");
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    check_all(&disk, backend, client, &mut storms);
}

#[test]
fn a_worker_goes_with_its_keeper_also_when_it_is_stopped() {
    let disk = Disk::new(DISK_BYTES);
    let mut backend = disk.serve();
    let worker = backend.worker();
    send(worker, Signal::STOP);
    backend.kill();
    // Some time it would go on with the guest's rings, beside the worker of another backend.
    wait_until("the worker is gone", || !is_alive(worker));
}

#[test]
fn a_failed_sync_is_remembered_over_workers_and_told() {
    let disk = Disk::new(DISK_BYTES);
    let volume = Volume::cow("one", &disk.base(), &disk.delta(), false);
    let mut managed = Managed::serve(&disk, &volume, manner());
    let mut client = Client::start(&managed.backend, &Profile::qemu());
    let queue = &mut client.queues[0];
    queue.write(0, &[7; SECTOR]);
    // As a worker does whose sync fails, and which dies right then.
    let memory = vitals_of(managed.backend.keeper());
    memory.write_all_at(&1u64.to_le_bytes(), vitals::LATCH as u64 * 8).expect("memory");
    kill_worker(&managed.backend);
    wait_until("there is another worker", || {
        let _ = queue.read(0, SECTOR);
        managed.backend.log().text().contains("the worker has died")
    });
    assert_eq!(queue.read(0, SECTOR), [7; SECTOR], "reads go on");
    assert_eq!(queue.execute(OUT, 0, &[8; SECTOR], 0).status, IOERR);
    assert_eq!(queue.execute(FLUSH, 0, &[], 0).status, IOERR);
    assert_eq!(queue.read(0, SECTOR), [7; SECTOR]);
    wait_until("it is told", || {
        managed.watcher.report();
        managed.watcher.events.iter().any(|event| matches!(event, Event::Latched { file } if file.contains("delta")))
    });
    // Started again, it may be written to: whoever did so has seen to the disk.
    drop(client);
    managed.watcher.ask(&Command::Stop, &[]);
    managed.backend.wait();
    drop(volume);
    let mut backend = disk.serve();
    let mut client = Client::start(&backend, &Profile::qemu());
    client.queues[0].write(0, &[8; SECTOR]);
    client.queues[0].flush();
    backend.stop();
}
