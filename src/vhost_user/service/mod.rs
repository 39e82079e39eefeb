//! [`Service`]: what serves the volume now, and what comes after it: the worker, its volume's files, and what is staged for the guest's
//! next boot; and who may say so ([`super::control`]).
//!
//! A worker is replaced by another whenever what it serves changes, and when it has died or is stuck; the front end's session goes on, and
//! tells the new one what it told the last. No two workers write to the same delta: the last one does nothing more by then, whether
//! or not its process is gone. Knows no messages of vhost-user.

mod deaths;
mod handing_over;
mod leaving;
mod space;
mod worker_process;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use crate::block::delta::{grow, open};
use crate::sys::socket;

use crate::vhost_user::attachment::{AttachedDelta, Offer, Part};
use crate::vhost_user::boot::{History, Start};
use crate::vhost_user::control::{self, Command, Controllers, Event, Reply, Report, Said};
use crate::vhost_user::conversation::Descriptors;
use crate::vhost_user::device::{self, Device, SERIAL_BYTES};
use crate::vhost_user::inflight::{self, RegionShape};
use crate::vhost_user::order::{Answer, Opened, Order, RingStop};
use crate::vhost_user::ring::RingPlace;
use crate::vhost_user::sandbox;
use crate::vhost_user::vitals::{self, Watch};

use deaths::Deaths;
pub use handing_over::Successor;
use leaving::{AllLeaving, End, Why};
use space::Space;
pub use worker_process::{Equipment, WorkerError};
use worker_process::{Unclosed, Worker};

