//! Attachments: volumes served to VMs, and the images that these have now and next.
//!
//! [`Host::converge`] is what brings the backends' side to what the catalog wants: whoever changes a volume's target calls it, and it
//! may be called at any time and again.

use std::collections::HashSet;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::time::{Duration, Instant};

use crate::block::DeltaCache;
use crate::digest::Digest;
use crate::sys::process;

use super::Host;
use super::access::{Call, Caller, Object};
use super::api::types::{AttachRequest, Attachment, DeployState, Role, Verb, Vm};
use super::backends::{BackendError, Launch, Part};
use super::catalog::{AttachmentRow, AttachmentState, DeltaRow, DeltaState, Facts, NewAttachment, VolumeRow};
use super::error::{Error, chain};
use super::host::{find_volume, image_ref_of};
use super::images::usable_image;
use super::names::{check_addon, check_name, shown};
use super::volumes::desired;

/// Virtqueues that are offered when nobody says how many.
const QUEUES: u16 = 16;
/// The largest number of them.
const QUEUES_MAX: u16 = 256;
/// How long to wait for the end of a backend that was detached, and whose user is the last.
const USER_PATIENCE: Duration = Duration::from_secs(2);

/// The serial number by which a guest tells a disk: its role, or one of the volume's own.
fn serial_of(volume: &str, role: &Option<Role>) -> String {
    match role {
        Some(Role::Os) => "os".to_owned(),
        Some(Role::Private) => "private".to_owned(),
        Some(Role::Addon(name)) => format!("addon-{name}"),
        None => format!("pando-{}", &blake3::hash(volume.as_bytes()).to_hex()[..14]),
    }
}

/// What a backend calls what it serves: the image, and the delta over it.
pub fn tag_of(image: Option<Digest>, delta: Option<&DeltaRow>) -> String {
    let image = image.map_or("none".to_owned(), |image| image.to_string());
    format!("{image}.{}", delta.map_or(0, |delta| delta.id))
}

/// The image and the delta's number that a tag names.
fn read_tag(tag: &str) -> Option<(Option<Digest>, i64)> {
    let (image, delta) = tag.split_once('.')?;
    let image = if image == "none" { None } else { Some(image.parse().ok()?) };
    Some((image, delta.parse().ok()?))
}

impl Host {
    fn view_attachment(&self, facts: &Facts<'_>, row: &AttachmentRow) -> Result<Attachment, Error> {
        let live = self.backends.view(row.id);
        Ok(Attachment {
            volume: row.volume.clone(),
            vm: row.vm.clone(),
            role: row.role.clone(),
            serial: row.serial.clone(),
            socket: self.places.front_end_socket(&row.vm, &row.volume).display().to_string(),
            read_only: row.read_only,
            delta_cache: (!row.read_only).then_some(row.delta_cache),
            bytes: live.as_ref().map_or(0, |live| live.bytes),
            image: image_ref_of(facts, row.image)?,
            staged: image_ref_of(facts, row.staged)?,
            previous: image_ref_of(facts, row.previous)?,
            state: match row.state {
                AttachmentState::Failed => "failed",
                _ if live.is_none() => "restarting",
                _ => "running",
            }
            .to_owned(),
            error: row.error.clone(),
            connected: live.as_ref().is_some_and(|live| live.connected),
            process: live.map(|live| live.process),
            restarts: row.restarts,
            attached_at: row.at,
            attached_by: row.by.clone(),
        })
    }

    /// The attachments of volumes that the caller may see.
    pub fn list_attachments(&self, caller: &Caller) -> Result<Vec<Attachment>, Error> {
        Call::look(self, caller, "attachment.list", "volume:*", |call| {
            self.catalog.read(|facts| {
                let rows = self.visible_attachments(call, facts)?;
                rows.iter().map(|row| self.view_attachment(facts, row)).collect()
            })
        })
    }

    fn visible_attachments(&self, call: &Call<'_>, facts: &Facts<'_>) -> Result<Vec<AttachmentRow>, Error> {
        call.require_any(facts, "volume")?;
        let mut seen = Vec::new();
        for row in facts.attachments()? {
            if call.may(facts, Verb::Use, &Object::Volume(row.volume.clone()))? {
                seen.push(row);
            }
        }
        Ok(seen)
    }

