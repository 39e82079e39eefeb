//! What each request does, what it answers, and how much of memory it says to have written.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use pando::sys::buffers::Writable;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use super::client::{self, Client, Profile};
use super::guest::Guest;
use super::harness::{Backend, Disk, PATIENCE, SECTOR, image_bytes, run, text};
use super::queue::{
    Completed, DISCARD, FLUSH, GET_ID, IN, IOERR, NO_STATUS, OK, OUT, Queue, UNSUPP, WRITE_ZEROES, header, range_bytes,
};
use super::ring::Buffer;

const DISK_BYTES: usize = 1 << 20;
const UNMAP: u32 = 1;

#[track_caller]
pub fn answer(queue: &mut Queue, kind: u32, sector: u64, readable: &[u8], writable: usize) -> (u8, u32) {
    let completed = queue.execute(kind, sector, readable, writable);
    (completed.status, completed.len)
}

/// A chain of buffers that a test lays out itself.
pub struct Chain {
    guest: Arc<Guest>,
    buffers: Vec<Buffer>,
}

impl Chain {
    pub fn new(queue: &Queue) -> Chain {
        Chain { guest: Arc::clone(queue.guest()), buffers: Vec::new() }
    }

    /// Appends bytes for the device to read.
    pub fn reads(mut self, bytes: &[u8]) -> Chain {
        let address = self.guest.allocate(bytes.len() as u64 + 1, 1);
        self.guest.write(address, bytes);
        self.buffers.push(Buffer::readable(address, bytes.len()));
        self
    }

    /// Appends memory for the device to write.
    pub fn writes(mut self, len: usize) -> Chain {
        let address = self.guest.allocate(len as u64 + 1, 1);
        self.guest.write(address, &vec![NO_STATUS; len]);
        self.buffers.push(Buffer::writable(address, len));
        self
    }

    /// Has it carried out: the length in the used ring, and all memory that the device could write.
    #[track_caller]
    pub fn execute(&self, queue: &mut Queue) -> (u32, Vec<u8>) {
        let head = queue.ring.submit(&self.buffers);
        self.finish(queue, head)
    }

    /// As [`Chain::execute`], through an indirect table.
    #[track_caller]
    pub fn execute_indirect(&self, queue: &mut Queue) -> (u32, Vec<u8>) {
        let table = self.guest.allocate(16 * self.buffers.len() as u64, 16);
        let head = queue.ring.submit_indirect(table, &self.buffers);
        self.finish(queue, head)
    }

    #[track_caller]
    fn finish(&self, queue: &mut Queue, head: u16) -> (u32, Vec<u8>) {
        queue.ring.kick();
        let (done, len) = queue.ring.wait_used(PATIENCE).expect("the request completes");
        assert_eq!(done, head);
        let writable = self.buffers.iter().filter(|buffer| buffer.writable);
        (len, writable.flat_map(|buffer| self.guest.read(buffer.address, buffer.len as usize)).collect())
    }
}

#[test]
fn reads_writes_and_flushes_say_what_they_did() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let mut client = Client::start(&backend, &Profile::qemu());
    let queue = &mut client.queues[0];
    for bytes in [512, 4096, 5 * 512, 65536] {
        assert!(queue.read(3, bytes) == model[3 * SECTOR..][..bytes]);
    }
    // Into the middle of a cluster, over several, and to the very end.
    for (sector, bytes) in [(1, 512), (7, 1024), (9, 16384), (2047, 512), (2000, 48 * 512)] {
        let new = image_bytes(bytes, sector as u64);
        queue.write(sector as u64, &new);
        model[sector * SECTOR..][..bytes].copy_from_slice(&new);
    }
    for at in (0..DISK_BYTES).step_by(65536) {
        assert!(queue.read((at / SECTOR) as u64, 65536) == model[at..][..65536]);
    }
    // A flush has no sector and no data, whatever it says.
    assert_eq!(answer(queue, FLUSH, 0, &[], 0), (OK, 1));
    assert_eq!(answer(queue, FLUSH, 77, &[], 0), (OK, 1));
}

