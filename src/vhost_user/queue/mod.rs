//! [`Queue`]: the thread that serves one ring.
//!
//! It takes a batch of requests from the ring, carries them out, makes their marks safe with one write, publishes all their completions with
//! one store, and notifies the driver at most once. It owns its ring: whatever changes about a ring stops the thread and
//! starts another, so there is nothing to lock.

mod away;
mod complaints;
mod running;
mod stalls;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::block::writes::Writes;
use crate::block::{self, Batch, Volume};
use crate::sys::buffers::Writable;
use crate::sys::events::{self, Epoll};
use crate::sys::guard;
use crate::sys::guest::{DirtyLog, GuestMemory};

use crate::vhost_user::counters::{Counters, Kind, Tally};
use crate::vhost_user::device::{self, Device};
use crate::vhost_user::errands::{Errands, Inbox};
use crate::vhost_user::foresight;
use crate::vhost_user::hold::Hold;
use crate::vhost_user::order::RingStop;
use crate::vhost_user::polling::Polling;
use crate::vhost_user::request::{self, Errand, Manner, PutOff, RequestError, Status};
use crate::vhost_user::rest::{self, Repose};
use crate::vhost_user::ring::{Chain, Ring, RingError};
use crate::vhost_user::steps::{self, Step};
use crate::vhost_user::transfers::{Request, Rings};
use crate::vhost_user::vitals::Vitals;

use away::Away;
use complaints::Complaints;
pub use running::RunningQueue;
use running::Stop;
use stalls::Stalls;

/// Requests of one batch: enough to share the costs of a batch; few enough that the driver handles the last batch's
/// completions while this one is served, so that neither side sleeps.
const BATCH_REQUESTS: u16 = 16;

/// A batch that has moved this many bytes is published, for the same reason.
const BATCH_BYTES: u64 = 256 << 10;

/// What serving a ring takes.
pub struct Queue {
    /// Number of the ring.
    pub index: u16,
    /// The ring.
    pub ring: Ring,
    /// Requests to carry out ahead of all that was never taken. At first: those that the last worker has taken and not completed, in the order
    /// of taking.
    pub again: VecDeque<u16>,
    /// Requests that wait for room.
    pub hold: Hold,
    /// How long to look at the ring before sleeping.
    pub polling: Polling,
    /// Who waits for the disk.
    pub errands: Arc<Errands>,
    /// What to let go of when it comes to rest.
    pub repose: Repose,
    /// By what the kernel reads and writes meanwhile, if that can be had.
    pub kernel_rings: Option<Arc<Rings>>,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The volume.
    pub volume: Arc<Volume>,
    /// What the driver was told.
    pub device: Arc<Device>,
    /// The features that the driver took.
    pub features: u64,
    /// Where to note what is written to guest memory, while the guest is on its way to another host.
    pub log: Option<QueueLog>,
    /// Where to count what is done.
    pub counters: Arc<Counters>,
    /// Where to show that it lives.
    pub vitals: Arc<Vitals>,
    /// Written by the driver when requests wait.
    pub kick: File,
    /// Written for the driver when completions wait.
    pub call: Option<File>,
    /// Written for the front end when the ring is broken.
    pub error: Option<File>,
}

/// Where a queue notes what it writes to guest memory.
///
/// Always after the write: the front end clears a page's bit before it copies the page. And ahead of showing that a request is complete, for
/// nobody carries out again what is.
pub struct QueueLog {
    /// The bitmap.
    pub log: Arc<DirtyLog>,
    /// Guest address and length of the used ring, if it is to be noted too.
    pub used: Option<(u64, u64)>,
}

impl QueueLog {
    fn note_used(&self) {
        if let Some((address, len)) = self.used {
            self.log.note(address, len);
        }
    }
}

/// The driver could not be notified.
#[derive(Debug, thiserror::Error)]
#[error("the driver cannot be notified of completions")]
struct NotifyError(#[source] io::Error);

/// A completion that waits for the batch's commit.
struct Completion<'m> {
    head: u16,
    kind: Kind,
    /// Bytes that were asked for.
    bytes: u64,
    data_bytes: u32,
    status: Status,
    status_place: Option<Writable<'m>>,
    wrote: bool,
    /// It was to write, and there was no room.
    is_full: bool,
    /// It has come back from an errand: its status is written, and it is counted.
    is_late: bool,
}

