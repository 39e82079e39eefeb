//! The tables of system calls: that each line of them is needed.
//!
//! A scenario has a backend do all that it ever does. With a line left out of a table, some process of it has to end by SIGSYS; without
//! such a line, none does.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pando::block::delta::{Delta, Lifetime, open};
use pando::block::storage::FileStorage;
use pando::vhost_user::control::Command;
use pando::vhost_user::sandbox::{KEEPER, SOCKET_FILE, WORKER};
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};

use super::client::{Client, Profile};
use super::guest::Guest;
use super::harness::{Backend, Disk, PATIENCE, SECTOR, children_of, program, send, text};
use super::managed::{self, Managed, Volume, Watcher, manner};
use super::queue::{DISCARD, FLUSH, IN, OUT, Queue, range_bytes};
use super::raw::{self, RawFrontEnd, state};
use super::upgrades::upgrade;

const DISK_BYTES: usize = 1 << 20;
/// Marks in a log: so many that the list of them is no longer copied when it grows, and all over a disk that is so large that
/// what becomes of the map makes the heap grow.
const MARKS: u64 = 9000;
const CLUSTERS_APART: u64 = 400;

/// Something went wrong, and a system call that may not be made should be why.
struct Broken;

/// Whether a process of a backend ended by SIGSYS.
fn is_killed(backend: &mut Backend) -> bool {
    let keeper = if backend.is_running() { None } else { backend.wait().signal() };
    keeper == Some(Signal::SYS.as_raw()) || backend.log().text().contains("SIGSYS")
}

/// Waits until something is so, or the backend has broken.
fn until(backend: &mut Backend, mut is_so: impl FnMut(&mut Backend) -> bool) -> Result<(), Broken> {
    let begun = Instant::now();
    while !is_so(backend) {
        if is_killed(backend) || !backend.is_running() || begun.elapsed() > PATIENCE {
            return Err(Broken);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn until_logged(backend: &mut Backend, mark: usize, words: &str) -> Result<(), Broken> {
    until(backend, |backend| backend.log().text()[mark..].contains(words))
}

fn execute(
    backend: &mut Backend,
    queue: &mut Queue,
    kind: u32,
    sector: u64,
    readable: &[u8],
    writable: usize,
) -> Result<(), Broken> {
    queue.submit(kind, sector, readable, writable);
    queue.ring.kick_anyway();
    until(backend, |_| queue.take().is_some())
}

/// A front end that comes, has a request of each kind carried out, and goes.
fn be_served(backend: &mut Backend, client: &mut Client) -> Result<(), Broken> {
    let queue = &mut client.queues[0];
    // What the last one has written, if there was one.
    execute(backend, queue, IN, 8, &[], SECTOR)?;
    execute(backend, queue, OUT, 8, &[7; 16 * SECTOR], 0)?;
    execute(backend, queue, FLUSH, 0, &[], 0)?;
    execute(backend, queue, DISCARD, 0, &range_bytes(&[(16, 8, 0)]), 0)
}

/// Two queues that flush, one after the other, so that the flush of one waits for that of the other in the end.
fn flush_by_turns(backend: &mut Backend, client: &mut Client) -> Result<(), Broken> {
    for round in 0..4 {
        let queue = &mut client.queues[round % 2];
        execute(backend, queue, OUT, 32, &[8; SECTOR], 0)?;
        execute(backend, queue, FLUSH, 0, &[], 0)?;
    }
    Ok(())
}

/// The keeper may have no more descriptors than it has, when the first front end comes.
fn run_out(backend: &mut Backend) -> Result<(), Broken> {
    let keeper = Pid::from_raw(backend.keeper().cast_signed()).expect("a number");
    let limit = |current| {
        let limit = Rlimit { current: Some(current), maximum: Some(DESCRIPTORS_ENOUGH) };
        prlimit(Some(keeper), Resource::Nofile, limit).expect("the process is ours")
    };
    // Ready, it waits for front ends and for nothing else, with all descriptors that it takes for that.
    until(backend, |backend| is_asleep(backend.keeper()))?;
    limit(DESCRIPTORS_BELOW);
    let mark = backend.log().mark();
    let waits = UnixStream::connect(backend.socket()).expect("it listens");
    until_logged(backend, mark, "could not be accepted")?;
    limit(DESCRIPTORS_ENOUGH);
    drop(waits);
    Ok(())
}

/// Whether a process waits for something.
fn is_asleep(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" S"))
}

/// Every number below has an open descriptor in a keeper. No fewer than it polls at once, which the kernel refuses.
const DESCRIPTORS_BELOW: u64 = 8;
const DESCRIPTORS_ENOUGH: u64 = 64;

/// A driver that cannot be notified, and a worker that is stopped and goes on while it waits for the thread that tries to.
fn be_interrupted(backend: &mut Backend) -> Result<(), Broken> {
    let full = vmm_sys_util::eventfd::EventFd::new(0).expect("an event descriptor");
    full.write(u64::MAX - 1).expect("an event descriptor");
    for _ in 0..INTERRUPTIONS {
        let stream = backend.connect();
        let mut raw = RawFrontEnd { stream: stream.try_clone().expect("a descriptor") };
        let mut client = Client::start_on(stream, &Profile::qemu(), Guest::new());
        raw.send(raw::SET_VRING_CALL, &0u64.to_ne_bytes(), &[full.as_raw_fd()]);
        let mark = backend.log().mark();
        client.queues[0].submit(IN, 0, &[], SECTOR);
        client.queues[0].ring.kick_anyway();
        raw.send(raw::GET_VRING_BASE, &state(0, 0), &[]);
        std::thread::sleep(Duration::from_millis(5));
        for worker in children_of(backend.keeper()) {
            send(worker, Signal::STOP);
            send(worker, Signal::CONT);
        }
        until_logged(backend, mark, "cannot be notified")?;
        raw.receive();
    }
    Ok(())
}

/// How often a worker is stopped in a wait that may be over by then.
const INTERRUPTIONS: usize = 5;

fn ends_well(backend: &mut Backend) -> Result<(), Broken> {
    if backend.wait().success() { Ok(()) } else { Err(Broken) }
}

/// A part of the scenario, each of which has a backend of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    /// By itself, with front ends that come and go.
    Alone,
    /// The next one, which finds a long log of the last.
    Next,
    /// For a guest that comes from elsewhere; reads are left to threads.
    Incoming,
    /// Managed; its volume grows, and it executes another program in its place.
    Managed,
    /// The worker aborts.
    Aborts,
}

