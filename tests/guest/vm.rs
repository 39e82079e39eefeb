//! One virtual machine: QEMU, the disks that backends serve to it, and what it says.
//!
//! Knows nothing of what is behind a disk's socket. A guest runs a script and frames the script's
//! output on its serial console; a script that wants to be heard says `say KEY VALUE...`.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::backend::Backend;
use crate::material;
use crate::process::{Process, wait_until};

/// What every script starts with: words for the host, and an end at the first thing that fails.
const PRELUDE: &str = r#"set -eu
say() { echo "@@ $*"; }
"#;

/// With the status behind it, what a guest says when its script has ended.
const END: &str = "@@pando end ";

/// What the boot loader in the image says when it starts.
const BOOT_LOADER: &str = "@@pando grub";

/// What Debian's kernel starts instead of systemd.
const BARE: &str =
    r#"init=/bin/sh -- -c "sh /sys/firmware/qemu_fw_cfg/by_name/opt/pando/run/raw; echo @@pando end $?; poweroff -ff""#;

/// For each step of a migration; as generous as the limits of guests.
const MIGRATION_LIMIT: Duration = Duration::from_secs(240);

/// A script that ends with this asks its guest to reboot, and is run again after it.
pub const REBOOT: u32 = 100;

#[derive(Clone, Copy)]
pub enum Guest {
    Tiny,
    Debian,
    /// Debian by way of the firmware and the boot loader and kernel in the image.
    DebianByFirmware,
    /// Debian's programs on a system that nothing writes to; the script is the first process, in the third of the time. Powers off
    /// whatever its script ends with.
    DebianBare,
}

impl Guest {
    fn memory_mib(self) -> u32 {
        match self {
            Guest::Tiny => 128,
            Guest::Debian | Guest::DebianByFirmware | Guest::DebianBare => 256,
        }
    }

    /// From start to power-off, many times what it takes on an idle machine without KVM.
    fn limit(self) -> Duration {
        Duration::from_secs(match self {
            Guest::Tiny => 90,
            Guest::Debian | Guest::DebianByFirmware | Guest::DebianBare => 240,
        })
    }
}

/// What a machine is started with, here and wherever it moves to.
struct Plan {
    dir: PathBuf,
    name: String,
    guest: Guest,
    cpus: u32,
    /// Whether a disk's connection that is lost is made again.
    reconnects: bool,
}

pub struct Vm {
    plan: Plan,
    qemu: Process,
    /// How often it has moved to another QEMU.
    moves: usize,
    /// What is written here the guest reads from its serial console.
    input: File,
    deadline: Instant,
}

impl Plan {
    fn file(&self, what: &str) -> PathBuf {
        self.dir.join(format!("{}.{what}", self.name))
    }

    /// What QEMU says, the one to which the machine has moved for the `moves`th time.
    fn log(&self, moves: usize) -> PathBuf {
        self.file(&format!("qemu{moves}"))
    }

    /// Starts QEMU for the machine, with `cpus` queues per disk; for one that comes from elsewhere, with where it listens for it.
    fn launch(&self, disks: &[&Path], moves: usize, incoming: Option<&Path>) -> Process {
        let Plan { name, guest, cpus, .. } = self;
        let (serial, input) = (self.file("serial"), self.file("input"));
        let mut args = machine(*guest, *cpus);
        let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
        option("-monitor", "stdio".to_owned());
        // Two write to it for a moment when the machine moves.
        let console = format!("file,id=console,path={},append=on,input-path={}", serial.display(), input.display());
        option("-chardev", console);
        option("-serial", "chardev:console".to_owned());
        option("-fw_cfg", format!("name=opt/pando/run,file={}", self.file("run").display()));
        let reconnect = if self.reconnects { ",reconnect=1" } else { "" };
        for (number, disk) in disks.iter().enumerate() {
            option("-chardev", format!("socket,id=disk{number},path={}{reconnect}", disk.display()));
            option("-device", format!("vhost-user-blk-pci,chardev=disk{number},num-queues={cpus}"));
        }
        if let Some(path) = incoming {
            option("-incoming", format!("unix:{}", path.display()));
        }
        args.extend(match guest {
            Guest::Tiny => kernel("tiny", ""),
            Guest::Debian => kernel("debian", ""),
            Guest::DebianBare => kernel("debian", BARE),
            Guest::DebianByFirmware => firmware(&self.file("vars")),
        });
        let program = std::env::var("PANDO_QEMU").unwrap_or("qemu-system-x86_64".to_owned());
        let mut qemu = Process::start(&format!("guest {name}"), program, &args, self.log(moves));
        qemu.show_on_failure(serial);
        qemu
    }
}

impl Vm {
    /// Starts `guest` with `cpus`, as many queues per disk, and `disks` as vda, vdb, ...
    pub fn start(dir: &Path, name: &str, guest: Guest, cpus: u32, disks: &[&Backend], script: &str) -> Self {
        let sockets: Vec<_> = disks.iter().map(|disk| disk.socket()).collect();
        Self::start_on(dir, name, guest, cpus, &sockets, script)
    }