/// How long to wait for another backend to leave a delta whose guest is here by now.
const CLAIM_PATIENCE: Duration = Duration::from_secs(10);
/// How often to see whether those that do nothing more are gone.
const BURY_INTERVAL_MS: i32 = 20;

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
    leaving: AllLeaving,
    deaths: Deaths,
    latch_told: bool,
    space: Space,
    device: Device,
    part: Part,
    staged: Option<Part>,
    history: History,
    offer: Offer,
    equipment: Equipment,
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
        equipment: Equipment,
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
                let (worker, opened) = Worker::start(&part, &offer, &equipment, &mut watch)?;
                (Some(worker), opened)
            }
        };
        let device = Device::new(opened.description(offer.queues));
        Ok(Service {
            elsewhere: worker.is_none(),
            worker,
            watch,
            leaving: AllLeaving::default(),
            deaths: Deaths::none(),
            latch_told: false,
            space: Space::unknown(),
            device,
            part,
            staged: None,
            history,
            offer,
            equipment,
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
        let gone = self.leaving.take_gone();
        self.tell_ends(gone)?;
        let [listener, controller] = self.management.controllers.descriptors();
        let worker = self.worker.as_ref().map(|worker| worker.conversation.as_fd());
        let still = self.worker.as_ref().and_then(|worker| worker.watch.as_ref()).map(AsFd::as_fd);
        let [_, wake] = self.watch.files();
        let signals = Some(self.management.signals.as_fd());
        let watched = [signals, worker, still, Some(wake.as_fd()), listener, controller, other];
        let bury_ms = if self.leaving.is_empty() { -1 } else { BURY_INTERVAL_MS };
        let timeouts_ms = [timeout_ms, self.watch.timeout_ms(), bury_ms];
        let timeout_ms = timeouts_ms.into_iter().filter(|limit_ms| *limit_ms >= 0).min().unwrap_or(-1);
        let [stop, worker_gone, worker_still, wake, connects, says, other] =
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
        Ok(Woken {
            stop: self.management.stops,
            worker_gone: worker_gone || worker_still || self.is_missing(),
            other,
            rest,
        })
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
            [Some(front_ends.as_fd()), Some(self.equipment.counters.as_fd()), base].into_iter().flatten().collect();
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
            Worker::start(&part, &self.offer, &self.equipment, &mut self.watch).and_then(|(worker, opened)| {
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
            && let Err(unclosed) = last.close(&mut self.watch)
        {
            let Unclosed { error, worker } = *unclosed;
            // Nobody needs it any more.
            drop(worker.map(Worker::end));
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
        worker.close(&mut self.watch).map_err(|unclosed| unclosed.error)?;
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
        if let Some(worker) = self.worker.take()
            && let Err(unclosed) = worker.close(&mut self.watch)
        {
            let Unclosed { error, worker } = *unclosed;
            if worker.is_some() {
                // It knows why, and goes on.
                self.worker = worker;
                return Err(error);
            }
            // It has left all that it completed.
            log::warn!("the worker did not end in good order: {}", chain_of(&error));
        }
        let grown = self.part.delta.as_ref().map(|AttachedDelta { file, label, .. }| {
            open::read_header(file, label).and_then(|header| grow::grow(file, label, &header, bytes))
        });
        self.replace()?;
        grown.transpose().map(drop).map_err(WorkerError::from)
    }

    /// Takes leave of a worker that is dead or as good as dead: it does nothing more when this returns.
    fn give_up(&mut self) -> Result<(), WorkerError> {
        let Some(worker) = self.worker.take() else { return Ok(()) };
        if worker.is_still() {
            self.leaving.add(worker.leave(Why::Died));
            self.note_death();
        } else {
            let status = worker.bury()?;
            self.note_death();
            self.tell_death(status);
        }
        Ok(())
    }

    fn note_death(&mut self) {
        self.tell_latch();
        self.deaths.note(self.watch.has_got_further());
    }

    fn tell_death(&mut self, status: ExitStatus) {
        log::error!("the worker has died ({status}){}", sandbox::remark_on(status));
        self.tell(Event::WorkerDied { status: status.to_string() });
    }

    /// Waits until all that leave are gone, and tells how those have died that have: who goes on in this process's place knows nothing of them.
    pub fn bury(&mut self) -> Result<(), WorkerError> {
        let ends = self.leaving.wait();
        self.tell_ends(ends)
    }

    fn tell_ends(&mut self, ends: Vec<End>) -> Result<(), WorkerError> {
        for End { why, status } in ends {
            let status = status?;
            if why == Why::Died {
                self.tell_death(status);
            }
        }
        Ok(())
    }

    /// Sees that there is a worker in place of one that has died, who has to be told how the guest's side stands.
    ///
    /// Does not return before there is one: while too many die, it waits, and looks after controllers.
    ///
    /// # Errors
    /// When asked to stop meanwhile.
    pub fn replace_dead(&mut self) -> Result<(), WorkerError> {
        self.give_up()?;
        self.replace()
    }

    fn replace(&mut self) -> Result<(), WorkerError> {
        self.claim()?;
        while self.worker.is_none() {
            if self.deaths.are_too_many() {
                self.bury()?;
                self.hold()?;
                self.deaths = Deaths::none();
            }
            self.deaths.taken_over = Instant::now();
            match Worker::start(&self.part, &self.offer, &self.equipment, &mut self.watch) {
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
        if let Err(unclosed) = worker.close(&mut self.watch) {
            self.worker = unclosed.worker;
            return Err(unclosed.error);
        }
        delta.locked().unlock().map_err(WorkerError::Lock)?;
        (self.worker, self.elsewhere) = (None, true);
        log::info!("{}: left to whoever the guest comes to", delta.label);
        Ok(())
    }

    /// Takes the volume back, or over, from another backend, whose guest comes here. Waits a little for that one to leave it.
    fn claim(&mut self) -> Result<(), WorkerError> {
        let Some(delta) = self.part.delta.as_ref().filter(|_| self.elsewhere) else { return Ok(()) };
        open::lock(delta.locked(), &delta.label, CLAIM_PATIENCE)?;
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
                match Worker::start(&self.part, &self.offer, &self.equipment, &mut self.watch) {
                    Ok((worker, _)) => self.worker = Some(worker),
                    Err(error) => break Err(error),
                }
            }
            let Some(worker) = self.worker.take() else { continue };
            match worker.close(&mut self.watch) {
                Ok(()) => break Ok(()),
                Err(unclosed) => {
                    let Unclosed { error, worker } = *unclosed;
                    drop(worker.map(Worker::end));
                    self.deaths.note(false);
                    if !error.is_death() || self.deaths.are_too_many() {
                        break Err(error);
                    }
                }
            }
        };
        // What they have open they let go of with the rest: the delta may be wanted as soon as this one is known to have left it.
        let closed = closed.and(self.bury());
        if self.management.stop_is_awaited {
            self.reply(match &closed {
                Ok(()) => Reply::Done,
                Err(error) => Reply::Failed(chain_of(error)),
            });
        }
        closed
    }
}

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
