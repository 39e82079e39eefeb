//! [`Machine`]: a host with a simulated disk, a volume on it, a guest that goes through a history, and every way to end it.
//!
//! Knows what was asked and what was answered, and so what the volume may hold after each kind of end.

use std::collections::HashMap;
use std::error::Error;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::rc::Rc;

use pando::block::base::Base;
use pando::block::delta::header::{BaseIdentity, Header, Phase, SESSION_AT, Session};
use pando::block::delta::layout::{CLUSTERS_PER_GROUP, Layout};
use pando::block::delta::open::NewDelta;
use pando::block::delta::{self, Delta, Latch, Lifetime};
use pando::block::storage::Storage;
use pando::block::{Batch, Volume};
use pando::digest::Digest;
use pando::sys::buffers::{Readable, Writable};
use pando::sys::shared::{self, SharedNumbers};
use pando::units::{ClusterSize, SECTOR_BYTES};
use rand::rngs::StdRng;

use super::disk::{Disk, Loss};
use super::history::Step;
use super::stamps::{After, Expected, Stamp};

/// The sectors that histories touch: the start, the edge of a map sector, and the edge of a group with the end of the base.
pub const WATCHED: [Range<u64>; 3] = {
    let map_sector_end = 2016 * 8;
    let group_end = CLUSTERS_PER_GROUP * 8;
    [0..80, map_sector_end - 48..map_sector_end + 48, group_end - 64..group_end + 43]
};
const BASE_SECTORS: u64 = CLUSTERS_PER_GROUP * 8 + 13;
const VOLUME_SECTORS: u64 = CLUSTERS_PER_GROUP * 8 + 43;

/// A request that completes with its batch, in sectors.
#[derive(Clone, Debug)]
enum Request {
    Write(Range<u64>),
    Zeroes { range: Range<u64>, give_back: bool },
}

pub struct Machine {
    base: Rc<File>,
    header: Header,
    pub disk: Disk,
    /// What a backend's processes remember of failed syncs.
    latch: File,
    pub volume: Option<Volume<Disk>>,
    pub expected: Expected,
    batch: Batch,
    /// Writes of the batch, each sector with its stamp.
    in_batch: Vec<(u64, Stamp)>,
    /// Requests of the batch: what a successor has to carry out again.
    requests: Vec<(Request, u64)>,
    writes: u64,
}

impl Machine {
    /// A machine with a new delta, which is durable, and no volume running.
    pub fn new() -> Machine {
        let base = Rc::new(base_file(BASE_SECTORS, &WATCHED));
        let identity = BaseIdentity { digest: Digest([7; 32]), bytes: BASE_SECTORS * SECTOR_BYTES };
        let header = NewDelta {
            base: Some(identity),
            virtual_bytes: Some(VOLUME_SECTORS * SECTOR_BYTES),
            cluster: ClusterSize::DEFAULT,
        }
        .header()
        .unwrap();
        let disk = Disk::default();
        delta::format(&disk, &header).unwrap();
        let expected = Expected::new(&WATCHED, |sector| match sector {
            _ if sector < BASE_SECTORS => Stamp::new(Stamp::BASE, sector),
            _ => Stamp::ZERO,
        });
        Machine {
            base,
            header,
            disk,
            latch: shared::create(c"latch", 8).unwrap(),
            volume: None,
            expected,
            batch: Batch::default(),
            in_batch: Vec::new(),
            requests: Vec::new(),
            writes: Stamp::BASE,
        }
    }

    /// A second machine in the same state, with a disk and a future of its own. No volume runs on it.
    pub fn fork(&self, disk: Disk) -> Machine {
        Machine {
            base: self.base.clone(),
            header: self.header.clone(),
            disk,
            latch: shared::create(c"latch", 8).unwrap(),
            volume: None,
            expected: self.expected.clone(),
            batch: Batch::default(),
            in_batch: Vec::new(),
            requests: Vec::new(),
            writes: self.writes,
        }
    }

