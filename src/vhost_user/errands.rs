//! [`Errands`]: requests that have to wait for the disk, carried out by threads that may, so that a queue never does: flushes, reads where
//! [`super::transfers`] cannot have the kernel do them, and writes past the page cache.
//!
//! A queue hands over the head of a request, and nothing of what it has read of it: the thread reads the chain and carries the request out from its start,
//! as the successor of a dead worker would. All queues share the threads. There are none until there is something to wait for, never more than
//! [`THREADS_MAX`], and none again some time after the last errand. Flushes that come while one is under way share the next.
//!
//! Invariant: a queue gets each head back once, through its [`Inbox`], and by then the thread has let go of the guest's memory.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::block::{Batch, Sources, Volume};
use crate::sys::events;
use crate::sys::guard::{self, Fault};
use crate::sys::guest::{DirtyLog, GuestMemory};

use super::counters::Kind;
use super::device::Device;
use super::request::{self, Errand, Manner, RequestError, Status};
use super::ring::{Chain, Table};
#[cfg(not(fuzzing))]
use super::steps::{self, Step};

/// As many requests wait for the disk at once.
const THREADS_MAX: usize = 32;
/// How long a thread waits for its next errand before it ends.
const IDLE: Duration = Duration::from_secs(5);
const STACK_BYTES: usize = 128 << 10;

/// Whether a queue's flushes are worth handing over. They are not where nothing else came during the last ones: then two threads would be woken for
/// nothing.
#[derive(Default)]
pub struct FlushHabit {
    /// How many in a row had the queue to themselves.
    alone: u32,
}

impl FlushHabit {
    const ENOUGH: u32 = 8;

    /// Whether the queue had better flush itself.
    #[inline]
    pub fn is_alone(&self) -> bool {
        self.alone >= Self::ENOUGH
    }

    /// Notes whether nothing else came during a flush.
    pub fn note(&mut self, alone: bool) {
        self.alone = if alone { self.alone.saturating_add(1) } else { 0 };
    }
}

/// How many flushes to expect together: as many as there are queues that have lately flushed.
///
/// Queues that each flush again as soon as they are answered come in two groups otherwise: the first one's flush is under way when the others come, and theirs when it comes
/// again. Whoever waits for the others for an instant has all of them served by one.
#[derive(Default)]
struct Company {
    /// Queues, and the number of the last flush that each had a part in.
    seen: Vec<(usize, u64)>,
    /// Flushes so far.
    flushes: u64,
    /// How long the last one took.
    took: Duration,
}

impl Company {
    /// A queue that has taken no part in so many flushes is not waited for.
    const LATELY: u64 = 2;
    /// Nor is any for longer than this, nor than half of what the last flush took.
    const PATIENCE_MAX: Duration = Duration::from_micros(500);

    fn expected(&self) -> usize {
        self.seen.len()
    }

    /// Notes which queues have a part in a flush.
    fn note(&mut self, queues: impl Iterator<Item = usize>) {
        self.flushes += 1;
        for queue in queues {
            match self.seen.iter_mut().find(|(known, _)| *known == queue) {
                Some((_, flush)) => *flush = self.flushes,
                None => self.seen.push((queue, self.flushes)),
            }
        }
        self.seen.retain(|(_, flush)| flush + Self::LATELY > self.flushes);
    }
}

/// The threads of a worker.
pub struct Errands {
    shared: Arc<Shared>,
}

struct Shared {
    volume: Arc<Volume>,
    device: Arc<Device>,
    state: Mutex<State>,
    more: Condvar,
    /// For a flush that others are about to join.
    company: Condvar,
    /// The queue that has flushed last, by itself or here.
    last_flusher: AtomicU32,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    /// Flushes, which one sync serves together.
    flushes: Vec<Job>,
    is_flushing: bool,
    /// With how many a flush is content that waits for others; 0: none waits.
    awaits: usize,
    company: Company,
    threads: usize,
    idle: usize,
    closed: bool,
}

/// A request that is handed over.
pub struct Job {
    /// Where its chain begins.
    pub head: u16,
    /// When the queue took it.
    pub taken: Instant,
    pub table: Table,
    pub memory: Arc<GuestMemory>,
    /// Where to note what is written to the guest's memory.
    pub log: Option<Arc<DirtyLog>>,
    /// Where it is to come back to.
    pub inbox: Arc<Inbox>,
}

