//! One virtio-blk request (virtio 1.3, section 5.2.6): read from its buffers, checked once, and carried out on a volume.
//!
//! The header, the data and the status may be spread over the buffers in any way. Whatever is wrong with a request is an answer
//! to the driver: I/O error or unsupported.

use virtio_bindings::virtio_blk;

use crate::block::cached::Patience;
use crate::block::{self, Batch, Volume};
use crate::sys::buffers::{Readable, Writable, total_len_readable, total_len_writable};
use crate::sys::guard::Fault;
use crate::sys::guest::GuestMemory;
use crate::units::{is_whole_sectors, sectors_to_bytes};

use super::counters::Kind;
use super::device::{RANGE_SECTORS_MAX, RANGES_MAX, SERIAL_BYTES};
use super::ring::Chain;

pub(super) const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
/// Bytes of data in one request. Far above what drivers send; a chain may name the same memory many times.
const DATA_BYTES_MAX: u64 = 256 << 20;

/// What a driver can be told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Status {
    Ok = virtio_blk::VIRTIO_BLK_S_OK as u8,
    IoError = virtio_blk::VIRTIO_BLK_S_IOERR as u8,
    Unsupported = virtio_blk::VIRTIO_BLK_S_UNSUPP as u8,
}

/// Why a request got another answer than "ok".
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// There is no place for a status, so there is no answer.
    #[error("the request has no writable byte for its status")]
    NoStatus,
    /// Not all of a header.
    #[error("the request has {len} readable bytes: expected a header of 16")]
    Header { len: u64 },
    /// A type that does not exist or was not offered.
    #[error("request type {kind} is not supported")]
    Kind { kind: u32 },
    /// An amount of data that cannot be.
    #[error("{len} bytes of data: expected {expected}")]
    DataLength { len: u64, expected: &'static str },
    /// A sector past any disk's end.
    #[error("sector {sector} does not exist")]
    Sector { sector: u64 },
    /// More in one range than the configuration space says.
    #[error("a range of {sectors} sectors: expected at most {RANGE_SECTORS_MAX}")]
    RangeLength { sectors: u32 },
    /// A flag of a range that does not exist for this type.
    #[error("range flags {flags:#x} are not supported here")]
    RangeFlags { flags: u32 },
    /// It was another one when its queue took it.
    #[error("the request has changed while it was carried out")]
    Changed,
    /// The front end has taken its memory away, or the host has lost it.
    #[error("guest memory at {guest_address:#x} is gone: its file has become shorter, or the page is lost")]
    Memory { guest_address: u64 },
    /// The volume refused.
    #[error(transparent)]
    Volume(#[from] block::Error),
}

impl From<Fault> for RequestError {
    fn from(fault: Fault) -> RequestError {
        RequestError::Volume(fault.into())
    }
}

impl RequestError {
    /// The same error with the guest's address of what it is about, if it is about memory.
    #[cold]
    pub fn located(self, memory: &GuestMemory) -> RequestError {
        match self {
            RequestError::Volume(block::Error::Memory(fault)) => match memory.guest_address_of(fault) {
                Some(guest_address) => RequestError::Memory { guest_address },
                None => fault.into(),
            },
            other => other,
        }
    }

    /// What the driver is told.
    pub fn status(&self) -> Status {
        match self {
            RequestError::Kind { .. } | RequestError::RangeFlags { .. } => Status::Unsupported,
            _ => Status::IoError,
        }
    }

    /// Whether the host has no room for it right now.
    pub fn is_full(&self) -> bool {
        matches!(self, RequestError::Volume(error) if error.is_full())
    }

    /// Whether the host's files are the cause, and not the guest.
    pub fn is_hosts(&self) -> bool {
        use block::Error;
        matches!(self, RequestError::Volume(Error::Io { .. } | Error::Corrupt { .. } | Error::Latched { .. }))
    }
}

/// How a request is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Not at all, if it would have to wait for the disk, as far as that is known or found out.
    AtOnce(Patience),
    /// As well, and a write not at all either: it may go with others.
    Together(Patience),
    /// It is one that has to wait, and may.
    Waits,
    /// It is a flush, and all has been flushed since it was taken.
    Flushed,
}

/// What a request has to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    Read,
    /// Also what makes bytes zero.
    Write,
    Flush,
}

/// Why a request is put off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOff {
    /// It is a write that may go with others. It has been checked, and is to put the readable buffers from [`Outcome::data_from`] on at [`Outcome::offset`].
    Write,
    /// It comes behind writes that were put off.
    BehindWrites,
}

