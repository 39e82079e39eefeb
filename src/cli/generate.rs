//! `pando completions` and `pando man`: what packages install beside the program.

use std::path::PathBuf;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use super::output::print;
use super::{Cli, Outcome};

/// Print a shell's completions for pando
#[derive(clap::Args)]
pub struct Completions {
    /// The shell
    shell: Shell,
}

/// Write the manual: a page for pando and one for each of its commands
#[derive(clap::Args)]
pub struct Man {
    /// The directory
    directory: PathBuf,
}

impl Completions {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "pando", &mut text);
        print(|out| Ok(out.write_all(&text)?))?;
        Ok(Outcome::Done)
    }
}

impl Man {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let cannot_write = || format!("cannot write to {}", self.directory.display());
        std::fs::create_dir_all(&self.directory).with_context(cannot_write)?;
        clap_mangen::generate_to(Cli::command(), &self.directory).with_context(cannot_write)?;
        Ok(Outcome::Done)
    }
}
