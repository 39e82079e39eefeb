//! A daemon of the run's own: started, asked, and ended with all that it has started.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::host::api;
use crate::sys;

/// How long the daemon may take to be ready, and to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether something has come to its end.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

pub struct Daemon {
    pando: PathBuf,
    directory: PathBuf,
    child: Child,
    /// Its sockets; in a place of its own, because a socket's path is short.
    run: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts `pando daemon` with all that it keeps below `directory`, and its sockets where `purpose` says what for.
    pub fn start(pando: &Path, directory: &Path, purpose: &str) -> Result<Self> {
        let run = run_directory(purpose);
        let log = directory.join("daemon.log");
        File::create(&log)?;
        let child = spawn(pando, directory, &run, &log)?;
        let mut daemon = Self { pando: pando.to_owned(), directory: directory.to_owned(), child, run, log };
        daemon.wait_until_ready()?;
        Ok(daemon)
    }

    /// Ends the daemon with SIGKILL, and nothing that it has started.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("SIGKILL")?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts another one in place of one that has ended.
    pub fn start_again(&mut self) -> Result<()> {
        self.child = spawn(&self.pando, &self.directory, &self.run, &self.log)?;
        self.wait_until_ready()
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let since = Instant::now();
        while self.call("GET", "/v1/status", None).is_err() {
            if let Some(status) = self.child.try_wait()? {
                bail!("the daemon ended before it was ready: {status}\n{}", self.said());
            }
            if since.elapsed() > PATIENCE {
                bail!("the daemon is not ready after {PATIENCE:?}\n{}", self.said());
            }
            thread::sleep(LOOK_INTERVAL);
        }
        Ok(())
    }

    /// Where its API is.
    pub fn socket(&self) -> PathBuf {
        self.run.join("api.sock")
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        api::call(&self.socket(), method, path, body)
    }

    /// Imports a file; gives the image's digest, and the time until it was durable.
    pub fn import(&self, path: &Path) -> Result<(String, Duration)> {
        self.import_as(path, None)
    }

    /// As [`Daemon::import`], with a name for people.
    pub fn import_as(&self, path: &Path, version: Option<&str>) -> Result<(String, Duration)> {
        let since = Instant::now();
        let mut job = self.call("POST", "/v1/images", Some(&json!({ "path": path, "version": version })))?;
        let number = job["id"].as_i64().context("a job has a number")?;
        while job["state"] == "running" {
            // Not by waiting for its progress, which there is very often: that would take time from it.
            thread::sleep(LOOK_INTERVAL);
            job = self.call("GET", &format!("/v1/jobs/{number}"), None)?;
        }
        let took = since.elapsed();
        match job["result"].as_str() {
            Some(digest) => Ok((digest.to_owned(), took)),
            None => bail!("the import failed: {}", job["error"]),
        }
    }

    /// The keepers of all backends.
    pub fn backends(&self) -> Result<Vec<u32>> {
        let attachments = self.call("GET", "/v1/attachments", None)?;
        let attachments = attachments.as_array().context("attachments are a list")?;
        attachments.iter().map(|it| Ok(u32::try_from(it["process"].as_u64().context("a keeper")?)?)).collect()
    }

    /// Detaches and removes every volume.
    pub fn detach_all(&self) -> Result<()> {
        for attachment in self.call("GET", "/v1/attachments", None)?.as_array().context("attachments are a list")? {
            let (vm, volume) = (attachment["vm"].as_str(), attachment["volume"].as_str());
            let (vm, volume) = vm.zip(volume).context("an attachment has a VM and a volume")?;
            self.call("DELETE", &format!("/v1/attachments/{vm}/{volume}"), None)?;
            self.call("DELETE", &format!("/v1/volumes/{volume}"), None)?;
        }
        Ok(())
    }

    /// Ends the daemon with SIGTERM, and waits for it.
    pub fn stop(&mut self) -> Result<()> {
        sys::terminate(self.child.id()).context("SIGTERM")?;
        let since = Instant::now();
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("the daemon ended with {status}\n{}", self.said()),
                None if since.elapsed() > PATIENCE => {
                    bail!("the daemon is still there {PATIENCE:?} after SIGTERM\n{}", self.said())
                }
                None => thread::sleep(LOOK_INTERVAL),
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // After a run that failed: its backends would outlive it. What does not succeed here has said why before.
        if let Ok(None) = self.child.try_wait() {
            let _ = self.detach_all();
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = fs::remove_dir_all(&self.run);
    }
}

/// Where the daemon of this process has its sockets: in memory, as `/run` is, where it can be. A disk's file system takes longer over a new
/// socket the more have been made or removed lately.
pub fn run_directory(purpose: &str) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    directory.join(format!("pando-{purpose}-{}", std::process::id()))
}

fn spawn(pando: &Path, directory: &Path, run: &Path, log: &Path) -> Result<Child> {
    let output = File::options().append(true).open(log).with_context(|| log.display().to_string())?;
    Command::new(pando)
        .arg("daemon")
        .arg("--state-dir")
        .arg(directory.join("state"))
        .arg("--run-dir")
        .arg(run)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot run {}", pando.display()))
}
