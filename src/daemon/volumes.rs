//! Volumes: created, looked at, reset, rebuilt, grown, removed; and which image each is to have.
//!
//! A delta's file is made after its row and removed before it, so a daemon that dies leaves rows that say what to finish or undo
//! ([`super::reconcile`]), and never a file that nobody knows.

use std::path::PathBuf;

use crate::block::DeltaCache;
use crate::block::delta::header::BaseIdentity;
use crate::block::delta::open::{self, NewDelta};
use crate::block::delta::{grow, layout::Layout};
use crate::digest::Digest;
use crate::units::{ClusterSize, is_whole_sectors};
use crate::vhost_user::attachment::AttachedDelta;
use crate::vhost_user::attachment::HOLD_DEFAULT;

use super::Host;
use super::access::{Call, Caller, Object};
use super::api::types::{DeployState, OnFull, Verb, Volume, VolumeKind, VolumeRequest};
use super::catalog::{AttachmentState, DeltaRow, DeltaState, Facts, ImageRow, VolumeRow, VolumeState, now};
use super::error::{Error, chain};
use super::host::{find_volume, image_ref_of};
use super::images::{find_image, object_of_image, usable_image};
use super::names::check_name;

/// The image that a volume is to be on at a VM (`None`: whatever VM attaches it next), which a deployment may have another word on.
pub fn desired(facts: &Facts<'_>, volume: &VolumeRow, vm: Option<&str>) -> Result<Option<Digest>, Error> {
    let of_deployment = match vm {
        Some(vm) => facts.placement(vm, &volume.name)?.and_then(|placement| placement.target),
        // A volume with a delta has one place at most.
        None if volume.is_writable() => facts.placements_of(&volume.name)?.into_iter().find_map(|place| place.target),
        None => None,
    };
    Ok(of_deployment.or(volume.target))
}

/// The image that a volume is on: its delta's, or what its VM runs, or what a VM would get.
fn present(facts: &Facts<'_>, volume: &VolumeRow) -> Result<Option<Digest>, Error> {
    if volume.stays() {
        return Ok(volume.image);
    }
    let attached = facts.attachments_of(&volume.name)?;
    let wanted = desired(facts, volume, None)?;
    // Of several VMs the one that is behind counts.
    let behind = attached.iter().find(|attachment| attachment.image != wanted);
    Ok(behind.or(attached.first()).map_or(wanted, |attachment| attachment.image))
}

/// The image that a volume is to be on, as [`desired`], by the VM that has it.
fn wanted(facts: &Facts<'_>, volume: &VolumeRow) -> Result<Option<Digest>, Error> {
    let attached = facts.attachments_of(&volume.name)?;
    for attachment in &attached {
        let wanted = desired(facts, volume, Some(&attachment.vm))?;
        if wanted != attachment.image {
            return Ok(wanted);
        }
    }
    desired(facts, volume, attached.first().map(|attachment| attachment.vm.as_str()))
}

/// Whether a volume is not on the image that it is to be on.
pub fn is_behind(facts: &Facts<'_>, volume: &VolumeRow) -> Result<bool, Error> {
    Ok(present(facts, volume)? != wanted(facts, volume)?)
}

/// The versions from behind `from` up to `to`, as the channel had them; just `to` when the channel does not lead from one to the other.
fn versions_between(facts: &Facts<'_>, channel: Option<&str>, from: Digest, to: Digest) -> Result<Vec<String>, Error> {
    let name = |digest: Digest, version: Option<String>| -> Result<String, Error> {
        let now = facts.versions(digest)?.pop();
        Ok(now.or(version).unwrap_or_else(|| digest.to_string()[..12].to_owned()))
    };
    if let Some(channel) = channel {
        let moves = facts.moves(channel)?;
        let newest = moves.iter().position(|step| step.image == to);
        let oldest = moves.iter().position(|step| step.image == from);
        if let (Some(newest), Some(oldest)) = (newest, oldest)
            && newest < oldest
        {
            let steps = moves[newest..oldest].iter().rev();
            return steps.map(|step| name(step.image, step.version.clone())).collect();
        }
    }
    Ok(vec![name(to, None)?])
}

