//! Verified work in a guest whose backends are killed and replaced, or which moves to another QEMU: its kernel and fio notice nothing.
//!
//! fio checks what it reads against what it wrote last; the whole disk's digest says that a fresh backend has the same. The kills come at
//! moments that a seed gives, each after the backend has written something since the last.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;

use crate::backend::{Backend, kill_worker};
use crate::host::Host;
use crate::material::{Image, directory, text};
use crate::process::wait_until;
use crate::vm::{Guest, Vm};

/// How many times as much is done as usual, from the environment.
const TIMES: &str = "PANDO_GUEST_TIMES";
const KILLS: usize = 20;
const MIGRATIONS: usize = 10;
/// Of a volume that the daemon has attached: every other one is an upgrade.
const DISTURBANCES: usize = 8;
/// From one kill or move, over the pause that it costs, to the next write; generous, for a machine that has more to do.
const PAUSE_LIMIT: Duration = Duration::from_secs(240);
const DISK_MIB: usize = 28;

/// What keepers say of their workers.
const DEATH: &str = "the worker has died";
/// What workers say of those before them.
const AGAIN: &str = "are carried out again";

/// Says what the whole disk is, past the guest's caches.
const SUM: &str = "sum() { dd if=$1 iflag=direct bs=1M 2>/dev/null | sha256sum | cut -d' ' -f1; }\n";

/// Beside other work reads what nobody writes, at first from the disk and then from the guest's own memory: what a device has written
/// there has to move along with the guest.
const LOOK: &str = r#"
part() { dd if=/dev/vdb bs=1M skip=$((24 + 2 * $1)) count=2 2>/dev/null | md5sum; }
look() {
  part 0 >part0
  part 1 >part1
  until [ -e stop ]; do
    for number in 0 1; do
      dd if=/dev/vdb iflag=nocache count=0 2>/dev/null
      for time in 1 2 3; do
        part $number | cmp -s - part$number || { say part $number is wrong, read $time; exit 1; }
        sleep 0.2
      done
    done
  done
}
"#;

/// In place of that.
const NO_LOOK: &str = "look() { :; }\n";

/// Works on its second disk until it is told a line, verifying all of it.
const WORK: &str = r#"
mount -t tmpfs tmp /tmp
cd /tmp
(read -r order </dev/ttyS0; : >stop) &
look &
look=$!
rounds=0
say starts
until [ -e stop ]; do
  fio --filename=/dev/vdb --ioengine=libaio --direct=1 --thread --invalidate=0 --fdatasync=32 --randrepeat=0 \
    --verify=crc32c --verify_fatal=1 --verify_state_save=0 --eta=never --output=log \
    --name=deep --rw=randrw --bs=4k --iodepth=32 --verify_backlog=256 --size=8M \
    --name=wide --rw=randwrite --bsrange=4k-64k --iodepth=8 --verify_backlog=64 --offset=8M --size=8M \
    --name=single --rw=randwrite --bs=4k --iodepth=1 --verify_backlog=64 --offset=16M --size=1M \
    || { grep 'err=' log; exit 1; }
  rounds=$((rounds + 1))
done
wait $look
if dmesg | grep -iE 'I/O error|critical|blocked for'; then exit 1; fi
say rounds $rounds
say sum $(sum /dev/vdb)
"#;

/// A guest at verified work: its system, which nothing writes to, and the disk that it writes to.
struct Work {
    dir: TempDir,
    image: Image,
    delta: PathBuf,
    random: StdRng,
    /// From each kill or move to the guest's next write.
    pauses: Vec<Duration>,
}

impl Work {
    fn new(name: &str) -> Work {
        let dir = directory();
        let image = Image::noise(dir.path(), DISK_MIB, name);
        let delta = dir.path().join("data.delta");
        let seed = 4;
        eprintln!("{name}: seed {seed}");
        Work { dir, image, delta, random: StdRng::seed_from_u64(seed), pauses: Vec::new() }
    }

    fn system(&self, name: &str) -> Backend {
        Backend::start(self.dir.path(), name, &["--base", Image::debian().path(), "--read-only"])
    }

    fn data(&self, name: &str, more: &[&str]) -> Backend {
        let args = ["--base", self.image.path(), "--delta", &text(&self.delta)];
        Backend::start(self.dir.path(), name, &[&args[..], more].concat())
    }

    /// Waits until a write comes, and then for a moment that may be any.
    fn goes_on(&mut self, vm: &mut Vm) {
        let (since, started) = (SystemTime::now(), Instant::now());
        wait_until("the guest to write", PAUSE_LIMIT, || {
            vm.assert_at_work();
            fs::metadata(&self.delta).and_then(|delta| delta.modified()).expect("the delta is there") > since
        });
        self.pauses.push(started.elapsed());
        thread::sleep(Duration::from_millis(self.random.random_range(0..600)));
    }

    /// Ends the work: nothing has failed. Gives the digest of what the guest has.
    fn end(&mut self, mut vm: Vm) -> String {
        self.goes_on(&mut vm);
        vm.order("stop");
        let said = vm.finish();
        self.pauses.sort();
        let [median, most] = [self.pauses.len() / 2, self.pauses.len() - 1].map(|at| self.pauses[at].as_millis());
        eprintln!("{} rounds; {median} ms to the next write, at most {most} ms", said.one("rounds"));
        said.one("sum").to_owned()
    }

