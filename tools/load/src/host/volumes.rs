//! Verbs of volumes, as a client of the daemon has them, and of their guests.

use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use serde_json::json;

use crate::device::{Device, Greeting, Setup};
use crate::host::daemon::Daemon;

/// Makes a `cow` volume over an image: of the image's size, or of so many bytes.
pub fn create(daemon: &Daemon, volume: &str, image: &str, bytes: Option<u64>) -> Result<()> {
    let request = json!({ "name": volume, "kind": "cow", "image": image, "bytes": bytes });
    daemon.call("POST", "/v1/volumes", Some(&request))?;
    Ok(())
}

/// Attaches a volume to a VM of the same name, and says where.
pub fn attach(daemon: &Daemon, volume: &str) -> Result<String> {
    let request = json!({ "volume": volume, "vm": volume });
    let answer = daemon.call("POST", "/v1/attachments", Some(&request))?;
    Ok(answer["socket"].as_str().context("an attachment has a socket")?.to_owned())
}

/// Becomes the guest of a volume, and starts its one queue.
pub fn connect(socket: &str) -> Result<Device> {
    let setup = Setup { queues: 1, queue_size: 256, area_bytes: 2 << 20, segment_bytes: None, indirect: true };
    let stream = UnixStream::connect(socket).with_context(|| socket.to_owned())?;
    Greeting::new(stream)?.start(&setup)
}
