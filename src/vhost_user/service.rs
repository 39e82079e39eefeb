//! [`Service`]: what serves the volume now, and what comes after it: the worker, its volume's files, and what is staged for the guest's
//! next boot.
//!
//! A worker is replaced by another whenever what it serves changes; the front end's session goes on, and tells the new one what it told
//! the last. Knows no messages of vhost-user.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Child, ExitStatus};
use std::sync::Mutex;

use crate::block::delta::{grow, open};
use crate::sys::process;

use super::attachment::{Offer, Part};
use super::boot::{History, Start};
use super::control::Event;
use super::conversation::{Conversation, ConversationError};
use super::device::Device;
use super::order::{Answer, DeltaOrder, Opened, Order, VolumeOrder};
use super::ring::RingPlace;
use super::worker::WORKER_ARGUMENT;

/// Why the worker did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The conversation failed; most often because the worker is gone.
    #[error("the worker did not answer")]
    Conversation(#[from] ConversationError),
    /// It said why.
    #[error("{reason}")]
    Refused { reason: String },
    /// It answered something else.
    #[error("the worker answered another question")]
    Answer,
    /// It could not be started.
    #[error("cannot start the worker")]
    Start(#[source] io::Error),
    /// It could not be waited for.
    #[error("cannot wait for the worker")]
    Wait(#[source] io::Error),
    /// There is nothing that could become larger.
    #[error("the volume is as large as its image: only one with a delta grows")]
    NoDelta,
    /// What it holds would be lost.
    #[error("an ephemeral volume does not grow while it is served: what it holds is known to its worker alone")]
    Ephemeral,
    /// The driver has been told what kind of disk it has.
    #[error("it is {found}, and the driver has been told that its disk is {told}")]
    Kind { found: &'static str, told: &'static str },
    /// The delta could not become larger.
    #[error(transparent)]
    Grow(#[from] open::OpenError),
}

/// The keeper's side of a worker process.
struct Worker {
    conversation: Conversation,
    process: Mutex<Child>,
}

impl Worker {
    /// Starts a worker for a volume.
    fn start(part: &Part, offer: &Offer, counters: &File) -> Result<(Worker, Opened), WorkerError> {
        let (conversation, theirs) = Conversation::with("worker").map_err(WorkerError::Start)?;
        let process = process::execute_self("pando-blk", WORKER_ARGUMENT, theirs).map_err(WorkerError::Start)?;
        let worker = Worker { conversation, process: Mutex::new(process) };
        let delta = part.delta.as_ref();
        let order = VolumeOrder {
            base: part.base.as_ref().map(|base| base.label.clone()),
            delta: delta.map(|delta| DeltaOrder { label: delta.label.clone(), ephemeral: delta.ephemeral }),
            queues: offer.queues,
            serial: part.serial,
            log_level: log::max_level() as u8,
        };
        let descriptors: Vec<BorrowedFd> = std::iter::once(counters.as_fd()).chain(part.descriptors()).collect();
        match worker.exchange(&Order::Open(order), &descriptors) {
            Ok(Answer::Opened(opened)) => Ok((worker, opened)),
            other => {
                // It ends with the conversation, by itself.
                let Worker { conversation, process } = worker;
                drop(conversation);
                let mut process = process.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
                process.wait().map_err(WorkerError::Wait)?;
                Err(other.err().unwrap_or(WorkerError::Answer))
            }
        }
    }

    fn exchange(&self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Result<Answer, WorkerError> {
        self.conversation.send(order, descriptors)?;
        let (answer, descriptors) = self.conversation.receive()?;
        descriptors.finish()?;
        match answer {
            Answer::Failed(reason) => Err(WorkerError::Refused { reason }),
            answer => Ok(answer),
        }
    }

    /// Waits for the process's end, which is near: it closed its side of the conversation.
    fn wait(&self) -> Result<ExitStatus, WorkerError> {
        self.process.lock().expect("no holder of this lock panics").wait().map_err(WorkerError::Wait)
    }

    /// Has it make everything durable and end.
    fn close(&self) -> Result<(), WorkerError> {
        self.exchange(&Order::Close, &[])?;
        self.wait().map(drop)
    }
}

/// What serves the volume.
pub struct Service {
    worker: Worker,
    device: Device,
    part: Part,
    staged: Option<Part>,
    history: History,
    offer: Offer,
    counters: File,
    events: Vec<Event>,
}

impl Service {
    /// Starts a worker for `part`.
    pub fn start(part: Part, offer: Offer, counters: File, history: History) -> Result<Service, WorkerError> {
        let (worker, opened) = Worker::start(&part, &offer, &counters)?;
        let device = Device::new(opened.description(offer.queues));
        Ok(Service { worker, device, part, staged: None, history, offer, counters, events: Vec::new() })
    }

    /// What a driver gets to know.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What is offered to front ends.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// What is served.
    pub fn part(&self) -> &Part {
        &self.part
    }

    /// What is served after the guest's next boot.
    pub fn staged(&self) -> Option<&Part> {
        self.staged.as_ref()
    }

    /// Where the worker counts.
    pub fn counters(&self) -> &File {
        &self.counters
    }

    /// Readable when the worker is gone: it never speaks first.
    pub fn worker_end(&self) -> BorrowedFd<'_> {
        self.worker.conversation.as_fd()
    }

    /// What has happened since this was asked last.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Has the worker carry out an order. For each ring that it stopped: which entry of the available ring comes next.
    pub fn ask(&mut self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Result<Vec<(u16, u16)>, WorkerError> {
        match self.worker.exchange(order, descriptors)? {
            Answer::Done(stopped) => {
                stopped.iter().for_each(|(ring, position)| self.history.stopped((*ring).into(), *position));
                Ok(stopped)
            }
            _ => Err(WorkerError::Answer),
        }
    }

    /// How far the used rings at these places have come.
    pub fn used_indexes(&self, places: Vec<RingPlace>) -> Result<Vec<Option<u16>>, WorkerError> {
        match self.worker.exchange(&Order::Look(places), &[])? {
            Answer::Looked(indexes) => Ok(indexes),
            _ => Err(WorkerError::Answer),
        }
    }

    /// Lets this be served from the guest's next boot on, or nothing else than what is.
    pub fn stage(&mut self, part: Option<Part>) {
        self.staged = part;
    }

    /// Notes a start of the device, and says whether what is staged is to be served from here on.
    pub fn starts(&mut self, start: &Start) -> bool {
        self.history.start(start) && self.staged.is_some()
    }

    /// Serves what is staged, once its worker has also carried out `order`, which says how the guest's side stands. When it cannot be
    /// served, what was served until now still is. Whether it is.
    pub fn switch(&mut self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> bool {
        let Some(part) = self.staged.take() else { return false };
        let started = Worker::start(&part, &self.offer, &self.counters).and_then(|(worker, opened)| {
            self.check_kind(&worker, &opened)?;
            worker.exchange(order, descriptors).map(|_| (worker, opened))
        });
        let (worker, opened) = match started {
            Ok(started) => started,
            Err(error) => {
                let reason = chain_of(&error);
                log::error!("{} could not be served, {} goes on: {reason}", part.tag, self.part.tag);
                self.events.push(Event::SwitchFailed { tag: part.tag, reason });
                return false;
            }
        };
        let last = std::mem::replace(&mut self.worker, worker);
        if let Err(error) = last.close() {
            // What it had completed is in the page cache; nobody will read it again.
            log::warn!("the last worker did not end in good order: {}", chain_of(&error));
        }
        self.replace_device(&opened);
        self.part = part;
        log::info!("{} is served from this boot on", self.part.tag);
        self.events.push(Event::Switched { tag: self.part.tag.clone(), bytes: opened.bytes });
        true
    }

    /// Sees that a driver that was told of the disk as it is finds one of its kind: it does not ask again.
    fn check_kind(&self, worker: &Worker, opened: &Opened) -> Result<(), WorkerError> {
        let told = self.device.description().read_only;
        if opened.read_only == told {
            return Ok(());
        }
        worker.close()?;
        let kind = |read_only| if read_only { "read-only" } else { "writable" };
        Err(WorkerError::Kind { found: kind(opened.read_only), told: kind(told) })
    }

    fn replace_device(&mut self, opened: &Opened) {
        let device = Device::new(opened.description(self.offer.queues));
        device.set_writeback(self.device.writeback());
        self.device = device;
    }

    /// Makes the volume larger, with another worker in place of the last one, who has to be told how the guest's side stands. No ring runs.
    ///
    /// The outer error: there is no worker any more.
    pub fn grow(&mut self, bytes: u64) -> Result<Result<(), WorkerError>, WorkerError> {
        let Some(delta) = &self.part.delta else { return Ok(Err(WorkerError::NoDelta)) };
        if delta.ephemeral {
            return Ok(Err(WorkerError::Ephemeral));
        }
        self.worker.close()?;
        let grown = open::read_header(&delta.file, &delta.label)
            .and_then(|header| grow::grow(&delta.file, &delta.label, &header, bytes));
        let (worker, opened) = Worker::start(&self.part, &self.offer, &self.counters)?;
        self.worker = worker;
        self.replace_device(&opened);
        Ok(grown.map(drop).map_err(WorkerError::from))
    }

    /// Starts a worker in place of one that has died.
    pub fn replace_dead(&mut self) -> Result<(), WorkerError> {
        let status = self.worker.wait()?;
        log::error!("the worker has died ({status}); starting another");
        let (worker, opened) = Worker::start(&self.part, &self.offer, &self.counters)?;
        self.worker = worker;
        self.replace_device(&opened);
        self.events.push(Event::WorkerDied { status: status.to_string() });
        Ok(())
    }

    /// Has the worker make everything durable and end.
    pub fn close(&mut self) -> Result<(), WorkerError> {
        self.worker.close()
    }
}

/// An error and its causes, in one line.
pub fn chain_of(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| text + ": " + &cause.to_string())
}
