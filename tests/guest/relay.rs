//! A stand-in for a backend's socket: passes everything on, descriptors too, until its connection is cut.
//!
//! Knows where a message ends, and nothing of what it says. Cutting is what a front end sees of a network of sockets that breaks: both ends lose their
//! connection at once, and neither has said goodbye.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use tempfile::TempDir;

/// Descriptors that one message may have.
const DESCRIPTORS_MAX: usize = 32;
/// A message's request, flags, and length of the rest, four bytes each.
const HEAD_BYTES: usize = 12;
const LENGTH_AT: usize = 8;

/// The connections there have been, and both ends of the last one.
#[derive(Default)]
struct Connections {
    count: usize,
    last: Option<(UnixStream, UnixStream)>,
}

pub struct Relay {
    socket: PathBuf,
    connections: Arc<Mutex<Connections>>,
    _sockets: TempDir,
}

impl Relay {
    /// Listens, and connects to `target` for each who connects.
    pub fn new(target: &Path) -> Self {
        let sockets = TempDir::new().expect("the system's directory takes files");
        let socket = sockets.path().join("relay.sock");
        let listener = UnixListener::bind(&socket).expect("a socket can be bound");
        let connections = Arc::new(Mutex::new(Connections::default()));
        let (target, kept) = (target.to_owned(), Arc::clone(&connections));
        // Ends with the test's process: it has nothing that is not this one's.
        thread::spawn(move || {
            for front in listener.incoming() {
                let front = front.expect("a connection comes");
                let back = UnixStream::connect(&target).expect("the backend takes a connection");
                pass_on(&front, &back);
                pass_on(&back, &front);
                let mut connections = kept.lock().expect("no thread has panicked with it");
                connections.count += 1;
                connections.last = Some((front, back));
            }
        });
        Self { socket, connections, _sockets: sockets }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// How many connections there have been.
    pub fn connections(&self) -> usize {
        self.connections.lock().expect("no thread has panicked with it").count
    }

    /// Ends the connection that there is.
    pub fn cut(&self) {
        let last = self.connections.lock().expect("no thread has panicked with it").last.take();
        let (front, back) = last.expect("there is a connection to cut");
        for end in [front, back] {
            // The other end may have gone by itself.
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

fn pass_on(from: &UnixStream, to: &UnixStream) {
    let copy = |end: &UnixStream| end.try_clone().expect("a descriptor can be duplicated");
    let (from, to) = (copy(from), copy(to));
    thread::spawn(move || {
        while pass(&from, &to).is_some() {}
        for end in [&from, &to] {
            let _ = end.shutdown(Shutdown::Both);
        }
    });
}

/// Passes a message on, whole: its descriptors have to come with its first byte. `None` at the end.
fn pass(mut from: &UnixStream, mut to: &UnixStream) -> Option<()> {
    let mut message = vec![0; HEAD_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let head = &mut [IoSliceMut::new(&mut message)];
    let received = recvmsg(from, head, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?.bytes;
    let rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    let descriptors: Vec<OwnedFd> = rights.flatten().collect();
    if received == 0 {
        return None;
    }
    from.read_exact(&mut message[received..]).ok()?;
    let length = message[LENGTH_AT..].first_chunk().map(|length| u32::from_ne_bytes(*length))?;
    message.resize(HEAD_BYTES + length as usize, 0);
    from.read_exact(&mut message[HEAD_BYTES..]).ok()?;

    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)), "as many as came have room");
    }
    let sent = sendmsg(to, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL).ok()?;
    to.write_all(&message[sent..]).ok()
}
