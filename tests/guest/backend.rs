//! `pando serve` as a user starts it: one volume on one socket.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::process::{Process, wait_until};

/// Generous: the first start on an image also computes its digest, on a machine that is busy.
const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(20);

pub struct Backend {
    process: Process,
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
        let mut process = Process::start(&format!("backend {name}"), program(), &line, log);
        wait_until("the backend to listen", START_LIMIT, || {
            process.assert_running();
            listens(&socket)
        });
        Self { process, socket, _sockets: sockets }
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
        let id = self.process.id();
        let workers = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).expect("the kernel lists children");
        assert!(!workers.trim().is_empty(), "the keeper has no worker");
        self.process.kill();
        wait_until("the worker to end with its keeper", STOP_LIMIT, || {
            // Also when nobody has taken note of its end yet: it then has no program any more.
            workers.split_ascii_whitespace().all(|worker| fs::read_link(format!("/proc/{worker}/exe")).is_err())
        });
    }
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
