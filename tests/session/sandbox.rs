//! Sandboxes: that they are closed as they should be, and that a closed one is in nobody's way. What they keep from is in `attempts`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;

use super::client::{Client, Profile, check_served};
use super::harness::{Backend, Disk, children_of, program, send, text, wait_until};
use super::managed::{Managed, Volume, manner};

const DISK_BYTES: usize = 1 << 20;

/// Descriptors that a process may have at most.
const DESCRIPTORS_MAX: u64 = 4096;

/// A field of a file of /proc, or nothing when it has none of the name.
fn field<'t>(text: &'t str, name: &str) -> &'t str {
    text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim()
}

/// The states of all threads of a process.
#[track_caller]
fn states(process: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).expect("a running process").flatten();
    threads.map(|thread| fs::read_to_string(thread.path().join("status")).expect("a running thread")).collect()
}

/// Whom a process runs as.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Groups besides.
    pub groups: String,
}

#[track_caller]
pub fn user_of(process: u32) -> User {
    let state = &states(process)[0];
    // Real, effective, saved, and that of files.
    let number = |name| {
        let numbers: Vec<u32> =
            field(state, name).split('\t').map(|number| number.parse().expect("a number")).collect();
        assert_eq!(numbers, [numbers[0]; 4], "{name}");
        numbers[0]
    };
    User { uid: number("Uid:"), gid: number("Gid:"), groups: field(state, "Groups:").to_owned() }
}

/// Sees that a process is closed in, with all its threads: it has no privileges, and the kernel looks at its system calls.
#[track_caller]
pub fn check_closed(process: u32) {
    for state in states(process) {
        let name = field(&state, "Name:");
        assert_eq!((field(&state, "Seccomp:"), field(&state, "NoNewPrivs:")), ("2", "1"), "{name}");
        let mut kinds = vec!["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"];
        if user_of(process).uid == 0 {
            // Nobody else may change it, and nobody has anything from it.
            kinds.push("CapBnd:");
        }
        for kind in kinds {
            assert_eq!(u64::from_str_radix(field(&state, kind), 16), Ok(0), "{name} {kind}");
        }
    }
    let limits = fs::read_to_string(format!("/proc/{process}/limits")).expect("a running process");
    for limit in field(&limits, "Max open files").split_whitespace().take(2) {
        assert!(limit.parse::<u64>().expect("a number") <= DESCRIPTORS_MAX, "{limit} descriptors");
    }
    let cores = fs::read_to_string(format!("/proc/{process}/coredump_filter")).expect("a running process");
    assert_eq!(u32::from_str_radix(cores.trim(), 16), Ok(0x11), "what a core holds");
}

/// How many filters of system calls a process is behind.
fn filters_of(process: u32) -> u32 {
    field(&states(process)[0], "Seccomp_filters:").parse().expect("a number")
}

/// Whether a process has no sandbox.
#[track_caller]
pub fn is_open(process: u32) -> bool {
    states(process).iter().all(|state| field(state, "Seccomp:") == "0")
}

#[test]
fn keeper_and_worker_are_closed_in_as_they_run() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let client = Client::start(&backend, &Profile::qemu().queues(3));
    assert_eq!(states(backend.worker()).len(), 4, "a thread for each ring");
    check_closed(backend.keeper());
    check_closed(backend.worker());
    assert!(
        filters_of(backend.worker()) > filters_of(backend.keeper()),
        "the worker has what its keeper has and no more"
    );
    drop(client);

    // So is the next worker.
    let first = backend.worker();
    send(first, Signal::KILL);
    let mut model = disk.contents.clone();
    check_next(&backend, first, &mut model, 1);
    check_closed(backend.worker());
}

/// How many descriptors the keeper has by which it learns at once that a worker's filter is nobody's any more.
fn watches_of(keeper: u32) -> usize {
    let entries = fs::read_dir(format!("/proc/{keeper}/fd")).expect("its descriptors").flatten();
    let is_watch = |entry: &fs::DirEntry| {
        fs::read_link(entry.path()).is_ok_and(|link| link.ends_with("anon_inode:seccomp notify"))
    };
    entries.filter(is_watch).count()
}