/// What a carried-out request leaves to do.
pub struct Outcome<'m> {
    /// The byte for the status; none when the driver gave none.
    pub status_place: Option<Writable<'m>>,
    /// What it has to wait for, if it has not been carried out for that.
    pub errand: Option<Errand>,
    /// Whether it is left to whoever asked, and why.
    pub put_off: Option<PutOff>,
    /// What went wrong, if anything.
    pub result: Result<(), RequestError>,
    /// Bytes of data that the device wrote, without the status.
    pub data_bytes: u32,
    /// Whether it wrote to the volume, and so depends on the batch's commit.
    pub wrote: bool,
    /// What it was.
    pub kind: Kind,
    /// Bytes of the volume that it was about, and where they begin, of a read or write.
    pub bytes: u64,
    pub offset: u64,
    /// Which of the readable buffers is the first with data.
    pub data_from: usize,
}

/// The fixed part of a request.
struct Header {
    kind: u32,
    sector: u64,
}

/// Carries out the request in `chain`, which lies in `memory`, or says what it has to wait for. A write is complete when the outcome is ok and `batch` has been committed.
#[inline]
pub fn execute<'m>(
    chain: &mut Chain<'m>,
    memory: &GuestMemory,
    volume: &Volume,
    serial: &[u8; SERIAL_BYTES],
    batch: &mut Batch,
    manner: Manner,
) -> Outcome<'m> {
    let mut outcome = Outcome {
        status_place: take_status(chain),
        errand: None,
        put_off: None,
        result: Ok(()),
        data_bytes: 0,
        wrote: false,
        kind: Kind::Other,
        bytes: 0,
        offset: 0,
        data_from: 0,
    };
    if outcome.status_place.is_none() {
        outcome.result = Err(RequestError::NoStatus);
        return outcome;
    }
    let result = carry_out(chain, volume, serial, batch, manner, &mut outcome);
    outcome.result = result.map_err(|error| error.located(memory));
    if outcome.errand.is_some() || outcome.put_off == Some(PutOff::BehindWrites) {
        // As it was, to be carried out once more.
        chain.writable.extend(outcome.status_place.take());
    }
    outcome
}

fn carry_out(
    chain: &mut Chain<'_>,
    volume: &Volume,
    serial: &[u8; SERIAL_BYTES],
    batch: &mut Batch,
    manner: Manner,
    outcome: &mut Outcome<'_>,
) -> Result<(), RequestError> {
    let (header, first, skipped) = read_header(chain)?;
    outcome.data_from = first;
    let patience = match manner {
        Manner::AtOnce(patience) | Manner::Together(patience) => Some(patience),
        Manner::Waits | Manner::Flushed => None,
    };
    let zeroes = matches!(header.kind, virtio_blk::VIRTIO_BLK_T_DISCARD | virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES);
    if zeroes && patience.is_some() && volume.is_direct() {
        outcome.errand = Some(Errand::Write);
        return Ok(());
    }
    if zeroes && matches!(manner, Manner::Together(_)) {
        outcome.put_off = Some(PutOff::BehindWrites);
        return Ok(());
    }
    if manner == Manner::Flushed && header.kind != virtio_blk::VIRTIO_BLK_T_FLUSH {
        return Err(RequestError::Changed);
    }
    match header.kind {
        virtio_blk::VIRTIO_BLK_T_IN => {
            outcome.kind = Kind::Read;
            let len = check_data(total_len_writable(&chain.writable))?;
            let offset = offset_of(header.sector)?;
            if !volume.read_in_batch(offset, &chain.writable, batch, patience.unwrap_or(Patience::Waits))? {
                outcome.errand = Some(Errand::Read);
            }
            (outcome.offset, outcome.bytes, outcome.data_bytes) = (offset, len.into(), len);
            Ok(())
        }
        virtio_blk::VIRTIO_BLK_T_OUT => {
            outcome.kind = Kind::Write;
            let readable = data_of(chain, first, skipped);
            outcome.bytes = check_data(total_len_readable(readable))?.into();
            outcome.offset = offset_of(header.sector)?;
            outcome.wrote = true;
            if !matches!(manner, Manner::Together(_)) {
                return Ok(volume.write(outcome.offset, readable, batch)?);
            }
            if volume.is_read_only() {
                return Err(block::Error::ReadOnly.into());
            }
            volume.check_range(outcome.offset, outcome.bytes)?;
            outcome.put_off = Some(PutOff::Write);
            Ok(())
        }
        virtio_blk::VIRTIO_BLK_T_FLUSH => {
            outcome.kind = Kind::Flush;
            match manner {
                Manner::AtOnce(_) | Manner::Together(_) if volume.has_to_sync() => outcome.errand = Some(Errand::Flush),
                Manner::Flushed => {}
                Manner::AtOnce(_) | Manner::Together(_) | Manner::Waits => volume.flush()?,
            }
            Ok(())
        }
        virtio_blk::VIRTIO_BLK_T_GET_ID => {
            let mut rest = &serial[..];
            for buffer in &chain.writable {
                rest = &rest[buffer.copy_from_slice(rest)?..];
            }
            outcome.data_bytes = (SERIAL_BYTES - rest.len()) as u32;
            if outcome.data_bytes == 0 {
                return Err(RequestError::DataLength { len: 0, expected: "room for a serial number of 20 bytes" });
            }
            Ok(())
        }
        kind @ (virtio_blk::VIRTIO_BLK_T_DISCARD | virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES) => {
            let is_discard = kind == virtio_blk::VIRTIO_BLK_T_DISCARD;
            outcome.kind = if is_discard { Kind::Discard } else { Kind::WriteZeroes };
            outcome.wrote = true;
            ranges(kind, data_of(chain, first, skipped), volume, batch, &mut outcome.bytes)
        }
        kind => Err(RequestError::Kind { kind }),
    }
}