/// The image whose size a volume has that has none of its own.
fn bytes_of(facts: &Facts<'_>, volume: &VolumeRow) -> Result<u64, Error> {
    let image = present(facts, volume)?.map(|digest| facts.image(digest)).transpose()?.flatten();
    let of_image = image.map_or(0, |image| image.bytes);
    Ok(volume.bytes.map_or(of_image, |bytes| bytes.max(of_image)))
}

impl Host {
    fn view_volume(&self, facts: &Facts<'_>, volume: &VolumeRow) -> Result<Volume, Error> {
        let attached = facts.attachments_of(&volume.name)?;
        let (present, wanted) = (present(facts, volume)?, wanted(facts, volume)?);
        let behind = match (present, wanted) {
            (Some(from), Some(to)) if from != to => versions_between(facts, volume.channel.as_deref(), from, to)?,
            _ => Vec::new(),
        };
        let state = match &attached {
            attached if attached.is_empty() => "detached",
            attached if attached.iter().any(|attachment| attachment.state == AttachmentState::Failed) => "failed",
            _ => "attached",
        };
        Ok(Volume {
            name: volume.name.clone(),
            kind: volume.kind,
            ephemeral: volume.ephemeral,
            channel: volume.channel.clone(),
            image: image_ref_of(facts, present)?,
            target: image_ref_of(facts, wanted.filter(|_| present != wanted))?,
            needs_rebuild: volume.stays() && !behind.is_empty(),
            behind,
            bytes: bytes_of(facts, volume)?,
            delta_bytes: facts.delta(&volume.name, DeltaState::Current)?.map(|delta| self.delta_bytes(&delta)),
            state: state.to_owned(),
            vms: attached.into_iter().map(|attachment| attachment.vm).collect(),
            created_at: volume.created_at,
            created_by: volume.created_by.clone(),
            on_full: if volume.hold_ms > 0 { OnFull::Hold } else { OnFull::Error },
            hold_timeout_s: volume.hold_ms / 1000,
        })
    }

    /// The volumes that the caller may see.
    pub fn list_volumes(&self, caller: &Caller) -> Result<Vec<Volume>, Error> {
        Call::look(self, caller, "volume.list", "volume:*", |call| {
            self.catalog.read(|facts| {
                call.require_any(facts, "volume")?;
                let mut seen = Vec::new();
                for volume in facts.volumes()? {
                    if call.may(facts, Verb::Use, &Object::Volume(volume.name.clone()))? {
                        seen.push(self.view_volume(facts, &volume)?);
                    }
                }
                Ok(seen)
            })
        })
    }

    /// One volume.
    pub fn show_volume(&self, caller: &Caller, name: &str) -> Result<Volume, Error> {
        Call::look(self, caller, "volume.show", format!("volume:{name}"), |call| {
            self.catalog.read(|facts| {
                call.require(facts, Verb::Use, &Object::Volume(name.to_owned()))?;
                self.view_volume(facts, &find_volume(facts, name)?)
            })
        })
    }

