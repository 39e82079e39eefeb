//! [`Failure`]: what went wrong, as an RFC 9457 problem document.

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::daemon::backends::BackendError;
use crate::daemon::error::{Error, chain};
use crate::store::StoreError;

use super::types::Problem;

/// A request that was not answered with what was asked for.
#[derive(Debug)]
pub struct Failure(pub Problem);

impl Failure {
    /// A problem of a kind, with an explanation.
    pub fn new(status: StatusCode, kind: &'static str, detail: impl Into<String>) -> Failure {
        Failure(Problem {
            kind: format!("about:blank#{kind}"),
            title: kind.replace('-', " "),
            status: status.as_u16(),
            detail: within_reason(detail.into()),
        })
    }
}

/// An explanation that is as long as anybody reads: what a caller has sent may stand in it, and more than once.
fn within_reason(detail: String) -> String {
    const START_CHARS: usize = 500;
    const END_CHARS: usize = 300;
    let count = detail.chars().count();
    if count <= START_CHARS + END_CHARS {
        return detail;
    }
    let start: String = detail.chars().take(START_CHARS).collect();
    let end: String = detail.chars().skip(count - END_CHARS).collect();
    format!("{start} ... {end}")
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let (status, kind) = match &error {
            Error::NotFound { .. } | Error::Store(StoreError::Absent { .. }) => (StatusCode::NOT_FOUND, "not-found"),
            Error::Ambiguous { .. } => (StatusCode::CONFLICT, "ambiguous"),
            Error::Name { .. } | Error::Invalid { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "invalid"),
            Error::Denied { .. } | Error::NotAdmin { .. } => (StatusCode::FORBIDDEN, "denied"),
            Error::Exists { .. } => (StatusCode::CONFLICT, "exists"),
            Error::InUse { .. } => (StatusCode::CONFLICT, "in-use"),
            Error::State { .. } | Error::Backend(BackendError::TooMany { .. }) => (StatusCode::CONFLICT, "wrong-state"),
            Error::Busy { .. } => (StatusCode::SERVICE_UNAVAILABLE, "busy"),
            Error::Store(StoreError::Full { .. }) => (StatusCode::INSUFFICIENT_STORAGE, "disk-full"),
            Error::Delta(error) if error.is_full() => (StatusCode::INSUFFICIENT_STORAGE, "disk-full"),
            Error::Delta(_) => (StatusCode::CONFLICT, "delta"),
            Error::Store(_) | Error::Backend(_) | Error::Catalog(_) | Error::Io { .. } => {
                (StatusCode::INTERNAL_SERVER_ERROR, "failed")
            }
        };
        if status.is_server_error() {
            log::error!("{}", chain(&error));
        }
        Failure::new(status, kind, chain(&error))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, [(header::CONTENT_TYPE, "application/problem+json")], Json(self.0)).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::delta::OpenError;

    #[test]
    fn a_full_disk_is_told_apart() {
        let full = |kind: std::io::ErrorKind| {
            let source = std::io::Error::from(kind);
            let error = OpenError::Io { action: "write", file: "a.delta".to_owned(), offset: 0, source };
            Failure::from(Error::from(error)).0.status
        };
        assert_eq!(full(std::io::ErrorKind::StorageFull), 507);
        assert_eq!(full(std::io::ErrorKind::PermissionDenied), 409);
    }

    #[test]
    fn an_explanation_is_no_longer_than_anybody_reads() {
        let Failure(problem) =
            Failure::new(StatusCode::BAD_REQUEST, "malformed", "\u{20ac}".repeat(20_000) + " at the end");
        assert!(problem.detail.len() < 4096 && problem.detail.ends_with(" at the end"), "{}", problem.detail);
        let Failure(problem) = Failure::new(StatusCode::BAD_REQUEST, "malformed", "as it is");
        assert_eq!(problem.detail, "as it is");
    }
}
