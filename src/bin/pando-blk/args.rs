//! The command line: what was typed, and what it means.

use std::ffi::OsString;
use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use pando::block::DeltaCache;
use pando::digest::Digest;
use pando::units::{ByteCount, ClusterSize};
use pando::vhost_user::attachment::HOLD_DEFAULT;
use pando::vhost_user::control::{MANAGED_ARGUMENT, RUN_AS_ARGUMENT};
use pando::vhost_user::device::SERIAL_BYTES;
use pando::vhost_user::handover::{CHECK_ARGUMENT, RESUME_ARGUMENT};
use pando::vhost_user::polling::{POLL_DEFAULT, POLL_MAX};
use pando::vhost_user::ring::RING_SIZE_MAX;
use pando::vhost_user::transfers::Io;
use pando::vhost_user::worker::{RING_ARGUMENT, WORKER_ARGUMENT};

const HELP: &str = "\
Serves one volume to a virtual machine over vhost-user-blk.

Usage: pando serve --base IMAGE --delta FILE [--create] --socket-path PATH
       pando serve --base IMAGE --ephemeral | --read-only --socket-path PATH
       pando serve --blank --delta FILE [--create --size SIZE] --socket-path PATH
('pando serve' and 'pando-blk' are the same.)

The volume:
  --base IMAGE         the raw image that reads come from; it is never written ('--blk-file' is the same)
  --blank              no image: a plain private disk
  --delta FILE         writes go to this file and stay; it fits the image that it was created for, and no other
  --create             create the delta if there is none
  --ephemeral[=DIR]    writes go to a file without a name in DIR (/var/tmp), gone when this process ends
  --read-only          writes are refused
  --incoming           the guest comes from another backend by live migration: the delta is taken over with its first request
  --size SIZE          the volume's size, for a delta to be created: at least the image's, such as 20G
  --cluster-size SIZE  the copy-on-write unit, for a delta to be created: 4K (the default) to 64K
  --base-digest HEX    the image's digest; believed instead of looked up or computed
  --delta-cache WAY    by what the delta's data goes to the disk and comes from there: writeback (the default), through the
                       host's page cache; direct, past it (O_DIRECT), for guests that have caches of their own
  --on-full WHAT       what becomes of a write that finds the delta's file system full: hold (the default) has it wait
                       for room; error has it fail at once
  --hold-timeout TIME  how long it waits before it fails, such as 90s or 10m (60s)

The place:
  --socket-path PATH   listen here; a socket that a dead process left is replaced
  --fd N               use this open socket, listening or connected

What is offered:
  --queues N           virtqueues (16; a thread exists for each that the guest uses)
  --queue-size N       the largest virtqueue that is taken, in descriptors (32768)
  --serial TEXT        the disk's serial number, up to 20 characters (one of its own for each delta)

How it waits:
  --io WAY             by what it waits for the disk: io_uring, threads, or auto (the default), which is io_uring where the
                       host has it and allows it, and threads elsewhere
  --poll-us N          a queue that runs out of requests looks for the next one for up to N microseconds before it sleeps,
                       while requests lately came that soon and nothing else wants the processor (50; 0: it sleeps at once)

  --log LEVEL          error, warn, info (the default), debug or trace, to standard error
  --no-inflight        keep no account of requests in flight, to measure what it costs: a crash may then lose some
  --no-sandbox         for debugging: a guest that takes the backend over can do what its user can

  --print-capabilities print what QEMU's conventions ask for, as JSON
  --help, --version

Serves front ends one after another until SIGTERM or SIGINT, and then ends with everything on disk.
Exit codes: 0 ended in good order; 1 failed, the reason is on standard error; 2 wrong usage.
";

/// As in QEMU's docs/interop/vhost-user.json.
const CAPABILITIES: &str = "{\n  \"type\": \"block\",\n  \"features\": [\"read-only\", \"blk-file\"]\n}\n";

