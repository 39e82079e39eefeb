//! The first two sectors of a delta file: what it is, and what the last session left.
//!
//! All numbers little-endian. Each sector ends its fields with a CRC-32C of all bytes ahead of it.
//!
//! The **header**, sector 0, is written once, at creation:
//!
//! | field | bytes | meaning |
//! |---|---|---|
//! | magic | 8 | `PANDODLT` |
//! | version | 4 | 1; any other is refused |
//! | cluster bytes | 4 | a power of two, 4 KiB to 64 KiB |
//! | incompatible features | 8 | a bit that is not known is a reason to refuse the file; none exist yet |
//! | compatible features | 8 | a bit that is not known is ignored; none exist yet |
//! | uuid | 16 | random |
//! | virtual size | 8 | bytes of the volume, a multiple of 512 |
//! | has base | 8 | 1: over a base; 0: over nothing (`blank`), and the next two are zero |
//! | base size | 8 | bytes of the base, at most the virtual size |
//! | base digest | 32 | BLAKE3 of the base's contents |
//! | checksum | 4 | |
//!
//! The **session**, sector 1, is written when a backend opens the delta and when it closes it in good order. One sector, so it is never seen torn:
//!
//! | field | bytes | meaning |
//! |---|---|---|
//! | magic | 8 | `PANDOSES` |
//! | phase | 8 | 0: closed in good order; 1: open |
//! | boot | 16 | the kernel's boot id at opening |
//! | generation | 8 | the lowest generation of the mark log that counts |
//! | checksum | 4 | |
//!
//! Why the boot id: an open session of *this* boot has died, and the page cache still holds all that it wrote, so its mark log counts.
//! One of an *earlier* boot was ended by the host; its log may have reached the disk ahead of the data that it speaks of, so it does not count.

use crate::digest::Digest;
use crate::units::{ClusterSize, is_whole_sectors};

use super::layout::{DISK_SECTOR_BYTES, HEADER_BLOCK_BYTES, Layout};
use super::marks::GENERATION_MAX;

/// A sector's bytes.
pub type Sector = [u8; DISK_SECTOR_BYTES as usize];

/// Where the header lies in the file.
pub const HEADER_AT: u64 = 0;
/// Where the session lies in the file.
pub const SESSION_AT: u64 = HEADER_AT + DISK_SECTOR_BYTES;
const _: () = assert!(SESSION_AT + DISK_SECTOR_BYTES <= HEADER_BLOCK_BYTES);

const HEADER_MAGIC: [u8; 8] = *b"PANDODLT";
const SESSION_MAGIC: [u8; 8] = *b"PANDOSES";
const VERSION: u32 = 1;

/// What a delta's base has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseIdentity {
    /// BLAKE3 of the contents.
    pub digest: Digest,
    /// Length in bytes.
    pub bytes: u64,
}

/// What a delta is, fixed at its creation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Cluster size and size of the volume.
    pub layout: Layout,
    /// Random, to tell deltas apart.
    pub uuid: [u8; 16],
    /// What it was made over, or `None` for nothing.
    pub base: Option<BaseIdentity>,
}

/// What the last session left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// Closed in good order, or open.
    pub phase: Phase,
    /// The kernel's boot id at opening.
    pub boot: [u8; 16],
    /// The lowest generation of the mark log that counts.
    pub generation: u64,
}

/// Whether a session was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// In good order: the cluster map on disk is all there is to know.
    Closed,
    /// Not closed: it runs, or it died.
    Open,
}

/// Why a header or session cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderFault {
    /// Some other kind of file.
    #[error("it is not a Pando delta: expected the magic bytes '{expected}', found '{found}'")]
    Magic { expected: String, found: String },
    /// Bytes changed since they were written.
    #[error("its {what} is corrupt: checksum {computed:#010x} expected, {stored:#010x} found")]
    Checksum { what: &'static str, computed: u32, stored: u32 },
    /// Written by a later program.
    #[error("it has format version {found}, and this program knows version {VERSION}: use a newer pando")]
    Version { found: u32 },
    /// Written by a later program.
    #[error("it uses features that this program does not know (bits {bits:#x}): use a newer pando")]
    Features { bits: u64 },
    /// A field that no program writes.
    #[error("its {field} is {found}, expected {expected}")]
    Field { field: &'static str, found: u64, expected: &'static str },
}

