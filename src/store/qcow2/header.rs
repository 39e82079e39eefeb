//! [`Header`]: what the first cluster of a qcow2 file says, checked.
//!
//! Everything that the reader divides by, allocates or seeks to is bounded here, before it is used.

use std::fs::File;

use crate::sys::buffers::Writable;
use crate::sys::file;

use super::{Fault, StoreError, fault_in};

const V2_BYTES: u64 = 72;
const V3_BYTES: u64 = 104;
const CLUSTER_BITS_MIN: u64 = 9;
/// QEMU's own limit.
const CLUSTER_BITS_MAX: u64 = 21;
const EXTENDED_CLUSTER_BITS_MIN: u32 = 14;
/// QEMU's own limit, 32 MiB.
const TABLE_COUNT_MAX: u64 = 32 << 20 >> 3;
const REFCOUNT_ORDER_MAX: u64 = 6;
/// The longest name of another file that the format allows.
const NAME_BYTES_MAX: usize = 1023;
const EXTENSIONS_MAX: usize = 256;
const EXTENSION_END: u32 = 0;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED: u64 = 1 << 4;

/// What a reader needs to know.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u64,
    pub(super) cluster_bits: u32,
    pub(super) virtual_bytes: u64,
    /// Where the L1 table is.
    pub(super) tables_at: u64,
    /// How many entries it has.
    table_count: u64,
    refcounts_at: u64,
    refcount_clusters: u64,
    /// Whether clusters have parts with their own state.
    pub(super) extended: bool,
}

impl Header {
    pub(super) fn read(file: &File, label: &str, file_bytes: u64) -> Result<Header, StoreError> {
        let mut head = [0; V3_BYTES as usize];
        read_into(file, label, &mut head, 0)?;
        let fault = |fault| Err(fault_in(label, fault));
        let number = |what, found, expected| Err(fault_in(label, Fault::Number { what, found, expected }));
        check_end("header", 0, V2_BYTES, file_bytes).map_err(|fault| fault_in(label, fault))?;
        let version = u64::from(be32(&head, 4));
        if !(2..=3).contains(&version) {
            return number("version", version, "2 or 3");
        }
        let cluster_bits = u64::from(be32(&head, 20));
        if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&cluster_bits) {
            return number("cluster size, as a power of two,", cluster_bits, "9 to 21");
        }
        let cluster_bytes = 1 << cluster_bits;
        let features = if version == 2 { 0 } else { be64(&head, 72) };
        if version == 3 {
            check_end("header", 0, V3_BYTES, file_bytes).map_err(|fault| fault_in(label, fault))?;
            let header_bytes = u64::from(be32(&head, 100));
            if header_bytes < V3_BYTES || header_bytes > cluster_bytes || header_bytes % 8 != 0 {
                return number("header length", header_bytes, "a multiple of 8 from 104 to the size of a cluster");
            }
            check_end("header", 0, header_bytes, file_bytes).map_err(|fault| fault_in(label, fault))?;
            let refcount_order = u64::from(be32(&head, 96));
            if refcount_order > REFCOUNT_ORDER_MAX {
                return number("refcount width, as a power of two,", refcount_order, "0 to 6");
            }
            if features & EXTERNAL_DATA != 0 {
                let name = data_file_name(file, label, header_bytes, cluster_bytes)?;
                return Err(StoreError::Refers { label: label.to_owned(), what: "external data file", name });
            }
        }
        let backing_at = be64(&head, 8);
        if backing_at != 0 {
            let mut name = vec![0; (be32(&head, 16) as usize).min(NAME_BYTES_MAX)];
            if backing_at < cluster_bytes {
                read_into(file, label, &mut name, backing_at)?;
            }
            let name = String::from_utf8_lossy(&name).into_owned();
            return Err(StoreError::Refers { label: label.to_owned(), what: "backing file", name });
        }
        if be32(&head, 32) != 0 {
            return fault(Fault::Encrypted);
        }
        if features & CORRUPT != 0 {
            return fault(Fault::MarkedCorrupt);
        }
        // Dirty says that refcounts may be wrong, which no reader needs.
        let unsupported = features & !(DIRTY | EXTENDED);
        if unsupported != 0 {
            return fault(Fault::Features { names: feature_names(unsupported) });
        }
        let header = Header {
            version,
            cluster_bits: cluster_bits as u32,
            virtual_bytes: be64(&head, 24),
            tables_at: be64(&head, 40),
            table_count: u64::from(be32(&head, 36)),
            refcounts_at: be64(&head, 48),
            refcount_clusters: u64::from(be32(&head, 56)),
            extended: features & EXTENDED != 0,
        };
        if header.extended && header.cluster_bits < EXTENDED_CLUSTER_BITS_MIN {
            return number("cluster size, as a power of two,", cluster_bits, "14 or more, for extended L2 entries");
        }
        Ok(header)
    }

    /// How many entries of the L1 table the disk needs.
    pub(super) fn tables_needed(&self) -> u64 {
        self.virtual_bytes.div_ceil(self.cluster_bytes() * self.table_entries())
    }

    /// Checks where the tables are: only then may they be read.
    pub(super) fn check_tables(&self, file_bytes: u64) -> Result<(), Fault> {
        let (found, expected) = (self.table_count, self.tables_needed());
        if found > TABLE_COUNT_MAX {
            return Err(Fault::Number { what: "L1 table's number of entries", found, expected: "4194304 at most" });
        }
        if found < expected {
            return Err(Fault::ShortTable { found, expected });
        }
        self.check_aligned("L1 table", self.tables_at)?;
        check_end("L1 table", self.tables_at, found * 8, file_bytes)?;
        self.check_aligned("refcount table", self.refcounts_at)?;
        check_end("refcount table", self.refcounts_at, self.refcount_clusters << self.cluster_bits, file_bytes)
    }

    pub(super) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// How many clusters an L2 table maps.
    pub(super) fn table_entries(&self) -> u64 {
        self.cluster_bytes() / if self.extended { 16 } else { 8 }
    }

    /// Checks that a cluster starts at `at`, and ends before the file does.
    pub(super) fn check_cluster(&self, what: &'static str, at: u64, file_bytes: u64) -> Result<(), Fault> {
        self.check_aligned(what, at)?;
        check_end(what, at, self.cluster_bytes(), file_bytes)
    }

    pub(super) fn check_aligned(&self, what: &'static str, at: u64) -> Result<(), Fault> {
        if at.is_multiple_of(self.cluster_bytes()) { Ok(()) } else { Err(Fault::Unaligned { what, offset: at }) }
    }
}

