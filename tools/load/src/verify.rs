//! Random requests whose answers are checked: what was written is what is read.
//!
//! Keeps one generation for each sector (see `content`), as of the requests that are complete. Requests that would overlap one
//! in flight are not made, because the outcome of those is nobody's promise. Knows nothing of queues' workings.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::content;
use crate::device::Config;
use crate::drive::{Answer, Client};
use crate::request::{Operation, Part, Request, SECTOR_BYTES};
use crate::sys::SharedMemory;

/// A sector that was zeroed, and one whose contents are nobody's promise (discarded).
const ZERO: u32 = u32::MAX;
const UNKNOWN: u32 = u32::MAX - 1;
/// Below this are the generations of what disks hold before anything is written.
const FIRST_WRITTEN: u32 = 16;
/// How often a place is looked for that no request in flight overlaps.
const TRIES: usize = 100;

/// What a sector holds that nobody has written yet.
#[derive(Debug)]
pub enum Base {
    /// `content` of a generation below 16, and zeros from this many bytes on.
    Content {
        generation: u32,
        bytes: u64,
    },
    /// The bytes of this file, and zeros after its end.
    File(File),
    Unknown,
}

/// What a discard leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discards {
    /// Anything, as the standard allows.
    Anything,
    /// Zeros in whole clusters of so many bytes, and elsewhere what was there.
    ZeroClusters(u64),
}

/// Where random requests go.
#[derive(Clone, Copy, Debug, Default)]
pub struct Area {
    /// Sectors at the disk's start that are only read.
    pub kept: u64,
    /// Every second request goes to the first so many sectors, where it is close to others. 0: none does.
    pub crowded: u64,
}

/// A sector that does not hold what it should.
#[derive(Debug, thiserror::Error)]
#[error("sector {sector}, byte {byte} of the disk: expected {expected}, found {found}")]
pub struct Mismatch {
    sector: u64,
    byte: u64,
    expected: String,
    found: String,
}

/// What the next requests are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Random,
    /// Reads of everything, at this offset next.
    Pass(u64),
    /// One read of the first sector, which may be any image's.
    Look,
    Nothing,
}

/// Random checked requests over the start of a disk.
#[derive(Debug)]
pub struct Verifier {
    base: Base,
    config: Config,
    block_bytes: u32,
    discards: Discards,
    area: Area,
    /// Whether it asks for whole blocks alone, half of them reads and half writes.
    plain: bool,
    generations: Vec<u32>,
    generation_last: u32,
    /// What is in flight, and the generation of what it writes.
    in_flight: Vec<(Request, u32)>,
    phase: Phase,
    /// Whether the first sector may be any image's, and which it was last.
    looks: bool,
    seen: Option<u32>,
    requests_left: u64,
    random: fastrand::Rng,
    scratch: Vec<u8>,
    expected: Vec<u8>,
}

impl Verifier {
    pub fn new(config: Config, base: Base, range_bytes: u64, block_bytes: u32, seed: u64) -> Self {
        Self {
            base,
            config,
            block_bytes,
            discards: Discards::Anything,
            area: Area::default(),
            plain: false,
            generations: vec![content::BASE; (range_bytes / SECTOR_BYTES) as usize],
            generation_last: FIRST_WRITTEN,
            in_flight: Vec::new(),
            phase: Phase::Nothing,
            looks: false,
            seen: None,
            requests_left: 0,
            random: fastrand::Rng::with_seed(seed),
            scratch: vec![0; block_bytes as usize],
            expected: vec![0; SECTOR_BYTES as usize],
        }
    }

    /// Expects more of discards than the standard does, and keeps requests to an area.
    pub fn with(self, discards: Discards, area: Area) -> Self {
        Self { discards, area, ..self }
    }

    /// Asks for reads and writes of whole blocks alone.
    pub fn plain(self) -> Self {
        Self { plain: true, ..self }
    }

