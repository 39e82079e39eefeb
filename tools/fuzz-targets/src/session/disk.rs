//! [`Disk`]: what each sector may hold, after writes that completed, that may have happened, and that nobody knows of.

use std::ops::Range;

use smallvec::{SmallVec, smallvec};

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// What a sector may hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// What the image has there.
    Base,
    /// Zeros.
    Zero,
    /// What the write of this number put there.
    Written(u16),
    /// Whatever a guest that means harm has put there.
    Anything,
}

/// All that a sector may hold.
pub type Contents = SmallVec<[Content; 2]>;

/// What the write of this number puts into a sector; the image's own bytes are those of number 0.
pub fn pattern(number: u16, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for word in bytes.as_chunks_mut::<8>().0 {
        *word = (u64::from(number) << 32 | sector << 8 | 0x80).to_le_bytes();
    }
    bytes
}

/// A disk, as a model.
#[derive(Clone)]
pub struct Disk {
    base_sectors: u64,
    sectors: Vec<Contents>,
}

impl Disk {
    /// One over an image, or over none, to which nothing was written.
    pub fn new(base_sectors: u64, sectors: u64) -> Disk {
        Disk { base_sectors, sectors: vec![smallvec![Content::Base]; sectors as usize] }
    }

    /// How many sectors it has.
    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// Makes it larger.
    pub fn grow(&mut self, sectors: u64) {
        self.sectors.resize(sectors as usize, smallvec![Content::Zero]);
    }

    /// From here on nobody knows what is where.
    pub fn lose_track(&mut self) {
        self.sectors.fill(smallvec![Content::Anything]);
    }

    /// What some sectors may hold now.
    pub fn contents(&self, range: Range<u64>) -> Vec<Contents> {
        self.sectors[range.start as usize..range.end as usize].to_vec()
    }

    /// A write to some sectors may happen from now on.
    pub fn begin(&mut self, range: Range<u64>, content: Content) {
        for sector in range {
            let contents = &mut self.sectors[sector as usize];
            if !contents.contains(&content) {
                contents.push(content);
            }
        }
    }

    /// It has happened, and what else may have been written to these sectors meanwhile is among `rivals`.
    pub fn complete(&mut self, range: Range<u64>, content: Content, rivals: &[(Range<u64>, Content)]) {
        for sector in range {
            let others = rivals.iter().filter(|(range, _)| range.contains(&sector)).map(|(_, content)| *content);
            self.sectors[sector as usize] = std::iter::once(content).chain(others).collect();
        }
    }

    /// Sees that what was read of some sectors is among what they may hold.
    #[track_caller]
    pub fn check(&self, start: u64, bytes: &[u8], contents: &[Contents]) {
        for ((sector, contents), bytes) in (start..).zip(contents).zip(bytes.as_chunks::<SECTOR>().0) {
            let holds = |content: &Content| match content {
                Content::Anything => true,
                Content::Base if sector < self.base_sectors => *bytes == pattern(0, sector),
                Content::Base | Content::Zero => *bytes == [0; SECTOR],
                Content::Written(number) => *bytes == pattern(*number, sector),
            };
            assert!(contents.iter().any(holds), "sector {sector} begins with {:x?}: not {contents:?}", &bytes[..8]);
        }
    }
}
