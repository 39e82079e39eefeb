//! Importing an image beside copying it: the same file, from the page cache, to the same file system, in turn.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::arguments::HostOptions;
use crate::content;
use crate::host::daemon::Daemon;
use crate::suite::progress;
use crate::sys;
use crate::turns;

/// Seconds that each took, a sample for each round.
#[derive(Default)]
pub struct Imports {
    pub pando: Vec<f64>,
    /// `cp`, which leaves the copy in memory.
    pub copy: Vec<f64>,
    /// `cp` and `sync` of the copy: as durable as an import.
    pub durable_copy: Vec<f64>,
}

pub fn measure(options: &HostOptions, directory: &Path, daemon: &Daemon) -> Result<Imports> {
    progress("making an image");
    let (image, copy) = (directory.join("image.raw"), directory.join("copy.raw"));
    let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&image)?;
    let mut block = vec![0; 1 << 20];
    for offset in (0..options.image).step_by(block.len()) {
        content::fill(&mut block, offset, content::BASE);
        file.write_all_at(&block, offset)?;
    }
    let mut imports = Imports::default();
    for round in 0..options.rounds {
        progress(&format!("round {} of {}: import and copy", round + 1, options.rounds));
        for importer in turns::order(3, round) {
            sys::fill_cache(&file)?;
            // What one has left to be written is not to be the next one's burden.
            run("sync", &[])?;
            let since = Instant::now();
            match importer {
                0 => {
                    let (digest, took) = daemon.import(&image)?;
                    imports.pando.push(took.as_secs_f64());
                    daemon.call("DELETE", &format!("/v1/images/{digest}"), None)?;
                }
                1 => {
                    run("cp", &[&image, &copy])?;
                    imports.copy.push(since.elapsed().as_secs_f64());
                    fs::remove_file(&copy)?;
                }
                _ => {
                    run("cp", &[&image, &copy])?;
                    run("sync", &[&copy])?;
                    imports.durable_copy.push(since.elapsed().as_secs_f64());
                    fs::remove_file(&copy)?;
                }
            }
        }
    }
    fs::remove_file(&image)?;
    Ok(imports)
}

fn run(program: &str, arguments: &[&Path]) -> Result<()> {
    let status = Command::new(program).args(arguments).status().with_context(|| program.to_owned())?;
    ensure!(status.success(), "{program}: {status}");
    Ok(())
}
