//! The API's client: HTTP over a unix socket, one connection for each request.
//!
//! Knows how requests and answers travel, and not what they mean.

use std::fmt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use crate::daemon::api::types::Problem;

/// The longest answer that is kept in memory.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Bytes of an upload read at a time.
const PIECE_BYTES: usize = 256 << 10;

/// The daemon said no.
#[derive(Debug)]
pub struct Refused(Problem);

/// The daemon is not there.
#[derive(Debug)]
pub struct NotReachable {
    socket: PathBuf,
    source: std::io::Error,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.detail)
    }
}

impl std::error::Error for Refused {}

impl fmt::Display for NotReachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NotReachable { socket, source } = self;
        write!(
            f,
            "no daemon answers at {}: {source}; start one with 'systemctl start pando' or 'pando daemon', or say where it is with --api",
            socket.display()
        )
    }
}

impl std::error::Error for NotReachable {}

/// The exit code for an error, by what a script can do about it.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    if error.downcast_ref::<NotReachable>().is_some() {
        return ExitCode::from(7);
    }
    match error.downcast_ref::<Refused>().map(|refused| refused.0.status) {
        Some(404) => ExitCode::from(4),
        Some(403) => ExitCode::from(5),
        Some(409) => ExitCode::from(6),
        _ => ExitCode::FAILURE,
    }
}

type SentBody = BoxBody<Bytes, std::io::Error>;

/// A daemon to ask.
pub struct Client {
    socket: PathBuf,
    runtime: Runtime,
}

impl Client {
    /// Asks the daemon at a socket.
    pub fn new(socket: &Path) -> anyhow::Result<Client> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Client { socket: socket.to_owned(), runtime: runtime.context("cannot start")? })
    }

    /// Asks for something.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.ask(Method::GET, path, None)
    }

    /// Has something done.
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: Option<Value>) -> anyhow::Result<T> {
        self.ask(Method::POST, path, body)
    }

    /// Puts something in its place.
    pub fn put<T: DeserializeOwned>(&self, path: &str, body: Option<Value>) -> anyhow::Result<T> {
        self.ask(Method::PUT, path, body)
    }

    /// Takes something away; the answer, if there is one.
    pub fn delete(&self, path: &str) -> anyhow::Result<Option<Value>> {
        let answer = self.runtime.block_on(self.exchange(Method::DELETE, path, None))?;
        if answer.is_empty() { Ok(None) } else { decode(&answer).map(Some) }
    }

    fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<T> {
        decode(&self.runtime.block_on(self.exchange(method, path, body))?)
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Bytes> {
        let mut request = Request::builder().method(method).uri(path);
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let body: SentBody = Full::from(body).map_err(|never| match never {}).boxed();
        let response = self.send(request.body(body).context("cannot make the request")?).await?;
        collect(response).await
    }

    async fn send(&self, mut request: Request<SentBody>) -> anyhow::Result<Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| NotReachable { socket: self.socket.clone(), source })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .context("the daemon does not speak HTTP")?;
        // Its errors come out of the request too.
        tokio::spawn(connection);
        request.headers_mut().insert("host", hyper::header::HeaderValue::from_static("pando"));
        let response = sender.send_request(request).await.context("the daemon did not answer")?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let answer = collect(response).await?;
        match serde_json::from_slice::<Problem>(&answer) {
            Ok(problem) => Err(Refused(problem).into()),
            Err(_) => bail!("the daemon answered {status} and does not say why"),
        }
    }

    /// Sends all that `from` has as the body of a request. `sent` is told how many bytes more have been sent.
    pub fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        mut from: impl Read + Send + 'static,
        sent: impl Fn(u64) + Send + 'static,
    ) -> anyhow::Result<T> {
        let (pieces, mut waiting) = mpsc::channel::<std::io::Result<Frame<Bytes>>>(4);
        let reader = std::thread::spawn(move || {
            loop {
                let mut piece = vec![0; PIECE_BYTES];
                let read = match from.read(&mut piece) {
                    Ok(0) => return,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    read => read,
                };
                let is_broken = read.is_err();
                let frame = read.map(|len| {
                    piece.truncate(len);
                    sent(len as u64);
                    Frame::data(Bytes::from(piece))
                });
                // The daemon may want no more, and says why.
                if pieces.blocking_send(frame).is_err() || is_broken {
                    return;
                }
            }
        });
        let answer = self.runtime.block_on(async {
            let frames = futures_util::stream::poll_fn(move |context| waiting.poll_recv(context));
            let body: SentBody = BodyExt::boxed(StreamBody::new(frames));
            let request = Request::post(path).header("content-type", "application/octet-stream").body(body);
            let response = self.send(request.context("cannot make the request")?).await?;
            collect(response).await
        })?;
        // It has ended, or waits for input that nobody wants any more.
        drop(reader);
        decode(&answer)
    }

    /// Gives all that the answer has to `take`, piece by piece, until `take` says that it is enough.
    pub fn download(&self, path: &str, mut take: impl FnMut(&[u8]) -> anyhow::Result<bool>) -> anyhow::Result<()> {
        self.runtime.block_on(async {
            let body: SentBody = Full::default().map_err(|never| match never {}).boxed();
            let request = Request::get(path).body(body).context("cannot make the request")?;
            let mut body = self.send(request).await?.into_body();
            while let Some(frame) = body.frame().await {
                let frame = frame.context("the daemon's answer broke off")?;
                if let Some(data) = frame.data_ref()
                    && !take(data)?
                {
                    break;
                }
            }
            Ok(())
        })
    }
}

