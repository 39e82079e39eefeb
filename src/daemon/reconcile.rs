//! After a daemon's return: the catalog, the files and the processes are brought to agree.
//!
//! Every change is noted before it is made, so what the last daemon left half-done can be told from what is whole: what nobody was told of is
//! undone, what was promised is finished. Backends that run are adopted, ones that are missing are started again, ones that nobody knows are
//! stopped. May run at any time and again.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::block::delta::open;

use super::Host;
use super::attachments::{object_of, tag_of};
use super::backends::Adopted;
use super::catalog::{AttachmentRow, AttachmentState, DeltaState, VolumeRow};
use super::error::{Error, chain};

/// Deaths of a backend within [`DEATHS_WINDOW`] after which it is not started again.
const DEATHS_MAX: usize = 5;
/// See [`DEATHS_MAX`].
const DEATHS_WINDOW: Duration = Duration::from_secs(10);

impl Host {
    /// Brings catalog, files and processes to agree. What cannot be is logged and left for the next time.
    pub fn reconcile(self: &Arc<Self>) -> Result<(), Error> {
        let ended = self.catalog.change(|facts| Ok::<_, Error>(facts.end_jobs_left()?))?;
        if ended > 0 {
            self.event("job.interrupted", "jobs", &format!("{ended} jobs of the last daemon were not done"));
        }
        for image in self.catalog.read(|facts| Ok::<_, Error>(facts.images_half_done()?))? {
            attempt("take away a half-imported image", || self.finish_removal(image.digest));
        }
        for row in self.catalog.read(|facts| Ok::<_, Error>(facts.attachments()?))? {
            attempt("bring an attachment back", || self.reconcile_attachment(&row));
        }
        self.stop_strangers()?;
        for volume in self.catalog.read(|facts| Ok::<_, Error>(facts.volumes_half_done()?))? {
            attempt("take away a half-made volume", || {
                self.with_volume(&volume.name, || self.undo_volume(&volume.name))
            });
        }
        for volume in self.catalog.read(|facts| Ok::<_, Error>(facts.volumes()?))? {
            attempt("tidy a volume", || self.with_volume(&volume.name, || self.reconcile_deltas(&volume)));
            self.converge(&volume.name);
        }
        self.name_strange_files()
    }

    fn reconcile_attachment(&self, row: &AttachmentRow) -> Result<(), Error> {
        self.with_volume(&row.volume, || {
            let Some(volume) = self.catalog.read(|facts| Ok::<_, Error>(facts.volume(&row.volume)?))? else {
                return Ok(());
            };
            if matches!(row.state, AttachmentState::Starting | AttachmentState::Stopping) {
                self.undo_attachment(&volume, row.id, &row.vm)?;
                return self.remove_doomed(&row.volume);
            }
            let name = format!("{}/{}", row.vm, row.volume);
            match self.backends.adopt(row.id, &name, &self.places.control_socket(row.id), row.image)? {
                Some(Adopted { tag, staged }) => {
                    self.note_served(&volume, row, &tag)?;
                    if !staged && row.staged.is_some() {
                        // It was noted and never said.
                        self.catalog.change(|facts| facts.set_staged(row.id, None))?;
                    }
                    log::info!("{name}: its backend goes on");
                    Ok(())
                }
                None if row.state == AttachmentState::Failed => Ok(()),
                None => self.restart(&volume, row, "it was not there when the daemon came back", false),
            }
        })
    }

    /// A backend's connection has ended: if it is dead, another takes its place.
    pub fn backend_gone(&self, id: i64) -> Result<(), Error> {
        let Some(row) = self.catalog.read(|facts| Ok::<_, Error>(facts.attachment_by_id(id)?))? else { return Ok(()) };
        self.with_volume(&row.volume, || {
            let (volume, row) = self.catalog.read(|facts| {
                Ok::<_, Error>((facts.volume(&row.volume)?, facts.attachment_by_id(id)?))
            })?;
            let (Some(volume), Some(row)) = (volume, row) else { return Ok(()) };
            // One that was started meanwhile is another one's.
            if row.state != AttachmentState::Running || self.backends.is_connected(id) {
                return Ok(());
            }
            let was_heard = self.backends.was_heard(id);
            self.backends.forget(id);
            let name = format!("{}/{}", row.vm, row.volume);
            if let Some(adopted) = self.backends.adopt(id, &name, &self.places.control_socket(id), row.image)? {
                // Only the connection was lost.
                return self.note_served(&volume, &row, &adopted.tag);
            }
            self.event("backend.died", &object_of(&row), "");
            if self.backends.count_death(id, DEATHS_WINDOW) > DEATHS_MAX {
                let reason = format!(
                    "its backend died more than {DEATHS_MAX} times in {} s: detach it, see to the cause, attach it again",
                    DEATHS_WINDOW.as_secs()
                );
                return self.give_up(&row, &reason);
            }
            self.restart(&volume, &row, "it died", was_heard)
        })?;
        self.converge(&row.volume);
        Ok(())
    }