    /// Makes this many random requests next.
    pub fn start_random(&mut self, requests: u64) {
        (self.requests_left, self.phase) = (requests, Phase::Random);
    }

    /// Reads everything back next.
    pub fn start_pass(&mut self) {
        self.phase = Phase::Pass(0);
    }

    /// Reads the first sector next, whose contents tell what the disk is.
    pub fn start_look(&mut self) {
        (self.phase, self.looks, self.seen) = (Phase::Look, true, None);
    }

    /// The generation of what the look has found, if it is that of any.
    pub fn end_look(&mut self) -> Option<u32> {
        self.looks = false;
        self.seen.take()
    }

    /// The driver has another idea of its disk from now on.
    pub fn take_config(&mut self, config: Config) {
        self.config = config;
    }

    /// All of a disk on which nothing was written yet is visited from now on.
    pub fn start_over(&mut self, base: Base) {
        self.generations = vec![content::BASE; (self.config.capacity_bytes / SECTOR_BYTES) as usize];
        self.base = base;
    }

    /// The disk has become larger, and all of it is visited; what is new of it holds what the base has there.
    pub fn grow(&mut self, bytes: u64) {
        self.config.capacity_bytes = bytes;
        self.generations.resize((bytes / SECTOR_BYTES) as usize, content::BASE);
    }

    /// How much of the disk is visited.
    pub fn bytes(&self) -> u64 {
        self.generations.len() as u64 * SECTOR_BYTES
    }

    /// What was in flight has not been carried out, and will not be.
    pub fn forget_in_flight(&mut self) {
        self.in_flight.clear();
    }

    /// What is in flight may have been carried out, or some of it.
    pub fn doubt_in_flight(&mut self) {
        for (request, _) in self.in_flight.iter().filter(|(request, _)| request.operation != Operation::Read) {
            self.generations[Self::sectors(request)].fill(UNKNOWN);
        }
    }

    /// Takes up where an earlier run left off, so that what it wrote is checked too.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|mut file| file.read_to_end(&mut bytes))
            .with_context(|| format!("cannot read the state of an earlier run from {}", path.display()))?;
        let (found, wanted) = (bytes.len(), self.generations.len() * 4);
        ensure!(found == wanted, "{}: {found} bytes, {wanted} expected", path.display());
        for (generation, bytes) in self.generations.iter_mut().zip(bytes.chunks_exact(4)) {
            *generation = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        let written = self.generations.iter().filter(|generation| **generation < UNKNOWN);
        self.generation_last = written.copied().max().unwrap_or(content::BASE).max(FIRST_WRITTEN);
        Ok(())
    }

    pub fn save(&self, path: &Path) -> io::Result<()> {
        let bytes: Vec<u8> = self.generations.iter().flat_map(|it| it.to_le_bytes()).collect();
        File::create(path)?.write_all(&bytes)
    }

    fn sectors(request: &Request) -> Range<usize> {
        let start = (request.offset / SECTOR_BYTES) as usize;
        start..start + request.bytes as usize / SECTOR_BYTES as usize
    }

    /// A random request that overlaps none in flight.
    fn random_request(&mut self) -> Option<Request> {
        if self.plain {
            return self.random_block();
        }
        let operation = match self.random.u8(..100) {
            0..3 if self.config.flush => {
                return Some(Request { operation: Operation::Flush, offset: 0, bytes: 0, part: Part::Whole });
            }
            3..5 if self.config.write_zeroes => Operation::WriteZeroes,
            5..7 if self.config.discard => Operation::Discard,
            0..50 => Operation::Write,
            _ => Operation::Read,
        };
        let operation = if self.config.read_only { Operation::Read } else { operation };
        let sectors_max = u64::from(self.block_bytes) / SECTOR_BYTES;
        let first = if operation == Operation::Read { 0 } else { self.area.kept };
        let crowded = self.area.crowded > 0 && self.random.bool();
        let all = self.generations.len() as u64;
        let end = if crowded { self.area.crowded.min(all) } else { all };
        for _ in 0..TRIES {
            let sectors = self.random.u64(1..=sectors_max);
            let sector = self.random.u64(first..=end.checked_sub(sectors).filter(|last| *last >= first)?);
            let request = Request {
                operation,
                offset: sector * SECTOR_BYTES,
                bytes: (sectors * SECTOR_BYTES) as u32,
                part: Part::Whole,
            };
            if !self.in_flight.iter().any(|(other, _)| overlap(other, &request)) {
                return Some(request);
            }
        }
        None
    }