    /// The same with whatever listens on these sockets; a connection that is lost is made again.
    pub fn start_on(dir: &Path, name: &str, guest: Guest, cpus: u32, disks: &[&Path], script: &str) -> Self {
        let plan = Plan { dir: dir.to_owned(), name: name.to_owned(), guest, cpus, reconnects: true };
        Self::start_as(plan, disks, script)
    }

    /// The same, but a connection that is lost stays so.
    pub fn start_connected_once(
        dir: &Path,
        name: &str,
        guest: Guest,
        cpus: u32,
        disks: &[&Path],
        script: &str,
    ) -> Self {
        let plan = Plan { dir: dir.to_owned(), name: name.to_owned(), guest, cpus, reconnects: false };
        Self::start_as(plan, disks, script)
    }

    fn start_as(plan: Plan, disks: &[&Path], script: &str) -> Self {
        fs::write(plan.file("run"), format!("{PRELUDE}{script}")).expect("the test's directory takes files");
        fs::write(plan.file("serial"), "").expect("the test's directory takes files");
        let input = plan.file("input");
        let made = Command::new("mkfifo").arg(&input).status().expect("mkfifo starts");
        assert!(made.success(), "mkfifo: {made}");
        // Open at both ends, so that nothing waits for QEMU to open it.
        let input = File::options().read(true).write(true).open(&input).expect("a pipe can be opened");
        let qemu = plan.launch(disks, 0, None);
        let deadline = Instant::now() + plan.guest.limit();
        Self { plan, qemu, moves: 0, input, deadline }
    }

    /// Live migration: the guest goes on in another QEMU, which has its disks from `disks`. Gives how many milliseconds it stood still,
    /// where QEMU says so.
    pub fn migrate(&mut self, disks: &[&Path]) -> Option<u64> {
        // In a short path, because a socket's is limited to 107 bytes.
        let sockets = TempDir::new().expect("the system's directory takes files");
        let socket = sockets.path().join("migration");
        let moves = self.moves + 1;
        let mut there = self.plan.launch(disks, moves, Some(&socket));
        wait_until("the other QEMU to wait for its guest", MIGRATION_LIMIT, || {
            there.assert_running();
            socket.exists()
        });
        self.qemu.tell(&format!("migrate unix:{}", socket.display()));
        let said = |moves| read(&self.plan.log(moves)).to_lowercase();
        // In the words of all QEMUs: "Migration status: failed", "Status:   failed".
        let status = |text: &str, status| text.lines().any(|line| line.contains("status:") && line.ends_with(status));
        wait_until("the guest to leave", MIGRATION_LIMIT, || {
            there.assert_running();
            self.qemu.tell("info migrate");
            let told = said(self.moves);
            assert!(!status(&told, "failed"), "{told}");
            status(&told, "completed")
        });
        self.qemu.tell("quit");
        let ended = self.qemu.wait(MIGRATION_LIMIT);
        assert!(ended.success(), "QEMU ended with {ended}");
        wait_until("the guest to go on", MIGRATION_LIMIT, || {
            there.tell("info status");
            status(&said(moves), "running")
        });
        let told = said(self.moves);
        (self.qemu, self.moves) = (there, moves);
        let (_, downtime) = ["\ndowntime: ", ", down="].iter().find_map(|name| told.rsplit_once(name))?;
        downtime.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    }

    /// Fails the test if the script has ended.
    pub fn assert_at_work(&mut self) {
        assert!(!self.said().contains(END), "its script has ended");
        self.qemu.assert_running();
    }

    /// Waits until the guest has said `line` on a line of its own.
    pub fn wait_for(&mut self, line: &str) {
        let what = format!("guest {} to say {line:?}", self.plan.name);
        let (qemu, serial) = (&mut self.qemu, self.plan.file("serial"));
        let limit = self.deadline.saturating_duration_since(Instant::now());
        wait_until(&what, limit, || {
            let all = read(&serial);
            let said = all.lines().any(|said| said == line);
            if !said {
                assert!(!all.contains(END), "its script has ended before");
                qemu.assert_running();
            }
            said
        });
    }

    /// Waits until the guest has said something under `key` for the `number`th time, over all its reboots, and gives it.
    pub fn hear(&mut self, key: &str, number: usize) -> String {
        let mut heard = None;
        self.wait_over_reboots(&format!("say {key:?} {number} times"), |said| {
            heard = said.all(key).get(number - 1).map(|value| (*value).to_owned());
            heard.is_some()
        });
        heard.expect("the wait ended because of it")
    }

    /// How often the boot loader in the image has started.
    pub fn boot_loaders(&self) -> usize {
        self.said().text.matches(BOOT_LOADER).count()
    }

    /// Waits until the boot loader in the image has started for the `number`th time.
    pub fn wait_for_boot_loader(&mut self, number: usize) {
        self.wait_over_reboots(&format!("start its boot loader {number} times"), |said| {
            said.text.matches(BOOT_LOADER).count() >= number
        });
    }

