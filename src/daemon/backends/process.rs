//! Starting a keeper.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;

use tokio::process::{Child, Command};
use tokio::runtime::Handle;

use crate::sys::process;
use crate::sys::socket::PacketSocket;
use crate::vhost_user::control::MANAGED_ARGUMENT;
use crate::vhost_user::reads::Io;
use crate::vhost_user::sandbox::NO_SANDBOX_ARGUMENT;

use super::users::UidRange;

/// Processes and threads of a user that is one backend's: a keeper, a worker and its successor with a thread for each ring, and room.
const PROCESSES_MAX: u64 = 1024;

/// How backends are started.
#[derive(Clone, Debug)]
pub struct Manner {
    /// The backend's program.
    pub program: PathBuf,
    /// Whether they close their sandboxes.
    pub sandbox: bool,
    /// Whom they run as, each as another; `None`: as the daemon does.
    pub users: Option<UidRange>,
    /// How long a queue of theirs without work looks at its ring before it sleeps, at most, in microseconds.
    pub poll_us: u64,
    /// By what they read what is not in memory.
    pub io: Io,
}

/// Starts the backend's program, and gives the connection to it. Dropped, the process goes on, and is waited for when it ends.
///
/// `queues`: how many it is to offer. `uid`: whom it runs as, if not as this process does.
pub fn start(manner: &Manner, queues: u16, uid: Option<u32>, runtime: &Handle) -> io::Result<(PacketSocket, Child)> {
    let (ours, theirs) = PacketSocket::pair()?;
    let _entered = runtime.enter();
    let mut command = std::process::Command::new(&manner.program);
    command.arg(MANAGED_ARGUMENT).args((!manner.sandbox).then_some(NO_SANDBOX_ARGUMENT));
    command.args(["--io", &manner.io.to_string(), "--queues", &queues.to_string()]);
    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
    if let Some(uid) = uid {
        process::run_as(&mut command, uid, PROCESSES_MAX);
    }
    Ok((ours, Command::from(command).spawn()?))
}
