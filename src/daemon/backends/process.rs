//! Starting keepers, by a thread that has few descriptors.
//!
//! The kernel copies the descriptors of whoever starts a process, and closes each copy again. The daemon has some for each volume that is
//! attached, so the next one would take longer to attach the more there are.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::AbortHandle;

use crate::sys::socket::PacketSocket;
use crate::sys::{apart, process};
use crate::vhost_user::control::{MANAGED_ARGUMENT, RUN_AS_ARGUMENT};
use crate::vhost_user::conversation::Conversation;
use crate::vhost_user::sandbox::NO_SANDBOX_ARGUMENT;
use crate::vhost_user::transfers::Io;

use super::users::UidRange;

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
    /// By what they wait for the disk.
    pub io: Io,
}

/// What the thread is told.
#[derive(Serialize, Deserialize)]
enum Order {
    /// Start this. Descriptor: its standard input. Answered with its number, or the number of an error if that has one.
    Start { program: OsString, arguments: Vec<String> },
    /// Some that were started have ended. Not answered.
    Reap,
}

/// What came of it.
type Started = Result<u32, Option<i32>>;

/// Starts keepers, and waits for their ends: none is the daemon's business any longer.
pub struct Starter {
    thread: Arc<Conversation>,
    /// Whoever has given an order and waits for the answer.
    turn: Mutex<()>,
    reaping: AbortHandle,
}

impl Starter {
    /// Starts the thread.
    pub fn new(runtime: &Handle) -> io::Result<Starter> {
        let thread = Arc::new(Conversation::over(apart::start("starter", serve)?, "thread that starts backends"));
        let _entered = runtime.enter();
        let mut ended = signal(SignalKind::child())?;
        let told = Arc::clone(&thread);
        let reaping =
            runtime.spawn(async move { while ended.recv().await.is_some() && told.send(&Order::Reap, &[]).is_ok() {} });
        Ok(Starter { thread, turn: Mutex::default(), reaping: reaping.abort_handle() })
    }

    /// Starts the backend's program, and gives the connection to it, and its number. The number is its own while it has the connection.
    ///
    /// `queues`: how many it is to offer. `uid`: whom it runs as, if not as this process does.
    pub fn start(&self, manner: &Manner, queues: u16, uid: Option<u32>) -> io::Result<(PacketSocket, u32)> {
        let (ours, theirs) = PacketSocket::pair()?;
        let mut arguments = vec![MANAGED_ARGUMENT.to_owned()];
        arguments.extend((!manner.sandbox).then(|| NO_SANDBOX_ARGUMENT.to_owned()));
        arguments.extend(["--io".to_owned(), manner.io.to_string(), "--queues".to_owned(), queues.to_string()]);
        // By itself: what is to be somebody else's as it is executed begins with a copy of the daemon's mappings, of which there are some for each volume.
        arguments.extend(uid.into_iter().flat_map(|uid| [RUN_AS_ARGUMENT.to_owned(), uid.to_string()]));
        let order = Order::Start { program: manner.program.clone().into(), arguments };
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.thread.send(&order, &[theirs.as_fd()]).map_err(io::Error::other)?;
        let (started, _) = self.thread.receive::<Started>().map_err(io::Error::other)?;
        let process = started.map_err(|number| match number {
            Some(number) => io::Error::from_raw_os_error(number),
            None => io::ErrorKind::InvalidInput.into(),
        })?;
        Ok((ours, process))
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        self.reaping.abort();
    }
}

/// What the thread does until nobody has orders for it any more.
fn serve(socket: PacketSocket) {
    let daemon = Conversation::over(socket, "daemon");
    while let Ok((order, mut descriptors)) = daemon.receive() {
        match order {
            Order::Start { program, arguments } => {
                let Ok(standard_input) = descriptors.take() else { return };
                let started: Started = start(program, &arguments, standard_input).map_err(|error| error.raw_os_error());
                if daemon.send(&started, &[]).is_err() {
                    return;
                }
            }
            Order::Reap => process::reap_ended(),
        }
    }
}

fn start(program: OsString, arguments: &[String], standard_input: OwnedFd) -> io::Result<u32> {
    let mut command = Command::new(program);
    Ok(command.args(arguments).stdin(Stdio::from(standard_input)).stdout(Stdio::null()).spawn()?.id())
}
