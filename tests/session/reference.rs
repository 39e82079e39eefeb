//! The same conversations with a disk on the field's own crates, `vhost-user-backend` and `virtio-queue`: the same answers.
//!
//! The reference is a disk in memory. What is compared is a transcript: every answer of the front end's protocol, and status,
//! length and bytes of every request. Left out is what that crate cannot do: drain on ENABLE(0), a ring set up before memory,
//! memory taken away under a ring, a second connection, and chains that are malformed, which it takes for short ones.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::Instant;

use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures as Protocol};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueT, Reader, Writer};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::client::{self, Client, Profile, Step};
use super::guest::Guest;
use super::harness::{Disk, PATIENCE, SECTOR};
use super::queue::{
    DISCARD, FLUSH, GET_ID, IN, IOERR, NO_STATUS, OK, OUT, Queue, UNSUPP, WRITE_ZEROES, header, range_bytes,
};
use super::ring::Buffer;

const DISK_BYTES: usize = 1 << 20;
const QUEUES: usize = 2;
const SERIAL: &str = "reference-serial-no1";
const RING_SIZE_MAX: usize = 1024;

/// Features that both offer.
const FEATURES: u64 = client::VERSION_1
    | client::EVENT_IDX
    | client::INDIRECT_DESC
    | client::PROTOCOL_FEATURES
    | client::BLK_FLUSH
    | client::BLK_SIZE
    | client::BLK_MQ
    | client::BLK_DISCARD
    | client::BLK_WRITE_ZEROES;

fn protocol() -> Protocol {
    Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS
}

/// The reference: a disk in memory, with the semantics of a volume.
struct MemoryDisk {
    contents: Vec<u8>,
    event_idx: bool,
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
}

type Memory = GuestMemoryLoadGuard<GuestMemoryMmap>;