    fn wait_over_reboots(&mut self, what: &str, mut done: impl FnMut(&Said) -> bool) {
        let what = format!("guest {} to {what}", self.plan.name);
        let limit = self.deadline.saturating_duration_since(Instant::now());
        wait_until(&what, limit, || {
            let said = self.said();
            let done = done(&said);
            if !done {
                assert!(said.ends().all(|status| status == REBOOT.to_string()), "its script has ended before");
                self.qemu.assert_running();
            }
            done
        });
    }

    /// Types a line at the guest's serial console. What comes of it has as long as the guest had for its start.
    pub fn order(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("a pipe takes a line");
        self.deadline = Instant::now() + self.plan.guest.limit();
    }

    /// The reset button.
    pub fn reset(&mut self) {
        self.qemu.tell("system_reset");
        self.deadline = Instant::now() + self.plan.guest.limit();
    }

    /// Stops the whole machine as a user of QEMU does, and lets it go on.
    pub fn pause(&mut self, time: Duration) {
        self.qemu.tell("stop");
        thread::sleep(time);
        self.qemu.tell("cont");
    }

    fn said(&self) -> Said {
        Said { name: self.plan.name.clone(), text: read(&self.plan.file("serial")) }
    }

    /// SIGKILL: the guest is gone between two instructions, as by a crash of the VMM.
    pub fn kill(mut self) -> Said {
        self.qemu.kill();
        self.said()
    }

    /// Waits for the guest to power off, and its script to have succeeded.
    pub fn finish(mut self) -> Said {
        let limit = self.deadline.saturating_duration_since(Instant::now());
        let status = self.qemu.wait(limit);
        let said = self.said();
        // From here on it is `said` that shows the console.
        drop(self);
        assert!(status.success(), "QEMU ended with {status}");
        let ends: Vec<&str> = said.ends().collect();
        let reboot = REBOOT.to_string();
        let (last, before) = ends.split_last().expect("the script came to its end");
        assert_eq!(*last, "0", "the script failed");
        assert!(before.iter().all(|&status| status == reboot), "{ends:?}");
        said
    }
}

/// What is on the serial console, as lines of text.
fn read(serial: &Path) -> String {
    let bytes = fs::read(serial).expect("QEMU's file can be read");
    String::from_utf8_lossy(&bytes).replace('\r', "")
}

fn machine(guest: Guest, cpus: u32) -> Vec<String> {
    let memory = guest.memory_mib();
    let mut args = format!("-nodefaults -no-user-config -display none -machine q35 -smp {cpus} -m {memory}M");
    // A backend reaches guest memory only where it is shared.
    args += &format!(" -object memory-backend-memfd,id=mem,size={memory}M,share=on -numa node,memdev=mem");
    args += &match material::accelerator() {
        "kvm" => " -accel kvm -cpu host".to_owned(),
        // With the default CPU: what a newer one can do takes longer to emulate.
        other => format!(" -accel {other}"),
    };
    args.split(' ').map(str::to_owned).collect()
}

/// `more` is added to the kernel's command line.
fn kernel(guest: &str, more: &str) -> Vec<String> {
    let path = |file: &str| material::file(&format!("{guest}.{file}")).display().to_string();
    vec![
        "-kernel".to_owned(),
        path("vmlinuz"),
        "-initrd".to_owned(),
        path("initrd"),
        "-append".to_owned(),
        format!("console=ttyS0 quiet panic=-1 root=/dev/vda2 ro {more}"),
    ]
}

/// The disk decides what runs. The firmware keeps its variables in `variables`.
fn firmware(variables: &Path) -> Vec<String> {
    const OVMF: &str = "/usr/share/OVMF";
    fs::copy(format!("{OVMF}/OVMF_VARS_4M.fd"), variables).expect("OVMF is installed (tools/setup guest)");
    vec![
        "-drive".to_owned(),
        format!("if=pflash,format=raw,readonly=on,file={OVMF}/OVMF_CODE_4M.fd"),
        "-drive".to_owned(),
        format!("if=pflash,format=raw,file={}", variables.display()),
    ]
}

/// Everything on a guest's serial console; shown when the test fails while it holds this.
pub struct Said {
    name: String,
    text: String,
}

impl Said {
    fn lines(&self) -> impl Iterator<Item = &str> {
        self.text.lines()
    }

    pub fn contains(&self, text: &str) -> bool {
        self.text.contains(text)
    }

    /// The statuses with which its scripts ended.
    fn ends(&self) -> impl Iterator<Item = &str> {
        self.lines().filter_map(|line| line.strip_prefix(END))
    }

    /// The values that were said under `key`, in order.
    pub fn all<'a>(&'a self, key: &str) -> Vec<&'a str> {
        self.lines()
            .filter_map(|line| line.strip_prefix("@@ "))
            .filter_map(|said| said.strip_prefix(key)?.strip_prefix(' '))
            .collect()
    }

    /// The value that was said under `key`, exactly once.
    pub fn one(&self, key: &str) -> &str {
        let all = self.all(key);
        assert_eq!(all.len(), 1, "{key}: {all:?}");
        all[0]
    }
}

impl Drop for Said {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("---- what guest {} said\n{}", self.name, self.text);
        }
    }
}