impl Header {
    /// The sector as it is on disk.
    pub fn encode(&self) -> Sector {
        let mut sector = Encoder::new();
        sector.put(&HEADER_MAGIC);
        sector.put(&VERSION.to_le_bytes());
        sector.put(&(self.layout.cluster().bytes() as u32).to_le_bytes());
        sector.put(&0u64.to_le_bytes());
        sector.put(&0u64.to_le_bytes());
        sector.put(&self.uuid);
        sector.put(&self.layout.virtual_bytes().to_le_bytes());
        sector.put(&u64::from(self.base.is_some()).to_le_bytes());
        let base = self.base.unwrap_or(BaseIdentity { digest: Digest([0; 32]), bytes: 0 });
        sector.put(&base.bytes.to_le_bytes());
        sector.put(&base.digest.0);
        sector.finish()
    }

    /// Reads and checks a sector.
    pub fn decode(sector: &Sector) -> Result<Header, HeaderFault> {
        let mut fields = Decoder::new(sector);
        fields.magic(HEADER_MAGIC)?;
        // The version goes ahead of the checksum: a later version may place the checksum elsewhere.
        let version = u32::from_le_bytes(fields.take());
        if version != VERSION {
            return Err(HeaderFault::Version { found: version });
        }
        let cluster_bytes = u64::from(u32::from_le_bytes(fields.take()));
        let incompatible = u64::from_le_bytes(fields.take());
        let _compatible = u64::from_le_bytes(fields.take());
        let uuid = fields.take();
        let virtual_bytes = u64::from_le_bytes(fields.take());
        let has_base = u64::from_le_bytes(fields.take());
        let base_bytes = u64::from_le_bytes(fields.take());
        let digest = Digest(fields.take());
        fields.checksum("header")?;
        if incompatible != 0 {
            return Err(HeaderFault::Features { bits: incompatible });
        }
        let field = |field, found, expected| HeaderFault::Field { field, found, expected };
        let cluster = ClusterSize::from_bytes(cluster_bytes)
            .ok_or_else(|| field("cluster size", cluster_bytes, "a power of two from 4096 to 65536"))?;
        let layout = Layout::new(cluster, virtual_bytes)
            .filter(|_| is_whole_sectors(virtual_bytes))
            .ok_or_else(|| field("virtual size", virtual_bytes, "a multiple of 512, at most 64 TiB"))?;
        let base = match has_base {
            0 if base_bytes != 0 => return Err(field("base size", base_bytes, "0, as there is no base")),
            0 if digest != Digest([0; 32]) => return Err(field("base flag", 0, "1, as there is a base's digest")),
            0 => None,
            1 if base_bytes > virtual_bytes => return Err(field("base size", base_bytes, "at most the virtual size")),
            1 => Some(BaseIdentity { digest, bytes: base_bytes }),
            found => return Err(field("base flag", found, "0 or 1")),
        };
        Ok(Header { layout, uuid, base })
    }
}

impl Session {
    /// A new delta's session: none yet.
    pub const NONE: Session = Session { phase: Phase::Closed, boot: [0; 16], generation: 1 };

    /// The sector as it is on disk.
    pub fn encode(&self) -> Sector {
        let mut sector = Encoder::new();
        sector.put(&SESSION_MAGIC);
        sector.put(&u64::from(self.phase == Phase::Open).to_le_bytes());
        sector.put(&self.boot);
        sector.put(&self.generation.to_le_bytes());
        sector.finish()
    }

    /// Reads and checks a sector.
    pub fn decode(sector: &Sector) -> Result<Session, HeaderFault> {
        let mut fields = Decoder::new(sector);
        fields.magic(SESSION_MAGIC)?;
        let phase = u64::from_le_bytes(fields.take());
        let boot = fields.take();
        let generation = u64::from_le_bytes(fields.take());
        fields.checksum("session")?;
        let phase = match phase {
            0 => Phase::Closed,
            1 => Phase::Open,
            found => return Err(HeaderFault::Field { field: "session phase", found, expected: "0 or 1" }),
        };
        if generation > GENERATION_MAX {
            return Err(HeaderFault::Field { field: "generation", found: generation, expected: "at most 2^62" });
        }
        Ok(Session { phase, boot, generation })
    }
}