    /// A copy of the machine after the death of the process: opened again and checked.
    pub fn after_process_death(&self) -> Machine {
        let mut machine = self.fork(self.disk.after_process_death());
        machine.start().unwrap();
        machine.check_after(After::ProcessDeath);
        machine
    }

    /// A copy of the machine after a power loss: opened again and checked.
    pub fn after_power_loss(&self, loss: Loss, rng: &mut StdRng) -> Machine {
        self.after_power_loss_with(self.disk.after_power_loss(loss, rng))
    }

    /// The same, with the disk that the power loss has left.
    pub fn after_power_loss_with(&self, disk: Disk) -> Machine {
        reboot(&disk);
        let mut machine = self.fork(disk);
        machine.start().unwrap();
        machine.check_after(After::PowerLoss);
        machine
    }

    /// Opens the volume.
    pub fn start(&mut self) -> Result<(), Box<dyn Error>> {
        self.volume = None;
        self.volume = Some(self.open(&self.disk)?);
        Ok(())
    }

    /// A volume on some disk, over this machine's base.
    pub fn open<S: Storage + Clone>(&self, disk: &S) -> Result<Volume<S>, Box<dyn Error>> {
        let delta = Delta::start(disk.clone(), "disk".to_owned(), self.header.clone(), Lifetime::Persistent)?;
        let latch = Latch::shared(SharedNumbers::map(&self.latch, 1)?, 0);
        Ok(Volume::cow(Base::map(&self.base, "base".into())?, delta.latching_in(latch)))
    }

    /// Where things lie on the disk.
    pub fn layout(&self) -> Layout {
        self.header.layout
    }

    pub fn volume(&self) -> &Volume<Disk> {
        self.volume.as_ref().expect("the volume is open")
    }

    /// Goes through the steps up to the first that fails.
    pub fn run(&mut self, steps: &[Step]) -> Result<(), Box<dyn Error>> {
        steps.iter().try_for_each(|step| self.step(step))
    }

    /// Does one step. What it leaves to be expected when it fails is what a failed request may leave: the old or the new.
    pub fn step(&mut self, step: &Step) -> Result<(), Box<dyn Error>> {
        self.writes += 1;
        match step {
            Step::Write(range) => self.request(Request::Write(range.clone()), self.writes)?,
            Step::Zeroes { range, give_back } => {
                self.request(Request::Zeroes { range: range.clone(), give_back: *give_back }, self.writes)?;
            }
            Step::Discard(range) => {
                let whole = whole_clusters(range);
                whole.clone().for_each(|sector| self.expected.begin(sector, Stamp::ZERO));
                self.volume().discard(range.start * SECTOR_BYTES, (range.end - range.start) * SECTOR_BYTES)?;
                whole.for_each(|sector| self.expected.complete(sector, Stamp::ZERO));
            }
            Step::Commit => {
                let in_batch = std::mem::take(&mut self.in_batch);
                self.requests.clear();
                self.volume.as_ref().expect("the volume is open").commit(&mut self.batch)?;
                in_batch.into_iter().for_each(|(sector, stamp)| self.expected.complete(sector, stamp));
            }
            Step::Flush => {
                self.volume().flush()?;
                self.expected.flushed();
            }
            Step::Reopen => {
                self.volume().close()?;
                self.expected.flushed();
                assert!(self.disk.is_synced(), "a closed delta is durable");
                self.start()?;
                self.check_running()?;
            }
            Step::Kill => {
                self.batch = Batch::default();
                self.in_batch.clear();
                self.start()?;
                for (request, number) in std::mem::take(&mut self.requests) {
                    self.request(request, number)?;
                }
            }
            Step::HandOver => {
                self.step(&Step::Commit)?;
                self.start()?;
                self.check_running()?;
            }
        }
        Ok(())
    }

