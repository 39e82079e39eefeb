//! `pando serve` as a user starts it: one volume on one socket.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::process::{Process, wait_until};

/// Generous: the first start on an image also computes its digest, on a machine that is busy.
const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(20);

pub struct Backend {
    process: Process,
    /// What `pando` was started with.
    line: Vec<String>,
    /// Of each of its starts.
    logs: Vec<PathBuf>,
    socket: PathBuf,
    /// Holds the socket: in a short path, because a socket's is limited to 107 bytes.
    _sockets: TempDir,
}

impl Backend {
    /// Serves the volume that `args` describe and logs in `dir`.
    pub fn start(dir: &Path, name: &str, args: &[&str]) -> Self {
        let sockets = TempDir::new().expect("the system's directory takes files");
        let socket = sockets.path().join(format!("{name}.sock"));
        let mut line = vec!["serve".to_owned()];
        line.extend(args.iter().map(|&arg| arg.to_owned()));
        line.extend(["--socket-path".to_owned(), socket.display().to_string()]);
        let log = dir.join(format!("{name}.log"));
        let process = serve(&line, &log, &socket);
        Self { process, line, logs: vec![log], socket, _sockets: sockets }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// SIGTERM: has to end well, and leave no socket behind that nobody serves.
    pub fn stop(mut self) {
        self.process.assert_running();
        self.process.terminate();
        let status = self.process.wait(STOP_LIMIT);
        assert!(status.success(), "the backend ended with {status}");
    }

    /// SIGKILL for the keeper; the worker has to follow it.
    pub fn kill(mut self) {
        self.kill_all();
    }

    /// The same, and it is started again at the same socket.
    pub fn kill_and_start_again(&mut self) {
        self.kill_all();
        let log = self.logs[0].with_extension(format!("{}.log", self.logs.len()));
        self.process = serve(&self.line, &log, &self.socket);
        self.logs.push(log);
    }

    fn kill_all(&mut self) {
        let workers = workers(self.keeper());
        assert!(!workers.is_empty(), "the keeper has no worker");
        self.process.kill();
        wait_until("the worker to end with its keeper", STOP_LIMIT, || {
            // Also when nobody has taken note of its end yet: it then has no program any more.
            workers.iter().all(|worker| fs::read_link(format!("/proc/{worker}/exe")).is_err())
        });
    }

    /// The keeper's process.
    pub fn keeper(&self) -> u32 {
        self.process.id()
    }

    /// How often its keepers and workers have said something.
    pub fn said(&self, words: &str) -> usize {
        let read = |log| fs::read_to_string(log).expect("the backend's log can be read");
        self.logs.iter().map(|log| read(log).matches(words).count()).sum()
    }
}

/// SIGKILL for a keeper's worker, at once or as soon as it is seen at work; the keeper has to start another.
pub fn kill_worker(keeper: u32, at_work: bool) {
    let [worker] = workers(keeper)[..] else { panic!("the keeper has no worker, or several") };
    let started = Instant::now();
    while at_work && !is_at_work(worker) {
        assert!(started.elapsed() < START_LIMIT, "the worker has nothing to do");
        // Work takes no longer.
        thread::sleep(Duration::from_micros(50));
    }
    kill_process(Pid::from_raw(worker).expect("processes have numbers"), Signal::KILL).expect("it can be killed");
    wait_until("another worker", START_LIMIT, || matches!(workers(keeper)[..], [another] if another != worker));
}

fn workers(keeper: u32) -> Vec<i32> {
    let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).expect("the keeper lives");
    children.split_ascii_whitespace().map(|child| child.parse().expect("processes have numbers")).collect()
}

/// Whether a thread of a process runs, or waits for a disk.
fn is_at_work(process: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{process}/task")).expect("the kernel lists threads");
    threads.flatten().any(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let (_, rest) = stat.rsplit_once(") ").unwrap_or_default();
        rest.starts_with(['R', 'D'])
    })
}

fn serve(line: &[String], log: &Path, socket: &Path) -> Process {
    let name = log.file_stem().unwrap_or_default().display();
    let mut process = Process::start(&format!("backend {name}"), program(), line, log.to_owned());
    wait_until("the backend to listen", START_LIMIT, || {
        process.assert_running();
        listens(socket)
    });
    process
}

/// Whether someone listens on a socket, without the connection that would disturb him.
fn listens(socket: &Path) -> bool {
    const ACCEPTS_CONNECTIONS: &str = "00010000";
    let sockets = fs::read_to_string("/proc/net/unix").expect("Linux lists its sockets");
    sockets.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        words.nth(3) == Some(ACCEPTS_CONNECTIONS) && words.nth(3).is_some_and(|path| Path::new(path) == socket)
    })
}

/// The program: where the variable says that it is, such as the one that is packaged, or as it was built with the tests.
pub fn program() -> PathBuf {
    match std::env::var_os("PANDO_PROGRAMS") {
        Some(directory) => Path::new(&directory).join("pando"),
        None => env!("CARGO_BIN_EXE_pando").into(),
    }
}

/// Runs `pando` to its end and gives what it printed.
pub fn pando(args: &[&str]) -> String {
    let output = Command::new(program()).args(args).output().expect("pando starts");
    assert!(output.status.success(), "pando {args:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("pando prints text")
}
