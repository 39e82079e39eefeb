//! [`Session`]: one front end's connection, as the keeper sees it.
//!
//! Holds what the front end has said (features, memory, rings, event descriptors) and turns each change that matters into an order
//! for the worker. A ring runs while it has a place, a kick descriptor, memory, and is both started and enabled; the front end may say
//! these things in any order, and again. Maps no guest memory and touches no ring.
//!
//! A worker may die at any time. Another one is then told all that the last one knew, and goes on with what was in flight; an order that the
//! last one has not answered is given again. The front end waits a little longer for its answer, and sees nothing.

mod messages;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard};

use vhost::vhost_user::{Backend, Error as ProtocolError};

use crate::sys::guest::RegionPlace;
use crate::sys::socket;

use crate::vhost_user::boot::{Driver, RingStart, Start};
use crate::vhost_user::device;
use crate::vhost_user::handover::{HandoverError, Keeping, Kept, RingState, SessionState};
use crate::vhost_user::inflight::{InflightError, RegionShape};
use crate::vhost_user::order::{LogPlace, Order, REGIONS_MAX, RingOrder, RingRun, RingStop, SessionOrder};
use crate::vhost_user::ring::RingPlace;
use crate::vhost_user::service::{Service, Successor, WorkerError};
use crate::vhost_user::state::{DeviceState, StateError};

type Result<T> = std::result::Result<T, ProtocolError>;