    /// Starts a backend again under a guest that may be running. The caller has the volume alone. `was_heard`: this daemon has listened to
    /// the one that died until then.
    fn restart(&self, volume: &VolumeRow, row: &AttachmentRow, why: &str, was_heard: bool) -> Result<(), Error> {
        if !was_heard && !self.find_out_boot(volume, row)? {
            let reason = "its backend died while no daemon was there, with another image staged: whether the guest has booted into that cannot \
                          be told; detach it, attach it again, and boot";
            return self.give_up(row, reason);
        }
        self.catalog.change(|facts| {
            facts.count_restart(row.id)?;
            // What was staged went with it; it is staged again.
            for delta in facts.deltas(&row.volume)?.iter().filter(|delta| delta.state == DeltaState::Staged) {
                facts.set_delta_state(delta.id, DeltaState::Doomed)?;
            }
            Ok::<_, Error>(facts.set_staged(row.id, None)?)
        })?;
        match self.start_attachment(volume, row.id, true) {
            Ok(_) => {
                self.event("backend.restarted", &object_of(row), why);
                self.remove_doomed(&row.volume)
            }
            // Perhaps for that alone. The next daemon finds none, and starts one.
            Err(error) if self.backends.is_ending() => {
                log::info!("{} is left to the next daemon: {}", object_of(row), chain(&error));
                Ok(())
            }
            Err(error) => self.give_up(row, &chain(&error)),
        }
    }

    /// Starts no backend any more until a volume is attached anew.
    fn give_up(&self, row: &AttachmentRow, reason: &str) -> Result<(), Error> {
        self.catalog.change(|facts| facts.set_attachment_state(row.id, AttachmentState::Failed, Some(reason)))?;
        self.event("backend.failed", &object_of(row), reason);
        Ok(())
    }

    /// Notes whether a guest has booted into what was staged while nobody listened to its backend, which is dead. False when that cannot be
    /// told: a guest that runs must find no other image.
    fn find_out_boot(&self, volume: &VolumeRow, row: &AttachmentRow) -> Result<bool, Error> {
        // After a restart of the host the socket is gone, and so are the guests.
        let Some(image) = row.staged.filter(|_| self.places.control_socket(row.id).exists()) else { return Ok(true) };
        if !volume.ephemeral {
            return Ok(false);
        }
        // Its worker opened the delta then.
        let staged = self.catalog.read(|facts| Ok::<_, Error>(facts.delta(&volume.name, DeltaState::Staged)?))?;
        if let Some(delta) = staged.filter(|delta| delta.image == Some(image))
            && open::was_used(&self.delta_path(&delta))?
        {
            self.note_served(volume, row, &tag_of(Some(image), Some(&delta)))?;
        }
        Ok(true)
    }

    /// Stops backends that no attachment is noted of.
    fn stop_strangers(&self) -> Result<(), Error> {
        let known: BTreeSet<_> = self
            .catalog
            .read(|facts| Ok::<_, Error>(facts.attachments()?))?
            .iter()
            .map(|row| self.places.control_socket(row.id))
            .collect();
        for path in files_in(&self.places.controls())?.into_iter().filter(|path| !known.contains(path)) {
            attempt("stop a backend that nobody knows", || {
                self.backends.stop(-1, &path)?;
                fs::remove_file(&path).map_err(|source| Error::Io {
                    action: "remove",
                    path: path.display().to_string(),
                    source,
                })
            });
        }
        Ok(())
    }

    fn reconcile_deltas(&self, volume: &VolumeRow) -> Result<(), Error> {
        self.catalog.change(|facts| {
            let attached = !facts.attachments_of(&volume.name)?.is_empty();
            for delta in facts.deltas(&volume.name)? {
                let is_left = match delta.state {
                    DeltaState::Making | DeltaState::Doomed => true,
                    DeltaState::Staged => facts.attachments_of(&volume.name)?.iter().all(|row| row.staged.is_none()),
                    DeltaState::Current => volume.ephemeral && !attached,
                };
                if is_left {
                    facts.set_delta_state(delta.id, DeltaState::Doomed)?;
                }
            }
            Ok::<_, Error>(())
        })?;
        self.remove_doomed(&volume.name)
    }

    /// Files that are nobody's are told of and left: they may be somebody's data.
    fn name_strange_files(&self) -> Result<(), Error> {
        let (deltas, images) = self.catalog.read(|facts| Ok::<_, Error>((facts.all_deltas()?, facts.images()?)))?;
        let known: BTreeSet<_> = deltas.iter().map(|delta| self.delta_path(delta)).collect();
        for path in files_in(&self.places.deltas())?.into_iter().filter(|path| !known.contains(path)) {
            self.event("file.unknown", &path.display().to_string(), "no volume is noted of it; it is left alone");
        }
        for digest in self.store.digests()?.images {
            if images.iter().all(|image| image.digest != digest) {
                let path = self.store.path(&digest).display().to_string();
                self.event("file.unknown", &path, "no image is noted of it; it is left alone");
            }
        }
        Ok(())
    }
}

fn attempt(what: &str, work: impl FnOnce() -> Result<(), Error>) {
    if let Err(error) = work() {
        log::error!("cannot {what}: {}", chain(&error));
    }
}

fn files_in(directory: &Path) -> Result<Vec<std::path::PathBuf>, Error> {
    let io = |source| Error::Io { action: "read", path: directory.display().to_string(), source };
    let entries = fs::read_dir(directory).map_err(io)?;
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(io)).collect()
}
