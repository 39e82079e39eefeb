//! [`Service`]: what serves the volume now, and what comes after it: the worker, its volume's files, and what is staged for the guest's
//! next boot; and who may say so ([`super::control`]).
//!
//! A worker is replaced by another whenever what it serves changes, and when it has died or is stuck; the front end's session goes on, and
//! tells the new one what it told the last. No two workers live with the same delta: the last one's process is waited for first. Knows no
//! messages of vhost-user.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use crate::block::delta::{grow, open};
use crate::sys::process::Running;
use crate::sys::socket::PacketListener;
use crate::sys::{file, process, socket};
use crate::units::ByteCount;

use super::attachment::{AttachedDelta, Offer, Part};
use super::boot::{History, Start};
use super::control::{self, Command, Controllers, Event, Reply, Report, Said};
use super::conversation::{Conversation, ConversationError, Descriptors};
use super::device::{self, Device, SERIAL_BYTES};
use super::handover::{HandoverError, Keeping, ServiceState};
use super::inflight::{self, RegionShape};
use super::order::{Answer, DeltaOrder, Opened, Order, RingStop, VolumeOrder};
use super::ring::RingPlace;
use super::sandbox;
use super::vitals::{self, Watch};

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
    /// There is none right now.
    #[error("there is no worker")]
    Absent,
    /// There is none until an operator acts or a while has passed.
    #[error("too many workers have died: held")]
    Held,
    /// Asked to stop while there was none.
    #[error("asked to stop")]
    Stopped,
    /// The driver has been told what kind of disk it has.
    #[error("it is {found}, and the driver has been told that its disk is {told}")]
    Kind { found: &'static str, told: &'static str },
    /// The delta cannot be had, or could not become larger.
    #[error(transparent)]
    Open(#[from] open::OpenError),
    /// The delta's lock could not be let go.
    #[error("cannot unlock the delta")]
    Lock(#[source] io::Error),
}

impl WorkerError {
    /// Whether the worker is gone, or does not say anything that can be understood, which is as good.
    pub fn is_death(&self) -> bool {
        matches!(self, WorkerError::Conversation(_) | WorkerError::Answer | WorkerError::Absent)
    }
}

/// The keeper's side of a worker process.
struct Worker {
    conversation: Conversation,
    process: Running,
}

/// How long to wait for another backend to leave a delta whose guest is here by now.
const CLAIM_PATIENCE: Duration = Duration::from_secs(10);

/// How long a worker may take over an order when none of its queues is stuck. What an order waits for is what the queues do.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

impl Worker {
    /// Starts a worker for a volume.
    fn start(part: &Part, offer: &Offer, counters: &File, watch: &mut Watch) -> Result<(Worker, Opened), WorkerError> {
        Worker::execute()?.open(part, offer, counters, watch)
    }

    /// Starts a worker that waits to be told what to serve.
    fn execute() -> Result<Worker, WorkerError> {
        let (conversation, theirs) = Conversation::with("worker").map_err(WorkerError::Start)?;
        let process =
            process::execute_self("pando-blk", sandbox::worker_arguments(), theirs).map_err(WorkerError::Start)?;
        Ok(Worker { conversation, process })
    }

    /// Has it open a volume.
    fn open(
        mut self,
        part: &Part,
        offer: &Offer,
        counters: &File,
        watch: &mut Watch,
    ) -> Result<(Worker, Opened), WorkerError> {
        let delta = part.delta.as_ref();
        let order = VolumeOrder {
            base: part.base.as_ref().map(|base| base.label.clone()),
            delta: delta.map(|delta| DeltaOrder { label: delta.label.clone(), ephemeral: delta.ephemeral }),
            queues: offer.queues,
            serial: part.serial,
            hold_ms: offer.hold.as_millis() as u64,
            log_level: log::max_level() as u8,
            boot: process::boot_id().map_err(WorkerError::Start)?,
        };
        let result = {
            let ours = [counters].into_iter().chain(watch.files());
            let files: Vec<OwnedFd> = ours
                .map(|file| file.as_fd().try_clone_to_owned())
                .collect::<io::Result<_>>()
                .map_err(WorkerError::Start)?;
            let descriptors: Vec<BorrowedFd> = files.iter().map(AsFd::as_fd).chain(part.descriptors()).collect();
            self.exchange(watch, &Order::Open(order), &descriptors)
        };
        match result {
            Ok(Answer::Opened(opened)) => Ok((self, opened)),
            other => {
                // Whatever it is at: nobody else may open the delta while it lives.
                let status = self.end()?;
                if !status.success() {
                    log::error!("the worker has died at its start ({status}){}", sandbox::remark_on(status));
                }
                Err(other.err().unwrap_or(WorkerError::Answer))
            }
        }
    }

    fn exchange(
        &mut self,
        watch: &mut Watch,
        order: &Order,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer, WorkerError> {
        self.conversation.send(order, descriptors)?;
        self.wait_for_answer(watch)?;
        let (answer, descriptors) = self.conversation.receive()?;
        descriptors.finish()?;
        match answer {
            Answer::Failed(reason) => Err(WorkerError::Refused { reason }),
            answer => Ok(answer),
        }
    }

    /// Waits until there is an answer or none will come. A worker that is stuck is killed, which is as good as its death.
    fn wait_for_answer(&mut self, watch: &mut Watch) -> Result<(), WorkerError> {
        const SLICE_MS: i32 = 1000;
        let ends = Instant::now() + ANSWER_PATIENCE;
        let mut killed = false;
        loop {
            let found = socket::wait_readable([Some(self.conversation.as_fd())], if killed { -1 } else { SLICE_MS });
            if found.map_err(WorkerError::Wait)?[0] {
                return Ok(());
            }
            let stuck = watch.look().map(|ring| format!("ring {ring} is stuck in a batch"));
            let silent = (Instant::now() > ends && !watch.is_busy()).then(|| "it does not answer".to_owned());
            if let Some(reason) = stuck.or(silent) {
                log::error!("the worker is killed: {reason}");
                self.process.kill();
                killed = true;
            }
        }
    }

    /// Sees that the process is gone, and says how it went.
    fn end(self) -> Result<ExitStatus, WorkerError> {
        self.process.kill();
        self.process.wait().map_err(WorkerError::Wait)
    }

    /// Has it make everything durable and end. One that refuses is given back: it goes on.
    fn close(mut self, watch: &mut Watch) -> Result<(), (WorkerError, Option<Worker>)> {
        let answer = self.exchange(watch, &Order::Close, &[]);
        if let Err(error @ WorkerError::Refused { .. }) = answer {
            return Err((error, Some(self)));
        }
        // It ends by itself, unless it does not answer.
        if answer.is_err() {
            self.process.kill();
        }
        let status = self.process.wait().map_err(|error| (WorkerError::Wait(error), None))?;
        if !status.success() {
            log::error!("the worker has died at its end ({status}){}", sandbox::remark_on(status));
        }
        answer.map(drop).map_err(|error| (error, None))
    }
}

/// The deaths of workers, to tell a worker that dies again and again from one that was killed.
struct Deaths {
    taken_over: Instant,
    /// In a row, each soon after taking over and without having got any further.
    in_vain: u32,
    recent: VecDeque<Instant>,
}

impl Deaths {
    /// A worker that dies so soon after taking over may have died of what it took over.
    const SOON: Duration = Duration::from_secs(10);
    const IN_VAIN_MAX: u32 = 5;
    /// So many within that time are too many in any case: one that dies of one ring's request gets further on others.
    const RECENT_MAX: usize = 300;
    /// How long no other worker is started then.
    const HOLD: Duration = Duration::from_secs(60);

    fn none() -> Deaths {
        Deaths { taken_over: Instant::now(), in_vain: 0, recent: VecDeque::new() }
    }

    fn note(&mut self, got_further: bool) {
        let now = Instant::now();
        let in_vain = !got_further && now - self.taken_over < Self::SOON;
        self.in_vain = if in_vain { self.in_vain + 1 } else { 0 };
        self.recent.push_back(now);
        while self.recent.front().is_some_and(|death| now - *death > Self::SOON) {
            self.recent.pop_front();
        }
    }

    fn are_too_many(&self) -> bool {
        self.in_vain >= Self::IN_VAIN_MAX || self.recent.len() >= Self::RECENT_MAX
    }
}

/// What has been told of the delta's file system.
struct Space {
    is_full: bool,
    last_full: Instant,
    is_low: bool,
    next_look: Instant,
}

impl Space {
    /// A file system with less than this left, or less than a twentieth if that is smaller, is worth a warning.
    const LOW_WATER: u64 = 1 << 30;
    /// For so long no request may have waited: a ring that stops, or a worker that dies, interrupts the wait.
    const SETTLED_AFTER: Duration = Duration::from_millis(900);
    /// Looked at when something is waited for, and no more often than this.
    const LOOK_INTERVAL: Duration = Duration::from_secs(1);
}

/// What a volume is, as far as its delta's header says.
fn describe(delta: &AttachedDelta, serial: Option<[u8; SERIAL_BYTES]>) -> Result<Opened, WorkerError> {
    let header = open::read_header(&delta.file, &delta.label)?;
    Ok(Opened {
        bytes: header.layout.virtual_bytes(),
        read_only: false,
        cluster_bytes: header.layout.cluster().bytes(),
        serial: serial.unwrap_or_else(|| device::serial_of_uuid(header.uuid)),
    })
}

/// What has to be done by who knows the front end.
pub enum Rest {
    /// Nothing.
    Nothing,
    /// The volume is to become this large, and then [`Service::answer_growth`].
    Grow { bytes: u64 },
    /// This program is to go on, and then [`Service::answer_upgrade`].
    Upgrade { program: OwnedFd },
}

/// What serves the volume.
pub struct Service {
    /// None: it has died and there is no other yet, or the volume is elsewhere.
    worker: Option<Worker>,
    /// The guest is with another backend, and so is the delta's lock.
    elsewhere: bool,
    watch: Watch,
    deaths: Deaths,
    latch_told: bool,
    space: Space,
    device: Device,
    part: Part,
    staged: Option<Part>,
    history: History,
    offer: Offer,
    counters: File,
    /// Where workers keep account of what is in flight, for front ends that offer no memory for it.
    inflight: Option<Inflight>,
    management: Management,
}

/// A region of memory for what is in flight.
pub struct Inflight {
    pub shape: RegionShape,
    pub file: File,
}

/// Who may tell the keeper what to do, and what they get to know.
pub struct Management {
    pub controllers: Controllers,
    pub signals: OwnedFd,
    /// What the attachment is called.
    pub name: String,
    /// The listener of front ends, if there is one.
    pub front_ends: Option<OwnedFd>,
    /// Whether a front end is connected.
    pub connected: bool,
    /// Whether a controller or a signal has said to stop.
    pub stops: bool,
    /// Whether a controller waits to hear that all has stopped.
    pub stop_is_awaited: bool,
}

impl Service {
    /// Starts a worker for `part`.
    pub fn start(
        part: Part,
        offer: Offer,
        counters: File,
        history: History,
        management: Management,
    ) -> Result<Service, WorkerError> {
        let memory = vitals::create().map_err(WorkerError::Start)?;
        let mut watch = Watch::over(memory, offer.queues).map_err(WorkerError::Start)?;
        let inflight = match offer.tracks_inflight {
            true => {
                let shape = RegionShape::new(offer.queues, offer.ring_size_max);
                Some(Inflight { shape, file: inflight::create(&shape).map_err(WorkerError::Start)? })
            }
            false => None,
        };
        let (worker, opened) = match &part.delta {
            // Only as much as its header says, until the guest comes.
            Some(delta) if offer.incoming => (None, describe(delta, part.serial)?),
            _ => {
                let (worker, opened) = Worker::start(&part, &offer, &counters, &mut watch)?;
                (Some(worker), opened)
            }
        };
        let device = Device::new(opened.description(offer.queues));
        Ok(Service {
            elsewhere: worker.is_none(),
            worker,
            watch,
            deaths: Deaths::none(),
            latch_told: false,
            space: Space { is_full: false, last_full: Instant::now(), is_low: false, next_look: Instant::now() },
            device,
            part,
            staged: None,
            history,
            offer,
            counters,
            inflight,
            management,
        })
    }

    /// What a driver gets to know.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What is offered to front ends.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Whether something is staged.
    pub fn has_staged(&self) -> bool {
        self.staged.is_some()
    }

    /// The keeper's own region for what is in flight.
    pub fn inflight(&self) -> Option<&Inflight> {
        self.inflight.as_ref()
    }

    /// Notes whether a front end is connected.
    pub fn note_connected(&mut self, connected: bool) {
        self.management.connected = connected;
    }

    /// Whether a controller or a signal has said to stop.
    pub fn stops(&self) -> bool {
        self.management.stops
    }

    /// Tells the controller something.
    pub fn tell(&mut self, event: Event) {
        self.management.controllers.say(&Said::Event(event), &[]);
    }

    /// Waits until something can be read from `other` or there is something else to do, at most so long; -1: without limit. What a
    /// controller says is done, but for the rest.
    pub fn wait(&mut self, other: Option<BorrowedFd<'_>>, timeout_ms: i32) -> Result<Woken, WorkerError> {
        let [listener, controller] = self.management.controllers.descriptors();
        let worker = self.worker.as_ref().map(|worker| worker.conversation.as_fd());
        let [_, wake] = self.watch.files();
        let watched = [Some(self.management.signals.as_fd()), worker, Some(wake.as_fd()), listener, controller, other];
        let watch_ms = self.watch.timeout_ms();
        let timeout_ms = if timeout_ms < 0 {
            watch_ms
        } else if watch_ms < 0 {
            timeout_ms
        } else {
            timeout_ms.min(watch_ms)
        };
        let [stop, worker_gone, wake, connects, says, other] =
            socket::wait_readable(watched, timeout_ms).map_err(WorkerError::Wait)?;
        if wake {
            self.watch.woken();
        }
        if let Some(ring) = self.watch.look()
            && let Some(worker) = &mut self.worker
        {
            log::error!("the worker is killed: ring {ring} is stuck in a batch");
            worker.process.kill();
        }
        self.tell_latch();
        self.tell_space();
        self.management.stops |= stop;
        if connects {
            self.management.controllers.accept();
        }
        let mut rest = Rest::Nothing;
        if says && let Some((command, descriptors)) = self.management.controllers.receive() {
            rest = self.obey(command, descriptors);
        }
        Ok(Woken { stop: self.management.stops, worker_gone: worker_gone || self.is_missing(), other, rest })
    }

    /// Whether there should be a worker and is none.
    fn is_missing(&self) -> bool {
        self.worker.is_none() && !self.elsewhere
    }

    /// Tells of a failed sync, once.
    fn tell_latch(&mut self) {
        if !self.latch_told && self.watch.is_latched() {
            self.latch_told = true;
            let file = self.part.delta.as_ref().map_or(String::new(), |delta| delta.label.clone());
            log::error!("{file}: a sync has failed; writes and flushes are refused until the backend is started again");
            self.tell(Event::Latched { file });
        }
    }

    /// Tells when requests begin to wait for room and when none waits any more, and ahead of that, when there is little left.
    fn tell_space(&mut self) {
        let (held, now) = (self.watch.held(), Instant::now());
        if held > 0 {
            self.space.last_full = now;
            if !std::mem::replace(&mut self.space.is_full, true) {
                log::error!("the delta's file system is full: {held} requests wait for room");
                self.tell(Event::Full { held });
            }
        } else if self.space.is_full && now - self.space.last_full >= Space::SETTLED_AFTER {
            self.space.is_full = false;
            log::info!("there is room again in the delta's file system: no request waits");
            self.tell(Event::SpaceBack);
        }
        let Some(delta) = self.part.delta.as_ref().filter(|_| now >= self.space.next_look) else { return };
        self.space.next_look = now + Space::LOOK_INTERVAL;
        // A file system that does not say is none that is nearly full.
        let Ok(found) = file::space(&delta.file) else { return };
        let low_water = Space::LOW_WATER.min(found.all / 20);
        if found.free >= low_water {
            self.space.is_low = false;
        } else if !std::mem::replace(&mut self.space.is_low, true) {
            log::warn!("the delta's file system has {} left", ByteCount(found.free));
            self.tell(Event::LowSpace { bytes: found.free });
        }
    }

    fn reply(&mut self, reply: Reply) {
        self.management.controllers.say(&Said::Reply(reply), &[]);
    }

    /// Does what a controller says.
    fn obey(&mut self, command: Command, mut descriptors: Descriptors) -> Rest {
        let reply = match command {
            Command::Serve(_) => Reply::Failed("it serves already".to_owned()),
            Command::Report => {
                self.report();
                return Rest::Nothing;
            }
            Command::Stage(spec) => match control::take_volume(spec, &mut descriptors) {
                Ok(part) => self.stage(part),
                Err(error) => Reply::Failed(error.to_string()),
            },
            Command::Unstage => {
                self.staged = None;
                Reply::Done
            }
            // None is held.
            Command::Resume => Reply::Done,
            Command::Grow { bytes } => return Rest::Grow { bytes },
            Command::Upgrade => match descriptors.take() {
                Ok(program) => return Rest::Upgrade { program },
                Err(error) => Reply::Failed(error.to_string()),
            },
            Command::Stop => {
                // Answered when all is durable.
                self.management.stops = true;
                self.management.stop_is_awaited = true;
                return Rest::Nothing;
            }
        };
        self.reply(reply);
        Rest::Nothing
    }

    /// Lets this be served from the guest's next boot on.
    fn stage(&mut self, part: Part) -> Reply {
        let is_served =
            |delta: &AttachedDelta| self.part.delta.as_ref().is_some_and(|served| served.is_same_file(delta));
        if part.delta.as_ref().is_some_and(is_served) {
            // Two workers would write to it, for a moment.
            return Reply::Failed("that delta is the one that is served: stage another".to_owned());
        }
        self.staged = Some(part);
        Reply::Done
    }

    /// Answers a controller that asked for the volume to become larger.
    pub fn answer_growth(&mut self, grown: Result<(), WorkerError>) {
        self.reply(grown.map_or_else(|error| Reply::Failed(chain_of(&error)), |()| Reply::Done));
    }

    /// Answers a controller that asked for an upgrade.
    pub fn answer_upgrade(&mut self, upgraded: Result<(), &dyn std::error::Error>) {
        if let Err(error) = upgraded {
            log::error!("not upgraded: {}", chain_of(error));
        }
        self.reply(upgraded.map_or_else(|error| Reply::Failed(chain_of(error)), |()| Reply::Done));
    }

    /// Tells the controller how things stand.
    pub fn report(&mut self) {
        let report = Report {
            process: std::process::id(),
            name: self.management.name.clone(),
            tag: self.part.tag.clone(),
            staged: self.staged.as_ref().map(|part| part.tag.clone()),
            bytes: self.device.description().bytes,
            connected: self.management.connected,
            held: self.is_missing(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let Management { controllers, front_ends, .. } = &mut self.management;
        let Some(front_ends) = front_ends else { return };
        let base = self.part.base.as_ref().map(AsFd::as_fd);
        let descriptors: Vec<BorrowedFd> =
            [Some(front_ends.as_fd()), Some(self.counters.as_fd()), base].into_iter().flatten().collect();
        controllers.say(&Said::Reply(Reply::Report(report)), &descriptors);
    }

    fn exchange(&mut self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Result<Answer, WorkerError> {
        let worker = self.worker.as_mut().ok_or(WorkerError::Absent)?;
        let answer = worker.exchange(&mut self.watch, order, descriptors);
        self.tell_latch();
        answer
    }

    /// Has the worker carry out an order. Where each ring stopped that it told to.
    pub fn ask(&mut self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Result<Vec<RingStop>, WorkerError> {
        if self.elsewhere && !order.runs_a_ring() {
            // Whoever serves the next ring is told all of it.
            return Ok(Vec::new());
        }
        match self.exchange(order, descriptors)? {
            Answer::Done(stopped) => {
                stopped.iter().for_each(|stop| self.history.stopped(stop.index.into(), stop.next_available));
                Ok(stopped)
            }
            _ => Err(WorkerError::Answer),
        }
    }

    /// How far the used rings at these places have come.
    pub fn used_indexes(&mut self, places: Vec<RingPlace>) -> Result<Vec<Option<u16>>, WorkerError> {
        match self.exchange(&Order::Look(places), &[])? {
            Answer::Looked(indexes) => Ok(indexes),
            _ => Err(WorkerError::Answer),
        }
    }

    /// Notes a start of the device, and says whether what is staged is to be served from here on.
    pub fn starts(&mut self, start: &Start) -> bool {
        self.history.start(start) && self.staged.is_some()
    }

    /// Serves what is staged, once its worker has also carried out `order`, which says how the guest's side stands. When it cannot be
    /// served, what was served until now still is. Whether it is.
    pub fn switch(&mut self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> bool {
        let Some(part) = self.staged.take() else { return false };
        let started =
            Worker::start(&part, &self.offer, &self.counters, &mut self.watch).and_then(|(worker, opened)| {
                let worker = self.check_kind(worker, &opened)?;
                self.prepare(worker, order, descriptors).map(|worker| (worker, opened))
            });
        let (worker, opened) = match started {
            Ok(started) => started,
            Err(error) => {
                let reason = chain_of(&error);
                log::error!("{} could not be served, {} goes on: {reason}", part.tag, self.part.tag);
                self.tell(Event::SwitchFailed { tag: part.tag, reason });
                return false;
            }
        };
        if let Some(last) = self.worker.replace(worker)
            && let Err((error, left)) = last.close(&mut self.watch)
        {
            // Nobody needs it any more.
            drop(left.map(Worker::end));
            // What it had completed is in the page cache; nobody will read it again.
            log::warn!("the last worker did not end in good order: {}", chain_of(&error));
        }
        self.replace_device(&opened);
        self.part = part;
        log::info!("{} is served from this boot on", self.part.tag);
        self.tell(Event::Switched { tag: self.part.tag.clone(), bytes: opened.bytes });
        true
    }

    /// Has a worker that does not serve yet carry out an order.
    fn prepare(
        &mut self,
        mut worker: Worker,
        order: &Order,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Worker, WorkerError> {
        match worker.exchange(&mut self.watch, order, descriptors) {
            Ok(_) => Ok(worker),
            Err(error) => {
                worker.end()?;
                Err(error)
            }
        }
    }

    /// Sees that a driver that was told of the disk as it is finds one of its kind: it does not ask again.
    fn check_kind(&mut self, worker: Worker, opened: &Opened) -> Result<Worker, WorkerError> {
        let told = self.device.description().read_only;
        if opened.read_only == told {
            return Ok(worker);
        }
        worker.close(&mut self.watch).map_err(|(error, _)| error)?;
        let kind = |read_only| if read_only { "read-only" } else { "writable" };
        Err(WorkerError::Kind { found: kind(opened.read_only), told: kind(told) })
    }

    fn replace_device(&mut self, opened: &Opened) {
        let device = Device::new(opened.description(self.offer.queues));
        device.set_writeback(self.device.writeback());
        self.device = device;
    }

    /// Makes the volume larger. No ring runs. Whatever comes of it, there may be another worker, who has to be told how the guest's side stands.
    pub fn grow(&mut self, bytes: u64) -> Result<(), WorkerError> {
        if self.part.delta.is_none() {
            return Err(WorkerError::NoDelta);
        }
        self.claim()?;
        if let Some(worker) = self.worker.take() {
            match worker.close(&mut self.watch) {
                Ok(()) => {}
                // It knows why, and goes on.
                Err((error, Some(worker))) => {
                    self.worker = Some(worker);
                    return Err(error);
                }
                // One that died in between has left all that it completed.
                Err((error, None)) => log::warn!("the worker did not end in good order: {}", chain_of(&error)),
            }
        }
        let grown = self.part.delta.as_ref().map(|AttachedDelta { file, label, .. }| {
            open::read_header(file, label).and_then(|header| grow::grow(file, label, &header, bytes))
        });
        self.replace()?;
        grown.transpose().map(drop).map_err(WorkerError::from)
    }

    /// Starts a worker that is to serve in place of the one that does, and sees that it is there.
    pub fn prepare_successor(&mut self) -> Result<Successor, WorkerError> {
        let mut worker = Worker::execute()?;
        match worker.exchange(&mut self.watch, &Order::Hello, &[]) {
            Ok(_) => Ok(Successor(worker)),
            Err(error) => {
                worker.end()?;
                Err(error)
            }
        }
    }

    /// Has a worker take the place of the one that serves, who has completed what it took. It has to be told how the guest's side stands.
    pub fn succeed(&mut self, successor: Successor) -> Result<(), WorkerError> {
        if self.elsewhere {
            // There is nothing to serve yet.
            return successor.0.end().map(drop);
        }
        if let Some(last) = self.worker.take() {
            // Nothing is made durable that was not: its successor has the same page cache.
            last.end()?;
        }
        match successor.0.open(&self.part, &self.offer, &self.counters, &mut self.watch) {
            Ok((worker, opened)) => {
                self.deaths.taken_over = Instant::now();
                self.watch.taken_over();
                self.worker = Some(worker);
                self.replace_device(&opened);
                Ok(())
            }
            Err(error) => {
                log::error!("the next worker cannot serve: {}", chain_of(&error));
                self.deaths.note(false);
                self.replace()
            }
        }
    }

    /// All that another program needs to know to go on here.
    pub fn freeze(&self, keeping: &mut Keeping) -> ServiceState {
        let [vitals, _] = self.watch.files();
        let description = self.device.description();
        let [listener, controller] = self.management.controllers.descriptors();
        ServiceState {
            worker: self.worker.as_ref().map(|worker| (worker.process.number(), keeping.keep(&worker.conversation))),
            elsewhere: self.elsewhere,
            latch_told: self.latch_told,
            vitals: keeping.keep(vitals),
            counters: keeping.keep(&self.counters),
            inflight: self.inflight.as_ref().map(|own| (own.shape, keeping.keep(&own.file))),
            part: self.part.freeze(keeping),
            staged: self.staged.as_ref().map(|part| part.freeze(keeping)),
            history: self.history.clone(),
            queues: self.offer.queues,
            ring_size_max: self.offer.ring_size_max,
            hold_ms: self.offer.hold.as_millis() as u64,
            bytes: description.bytes,
            read_only: description.read_only,
            cluster_bytes: description.cluster_bytes,
            serial: description.serial,
            writeback: self.device.writeback(),
            name: self.management.name.clone(),
            controllers: (
                listener.map(|listener| keeping.keep(&listener)),
                controller.map(|controller| keeping.keep(&controller)),
            ),
        }
    }

    /// The same in that program.
    pub fn thaw(state: ServiceState, signals: OwnedFd, front_ends: Option<OwnedFd>) -> Result<Service, HandoverError> {
        let system = |action| move |source| HandoverError::System { action, source };
        let worker = match state.worker {
            Some((process, conversation)) => Some(Worker {
                conversation: Conversation::over(conversation.take()?.into(), "worker"),
                process: Running::from_number(process),
            }),
            None => None,
        };
        let vitals = File::from(state.vitals.take()?);
        let inflight = match state.inflight {
            Some((shape, file)) => Some(Inflight { shape, file: file.take()?.into() }),
            None => None,
        };
        let offer = Offer {
            queues: state.queues,
            ring_size_max: state.ring_size_max,
            tracks_inflight: inflight.is_some(),
            hold: Duration::from_millis(state.hold_ms),
            incoming: false,
        };
        let opened = Opened {
            bytes: state.bytes,
            read_only: state.read_only,
            cluster_bytes: state.cluster_bytes,
            serial: state.serial,
        };
        let device = Device::new(opened.description(offer.queues));
        device.set_writeback(state.writeback);
        let listener = state.controllers.0.map(|listener| listener.take().map(PacketListener::from)).transpose()?;
        let current = match state.controllers.1 {
            Some(controller) => Some(Conversation::over(controller.take()?.into(), "controller")),
            None => None,
        };
        Ok(Service {
            worker,
            elsewhere: state.elsewhere,
            watch: Watch::over(vitals, offer.queues).map_err(system("map the signs of life"))?,
            deaths: Deaths::none(),
            latch_told: state.latch_told,
            space: Space { is_full: false, last_full: Instant::now(), is_low: false, next_look: Instant::now() },
            device,
            part: Part::thaw(state.part)?,
            staged: state.staged.map(Part::thaw).transpose()?,
            history: state.history,
            counters: state.counters.take()?.into(),
            inflight,
            management: Management {
                controllers: Controllers::resumed(listener, current),
                signals,
                name: state.name,
                front_ends,
                connected: false,
                stops: false,
                stop_is_awaited: false,
            },
            offer,
        })
    }

    /// Waits for the end of a worker that is dead or as good as dead.
    fn bury(&mut self) -> Result<(), WorkerError> {
        let Some(worker) = self.worker.take() else { return Ok(()) };
        let status = worker.end()?;
        self.tell_latch();
        self.deaths.note(self.watch.has_got_further());
        log::error!("the worker has died ({status}){}", sandbox::remark_on(status));
        self.tell(Event::WorkerDied { status: status.to_string() });
        Ok(())
    }

    /// Sees that there is a worker in place of one that has died, who has to be told how the guest's side stands.
    ///
    /// Does not return before there is one: while too many die, it waits, and looks after controllers.
    ///
    /// # Errors
    /// When asked to stop meanwhile.
    pub fn replace_dead(&mut self) -> Result<(), WorkerError> {
        self.bury()?;
        self.replace()
    }

    fn replace(&mut self) -> Result<(), WorkerError> {
        self.claim()?;
        while self.worker.is_none() {
            if self.deaths.are_too_many() {
                self.hold()?;
                self.deaths = Deaths::none();
            }
            self.deaths.taken_over = Instant::now();
            match Worker::start(&self.part, &self.offer, &self.counters, &mut self.watch) {
                Ok((worker, opened)) => {
                    self.watch.taken_over();
                    self.worker = Some(worker);
                    self.replace_device(&opened);
                }
                Err(error) => {
                    self.deaths.note(false);
                    let status = chain_of(&error);
                    log::error!("another worker cannot be started: {status}");
                    self.tell(Event::WorkerDied { status });
                }
            }
        }
        Ok(())
    }

    /// Leaves the volume to another backend, to which the guest is on its way: all that was written is durable, and the delta is nobody's
    /// until the guest runs again, there or here. No ring runs.
    pub fn release(&mut self) -> Result<(), WorkerError> {
        let Some(delta) = &self.part.delta else { return Ok(()) };
        if delta.ephemeral {
            return Ok(());
        }
        let Some(worker) = self.worker.take() else { return Ok(()) };
        if let Err((error, left)) = worker.close(&mut self.watch) {
            self.worker = left;
            return Err(error);
        }
        delta.file.unlock().map_err(WorkerError::Lock)?;
        (self.worker, self.elsewhere) = (None, true);
        log::info!("{}: left to whoever the guest comes to", delta.label);
        Ok(())
    }

    /// Takes the volume back, or over, from another backend, whose guest comes here. Waits a little for that one to leave it.
    fn claim(&mut self) -> Result<(), WorkerError> {
        let Some(delta) = self.part.delta.as_ref().filter(|_| self.elsewhere) else { return Ok(()) };
        open::lock(&delta.file, &delta.label, CLAIM_PATIENCE)?;
        self.elsewhere = false;
        log::info!("{}: taken over with its guest", delta.label);
        Ok(())
    }

    /// Waits for an operator, or for a while.
    fn hold(&mut self) -> Result<(), WorkerError> {
        let seconds = Deaths::HOLD.as_secs();
        log::error!("too many workers have died one after another: held for {seconds} s; the guest's requests wait");
        self.tell(Event::WorkerHeld { seconds });
        let ends = Instant::now() + Deaths::HOLD;
        loop {
            if self.management.stops {
                return Err(WorkerError::Stopped);
            }
            let left = ends.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let [listener, controller] = self.management.controllers.descriptors();
            let watched = [Some(self.management.signals.as_fd()), listener, controller];
            let [stop, connects, says] =
                socket::wait_readable(watched, left.as_millis() as i32 + 1).map_err(WorkerError::Wait)?;
            self.management.stops |= stop;
            if connects {
                self.management.controllers.accept();
            }
            if says && let Some((command, descriptors)) = self.management.controllers.receive() {
                let resumes = matches!(command, Command::Resume);
                match self.obey(command, descriptors) {
                    Rest::Nothing => {}
                    Rest::Grow { .. } => self.answer_growth(Err(WorkerError::Held)),
                    Rest::Upgrade { .. } => self.answer_upgrade(Err(&WorkerError::Held)),
                }
                if resumes {
                    break;
                }
            }
        }
        log::info!("another worker is tried");
        self.tell(Event::WorkerResumed);
        Ok(())
    }

    /// Has the worker make everything durable and end, and answers a controller that has asked for it.
    pub fn close(&mut self) -> Result<(), WorkerError> {
        let closed = loop {
            if self.elsewhere {
                break Ok(());
            }
            if self.worker.is_none() {
                // Held, and asked to stop: one last try to leave the delta in good order.
                match Worker::start(&self.part, &self.offer, &self.counters, &mut self.watch) {
                    Ok((worker, _)) => self.worker = Some(worker),
                    Err(error) => break Err(error),
                }
            }
            let Some(worker) = self.worker.take() else { continue };
            match worker.close(&mut self.watch) {
                Ok(()) => break Ok(()),
                Err((error, left)) => {
                    drop(left.map(Worker::end));
                    self.deaths.note(false);
                    if !error.is_death() || self.deaths.are_too_many() {
                        break Err(error);
                    }
                }
            }
        };
        if self.management.stop_is_awaited {
            self.reply(match &closed {
                Ok(()) => Reply::Done,
                Err(error) => Reply::Failed(chain_of(error)),
            });
        }
        closed
    }
}

/// A worker that waits to be told what to serve.
pub struct Successor(Worker);

/// What ended a wait.
pub struct Woken {
    /// Asked to stop.
    pub stop: bool,
    /// The worker is dead.
    pub worker_gone: bool,
    /// Something can be read from what else was waited for.
    pub other: bool,
    /// What a controller has said and is not done.
    pub rest: Rest,
}

/// An error and its causes, in one line.
pub fn chain_of(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| text + ": " + &cause.to_string())
}