    /// Creates a volume.
    pub fn create_volume(&self, caller: &Caller, request: &VolumeRequest) -> Result<Volume, Error> {
        check_name("volume", &request.name)?;
        let name = &request.name;
        Call::run(self, caller, "volume.create", format!("volume:{name}"), |call| {
            let cluster = check_request(request)?;
            let hold_ms = hold_of(request)?;
            self.with_volume(name, || {
                let (row, made) = self.catalog.change(|facts| {
                    call.require(facts, Verb::Write, &Object::Volume(name.clone()))?;
                    let image = image_for(call, facts, request)?;
                    if facts.volume(name)?.is_some() {
                        return Err(Error::Exists { kind: "volume", name: name.clone() });
                    }
                    check_bytes(request.bytes, image.as_ref())?;
                    let target = image.as_ref().map(|image| image.digest);
                    let row = VolumeRow {
                        name: name.clone(),
                        kind: request.kind,
                        ephemeral: request.ephemeral,
                        channel: request.channel.clone(),
                        image: None,
                        target,
                        bytes: request.bytes,
                        cluster_bytes: cluster.bytes(),
                        hold_ms,
                        state: VolumeState::Creating,
                        created_at: now(),
                        created_by: caller.principal(),
                    };
                    facts.insert_volume(&row)?;
                    // An ephemeral one gets its delta when it is attached.
                    let made = row.is_writable() && !row.ephemeral;
                    let delta = made.then(|| facts.insert_delta(name, target)).transpose()?;
                    Ok((row, delta))
                })?;
                let result = made.as_ref().map_or(Ok(()), |delta| self.make_delta(&row, delta)).and_then(|()| {
                    self.catalog.change(|facts| {
                        if let Some(delta) = &made {
                            facts.make_current(delta)?;
                        }
                        if let Some(image) = row.target.filter(|_| row.stays()) {
                            facts.set_volume_image(name, image)?;
                        }
                        facts.set_volume_state(name, VolumeState::Ready)?;
                        call.done(facts, row.target.map_or(String::new(), |image| format!("image {image}")))?;
                        self.view_volume(facts, &find_volume(facts, name)?)
                    })
                });
                if result.is_err() {
                    self.undo_volume(name)?;
                }
                result
            })
        })
    }

    /// Removes a volume and what is in it.
    pub fn remove_volume(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        Call::run(self, caller, "volume.rm", format!("volume:{name}"), |call| {
            self.with_volume(name, || {
                self.catalog.change(|facts| {
                    call.require(facts, Verb::Write, &Object::Volume(name.to_owned()))?;
                    let volume = find_volume(facts, name)?;
                    require_detached(facts, &volume)?;
                    facts.set_volume_state(name, VolumeState::Removing)?;
                    doom_deltas(facts, name)?;
                    call.done(facts, "")
                })?;
                self.undo_volume(name)
            })
        })
    }

    /// Takes away what there is of a volume that was never finished or is to go. The caller has the volume alone.
    pub fn undo_volume(&self, name: &str) -> Result<(), Error> {
        self.catalog.change(|facts| doom_deltas(facts, name))?;
        let removed = self.remove_doomed_files(name)?;
        self.catalog.change(|facts| {
            for delta in removed {
                facts.remove_delta(delta)?;
            }
            facts.remove_targets(name)?;
            Ok(facts.remove_volume(name)?)
        })
    }

    /// Gives a volume a fresh delta on the image that it is on.
    pub fn reset_volume(&self, caller: &Caller, name: &str) -> Result<Volume, Error> {
        self.renew(caller, "volume.reset", name, |_, volume| Ok(volume.image))
    }

    /// Gives a volume a fresh delta on the image that it is to be on.
    pub fn rebuild_volume(&self, caller: &Caller, name: &str) -> Result<Volume, Error> {
        self.renew(caller, "volume.rebuild", name, |facts, volume| {
            if volume.kind == VolumeKind::Blank {
                return Err(Error::State {
                    object: format!("volume {name}"),
                    found: "has no image to be rebuilt on".to_owned(),
                    remedy: "'pando volume reset' empties it",
                });
            }
            let wanted = desired(facts, volume, None)?;
            wanted.map(|digest| usable_image(facts, digest)).transpose()?;
            Ok(wanted)
        })
    }

