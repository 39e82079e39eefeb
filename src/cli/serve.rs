//! `pando serve`: executes `pando-blk`, with the same arguments.

use std::convert::Infallible;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::anyhow;

/// All arguments are pando-blk's own, so that there is one place that knows them: `pando serve --help` shows its help.
#[derive(clap::Args)]
#[command(disable_help_flag = true, override_usage = "pando serve [OPTIONS of pando-blk; --help lists them]")]
pub struct Serve {
    /// What pando-blk takes; see 'pando serve --help'
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

const BACKEND: &str = "pando-blk";

impl Serve {
    /// Becomes the backend: returns only when that cannot be done.
    pub fn run(self) -> anyhow::Result<Infallible> {
        let backend = backend_program();
        let error = Command::new(&backend).args(&self.arguments).exec();
        Err(anyhow!(error).context(format!(
            "cannot execute {}, the backend: expected it beside this program or in PATH",
            backend.display()
        )))
    }
}

/// The backend's program: beside this one, or else wherever PATH has it.
pub fn backend_program() -> PathBuf {
    let beside = std::env::current_exe().map(|this| this.with_file_name(BACKEND));
    beside.ok().filter(|backend| backend.is_file()).unwrap_or_else(|| PathBuf::from(BACKEND))
}
