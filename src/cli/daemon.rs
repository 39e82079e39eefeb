//! `pando daemon`: runs the daemon of this host.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;

use crate::daemon::{self, Manner, Options, Places, UidRange};
use crate::vhost_user::polling::{POLL_DEFAULT, POLL_MAX};
use crate::vhost_user::transfers::Io;

use super::Outcome;
use super::serve::backend_program;

/// Run the daemon of this host: images, channels, volumes, and the backends that serve them
///
/// Answers the API on the socket api.sock in the run directory until SIGTERM or SIGINT. Backends go on without it, and the
/// next daemon finds them again: stopping, killing or upgrading it leaves running VMs untouched.
#[derive(clap::Args)]
pub struct Daemon {
    /// Where the database, the images and the deltas are
    #[arg(long, value_name = "DIR", default_value = "/var/lib/pando")]
    state_dir: PathBuf,
    /// Where the sockets are
    #[arg(long, value_name = "DIR", default_value = "/run/pando")]
    run_dir: PathBuf,
    /// Serve metrics on this TCP address too, to everyone who can reach it, such as 127.0.0.1:9187
    #[arg(long, value_name = "ADDRESS")]
    metrics_listen: Option<SocketAddr>,
    /// Run each backend as a user of its own, with a group of the same number; nobody else may be one of them, and the daemon has to be root
    #[arg(long, value_name = "FIRST-LAST")]
    backend_uids: Option<UidRange>,
    /// How long a backend's queue that runs out of requests looks for the next one before it sleeps, at most, in microseconds, while
    /// requests lately came that soon and nothing else wants the processor; 0: it sleeps at once
    #[arg(long, value_name = "N", default_value_t = POLL_DEFAULT.as_micros() as u64,
        value_parser = clap::value_parser!(u64).range(..=POLL_MAX.as_micros() as u64))]
    poll_us: u64,
    /// By what backends wait for the disk: io_uring, threads, or auto, which is io_uring where the host has it and allows it
    #[arg(long, value_name = "WAY", default_value_t)]
    io: Io,
    /// For debugging: backends without a sandbox, so that a guest that takes one over can do all that the daemon's user can
    #[arg(long)]
    no_sandbox: bool,
    /// How much to log: error, warn, info, debug
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log: log::LevelFilter,
}

impl Daemon {
    pub fn run(self) -> anyhow::Result<Outcome> {
        log::set_max_level(self.log);
        let absolute =
            |path: PathBuf| std::path::absolute(&path).with_context(|| format!("{} is no path", path.display()));
        daemon::run(Options {
            places: Places { state: absolute(self.state_dir)?, run: absolute(self.run_dir)? },
            backends: Manner {
                program: backend_program(),
                sandbox: !self.no_sandbox,
                users: self.backend_uids,
                poll_us: self.poll_us,
                io: self.io,
            },
            metrics_address: self.metrics_listen,
        })?;
        Ok(Outcome::Done)
    }
}
