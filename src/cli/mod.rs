//! The command line of `pando`: arguments, a call, text.
//!
//! A struct with `clap` attributes holds what the user typed; what it means is a plain struct of the layer that is called. Results
//! go to standard output, as text or as JSON; everything else goes to standard error. Knows nothing of what the calls do.

mod daemon;
mod delta;
mod image;
mod output;
mod serve;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use output::note;

/// Many virtual machines from one read-only operating-system image.
#[derive(Parser)]
#[command(name = "pando", version, arg_required_else_help = true, after_help = HELP_END)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve one volume to one virtual machine over vhost-user-blk (executes pando-blk)
    Serve(serve::Serve),
    Daemon(daemon::Daemon),
    /// Create, look at, check and repair deltas: a VM's private file over a shared image
    #[command(subcommand)]
    Delta(delta::Delta),
    /// Work with images: the shared, read-only disks below deltas
    #[command(subcommand)]
    Image(image::Image),
}

const HELP_END: &str = "\
Examples:
  pando serve --base debian.raw --ephemeral --socket-path /run/vm1.sock
  pando delta create vm1.delta --base debian.raw --size 20G
  pando delta info vm1.delta
  pando image digest debian.raw

Exit codes:
  0  done
  1  not done, or the command line made no sense; standard error says why
  2  'delta check' found faults
  3  'delta check' found nothing worse than waste or a session that was not closed";

/// How a command that ran to its end came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Faults,
    NotesOnly,
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> ExitCode {
        ExitCode::from(match outcome {
            Outcome::Done => 0,
            Outcome::Faults => 2,
            Outcome::NotesOnly => 3,
        })
    }
}

/// Does what the arguments (the program's name first) ask for. `None`: they made no sense, and the user has been told.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<Option<ExitCode>> {
    // What the layers below have to say is for people, and looks like everything else that the program says.
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Trace)
        .format(|to, record| writeln!(to, "pando: {}", record.args()))
        .init();
    log::set_max_level(log::LevelFilter::Warn);
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too. Nobody is left to be told when printing fails.
            let _ = error.print();
            return Ok((!error.use_stderr()).then_some(ExitCode::SUCCESS));
        }
    };
    let outcome = match cli.command {
        Command::Serve(serve) => return serve.run().map(|never| match never {}),
        Command::Daemon(daemon) => daemon.run(),
        Command::Delta(delta) => delta.run(),
        Command::Image(image) => image.run(),
    }?;
    Ok(Some(outcome.into()))
}

/// Prints an error and what caused it, once.
pub fn report(error: &anyhow::Error) {
    note(format_args!("{error:#}"));
}
