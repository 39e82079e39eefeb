//! A whole backend between a controller and front ends that mean well, change their minds, break off, lie or send noise, over sockets, with
//! workers that die at any step.
//!
//! Nothing panics and nothing hangs; memory about the guest's is not touched, nor is the guest's after the connection has ended; no descriptor and no
//! thread is left. Whenever a front end means well, whatever came before it, every request of its driver completes as it should and reads what was
//! written; and the delta is whole in the end.
#![no_main]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use fuzz_targets::session::backend::{self, BASE_SECTORS, Backend, Volumed};
use fuzz_targets::session::disk::Disk;
use fuzz_targets::session::front_end::{self as message, FrontEnd, VERSION, longs, words};
use fuzz_targets::session::guest::{self, Guest, REGION_BYTES, RING_SIZE, RINGS, USER, Wish};
use fuzz_targets::{Choices, open_descriptors, threads, unnamed_file};
use libfuzzer_sys::fuzz_target;
use pando::block::{DeltaCache, cached};
use pando::sys::buffers::Readable;
use pando::sys::{events, file, shared};
use pando::vhost_user::steps::{self, ALL, Step};
use pando::vhost_user::transfers::Io;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Things that happen in one input.
const ACTIONS_MAX: usize = 24;
/// Connections in one input.
const CONNECTIONS_MAX: usize = 5;
/// Workers that die in one input: of more in a row a keeper takes a rest.
const DEATHS_MAX: usize = 3;
/// The features of virtio that are taken away now and then, so that drivers differ.
const EVENT_IDX: u64 = 1 << 29;
const MANNERS: [u64; 4] =
    [u64::MAX, !EVENT_IDX, !(1 << 9), !(EVENT_IDX | 1 << 28 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 11)];

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    steps::unwind_at(Step::Begin, 0);
    let how = choices.below(4);
    cached::pretend_cold(how & 1 == 1);
    let io = if how & 2 == 0 { Io::Auto } else { Io::Threads };
    backend::prepare();
    LazyLock::force(&POOL);
    let before = (open_descriptors(), threads());
    Play::new(&mut choices, io).run(&mut choices);
    // The kernel may still be at the end of a thread that has been waited for.
    let begun = Instant::now();
    while threads() != before.1 && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_micros(100));
    }
    assert_eq!((open_descriptors(), threads()), before, "descriptors or threads are left");
});

/// Descriptors that make no sense, or some.
struct Pool {
    descriptors: Vec<OwnedFd>,
}

static POOL: LazyLock<Pool> = LazyLock::new(|| {
    let memory = shared::create(c"pando-fuzz-noise", 1 << 16).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    drop(far);
    let short = unnamed_file();
    short.set_len(100).unwrap();
    let eventfd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
    let descriptors = vec![
        memory.into(),
        events::into_file(eventfd).into(),
        File::open("/dev/null").unwrap().into(),
        near.into(),
        short.into(),
        File::open("/").unwrap().into(),
        File::options().write(true).open("/dev/null").unwrap().into(),
        File::open("/proc/self/maps").unwrap().into(),
    ];
    Pool { descriptors }
});

fn cache(choices: &mut Choices<'_>) -> DeltaCache {
    if choices.below(3) == 2 { DeltaCache::Direct } else { DeltaCache::Writeback }
}

/// One input: a backend, and who talks to it.
struct Play {
    backend: Backend,
    front_end: FrontEnd,
    guest: Guest,
    features: u64,
    /// Whether the front end has said or done anything that it should not.
    is_hostile: bool,
    /// The front end's own region for what is in flight, with its numbers.
    inflight: Option<(Vec<u8>, OwnedFd)>,
    /// Memory of connections that have ended.
    past: Vec<Guest>,
    writes: u16,
    deaths: usize,
    connections: usize,
}

