//! [`FrontEnd`]: a connection on which any message can be sent, with any descriptors.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pando::sys::socket;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Messages.
pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const SET_VRING_ENABLE: u32 = 18;
pub const SET_BACKEND_REQ_FD: u32 = 21;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const GET_INFLIGHT_FD: u32 = 31;
pub const SET_INFLIGHT_FD: u32 = 32;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;
/// Behind the last message that there is.
pub const MESSAGES_END: u32 = 46;

/// The header's flags: version 1.
pub const VERSION: u32 = 1;
pub const NEED_REPLY: u32 = 1 << 3;

const HEADER_BYTES: usize = 12;
/// How long an answer may take. A keeper that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(15);

/// The bytes of a message.
pub fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    [&request.to_ne_bytes()[..], &flags.to_ne_bytes(), &(body.len() as u32).to_ne_bytes(), body].concat()
}

/// A body of numbers of 32 bits.
pub fn words(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

/// A body of numbers of 64 bits.
pub fn longs(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

/// What is said back.
pub struct Reply {
    pub request: u32,
    pub body: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

/// A connection.
pub struct FrontEnd {
    stream: UnixStream,
}

impl FrontEnd {
    /// Over a connection that is new.
    pub fn over(stream: UnixStream) -> FrontEnd {
        stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
        stream.set_write_timeout(Some(PATIENCE)).expect("a limit");
        FrontEnd { stream }
    }

    /// Sends bytes, with descriptors.
    pub fn send_bytes(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let numbers: Vec<_> = descriptors.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
        self.stream.send_with_fds(&[bytes], &numbers)?;
        Ok(())
    }

    /// The next answer.
    pub fn receive(&mut self) -> io::Result<Reply> {
        let mut header = [0; HEADER_BYTES];
        // Waits for it, and leaves it there: descriptors come with its first byte.
        socket::wait_readable([Some(std::os::fd::AsFd::as_fd(&self.stream))], PATIENCE.as_millis() as i32)?;
        let descriptors = socket::peek_descriptors(&self.stream, HEADER_BYTES, 32).map(|(found, _)| found);
        self.stream.read_exact(&mut header)?;
        let part = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut body = vec![0; part(8).min(1 << 16) as usize];
        self.stream.read_exact(&mut body)?;
        Ok(Reply { request: part(0), body, descriptors: descriptors.unwrap_or_default() })
    }

    /// Takes whatever has been answered, without waiting.
    pub fn forget_answers(&mut self) {
        let mut bytes = [0; 4096];
        while matches!(socket::bytes_waiting(&self.stream), Ok(1..)) {
            if !matches!(self.stream.read(&mut bytes), Ok(1..)) {
                break;
            }
        }
    }

    /// Says something that is fine, and sees that it is done.
    #[track_caller]
    pub fn say(&mut self, request: u32, body: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let bytes = message(request, VERSION | NEED_REPLY, body);
        self.send_bytes(&bytes, descriptors).expect("the backend listens");
        let reply = self.receive().expect("an answer");
        assert_eq!((reply.request, reply.body), (request, longs(&[0])), "message {request} is refused");
    }

    /// Says something that is fine, without an answer: one that is refused ends the connection, which [`FrontEnd::settle`] finds.
    #[track_caller]
    pub fn tell(&mut self, request: u32, body: &[u8], descriptors: &[BorrowedFd<'_>]) {
        self.send_bytes(&message(request, VERSION, body), descriptors).expect("the backend listens");
    }

    /// Waits until the backend has done all that it was told.
    #[track_caller]
    pub fn settle(&mut self) {
        self.ask_number(GET_FEATURES);
    }

    /// Asks something that is fine.
    #[track_caller]
    pub fn ask(&mut self, request: u32, body: &[u8]) -> Reply {
        self.send_bytes(&message(request, VERSION, body), &[]).expect("the backend listens");
        let reply = self.receive().expect("an answer");
        assert_eq!(reply.request, request);
        reply
    }

    /// Asks for a number.
    #[track_caller]
    pub fn ask_number(&mut self, request: u32) -> u64 {
        u64::from_ne_bytes(self.ask(request, &[]).body.try_into().expect("a number"))
    }
}
