//! What has happened: events, the audit log, and jobs that outlived their daemon.

use crate::daemon::api::types::{AuditRecord, Event};

use super::{CatalogError, Facts, now};

/// Events that are kept; older ones go.
const EVENTS_MAX: i64 = 20_000;
/// Jobs that are kept; older ones go.
const JOBS_MAX: i64 = 1_000;
/// Records in one answer.
pub const RECORDS_MAX: u32 = 1_000;

/// A line for the audit log.
#[derive(Clone, Debug)]
pub struct AuditEntry {
    pub principal: String,
    pub process: u32,
    pub action: &'static str,
    pub object: String,
    pub outcome: &'static str,
    pub detail: String,
}

fn read_event(row: &rusqlite::Row<'_>) -> rusqlite::Result<Event> {
    Ok(Event {
        id: row.get("id")?,
        at: row.get("at")?,
        kind: row.get("kind")?,
        object: row.get("object")?,
        detail: row.get("detail")?,
    })
}

impl Facts<'_> {
    /// Notes an event, and gives its number.
    pub fn insert_event(&self, kind: &str, object: &str, detail: &str) -> Result<i64, CatalogError> {
        let id = self.insert(
            "INSERT INTO event (at, kind, object, detail) VALUES (?1, ?2, ?3, ?4)",
            rusqlite::params![now(), kind, object, detail],
        )?;
        self.execute("DELETE FROM event WHERE id <= ?1", [id - EVENTS_MAX])?;
        Ok(id)
    }

    /// The newest events behind `after`, the oldest of them first.
    pub fn events(&self, after: i64, limit: Option<u32>) -> Result<Vec<Event>, CatalogError> {
        let mut events = self.all(
            "SELECT * FROM event WHERE id > ?1 ORDER BY id DESC LIMIT ?2",
            rusqlite::params![after, limit.unwrap_or(RECORDS_MAX).min(RECORDS_MAX)],
            read_event,
        )?;
        events.reverse();
        Ok(events)
    }

    /// The oldest events behind `after`: what a follower has not seen.
    pub fn events_next(&self, after: i64) -> Result<Vec<Event>, CatalogError> {
        self.all(
            "SELECT * FROM event WHERE id > ?1 ORDER BY id LIMIT ?2",
            rusqlite::params![after, RECORDS_MAX],
            read_event,
        )
    }

    /// Adds to the audit log.
    pub fn insert_audit(&self, entry: &AuditEntry) -> Result<(), CatalogError> {
        self.execute(
            "INSERT INTO audit (at, principal, process, action, object, outcome, detail) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            rusqlite::params![
                now(),
                entry.principal,
                entry.process,
                entry.action,
                entry.object,
                entry.outcome,
                entry.detail
            ],
        )?;
        Ok(())
    }

    /// The audit log behind `after`: the oldest records of it first, or, without `after`, the newest.
    pub fn audit(&self, after: Option<i64>, limit: Option<u32>) -> Result<Vec<AuditRecord>, CatalogError> {
        let order = if after.is_some() { "ASC" } else { "DESC" };
        let mut records = self.all(
            &format!("SELECT * FROM audit WHERE id > ?1 ORDER BY id {order} LIMIT ?2"),
            rusqlite::params![after.unwrap_or(0), limit.unwrap_or(RECORDS_MAX).min(RECORDS_MAX)],
            |row| {
                Ok(AuditRecord {
                    id: row.get("id")?,
                    at: row.get("at")?,
                    principal: row.get("principal")?,
                    process: row.get("process")?,
                    action: row.get("action")?,
                    object: row.get("object")?,
                    outcome: row.get("outcome")?,
                    detail: row.get("detail")?,
                })
            },
        )?;
        records.sort_by_key(|record| record.id);
        Ok(records)
    }

    /// Notes a job that has begun, and gives its number.
    pub fn insert_job(&self, kind: &str, object: &str, by: &str) -> Result<i64, CatalogError> {
        let id = self.insert(
            "INSERT INTO job (kind, object, state, at, by) VALUES (?1, ?2, 'running', ?3, ?4)",
            rusqlite::params![kind, object, now(), by],
        )?;
        self.execute("DELETE FROM job WHERE id <= ?1", [id - JOBS_MAX])?;
        Ok(id)
    }

    /// Notes how a job ended.
    pub fn end_job(&self, id: i64, state: &str, result: Option<&str>, error: Option<&str>) -> Result<(), CatalogError> {
        self.execute(
            "UPDATE job SET state = ?2, result = ?3, error = ?4 WHERE id = ?1",
            rusqlite::params![id, state, result, error],
        )?;
        Ok(())
    }

    /// Ends the jobs of a daemon that is no more.
    pub fn end_jobs_left(&self) -> Result<usize, CatalogError> {
        self.execute(
            "UPDATE job SET state = 'failed', error = 'the daemon ended before it was done' WHERE state = 'running'",
            [],
        )
    }

    /// The jobs of the past, each as its number, kind, object, state, result, error, time and principal, the newest first.
    pub fn jobs(&self) -> Result<Vec<crate::daemon::api::types::Job>, CatalogError> {
        use crate::daemon::api::types::{Job, JobState};
        self.all("SELECT * FROM job ORDER BY id DESC LIMIT ?1", [JOBS_MAX], |row| {
            let state: String = row.get("state")?;
            Ok(Job {
                id: row.get("id")?,
                kind: row.get("kind")?,
                object: row.get("object")?,
                state: match state.as_str() {
                    "running" => JobState::Running,
                    "done" => JobState::Done,
                    "cancelled" => JobState::Cancelled,
                    _ => JobState::Failed,
                },
                done_bytes: 0,
                total_bytes: 0,
                eta_seconds: None,
                result: row.get("result")?,
                error: row.get("error")?,
                started_at: row.get("at")?,
                started_by: row.get("by")?,
            })
        })
    }
}
