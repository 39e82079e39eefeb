//! What the daemon of a host costs: attaching a volume, importing an image, and standing with many of them.
//!
//! Everything is asked for as any client does, over the API's socket ([`api`]) or by the command line; what it takes is seen from
//! outside. Owns the order of events; [`import`], [`sizes`] and [`many`] measure, [`report`] prints what was found.

pub mod api;
pub mod daemon;
mod import;
mod many;
mod report;
mod sizes;
mod volumes;

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::arguments::{HostOptions, ManyOptions};
use crate::suite::{machine, progress};
use crate::sys;

use daemon::Daemon;
use import::Imports;
use many::Many;
use sizes::Size;

/// The image below attached volumes: large, and nothing of it is ever read.
const SPARSE_BYTES: u64 = 10 << 30;

/// What was found.
struct Figures {
    imports: Imports,
    sparse_import_ms: f64,
    /// From the call to the answer and a connection to the socket that it names.
    attach_ms: Vec<f64>,
    /// The same by the command line, from its start to its end.
    attach_by_command_ms: Vec<f64>,
    many: Many,
}

/// What was found with many more.
struct Crowd {
    sizes: Vec<Size>,
    many: Many,
}

/// The files of a run, removed at its end.
struct Site(PathBuf);

impl Site {
    fn new(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        Ok(Self(fs::canonicalize(directory)?))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{} is left behind: {error}", self.0.display());
        }
    }
}

pub fn run(options: &HostOptions) -> Result<()> {
    let site = Site::new(&options.work_dir)?;
    let mut daemon = Daemon::start(&options.pando, &site.0, "bench")?;
    let measured = measure(options, &site, &daemon);
    let figures = measured.with_context(|| format!("the daemon said:\n{}", daemon.said()))?;
    daemon.stop()?;
    progress("");
    print!("{}", report::report(&machine::describe()?, options, &figures));
    Ok(())
}

/// The daemon with so many volumes attached that its limits and costs show.
pub fn run_many(options: &ManyOptions) -> Result<()> {
    // Each attached volume takes a few of this process.
    sys::raise_descriptor_limit().context("the limit of descriptors")?;
    let site = Site::new(&options.work_dir)?;
    let mut daemon = Daemon::start(&options.pando, &site.0, "bench")?;
    let measured = measure_crowd(options, &site, &daemon);
    let figures = measured.with_context(|| format!("the daemon said:\n{}", daemon.said()))?;
    daemon.stop()?;
    progress("");
    print!("{}", report::crowd(&machine::describe()?, &figures));
    Ok(())
}

fn measure_crowd(options: &ManyOptions, site: &Site, daemon: &Daemon) -> Result<Crowd> {
    let sizes = sizes::measure(daemon, &site.0, options.attaches)?;
    let (image, _) = import_sparse(site, daemon)?;
    let many = many::measure(daemon, &image, options.count, Duration::from_secs_f64(options.idle_seconds))?;
    Ok(Crowd { sizes, many })
}

/// Imports an image of which nothing is ever read; gives its digest, and the time that it took.
fn import_sparse(site: &Site, daemon: &Daemon) -> Result<(String, Duration)> {
    progress("importing a sparse image");
    let sparse = site.0.join("sparse.raw");
    File::create(&sparse)?.set_len(SPARSE_BYTES)?;
    daemon.import(&sparse)
}

fn measure(options: &HostOptions, site: &Site, daemon: &Daemon) -> Result<Figures> {
    let imports = import::measure(options, &site.0, daemon)?;

    let (image, took) = import_sparse(site, daemon)?;

    progress("attaching");
    let mut attach_ms = Vec::new();
    for index in 0..options.attaches {
        let volume = format!("api-{index}");
        volumes::create(daemon, &volume, &image, None)?;
        let since = Instant::now();
        let socket = volumes::attach(daemon, &volume)?;
        UnixStream::connect(&socket).with_context(|| socket.clone())?;
        attach_ms.push(milliseconds(since.elapsed()));
    }
    let mut attach_by_command_ms = Vec::new();
    for index in 0..options.attaches {
        let volume = format!("command-{index}");
        volumes::create(daemon, &volume, &image, None)?;
        let since = Instant::now();
        let status = Command::new(&options.pando)
            .args(["attach", &volume, "--vm", &volume])
            .env("PANDO_API", daemon.socket())
            .stdout(Stdio::null())
            .status()
            .with_context(|| options.pando.display().to_string())?;
        attach_by_command_ms.push(milliseconds(since.elapsed()));
        ensure!(status.success(), "pando attach: {status}");
    }
    daemon.detach_all()?;

    let many = many::measure(daemon, &image, options.attachments, Duration::from_secs_f64(options.idle_seconds))?;
    Ok(Figures { imports, sparse_import_ms: milliseconds(took), attach_ms, attach_by_command_ms, many })
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
