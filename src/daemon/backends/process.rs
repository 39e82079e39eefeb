//! Starting a keeper.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;

use tokio::process::{Child, Command};
use tokio::runtime::Handle;

use crate::sys::socket::PacketSocket;
use crate::vhost_user::control::MANAGED_ARGUMENT;
use crate::vhost_user::sandbox::NO_SANDBOX_ARGUMENT;

/// How backends are started.
#[derive(Clone, Debug)]
pub struct Manner {
    /// The backend's program.
    pub program: PathBuf,
    /// Whether they close their sandboxes.
    pub sandbox: bool,
}

/// Starts the backend's program, and gives the connection to it. Dropped, the process goes on, and is waited for when it ends.
pub fn start(manner: &Manner, runtime: &Handle) -> io::Result<(PacketSocket, Child)> {
    let (ours, theirs) = PacketSocket::pair()?;
    let _entered = runtime.enter();
    let process = Command::new(&manner.program)
        .arg(MANAGED_ARGUMENT)
        .args((!manner.sandbox).then_some(NO_SANDBOX_ARGUMENT))
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()?;
    Ok((ours, process))
}
