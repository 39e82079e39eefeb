//! [`Guest`]: a machine's verifying client, and [`Seat`], where its thread can be asked to wait.
//!
//! The guest's thread drives all queues of its disk and compares what it reads with what was written. It knows nothing of the
//! backend, of connections or of disturbances: it sees its rings stand still and go on. The front end's thread takes its place
//! ([`Seat::hold`]) for what happens to the device as a whole.

use std::ops::{Deref, DerefMut, Range};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Config, Queue};
use crate::drive::{Drive, Tally};
use crate::soak::disk::Disk;
use crate::soak::journal::Journal;
use crate::soak::watch::Pulse;
use crate::verify::{Area, Discards, Verifier};

/// The longest request.
pub const BLOCK_BYTES: u32 = 32 << 10;
/// The most requests in flight in a queue.
pub const DEPTH: usize = 32;
/// Sectors at the start of every disk that tell its image and are never written: those of the largest cluster.
const KEPT_SECTORS: u64 = (64 << 10) / 512;
/// Where every second request goes: few enough clusters for requests to meet in them, and for a write to lie over another.
const CROWDED_SECTORS: u64 = KEPT_SECTORS + (1 << 20) / 512;
/// Less than this without a completion is nothing to tell of.
const STALL_LEAST: Duration = Duration::from_millis(10);
/// How long a guest keeps to one depth, at most.
const MOOD: Duration = Duration::from_millis(60);
/// How long it sleeps when nothing happens before it looks again.
const SLEEP: Duration = Duration::from_millis(100);

pub struct Guest {
    drive: Drive<Vec<Queue>, Verifier>,
    random: fastrand::Rng,
    /// Requests that it keeps in flight in each queue, and until when.
    depth: usize,
    until: Instant,
    /// Since when nothing has completed.
    quiet_since: Instant,
    machine: usize,
    journal: Arc<Journal>,
    pulse: Arc<Pulse>,
}

impl Guest {
    /// A guest without a device.
    pub fn new(machine: usize, disk: &Disk, seed: u64, journal: Arc<Journal>, pulse: Arc<Pulse>) -> Self {
        let (discards, area) =
            (Discards::ZeroClusters(disk.cluster_bytes), Area { kept: KEPT_SECTORS, crowded: CROWDED_SECTORS });
        let base = disk.base_on(disk.image);
        let verifier = Verifier::new(Config::default(), base, 0, BLOCK_BYTES, seed).with(discards, area);
        Self {
            drive: Drive::new(Vec::new(), verifier),
            random: fastrand::Rng::with_seed(seed ^ 1),
            depth: 0,
            until: Instant::now(),
            quiet_since: Instant::now(),
            machine,
            journal,
            pulse,
        }
    }

    /// What it compares with.
    pub fn verifier(&mut self) -> &mut Verifier {
        &mut self.drive.client
    }

    pub fn random(&mut self) -> &mut fastrand::Rng {
        &mut self.random
    }

    pub fn tally(&self) -> &Tally {
        &self.drive.tally
    }

    /// A driver starts from nothing on these queues. What was in flight is never answered.
    pub fn take_queues(&mut self, queues: Vec<Queue>) {
        self.drive.client.forget_in_flight();
        self.drive.replace_queues(queues);
    }

    /// Has buffers lie in another part of the memory from now on, or where they were; each queue has its share of that part.
    pub fn set_spare(&mut self, spare: Option<&Range<usize>>) {
        let share = DEPTH * BLOCK_BYTES as usize;
        for queue in 0..self.drive.queues() {
            self.drive.queue_mut(queue).slots.set_spare(spare.map(|spare| spare.start + queue * share));
        }
    }

    /// Whether a request in flight has its buffer there.
    pub fn uses(&self, spare: &Range<usize>) -> bool {
        (0..self.drive.queues()).any(|queue| self.drive.buffers_in_use(queue).any(|buffer| spare.contains(&buffer)))
    }

