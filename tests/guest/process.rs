//! A program that a test started: its log, its limit, its certain end.
//!
//! Knows nothing of what the program is. A program ends with the test at the latest, also when the
//! test panics (by `Drop`) or is killed (by the parent-death signal). When the test fails, what the
//! program said is printed.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(20);
/// How much of a long log a failure shows.
const LOG_LINES_SHOWN: usize = 60;

pub struct Process {
    name: String,
    child: Child,
    /// Files to show when the test fails.
    logs: Vec<PathBuf>,
}

impl Process {
    /// Starts `program` with its standard output and error in `log`.
    pub fn start(name: &str, program: impl AsRef<Path>, args: &[String], log: PathBuf) -> Self {
        let out = File::create(&log).expect("the test's directory takes files");
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program.as_ref())
            .args(args)
            .stdin(Stdio::piped())
            .stdout(out.try_clone().expect("a descriptor can be duplicated"))
            .stderr(out)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        Self { name: name.to_owned(), child, logs: vec![log] }
    }

    pub fn show_on_failure(&mut self, log: PathBuf) {
        self.logs.push(log);
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Fails the test if the program has ended.
    pub fn assert_running(&mut self) {
        if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
            panic!("{} ended early: {status}", self.name);
        }
    }

    /// Writes a line to its standard input.
    pub fn tell(&mut self, line: &str) {
        self.assert_running();
        let input = self.child.stdin.as_mut().expect("it was started with a pipe");
        writeln!(input, "{line}").expect("the program reads its input");
    }

    pub fn terminate(&self) {
        let status =
            Command::new("sh").arg("-c").arg(format!("kill -TERM {}", self.child.id())).status().expect("sh starts");
        assert!(status.success(), "{} takes no signal", self.name);
    }

    /// SIGKILL, and the end of it.
    pub fn kill(&mut self) {
        self.assert_running();
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let mut ended = None;
        let what = format!("{} to end", self.name);
        wait_until(&what, limit, || {
            ended = self.child.try_wait().expect("a child can be waited for");
            ended.is_some()
        });
        ended.expect("the wait ended because of it")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a program that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            for log in &self.logs {
                eprintln!("---- {} {}\n{}", self.name, log.display(), tail(log));
            }
        }
    }
}

fn tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
}

pub fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < limit, "waited {} s for {what}", limit.as_secs());
        thread::sleep(POLL);
    }
}
