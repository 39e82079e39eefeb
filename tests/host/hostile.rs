//! Clients that mean no good, and files that lie: a clear problem document, nothing half-made, no growth.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::daemon::{Daemon, change_file};
use crate::session::harness::private_bytes_of;

const IMAGE_BYTES: usize = 1 << 20;

#[test]
fn names_that_cannot_be_are_refused_and_near_ones_suggested() {
    let daemon = Daemon::new();
    daemon.import("debian-12.7", IMAGE_BYTES, 1);
    daemon.post("/v1/volumes", json!({ "name": "web-1", "kind": "read-only", "image": "debian-12.7" }));
    let long = "x".repeat(10_000);
    for name in ["", "a/b", "../../etc/passwd", ".", "a b", "a\0b", "ü", long.as_str()] {
        let request = json!({ "name": name, "kind": "read-only", "image": "debian-12.7" });
        let detail = daemon.ask("POST", "/v1/volumes", Some(&request)).problem(422, "invalid");
        assert!(detail.contains("expected up to 40") && detail.len() < 400, "{detail}");
        let request = json!({ "volume": "web-1", "vm": name });
        daemon.ask("POST", "/v1/attachments", Some(&request)).problem(422, "invalid");
    }
    let detail = daemon.ask("GET", "/v1/volumes/web-2", None).problem(404, "not-found");
    assert!(detail.contains("did you mean 'web-1'?"), "{detail}");
    let detail = daemon.ask("GET", "/v1/images/debian-12.8", None).problem(404, "not-found");
    assert!(detail.contains("did you mean 'debian-12.7'?"), "{detail}");
    daemon.ask("GET", &format!("/v1/volumes/{long}"), None).problem(404, "not-found");
    for channel in ["a//b", "%2Fa", "a%2F..%2Fb"] {
        let image = json!({ "image": "debian-12.7" });
        let answer = daemon.ask("PUT", &format!("/v1/channels/{channel}"), Some(&image));
        assert!(matches!(answer.status, 404 | 422), "{answer:?}");
    }
    assert_eq!(daemon.get("/v1/volumes").as_array().map(Vec::len), Some(1));
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let daemon = Daemon::new();
    let (_, digest) = daemon.import("os", IMAGE_BYTES, 1);
    let volume = |more: Value| {
        let mut request = json!({ "name": "v", "kind": "cow" });
        request.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        request
    };
    for more in [
        json!({}),
        json!({ "image": "os", "channel": "c" }),
        json!({ "kind": "blank" }),
        json!({ "kind": "blank", "bytes": 0 }),
        json!({ "kind": "blank", "bytes": 513 }),
        json!({ "kind": "blank", "bytes": u64::MAX }),
        json!({ "kind": "blank", "bytes": 1u64 << 47 }),
        json!({ "image": "os", "bytes": 512 }),
        json!({ "image": "os", "cluster_bytes": 3000 }),
        json!({ "kind": "read-only", "image": "os", "bytes": IMAGE_BYTES }),
        json!({ "kind": "read-only", "image": "os", "ephemeral": true }),
    ] {
        daemon.ask("POST", "/v1/volumes", Some(&volume(more))).problem(422, "invalid");
    }
    let malformed =
        |body: &str| daemon.send("POST", "/v1/volumes", "content-type: application/json\r\n", body.as_bytes());
    for body in [
        "",
        "{",
        "[]",
        "null",
        "{\"name\": 3}",
        "{\"name\":\"v\",\"kind\":\"tree\"}",
        "{\"name\":\"v\",\"kind\":\"cow\",\"more\":1}",
    ] {
        malformed(body).expect("an answer").problem(400, "malformed");
    }
    let deep = "[".repeat(60_000);
    malformed(&deep).expect("an answer").problem(400, "malformed");
    daemon.send("POST", "/v1/volumes", "", b"{}").expect("an answer").problem(415, "not-json");
    daemon.ask("PATCH", "/v1/volumes", None).problem(405, "method-not-allowed");
    daemon.ask("GET", "/v2/volumes", None).problem(404, "not-found");
    daemon.ask("GET", "/v1/audit?after=x", None).problem(400, "malformed");
    daemon.ask("GET", "/v1/jobs/x", None).problem(404, "not-found");
    daemon.ask("GET", &format!("/v1/images/{}", &digest[..7]), None).problem(404, "not-found");
    daemon.ask("GET", &format!("/v1/images/{}", &digest[..8]), None).ok();
    let image = |path: &str| json!({ "path": path, "version": "v" });
    daemon.ask("POST", "/v1/images", Some(&image("relative"))).problem(422, "invalid");
    daemon.ask("POST", "/v1/images", Some(&image("/dev/null"))).problem(422, "invalid");
    daemon.ask("POST", "/v1/images", Some(&image("/"))).problem(422, "invalid");
    daemon.ask("POST", "/v1/images", Some(&image("/nothing/there"))).problem(422, "invalid");
    daemon.ask("POST", "/v1/images", Some(&json!({ "path": "/x", "format": "floppy" }))).problem(422, "invalid");
    assert_eq!(daemon.get("/v1/volumes"), json!([]));
    assert!(daemon.delta_files().is_empty());
}