impl Play {
    fn new(choices: &mut Choices<'_>, io: Io) -> Play {
        let sectors = if choices.rarely() { None } else { Some(choices.one_of(&[203, BASE_SECTORS, 400])) };
        let served = Volumed::new("first", choices.below(4) != 3 || sectors.is_none(), sectors, cache(choices));
        let backend = Backend::start(served, io);
        let front_end = FrontEnd::over(backend.connect());
        let (guest, features) = (Guest::new(true), 0);
        let mut play = Play {
            backend,
            front_end,
            guest,
            features,
            is_hostile: false,
            inflight: None,
            past: Vec::new(),
            writes: 0,
            deaths: 0,
            connections: 1,
        };
        play.negotiate(choices);
        play.begin(choices);
        play
    }

    fn run(mut self, choices: &mut Choices<'_>) {
        for _ in 0..ACTIONS_MAX {
            if choices.is_over() {
                break;
            }
            if self.is_hostile {
                self.harm(choices);
            } else {
                self.act(choices);
            }
        }
        steps::unwind_at(Step::Begin, 0);
        // Whatever has happened, a front end that means well is served.
        self.connect_anew(choices);
        let past: Vec<_> = self.past.iter().map(Guest::snapshot).collect();
        for _ in 0..4 {
            self.submit(choices, 0);
        }
        self.guest.kick(0);
        self.guest.finish(0, &mut self.backend.served.disk);
        self.read_all();
        let Play { backend, front_end, guest, past: guests, .. } = self;
        drop(front_end);
        let served = backend.stop();
        for (guest, before) in guests.iter().zip(past) {
            assert!(guest.snapshot() == before, "memory of a connection that has ended was written");
            Guest::check_margins(&before);
        }
        Guest::check_margins(&guest.snapshot());
        if choices.below(4) == 0 {
            served.check();
        }
    }

    fn disk(&mut self) -> &mut Disk {
        &mut self.backend.served.disk
    }

    /// Says all that comes before memory and rings.
    fn negotiate(&mut self, choices: &mut Choices<'_>) {
        let offered = self.front_end.ask_number(message::GET_FEATURES);
        let protocol = self.front_end.ask_number(message::GET_PROTOCOL_FEATURES);
        self.front_end.tell(message::SET_PROTOCOL_FEATURES, &longs(&[protocol]), &[]);
        self.front_end.tell(message::SET_OWNER, &[], &[]);
        self.features = offered & choices.one_of(&MANNERS);
        self.front_end.tell(message::SET_FEATURES, &longs(&[self.features]), &[]);
    }

    /// Starts a driver from nothing: other memory, other rings.
    fn begin(&mut self, choices: &mut Choices<'_>) {
        let last = std::mem::replace(&mut self.guest, Guest::new(self.features & EVENT_IDX != 0));
        self.past.push(last);
        self.inflight = None;
        if choices.below(2) == 1 {
            self.take_inflight();
        }
        self.tell_memory(choices);
        for ring in 0..RINGS {
            self.set_up(ring, 0);
            self.enable(ring, true);
        }
        self.front_end.settle();
        self.backend.catch_up();
    }

    /// Has the backend make a region for what is in flight.
    fn take_inflight(&mut self) {
        let asked = inflight_body([0, 0], [RINGS as u16, RING_SIZE]);
        let mut reply = self.front_end.ask(message::GET_INFLIGHT_FD, &asked);
        let file = reply.descriptors.pop().expect("it comes with its memory");
        self.inflight = Some((reply.body, file));
        self.give_inflight();
    }

    fn give_inflight(&mut self) {
        if let Some((body, file)) = &self.inflight {
            self.front_end.tell(message::SET_INFLIGHT_FD, body, &[file.as_fd()]);
        }
    }

    fn tell_memory(&mut self, choices: &mut Choices<'_>) {
        if choices.below(2) == 0 {
            let mut body = words(&[2, 0]);
            body.extend([0, 1].iter().flat_map(|region| longs(&self.guest.region(*region))));
            self.front_end.tell(message::SET_MEM_TABLE, &body, &[self.guest.file(0), self.guest.file(1)]);
        } else {
            (0..2).for_each(|region| self.add_region(region));
        }
    }