impl Completion<'_> {
    /// Of a request of which nothing is known: it has failed, and there is no place to say so.
    fn of(head: u16) -> Self {
        Completion {
            head,
            kind: Kind::Other,
            bytes: 0,
            data_bytes: 0,
            status: Status::IoError,
            status_place: None,
            wrote: false,
            is_full: false,
            is_late: false,
        }
    }
}

impl Queue {
    fn serve(mut self, epoll: &Epoll, stop: &Stop, inbox: Arc<Inbox>) -> RingStop {
        let mut complaints = Complaints::new(self.index);
        let result = self.serve_until_stopped(epoll, stop, inbox, &mut complaints);
        // A ring that breaks waits for nothing any more.
        self.vitals.end(self.index);
        if let Err(error) = result {
            log::error!("ring {}: {error}; it is served no further", self.index);
            if let Some(report) = &self.error
                && let Err(error) = stop.while_notifying(|| events::signal(report))
            {
                log::warn!("ring {}: cannot tell the front end so: {error}", self.index);
            }
            while !stop.asked.load(Ordering::Acquire) {
                if let Err(error) = epoll.wait(None) {
                    log::error!("ring {}: cannot wait: {error}", self.index);
                    break;
                }
            }
        }
        RingStop {
            index: self.index,
            next_available: self.ring.next_available(),
            // No more than the ring has descriptors.
            held: self.hold.len() as u16,
        }
    }

    fn serve_until_stopped(
        &mut self,
        epoll: &Epoll,
        stop: &Stop,
        inbox: Arc<Inbox>,
        complaints: &mut Complaints,
    ) -> Result<(), QueueError> {
        let memory = Arc::clone(&self.memory);
        // What the kernel writes is not noted: threads do that while a log is kept.
        let mut away = Away::new(inbox, self.kernel_rings.clone().filter(|_| self.log.is_none()));
        let mut batch = Batch::default();
        let mut writes = Writes::default();
        let mut tally = Tally::default();
        let mut stalls = Stalls::new();
        let mut chain = Chain { written: self.log.is_some().then(Vec::new), ..Chain::default() };
        let mut completions = Vec::with_capacity(usize::from(BATCH_REQUESTS));
        // What was completed before this call descriptor came was told to another one, or to none.
        self.notify(stop, complaints);
        self.suspend_kicks();
        steps::reach(Step::Recovered);
        if !self.again.is_empty() {
            log::info!("ring {}: {} requests of the last worker's are carried out again", self.index, self.again.len());
        }
        // When requests ran out, and whether the driver was shown something then.
        let mut idle_since = None;
        let mut answered = false;
        // Why nothing is taken any more. What was taken before is completed.
        let mut broken = None::<QueueError>;
        loop {
            let stops = broken.is_some() || self.again.is_empty() && stop.asked.load(Ordering::Acquire);
            if stops && away.transfers.count() > 0 {
                away.transfers.wait(&self.volume).map_err(QueueError::Wait)?;
            } else if stops && away.count > 0 {
                away.inbox.wait();
            } else if let Some(error) = broken {
                return Err(error);
            } else if stops {
                // What waits for room waits on where this ring goes, unless nobody there knows of it.
                if self.hold.is_empty() || self.log.is_none() {
                    break;
                }
                self.hold.give_up();
            }
            if self.hold.until_try().is_some_and(|until| until.is_zero()) && self.again.is_empty() {
                self.hold.take_tries(&mut self.again);
            }
            // What was taken before comes alone, ahead of all that never was.
            let found = if self.again.is_empty() && !stops { self.ring.waiting() } else { Ok(0) };
            let Ok(waiting) = found.map_err(|error| broken = Some(error.into())) else { continue };
            if waiting > 0 || !self.again.is_empty() || away.has_some() {
                let taken = Instant::now();
                if let Some(since) = idle_since.take() {
                    self.polling.came_after(taken - since);
                }
                self.vitals.begin(self.index);
                self.take_back(&mut away, &mut completions, complaints);
                self.take_moved(&mut away, &mut completions, &mut batch, complaints);
                let batch_of = (taken, waiting);
                let all = (&mut completions, &mut batch, &mut writes, &mut away);
                if broken.is_none() {
                    broken = self.serve_batch(batch_of, &memory, &mut chain, all, epoll, complaints).err();
                }
                self.carry_out(&mut writes, &mut completions, &mut batch, &memory, complaints);
                answered = !completions.is_empty();
                self.finish_batch(&mut completions, &mut batch, &mut chain, &mut tally, stop, complaints);
                let shown = Instant::now();
                let copied = away.copied.iter().map(|(_, len)| len).sum();
                self.repose.note_read(copied);
                if stalls.waited(shown - taken, copied) {
                    away.copied.iter().for_each(|(offset, len)| self.volume.forget(*offset, *len));
                }
                away.copied_before = !away.copied.is_empty();
                away.copied.clear();
                away.transfers.submit_soon(&self.volume, self.ring.has_waiting());
                tally.count(&self.counters, self.index, shown - taken);
                if away.is_waited_for() {
                    self.vitals.go_on(self.index);
                } else {
                    self.vitals.end(self.index);
                }
                idle_since = Some(shown);
            } else {
                away.transfers.submit(&self.volume);
                if away.has_some() {
                    // What was in memory after all wakes nobody.
                    continue;
                }
                match self.poll(idle_since, answered, stop, &away) {
                    Ok(true) => {}
                    Ok(false) => {
                        if !self.resume_kicks() {
                            self.sleep(epoll, stop)?;
                        }
                        answered = false;
                        self.suspend_kicks();
                    }
                    Err(error) => broken = Some(error.into()),
                }
            }
        }
        self.resume_kicks();
        self.vitals.count_held(-(self.hold.len() as i64));
        Ok(self.ring.check_memory()?)
    }