/// Takes the status byte, the last of what is writable, off the chain.
fn take_status<'m>(chain: &mut Chain<'m>) -> Option<Writable<'m>> {
    while let Some(last) = chain.writable.last_mut() {
        let Some(before) = last.len().checked_sub(1) else {
            chain.writable.pop();
            continue;
        };
        let status = last.part(before, 1);
        if before == 0 {
            chain.writable.pop();
        } else {
            *last = last.part(0, before);
        }
        return Some(status);
    }
    None
}

/// The data of a request, whose header ends so many bytes behind the start of the readable buffer `first`. Takes those bytes off.
fn data_of<'c, 'm>(chain: &'c mut Chain<'m>, first: usize, skipped: usize) -> &'c [Readable<'m>] {
    let readable = &mut chain.readable[first..];
    if skipped > 0
        && let Some(buffer) = readable.first_mut()
    {
        *buffer = buffer.part(skipped, usize::MAX);
    }
    readable
}

/// Reads the header of the chain: also says with which readable buffer the data starts, and behind how many of its bytes.
fn read_header(chain: &Chain<'_>) -> Result<(Header, usize, usize), RequestError> {
    let mut bytes = [0; HEADER_BYTES];
    let mut found = 0;
    let (mut first, mut skipped) = (0, 0);
    while found < HEADER_BYTES {
        let Some(buffer) = chain.readable.get(first) else {
            return Err(RequestError::Header { len: found as u64 });
        };
        let len = buffer.copy_to_slice(&mut bytes[found..])?;
        found += len;
        if len == buffer.len() {
            first += 1;
        } else {
            skipped = len;
        }
    }
    let value = u128::from_le_bytes(bytes);
    // Between the two: the I/O priority, which means nothing to a host.
    Ok((Header { kind: value as u32, sector: (value >> 64) as u64 }, first, skipped))
}

fn check_data(len: u64) -> Result<u32, RequestError> {
    if !is_whole_sectors(len) || len == 0 {
        return Err(RequestError::DataLength { len, expected: "a multiple of 512, not zero" });
    }
    if len > DATA_BYTES_MAX {
        return Err(RequestError::DataLength { len, expected: "at most 256 MiB" });
    }
    Ok(len as u32)
}

fn offset_of(sector: u64) -> Result<u64, RequestError> {
    sectors_to_bytes(sector).ok_or(RequestError::Sector { sector })
}

/// Carries out the ranges of a discard or write-zeroes request. All are checked before the first is carried out.
fn ranges(
    kind: u32,
    readable: &[Readable<'_>],
    volume: &Volume,
    batch: &mut Batch,
    done: &mut u64,
) -> Result<(), RequestError> {
    let len = total_len_readable(readable);
    if len == 0 || !len.is_multiple_of(RANGE_BYTES as u64) || len > u64::from(RANGES_MAX) * RANGE_BYTES as u64 {
        return Err(RequestError::DataLength { len, expected: "1 to 64 ranges of 16 bytes" });
    }
    if volume.is_read_only() {
        return Err(block::Error::ReadOnly.into());
    }
    let mut bytes = [0; RANGES_MAX as usize * RANGE_BYTES];
    let mut found = 0;
    for buffer in readable {
        found += buffer.copy_to_slice(&mut bytes[found..])?;
    }
    let ranges = bytes[..found].as_chunks::<RANGE_BYTES>().0.iter().map(|bytes| {
        let value = u128::from_le_bytes(*bytes);
        (value as u64, (value >> 64) as u32, (value >> 96) as u32)
    });
    let unmap = virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    let allowed = if kind == virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES { unmap } else { 0 };
    for (sector, sectors, flags) in ranges.clone() {
        if flags & !allowed != 0 {
            return Err(RequestError::RangeFlags { flags });
        }
        if sectors > RANGE_SECTORS_MAX {
            return Err(RequestError::RangeLength { sectors });
        }
        let (offset, len) = (offset_of(sector)?, offset_of(u64::from(sectors))?);
        volume.check_range(offset, len)?;
    }
    for (sector, sectors, flags) in ranges {
        let (offset, len) = (offset_of(sector)?, offset_of(u64::from(sectors))?);
        if kind == virtio_blk::VIRTIO_BLK_T_DISCARD {
            volume.discard(offset, len)?;
        } else {
            volume.write_zeroes(offset, len, flags & unmap != 0, batch)?;
        }
        *done += len;
    }
    Ok(())
}