    /// Another guest finds the same on a backend that nobody has used.
    fn look(&self, fresh: &Path, sum: &str) {
        let look = format!("{SUM}say sum $(sum /dev/vda)\n");
        let found = Vm::start_on(self.dir.path(), "look", Guest::Tiny, 1, &[fresh], &look).finish();
        assert_eq!(found.one("sum"), sum);
        self.image.assert_unchanged();
        Image::debian().assert_unchanged();
    }

    /// Both, for backends of the test's own, which stop between.
    fn finish(mut self, vm: Vm, backends: impl IntoIterator<Item = Backend>) {
        let sum = self.end(vm);
        let mut again = 0;
        for backend in backends {
            again += backend.said(AGAIN);
            backend.stop();
        }
        eprintln!("{again} rings came to a worker with requests of a dead one");
        let fresh = self.data("fresh", &[]);
        self.look(fresh.socket(), &sum);
        fresh.stop();
    }
}

fn times() -> usize {
    std::env::var(TIMES).map_or(1, |times| times.parse().expect("a number"))
}

fn script(look: &str) -> String {
    format!("{SUM}{look}{WORK}")
}

#[test]
fn workers_die_and_nobody_notices() {
    let mut work = Work::new("workers");
    let (system, data) = (work.system("system"), work.data("data", &["--create"]));
    let disks = [system.socket(), data.socket()];
    let mut vm = Vm::start_connected_once(work.dir.path(), "guest", Guest::DebianBare, 2, &disks, &script(NO_LOOK));
    vm.wait_for("@@ starts");
    let kills = KILLS * times();
    for kill in 1..=kills {
        work.goes_on(&mut vm);
        kill_worker(data.keeper(), kill % 2 == 1);
        // Not again: a worker that has nothing to do dies in vain.
        if kill == kills / 2 {
            kill_worker(system.keeper(), false);
        }
    }
    wait_until("the keepers to tell of the deaths", PAUSE_LIMIT, || data.said(DEATH) == kills);
    assert_eq!(system.said(DEATH), 1);
    work.finish(vm, [system, data]);
}

#[test]
fn backends_die_and_qemu_finds_them_again() {
    let mut work = Work::new("backends");
    // What a dead one had under way may still be on its way past the page cache.
    let (system, mut data) = (work.system("system"), work.data("data", &["--create", "--delta-cache", "direct"]));
    let mut vm = Vm::start(work.dir.path(), "guest", Guest::DebianBare, 2, &[&system, &data], &script(NO_LOOK));
    vm.wait_for("@@ starts");
    let kills = KILLS * times();
    for kill in 1..=kills {
        work.goes_on(&mut vm);
        kill_worker(data.keeper(), kill % 2 == 1);
        if kill % 5 == 0 {
            work.goes_on(&mut vm);
            // The guest goes on a little earlier.
            wait_until("the keeper to tell of the death", PAUSE_LIMIT, || data.said(DEATH) == kill);
            data.kill_and_start_again();
        }
    }
    assert_eq!(system.said(DEATH), 0);
    work.finish(vm, [system, data]);
}

#[test]
fn workers_of_a_daemon_die_and_backends_are_upgraded() {
    let mut work = Work::new("attached");
    let system = work.system("system");
    let host = Host::start(work.dir.path());
    host.import(Path::new(work.image.path()), "noise");
    host.set_channel("noise", "noise");
    host.create("data", "noise", &["cow"]);
    let socket = host.attach("data");
    let mut deltas = fs::read_dir(work.dir.path().join("state/volumes")).expect("the daemon keeps deltas there");
    work.delta = deltas.next().expect("there is one").expect("it can be listed").path();
    let disks = [system.socket(), &socket];
    let mut vm = Vm::start_connected_once(work.dir.path(), "guest", Guest::DebianBare, 2, &disks, &script(NO_LOOK));
    vm.wait_for("@@ starts");
    let keeper = host.keeper("data");
    for disturbance in 1..=DISTURBANCES * times() {
        work.goes_on(&mut vm);
        if disturbance % 2 == 1 {
            kill_worker(keeper, true);
        } else {
            host.upgrade();
        }
    }
    let sum = work.end(vm);
    system.stop();
    assert_eq!(host.keeper("data"), keeper);
    host.detach("data");
    work.look(&host.attach("data"), &sum);
    host.detach("data");
}

#[test]
fn a_guest_moves_back_and_forth_between_two_backends() {
    let mut work = Work::new("moves");
    let systems = ["system-0", "system-1"].map(|name| work.system(name));
    let data = [work.data("data-0", &["--create"]), work.data("data-1", &["--incoming"])];
    let mut vm = Vm::start(work.dir.path(), "guest", Guest::DebianBare, 2, &[&systems[0], &data[0]], &script(LOOK));
    vm.wait_for("@@ starts");
    let mut pauses = Vec::new();
    for number in 1..=MIGRATIONS * times() {
        work.goes_on(&mut vm);
        let (here, there) = ((number - 1) % 2, number % 2);
        if number % 4 == 0 {
            kill_worker(data[here].keeper(), true);
        }
        pauses.push(vm.migrate(&[systems[there].socket(), data[there].socket()]));
    }
    let pauses: Vec<u64> = pauses.into_iter().flatten().collect();
    eprintln!("stood still for {pauses:?} ms");
    work.finish(vm, systems.into_iter().chain(data));
}
