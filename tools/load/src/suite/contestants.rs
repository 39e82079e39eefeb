//! Who is compared: one entry for each way to serve a disk.
//!
//! To add a backend, add an entry: how to find its version, how to make its private file, and the
//! command line that serves. Nothing else in the suite knows any backend by name.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Where the programs under test are.
#[derive(Clone, Debug)]
pub struct Programs {
    pub pando_blk: PathBuf,
    pub qemu_storage_daemon: PathBuf,
    pub qemu_img: PathBuf,
    /// This program, which can serve too.
    pub load: PathBuf,
}

/// One disk to serve: a base that is shared, and a private file over it.
#[derive(Clone, Debug)]
pub struct Volume {
    pub base: PathBuf,
    /// What the guest sees; at least the base's size.
    pub bytes: u64,
    pub private: PathBuf,
    pub socket: PathBuf,
    pub queues: usize,
    /// Whether the private file's data goes past the page cache.
    pub direct: bool,
}

pub struct Contestant {
    pub name: &'static str,
    pub about: &'static str,
    /// Whether it has a private file to write to; otherwise it serves the base, read-only.
    pub writable: bool,
    /// What `--version` says; an error when the program is not there.
    pub version: fn(&Programs) -> Result<String>,
    /// Makes the private file.
    pub prepare: fn(&Programs, &Volume) -> Result<()>,
    /// What serves the volume, its private file being there.
    pub command: fn(&Programs, &Volume) -> Vec<OsString>,
}

/// The first one is what the others are compared with.
pub const CONTESTANTS: &[Contestant] = &[
    Contestant {
        name: "pando",
        about: "base and delta",
        writable: true,
        version: |programs| version(&programs.pando_blk),
        prepare: pando_prepare,
        command: pando_command,
    },
    Contestant {
        name: "qsd-raw",
        about: "qemu-storage-daemon, the raw base, read-only, io_uring",
        writable: false,
        version: |programs| version(&programs.qemu_storage_daemon),
        prepare: |_, _| Ok(()),
        command: |programs, volume| qsd_command(programs, volume, false),
    },
    Contestant {
        name: "qsd-qcow2",
        about: "qemu-storage-daemon, qcow2 overlay on the raw base, io_uring",
        writable: true,
        version: |programs| version(&programs.qemu_storage_daemon),
        prepare: |programs, volume| qcow2_create(programs, volume, "extended_l2=off"),
        command: |programs, volume| qsd_command(programs, volume, true),
    },
    Contestant {
        name: "qsd-qcow2-ext",
        about: "the same with extended_l2=on",
        writable: true,
        version: |programs| version(&programs.qemu_storage_daemon),
        prepare: |programs, volume| qcow2_create(programs, volume, "extended_l2=on"),
        command: |programs, volume| qsd_command(programs, volume, true),
    },
    Contestant {
        name: "reference",
        about: "the raw base, read-only, plain pread on the vhost-user-backend crate",
        writable: false,
        version: |_| Ok("vhost-user-backend 0.24".to_owned()),
        prepare: |_, _| Ok(()),
        command: reference_command,
    },
];

/// Stands for the base's digest, which pando is told to believe: nothing here is about hashing.
const BASE_DIGEST: &str = "5eedba5e5eedba5e5eedba5e5eedba5e5eedba5e5eedba5e5eedba5e5eedba5e";

/// A command line, from anything that turns into its words.
macro_rules! words {
    ($($word:expr),* $(,)?) => { vec![$(OsString::from($word)),*] };
}

/// The first of them with and without an account of what is in flight.
pub const ACCOUNTS: [Contestant; 2] = [
    Contestant { name: "with account", ..CONTESTANTS[0] },
    Contestant {
        name: "without",
        command: |programs, volume| {
            let mut command = pando_command(programs, volume);
            command.extend(words!["--no-inflight"]);
            command
        },
        ..CONTESTANTS[0]
    },
];

fn pando_prepare(programs: &Programs, volume: &Volume) -> Result<()> {
    // Creating is part of starting; so start it once and stop it as soon as it listens.
    let mut command = pando_command(programs, volume);
    command.extend(words!["--create", "--size", volume.bytes.to_string()]);
    let log = volume.private.with_extension("log");
    let mut backend = crate::process::Backend::start(&command, &volume.socket, &log)?;
    backend.connect()?;
    backend.stop()
}

fn pando_command(programs: &Programs, volume: &Volume) -> Vec<OsString> {
    words![
        &programs.pando_blk,
        "--base",
        &volume.base,
        "--base-digest",
        BASE_DIGEST,
        "--delta",
        &volume.private,
        "--delta-cache",
        if volume.direct { "direct" } else { "writeback" },
        "--socket-path",
        &volume.socket,
    ]
}

fn qcow2_create(programs: &Programs, volume: &Volume, option: &str) -> Result<()> {
    let status = Command::new(&programs.qemu_img)
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-o", option, "-b"])
        .arg(&volume.base)
        .arg(&volume.private)
        .arg(volume.bytes.to_string())
        .status()
        .context("cannot run qemu-img")?;
    ensure!(status.success(), "qemu-img create: {status}");
    Ok(())
}

fn qsd_command(programs: &Programs, volume: &Volume, overlay: bool) -> Vec<OsString> {
    let file = |node: &str, path: &Path, direct: bool, mode: &str| {
        let (path, direct) = (path.display(), if direct { "on" } else { "off" });
        format!("driver=file,node-name={node},filename={path},aio=io_uring,cache.direct={direct}{mode}")
    };
    let base = file("base", &volume.base, false, ",read-only=on");
    let mut command = words![&programs.qemu_storage_daemon, "--object", "iothread,id=io0", "--blockdev", base,];
    if overlay {
        let private = file("private", &volume.private, volume.direct, ",discard=unmap");
        let qcow2 = "driver=qcow2,node-name=overlay,file=private,backing=base,discard=unmap";
        command.extend(words!["--blockdev", private, "--blockdev", qcow2]);
    }
    let (node, writable) = if overlay { ("overlay", "on") } else { ("base", "off") };
    let (socket, queues) = (volume.socket.display(), volume.queues);
    let export = format!(
        "type=vhost-user-blk,id=e0,node-name={node},addr.type=unix,addr.path={socket},\
         writable={writable},num-queues={queues},iothread=io0"
    );
    command.extend(words!["--export", export]);
    command
}

fn reference_command(programs: &Programs, volume: &Volume) -> Vec<OsString> {
    words![
        &programs.load,
        "reference-backend",
        "--read-only",
        "--file",
        &volume.base,
        "--queues",
        volume.queues.to_string(),
        "--socket-path",
        &volume.socket,
    ]
}

fn version(program: &Path) -> Result<String> {
    let run = Command::new(program).arg("--version").output();
    let output = run.with_context(|| format!("cannot run {}", program.display()))?;
    if !output.status.success() {
        bail!("{} --version: {}", program.display(), output.status);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