    /// One attachment.
    pub fn show_attachment(&self, caller: &Caller, vm: &str, volume: &str) -> Result<Attachment, Error> {
        Call::look(self, caller, "attachment.show", format!("volume:{}", shown(volume)), |call| {
            self.catalog.read(|facts| {
                call.require(facts, Verb::Use, &Object::Volume(volume.to_owned()))?;
                self.view_attachment(facts, &find_attachment(facts, vm, volume)?)
            })
        })
    }

    /// The VMs, as the attachments that the caller may see show them.
    pub fn list_vms(&self, caller: &Caller) -> Result<Vec<Vm>, Error> {
        Call::look(self, caller, "vm.list", "volume:*", |call| {
            self.catalog.read(|facts| {
                let mut vms: Vec<Vm> = Vec::new();
                for row in self.visible_attachments(call, facts)? {
                    if vms.last().is_none_or(|vm| vm.name != row.vm) {
                        let groups = facts.groups_of(&format!("vm:{}", row.vm))?;
                        let name = row.vm.clone();
                        vms.push(Vm { name, os: None, os_staged: None, volumes: Vec::new(), groups });
                    }
                    let Some(vm) = vms.last_mut() else { continue };
                    // Said to be the system's disk, or the first with an image of which nothing was said.
                    if row.role == Some(Role::Os) || row.role.is_none() && vm.os.is_none() && row.image.is_some() {
                        vm.os = image_ref_of(facts, row.image)?;
                        vm.os_staged = image_ref_of(facts, row.staged)?;
                    }
                    vm.volumes.push(row.volume);
                }
                Ok(vms)
            })
        })
    }

    /// Attaches a volume to a VM: starts a backend, and says on which socket.
    pub fn attach(&self, caller: &Caller, request: &AttachRequest) -> Result<Attachment, Error> {
        check_name("VM", &request.vm)?;
        if let Some(Role::Addon(name)) = &request.role {
            check_addon(name)?;
        }
        let queues = request.queues.unwrap_or(QUEUES);
        if queues == 0 || queues > QUEUES_MAX {
            let expected = format!("1 to {QUEUES_MAX}");
            return Err(Error::Invalid { field: "queues", found: queues.to_string(), expected });
        }
        let name = &request.volume;
        Call::run(self, caller, "attach", format!("volume:{}", shown(name)), |call| {
            self.with_volume(name, || {
                let (volume, id) = self.catalog.change(|facts| self.note_attachment(call, facts, request, queues))?;
                let result = self.start_attachment(&volume, id, false).and_then(|delta| {
                    self.catalog.change(|facts| {
                        if let Some(delta) = delta.filter(|delta| delta.state == DeltaState::Making) {
                            facts.make_current(&delta)?;
                        }
                        facts.set_attachment_state(id, AttachmentState::Running, None)?;
                        let row = find_attachment(facts, &request.vm, name)?;
                        if let Some(image) = row.image {
                            facts.settle_targets(Some(&row.vm), name, image, DeployState::Active, None)?;
                        }
                        call.done(facts, format!("VM {}", request.vm))?;
                        self.view_attachment(facts, &row)
                    })
                });
                if result.is_err() {
                    self.undo_attachment(&volume, id, &request.vm)?;
                }
                self.remove_doomed(name)?;
                result
            })
        })
    }