    fn renew(
        &self,
        caller: &Caller,
        action: &'static str,
        name: &str,
        image: impl FnOnce(&Facts<'_>, &VolumeRow) -> Result<Option<Digest>, Error>,
    ) -> Result<Volume, Error> {
        Call::run(self, caller, action, format!("volume:{name}"), |call| {
            self.with_volume(name, || {
                let (volume, delta) = self.catalog.change(|facts| {
                    call.require(facts, Verb::Write, &Object::Volume(name.to_owned()))?;
                    let volume = find_volume(facts, name)?;
                    if !volume.is_writable() || volume.ephemeral {
                        return Err(Error::State {
                            object: format!("volume {name}"),
                            found: if volume.ephemeral { "is ephemeral" } else { "is read-only" }.to_owned(),
                            remedy: "it has no delta that is kept, and takes a new image by itself",
                        });
                    }
                    require_detached(facts, &volume)?;
                    let image = image(facts, &volume)?;
                    Ok((volume, facts.insert_delta(name, image)?))
                })?;
                let result = self.make_delta(&volume, &delta).and_then(|()| {
                    self.catalog.change(|facts| {
                        facts.make_current(&delta)?;
                        if let Some(image) = delta.image {
                            facts.set_volume_image(name, image)?;
                            facts.settle_targets(None, name, image, DeployState::Active, None)?;
                        }
                        call.done(facts, delta.image.map_or(String::new(), |image| format!("image {image}")))
                    })
                });
                if result.is_err() {
                    self.catalog.change(|facts| facts.set_delta_state(delta.id, DeltaState::Doomed))?;
                }
                self.remove_doomed(name)?;
                result?;
                self.catalog.read(|facts| self.view_volume(facts, &find_volume(facts, name)?))
            })
        })
    }

    /// Makes a volume larger; a guest that runs from it is told.
    pub fn grow_volume(&self, caller: &Caller, name: &str, bytes: u64) -> Result<Volume, Error> {
        let result = Call::run(self, caller, "volume.grow", format!("volume:{name}"), |call| {
            self.with_volume(name, || {
                let (volume, delta, attached) = self.catalog.read(|facts| {
                    call.require(facts, Verb::Write, &Object::Volume(name.to_owned()))?;
                    let volume = find_volume(facts, name)?;
                    if !volume.is_writable() {
                        return Err(Error::State {
                            object: format!("volume {name}"),
                            found: "is read-only and as large as its image".to_owned(),
                            remedy: "only volumes with a delta grow",
                        });
                    }
                    let found = bytes_of(facts, &volume)?;
                    if bytes < found || !is_whole_sectors(bytes) || bytes > Layout::VIRTUAL_BYTES_MAX {
                        return Err(Error::Invalid {
                            field: "bytes",
                            found: bytes.to_string(),
                            expected: format!("a multiple of 512 from {found}, the size that it has, to 64 TiB"),
                        });
                    }
                    let attached = facts.attachments_of(name)?.into_iter().next();
                    Ok((volume, facts.delta(name, DeltaState::Current)?, attached))
                })?;
                if let Some(attachment) = attached.as_ref().filter(|attachment| attachment.staged.is_some()) {
                    // Made for the old size, to which the guest's disk would shrink at its next boot.
                    self.backends.unstage(attachment.id)?;
                    self.settle_served(&volume, attachment)?;
                }
                match (&attached, &delta) {
                    (Some(attachment), _) => self.backends.grow(attachment.id, bytes)?,
                    (None, Some(delta)) => {
                        let path = self.delta_path(delta);
                        let (file, header) = open::open_locked(&path)?;
                        grow::grow(&file, &path.display().to_string(), &header, bytes)?;
                    }
                    (None, None) => {}
                }
                self.catalog.change(|facts| {
                    facts.set_volume_bytes(&volume.name, bytes)?;
                    call.done(facts, format!("{bytes} bytes"))?;
                    self.view_volume(facts, &find_volume(facts, name)?)
                })
            })
        });
        // Staged again, as large as the volume is by now.
        self.converge(name);
        result
    }

    /// Where a delta's file is.
    pub fn delta_path(&self, delta: &DeltaRow) -> PathBuf {
        self.places.deltas().join(delta.file_name())
    }

    /// What a delta takes on disk.
    pub fn delta_bytes(&self, delta: &DeltaRow) -> u64 {
        use std::os::unix::fs::MetadataExt;
        const BLOCK_BYTES: u64 = 512;
        std::fs::metadata(self.delta_path(delta)).map_or(0, |metadata| metadata.blocks() * BLOCK_BYTES)
    }

    /// Makes the file of a delta that has a row already.
    pub fn make_delta(&self, volume: &VolumeRow, delta: &DeltaRow) -> Result<(), Error> {
        let base = match delta.image {
            Some(digest) => {
                let image = self.catalog.read(|facts| usable_image(facts, digest))?;
                Some(BaseIdentity { digest, bytes: image.bytes })
            }
            None => None,
        };
        // An image may have become larger than the volume was to be.
        let virtual_bytes = volume.bytes.map(|bytes| bytes.max(base.map_or(0, |base| base.bytes)));
        let cluster = ClusterSize::from_bytes(volume.cluster_bytes).unwrap_or(ClusterSize::DEFAULT);
        open::create(&self.delta_path(delta), &NewDelta { base, virtual_bytes, cluster })?;
        Ok(())
    }

    /// Opens and locks a delta, and sees that it is for its image.
    pub fn open_delta(&self, delta: &DeltaRow, cache: DeltaCache) -> Result<AttachedDelta, Error> {
        let path = self.delta_path(delta);
        let label = path.display().to_string();
        let (file, header) = open::open_locked(&path)?;
        let base = match delta.image {
            Some(digest) => {
                let image = self.catalog.read(|facts| usable_image(facts, digest))?;
                Some(BaseIdentity { digest, bytes: image.bytes })
            }
            None => None,
        };
        open::check_matches(&header, &label, base, None)?;
        open::check_length(&file, &header, &label)?;
        let delta = AttachedDelta { file, direct: None, label, ephemeral: false };
        Ok(match cache {
            DeltaCache::Writeback => delta,
            DeltaCache::Direct => delta.past_page_cache(true)?,
        })
    }

    /// Removes the files of a volume's deltas that are to go, and then their rows.
    pub fn remove_doomed(&self, volume: &str) -> Result<(), Error> {
        for delta in self.remove_doomed_files(volume)? {
            self.catalog.change(|facts| facts.remove_delta(delta))?;
        }
        Ok(())
    }

    /// Removes the files of a volume's deltas that are to go, and says of which deltas there is none any more.
    fn remove_doomed_files(&self, volume: &str) -> Result<Vec<i64>, Error> {
        let mut removed = Vec::new();
        let deltas = self.catalog.read(|facts| Ok::<_, Error>(facts.deltas(volume)?))?;
        for delta in deltas.into_iter().filter(|delta| delta.state == DeltaState::Doomed) {
            let path = self.delta_path(&delta);
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    let error = Error::Io { action: "remove", path: path.display().to_string(), source };
                    // It is tried again when the daemon starts.
                    log::error!("{}", chain(&error));
                }
                _ => removed.push(delta.id),
            }
        }
        Ok(removed)
    }
}