impl VhostUserBackendMut for MemoryDisk {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        RING_SIZE_MAX
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn protocol_features(&self) -> Protocol {
        protocol()
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // Capacity, block size and number of queues: what both say.
        let mut config = vec![0; 4096];
        config[..8].copy_from_slice(&((self.contents.len() / SECTOR) as u64).to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config[34..36].copy_from_slice(&(QUEUES as u16).to_le_bytes());
        config[offset as usize..][..size as usize].to_vec()
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> std::io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &mut self,
        event: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> std::io::Result<()> {
        let Some(vring) = vrings.get(usize::from(event)) else { return Ok(()) };
        loop {
            vring.disable_notification().map_err(std::io::Error::other)?;
            self.serve(vring)?;
            if !vring.enable_notification().map_err(std::io::Error::other)? {
                return Ok(());
            }
        }
    }
}

impl MemoryDisk {
    fn serve(&mut self, vring: &VringRwLock) -> std::io::Result<()> {
        let memory = self.memory.clone().ok_or(std::io::ErrorKind::InvalidInput)?.memory();
        let next = |vring: &VringRwLock| vring.get_mut().get_queue_mut().pop_descriptor_chain(memory.clone());
        while let Some(chain) = next(vring) {
            let head = chain.head_index();
            let len = self.execute(chain, &memory);
            vring.add_used(head, len).map_err(std::io::Error::other)?;
            if vring.needs_notification().map_err(std::io::Error::other)? {
                vring.signal_used_queue()?;
            }
        }
        Ok(())
    }

    /// Carries out a request: the length for the used ring.
    fn execute(&mut self, chain: DescriptorChain<Memory>, memory: &Memory) -> u32 {
        let memory: &GuestMemoryMmap = memory;
        let Ok(mut reader) = chain.clone().reader(memory) else { return 0 };
        let Ok(mut writer) = chain.writer(memory) else { return 0 };
        let Some(room) = writer.available_bytes().checked_sub(1) else { return 0 };
        let Ok(mut status_writer) = writer.split_at(room) else { return 0 };
        let (status, len) = match self.carry_out(&mut reader, &mut writer, room) {
            Ok(len) => (OK, len),
            Err(status) => (status, 0),
        };
        if status_writer.write_all(&[status]).is_ok() { len as u32 + 1 } else { 0 }
    }

    fn carry_out(&mut self, reader: &mut Reader<'_>, writer: &mut Writer<'_>, room: usize) -> Result<usize, u8> {
        let mut bytes = [0; 16];
        reader.read_exact(&mut bytes).map_err(|_| IOERR)?;
        let kind = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
        let sector = u64::from_le_bytes(bytes[8..].try_into().expect("eight bytes"));
        let mut data = Vec::new();
        reader.read_to_end(&mut data).map_err(|_| IOERR)?;
        match kind {
            IN => {
                let range = self.range(sector, room)?;
                writer.write_all(&self.contents[range]).map_err(|_| IOERR)?;
                Ok(room)
            }
            OUT => {
                let range = self.range(sector, data.len())?;
                self.contents[range].copy_from_slice(&data);
                Ok(0)
            }
            FLUSH => Ok(0),
            GET_ID => {
                let len = room.min(SERIAL.len());
                writer.write_all(&SERIAL.as_bytes()[..len]).map_err(|_| IOERR)?;
                if len == 0 { Err(IOERR) } else { Ok(len) }
            }
            DISCARD | WRITE_ZEROES => self.ranges(kind, &data),
            _ => Err(UNSUPP),
        }
    }

    fn range(&self, sector: u64, len: usize) -> Result<std::ops::Range<usize>, u8> {
        let start = usize::try_from(sector).ok().and_then(|sector| sector.checked_mul(SECTOR)).ok_or(IOERR)?;
        let end = start.checked_add(len).ok_or(IOERR)?;
        if len == 0 || !len.is_multiple_of(SECTOR) || end > self.contents.len() { Err(IOERR) } else { Ok(start..end) }
    }

    fn ranges(&mut self, kind: u32, data: &[u8]) -> Result<usize, u8> {
        if data.is_empty() || !data.len().is_multiple_of(16) {
            return Err(IOERR);
        }
        let mut ranges = Vec::new();
        for bytes in data.chunks(16) {
            let sector = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
            let sectors = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
            let flags = u32::from_le_bytes(bytes[12..].try_into().expect("four bytes"));
            if flags & !u32::from(kind == WRITE_ZEROES) != 0 {
                return Err(UNSUPP);
            }
            ranges.push(self.range(sector, sectors as usize * SECTOR)?);
        }
        for range in ranges {
            // A discard leaves a cluster that it does not name whole.
            let range = match kind {
                DISCARD => range.start.next_multiple_of(4096)..range.end / 4096 * 4096,
                _ => range,
            };
            if range.start < range.end {
                self.contents[range].fill(0);
            }
        }
        Ok(0)
    }
}

/// Serves one connection.
fn serve_reference(socket: &Path, contents: Vec<u8>) -> std::thread::JoinHandle<()> {
    let disk = Arc::new(RwLock::new(MemoryDisk { contents, event_idx: false, memory: None }));
    let socket = socket.to_owned();
    std::thread::spawn(move || {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new("reference".to_owned(), disk, memory).expect("a daemon");
        daemon.serve(&socket).expect("a conversation");
    })
}

/// What was said and answered.
#[derive(Default)]
struct Transcript(String);

impl Transcript {
    fn note(&mut self, what: &str, answer: impl std::fmt::Debug) {
        writeln!(self.0, "{what}: {answer:?}").expect("a string takes all");
    }
}

/// One request, alone: status, length, and the bytes written, as a digest.
fn request(queue: &mut Queue, kind: u32, sector: u64, readable: &[u8], writable: usize) -> (u8, u32, String) {
    let done = queue.execute(kind, sector, readable, writable);
    // What an unsuccessful request leaves in its buffers is nobody's business.
    let data = if done.status == OK { &done.data[..] } else { &[] };
    (done.status, done.len, blake3::hash(data).to_hex()[..16].to_owned())
}

/// A request whose bytes are cut into buffers at random: the length, and all that was written.
fn scattered(queue: &mut Queue, rng: &mut SmallRng, readable: &[u8], writable: usize, indirect: bool) -> (u32, String) {
    let guest = Arc::clone(queue.guest());
    let mut buffers = Vec::new();
    let mut cut = |len: usize, is_writable: bool, bytes: &[u8]| {
        let mut at = 0;
        while at < len {
            let part = rng.random_range(1..=(len - at).min(3000));
            let address = guest.allocate(part as u64, 1);
            guest.write(address, if is_writable { &[NO_STATUS; 3000][..part] } else { &bytes[at..at + part] });
            buffers.push(Buffer { address, len: part as u32, writable: is_writable });
            at += part;
        }
    };
    cut(readable.len(), false, readable);
    cut(writable, true, &[]);
    let head = if indirect {
        let table = guest.allocate(16 * buffers.len() as u64, 16);
        queue.ring.submit_indirect(table, &buffers)
    } else {
        queue.ring.submit(&buffers)
    };
    queue.ring.kick();
    let (done, len) = queue.ring.wait_used(PATIENCE).expect("the request completes");
    assert_eq!(done, head);
    let written: Vec<u8> = buffers
        .iter()
        .filter(|buffer| buffer.writable)
        .flat_map(|buffer| guest.read(buffer.address, buffer.len as usize))
        .collect();
    let status = written.last().copied();
    let told = if status == Some(OK) { &written[..len as usize - 1] } else { &[] };
    (len, format!("{status:?} {}", &blake3::hash(told).to_hex()[..16]))
}

/// A conversation: the transcript of one and the same script.
fn converse(stream: UnixStream, profile: &Profile, seed: u64) -> String {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut transcript = Transcript::default();
    let note = &mut transcript;
    let guest = Guest::with_regions(&[(0, 24 << 20), (4 << 30, 1 << 20)], super::guest::Backing::Memfd);
    let mut client = Client::negotiate(stream, profile, guest.expect("guest memory"));
    note.note("GET_FEATURES", client.offered & FEATURES);
    if !profile.protocol.is_empty() {
        let found = client.front_end.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
        note.note("GET_PROTOCOL_FEATURES", found & protocol());
        note.note("GET_QUEUE_NUM", client.front_end.get_queue_num().expect("GET_QUEUE_NUM"));
        for (offset, size) in [(0u32, 8usize), (20, 4), (34, 2), (34, 1), (4, 4), (60, 40), (3000, 30)] {
            let flags = VhostUserConfigFlags::empty();
            let found = client.front_end.get_config(offset, size as u32, flags, &vec![7; size]);
            note.note("GET_CONFIG", found.map(|(reply, bytes)| (reply.offset, reply.size, bytes)).expect("GET_CONFIG"));
        }
    }
    client.tell_memory();
    for index in 0..client.queues.len() {
        client.set_up(index, profile.start);
        if profile.features & client::PROTOCOL_FEATURES != 0 {
            client.enable(index, true);
        }
    }
    client.settle();
    let mut last = Instant::now();
    for number in 0..250 {
        assert!(last.elapsed() < PATIENCE, "request {number} took very long");
        last = Instant::now();
        let index = rng.random_range(0..client.queues.len());
        let queue = &mut client.queues[index];
        let sector = match rng.random_range(0..8) {
            0 => rng.random_range(2000..2100),
            1 => rng.random(),
            _ => rng.random_range(0..2048u64),
        };
        let bytes = match rng.random_range(0..8) {
            0 => rng.random_range(0..2000),
            _ => rng.random_range(1..=16) * SECTOR,
        };
        let mut data = vec![0; bytes];
        rng.fill_bytes(&mut data);
        let range = [(sector, rng.random_range(0..64), u32::from(rng.random_range(0..4) == 0))];
        // An empty range is where the two may differ: whether its start has to exist.
        let range = if range[0].1 == 0 { range_bytes(&[(0, 1, 0)]) } else { range_bytes(&range) };
        let what = format!("request {number} on {index}");
        match rng.random_range(0..12) {
            0..3 => note.note(&what, request(queue, IN, sector, &[], bytes)),
            3..5 => note.note(&what, request(queue, OUT, sector, &data, 0)),
            5 => note.note(&what, request(queue, FLUSH, sector, &[], 0)),
            6 => note.note(&what, request(queue, GET_ID, 0, &[], rng.random_range(0..40))),
            7 => note.note(&what, request(queue, DISCARD, 0, &range, 0)),
            8 => note.note(&what, request(queue, WRITE_ZEROES, 0, &range, 0)),
            9 => note.note(&what, request(queue, rng.random_range(14..100), sector, &data, 0)),
            10 => {
                let indirect = profile.features & client::INDIRECT_DESC != 0 && rng.random();
                let out = [&header(OUT, sector)[..], &data].concat();
                note.note(&what, scattered(queue, &mut rng, &out, 1, indirect));
            }
            _ => {
                let indirect = profile.features & client::INDIRECT_DESC != 0 && rng.random();
                note.note(&what, scattered(queue, &mut rng, &header(IN, sector), bytes + 1, indirect));
            }
        }
        if number % 50 == 49 {
            // A pause: the base, and on from there, with another call.
            let base = client.base(index);
            note.note("GET_VRING_BASE", (base, client.queues[index].ring.used_index()));
            client.set_up(index, base);
            client.settle();
        }
        if number % 60 == 59 {
            client.step(index, Step::Addr, 0);
            client.step(index, Step::Call, 0);
            client.front_end.set_features(client.features).expect("SET_FEATURES");
            client.settle();
        }
    }
    // Without a request lost or one too many.
    for index in 0..client.queues.len() {
        let ring = &client.queues[index].ring;
        note.note("the end", (ring.next_available, ring.next_used, ring.used_index()));
        note.note("GET_VRING_BASE", client.base(index));
    }
    transcript.0
}

/// Both conversations, compared line by line.
fn check(name: &str, profile: &Profile, seed: u64) {
    eprintln!("{name}, seed {seed}");
    let disk = Disk::new(DISK_BYTES);
    let queues = QUEUES.to_string();
    let backend = disk.serve_with(&["--serial", SERIAL, "--queues", &queues]);
    let ours = converse(backend.connect(), profile, seed);

    let socket = disk.path("reference");
    let reference = serve_reference(&socket, disk.contents.clone());
    super::harness::wait_until("the reference listens", || socket.exists());
    let mut stream = UnixStream::connect(&socket);
    super::harness::wait_until("the reference accepts", || {
        if stream.is_err() {
            stream = UnixStream::connect(&socket);
        }
        stream.is_ok()
    });
    let theirs = converse(stream.expect("a connection"), profile, seed);
    reference.join().expect("the reference ended in good order");

    for (ours, theirs) in ours.lines().zip(theirs.lines()) {
        assert_eq!(ours, theirs, "{name}, seed {seed}: ours, and the reference's");
    }
    assert_eq!(ours.lines().count(), theirs.lines().count());
    assert!(ours.lines().count() > 250);
}

fn common() -> Profile {
    Profile { features: FEATURES, protocol: protocol(), queues: QUEUES, depth: 2, ..Profile::qemu() }
}

#[test]
fn a_modern_front_end_gets_the_same_answers() {
    check("all that both know", &common(), 1);
    check("every message answered", &common().answered(), 2);
}

#[test]
fn a_simple_front_end_gets_the_same_answers() {
    let plain = client::VERSION_1 | client::PROTOCOL_FEATURES | client::BLK_FLUSH;
    check("no event indexes, no indirect tables", &Profile { features: plain, ..common() }, 3);
    let whole_table = Profile { slots: false, ring_size: 256, start: 65_500, ..common() };
    check("one memory table, indexes that wrap", &whole_table, 4);
}