#[test]
fn what_is_not_on_the_disk_is_an_error() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &Profile::qemu());
    let queue = &mut client.queues[0];
    let sectors = (DISK_BYTES / SECTOR) as u64;
    for sector in [sectors, sectors + 1, sectors - 7, 1 << 40, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX] {
        assert_eq!(answer(queue, IN, sector, &[], 4096), (IOERR, 1), "read at {sector}");
        assert_eq!(answer(queue, OUT, sector, &[1; 4096], 0), (IOERR, 1), "write at {sector}");
        let range = range_bytes(&[(sector, 8, 0)]);
        assert_eq!(answer(queue, DISCARD, 0, &range, 0), (IOERR, 1), "discard at {sector}");
        assert_eq!(answer(queue, WRITE_ZEROES, 0, &range, 0), (IOERR, 1), "zeroes at {sector}");
    }
    // Not whole sectors, and no data at all.
    for bytes in [1, 511, 513, 4095] {
        assert_eq!(answer(queue, IN, 0, &[], bytes), (IOERR, 1));
        assert_eq!(answer(queue, OUT, 0, &vec![1; bytes], 0), (IOERR, 1));
    }
    assert_eq!(answer(queue, IN, 0, &[], 0), (IOERR, 1));
    assert_eq!(answer(queue, OUT, 0, &[], 0), (IOERR, 1));
    // Nothing of all that reached the disk.
    for at in (0..DISK_BYTES).step_by(65536) {
        assert!(queue.read((at / SECTOR) as u64, 65536) == disk.contents[at..][..65536]);
    }
}

#[test]
fn unknown_requests_are_unsupported() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &Profile::qemu());
    let queue = &mut client.queues[0];
    // SCSI commands, the barrier of old, GET_LIFETIME, SECURE_ERASE, zones, and what does not exist.
    for kind in [2, 3, 5, 10, 12, 14, 15, 16, 18, 20, 22, 24, 26, 0x8000_0000, 0x8000_0001, u32::MAX] {
        assert_eq!(answer(queue, kind, 0, &[0; 512], 0), (UNSUPP, 1), "type {kind}");
        assert_eq!(answer(queue, kind, 0, &[], 512), (UNSUPP, 1), "type {kind}");
    }
    // Flags that a discard or write-zeroes does not know.
    for (kind, flags) in [(DISCARD, UNMAP), (DISCARD, 2), (WRITE_ZEROES, 2), (WRITE_ZEROES, 0x8000_0001)] {
        assert_eq!(answer(queue, kind, 0, &range_bytes(&[(0, 8, flags)]), 0), (UNSUPP, 1), "flags {flags:#x}");
    }
    assert!(queue.read(0, 4096) == disk.contents[..4096]);
}

#[test]
fn discard_and_write_zeroes_hide_the_base_and_give_space_back() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let mut client = Client::start(&backend, &Profile::qemu());
    let queue = &mut client.queues[0];
    let zero = |model: &mut [u8], sectors: std::ops::Range<usize>| {
        model[sectors.start * SECTOR..sectors.end * SECTOR].fill(0);
    };
    let held = || std::fs::metadata(disk.delta()).expect("the delta").blocks() * 512;

    // A discard hides whole clusters, and leaves the rest of its range as it is.
    assert_eq!(answer(queue, DISCARD, 0, &range_bytes(&[(3, 30, 0)]), 0), (OK, 1));
    zero(&mut model, 8..32);
    // Zeroes are exact to the sector.
    assert_eq!(answer(queue, WRITE_ZEROES, 0, &range_bytes(&[(101, 3, 0)]), 0), (OK, 1));
    zero(&mut model, 101..104);
    assert_eq!(answer(queue, WRITE_ZEROES, 0, &range_bytes(&[(205, 100, UNMAP)]), 0), (OK, 1));
    zero(&mut model, 205..305);
    // Several ranges in one request, one of them empty.
    let ranges = range_bytes(&[(400, 8, 0), (800, 0, 0), (500, 16, UNMAP), (2040, 8, 0)]);
    assert_eq!(answer(queue, WRITE_ZEROES, 0, &ranges, 0), (OK, 1));
    [400..408, 500..516, 2040..2048].into_iter().for_each(|sectors| zero(&mut model, sectors));
    let ranges: Vec<(u64, u32, u32)> = (0..64).map(|number| (1024 + number * 8, 8, 0)).collect();
    assert_eq!(answer(queue, DISCARD, 0, &range_bytes(&ranges), 0), (OK, 1));
    zero(&mut model, 1024..1536);
    for at in (0..DISK_BYTES).step_by(65536) {
        assert!(queue.read((at / SECTOR) as u64, 65536) == model[at..][..65536], "near sector {}", at / SECTOR);
    }

    // What was written and is then discarded is held no more.
    let before = held();
    let new = image_bytes(65536, 1);
    (0..4).for_each(|number| queue.write(1024 + number * 128, &new));
    queue.flush();
    assert!(held() >= before + 4 * 65536, "{before}, then {}", held());
    assert_eq!(answer(queue, DISCARD, 0, &range_bytes(&[(1024, 512, 0)]), 0), (OK, 1));
    assert!(held() < before + 65536, "{before}, then {}", held());
    assert!(queue.read(1024, 65536).iter().all(|byte| *byte == 0));

    // More ranges than were offered, a longer one, none, and a part of one. One that is wrong, and none is carried out.
    let many: Vec<(u64, u32, u32)> = (0..65).map(|number| (number, 1, 0)).collect();
    let sectors = (DISK_BYTES / SECTOR) as u64;
    for ranges in
        [range_bytes(&many), Vec::new(), vec![0; 15], vec![0; 17], range_bytes(&[(600, 8, 0), (sectors, 1, 0)])]
    {
        assert_eq!(answer(queue, DISCARD, 0, &ranges, 0), (IOERR, 1));
        assert_eq!(answer(queue, WRITE_ZEROES, 0, &ranges, 0), (IOERR, 1));
    }
    assert!(queue.read(600, 4096) == model[600 * SECTOR..][..4096]);
}