/// Notes that all deltas of a volume are to go. Nothing changes, and nothing is written, where all are noted already.
fn doom_deltas(facts: &Facts<'_>, volume: &str) -> Result<(), Error> {
    for delta in facts.deltas(volume)?.iter().filter(|delta| delta.state != DeltaState::Doomed) {
        facts.set_delta_state(delta.id, DeltaState::Doomed)?;
    }
    Ok(())
}

fn require_detached(facts: &Facts<'_>, volume: &VolumeRow) -> Result<(), Error> {
    let users: Vec<String> =
        facts.attachments_of(&volume.name)?.into_iter().map(|attachment| format!("VM {}", attachment.vm)).collect();
    if users.is_empty() {
        return Ok(());
    }
    let object = format!("volume {}", volume.name);
    Err(Error::InUse { object, users, remedy: "detach it first, with 'pando detach'" })
}

/// Sees that what was asked for makes a volume, as far as that can be told without the catalog.
fn check_request(request: &VolumeRequest) -> Result<ClusterSize, Error> {
    let invalid = |field, found: &str, expected: &str| Error::Invalid {
        field,
        found: found.to_owned(),
        expected: expected.to_owned(),
    };
    let sources = usize::from(request.image.is_some()) + usize::from(request.channel.is_some());
    if (request.kind == VolumeKind::Blank) != (sources == 0) || sources > 1 {
        return Err(invalid(
            "image and channel",
            ["neither", "one of the two", "both"][sources],
            "one of the two for a 'cow' or 'read-only' volume, neither for a 'blank' one",
        ));
    }
    if request.kind == VolumeKind::Blank && request.bytes.is_none() {
        return Err(invalid("bytes", "left out", "the size of a 'blank' volume"));
    }
    if request.kind == VolumeKind::ReadOnly && request.bytes.is_some() {
        return Err(invalid("bytes", "given", "none: a 'read-only' volume is as large as its image"));
    }
    if request.kind == VolumeKind::ReadOnly && request.ephemeral {
        return Err(invalid("ephemeral", "true", "false: a 'read-only' volume has no delta"));
    }
    let bytes = request.cluster_bytes.unwrap_or(ClusterSize::DEFAULT.bytes());
    ClusterSize::from_bytes(bytes)
        .ok_or_else(|| invalid("cluster_bytes", &bytes.to_string(), "4096, 8192, 16384, 32768 or 65536"))
}

