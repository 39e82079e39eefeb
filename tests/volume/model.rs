//! The model: a volume against a byte vector, over real files and over the simulated disk.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::LazyLock;

use pando::block::base::Base;
use pando::block::delta::header::{BaseIdentity, Header};
use pando::block::delta::open::{self, NewDelta};
use pando::block::delta::{self, Delta, Lifetime};
use pando::block::storage::{FileStorage, Storage};
use pando::block::{Batch, Error, Volume};
use pando::digest::Digest;
use pando::sys::buffers::{Readable, Writable};
use pando::units::{ClusterSize, SECTOR_BYTES};
use rand::RngExt;
use rand::rngs::StdRng;

use super::disk::{Counts, Disk};
use super::history::{Context, seeded, seeds};

/// What a volume is made of. `base_bytes` of `None` is a blank volume.
#[derive(Clone, Copy, Debug)]
struct Shape {
    cluster_bytes: u64,
    base_bytes: Option<u64>,
    virtual_bytes: u64,
}

const fn shape(cluster_bytes: u64, base_bytes: Option<u64>, virtual_bytes: u64) -> Shape {
    Shape { cluster_bytes, base_bytes, virtual_bytes }
}

const SHAPES: [Shape; 9] = [
    // The base ends within a sector, and the volume within a cluster.
    shape(4 << 10, Some(1_000_001), (3 << 20) + 1536),
    shape(64 << 10, Some(1_000_001), (20 << 20) + 512),
    // The base is all of the volume: whole clusters, and not.
    shape(4 << 10, Some(2 << 20), 2 << 20),
    shape(4 << 10, Some((2 << 20) + 512), (2 << 20) + 512),
    shape(64 << 10, Some((4 << 20) + 512), (4 << 20) + 512),
    // The base ends where a cluster does, and behind it one begins.
    shape(4 << 10, Some(1 << 20), (1 << 20) + 512),
    // The base ends just behind the first group of clusters.
    shape(4 << 10, Some((63 << 20) + 512), 65 << 20),
    // No base, and one without a byte.
    shape(64 << 10, None, (1 << 20) + 1024),
    shape(4 << 10, Some(0), 1 << 20),
];

impl Shape {
    fn new_delta(&self) -> NewDelta {
        NewDelta {
            base: self.base_bytes.map(|bytes| BaseIdentity { digest: Digest([7; 32]), bytes }),
            virtual_bytes: Some(self.virtual_bytes),
            cluster: ClusterSize::from_bytes(self.cluster_bytes).unwrap(),
        }
    }
}

/// A volume beside the vector that it is compared with.
struct Pair<'a, S> {
    volume: Volume<S>,
    bytes: Vec<u8>,
    batch: Batch,
    shape: Shape,
    open: &'a dyn Fn() -> Volume<S>,
}

/// Random bytes of which parts are written, the same in all tests.
static NOISE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut rng = seeded(1).0;
    std::iter::repeat_with(|| rng.random::<u64>().to_le_bytes()).take((32 << 20) / 8).flatten().collect()
});

