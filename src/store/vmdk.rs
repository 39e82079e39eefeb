//! Reading a VMDK file that is all of a disk, as the disk that it describes: `monolithicSparse`, as hypervisors write to it, and
//! `streamOptimized`, as disks are shipped in.
//!
//! The file is as hostile as a qcow2 file ([`super::qcow2`]), and read by the same rules: every number is taken once, checked, and then used;
//! nothing is allocated that is not bounded by the file's own size or a constant; and no other file is ever opened, so a disk in several files, or
//! over a parent, is refused. The format is described in VMware's "Virtual Disk Format 5.0".

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

use crate::sys::buffers::Writable;
use crate::sys::file;
use crate::units::SECTOR_BYTES;

use super::{StoreError, source};

const MAGIC: &[u8] = b"KDMV";
const HEADER_BYTES: usize = 512;
/// Where the grain directory is, when that is only said in a second header near the file's end.
const AT_END: u64 = u64::MAX;
/// The second header is this far from the end: itself, and the marker that ends the stream.
const FOOTER_BYTES: u64 = 1024;
/// Entries in a grain table: the format has this number in the header, and no other value of it.
const TABLE_ENTRIES: u64 = 512;
/// The largest grain, in sectors: 1 MiB, far above what is written.
const GRAIN_SECTORS_MAX: u64 = 2048;
/// The longest description that is looked at.
const DESCRIPTOR_BYTES_MAX: u64 = 64 << 10;
/// What stands ahead of a compressed grain: its first sector, and how many bytes follow.
const MARKER_BYTES: u64 = 12;
/// Grain tables that are kept.
const TABLES_KEPT: usize = 8;

/// What is expected of a file that has no description: parts have none.
const WHOLE: &str = "one of its own; this looks like a part of a disk in several files";

const HAS_ZEROED_GRAINS: u32 = 1 << 2;
const IS_COMPRESSED: u32 = 1 << 16;
/// The entry of a grain that is zeros, where [`HAS_ZEROED_GRAINS`] is set.
const ZEROED: u64 = 1;

/// Why a file cannot be taken as VMDK.
#[derive(Debug, thiserror::Error)]
pub enum VmdkFault {
    /// The file ends too early.
    #[error("its {what} ends at byte {end}, and the file has {file_bytes}: it was cut off, or says what is not true")]
    Truncated { what: &'static str, end: u64, file_bytes: u64 },
    /// A number is none that can be.
    #[error("its {what} is {found}, expected {expected}")]
    Number { what: &'static str, found: u64, expected: &'static str },
    /// It has no description, or another one than it needs.
    #[error(
        "its description says '{found}' as {what}, expected {expected}: 'qemu-img convert -O qcow2' makes one whole file of it"
    )]
    Descriptor { what: &'static str, found: String, expected: &'static str },
    /// A compressed grain is damaged.
    #[error("the compressed grain at byte {offset} of the disk is damaged")]
    Compressed { offset: u64 },
}

