//! The program under test: [`Backend`], and the files that it serves: [`Disk`].
//!
//! A backend ends with its test, also when that panics; what it logged is then shown. Knows nothing of vhost-user.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pando::block::base::Base;
use pando::block::cached::COLD_VARIABLE;
use pando::block::delta::header::{SESSION_AT, Session};
use pando::block::delta::{Delta, Lifetime, open};
use pando::block::storage::FileStorage;
use pando::block::{DeltaCache, Volume};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};

/// How long anything may take that should take no time: long enough for a busy machine, on which a write may wait for the
/// file system's journal to commit gigabytes of somebody else's.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How long a backend may run. What waits for its answers has no limit of its own, and sees the connection end instead.
const LIFE: Duration = Duration::from_secs(300);

/// A sector, as virtio has it.
pub const SECTOR: usize = 512;

/// The bytes that an image of a seed has. Sectors differ from each other, and from zeros.
pub fn image_bytes(bytes: usize, seed: u64) -> Vec<u8> {
    let mut contents = vec![0; bytes];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut contents);
    contents
}

/// An image, and a place for deltas and sockets beside it. Gone with the test.
pub struct Disk {
    directory: tempfile::TempDir,
    /// What the image holds.
    pub contents: Vec<u8>,
}

impl Disk {
    /// An image of `bytes` random bytes.
    pub fn new(bytes: usize) -> Disk {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let contents = image_bytes(bytes, bytes as u64);
        fs::write(directory.path().join("base.raw"), &contents).expect("an image");
        Disk { directory, contents }
    }

    /// A path beside the image.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The image.
    pub fn base(&self) -> PathBuf {
        self.path("base.raw")
    }

    /// The delta.
    pub fn delta(&self) -> PathBuf {
        self.path("delta")
    }

    /// The volume as it would be if the host's power failed now: what no flush has made safe is not there.
    #[track_caller]
    pub fn after_power_loss(&self) -> Volume {
        let copy = self.path("copy");
        fs::copy(self.delta(), &copy).expect("a copy");
        let file = File::options().read(true).write(true).open(&copy).expect("the copy");
        let storage = FileStorage::new(file.try_clone().expect("a descriptor")).expect("a storage");
        let session = open::read_session(&storage, "copy").expect("a session");
        // A session of another boot: what only its mark log speaks of does not count.
        let lost = Session { boot: [0xaa; 16], ..session };
        file.write_all_at(&lost.encode(), SESSION_AT).expect("the session is written");
        self.open_volume(&copy)
    }

    /// The volume as the backend's death or end leaves it, by one of its deltas.
    #[track_caller]
    pub fn open_volume(&self, delta: &Path) -> Volume {
        let (file, header) = open::open_locked(delta).expect("nobody else holds the delta");
        let base = File::open(self.base()).and_then(|base| Base::map(&base, "base".to_owned())).expect("the image");
        let storage = FileStorage::new(file).expect("a storage");
        let delta = Delta::start(storage, "delta".to_owned(), header, Lifetime::Persistent).expect("a whole delta");
        Volume::cow(base, delta)
    }

    /// Serves the image under the delta, which is created if there is none.
    pub fn serve(&self) -> Backend {
        self.serve_with(&[])
    }

    /// As [`Disk::serve`], with more arguments.
    pub fn serve_with(&self, more: &[&str]) -> Backend {
        let delta = self.delta();
        let mut arguments = vec!["--delta", text(&delta), "--create"];
        arguments.extend(more);
        self.serve_as(&arguments)
    }

    /// Serves the image, with all arguments but the image and the socket.
    pub fn serve_as(&self, arguments: &[&str]) -> Backend {
        self.serve_at(&self.path("socket"), arguments)
    }