/// What the process is to do.
pub enum Invocation {
    /// Be a worker, with these descriptors as rings; only ever asked for by a keeper.
    Worker { sandbox: bool, rings: Vec<RawFd> },
    /// Serve what descriptor 0 says, with so many virtqueues, and as another user if one is given; only ever asked for by a daemon.
    Managed { sandbox: bool, io: Io, queues: u16, user: Option<u32> },
    /// Go on as the keeper whose state descriptor 0 is; only ever asked for by that keeper.
    Resume { sandbox: bool },
    /// Say whether that could be done.
    CheckState,
    /// Print this and be done.
    Print(String),
    /// Serve.
    Serve(Box<Options>),
}

/// What is to be served, and where.
pub struct Options {
    pub volume: Volume,
    pub base: Option<PathBuf>,
    pub base_digest: Option<Digest>,
    pub delta_cache: DeltaCache,
    pub place: Place,
    pub queues: u16,
    pub ring_size_max: u16,
    pub serial: Option<String>,
    pub tracks_inflight: bool,
    pub hold: Duration,
    pub poll: Duration,
    pub io: Io,
    pub log_level: log::LevelFilter,
    pub sandbox: bool,
}

/// Where writes go.
pub enum Volume {
    Delta { path: PathBuf, create: bool, incoming: bool, size: Option<u64>, cluster: Option<ClusterSize> },
    Ephemeral { directory: PathBuf, size: Option<u64>, cluster: Option<ClusterSize> },
    ReadOnly,
}

/// Where front ends come from.
#[derive(Clone, PartialEq, Eq)]
pub enum Place {
    Path(PathBuf),
    Descriptor(RawFd),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Path(path) => path.display().fmt(f),
            Place::Descriptor(number) => write!(f, "descriptor {number}"),
        }
    }
}

/// What becomes of a write that there is no room for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnFull {
    Hold,
    Error,
}

/// What was typed.
#[derive(Default)]
struct Typed {
    base: Option<PathBuf>,
    blank: bool,
    delta: Option<PathBuf>,
    create: bool,
    ephemeral: Option<PathBuf>,
    read_only: bool,
    size: Option<u64>,
    cluster: Option<ClusterSize>,
    base_digest: Option<Digest>,
    delta_cache: Option<DeltaCache>,
    place: Option<Place>,
    queues: Option<u16>,
    ring_size_max: Option<u16>,
    serial: Option<String>,
    incoming: bool,
    no_inflight: bool,
    on_full: Option<OnFull>,
    hold_timeout: Option<Duration>,
    poll_us: Option<u64>,
    io: Option<Io>,
    log_level: Option<log::LevelFilter>,
    no_sandbox: bool,
}