/// A VMDK file that is open for reading.
pub(super) struct Vmdk {
    file: File,
    label: String,
    file_bytes: u64,
    virtual_bytes: u64,
    grain_bytes: u64,
    flags: u32,
    /// Where the grain tables are, in sectors, or zero.
    tables: Vec<u64>,
    kept: Mutex<VecDeque<(u64, Arc<[u64]>)>>,
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Vmdk {
    /// Checks all that can be checked without reading the grain tables.
    pub(super) fn open(file: File, label: &str, file_bytes: u64, bytes_max: u64) -> Result<Vmdk, StoreError> {
        let mut image = Vmdk {
            file,
            label: label.to_owned(),
            file_bytes,
            virtual_bytes: 0,
            grain_bytes: 0,
            flags: 0,
            tables: Vec::new(),
            kept: Mutex::default(),
        };
        let mut header = image.bytes("header", 0, HEADER_BYTES as u64)?;
        image.check_descriptor(number(&header, 28, 8), number(&header, 36, 8))?;
        if number(&header, 56, 8) == AT_END {
            let footer = file_bytes.checked_sub(FOOTER_BYTES);
            let footer = footer.ok_or(VmdkFault::Truncated { what: "footer", end: FOOTER_BYTES, file_bytes });
            header = image.bytes("footer", footer.map_err(|fault| image.fault(fault))?, HEADER_BYTES as u64)?;
        }
        let check = |what, found: u64, expected, fine: bool| {
            if fine { Ok(()) } else { Err(image.fault(VmdkFault::Number { what, found, expected })) }
        };
        let magic = number(&header, 0, 4);
        check("footer's mark", magic, "that of the format", header.starts_with(MAGIC))?;
        let version = number(&header, 4, 4);
        check("version", version, "1, 2 or 3", (1..=3).contains(&version))?;
        let flags = number(&header, 8, 4) as u32;
        let (sectors, grain_sectors) = (number(&header, 12, 8), number(&header, 20, 8));
        let is_grain = grain_sectors.is_power_of_two() && grain_sectors <= GRAIN_SECTORS_MAX;
        check("grain", grain_sectors, "a power of two of sectors, at most 2048", is_grain)?;
        let entries = number(&header, 44, 4);
        check("number of entries in a grain table", entries, "512", entries == TABLE_ENTRIES)?;
        let algorithm = number(&header, 77, 2);
        let is_known = flags & IS_COMPRESSED == 0 || algorithm == 1;
        check("compression", algorithm, "1, deflate", is_known)?;
        let virtual_bytes = sectors.saturating_mul(SECTOR_BYTES);
        source::check_disk_bytes(label, virtual_bytes, bytes_max)?;
        image.virtual_bytes = virtual_bytes;
        image.grain_bytes = grain_sectors * SECTOR_BYTES;
        image.flags = flags;
        let tables = virtual_bytes.div_ceil(image.grain_bytes * TABLE_ENTRIES);
        image.tables = image.table_at("grain directory", number(&header, 56, 8), tables)?;
        Ok(image)
    }

    /// Sees that the file is all of a disk.
    fn check_descriptor(&self, at: u64, sectors: u64) -> Result<(), StoreError> {
        let found = |what, found: &str, expected| {
            let found = found.chars().filter(|character| !character.is_control()).take(80).collect();
            self.fault(VmdkFault::Descriptor { what, found, expected })
        };
        if at == 0 || sectors == 0 {
            return Err(found("its place", "nothing", WHOLE));
        }
        let len = sectors.saturating_mul(SECTOR_BYTES).min(DESCRIPTOR_BYTES_MAX);
        let text = self.bytes("description", at.saturating_mul(SECTOR_BYTES), len)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let field = |name: &str| {
            let lines = text.split('\0').next().unwrap_or_default().lines();
            let value = lines.filter_map(|line| line.split_once('=')).find(|(found, _)| found.trim() == name);
            value.map(|(_, value)| value.trim().trim_matches('"').to_owned()).unwrap_or_default()
        };
        let kind = field("createType");
        if kind.is_empty() {
            return Err(found("its type", "nothing", WHOLE));
        }
        if !matches!(kind.as_str(), "monolithicSparse" | "streamOptimized") {
            return Err(found("its type", &kind, "monolithicSparse or streamOptimized"));
        }
        let parent = field("parentCID");
        if !parent.eq_ignore_ascii_case("ffffffff") {
            let name = field("parentFileNameHint");
            return Err(StoreError::Refers { label: self.label.clone(), what: "parent", name });
        }
        Ok(())
    }

    /// Bytes of the disk.
    pub(super) fn virtual_bytes(&self) -> u64 {
        self.virtual_bytes
    }

    /// Reads the bytes of the disk at `offset`; `false` when they are all zeros without having been read.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> Result<bool, StoreError> {
        let mut any = false;
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let within = at % self.grain_bytes;
            let len = (self.grain_bytes - within).min((into.len() - done) as u64) as usize;
            let piece = &mut into[done..done + len];
            match self.grain(at)? {
                None => piece.fill(0),
                Some(grain) if self.flags & IS_COMPRESSED == 0 => {
                    let from = grain.saturating_add(within);
                    self.check_end("grain", from, len as u64)?;
                    file::read_at(&self.file, Writable::from_mut_slice(piece), from).map_err(|e| self.unreadable(e))?;
                    any = true;
                }
                Some(grain) => {
                    self.decompress(at - within, grain, within as usize, piece)?;
                    any = true;
                }
            }
            done += len;
        }
        Ok(any)
    }

    /// Where in the file the grain around `offset` of the disk is; none when it is zeros.
    fn grain(&self, offset: u64) -> Result<Option<u64>, StoreError> {
        let index = offset / self.grain_bytes;
        let table = self.tables.get((index / TABLE_ENTRIES) as usize).copied().unwrap_or(0);
        if table == 0 {
            return Ok(None);
        }
        let entry = self.table(table)?[(index % TABLE_ENTRIES) as usize];
        let is_zeros = entry == 0 || entry == ZEROED && self.flags & HAS_ZEROED_GRAINS != 0;
        Ok((!is_zeros).then_some(entry * SECTOR_BYTES))
    }

    /// Decompresses the grain that starts at `offset` of the disk and is at `at` in the file, and gives the bytes from `within` it on.
    fn decompress(&self, offset: u64, at: u64, within: usize, into: &mut [u8]) -> Result<(), StoreError> {
        let damaged = || self.fault(VmdkFault::Compressed { offset });
        let marker = self.bytes("grain's marker", at, MARKER_BYTES)?;
        let (sector, len) = (number(&marker, 0, 8), number(&marker, 8, 4));
        // What does not become shorter is a little longer than the grain.
        if sector != offset / SECTOR_BYTES || len > 2 * self.grain_bytes + SECTOR_BYTES {
            return Err(damaged());
        }
        let packed = self.bytes("compressed grain", at + MARKER_BYTES, len)?;
        let mut grain = vec![0; self.grain_bytes as usize];
        let flags =
            inflate_flags::TINFL_FLAG_PARSE_ZLIB_HEADER | inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (status, _, written) = decompress(&mut DecompressorOxide::new(), &packed, &mut grain, 0, flags);
        // The last grain may end with the disk.
        let expected = self.grain_bytes.min(self.virtual_bytes - offset);
        if status != TINFLStatus::Done || (written as u64) < expected {
            return Err(damaged());
        }
        into.copy_from_slice(&grain[within..within + into.len()]);
        Ok(())
    }

    /// A grain table.
    fn table(&self, at: u64) -> Result<Arc<[u64]>, StoreError> {
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = lock().iter().find(|(kept, _)| *kept == at) {
            return Ok(Arc::clone(table));
        }
        let table: Arc<[u64]> = self.table_at("grain table", at, TABLE_ENTRIES)?.into();
        let mut kept = lock();
        kept.truncate(TABLES_KEPT - 1);
        kept.push_front((at, Arc::clone(&table)));
        Ok(table)
    }

    /// `count` sector numbers that stand at a sector of the file.
    fn table_at(&self, what: &'static str, sector: u64, count: u64) -> Result<Vec<u64>, StoreError> {
        let bytes = self.bytes(what, sector.saturating_mul(SECTOR_BYTES), count * 4)?;
        Ok(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word).into()).collect())
    }

    /// Bytes of the file, as many as it has.
    fn bytes(&self, what: &'static str, at: u64, len: u64) -> Result<Vec<u8>, StoreError> {
        self.check_end(what, at, len)?;
        let mut bytes = vec![0; len as usize];
        file::read_at(&self.file, Writable::from_mut_slice(&mut bytes), at).map_err(|e| self.unreadable(e))?;
        Ok(bytes)
    }

    fn check_end(&self, what: &'static str, at: u64, len: u64) -> Result<(), StoreError> {
        let (end, file_bytes) = (at.saturating_add(len), self.file_bytes);
        if end <= file_bytes { Ok(()) } else { Err(self.fault(VmdkFault::Truncated { what, end, file_bytes })) }
    }

    fn unreadable(&self, source: io::Error) -> StoreError {
        StoreError::Unreadable { label: self.label.clone(), source }
    }

    fn fault(&self, fault: VmdkFault) -> StoreError {
        StoreError::Vmdk { label: self.label.clone(), fault }
    }
}
