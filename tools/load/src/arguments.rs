//! What the user types. Meaning is given to it where it is used.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::drive::Wait;
use crate::workload::{Mix, Order};

/// Load generator and benchmark for vhost-user-blk backends, without a virtual machine.
#[derive(Debug, Parser)]
pub struct Arguments {
    #[command(subcommand)]
    pub task: Task,
}

#[derive(Debug, Subcommand)]
pub enum Task {
    /// Run one workload against a backend that listens, and print its figures.
    Run(RunOptions),
    /// Write, zero, discard and flush at random, and check everything that is read.
    Verify(VerifyOptions),
    /// Compare backends on all workloads, several times in turn, and print the medians.
    Suite(SuiteOptions),
    /// Draw a record of that, without measuring.
    Plot(PlotOptions),
    /// Draw where pando's processor time goes, line by line.
    Profile(ProfileOptions),
    /// Count the system calls that pando's worker makes for each batch of requests.
    Syscalls(InspectOptions),
    /// Measure the daemon of a host: attaching, importing, and what all of it takes at rest.
    Host(HostOptions),
    /// Measure it with many volumes attached at once.
    Many(ManyOptions),
    /// Measure what a guest notices: of killed workers, upgrades, accounts of what is in flight, and a hostile neighbour.
    Survive(SurviveOptions),
    /// Verify work on volumes of all kinds while everything that can happen to them does.
    Soak(SoakOptions),
    /// Serve a raw file as a backend on the vhost-user-backend crate, to compare with.
    #[command(hide = true)]
    ReferenceBackend(ReferenceOptions),
    /// Be a guest and a front end that mean harm, until told to end.
    #[command(hide = true)]
    Noise(NoiseOptions),
}

/// How to drive a device.
#[derive(Clone, Debug, Args)]
pub struct DriverOptions {
    /// Queues to use.
    #[arg(long, default_value_t = 1)]
    pub queues: usize,
    /// Descriptors in each queue; a power of two.
    #[arg(long, default_value_t = 256)]
    pub queue_size: u16,
    /// How the driver learns of completions.
    #[arg(long, value_enum, default_value_t = Wait::Poll)]
    pub wait: Wait,
    /// Driver threads, each with its share of the queues.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Split each request's buffer into segments of this many bytes (such as 4k).
    #[arg(long, value_parser = parse_bytes)]
    pub segment: Option<u64>,
    /// Spread each queue's buffers over this much memory; by default one buffer to a request in
    /// flight.
    #[arg(long, value_parser = parse_bytes, default_value = "0")]
    pub buffers: u64,
    /// Chains of plain descriptors, where a Linux guest uses indirect ones.
    #[arg(long)]
    pub direct_descriptors: bool,
    /// Seed of everything that is random.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

#[derive(Debug, Args)]
pub struct RunOptions {
    /// Socket on which the backend listens.
    #[arg(long)]
    pub socket_path: PathBuf,
    #[command(flatten)]
    pub driver: DriverOptions,
    #[arg(long, value_enum, default_value_t = Order::Random)]
    pub order: Order,
    #[arg(long, value_enum, default_value_t = Mix::Read)]
    pub mix: Mix,
    /// Bytes in each request.
    #[arg(long, value_parser = parse_bytes, default_value = "4k")]
    pub block: u64,
    /// Requests in flight in each queue.
    #[arg(long, default_value_t = 32)]
    pub depth: usize,
    /// The part of the disk to visit, from its start; all of it by default.
    #[arg(long, value_parser = parse_bytes)]
    pub range: Option<u64>,
    #[arg(long, default_value_t = 3.0)]
    pub seconds: f64,
    /// Stop after this many requests in each queue.
    #[arg(long)]
    pub requests: Option<u64>,
    /// Process id of the backend, for its CPU time.
    #[arg(long)]
    pub pid: Option<u32>,
}

#[derive(Debug, Args)]
pub struct VerifyOptions {
    /// Socket on which the backend listens.
    #[arg(long)]
    pub socket_path: PathBuf,
    #[command(flatten)]
    pub driver: DriverOptions,
    /// The longest request; lengths are random multiples of a sector.
    #[arg(long, value_parser = parse_bytes, default_value = "64k")]
    pub block: u64,
    #[arg(long, default_value_t = 32)]
    pub depth: usize,
    /// The part of the disk to visit, from its start; all of it by default.
    #[arg(long, value_parser = parse_bytes)]
    pub range: Option<u64>,
    /// Random requests before everything is read back.
    #[arg(long, default_value_t = 100_000)]
    pub requests: u64,
    /// File that the disk's contents come from; without it, unwritten sectors are not checked.
    #[arg(long)]
    pub base: Option<PathBuf>,
    /// Remember here what was written; a later run with the same file checks it.
    #[arg(long)]
    pub state: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct SuiteOptions {
    /// Directory for this run's files, removed at its end. It should not be in memory.
    #[arg(long)]
    pub work_dir: PathBuf,
    #[arg(long, default_value = "pando-blk")]
    pub pando_blk: PathBuf,
    #[arg(long, default_value = "qemu-storage-daemon")]
    pub qemu_storage_daemon: PathBuf,
    #[arg(long, default_value = "qemu-img")]
    pub qemu_img: PathBuf,
    /// Times that everything is measured [default: 5, or 2 with --quick; where the disk is waited for, 10 or 6].
    #[arg(long)]
    rounds: Option<usize>,
    /// Time for each measurement [default: 2, or 0.5 with --quick].
    #[arg(long)]
    seconds: Option<f64>,
    /// Fewer rounds of shorter measurements.
    #[arg(long)]
    quick: bool,
    /// Only the lines whose name contains this; may be repeated.
    #[arg(long)]
    pub only: Vec<String>,
    /// Only the contestants whose name contains this; may be repeated.
    #[arg(long)]
    pub contestants: Vec<String>,
    /// How the driver learns of completions, except where the line says it.
    #[arg(long, value_enum, default_value_t = Wait::Poll)]
    pub wait: Wait,
    /// Spread each queue's buffers over this much memory; by default one buffer to a request in
    /// flight.
    #[arg(long, value_parser = parse_bytes, default_value = "0")]
    pub buffers: u64,
    /// Directory that keeps the record of the last whole run, and of the last part of one.
    #[arg(long)]
    pub results_dir: PathBuf,
    /// Write everything that was measured to this file too.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Print Markdown tables.
    #[arg(long)]
    pub markdown: bool,
}

impl SuiteOptions {
    pub fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 2 } else { 5 })
    }

    /// The same for what waits for the disk, which varies most.
    pub fn rounds_on_disk(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 6 } else { 10 })
    }

    pub fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(if self.quick { 0.5 } else { 2.0 })
    }
}