/// Why a front end's message is refused, which ends the connection.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A ring that was not offered.
    #[error("ring {index} does not exist: {queues} are offered")]
    Ring { index: u32, queues: u16 },
    /// A size that cannot be.
    #[error("ring {index} of {size} descriptors: expected a power of two from 1 to {max}")]
    RingSize { index: u32, size: u32, max: u16 },
    /// An index that cannot be.
    #[error("ring {index} from entry {base}: expected 0 to 65535")]
    RingBase { index: u32, base: u32 },
    /// Polling a ring that never kicks is not done.
    #[error("ring {index} comes without a kick descriptor: expected an eventfd")]
    NoKick { index: u32 },
    /// Features that were not offered.
    #[error("features {features:#x} were taken, and only {offered:#x} are offered")]
    Features { features: u64, offered: u64 },
    /// Too many regions.
    #[error("{count} memory regions: expected at most {REGIONS_MAX}")]
    Regions { count: usize },
    /// A region that is not there.
    #[error("memory region {place:x?} is to be removed and does not exist")]
    UnknownRegion { place: RegionPlace },
    /// A region for what is in flight that cannot be used.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// The device's state cannot be sent, or is not what this backend can go on from.
    #[error(transparent)]
    State(#[from] StateError),
    /// The system said no.
    #[error("cannot {action}")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    /// Something that was not offered.
    #[error("{what} was not offered")]
    NotOffered { what: &'static str },
    /// The worker could not.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

impl From<Refusal> for ProtocolError {
    fn from(refusal: Refusal) -> ProtocolError {
        ProtocolError::ReqHandlerError(io::Error::other(refusal))
    }
}

/// One front end's connection.
pub struct Session<'k> {
    service: &'k Mutex<Service>,
    features: u64,
    /// What the front end and the protocol's code have agreed on.
    protocol_features: u64,
    regions: Vec<(RegionPlace, File)>,
    /// The front end's memory for what is in flight, if it offers any.
    inflight: Option<(RegionShape, File)>,
    /// Where the front end has writes to guest memory noted.
    log: Option<(LogPlace, File)>,
    /// A transfer of the device's state to this backend, until it is checked.
    incoming: Option<File>,
    rings: Vec<Ring>,
    /// Whether no ring has run yet.
    is_new: bool,
    /// Where the front end takes messages.
    channel: Option<OwnedFd>,
    /// The protocol's own idea of it; kept open for the front end.
    _channel: Option<Backend>,
}

/// What the front end has said of a ring.
#[derive(Default)]
struct Ring {
    place: RingPlace,
    /// The guest address of the used ring, if writes to it are to be noted.
    used_in_log: Option<u64>,
    /// Whether the addresses have been given.
    placed: bool,
    /// Which entry of the available ring comes next, while it does not run; `None` as long as nobody has said. A ring may run
    /// before the front end says it, and then starts where the used ring says.
    next_available: Option<u16>,
    /// Whether the front end has said so since it stopped the ring.
    has_base: bool,
    kick: Option<File>,
    call: Option<File>,
    error: Option<File>,
    /// Kicked to life, and not stopped since.
    started: bool,
    enabled: bool,
    /// Whether the worker serves it.
    runs: bool,
    /// Where it stopped, if requests are in flight there that wait for room: they go on if it does.
    held_at: Option<(RingPlace, u16)>,
}

impl Ring {
    fn should_run(&self) -> bool {
        self.started && self.enabled && self.placed && self.place.size > 0 && self.kick.is_some()
    }

    /// Notes where it stopped.
    fn stopped(&mut self, stop: &RingStop) {
        self.next_available = Some(stop.next_available);
        self.held_at = (stop.held > 0).then_some((self.place, stop.next_available));
    }

    fn freeze(&self, keeping: &mut Keeping) -> RingState {
        RingState {
            place: self.place,
            placed: self.placed,
            used_in_log: self.used_in_log,
            next_available: self.next_available,
            has_base: self.has_base,
            events: [&self.kick, &self.call, &self.error].map(|event| event.as_ref().map(|event| keeping.keep(event))),
            started: self.started,
            enabled: self.enabled,
            runs: self.runs,
            held_at: self.held_at,
        }
    }

    fn thaw(state: RingState) -> std::result::Result<Ring, HandoverError> {
        let [kick, call, error] = state.events;
        let file = |kept: Option<Kept>| kept.map(|kept| kept.take().map(File::from)).transpose();
        Ok(Ring {
            place: state.place,
            used_in_log: state.used_in_log,
            placed: state.placed,
            next_available: state.next_available,
            has_base: state.has_base,
            kick: file(kick)?,
            call: file(call)?,
            error: file(error)?,
            started: state.started,
            enabled: state.enabled,
            runs: state.runs,
            held_at: state.held_at,
        })
    }

    fn events(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [&self.kick, &self.call, &self.error].into_iter().flatten().map(AsFd::as_fd)
    }
}

impl<'k> Session<'k> {
    /// A connection on which nothing has been said.
    pub fn new(service: &'k Mutex<Service>) -> Session<'k> {
        let queues = {
            let service = lock(service);
            // A driver that says nothing of the write cache finds it on, whatever the last one did.
            service.device().set_writeback(true);
            service.offer().queues
        };
        let rings = (0..queues).map(|_| Ring::default()).collect();
        Session {
            service,
            features: 0,
            protocol_features: 0,
            regions: Vec::new(),
            inflight: None,
            log: None,
            incoming: None,
            rings,
            is_new: true,
            channel: None,
            _channel: None,
        }
    }

    fn service(&self) -> MutexGuard<'k, Service> {
        lock(self.service)
    }

    /// Has the worker carry out an order; if it dies, its successor.
    fn ask(
        &self,
        order: SessionOrder,
        descriptors: &[BorrowedFd<'_>],
    ) -> std::result::Result<Vec<RingStop>, WorkerError> {
        let order = Order::Become(order);
        self.surviving(|service| service.ask(&order, descriptors))
    }

    /// Does something with the worker, and again with its successor if it dies.
    fn surviving<T>(
        &self,
        mut act: impl FnMut(&mut Service) -> std::result::Result<T, WorkerError>,
    ) -> std::result::Result<T, WorkerError> {
        loop {
            let result = act(&mut self.service());
            match result {
                Err(error) if error.is_death() => self.revive()?,
                other => return other,
            }
        }
    }

    /// Has a worker of this process's program serve in place of the one that does, which completes what it has taken.
    ///
    /// # Errors
    /// Whatever they are, no ring runs any more.
    pub fn hand_over(&self, successor: Successor) -> std::result::Result<(), WorkerError> {
        let rings = self.running().into_iter().map(|index| RingOrder { index: index as u16, run: None }).collect();
        if let Err(error) = self.ask(SessionOrder { rings, ..self.order() }, &[]) {
            successor.dismiss()?;
            return Err(error);
        }
        self.service().succeed(successor)?;
        match self.tell_all() {
            Err(error) if error.is_death() => self.revive(),
            other => other,
        }
    }

    /// All that another program needs to know to go on here.
    pub fn freeze(&self, stream: &UnixStream, keeping: &mut Keeping) -> SessionState {
        let region = |(place, file): &(RegionPlace, File), keeping: &mut Keeping| (*place, keeping.keep(file));
        SessionState {
            stream: keeping.keep(stream),
            features: self.features,
            protocol_features: self.protocol_features,
            regions: self.regions.iter().map(|found| region(found, keeping)).collect(),
            inflight: self.inflight.as_ref().map(|(shape, file)| (*shape, keeping.keep(file))),
            log: self.log.as_ref().map(|(place, file)| (*place, keeping.keep(file))),
            is_new: self.is_new,
            channel: self.channel.as_ref().map(|channel| keeping.keep(channel)),
            rings: self.rings.iter().map(|ring| ring.freeze(keeping)).collect(),
        }
    }

    /// The same in that program, and the connection.
    pub fn thaw(
        state: SessionState,
        service: &'k Mutex<Service>,
    ) -> std::result::Result<(Session<'k>, UnixStream), HandoverError> {
        let file = |kept: Kept| kept.take().map(File::from);
        let take = |(place, kept): (RegionPlace, Kept)| file(kept).map(|file| (place, file));
        let inflight = state.inflight.map(|(shape, kept)| file(kept).map(|file| (shape, file))).transpose()?;
        let log = state.log.map(|(place, kept)| file(kept).map(|file| (place, file))).transpose()?;
        let session = Session {
            service,
            features: state.features,
            protocol_features: state.protocol_features,
            regions: state.regions.into_iter().map(take).collect::<std::result::Result<_, _>>()?,
            inflight,
            log,
            incoming: None,
            rings: state.rings.into_iter().map(Ring::thaw).collect::<std::result::Result<_, _>>()?,
            is_new: state.is_new,
            channel: state.channel.map(Kept::take).transpose()?,
            _channel: None,
        };
        Ok((session, state.stream.take()?.into()))
    }

    /// What the protocol's code has to be told again: virtio's features, and the protocol's.
    pub fn agreed(&self) -> [u64; 2] {
        [self.features, self.protocol_features]
    }

    /// Has another worker go on where one that has died was.
    ///
    /// # Errors
    /// When asked to stop, or when it cannot go on with what the front end has given.
    pub fn revive(&self) -> std::result::Result<(), WorkerError> {
        loop {
            self.service().replace_dead()?;
            match self.tell_all() {
                Err(error) if error.is_death() => {}
                other => return other,
            }
        }
    }

    /// Tells a worker that knows nothing how the guest's side stands.
    fn tell_all(&self) -> std::result::Result<(), WorkerError> {
        let mut service = self.service();
        let rings =
            self.running().into_iter().map(|index| self.ring_order(index, service.inflight().is_some())).collect();
        let order = SessionOrder { rings, ..self.standing(&service) };
        let accounts = self.accounts(&service)?;
        let descriptors: Vec<BorrowedFd> = self
            .region_files()
            .chain(accounts.iter().map(AsFd::as_fd))
            .chain(self.running().into_iter().flat_map(|index| self.rings[index].events()))
            .collect();
        service.ask(&Order::Become(order), &descriptors).map(drop)
    }

    /// How the guest's side stands, without its rings. Descriptors: those of the regions, then those of the account of what is in flight and of
    /// the dirty log.
    fn standing(&self, service: &Service) -> SessionOrder {
        SessionOrder {
            features: self.features,
            writeback: service.device().writeback(),
            memory: Some(self.places()),
            inflight: self.inflight_shape(service),
            log: self.log.as_ref().map(|(place, _)| *place),
            rings: Vec::new(),
        }
    }

    fn region_files(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.regions.iter().map(|(_, file)| file.as_fd())
    }

    fn inflight_shape(&self, service: &Service) -> Option<RegionShape> {
        match (&self.inflight, service.inflight()) {
            (Some((shape, _)), _) => Some(*shape),
            (None, own) => own.map(|own| own.shape),
        }
    }

    /// The memory of the account of what is in flight and of the dirty log, those that there are.
    fn accounts(&self, service: &Service) -> std::result::Result<Vec<OwnedFd>, WorkerError> {
        let inflight = match (&self.inflight, service.inflight()) {
            (Some((_, file)), _) => Some(file),
            (None, own) => own.map(|own| &own.file),
        };
        let files = inflight.into_iter().chain(self.log.as_ref().map(|(_, file)| file));
        files.map(|file| file.as_fd().try_clone_to_owned()).collect::<io::Result<_>>().map_err(WorkerError::Start)
    }

    /// How a ring is to run.
    fn ring_order(&self, index: usize, is_tracked: bool) -> RingOrder {
        let ring = &self.rings[index];
        let run = RingRun {
            place: ring.place,
            // Of a ring that has run, its account knows better. Without one, the used index is what there is.
            next_available: if ring.runs && !is_tracked { None } else { ring.next_available },
            used_in_log: ring.used_in_log,
            has_call: ring.call.is_some(),
            has_error: ring.error.is_some(),
        };
        RingOrder { index: index as u16, run: Some(run) }
    }

    /// Takes the descriptor over at which the front end takes messages.
    pub fn set_channel(&mut self, channel: OwnedFd) {
        self.channel = Some(channel);
    }

    /// Tells the front end that the configuration space has changed, if it listens to such messages.
    fn tell_config_change(&self) {
        /// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1 and no answer, no payload. An answer must not be asked for: QEMU asks for the
        /// configuration before it would give one.
        const MESSAGE: [u32; 3] = [2, 1, 0];
        let Some(channel) = &self.channel else { return };
        let bytes: Vec<u8> = MESSAGE.iter().flat_map(|part| part.to_ne_bytes()).collect();
        if let Err(error) = socket::send_at_once(channel, &bytes) {
            log::warn!("the front end could not be told of the volume's new size: {error}");
        }
    }

    /// Stops all rings and forgets the guest's memory.
    pub fn end(&mut self) -> std::result::Result<(), WorkerError> {
        // First the one and then the other: what is in flight needs the memory, whoever completes it.
        let stopped = self.stop_all(&self.running());
        // A worker that refuses, having taken over from one that died of the order, runs none either.
        self.rings.iter_mut().for_each(|ring| ring.runs = false);
        self.regions.clear();
        self.features = 0;
        self.ask(SessionOrder { memory: Some(Vec::new()), ..self.order() }, &[])?;
        stopped
    }

    fn running(&self) -> Vec<usize> {
        (0..self.rings.len()).filter(|index| self.rings[*index].runs).collect()
    }

    /// An order that changes nothing but what has changed by itself.
    fn order(&self) -> SessionOrder {
        SessionOrder {
            features: self.features,
            writeback: self.service().device().writeback(),
            ..SessionOrder::default()
        }
    }

    fn index(&self, index: u32) -> std::result::Result<usize, Refusal> {
        match usize::try_from(index) {
            Ok(found) if found < self.rings.len() => Ok(found),
            _ => Err(Refusal::Ring { index, queues: self.rings.len() as u16 }),
        }
    }

    /// Changes something about a ring: it is stopped first, all that it has taken complete, and started again afterwards if it should
    /// still run.
    fn change(&mut self, index: usize, change: impl FnOnce(&mut Ring)) -> Result<()> {
        self.stop(index)?;
        change(&mut self.rings[index]);
        self.start(index)
    }

    fn stop(&mut self, index: usize) -> Result<()> {
        if !self.rings[index].runs {
            return Ok(());
        }
        let order = SessionOrder { rings: vec![RingOrder { index: index as u16, run: None }], ..self.order() };
        let stopped = self.ask(order, &[]).map_err(Refusal::from)?;
        self.rings[index].runs = false;
        stopped.iter().for_each(|stop| self.rings[usize::from(stop.index)].stopped(stop));
        Ok(())
    }

    /// Stops these rings, all of which run.
    fn stop_all(&mut self, running: &[usize]) -> std::result::Result<(), WorkerError> {
        let rings = running.iter().map(|index| RingOrder { index: *index as u16, run: None }).collect();
        let stopped = self.ask(SessionOrder { rings, ..self.order() }, &[])?;
        running.iter().for_each(|index| self.rings[*index].runs = false);
        stopped.iter().for_each(|stop| self.rings[usize::from(stop.index)].stopped(stop));
        Ok(())
    }

    fn start(&mut self, index: usize) -> Result<()> {
        let ring = &self.rings[index];
        if ring.runs || !ring.should_run() || self.regions.is_empty() {
            return Ok(());
        }
        if self.rings.iter().all(|ring| !ring.runs) {
            self.device_starts()?;
        }
        let ring = &mut self.rings[index];
        let goes_on =
            ring.held_at.take().is_some_and(|held| Some(held) == ring.next_available.map(|at| (ring.place, at)));
        let is_tracked = {
            let service = self.service();
            // A region of the front end's knows what was there before this connection; ours knows what was there since it stopped.
            if self.inflight.is_none()
                && !goes_on
                && let Some(own) = service.inflight()
            {
                let system = |source| Refusal::System { action: "clear the account of what is in flight", source };
                own.shape.clear(&own.file, index as u16).map_err(system)?;
            }
            service.inflight().is_some()
        };
        let order = SessionOrder { rings: vec![self.ring_order(index, is_tracked)], ..self.order() };
        let descriptors: Vec<BorrowedFd> = self.rings[index].events().collect();
        self.ask(order, &descriptors).map_err(Refusal::from)?;
        self.rings[index].runs = true;
        Ok(())
    }

    /// No ring runs, and one is about to. If this is the first start of the guest's boot, what is staged is served from here on.
    fn device_starts(&mut self) -> Result<()> {
        // Not those that a driver before this one has left behind: firmware uses one ring where a kernel used many.
        let takes_part = |ring: &Ring| ring.placed && (ring.should_run() || ring.has_base);
        let placed: Vec<usize> = (0..self.rings.len()).filter(|index| takes_part(&self.rings[*index])).collect();
        let used = if self.service().has_staged() {
            let places = || placed.iter().map(|index| self.rings[*index].place).collect();
            self.surviving(|service| service.used_indexes(places())).map_err(Refusal::from)?
        } else {
            // Nothing depends on it.
            vec![None; placed.len()]
        };
        let ring = |(index, used): (&usize, Option<u16>)| RingStart {
            index: *index,
            base: self.rings[*index].next_available,
            used,
        };
        let start = Start {
            driver: Driver::of_features(self.features),
            new_connection: self.is_new,
            rings: placed.iter().zip(used).map(ring).collect(),
        };
        self.is_new = false;
        let mut service = self.service();
        if service.starts(&start) {
            let bytes = service.device().description().bytes;
            let order = self.standing(&service);
            let accounts = self.accounts(&service).map_err(Refusal::from)?;
            let descriptors: Vec<BorrowedFd> = self.region_files().chain(accounts.iter().map(AsFd::as_fd)).collect();
            let switched = service.switch(&Order::Become(order), &descriptors);
            if switched && service.device().description().bytes != bytes {
                self.tell_config_change();
            }
        }
        Ok(())
    }

    /// Makes the volume larger under a guest that may be running: its rings stop, and go on where they were. Whether it is larger, and whether they go on.
    pub fn grow(&mut self, bytes: u64) -> (std::result::Result<(), WorkerError>, Result<()>) {
        let running = self.running();
        let stopped = self.stop_all(&running).map_err(|error| Refusal::from(error).into());
        let before = self.service().device().description().bytes;
        // Also if they could not be stopped: what a front end has done to its memory does not keep a volume small.
        let grown = self.service().grow(bytes);
        let resumed = stopped
            .and_then(|()| self.tell_memory())
            .and_then(|()| running.into_iter().try_for_each(|index| self.start(index)));
        if self.service().device().description().bytes != before {
            self.tell_config_change();
        }
        (grown, resumed)
    }

    /// What another backend needs to know to go on where this one is.
    fn state(&self) -> DeviceState {
        let service = self.service();
        let description = service.device().description();
        DeviceState { bytes: description.bytes, read_only: description.read_only, serial: description.serial }
    }

    /// Whether a ring lies in these regions.
    fn is_in(&self, index: usize, regions: &[RegionPlace]) -> bool {
        self.rings[index].place.parts(device::has_event_idx(self.features)).iter().all(|part| {
            regions.iter().any(|region| {
                let within = part.address.checked_sub(region.user_address);
                within.is_some_and(|within| within.saturating_add(part.bytes as u64) <= region.bytes)
            })
        })
    }

    fn places(&self) -> Vec<RegionPlace> {
        self.regions.iter().map(|(place, _)| *place).collect()
    }

    /// Stops the rings that will not lie in memory, while it is as it was: there is what they have taken, whoever completes it.
    ///
    /// A front end that changes a region removes it and then adds what is in its place, also while a ring lies in it. Such
    /// a ring goes on when it has memory again.
    fn stop_outside(&mut self, regions: &[RegionPlace]) -> Result<()> {
        for index in self.running() {
            if !self.is_in(index, regions) {
                log::debug!("ring {index} waits for its memory to come back");
                self.stop(index)?;
            }
        }
        Ok(())
    }

    /// Tells the worker of the memory as it is now. Rings that run go on over it.
    fn tell_memory(&mut self) -> Result<()> {
        if self.regions.len() > REGIONS_MAX {
            return Err(Refusal::Regions { count: self.regions.len() }.into());
        }
        let (order, accounts) = {
            let service = self.service();
            (self.standing(&service), self.accounts(&service).map_err(Refusal::from)?)
        };
        let descriptors: Vec<BorrowedFd> = self.region_files().chain(accounts.iter().map(AsFd::as_fd)).collect();
        self.ask(order, &descriptors).map_err(Refusal::from)?;
        let places = self.places();
        for index in 0..self.rings.len() {
            if self.is_in(index, &places) {
                self.start(index)?;
            }
        }
        Ok(())
    }

    /// Leaves the volume to another backend when the guest is on its way there: all its rings have stopped while its writes to memory are logged.
    fn release_if_moving(&mut self) -> Result<()> {
        let is_moving = device::logs_writes(self.features) && self.log.is_some() && self.running().is_empty();
        if is_moving {
            self.surviving(Service::release).map_err(Refusal::from)?;
        }
        Ok(())
    }

    /// Stops all rings, as if they had never been started.
    fn reset(&mut self) -> Result<()> {
        for index in 0..self.rings.len() {
            self.stop(index)?;
            self.rings[index] = Ring::default();
        }
        Ok(())
    }
}

fn lock(service: &Mutex<Service>) -> MutexGuard<'_, Service> {
    service.lock().expect("no holder of this lock panics")
}
