//! Images: imported, looked at, verified, exported, removed. What they are at rest is [`crate::store`]'s affair.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::digest::Digest;
use crate::store::{Announcement, Format, Progress, Source, Spool, StoreError};

use super::Host;
use super::access::{Call, Caller, Object};
use super::api::types::{self, Image, Job, UploadQuery, Verb};
use super::catalog::{Facts, ImageRow, ImageState, now};
use super::error::{Error, chain};
use super::jobs::Running;
use super::names::{check_version, nearest, shown};

/// The image that a version, a digest or the beginning of one names.
pub fn find_image(facts: &Facts<'_>, name: &str) -> Result<ImageRow, Error> {
    let found = facts.images_named(name)?;
    if found.len() > 1 {
        return Err(Error::Ambiguous { name: shown(name) });
    }
    let image = found.first().map(|digest| facts.image(*digest)).transpose()?.flatten();
    match image.filter(|image| matches!(image.state, ImageState::Verified | ImageState::Corrupt)) {
        Some(image) => Ok(image),
        None => {
            Err(Error::NotFound { kind: "image", name: shown(name), nearest: nearest(name, facts.all_versions()?) })
        }
    }
}

/// The image with this digest, if VMs may run from it.
pub fn usable_image(facts: &Facts<'_>, digest: Digest) -> Result<ImageRow, Error> {
    match facts.image(digest)? {
        Some(image) if image.state == ImageState::Verified => Ok(image),
        Some(image) if image.state == ImageState::Corrupt => Err(Error::State {
            object: format!("image {digest}"),
            found: "was found corrupt".to_owned(),
            remedy: "import it again, or remove it",
        }),
        _ => Err(Error::NotFound { kind: "image", name: digest.to_string(), nearest: None }),
    }
}

/// An image, as grants know it.
pub fn object_of_image(facts: &Facts<'_>, image: &ImageRow) -> Result<Object, Error> {
    let mut names = vec![image.digest.to_string()];
    names.extend(facts.versions(image.digest)?);
    Ok(Object::Image(names))
}

/// What an import is told besides the contents.
pub struct ImportOptions {
    version: Option<String>,
    format: Option<Format>,
}

impl ImportOptions {
    fn new(version: Option<&String>, format: Option<&String>) -> Result<ImportOptions, Error> {
        version.map_or(Ok(()), |version| check_version(version))?;
        let format = format.map(|name| {
            Format::named(name).ok_or_else(|| Error::Invalid {
                field: "format",
                found: shown(name),
                expected: Format::ALL.map(|format| format.to_string()).join(", "),
            })
        });
        Ok(ImportOptions { version: version.cloned(), format: format.transpose()? })
    }

    /// What the audit log and the job call it.
    fn object(&self) -> String {
        format!("image:{}", self.version.as_deref().unwrap_or("new"))
    }
}

impl Host {
    fn view_image(&self, facts: &Facts<'_>, image: &ImageRow) -> Result<Image, Error> {
        let users = facts.users_of(image.digest)?;
        let volumes = users.iter().filter_map(|user| user.strip_prefix("volume ")).map(str::to_owned).collect();
        Ok(Image {
            digest: image.digest.to_string(),
            versions: facts.versions(image.digest)?,
            bytes: image.bytes,
            stored_bytes: self.store.stored_bytes(&image.digest).unwrap_or(0),
            format: image.format.clone(),
            state: match image.state {
                ImageState::Corrupt => types::ImageState::Corrupt,
                _ => types::ImageState::Verified,
            },
            verified_at: image.verified_at,
            verity: image.verity,
            imported_at: image.imported_at,
            imported_by: image.imported_by.clone(),
            channels: facts.channels_at(image.digest)?,
            volumes,
            vms: facts.vms_on(image.digest)?,
        })
    }

    /// The images that the caller may see.
    pub fn list_images(&self, caller: &Caller) -> Result<Vec<Image>, Error> {
        Call::look(self, caller, "image.list", "image:*", |call| {
            self.catalog.read(|facts| {
                call.require_any(facts, "image")?;
                let mut seen = Vec::new();
                for image in facts.images()? {
                    if call.may(facts, Verb::Use, &object_of_image(facts, &image)?)? {
                        seen.push(self.view_image(facts, &image)?);
                    }
                }
                Ok(seen)
            })
        })
    }

