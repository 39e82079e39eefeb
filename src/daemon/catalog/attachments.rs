//! Attachments, and placements: which VM a volume belongs to.

use rusqlite::Row;

use crate::block::DeltaCache;
use crate::daemon::api::types::Role;
use crate::digest::Digest;

use super::{CatalogError, Facts, content, now, words};

/// How an attachment stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachmentState {
    /// Its backend is being started; nobody has been told of it yet.
    Starting,
    /// Its backend serves, or is to be started again.
    Running,
    /// Its backend died too often.
    Failed,
    /// Its backend is being stopped.
    Stopping,
}

words!(AttachmentState { Starting = "starting", Running = "running", Failed = "failed", Stopping = "stopping" });

/// A volume served to a VM.
#[derive(Clone, Debug)]
pub struct AttachmentRow {
    pub id: i64,
    pub vm: String,
    pub volume: String,
    pub role: Option<Role>,
    pub serial: String,
    pub read_only: bool,
    pub queues: u16,
    pub kernel_from_vmm: bool,
    pub delta_cache: DeltaCache,
    pub image: Option<Digest>,
    pub staged: Option<Digest>,
    pub previous: Option<Digest>,
    pub state: AttachmentState,
    pub error: Option<String>,
    pub restarts: u64,
    /// Whose the front ends' socket is: user and group.
    pub owner: (u32, u32),
    /// Whom its backend runs as, if it has a user of its own.
    pub backend_uid: Option<u32>,
    pub at: i64,
    pub by: String,
}

/// What an attachment is made of.
pub struct NewAttachment {
    pub vm: String,
    pub volume: String,
    pub role: Option<Role>,
    pub serial: String,
    pub read_only: bool,
    pub queues: u16,
    pub kernel_from_vmm: bool,
    pub delta_cache: DeltaCache,
    pub image: Option<Digest>,
    pub owner: (u32, u32),
    pub by: String,
}

/// A volume's place at a VM.
#[derive(Clone, Debug)]
pub struct Placement {
    pub vm: String,
    pub volume: String,
    pub role: Option<Role>,
    /// What a deployment wants this VM to have, in place of the volume's own target.
    pub target: Option<Digest>,
}

fn role_word(role: &Option<Role>) -> Option<String> {
    role.as_ref().map(|role| match role {
        Role::Os => "os".to_owned(),
        Role::Private => "private".to_owned(),
        Role::Addon(name) => format!("addon-{name}"),
    })
}

fn role_of(row: &Row<'_>) -> rusqlite::Result<Option<Role>> {
    let word: Option<String> = row.get("role")?;
    word.map(|word| match word.as_str() {
        "os" => Ok(Role::Os),
        "private" => Ok(Role::Private),
        other => other.strip_prefix("addon-").map(|name| Role::Addon(name.to_owned())).ok_or_else(|| {
            rusqlite::Error::FromSqlConversionFailure(
                0,
                rusqlite::types::Type::Text,
                Box::new(content("a role", other)),
            )
        }),
    })
    .transpose()
}

impl AttachmentRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<AttachmentRow> {
        Ok(AttachmentRow {
            id: row.get("id")?,
            vm: row.get("vm")?,
            volume: row.get("volume")?,
            role: role_of(row)?,
            serial: row.get("serial")?,
            read_only: row.get("read_only")?,
            queues: row.get("queues")?,
            kernel_from_vmm: row.get("kernel_from_vmm")?,
            delta_cache: if row.get("direct")? { DeltaCache::Direct } else { DeltaCache::Writeback },
            image: row.get("image")?,
            staged: row.get("staged")?,
            previous: row.get("previous")?,
            state: row.get("state")?,
            error: row.get("error")?,
            restarts: row.get("restarts")?,
            owner: (row.get("owner_uid")?, row.get("owner_gid")?),
            backend_uid: row.get("backend_uid")?,
            at: row.get("at")?,
            by: row.get("by")?,
        })
    }
}

impl Placement {
    fn read(row: &Row<'_>) -> rusqlite::Result<Placement> {
        Ok(Placement {
            vm: row.get("vm")?,
            volume: row.get("volume")?,
            role: role_of(row)?,
            target: row.get("target")?,
        })
    }
}

