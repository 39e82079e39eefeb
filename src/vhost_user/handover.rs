//! What a keeper hands over to itself when it executes a newer program in its place: [`State`], in memory that goes with it.
//!
//! Descriptors stay open and keep their numbers; everything else is written down. A program reads the states of its own version and of the
//! one before, so that a host is upgraded step by step; whether it can is found out ahead, by having it read the state ([`CHECK_ARGUMENT`]).
//!
//! ```text
//! magic (8) | version (4, little-endian) | the fields of State, as postcard writes them | those of Further
//! ```
//!
//! Knows no messages and no files but by number.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use serde::{Deserialize, Serialize};

use crate::sys::uring::Shape;
use crate::sys::{file, process, shared, socket};

use super::boot::History;
use super::device::SERIAL_BYTES;
use super::inflight::RegionShape;
use super::order::LogPlace;
use super::polling::POLL_DEFAULT;
use super::ring::RingPlace;
use crate::sys::guest::RegionPlace;

/// The argument by which the program knows that its descriptor 0 is the state of a keeper, which it is to be from now on.
pub const RESUME_ARGUMENT: &str = "--resume";
/// The argument by which it knows that it is to read that state and say whether it could.
pub const CHECK_ARGUMENT: &str = "--check-state";

const MAGIC: [u8; 8] = *b"PANDOKPR";
/// The version that this program writes. It reads this one and the one before.
const VERSION: u32 = 4;
/// Far above the largest: 128 regions and 256 rings.
const BYTES_MAX: u64 = 1 << 20;

/// Why a state cannot be handed over or taken over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// Something else.
    #[error("what is handed over is not the state of a keeper")]
    Magic,
    /// Of a program that is too old or too new.
    #[error("the state of the keeper has version {found}, and this program knows versions {} and {VERSION}", VERSION - 1)]
    Version { found: u32 },
    /// Cut off, or of another program.
    #[error("the state of the keeper cannot be read")]
    Decode(#[source] postcard::Error),
    /// The system said no.
    #[error("cannot {action}")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    /// The other program said no.
    #[error("the new program cannot take over: {0}")]
    Refused(String),
}

/// A descriptor that stays open, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept(RawFd);

impl Kept {
    /// Takes it over. To be called once for each, in the process that has been executed.
    pub fn take(self) -> Result<OwnedFd, HandoverError> {
        let system = |source| HandoverError::System { action: "take over a descriptor", source };
        socket::inherited(self.0).map_err(system)
    }
}

/// The descriptors that a state speaks of.
#[derive(Default)]
pub struct Keeping(Vec<RawFd>);

impl Keeping {
    /// Notes that a descriptor is to stay open.
    pub fn keep(&mut self, descriptor: &impl AsFd) -> Kept {
        let number = descriptor.as_fd().as_raw_fd();
        self.0.push(number);
        Kept(number)
    }
}

/// All that a keeper is.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Whether it has closed a sandbox; that one holds for the next program too.
    pub sandbox: bool,
    pub log_level: u8,
    pub boot: [u8; 16],
    /// Where front ends come from, and whether that is a listener.
    pub endpoint: Kept,
    pub endpoint_listens: bool,
    pub service: ServiceState,
    /// The front end that is connected.
    pub session: Option<SessionState>,
    /// What earlier versions do not have, or only in part.
    #[serde(skip)]
    pub further: Further,
}

/// What has come with later versions.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Further {
    /// From version 2 on.
    pub poll_us: u64,
    /// From version 3 on. A keeper that has begun without can have none any more.
    pub rings: Option<RingsState>,
    /// From version 4 on: the deltas of what is served and of what is staged, opened for their data to go past the page cache.
    pub directs: (Option<Kept>, Option<Kept>),
}

impl Default for Further {
    fn default() -> Further {
        Further { poll_us: POLL_DEFAULT.as_micros() as u64, rings: None, directs: (None, None) }
    }
}

/// By what workers have the kernel read and write meanwhile.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingsState {
    pub files: Vec<Kept>,
    pub shape: Shape,
}

/// What serves the volume.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceState {
    /// The worker's process and the conversation with it.
    pub worker: Option<(u32, Kept)>,
    pub elsewhere: bool,
    pub latch_told: bool,
    pub vitals: Kept,
    pub counters: Kept,
    pub inflight: Option<(RegionShape, Kept)>,
    pub part: PartState,
    pub staged: Option<PartState>,
    pub history: History,
    pub queues: u16,
    pub ring_size_max: u16,
    pub hold_ms: u64,
    /// What drivers have been told.
    pub bytes: u64,
    pub read_only: bool,
    pub cluster_bytes: u64,
    pub serial: [u8; SERIAL_BYTES],
    pub writeback: bool,
    pub name: String,
    /// The listener of controllers, and the one that talks.
    pub controllers: (Option<Kept>, Option<Kept>),
}

/// A volume's files.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartState {
    pub tag: String,
    /// The image, and what to call it in messages.
    pub base: Option<(Kept, String)>,
    pub delta: Option<DeltaState>,
    pub serial: Option<[u8; SERIAL_BYTES]>,
}

/// A delta.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeltaState {
    pub file: Kept,
    pub label: String,
    pub ephemeral: bool,
}