/// How long a volume's writes wait for room, in milliseconds.
fn hold_of(request: &VolumeRequest) -> Result<u64, Error> {
    const SECONDS_MAX: u64 = 24 * 60 * 60;
    let invalid = |found: &str, expected: &str| Error::Invalid {
        field: "hold_timeout_s",
        found: found.to_owned(),
        expected: expected.to_owned(),
    };
    match (request.on_full, request.hold_timeout_s) {
        (OnFull::Error, None) => Ok(0),
        (OnFull::Error, Some(_)) => Err(invalid("given", "none: with on_full 'error' no write waits")),
        (OnFull::Hold, None) => Ok(HOLD_DEFAULT.as_millis() as u64),
        (OnFull::Hold, Some(seconds)) if (1..=SECONDS_MAX).contains(&seconds) => Ok(seconds * 1000),
        (OnFull::Hold, Some(seconds)) => Err(invalid(&seconds.to_string(), "1 to 86400")),
    }
}

fn check_bytes(bytes: Option<u64>, image: Option<&ImageRow>) -> Result<(), Error> {
    let Some(bytes) = bytes else { return Ok(()) };
    let least = image.map_or(512, |image| image.bytes);
    if bytes >= least && is_whole_sectors(bytes) && bytes <= Layout::VIRTUAL_BYTES_MAX {
        return Ok(());
    }
    Err(Error::Invalid {
        field: "bytes",
        found: bytes.to_string(),
        expected: format!("a multiple of 512 from {least} to {}", Layout::VIRTUAL_BYTES_MAX),
    })
}

/// The image that a new volume is to be on, if the caller may use it.
fn image_for(call: &Call<'_>, facts: &Facts<'_>, request: &VolumeRequest) -> Result<Option<ImageRow>, Error> {
    if let Some(channel) = &request.channel {
        call.require(facts, Verb::Use, &Object::Channel(channel.clone()))?;
        let found = super::channels::find_channel(facts, channel)?;
        return usable_image(facts, found.image).map(Some);
    }
    let Some(name) = &request.image else { return Ok(None) };
    let image = find_image(facts, name)?;
    call.require(facts, Verb::Use, &object_of_image(facts, &image)?)?;
    usable_image(facts, image.digest).map(Some)
}
