//! [`Daemon`]: the program under test in directories of its own, its API, and the certain end of all that it has started.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::session::harness::image_bytes;

/// How long anything may take that should take no time.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon, its state and its sockets. All of it goes with the test.
pub struct Daemon {
    site: Site,
    process: Option<Child>,
    /// More that it is started with.
    pub arguments: Vec<String>,
    /// How many descriptors it may have when it starts, and how many it may give itself, if not as this process.
    pub descriptors: Option<(u64, u64)>,
    _directory: TempDir,
}

/// Where a daemon is, which can be asked whether it runs or not.
#[derive(Clone)]
pub struct Site {
    directory: PathBuf,
}

impl Deref for Daemon {
    type Target = Site;

    fn deref(&self) -> &Site {
        &self.site
    }
}

/// What the API answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
}

impl Answer {
    /// What was asked for.
    #[track_caller]
    pub fn ok(self) -> Value {
        assert!((200..300).contains(&self.status), "{self:?}");
        self.body
    }

    /// Why it was not done: a problem document of this kind.
    #[track_caller]
    pub fn problem(self, status: u16, kind: &str) -> String {
        assert_eq!(
            (self.status, self.body["type"].as_str()),
            (status, Some(format!("about:blank#{kind}").as_str())),
            "{self:?}"
        );
        self.body["detail"].as_str().expect("a problem has details").to_owned()
    }
}

impl Daemon {
    /// Starts a daemon with nothing in it.
    pub fn new() -> Daemon {
        Daemon::with(&[])
    }

    /// As [`Daemon::new`], with more arguments.
    pub fn with(arguments: &[&str]) -> Daemon {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let site = Site { directory: directory.path().to_owned() };
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let mut daemon = Daemon { site, process: None, arguments, descriptors: None, _directory: directory };
        daemon.start();
        daemon
    }

    /// Starts the daemon, again perhaps, and waits until it answers.
    pub fn start(&mut self) {
        assert!(self.process.is_none(), "it runs");
        let log = File::options().create(true).append(true).open(self.path("log")).expect("a log");
        // What a killed daemon left there answers nobody.
        let _ = fs::remove_file(self.api());
        let program = env!("CARGO_BIN_EXE_pando");
        let mut command = Command::new(if self.descriptors.is_some() { "sh" } else { program });
        if let Some((current, maximum)) = self.descriptors {
            let script = format!("ulimit -Sn {current} && ulimit -Hn {maximum} && exec \"$@\"");
            command.args(["-c", &script, "sh", program]);
        }
        let process = command
            .args(["daemon", "--log", "debug", "--state-dir"])
            .arg(self.path("state"))
            .arg("--run-dir")
            .arg(self.path("run"))
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the daemon starts");
        self.process = Some(process);
        wait_until("the daemon to answer", || {
            if let Some(status) = self.process.as_mut().and_then(|process| process.try_wait().expect("a status")) {
                panic!("the daemon ended with {status}: {}", self.log());
            }
            UnixStream::connect(self.api()).is_ok()
        });
    }

    /// Kills the daemon, and nothing else.
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("it runs");
        process.kill().expect("it is killed");
        process.wait().expect("it ends");
    }

    /// Asks the daemon to stop, which has to go well.
    pub fn stop(&mut self) {
        let mut process = self.process.take().expect("it runs");
        kill_process(Pid::from_child(&process), Signal::TERM).expect("it is asked");
        assert!(process.wait().expect("it ends").success());
    }

    /// What the kernel says of a thread of the daemon's.
    #[track_caller]
    pub fn thread(&self, name: &str) -> PathBuf {
        let threads = fs::read_dir(format!("/proc/{}/task", self.process())).expect("its threads").flatten();
        let mut threads = threads.map(|entry| entry.path());
        let is_it = |path: &PathBuf| fs::read_to_string(path.join("comm")).is_ok_and(|found| found.trim_end() == name);
        threads.find(is_it).unwrap_or_else(|| panic!("there is no thread {name}"))
    }

    /// The daemon's process.
    pub fn process(&self) -> u32 {
        self.process.as_ref().expect("it runs").id()
    }

    /// Where it is.
    pub fn site(&self) -> Site {
        self.site.clone()
    }
}

impl Site {
    /// A path in the test's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The API's socket.
    pub fn api(&self) -> PathBuf {
        self.path("run/api.sock")
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Asks the API.
    #[track_caller]
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        self.try_ask(method, path, body).unwrap_or_else(|| panic!("{method} {path} was not answered: {}", self.log()))
    }

    /// As [`Site::ask`], of a daemon that may be killed meanwhile.
    pub fn try_ask(&self, method: &str, path: &str, body: Option<&Value>) -> Option<Answer> {
        let body = body.map(Value::to_string);
        let headers = if body.is_some() { "content-type: application/json\r\n" } else { "" };
        self.send(method, path, headers, body.unwrap_or_default().as_bytes())
    }