const PARTS: [Part; 5] = [Part::Alone, Part::Next, Part::Incoming, Part::Managed, Part::Aborts];

/// Plays a part with a line left out of a table: whether a process ended by SIGSYS. Otherwise all has to go well.
#[track_caller]
fn is_killed_in(part: Part, disk: &Disk, without: &str) -> bool {
    let mut command = program();
    command.env("PANDO_SANDBOX_WITHOUT", without).stdin(Stdio::null());
    let (delta, socket) = (disk.delta(), disk.path("socket"));
    if part == Part::Managed {
        let volume = Volume::cow("volume", &disk.base(), &disk.path("other-delta"), false);
        let Managed { mut backend, watcher, .. } =
            Managed::serve_on(managed::start_command(disk, command), disk, &volume, manner());
        return is_killed_while(&mut backend, without, |backend| grow(backend, watcher));
    }
    command.args(["--blank", "--delta", text(&delta), "--socket-path", text(&socket)]);
    command.args(if part == Part::Incoming { &["--incoming"][..] } else { &["--create", "--size", "16G"] });
    // Past the page cache, nothing is done that is not done for the rest of a delta.
    command.args(["--delta-cache", "writeback"]);
    command.args(["--io", if part == Part::Incoming { "threads" } else { "auto" }]);
    if part == Part::Aborts {
        command.env("PANDO_ATTEMPT", "worker:abort");
    }
    let mut backend = Backend::start_command(&mut command, &socket);
    is_killed_while(&mut backend, without, |backend| {
        if part == Part::Aborts {
            if backend.wait().signal() == Some(Signal::SYS.as_raw()) {
                return Err(Broken);
            }
            backend.log().expect_after(0, &["died at its start"]);
            return if backend.log().text().contains("SIGABRT") { Ok(()) } else { Err(Broken) };
        }
        until_logged(backend, 0, "ready for front ends")?;
        if matches!(part, Part::Next | Part::Incoming) {
            be_served(backend, &mut Client::start(backend, &Profile::qemu()))?;
        }
        if part == Part::Alone {
            run_out(backend)?;
            for _ in 0..2 {
                let mut client = Client::start(backend, &Profile::qemu().queues(2));
                be_served(backend, &mut client)?;
                flush_by_turns(backend, &mut client)?;
            }
            be_interrupted(backend)?;
        }
        backend.terminate();
        ends_well(backend)
    })
}