    fn add_region(&mut self, region: usize) {
        let body = [longs(&[0]), longs(&self.guest.region(region))].concat();
        self.front_end.tell(message::ADD_MEM_REG, &body, &[self.guest.file(region)]);
    }

    fn remove_region(&mut self, region: usize) {
        let body = [longs(&[0]), longs(&self.guest.region(region))].concat();
        self.front_end.say(message::REM_MEM_REG, &body, &[]);
    }

    fn set_up(&mut self, ring: usize, base: u16) {
        let index = ring as u32;
        self.front_end.tell(message::SET_VRING_NUM, &words(&[index, RING_SIZE.into()]), &[]);
        self.front_end.tell(message::SET_VRING_BASE, &words(&[index, base.into()]), &[]);
        let [descriptors, used, available] = self.guest.place(ring);
        let place = [words(&[index, 0]), longs(&[descriptors, used, available, 0])].concat();
        self.front_end.tell(message::SET_VRING_ADDR, &place, &[]);
        let kick = self.guest.rings[ring].kick.as_fd();
        self.front_end.tell(message::SET_VRING_KICK, &longs(&[index.into()]), &[kick]);
        self.tell_call(ring);
    }

    fn tell_call(&mut self, ring: usize) {
        let call = self.guest.rings[ring].call.as_fd();
        self.front_end.tell(message::SET_VRING_CALL, &longs(&[ring as u64]), &[call]);
    }

    fn enable(&mut self, ring: usize, on: bool) {
        if self.features & 1 << 30 != 0 {
            self.front_end.tell(message::SET_VRING_ENABLE, &words(&[ring as u32, on.into()]), &[]);
        }
    }

    fn submit(&mut self, choices: &mut Choices<'_>, ring: usize) {
        self.writes += 1;
        let Play { backend: Backend { served, .. }, guest, writes, .. } = self;
        if served.is_read_only() {
            return;
        }
        guest.submit(ring, choices, &mut served.disk, *writes);
    }

    /// Reads the whole disk.
    fn read_all(&mut self) {
        let Play { backend: Backend { served, .. }, guest, .. } = self;
        guest.finish(0, &mut served.disk);
        let sectors = served.disk.sectors();
        for (number, start) in (0..sectors).step_by(guest::SECTORS_MAX as usize).enumerate() {
            let range = start..(start + guest::SECTORS_MAX).min(sectors);
            let slot = number % guest::SLOTS;
            if slot == 0 {
                guest.kick(0);
                guest.finish(0, &mut served.disk);
            }
            guest.put(0, slot, Wish { kind: guest::IN, sectors: range, number: 0, form: 1 }, &mut served.disk);
        }
        guest.kick(0);
        guest.finish(0, &mut served.disk);
    }

    /// Connects once more, unless that was done so often that nothing new comes of it. The driver starts from nothing.
    fn connect_again(&mut self, choices: &mut Choices<'_>) {
        if self.connections < CONNECTIONS_MAX {
            self.connect_anew(choices);
        }
    }

    fn connect_anew(&mut self, choices: &mut Choices<'_>) {
        self.connections += 1;
        let stream = self.backend.connect();
        // The last connection ends here, and with it whatever it has caused.
        self.front_end = FrontEnd::over(stream);
        self.negotiate(choices);
        self.backend.catch_up();
        if std::mem::take(&mut self.is_hostile) {
            self.disk().lose_track();
        }
        self.begin(choices);
    }