    /// As [`Disk::serve_as`], at a socket of one's own.
    pub fn serve_at(&self, socket: &Path, arguments: &[&str]) -> Backend {
        let base = self.base();
        let mut all = vec!["--base", text(&base), "--socket-path", text(socket)];
        all.extend(arguments);
        let mut backend = Backend::start(&all, socket);
        backend.wait_until_ready();
        backend
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

thread_local! {
    static IS_COLD: Cell<bool> = const { Cell::new(false) };
    static IO: Cell<Option<&'static str>> = const { Cell::new(None) };
    static CACHE: Cell<Option<DeltaCache>> = const { Cell::new(None) };
}

/// By what the data of the deltas of backends goes to the disk, where a test does not say it: in a host's variable, for a run of all tests with either.
const CACHE_VARIABLE: &str = "PANDO_TEST_DELTA_CACHE";

/// By what it goes for this test.
pub fn delta_cache() -> DeltaCache {
    let chosen = CACHE.get().or_else(|| std::env::var(CACHE_VARIABLE).ok()?.parse().ok());
    chosen.unwrap_or_default()
}

/// Runs a test whose backends have the data of their deltas go past the page cache; with rings, and once more with threads.
pub fn direct(test: impl Fn()) {
    direct_by("auto", &test);
    direct_by("threads", &test);
}

/// As [`direct`], in one way.
pub fn direct_by(io: &'static str, test: impl Fn()) {
    CACHE.set(Some(DeltaCache::Direct));
    IO.set(Some(io));
    test();
    CACHE.set(None);
    IO.set(None);
}

/// What backends are told to read by what is not in memory, where a test does not say it: in a host's variable, for a run of all tests with either.
const IO_VARIABLE: &str = "PANDO_TEST_IO";

/// Runs a test whose backends find nothing in memory, so that all that they read has to wait: for the kernel, and once more for threads.
pub fn cold(test: impl Fn()) {
    cold_by("auto", &test);
    cold_by("threads", &test);
}

/// As [`cold`], in one way.
pub fn cold_by(io: &'static str, test: impl Fn()) {
    IS_COLD.set(true);
    IO.set(Some(io));
    test();
    IS_COLD.set(false);
    IO.set(None);
}

/// The program, not started yet.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pando-blk"));
    if IS_COLD.get() {
        command.env(COLD_VARIABLE, "1");
    }
    command
}

/// The program, running.
pub struct Backend {
    child: Child,
    socket: PathBuf,
    log: Log,
    reader: Option<JoinHandle<()>>,
    /// Dropped when the process has been waited for, so that its number is never used afterwards.
    life: Option<Sender<()>>,
}

/// What a program has said so far.
#[derive(Clone, Default)]
pub struct Log {
    shared: Arc<(Mutex<String>, Condvar)>,
}

impl Log {
    fn add(&self, line: &str) {
        let (said, more) = &*self.shared;
        said.lock().expect("no reader panics").push_str(line);
        more.notify_all();
    }

    /// All of it.
    pub fn text(&self) -> String {
        self.shared.0.lock().expect("no reader panics").clone()
    }

    /// How much there is by now, for [`Log::expect_after`].
    pub fn mark(&self) -> usize {
        self.shared.0.lock().expect("no reader panics").len()
    }

    /// Waits for a line after `mark` with all of `words` in it.
    #[track_caller]
    pub fn expect_after(&self, mark: usize, words: &[&str]) {
        let (said, more) = &*self.shared;
        let has = |text: &str| text[mark..].lines().any(|line| words.iter().all(|word| line.contains(word)));
        let said = said.lock().expect("no reader panics");
        let (said, result) = more.wait_timeout_while(said, PATIENCE, |said| !has(said)).expect("no reader panics");
        // What is shown at the end of a test that fails needs the lock.
        let found = !result.timed_out();
        drop(said);
        assert!(found, "no line with {words:?} in the log after byte {mark}");
    }
}

impl Backend {
    /// Starts the program; nobody has waited for it yet.
    pub fn start(arguments: &[&str], socket: &Path) -> Backend {
        Backend::start_command(program().args(arguments).stdin(Stdio::null()), socket)
    }

    /// As [`Backend::start`], from a command that is complete.
    pub fn start_command(command: &mut Command, socket: &Path) -> Backend {
        let says = command.get_args().any(|argument| argument == "--io");
        if let Some(io) = IO.get().map(str::to_owned).or_else(|| std::env::var(IO_VARIABLE).ok()).filter(|_| !says) {
            command.args(["--io", &io]);
        }
        let has_delta = command
            .get_args()
            .any(|argument| argument == "--delta" || argument.as_encoded_bytes().starts_with(b"--ephemeral"));
        if has_delta && !command.get_args().any(|argument| argument == "--delta-cache") {
            command.args(["--delta-cache", &delta_cache().to_string()]);
        }
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the program starts");
        let log = Log::default();
        let mut errors = BufReader::new(child.stderr.take().expect("standard error is a pipe"));
        let to = log.clone();
        let reader = std::thread::spawn(move || {
            let mut line = Vec::new();
            while errors.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
                to.add(&String::from_utf8_lossy(&line));
                line.clear();
            }
        });
        let (life, end) = mpsc::channel();
        let keeper = child.id();
        std::thread::spawn(move || {
            if end.recv_timeout(LIFE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("the backend of a test that hangs is killed");
                let worker = children_of(keeper);
                send(keeper, Signal::KILL);
                worker.into_iter().for_each(|worker| send(worker, Signal::KILL));
            }
        });
        Backend { child, socket: socket.to_owned(), log, reader: Some(reader), life: Some(life) }
    }

