//! Requests whose buffers hold anything, on a small volume: nothing panics, every answer is the one that a simple model
//! gives, and every read returns the model's bytes, also after the process has died or closed the delta.
#![no_main]

use std::fs::File;
use std::sync::{Arc, LazyLock};

use fuzz_targets::{Choices, unnamed_file};
use libfuzzer_sys::fuzz_target;
use pando::block::base::Base;
use pando::block::cached::{self, Patience};
use pando::block::delta::header::{BaseIdentity, Header};
use pando::block::delta::{self, Delta, Lifetime};
use pando::block::storage::FileStorage;
use pando::block::writes::Writes;
use pando::block::{Batch, BegunWrite, Volume};
use pando::digest::Digest;
use pando::sys::buffers::{Readable, Writable};
use pando::sys::file;
use pando::sys::guest::GuestMemory;
use pando::units::ClusterSize;
use pando::vhost_user::request::{self, Errand, Manner, Outcome, PutOff, Status};
use pando::vhost_user::ring::Chain;

const SECTOR: usize = 512;
/// The volume has a stretch of small clusters and part of another, and ends within a cluster.
const SECTORS: u64 = (1 << 20) / 512 + 3 * 16 + 3;
/// The base ends within the volume, and within a cluster.
const BASE_SECTORS: u64 = 1500;
const SERIAL: [u8; 20] = *b"a serial of 20 bytes";

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

static BASE_BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| (0..BASE_SECTORS).flat_map(|at| pattern(0, at)).collect());

static BASE: LazyLock<File> = LazyLock::new(|| {
    let file = unnamed_file();
    pando::sys::file::write_at(&file, &[Readable::from_slice(&BASE_BYTES)], 0).unwrap();
    file
});

/// What a sector holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Content {
    Base,
    Zero,
    /// What the write with this number put there.
    Written(u8),
}

/// What the write of this number puts into a sector; the base's own bytes are those of number 0.
fn pattern(number: u8, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for word in bytes.as_chunks_mut::<8>().0 {
        *word = (u64::from(number) << 32 | sector << 8 | 0x80).to_le_bytes();
    }
    bytes
}

impl Content {
    #[track_caller]
    fn check(self, sector: u64, bytes: &[u8]) {
        let as_expected = match self {
            Content::Base if sector < BASE_SECTORS => *bytes == BASE_BYTES[sector as usize * SECTOR..][..SECTOR],
            Content::Base | Content::Zero => *bytes == [0; SECTOR],
            Content::Written(number) => *bytes == pattern(number, sector),
        };
        assert!(as_expected, "sector {sector} is not {self:?}");
    }
}

/// The device, and what the model knows of it.
struct Disk {
    volume: Option<Arc<Volume>>,
    /// `None`: read-only.
    delta: Option<(File, Option<File>, Header)>,
    sectors: Vec<Content>,
    cluster_sectors: u64,
    writes: u8,
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    let mut disk = Disk::new(&mut choices);
    let mut batch = Batch::default();
    for _ in 0..48 {
        if choices.is_over() {
            break;
        }
        disk.request(&mut choices, &mut batch);
        if choices.sometimes() {
            disk.volume().commit(&mut batch).unwrap();
            disk.open_again(&mut choices);
        }
    }
    disk.volume().commit(&mut batch).unwrap();
    if choices.below(2) == 0 {
        disk.open_again(&mut choices);
    }
    disk.check_all();
});