    /// Loses the connection, and goes on over another with the driver where it was.
    fn reconnect(&mut self, choices: &mut Choices<'_>) {
        if self.connections >= CONNECTIONS_MAX {
            return;
        }
        self.connections += 1;
        let features = self.features;
        let stream = self.backend.connect();
        self.front_end = FrontEnd::over(stream);
        self.negotiate(choices);
        self.features = features;
        self.front_end.tell(message::SET_FEATURES, &longs(&[features]), &[]);
        self.give_inflight();
        self.tell_memory(choices);
        for ring in 0..RINGS {
            let base = self.guest.used_index(ring);
            self.set_up(ring, base);
            self.enable(ring, true);
        }
        self.front_end.settle();
        self.backend.catch_up();
    }

    /// Something that a front end, a driver or a controller may well do.
    fn act(&mut self, choices: &mut Choices<'_>) {
        let ring = choices.below(RINGS as u64) as usize;
        let action = choices.below(16);
        if self.backend.staged.is_some() && matches!(action, 6..9 | 13) {
            // A driver that has not done anything yet could find itself on the other volume, with requests for this one.
            return self.connect_again(choices);
        }
        match action {
            0..4 => {
                for _ in 0..1 + choices.below(4) {
                    self.submit(choices, ring);
                }
                if choices.below(4) != 3 {
                    self.guest.kick(ring);
                }
            }
            4 | 5 => {
                self.guest.kick_anyway(ring);
                let Play { backend: Backend { served, .. }, guest, .. } = self;
                guest.finish(ring, &mut served.disk);
            }
            6 => {
                let index = ring as u32;
                let body = self.front_end.ask(message::GET_VRING_BASE, &words(&[index, 0])).body;
                let base = u16::from_ne_bytes([body[4], body[5]]);
                assert_eq!(base, self.guest.used_index(ring), "all that was taken is complete");
                self.set_up(ring, base);
            }
            7 => {
                self.enable(ring, false);
                self.enable(ring, true);
            }
            8 => match choices.below(4) {
                0 => self.tell_memory_again(),
                // A ring waits for its memory; a request whose data lies in memory that is not there fails.
                region => {
                    let is_idle = (0..RINGS).all(|ring| self.guest.is_idle(ring));
                    let region = if is_idle { region as usize % 2 } else { 0 };
                    self.remove_region(region);
                    self.add_region(region);
                    self.front_end.settle();
                }
            },
            9 => self.tell_call(ring),
            10 => {
                let on = choices.below(2) as u8;
                self.front_end.say(message::SET_CONFIG, &[words(&[32, 1, 0]), vec![on]].concat(), &[]);
                let features = self.features;
                self.front_end.say(message::SET_FEATURES, &longs(&[features]), &[]);
            }
            11 => self.command(choices),
            12 => self.plan_death(choices),
            13 => self.reconnect(choices),
            14 => self.is_hostile = true,
            _ => self.connect_again(choices),
        }
    }

    /// Tells of the same memory once more, in one message.
    fn tell_memory_again(&mut self) {
        let mut body = words(&[2, 0]);
        body.extend([1, 0].iter().flat_map(|region| longs(&self.guest.region(*region))));
        self.front_end.say(message::SET_MEM_TABLE, &body, &[self.guest.file(1), self.guest.file(0)]);
    }

    /// Has a worker die at a step that it may reach.
    fn plan_death(&mut self, choices: &mut Choices<'_>) {
        if self.deaths < DEATHS_MAX {
            self.deaths += 1;
            let step = choices.one_of(&ALL);
            steps::unwind_at(step, 1 + choices.below(6));
        }
    }