fn grow(backend: &mut Backend, mut watcher: Watcher) -> Result<(), Broken> {
    let mut client = Client::start(backend, &Profile::qemu());
    let channel = client.listen_on_channel();
    client.settle();
    watcher.ask(&Command::Grow { bytes: 2 * DISK_BYTES as u64 }, &[]);
    channel.next_request();
    upgrade(&mut watcher);
    be_served(backend, &mut client)?;
    watcher.ask(&Command::Stop, &[]);
    ends_well(backend)
}

#[track_caller]
fn is_killed_while(backend: &mut Backend, without: &str, act: impl FnOnce(&mut Backend) -> Result<(), Broken>) -> bool {
    let (log, keeper, is_over) = (backend.log().clone(), backend.keeper(), AtomicBool::new(false));
    let went_well = std::thread::scope(|scope| {
        scope.spawn(|| {
            // A keeper would start one worker after another, and then wait, and so would whoever asks it for something.
            while !is_over.load(Ordering::Acquire) && !log.text().contains("SIGSYS") {
                std::thread::sleep(Duration::from_millis(1));
            }
            if !is_over.load(Ordering::Acquire) {
                send(keeper, Signal::KILL);
            }
        });
        // Those who ask a backend that has broken for something panic.
        let result = catch_unwind(AssertUnwindSafe(|| act(backend)));
        is_over.store(true, Ordering::Release);
        matches!(result, Ok(Ok(())))
    });
    if went_well && !is_killed(backend) {
        return false;
    }
    // It may be about to end.
    let begun = Instant::now();
    while !is_killed(backend) {
        let log = backend.log().text();
        assert!(begun.elapsed() < Duration::from_secs(5), "without {without}, something else went wrong: {log}");
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Leaves a log in the delta that is long, as a process does that dies.
fn lengthen_log(disk: &Disk) {
    let (file, header) = open::open_locked(&disk.delta()).expect("nobody else holds the delta");
    let storage = FileStorage::new(file).expect("a storage");
    let delta = Delta::start(storage, "delta".to_owned(), header, Lifetime::Persistent).expect("a whole delta");
    for cluster in (0..MARKS).map(|number| CLUSTERS_APART * number) {
        delta.load(cluster).and_then(|()| delta.zero(cluster, 1, false)).expect("room in the log");
    }
}

/// The part in which a process ends by SIGSYS that lacks a line of its table, if there is one.
#[track_caller]
fn is_missed_in(without: &str) -> Option<Part> {
    let disk = Disk::new(DISK_BYTES);
    PARTS.into_iter().find(|part| {
        if *part == Part::Next {
            lengthen_log(&disk);
        }
        is_killed_in(*part, &disk, without)
    })
}

#[test]
fn the_tables_have_all_that_is_needed_and_nothing_else() {
    let begun = Instant::now();
    assert_eq!(is_missed_in("nobody:nothing"), None, "with whole tables");
    eprintln!("{:?} for all of it", begun.elapsed());
    let worker = WORKER.iter().map(|call| format!("worker:{}", call.name));
    let keeper = KEEPER.iter().chain(SOCKET_FILE).map(|call| format!("keeper:{}", call.name));
    let lines = Mutex::new(worker.chain(keeper));
    let next = || lines.lock().expect("no holder of this lock panics").next();
    let needless = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(line) = next() {
                    match is_missed_in(&line) {
                        Some(part) => eprintln!("{line}: {part:?}"),
                        None => needless.lock().expect("no holder of this lock panics").push(line),
                    }
                }
            });
        }
    });
    eprintln!("{:?}", begun.elapsed());
    assert_eq!(
        needless.into_inner().expect("no holder of this lock panics"),
        Vec::<String>::new(),
        "nobody misses these"
    );
}