    /// One image.
    pub fn show_image(&self, caller: &Caller, name: &str) -> Result<Image, Error> {
        Call::look(self, caller, "image.show", format!("image:{}", shown(name)), |call| {
            self.catalog.read(|facts| {
                let image = self.find_image_for(call, facts, name, Verb::Use)?;
                self.view_image(facts, &image)
            })
        })
    }

    /// An image that the caller may do `verb` with. Who may not see any is not told which there are.
    fn find_image_for(&self, call: &Call<'_>, facts: &Facts<'_>, name: &str, verb: Verb) -> Result<ImageRow, Error> {
        call.require_any(facts, "image")?;
        let image = find_image(facts, name)?;
        call.require(facts, verb, &object_of_image(facts, &image)?)?;
        Ok(image)
    }

    /// Starts to import a file of this host, which only those may ask for who could read any.
    pub fn import_path(self: &Arc<Self>, caller: &Caller, request: &types::ImportRequest) -> Result<Job, Error> {
        let options = ImportOptions::new(request.version.as_ref(), request.format.as_ref())?;
        Call::run(self, caller, "image.import", options.object(), |call| {
            call.require_admin("import a file by its path")?;
            let file = open_absolute(&request.path)?;
            let source = Source::file(file, request.path.clone()).with_format(options.format);
            self.start_import(caller, source, options)
        })
    }

    /// Sees that the caller may import, and gives what the contents go into.
    pub fn begin_upload(&self, caller: &Caller, query: &UploadQuery) -> Result<(Spool, ImportOptions), Error> {
        let options = ImportOptions::new(query.version.as_ref(), query.format.as_ref())?;
        Call::look(self, caller, "image.import", options.object(), |call| {
            let names = options.version.clone().map_or(vec![String::new()], |version| vec![version]);
            self.catalog.read(|facts| call.require(facts, Verb::Publish, &Object::Image(names)))?;
            Ok(self.store.spool()?)
        })
        .map(|spool| (spool, options))
    }

    /// Starts to import what was uploaded.
    pub fn import_upload(
        self: &Arc<Self>,
        caller: &Caller,
        spool: Spool,
        options: ImportOptions,
    ) -> Result<Job, Error> {
        Call::run(self, caller, "image.import", options.object(), |_| {
            let source = Source::spooled(spool.finish()?, "the upload").with_format(options.format);
            self.start_import(caller, source, options)
        })
    }

    fn start_import(self: &Arc<Self>, caller: &Caller, source: Source, options: ImportOptions) -> Result<Job, Error> {
        let (object, by) = (options.object(), caller.principal());
        self.start_job("image.import", object, by.clone(), move |host, running| {
            let version = options.version.as_deref();
            let digest = host.import(source, running, version, &by)?;
            host.event("image.imported", &format!("image:{digest}"), version.unwrap_or(""));
            host.warm_image(digest);
            Ok(digest.to_string())
        })
    }

    fn import(&self, source: Source, running: &Running, version: Option<&str>, by: &str) -> Result<Digest, Error> {
        let progress = |progress: Progress| running.progress(progress.done_bytes, progress.total_bytes);
        let mut row = None;
        // The row precedes the file, so that a daemon that dies in between knows what to take away again.
        let announce = |about: Announcement| {
            let image = ImageRow {
                digest: about.digest,
                bytes: about.bytes,
                format: about.format.to_string(),
                verity: false,
                state: ImageState::Importing,
                verified_at: now(),
                imported_at: now(),
                imported_by: by.to_owned(),
            };
            let noted = self.catalog.change(|facts| {
                if facts.image(image.digest)?.is_none_or(|there| there.state == ImageState::Removing) {
                    facts.put_image(&image)?;
                }
                Ok::<_, Error>(())
            });
            row = Some(image);
            noted.map_err(|error| std::io::Error::other(chain(&error)))
        };
        let imported = self.store.import(source, &progress, &running.cancelled, announce)?;
        let Some(row) = row else { return Err(Error::Store(StoreError::Cancelled)) };
        self.catalog.change(|facts| {
            facts.put_image(&ImageRow {
                verity: imported.verity,
                state: ImageState::Verified,
                verified_at: now(),
                ..row
            })?;
            if let Some(version) = version {
                facts.set_version(version, imported.digest)?;
            }
            Ok::<_, Error>(imported.digest)
        })
    }