#[derive(Debug, Args)]
pub struct PlotOptions {
    /// A run's record, as the suite writes it.
    pub record: PathBuf,
    /// Where the drawing goes.
    #[arg(long)]
    pub svg: PathBuf,
}

#[derive(Debug, Args)]
pub struct ProfileOptions {
    #[command(flatten)]
    pub inspect: InspectOptions,
    /// Directory for the drawings.
    #[arg(long)]
    pub results_dir: PathBuf,
}

#[derive(Debug, Args)]
pub struct InspectOptions {
    /// Directory for this run's files, removed at its end. It should not be in memory.
    #[arg(long)]
    pub work_dir: PathBuf,
    #[arg(long, default_value = "pando-blk")]
    pub pando_blk: PathBuf,
    /// Only the lines whose name contains this, instead of the usual ones; may be repeated.
    #[arg(long)]
    pub only: Vec<String>,
    /// Time for each line.
    #[arg(long, default_value_t = 5.0)]
    pub seconds: f64,
}

#[derive(Debug, Args)]
pub struct HostOptions {
    /// Directory for this run's files, removed at its end. It should not be in memory.
    #[arg(long)]
    pub work_dir: PathBuf,
    /// The program whose daemon is measured; `pando-blk` lies beside it.
    #[arg(long, default_value = "pando")]
    pub pando: PathBuf,
    /// Times that an image is imported and copied.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Size of that image.
    #[arg(long, value_parser = parse_bytes, default_value = "2g")]
    pub image: u64,
    /// Times that a volume is attached, by the API and by the command line.
    #[arg(long, default_value_t = 20)]
    pub attaches: usize,
    /// Volumes that are attached at once.
    #[arg(long, default_value_t = 100, value_parser = parse_count)]
    pub attachments: usize,
    /// Seconds that the daemon is watched at rest.
    #[arg(long, default_value_t = 10.0)]
    pub idle_seconds: f64,
}

