//! The loop that keeps requests in flight on a set of queues and takes the time of each.
//!
//! One thread drives one or more queues, each to its depth: [`drive`] does so to the end, and [`Drive`] has the steps of it for
//! whoever has something else to do in between. What is asked for is the client's business; this file owns submission, completion,
//! waiting and counting. Nothing is allocated while it runs.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::device::Queue;
use crate::histogram::Histogram;
use crate::request::{Operation, Part, Request, STATUS_OK};
use crate::sys::{self, SharedMemory};

/// A backend that completes nothing for this long is stuck.
const PATIENCE: Duration = Duration::from_secs(10);
/// Looks at the rings in vain before the CPU is offered to others: more than any backend takes that has
/// one of its own, and soon enough where it has to share this one.
const SPINS_BEFORE_YIELD: u32 = 512;
/// How often the clock is looked at while spinning.
const SPINS_PER_LOOK: u32 = 4096;

/// How the driver learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Wait {
    /// Sleep until the call eventfd fires, as a guest that takes interrupts.
    Call,
    /// Watch the used ring and ask for no calls.
    Poll,
}

/// What to ask for, and what to do with the answers.
pub trait Client {
    /// The next request for this slot; none when it has had its last.
    fn next(&mut self, queue: usize, slot: usize) -> Option<Request>;

    /// Puts the data of a write into its buffer at `data`.
    fn fill(&mut self, _request: &Request, _memory: &SharedMemory, _data: usize) {}

    /// Whether the time that a request takes is of interest.
    fn is_timed(&self, _request: &Request) -> bool {
        true
    }

    /// Takes note of a request that has succeeded.
    fn done(&mut self, _request: &Request, _answer: &Answer) -> Result<()> {
        Ok(())
    }
}

/// What came back for a request that has succeeded.
#[derive(Debug)]
pub struct Answer<'a> {
    /// The used length: how many bytes the device says it wrote.
    pub written: u32,
    pub memory: &'a SharedMemory,
    /// Where the request's buffer is in `memory`.
    pub data: usize,
}

/// What was counted.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub requests: u64,
    pub bytes: u64,
    pub elapsed: Duration,
    pub latency: Histogram,
    /// The longest of these, to the nanosecond.
    pub longest: Duration,
}

impl Tally {
    /// Joins what another thread counted in the same time.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.elapsed = self.elapsed.max(other.elapsed);
        self.latency.add(&other.latency);
        self.longest = self.longest.max(other.longest);
    }
}

/// A request that a slot has in flight.
#[derive(Clone, Copy, Debug)]
struct Flight {
    request: Request,
    /// When it, or the pair that it ends, was submitted.
    since: Instant,
}

/// Queues that are driven, and what is in flight on them.
pub struct Drive<Q, C> {
    queues: Q,
    pub client: C,
    /// By queue, then slot.
    flights: Vec<Vec<Option<Flight>>>,
    in_flight: usize,
    pub tally: Tally,
}

/// Drives `queues` until the client has no more to ask for, or `time` is over and all is answered.
pub fn drive(queues: &mut [Queue], client: &mut impl Client, wait: Wait, time: Option<Duration>) -> Result<Tally> {
    Drive::new(queues, client).run(wait, time)
}

impl<C: Client> Client for &mut C {
    fn next(&mut self, queue: usize, slot: usize) -> Option<Request> {
        (**self).next(queue, slot)
    }

    fn fill(&mut self, request: &Request, memory: &SharedMemory, data: usize) {
        (**self).fill(request, memory, data);
    }

    fn is_timed(&self, request: &Request) -> bool {
        (**self).is_timed(request)
    }

    fn done(&mut self, request: &Request, answer: &Answer) -> Result<()> {
        (**self).done(request, answer)
    }
}

impl<Q: AsRef<[Queue]> + AsMut<[Queue]>, C: Client> Drive<Q, C> {
    /// Drives these queues, on which nothing is in flight.
    pub fn new(queues: Q, client: C) -> Self {
        let flights = no_flights(&queues);
        Self { queues, client, flights, in_flight: 0, tally: Tally::default() }
    }

    fn run(mut self, wait: Wait, time: Option<Duration>) -> Result<Tally> {
        let start = Instant::now();
        for queue in 0..self.flights.len() {
            self.queues.as_mut()[queue].ring.disarm();
            self.fill(queue, usize::MAX, start);
            self.publish(queue)?;
        }
        let mut now = start;
        let mut progress_at = start;
        let mut spins = 0_u32;
        while self.in_flight > 0 {
            let mut completed = 0;
            for queue in 0..self.flights.len() {
                completed +=
                    self.harvest(queue, &mut now, |now| time.is_none_or(|time| now.duration_since(start) < time))?;
            }
            if completed > 0 {
                (progress_at, spins) = (now, 0);
                continue;
            }
            match wait {
                Wait::Call => self.sleep(PATIENCE, None)?,
                Wait::Poll => {
                    std::hint::spin_loop();
                    spins = spins.wrapping_add(1);
                    if spins >= SPINS_BEFORE_YIELD {
                        std::thread::yield_now();
                    }
                    if !spins.is_multiple_of(SPINS_PER_LOOK) {
                        continue;
                    }
                }
            }
            if progress_at.elapsed() > PATIENCE {
                bail!("no completion in {PATIENCE:?} with {} requests in flight", self.in_flight);
            }
        }
        self.tally.elapsed = start.elapsed();
        Ok(self.tally)
    }

    /// How many queues are driven.
    pub fn queues(&self) -> usize {
        self.flights.len()
    }

