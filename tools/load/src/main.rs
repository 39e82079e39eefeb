//! `load`: asks vhost-user-blk backends for work, without a virtual machine, and measures them.
//!
//! It is the front end and the guest's driver in one: `device` holds the session, `ring` and
//! `request` the driver's side of the queues, `drive` the loop, `workload` and `verify` what is
//! asked for. `suite` compares backends, `process` weighs them, `plot` draws what was found, `inspect`
//! looks into one at work; `host` measures the daemon of a host by its API, `survive` what a guest notices of all that goes wrong, and `soak` sees what daemon and backends survive. It knows the inside of none.

mod arguments;
mod connection;
mod content;
mod device;
mod drive;
mod histogram;
mod host;
mod inspect;
mod permutation;
mod plot;
mod process;
mod reference;
mod request;
mod ring;
mod run;
mod soak;
mod suite;
mod survive;
mod sys;
mod turns;
mod verify;
mod workload;

use std::process::ExitCode;

use clap::Parser;

use arguments::{Arguments, Task};

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Run(options) => run::run(&options),
        Task::Verify(options) => run::verify(&options),
        Task::Suite(options) => suite::run(&options),
        Task::Plot(options) => plot::run(&options),
        Task::Profile(options) => inspect::profile::run(&options),
        Task::Syscalls(options) => inspect::syscalls::run(&options),
        Task::Host(options) => host::run(&options),
        Task::Many(options) => host::run_many(&options),
        Task::Survive(options) => survive::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Noise(options) => survive::noise::run(&options),
        Task::ReferenceBackend(options) => {
            reference::serve(&options.file, &options.socket_path, options.queues, !options.read_only)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("load: {error:#}");
            ExitCode::FAILURE
        }
    }
}
