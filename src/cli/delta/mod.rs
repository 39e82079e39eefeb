//! `pando delta`: one file for each of its commands.

mod check;
mod create;
mod info;
mod map;

use super::Outcome;

#[derive(clap::Subcommand)]
pub enum Delta {
    /// Create an empty delta over an image, or over nothing
    Create(create::Create),
    /// Show what a delta is for, what it holds and how its last session ended
    Info(info::Info),
    /// Check every structure of a delta and name each fault; with --repair, fix what takes no guess
    Check(check::Check),
    /// List where each range of the volume lies, as 'qemu-img map' does
    Map(map::Map),
}

impl Delta {
    pub fn run(self) -> anyhow::Result<Outcome> {
        match self {
            Delta::Create(create) => create.run()?,
            Delta::Info(info) => info.run()?,
            Delta::Check(check) => return check.run(),
            Delta::Map(map) => map.run()?,
        }
        Ok(Outcome::Done)
    }
}
