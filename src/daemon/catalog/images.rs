//! Images, the versions that name them, and the channels that point to them.

use rusqlite::Row;

use crate::digest::Digest;

use super::{CatalogError, Facts, now, words};

/// How an image's row stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageState {
    /// Its file is about to appear.
    Importing,
    /// Its file is there and was seen to be whole.
    Verified,
    /// Its file was found not to have its digest.
    Corrupt,
    /// Its file is about to go.
    Removing,
}

words!(ImageState { Importing = "importing", Verified = "verified", Corrupt = "corrupt", Removing = "removing" });

/// An image.
#[derive(Clone, Debug)]
pub struct ImageRow {
    pub digest: Digest,
    pub bytes: u64,
    pub format: String,
    pub verity: bool,
    pub state: ImageState,
    pub verified_at: i64,
    pub imported_at: i64,
    pub imported_by: String,
}

impl ImageRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<ImageRow> {
        Ok(ImageRow {
            digest: row.get("digest")?,
            bytes: row.get("bytes")?,
            format: row.get("format")?,
            verity: row.get("verity")?,
            state: row.get("state")?,
            verified_at: row.get("verified_at")?,
            imported_at: row.get("imported_at")?,
            imported_by: row.get("imported_by")?,
        })
    }
}

/// A channel.
#[derive(Clone, Debug)]
pub struct ChannelRow {
    pub name: String,
    pub image: Digest,
    pub moved_at: i64,
    pub moved_by: String,
}

impl ChannelRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<ChannelRow> {
        Ok(ChannelRow {
            name: row.get("name")?,
            image: row.get("image")?,
            moved_at: row.get("moved_at")?,
            moved_by: row.get("moved_by")?,
        })
    }
}

/// One move of a channel. Its images may be gone by now.
#[derive(Clone, Debug)]
pub struct MoveRow {
    pub id: i64,
    pub action: String,
    pub image: Digest,
    pub previous: Option<Digest>,
    pub version: Option<String>,
    pub at: i64,
    pub by: String,
}

impl MoveRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<MoveRow> {
        Ok(MoveRow {
            id: row.get("id")?,
            action: row.get("action")?,
            image: row.get("image")?,
            previous: row.get("previous")?,
            version: row.get("version")?,
            at: row.get("at")?,
            by: row.get("by")?,
        })
    }
}

