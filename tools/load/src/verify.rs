//! Random requests whose answers are checked: what was written is what is read.
//!
//! Keeps one generation for each sector (see `content`). Requests that would overlap one in flight
//! are not made, because the outcome of those is nobody's promise. Knows nothing of queues' workings.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::content;
use crate::device::Config;
use crate::drive::{Answer, Client};
use crate::request::{Operation, Part, Request, SECTOR_BYTES};
use crate::sys::SharedMemory;

/// A sector that was zeroed, and one whose contents are nobody's promise (discarded).
const ZERO: u32 = u32::MAX;
const UNKNOWN: u32 = u32::MAX - 1;
/// How often a place is looked for that no request in flight overlaps.
const TRIES: usize = 100;

/// What a sector holds that nobody has written yet.
#[derive(Debug)]
pub enum Base {
    /// `content` of the generation `BASE`, and zeros from this many bytes on.
    Content(u64),
    /// The bytes of this file, and zeros after its end.
    File(File),
    Unknown,
}

/// Random checked requests over the start of a disk.
#[derive(Debug)]
pub struct Verifier {
    base: Base,
    config: Config,
    block_bytes: u32,
    generations: Vec<u32>,
    generation_last: u32,
    in_flight: Vec<Request>,
    /// While set: the next block of the pass that reads everything back.
    pass: Option<u64>,
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
            generations: vec![content::BASE; (range_bytes / SECTOR_BYTES) as usize],
            generation_last: content::BASE,
            in_flight: Vec::new(),
            pass: None,
            requests_left: 0,
            random: fastrand::Rng::with_seed(seed),
            scratch: vec![0; block_bytes as usize],
            expected: vec![0; SECTOR_BYTES as usize],
        }
    }

    /// Makes this many random requests next.
    pub fn start_random(&mut self, requests: u64) {
        (self.requests_left, self.pass) = (requests, None);
    }

    /// Reads everything back next.
    pub fn start_pass(&mut self) {
        self.pass = Some(0);
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
        self.generation_last = written.copied().max().unwrap_or(content::BASE);
        Ok(())
    }

    pub fn save(&self, path: &Path) -> io::Result<()> {
        let bytes: Vec<u8> = self.generations.iter().flat_map(|it| it.to_le_bytes()).collect();
        File::create(path)?.write_all(&bytes)
    }

    fn sectors(request: &Request) -> std::ops::Range<usize> {
        let start = (request.offset / SECTOR_BYTES) as usize;
        start..start + request.bytes as usize / SECTOR_BYTES as usize
    }

    /// A random request that overlaps none in flight.
    fn random_request(&mut self) -> Option<Request> {
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
        for _ in 0..TRIES {
            let sectors = self.random.u64(1..=sectors_max);
            let sector = self.random.u64(..=self.generations.len() as u64 - sectors);
            let request = Request {
                operation,
                offset: sector * SECTOR_BYTES,
                bytes: (sectors * SECTOR_BYTES) as u32,
                part: Part::Whole,
            };
            if !self.in_flight.iter().any(|other| overlap(other, &request)) {
                return Some(request);
            }
        }
        None
    }

    fn pass_request(&mut self, at: u64) -> Option<Request> {
        let end = self.generations.len() as u64 * SECTOR_BYTES;
        let bytes = u64::from(self.block_bytes).min(end.checked_sub(at)?);
        self.pass = Some(at + bytes);
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
            (content::BASE, Base::Content(bytes)) if offset >= *bytes => zeros(),
            (content::BASE, Base::File(file)) => {
                self.expected.fill(0);
                read_at_most(file, &mut self.expected, offset)?;
                let mut pairs = data.iter().zip(&self.expected);
                pairs.position(|(found, wanted)| found != wanted).map(|at| offset + at as u64)
            }
            _ => content::mismatch(data, offset, generation),
        };
        match (mismatch, generation) {
            (None, _) => Ok(()),
            (Some(at), ZERO) => bail!("byte {at} of the disk should be zero"),
            (Some(at), content::BASE) => bail!("byte {at} of the disk should be the base's"),
            (Some(at), _) => bail!("byte {at} of the disk is not what write {generation} put there"),
        }
    }
}

impl Client for Verifier {
    fn next(&mut self, _queue: usize, _slot: usize) -> Option<Request> {
        let request = match self.pass {
            Some(at) => self.pass_request(at)?,
            None => {
                self.requests_left = self.requests_left.checked_sub(1)?;
                self.random_request()?
            }
        };
        self.in_flight.push(request);
        Some(request)
    }

    fn fill(&mut self, request: &Request, memory: &SharedMemory, data: usize) {
        self.generation_last += 1;
        let bytes = &mut self.scratch[..request.bytes as usize];
        content::fill(bytes, request.offset, self.generation_last);
        memory.write(data, bytes);
        // No other request touches these sectors until this one is done, so saying it now is safe.
        self.generations[Self::sectors(request)].fill(self.generation_last);
    }

    fn done(&mut self, request: &Request, answer: &Answer) -> Result<()> {
        if let Some(index) = self.in_flight.iter().position(|other| other == request) {
            self.in_flight.swap_remove(index);
        }
        let mut written = 1;
        match request.operation {
            Operation::Read => {
                written += request.bytes;
                let mut data = std::mem::take(&mut self.scratch);
                answer.memory.read(answer.data, &mut data[..request.bytes as usize]);
                let sectors = data.chunks_exact(SECTOR_BYTES as usize);
                for (sector, data) in Self::sectors(request).zip(sectors) {
                    let offset = sector as u64 * SECTOR_BYTES;
                    self.check(data, offset, self.generations[sector])?;
                }
                self.scratch = data;
            }
            Operation::WriteZeroes => self.generations[Self::sectors(request)].fill(ZERO),
            Operation::Discard => self.generations[Self::sectors(request)].fill(UNKNOWN),
            Operation::Write | Operation::Flush => {}
        }
        let found = answer.written;
        ensure!(found == written, "{request:?}: the used length is {found}, not {written}");
        Ok(())
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
