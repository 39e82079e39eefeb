//! What becomes of a keeper or a worker that has been taken over, and tries something that it never does.
//!
//! A process of a debug build tries it once its sandbox is closed, when its environment says so.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use rustix::process::Signal;

use super::client::{Client, Profile};
use super::harness::{Backend, Disk, SECTOR, Sleeper, is_alive, program, text, wait_until};
use super::sandbox::libraries_of;

const DISK_BYTES: usize = 1 << 20;

/// What comes of an attempt.
#[derive(Clone, Copy)]
enum Comes {
    /// The process ends: by this signal, or by this exit code.
    End(Signal),
    Exit(i32),
    /// It is told this, and goes on.
    Told(&'static str),
}

use Comes::{End, Exit, Told};

const SYS: Comes = End(Signal::SYS);
const DENIED: Comes = Told("Permission denied");

/// Has a process of a backend try something as soon as its sandbox is closed. How the backend ended if it did, and what it has said.
fn attempt(disk: &Disk, process: &str, what: &str) -> (Option<ExitStatus>, String) {
    let (base, socket) = (disk.base(), disk.path("socket"));
    let mut command = program();
    command.args(["--base", text(&base), "--read-only", "--log", "debug", "--socket-path", text(&socket)]);
    command.env("PANDO_ATTEMPT", format!("{process}:{what}")).stdin(Stdio::null());
    let mut backend = Backend::start_command(&mut command, &socket);
    let log = backend.log().clone();
    wait_until("it serves or has ended", || !backend.is_running() || log.text().contains("ready for front ends"));
    let mut status = None;
    if backend.is_running() {
        let mut client = Client::start(&backend, &Profile::qemu());
        assert_eq!(client.queues[0].read(0, SECTOR), disk.contents[..SECTOR], "after it tried to {what}");
        drop(client);
        backend.stop();
    } else {
        status = Some(backend.wait());
    }
    // With all that it has said.
    drop(backend);
    (status, log.text())
}

#[track_caller]
fn check_attempts(process: &str, attempts: &[(&str, Comes)]) {
    let disk = Disk::new(DISK_BYTES);
    for (what, comes) in attempts {
        let (status, log) = attempt(&disk, process, what);
        if process == "keeper" && log.contains("no Landlock") {
            eprintln!("SKIPPED: {what}: no Landlock here");
            continue;
        }
        let told = log.lines().find_map(|line| Some(line.split_once(&format!("attempted to {what}: "))?.1));
        // A worker's end is so early its keeper's too, which says how it came.
        let has_died = |how: &str| status.is_some() && log.contains(&format!("died at its start ({how}"));
        let as_it_should = match comes {
            End(signal) if process == "keeper" => status.is_some_and(|status| status.signal() == Some(signal.as_raw())),
            End(signal) => has_died(&format!("signal: {} ", signal.as_raw())),
            Exit(code) if process == "keeper" => status.is_some_and(|status| status.code() == Some(*code)),
            Exit(code) => has_died(&format!("exit status: {code})")),
            Told(words) => status.is_none() && told.is_some_and(|told| told.contains(words)),
        };
        let is_told = matches!(comes, Told(_));
        assert!(
            as_it_should && is_told == told.is_some(),
            "{process}: {what}: it ended with {status:?}, and said:\n{log}"
        );
        assert_eq!(log.contains("may have been taken over"), matches!(comes, End(Signal::SYS)) && process == "worker");
    }
}

/// What neither of the two can do.
const FORBIDDEN: [(&str, Comes); 13] = [
    ("socket", SYS),
    // By one of its own it could do what its system calls cannot.
    ("ring", SYS),
    ("ring-buffers", SYS),
    ("fork", SYS),
    ("namespace", SYS),
    ("signal 1", SYS),
    ("kill-group", SYS),
    ("trace", SYS),
    ("code", SYS),
    ("anonymous-code", SYS),
    ("later-code", SYS),
    // So that the C library starts threads by a call whose flags can be checked.
    ("clone3", Told("Function not implemented")),
    ("nonsense", Told("no such attempt")),
];

#[test]
fn a_worker_that_was_taken_over_can_do_nothing_else() {
    check_attempts("worker", &FORBIDDEN);
    let victim = tempfile::NamedTempFile::new().expect("a file");
    let path = text(victim.path());
    let on_path = |verb: &str| format!("{verb} {path}");
    check_attempts(
        "worker",
        &[
            (&on_path("read"), SYS),
            (&on_path("write"), SYS),
            (&format!("create {path}-more"), SYS),
            (&on_path("remove"), SYS),
            ("execute /bin/true", SYS),
            ("execute /proc/self/exe", SYS),
            ("interrupt 1", SYS),
            // An end is no attempt, and is not taken for one.
            ("abort", End(Signal::ABORT)),
            ("panic", Exit(101)),
        ],
    );
    assert!(victim.path().exists());
}

#[test]
fn a_keeper_that_was_taken_over_can_do_little_else() {
    check_attempts("keeper", &FORBIDDEN);
    let disk = Disk::new(DISK_BYTES);
    let victim = disk.path("victim");
    fs::write(&victim, "precious").expect("a file");
    let library = libraries_of(Path::new(program().get_program())).remove(0);
    let path = text(&victim);
    let on_path = |verb: &str| format!("{verb} {path}");
    check_attempts(
        "keeper",
        &[
            (&on_path("read"), DENIED),
            (&on_path("write"), SYS),
            (&format!("create {path}-more"), SYS),
            (&on_path("remove"), DENIED),
            ("execute /bin/true", DENIED),
            ("abort", End(Signal::ABORT)),
            ("panic", Exit(101)),
            // What it needs to start a worker, it can have.
            (&format!("read {}", text(&library)), Told("done")),
        ],
    );
    assert_eq!(fs::read(&victim).expect("the file"), b"precious");
}

#[test]
fn a_keeper_interrupts_nobody_outside() {
    let disk = Disk::new(DISK_BYTES);
    let victim = Sleeper::start(Command::new("sleep").arg("1000"));
    let (status, log) = attempt(&disk, "keeper", &format!("interrupt {}", victim.process()));
    let is_there = is_alive(victim.process());
    let version = log.lines().find_map(|line| line.split_once("has version ")?.1.split(' ').next()?.parse().ok());
    if version.unwrap_or(0) < SIGNALS_SINCE {
        eprintln!("SKIPPED: version {version:?} of Landlock knows no signals");
        return;
    }
    assert!(is_there && status.is_none() && log.contains("Operation not permitted"), "{status:?}, {log}");
}

/// The version of Landlock that came with a scope for signals.
const SIGNALS_SINCE: u32 = 6;