impl Disk {
    fn new(choices: &mut Choices<'_>) -> Disk {
        let read_only = choices.rarely();
        let past_cache = choices.below(3) == 2;
        let cluster = ClusterSize::from_bytes(choices.one_of(&[4096, 65536])).unwrap();
        let layout = delta::layout::Layout::new(cluster, SECTORS * SECTOR as u64).unwrap();
        let base = BaseIdentity { digest: Digest([1; 32]), bytes: BASE_SECTORS * SECTOR as u64 };
        let header = Header { layout, uuid: [7; 16], base: Some(base) };
        let delta = (!read_only).then(|| {
            let file = unnamed_file();
            file.set_len(layout.file_bytes()).unwrap();
            delta::format(&FileStorage::new(file.try_clone().unwrap()).unwrap(), &header).unwrap();
            // Files in memory can do that on some hosts.
            let direct = Some(&file).filter(|_| past_cache).and_then(|file| file::reopen_direct(file).ok());
            (file, direct, header)
        });
        let sectors = if read_only { BASE_SECTORS } else { SECTORS };
        let mut disk = Disk {
            volume: None,
            delta,
            sectors: vec![Content::Base; sectors as usize],
            cluster_sectors: if read_only { 8 } else { cluster.bytes() / SECTOR as u64 },
            writes: 0,
        };
        disk.volume = Some(Arc::new(disk.open()));
        disk
    }

    fn open(&self) -> Volume {
        let base = Base::map(&BASE, "base".into()).unwrap();
        let Some((file, direct, header)) = &self.delta else { return Volume::read_only(base) };
        let copy = |file: &File| file.try_clone().unwrap();
        let storage = FileStorage::with(copy(file), direct.as_ref().map(copy)).unwrap();
        let delta = Delta::start(storage, "fuzz".into(), header.clone(), Lifetime::Persistent).unwrap();
        Volume::cow(base, delta)
    }

    fn volume(&self) -> &Volume {
        self.volume.as_ref().unwrap()
    }

    /// Ends the volume, in good order or as a killed process does, and opens it again.
    fn open_again(&mut self, choices: &mut Choices<'_>) {
        if let Some(volume) = self.volume.take()
            && choices.below(2) == 0
        {
            volume.close().unwrap();
        }
        self.volume = Some(Arc::new(self.open()));
    }

