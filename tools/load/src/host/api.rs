//! The least of HTTP that it takes to ask the daemon for something: one request on one connection.
//!
//! Knows nothing of what is asked for. A client of its own, so that nothing else is measured with the daemon.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// How long the daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the daemon answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
}

impl Answer {
    /// Whether it is what was asked for.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// Why it is not.
    pub fn reason(&self) -> &str {
        self.body["detail"].as_str().unwrap_or("without a reason")
    }
}

/// Asks, and gives the answer; a failure when the daemon says that it is one.
pub fn call(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
    let answer = ask(socket, method, path, body)?;
    if !answer.is_success() {
        bail!("{method} {path}: {}, {}", answer.status, answer.reason());
    }
    Ok(answer.body)
}

/// Asks, and gives the answer, whatever it is; a failure when there is none.
pub fn ask(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Result<Answer> {
    let what = || format!("{method} {path}");
    let mut stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let body = body.map_or(String::new(), Value::to_string);
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: pando\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).with_context(what)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).with_context(what)?;
    let (status, body) = parse(&answer).with_context(what)?;
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).with_context(what)? };
    Ok(Answer { status, body })
}

/// The status and the body of an answer that has come to its end.
fn parse(answer: &[u8]) -> Result<(u16, Vec<u8>)> {
    const END_OF_HEAD: &[u8] = b"\r\n\r\n";
    let end = answer.windows(END_OF_HEAD.len()).position(|window| window == END_OF_HEAD).context("no head")?;
    let head = std::str::from_utf8(&answer[..end])?;
    let mut body = &answer[end + END_OF_HEAD.len()..];
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no status")?;
    if !head.to_lowercase().contains("transfer-encoding: chunked") {
        return Ok((status, body.to_vec()));
    }
    let mut whole = Vec::new();
    loop {
        let end = body.windows(2).position(|window| window == b"\r\n").context("no length of a chunk")?;
        let bytes = usize::from_str_radix(std::str::from_utf8(&body[..end])?, 16)?;
        if bytes == 0 {
            return Ok((status, whole));
        }
        whole.extend(body.get(end + 2..end + 2 + bytes).context("a chunk is cut off")?);
        body = body.get(end + 2 + bytes + 2..).context("a chunk is cut off")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        let (status, body) = parse(b"HTTP/1.1 204 No Content\r\nDate: now\r\n\r\n").unwrap();
        assert_eq!((status, body.as_slice()), (204, b"".as_slice()));
        let (status, body) = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").unwrap();
        assert_eq!((status, body.as_slice()), (200, b"{}".as_slice()));
        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n1\r\n]\r\n0\r\n\r\n";
        assert_eq!(parse(chunked).unwrap().1, b"[]");
        assert!(parse(&chunked[..chunked.len() - 8]).is_err());
        assert!(parse(b"HTTP/1.1 200 OK\r\n").is_err());
    }
}