#[test]
fn serial_numbers_are_whole_and_unique() {
    let disk = Disk::new(DISK_BYTES);
    let serial = |backend: &Backend| {
        let mut client = Client::start(backend, &Profile::qemu());
        let completed = client.queues[0].execute(GET_ID, 0, &[], 20);
        assert_eq!((completed.status, completed.len), (OK, 21));
        // Less room and more: as much as fits, and nothing behind it.
        let Completed { status, len, data } = client.queues[0].execute(GET_ID, 0, &[], 8);
        assert_eq!((status, len, &data[..]), (OK, 9, &completed.data[..8]));
        let before = client.queues[0].execute(IN, 0, &[], 512);
        let more = client.queues[0].execute(GET_ID, 0, &[], 512);
        assert_eq!((more.status, more.len, &more.data[..20]), (OK, 21, &completed.data[..]));
        assert!(more.data[20..] == before.data[20..], "bytes behind the serial number were written");
        completed.data
    };
    let one = serial(&disk.serve());
    assert_eq!(serial(&disk.serve()), one, "it stays the same");
    let other_delta = disk.path("other");
    let other = serial(&disk.serve_as(&["--delta", text(&other_delta), "--create"]));
    assert_ne!(one, other, "each delta has one of its own");
    assert!([&one, &other].into_iter().all(|serial| serial.iter().filter(|byte| **byte != 0).count() > 8));
    let named = serial(&disk.serve_with(&["--serial", "twenty-characters-ok"]));
    assert_eq!(named, b"twenty-characters-ok");
    let read_only = serial(&disk.serve_as(&["--read-only"]));
    assert!(![&one, &other].contains(&&read_only));
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve_as(&["--read-only"]);
    let mut client = Client::start(&backend, &Profile::qemu());
    let queue = &mut client.queues[0];
    assert_eq!(answer(queue, OUT, 0, &[1; 512], 0), (IOERR, 1));
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(answer(queue, kind, 0, &range_bytes(&[(0, 8, 0)]), 0), (IOERR, 1));
    }
    assert_eq!(answer(queue, FLUSH, 0, &[], 0), (OK, 1));
    for at in (0..DISK_BYTES).step_by(65536) {
        assert!(queue.read((at / SECTOR) as u64, 65536) == disk.contents[at..][..65536]);
    }
    drop(client);
    drop(backend);
    assert!(std::fs::read(disk.base()).expect("the image") == disk.contents, "the image was written");
}