    /// A random read or write of one block that overlaps none in flight.
    fn random_block(&mut self) -> Option<Request> {
        let operation = if self.random.bool() { Operation::Write } else { Operation::Read };
        for _ in 0..TRIES {
            let block = self.random.u64(..self.bytes() / u64::from(self.block_bytes));
            let offset = block * u64::from(self.block_bytes);
            let request = Request { operation, offset, bytes: self.block_bytes, part: Part::Whole };
            if !self.in_flight.iter().any(|(other, _)| overlap(other, &request)) {
                return Some(request);
            }
        }
        None
    }

    fn pass_request(&mut self, at: u64) -> Option<Request> {
        let bytes = u64::from(self.block_bytes).min(self.bytes().checked_sub(at)?);
        self.phase = Phase::Pass(at + bytes);
        let operation = Operation::Read;
        let request = Request { operation, offset: at, bytes: bytes as u32, part: Part::Whole };
        (bytes > 0).then_some(request)
    }

    /// Checks one sector's bytes.
    fn check(&mut self, data: &[u8], offset: u64, generation: u32) -> Result<()> {
        let zeros = || data.iter().position(|byte| *byte != 0).map(|at| offset + at as u64);
        let mismatch = match (generation, &self.base) {
            (UNKNOWN, _) | (content::BASE, Base::Unknown) => None,
            (ZERO, _) => zeros(),
            (content::BASE, Base::Content { bytes, .. }) if offset >= *bytes => zeros(),
            (content::BASE, Base::Content { generation, .. }) => content::mismatch(data, offset, *generation),
            (content::BASE, Base::File(file)) => {
                self.expected.fill(0);
                read_at_most(file, &mut self.expected, offset)?;
                let mut pairs = data.iter().zip(&self.expected);
                pairs.position(|(found, wanted)| found != wanted).map(|at| offset + at as u64)
            }
            _ => content::mismatch(data, offset, generation),
        };
        let Some(byte) = mismatch else { return Ok(()) };
        let expected = match (generation, &self.base) {
            (ZERO, _) => "zeros".to_owned(),
            (content::BASE, Base::Content { bytes, .. }) if offset >= *bytes => {
                "zeros, behind the image's end".to_owned()
            }
            (content::BASE, Base::Content { generation, .. }) => format!("what image {generation} has there"),
            (content::BASE, _) => "what the base has there".to_owned(),
            _ => format!("what write {generation} put there"),
        };
        let word = byte / 8 * 8;
        let found = describe(&data[(word - offset) as usize..], word);
        Err(Mismatch { sector: offset / SECTOR_BYTES, byte, expected, found }.into())
    }

    fn check_read(&mut self, request: &Request, answer: &Answer) -> Result<()> {
        let mut data = std::mem::take(&mut self.scratch);
        answer.memory.read(answer.data, &mut data[..request.bytes as usize]);
        let mut result = Ok(());
        if self.looks {
            self.seen = content::generation_of(&data, request.offset).filter(|seen| *seen < FIRST_WRITTEN);
        } else {
            let sectors = data.chunks_exact(SECTOR_BYTES as usize);
            result = Self::sectors(request).zip(sectors).try_for_each(|(sector, data)| {
                self.check(data, sector as u64 * SECTOR_BYTES, self.generations[sector])
            });
        }
        self.scratch = data;
        result
    }

