//! `pando-blk`, the backend: serves one volume to one front end at a time over vhost-user-blk.
//!
//! Started by a person, a VMM or a daemon it is the keeper; it executes itself again as the worker. Parses, opens, runs,
//! prints an error chain, and says how it went by its exit code.

mod args;
mod open;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use pando::sys::process::{self, StopSignals};
use pando::vhost_user::handover::State;
use pando::vhost_user::transfers::Io;
use pando::vhost_user::{keeper, sandbox, worker};

use args::Invocation;
use open::SocketFile;

fn main() -> ExitCode {
    let result = match args::parse(&std::env::args_os().collect::<Vec<_>>()) {
        Ok(Invocation::Worker { sandbox, rings }) => {
            start("worker", log::LevelFilter::Info, sandbox);
            worker::run(&rings).context("the worker failed")
        }
        Ok(Invocation::Managed { sandbox, io, queues, user }) => user.map_or(Ok(()), become_user).and_then(|()| {
            start("keeper", log::LevelFilter::Info, sandbox);
            managed(io, queues)
        }),
        Ok(Invocation::Resume { sandbox }) => {
            start("keeper", log::LevelFilter::Info, sandbox);
            resume()
        }
        Ok(Invocation::CheckState) => State::receive().map(drop).context("this program cannot take over"),
        Ok(Invocation::Print(text)) => std::io::stdout().write_all(text.as_bytes()).context("cannot print"),
        Ok(Invocation::Serve(options)) => {
            start("keeper", options.log_level, options.sandbox);
            serve(&options)
        }
        Err(error) => {
            eprintln!("pando-blk: {error:#}\nTry 'pando-blk --help'.");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pando-blk: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: &args::Options) -> anyhow::Result<()> {
    // From here on a request to stop is answered in good order, also while the volume is being opened.
    let signals = StopSignals::hold().context("cannot hold back signals")?;
    let (attachment, socket) = open::attach(options)?;
    // From here on nothing is opened, and front ends are listened to.
    sandbox::close_keeper(socket.as_ref().map(SocketFile::directory)).map_err(keeper::KeeperError::from)?;
    let result = keeper::serve(attachment, &signals, || log::info!("ready for front ends at {}", options.place));
    drop(socket);
    Ok(result?)
}

fn become_user(uid: u32) -> anyhow::Result<()> {
    /// A keeper, a worker and its successor with a thread for each ring, and room.
    const PROCESSES_MAX: u64 = 1024;
    process::become_user(uid, PROCESSES_MAX).with_context(|| format!("cannot run as user {uid}"))
}

fn managed(io: Io, queues: u16) -> anyhow::Result<()> {
    let signals = StopSignals::hold().context("cannot hold back signals")?;
    Ok(keeper::serve_managed(&signals, io, queues)?)
}

fn resume() -> anyhow::Result<()> {
    let signals = StopSignals::hold().context("cannot hold back signals")?;
    Ok(keeper::resume(&signals)?)
}

fn start(process: &'static str, level: log::LevelFilter, has_sandbox: bool) {
    if !has_sandbox {
        sandbox::leave_open();
    }
    env_logger::Builder::new()
        // The worker is told its level later; what may pass at most is decided here, once.
        .filter_level(log::LevelFilter::Trace)
        .format(move |out, record| {
            writeln!(out, "pando-blk {process}: {}: {}", record.level().as_str().to_ascii_lowercase(), record.args())
        })
        .init();
    log::set_max_level(level);
}