impl<S: Storage> Pair<'_, S> {
    /// Goes through random requests.
    fn run(&mut self, requests: usize, rng: &mut StdRng) {
        for _ in 0..requests {
            match rng.random_range(0..16) {
                0..6 => self.write(rng),
                6..10 => {
                    let range = self.range(rng);
                    self.compare(range, rng);
                }
                10 => self.discard(rng),
                11..13 => self.zeroes(rng),
                13 => self.volume.flush().unwrap(),
                14 => self.commit(),
                _ => self.reopen(rng),
            }
        }
        self.commit();
        self.compare(0..self.shape.virtual_bytes, rng);
    }

    /// Sectors at random, as bytes: a few, or many, rarely more than a stretch, often at the end.
    fn range(&self, rng: &mut StdRng) -> Range<u64> {
        let sectors = self.shape.virtual_bytes / SECTOR_BYTES;
        let stretch = 256 * self.shape.cluster_bytes / SECTOR_BYTES;
        let len_max = match rng.random_range(0..16) {
            0 => stretch + stretch / 2,
            1..6 => 4 * self.shape.cluster_bytes / SECTOR_BYTES,
            _ => 16,
        };
        let len = rng.random_range(1..=len_max).min(sectors);
        let start = match rng.random_range(0..8) {
            0 => sectors - len,
            1 => (self.shape.base_bytes.unwrap_or(0) / SECTOR_BYTES).saturating_sub(len / 2).min(sectors - len),
            _ => rng.random_range(0..=sectors - len),
        };
        start * SECTOR_BYTES..(start + len) * SECTOR_BYTES
    }

    fn write(&mut self, rng: &mut StdRng) {
        let range = self.range(rng);
        let len = (range.end - range.start) as usize;
        let start = rng.random_range(0..=NOISE.len() - len);
        let bytes = &NOISE[start..start + len];
        let buffers: Vec<Readable> = split(len, rng).into_iter().map(|r| Readable::from_slice(&bytes[r])).collect();
        self.volume.write(range.start, &buffers, &mut self.batch).unwrap();
        self.bytes[range.start as usize..range.end as usize].copy_from_slice(bytes);
    }

    fn discard(&mut self, rng: &mut StdRng) {
        let range = self.range(rng);
        self.volume.discard(range.start, range.end - range.start).unwrap();
        let cluster = self.shape.cluster_bytes;
        let start = range.start.next_multiple_of(cluster);
        let end = if range.end == self.shape.virtual_bytes { range.end } else { range.end / cluster * cluster };
        if start < end {
            self.bytes[start as usize..end as usize].fill(0);
        }
    }

    fn zeroes(&mut self, rng: &mut StdRng) {
        let range = self.range(rng);
        self.volume.write_zeroes(range.start, range.end - range.start, rng.random(), &mut self.batch).unwrap();
        self.bytes[range.start as usize..range.end as usize].fill(0);
    }

    fn commit(&mut self) {
        self.volume.commit(&mut self.batch).unwrap();
    }

    /// Opens the volume again, in good order or as after the death of the process.
    fn reopen(&mut self, rng: &mut StdRng) {
        self.commit();
        if rng.random() {
            self.volume.close().unwrap();
        }
        self.volume = (self.open)();
        let range = self.range(rng);
        self.compare(range, rng);
    }

    /// Reads a range into buffers of odd sizes.
    fn compare(&self, range: Range<u64>, rng: &mut StdRng) {
        let mut found = vec![0xee; (range.end - range.start) as usize];
        let parts = split(found.len(), rng);
        let mut buffers = Vec::new();
        let mut rest = &mut found[..];
        for part in parts {
            let (buffer, behind) = rest.split_at_mut(part.len());
            buffers.push(Writable::from_mut_slice(buffer));
            rest = behind;
        }
        self.volume.read(range.start, &buffers).unwrap();
        let expected = &self.bytes[range.start as usize..range.end as usize];
        if found != expected {
            let at = found.iter().zip(expected).position(|(found, expected)| found != expected).unwrap_or(0);
            panic!("byte {} of {range:?} is {}, expected {}", range.start + at as u64, found[at], expected[at]);
        }
    }
}

/// Cuts `len` bytes into pieces of any length, some of them empty.
fn split(len: usize, rng: &mut StdRng) -> Vec<Range<usize>> {
    let (mut parts, mut at) = (Vec::new(), 0);
    while at < len {
        let end = match rng.random_range(0..8) {
            0 => at,
            1 => at + rng.random_range(1..9),
            2 => at + (len - at) / 2,
            _ => at + rng.random_range(1..200_000),
        };
        parts.push(at..end.min(len));
        at = end.min(len);
    }
    parts
}

/// A base with random contents, and the bytes of a volume over it.
fn base(shape: Shape, rng: &mut StdRng) -> (Option<File>, Vec<u8>) {
    let start = rng.random_range(0..NOISE.len());
    let noise = NOISE[start..].iter().chain(NOISE.iter()).chain(NOISE.iter());
    let mut bytes: Vec<u8> = noise.copied().take(shape.base_bytes.unwrap_or(0) as usize).collect();
    let file = shape.base_bytes.map(|_| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    });
    bytes.resize(shape.virtual_bytes as usize, 0);
    (file, bytes)
}

fn map(base: &Option<File>) -> Base {
    base.as_ref().map_or_else(|| Ok(Base::empty()), |base| Base::map(base, "base".into())).unwrap()
}