#[test]
fn a_keeper_watches_its_worker_by_the_workers_filter() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    assert_eq!(watches_of(backend.keeper()), 1);
    for seed in 0..3 {
        let worker = backend.worker();
        send(worker, Signal::KILL);
        check_next(&backend, worker, &mut model, seed);
        assert_eq!(watches_of(backend.keeper()), 1, "of the worker that is there, and of no other");
    }
}

#[test]
fn a_managed_keeper_and_its_worker_are_closed_in() {
    let disk = Disk::new(DISK_BYTES);
    let managed = Managed::serve(&disk, &Volume::read_only("image", &disk.base()), manner());
    check_closed(managed.backend.keeper());
    check_closed(managed.backend.worker());
}

#[test]
fn a_backend_without_a_sandbox_says_so() {
    let disk = Disk::new(DISK_BYTES);
    let mut backend = disk.serve_with(&["--no-sandbox"]);
    backend.log().expect_after(0, &["warn", "NO SANDBOX"]);
    assert!(is_open(backend.keeper()) && is_open(backend.worker()));
    let mut model = disk.contents.clone();
    check_served(&backend, &mut model, 1);
    backend.stop();
    let mut backend = disk.serve();
    check_served(&backend, &mut model, 2);
    assert!(!backend.log().text().contains("NO SANDBOX"));
    backend.stop();
}

/// Waits for the worker to be another one than `last`, and sees that it serves.
#[track_caller]
fn check_next(backend: &Backend, last: u32, model: &mut [u8], seed: u64) {
    wait_until("there is another worker", || {
        children_of(backend.keeper()).last().is_some_and(|worker| *worker != last)
    });
    check_served(backend, model, seed);
}

#[test]
fn a_worker_starts_after_the_program_and_its_libraries_were_replaced() {
    let disk = Disk::new(DISK_BYTES);
    let (ours, libraries) = (disk.path("pando-blk"), disk.path("libraries"));
    fs::copy(program().get_program(), &ours).expect("a copy");
    fs::create_dir(&libraries).expect("a directory");
    let names = libraries_of(&ours);
    let put = |library: &Path| {
        let (next, path) = (disk.path("next"), libraries.join(library.file_name().expect("a name")));
        fs::copy(library, &next).and_then(|_| fs::rename(&next, &path)).expect("a library in its place");
    };
    names.iter().for_each(|library| put(library));
    // While another test starts a process, that has all files open for a moment that this one writes to.
    wait_until("the copy can be executed", || Command::new(&ours).arg("--version").output().is_ok());
    let (base, delta, socket) = (disk.base(), disk.delta(), disk.path("socket"));
    let mut command = Command::new(&ours);
    command.args(["--base", text(&base), "--delta", text(&delta), "--create", "--socket-path", text(&socket)]);
    let mut backend = Backend::start_command(command.env("LD_LIBRARY_PATH", &libraries).stdin(Stdio::null()), &socket);
    backend.wait_until_ready();
    let mut model = disk.contents.clone();
    for seed in 0..3 {
        names.iter().for_each(|library| put(library));
        fs::write(disk.path("next"), "another program").expect("a file");
        fs::rename(disk.path("next"), &ours).expect("a program in its place");
        let worker = backend.worker();
        send(worker, Signal::KILL);
        check_next(&backend, worker, &mut model, seed);
    }
    backend.stop();
}

/// The libraries that a program loads, but for the loader, whose path is fixed.
#[track_caller]
pub fn libraries_of(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd").stdout;
    let output = String::from_utf8(output).expect("text");
    let path = |line: &str| Some(PathBuf::from(line.split_once("=> ")?.1.split(' ').next()?));
    let found: Vec<PathBuf> = output.lines().filter_map(path).collect();
    assert!(!found.is_empty(), "{output}");
    found
}