/// Reads the command line.
pub fn parse(arguments: &[OsString]) -> anyhow::Result<Invocation> {
    if let Some(invocation) = parse_role(arguments)? {
        return Ok(invocation);
    }
    // By QEMU's conventions, everything else is ignored then.
    if arguments.iter().skip(1).any(|argument| argument == "--print-capabilities") {
        return Ok(Invocation::Print(CAPABILITIES.to_owned()));
    }
    let mut typed = Typed::default();
    let mut parser = lexopt::Parser::from_iter(arguments);
    while let Some(argument) = parser.next()? {
        use lexopt::prelude::{Long, Short};
        match argument {
            Long("help") | Short('h') => return Ok(Invocation::Print(HELP.to_owned())),
            Long("version") | Short('V') => {
                return Ok(Invocation::Print(format!("pando-blk {}\n", env!("CARGO_PKG_VERSION"))));
            }
            Long("base" | "blk-file") => once(&mut typed.base, "--base", parser.value()?.into())?,
            Long("blank") => typed.blank = true,
            Long("delta") => once(&mut typed.delta, "--delta", parser.value()?.into())?,
            Long("create") => typed.create = true,
            Long("ephemeral") => {
                let directory = parser.optional_value().unwrap_or_else(|| "/var/tmp".into());
                once(&mut typed.ephemeral, "--ephemeral", directory.into())?;
            }
            Long("delta-cache") => {
                once(&mut typed.delta_cache, "--delta-cache", value(&mut parser, "--delta-cache")?)?;
            }
            Long("on-full") => {
                let what = match value::<String>(&mut parser, "--on-full")?.as_str() {
                    "hold" => OnFull::Hold,
                    "error" => OnFull::Error,
                    other => bail!("--on-full {other}: expected hold or error"),
                };
                once(&mut typed.on_full, "--on-full", what)?;
            }
            Long("hold-timeout") => {
                let time: humantime::Duration = value(&mut parser, "--hold-timeout")?;
                once(&mut typed.hold_timeout, "--hold-timeout", time.into())?;
            }
            Long("io") => once(&mut typed.io, "--io", value(&mut parser, "--io")?)?,
            Long("poll-us") => once(&mut typed.poll_us, "--poll-us", value(&mut parser, "--poll-us")?)?,
            Long("incoming") => typed.incoming = true,
            Long("no-inflight") => typed.no_inflight = true,
            Long("read-only") => typed.read_only = true,
            Long("size") => once(&mut typed.size, "--size", value::<ByteCount>(&mut parser, "--size")?.0)?,
            Long("cluster-size") => {
                let bytes: ByteCount = value(&mut parser, "--cluster-size")?;
                let cluster = ClusterSize::from_bytes(bytes.0);
                let cluster =
                    cluster.with_context(|| format!("--cluster-size {}: expected 4K, 8K, 16K, 32K or 64K", bytes.0))?;
                once(&mut typed.cluster, "--cluster-size", cluster)?;
            }
            Long("base-digest") => once(&mut typed.base_digest, "--base-digest", value(&mut parser, "--base-digest")?)?,
            Long("socket-path") => {
                once(&mut typed.place, "--socket-path or --fd", Place::Path(parser.value()?.into()))?;
            }
            Long("fd") => {
                once(&mut typed.place, "--socket-path or --fd", Place::Descriptor(value(&mut parser, "--fd")?))?;
            }
            Long("queues") => once(&mut typed.queues, "--queues", value(&mut parser, "--queues")?)?,
            Long("queue-size") => once(&mut typed.ring_size_max, "--queue-size", value(&mut parser, "--queue-size")?)?,
            Long("serial") => once(&mut typed.serial, "--serial", value(&mut parser, "--serial")?)?,
            Long("no-sandbox") => typed.no_sandbox = true,
            Long("log") => once(&mut typed.log_level, "--log", value(&mut parser, "--log")?)?,
            other => return Err(other.unexpected().into()),
        }
    }
    typed.mean().map(|options| Invocation::Serve(Box::new(options)))
}

/// What one process of Pando's says to another: a role, and what belongs to it.
fn parse_role(arguments: &[OsString]) -> anyhow::Result<Option<Invocation>> {
    const ROLES: [&str; 4] = [WORKER_ARGUMENT, MANAGED_ARGUMENT, RESUME_ARGUMENT, CHECK_ARGUMENT];
    let Some(role) = arguments.get(1).and_then(|role| ROLES.into_iter().find(|known| role == known)) else {
        return Ok(None);
    };
    let (mut sandbox, mut rings, mut io, mut queues, mut user) = (true, Vec::new(), None, None, None);
    let mut parser = lexopt::Parser::from_args(&arguments[2..]);
    while let Some(argument) = parser.next()? {
        use lexopt::prelude::Long;
        match argument {
            Long("no-sandbox") => sandbox = false,
            Long("ring") => rings.push(value(&mut parser, RING_ARGUMENT)?),
            Long("io") => once(&mut io, "--io", value(&mut parser, "--io")?)?,
            Long("queues") => once(&mut queues, "--queues", value(&mut parser, "--queues")?)?,
            Long("run-as") => once(&mut user, RUN_AS_ARGUMENT, value(&mut parser, RUN_AS_ARGUMENT)?)?,
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Some(match role {
        WORKER_ARGUMENT => Invocation::Worker { sandbox, rings },
        MANAGED_ARGUMENT => {
            Invocation::Managed { sandbox, io: io.unwrap_or_default(), queues: queues.unwrap_or(1), user }
        }
        RESUME_ARGUMENT => Invocation::Resume { sandbox },
        _ => Invocation::CheckState,
    }))
}

fn once<T>(place: &mut Option<T>, name: &str, value: T) -> anyhow::Result<()> {
    ensure!(place.replace(value).is_none(), "{name} is given twice");
    Ok(())
}

fn value<T: std::str::FromStr>(parser: &mut lexopt::Parser, name: &str) -> anyhow::Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let typed = parser.value()?;
    let text = typed.to_str().with_context(|| format!("{name}: {typed:?} is not text"))?;
    text.parse().with_context(|| format!("{name} {text}"))
}

