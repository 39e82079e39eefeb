//! Deployments and their targets.

use rusqlite::Row;

use crate::daemon::api::types::DeployState;
use crate::digest::Digest;

use super::{CatalogError, Facts, now, words};

words!(DeployState {
    Staged = "staged",
    Active = "active",
    NeedsRebuild = "needs-rebuild",
    Failed = "failed",
    Superseded = "superseded",
    Aborted = "aborted",
    Removed = "removed",
});

/// A deployment.
#[derive(Clone, Debug)]
pub struct DeploymentRow {
    pub id: i64,
    pub image: Digest,
    pub channel: Option<String>,
    pub group: String,
    pub state: String,
    pub at: i64,
    pub by: String,
}

impl DeploymentRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<DeploymentRow> {
        Ok(DeploymentRow {
            id: row.get("id")?,
            image: row.get("image")?,
            channel: row.get("channel")?,
            group: row.get("grp")?,
            state: row.get("state")?,
            at: row.get("at")?,
            by: row.get("by")?,
        })
    }
}

/// One volume of a deployment.
#[derive(Clone, Debug)]
pub struct TargetRow {
    pub deployment: i64,
    pub vm: String,
    pub volume: String,
    pub state: DeployState,
    pub error: Option<String>,
    /// What the placement's own target was before.
    pub previous_target: Option<Digest>,
    /// What the VM had before.
    pub previous: Option<Digest>,
}

impl TargetRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<TargetRow> {
        Ok(TargetRow {
            deployment: row.get("deployment")?,
            vm: row.get("vm")?,
            volume: row.get("volume")?,
            state: row.get("state")?,
            error: row.get("error")?,
            previous_target: row.get("previous_target")?,
            previous: row.get("previous")?,
        })
    }

    /// Whether it may still come to have the image.
    pub fn is_open(&self) -> bool {
        matches!(self.state, DeployState::Staged | DeployState::NeedsRebuild | DeployState::Failed)
    }
}

const OPEN: &str = "state IN ('staged', 'needs-rebuild', 'failed')";

impl Facts<'_> {
    /// Notes a deployment.
    pub fn insert_deployment(
        &self,
        image: Digest,
        channel: Option<&str>,
        group: &str,
        by: &str,
    ) -> Result<i64, CatalogError> {
        self.insert(
            "INSERT INTO deployment (image, channel, grp, state, at, by) VALUES (?1, ?2, ?3, 'rolling', ?4, ?5)",
            rusqlite::params![image, channel, group, now(), by],
        )
    }

    /// Notes one of its targets.
    pub fn insert_target(&self, target: &TargetRow) -> Result<(), CatalogError> {
        self.execute(
            "INSERT INTO deployment_target VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            rusqlite::params![
                target.deployment,
                target.vm,
                target.volume,
                target.state,
                target.error,
                target.previous_target,
                target.previous
            ],
        )?;
        Ok(())
    }

    /// A deployment.
    pub fn deployment(&self, id: i64) -> Result<Option<DeploymentRow>, CatalogError> {
        self.one("SELECT * FROM deployment WHERE id = ?1", [id], DeploymentRow::read)
    }

    /// The newest thousand deployments, the newest first.
    pub fn deployments(&self) -> Result<Vec<DeploymentRow>, CatalogError> {
        self.all("SELECT * FROM deployment ORDER BY id DESC LIMIT 1000", [], DeploymentRow::read)
    }

    /// A deployment's targets.
    pub fn targets(&self, deployment: i64) -> Result<Vec<TargetRow>, CatalogError> {
        self.all(
            "SELECT * FROM deployment_target WHERE deployment = ?1 ORDER BY vm, volume",
            [deployment],
            TargetRow::read,
        )
    }

    /// Notes how the open targets of a volume stand, at one VM or at all of them, that were to have a certain image.
    pub fn settle_targets(
        &self,
        vm: Option<&str>,
        volume: &str,
        image: Digest,
        state: DeployState,
        error: Option<&str>,
    ) -> Result<(), CatalogError> {
        self.execute(
            &format!(
                "UPDATE deployment_target SET state = ?4, error = ?5 WHERE volume = ?2 AND (?1 IS NULL OR vm = ?1) AND {OPEN} \
                 AND deployment IN (SELECT id FROM deployment WHERE image = ?3 AND state = 'rolling')"
            ),
            rusqlite::params![vm, volume, image, state, error],
        )?;
        self.close_deployments()
    }

    /// A later instruction has another target for a volume, at one VM or at all of them: open targets that it replaces are settled. The
    /// caller ends the deployments that have none left ([`Facts::close_deployments`]), once its own is complete.
    pub fn supersede_targets(&self, vm: Option<&str>, volume: &str) -> Result<(), CatalogError> {
        self.execute(
            &format!(
                "UPDATE deployment_target SET state = 'superseded' WHERE volume = ?2 AND (?1 IS NULL OR vm = ?1) AND {OPEN}"
            ),
            rusqlite::params![vm, volume],
        )?;
        Ok(())
    }

    /// Settles the open targets of a volume that is removed.
    pub fn remove_targets(&self, volume: &str) -> Result<(), CatalogError> {
        self.execute(
            &format!("UPDATE deployment_target SET state = 'removed' WHERE volume = ?1 AND {OPEN}"),
            [volume],
        )?;
        self.close_deployments()
    }

    /// Notes how one target stands.
    pub fn set_target_state(&self, target: &TargetRow, state: DeployState) -> Result<(), CatalogError> {
        self.execute(
            "UPDATE deployment_target SET state = ?4 WHERE deployment = ?1 AND vm = ?2 AND volume = ?3",
            rusqlite::params![target.deployment, target.vm, target.volume, state],
        )?;
        Ok(())
    }

    /// Notes how a deployment stands.
    pub fn set_deployment_state(&self, id: i64, state: &str) -> Result<(), CatalogError> {
        self.execute("UPDATE deployment SET state = ?2 WHERE id = ?1", rusqlite::params![id, state])?;
        Ok(())
    }

    /// Ends the deployments that have no open target.
    pub fn close_deployments(&self) -> Result<(), CatalogError> {
        self.execute(
            &format!(
                "UPDATE deployment SET state = 'done' WHERE state = 'rolling' AND NOT EXISTS \
                 (SELECT 1 FROM deployment_target WHERE deployment_target.deployment = deployment.id AND deployment_target.{OPEN})"
            ),
            [],
        )?;
        Ok(())
    }
}