    /// Sees that a volume can be attached as asked for, and notes that it is about to be.
    fn note_attachment(
        &self,
        call: &Call<'_>,
        facts: &Facts<'_>,
        request: &AttachRequest,
        queues: u16,
    ) -> Result<(VolumeRow, i64), Error> {
        let (name, vm) = (&request.volume, &request.vm);
        call.require(facts, Verb::Use, &Object::Volume(name.clone()))?;
        let volume = find_volume(facts, name)?;
        let verb = if volume.is_writable() { Verb::Write } else { Verb::Use };
        call.require(facts, verb, &Object::Volume(name.clone()))?;
        let others = facts.attachments_of(name)?;
        let same = others.iter().any(|other| other.vm == *vm);
        if same || volume.is_writable() && !others.is_empty() {
            let users = others.iter().map(|other| format!("VM {}", other.vm)).collect();
            let remedy = if same {
                "it is attached there already"
            } else {
                "a volume with a delta has one writer: detach it there first"
            };
            return Err(Error::InUse { object: format!("volume {name}"), users, remedy });
        }
        facts.place(vm, name, &request.role, volume.is_writable())?;
        let delta_cache = request.delta_cache.unwrap_or_default();
        if delta_cache == DeltaCache::Direct && !volume.is_writable() {
            return Err(Error::Invalid {
                field: "delta_cache",
                found: delta_cache.to_string(),
                expected: "none: a 'read-only' volume has no delta".to_owned(),
            });
        }
        let image = if volume.stays() { volume.image } else { desired(facts, &volume, Some(vm))? };
        image.map(|image| usable_image(facts, image)).transpose()?;
        let id = facts.insert_attachment(&NewAttachment {
            vm: vm.clone(),
            volume: name.clone(),
            role: request.role.clone(),
            serial: serial_of(name, &request.role),
            read_only: !volume.is_writable(),
            queues,
            kernel_from_vmm: request.kernel_from_vmm,
            delta_cache,
            image,
            owner: owner_for(call, request)?,
            by: call.caller().principal(),
        })?;
        if volume.ephemeral {
            // What was in it ends with the last attachment.
            facts.insert_delta(name, image)?;
        }
        Ok((volume, id))
    }