    /// Something that a controller says.
    fn command(&mut self, choices: &mut Choices<'_>) {
        match choices.below(4) {
            0 => {
                let sectors = self.disk().sectors();
                let wrong = choices.one_of(&[u64::MAX, 0, sectors - 1, 1 << 50]);
                let asked = if choices.sometimes() { wrong } else { sectors + choices.below(300) };
                let fits = !self.backend.served.is_read_only() && asked != wrong;
                let grown = self.backend.grow(asked);
                assert_eq!(grown.is_ok(), fits, "{asked} sectors, from {sectors}: {grown:?}");
            }
            1 => {
                let sectors = if choices.sometimes() { None } else { Some(choices.one_of(&[300, BASE_SECTORS, 40])) };
                let has_base = sectors.is_none_or(|sectors| sectors >= BASE_SECTORS && choices.below(2) == 0);
                self.backend.stage(Volumed::new("staged", has_base, sectors, cache(choices)));
            }
            2 => self.backend.unstage(),
            _ => {
                let report = self.backend.report();
                // What has been said by then is known by then.
                assert_eq!(report.tag, self.backend.served.tag);
                assert_eq!(report.staged.is_some(), self.backend.staged.is_some());
            }
        }
    }

    /// Something that nobody should do.
    fn harm(&mut self, choices: &mut Choices<'_>) {
        self.front_end.forget_answers();
        match choices.below(13) {
            0..4 => self.send_noise(choices),
            4 | 5 => self.spoil_memory(choices),
            6 => self.spoil_ring(choices),
            7 => self.lie_of_inflight(choices),
            8 => (0..RINGS).for_each(|ring| self.guest.kick_anyway(ring)),
            9 if self.connections < CONNECTIONS_MAX => {
                let bytes = message::message(choices.below(50) as u32, VERSION, &[0; 32]);
                let len = choices.below(bytes.len() as u64) as usize;
                let _ = self.front_end.send_bytes(&bytes[..len.max(1)], &[]);
                self.connect_anew(choices);
            }
            10 => self.plan_death(choices),
            11 => self.connect_again(choices),
            _ => self.command(choices),
        }
    }

    /// A message of any kind, mostly with a body of its own kind.
    fn send_noise(&mut self, choices: &mut Choices<'_>) {
        let request = if choices.rarely() { choices.any() } else { choices.below(message::MESSAGES_END.into()) as u32 };
        let mut body = self.random_body(choices, request);
        if choices.rarely() && !body.is_empty() {
            let at = choices.below(body.len() as u64) as usize;
            body[at] = choices.any();
        }
        if choices.rarely() {
            body.resize(choices.below(300) as usize, 0xff);
        }
        let flags =
            if choices.rarely() { choices.any() } else { VERSION | (choices.below(2) as u32 * message::NEED_REPLY) };
        let mut bytes = message::message(request, flags, &body);
        if choices.rarely() {
            let len = choices.any::<u32>();
            bytes[8..12].copy_from_slice(&len.to_ne_bytes());
        }
        let descriptors = self.random_descriptors(choices, request);
        // The backend may have ended the connection.
        let _ = self.front_end.send_bytes(&bytes, &descriptors);
    }

