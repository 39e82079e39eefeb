//! The worker: the process that moves the bytes. It maps the guest's memory, the base and the delta, and serves the rings.
//!
//! It knows no path, no socket but the one to its keeper, and nothing of vhost-user's messages: it is told what to be
//! ([`super::order`]) and becomes it. It ends when its keeper does.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use crate::block::base::Base;
use crate::block::cached;
use crate::block::delta::{Delta, Latch, Lifetime, OpenError, open};
use crate::block::storage::FileStorage;
use crate::block::{self, Volume};
use crate::sys::guard;
use crate::sys::guest::{DirtyLog, GuestMemory, MapError, RegionPlace, SharedArea};
use crate::sys::process;
use crate::sys::socket;
use crate::units::ClusterSize;

use super::attachment::AttachedDelta;
use super::conversation::{Conversation, ConversationError, Descriptors};
use super::counters::Counters;
use super::device::{self, Description, Device};
use super::errands::Errands;
use super::hold::Hold;
use super::inflight::{InflightError, RegionShape};
use super::order::{Answer, LogPlace, Opened, Order, RingOrder, RingRun, RingStop, SessionOrder, VolumeOrder};
use super::polling::Polling;
use super::queue::{Queue, QueueLog, RunningQueue};
use super::rest::{Repose, Rest};
use super::ring::{self, Ring, RingError};
use super::sandbox;
use super::service::chain_of;
use super::steps::{self, Step};
use super::transfers::Rings;
use super::vitals::{self, Vitals};

