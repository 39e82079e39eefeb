//! [`run`]: the daemon from its start to its end.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use crate::sys::{file, process};
use crate::vhost_user::sandbox::NO_SANDBOX_ARGUMENT;

use super::backends::{Backends, Manner, Notice};
use super::error::{Error, chain};
use super::{Host, Places, api};

/// Threads that may wait for disks and processes at once.
const WAITING_THREADS_MAX: usize = 64;
/// How long requests that are being answered may take when the daemon ends.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// How a daemon is to run.
pub struct Options {
    /// Where it keeps what it has.
    pub places: Places,
    /// How backends are started.
    pub backends: Manner,
    /// Where its metrics are served besides, if anywhere.
    pub metrics_address: Option<SocketAddr>,
}

/// Why the daemon ended, or did not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Another one runs.
    #[error("another daemon has {path}: stop that one first, or give another --state-dir")]
    Locked { path: String },
    /// What it needs is not to be had.
    #[error(transparent)]
    Host(#[from] Error),
    /// The system refused.
    #[error("cannot {action} {what}")]
    System {
        action: &'static str,
        what: String,
        #[source]
        source: io::Error,
    },
}

/// Runs the daemon until SIGTERM or SIGINT. The backends that it has started go on without it.
pub fn run(options: Options) -> Result<(), RunError> {
    let system = |action, what: String| move |source| RunError::System { action, what, source };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(WAITING_THREADS_MAX)
        .thread_keep_alive(Duration::from_secs(2))
        .thread_stack_size(512 << 10)
        .enable_all()
        .build()
        .map_err(system("start", "the threads of the API".to_owned()))?;
    let result = runtime.block_on(serve(options));
    runtime.shutdown_timeout(END_PATIENCE);
    result
}

async fn serve(mut options: Options) -> Result<(), RunError> {
    let system = |action, what: String| move |source| RunError::System { action, what, source };
    let (notices, mut noticed) = tokio::sync::mpsc::unbounded_channel();
    if !options.backends.sandbox {
        log::warn!(
            "NO SANDBOX ({NO_SANDBOX_ARGUMENT}): a guest that takes its backend over can do all that the daemon's user can"
        );
    }
    if let Some(range) = options.backends.users.take_if(|_| !rustix::process::geteuid().is_root()) {
        log::warn!("--backend-uids {range} is left out: only root can start others as other users");
    }
    // Each attachment takes some, and what is usual (1,024) was chosen for programs that cannot have more.
    let descriptors_max =
        process::raise_descriptor_limit().map_err(system("raise", "the limit of open descriptors".to_owned()))?;
    let backends = Backends::new(options.backends, descriptors_max, tokio::runtime::Handle::current(), notices)
        .map_err(system("start", "the thread that starts backends".to_owned()))?;
    let places = options.places;
    let (host, _lock) = blocking(move || {
        std::fs::create_dir_all(&places.state).map_err(|source| RunError::System {
            action: "make",
            what: places.state.display().to_string(),
            source,
        })?;
        let lock = lock(&places)?;
        let host = Arc::new(Host::open(places, backends)?);
        host.reconcile()?;
        Ok::<_, RunError>((host, lock))
    })
    .await?;

    let watching = Arc::clone(&host);
    tokio::spawn(async move {
        // What follows from them may take its time. Those of one attachment are taken one after another: a backend that dies may have said before which
        // image its guest has booted into, and the next one has to serve that.
        let mut last: HashMap<i64, JoinHandle<()>> = HashMap::new();
        while let Some(notice) = noticed.recv().await {
            let (host, attachment) = (Arc::clone(&watching), notice.attachment());
            if let Notice::Switched { bytes, .. } = &notice {
                host.backends.note_switched(attachment, *bytes);
            }
            let before = last.remove(&attachment);
            let taken = tokio::spawn(async move {
                if let Some(before) = before {
                    // One that has panicked is over, too.
                    let _ = before.await;
                }
                let _ = tokio::task::spawn_blocking(move || take_notice(&host, notice)).await;
            });
            last.retain(|_, taken| !taken.is_finished());
            last.insert(attachment, taken);
        }
    });

    let path = host.places.api_socket();
    // Held under the lock: whatever is there was left by a daemon that is gone.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(system("listen at", path.display().to_string()))?;
    // Who may do what is decided for each request by who the kernel says it comes from.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))
        .map_err(system("open to all", path.display().to_string()))?;
    if let Some(address) = options.metrics_address {
        let listener = TcpListener::bind(address).await.map_err(system("listen at", address.to_string()))?;
        tokio::spawn(api::server::serve_tcp(listener, api::metrics_router(Arc::clone(&host))));
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(system("wait for", "SIGTERM".to_owned()))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("wait for", "SIGINT".to_owned()))?;
    // A file that would be larger than this process may write is an error for whoever asked, not the daemon's end.
    let _too_large = signal(SignalKind::from_raw(libc::SIGXFSZ)).map_err(system("wait for", "SIGXFSZ".to_owned()))?;
    let end = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    log::info!("ready at {}", path.display());
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        log::warn!("systemd could not be told that the daemon is ready: {error}");
    }
    api::server::serve_unix(listener, Arc::clone(&host), end).await;
    host.backends.note_end();
    log::info!("asked to stop; backends go on");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let _ = std::fs::remove_file(&path);
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RunError> + Send + 'static,
) -> Result<T, RunError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| RunError::System {
        action: "finish",
        what: "what the last daemon left".to_owned(),
        source: io::Error::other(error),
    })?
}

/// How long to wait for the lock of a daemon that is about to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// One daemon for a state directory.
fn lock(places: &Places) -> Result<File, RunError> {
    let path = places.state.join("lock");
    let system = |source| RunError::System { action: "lock", what: path.display().to_string(), source };
    let lock = File::options().create(true).truncate(false).write(true).open(&path).map_err(system)?;
    let begun = Instant::now();
    while !file::try_lock(&lock).map_err(system)? {
        if begun.elapsed() > LOCK_PATIENCE {
            return Err(RunError::Locked { path: places.state.display().to_string() });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(lock)
}

fn take_notice(host: &Arc<Host>, notice: Notice) {
    let (what, result) = match notice {
        Notice::Gone { attachment } => ("start a backend again", host.backend_gone(attachment)),
        Notice::Switched { attachment, tag, .. } => ("note a switch", host.switched(attachment, &tag)),
        Notice::SwitchFailed { attachment, reason } => {
            ("note a failed switch", host.switch_failed(attachment, &reason))
        }
        Notice::Connected { attachment, connected, detail } => {
            ("note a front end", host.front_end_changed(attachment, connected, &detail))
        }
        Notice::WorkerDied { attachment, status } => ("note a worker's death", host.worker_died(attachment, &status)),
        Notice::Incident { attachment, kind, detail } => {
            ("note an incident", host.attachment_event(attachment, kind, &detail))
        }
    };
    if let Err(error) = result {
        log::error!("cannot {what}: {}", chain(&error));
    }
}