impl Facts<'_> {
    /// The image with this digest, whatever its state.
    pub fn image(&self, digest: Digest) -> Result<Option<ImageRow>, CatalogError> {
        self.one("SELECT * FROM image WHERE digest = ?1", [digest], ImageRow::read)
    }

    /// All images that are there.
    pub fn images(&self) -> Result<Vec<ImageRow>, CatalogError> {
        self.all(
            "SELECT * FROM image WHERE state IN ('verified', 'corrupt') ORDER BY imported_at, digest",
            [],
            ImageRow::read,
        )
    }

    /// Images whose files are about to appear or to go.
    pub fn images_half_done(&self) -> Result<Vec<ImageRow>, CatalogError> {
        self.all("SELECT * FROM image WHERE state IN ('importing', 'removing')", [], ImageRow::read)
    }

    /// The images that a version or the first digits of a digest name.
    pub fn images_named(&self, name: &str) -> Result<Vec<Digest>, CatalogError> {
        let by_version =
            self.all("SELECT image FROM version WHERE name = ?1", [name], |row| row.get::<_, Digest>(0))?;
        let is_prefix = name.len() >= 8 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !by_version.is_empty() || !is_prefix {
            return Ok(by_version);
        }
        self.all(
            "SELECT digest FROM image WHERE substr(digest, 1, length(?1)) = lower(?1) AND state IN ('verified', 'corrupt') LIMIT 2",
            [name],
            |row| row.get(0),
        )
    }

    /// Notes an image, or what has changed about it.
    pub fn put_image(&self, image: &ImageRow) -> Result<(), CatalogError> {
        self.execute(
            "INSERT INTO image VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (digest) DO UPDATE SET \
             verity = excluded.verity, state = excluded.state, verified_at = excluded.verified_at",
            rusqlite::params![
                image.digest,
                image.bytes,
                image.format,
                image.verity,
                image.state,
                image.verified_at,
                image.imported_at,
                image.imported_by
            ],
        )?;
        Ok(())
    }

    /// Notes how an image stands.
    pub fn set_image_state(&self, digest: Digest, state: ImageState) -> Result<(), CatalogError> {
        let verified_at = (state == ImageState::Verified).then(now);
        self.execute(
            "UPDATE image SET state = ?2, verified_at = coalesce(?3, verified_at) WHERE digest = ?1",
            rusqlite::params![digest, state, verified_at],
        )?;
        Ok(())
    }

    /// Forgets an image and its versions.
    pub fn remove_image(&self, digest: Digest) -> Result<(), CatalogError> {
        self.execute("DELETE FROM image WHERE digest = ?1", [digest])?;
        Ok(())
    }

    /// The versions that name an image, the oldest first.
    pub fn versions(&self, digest: Digest) -> Result<Vec<String>, CatalogError> {
        self.all("SELECT name FROM version WHERE image = ?1 ORDER BY at, name", [digest], |row| row.get(0))
    }

    /// All versions.
    pub fn all_versions(&self) -> Result<Vec<String>, CatalogError> {
        self.all("SELECT name FROM version ORDER BY name", [], |row| row.get(0))
    }

    /// Lets a version name this image from now on.
    pub fn set_version(&self, name: &str, digest: Digest) -> Result<(), CatalogError> {
        self.execute(
            "INSERT INTO version VALUES (?1, ?2, ?3) ON CONFLICT (name) DO UPDATE SET image = excluded.image, at = excluded.at",
            rusqlite::params![name, digest, now()],
        )?;
        Ok(())
    }

    /// What uses an image, each as `volume web-1`; empty when it may go.
    pub fn users_of(&self, digest: Digest) -> Result<Vec<String>, CatalogError> {
        self.all(
            "SELECT 'channel ' || name FROM channel WHERE image = ?1 \
             UNION SELECT 'volume ' || name FROM volume WHERE image = ?1 OR target = ?1 \
             UNION SELECT 'volume ' || volume FROM delta WHERE image = ?1 \
             UNION SELECT 'VM ' || vm FROM attachment WHERE image = ?1 OR staged = ?1 \
             UNION SELECT 'VM ' || vm FROM placement WHERE target = ?1",
            [digest],
            |row| row.get(0),
        )
    }

    /// The channels that point to an image.
    pub fn channels_at(&self, digest: Digest) -> Result<Vec<String>, CatalogError> {
        self.all("SELECT name FROM channel WHERE image = ?1 ORDER BY name", [digest], |row| row.get(0))
    }

    /// A channel.
    pub fn channel(&self, name: &str) -> Result<Option<ChannelRow>, CatalogError> {
        self.one("SELECT * FROM channel WHERE name = ?1", [name], ChannelRow::read)
    }

    /// All channels.
    pub fn channels(&self) -> Result<Vec<ChannelRow>, CatalogError> {
        self.all("SELECT * FROM channel ORDER BY name", [], ChannelRow::read)
    }

    /// Points a channel to an image and notes that in its history, as a `set` or a `rollback`.
    pub fn move_channel(&self, name: &str, image: Digest, by: &str, action: &str) -> Result<(), CatalogError> {
        let previous = self.channel(name)?.map(|channel| channel.image);
        self.execute(
            "INSERT INTO channel VALUES (?1, ?2, ?3, ?4) ON CONFLICT (name) DO UPDATE SET \
             image = excluded.image, moved_at = excluded.moved_at, moved_by = excluded.moved_by",
            rusqlite::params![name, image, now(), by],
        )?;
        let version = self.versions(image)?.pop();
        self.execute(
            "INSERT INTO channel_move (channel, action, image, previous, version, at, by) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            rusqlite::params![name, action, image, previous, version, now(), by],
        )?;
        Ok(())
    }

    /// A channel's moves, the newest first.
    pub fn moves(&self, channel: &str) -> Result<Vec<MoveRow>, CatalogError> {
        self.all("SELECT * FROM channel_move WHERE channel = ?1 ORDER BY id DESC LIMIT 1000", [channel], MoveRow::read)
    }

    /// Forgets a channel; its history stays in the audit log.
    pub fn remove_channel(&self, name: &str) -> Result<(), CatalogError> {
        self.execute("DELETE FROM channel_move WHERE channel = ?1", [name])?;
        self.execute("DELETE FROM channel WHERE name = ?1", [name])?;
        Ok(())
    }
}