/// The argument by which the program knows that it is to be a worker.
pub const WORKER_ARGUMENT: &str = "--worker";
/// The argument ahead of the number of each descriptor that is a ring for its reads.
pub const RING_ARGUMENT: &str = "--ring";

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error(transparent)]
    Order(#[from] ConversationError),
    #[error("an order came out of turn")]
    Turn,
    #[error("cannot map the counters")]
    MapCounters(#[source] io::Error),
    #[error("cannot map the signs of life")]
    MapVitals(#[source] io::Error),
    #[error("cannot map the base")]
    MapBase(#[source] io::Error),
    #[error("cannot use {label}")]
    UseDelta {
        label: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot wait for what the last worker has under way")]
    Rings(#[source] io::Error),
    #[error(transparent)]
    OpenDelta(#[from] OpenError),
    #[error(transparent)]
    Memory(#[from] MapError),
    #[error("the inflight region cannot be used")]
    Inflight(#[from] InflightError),
    #[error("the dirty log cannot be mapped")]
    MapLog(#[source] MapError),
    #[error("the inflight region cannot be mapped")]
    MapInflight(#[source] MapError),
    #[error("ring {index} cannot be served")]
    Ring {
        index: u16,
        #[source]
        source: RingError,
    },
    #[error("ring {index} cannot be started")]
    Start {
        index: u16,
        #[source]
        source: io::Error,
    },
    #[error("ring {index} cannot be stopped")]
    Stop {
        index: u16,
        #[source]
        source: io::Error,
    },
    #[error("cannot close the volume")]
    Close(#[source] block::Error),
}

/// Serves as a worker until the keeper says to close, or is gone.
///
/// To be called first thing in the process. Its standard input is the conversation with the keeper. Nothing is read there outside the sandbox.
/// `rings` are the numbers of descriptors that it was started with.
pub fn run(rings: &[RawFd]) -> io::Result<()> {
    // One that notices late that its keeper is gone would serve the guest's rings beside the worker of the next.
    process::die_with_parent()?;
    guard::install()?;
    process::close_inherited_but(rings)?;
    let rings = rings.iter().map(|ring| socket::inherited(*ring)).collect::<io::Result<Vec<_>>>()?;
    process::allow_interrupts()?;
    process::settle_allocator();
    process::set_name(c"pando-worker");
    steps::choose();
    cached::choose();
    let conversation = Conversation::over(process::standard_input().into(), "keeper");
    let watch = sandbox::close_worker().map_err(io::Error::other)?;
    serve(&conversation, &mut None, rings, watch)
}

/// As [`run`], in a thread that stands in for the process: what the end of a process ends is ended here, and completes what it has taken.
#[cfg(fuzzing)]
pub fn stand_in(conversation: OwnedFd, rings: Vec<OwnedFd>) {
    let mut worker = None;
    let conversation = Conversation::over(conversation.into(), "keeper");
    let serves = std::panic::AssertUnwindSafe(|| serve(&conversation, &mut worker, rings, None));
    // Whoever listens is told that it is gone, as of any worker that fails.
    let _ = std::panic::catch_unwind(serves);
    for ring in worker.into_iter().flat_map(|worker| worker.rings.into_values()) {
        // Of a thread that has unwound, nothing is left.
        let _ = ring.queue.stop();
    }
}

/// `rings` are for the volume's reads. `watch` goes to the keeper with the first answer.
fn serve(
    conversation: &Conversation,
    worker: &mut Option<Worker>,
    mut rings: Vec<OwnedFd>,
    mut watch: Option<OwnedFd>,
) -> io::Result<()> {
    loop {
        let (order, descriptors) = match conversation.receive() {
            Ok(received) => received,
            Err(ConversationError::Gone(_)) => {
                log::debug!("the keeper is gone");
                return Ok(());
            }
            Err(error) => return Err(io::Error::other(error)),
        };
        let mut closes = matches!(order, Order::Close);
        let answer = match carry_out(worker, order, descriptors, &mut rings) {
            Ok(answer) => answer,
            Err(error) => {
                // Not closed: it is still the one that knows what was lost.
                closes = false;
                Answer::Failed(chain_of(&error))
            }
        };
        steps::reach(Step::Unanswered);
        let watch = watch.take();
        match conversation.send(&answer, &watch.iter().map(AsFd::as_fd).collect::<Vec<_>>()) {
            Err(ConversationError::Gone(_)) => return Ok(()),
            result => result.map_err(io::Error::other)?,
        }
        if closes {
            return Ok(());
        }
    }
}

fn carry_out(
    worker: &mut Option<Worker>,
    order: Order,
    descriptors: Descriptors,
    rings: &mut Vec<OwnedFd>,
) -> Result<Answer, WorkerError> {
    match (worker.as_mut(), order) {
        (None, Order::Open(order)) => {
            let (opened, started) = Worker::open(order, descriptors, std::mem::take(rings))?;
            *worker = Some(started);
            Ok(Answer::Opened(opened))
        }
        (_, Order::Hello) => Ok(Answer::Done(Vec::new())),
        (Some(worker), Order::Become(order)) => match worker.become_as(order, descriptors) {
            Ok(stopped) => Ok(Answer::Done(stopped)),
            Err(error) => {
                // The guest is not served in part: whoever gave the order takes it that no ring runs.
                worker.stop_all()?;
                Err(error)
            }
        },
        (Some(worker), Order::Look(places)) => {
            Ok(Answer::Looked(places.iter().map(|place| ring::used_index(&worker.memory, place)).collect()))
        }
        (Some(worker), Order::Close) => worker.close().map(|()| Answer::Done(Vec::new())),
        (None, Order::Close) => Ok(Answer::Done(Vec::new())),
        _ => Err(WorkerError::Turn),
    }
}

struct Worker {
    volume: Arc<Volume>,
    device: Arc<Device>,
    features: u64,
    memory: Arc<GuestMemory>,
    /// Where to keep account of what is in flight; none: nowhere.
    inflight: Option<(RegionShape, Arc<GuestMemory>)>,
    /// Where to note what has been written to guest memory.
    log: Option<Arc<DirtyLog>>,
    counters: Arc<Counters>,
    vitals: Arc<Vitals>,
    /// How long a request waits for room.
    hold: Duration,
    /// How long a queue polls at most.
    poll: Duration,
    /// Who waits for the disk, so that queues do not.
    errands: Arc<Errands>,
    /// Which of them are at rest.
    rest: Arc<Rest>,
    /// By what queues have the kernel read and write meanwhile.
    kernel_rings: Option<Arc<Rings>>,
    rings: BTreeMap<u16, RunningRing>,
}

/// A ring that runs, with all that it takes to start it again elsewhere.
struct RunningRing {
    run: RingRun,
    events: RingEvents,
    queue: RunningQueue,
}

/// A ring's descriptors.
struct RingEvents {
    kick: File,
    call: Option<File>,
    error: Option<File>,
}

impl Worker {
    fn open(
        order: VolumeOrder,
        mut descriptors: Descriptors,
        rings: Vec<OwnedFd>,
    ) -> Result<(Opened, Worker), WorkerError> {
        if let Some(level) = log::LevelFilter::iter().nth(order.log_level.into()) {
            log::set_max_level(level);
        }
        process::note_boot_id(order.boot);
        let counters = Counters::map(&File::from(descriptors.take()?)).map_err(WorkerError::MapCounters)?;
        let (memory, wake) = (File::from(descriptors.take()?), File::from(descriptors.take()?));
        let latch = Latch::shared(vitals::numbers(&memory).map_err(WorkerError::MapVitals)?, vitals::LATCH);
        let vitals = Vitals::map(&memory, wake).map_err(WorkerError::MapVitals)?;
        let base = descriptors.take_if(order.base.is_some())?.map(File::from);
        let base = base.zip(order.base.clone());
        let base = base
            .map_or_else(|| Ok(Base::empty()), |(file, label)| Base::map(&file, label))
            .map_err(WorkerError::MapBase)?;
        let delta =
            order.delta.map(|delta| AttachedDelta::receive(delta, order.direct, &mut descriptors)).transpose()?;
        descriptors.finish()?;
        let (volume, uuid) = match delta {
            Some(AttachedDelta { file, direct, label, ephemeral }) => {
                let header = open::read_header(&file, &label)?;
                let storage = FileStorage::with(file, direct);
                let storage = storage.map_err(|source| WorkerError::UseDelta { label: label.clone(), source })?;
                let lifetime = if ephemeral { Lifetime::Ephemeral } else { Lifetime::Persistent };
                let delta = Delta::start(storage, label, header, lifetime)?.latching_in(latch);
                let uuid = delta.uuid();
                (Volume::cow(base, delta), uuid)
            }
            None => (Volume::read_only(base), [0; 16]),
        };
        let serial = order.serial.unwrap_or_else(|| device::serial_of_uuid(uuid));
        let opened = Opened {
            bytes: volume.bytes(),
            read_only: volume.is_read_only(),
            cluster_bytes: volume.cluster().bytes(),
            serial,
        };
        let kernel_rings = order.kernel_rings.map(|shape| Rings::new(rings, shape));
        if let Some(rings) = kernel_rings.as_ref().filter(|_| order.direct) {
            // Else it reaches the guest's memory later, where something else is by then.
            rings.wait_for_last().map_err(WorkerError::Rings)?;
        }
        let (volume, device) = (Arc::new(volume), Arc::new(Device::new(opened.description(order.queues))));
        let worker = Worker {
            rest: Arc::new(Rest::new(Arc::clone(&volume))),
            errands: Arc::new(Errands::new(Arc::clone(&volume), Arc::clone(&device))),
            volume,
            device,
            features: 0,
            memory: Arc::default(),
            inflight: None,
            log: None,
            counters: Arc::new(counters),
            vitals: Arc::new(vitals),
            hold: Duration::from_millis(order.hold_ms),
            poll: Duration::from_micros(order.poll_us),
            kernel_rings: kernel_rings.map(Arc::new),
            rings: BTreeMap::new(),
        };
        Ok((opened, worker))
    }

    /// Becomes what the order says; the positions of the rings that it stops. In part, if that fails.
    fn become_as(&mut self, order: SessionOrder, mut descriptors: Descriptors) -> Result<Vec<RingStop>, WorkerError> {
        let mut regions = Vec::new();
        for place in order.memory.iter().flatten() {
            regions.push((*place, File::from(descriptors.take()?)));
        }
        let inflight = match order.inflight {
            Some(shape) => Some((shape, map_inflight(&shape, descriptors.take()?.into())?)),
            None => None,
        };
        let log = match order.log {
            Some(LogPlace { offset, bytes }) => {
                let log = DirtyLog::map(descriptors.take()?.into(), offset, bytes).map_err(WorkerError::MapLog)?;
                Some(Arc::new(log))
            }
            None => None,
        };
        let mut changed = Vec::new();
        for RingOrder { index, run } in order.rings {
            let run = match run {
                None => None,
                Some(run) => {
                    let kick = File::from(descriptors.take()?);
                    let call = descriptors.take_if(run.has_call)?.map(File::from);
                    let error = descriptors.take_if(run.has_error)?.map(File::from);
                    Some((run, RingEvents { kick, call, error }))
                }
            };
            changed.push((index, run));
        }
        descriptors.finish()?;
        self.device.set_writeback(order.writeback);

        // Rings that are not told anything go on where they are, over new memory, with new features, another account and another log.
        let all_change =
            order.memory.is_some() || order.features != self.features || inflight.is_some() || log.is_some();
        let mut moved = BTreeMap::new();
        let mut stopped = Vec::new();
        for index in self.rings.keys().copied().collect::<Vec<_>>() {
            let is_told = changed.iter().any(|(changed, _)| *changed == index);
            if !all_change && !is_told {
                continue;
            }
            let Some(ring) = self.rings.remove(&index) else { continue };
            let stop = ring.queue.stop().map_err(|source| WorkerError::Stop { index, source })?;
            if is_told {
                stopped.push(stop);
            } else {
                moved.insert(index, (RingRun { next_available: Some(stop.next_available), ..ring.run }, ring.events));
            }
        }
        self.features = order.features;
        if log.is_some() {
            self.log = log;
        }
        if let Some(inflight) = inflight {
            self.inflight = Some(inflight);
        }
        if order.memory.is_some() {
            // The old regions are unmapped first: twice the guest's memory may be more than there are addresses for.
            self.memory = Arc::default();
            self.memory = Arc::new(GuestMemory::map(regions)?);
        }
        let told = changed.into_iter().filter_map(|(index, run)| Some((index, run?)));
        for (index, (run, events)) in moved.into_iter().chain(told) {
            self.start(index, run, events)?;
        }
        Ok(stopped)
    }

    fn start(&mut self, index: u16, run: RingRun, events: RingEvents) -> Result<(), WorkerError> {
        let event_idx = device::has_event_idx(self.features);
        let mut ring = Ring::new(&self.memory, &run.place, run.next_available.unwrap_or(0), event_idx)
            .map_err(|source| WorkerError::Ring { index, source })?;
        if run.next_available.is_none() {
            ring.go_on_from_used();
        }
        let inherited = match self.inflight_slot(index, run.place.size)? {
            Some(slot) => ring.track(slot).map_err(|source| WorkerError::Ring { index, source })?,
            None => Vec::new(),
        };
        let next_available = ring.next_available();
        let copy = |file: &File| file.try_clone().map_err(|source| WorkerError::Start { index, source });
        let log = self.log.as_ref().filter(|_| device::logs_writes(self.features)).map(|log| QueueLog {
            log: Arc::clone(log),
            used: run.used_in_log.map(|address| (address, run.place.used_bytes(event_idx))),
        });
        let queue = Queue {
            index,
            log,
            ring,
            again: inherited.into(),
            hold: Hold::new(self.hold),
            polling: Polling::new(self.poll),
            errands: Arc::clone(&self.errands),
            kernel_rings: self.kernel_rings.clone(),
            repose: Repose::new(Arc::clone(&self.rest)),
            memory: Arc::clone(&self.memory),
            volume: Arc::clone(&self.volume),
            device: Arc::clone(&self.device),
            features: self.features,
            counters: Arc::clone(&self.counters),
            vitals: Arc::clone(&self.vitals),
            kick: copy(&events.kick)?,
            call: events.call.as_ref().map(copy).transpose()?,
            error: events.error.as_ref().map(copy).transpose()?,
        };
        let queue = RunningQueue::start(queue).map_err(|source| WorkerError::Start { index, source })?;
        log::debug!("ring {index} runs from entry {next_available}");
        self.rings.insert(index, RunningRing { run, events, queue });
        Ok(())
    }

    /// Where a ring's account is kept.
    fn inflight_slot(&self, index: u16, size: u16) -> Result<Option<SharedArea>, WorkerError> {
        let Some((shape, memory)) = &self.inflight else { return Ok(None) };
        let (at, len) = shape.slot(index, size)?;
        // The shape was checked against the memory's length.
        Ok(memory.area(at, len, 8))
    }

    fn stop_all(&mut self) -> Result<(), WorkerError> {
        let stop =
            |(index, ring): (u16, RunningRing)| ring.queue.stop().map_err(|source| WorkerError::Stop { index, source });
        // All of them, whatever becomes of one.
        let stopped: Vec<_> = std::mem::take(&mut self.rings).into_iter().map(stop).collect();
        stopped.into_iter().try_for_each(|stopped| stopped.map(drop))
    }

    fn close(&mut self) -> Result<(), WorkerError> {
        self.stop_all()?;
        self.volume.close().map_err(WorkerError::Close)
    }
}

/// Maps an inflight region as memory that others change too, with its slots at their offsets.
fn map_inflight(shape: &RegionShape, file: File) -> Result<Arc<GuestMemory>, WorkerError> {
    shape.check()?;
    let place = RegionPlace { guest_address: 0, user_address: 0, bytes: shape.bytes, file_offset: shape.offset };
    GuestMemory::map(vec![(place, file)]).map(Arc::new).map_err(WorkerError::MapInflight)
}

impl Opened {
    /// What a driver is told.
    pub fn description(&self, queues: u16) -> Description {
        let Opened { bytes, read_only, cluster_bytes, serial } = *self;
        debug_assert!(ClusterSize::from_bytes(cluster_bytes).is_some());
        Description { bytes, read_only, cluster_bytes, queues, serial }
    }
}