#[derive(Debug, Args)]
pub struct ManyOptions {
    /// Volumes that are attached at once.
    #[arg(default_value_t = 1000, value_parser = parse_count)]
    pub count: usize,
    /// Directory for this run's files, removed at its end. It should not be in memory.
    #[arg(long)]
    pub work_dir: PathBuf,
    /// The program whose daemon is measured; `pando-blk` lies beside it.
    #[arg(long, default_value = "pando")]
    pub pando: PathBuf,
    /// Times that a volume of each size is attached.
    #[arg(long, default_value_t = 20)]
    pub attaches: usize,
    /// Seconds that daemon and backends are watched at rest.
    #[arg(long, default_value_t = 10.0)]
    pub idle_seconds: f64,
}

#[derive(Debug, Args)]
pub struct SurviveOptions {
    /// Directory for this run's files, removed at its end. It should not be in memory.
    #[arg(long)]
    pub work_dir: PathBuf,
    /// The program whose daemon and backends are measured; `pando-blk` lies beside it.
    #[arg(long, default_value = "pando")]
    pub pando: PathBuf,
    /// Only these parts; may be repeated.
    #[arg(long, value_enum)]
    pub only: Vec<Part>,
    /// Workers that are killed under each client.
    #[arg(long, default_value_t = 100)]
    pub kills: usize,
    /// Upgrades under each client.
    #[arg(long, default_value_t = 100)]
    pub upgrades: usize,
    /// Times that work is measured with and without an account of what is in flight.
    #[arg(long, default_value_t = 9)]
    pub rounds: usize,
    /// Time for each of these measurements.
    #[arg(long, default_value_t = 1.0)]
    pub seconds: f64,
    /// For how long a hostile neighbour makes noise.
    #[arg(long, default_value_t = 1.0)]
    pub minutes: f64,
    /// Write everything that was measured to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// A part of what is measured there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// What a guest notices of killed workers and of upgrades.
    Pauses,
    /// What the account of requests in flight costs.
    Account,
    /// What a guest notices of a hostile one.
    Neighbour,
}

#[derive(Debug, Args)]
pub struct NoiseOptions {
    /// Socket on which the backend listens.
    #[arg(long)]
    pub socket_path: PathBuf,
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

#[derive(Debug, Args)]
pub struct SoakOptions {
    /// For how long.
    pub minutes: f64,
    /// Do again what a run with this seed did, as far as timing allows.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Directory below which this run has its files. They are removed at its end, and kept when it fails.
    #[arg(long)]
    pub work_dir: PathBuf,
    /// The program whose daemon is tested; `pando-blk` lies beside it.
    #[arg(long, default_value = "pando")]
    pub pando: PathBuf,
    /// Leave the deltas where all other files are: on a disk that keeps them, and is never full.
    #[arg(long)]
    pub deltas_on_disk: bool,
    /// Persistent cow volumes, beside one volume of each other kind.
    #[arg(long, default_value_t = 3)]
    pub cow_volumes: usize,
}

#[derive(Debug, Args)]
pub struct ReferenceOptions {
    #[arg(long)]
    pub file: PathBuf,
    #[arg(long)]
    pub socket_path: PathBuf,
    #[arg(long, default_value_t = 1)]
    pub queues: usize,
    #[arg(long)]
    pub read_only: bool,
}

/// Bytes, with an optional binary suffix: `4k`, `64m`, `2g`, `1t`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let lower = text.to_lowercase();
    let digits = lower.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match &lower[digits.len()..] {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        suffix => return Err(format!("unknown suffix {suffix:?}; one of k, m, g, t is expected")),
    };
    let number: u64 = digits.parse().map_err(|error| format!("{digits:?}: {error}"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than 64 bits hold"))
}

/// A number of things, of which there is at least one.
fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1 is expected".to_owned()),
        Ok(count) => Ok(count),
        Err(error) => Err(format!("{text:?}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("512"), Ok(512));
        assert_eq!(parse_bytes("4k"), Ok(4096));
        assert_eq!(parse_bytes("2G"), Ok(2 << 30));
        assert!(parse_bytes("4x").is_err());
        assert!(parse_bytes("k").is_err());
        assert!(parse_bytes("99999999t").is_err());
    }
}