    fn request(&mut self, choices: &mut Choices<'_>, batch: &mut Batch) {
        let kind = choices.one_of(&[IN, OUT, OUT, DISCARD, WRITE_ZEROES, WRITE_ZEROES, FLUSH, GET_ID]);
        let kind = if choices.rarely() { choices.any() } else { kind };
        let (sector, count) = self.range(choices);
        self.writes = self.writes % u8::MAX + 1;
        let data = match kind {
            OUT => (0..count).flat_map(|at| pattern(self.writes, sector.wrapping_add(at) & 0xff_ffff)).collect(),
            DISCARD | WRITE_ZEROES => self.ranges(choices, sector, count, kind),
            _ => Vec::new(),
        };
        let mut readable = Vec::with_capacity(16 + data.len());
        readable.extend(kind.to_le_bytes());
        readable.extend(choices.any::<u32>().to_le_bytes());
        readable.extend(sector.to_le_bytes());
        readable.extend(data);
        if choices.rarely() {
            readable.truncate(choices.up_to(readable.len() as u64) as usize);
        }
        let mut writable = match kind {
            IN => count as usize * SECTOR + 1,
            GET_ID => choices.one_of(&[21, 21, 1, 5, 100]),
            _ => 1,
        };
        if choices.rarely() {
            writable = choices.up_to(writable as u64 + 5) as usize;
        }
        let mut written = vec![0xee; writable];

        let readable_parts = choices.cut(readable.len(), 6);
        let writable_parts = choices.cut(writable, 6);
        let mut chain = Chain::default();
        let mut rest = &readable[..];
        for len in readable_parts {
            let (part, behind) = rest.split_at(len);
            chain.readable.push(Readable::from_slice(part));
            rest = behind;
        }
        let mut rest = &mut written[..];
        for len in writable_parts {
            let (part, behind) = rest.split_at_mut(len);
            chain.writable.push(Writable::from_mut_slice(part));
            rest = behind;
        }
        let volume = self.volume.as_ref().unwrap();
        let how = choices.below(6);
        cached::pretend_cold(how % 3 == 0);
        let memory = GuestMemory::default();
        let manners = [Manner::AtOnce, Manner::Together].map(|manner| manner(Patience::AtOnce));
        let manner = manners[usize::from(how >= 4)];
        let mut outcome = request::execute(&mut chain, &memory, volume, &SERIAL, batch, manner);
        match outcome.put_off {
            // As a queue has the kernel do it.
            Some(PutOff::Write)
                if how == 4
                    && let Ok(Some((write, places))) =
                        BegunWrite::new(volume, outcome.offset, &chain.readable[outcome.data_from..]) =>
            {
                for place in places {
                    file::write_at(volume.file(place.file).unwrap(), &place.buffers, place.offset).unwrap();
                }
                write.finish(batch);
            }
            Some(PutOff::Write) => {
                let mut writes = Writes::default();
                writes.put_off(outcome.offset, &chain.readable[outcome.data_from..], 0);
                writes.carry_out(volume, batch, |_, error| outcome.result = Err(error.into()));
            }
            Some(PutOff::BehindWrites) => {
                outcome = request::execute(&mut chain, &memory, volume, &SERIAL, batch, manners[0]);
            }
            None => {}
        }
        let Outcome { status_place, result, data_bytes, .. } = match outcome.errand {
            None => outcome,
            // As a queue has the kernel do it.
            Some(Errand::Read) if how == 3 => {
                let (status_place, data) = chain.writable.split_last().unwrap();
                for place in volume.places(outcome.offset, data, batch).unwrap() {
                    let mut at = place.offset;
                    for part in place.buffers {
                        file::read_at(volume.file(place.file).unwrap(), part, at).unwrap();
                        at += part.len() as u64;
                    }
                    assert_eq!(at, place.offset + place.len);
                }
                Outcome { status_place: Some(*status_place), ..outcome }
            }
            Some(errand) => {
                let of_errand: &[u32] = match errand {
                    Errand::Read => &[IN],
                    Errand::Flush => &[FLUSH],
                    Errand::Write => &[DISCARD, WRITE_ZEROES],
                };
                assert!(of_errand.contains(&kind), "no other is put off");
                request::execute(&mut chain, &memory, volume, &SERIAL, batch, Manner::Waits)
            }
        };
        let has_place = status_place.is_some();
        if let Some(place) = status_place {
            assert_eq!(place.copy_from_slice(&[0x55]), Ok(1));
        }
        assert_eq!(has_place, writable > 0);

        let status = result.as_ref().map_or_else(|error| error.status(), |()| Status::Ok);
        let expected = if has_place { self.model(&readable, &written[..writable - 1]) } else { Status::IoError };
        assert_eq!(status, expected, "{result:?}");
        if has_place {
            assert_eq!(written[writable - 1], 0x55, "the status is the last byte that may be written");
        }
        if status == Status::Ok {
            let expected = match kind {
                IN => writable - 1,
                GET_ID => (writable - 1).min(SERIAL.len()),
                _ => 0,
            };
            assert_eq!(data_bytes as usize, expected);
        }
    }

    /// Where a request begins, and how many sectors it has.
    fn range(&self, choices: &mut Choices<'_>) -> (u64, u64) {
        let end = self.sectors.len() as u64;
        let count = if choices.sometimes() { choices.below(300) } else { choices.below(20) };
        let near = |place: u64, by: u64| place.saturating_add(by).saturating_sub(10).min(end.saturating_sub(count));
        let sector = match choices.below(4) {
            0 => near(choices.below(end), 10),
            1 => near(choices.below(end) / self.cluster_sectors * self.cluster_sectors, choices.below(20)),
            2 => near(choices.one_of(&[0, end, BASE_SECTORS, 2048]), choices.below(20)),
            _ => near(choices.below(64), 10),
        };
        if choices.rarely() { (choices.any(), count) } else { (sector, count) }
    }