impl Facts<'_> {
    /// An attachment.
    pub fn attachment(&self, vm: &str, volume: &str) -> Result<Option<AttachmentRow>, CatalogError> {
        self.one("SELECT * FROM attachment WHERE vm = ?1 AND volume = ?2", [vm, volume], AttachmentRow::read)
    }

    /// An attachment, by its number.
    pub fn attachment_by_id(&self, id: i64) -> Result<Option<AttachmentRow>, CatalogError> {
        self.one("SELECT * FROM attachment WHERE id = ?1", [id], AttachmentRow::read)
    }

    /// All attachments, in whatever state.
    pub fn attachments(&self) -> Result<Vec<AttachmentRow>, CatalogError> {
        self.all("SELECT * FROM attachment ORDER BY vm, volume", [], AttachmentRow::read)
    }

    /// Who has a volume, by their names.
    pub fn attachments_of(&self, volume: &str) -> Result<Vec<AttachmentRow>, CatalogError> {
        self.all("SELECT * FROM attachment WHERE volume = ?1 ORDER BY vm", [volume], AttachmentRow::read)
    }

    /// The VMs that run from an image.
    pub fn vms_on(&self, image: Digest) -> Result<Vec<String>, CatalogError> {
        self.all("SELECT DISTINCT vm FROM attachment WHERE image = ?1 ORDER BY vm", [image], |row| row.get(0))
    }

    /// Notes an attachment whose backend is about to be started.
    pub fn insert_attachment(&self, new: &NewAttachment) -> Result<i64, CatalogError> {
        self.insert(
            "INSERT INTO attachment (vm, volume, role, serial, read_only, queues, kernel_from_vmm, direct, image, state, at, by, owner_uid, owner_gid) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 'starting', ?10, ?11, ?12, ?13)",
            rusqlite::params![
                new.vm,
                new.volume,
                role_word(&new.role),
                new.serial,
                new.read_only,
                new.queues,
                new.kernel_from_vmm,
                new.delta_cache == DeltaCache::Direct,
                new.image,
                now(),
                new.by,
                new.owner.0,
                new.owner.1
            ],
        )
    }

    /// Notes how an attachment stands, and why.
    pub fn set_attachment_state(
        &self,
        id: i64,
        state: AttachmentState,
        error: Option<&str>,
    ) -> Result<(), CatalogError> {
        self.execute(
            "UPDATE attachment SET state = ?2, error = ?3 WHERE id = ?1",
            rusqlite::params![id, state, error],
        )?;
        Ok(())
    }

    /// Notes what comes next.
    pub fn set_staged(&self, id: i64, staged: Option<Digest>) -> Result<(), CatalogError> {
        self.execute("UPDATE attachment SET staged = ?2 WHERE id = ?1", rusqlite::params![id, staged])?;
        Ok(())
    }

    /// Notes that what was staged is served now.
    pub fn set_switched(&self, id: i64, image: Digest) -> Result<(), CatalogError> {
        self.execute(
            "UPDATE attachment SET previous = image, image = ?2, staged = NULL, error = NULL WHERE id = ?1",
            rusqlite::params![id, image],
        )?;
        Ok(())
    }

    /// Notes that a backend was started again.
    pub fn count_restart(&self, id: i64) -> Result<(), CatalogError> {
        self.execute("UPDATE attachment SET restarts = restarts + 1 WHERE id = ?1", [id])?;
        Ok(())
    }

    /// Whether a user is some backend's own.
    pub fn is_backend_uid(&self, uid: u32) -> Result<bool, CatalogError> {
        let found = self.one("SELECT 1 FROM attachment WHERE backend_uid = ?1", [uid], |_| Ok(()))?;
        Ok(found.is_some())
    }

    /// Notes whom an attachment's backend runs as.
    pub fn set_backend_uid(&self, id: i64, uid: Option<u32>) -> Result<(), CatalogError> {
        self.execute("UPDATE attachment SET backend_uid = ?2 WHERE id = ?1", rusqlite::params![id, uid])?;
        Ok(())
    }

    /// Forgets an attachment.
    pub fn remove_attachment(&self, id: i64) -> Result<(), CatalogError> {
        self.execute("DELETE FROM attachment WHERE id = ?1", [id])?;
        Ok(())
    }

    /// Notes that a volume belongs to a VM; a volume with a delta belongs to one at a time.
    pub fn place(&self, vm: &str, volume: &str, role: &Option<Role>, alone: bool) -> Result<(), CatalogError> {
        if alone {
            self.execute("DELETE FROM placement WHERE volume = ?1 AND vm <> ?2", [volume, vm])?;
        }
        self.execute(
            "INSERT INTO placement (vm, volume, role) VALUES (?1, ?2, ?3) \
             ON CONFLICT (vm, volume) DO UPDATE SET role = excluded.role",
            rusqlite::params![vm, volume, role_word(role)],
        )?;
        Ok(())
    }

    /// A volume's place at a VM.
    pub fn placement(&self, vm: &str, volume: &str) -> Result<Option<Placement>, CatalogError> {
        self.one("SELECT * FROM placement WHERE vm = ?1 AND volume = ?2", [vm, volume], Placement::read)
    }

    /// The VMs that a volume belongs to.
    pub fn placements_of(&self, volume: &str) -> Result<Vec<Placement>, CatalogError> {
        self.all("SELECT * FROM placement WHERE volume = ?1 ORDER BY vm", [volume], Placement::read)
    }

    /// The volumes of a VM.
    pub fn placements_at(&self, vm: &str) -> Result<Vec<Placement>, CatalogError> {
        self.all("SELECT * FROM placement WHERE vm = ?1 ORDER BY volume", [vm], Placement::read)
    }

    /// Notes what a deployment wants a VM to have.
    pub fn set_placement_target(&self, vm: &str, volume: &str, target: Option<Digest>) -> Result<(), CatalogError> {
        self.execute(
            "UPDATE placement SET target = ?3 WHERE vm = ?1 AND volume = ?2",
            rusqlite::params![vm, volume, target],
        )?;
        Ok(())
    }

    /// Forgets what deployments wanted of a volume: a later instruction has another target for all its VMs.
    pub fn clear_placement_targets(&self, volume: &str) -> Result<(), CatalogError> {
        self.execute("UPDATE placement SET target = NULL WHERE volume = ?1", [volume])?;
        Ok(())
    }
}