/// Checks that `len` bytes at `at` end before the file does.
pub(super) fn check_end(what: &'static str, at: u64, len: u64, file_bytes: u64) -> Result<(), Fault> {
    match at.checked_add(len) {
        Some(end) if end <= file_bytes => Ok(()),
        end => Err(Fault::Truncated { what, end: end.unwrap_or(u64::MAX), file_bytes }),
    }
}

fn feature_names(features: u64) -> String {
    let name = |bit: u64| match 1 << bit {
        COMPRESSION => "compression other than zlib's (zstd, most likely)".to_owned(),
        _ => format!("the incompatible feature {bit}"),
    };
    let names: Vec<String> = (0..64).filter(|bit| features >> bit & 1 == 1).map(name).collect();
    names.join(", ")
}

/// The name of the external data file, from the header's extensions; empty when none of them has it.
fn data_file_name(file: &File, label: &str, mut at: u64, cluster_bytes: u64) -> Result<String, StoreError> {
    for _ in 0..EXTENSIONS_MAX {
        let mut head = [0; 8];
        read_into(file, label, &mut head, at)?;
        let (kind, len) = (be32(&head, 0), u64::from(be32(&head, 4)));
        at += 8;
        if kind == EXTENSION_END || at + len > cluster_bytes {
            break;
        }
        if kind == EXTENSION_DATA_FILE {
            let mut name = vec![0; (len as usize).min(NAME_BYTES_MAX)];
            read_into(file, label, &mut name, at)?;
            return Ok(String::from_utf8_lossy(&name).into_owned());
        }
        at += len.next_multiple_of(8);
    }
    Ok(String::new())
}

fn read_into(file: &File, label: &str, into: &mut [u8], at: u64) -> Result<(), StoreError> {
    file::read_at(file, Writable::from_mut_slice(into), at)
        .map_err(|source| StoreError::Unreadable { label: label.to_owned(), source })
}

/// The number at `at`, which lies within `bytes`.
fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |all, byte| all << 8 | u32::from(*byte))
}

/// The number at `at`, which lies within `bytes`.
fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}