#[test]
fn a_body_of_a_gigabyte_is_not_read() {
    let daemon = Daemon::new();
    let before = private_bytes_of(daemon.process());
    let mut stream = UnixStream::connect(daemon.api()).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a limit");
    stream.set_write_timeout(Some(Duration::from_secs(20))).expect("a limit");
    let head = format!(
        "POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        1u64 << 30
    );
    stream.write_all(head.as_bytes()).expect("room");
    let mut answer = [0; 4096];
    let mut sent = 0;
    let piece = vec![b' '; 1 << 20];
    while sent < 1 << 30 {
        match stream.write(&piece) {
            Ok(0) | Err(_) => break,
            Ok(len) => sent += len,
        }
    }
    assert!(sent < 64 << 20, "{sent} bytes were taken");
    let len = stream.read(&mut answer).expect("an answer");
    let answer = String::from_utf8_lossy(&answer[..len]);
    assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains("about:blank#too-large"), "{answer}");
    let grown = private_bytes_of(daemon.process()).saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} bytes more");
    // Without a length it is known only when it is there.
    let chunk = format!("{:x}\r\n{}\r\n", 100_000, " ".repeat(100_000));
    let mut stream = UnixStream::connect(daemon.api()).expect("a connection");
    let head =
        "POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let _ = stream.write_all(format!("{head}{chunk}").as_bytes());
    let mut answer = [0; 4096];
    let len = stream.read(&mut answer).expect("an answer");
    assert!(answer[..len].starts_with(b"HTTP/1.1 413 "));
}

#[test]
fn who_is_refused_while_it_uploads_can_read_why() {
    let daemon = Daemon::new();
    let mut stream = UnixStream::connect(daemon.api()).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a limit");
    stream.set_write_timeout(Some(Duration::from_secs(20))).expect("a limit");
    let head = "POST /v1/images/upload?sha256=none HTTP/1.1\r\nhost: x\r\ncontent-length: 1073741824\r\n\r\n";
    stream.write_all(head.as_bytes()).expect("room");
    let mut answer = [0; 4096];
    let len = stream.read(&mut answer).expect("an answer");
    assert!(answer[..len].starts_with(b"HTTP/1.1 400 "), "{}", String::from_utf8_lossy(&answer[..len]));
    // A client in the middle of a write is not cut off: it would tell of a broken pipe, and not of the answer.
    stream.write_all(&vec![7; 4 << 20]).expect("what comes after the answer is still taken");
    // But not for ever.
    assert_eq!(stream.read(&mut answer).expect("the end"), 0);
}

#[test]
fn a_thousand_idle_connections_keep_nobody_out_for_long() {
    let daemon = Daemon::new();
    let before = private_bytes_of(daemon.process());
    let connections: Vec<_> = (0..1000).filter_map(|_| UnixStream::connect(daemon.api()).ok()).collect();
    assert!(connections.len() > 500, "{} connections", connections.len());
    // Further ones are told that there are too many.
    let begun = Instant::now();
    loop {
        let answer = daemon.ask("GET", "/v1/status", None);
        if answer.status == 503 {
            assert!(answer.problem(503, "busy").contains("128 connections"), "it says how many");
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "there is a limit");
    }
    let grown = private_bytes_of(daemon.process()).saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more");
    drop(connections);
    let begun = Instant::now();
    while daemon.ask("GET", "/v1/status", None).status != 200 {
        assert!(begun.elapsed() < Duration::from_secs(10), "room comes back");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn images_that_lie_leave_nothing() {
    let daemon = Daemon::new();
    let import = |name: &str, bytes: &[u8]| {
        let path = daemon.path(name);
        std::fs::write(&path, bytes).expect("a file");
        daemon.end_of(&daemon.post("/v1/images", json!({ "path": path })))
    };
    let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
    header.resize(104, 0xff);
    for (name, bytes) in
        [("odd", vec![1; 1000]), ("empty", Vec::new()), ("lying", header), ("vmdk", b"KDMV\x01".repeat(512))]
    {
        let job = import(name, &bytes);
        assert_eq!(job["state"], "failed", "{name}: {job}");
        assert!(job["error"].as_str().is_some_and(|error| error.contains(name)), "{job}");
    }
    assert!(daemon.image_files().is_empty());
    assert_eq!(daemon.get("/v1/images"), json!([]));

    // One whose file is changed behind the daemon's back is found out, and given to nobody.
    let (_, digest) = daemon.import("os", IMAGE_BYTES, 1);
    daemon.post("/v1/volumes", json!({ "name": "v", "kind": "read-only", "image": "os" }));
    let file = daemon.path(&format!("state/images/{digest}.raw"));
    change_file(&file, 1000, b"changed");
    let job = daemon.end_of(&daemon.post("/v1/images/os/verify", json!({})));
    assert_eq!(job["state"], "failed", "{job}");
    assert_eq!(daemon.get("/v1/images/os")["state"], "corrupt");
    let request = json!({ "volume": "v", "vm": "a" });
    daemon.ask("POST", "/v1/attachments", Some(&request)).problem(409, "wrong-state");
    assert_eq!(daemon.get("/v1/attachments"), json!([]));
    assert!(daemon.events_of(&format!("image:{digest}")).contains(&"image.corrupt".to_owned()));
}

#[test]
fn an_upload_that_breaks_off_leaves_nothing() {
    let daemon = Daemon::new();
    let mut stream = UnixStream::connect(daemon.api()).expect("a connection");
    let head = format!(
        "POST /v1/images/upload?version=half HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\ncontent-length: {IMAGE_BYTES}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).expect("room");
    stream.write_all(&vec![7; IMAGE_BYTES / 2]).expect("room");
    drop(stream);
    let answer = daemon.send(
        "POST",
        "/v1/images/upload?version=whole",
        "content-type: application/octet-stream\r\n",
        &vec![7; IMAGE_BYTES],
    );
    daemon.result_of(&answer.expect("an answer").ok());
    assert_eq!(daemon.image_files().len(), 1);
    assert_eq!(daemon.get("/v1/images")[0]["versions"], json!(["whole"]));
}
