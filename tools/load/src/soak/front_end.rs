//! [`FrontEnd`]: a machine's VMM. It speaks with the backend, and comes back when that has died, as QEMU does with `reconnect`.
//!
//! It does one thing after the other in a thread of its own, and in between listens to its connection. Whatever it says may be
//! cut off by the backend's death: then the device is made to stand on another connection as it was to stand on the last one, with
//! the same account of what is in flight. A connection that ends without a reason ends the run.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::connection::Config;
use crate::soak::clerk::Clerk;
use crate::soak::disk::{Disk, Image};
use crate::soak::guest::{DEPTH, Held};
use crate::soak::machine::{Machine, Tasks};
use crate::soak::site::Site;
use crate::soak::standing::{Link, Standing};
use crate::soak::strikes::Moment;
use crate::soak::watch::Pulse;
use crate::sys;

/// How long another backend may take to be there.
const PATIENCE: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_millis(5);
/// How long it listens before it looks after itself.
const LISTEN: Duration = Duration::from_secs(1);
/// How long a guest that is driven from here sleeps between two looks at the connection.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// The backend's message that the configuration space has changed, which has nothing behind its header.
const CONFIG_CHANGE: u32 = 2;
const MESSAGE_BYTES: usize = 12;

pub struct FrontEnd {
    pub machine: Arc<Machine>,
    pub site: Arc<Site>,
    pub clerk: Arc<Clerk>,
    pub pulse: Arc<Pulse>,
    pub standing: Standing,
    /// What the guest was told of its disk.
    pub config: Config,
    /// The image that the guest's disk is on.
    pub image: Option<Image>,
    /// The image that its channel points to.
    pub wanted: Option<Image>,
    /// Where it pointed before, since the guest was last seen on what it points to: one of these may be staged while the daemon cannot say otherwise.
    pub passed: Vec<Image>,
    /// What the volume was made to grow to.
    pub grown: Option<u64>,
    pub socket: PathBuf,
    /// The last start of a driver, among the times when the deltas' disk was full.
    pub started: Moment,
    link: Option<Link>,
    /// As of when there is this connection.
    since: Moment,
    is_over: bool,
}

/// Why there is no connection, and whether anybody was there.
struct NoLink {
    error: anyhow::Error,
    was_greeted: bool,
}

impl FrontEnd {
    /// A front end whose machine is not switched on.
    pub fn new(machine: Arc<Machine>, site: Arc<Site>, clerk: Arc<Clerk>, pulse: Arc<Pulse>) -> Result<Self> {
        Ok(Self {
            standing: Standing::new(machine.disk.manner)?,
            config: Config::default(),
            image: machine.disk.image,
            wanted: machine.disk.image,
            passed: Vec::new(),
            grown: None,
            socket: PathBuf::new(),
            started: Moment::default(),
            link: None,
            since: machine.keeper_strikes.now(),
            is_over: false,
            machine,
            site,
            clerk,
            pulse,
        })
    }

    /// Attaches the disk, boots, and does what it is asked to until it has ended.
    pub fn run(mut self, tasks: &Tasks) -> Result<()> {
        let machine = self.machine.clone();
        self.switch_on(&mut machine.seat.hold())?;
        while !self.is_over {
            match tasks.take() {
                Some(task) => {
                    task(&mut self)?;
                    self.pulse.rests();
                    tasks.done();
                }
                None => self.listen(LISTEN, Some(tasks))?,
            }
        }
        Ok(())
    }

    /// Has its thread end after what it does now.
    pub fn end(&mut self) {
        self.is_over = true;
    }

    pub fn disk(&self) -> &Disk {
        &self.machine.disk
    }

    /// As of when there is this connection.
    pub fn connected_since(&self) -> Moment {
        self.since
    }

    /// As of when there is this connection, with nobody having struck at the backend since.
    pub fn undisturbed_since(&self) -> Option<Moment> {
        (self.link.is_some() && !self.machine.keeper_strikes.since(self.since)).then_some(self.since)
    }