/// A request that comes back.
pub struct Done {
    pub head: u16,
    /// When the queue took it.
    pub taken: Instant,
    pub kind: Kind,
    /// Bytes of the volume that it was about.
    pub bytes: u64,
    /// Bytes of data that were written to the guest's memory, with the status.
    pub written: u32,
    /// Whether it wrote to the volume.
    pub wrote: bool,
    /// Where bytes that were read came from.
    pub sources: Sources,
    /// What went wrong, if anything did.
    pub error: Option<RequestError>,
    /// Memory that the ring cannot do without is gone.
    pub fault: Option<Fault>,
}

/// Where a queue gets its requests back.
pub struct Inbox {
    done: Mutex<Vec<Done>>,
    has_some: AtomicBool,
    /// For a queue that waits for nothing else, and whether it does.
    more: Condvar,
    is_awaited: AtomicBool,
    /// Written when there is something.
    pub event: File,
}

impl Inbox {
    /// An empty one.
    pub fn new() -> io::Result<Inbox> {
        let event = vmm_sys_util::eventfd::EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
        Ok(Inbox {
            done: Mutex::default(),
            has_some: AtomicBool::new(false),
            more: Condvar::new(),
            is_awaited: AtomicBool::new(false),
            event: events::into_file(event),
        })
    }

    /// Whether something has come back.
    #[inline]
    pub fn has_some(&self) -> bool {
        self.has_some.load(Ordering::Acquire)
    }

    /// Moves what has come back to `to`.
    pub fn take(&self, to: &mut Vec<Done>) {
        let mut done = lock(&self.done);
        self.has_some.store(false, Ordering::Release);
        to.append(&mut done);
    }

    /// Waits until something has come back.
    pub fn wait(&self) {
        let mut done = lock(&self.done);
        self.is_awaited.store(true, Ordering::Relaxed);
        while done.is_empty() {
            done = self.more.wait(done).expect("no holder of this lock panics");
        }
        self.is_awaited.store(false, Ordering::Relaxed);
    }