#[test]
pub fn buffers_may_be_laid_out_in_any_way() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &Profile::qemu());
    let queue = &mut client.queues[0];
    let new = image_bytes(4096, 9);

    // The header in pieces, with data in the last of them, and empty buffers among all.
    let mut bytes = header(OUT, 8).to_vec();
    bytes.extend_from_slice(&new);
    let chain = Chain::new(queue).reads(&bytes[..1]).reads(&[]).reads(&bytes[1..7]).reads(&bytes[7..1000]);
    let chain = chain.reads(&bytes[1000..]).reads(&[]).writes(0).writes(1).writes(0);
    assert_eq!(chain.execute(queue), (1, vec![OK]));
    assert!(queue.read(8, 4096) == new);
    let chain = Chain::new(queue).reads(&bytes).writes(1);
    assert_eq!(chain.execute_indirect(queue), (1, vec![OK]));

    // The status in the last byte of the data's buffer; the data in odd pieces at odd addresses.
    let head = header(IN, 8);
    let chain = Chain::new(queue).reads(&head).writes(4097);
    assert_eq!(chain.execute(queue), (4097, [&new[..], &[OK]].concat()));
    let chain = Chain::new(queue).reads(&head).writes(1).writes(0).writes(510).writes(1025).writes(1).writes(0);
    assert_eq!(chain.execute(queue), (1537, [&new[..1536], &[OK]].concat()));

    // The status in a buffer of several bytes is the last of them, and the others are data: these are 513, which cannot be.
    let chain = Chain::new(queue).reads(&head).writes(512).writes(2);
    let (len, written) = chain.execute(queue);
    assert_eq!((len, written[513]), (1, IOERR));

    // No status, no header, nothing.
    let chain = Chain::new(queue).reads(&head);
    assert_eq!(chain.execute(queue), (0, vec![]));
    let chain = Chain::new(queue).reads(&head[..15]).writes(1);
    assert_eq!(chain.execute(queue), (1, vec![IOERR]));
    let chain = Chain::new(queue).writes(1);
    assert_eq!(chain.execute(queue), (1, vec![IOERR]));
    let chain = Chain::new(queue).reads(&[]);
    assert_eq!(chain.execute(queue), (0, vec![]));
    let chain = Chain::new(queue).writes(0);
    assert_eq!(chain.execute(queue), (0, vec![]));
    // Something for the device to read behind something to write.
    let chain = Chain::new(queue).reads(&head).writes(512).reads(&[0; 16]).writes(1);
    assert_eq!(chain.execute(queue).0, 0);
    assert!(queue.read(8, 4096) == new, "the queue goes on");
}

#[test]
pub fn requests_longer_than_the_ring_come_through_indirect_tables() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let profile = Profile { ring_size: 128, ..Profile::qemu() };
    let mut client = Client::start(&backend, &profile);
    let queue = &mut client.queues[0];
    // Windows sends 129 segments whatever it is told, and nobody more than the kernel takes in one call.
    for segments in [127, 129, 254, 1024] {
        let new = image_bytes(segments * 512, segments as u64);
        let mut chain = Chain::new(queue).reads(&header(OUT, 100));
        for segment in new.chunks(512) {
            chain = chain.reads(segment);
        }
        assert_eq!(chain.writes(1).execute_indirect(queue), (1, vec![OK]), "writing {segments} segments");
        let mut chain = Chain::new(queue).reads(&header(IN, 100));
        for _ in 0..segments {
            chain = chain.writes(512);
        }
        let (len, read) = chain.writes(1).execute_indirect(queue);
        assert_eq!((len as usize, read[new.len()]), (new.len() + 1, OK), "reading {segments} segments");
        assert!(read[..new.len()] == new);
    }
}

#[test]
fn a_disk_need_not_end_with_a_cluster() {
    for odd in [1, 7, 9] {
        let disk = Disk::new(DISK_BYTES + odd * SECTOR);
        let backend = disk.serve();
        let mut client = Client::start(&backend, &Profile::qemu());
        let queue = &mut client.queues[0];
        let last = (DISK_BYTES / SECTOR + odd) as u64 - 1;
        assert!(queue.read(last, 512) == disk.contents[disk.contents.len() - 512..]);
        assert_eq!(answer(queue, IN, last, &[], 1024), (IOERR, 1));
        assert_eq!(answer(queue, OUT, last, &[1; 1024], 0), (IOERR, 1));
        let new = image_bytes(512, 3);
        queue.write(last, &new);
        queue.flush();
        assert!(queue.read(last, 512) == new);
        assert!(queue.read(last - 8, 4096) == disk.contents[disk.contents.len() - 9 * 512..][..4096]);
        // The last cluster is whole where the disk ends.
        let start = (DISK_BYTES / SECTOR) as u64;
        assert_eq!(answer(queue, DISCARD, 0, &range_bytes(&[(start, odd as u32, 0)]), 0), (OK, 1));
        assert!(queue.read(start, odd * 512).iter().all(|byte| *byte == 0) || odd > 8);
        assert!(queue.read(last, 512).iter().all(|byte| *byte == 0), "sector {last} is discarded");
    }
}

#[test]
pub fn a_volume_may_be_larger_than_its_image() {
    let disk = Disk::new(DISK_BYTES + SECTOR);
    let backend = disk.serve_with(&["--size", "1T"]);
    let mut client = Client::start(&backend, &Profile::qemu());
    let queue = &mut client.queues[0];
    let end = (1u64 << 40) / 512;
    let boundary = queue.read(2048, 4096);
    assert!(boundary[..512] == disk.contents[DISK_BYTES..] && boundary[512..].iter().all(|byte| *byte == 0));
    let new = image_bytes(8192, 4);
    queue.write(end - 16, &new);
    queue.write(2049, &new[..512]);
    assert!(queue.read(end - 16, 8192) == new);
    assert!(queue.read(2048, 1024) == [&disk.contents[DISK_BYTES..], &new[..512]].concat());
    assert_eq!(answer(queue, IN, end, &[], 512), (IOERR, 1));
}

