//! Starting a keeper.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;

use tokio::process::{Child, Command};
use tokio::runtime::Handle;

use crate::sys::socket::PacketSocket;
use crate::vhost_user::control::MANAGED_ARGUMENT;

/// Starts the backend's program, and gives the connection to it. Dropped, the process goes on, and is waited for when it ends.
pub fn start(program: &Path, runtime: &Handle) -> io::Result<(PacketSocket, Child)> {
    let (ours, theirs) = PacketSocket::pair()?;
    let _entered = runtime.enter();
    let process = Command::new(program)
        .arg(MANAGED_ARGUMENT)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()?;
    Ok((ours, process))
}
