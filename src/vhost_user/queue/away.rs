//! [`Away`]: requests of a queue that others carry out, from being sent until they are shown to the driver.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use crate::block::{Batch, Sources};
use crate::sys::buffers::Readable;
use crate::sys::events::Epoll;
use crate::sys::guard;
use crate::sys::guest::GuestMemory;
use crate::vhost_user::counters::{Kind, Tally};
use crate::vhost_user::errands::{Done, FlushHabit, Inbox, Job};

use crate::vhost_user::request::{Errand, RequestError, Status};
use crate::vhost_user::transfers::{Finished, Request, Rings, Transfers};

use crate::vhost_user::steps::{self, Step};

use super::complaints::Complaints;
use super::{Completion, Queue};

/// There is nobody else to wait for the disk.
#[derive(Debug, thiserror::Error)]
#[error("a request waits for the disk, and keeps others waiting")]
struct AloneError(#[source] io::Error);

/// Requests of a queue that others carry out.
pub(super) struct Away<'m> {
    pub(super) inbox: Arc<Inbox>,
    /// How many have not come back.
    pub(super) count: usize,
    /// Those that have, while they are looked at.
    pub(super) back: Vec<Done>,
    /// Those that the kernel carries out, and of these what it is done with, while that is looked at.
    pub(super) transfers: Transfers<'m>,
    pub(super) moved: Vec<Finished<'m>>,
    /// Offsets and lengths of the reads of a batch that had not to wait, as far as anybody knew, and whether there were any in the batch before.
    pub(super) copied: Vec<(u64, u64)>,
    pub(super) copied_before: bool,
    /// Whether flushes had better not be among them, and whether one is that nothing has come beside.
    pub(super) habit: FlushHabit,
    pub(super) lone_flush: bool,
}

impl Drop for Away<'_> {
    fn drop(&mut self) {
        // They write to the guest's memory until they are back, whatever becomes of the ring.
        self.wait_for_all();
    }
}

impl<'m> Away<'m> {
    /// None yet. What threads have comes back to `inbox`; without rings, the kernel has none.
    pub(super) fn new(inbox: Arc<Inbox>, rings: Option<Arc<Rings>>) -> Away<'m> {
        Away {
            inbox,
            count: 0,
            back: Vec::new(),
            transfers: Transfers::new(rings),
            moved: Vec::new(),
            copied: Vec::new(),
            copied_before: false,
            habit: FlushHabit::default(),
            lone_flush: false,
        }
    }

    /// Whether any has not come back.
    pub(super) fn is_waited_for(&self) -> bool {
        self.count > 0 || self.transfers.count() > 0
    }

    /// Whether one has.
    #[inline]
    pub(super) fn has_some(&self) -> bool {
        self.inbox.has_some() || self.transfers.has_some()
    }

    fn wait_for_all(&mut self) {
        while self.count > 0 {
            self.inbox.wait();
            self.inbox.take(&mut self.back);
            self.count -= self.back.len();
            self.back.clear();
        }
    }
}

impl Queue {
    /// Takes what has come back, to be shown to the driver.
    pub(super) fn take_back(
        &mut self,
        away: &mut Away<'_>,
        completions: &mut Vec<Completion<'_>>,
        complaints: &mut Complaints,
    ) {
        if !away.inbox.has_some() {
            return;
        }
        away.inbox.take(&mut away.back);
        away.count -= away.back.len();
        for done in away.back.drain(..) {
            if done.kind == Kind::Flush {
                away.habit.note(std::mem::take(&mut away.lone_flush));
            }
            if let Some(fault) = done.fault {
                guard::note_fault(fault);
            }
            if let Some(error) = &done.error {
                complaints.request(error);
                if error.is_full() && self.keep(done.head) {
                    continue;
                }
            }
            let status = done.error.as_ref().map_or(Status::Ok, RequestError::status);
            let completion = Completion {
                kind: done.kind,
                bytes: done.bytes,
                data_bytes: done.written,
                status,
                wrote: done.wrote,
                is_late: true,
                ..Completion::of(done.head)
            };
            self.count_late(&completion, done.taken, done.sources);
            completions.push(completion);
        }
    }