    /// Sends a request as it is, and reads the answer to it.
    pub fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Option<Answer> {
        let mut stream = UnixStream::connect(self.api()).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n"
        );
        // A server that has heard enough answers before all is sent.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Answer { status, body: serde_json::from_str(body).unwrap_or(Value::String(body.to_owned())) })
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        self.ask("GET", path, None).ok()
    }

    #[track_caller]
    pub fn post(&self, path: &str, body: Value) -> Value {
        self.ask("POST", path, Some(&body)).ok()
    }

    #[track_caller]
    pub fn delete(&self, path: &str) {
        self.ask("DELETE", path, None).ok();
    }

    /// Writes an image file of random bytes and imports it: its contents and its digest.
    #[track_caller]
    pub fn import(&self, version: &str, bytes: usize, seed: u64) -> (Vec<u8>, String) {
        let contents = image_bytes(bytes, seed);
        let path = self.path(&format!("{version}.raw"));
        fs::write(&path, &contents).expect("an image");
        let digest = self.import_file(&path, version);
        (contents, digest)
    }

    /// Imports a file: its digest.
    #[track_caller]
    pub fn import_file(&self, path: &Path, version: &str) -> String {
        let job = self.post("/v1/images", json!({ "path": path, "version": version }));
        self.result_of(&job)
    }

    /// Waits for a job to end well: its result.
    #[track_caller]
    pub fn result_of(&self, job: &Value) -> String {
        let job = self.end_of(job);
        assert_eq!(job["state"], "done", "{job}");
        job["result"].as_str().expect("a result").to_owned()
    }

    /// Waits for a job to end.
    #[track_caller]
    pub fn end_of(&self, job: &Value) -> Value {
        let path = format!("/v1/jobs/{}?wait_ms=500", job["id"]);
        let begun = Instant::now();
        loop {
            let job = self.get(&path);
            if job["state"] != "running" {
                return job;
            }
            assert!(begun.elapsed() < PATIENCE, "{job}");
        }
    }

    #[track_caller]
    pub fn set_channel(&self, channel: &str, image: &str) -> Value {
        let path = format!("/v1/channels/{}", channel.replace('/', "%2F"));
        self.ask("PUT", &path, Some(&json!({ "image": image }))).ok()
    }

    /// Attaches a volume to a VM: where it is served.
    #[track_caller]
    pub fn attach(&self, volume: &str, vm: &str) -> PathBuf {
        let attachment = self.post("/v1/attachments", json!({ "volume": volume, "vm": vm }));
        attachment["socket"].as_str().expect("a socket").into()
    }

    #[track_caller]
    pub fn attachment(&self, vm: &str, volume: &str) -> Value {
        self.get(&format!("/v1/attachments/{vm}/{volume}"))
    }

    #[track_caller]
    pub fn detach(&self, vm: &str, volume: &str) {
        self.delete(&format!("/v1/attachments/{vm}/{volume}"));
    }

    #[track_caller]
    pub fn volume(&self, name: &str) -> Value {
        self.get(&format!("/v1/volumes/{name}"))
    }

    /// Connects to a volume's socket.
    #[track_caller]
    pub fn connect(&self, socket: &Path) -> UnixStream {
        UnixStream::connect(socket).unwrap_or_else(|error| panic!("{}: {error}: {}", socket.display(), self.log()))
    }

    /// The kinds of all events about an object.
    #[track_caller]
    pub fn events_of(&self, object: &str) -> Vec<String> {
        let events = self.get("/v1/events");
        let events = events.as_array().expect("events").iter().filter(|event| event["object"] == object);
        events.map(|event| event["kind"].as_str().expect("a kind").to_owned()).collect()
    }

    /// The keepers that run on this daemon's files, whoever knows of them.
    pub fn keepers(&self) -> Vec<u32> {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        numbers.filter(|process| is_keeper(*process) && self.has_files(*process)).collect()
    }

    /// Whether a process has any of the test's files open.
    fn has_files(&self, process: u32) -> bool {
        let descriptors = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
        descriptors
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .any(|file| file.starts_with(self.path("state")))
    }

    /// Names of the files of deltas.
    pub fn delta_files(&self) -> Vec<String> {
        names_in(&self.path("state/volumes"))
    }

    /// Names of the files of images.
    pub fn image_files(&self) -> Vec<String> {
        names_in(&self.path("state/images"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("-- the daemon's log\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
        for keeper in self.keepers() {
            if let Some(keeper) = Pid::from_raw(keeper.cast_signed()) {
                let _ = kill_process(keeper, Signal::KILL);
            }
        }
    }
}

fn is_keeper(process: u32) -> bool {
    let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    [Some(&b"--managed"[..]), Some(b"--resume")].contains(&line.split(|byte| *byte == 0).nth(1))
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Waits for something that comes soon.
#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Changes some bytes of a file in place.
pub fn change_file(path: &Path, offset: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).expect("a file");
    file.write_all_at(bytes, offset).expect("it takes bytes");
}
