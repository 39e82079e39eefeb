//! [`Host`]: all that the daemon's requests share, and the order in which they may change it.
//!
//! What is changed about a volume (its delta, its attachments) is changed by one request at a time, which holds the volume's lock; facts
//! change in transactions of the catalog. A volume's lock is taken before the catalog is asked, and never two locks at once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, Weak};

use tokio::sync::watch;

use crate::digest::Digest;
use crate::store::Store;

use super::access::Caller;
use super::api::types::{ImageRef, Status};
use super::backends::Backends;
use super::catalog::{Catalog, Facts, VolumeState, now};
use super::error::{Error, chain};
use super::jobs::Jobs;

/// Where the daemon keeps what it has.
#[derive(Clone, Debug)]
pub struct Places {
    /// The database, the images and the deltas.
    pub state: PathBuf,
    /// The sockets.
    pub run: PathBuf,
}

impl Places {
    /// The database.
    pub fn database(&self) -> PathBuf {
        self.state.join("pando.db")
    }

    /// The images.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    /// The deltas.
    pub fn deltas(&self) -> PathBuf {
        self.state.join("volumes")
    }

    /// Where the API is.
    pub fn api_socket(&self) -> PathBuf {
        self.run.join("api.sock")
    }

    /// The directory of the sockets that front ends connect to, one directory below it for each VM.
    pub fn vms(&self) -> PathBuf {
        self.run.join("vm")
    }

    /// Where a VM's front end finds a volume.
    pub fn front_end_socket(&self, vm: &str, volume: &str) -> PathBuf {
        self.vms().join(vm).join(format!("{volume}.sock"))
    }

    /// The directory of the sockets at which the daemon finds its backends again.
    pub fn controls(&self) -> PathBuf {
        self.run.join("control")
    }

    /// Where the daemon finds an attachment's backend.
    pub fn control_socket(&self, attachment: i64) -> PathBuf {
        self.controls().join(format!("{attachment}.sock"))
    }
}

/// What all requests share.
pub struct Host {
    /// Where things are.
    pub places: Places,
    /// What is known.
    pub catalog: Catalog,
    /// The images.
    pub store: Store,
    /// The processes.
    pub backends: Backends,
    /// What is at work.
    pub jobs: Jobs,
    /// Connections of the API that were too many.
    pub connections_refused: AtomicU64,
    events: watch::Sender<i64>,
    locks: Mutex<HashMap<String, Weak<Mutex<()>>>>,
    started_at: i64,
    starts: u64,
}

impl Host {
    /// All that is shared, as the last daemon left it; nothing is reconciled yet.
    pub fn open(places: Places, backends: Backends) -> Result<Host, Error> {
        for (directory, mode) in [
            (&places.state, 0o700),
            (&places.images(), 0o700),
            (&places.deltas(), 0o700),
            (&places.run, 0o755),
            (&places.vms(), 0o755),
            (&places.controls(), 0o700),
        ] {
            make_directory(directory, mode)?;
        }
        let catalog = Catalog::open(&places.database())?;
        let starts = catalog.change(|facts| facts.count("starts"))?;
        let last_event = catalog.read(|facts| facts.events(0, Some(1)))?.last().map_or(0, |event| event.id);
        let store = Store::open(&places.state)?;
        Ok(Host {
            places,
            catalog,
            store,
            backends,
            jobs: Jobs::default(),
            connections_refused: AtomicU64::new(0),
            events: watch::Sender::new(last_event),
            locks: Mutex::default(),
            started_at: now(),
            starts,
        })
    }

    /// Runs `work` while nobody else changes anything about the volume.
    pub fn with_volume<T>(&self, volume: &str, work: impl FnOnce() -> T) -> T {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            match locks.get(volume).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(Mutex::new(()));
                    locks.insert(volume.to_owned(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        let _alone = lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        work()
    }

    /// Whether a caller may everything.
    pub fn is_admin(&self, caller: &Caller) -> bool {
        caller.uid == 0 || caller.uid == rustix::process::geteuid().as_raw()
    }

    /// Tells whoever follows the events of something that happened.
    pub fn event(&self, kind: &str, object: &str, detail: &str) {
        log::info!("{kind} {object}{}{detail}", if detail.is_empty() { "" } else { ": " });
        match self.catalog.change(|facts| facts.insert_event(kind, object, detail)) {
            Ok(id) => _ = self.events.send_replace(id),
            Err(error) => log::error!("the event {kind} of {object} could not be noted: {}", chain(&error)),
        }
    }

    /// Changes whenever something happens: the number of the newest event.
    pub fn events(&self) -> watch::Receiver<i64> {
        self.events.subscribe()
    }

    /// The daemon itself.
    pub fn status(&self) -> Result<Status, Error> {
        self.catalog.read(|facts| {
            let volumes = facts.volumes()?;
            let mut behind = 0;
            for volume in &volumes {
                behind += u64::from(super::volumes::is_behind(facts, volume)?);
            }
            Ok(Status {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                process: std::process::id(),
                uid: rustix::process::geteuid().as_raw(),
                started_at: self.started_at,
                starts: self.starts,
                images: facts.images()?.len() as u64,
                volumes: volumes.len() as u64,
                attachments: facts.attachments()?.len() as u64,
                jobs_running: self.jobs.count() as u64,
                volumes_behind: behind,
                memory_bytes: private_memory_bytes(),
            })
        })
    }
}

/// An image and its versions.
pub fn image_ref(facts: &Facts<'_>, digest: Digest) -> Result<ImageRef, Error> {
    Ok(ImageRef { digest: digest.to_string(), versions: facts.versions(digest)? })
}

/// As [`image_ref`], of an image that may not be.
pub fn image_ref_of(facts: &Facts<'_>, digest: Option<Digest>) -> Result<Option<ImageRef>, Error> {
    digest.map(|digest| image_ref(facts, digest)).transpose()
}

/// A volume that is there, or the nearest name.
pub fn find_volume(facts: &Facts<'_>, name: &str) -> Result<super::catalog::VolumeRow, Error> {
    match facts.volume(name)? {
        Some(volume) if volume.state == VolumeState::Ready => Ok(volume),
        _ => {
            let names = facts.volumes()?.into_iter().map(|volume| volume.name);
            Err(Error::NotFound {
                kind: "volume",
                name: super::names::shown(name),
                nearest: super::names::nearest(name, names),
            })
        }
    }
}

fn make_directory(path: &Path, mode: u32) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(|source| Error::Io {
        action: "make the directory",
        path: path.display().to_string(),
        source,
    })
}

/// Memory that the daemon alone has, in bytes; 0 when the kernel does not tell.
fn private_memory_bytes() -> u64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
    let lines = rollup.lines().filter(|line| line.starts_with("Private_"));
    lines.filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()).sum::<u64>() * 1024
}
