//! `perf`, attached to processes for as long as some work takes.
//!
//! It is told to watch them for as long as `cat` runs. `cat` runs only when everything is watched, and says so by giving back a byte; it ends
//! when its input does. So the watch begins and ends with the work, and no signal is sent to anyone. Knows nothing of what the work is.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// What is missing when perf may not watch.
pub const PERMISSION: &str = "perf could not watch the backend. It takes root, or CAP_PERFMON and a kernel.perf_event_paranoid that allows it; \
     for system calls also a kernel with their tracepoints (CONFIG_FTRACE_SYSCALLS) and tracefs at /sys/kernel/tracing";

const NOT_HERE: &str = "cannot run perf; tools/setup profile installs it";

/// A `perf` that watches; killed when dropped.
#[derive(Debug)]
pub struct Watch {
    perf: Child,
    said: PathBuf,
}

impl Watch {
    /// Starts `perf` with these words, on these processes and all threads that they ever have. It may leave its messages at `said`.
    ///
    /// Fails where it may not see the kernel's part too: it would leave that out, and say nothing of it.
    pub fn start<'a>(words: impl IntoIterator<Item = &'a str>, pids: &[u32], said: &Path) -> Result<Self> {
        let pids: Vec<_> = pids.iter().map(u32::to_string).collect();
        let pids = pids.join(",");
        let probe =
            Command::new("perf").args(["stat", "--event", "cpu-clock:k", "--pid", &pids, "--", "true"]).output();
        let probe = probe.context(NOT_HERE)?;
        ensure!(probe.status.success(), "{PERMISSION}. It said:\n{}", String::from_utf8_lossy(&probe.stderr));
        let perf = Command::new("perf")
            .args(words)
            .args(["--pid", &pids, "--", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(said)?)
            .spawn()
            .context(NOT_HERE)?;
        let mut watch = Self { perf, said: said.to_owned() };
        watch.wait_until_ready().with_context(|| format!("{PERMISSION}. It said:\n{}", watch.said()))?;
        Ok(watch)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let Some((input, output)) = self.perf.stdin.as_mut().zip(self.perf.stdout.as_mut()) else {
            bail!("perf has no pipes");
        };
        input.write_all(b".")?;
        output.read_exact(&mut [0])?;
        Ok(())
    }

    /// Ends the watch, and waits until `perf` has written what it saw.
    pub fn finish(mut self) -> Result<()> {
        drop(self.perf.stdin.take());
        let status = self.perf.wait()?;
        if !status.success() {
            bail!("perf: {status}\n{}", self.said());
        }
        Ok(())
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // After `finish` both fail, and there is nothing left to do.
        let _ = self.perf.kill();
        let _ = self.perf.wait();
    }
}
