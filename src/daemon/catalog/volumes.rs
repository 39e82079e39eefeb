//! Volumes and the files of their deltas.

use rusqlite::Row;

use crate::daemon::api::types::VolumeKind;
use crate::digest::Digest;

use super::{CatalogError, Facts, now, words};

words!(VolumeKind { Cow = "cow", ReadOnly = "read-only", Blank = "blank" });

/// How a volume's row stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeState {
    /// Its first delta is being made.
    Creating,
    /// It is there.
    Ready,
    /// Its delta is about to go.
    Removing,
}

words!(VolumeState { Creating = "creating", Ready = "ready", Removing = "removing" });

/// A volume.
#[derive(Clone, Debug)]
pub struct VolumeRow {
    pub name: String,
    pub kind: VolumeKind,
    pub ephemeral: bool,
    pub channel: Option<String>,
    /// What the delta of a persistent `cow` volume was made on; none for others.
    pub image: Option<Digest>,
    /// What it is to be on; none for blank ones.
    pub target: Option<Digest>,
    /// Size as a guest sees it; none: the image's own.
    pub bytes: Option<u64>,
    pub cluster_bytes: u64,
    /// How long a write waits while the file system of its delta is full, in milliseconds; 0: it fails at once.
    pub hold_ms: u64,
    pub state: VolumeState,
    pub created_at: i64,
    pub created_by: String,
}

impl VolumeRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<VolumeRow> {
        Ok(VolumeRow {
            name: row.get("name")?,
            kind: row.get("kind")?,
            ephemeral: row.get("ephemeral")?,
            channel: row.get("channel")?,
            image: row.get("image")?,
            target: row.get("target")?,
            bytes: row.get("bytes")?,
            cluster_bytes: row.get("cluster_bytes")?,
            state: row.get("state")?,
            created_at: row.get("created_at")?,
            created_by: row.get("created_by")?,
            hold_ms: row.get("hold_ms")?,
        })
    }

    /// Whether its delta means nothing over another image and is to be kept: it stays where it is until it is rebuilt.
    pub fn stays(&self) -> bool {
        self.kind == VolumeKind::Cow && !self.ephemeral
    }

    /// Whether it has a delta.
    pub fn is_writable(&self) -> bool {
        self.kind != VolumeKind::ReadOnly
    }
}

/// How a delta's file stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaState {
    /// Being made.
    Making,
    /// The volume's.
    Current,
    /// The volume's from its VM's next boot on.
    Staged,
    /// About to go.
    Doomed,
}

words!(DeltaState { Making = "making", Current = "current", Staged = "staged", Doomed = "doomed" });

/// A delta's file.
#[derive(Clone, Debug)]
pub struct DeltaRow {
    pub id: i64,
    pub volume: String,
    pub image: Option<Digest>,
    pub state: DeltaState,
}

impl DeltaRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<DeltaRow> {
        Ok(DeltaRow {
            id: row.get("id")?,
            volume: row.get("volume")?,
            image: row.get("image")?,
            state: row.get("state")?,
        })
    }

    /// The name of its file: no two deltas ever have the same.
    pub fn file_name(&self) -> String {
        format!("{}.{}.delta", self.volume, self.id)
    }
}