    fn put(&self, done: Done) {
        let mut waiting = lock(&self.done);
        waiting.push(done);
        let is_first = !self.has_some.swap(true, Ordering::AcqRel);
        let is_awaited = self.is_awaited.load(Ordering::Relaxed);
        // Ahead of waking the queue, which may take the processor at once and would have to wait for the lock.
        drop(waiting);
        if is_first {
            // It cannot be full, so this cannot fail.
            let _ = events::signal(&self.event);
        }
        if is_awaited {
            self.more.notify_one();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no holder of this lock panics")
}

impl Errands {
    /// None yet.
    pub fn new(volume: Arc<Volume>, device: Arc<Device>) -> Errands {
        let (state, more) = (Mutex::default(), Condvar::new());
        let (company, last_flusher) = (Condvar::new(), AtomicU32::new(u32::MAX));
        Errands { shared: Arc::new(Shared { volume, device, state, more, company, last_flusher }) }
    }

    /// Notes that a queue flushes. Whether the last flush was its as well.
    pub fn flushes_again(&self, queue: u16) -> bool {
        self.shared.last_flusher.swap(queue.into(), Ordering::Relaxed) == u32::from(queue)
    }

    /// Hands a request over. An error when there is no thread for it: then whoever asks has to wait after all.
    pub fn send(&self, errand: Errand, job: Job) -> io::Result<()> {
        let mut state = lock(&self.shared.state);
        if errand == Errand::Flush && (state.is_flushing || !state.flushes.is_empty()) {
            // Whoever flushes, or is on the way to, has this one in the same sync, or in the next.
            state.flushes.push(job);
            let is_last = state.awaits > 0 && state.flushes.len() >= state.awaits;
            if is_last {
                state.awaits = 0;
                // Whoever is woken may take the processor at once, and needs the lock.
                drop(state);
                self.shared.company.notify_one();
            }
            return Ok(());
        }
        if state.idle <= state.runnable() && state.threads < THREADS_MAX {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("errands".to_owned()).stack_size(STACK_BYTES);
            match thread.spawn(move || shared.run()) {
                Ok(_) => state.threads += 1,
                Err(error) if state.threads == 0 => return Err(error),
                Err(_) => {}
            }
        }
        match errand {
            Errand::Read | Errand::Write => state.waiting.push_back(job),
            Errand::Flush => state.flushes.push(job),
        }
        drop(state);
        self.shared.more.notify_one();
        Ok(())
    }
}

impl Drop for Errands {
    fn drop(&mut self) {
        lock(&self.shared.state).closed = true;
        self.shared.more.notify_all();
    }
}

impl Shared {
    fn run(&self) {
        let mut state = lock(&self.state);
        loop {
            if !state.flushes.is_empty() && !state.is_flushing {
                state.is_flushing = true;
                let expected = state.company.expected();
                if state.flushes.len() < expected {
                    let patience = (state.company.took / 2).min(Company::PATIENCE_MAX);
                    state.awaits = expected;
                    let waited = self.company.wait_timeout_while(state, patience, |state| state.awaits > 0);
                    state = waited.expect("no holder of this lock panics").0;
                    state.awaits = 0;
                }
                let jobs = std::mem::take(&mut state.flushes);
                state.company.note(jobs.iter().map(|job| Arc::as_ptr(&job.inbox).addr()));
                drop(state);
                // All of them were handed over before this, and the writes that they speak of are complete. When it fails, each finds out why.
                let begun = Instant::now();
                let manner = self.volume.flush().map_or(Manner::Waits, |()| Manner::Flushed);
                let took = begun.elapsed();
                jobs.into_iter().for_each(|job| self.carry_out(job, manner));
                state = lock(&self.state);
                state.is_flushing = false;
                state.company.took = took;
            } else if let Some(job) = state.waiting.pop_front() {
                drop(state);
                self.carry_out(job, Manner::Waits);
                state = lock(&self.state);
            } else if state.closed {
                break;
            } else {
                state.idle += 1;
                let (woken, wait) = self.more.wait_timeout(state, IDLE).expect("no holder of this lock panics");
                state = woken;
                state.idle -= 1;
                if wait.timed_out() && state.runnable() == 0 {
                    break;
                }
            }
        }
        state.threads -= 1;
    }

    fn carry_out(&self, job: Job, manner: Manner) {
        let done = self.execute(&job, manner);
        // Ahead of saying so: the memory is unmapped soon after.
        let Job { table, memory, log, inbox, .. } = job;
        drop((table, memory, log));
        inbox.put(done);
    }

    fn execute(&self, job: &Job, manner: Manner) -> Done {
        let Job { head, taken, table, memory, log, .. } = job;
        let mut chain = Chain { written: log.is_some().then(Vec::new), ..Chain::default() };
        let mut done = Done {
            head: *head,
            taken: *taken,
            kind: Kind::Other,
            bytes: 0,
            written: 0,
            wrote: false,
            sources: Sources::default(),
            error: None,
            fault: None,
        };
        let found = table.chain(*head, memory, &mut chain);
        // Descriptors that are gone read as zeros.
        done.fault = guard::take_fault();
        if done.fault.is_some() {
            return done;
        }
        if found.is_err() {
            done.error = Some(RequestError::Changed);
            return done;
        }
        let mut batch = Batch::default();
        let mut outcome =
            request::execute(&mut chain, memory, &self.volume, &self.device.description().serial, &mut batch, manner);
        if outcome.wrote && outcome.result.is_ok() {
            // Where death is an unwinding, it is one of a queue's thread.
            #[cfg(not(fuzzing))]
            steps::reach(Step::Executed);
            outcome.result = self.volume.commit(&mut batch).map_err(RequestError::from);
        }
        let status = outcome.result.as_ref().map_or_else(RequestError::status, |()| Status::Ok);
        if status == Status::Ok {
            done.written = outcome.data_bytes;
        }
        match outcome.status_place.map_or(Ok(0), |place| place.copy_from_slice(&[status as u8])) {
            Ok(bytes) => done.written += bytes as u32,
            Err(fault) => done.fault = Some(fault),
        }
        (done.kind, done.bytes, done.wrote) = (outcome.kind, outcome.bytes, outcome.wrote);
        done.error = outcome.result.err();
        done.sources = batch.take_sources();
        if let (Some(log), Some(written)) = (log, &mut chain.written) {
            written.drain(..).for_each(|(address, len)| log.note(address, len.into()));
        }
        done
    }
}

impl State {
    /// How many threads could find something to do.
    fn runnable(&self) -> usize {
        self.waiting.len() + usize::from(!self.flushes.is_empty() && !self.is_flushing)
    }
}