    /// Carries out a request whose writes have this number.
    fn request(&mut self, request: Request, number: u64) -> Result<(), Box<dyn Error>> {
        self.requests.push((request.clone(), number));
        let volume = self.volume.as_ref().expect("the volume is open");
        match request {
            Request::Write(range) => {
                let stamps: Vec<_> = range.clone().map(|sector| (sector, Stamp::new(number, sector))).collect();
                stamps.iter().for_each(|(sector, stamp)| self.expected.begin(*sector, *stamp));
                let bytes: Vec<u8> = stamps.iter().flat_map(|(_, stamp)| stamp.bytes()).collect();
                // In several buffers, none of them of whole sectors.
                let pieces: Vec<_> = bytes.chunks(1000).map(Readable::from_slice).collect();
                volume.write(range.start * SECTOR_BYTES, &pieces, &mut self.batch)?;
                self.in_batch.extend(stamps);
            }
            Request::Zeroes { range, give_back } => {
                range.clone().for_each(|sector| self.expected.begin(sector, Stamp::ZERO));
                let (offset, len) = (range.start * SECTOR_BYTES, (range.end - range.start) * SECTOR_BYTES);
                volume.write_zeroes(offset, len, give_back, &mut self.batch)?;
                self.in_batch.extend(range.map(|sector| (sector, Stamp::ZERO)));
            }
        }
        Ok(())
    }

    /// Compares all watched sectors while the volume runs.
    pub fn check_running(&self) -> Result<(), Box<dyn Error>> {
        let read = read_watched(self.volume(), &self.expected)?;
        self.expected.check_running(read);
        Ok(())
    }

    fn check_after(&mut self, after: After) {
        let read = read_watched(self.volume(), &self.expected).unwrap();
        self.expected.check_after(after, read);
    }
}

/// What a volume holds in the watched sectors.
fn read_watched(volume: &Volume<Disk>, expected: &Expected) -> Result<impl Fn(u64) -> Stamp + use<>, Box<dyn Error>> {
    let mut found = HashMap::new();
    for range in expected.watched() {
        let mut bytes = vec![0xee; ((range.end - range.start) * SECTOR_BYTES) as usize];
        volume.read(range.start * SECTOR_BYTES, &[Writable::from_mut_slice(&mut bytes)])?;
        for (sector, bytes) in range.zip(bytes.chunks(SECTOR_BYTES as usize)) {
            let stamp = Stamp::of(bytes).unwrap_or_else(|| panic!("sector {sector} is of several writes"));
            found.insert(sector, stamp);
        }
    }
    Ok(move |sector| found[&sector])
}

/// The whole clusters within a range of sectors; the last one of the volume is whole where the volume ends.
fn whole_clusters(range: &Range<u64>) -> Range<u64> {
    let start = range.start.next_multiple_of(8);
    let end = if range.end == VOLUME_SECTORS { range.end } else { range.end / 8 * 8 };
    start..end.max(start)
}

/// A sparse file in which every one of these sectors has its stamp.
pub fn base_file(sectors: u64, stamped: &[Range<u64>]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.set_len(sectors * SECTOR_BYTES).unwrap();
    for range in stamped {
        file.seek(SeekFrom::Start(range.start * SECTOR_BYTES)).unwrap();
        let sectors = range.start..range.end.min(sectors);
        let bytes: Vec<u8> = sectors.flat_map(|sector| Stamp::new(Stamp::BASE, sector).bytes()).collect();
        file.write_all(&bytes).unwrap();
    }
    file
}

/// Makes a session that is open on this disk one of an earlier boot.
pub fn reboot(disk: &Disk) {
    let mut sector = [0; SECTOR_BYTES as usize];
    disk.peek(SESSION_AT, &mut sector);
    let session = Session::decode(&sector).unwrap();
    if session.phase == Phase::Open {
        disk.overwrite(SESSION_AT, &Session { boot: [0xb0; 16], ..session }.encode());
    }
}