    /// Whether nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.drive.in_flight() == 0
    }

    /// Takes what is complete: how much that was.
    pub fn harvest(&mut self) -> Result<usize> {
        let mut now = Instant::now();
        let mut completed = 0;
        for queue in 0..self.drive.queues() {
            completed += self.drive.harvest(queue, &mut now, |_| false)?;
        }
        if completed > 0 {
            if now.duration_since(self.quiet_since) >= STALL_LEAST {
                self.journal.stall(self.machine, self.quiet_since, now);
            }
            self.note_progress(now);
        }
        Ok(completed)
    }

    fn note_progress(&mut self, now: Instant) {
        self.quiet_since = now;
        match self.drive.in_flight() {
            0 => self.pulse.rests(),
            count => self.pulse.waits_for(format!("one of {count} requests to complete")),
        }
    }

    /// Asks for more, so that so many requests are in flight in each queue.
    pub fn submit(&mut self, depth: usize) -> Result<()> {
        let (before, now) = (self.drive.in_flight(), Instant::now());
        for queue in 0..self.drive.queues() {
            self.drive.fill(queue, depth, now);
            self.drive.publish(queue)?;
        }
        if before == 0 && self.drive.in_flight() > 0 {
            self.note_progress(now);
        }
        Ok(())
    }

    /// Sleeps until something is complete, `wake` is written to, or `timeout` has passed.
    pub fn sleep(&mut self, timeout: Duration, wake: Option<&EventFd>) -> Result<()> {
        self.drive.sleep(timeout, wake.map(AsRawFd::as_raw_fd))
    }

    /// One round of random work.
    fn work(&mut self, wake: &EventFd) -> Result<()> {
        let completed = self.harvest()?;
        let now = Instant::now();
        if now >= self.until {
            // Now and then it has nothing to do, so that the backend goes to sleep and has to wake up.
            self.depth = if self.random.u8(..4) == 0 { 0 } else { self.random.usize(1..=DEPTH) };
            self.until = now + MOOD.mul_f64(self.random.f64());
        }
        self.submit(self.depth)?;
        if completed == 0 {
            let rest = self.until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.sleep(if self.is_idle() { rest } else { SLEEP }, Some(wake))?;
        }
        Ok(())
    }
}

/// Where a guest runs until somebody else wants its place.
pub struct Seat {
    guest: Mutex<Guest>,
    /// How many want its place.
    wanted: AtomicUsize,
    changed: Condvar,
    wake: EventFd,
    ended: AtomicBool,
}

impl Seat {
    pub fn new(guest: Guest) -> Result<Self> {
        let (wanted, changed, ended) = (AtomicUsize::new(0), Condvar::new(), AtomicBool::new(false));
        Ok(Self { guest: Mutex::new(guest), wanted, changed, wake: EventFd::new(EFD_NONBLOCK)?, ended })
    }

    fn lock(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works at random until [`Seat::end`], and stands still while it is held.
    pub fn run(&self) -> Result<()> {
        let mut guest = self.lock();
        while !self.ended.load(Ordering::Acquire) {
            if self.wanted.load(Ordering::Acquire) > 0 {
                guest = self.changed.wait(guest).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            guest.work(&self.wake)?;
        }
        Ok(())
    }

    /// Has the guest stand still, for as long as the result lives.
    pub fn hold(&self) -> Held<'_> {
        self.wanted.fetch_add(1, Ordering::AcqRel);
        // Full only if it was woken very often already.
        let _ = self.wake.write(1);
        let guest = self.lock();
        let _ = self.wake.read();
        guest.pulse.rests();
        Held { seat: self, guest }
    }

    /// Where its queues stand, if anybody lets go of it soon.
    pub fn standing(&self) -> String {
        const TRIES: usize = 500;
        for _ in 0..TRIES {
            match self.guest.try_lock() {
                Ok(guest) => return guest.drive.standing(),
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner().drive.standing(),
                Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(1)),
            }
        }
        "  nobody lets go of it\n".to_owned()
    }

    /// Lets the guest's thread end.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
        drop(self.hold());
    }
}

/// A guest that stands still.
pub struct Held<'s> {
    seat: &'s Seat,
    guest: MutexGuard<'s, Guest>,
}

impl Deref for Held<'_> {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Guest {
        &mut self.guest
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // What it has not seen while it stood still is no stall.
        self.note_progress(Instant::now());
        // Under the lock, which goes after this: its thread does not miss it.
        self.seat.wanted.fetch_sub(1, Ordering::AcqRel);
        self.seat.changed.notify_all();
    }
}
