//! From paths to descriptors: the [`Attachment`] that a daemon would have handed over.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, bail, ensure};
use pando::block::DeltaCache;
use pando::block::delta::header::BaseIdentity;
use pando::block::delta::open::{self, NewDelta};
use pando::digest::{self, Digest, Origin};
use pando::sys::socket::{self, SocketKind};
use pando::units::{ByteCount, ClusterSize, is_whole_sectors};
use pando::vhost_user::attachment::{AttachedBase, AttachedDelta, Attachment, Endpoint, Offer, Part};
use pando::vhost_user::counters;
use pando::vhost_user::device::{SERIAL_BYTES, serial_from};
use pando::vhost_user::service::Equipment;

use crate::args::{Options, Place, Volume};

/// A socket file that is removed when this process no longer listens on it.
pub struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl SocketFile {
    /// The directory that it is in.
    pub fn directory(&self) -> &Path {
        directory_of(&self.path)
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have put another in its place.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Opens everything that the options name.
pub fn attach(options: &Options) -> anyhow::Result<(Attachment, Option<SocketFile>)> {
    let base = options.base.as_deref().map(open_base).transpose()?;
    let base_bytes = base.as_ref().map(|base| base.bytes);
    let delta = match &options.volume {
        Volume::ReadOnly => {
            let bytes = base_bytes.unwrap_or(0);
            ensure!(
                is_whole_sectors(bytes) && bytes > 0,
                "the image has {bytes} bytes: expected a multiple of 512, the sector, and not zero"
            );
            None
        }
        Volume::Ephemeral { directory, size, cluster } => {
            // Nobody opens it again, so nobody asks what it was made for.
            let base = base_bytes.map(|bytes| BaseIdentity { digest: Digest([0; 32]), bytes });
            let new = NewDelta { base, virtual_bytes: *size, cluster: cluster.unwrap_or(ClusterSize::DEFAULT) };
            let (file, _) = open::create_unnamed(directory, &new)?;
            let label = format!("the unnamed delta in {}", directory.display());
            Some((AttachedDelta { file, direct: None, label, ephemeral: true }, false))
        }
        Volume::Delta { path, create, incoming, size, cluster } => {
            let base = base.as_ref().map(|base| base.identity(options.base_digest)).transpose()?;
            let new = NewDelta { base, virtual_bytes: *size, cluster: cluster.unwrap_or(ClusterSize::DEFAULT) };
            Some((open_delta(path, *create, *incoming, &new)?, !incoming))
        }
    };
    let delta = match (delta, options.delta_cache) {
        (Some((delta, is_locked)), DeltaCache::Direct) => Some(delta.past_page_cache(is_locked)?),
        (delta, _) => delta.map(|(delta, _)| delta),
    };
    // Last: whoever sees the socket may connect to it.
    let (endpoint, socket) = open_endpoint(&options.place)?;
    let serial = match (&options.serial, &options.volume) {
        (Some(text), _) => Some(serial_from(text)),
        // Of the delta's UUID.
        (None, Volume::Delta { .. }) => None,
        (None, _) => Some(serial_of_place(options)),
    };
    let attachment = Attachment {
        part: Part { tag: String::new(), base: base.map(OpenBase::attached), delta, serial },
        endpoint,
        offer: Offer {
            queues: options.queues,
            ring_size_max: options.ring_size_max,
            tracks_inflight: options.tracks_inflight,
            hold: options.hold,
            poll: options.poll,
            incoming: matches!(options.volume, Volume::Delta { incoming: true, .. }),
        },
        equipment: Equipment {
            counters: counters::create().context("cannot make a page for the counters")?,
            rings: options.io.rings(options.queues).context("--io io_uring: cannot make a ring")?,
        },
        name: options.place.to_string(),
        resumed: false,
        kernel_from_vmm: false,
    };
    Ok((attachment, socket))
}

/// A serial number that stays the same over restarts and that no other disk of the machine has.
fn serial_of_place(options: &Options) -> [u8; SERIAL_BYTES] {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut hasher = blake3::Hasher::new();
    hasher.update(options.base.as_deref().map(absolute).unwrap_or_default().as_os_str().as_encoded_bytes());
    hasher.update(&[0]);
    match &options.place {
        Place::Path(path) => hasher.update(absolute(path).as_os_str().as_encoded_bytes()),
        Place::Descriptor(number) => hasher.update(&number.to_le_bytes()),
    };
    serial_from(&format!("pando-{}", &hasher.finalize().to_hex()[..14]))
}

struct OpenBase {
    file: File,
    path: PathBuf,
    bytes: u64,
}

fn open_base(path: &Path) -> anyhow::Result<OpenBase> {
    let context = || format!("cannot open the image {}", path.display());
    let file = File::open(path).with_context(context)?;
    let metadata = file.metadata().with_context(context)?;
    ensure!(metadata.is_file(), "{} is not a file: expected a raw image", path.display());
    Ok(OpenBase { file, path: path.to_owned(), bytes: metadata.len() })
}

impl OpenBase {
    fn attached(self) -> AttachedBase {
        AttachedBase { file: self.file, label: self.path.display().to_string() }
    }

    fn identity(&self, believed: Option<Digest>) -> anyhow::Result<BaseIdentity> {
        if let Some(digest) = believed {
            log::info!("believed, not checked: the digest of {} is {digest}", self.path.display());
            return Ok(BaseIdentity { digest, bytes: self.bytes });
        }
        let read = AtomicU64::new(0);
        let tenth = (self.bytes / 10).max(1);
        let progress = |more| {
            let before = read.fetch_add(more, Ordering::Relaxed);
            if before == 0 && more < self.bytes {
                log::info!(
                    "computing the digest of {}, {}; it is remembered beside it ('pando image digest' does this ahead)",
                    self.path.display(),
                    ByteCount(self.bytes)
                );
            } else if before / tenth != (before + more) / tenth {
                log::info!("{} %", (before + more) * 100 / self.bytes.max(1));
            }
        };
        let (digest, origin) = digest::of_image(&self.file, &self.path, &progress)?;
        let how = match origin {
            Origin::Record => "by the record beside it",
            Origin::Computed => "computed now",
        };
        log::info!("the digest of {} is {digest}, {how}", self.path.display());
        Ok(BaseIdentity { digest, bytes: self.bytes })
    }
}

fn open_delta(path: &Path, create: bool, incoming: bool, new: &NewDelta) -> anyhow::Result<AttachedDelta> {
    let exists = path.try_exists().with_context(|| format!("cannot look for {}", path.display()))?;
    if !exists {
        ensure!(create, "{} does not exist: add --create to create it", path.display());
        open::create(path, new)?;
        log::info!("created {}", path.display());
    }
    let (file, header) = if incoming { open::open_unlocked(path)? } else { open::open_locked(path)? };
    let label = path.display().to_string();
    open::check_matches(&header, &label, new.base, new.virtual_bytes)?;
    open::check_length(&file, &header, &label)?;
    Ok(AttachedDelta { file, direct: None, label, ephemeral: false })
}

fn open_endpoint(place: &Place) -> anyhow::Result<(Endpoint, Option<SocketFile>)> {
    match place {
        Place::Descriptor(number) => {
            let context = || format!("--fd {number} cannot be used: expected an open stream socket");
            let descriptor = socket::inherited(*number).with_context(context)?;
            Ok(match socket::socket_kind(&descriptor).with_context(context)? {
                SocketKind::Listening => (Endpoint::Listening(nonblocking(descriptor.into())?), None),
                SocketKind::Connected => (Endpoint::Connected(descriptor.into()), None),
            })
        }
        Place::Path(path) => {
            let listener = bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
            let inode =
                std::fs::symlink_metadata(path).with_context(|| format!("cannot examine {}", path.display()))?.ino();
            Ok((Endpoint::Listening(nonblocking(listener)?), Some(SocketFile { path: path.clone(), inode })))
        }
    }
}

/// A connection may be gone by the time that it is accepted; then accepting must not wait for the next.
fn nonblocking(listener: UnixListener) -> anyhow::Result<UnixListener> {
    listener.set_nonblocking(true).context("cannot use the socket")?;
    Ok(listener)
}

fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        result => return Ok(result?),
    }
    // Two that start at once must not both find the socket dead and one then remove the other's.
    let directory = File::open(directory_of(path)).context("cannot open its directory")?;
    directory.lock().context("cannot lock its directory")?;
    let metadata = std::fs::symlink_metadata(path)?;
    ensure!(metadata.file_type().is_socket(), "there is a file that is not a socket");
    match UnixStream::connect(path) {
        Ok(_) => bail!("another process listens there"),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) => return Err(error).context("there is a socket, and whether it is in use cannot be told"),
    }
    log::info!("replacing {}, which a dead process left", path.display());
    std::fs::remove_file(path)?;
    Ok(UnixListener::bind(path)?)
}
