//! The command line of `pando`: arguments, a call, text.
//!
//! A struct with `clap` attributes holds what the user typed; what it means is a plain struct of the layer that is called. Results
//! go to standard output, as text or as JSON; everything else goes to standard error. Knows nothing of what the calls do.

mod asking;
mod attachment;
mod channel;
mod client;
mod daemon;
mod delta;
mod deployment;
mod generate;
mod group;
mod image;
mod output;
mod progress;
mod serve;
mod table;
mod top;
mod upgrade;
mod volume;
mod watch;

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
    Daemon(daemon::Daemon),
    /// Images: import, list, verify, export, remove; digests of files
    Image(image::Image),
    /// Channels: names that point to images and move atomically, with history and rollback
    Channel(channel::Channel),
    /// Volumes: create, list, reset, rebuild, grow, remove
    Volume(volume::Volume),
    Attach(attachment::Attach),
    Detach(attachment::Detach),
    /// Attachments: who has what
    Attachment(attachment::Attachment),
    /// VMs: which runs which version
    Vm(attachment::Vm),
    Deploy(deployment::Deploy),
    /// Deployments: how far each VM is
    Deployment(deployment::Deployment),
    /// Groups: who may do what, and which VMs are deployed to together
    Group(group::Group),
    Upgrade(upgrade::Upgrade),
    Status(watch::Status),
    Top(top::Top),
    Events(watch::Events),
    Audit(watch::Audit),
    /// Long operations: list, wait, cancel
    Job(watch::Job),
    /// Serve one volume to one virtual machine over vhost-user-blk, without a daemon (executes pando-blk)
    Serve(serve::Serve),
    /// Create, look at, check and repair deltas: a VM's private file over a shared image
    #[command(subcommand)]
    Delta(delta::Delta),
    Completions(generate::Completions),
    Man(generate::Man),
}

const HELP_END: &str = "\
Examples:
  pando image import debian-12.qcow2 --version debian-12.7
  pando channel set debian-12/stable debian-12.7
  pando volume create web-1 --channel debian-12/stable --kind cow --size 20G
  pando attach web-1 --vm web-1 --os --print qemu
  pando deploy debian-12.8 --group canary --wait
  pando serve --base debian.raw --ephemeral --socket-path /run/vm1.sock

All but daemon, serve, delta, image digest, completions and man ask the daemon, at the socket that --api or PANDO_API says
(/run/pando/api.sock).

Exit codes:
  0  done
  1  not done, or the command line made no sense; standard error says why
  2  'delta check' found faults
  3  'delta check' found nothing worse than waste or a session that was not closed
  4  there is no such thing
  5  refused: this user has no grant for it
  6  not as things are: it exists already, is in use, or is in another state
  7  the daemon does not answer";

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
        Command::Image(image) => image.run(),
        Command::Channel(channel) => channel.run(),
        Command::Volume(volume) => volume.run(),
        Command::Attach(attach) => attach.run(),
        Command::Detach(detach) => detach.run(),
        Command::Attachment(attachment) => attachment.run(),
        Command::Vm(vm) => vm.run(),
        Command::Deploy(deploy) => deploy.run(),
        Command::Deployment(deployment) => deployment.run(),
        Command::Group(group) => group.run(),
        Command::Upgrade(upgrade) => upgrade.run(),
        Command::Status(status) => status.run(),
        Command::Top(top) => top.run(),
        Command::Events(events) => events.run(),
        Command::Audit(audit) => audit.run(),
        Command::Job(job) => job.run(),
        Command::Delta(delta) => delta.run(),
        Command::Completions(completions) => completions.run(),
        Command::Man(man) => man.run(),
    };
    match outcome {
        Ok(outcome) => Ok(Some(outcome.into())),
        Err(error) => {
            report(&error);
            Ok(Some(client::exit_code(&error)))
        }
    }
}

/// Prints an error and what caused it, once.
pub fn report(error: &anyhow::Error) {
    note(format_args!("{error:#}"));
}