    /// Whether requests of this driver's may have waited for room.
    pub fn has_been_full(&self) -> bool {
        self.site.was_full_since(self.started)
    }

    /// The features that the backend offers.
    pub fn offered(&self) -> Result<u64> {
        Ok(self.link.as_ref().context("there is a connection")?.connection.offered())
    }

    /// Says something. None: the backend died over it, and the device stands again as it was to stand.
    pub fn say<T>(&mut self, what: &str, words: impl FnOnce(&mut Link, &Standing) -> Result<T>) -> Result<Option<T>> {
        self.pulse.waits_for(what);
        let link = self.link.as_mut().context("there is a connection")?;
        let said = words(link, &self.standing);
        self.pulse.rests();
        match said {
            Ok(said) => Ok(Some(said)),
            Err(error) => self.reconnect(error.context(what.to_owned())).map(|()| None),
        }
    }

    fn reconnect(&mut self, error: anyhow::Error) -> Result<()> {
        self.link = None;
        if !self.machine.keeper_strikes.since(self.since) {
            return Err(error.context("the backend has ended the connection, though nobody had killed it"));
        }
        self.connect()
    }

    /// Connects to whoever serves the disk, and has the device stand there as it is to stand.
    pub fn connect(&mut self) -> Result<()> {
        self.pulse.waits_for("a backend to connect to");
        let ends = Instant::now() + PATIENCE;
        loop {
            self.since = self.machine.keeper_strikes.now();
            match self.try_connect() {
                Ok(link) => {
                    self.link = Some(link);
                    self.pulse.rests();
                    return Ok(());
                }
                Err(NoLink { error, was_greeted }) => {
                    // A listener may have nobody behind it, and one that is about to die answers nothing.
                    ensure!(Instant::now() < ends, "no backend for {PATIENCE:?}: {error:#}");
                    if was_greeted && !self.machine.keeper_strikes.since(self.since) {
                        return Err(error.context("the backend refuses what another one took"));
                    }
                    thread::sleep(RETRY_INTERVAL);
                }
            }
        }
    }

    fn try_connect(&mut self) -> Result<Link, NoLink> {
        let early = |error| NoLink { error, was_greeted: false };
        let late = |error| NoLink { error, was_greeted: true };
        let socket = UnixStream::connect(&self.socket);
        let socket = socket.with_context(|| self.socket.display().to_string()).map_err(early)?;
        self.clerk.allow("front-end.connected", &self.disk().object());
        let mut link = Link::new(socket, &self.disk().manner).map_err(early)?;
        self.machine.note_served(Some(self.since));
        self.clerk.expect("front-end.connected", &self.disk().object());
        if self.standing.runs {
            link.start(&self.standing).map_err(late)?;
        }
        Ok(link)
    }

    /// Closes the connection, on which no ring runs. `detaches`: the backend is about to go.
    pub fn disconnect(&mut self, detaches: bool) {
        if detaches {
            self.machine.note_served(None);
        }
        self.link = None;
    }

    /// Waits for the backend to say something, or for a task.
    fn listen(&mut self, timeout: Duration, tasks: Option<&Tasks>) -> Result<()> {
        let Some(link) = &self.link else { bail!("there is no connection, and nothing to do") };
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let wake = tasks.map_or(-1, |tasks| tasks.wake().as_raw_fd());
        let mut fds = [link.connection.as_raw_fd(), link.channel.as_raw_fd(), wake].map(poll);
        sys::wait_readable(&mut fds, timeout)?;
        if fds[0].revents != 0 {
            // Nobody speaks there without having been asked.
            return self.reconnect(anyhow!("the connection has ended"));
        }
        if fds[1].revents != 0 && self.hear()? {
            self.tell_guest_of_size()?;
        }
        Ok(())
    }

