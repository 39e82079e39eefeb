//! The mark log: which clusters were marked since the last flush, kept where the death of the process cannot reach it.
//!
//! A completed write has to survive `kill -9`, flushed or not, but its mark may go into the map on disk only after its data
//! is durable. So the mark goes into this log first, by an ordinary write that the page cache keeps when the process is
//! gone. Nobody syncs the log. After the host itself went down it is void (the session's boot id tells): its pages may then
//! have reached the disk ahead of the data that they speak of.
//!
//! By system call and not through a mapping, so that a full disk or a failing one is an error code. One write takes the
//! marks of a whole batch of requests.
//!
//! The log has two halves. A half is a sequence of entries, all of one generation, from its start, and ends with the first that is none:
//!
//! | field | bytes | meaning |
//! |---|---|---|
//! | checksum | 4 | CRC-32C of the rest of the entry |
//! | count | 4 | marks that follow |
//! | generation | 8 | counts up by one each time that the log turns to the other half |
//! | marks | 16 each | first cluster (8; the top bit set: zero, clear: in the delta), number of clusters (8) |
//!
//! A flush turns to the other half before it copies the map, so what the half behind it holds is in that copy, and is free again
//! once the copy is in the map on disk. Replaying the lower generation and then the higher one, over the map on disk, gives the
//! states at the time of death: entries stand in the order in which the states changed.

use std::io;

use crate::block::storage::Storage;
use crate::sys::buffers::{Readable, Writable};
use crate::sys::process;

use super::header::HeaderFault;
use super::layout::{LOG_HALF_BYTES, LOG_START};
use super::map::State;

const ENTRY_HEAD_BYTES: usize = 16;
const MARK_BYTES: usize = 16;
const ZERO_BIT: u64 = 1 << 63;
/// Marks in one entry, so that reading one back takes bounded memory.
const MARKS_PER_ENTRY_MAX: usize = 4096;

/// Marks that are appended at once: no more than an empty half has room for, or turning the log would never make room.
pub const APPEND_MARKS_MAX: usize = 16 * MARKS_PER_ENTRY_MAX;
const _: () = assert!(16 * (ENTRY_HEAD_BYTES + MARKS_PER_ENTRY_MAX * MARK_BYTES) as u64 <= LOG_HALF_BYTES);

/// Clusters in one mark, so that replaying any log ends in seconds, whoever wrote it.
pub const CLUSTERS_MAX: u64 = super::layout::CLUSTERS_PER_STRETCH;

/// No session starts further than this, so that counting never overflows.
pub const GENERATION_MAX: u64 = 1 << 62;

/// No session has counted further than this that another one goes on from: what that one counts is still believed.
const GENERATION_TAKEN_OVER_MAX: u64 = GENERATION_MAX + (1 << 61);

/// A run of clusters with a new state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// First cluster.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Whether they are now zero; if not, they are in the delta.
    pub zero: bool,
}

impl Mark {
    /// The state of its clusters.
    pub fn state(&self) -> State {
        if self.zero { State::Zero } else { State::Delta }
    }
}

/// Why marks could not be logged.
#[derive(Debug)]
pub enum AppendError {
    /// No room until a flush has turned the log.
    Full,
    /// The file system refused.
    Io { offset: u64, source: io::Error },
}

/// The end of the log that is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkLog {
    half: u64,
    /// Bytes of the half in use.
    used: u64,
    generation: u64,
}

/// What a dead session left in the log.
pub struct Replay {
    /// In the order in which they were made.
    pub marks: Vec<Mark>,
    /// Where to go on.
    pub log: MarkLog,
    /// Whether the other half's marks count as well, so that it is not free yet.
    pub other_half_counts: bool,
}

impl Replay {
    /// Sees that whoever goes on with the log can count on.
    pub fn check(&self) -> Result<(), HeaderFault> {
        let found = self.log.generation;
        let field = "generation of the mark log";
        let fault = HeaderFault::Field { field, found, expected: "at most 2^62 + 2^61" };
        if found > GENERATION_TAKEN_OVER_MAX { Err(fault) } else { Ok(()) }
    }
}

fn half_start(half: u64) -> u64 {
    LOG_START + half * LOG_HALF_BYTES
}

impl MarkLog {
    /// A log with nothing in it.
    pub fn new(generation: u64) -> MarkLog {
        MarkLog { half: generation % 2, used: 0, generation }
    }

