//! A look inside pando at work: the suite's lines with it alone, watched by `perf`.
//!
//! No figure here is to be compared with anything: who is watched is slower. [`profile`] says where time goes, [`syscalls`] counts calls;
//! [`folded`] and [`perf`] know how that is found.

mod folded;
mod perf;
pub mod profile;
pub mod syscalls;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::arguments::InspectOptions;
use crate::drive::{Tally, Wait};
use crate::process::Backend;
use crate::suite::contestants::{CONTESTANTS, Programs};
use crate::suite::rows::{ROWS, Row};
use crate::suite::site::Site;
use crate::suite::{Manner, Suite, progress, wanted};

/// A site, and how lines are done there.
pub struct Inspection {
    site: Site,
    manner: Manner,
}

impl Inspection {
    pub fn new(options: &InspectOptions) -> Result<Self> {
        let programs = Programs {
            pando_blk: options.pando_blk.clone(),
            // Nobody else takes part.
            qemu_storage_daemon: "qemu-storage-daemon".into(),
            qemu_img: "qemu-img".into(),
            load: std::env::current_exe()?,
        };
        progress("making an image");
        let site = Site::new(&options.work_dir, programs)?;
        let manner = Manner {
            rounds: 1,
            rounds_on_disk: 1,
            time: Duration::from_secs_f64(options.seconds),
            wait: Wait::Poll,
            buffer_bytes: 0,
            with_limit: false,
        };
        Ok(Self { site, manner })
    }

    /// A file of the run, removed at its end.
    pub fn file(&self, name: &str) -> PathBuf {
        self.site.directory().join(name)
    }

    /// Prepares pando for a line and gives its backend, and the line's work, to `watch`.
    pub fn watch<T>(
        &self,
        row: &Row,
        watch: impl FnOnce(&Backend, &mut dyn FnMut() -> Result<Tally>) -> Result<T>,
    ) -> Result<T> {
        progress(row.name);
        let pando = &CONTESTANTS[0];
        let suite = Suite { site: &self.site, manner: self.manner, contestants: &[pando] };
        let seen = suite.on_line(pando, row, 0, watch);
        progress("");
        seen
    }
}

/// The lines that were asked for; without a wish, the usual ones.
pub fn lines(only: &[String], usual: &[&str]) -> Result<Vec<&'static Row>> {
    let is_wanted = |row: &&Row| if only.is_empty() { usual.contains(&row.name) } else { wanted(only, row.name) };
    let rows: Vec<_> = ROWS.iter().filter(is_wanted).collect();
    ensure!(!rows.is_empty(), "no line has a name that contains any of {only:?}");
    Ok(rows)
}