    fn serve_batch<'m>(
        &mut self,
        (taken, waiting): (Instant, u16),
        memory: &'m Arc<GuestMemory>,
        chain: &mut Chain<'m>,
        (completions, batch, writes, away): (&mut Vec<Completion<'m>>, &mut Batch, &mut Writes<'m>, &mut Away<'m>),
        epoll: &Epoll,
        complaints: &mut Complaints,
    ) -> Result<(), QueueError> {
        let mut bytes = 0;
        let mut waiting = waiting;
        let serial = self.device.description().serial;
        foresight::look_ahead(&self.ring, waiting, memory, &self.volume);
        for _ in 0..BATCH_REQUESTS {
            if bytes >= BATCH_BYTES {
                break;
            }
            let head = match self.again.pop_front() {
                Some(head) => head,
                None if waiting == 0 => break,
                None => match self.ring.take() {
                    Ok(head) => head,
                    // All that is in flight is in this batch, and free again after it.
                    Err(RingError::InFlight { .. }) if !completions.is_empty() => break,
                    Err(error) => return Err(error.into()),
                },
            };
            waiting = waiting.saturating_sub(1);
            away.lone_flush = false;
            let found = self.ring.chain(head, memory, chain);
            // Ahead of acting upon it: descriptors that are gone read as zeros.
            self.ring.check_memory()?;
            if let Err(error) = found {
                complaints.guests(&error);
                // Without a chain there is no place for a status either; the driver gets its descriptors back.
                completions.push(Completion::of(head));
                continue;
            }
            let patience = away.transfers.patience();
            let mut outcome = request::execute(chain, memory, &self.volume, &serial, batch, Manner::Together(patience));
            if outcome.put_off == Some(PutOff::Write) {
                if self.volume.is_direct()
                    && let Some(status_place) = outcome.status_place
                {
                    let request = Request { head, taken, offset: outcome.offset, status_place };
                    if self.send_write(request, &chain.readable[outcome.data_from..], away, memory, epoll, complaints) {
                        continue;
                    }
                    self.wait_for_transfers(away, completions, batch, complaints).map_err(QueueError::Wait)?;
                }
                writes.put_off(outcome.offset, &chain.readable[outcome.data_from..], completions.len());
            } else if outcome.put_off == Some(PutOff::BehindWrites) {
                self.carry_out(writes, completions, batch, memory, complaints);
                outcome = request::execute(chain, memory, &self.volume, &serial, batch, Manner::AtOnce(patience));
            } else if let Some(errand) = outcome.errand {
                let is_lone =
                    errand == Errand::Flush && waiting == 0 && completions.is_empty() && !away.is_waited_for();
                let is_again = errand == Errand::Flush && self.errands.flushes_again(self.index);
                let stays = is_lone && is_again && away.habit.is_alone() && !self.volume.is_flushing();
                if errand == Errand::Read
                    && let Some((status_place, data)) = chain.writable.split_last()
                    && away.transfers.begin_read(
                        Request { head, taken, offset: outcome.offset, status_place: *status_place },
                        data,
                        &self.volume,
                        memory,
                        epoll,
                        away.copied_before || !away.copied.is_empty(),
                    )
                {
                    continue;
                }
                // One that waits for room is tried again by this queue, and not by two at once.
                if !stays && !self.hold.contains(head) && self.send_away(errand, head, taken, away, complaints) {
                    away.lone_flush = is_lone;
                    continue;
                }
                if errand == Errand::Write {
                    self.wait_for_transfers(away, completions, batch, complaints).map_err(QueueError::Wait)?;
                }
                outcome = request::execute(chain, memory, &self.volume, &serial, batch, Manner::Waits);
                if is_lone {
                    away.habit.note(self.ring.waiting()? == 0);
                }
            }
            if outcome.kind == Kind::Read {
                away.copied.push((outcome.offset, outcome.bytes));
            }
            steps::reach(Step::Executed);
            let status = match &outcome.result {
                Ok(()) => Status::Ok,
                Err(error) => {
                    complaints.request(error);
                    if error.is_full() && self.keep(head) {
                        continue;
                    }
                    error.status()
                }
            };
            let data_bytes = if status == Status::Ok { outcome.data_bytes } else { 0 };
            bytes += chain.bytes();
            completions.push(Completion {
                kind: outcome.kind,
                bytes: outcome.bytes,
                data_bytes,
                status,
                status_place: outcome.status_place,
                wrote: outcome.wrote,
                ..Completion::of(head)
            });
        }
        Ok(())
    }