    /// Writes `marks` behind what is there. They are in the log when this returns, and not at all when it fails.
    pub fn append(&mut self, marks: &[Mark], storage: &impl Storage) -> Result<(), AppendError> {
        let mut bytes = Vec::with_capacity(2 * ENTRY_HEAD_BYTES + marks.len() * MARK_BYTES);
        for marks in marks.chunks(MARKS_PER_ENTRY_MAX) {
            let start = bytes.len();
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&(marks.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&self.generation.to_le_bytes());
            for mark in marks {
                let zero = if mark.zero { ZERO_BIT } else { 0 };
                bytes.extend_from_slice(&(mark.first | zero).to_le_bytes());
                bytes.extend_from_slice(&mark.count.to_le_bytes());
            }
            let checksum = crc32c::crc32c(&bytes[start + 4..]);
            bytes[start..start + 4].copy_from_slice(&checksum.to_le_bytes());
        }
        if bytes.len() as u64 > LOG_HALF_BYTES - self.used {
            return Err(AppendError::Full);
        }
        let used = self.used + bytes.len() as u64;
        // Without marks, which no entry is: here it ends, whatever the file holds behind it.
        bytes.resize(bytes.len() + ENTRY_HEAD_BYTES.min((LOG_HALF_BYTES - used) as usize), 0);
        let offset = half_start(self.half) + self.used;
        storage
            .write_at(&[Readable::from_slice(&bytes)], offset)
            .map_err(|source| AppendError::Io { offset, source })?;
        self.used = used;
        Ok(())
    }

    /// Turns to the other half, which must be free.
    pub fn turn(&mut self) {
        *self = MarkLog::new(self.generation + 1);
    }

    /// Whether nothing was logged since the last turn.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// The generation that entries carry now.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

/// Reads what a session left whose lowest generation is `generation`, for a volume of `clusters` clusters.
pub fn replay(storage: &impl Storage, generation: u64, clusters: u64) -> io::Result<Replay> {
    let mut halves = [read_half(storage, 0, generation, clusters)?, read_half(storage, 1, generation, clusters)?];
    halves.sort_by_key(|half| half.generation);
    let [lower, higher] = halves;
    let other_half_counts = !lower.marks.is_empty();
    let log = match higher.generation {
        // Nothing was logged.
        None => MarkLog::new(generation),
        Some(generation) => MarkLog { half: higher.half, used: higher.used, generation },
    };
    Ok(Replay { marks: [lower.marks, higher.marks].concat(), log, other_half_counts })
}

/// The highest generation that an entry at the start of a half has; whatever session it is of.
pub fn highest_generation(storage: &impl Storage, clusters: u64) -> io::Result<u64> {
    let mut highest = 0;
    for half in [0, 1] {
        if let Some(entry) = read_entry(&mut HalfReader::new(storage, half), 0, clusters)? {
            highest = highest.max(entry.generation);
        }
    }
    Ok(highest)
}

/// A generation for a new session, where `highest` is the highest one in sight, or `None` when that cannot be.
///
/// It is above by a random number. A power loss may have kept entries of the session before and lost every place that tells how
/// far that had counted: this session's own sector, the starts of the halves. Nothing but chance keeps such entries from being
/// taken for the new session's, whose own entries may come to end where they start.
pub fn generation_above(highest: u64) -> Option<u64> {
    let [a, b, c, d, ..] = process::random_uuid();
    let generation = highest.checked_add(1 + u64::from(u32::from_le_bytes([a, b, c, d])))?;
    (generation <= GENERATION_MAX).then_some(generation)
}

struct Half {
    half: u64,
    /// `None` when no entry counts.
    generation: Option<u64>,
    marks: Vec<Mark>,
    used: u64,
}

fn read_half(storage: &impl Storage, half: u64, lowest: u64, clusters: u64) -> io::Result<Half> {
    let mut found = Half { half, generation: None, marks: Vec::new(), used: 0 };
    let mut reader = HalfReader::new(storage, half);
    while let Some(entry) = read_entry(&mut reader, found.used, clusters)? {
        // What an earlier generation left further on does not count. A generation belongs to one half.
        let counts = entry.generation >= lowest
            && entry.generation % 2 == half
            && found.generation.is_none_or(|generation| generation == entry.generation);
        if !counts {
            break;
        }
        found.generation = Some(entry.generation);
        found.used += (ENTRY_HEAD_BYTES + entry.marks.len() * MARK_BYTES) as u64;
        found.marks.extend(entry.marks);
    }
    Ok(found)
}

/// Reads a half from its start on, piece by piece, each larger than the last: most logs are short, and who takes a long one over from a dead session
/// has a guest that waits.
struct HalfReader<'s, S> {
    storage: &'s S,
    start: u64,
    /// The piece that was read last, and where in the half it starts.
    piece: Vec<u8>,
    piece_at: u64,
}

/// The first piece of a half that is read, and the largest.
const PIECE_BYTES_MIN: usize = 4 << 10;
const PIECE_BYTES_MAX: usize = 1 << 20;

impl<S: Storage> HalfReader<'_, S> {
    fn new(storage: &S, half: u64) -> HalfReader<'_, S> {
        HalfReader { storage, start: half_start(half), piece: Vec::new(), piece_at: 0 }
    }

    /// The `len` bytes at `at`, or `None` when the half ends ahead of them.
    fn bytes(&mut self, at: u64, len: usize) -> io::Result<Option<&[u8]>> {
        let rest = LOG_HALF_BYTES - at;
        if len as u64 > rest {
            return Ok(None);
        }
        let held = |reader: &Self| at - reader.piece_at + len as u64 <= reader.piece.len() as u64;
        if !held(self) {
            let next = (2 * self.piece.len()).clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX).max(len);
            self.piece.resize((next as u64).min(rest) as usize, 0);
            self.piece_at = at;
            self.storage.read_alone_at(Writable::from_mut_slice(&mut self.piece), self.start + at)?;
        }
        let from = (at - self.piece_at) as usize;
        Ok(Some(&self.piece[from..from + len]))
    }
}

