//! The handlers whose bodies have no bounds: images that come and go, and events as they happen.

use std::io;
use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt, stream};
use tokio::sync::mpsc;

use crate::daemon::Host;
use crate::daemon::access::Caller;
use crate::daemon::error::Error;
use crate::sys::buffers::Writable;
use crate::sys::file;

use super::extract::{Asked, At};
use super::problem::Failure;
use super::run;
use super::types::{Event, EventQuery, Job, UploadQuery};

/// Bytes of an image read at a time.
const PIECE_BYTES: usize = 256 << 10;
/// Pieces that wait between who reads and who writes.
const PIECES_WAITING: usize = 4;

/// Imports an image from the body of the request.
#[utoipa::path(post, path = "/v1/images/upload", params(UploadQuery),
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "The image"),
    responses((status = 202, description = "The body is here whole, and is being imported", body = Job)))]
pub async fn upload_image(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Asked(query): Asked<UploadQuery>,
    request: Request,
) -> Result<(StatusCode, Json<Job>), Failure> {
    let (mut spool, options) =
        run(Arc::clone(&host), caller.clone(), move |host, caller| host.begin_upload(caller, &query)).await?;
    let (pieces, mut waiting) = mpsc::channel::<Bytes>(PIECES_WAITING);
    // The disk is written to by a thread that may wait for it.
    let written = tokio::task::spawn_blocking(move || {
        while let Some(piece) = waiting.blocking_recv() {
            spool.write(&piece)?;
        }
        Ok::<_, Error>(spool)
    });
    let mut body = request.into_body().into_data_stream();
    let mut broken = None;
    while let Some(piece) = body.next().await {
        match piece {
            Ok(piece) => {
                if pieces.send(piece).await.is_err() {
                    // Nobody takes it any more: the disk is full, most likely, and its error comes below.
                    break;
                }
            }
            Err(error) => {
                broken = Some(error);
                break;
            }
        }
    }
    drop(pieces);
    let failed = || Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "the upload was not written to its end");
    let spool = written.await.map_err(|_| failed())??;
    if let Some(error) = broken {
        let detail = format!("the body ended before it was whole: {error}");
        return Err(Failure::new(StatusCode::BAD_REQUEST, "malformed", detail));
    }
    let job = run(host, caller, move |host, caller| host.import_upload(caller, spool, options)).await?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// An image's contents.
#[utoipa::path(get, path = "/v1/images/{image}/content",
    params(("image" = String, Path, description = "A version, a digest or its first digits")),
    responses((status = 200, description = "The contents", body = Vec<u8>, content_type = "application/octet-stream")))]
pub async fn image_content(
    State(host): State<Arc<Host>>,
    caller: Caller,
    At(image): At<String>,
) -> Result<Response, Failure> {
    let (file, bytes) = run(host, caller, move |host, caller| host.image_content(caller, &image)).await?;
    let (pieces, waiting) = mpsc::channel::<io::Result<Bytes>>(PIECES_WAITING);
    tokio::task::spawn_blocking(move || {
        let mut at = 0;
        while at < bytes {
            let mut piece = vec![0; PIECE_BYTES.min((bytes - at) as usize)];
            let read = file::read_at(&file, Writable::from_mut_slice(&mut piece), at);
            at += piece.len() as u64;
            let is_broken = read.is_err();
            // A client that is gone wants no more.
            if pieces.blocking_send(read.map(|()| piece.into())).is_err() || is_broken {
                return;
            }
        }
    });
    let headers =
        [(header::CONTENT_TYPE, "application/octet-stream".to_owned()), (header::CONTENT_LENGTH, bytes.to_string())];
    Ok((headers, Body::from_stream(received(waiting))).into_response())
}

fn received<T>(receiver: mpsc::Receiver<T>) -> impl Stream<Item = T> {
    stream::unfold(receiver, |mut receiver| async move { receiver.recv().await.map(|item| (item, receiver)) })
}

/// What has happened, or, with `follow`, what happens: a line of JSON for each event, without end.
#[utoipa::path(get, path = "/v1/events", params(EventQuery),
    responses((status = 200, description = "The events, the oldest first; as lines (application/x-ndjson) with `follow`", body = Vec<Event>)))]
pub async fn events(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Asked(query): Asked<EventQuery>,
) -> Result<Response, Failure> {
    let (after, limit) = (query.after, query.limit);
    if !query.follow {
        let events = run(host, caller, move |host, caller| host.list_events(caller, after, limit)).await?;
        return Ok(Json(events).into_response());
    }
    let mut changed = host.events();
    // Without a number, from now on.
    let newest = *changed.borrow_and_update();
    run(Arc::clone(&host), caller, move |host, caller| host.list_events(caller, Some(newest), Some(0))).await?;
    let lines = stream::unfold((host, changed, after.unwrap_or(newest)), |(host, mut changed, mut seen)| async move {
        loop {
            let shared = Arc::clone(&host);
            let next = tokio::task::spawn_blocking(move || shared.next_events(seen)).await;
            // A database that fails ends the answer; the log says why.
            let events = next.ok()?.ok()?;
            if let Some(last) = events.last() {
                seen = last.id;
                let lines: String =
                    events.iter().filter_map(|event| Some(serde_json::to_string(event).ok()? + "\n")).collect();
                return Some((Ok::<_, io::Error>(Bytes::from(lines)), (host, changed, seen)));
            }
            changed.changed().await.ok()?;
        }
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}