    /// Has an image that is there now warmed, which nobody waits for.
    fn warm_image(&self, digest: Digest) {
        let store = self.store.clone();
        let warms = move || match store.warm(&digest) {
            Ok(tried) => log::debug!("image {digest} is {}", if tried { "in memory" } else { "not all in memory" }),
            Err(error) => log::debug!("image {digest} stays in memory as it is: {}", chain(&error)),
        };
        if let Err(error) = std::thread::Builder::new().name("warmer".to_owned()).spawn(warms) {
            log::debug!("image {digest} stays in memory as it is: {error}");
        }
    }

    /// Starts to read all of an image and see that it is what it was.
    pub fn verify_image(self: &Arc<Self>, caller: &Caller, name: &str) -> Result<Job, Error> {
        Call::run(self, caller, "image.verify", format!("image:{}", shown(name)), |call| {
            let image = self.catalog.read(|facts| self.find_image_for(call, facts, name, Verb::Use))?;
            let digest = image.digest;
            self.start_job("image.verify", format!("image:{digest}"), caller.principal(), move |host, running| {
                let progress = |progress: Progress| running.progress(progress.done_bytes, progress.total_bytes);
                match host.store.verify(&digest, &progress, &running.cancelled) {
                    Ok(()) => {
                        host.catalog.change(|facts| facts.set_image_state(digest, ImageState::Verified))?;
                        Ok(digest.to_string())
                    }
                    Err(error @ (StoreError::Corrupt { .. } | StoreError::WrongLength { .. })) => {
                        host.catalog.change(|facts| facts.set_image_state(digest, ImageState::Corrupt))?;
                        host.event("image.corrupt", &format!("image:{digest}"), &chain(&error));
                        Err(error.into())
                    }
                    Err(error) => Err(error.into()),
                }
            })
        })
    }

    /// An image's contents, for a caller to read, and how many bytes that is.
    pub fn image_content(&self, caller: &Caller, name: &str) -> Result<(File, u64), Error> {
        Call::run(self, caller, "image.content", format!("image:{}", shown(name)), |call| {
            let image = self.catalog.read(|facts| self.find_image_for(call, facts, name, Verb::Use))?;
            Ok((self.store.open_image(&image.digest, Some(image.bytes))?, image.bytes))
        })
    }

    /// Removes an image that nothing uses.
    pub fn remove_image(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        Call::run(self, caller, "image.rm", format!("image:{}", shown(name)), |call| {
            let digest = self.catalog.change(|facts| {
                let image = self.find_image_for(call, facts, name, Verb::Admin)?;
                let users = facts.users_of(image.digest)?;
                if !users.is_empty() {
                    let object = format!("image {}", image.digest);
                    return Err(Error::InUse { object, users, remedy: "move, rebuild or remove these first" });
                }
                facts.set_image_state(image.digest, ImageState::Removing)?;
                call.done(facts, image.digest.to_string())?;
                Ok(image.digest)
            })?;
            self.finish_removal(digest)
        })
    }

    /// Takes away the file and then the row of an image that is to go, or that was never finished.
    pub fn finish_removal(&self, digest: Digest) -> Result<(), Error> {
        match self.store.remove(&digest) {
            Ok(()) | Err(StoreError::Absent { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.catalog.change(|facts| facts.remove_image(digest))?)
    }
}

fn check_absolute(path: &str) -> Result<(), Error> {
    if Path::new(path).is_absolute() && !path.contains('\0') {
        return Ok(());
    }
    Err(Error::Invalid { field: "path", found: shown(path), expected: "an absolute path".to_owned() })
}

fn open_absolute(path: &str) -> Result<File, Error> {
    use std::os::unix::fs::OpenOptionsExt;
    check_absolute(path)?;
    // Without waiting for whoever writes to a pipe.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    // That it cannot be opened is for who named it to see to.
    let file = file.map_err(|error| Error::Invalid {
        field: "path",
        found: shown(path),
        expected: format!("a file that can be opened ({error})"),
    })?;
    let io = |source| Error::Io { action: "examine", path: shown(path), source };
    if !file.metadata().map_err(io)?.is_file() {
        return Err(Error::Invalid { field: "path", found: shown(path), expected: "a regular file".to_owned() });
    }
    Ok(file)
}