struct Entry {
    generation: u64,
    marks: Vec<Mark>,
}

/// The entry at `at` in a half, where an earlier one ended, or `None` when there is no valid one.
fn read_entry<S: Storage>(reader: &mut HalfReader<'_, S>, at: u64, clusters: u64) -> io::Result<Option<Entry>> {
    let Some(head) = reader.bytes(at, ENTRY_HEAD_BYTES)? else { return Ok(None) };
    let [checksum, count] =
        [&head[..4], &head[4..8]].map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    if count == 0 || count as usize > MARKS_PER_ENTRY_MAX {
        return Ok(None);
    }
    let Some(bytes) = reader.bytes(at, ENTRY_HEAD_BYTES + count as usize * MARK_BYTES)? else { return Ok(None) };
    if crc32c::crc32c(&bytes[4..]) != checksum {
        return Ok(None);
    }
    let (numbers, _) = bytes[8..].as_chunks::<8>();
    let mut numbers = numbers.iter().map(|bytes| u64::from_le_bytes(*bytes));
    let generation = numbers.next().unwrap_or(0);
    // Twice the limit, because a session that starts at it counts on.
    if generation > 2 * GENERATION_MAX {
        return Ok(None);
    }
    let mut marks = Vec::with_capacity(count as usize);
    while let (Some(first), Some(count)) = (numbers.next(), numbers.next()) {
        let mark = Mark { first: first & !ZERO_BIT, count, zero: first & ZERO_BIT != 0 };
        if count > CLUSTERS_MAX || mark.first.checked_add(count).is_none_or(|end| end > clusters) {
            return Ok(None);
        }
        marks.push(mark);
    }
    Ok(Some(Entry { generation, marks }))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::block::storage::FileStorage;

    /// A file, and how often it is read.
    struct Counted(FileStorage, AtomicUsize);

    impl Storage for Counted {
        fn read_at(&self, into: Writable<'_>, offset: u64) -> io::Result<()> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.read_at(into, offset)
        }

        fn write_at(&self, from: &[Readable<'_>], offset: u64) -> io::Result<()> {
            self.0.write_at(from, offset)
        }

        fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
            self.0.punch_hole(offset, len)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.0.set_len(len)
        }

        fn sync(&self) -> io::Result<()> {
            self.0.sync()
        }
    }

    /// A guest waits while a log is read: one of hundreds of thousands of entries takes few reads, and so does an empty one.
    #[test]
    fn a_full_log_is_read_back_with_few_reads() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LOG_START + 2 * LOG_HALF_BYTES).unwrap();
        let storage = Counted(FileStorage::new(file).unwrap(), AtomicUsize::new(0));
        let mut log = MarkLog::new(6);
        let mut written = Vec::new();
        for turn in 0..2 {
            // Entries of all lengths, so that they lie over the ends of pieces in many ways, until the half is full.
            for entry in 0.. {
                let length = if entry % 1000 == 999 { MARKS_PER_ENTRY_MAX as u64 } else { 1 + entry % 5 };
                let marks =
                    (0..length).map(|mark| Mark { first: entry + mark, count: 1 + mark % 3, zero: mark % 2 == 0 });
                let marks: Vec<Mark> = marks.collect();
                match log.append(&marks, &storage) {
                    Ok(()) => written.extend(marks),
                    Err(_) => break,
                }
            }
            if turn == 0 {
                log.turn();
            }
        }
        let replay = replay(&storage, 6, 1 << 40).unwrap();
        assert!(replay.marks == written && replay.log == log && replay.other_half_counts);
        let reads = storage.1.swap(0, Ordering::Relaxed);
        assert!(reads < 100, "{reads} reads for {} marks", written.len());
        assert!(super::replay(&storage, 8, 1 << 40).unwrap().marks.is_empty());
        assert_eq!(storage.1.load(Ordering::Relaxed), 2);
    }

    /// A file can hold entries of the generation that is written, where nobody has been yet.
    #[test]
    fn a_log_ends_where_it_was_last_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LOG_START + 2 * LOG_HALF_BYTES).unwrap();
        let storage = FileStorage::new(file).unwrap();
        let mark = |first| Mark { first, count: 1, zero: true };
        let mut lies = MarkLog::new(6);
        (0..4).for_each(|number| lies.append(&[mark(number)], &storage).unwrap());
        storage.write_at(&[Readable::from_slice(&[0xff; 4])], half_start(0)).unwrap();
        let Replay { marks, mut log, .. } = replay(&storage, 6, 1 << 40).unwrap();
        assert_eq!(marks, []);
        for number in 10..12 {
            log.append(&[mark(number)], &storage).unwrap();
            let replay = replay(&storage, 6, 1 << 40).unwrap();
            assert_eq!(replay.marks, (10..=number).map(mark).collect::<Vec<_>>());
            assert_eq!(replay.log, log);
        }
    }
}