    /// The data of a discard or write-zeroes request, mostly of one range.
    fn ranges(&self, choices: &mut Choices<'_>, sector: u64, count: u64, kind: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut range = (sector, count);
        let ranges = if choices.rarely() { choices.below(80) } else { 1 + choices.below(3) };
        for _ in 0..ranges {
            let flags = if kind == WRITE_ZEROES { choices.below(2) as u32 } else { 0 };
            let flags = if choices.rarely() { choices.any() } else { flags };
            let sectors = if choices.rarely() { choices.any() } else { range.1 as u32 };
            bytes.extend(range.0.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            range = self.range(choices);
        }
        if choices.rarely() {
            bytes.push(0);
        }
        bytes
    }

    /// Carries out a request on the model; `written` is what a device may write apart from the status, as it is afterwards.
    fn model(&mut self, readable: &[u8], written: &[u8]) -> Status {
        let Some((header, data)) = readable.split_at_checked(16) else { return Status::IoError };
        let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
        match kind {
            IN => {
                let Some(range) = self.sectors_of(sector, written.len()) else { return Status::IoError };
                for (sector, bytes) in range.zip(written.chunks(SECTOR)) {
                    self.sectors[sector as usize].check(sector, bytes);
                }
                Status::Ok
            }
            OUT => {
                let Some(range) = self.sectors_of(sector, data.len()) else { return Status::IoError };
                if self.delta.is_none() {
                    return Status::IoError;
                }
                range.for_each(|sector| self.sectors[sector as usize] = Content::Written(self.writes));
                Status::Ok
            }
            FLUSH => Status::Ok,
            GET_ID => {
                let len = written.len().min(SERIAL.len());
                assert!(written[..len] == SERIAL[..len]);
                if len > 0 { Status::Ok } else { Status::IoError }
            }
            DISCARD | WRITE_ZEROES => self.model_ranges(kind, data),
            _ => Status::Unsupported,
        }
    }

    fn sectors_of(&self, sector: u64, bytes: usize) -> Option<std::ops::Range<u64>> {
        let count = (bytes / SECTOR) as u64;
        let end = sector.checked_add(count)?;
        (bytes.is_multiple_of(SECTOR) && count > 0 && end <= self.sectors.len() as u64).then_some(sector..end)
    }

    fn model_ranges(&mut self, kind: u32, data: &[u8]) -> Status {
        if data.is_empty() || data.len() > 64 * 16 || !data.len().is_multiple_of(16) || self.delta.is_none() {
            return Status::IoError;
        }
        let mut ranges = Vec::new();
        for range in data.as_chunks::<16>().0 {
            let sector = u64::from_le_bytes(range[..8].try_into().unwrap());
            let count = u32::from_le_bytes(range[8..12].try_into().unwrap());
            let flags = u32::from_le_bytes(range[12..].try_into().unwrap());
            if flags > u32::from(kind == WRITE_ZEROES) {
                return Status::Unsupported;
            }
            let end = sector.checked_add(count.into());
            let Some(end) = end.filter(|end| *end <= self.sectors.len() as u64) else { return Status::IoError };
            ranges.push(sector..end);
        }
        let (size, clusters) = (self.sectors.len() as u64, self.cluster_sectors);
        for range in ranges {
            let range = if kind == WRITE_ZEROES {
                range
            } else {
                // Whole clusters alone; the volume's last is whole where the volume ends.
                let end = if range.end == size { size } else { range.end / clusters * clusters };
                range.start.next_multiple_of(clusters)..end
            };
            range.for_each(|sector| self.sectors[sector as usize] = Content::Zero);
        }
        Status::Ok
    }

    fn check_all(&self) {
        let mut found = vec![0xee; self.sectors.len() * SECTOR];
        self.volume().read(0, &[Writable::from_mut_slice(&mut found)]).unwrap();
        for ((sector, content), bytes) in self.sectors.iter().enumerate().zip(found.as_chunks::<SECTOR>().0) {
            content.check(sector as u64, bytes);
        }
    }
}
