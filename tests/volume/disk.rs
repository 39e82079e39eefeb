//! [`Disk`]: a simulated disk below a delta, with a page cache that a power loss takes away.
//!
//! Knows nothing of deltas. A sector that was written since the last sync has several versions: the durable one and one for
//! each change since. A power loss leaves any of them, each sector for itself, so that writes are lost, torn and
//! reordered; the death of the process leaves the last.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use pando::block::storage::Storage;
use pando::sys::buffers::{Readable, Writable, total_len_readable};
use rand::RngExt;
use rand::rngs::StdRng;

const SECTOR_BYTES: usize = 512;

/// A sector's contents; `None` reads as zeros.
type Contents = Option<Arc<[u8; SECTOR_BYTES]>>;

/// A handle to a disk; clones are handles to the same one.
#[derive(Clone, Default)]
pub struct Disk {
    state: Arc<Mutex<State>>,
}

#[derive(Clone, Default)]
struct State {
    /// What a read sees.
    cache: HashMap<u64, Arc<[u8; SECTOR_BYTES]>>,
    /// For each sector changed since the last sync: what is durable, then every change with its number.
    unsynced: BTreeMap<u64, (Contents, Vec<(u64, Contents)>)>,
    /// Whether `unsynced` is not kept, for long histories that end with the death of the process only.
    forgets_versions: bool,
    counts: Counts,
    plan: Option<Plan>,
    /// Whether the planned call was made.
    is_reached: bool,
}

/// How often each verb was called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub reads: u64,
    pub writes: u64,
    pub punches: u64,
    pub syncs: u64,
}

impl Counts {
    /// Calls that change something. The next one has this number.
    pub fn changes(&self) -> u64 {
        self.writes + self.punches + self.syncs
    }
}

/// Which call fails, and what it does before.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub call: Call,
    pub done: Done,
    pub then: Then,
}

/// A call, by its number from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Among writes, punches and syncs.
    Change(u64),
    Read(u64),
}

/// How much of the failing call takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    Nothing,
    FirstHalf,
    All,
}

/// What happens at the failing call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It fails with this code and the disk goes on.
    Fail(i32),
    /// Whoever uses the disk is gone: no later call has any effect.
    Stop,
}

/// Which of the unsynced changes a power loss leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// None.
    All,
    /// All.
    Nothing,
    /// Those before some point.
    AfterPoint,
    /// Those after some point.
    BeforePoint,
    /// Each change as a whole is lost or not.
    SomeChanges,
    /// Each sector for itself shows any of its versions.
    SomeSectors,
}

impl Loss {
    pub const KINDS: [Loss; 6] =
        [Loss::All, Loss::Nothing, Loss::AfterPoint, Loss::BeforePoint, Loss::SomeChanges, Loss::SomeSectors];
}

impl Disk {
    /// A disk for a history of any length, which cannot lose power.
    pub fn without_power_loss() -> Disk {
        let disk = Disk::default();
        disk.state().forgets_versions = true;
        disk
    }

    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    /// Lets a call fail. Calls are numbered from now on.
    pub fn plan(&self, plan: Plan) {
        let mut state = self.state();
        state.counts = Counts::default();
        state.plan = Some(plan);
        state.is_reached = false;
    }

    /// Whether the planned call was made.
    pub fn is_reached(&self) -> bool {
        self.state().is_reached
    }

    /// Whether nothing is waiting for a sync.
    pub fn is_synced(&self) -> bool {
        self.state().unsynced.is_empty()
    }

    /// The disk as another process finds it after this one has died.
    pub fn after_process_death(&self) -> Disk {
        let state = State { plan: None, counts: Counts::default(), ..self.state().clone() };
        Disk { state: Arc::new(Mutex::new(state)) }
    }

    /// A disk as it may be found after a power loss.
    pub fn after_power_loss(&self, loss: Loss, rng: &mut StdRng) -> Disk {
        let changes: Vec<u64> = {
            let state = self.state();
            let mut changes: Vec<u64> =
                state.unsynced.values().flat_map(|(_, versions)| versions.iter().map(|(change, _)| *change)).collect();
            changes.sort_unstable();
            changes.dedup();
            changes
        };
        let point = if changes.is_empty() { 0 } else { changes[rng.random_range(0..changes.len())] };
        let kept: HashMap<u64, bool> = changes.iter().map(|change| (*change, rng.random_bool(0.5))).collect();
        self.after_power_loss_of(|_, versions| match loss {
            Loss::All => None,
            Loss::Nothing => versions.len().checked_sub(1),
            Loss::AfterPoint => versions.iter().rposition(|change| *change < point),
            Loss::BeforePoint => versions.iter().rposition(|change| *change >= point),
            Loss::SomeChanges => versions.iter().rposition(|change| kept[change]),
            Loss::SomeSectors => rng.random_range(0..=versions.len()).checked_sub(1),
        })
    }