async fn collect(response: Response<Incoming>) -> anyhow::Result<Bytes> {
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    Ok(body.map_err(|error| anyhow::anyhow!("the daemon's answer broke off: {error}"))?.to_bytes())
}

fn decode<T: DeserializeOwned>(answer: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(answer).context("the daemon's answer cannot be read: it may be of another version")
}

/// A name as a part of a path.
pub fn part(name: &str) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~');
    let encode = |byte: u8| if plain(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    name.bytes().map(encode).collect()
}

/// A query, of what is there.
pub fn query(parts: &[(&str, Option<String>)]) -> String {
    let given = parts.iter().filter_map(|(name, value)| Some(format!("{name}={}", part(value.as_ref()?))));
    let given: Vec<String> = given.collect();
    if given.is_empty() { String::new() } else { format!("?{}", given.join("&")) }
}

/// Writes bytes to a file that is made sparse: zeros are left out.
pub struct SparseFile {
    file: std::fs::File,
    at: u64,
}

impl SparseFile {
    /// A new file; there must be none.
    pub fn create(path: &Path) -> std::io::Result<SparseFile> {
        Ok(SparseFile { file: std::fs::File::create_new(path)?, at: 0 })
    }

    /// Adds bytes.
    pub fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        const BLOCK_BYTES: u64 = 4096;
        let mut rest = bytes;
        while !rest.is_empty() {
            let to_boundary = (BLOCK_BYTES - self.at % BLOCK_BYTES) as usize;
            let (block, after) = rest.split_at(to_boundary.min(rest.len()));
            if block.iter().any(|byte| *byte != 0) {
                self.file.write_all_at(block, self.at)?;
            }
            self.at += block.len() as u64;
            rest = after;
        }
        Ok(())
    }

    /// Gives the file its length and makes it durable.
    pub fn finish(mut self) -> std::io::Result<()> {
        self.file.set_len(self.at)?;
        self.file.flush()?;
        self.file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_one_part_of_a_path() {
        assert_eq!(part("debian-12/stable"), "debian-12%2Fstable");
        assert_eq!(part("ä b?"), "%C3%A4%20b%3F");
        assert_eq!(query(&[("a", None), ("b", Some("1 2".to_owned()))]), "?b=1%202");
    }

    #[test]
    fn zeros_become_holes() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        let mut file = SparseFile::create(&path).unwrap();
        let bytes = [vec![0; 1 << 20], vec![7; 5000], vec![0; 1 << 20]].concat();
        bytes.chunks(777).for_each(|piece| file.write(piece).unwrap());
        file.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 64 << 10);
    }
}
