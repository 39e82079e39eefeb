//! [`RawFrontEnd`]: messages as bytes, for what a proper front end never sends.

use std::io::Read;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Requests, by their numbers in the protocol.
pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const RESET_OWNER: u32 = 4;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const GET_INFLIGHT_FD: u32 = 31;
pub const ADD_MEM_REG: u32 = 37;

/// The header's flags: version 1.
pub const VERSION: u32 = 1;
pub const NEED_REPLY: u32 = 1 << 3;

const HEADER_BYTES: usize = 12;

/// A connection on which anything can be sent.
pub struct RawFrontEnd {
    pub stream: UnixStream,
}

/// The bytes of a message.
pub fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let len = body.len() as u32;
    [&request.to_ne_bytes()[..], &flags.to_ne_bytes(), &len.to_ne_bytes(), body].concat()
}

/// The body that says an index and a number.
pub fn state(index: u32, number: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&index.to_ne_bytes());
    bytes[4..].copy_from_slice(&number.to_ne_bytes());
    bytes
}

/// The body that says a region of memory, as ADD_MEM_REG has it.
pub fn region(guest_address: u64, bytes: u64, user_address: u64, offset: u64) -> Vec<u8> {
    [0, guest_address, bytes, user_address, offset].iter().flat_map(|number: &u64| number.to_ne_bytes()).collect()
}

impl RawFrontEnd {
    /// Sends bytes, with descriptors.
    pub fn send_bytes(&self, bytes: &[u8], descriptors: &[RawFd]) -> std::io::Result<()> {
        self.stream.send_with_fds(&[bytes], descriptors)?;
        Ok(())
    }

    /// Sends a message.
    #[track_caller]
    pub fn send(&self, request: u32, body: &[u8], descriptors: &[RawFd]) {
        self.send_bytes(&message(request, VERSION, body), descriptors).expect("the backend listens");
    }

    /// The answer's body.
    #[track_caller]
    pub fn receive(&mut self) -> Vec<u8> {
        let mut header = [0; HEADER_BYTES];
        self.stream.read_exact(&mut header).expect("an answer");
        let len = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        let mut body = vec![0; len as usize];
        self.stream.read_exact(&mut body).expect("all of an answer");
        body
    }

    /// Sends a message, and gives its answer, which is a number.
    #[track_caller]
    pub fn ask(&mut self, request: u32) -> u64 {
        self.send(request, &[], &[]);
        u64::from_ne_bytes(self.receive().try_into().expect("a number"))
    }

    /// Says all that comes before memory and rings.
    #[track_caller]
    pub fn negotiate(&mut self) {
        let features = self.ask(GET_FEATURES);
        let protocol = self.ask(GET_PROTOCOL_FEATURES);
        self.send(SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[]);
        self.send(SET_OWNER, &[], &[]);
        self.send(SET_FEATURES, &features.to_ne_bytes(), &[]);
    }

    /// Whether the backend ends the connection, in a time.
    pub fn is_ended_within(&mut self, limit: Duration) -> bool {
        self.stream.set_read_timeout(Some(limit)).expect("a time limit");
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
