//! The API: HTTP/JSON on a unix socket, one handler for each thing that can be asked for.
//!
//! Handlers only translate: a request into a call of [`Host`], what comes of it into JSON or a problem document. The OpenAPI document is made
//! of them and of [`types`]. Calls run on threads that may wait for disks and processes.

mod extract;
mod problem;
mod routes;
pub mod server;
mod stream;
pub mod types;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use super::Host;
use super::access::Caller;
use super::error::Error;
use problem::Failure;

/// The longest body of JSON that is read.
pub const BODY_BYTES_MAX: usize = 64 << 10;

/// What a handler gives.
type Answer<T> = Result<Json<T>, Failure>;

/// As JSON, what a call that may wait gives.
async fn call<T: Send + 'static>(
    host: Arc<Host>,
    caller: Caller,
    work: impl FnOnce(&Arc<Host>, &Caller) -> Result<T, Error> + Send + 'static,
) -> Answer<T> {
    run(host, caller, work).await.map(Json)
}

/// What a call that may wait gives.
async fn run<T: Send + 'static>(
    host: Arc<Host>,
    caller: Caller,
    work: impl FnOnce(&Arc<Host>, &Caller) -> Result<T, Error> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(move || work(&host, &caller)).await {
        Ok(result) => Ok(result?),
        Err(_) => {
            Err(Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "the request was not carried out to its end"))
        }
    }
}

/// The API.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Pando",
        description = "Images, channels, volumes and who has them, on one host. Served on a unix socket; the caller is who the kernel says."
    ),
    components(schemas(types::Problem))
)]
struct Document;

/// The API's routes, and the document about them.
fn routed() -> (Router<Arc<Host>>, utoipa::openapi::OpenApi) {
    let (router, mut document) =
        OpenApiRouter::with_openapi(Document::openapi()).merge(routes::all()).split_for_parts();
    describe_problems(&mut document);
    (router, document)
}

/// Lets every operation say that it may answer with a problem document.
fn describe_problems(document: &mut utoipa::openapi::OpenApi) {
    use utoipa::openapi::{Content, Ref, RefOr, ResponseBuilder};
    let schema = <types::Problem as utoipa::ToSchema>::name();
    let response = ResponseBuilder::new()
        .description("What went wrong (RFC 9457)")
        .content("application/problem+json", Content::new(Some(Ref::from_schema_name(schema))))
        .build();
    for path in document.paths.paths.values_mut() {
        let operations = [&mut path.get, &mut path.put, &mut path.post, &mut path.delete];
        for operation in operations.into_iter().flatten() {
            operation.responses.responses.insert("default".to_owned(), RefOr::T(response.clone()));
        }
    }
}

/// Everything that is served on the unix socket.
pub fn router(host: Arc<Host>) -> Router {
    let (router, document) = routed();
    let document = document.to_json().unwrap_or_default();
    let json = [(axum::http::header::CONTENT_TYPE, "application/json")];
    router
        .route("/openapi.json", get(move || async move { (json, document) }))
        .route("/metrics", get(metrics))
        .fallback(nothing_there)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(host)
}

/// What is served on a TCP port: what may be known to all who can reach it.
pub fn metrics_router(host: Arc<Host>) -> Router {
    Router::new().route("/metrics", get(metrics)).fallback(nothing_there).with_state(host)
}

async fn metrics(State(host): State<Arc<Host>>) -> Result<impl IntoResponse, Failure> {
    let text = tokio::task::spawn_blocking(move || host.metrics()).await;
    let failed = || Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "the metrics could not be collected");
    let text = text.map_err(|_| failed())??;
    Ok(([(axum::http::header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text))
}

async fn nothing_there(uri: axum::http::Uri) -> Failure {
    let path = super::names::shown(uri.path());
    Failure::new(
        StatusCode::NOT_FOUND,
        "not-found",
        format!("there is nothing at {path}; /openapi.json says what there is"),
    )
}

async fn no_such_method(method: axum::http::Method, uri: axum::http::Uri) -> Failure {
    let path = super::names::shown(uri.path());
    let detail = format!("{method} cannot be done with {path}; /openapi.json says what can");
    Failure::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", detail)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_operation_is_described() {
        let (_, document) = super::routed();
        let text = document.to_json().unwrap();
        for part in
            ["/v1/volumes/{name}/grow", "VolumeRequest", "\"Problem\":{", "application/problem+json", "\"default\""]
        {
            assert!(text.contains(part), "{part}");
        }
    }
}