    /// Counts a request that others have carried out.
    fn count_late(&self, completion: &Completion<'_>, taken: Instant, sources: Sources) {
        let mut tally = Tally::default();
        tally.sources = sources;
        tally.note(completion.kind, completion.bytes, completion.status != Status::Ok);
        tally.count(&self.counters, self.index, taken.elapsed());
    }

    /// Takes what the kernel is done with, to be shown to the driver once `batch` is committed. What it has not moved others have to.
    pub(super) fn take_moved<'m>(
        &mut self,
        away: &mut Away<'m>,
        completions: &mut Vec<Completion<'m>>,
        batch: &mut Batch,
        complaints: &mut Complaints,
    ) {
        if !away.transfers.has_some() {
            return;
        }
        let mut moved = std::mem::take(&mut away.moved);
        away.transfers.take(&self.volume, &mut moved);
        for Finished { request: Request { head, taken, status_place, .. }, bytes, sources, write, failed } in
            moved.drain(..)
        {
            let (kind, errand) =
                if write.is_some() { (Kind::Write, Errand::Write) } else { (Kind::Read, Errand::Read) };
            if failed {
                // Whoever does it instead may have to have the clusters alone.
                drop(write);
                if !self.send_away(errand, head, taken, away, complaints) {
                    away.transfers.give_up();
                    self.again.push_back(head);
                }
                continue;
            }
            let completion = Completion {
                kind,
                bytes: bytes.into(),
                data_bytes: if write.is_some() { 0 } else { bytes },
                status: Status::Ok,
                status_place: Some(status_place),
                wrote: write.is_some(),
                is_late: true,
                ..Completion::of(head)
            };
            if let Some(write) = write {
                write.finish(batch);
                steps::reach(Step::Executed);
            }
            self.count_late(&completion, taken, sources);
            completions.push(completion);
        }
        away.moved = moved;
    }

    /// Has a write past the page cache carried out by others. Whether they do.
    pub(super) fn send_write<'m>(
        &mut self,
        request: Request<'m>,
        data: &[Readable<'m>],
        away: &mut Away<'m>,
        memory: &Arc<GuestMemory>,
        epoll: &Epoll,
        complaints: &mut Complaints,
    ) -> bool {
        let (head, taken) = (request.head, request.taken);
        // One that waits for room is tried again by this queue, and not by two at once.
        !self.hold.contains(head)
            && (away.transfers.begin_write(request, data, &self.volume, memory, epoll)
                || self.send_away(Errand::Write, head, taken, away, complaints))
    }

    /// Waits until the kernel is done with all, so that no other has to wait for that.
    pub(super) fn wait_for_transfers<'m>(
        &mut self,
        away: &mut Away<'m>,
        completions: &mut Vec<Completion<'m>>,
        batch: &mut Batch,
        complaints: &mut Complaints,
    ) -> io::Result<()> {
        while away.transfers.count() > 0 {
            away.transfers.wait(&self.volume)?;
            self.take_moved(away, completions, batch, complaints);
        }
        Ok(())
    }

    /// Has others carry out a request. Whether they do.
    pub(super) fn send_away(
        &self,
        errand: Errand,
        head: u16,
        taken: Instant,
        away: &mut Away<'_>,
        complaints: &mut Complaints,
    ) -> bool {
        let job = Job {
            head,
            taken,
            table: self.ring.table().clone(),
            memory: Arc::clone(&self.memory),
            log: self.log.as_ref().map(|log| Arc::clone(&log.log)),
            inbox: Arc::clone(&away.inbox),
        };
        match self.errands.send(errand, job) {
            Ok(()) => {
                away.count += 1;
                true
            }
            Err(error) => {
                complaints.hosts(&AloneError(error));
                false
            }
        }
    }
}
