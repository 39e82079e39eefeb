//! What a handler takes out of a request: bodies, queries, names in paths, and who calls. Whatever does not fit is a problem
//! document that says what was expected.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use crate::daemon::access::Caller;

use super::problem::Failure;

/// A body of JSON.
pub struct Input<T>(pub T);

/// A query.
pub struct Asked<T>(pub T);

/// The names in a path.
pub struct At<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Input<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Input<T>, Failure> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Input(value)),
            Err(JsonRejection::MissingJsonContentType(error)) => {
                Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "not-json", error.body_text()))
            }
            Err(error) if error.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(too_large()),
            Err(error) => Err(Failure::new(StatusCode::BAD_REQUEST, "malformed", error.body_text())),
        }
    }
}

/// A body that is longer than any that makes sense.
pub fn too_large() -> Failure {
    Failure::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "too-large",
        format!("the body is too long: expected at most {} bytes of JSON", super::BODY_BYTES_MAX),
    )
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Asked<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Asked<T>, Failure> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(Asked(value)),
            Err(error) => Err(Failure::new(StatusCode::BAD_REQUEST, "malformed", error.body_text())),
        }
    }
}

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for At<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<At<T>, Failure> {
        match Path::<T>::from_request_parts(parts, state).await {
            Ok(Path(value)) => Ok(At(value)),
            Err(error) => Err(Failure::new(StatusCode::NOT_FOUND, "not-found", error.body_text())),
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Caller, Failure> {
        // Put there by the server for each connection; without it nobody is anybody.
        let unknown = || Failure::new(StatusCode::FORBIDDEN, "denied", "it is not known who calls");
        parts.extensions.get::<Caller>().cloned().ok_or_else(unknown)
    }
}