    /// Starts an attachment's backend, and gives the delta that it serves. The caller has the volume alone.
    ///
    /// `resumed`: a guest may be running from it.
    pub fn start_attachment(&self, volume: &VolumeRow, id: i64, resumed: bool) -> Result<Option<DeltaRow>, Error> {
        let (row, delta) = self.catalog.read(|facts| {
            let row = facts.attachment_by_id(id)?.ok_or(Error::NotFound {
                kind: "attachment",
                name: volume.name.clone(),
                nearest: None,
            })?;
            let making = facts.delta(&volume.name, DeltaState::Making)?.filter(|_| !resumed);
            let delta = match making {
                Some(delta) => Some(delta),
                None => facts.delta(&volume.name, DeltaState::Current)?,
            };
            Ok::<_, Error>((row, delta))
        })?;
        if let Some(delta) = delta.as_ref().filter(|delta| delta.state == DeltaState::Making) {
            self.make_delta(volume, delta)?;
        }
        let socket = self.places.front_end_socket(&row.vm, &row.volume);
        if let Some(directory) = socket.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(|source| Error::Io {
                action: "make the directory",
                path: directory.display().to_string(),
                source,
            })?;
        }
        self.backends.start(Launch {
            attachment: id,
            name: format!("{}/{}", row.vm, row.volume),
            socket,
            control: self.places.control_socket(id),
            part: self.part(row.image, delta.as_ref(), &row)?,
            queues: row.queues,
            hold_ms: volume.hold_ms,
            resumed,
            kernel_from_vmm: row.kernel_from_vmm,
            uid: self.user_for(&row)?,
        })?;
        self.hand_over_socket(&row);
        Ok(delta)
    }

    /// Whom an attachment's backend is to run as: the one that it has already, or one that nobody is.
    fn user_for(&self, row: &AttachmentRow) -> Result<Option<u32>, Error> {
        let range = self.backends.users();
        if row.backend_uid.is_some_and(|uid| range.is_some_and(|range| range.contains(uid))) {
            return Ok(row.backend_uid);
        }
        let Some(range) = range else {
            if row.backend_uid.is_some() {
                self.catalog.change(|facts| Ok::<_, Error>(facts.set_backend_uid(row.id, None)?))?;
            }
            return Ok(None);
        };
        let none_left = || Error::State {
            object: format!("--backend-uids {range}"),
            found: "has no user left that nothing runs as".to_owned(),
            remedy: "detach something, or give the daemon a larger range",
        };
        // In turn, so that one comes again as late as can be.
        let turn = self.catalog.change(|facts| Ok::<_, Error>(facts.count("backend-uid")?))?;
        let begun = Instant::now();
        let mut running: Option<HashSet<u32>> = None;
        loop {
            let noted = self.catalog.change(|facts| {
                let mut is_any_free = false;
                for uid in range.from(turn) {
                    if facts.is_backend_uid(uid)? {
                        continue;
                    }
                    is_any_free = true;
                    // A backend may not have ended when it said that it would.
                    if !process::is_any_of(uid) || running.as_ref().is_some_and(|running| !running.contains(&uid)) {
                        facts.set_backend_uid(row.id, Some(uid))?;
                        return Ok(Some(uid));
                    }
                }
                if is_any_free { Ok::<_, Error>(None) } else { Err(none_left()) }
            })?;
            if noted.is_some() {
                return Ok(noted);
            }
            if begun.elapsed() > USER_PATIENCE {
                return Err(none_left());
            }
            std::thread::sleep(Duration::from_millis(5));
            // A backend that was started by a daemon before this one, and has ended, is there until the first process waits for it.
            running = process::users_running().ok();
        }
    }

    /// What a backend is to serve, as open files.
    fn part(&self, image: Option<Digest>, delta: Option<&DeltaRow>, row: &AttachmentRow) -> Result<Part, Error> {
        let tag = tag_of(image, delta);
        let base = match image {
            Some(digest) => Some(self.backends.image(digest, || {
                let image = self.catalog.read(|facts| usable_image(facts, digest))?;
                Ok::<_, Error>(self.store.open_image(&digest, Some(image.bytes))?)
            })?),
            None => None,
        };
        let delta = match delta {
            Some(delta) => Some(self.open_delta(delta, row.delta_cache)?),
            None => None,
        };
        Ok(Part { tag, image, base, delta, serial: row.serial.clone() })
    }

    /// Lets an attachment's owner, and nobody else but root, connect to it.
    fn hand_over_socket(&self, row: &AttachmentRow) {
        let socket = self.places.front_end_socket(&row.vm, &row.volume);
        let (uid, gid) = row.owner;
        let result = std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
            .and_then(|()| std::os::unix::fs::chown(&socket, Some(uid), Some(gid)));
        if let Err(error) = result {
            log::warn!("{} stays the daemon's own: {error}", socket.display());
        }
    }

    /// Detaches a volume from a VM: everything that the guest wrote is durable when this returns.
    pub fn detach(&self, caller: &Caller, vm: &str, name: &str) -> Result<(), Error> {
        Call::run(self, caller, "detach", format!("volume:{}", shown(name)), |call| {
            self.with_volume(name, || {
                let (volume, id) = self.catalog.change(|facts| {
                    call.require(facts, Verb::Use, &Object::Volume(name.to_owned()))?;
                    let volume = find_volume(facts, name)?;
                    let verb = if volume.is_writable() { Verb::Write } else { Verb::Use };
                    call.require(facts, verb, &Object::Volume(name.to_owned()))?;
                    let row = find_attachment(facts, vm, name)?;
                    facts.set_attachment_state(row.id, AttachmentState::Stopping, None)?;
                    call.done(facts, format!("VM {vm}"))?;
                    Ok::<_, Error>((volume, row.id))
                })?;
                self.undo_attachment(&volume, id, vm)?;
                self.remove_doomed(name)
            })
        })
    }

    /// Ends an attachment, however far it has come. The caller has the volume alone, and removes doomed deltas afterwards.
    pub fn undo_attachment(&self, volume: &VolumeRow, id: i64, vm: &str) -> Result<(), Error> {
        self.backends.stop(id, &self.places.control_socket(id))?;
        for path in [self.places.control_socket(id), self.places.front_end_socket(vm, &volume.name)] {
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::Io { action: "remove", path: path.display().to_string(), source });
                }
                _ => {}
            }
        }
        // Gone when it was the VM's last; the directory of another's sockets stays.
        let _ = std::fs::remove_dir(self.places.vms().join(vm));
        self.catalog.change(|facts| {
            for delta in facts.deltas(&volume.name)? {
                if volume.ephemeral || delta.state != DeltaState::Current {
                    facts.set_delta_state(delta.id, DeltaState::Doomed)?;
                }
            }
            Ok::<_, Error>(facts.remove_attachment(id)?)
        })?;
        self.backends.release_images(|digest| self.is_served(digest));
        Ok(())
    }

    /// Brings what the backends of a volume have staged to what its VMs are to have from their next boot on.
    pub fn converge(&self, name: &str) {
        let result = self.with_volume(name, || {
            let Some(volume) = self.catalog.read(|facts| Ok::<_, Error>(facts.volume(name)?))? else { return Ok(()) };
            if volume.stays() || volume.target.is_none() {
                return Ok(());
            }
            let rows = self.catalog.read(|facts| Ok::<_, Error>(facts.attachments_of(name)?))?;
            for row in rows.iter().filter(|row| row.state == AttachmentState::Running) {
                match self.converge_attachment(&volume, row) {
                    // The one that takes its place is told afterwards.
                    Err(Error::Backend(error @ (BackendError::Gone | BackendError::Absent))) => {
                        log::warn!("{}: {error}", object_of(row));
                    }
                    Err(error) => self.note_failed_switch(row, &chain(&error))?,
                    Ok(()) => {}
                }
            }
            self.remove_doomed(name)
        });
        if let Err(error) = result {
            log::error!("volume {name} could not be brought to its image: {}", chain(&error));
        }
    }

    fn converge_attachment(&self, volume: &VolumeRow, row: &AttachmentRow) -> Result<(), Error> {
        let wanted = self.catalog.read(|facts| desired(facts, volume, Some(&row.vm)))?;
        let staged = wanted.filter(|_| wanted != row.image);
        if staged == row.staged || self.backends.view(row.id).is_none() {
            // A backend that is being started again is told afterwards.
            return Ok(());
        }
        let Some(image) = staged else {
            self.backends.unstage(row.id)?;
            self.settle_served(volume, row)?;
            self.event("image.unstaged", &object_of(row), "");
            return Ok(());
        };
        let delta = match volume.ephemeral {
            true => Some(self.catalog.change(|facts| facts.insert_delta(&volume.name, Some(image)))?),
            false => None,
        };
        if let Some(delta) = &delta
            && let Err(error) = self.make_delta(volume, delta)
        {
            self.catalog.change(|facts| facts.set_delta_state(delta.id, DeltaState::Doomed))?;
            return Err(error);
        }
        let part = self.part(Some(image), delta.as_ref(), row)?;
        // Noted first: a backend that switches at once is understood then.
        self.catalog.change(|facts| {
            for old in facts.deltas(&volume.name)?.iter().filter(|old| old.state == DeltaState::Staged) {
                facts.set_delta_state(old.id, DeltaState::Doomed)?;
            }
            if let Some(delta) = &delta {
                facts.set_delta_state(delta.id, DeltaState::Staged)?;
            }
            Ok::<_, Error>(facts.set_staged(row.id, Some(image))?)
        })?;
        self.backends.stage(row.id, part)?;
        self.event("image.staged", &object_of(row), &image.to_string());
        Ok(())
    }

    /// Sees what a backend serves after nothing is staged there any more. The caller has the volume alone.
    pub fn settle_served(&self, volume: &VolumeRow, row: &AttachmentRow) -> Result<(), Error> {
        let served = self.backends.report(row.id)?;
        self.note_served(volume, row, &served.tag)?;
        self.catalog.change(|facts| {
            for old in facts.deltas(&volume.name)?.iter().filter(|old| old.state == DeltaState::Staged) {
                facts.set_delta_state(old.id, DeltaState::Doomed)?;
            }
            Ok::<_, Error>(facts.set_staged(row.id, None)?)
        })
    }

    /// A backend has begun to serve what was staged.
    pub fn switched(&self, id: i64, tag: &str) -> Result<(), Error> {
        let Some(row) = self.catalog.read(|facts| Ok::<_, Error>(facts.attachment_by_id(id)?))? else { return Ok(()) };
        self.with_volume(&row.volume, || {
            let (volume, row) =
                self.catalog.read(|facts| Ok::<_, Error>((facts.volume(&row.volume)?, facts.attachment_by_id(id)?)))?;
            let (Some(volume), Some(row)) = (volume, row) else { return Ok(()) };
            self.note_served(&volume, &row, tag)?;
            self.remove_doomed(&volume.name)
        })?;
        // What is wanted may have changed in between.
        self.converge(&row.volume);
        Ok(())
    }

    /// Notes what a backend says that it serves. The caller has the volume alone.
    pub fn note_served(&self, volume: &VolumeRow, row: &AttachmentRow, tag: &str) -> Result<(), Error> {
        let Some((Some(image), delta)) = read_tag(tag) else { return Ok(()) };
        if row.image == Some(image) {
            return Ok(());
        }
        self.catalog.change(|facts| {
            facts.set_switched(row.id, image)?;
            for found in facts.deltas(&volume.name)? {
                if found.id == delta {
                    facts.make_current(&found)?;
                }
            }
            Ok::<_, Error>(facts.settle_targets(Some(&row.vm), &row.volume, image, DeployState::Active, None)?)
        })?;
        self.backends.release_images(|digest| self.is_served(digest));
        self.event("image.active", &object_of(row), &image.to_string());
        Ok(())
    }

    /// Whether some attachment has or will have an image.
    fn is_served(&self, digest: Digest) -> bool {
        let rows = self.catalog.read(|facts| Ok::<_, Error>(facts.attachments()?));
        rows.map_or(true, |rows| rows.iter().any(|row| row.image == Some(digest) || row.staged == Some(digest)))
    }

    /// A backend could not serve what was staged.
    pub fn switch_failed(&self, id: i64, reason: &str) -> Result<(), Error> {
        let Some(row) = self.catalog.read(|facts| Ok::<_, Error>(facts.attachment_by_id(id)?))? else { return Ok(()) };
        self.with_volume(&row.volume, || {
            self.note_failed_switch(&row, reason)?;
            self.remove_doomed(&row.volume)
        })
    }

    /// A front end has come to a backend or gone from it.
    pub fn front_end_changed(&self, id: i64, connected: bool, detail: &str) -> Result<(), Error> {
        let kind = if connected { "front-end.connected" } else { "front-end.disconnected" };
        self.attachment_event(id, kind, detail)
    }

    /// A backend's worker died, and another has taken its place.
    pub fn worker_died(&self, id: i64, status: &str) -> Result<(), Error> {
        self.catalog.change(|facts| facts.count_restart(id))?;
        self.attachment_event(id, "worker.died", status)
    }

    /// Something has happened to a backend that an operator wants to know of.
    pub fn attachment_event(&self, id: i64, kind: &str, detail: &str) -> Result<(), Error> {
        if let Some(row) = self.catalog.read(|facts| Ok::<_, Error>(facts.attachment_by_id(id)?))? {
            self.event(kind, &object_of(&row), detail);
        }
        Ok(())
    }

    /// What was staged cannot be served; the VM goes on with what it has.
    pub fn note_failed_switch(&self, row: &AttachmentRow, reason: &str) -> Result<(), Error> {
        self.catalog.change(|facts| {
            facts.set_attachment_state(row.id, row.state, Some(reason))?;
            facts.set_staged(row.id, None)?;
            for old in facts.deltas(&row.volume)?.iter().filter(|old| old.state == DeltaState::Staged) {
                facts.set_delta_state(old.id, DeltaState::Doomed)?;
            }
            let wanted = facts.volume(&row.volume)?.map(|volume| desired(facts, &volume, Some(&row.vm))).transpose()?;
            if let Some(image) = wanted.flatten() {
                facts.settle_targets(Some(&row.vm), &row.volume, image, DeployState::Failed, Some(reason))?;
            }
            Ok::<_, Error>(())
        })?;
        self.event("image.failed", &object_of(row), reason);
        Ok(())
    }
}

/// Whose the socket of an attachment is to be.
fn owner_for(call: &Call<'_>, request: &AttachRequest) -> Result<(u32, u32), Error> {
    let caller = call.caller();
    let own = (caller.uid, caller.gids.first().copied().unwrap_or(caller.uid));
    match request.owner {
        Some(owner) if (owner.uid, owner.gid) != own => {
            call.require_admin("give a socket to another user")?;
            Ok((owner.uid, owner.gid))
        }
        _ => Ok(own),
    }
}

/// What events call an attachment.
pub fn object_of(row: &AttachmentRow) -> String {
    format!("attachment:{}/{}", row.vm, row.volume)
}

/// An attachment, or who has the volume instead.
pub fn find_attachment(facts: &Facts<'_>, vm: &str, volume: &str) -> Result<AttachmentRow, Error> {
    match facts.attachment(vm, volume)? {
        Some(row) => Ok(row),
        None => {
            let names = facts.attachments()?.into_iter().map(|row| format!("{}/{}", row.vm, row.volume));
            let name = format!("{}/{}", shown(vm), shown(volume));
            Err(Error::NotFound { kind: "attachment", nearest: super::names::nearest(&name, names), name })
        }
    }
}
