//! What a volume may hold, sector by sector: [`Stamp`]s that say which write a sector's contents are of, and [`Expected`], which
//! knows the stamps that a process death or a power loss may leave.

use std::collections::BTreeMap;
use std::ops::Range;

use pando::units::SECTOR_BYTES;

/// The contents of one sector: this number, over and over. No two sectors and no two writes have the same, except for zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(pub u64);

impl Stamp {
    pub const ZERO: Stamp = Stamp(0);
    /// The number of the "write" that made the base.
    pub const BASE: u64 = 1;

    /// The stamp of a sector as write number `write` (from 2) leaves it.
    pub fn new(write: u64, sector: u64) -> Stamp {
        Stamp(write << 32 | sector)
    }

    /// The sector's bytes.
    pub fn bytes(self) -> [u8; SECTOR_BYTES as usize] {
        let mut bytes = [0; SECTOR_BYTES as usize];
        bytes.as_chunks_mut::<8>().0.fill(self.0.to_le_bytes());
        bytes
    }

    /// The stamp of which these are the bytes, or `None` when they are of no single one.
    pub fn of(bytes: &[u8]) -> Option<Stamp> {
        let (words, _) = bytes.as_chunks::<8>();
        words.iter().all(|word| word == &words[0]).then(|| Stamp(u64::from_le_bytes(words[0])))
    }
}

impl std::fmt::Display for Stamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 >> 32 {
            0 if self.0 == 0 => write!(f, "zeros"),
            write => write!(f, "write {write} of sector {}", self.0 as u32),
        }
    }
}

/// What the watched sectors of a volume may hold.
#[derive(Clone)]
pub struct Expected {
    sectors: BTreeMap<u64, Sector>,
}

#[derive(Clone)]
struct Sector {
    /// The last completed write.
    now: Stamp,
    /// Writes since that are not complete, the oldest first.
    in_flight: Vec<Stamp>,
    /// What a power loss may leave: what was there at the last flush, and everything since.
    since_flush: Vec<Stamp>,
}

impl Sector {
    fn settled(now: Stamp) -> Sector {
        Sector { now, in_flight: Vec::new(), since_flush: vec![now] }
    }
}

/// After what a volume is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    ProcessDeath,
    PowerLoss,
}

impl Expected {
    /// Of these sectors, which hold what `stamp` says.
    pub fn new(watched: &[Range<u64>], stamp: impl Fn(u64) -> Stamp) -> Expected {
        Expected {
            sectors: watched.iter().cloned().flatten().map(|sector| (sector, Sector::settled(stamp(sector)))).collect(),
        }
    }

    fn sector(&mut self, sector: u64) -> &mut Sector {
        self.sectors.get_mut(&sector).unwrap_or_else(|| panic!("sector {sector} is not watched"))
    }

    /// A write has begun.
    pub fn begin(&mut self, sector: u64, stamp: Stamp) {
        let sector = self.sector(sector);
        sector.in_flight.push(stamp);
        sector.since_flush.push(stamp);
    }

    /// A write is complete. So are those of the sector that began before it, which it hides.
    pub fn complete(&mut self, sector: u64, stamp: Stamp) {
        let sector = self.sector(sector);
        // Not there when a later write hides it already.
        if let Some(index) = sector.in_flight.iter().position(|begun| *begun == stamp) {
            sector.now = stamp;
            sector.in_flight.drain(..=index);
        }
    }

    /// A flush that began when all completed writes were complete is complete.
    pub fn flushed(&mut self) {
        for sector in self.sectors.values_mut() {
            sector.since_flush.clear();
            sector.since_flush.push(sector.now);
            sector.since_flush.extend(&sector.in_flight);
        }
    }

    /// The same, but for a sector that may have been written since.
    pub fn flushed_except(&mut self, except: u64) {
        let since = self.sector(except).since_flush.clone();
        self.flushed();
        self.sector(except).since_flush = since;
    }

    /// Compares the volume while it runs.
    pub fn check_running(&self, read: impl Fn(u64) -> Stamp) {
        for (number, sector) in &self.sectors {
            let found = read(*number);
            // What is not complete may be seen, and what has failed may have happened.
            assert!(
                found == sector.now || sector.in_flight.contains(&found),
                "sector {number} holds {found}, expected {}",
                sector.now
            );
        }
    }

    /// Compares the volume as it is found when it is opened again. From then on what was found counts.
    pub fn check_after(&mut self, after: After, read: impl Fn(u64) -> Stamp) {
        for (number, sector) in &mut self.sectors {
            let found = read(*number);
            match after {
                After::ProcessDeath => {
                    assert!(
                        found == sector.now || sector.in_flight.contains(&found),
                        "after the death of the process sector {number} holds {found}, expected {} or one of {:?}",
                        sector.now,
                        sector.in_flight
                    );
                    sector.now = found;
                    sector.in_flight.clear();
                }
                After::PowerLoss => {
                    assert!(
                        sector.since_flush.contains(&found),
                        "after the power loss sector {number} holds {found}, expected one of {:?}",
                        sector.since_flush
                    );
                    *sector = Sector::settled(found);
                }
            }
        }
    }

    /// The watched sectors, as ranges.
    pub fn watched(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for sector in self.sectors.keys() {
            match ranges.last_mut() {
                Some(range) if range.end == *sector => range.end += 1,
                _ => ranges.push(*sector..sector + 1),
            }
        }
        ranges
    }
}