fn start<S: Storage>(storage: S, header: &Header, lifetime: Lifetime) -> Delta<S> {
    Delta::start(storage, "delta".to_owned(), header.clone(), lifetime).unwrap()
}

fn check<S: Storage>(shape: Shape, seed: u64, storage: &dyn Fn() -> S, header: &Header) {
    let _context = Context(format!("{shape:?}"));
    let (mut rng, _context) = seeded(seed);
    let (base, bytes) = base(shape, &mut rng);
    let open = || Volume::cow(map(&base), start(storage(), header, Lifetime::Persistent));
    Pair { volume: open(), bytes, batch: Batch::default(), shape, open: &open }.run(150, &mut rng);
}

#[test]
fn over_real_files() {
    for (shape, seed) in SHAPES.into_iter().flat_map(|shape| seeds(0..2).into_iter().map(move |seed| (shape, seed))) {
        let (file, header) = open::create_unnamed(&std::env::temp_dir(), &shape.new_delta()).unwrap();
        check(shape, seed, &|| FileStorage::new(file.try_clone().unwrap()).unwrap(), &header);
    }
}

#[test]
fn over_real_files_past_the_page_cache() {
    for (shape, seed) in SHAPES.into_iter().flat_map(|shape| seeds(3..5).into_iter().map(move |seed| (shape, seed))) {
        let (file, header) = open::create_unnamed(&std::env::temp_dir(), &shape.new_delta()).unwrap();
        let Ok(direct) = open::open_direct(&file, "delta", false) else {
            println!("skipped: no O_DIRECT here");
            return;
        };
        let copy = |file: &File| file.try_clone().unwrap();
        check(shape, seed, &|| FileStorage::with(copy(&file), Some(copy(&direct))).unwrap(), &header);
    }
}

#[test]
fn over_the_simulated_disk() {
    for (shape, seed) in SHAPES.into_iter().flat_map(|shape| seeds(2..3).into_iter().map(move |seed| (shape, seed))) {
        let header = shape.new_delta().header().unwrap();
        let disk = Disk::without_power_loss();
        delta::format(&disk, &header).unwrap();
        check(shape, seed, &|| disk.clone(), &header);
    }
}

fn write(volume: &Volume<impl Storage>, offset: u64, len: usize) {
    let mut batch = Batch::default();
    volume.write(offset, &[Readable::from_slice(&vec![1; len])], &mut batch).unwrap();
    volume.commit(&mut batch).unwrap();
}

#[test]
fn space_comes_back() {
    const LEN: u64 = 8 << 20;
    let shape = shape(4 << 10, Some(16 << 20), 16 << 20);
    let (base, _) = base(shape, &mut seeded(1).0);
    let (file, header) = open::create_unnamed(&std::env::temp_dir(), &shape.new_delta()).unwrap();
    let held = || {
        file.sync_all().unwrap();
        file.metadata().unwrap().blocks() * 512
    };
    let storage = FileStorage::new(file.try_clone().unwrap()).unwrap();
    let volume = Volume::cow(map(&base), start(storage, &header, Lifetime::Persistent));
    let at_first = held();
    assert!(at_first < 1 << 20, "a new delta holds next to nothing: {at_first}");

    let give_back: [(&str, &dyn Fn()); 2] = [
        ("discard", &|| volume.discard(1 << 20, LEN).unwrap()),
        ("write zeroes", &|| volume.write_zeroes(1 << 20, LEN, true, &mut Batch::default()).unwrap()),
    ];
    for (name, give_back) in give_back {
        write(&volume, 1 << 20, LEN as usize);
        assert!(held() >= LEN, "{name}");
        give_back();
        let left = held();
        assert!(left < 1 << 20, "{name}: {left} bytes left");
    }

    write(&volume, 1 << 20, LEN as usize);
    volume.write_zeroes(1 << 20, LEN, false, &mut Batch::default()).unwrap();
    assert!(held() >= LEN, "kept when not to be given back");
}

