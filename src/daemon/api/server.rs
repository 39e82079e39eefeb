//! The listener: connections, who is at their other end, and how many there may be.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tower_service::Service;

use crate::daemon::Host;
use crate::daemon::access::Caller;
use crate::sys::socket;

use super::problem::Failure;

/// Connections of one user at once, and of all whom nothing is known of.
const CONNECTIONS_PER_USER_MAX: usize = 128;
/// How long a client may take over a request's head, and leave a connection idle.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);
/// How long the rest of a body that nobody wants is taken, for its sender to see the answer.
const REST_PATIENCE: Duration = Duration::from_secs(2);
/// How many bytes of it.
const REST_BYTES_MAX: usize = 16 << 20;

/// The connections of each user.
#[derive(Clone, Default)]
struct Connections(Arc<Mutex<HashMap<u32, usize>>>);

/// One of them, for as long as it lasts.
struct Connection {
    connections: Connections,
    uid: u32,
}

impl Connections {
    fn enter(&self, uid: u32) -> Option<Connection> {
        let mut counts = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let count = counts.entry(uid).or_default();
        if *count >= CONNECTIONS_PER_USER_MAX {
            return None;
        }
        *count += 1;
        Some(Connection { connections: self.clone(), uid })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut counts = self.connections.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.uid);
            }
        }
    }
}

/// Answers the requests that come to a unix socket, each with its caller, until `end`.
pub async fn serve_unix(listener: UnixListener, host: Arc<Host>, end: impl Future<Output = ()>) {
    let router = super::router(Arc::clone(&host));
    let connections = Connections::default();
    let mut end = std::pin::pin!(end);
    loop {
        let accepted = tokio::select! {
            () = &mut end => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            // No descriptors left, most likely: some are given back soon.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let peer = match socket::peer(&stream) {
            Ok(peer) => peer,
            Err(error) => {
                log::warn!("a client of the API is unknown: {error}");
                continue;
            }
        };
        let caller = Caller { uid: peer.uid, gids: peer.gids, process: peer.process };
        match connections.enter(caller.uid) {
            Some(entered) => _ = tokio::spawn(serve_connection(stream, router.clone(), Some(caller), entered)),
            None => {
                host.connections_refused.fetch_add(1, Ordering::Relaxed);
                // All that is ever said on it: nothing is kept of a connection that there is no room for.
                let _ = stream.try_write(refusal().as_bytes());
            }
        }
    }
}

/// Answers the requests that come to a TCP port, whose callers nobody knows.
pub async fn serve_tcp(listener: TcpListener, router: Router) {
    let connections = Connections::default();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => match connections.enter(u32::MAX) {
                Some(entered) => _ = tokio::spawn(serve_connection(stream, router.clone(), None, entered)),
                None => _ = stream.try_write(refusal().as_bytes()),
            },
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// The answer to whoever has as many connections as there may be.
fn refusal() -> String {
    let detail = format!("this user has {CONNECTIONS_PER_USER_MAX} connections already: close some");
    let Failure(problem) = Failure::new(StatusCode::SERVICE_UNAVAILABLE, "busy", detail);
    let body = serde_json::to_string(&problem).unwrap_or_default();
    format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// A request's body. What is left of it when it is dropped is taken for a while and thrown away: a connection that
/// is closed while its client writes has the client report a broken pipe, and not the answer that tells it why.
struct Upload(Option<Incoming>);

impl hyper::body::Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        self.0.as_mut().map_or(Poll::Ready(None), |body| Pin::new(body).poll_frame(context))
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or_else(SizeHint::default, Incoming::size_hint)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(mut rest) = self.0.take().filter(|body| !hyper::body::Body::is_end_stream(body)) else { return };
        // Without a runtime the daemon ends, and its connections with it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let discard = async move {
                let mut bytes = 0;
                while let Some(Ok(frame)) = rest.frame().await
                    && bytes < REST_BYTES_MAX
                {
                    bytes += frame.data_ref().map_or(0, Bytes::len);
                }
            };
            runtime.spawn(tokio::time::timeout(REST_PATIENCE, discard));
        }
    }
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    caller: Option<Caller>,
    entered: Connection,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let mut router = router.clone();
        let mut request = request.map(|body| Body::new(Upload(Some(body))));
        if let Some(caller) = &caller {
            request.extensions_mut().insert(caller.clone());
        }
        async move { router.call(request).await }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_PATIENCE).max_buf_size(64 << 10);
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        log::debug!("a connection of the API ended: {error}");
    }
    drop(entered);
}
