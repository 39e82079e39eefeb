//! A client that nobody here wrote: the crate `virtio-driver`, with its own vhost-user, its own rings and its own requests.

use std::collections::HashMap;
use std::os::fd::AsRawFd;

use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use virtio_driver::{
    QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::guest::{Backing, Guest};
use super::harness::{Backend, Disk, PATIENCE, SECTOR, text};

const DISK_BYTES: usize = 4 << 20;
/// Bytes of the largest request.
const PIECE_BYTES: usize = 64 << 10;
/// Requests that run at once on a queue.
const DEPTH: usize = 16;
const RING_SIZE: u16 = 64;

/// A disk as the driver shows it.
struct DriverDisk {
    transport: Box<VirtioBlkTransport>,
    queues: Vec<QueueOf>,
    /// A place for each request of each queue.
    memory: Guest,
}

struct QueueOf {
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    completions: Epoll,
    completion: std::sync::Arc<virtio_driver::EventFd>,
}

impl DriverDisk {
    fn connect(backend: &Backend, features: VirtioFeatureFlags, queues: usize) -> DriverDisk {
        let blk = VirtioBlkFeatureFlags::all();
        let transport = VhostUser::new(text(backend.socket()), features.bits() | blk.bits()).expect("a connection");
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let rings = VirtioBlkQueue::setup_queues(transport.as_mut(), queues, RING_SIZE).expect("queues");
        let bytes = queues * DEPTH * PIECE_BYTES;
        let memory = Guest::with_regions(&[(0, bytes as u64)], Backing::Memfd).expect("memory");
        let file = memory.file_of(0);
        let start = memory.user_address(0) as usize;
        transport.map_mem_region(start, bytes, file.as_raw_fd(), 0).expect("a region");
        let queue_of = |(index, mut queue): (usize, VirtioBlkQueue<'static, usize>)| {
            queue.set_used_notif_enabled(true);
            let completion = transport.get_completion_fd(index);
            let completions = Epoll::new().expect("an epoll descriptor");
            let event = EpollEvent::new(EventSet::IN, 0);
            completions.ctl(ControlOperation::Add, completion.as_raw_fd(), event).expect("epoll takes it");
            QueueOf { queue, notifier: transport.get_submission_notifier(index), completions, completion }
        };
        let queues = rings.into_iter().enumerate().map(queue_of).collect();
        DriverDisk { transport, queues, memory }
    }

    /// Guest address of a place.
    fn place(queue: usize, place: usize) -> u64 {
        ((queue * DEPTH + place) * PIECE_BYTES) as u64
    }

    /// Host address of a place.
    fn pointer(&self, queue: usize, place: usize) -> *mut u8 {
        let region = self.memory.memory.iter().next().expect("a region");
        region.get_host_address(MemoryRegionAddress(Self::place(queue, place))).expect("a place in the region")
    }

    fn submit_read(&mut self, queue: usize, place: usize, offset: usize, len: usize) {
        let buffer = self.pointer(queue, place);
        // SAFETY: a place of the mapped region, as long as the largest request, which no other request has meanwhile.
        let result = unsafe { self.queues[queue].queue.read_raw(offset as u64, buffer, len, place) };
        result.expect("room on the ring");
    }

    fn submit_write(&mut self, queue: usize, place: usize, offset: usize, bytes: &[u8]) {
        self.memory.write(Self::place(queue, place), bytes);
        let buffer = self.pointer(queue, place);
        // SAFETY: as above.
        let result = unsafe { self.queues[queue].queue.write_raw(offset as u64, buffer, bytes.len(), place) };
        result.expect("room on the ring");
    }

    /// Notifies the device and waits for so many completions: their places.
    #[track_caller]
    fn complete(&mut self, queue: usize, count: usize) -> Vec<usize> {
        let queue = &mut self.queues[queue];
        if queue.queue.avail_notif_needed() {
            queue.notifier.notify().expect("a kick");
        }
        let mut places = Vec::new();
        while places.len() < count {
            places.extend(queue.queue.completions().map(|completion| {
                assert_eq!(completion.ret, 0, "a request failed");
                completion.context
            }));
            if places.len() < count {
                let mut events = [EpollEvent::default()];
                let found = queue.completions.wait(PATIENCE.as_millis() as i32, &mut events).expect("a wait");
                assert!(found > 0, "a request never completes, or nobody is told");
                queue.completion.read().expect("a call");
            }
        }
        places
    }

    /// Reads the whole disk.
    #[track_caller]
    fn contents(&mut self) -> Vec<u8> {
        let config = self.transport.get_config().expect("the configuration");
        let bytes = u64::from(config.capacity) as usize * SECTOR;
        let mut contents = vec![0; bytes];
        for (number, start) in (0..bytes).step_by(DEPTH * PIECE_BYTES).enumerate() {
            let queue = number % self.queues.len();
            let pieces: Vec<_> = (start..bytes.min(start + DEPTH * PIECE_BYTES)).step_by(PIECE_BYTES).collect();
            for (place, at) in pieces.iter().enumerate() {
                self.submit_read(queue, place, *at, PIECE_BYTES.min(bytes - at));
            }
            self.complete(queue, pieces.len());
            for (place, at) in pieces.iter().enumerate() {
                let len = PIECE_BYTES.min(bytes - at);
                contents[*at..at + len].copy_from_slice(&self.memory.read(Self::place(queue, place), len));
            }
        }
        contents
    }

    /// Random reads and writes on all queues at once, each read compared with `model`.
    fn work(&mut self, model: &mut [u8], rng: &mut SmallRng) {
        let mut reads = HashMap::new();
        let mut taken: Vec<std::ops::Range<usize>> = Vec::new();
        let mut counts = Vec::new();
        for queue in 0..self.queues.len() {
            let mut count = 0;
            for place in 0..rng.random_range(1..=DEPTH) {
                let len = rng.random_range(1..=PIECE_BYTES / SECTOR) * SECTOR;
                let at = rng.random_range(0..=(model.len() - len) / SECTOR) * SECTOR;
                if taken.iter().any(|other| at < other.end && other.start < at + len) {
                    continue;
                }
                taken.push(at..at + len);
                if rng.random() {
                    rng.fill_bytes(&mut model[at..at + len]);
                    self.submit_write(queue, place, at, &model[at..at + len]);
                } else {
                    self.submit_read(queue, place, at, len);
                    reads.insert((queue, place), at..at + len);
                }
                count += 1;
            }
            counts.push(count);
        }
        for (queue, count) in counts.into_iter().enumerate() {
            for place in self.complete(queue, count) {
                if let Some(bytes) = reads.remove(&(queue, place)) {
                    let found = self.memory.read(Self::place(queue, place), bytes.len());
                    assert!(found == model[bytes.clone()], "what is read at byte {} is wrong", bytes.start);
                }
            }
        }
        assert!(reads.is_empty());
    }
}

#[test]
fn the_whole_disk_is_read() {
    let disk = Disk::new(DISK_BYTES + 3 * SECTOR);
    let backend = disk.serve_as(&["--read-only"]);
    let mut driver = DriverDisk::connect(&backend, VirtioFeatureFlags::VERSION_1, 1);
    assert!(driver.contents() == disk.contents);
}

#[test]
fn verified_work_on_one_queue_and_on_four() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let version_1 = VirtioFeatureFlags::VERSION_1;
    for (seed, (queues, features)) in [
        (1, version_1),
        (1, version_1 | VirtioFeatureFlags::RING_EVENT_IDX),
        (4, version_1),
        (4, VirtioFeatureFlags::all()),
    ]
    .into_iter()
    .enumerate()
    {
        eprintln!("{queues} queues, {features:?}, seed {seed}");
        let mut rng = SmallRng::seed_from_u64(seed as u64);
        let mut driver = DriverDisk::connect(&backend, features, queues);
        for _ in 0..25 {
            driver.work(&mut model, &mut rng);
        }
        // Zeroes and discards, and a flush behind them.
        let queue = &mut driver.queues[queues - 1].queue;
        queue.write_zeroes(512, 3 * 512, false, 0).expect("room on the ring");
        queue.discard(8192, 4096, 1).expect("room on the ring");
        queue.flush(2).expect("room on the ring");
        let mut done = driver.complete(queues - 1, 3);
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2]);
        model[512..2048].fill(0);
        model[8192..12288].fill(0);
        assert!(driver.contents() == model);
    }
}