/// A new volume on the simulated disk, over a base of random bytes.
fn simulated(lifetime: Lifetime) -> (Disk, Volume<Disk>) {
    let shape = shape(4 << 10, Some(1 << 20), 2 << 20);
    let (base, _) = base(shape, &mut seeded(1).0);
    let header = shape.new_delta().header().unwrap();
    let disk = Disk::default();
    delta::format(&disk, &header).unwrap();
    (disk.clone(), Volume::cow(map(&base), start(disk, &header, lifetime)))
}

#[test]
fn a_flush_syncs_as_often_as_it_must() {
    let (disk, volume) = simulated(Lifetime::Persistent);
    let syncs_of = |act: &dyn Fn()| {
        act();
        let before = disk.counts().syncs;
        volume.flush().unwrap();
        disk.counts().syncs - before
    };
    assert_eq!(syncs_of(&|| ()), 0, "a volume that was only opened");
    assert_eq!(syncs_of(&|| write(&volume, 512, 512)), 2, "a new cluster: data, then its mark");
    assert_eq!(syncs_of(&|| ()), 0, "nothing since the last flush");
    assert_eq!(syncs_of(&|| write(&volume, 1024, 512)), 1, "a cluster that is in the delta: data");
    assert_eq!(syncs_of(&|| volume.discard(0, 4096).unwrap()), 2, "a discard");
    assert_eq!(syncs_of(&|| volume.discard(0, 4096).unwrap()), 0, "what is discarded already");
    assert_eq!(syncs_of(&|| volume.discard(1 << 20, 1 << 20).unwrap()), 0, "what is zero by nature");
    let into = &mut [0; 4096];
    assert_eq!(syncs_of(&|| volume.read(0, &[Writable::from_mut_slice(&mut into.clone())]).unwrap()), 0, "a read");
}

#[test]
fn an_ephemeral_volume_costs_no_sync() {
    let (disk, volume) = simulated(Lifetime::Ephemeral);
    let before = disk.counts();
    write(&volume, 512, 512);
    volume.flush().unwrap();
    volume.discard(0, 4096).unwrap();
    volume.close().unwrap();
    // The cluster, its mark, and the hole's.
    assert_eq!(disk.counts(), Counts { writes: before.writes + 3, punches: 1, reads: before.reads + 1, ..before });
}

#[test]
fn a_read_only_volume_is_its_base() {
    let (base, bytes) = base(shape(4 << 10, Some(100_000), 100_000), &mut seeded(1).0);
    let volume: Volume = Volume::read_only(map(&base));
    assert!(volume.is_read_only() && volume.bytes() == 100_000);
    let mut found = vec![0; bytes.len()];
    volume.read(0, &[Writable::from_mut_slice(&mut found)]).unwrap();
    assert!(found == bytes);
    let mut batch = Batch::default();
    let is_refused = |result| matches!(result, Err(Error::ReadOnly));
    assert!(is_refused(volume.write(0, &[Readable::from_slice(&[1; 512])], &mut batch)));
    assert!(is_refused(volume.write_zeroes(0, 512, false, &mut batch)));
    assert!(is_refused(volume.discard(0, 4096)));
    volume.commit(&mut batch).unwrap();
    volume.flush().unwrap();
    volume.close().unwrap();
}

#[test]
fn what_lies_outside_is_refused() {
    let (_, volume) = simulated(Lifetime::Persistent);
    let end = volume.bytes();
    let mut batch = Batch::default();
    let is_refused = |result| matches!(result, Err(Error::OutOfRange { .. }));
    for offset in [end - 512, end, end + 512, u64::MAX - 511, u64::MAX] {
        let mut bytes = [1; 1024];
        assert!(is_refused(volume.read(offset, &[Writable::from_mut_slice(&mut bytes)])), "{offset}");
        assert!(is_refused(volume.write(offset, &[Readable::from_slice(&bytes)], &mut batch)), "{offset}");
        assert!(is_refused(volume.write_zeroes(offset, 1024, true, &mut batch)), "{offset}");
        assert!(is_refused(volume.discard(offset, 1024)), "{offset}");
    }
    // Nothing at all is within, wherever the volume has bytes or ends.
    for offset in [0, 512, 4096, 1 << 20, end] {
        volume.read(offset, &[]).unwrap();
        volume.write(offset, &[], &mut batch).unwrap();
        volume.write_zeroes(offset, 0, true, &mut batch).unwrap();
        volume.discard(offset, 0).unwrap();
    }
}