/// Puts fields one after another, so that each one's place follows from the one before.
struct Encoder {
    sector: Sector,
    at: usize,
}

impl Encoder {
    fn new() -> Encoder {
        Encoder { sector: [0; DISK_SECTOR_BYTES as usize], at: 0 }
    }

    fn put(&mut self, field: &[u8]) {
        self.sector[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
    }

    fn finish(mut self) -> Sector {
        let checksum = crc32c::crc32c(&self.sector[..self.at]);
        self.put(&checksum.to_le_bytes());
        self.sector
    }
}

/// Takes fields in the order in which [`Encoder`] puts them.
struct Decoder<'s> {
    sector: &'s Sector,
    at: usize,
}

impl Decoder<'_> {
    fn new(sector: &Sector) -> Decoder<'_> {
        Decoder { sector, at: 0 }
    }

    fn take<const LEN: usize>(&mut self) -> [u8; LEN] {
        let mut field = [0; LEN];
        field.copy_from_slice(&self.sector[self.at..self.at + LEN]);
        self.at += LEN;
        field
    }

    fn magic(&mut self, expected: [u8; 8]) -> Result<(), HeaderFault> {
        let found: [u8; 8] = self.take();
        if found == expected {
            return Ok(());
        }
        let text = |bytes: [u8; 8]| bytes.escape_ascii().to_string();
        Err(HeaderFault::Magic { expected: text(expected), found: text(found) })
    }

    fn checksum(&mut self, what: &'static str) -> Result<(), HeaderFault> {
        let computed = crc32c::crc32c(&self.sector[..self.at]);
        let stored = u32::from_le_bytes(self.take());
        if stored == computed { Ok(()) } else { Err(HeaderFault::Checksum { what, computed, stored }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            layout: Layout::new(ClusterSize::DEFAULT, 20 << 30).unwrap(),
            uuid: [7; 16],
            base: Some(BaseIdentity { digest: Digest([9; 32]), bytes: 2 << 30 }),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for header in [header(), Header { base: None, ..header() }] {
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
        let session = Session { phase: Phase::Open, boot: [3; 16], generation: 17 };
        assert_eq!(Session::decode(&session.encode()), Ok(session));
    }

    #[test]
    fn a_change_of_any_bit_is_noticed() {
        let sector = header().encode();
        let end = sector.iter().rposition(|byte| *byte != 0).unwrap();
        for bit in 0..(end + 1) * 8 {
            let mut changed = sector;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&changed).is_err(), "bit {bit}");
        }
    }

    /// A header with one field overwritten and a checksum that fits.
    fn with(at: usize, bytes: &[u8]) -> Sector {
        let mut sector = header().encode();
        sector[at..at + bytes.len()].copy_from_slice(bytes);
        let end = 104;
        let checksum = crc32c::crc32c(&sector[..end]);
        sector[end..end + 4].copy_from_slice(&checksum.to_le_bytes());
        sector
    }

    #[test]
    fn fields_that_make_no_sense_are_refused() {
        assert_eq!(Header::decode(&with(0, b"")), Ok(header()), "the helper keeps the checksum's place");
        assert_eq!(Header::decode(&with(8, &[2])), Err(HeaderFault::Version { found: 2 }));
        assert_eq!(Header::decode(&with(16, &[4])), Err(HeaderFault::Features { bits: 4 }));
        assert_eq!(Header::decode(&with(24, &[4])), Ok(header()), "an unknown compatible feature is ignored");
        // No base by its flag, and one by its size; no base by both, and one by its digest.
        for (at, bytes) in [(56, [0; 8].as_slice()), (56, &[0; 16])] {
            assert!(matches!(Header::decode(&with(at, bytes)), Err(HeaderFault::Field { .. })));
        }
        for (at, bytes) in [(12, [1u8, 0, 0, 0, 0, 0, 0, 0]), (48, [1; 8]), (48, [0; 8]), (56, [2; 8]), (64, [255; 8])]
        {
            let len = if at == 12 { 4 } else { 8 };
            assert!(matches!(Header::decode(&with(at, &bytes[..len])), Err(HeaderFault::Field { .. })), "{at}");
        }
    }
}