impl Typed {
    fn mean(self) -> anyhow::Result<Options> {
        if self.blank {
            ensure!(self.base.is_none(), "--blank is a volume without an image: leave --base out, or --blank");
            ensure!(!self.read_only, "--blank with --read-only would be a disk of nothing");
        } else if self.base.is_none() {
            bail!("no image: expected --base IMAGE, or --blank for a plain private disk");
        }
        let creates = self.create || self.ephemeral.is_some();
        ensure!(
            self.cluster.is_none() || creates,
            "--cluster-size is for a delta to be created: add --create, or leave it out"
        );
        let volume = match (self.delta, self.ephemeral, self.read_only) {
            (Some(path), None, false) => Volume::Delta {
                path,
                create: self.create,
                incoming: self.incoming,
                size: self.size,
                cluster: self.cluster,
            },
            (None, Some(directory), false) => {
                ensure!(self.size.is_some() || !self.blank, "--blank with --ephemeral needs a --size");
                Volume::Ephemeral { directory, size: self.size, cluster: self.cluster }
            }
            (None, None, true) => {
                ensure!(self.size.is_none(), "--read-only shows the image as it is: leave --size out");
                Volume::ReadOnly
            }
            (None, None, false) => bail!(
                "where are writes to go? Expected one of:\n  --delta FILE    to a private file, and they stay\n  \
                 --ephemeral     to a private file that goes when this process ends\n  --read-only     nowhere: they are refused"
            ),
            _ => bail!("expected only one of --delta, --ephemeral and --read-only"),
        };
        ensure!(!self.incoming || !self.create, "--incoming takes over a delta that exists: leave --create out");
        if let Volume::Ephemeral { .. } | Volume::ReadOnly = volume {
            ensure!(!self.incoming, "--incoming goes with --delta: other volumes are anybody's at any time");
            ensure!(!self.create, "--create goes with --delta");
        }
        if matches!(volume, Volume::ReadOnly) {
            ensure!(self.delta_cache.is_none(), "--delta-cache is for --delta or --ephemeral: leave it out");
        }
        let place = self.place.context("no socket: expected --socket-path PATH or --fd N")?;
        let hold = match (self.on_full, self.hold_timeout) {
            (Some(OnFull::Error), None) => Duration::ZERO,
            (Some(OnFull::Error), Some(_)) => bail!("--hold-timeout is for --on-full hold: leave one of them out"),
            (_, timeout) => timeout.unwrap_or(HOLD_DEFAULT),
        };
        let poll = self.poll_us.map_or(POLL_DEFAULT, Duration::from_micros);
        ensure!(poll <= POLL_MAX, "--poll-us {}: expected at most {}", poll.as_micros(), POLL_MAX.as_micros());
        let queues = self.queues.unwrap_or(16);
        // Each ring that runs costs a thread and some descriptors.
        ensure!((1..=256).contains(&queues), "--queues {queues}: expected 1 to 256");
        let ring_size_max = self.ring_size_max.unwrap_or(RING_SIZE_MAX);
        ensure!(
            ring_size_max.is_power_of_two() && ring_size_max <= RING_SIZE_MAX,
            "--queue-size {ring_size_max}: expected a power of two from 1 to {RING_SIZE_MAX}"
        );
        if let Some(serial) = &self.serial {
            let fits = !serial.is_empty()
                && serial.len() <= SERIAL_BYTES
                && serial.bytes().all(|byte| byte.is_ascii_graphic());
            ensure!(
                fits,
                "--serial {serial:?}: expected 1 to {SERIAL_BYTES} printable ASCII characters without spaces"
            );
        }
        Ok(Options {
            volume,
            base: self.base,
            base_digest: self.base_digest,
            delta_cache: self.delta_cache.unwrap_or_default(),
            place,
            queues,
            ring_size_max,
            serial: self.serial,
            tracks_inflight: !self.no_inflight,
            hold,
            poll,
            io: self.io.unwrap_or_default(),
            log_level: self.log_level.unwrap_or(log::LevelFilter::Info),
            sandbox: !self.no_sandbox,
        })
    }
}