    /// The disk after a power loss that left of each sector (its number, the numbers of the changes since the last sync) what
    /// `choose` says: an index among the changes, or `None` for what was durable.
    pub fn after_power_loss_of(&self, mut choose: impl FnMut(u64, &[u64]) -> Option<usize>) -> Disk {
        let state = self.state();
        assert!(!state.forgets_versions, "this disk cannot lose power");
        let mut cache = state.cache.clone();
        for (sector, (durable, versions)) in &state.unsynced {
            let changes: Vec<u64> = versions.iter().map(|(change, _)| *change).collect();
            let left = choose(*sector, &changes).map_or(durable, |index| &versions[index].1);
            put(&mut cache, *sector, left.clone());
        }
        Disk { state: Arc::new(Mutex::new(State { cache, ..State::default() })) }
    }

    /// Changes contents behind everybody's back, durably.
    pub fn overwrite(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.state();
        for (index, byte) in bytes.iter().enumerate() {
            let (sector, at) = place(offset + index as u64);
            let mut contents = state.cache.get(&sector).map_or([0; SECTOR_BYTES], |contents| **contents);
            contents[at] = *byte;
            put(&mut state.cache, sector, Some(Arc::new(contents)));
            state.unsynced.remove(&sector);
        }
    }

    /// Reads contents without being counted.
    pub fn peek(&self, offset: u64, bytes: &mut [u8]) {
        self.state().read(Writable::from_mut_slice(bytes), offset);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a test that panicked has failed already")
    }
}

fn place(offset: u64) -> (u64, usize) {
    (offset / SECTOR_BYTES as u64, (offset % SECTOR_BYTES as u64) as usize)
}

fn put(cache: &mut HashMap<u64, Arc<[u8; SECTOR_BYTES]>>, sector: u64, contents: Contents) {
    match contents {
        Some(contents) => _ = cache.insert(sector, contents),
        None => _ = cache.remove(&sector),
    }
}

impl State {
    /// What of a call that changes something is to be done, and how it ends.
    fn begin(&mut self) -> (Done, io::Result<()>) {
        let number = self.counts.changes();
        self.decide(Call::Change(number))
    }

    fn decide(&mut self, call: Call) -> (Done, io::Result<()>) {
        let gone = || io::Error::other("the simulated disk has stopped");
        match self.plan {
            Some(Plan { then: Then::Stop, .. }) if self.is_reached => (Done::Nothing, Err(gone())),
            Some(Plan { call: planned, done, then }) if planned == call => {
                self.is_reached = true;
                match then {
                    Then::Fail(code) => (done, Err(io::Error::from_raw_os_error(code))),
                    Then::Stop => (done, Err(gone())),
                }
            }
            _ => (Done::All, Ok(())),
        }
    }

    fn read(&self, into: Writable<'_>, offset: u64) {
        let mut done = 0;
        while done < into.len() {
            let (sector, at) = place(offset + done as u64);
            let part = into.part(done, SECTOR_BYTES - at);
            match self.cache.get(&sector) {
                Some(contents) => _ = part.copy_from_slice(&contents[at..]).unwrap(),
                None => part.fill_zero().unwrap(),
            }
            done += part.len();
        }
    }

    fn change(&mut self, change: u64, sector: u64, contents: Contents) {
        if !self.forgets_versions {
            let durable = self.cache.get(&sector).cloned();
            let (_, versions) = self.unsynced.entry(sector).or_insert_with(|| (durable, Vec::new()));
            versions.push((change, contents.clone()));
        }
        put(&mut self.cache, sector, contents);
    }

    fn write(&mut self, change: u64, mut bytes: &[u8], offset: u64) {
        let mut offset = offset;
        while !bytes.is_empty() {
            let (sector, at) = place(offset);
            let (now, rest) = bytes.split_at(bytes.len().min(SECTOR_BYTES - at));
            let mut contents = self.cache.get(&sector).map_or([0; SECTOR_BYTES], |contents| **contents);
            contents[at..at + now.len()].copy_from_slice(now);
            self.change(change, sector, Some(Arc::new(contents)));
            offset += now.len() as u64;
            bytes = rest;
        }
    }
}

