//! Reading a qcow2 file, of version 2 or 3, as the disk that it describes.
//!
//! The file is hostile: it comes from a client, and may even change while it is read. So every number is taken from it
//! once, checked, and then used; every table and cluster has to lie within the file; and nothing is allocated that is not
//! bounded by a constant here. It never opens another file: an image with a backing file or an external data file is refused.
//!
//! What is read is the active state. Snapshots within the file are other states, and refcounts say what may be overwritten:
//! neither matters to a reader, so neither is looked at, beyond where the refcount table lies: that tells a file which was cut off.
//! The format is described in QEMU's documentation, docs/interop/qcow2.rst.

mod header;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

use crate::sys::buffers::Writable;
use crate::sys::file;

use super::{StoreError, source};
use header::Header;

/// How many second-level tables are kept: the threads of an import work close to each other.
const TABLES_KEPT: usize = 8;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const READS_AS_ZERO: u64 = 1;
/// The parts of a cluster that have their own state when entries are extended.
const SUBCLUSTERS: u32 = 32;

/// Why a file cannot be taken as qcow2.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The file ends too early.
    #[error("its {what} ends at byte {end}, and the file has {file_bytes}: it was cut off, or says what is not true")]
    Truncated { what: &'static str, end: u64, file_bytes: u64 },
    /// A number is none that can be.
    #[error("its {what} is {found}, expected {expected}")]
    Number { what: &'static str, found: u64, expected: &'static str },
    /// An offset is not where a cluster starts.
    #[error("its {what} is at byte {offset}, where no cluster starts: it is damaged")]
    Unaligned { what: &'static str, offset: u64 },
    /// The first-level table does not reach to the end of the disk.
    #[error("its L1 table has {found} entries, expected {expected} for its size: it is damaged")]
    ShortTable { found: u64, expected: u64 },
    /// Incompatible features that are not supported.
    #[error("it uses {names}, which is not supported: 'qemu-img convert -O qcow2' makes one without")]
    Features { names: String },
    /// QEMU found it damaged before.
    #[error("it is marked as corrupt: 'qemu-img check -r all' tries to repair it")]
    MarkedCorrupt,
    /// The contents are encrypted.
    #[error("it is encrypted: 'qemu-img convert' can decrypt it, with its key")]
    Encrypted,
    /// A mapping has contradictory or reserved bits.
    #[error("the mapping at byte {offset} of the disk is {entry:#x}, which means nothing: it is damaged")]
    Entry { offset: u64, entry: u64 },
    /// A compressed cluster does not decompress to a cluster.
    #[error("the compressed cluster at byte {offset} of the disk is damaged")]
    Compressed { offset: u64 },
}

/// A qcow2 file that is open for reading.
pub(super) struct Qcow2 {
    file: File,
    label: String,
    file_bytes: u64,
    header: Header,
    /// Where the second-level tables are, or zero.
    tables: Vec<u64>,
    kept: Mutex<VecDeque<(u64, Arc<[u64]>)>>,
}

/// Where the bytes of a piece of the disk are.
enum Place {
    Zeros,
    /// In the file at this offset, as they are.
    File(u64),
    /// Within the compressed cluster that has so many bytes at most at this offset.
    Compressed {
        at: u64,
        len: u64,
    },
}

impl Qcow2 {
    /// Checks all that can be checked without reading the second-level tables.
    pub(super) fn open(file: File, label: &str, file_bytes: u64, bytes_max: u64) -> Result<Qcow2, StoreError> {
        let header = Header::read(&file, label, file_bytes)?;
        source::check_disk_bytes(label, header.virtual_bytes, bytes_max)?;
        header.check_tables(file_bytes).map_err(|fault| fault_in(label, fault))?;
        let mut image =
            Qcow2 { file, label: label.to_owned(), file_bytes, header, tables: Vec::new(), kept: Mutex::default() };
        image.tables = image.read_table("L1 table", image.header.tables_at, image.header.tables_needed())?;
        for entry in &mut image.tables {
            let at = *entry & OFFSET_MASK;
            if at != 0 {
                image.header.check_cluster("L2 table", at, file_bytes).map_err(|fault| fault_in(label, fault))?;
            }
            *entry = at;
        }
        Ok(image)
    }

    /// Bytes of the disk.
    pub(super) fn virtual_bytes(&self) -> u64 {
        self.header.virtual_bytes
    }

    /// Reads the bytes of the disk at `offset`; `false` when they are all zeros without having been read.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> Result<bool, StoreError> {
        let mut scratch = Scratch::default();
        let mut any = false;
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let (place, len) = self.place(at, (into.len() - done) as u64)?;
            let piece = &mut into[done..done + len as usize];
            match place {
                Place::Zeros => piece.fill(0),
                Place::File(from) => {
                    file::read_at(&self.file, Writable::from_mut_slice(piece), from).map_err(|e| self.unreadable(e))?;
                }
                Place::Compressed { at: from, len } => self.decompress(at, from, len, piece, &mut scratch)?,
            }
            any |= !matches!(place, Place::Zeros);
            done += len as usize;
        }
        Ok(any)
    }

    /// Where the bytes at `offset` are, and for how many of `len` bytes this holds.
    fn place(&self, offset: u64, len: u64) -> Result<(Place, u64), StoreError> {
        let header = &self.header;
        let table_span = header.cluster_bytes() * header.table_entries();
        let table = self.tables.get((offset / table_span) as usize).copied().unwrap_or(0);
        if table == 0 {
            return Ok((Place::Zeros, len.min(table_span - offset % table_span)));
        }
        let table = self.table(table)?;
        let cluster = header.cluster_bytes();
        let words = if header.extended { 2 } else { 1 };
        let index = (offset % table_span / cluster) as usize * words;
        let entry = table[index];
        let within = offset % cluster;
        let len = len.min(cluster - within);
        if entry & COMPRESSED != 0 {
            return Ok((self.compressed(offset, entry)?, len));
        }
        let damaged = || self.fault(Fault::Entry { offset: offset - within, entry });
        let host = entry & OFFSET_MASK;
        if entry & !(OFFSET_MASK | READS_AS_ZERO | 1 << 63) != 0 {
            return Err(damaged());
        }
        if host != 0 {
            header.check_aligned("data cluster", host).map_err(|fault| self.fault(fault))?;
        }
        if !header.extended {
            let reads_as_zero = entry & READS_AS_ZERO != 0;
            if reads_as_zero && header.version < 3 {
                return Err(damaged());
            }
            let place = if reads_as_zero || host == 0 { Place::Zeros } else { self.data(host + within, len)? };
            return Ok((place, len));
        }
        if entry & READS_AS_ZERO != 0 {
            return Err(damaged());
        }
        let subcluster_bytes = cluster / u64::from(SUBCLUSTERS);
        let subcluster = within / subcluster_bytes;
        let len = len.min(subcluster_bytes - within % subcluster_bytes);
        let bits = table[index + 1];
        let (allocated, zero) = (bits >> subcluster & 1 == 1, bits >> (32 + subcluster) & 1 == 1);
        match (allocated, zero) {
            (true, true) => Err(self.fault(Fault::Entry { offset, entry: bits })),
            (true, false) if host == 0 => Err(damaged()),
            (true, false) => Ok((self.data(host + within, len)?, len)),
            (false, _) => Ok((Place::Zeros, len)),
        }
    }

    fn data(&self, at: u64, len: u64) -> Result<Place, StoreError> {
        header::check_end("data", at, len, self.file_bytes).map_err(|fault| self.fault(fault))?;
        Ok(Place::File(at))
    }

    /// The place of a compressed cluster, whose entry holds an offset and a number of sectors.
    fn compressed(&self, offset: u64, entry: u64) -> Result<Place, StoreError> {
        let offset_bits = 62 - (self.header.cluster_bits - 8);
        let at = entry & ((1 << offset_bits) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        if entry >> 63 != 0 || at >= self.file_bytes {
            return Err(self.fault(Fault::Entry { offset, entry }));
        }
        // The last sector need not be whole at the end of the file.
        let len = ((sectors + 1) * 512 - at % 512).min(self.file_bytes - at);
        Ok(Place::Compressed { at, len })
    }

    /// Decompresses the cluster around `offset` of the disk, and gives the bytes at `offset`.
    fn decompress(
        &self,
        offset: u64,
        from: u64,
        len: u64,
        into: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), StoreError> {
        let cluster = self.header.cluster_bytes() as usize;
        // Twice the largest cluster at most: that is all that fits in an entry.
        scratch.packed.resize(len as usize, 0);
        file::read_at(&self.file, Writable::from_mut_slice(&mut scratch.packed), from)
            .map_err(|e| self.unreadable(e))?;
        let within = (offset % cluster as u64) as usize;
        let whole = into.len() == cluster;
        let out = if whole {
            &mut *into
        } else {
            scratch.cluster.resize(cluster, 0);
            &mut scratch.cluster[..]
        };
        let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (status, _, written) = decompress(&mut DecompressorOxide::new(), &scratch.packed, out, 0, flags);
        // What follows in the last sector belongs to others, and may look like more.
        if written != cluster || !matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput) {
            return Err(self.fault(Fault::Compressed { offset: offset - within as u64 }));
        }
        if !whole {
            into.copy_from_slice(&scratch.cluster[within..within + into.len()]);
        }
        Ok(())
    }

    /// A second-level table.
    fn table(&self, at: u64) -> Result<Arc<[u64]>, StoreError> {
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = lock().iter().find(|(kept, _)| *kept == at) {
            return Ok(Arc::clone(table));
        }
        let table: Arc<[u64]> = self.read_table("L2 table", at, self.header.cluster_bytes() / 8)?.into();
        let mut kept = lock();
        kept.truncate(TABLES_KEPT - 1);
        kept.push_front((at, Arc::clone(&table)));
        Ok(table)
    }

    /// Reads a table whose place and size have been checked.
    fn read_table(&self, what: &'static str, at: u64, count: u64) -> Result<Vec<u64>, StoreError> {
        header::check_end(what, at, count * 8, self.file_bytes).map_err(|fault| self.fault(fault))?;
        let mut bytes = vec![0; count as usize * 8];
        file::read_at(&self.file, Writable::from_mut_slice(&mut bytes), at).map_err(|e| self.unreadable(e))?;
        Ok(bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect())
    }

    fn unreadable(&self, source: io::Error) -> StoreError {
        StoreError::Unreadable { label: self.label.clone(), source }
    }

    fn fault(&self, fault: Fault) -> StoreError {
        fault_in(&self.label, fault)
    }
}

/// Buffers that are used again within a part.
#[derive(Default)]
struct Scratch {
    packed: Vec<u8>,
    cluster: Vec<u8>,
}

pub(super) fn fault_in(label: &str, fault: Fault) -> StoreError {
    StoreError::Qcow2 { label: label.to_owned(), fault }
}
