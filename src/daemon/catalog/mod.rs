//! The catalog: what the daemon knows, in an SQLite database.
//!
//! Facts only: it starts no process, opens no image and decides nothing about who may. Every change is one transaction, durable when
//! it returns, so a daemon that dies at any instruction finds on its return what it had decided, and finishes or undoes the rest.
//! A file holds a table's rows and questions; whoever calls them holds a transaction.

mod attachments;
mod deployments;
mod groups;
mod images;
mod log;
mod schema;
mod volumes;

use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, Transaction, TransactionBehavior};

use crate::digest::Digest;

pub use attachments::{AttachmentRow, AttachmentState, NewAttachment};
pub use deployments::{DeploymentRow, TargetRow};
pub use images::{ChannelRow, ImageRow, ImageState, MoveRow};
pub use log::{AuditEntry, RECORDS_MAX};
pub use volumes::{DeltaRow, DeltaState, VolumeRow, VolumeState};

/// Why the catalog did not answer.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// SQLite refused.
    #[error("the daemon's database failed")]
    Sqlite(#[from] rusqlite::Error),
    /// Made by a newer daemon.
    #[error("{path} has version {found} and this daemon knows up to {known}: it was written by a newer pando; install that one again", known = schema::STEPS.len())]
    Newer { path: String, found: usize },
    /// What stands in it cannot be.
    #[error("the daemon's database holds '{found}' where {expected} was expected")]
    Content { expected: &'static str, found: String },
}

/// The database, open.
pub struct Catalog {
    connection: Mutex<Connection>,
}

/// What questions and changes are asked of: the inside of one transaction.
pub struct Facts<'c> {
    transaction: Transaction<'c>,
}

impl Catalog {
    /// Opens the database at `path`, makes it if there is none, and brings its tables up to date.
    pub fn open(path: &Path) -> Result<Catalog, CatalogError> {
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        // FULL: a committed transaction survives power loss. What a page cache of SQLite's own would hold, the kernel's does.
        connection.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA cache_size = -1024;",
        )?;
        connection.set_prepared_statement_cache_capacity(128);
        let found: usize = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if found > schema::STEPS.len() {
            return Err(CatalogError::Newer { path: path.display().to_string(), found });
        }
        for (index, step) in schema::STEPS.iter().enumerate().skip(found) {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute_batch(step)?;
            transaction.pragma_update(None, "user_version", index + 1)?;
            transaction.commit()?;
        }
        Ok(Catalog { connection: Mutex::new(connection) })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic inside a transaction has rolled it back.
        self.connection.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Asks; nothing is changed.
    pub fn read<T, E: From<CatalogError>>(&self, ask: impl FnOnce(&Facts<'_>) -> Result<T, E>) -> Result<T, E> {
        let mut connection = self.lock();
        let transaction = connection.transaction().map_err(CatalogError::from)?;
        ask(&Facts { transaction })
    }

    /// Asks and changes: all of it durable when this returns, or, with an error, none of it done.
    pub fn change<T, E: From<CatalogError>>(&self, change: impl FnOnce(&Facts<'_>) -> Result<T, E>) -> Result<T, E> {
        let mut connection = self.lock();
        let transaction =
            connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(CatalogError::from)?;
        let facts = Facts { transaction };
        let result = change(&facts)?;
        facts.transaction.commit().map_err(CatalogError::from)?;
        Ok(result)
    }
}

impl Facts<'_> {
    /// Adds one to a number that outlives the daemon, and gives it.
    pub fn count(&self, name: &str) -> Result<u64, CatalogError> {
        self.execute("INSERT INTO counter VALUES (?1, 1) ON CONFLICT (name) DO UPDATE SET value = value + 1", [name])?;
        self.one("SELECT value FROM counter WHERE name = ?1", [name], |row| row.get(0))?
            .ok_or_else(|| content("a number", name))
    }

    /// All rows that a question has for an answer.
    fn all<T>(
        &self,
        question: &str,
        parameters: impl rusqlite::Params,
        read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, CatalogError> {
        let mut statement = self.transaction.prepare_cached(question)?;
        let rows = statement.query_map(parameters, read)?.collect::<Result<_, _>>()?;
        Ok(rows)
    }

    /// The row that a question has for an answer, if it has one.
    fn one<T>(
        &self,
        question: &str,
        parameters: impl rusqlite::Params,
        read: impl FnOnce(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>, CatalogError> {
        use rusqlite::OptionalExtension;
        let mut statement = self.transaction.prepare_cached(question)?;
        Ok(statement.query_row(parameters, read).optional()?)
    }

    /// Makes a change, and says how many rows it touched.
    fn execute(&self, change: &str, parameters: impl rusqlite::Params) -> Result<usize, CatalogError> {
        Ok(self.transaction.prepare_cached(change)?.execute(parameters)?)
    }

    /// Adds a row, and gives its number.
    fn insert(&self, change: &str, parameters: impl rusqlite::Params) -> Result<i64, CatalogError> {
        Ok(self.transaction.prepare_cached(change)?.insert(parameters)?)
    }
}

/// Seconds since 1970.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_secs() as i64)
}

fn content(expected: &'static str, found: &str) -> CatalogError {
    CatalogError::Content { expected, found: found.to_owned() }
}

impl rusqlite::types::ToSql for Digest {
    fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
        Ok(self.to_string().into())
    }
}

impl rusqlite::types::FromSql for Digest {
    fn column_result(value: rusqlite::types::ValueRef<'_>) -> rusqlite::types::FromSqlResult<Digest> {
        value.as_str()?.parse().map_err(|error| rusqlite::types::FromSqlError::Other(Box::new(error)))
    }
}

/// Lets a type of ours stand in a column, as one word of a few.
macro_rules! words {
    ($type:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        impl $type {
            /// The word for it in the database.
            pub fn word(self) -> &'static str {
                match self { $($type::$variant => $word),+ }
            }
        }
        impl rusqlite::types::ToSql for $type {
            fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
                Ok(self.word().into())
            }
        }
        impl rusqlite::types::FromSql for $type {
            fn column_result(value: rusqlite::types::ValueRef<'_>) -> rusqlite::types::FromSqlResult<Self> {
                match value.as_str()? {
                    $($word => Ok($type::$variant),)+
                    other => Err(rusqlite::types::FromSqlError::Other(
                        format!("'{other}' is no {}", stringify!($type)).into(),
                    )),
                }
            }
        }
    };
}
use words;