impl Done {
    /// Of `len` bytes at `offset`, how many come to pass: up to a sector's end when not all.
    fn part(self, offset: u64, len: u64) -> u64 {
        match self {
            Done::Nothing => 0,
            Done::FirstHalf => {
                let end = (offset + len / 2) / SECTOR_BYTES as u64 * SECTOR_BYTES as u64;
                end.saturating_sub(offset)
            }
            Done::All => len,
        }
    }
}

impl Storage for Disk {
    fn read_at(&self, into: Writable<'_>, offset: u64) -> io::Result<()> {
        let mut state = self.state();
        let number = state.counts.reads;
        let (_, result) = state.decide(Call::Read(number));
        state.counts.reads += 1;
        state.read(into, offset);
        result
    }

    fn write_at(&self, from: &[Readable<'_>], offset: u64) -> io::Result<()> {
        let mut bytes = vec![0; total_len_readable(from) as usize];
        let mut at = 0;
        for buffer in from {
            at += buffer.copy_to_slice(&mut bytes[at..]).unwrap();
        }
        let mut state = self.state();
        let (done, result) = state.begin();
        let change = state.counts.changes();
        state.counts.writes += 1;
        state.write(change, &bytes[..done.part(offset, bytes.len() as u64) as usize], offset);
        result
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        assert!(offset.is_multiple_of(4096) && len.is_multiple_of(4096), "only whole pages give their space back");
        let mut state = self.state();
        let (done, result) = state.begin();
        let change = state.counts.changes();
        state.counts.punches += 1;
        let end = offset + done.part(offset, len);
        for sector in offset / SECTOR_BYTES as u64..end / SECTOR_BYTES as u64 {
            if state.cache.contains_key(&sector) {
                state.change(change, sector, None);
            }
        }
        result
    }

    /// The length plays no part here: what lies past it reads as zeros, and so does what was never written.
    fn set_len(&self, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.state();
        let (done, result) = state.begin();
        state.counts.syncs += 1;
        match done {
            Done::Nothing => {}
            // Some of it became durable, sector by sector in no order.
            Done::FirstHalf => {
                let mut odd = false;
                state.unsynced.retain(|_, _| {
                    odd = !odd;
                    odd
                });
            }
            Done::All => state.unsynced.clear(),
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn write(disk: &Disk, offset: u64, byte: u8, len: usize) {
        disk.write_at(&[Readable::from_slice(&vec![byte; len])], offset).unwrap();
    }

    fn bytes(disk: &Disk, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xff; len];
        disk.peek(0, &mut bytes);
        bytes
    }

    #[test]
    fn a_power_loss_leaves_any_version_of_each_sector() {
        let disk = Disk::default();
        write(&disk, 0, 1, 1024);
        disk.sync().unwrap();
        write(&disk, 0, 2, 1024);
        write(&disk, 512, 3, 512);
        let mut rng = StdRng::seed_from_u64(1);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..200 {
            let left = bytes(&disk.after_power_loss(Loss::SomeSectors, &mut rng), 1024);
            seen.insert((left[0], left[512]));
        }
        assert_eq!(seen, [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)].into());
        assert_eq!(bytes(&disk.after_power_loss(Loss::All, &mut rng), 1024), [1; 1024]);
        assert_eq!(bytes(&disk.after_process_death(), 1024), [[2; 512], [3; 512]].concat());
        disk.sync().unwrap();
        assert_eq!(bytes(&disk.after_power_loss(Loss::All, &mut rng), 1024), [[2; 512], [3; 512]].concat());
    }

    #[test]
    fn a_stopped_disk_changes_no_more() {
        let disk = Disk::default();
        disk.plan(Plan { call: Call::Change(1), done: Done::FirstHalf, then: Then::Stop });
        write(&disk, 0, 1, 1024);
        assert!(disk.write_at(&[Readable::from_slice(&[2; 1024])], 0).is_err());
        assert!(disk.punch_hole(0, 4096).is_err() && disk.sync().is_err());
        assert!(disk.is_reached());
        assert_eq!(bytes(&disk.after_process_death(), 1024), [[2; 512], [1; 512]].concat());
    }
}
