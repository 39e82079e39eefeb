//! [`DeviceState`]: what one backend tells another through the front end, when a guest moves between them (`DEVICE_STATE`).
//!
//! Rings travel with the guest, and contents in the delta, so there is little to say: enough to notice that the other one has another disk.
//!
//! | field | bytes | meaning |
//! |---|---|---|
//! | magic | 8 | `PANDODEV` |
//! | version | 4 | 1 |
//! | read-only | 4 | 1: writes are refused; 0: they are not |
//! | bytes | 8 | size of the disk |
//! | serial | 20 | what GET_ID answers |
//!
//! Little-endian. Knows nothing of sessions or files.

use std::fs::File;
use std::io::{self, Read, Write};

use crate::sys::socket;

use super::device::SERIAL_BYTES;

const MAGIC: [u8; 8] = *b"PANDODEV";
const VERSION: u32 = 1;
const STATE_BYTES: usize = 8 + 4 + 4 + 8 + SERIAL_BYTES;

/// How long the other side of a transfer may take over what is there already or comes at once.
const PATIENCE_MS: i32 = 1000;

/// What a disk is to its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Size in bytes.
    pub bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What GET_ID answers.
    pub serial: [u8; SERIAL_BYTES],
}

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The other end of the pipe does not do its part.
    #[error("the device's state cannot be transferred: {what}")]
    Transfer {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    /// Not a state of such a device.
    #[error("the state that came is not one of a Pando device of version {VERSION}")]
    Format,
    /// The guest comes from another disk.
    #[error(
        "the guest comes from a disk of {expected} bytes{}, and this one has {found} bytes{}",
        refuses(*.expected_read_only),
        refuses(*.found_read_only)
    )]
    OtherDisk { expected: u64, expected_read_only: bool, found: u64, found_read_only: bool },
}

fn refuses(read_only: bool) -> &'static str {
    if read_only { " that refuses writes" } else { "" }
}

impl DeviceState {
    fn encode(&self) -> [u8; STATE_BYTES] {
        let mut bytes = Vec::with_capacity(STATE_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(u32::from(self.read_only).to_le_bytes());
        bytes.extend(self.bytes.to_le_bytes());
        bytes.extend(self.serial);
        bytes.try_into().expect("the fields have this length")
    }

    fn decode(bytes: &[u8]) -> Option<DeviceState> {
        let bytes: &[u8; STATE_BYTES] = bytes.try_into().ok()?;
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (serial, size) = (bytes[24..].try_into().ok()?, bytes[16..24].try_into().ok()?);
        let is_known = bytes[..8] == MAGIC && number(8) == VERSION && number(12) <= 1;
        is_known.then(|| DeviceState { bytes: u64::from_le_bytes(size), read_only: number(12) == 1, serial })
    }

    /// Writes it to the front end's pipe.
    pub fn send(&self, mut pipe: &File) -> Result<(), StateError> {
        let failed = |source| StateError::Transfer { what: "it cannot be written", source };
        if !socket::is_writable(pipe).map_err(failed)? {
            return Err(failed(io::ErrorKind::WouldBlock.into()));
        }
        pipe.write_all(&self.encode()).map_err(failed)
    }

    /// Reads the state that the front end has written to its pipe and closed, and sees that a guest of that state can go on here.
    pub fn check(&self, mut pipe: &File) -> Result<(), StateError> {
        let failed = |source| StateError::Transfer { what: "it cannot be read to its end", source };
        let mut bytes = Vec::new();
        loop {
            let [is_readable] =
                socket::wait_readable([Some(std::os::fd::AsFd::as_fd(pipe))], PATIENCE_MS).map_err(failed)?;
            if !is_readable {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            let mut more = [0; 256];
            match pipe.read(&mut more).map_err(failed)? {
                0 => break,
                count => bytes.extend_from_slice(&more[..count]),
            }
            if bytes.len() > STATE_BYTES {
                return Err(StateError::Format);
            }
        }
        let expected = DeviceState::decode(&bytes).ok_or(StateError::Format)?;
        if (expected.bytes, expected.read_only) != (self.bytes, self.read_only) {
            return Err(StateError::OtherDisk {
                expected: expected.bytes,
                expected_read_only: expected.read_only,
                found: self.bytes,
                found_read_only: self.read_only,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::device::serial_from;

    #[test]
    fn what_is_sent_is_understood_and_nothing_else() {
        let state = DeviceState { bytes: 1 << 30, read_only: false, serial: serial_from("disk") };
        assert_eq!(DeviceState::decode(&state.encode()), Some(state));
        for (at, value) in [(0, b'X'), (8, 2), (12, 2)] {
            let mut bytes = state.encode();
            bytes[at] = value;
            assert_eq!(DeviceState::decode(&bytes), None);
        }
        assert_eq!(DeviceState::decode(&state.encode()[1..]), None);
    }
}