    fn note_discard(&mut self, request: &Request) {
        let sectors = Self::sectors(request);
        match self.discards {
            Discards::Anything => self.generations[sectors].fill(UNKNOWN),
            Discards::ZeroClusters(bytes) => {
                let cluster = (bytes / SECTOR_BYTES) as usize;
                let all = self.generations.len();
                // The last cluster is whole where the disk ends.
                let end = if sectors.end == all { all } else { sectors.end / cluster * cluster };
                let start = sectors.start.next_multiple_of(cluster);
                if start < end {
                    self.generations[start..end].fill(ZERO);
                }
            }
        }
    }
}

impl Client for Verifier {
    fn next(&mut self, _queue: usize, _slot: usize) -> Option<Request> {
        let request = match self.phase {
            Phase::Pass(at) => self.pass_request(at)?,
            Phase::Random => {
                self.requests_left = self.requests_left.checked_sub(1)?;
                self.random_request()?
            }
            Phase::Look => {
                self.phase = Phase::Nothing;
                Request { operation: Operation::Read, offset: 0, bytes: SECTOR_BYTES as u32, part: Part::Whole }
            }
            Phase::Nothing => return None,
        };
        self.in_flight.push((request, content::BASE));
        Some(request)
    }

    fn fill(&mut self, request: &Request, memory: &SharedMemory, data: usize) {
        // After four billion writes they begin anew; what was written so long ago is hardly what is found by mistake.
        self.generation_last =
            if self.generation_last + 1 < UNKNOWN { self.generation_last + 1 } else { FIRST_WRITTEN };
        let bytes = &mut self.scratch[..request.bytes as usize];
        content::fill(bytes, request.offset, self.generation_last);
        memory.write(data, bytes);
        if let Some((_, generation)) = self.in_flight.iter_mut().rev().find(|(other, _)| other == request) {
            *generation = self.generation_last;
        }
    }

    fn done(&mut self, request: &Request, answer: &Answer) -> Result<()> {
        let index = self.in_flight.iter().position(|(other, _)| other == request);
        let generation = index.map(|index| self.in_flight.swap_remove(index).1);
        let mut written = 1;
        match (request.operation, generation) {
            (Operation::Read, _) => {
                written += request.bytes;
                self.check_read(request, answer)?;
            }
            (Operation::Write, Some(generation)) => self.generations[Self::sectors(request)].fill(generation),
            (Operation::WriteZeroes, _) => self.generations[Self::sectors(request)].fill(ZERO),
            (Operation::Discard, _) => self.note_discard(request),
            (Operation::Write, None) | (Operation::Flush, _) => {}
        }
        let found = answer.written;
        ensure!(found == written, "{request:?}: the used length is {found}, not {written}");
        Ok(())
    }
}

/// What the bytes at `offset`, a multiple of eight, are, which should have been others.
fn describe(data: &[u8], offset: u64) -> String {
    match content::generation_of(data, offset) {
        Some(image) if image < FIRST_WRITTEN => format!("what image {image} has there"),
        Some(write) => format!("what write {write} put there"),
        None if data.iter().all(|byte| *byte == 0) => "zeros".to_owned(),
        None => format!("{:02x?}", &data[..data.len().min(16)]),
    }
}

/// Whether two requests touch the same sectors and one of them changes them.
fn overlap(a: &Request, b: &Request) -> bool {
    let reads = a.operation == Operation::Read && b.operation == Operation::Read;
    let (a_end, b_end) = (a.offset + u64::from(a.bytes), b.offset + u64::from(b.bytes));
    !reads && a.offset < b_end && b.offset < a_end
}

/// Reads what a file has at `offset`, at most as much as fits.
fn read_at_most(file: &File, mut data: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !data.is_empty() {
        match file.read_at(data, offset)? {
            0 => break,
            count => {
                data = &mut data[count..];
                offset += count as u64;
            }
        }
    }
    Ok(())
}