impl Facts<'_> {
    /// A volume, whatever its state.
    pub fn volume(&self, name: &str) -> Result<Option<VolumeRow>, CatalogError> {
        self.one("SELECT * FROM volume WHERE name = ?1", [name], VolumeRow::read)
    }

    /// All volumes that are there.
    pub fn volumes(&self) -> Result<Vec<VolumeRow>, CatalogError> {
        self.all("SELECT * FROM volume WHERE state = 'ready' ORDER BY name", [], VolumeRow::read)
    }

    /// Volumes that are about to be there, or to go.
    pub fn volumes_half_done(&self) -> Result<Vec<VolumeRow>, CatalogError> {
        self.all("SELECT * FROM volume WHERE state <> 'ready'", [], VolumeRow::read)
    }

    /// The volumes that follow a channel.
    pub fn followers(&self, channel: &str) -> Result<Vec<VolumeRow>, CatalogError> {
        self.all(
            "SELECT * FROM volume WHERE channel = ?1 AND state = 'ready' ORDER BY name",
            [channel],
            VolumeRow::read,
        )
    }

    /// Notes a volume that is about to be there.
    pub fn insert_volume(&self, volume: &VolumeRow) -> Result<(), CatalogError> {
        self.execute(
            "INSERT INTO volume VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
            rusqlite::params![
                volume.name,
                volume.kind,
                volume.ephemeral,
                volume.channel,
                volume.image,
                volume.target,
                volume.bytes,
                volume.cluster_bytes,
                volume.state,
                now(),
                volume.created_by,
                volume.hold_ms
            ],
        )?;
        Ok(())
    }

    /// Notes how a volume stands.
    pub fn set_volume_state(&self, name: &str, state: VolumeState) -> Result<(), CatalogError> {
        self.execute("UPDATE volume SET state = ?2 WHERE name = ?1", rusqlite::params![name, state])?;
        Ok(())
    }

    /// Notes on which image a persistent `cow` volume's delta is.
    pub fn set_volume_image(&self, name: &str, image: Digest) -> Result<(), CatalogError> {
        self.execute("UPDATE volume SET image = ?2 WHERE name = ?1", rusqlite::params![name, image])?;
        Ok(())
    }

    /// Notes which image a volume is to be on.
    pub fn set_volume_target(&self, name: &str, target: Digest) -> Result<(), CatalogError> {
        self.execute("UPDATE volume SET target = ?2 WHERE name = ?1", rusqlite::params![name, target])?;
        Ok(())
    }

    /// Notes a volume's size.
    pub fn set_volume_bytes(&self, name: &str, bytes: u64) -> Result<(), CatalogError> {
        self.execute("UPDATE volume SET bytes = ?2 WHERE name = ?1", rusqlite::params![name, bytes])?;
        Ok(())
    }

    /// Forgets a volume, which has no delta and no attachment any more.
    pub fn remove_volume(&self, name: &str) -> Result<(), CatalogError> {
        self.execute("DELETE FROM volume WHERE name = ?1", [name])?;
        Ok(())
    }

    /// Notes the file of a delta that is about to be made.
    pub fn insert_delta(&self, volume: &str, image: Option<Digest>) -> Result<DeltaRow, CatalogError> {
        let id = self.insert(
            "INSERT INTO delta (volume, image, state) VALUES (?1, ?2, 'making')",
            rusqlite::params![volume, image],
        )?;
        Ok(DeltaRow { id, volume: volume.to_owned(), image, state: DeltaState::Making })
    }

    /// A volume's deltas.
    pub fn deltas(&self, volume: &str) -> Result<Vec<DeltaRow>, CatalogError> {
        self.all("SELECT * FROM delta WHERE volume = ?1 ORDER BY id", [volume], DeltaRow::read)
    }

    /// A volume's delta in a certain state: the newest of them.
    pub fn delta(&self, volume: &str, state: DeltaState) -> Result<Option<DeltaRow>, CatalogError> {
        self.one(
            "SELECT * FROM delta WHERE volume = ?1 AND state = ?2 ORDER BY id DESC LIMIT 1",
            rusqlite::params![volume, state],
            DeltaRow::read,
        )
    }

    /// All deltas.
    pub fn all_deltas(&self) -> Result<Vec<DeltaRow>, CatalogError> {
        self.all("SELECT * FROM delta ORDER BY id", [], DeltaRow::read)
    }

    /// Notes how a delta stands.
    pub fn set_delta_state(&self, id: i64, state: DeltaState) -> Result<(), CatalogError> {
        self.execute("UPDATE delta SET state = ?2 WHERE id = ?1", rusqlite::params![id, state])?;
        Ok(())
    }

    /// Makes a delta its volume's, and the one until now doomed.
    pub fn make_current(&self, delta: &DeltaRow) -> Result<(), CatalogError> {
        self.execute(
            "UPDATE delta SET state = CASE id WHEN ?2 THEN 'current' ELSE 'doomed' END \
             WHERE volume = ?1 AND (id = ?2 OR state = 'current')",
            rusqlite::params![delta.volume, delta.id],
        )?;
        Ok(())
    }

    /// Forgets a delta, whose file is gone.
    pub fn remove_delta(&self, id: i64) -> Result<(), CatalogError> {
        self.execute("DELETE FROM delta WHERE id = ?1", [id])?;
        Ok(())
    }
}