    fn random_body(&self, choices: &mut Choices<'_>, request: u32) -> Vec<u8> {
        let ring = if choices.rarely() { choices.any() } else { choices.below(RINGS as u64) as u32 };
        match request {
            message::SET_FEATURES | message::SET_PROTOCOL_FEATURES => {
                let number = choices.one_of(&[self.features, 0, u64::MAX, 1 << 30, 0x1_0000_0000]);
                longs(&[number ^ u64::from(choices.any::<u8>()) << choices.below(57)])
            }
            message::SET_MEM_TABLE => {
                let count = choices.below(4) as u32;
                let mut body = words(&[if choices.rarely() { choices.any() } else { count }, 0]);
                body.extend((0..count).flat_map(|_| longs(&self.random_region(choices))));
                body
            }
            message::ADD_MEM_REG | message::REM_MEM_REG => [longs(&[0]), longs(&self.random_region(choices))].concat(),
            message::SET_VRING_NUM => words(&[ring, choices.one_of(&[32, 16, 1, 256, 512, 0, 3, 65536])]),
            message::SET_VRING_BASE => {
                let base = if choices.rarely() { choices.any() } else { choices.below(70) as u32 };
                words(&[ring, base])
            }
            message::SET_VRING_ADDR => {
                let mut place = self.guest.place(ring as usize % RINGS);
                for address in &mut place {
                    if choices.sometimes() {
                        *address = match choices.below(3) {
                            0 => USER[choices.below(2) as usize] + choices.below(REGION_BYTES),
                            1 => USER[choices.below(2) as usize] + choices.below(REGION_BYTES / 16) * 16,
                            _ => choices.any(),
                        };
                    }
                }
                [words(&[ring, 0]), longs(&place), longs(&[0])].concat()
            }
            message::SET_VRING_KICK | message::SET_VRING_CALL | message::SET_VRING_ERR => {
                let none = if choices.sometimes() { 1 << 8 } else { 0 };
                longs(&[u64::from(ring) | none])
            }
            message::SET_VRING_ENABLE | message::GET_VRING_BASE => words(&[ring, choices.below(3) as u32]),
            message::GET_CONFIG | message::SET_CONFIG => {
                let (offset, size) = (choices.one_of(&[0, 32, 60, 0x100, 250]), choices.below(70) as u32);
                [words(&[offset, size, 0]), vec![choices.any(); size as usize]].concat()
            }
            message::GET_INFLIGHT_FD | message::SET_INFLIGHT_FD => {
                let place = [choices.one_of(&[1 << 14, 1100, 0, u64::MAX]), choices.one_of(&[0, 64, 63, !63])];
                let rings = [choices.below(4) as u16, choices.one_of(&[RING_SIZE, 256, 0, 33, 32768, 65535])];
                inflight_body(place, rings)
            }
            _ => {
                let mut body = vec![0; choices.one_of(&[0, 8, 16, 40])];
                choices.fill(&mut body);
                body
            }
        }
    }

    /// A region like the guest's, mostly.
    fn random_region(&self, choices: &mut Choices<'_>) -> [u64; 4] {
        let mut region = self.guest.region(choices.below(2) as usize);
        if choices.sometimes() {
            let at = choices.below(4) as usize;
            region[at] = match choices.below(3) {
                0 => region[at].wrapping_add(choices.below(8193)).wrapping_sub(4096),
                1 => choices.any(),
                _ => choices.one_of(&[0, 1, 4095, 4096, 1 << 40, u64::MAX]),
            };
        }
        region
    }