    /// Looks at the ring for a while, if that is worth it, when requests ran out at `since`. Whether there is something to do.
    fn poll(
        &mut self,
        since: Option<Instant>,
        answered: bool,
        stop: &Stop,
        away: &Away<'_>,
    ) -> Result<bool, RingError> {
        /// Between two looks at the clock.
        const LOOKS: u32 = 8;
        let Some(since) = since.filter(|_| self.hold.is_empty()) else { return Ok(false) };
        let Some(window) = self.polling.window(since) else { return self.glance(answered, away) };
        let Some(_poller) = self.polling.enter() else { return self.glance(answered, away) };
        let mut last = since;
        loop {
            for _ in 0..LOOKS {
                if self.ring.waiting()? > 0 || away.has_some() || stop.asked.load(Ordering::Acquire) {
                    self.polling.was_left_alone();
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if now - since > window || self.polling.was_taken_away(last, now) {
                return Ok(false);
            }
            last = now;
        }
    }

    /// Has a short look at the ring, if the driver has just been answered and may be at its next request. Whether there is something to do.
    fn glance(&mut self, answered: bool, away: &Away<'_>) -> Result<bool, RingError> {
        if !answered {
            return Ok(false);
        }
        let Some(window) = self.polling.glance() else { return Ok(false) };
        let begun = Instant::now();
        let mut paid = false;
        while !paid && begun.elapsed() < window {
            std::hint::spin_loop();
            paid = self.ring.waiting()? > 0 || away.has_some();
        }
        self.polling.glanced(paid);
        Ok(paid)
    }

    /// Waits until there is something to do.
    fn sleep(&mut self, epoll: &Epoll, stop: &Stop) -> Result<(), QueueError> {
        let until_rest = self.repose.is_awake().then_some(rest::AFTER);
        let limit = [self.hold.until_try(), until_rest].into_iter().flatten().min();
        let woken = epoll.wait(limit).map_err(QueueError::Wait)?;
        if !woken && until_rest.is_some_and(|until_rest| limit == Some(until_rest)) {
            let ring = &self.ring;
            self.repose.begin(|| ring.has_waiting() || stop.asked.load(Ordering::Acquire));
        }
        Ok(())
    }

    /// Carries out the writes that were put off.
    fn carry_out(
        &self,
        writes: &mut Writes<'_>,
        completions: &mut [Completion<'_>],
        batch: &mut Batch,
        memory: &GuestMemory,
        complaints: &mut Complaints,
    ) {
        if writes.is_empty() {
            return;
        }
        writes.carry_out(&self.volume, batch, |number, error| {
            let error = RequestError::from(error).located(memory);
            complaints.request(&error);
            let completion = &mut completions[number];
            completion.status = error.status();
            completion.is_full = error.is_full();
        });
        steps::reach(Step::Executed);
    }

    /// Makes the batch's writes safe, and then shows its completions to the driver.
    fn finish_batch(
        &mut self,
        completions: &mut Vec<Completion<'_>>,
        batch: &mut Batch,
        chain: &mut Chain<'_>,
        tally: &mut Tally,
        stop: &Stop,
        complaints: &mut Complaints,
    ) {
        let mut safe = self.volume.commit(batch);
        if safe.is_ok()
            && completions.iter().any(|completion| completion.wrote)
            && device::is_write_through(self.features, self.device.writeback())
        {
            safe = self.volume.flush();
        }
        if let Err(error) = &safe {
            complaints.hosts(error);
        }
        let is_full = safe.as_ref().is_err_and(block::Error::is_full);
        for completion in completions.drain(..) {
            let is_full = completion.is_full || completion.wrote && is_full && completion.status == Status::Ok;
            if is_full && self.keep(completion.head) {
                continue;
            }
            let status = if completion.wrote && safe.is_err() { Status::IoError } else { completion.status };
            if !self.hold.is_empty() {
                self.vitals.count_held(-(self.hold.len() as i64));
                self.hold.complete(completion.head, status == Status::Ok);
                self.vitals.count_held(self.hold.len() as i64);
            }
            if !completion.is_late {
                tally.note(completion.kind, completion.bytes, status != Status::Ok);
            }
            let told = completion.status_place.map_or(Ok(0), |place| place.copy_from_slice(&[status as u8]));
            // A request must not look complete whose status nobody has written: with that note, nothing is published.
            let status_bytes = told.unwrap_or_else(|fault| {
                guard::note_fault(fault);
                0
            });
            self.ring.complete(completion.head, completion.data_bytes + status_bytes as u32);
        }
        tally.sources = batch.take_sources();
        if let (Some(log), Some(written)) = (&self.log, &mut chain.written) {
            written.drain(..).for_each(|(address, len)| log.log.note(address, len.into()));
        }
        let wants_notice = self.ring.publish();
        self.note_used();
        if wants_notice {
            // It has got further, and whoever is woken now may have the processor before it says so otherwise.
            self.vitals.go_on(self.index);
            self.notify(stop, complaints);
        }
    }

    fn suspend_kicks(&self) {
        self.ring.suspend_kicks();
        self.note_used();
    }

    fn resume_kicks(&self) -> bool {
        let resumed = self.ring.resume_kicks();
        self.note_used();
        resumed
    }

    /// Notes that the used ring has been written.
    #[inline]
    fn note_used(&self) {
        if let Some(log) = &self.log {
            log.note_used();
        }
    }

    /// Has a request wait that there is no room for. Whether it does; if not, it fails.
    #[cold]
    fn keep(&mut self, head: u16) -> bool {
        let before = self.hold.len();
        let waits = self.hold.keep(head);
        if self.hold.len() > before {
            self.vitals.count_held(1);
            self.counters.count_held(self.index);
        }
        waits
    }

    fn notify(&self, stop: &Stop, complaints: &mut Complaints) {
        if let Some(call) = &self.call
            && let Err(error) = stop.while_notifying(|| events::signal(call))
        {
            complaints.hosts(&NotifyError(error));
        }
        steps::reach(Step::Notified);
    }
}

/// Why a ring is served no further.
#[derive(Debug, thiserror::Error)]
enum QueueError {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("cannot wait for its driver: {0}")]
    Wait(#[source] io::Error),
}
