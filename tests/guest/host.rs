//! The daemon of a host of the test's own, and what an operator asks of it by the command line.
//!
//! Knows pando by its program alone. Backends outlive a daemon; these end with the test.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::backend::program;
use crate::material::text;
use crate::process::{Process, wait_until};

const START_LIMIT: Duration = Duration::from_secs(60);

pub struct Host {
    process: Process,
    /// Holds the sockets: in a short path, because a socket's is limited to 107 bytes.
    sockets: TempDir,
}

impl Host {
    /// Starts a daemon that keeps everything below `dir`.
    pub fn start(dir: &Path) -> Self {
        let sockets = TempDir::new().expect("the system's directory takes files");
        let (state, run) = (text(&dir.join("state")), text(sockets.path()));
        let args = ["daemon", "--state-dir", &state, "--run-dir", &run].map(str::to_owned);
        let process = Process::start("daemon", program(), &args, dir.join("daemon.log"));
        let mut host = Self { process, sockets };
        wait_until("the daemon to answer", START_LIMIT, || {
            host.process.assert_running();
            UnixStream::connect(host.api()).is_ok()
        });
        host
    }

    fn api(&self) -> PathBuf {
        self.sockets.path().join("api.sock")
    }

    /// Runs `pando` to its good end, and gives what it printed.
    fn pando(&self, args: &[&str]) -> Value {
        self.try_pando(args).unwrap_or_else(|error| panic!("pando {args:?}: {error}"))
    }

    fn try_pando(&self, args: &[&str]) -> Result<Value, String> {
        let mut command = Command::new(program());
        let output = command.args(args).arg("--json").env("PANDO_API", self.api()).output().expect("pando starts");
        if !output.status.success() {
            return Err(format!("{}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
        }
        if output.stdout.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
    }

    /// Imports a file, and waits until that is done.
    pub fn import(&self, path: &Path, version: &str) {
        self.pando(&["image", "import", &text(path), "--version", version]);
    }

    pub fn set_channel(&self, channel: &str, image: &str) {
        self.pando(&["channel", "set", channel, image]);
    }

    pub fn roll_back(&self, channel: &str) {
        self.pando(&["channel", "rollback", channel]);
    }

    pub fn channel(&self, channel: &str) -> Value {
        self.pando(&["channel", "show", channel])
    }

    /// Creates a volume that follows a channel.
    pub fn create(&self, name: &str, channel: &str, kind: &[&str]) {
        self.pando(&[&["volume", "create", name, "--channel", channel, "--kind"], kind].concat());
    }

    pub fn grow(&self, name: &str, size: &str) {
        self.pando(&["volume", "grow", name, size]);
    }

    pub fn volume(&self, name: &str) -> Value {
        self.pando(&["volume", "show", name])
    }

    /// Attaches a volume as the system's disk of the VM of the same name, and says where.
    pub fn attach(&self, name: &str) -> PathBuf {
        let attachment = self.pando(&["attach", name, "--vm", name, "--os"]);
        attachment["socket"].as_str().expect("an attachment has a socket").into()
    }

    /// The versions of the image that a VM has and of the one that it will have after its next boot.
    pub fn versions(&self, name: &str) -> (String, Option<String>) {
        let attachment = self.pando(&["attachment", "show", name, name]);
        assert_eq!(attachment["state"], "running", "{attachment}");
        let version = |image: &Value| image["versions"][0].as_str().map(str::to_owned);
        (version(&attachment["image"]).expect("it has an image"), version(&attachment["staged"]))
    }

    /// The keeper's process of the VM of a volume's name.
    pub fn keeper(&self, name: &str) -> u32 {
        let attachment = self.pando(&["attachment", "show", name, name]);
        attachment["process"].as_u64().and_then(|process| process.try_into().ok()).expect("its backend runs")
    }

    /// Has the one backend go on with the installed program.
    pub fn upgrade(&self) {
        let upgraded = self.pando(&["upgrade"]);
        let [one] = &upgraded.as_array().expect("a list")[..] else { panic!("{upgraded}") };
        assert!(one["error"].is_null(), "{upgraded}");
    }

    pub fn detach(&self, name: &str) {
        self.pando(&["detach", name, "--vm", name]);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // What a test that failed has left attached. A daemon that does not answer has said so before.
        let attachments = self.try_pando(&["attachment", "list"]).unwrap_or_default();
        for attachment in attachments.as_array().into_iter().flatten() {
            let name = |key: &str| attachment[key].as_str().unwrap_or_default();
            let _ = self.try_pando(&["detach", name("volume"), "--vm", name("vm")]);
        }
    }
}