    /// As many descriptors as a message should have, mostly, and of the right kind, mostly.
    fn random_descriptors(&self, choices: &mut Choices<'_>, request: u32) -> Vec<BorrowedFd<'_>> {
        let expected = match request {
            message::SET_MEM_TABLE => choices.below(4),
            message::SET_VRING_KICK | message::SET_VRING_CALL | message::SET_VRING_ERR => 1,
            message::ADD_MEM_REG | message::SET_INFLIGHT_FD | message::SET_BACKEND_REQ_FD => 1,
            _ => 0,
        };
        let count = if choices.sometimes() { choices.below(9) } else { expected };
        let mut descriptors = Vec::new();
        for _ in 0..count {
            let ring = &self.guest.rings[choices.below(RINGS as u64) as usize];
            let usual = match request {
                message::SET_MEM_TABLE | message::ADD_MEM_REG => self.guest.file(choices.below(2) as usize),
                message::SET_VRING_KICK => ring.kick.as_fd(),
                message::SET_VRING_CALL | message::SET_VRING_ERR => ring.call.as_fd(),
                _ => POOL.descriptors[0].as_fd(),
            };
            let other = &POOL.descriptors[choices.below(POOL.descriptors.len() as u64) as usize];
            descriptors.push(if choices.sometimes() { other.as_fd() } else { usual });
        }
        descriptors
    }

    /// Writes anything anywhere in the guest's memory, but mostly where the rings are.
    fn spoil_memory(&mut self, choices: &mut Choices<'_>) {
        for _ in 0..1 + choices.below(8) {
            let place = choices.one_of(&[0, 0x800, 0x1000, 0x2000, 0x8000, 0xc000, REGION_BYTES - 8]);
            let address = if choices.sometimes() { choices.below(2 * REGION_BYTES) } else { place + choices.below(64) };
            let bytes = match choices.below(4) {
                0 => choices.any::<u64>().to_le_bytes().to_vec(),
                1 => choices.any::<u16>().to_le_bytes().to_vec(),
                2 => vec![choices.any()],
                _ => (choices.below(2 * REGION_BYTES)).to_le_bytes().to_vec(),
            };
            self.guest.write(address, &bytes);
        }
        (0..RINGS).for_each(|ring| self.guest.kick_anyway(ring));
    }

    /// Describes something, and offers it.
    fn spoil_ring(&mut self, choices: &mut Choices<'_>) {
        let ring = choices.below(RINGS as u64);
        let start = ring * 0x2000;
        for index in 0..1 + choices.below(6) {
            let table = choices.one_of(&[start, 0xc000]);
            let address = if choices.sometimes() { choices.any() } else { choices.below(2 * REGION_BYTES) };
            let len = if choices.sometimes() { choices.any() } else { choices.one_of(&[16u32, 512, 1, 96, 4096]) };
            let flags = if choices.rarely() { choices.any() } else { choices.one_of(&[1u16, 0, 3, 2, 4]) };
            let next = if choices.rarely() { choices.any() } else { index as u16 + 1 };
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend(next.to_le_bytes());
            self.guest.write(table + index * 16, &descriptor);
        }
        let header = [choices.below(16) as u32, 0, choices.below(1200) as u32, 0];
        self.guest.write(choices.below(2 * REGION_BYTES), &words(&header));
        let used = self.guest.used_index(ring as usize);
        let ahead = if choices.rarely() { choices.any() } else { choices.below(6) as u16 };
        for entry in 0..u64::from(RING_SIZE) {
            self.guest.write(start + 0x804 + 2 * entry, &(choices.below(6) as u16).to_le_bytes());
        }
        self.guest.write(start + 0x802, &used.wrapping_add(ahead).to_le_bytes());
        self.guest.kick_anyway(ring as usize);
    }

    /// Gives a region for what is in flight that tells of a past that never was.
    fn lie_of_inflight(&mut self, choices: &mut Choices<'_>) {
        let stride = (u64::from(RING_SIZE) * 16 + 2).next_multiple_of(64);
        let region = shared::create(c"pando-fuzz-lie", RINGS as u64 * stride).unwrap();
        for ring in 0..RINGS {
            let mut slot = vec![0; 16 + usize::from(RING_SIZE) * 16];
            let mut put = |at: usize, value: u16| slot[at..at + 2].copy_from_slice(&value.to_le_bytes());
            put(0, choices.below(3) as u16);
            put(8, if choices.rarely() { choices.any() } else { 1 });
            put(10, if choices.rarely() { choices.any() } else { RING_SIZE });
            put(12, choices.below(40) as u16);
            put(14, self.guest.used_index(ring).wrapping_sub(choices.below(4) as u16));
            for head in 0..choices.below(32) as usize {
                put(16 + head * 16, choices.below(2) as u16);
                put(16 + head * 16 + 6, choices.below(34) as u16);
                put(16 + head * 16 + 8, choices.any());
            }
            file::write_at(&region, &[Readable::from_slice(&slot)], ring as u64 * stride).unwrap();
        }
        let body = inflight_body([RINGS as u64 * stride, 0], [RINGS as u16, RING_SIZE]);
        let _ =
            self.front_end.send_bytes(&message::message(message::SET_INFLIGHT_FD, VERSION, &body), &[region.as_fd()]);
    }
}

/// The body that says where a region for what is in flight lies, and for which rings it is.
fn inflight_body(place: [u64; 2], [rings, size]: [u16; 2]) -> Vec<u8> {
    // As wide as the structure is with its padding.
    [longs(&place), words(&[u32::from(rings) | u32::from(size) << 16, 0])].concat()
}
