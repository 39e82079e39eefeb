//! [`Error`]: why the daemon did not do what it was asked to, by what a caller can do about it.

use std::io;

use crate::block::delta::OpenError;
use crate::store::StoreError;

use super::backends::BackendError;
use super::catalog::CatalogError;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such thing, or the caller may not know of it.
    #[error("there is no {kind} '{name}'{}", meant(.nearest))]
    NotFound { kind: &'static str, name: String, nearest: Option<String> },
    /// The first digits of a digest fit several images.
    #[error("'{name}' is the beginning of several images' digests: give more digits")]
    Ambiguous { name: String },
    /// A name that cannot be one.
    #[error("'{found}' cannot be the name of a {kind}: expected {expected}")]
    Name { kind: &'static str, found: String, expected: &'static str },
    /// Something else about the request.
    #[error("{field} is {found}: expected {expected}")]
    Invalid { field: &'static str, found: String, expected: String },
    /// The caller has no grant for it.
    #[error(
        "{principal} may not {verb} {object}: this needs the grant '{verb}' on it, which an administrator gives with 'pando group grant'"
    )]
    Denied { principal: String, verb: &'static str, object: String },
    /// The caller is no administrator.
    #[error("{principal} may not {what}: only root and the daemon's own user may")]
    NotAdmin { principal: String, what: &'static str },
    /// There is one already.
    #[error("there is a {kind} '{name}' already")]
    Exists { kind: &'static str, name: String },
    /// Something uses it.
    #[error("{object} is in use by {}: {remedy}", .users.join(", "))]
    InUse { object: String, users: Vec<String>, remedy: &'static str },
    /// It is not in a state in which this can be done.
    #[error("{object} {found}: {remedy}")]
    State { object: String, found: String, remedy: &'static str },
    /// The daemon has as much to do as it takes on.
    #[error("{what}: try again later")]
    Busy { what: &'static str },
    /// Images at rest.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A delta.
    #[error(transparent)]
    Delta(#[from] OpenError),
    /// A backend.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The database.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The system.
    #[error("cannot {action} {path}")]
    Io {
        action: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
}

fn meant(nearest: &Option<String>) -> String {
    nearest.as_ref().map_or(String::new(), |name| format!("; did you mean '{name}'?"))
}

/// An error and its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.ends_with(&cause) { text } else { text + ": " + &cause }
    })
}
