//! The machine's own limit: a line's requests, done in a loop by the benchmark itself.
//!
//! Reads are copies from the mapped base, writes are bare `pwrite` to a private sparse file, flushes
//! are `fdatasync`. No ring, no other process, no copy on write: what no backend can undercut.

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::drive::{Client, Tally};
use crate::request::{Operation, Part};
use crate::suite::record::Sample;
use crate::suite::rows::{BASE_BYTES, Row};
use crate::sys::{self, MappedFile, SharedMemory};
use crate::workload::Workload;

/// How the limit reads.
#[derive(Clone, Copy, Debug)]
pub enum Reading {
    /// Copies from the mapping: no system call.
    Copy,
    /// `pread`: a system call, but through the kernel's own mapping, which has larger pages.
    Pread,
}

/// What the limit is measured on.
pub struct Bench<'a> {
    pub base: &'a File,
    pub base_mapped: &'a MappedFile,
    pub reading: Reading,
    /// Where the private file goes; it is removed afterwards.
    pub private: &'a Path,
    pub buffer_bytes: usize,
    pub seed: u64,
}

impl Bench<'_> {
    pub fn measure(&self, row: &Row, time: Duration) -> Result<Sample> {
        for workload in row.before.iter().filter(|_| row.writes()) {
            self.run(workload, None).context("preparing the limit")?;
        }
        let cpu_before = sys::thread_cpu_ns()?;
        let tally = self.run(&row.measured, Some(time))?;
        let cpu_ns = sys::thread_cpu_ns()? - cpu_before;
        if self.private.exists() {
            fs::remove_file(self.private)?;
        }
        Ok(Sample::new(&tally, cpu_ns))
    }

    fn run(&self, workload: &Workload, time: Option<Duration>) -> Result<Tally> {
        let block_bytes = workload.block_bytes as usize;
        let buffers = workload.depth.max(self.buffer_bytes / block_bytes);
        let memory = SharedMemory::new(buffers * block_bytes)?;
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(self.private)?;
        file.set_len(BASE_BYTES)?;
        let mut walker = workload.walker(1, self.seed);
        let mut tally = Tally::default();
        let start = Instant::now();
        let (mut slot, mut buffer) = (0, 0);
        // A clock look costs next to nothing beside a batch of this many requests.
        const BATCH: u64 = 32;
        while let Some(request) = walker.next(0, slot) {
            let (at, bytes) = (request.offset, request.bytes as usize);
            match request.operation {
                Operation::Read => {
                    let buffer = buffer * block_bytes;
                    match self.reading {
                        Reading::Copy => self.base_mapped.copy(at as usize, &memory, buffer, bytes),
                        Reading::Pread => memory.read_from(buffer, bytes, self.base, at)?,
                    }
                }
                Operation::Write => memory.write_to(buffer * block_bytes, bytes, &file, at)?,
                _ => file.sync_data()?,
            }
            slot = (slot + 1) % workload.depth;
            buffer = (buffer + 1) % buffers;
            tally.bytes += bytes as u64;
            if request.part != Part::First {
                tally.requests += 1;
                let look = request.part == Part::Last || tally.requests.is_multiple_of(BATCH);
                if look && time.is_some_and(|time| start.elapsed() >= time) {
                    break;
                }
            }
        }
        tally.elapsed = start.elapsed();
        Ok(tally)
    }
}