#[test]
fn an_image_of_no_whole_sectors_is_refused_at_the_start() {
    for bytes in [DISK_BYTES + 1, DISK_BYTES + 511, 0] {
        let disk = Disk::new(bytes);
        let (base, delta, socket) = (disk.base(), disk.delta(), disk.path("socket"));
        let place = ["--base", text(&base), "--socket-path", text(&socket)];
        for kind in [&["--read-only"][..], &["--ephemeral"], &["--delta", text(&delta), "--create"]] {
            let (code, _, errors) = run(&[&place[..], kind].concat());
            assert_eq!(code, 1, "{kind:?} {errors}");
            assert!(errors.contains("multiple of 512"), "{kind:?} {errors}");
            assert!(!delta.exists() && !socket.exists(), "something is left behind");
        }
    }
}

/// Whether the new contents of a sector would still be there if the power failed now.
pub fn survives_power_loss(disk: &Disk, sector: u64, expected: &[u8]) -> bool {
    let volume = disk.after_power_loss();
    let mut found = vec![0; expected.len()];
    volume.read(sector * SECTOR as u64, &[Writable::from_mut_slice(&mut found)]).expect("the delta can be read");
    found == expected
}

#[test]
fn writes_go_through_when_the_driver_does_not_flush() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut new = (0..).map(|seed| image_bytes(4096, seed));
    let mut next = move || new.next().expect("without end");

    // With a write cache, what is not flushed may be lost; what is flushed may not.
    let mut client = Client::start(&backend, &Profile::qemu().answered());
    let bytes = next();
    client.queues[0].write(0, &bytes);
    assert!(!survives_power_loss(&disk, 0, &bytes), "this test sees nothing: an unflushed write is durable");
    client.queues[0].flush();
    assert!(survives_power_loss(&disk, 0, &bytes));

    // The driver turns the cache off, and on again.
    client.front_end.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).expect("SET_CONFIG");
    let asked = client.front_end.get_config(32, 1, VhostUserConfigFlags::empty(), &[9]).expect("GET_CONFIG");
    assert_eq!(asked.1, [0]);
    let bytes = next();
    client.queues[0].write(8, &bytes);
    assert!(survives_power_loss(&disk, 8, &bytes), "the cache is off");
    let range = range_bytes(&[(8, 8, 0)]);
    assert_eq!(answer(&mut client.queues[0], WRITE_ZEROES, 0, &range, 0), (OK, 1));
    assert!(survives_power_loss(&disk, 8, &[0; 4096]), "the cache is off");
    client.front_end.set_config(32, VhostUserConfigFlags::WRITABLE, &[1]).expect("SET_CONFIG");
    let bytes = next();
    client.queues[0].write(16, &bytes);
    assert!(!survives_power_loss(&disk, 16, &bytes), "the cache is on again");

    // A driver that cannot flush, and one that can and knows no switch.
    drop(client);
    let profile = Profile { features: !(client::BLK_FLUSH | client::CONFIG_WCE), ..Profile::qemu() };
    let mut client = Client::start(&backend, &profile);
    let bytes = next();
    client.queues[0].write(24, &bytes);
    assert!(survives_power_loss(&disk, 24, &bytes), "the driver has no flush");
    drop(client);
    let profile = Profile { features: !client::CONFIG_WCE, ..Profile::qemu() };
    let mut client = Client::start(&backend, &profile);
    let bytes = next();
    client.queues[0].write(32, &bytes);
    assert!(!survives_power_loss(&disk, 32, &bytes), "the driver will flush");
    drop(client);

    // The next front end finds the cache on, whatever the last one did.
    let mut client = Client::start(&backend, &Profile::qemu().answered());
    client.front_end.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).expect("SET_CONFIG");
    drop(client);
    let mut client = Client::start(&backend, &Profile::qemu());
    let asked = client.front_end.get_config(32, 1, VhostUserConfigFlags::empty(), &[9]).expect("GET_CONFIG");
    assert_eq!(asked.1, [1]);
    let bytes = next();
    client.queues[0].write(40, &bytes);
    assert!(!survives_power_loss(&disk, 40, &bytes), "the cache is on");
}