/// What a front end has said.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionState {
    pub stream: Kept,
    pub features: u64,
    pub protocol_features: u64,
    pub regions: Vec<(RegionPlace, Kept)>,
    pub inflight: Option<(RegionShape, Kept)>,
    pub log: Option<(LogPlace, Kept)>,
    pub is_new: bool,
    pub channel: Option<Kept>,
    pub rings: Vec<RingState>,
}

/// What it has said of a ring.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    pub place: RingPlace,
    pub placed: bool,
    pub used_in_log: Option<u64>,
    pub next_available: Option<u16>,
    pub has_base: bool,
    /// Kick, call and error.
    pub events: [Option<Kept>; 3],
    pub started: bool,
    pub enabled: bool,
    pub runs: bool,
    pub held_at: Option<(RingPlace, u16)>,
}

impl State {
    /// The state as bytes.
    pub fn encode(&self) -> Result<Vec<u8>, HandoverError> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        let bytes = postcard::to_extend(self, bytes).map_err(HandoverError::Decode)?;
        postcard::to_extend(&self.further, bytes).map_err(HandoverError::Decode)
    }

    /// Reads a state of this version or the one before.
    pub fn decode(bytes: &[u8]) -> Result<State, HandoverError> {
        let (magic, rest) = bytes.split_first_chunk::<8>().ok_or(HandoverError::Magic)?;
        let (version, rest) = rest.split_first_chunk::<4>().ok_or(HandoverError::Magic)?;
        if *magic != MAGIC {
            return Err(HandoverError::Magic);
        }
        let found = u32::from_le_bytes(*version);
        if !(VERSION - 1..=VERSION).contains(&found) {
            return Err(HandoverError::Version { found });
        }
        let (state, rest) = postcard::take_from_bytes(rest).map_err(HandoverError::Decode)?;
        let further = match found {
            VERSION => postcard::from_bytes(rest).map_err(HandoverError::Decode)?,
            _ => {
                let (poll_us, rings) = postcard::from_bytes(rest).map_err(HandoverError::Decode)?;
                Further { poll_us, rings, ..Further::default() }
            }
        };
        Ok(State { further, ..state })
    }

    /// Reads the state that descriptor 0 is.
    pub fn receive() -> Result<State, HandoverError> {
        let system = |source| HandoverError::System { action: "read the state of the keeper", source };
        // Its number is not to be anything else's.
        let memory = std::mem::ManuallyDrop::new(File::from(process::standard_input()));
        let len = file::len(&memory).map_err(system)?;
        if len > BYTES_MAX {
            return Err(HandoverError::Magic);
        }
        let mut bytes = vec![0; len as usize];
        file::read_at(&memory, crate::sys::buffers::Writable::from_mut_slice(&mut bytes), 0).map_err(system)?;
        State::decode(&bytes)
    }
}

/// Executes `program` in place of this one, to go on with `state`, if it can read that. Returns only when it cannot.
pub fn execute(program: BorrowedFd<'_>, state: &State, keeping: &Keeping, arguments: &[&str]) -> HandoverError {
    match try_execute(program, state, keeping, arguments) {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

fn try_execute(
    program: BorrowedFd<'_>,
    state: &State,
    keeping: &Keeping,
    arguments: &[&str],
) -> Result<std::convert::Infallible, HandoverError> {
    let system = |action| move |source| HandoverError::System { action, source };
    let bytes = state.encode()?;
    let memory = shared::create(c"pando-state", bytes.len() as u64).map_err(system("make memory for the state"))?;
    let written = file::write_at(&memory, &[crate::sys::buffers::Readable::from_slice(&bytes)], 0);
    written.map_err(system("write the state"))?;
    let copy = |memory: &File| memory.as_fd().try_clone_to_owned().map_err(system("copy a descriptor"));
    let with = |first| [&[first], arguments].concat();
    let status = process::execute_program(program, "pando-blk", &with(CHECK_ARGUMENT), copy(&memory)?)
        .and_then(|mut child| child.wait())
        .map_err(system("execute the new program"))?;
    if !status.success() {
        return Err(HandoverError::Refused(status.to_string()));
    }
    for number in &keeping.0 {
        process::keep_on_exec(*number, true).map_err(system("keep a descriptor"))?;
    }
    let source = process::become_program(program, "pando-blk", &with(RESUME_ARGUMENT), copy(&memory)?);
    for number in &keeping.0 {
        process::keep_on_exec(*number, false).map_err(system("keep a descriptor"))?;
    }
    Err(HandoverError::System { action: "execute the new program", source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_state_is_refused() {
        assert!(matches!(State::decode(b"PANDO"), Err(HandoverError::Magic)));
        assert!(matches!(State::decode(b"PANDODLT\x01\0\0\0"), Err(HandoverError::Magic)));
        assert!(matches!(State::decode(b"PANDOKPR\x09\0\0\0"), Err(HandoverError::Version { found: 9 })));
        assert!(matches!(State::decode(b"PANDOKPR\x01\0\0\0"), Err(HandoverError::Version { found: 1 })));
        assert!(matches!(State::decode(b"PANDOKPR\x03\0\0\0\xff"), Err(HandoverError::Decode(_))));
    }
}