    /// How many requests are in flight on all queues.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Asks the client for requests for the idle ones of a queue's first `slots` slots; they are seen after `publish`.
    pub fn fill(&mut self, queue: usize, slots: usize, now: Instant) {
        for slot in 0..self.flights[queue].len().min(slots) {
            if self.flights[queue][slot].is_none() {
                self.submit(queue, slot, now, None);
            }
        }
    }

    /// Takes all completions that are there, and puts new requests in their places while `more`.
    pub fn harvest(&mut self, queue: usize, now: &mut Instant, more: impl Fn(Instant) -> bool) -> Result<usize> {
        let mut completed = 0;
        while let Some((head, written)) = self.queues.as_mut()[queue].ring.pop() {
            if completed == 0 {
                *now = Instant::now();
            }
            completed += 1;
            let slot = self.queues.as_ref()[queue].slots.slot_of(head);
            let flight = slot.and_then(|slot| self.flights[queue][slot].take());
            let (Some(slot), Some(flight)) = (slot, flight) else {
                bail!("queue {queue}: head {head} completed, which is not in flight");
            };
            self.in_flight -= 1;
            self.complete(queue, slot, &flight, written, *now)?;
            let since = (flight.request.part == Part::First).then_some(flight.since);
            if since.is_some() || more(*now) {
                self.submit(queue, slot, *now, since);
            }
        }
        if completed > 0 {
            self.queues.as_mut()[queue].ring.disarm();
            self.publish(queue)?;
        }
        Ok(completed)
    }

    fn complete(&mut self, queue: usize, slot: usize, flight: &Flight, written: u32, now: Instant) -> Result<()> {
        let request = &flight.request;
        let slots = &self.queues.as_ref()[queue].slots;
        let status = slots.status(slot);
        ensure!(status == STATUS_OK, "{request:?} failed with status {status}");
        let answer = Answer { written, memory: slots.memory(), data: slots.data(slot) };
        self.client.done(request, &answer)?;
        self.tally.bytes += u64::from(request.bytes);
        if request.part != Part::First {
            self.tally.requests += 1;
            if self.client.is_timed(request) {
                let latency = now.duration_since(flight.since);
                self.tally.latency.record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
                self.tally.longest = self.tally.longest.max(latency);
            }
        }
        Ok(())
    }

    /// Asks the client for this slot's next request and pushes it. `since` is when its pair began.
    fn submit(&mut self, queue: usize, slot: usize, now: Instant, since: Option<Instant>) {
        let Some(request) = self.client.next(queue, slot) else { return };
        let Queue { ring, slots, .. } = &mut self.queues.as_mut()[queue];
        slots.turn_buffer(slot);
        if request.operation == Operation::Write {
            self.client.fill(&request, slots.memory(), slots.data(slot));
        }
        slots.push(slot, &request, ring);
        self.flights[queue][slot] = Some(Flight { request, since: since.unwrap_or(now) });
        self.in_flight += 1;
    }

    /// Shows the device what was submitted on a queue.
    pub fn publish(&mut self, queue: usize) -> Result<()> {
        let Queue { ring, kick, .. } = &mut self.queues.as_mut()[queue];
        if ring.publish() {
            kick.write(1).context("kick")?;
        }
        Ok(())
    }

    /// Sleeps until a queue has completions, `wake` can be read or `timeout` has passed.
    pub fn sleep(&mut self, timeout: Duration, wake: Option<RawFd>) -> Result<()> {
        let queues = self.queues.as_mut();
        if queues.iter_mut().any(|queue| queue.ring.arm()) {
            return Ok(());
        }
        let mut fds: [libc::pollfd; QUEUES_MAX + 1] = std::array::from_fn(|index| libc::pollfd {
            fd: queues.get(index).map_or(-1, Queue::call_fd),
            events: libc::POLLIN,
            revents: 0,
        });
        let count = queues.len();
        fds[count].fd = wake.unwrap_or(-1);
        let fds = &mut fds[..=count];
        sys::wait_readable(fds, timeout).context("poll")?;
        for (queue, fd) in queues.iter().zip(fds) {
            if fd.revents != 0 {
                // Nothing to read means that the call was spurious: the ring says what is done.
                let _ = queue.call.read();
            }
        }
        Ok(())
    }
}

fn no_flights(queues: &impl AsRef<[Queue]>) -> Vec<Vec<Option<Flight>>> {
    queues.as_ref().iter().map(|queue| vec![None; queue.slots.depth()]).collect()
}

impl<C: Client> Drive<Vec<Queue>, C> {
    /// Goes on with other queues, on which nothing is in flight. What was in flight is forgotten.
    pub fn replace_queues(&mut self, queues: Vec<Queue>) {
        self.flights = no_flights(&queues);
        self.in_flight = 0;
        self.queues = queues;
    }

    /// The queues, on which nothing is in flight.
    pub fn into_queues(self) -> Vec<Queue> {
        self.queues
    }

    pub fn queue_mut(&mut self, queue: usize) -> &mut Queue {
        &mut self.queues[queue]
    }

    /// Where each queue stands, and how many requests it has in flight, a line for each.
    pub fn standing(&self) -> String {
        let queues = self.queues.iter().zip(&self.flights).enumerate();
        let line = |(number, (queue, flights)): (usize, (&Queue, &Vec<Option<Flight>>))| {
            format!("  queue {number}: {} in flight; {}\n", flights.iter().flatten().count(), queue.ring.standing())
        };
        queues.map(line).collect()
    }

    /// Where the buffers of the requests in flight on a queue are.
    pub fn buffers_in_use(&self, queue: usize) -> impl Iterator<Item = usize> {
        let slots = &self.queues[queue].slots;
        let busy = self.flights[queue].iter().enumerate().filter(|(_, flight)| flight.is_some());
        busy.map(|(slot, _)| slots.data(slot))
    }
}

/// The most queues that one thread drives.
pub const QUEUES_MAX: usize = 64;