    /// Waits until it says that it serves.
    #[track_caller]
    pub fn wait_until_ready(&mut self) {
        let begun = Instant::now();
        while !self.log.text().contains("ready for front ends") {
            assert!(self.is_running(), "the backend ended");
            assert!(begun.elapsed() < PATIENCE, "the backend does not get ready");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The socket that it listens on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A new connection.
    #[track_caller]
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).expect("the backend accepts");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        stream
    }

    /// What it has logged.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// The keeper's process.
    pub fn keeper(&self) -> u32 {
        self.child.id()
    }

    /// The worker's process. One that has died may be there for a moment beside it.
    #[track_caller]
    pub fn worker(&self) -> u32 {
        let mut children = Vec::new();
        wait_until("a keeper has one worker", || {
            children = children_of(self.keeper());
            children.len() == 1
        });
        children[0]
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.status().is_none()
    }

    fn status(&mut self) -> Option<ExitStatus> {
        // Once it has been waited for, another process may get its number.
        let status = self.child.try_wait().expect("a child can be waited for");
        if status.is_some() {
            self.life = None;
        }
        status
    }

    /// Asks it to stop.
    pub fn terminate(&self) {
        send(self.keeper(), Signal::TERM);
    }

    /// Ends it with the signal that nobody can handle.
    pub fn kill(&mut self) {
        send(self.keeper(), Signal::KILL);
        self.wait();
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.status() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "the backend does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Asks it to stop and sees that it does so in good order.
    #[track_caller]
    pub fn stop(&mut self) {
        self.terminate();
        let status = self.wait();
        assert!(status.success(), "asked to stop, the backend ended with {status}");
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.life = None;
        // It may have ended, and that is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            // The worker has the other end too, and ends by itself.
            let _ = reader.join();
        }
        if std::thread::panicking() {
            eprintln!("--- the backend at {} said:\n{}---", self.socket.display(), self.log.text());
        }
    }
}

/// A process that does nothing, until it is dropped.
pub struct Sleeper(Child);

impl Sleeper {
    /// Starts a command that does nothing.
    pub fn start(command: &mut Command) -> Sleeper {
        Sleeper(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts"))
    }

    /// The process.
    pub fn process(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // It may have ended, and that is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the program until it ends by itself: exit code, standard output and standard error.
#[track_caller]
pub fn run(arguments: &[&str]) -> (i32, String, String) {
    let mut child = program()
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let begun = Instant::now();
    while child.try_wait().expect("a child can be waited for").is_none() {
        if begun.elapsed() > PATIENCE {
            // The panic below says what matters.
            let _ = child.kill();
            panic!("{arguments:?} was to end by itself, and did not");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output().expect("its output");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// Sends a signal.
pub fn send(process: u32, signal: Signal) {
    let process = Pid::from_raw(process as i32).expect("a process number");
    // One that has just ended is as good as signalled.
    let _ = kill_process(process, signal);
}

/// The processes that `parent` has started and that have not ended.
pub fn children_of(parent: u32) -> Vec<u32> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc").expect("processes are listed").flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if parent_of(process) == Some(parent) {
            children.push(process);
        }
    }
    children
}

/// What a process is doing, as the kernel's letter for it, and its parent.
fn look_at(process: u32) -> Option<(String, u32)> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
}

/// The parent of a process that has not ended.
fn parent_of(process: u32) -> Option<u32> {
    look_at(process).filter(|(state, _)| state != "Z").map(|(_, parent)| parent)
}

/// Whether a process stands still after a signal to stop.
pub fn is_stopped(process: u32) -> bool {
    look_at(process).is_some_and(|(state, _)| state == "T")
}

/// Whether a process has not ended.
pub fn is_alive(process: u32) -> bool {
    parent_of(process).is_some()
}

/// How many descriptors a process has open.
#[track_caller]
pub fn descriptors_of(process: u32) -> usize {
    fs::read_dir(format!("/proc/{process}/fd")).expect("a running process").count()
}

/// Of the openings of files that a process has and that hold a lock, whether each goes past the page cache.
#[track_caller]
pub fn locked_openings(process: u32) -> Vec<bool> {
    let mut openings = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fdinfo")).expect("a running process").flatten() {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let flags = text.lines().find_map(|line| i32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
        if text.contains("FLOCK") {
            openings.push(flags.expect("flags") & libc::O_DIRECT != 0);
        }
    }
    openings
}

/// Bytes of memory that a process has for itself, and has written: pages of a program that others execute too are its own alone when those end.
#[track_caller]
pub fn private_bytes_of(process: u32) -> u64 {
    let mut text = String::new();
    let file = File::open(format!("/proc/{process}/smaps_rollup"));
    file.and_then(|mut file| file.read_to_string(&mut text)).expect("a running process");
    let field = |line: &str| line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok());
    text.lines().filter(|line| line.starts_with("Private_Dirty:")).filter_map(field).map(|kib| kib << 10).sum()
}

/// Waits until something is so.
#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