    /// Takes the backend's own messages: whether the configuration has changed.
    fn hear(&mut self) -> Result<bool> {
        let Some(link) = &mut self.link else { return Ok(false) };
        let mut message = [0; MESSAGE_BYTES];
        let mut has_changed = false;
        loop {
            match link.channel.read(&mut message) {
                Ok(MESSAGE_BYTES) if message[..4] == CONFIG_CHANGE.to_ne_bytes() => has_changed = true,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(has_changed),
                // It goes with its backend; the connection has more to tell.
                Ok(0) | Err(_) => {
                    thread::sleep(RETRY_INTERVAL);
                    return Ok(has_changed);
                }
                Ok(found) => bail!("the backend says {:02x?} by itself", &message[..found]),
            }
        }
    }

    /// The configuration space as it is now.
    pub fn read_config(&mut self) -> Result<Config> {
        loop {
            if let Some(config) = self.say("the configuration", |link, _| link.connection.config())? {
                return Ok(config);
            }
        }
    }

    /// Has the guest see a size that has changed, to one that it may have.
    fn tell_guest_of_size(&mut self) -> Result<()> {
        let found = self.read_config()?;
        let expected = self.disk().bytes_on(self.image, self.grown);
        ensure!(
            found.capacity_bytes == expected || found.capacity_bytes == self.config.capacity_bytes,
            "the disk is said to have {} bytes, expected {expected}",
            found.capacity_bytes
        );
        if found.capacity_bytes > self.config.capacity_bytes {
            let machine = self.machine.clone();
            machine.seat.hold().verifier().grow(found.capacity_bytes);
        }
        self.config = found;
        Ok(())
    }

    /// Has the rings run from where they are.
    pub fn start_rings(&mut self) -> Result<()> {
        let (queues, ring_size) = (self.disk().manner.queues, self.disk().manner.queue_size);
        while self.disk().manner.keeps_inflight && self.standing.inflight.is_none() {
            let asked =
                self.say("memory for what is in flight", |link, _| link.connection.ask_inflight(queues, ring_size));
            self.standing.inflight = asked?;
        }
        self.standing.runs = true;
        // Should the backend die over it, whoever comes next is told the same.
        self.say("the rings to start", |link, standing| link.start(standing)).map(drop)
    }

    /// Stops the rings, with all that was taken from them complete: where each is to go on.
    pub fn stop_rings(&mut self) -> Result<Vec<u16>> {
        loop {
            let stopped = self.say("the rings to stop", |link, standing| link.stop(standing))?;
            let Some(stopped) = stopped else { continue };
            self.standing.runs = false;
            let positions = self.standing.positions();
            // What waits for room waits on.
            let waiting_max = if self.has_been_full() { DEPTH as u16 } else { 0 };
            ensure!(
                stopped.iter().zip(&positions).all(|(taken, done)| taken.wrapping_sub(*done) <= waiting_max),
                "the rings are to go on at {stopped:?}, and have completed up to {positions:?}"
            );
            return Ok(stopped);
        }
    }

    /// Drives a guest that stands still otherwise until nothing is in flight, after `submit` has had its way.
    pub fn drive(&mut self, held: &mut Held, mut submit: impl FnMut(&mut Held) -> Result<()>) -> Result<()> {
        loop {
            held.harvest()?;
            submit(held)?;
            if held.is_idle() {
                return Ok(());
            }
            held.sleep(LOOK_INTERVAL, None)?;
            self.listen_for_end()?;
        }
    }

    /// Waits until all that is in flight is complete.
    pub fn drain(&mut self, held: &mut Held) -> Result<()> {
        self.drive(held, |_| Ok(()))
    }

    /// Looks whether the connection has ended. What else is said waits: the guest stands still.
    pub fn listen_for_end(&mut self) -> Result<()> {
        let Some(link) = &self.link else { bail!("a guest is driven without a connection") };
        let fd = link.connection.as_raw_fd();
        if sys::wait_readable(&mut [libc::pollfd { fd, events: libc::POLLIN, revents: 0 }], Duration::ZERO)? {
            self.reconnect(anyhow!("the connection has ended"))?;
        }
        Ok(())
    }
}
