//! Bugs that other block backends were told of in public, each as a test that bears its name: what happened there must not happen here.
//!
//! Not all of them are here: spdk#3766 (a region for what is in flight starts at entry 0) is in `deaths`, and what of ubicloud#3972
//! takes a write in the middle of another is in `tests/volume/overlap.rs`.

use std::ops::Range;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use super::client::{Client, Profile};
use super::harness::{Disk, PATIENCE, SECTOR, image_bytes};
use super::lifecycle::contents;
use super::queue::{DISCARD, GET_ID, IN, IOERR, NO_STATUS, OK, OUT, Queue, WRITE_ZEROES, header, range_bytes};
use super::requests::{Chain, answer};

const QUEUES: usize = 4;
const DEPTH: usize = 32;
/// The feature bits of virtio-blk.
const DISCARD_FEATURE: u64 = 1 << 13;
const WRITE_ZEROES_FEATURE: u64 = 1 << 14;

fn profile() -> Profile {
    Profile { depth: DEPTH, ..Profile::qemu().queues(QUEUES) }
}

/// What a test writes to a sector.
fn new_bytes(sectors: &Range<usize>) -> Vec<u8> {
    sectors.clone().flat_map(|sector| image_bytes(SECTOR, 1000 + sector as u64)).collect()
}

/// Writes these ranges, as many at once as there is room for.
fn write_all(queue: &mut Queue, ranges: &[Range<usize>]) {
    for ranges in ranges.chunks(DEPTH) {
        for range in ranges {
            queue.submit(OUT, range.start as u64, &new_bytes(range), 0);
        }
        queue.ring.kick();
        for _ in ranges {
            assert_eq!(queue.wait(PATIENCE).expect("a write completes").1.status, OK);
        }
    }
}

/// cloud-hypervisor#8621: with a backing file and more than one queue, guests' file systems broke. Here all queues write pieces of the
/// same clusters at the same time, most of which only the image has until then, and every piece is there afterwards.
#[test]
fn cloud_hypervisor_8621_queues_that_meet_over_an_image_all_win() {
    const DISK_BYTES: usize = 4 << 20;
    for (cluster, size) in [(8, "4K"), (128, "64K")] {
        let disk = Disk::new(DISK_BYTES);
        let mut backend = disk.serve_with(&["--cluster-size", size]);
        let mut client = Client::start(&backend, &profile());
        let mut model = disk.contents.clone();
        let mut first: Vec<usize> = (0..DISK_BYTES / SECTOR).step_by(cluster).collect();
        first.shuffle(&mut SmallRng::seed_from_u64(cluster as u64));
        // A delta that has some of them already: it took a used one there.
        let held: Vec<Range<usize>> = first.iter().step_by(5).map(|first| *first..first + 1).collect();
        write_all(&mut client.queues[0], &held);
        // Without the first sector of a cluster, and without the last: there is something to fill up on both sides.
        let piece = (cluster - 2) / QUEUES;
        let piece_of = |queue: usize, first: usize| first + 1 + queue * piece..first + 1 + (queue + 1) * piece;
        let together = Barrier::new(QUEUES);
        std::thread::scope(|scope| {
            for (number, queue) in client.queues.iter_mut().enumerate() {
                let (first, together) = (&first, &together);
                scope.spawn(move || {
                    for some in first.chunks(4) {
                        let ranges: Vec<_> = some.iter().map(|first| piece_of(number, *first)).collect();
                        together.wait();
                        write_all(queue, &ranges);
                    }
                });
            }
        });
        let pieces = first.iter().flat_map(|first| (0..QUEUES).map(|queue| piece_of(queue, *first)));
        for range in held.iter().cloned().chain(pieces) {
            model[range.start * SECTOR..range.end * SECTOR].copy_from_slice(&new_bytes(&range));
        }
        for at in (0..DISK_BYTES).step_by(64 << 10) {
            let found = client.queues[1].read((at / SECTOR) as u64, 64 << 10);
            assert!(found == model[at..at + (64 << 10)], "clusters of {size}: near byte {at}");
        }
        drop(client);
        backend.stop();
        assert!(contents(&disk) == model, "clusters of {size}: the files do not hold what was written");
    }
}

/// ubicloud#3972: a read over parts that had been fetched and parts that had not was answered from the image alone. Here reads go over many
/// clusters, of the image and of the delta, while one after another changes sides.
#[test]
fn ubicloud_3972_a_read_over_image_and_delta_has_each_from_its_own() {
    const CLUSTER: usize = 8;
    const CLUSTERS: usize = 512;
    /// What is written of each cluster.
    const WRITTEN: Range<usize> = 2..6;
    let disk = Disk::new(CLUSTERS * CLUSTER * SECTOR);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &profile());
    let flags = || Vec::from_iter((0..CLUSTERS).map(|_| AtomicBool::new(false)));
    let (begun, done, ended) = (flags(), flags(), AtomicBool::new(false));
    let mut order = Vec::from_iter(0..CLUSTERS);
    order.shuffle(&mut SmallRng::seed_from_u64(1));
    let (writer, readers) = client.queues.split_first_mut().expect("there are queues");
    std::thread::scope(|scope| {
        let (begun, done, ended) = (&begun, &done, &ended);
        scope.spawn(move || {
            for cluster in order {
                let range = cluster * CLUSTER + WRITTEN.start..cluster * CLUSTER + WRITTEN.end;
                begun[cluster].store(true, Ordering::SeqCst);
                writer.write(range.start as u64, &new_bytes(&range));
                done[cluster].store(true, Ordering::SeqCst);
            }
            ended.store(true, Ordering::SeqCst);
        });
        for (number, reader) in readers.iter_mut().enumerate() {
            let contents = &disk.contents;
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(number as u64);
                let mut is_last = false;
                while !is_last {
                    // Once more when all is written.
                    is_last = ended.load(Ordering::SeqCst);
                    let len = rng.random_range(1..=16 * CLUSTER);
                    let first = rng.random_range(0..=CLUSTERS * CLUSTER - len);
                    let clusters = first / CLUSTER..(first + len).div_ceil(CLUSTER);
                    let look = |flags: &[AtomicBool]| -> Vec<bool> {
                        flags[clusters.clone()].iter().map(|flag| flag.load(Ordering::SeqCst)).collect()
                    };
                    let was_done = look(done);
                    let found = reader.read(first as u64, len * SECTOR);
                    let was_begun = look(begun);
                    for (sector, found) in (first..).zip(found.chunks(SECTOR)) {
                        let index = sector / CLUSTER - clusters.start;
                        let is_written = WRITTEN.contains(&(sector % CLUSTER));
                        let is_old = found == &contents[sector * SECTOR..][..SECTOR];
                        let is_new = is_written && found == new_bytes(&(sector..sector + 1));
                        let may_be_old = !is_written || !was_done[index];
                        let may_be_new = is_written && was_begun[index];
                        assert!(
                            is_old && may_be_old || is_new && may_be_new,
                            "sector {sector} in a read of {len} from {first}: as in the image: {is_old}, as written: {is_new}"
                        );
                    }
                }
            });
        }
    });
}

/// openvmm#4046, cloud-hypervisor#7873 and #8388: requests behind the disk's end were carried out, or their sector times 512 was too large for a
/// number. Here they fail, and neither the disk nor the guest's buffer is touched.
#[test]
fn openvmm_4046_requests_behind_the_end_touch_nothing() {
    const DISK_BYTES: usize = 1 << 20;
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &Profile::qemu());
    let queue = &mut client.queues[0];
    let end = (DISK_BYTES / SECTOR) as u64;
    // 2^55 sectors have 2^64 bytes: what lies there is where the disk starts, to whoever does not look.
    for sector in [end - 7, end, 1 << 40, (1 << 55) - 8, 1 << 55, (1 << 55) + 8, 1 << 63, u64::MAX - 7, u64::MAX] {
        let chain = Chain::new(queue).reads(&header(IN, sector)).writes(4096).writes(1);
        let untouched = [vec![NO_STATUS; 4096], vec![IOERR]].concat();
        assert_eq!(chain.execute(queue), (1, untouched), "read at {sector}");
        assert_eq!(answer(queue, OUT, sector, &[1; 4096], 0), (IOERR, 1), "write at {sector}");
        for sectors in [8, u32::MAX] {
            let range = range_bytes(&[(sector, sectors, 0)]);
            assert_eq!(answer(queue, DISCARD, 0, &range, 0), (IOERR, 1), "discard at {sector}");
            assert_eq!(answer(queue, WRITE_ZEROES, 0, &range, 0), (IOERR, 1), "zeroes at {sector}");
        }
    }
    for at in (0..DISK_BYTES).step_by(64 << 10) {
        assert!(queue.read((at / SECTOR) as u64, 64 << 10) == disk.contents[at..][..64 << 10]);
    }
}

/// Several wrote the serial number to wherever the second descriptor pointed, or took for granted that 20 bytes of it were there (ubiblk#56),
/// or refused it on a read-only disk (cloud-hypervisor#7546). Here as much is written as there is room for.
#[test]
fn get_id_without_a_buffer_or_with_a_short_one_is_answered() {
    let disk = Disk::new(1 << 20);
    for arguments in [&["--serial", "abcdefghijklmnopqrst"][..], &["--serial", "abcdefghijklmnopqrst", "--read-only"]] {
        let backend =
            if arguments.contains(&"--read-only") { disk.serve_as(arguments) } else { disk.serve_with(arguments) };
        let mut client = Client::start(&backend, &Profile::qemu());
        let queue = &mut client.queues[0];
        let get_id = header(GET_ID, 0);
        assert_eq!(Chain::new(queue).reads(&get_id).execute(queue), (0, vec![]));
        assert_eq!(Chain::new(queue).reads(&get_id).writes(1).execute(queue), (1, vec![IOERR]));
        assert_eq!(Chain::new(queue).reads(&get_id).writes(0).writes(1).execute(queue), (1, vec![IOERR]));
        // A buffer that the device may not write to is none.
        assert_eq!(Chain::new(queue).reads(&get_id).reads(&[0; 20]).writes(1).execute(queue), (1, vec![IOERR]));
        for room in [1, 19, 20] {
            let expected = [&b"abcdefghijklmnopqrst"[..room], &[OK]].concat();
            let chain = Chain::new(queue).reads(&get_id).writes(room).writes(1);
            assert_eq!(chain.execute(queue), (room as u32 + 1, expected));
        }
        // In pieces, and more room than there is serial number.
        let chain = Chain::new(queue).reads(&get_id).writes(3).writes(0).writes(30).writes(1);
        let expected = [&b"abcdefghijklmnopqrst"[..], &[NO_STATUS; 13], &[OK]].concat();
        assert_eq!(chain.execute(queue), (21, expected));
    }
}

/// spdk#2330, kvm-guest-drivers-windows#578: Windows sends requests of 129 segments to a disk that was said to take 126, and found it
/// unusable. Here they are served, in a chain and in an indirect table.
#[test]
fn spdk_2330_windows_129_segments_are_served() {
    let disk = Disk::new(1 << 20);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &Profile { ring_size: 256, ..Profile::qemu() });
    let queue = &mut client.queues[0];
    for (segments, indirect) in [(129, false), (130, false), (254, false), (129, true), (512, true)] {
        let new = image_bytes(segments * SECTOR, segments as u64);
        let execute = |chain: Chain, queue: &mut Queue| match indirect {
            true => chain.execute_indirect(queue),
            false => chain.execute(queue),
        };
        let write = Chain::new(queue).reads(&header(OUT, 100));
        let write = new.chunks(SECTOR).fold(write, |chain, segment| chain.reads(segment)).writes(1);
        assert_eq!(execute(write, queue), (1, vec![OK]), "writing {segments} segments");
        let read = Chain::new(queue).reads(&header(IN, 100));
        let read = (0..segments).fold(read, |chain, _| chain.writes(SECTOR)).writes(1);
        let (len, found) = execute(read, queue);
        assert_eq!((len as usize, found[new.len()]), (new.len() + 1, OK), "reading {segments} segments");
        assert!(found[..new.len()] == new);
    }
}

/// cloud-hypervisor#7849: a disk that offered discards with all limits 0 cost Windows a blue screen. Here whoever offers them says how much,
/// whatever the front end takes and the driver knows; and a driver that takes 0 for a limit, or sends nothing in earnest, gets an answer.
#[test]
fn cloud_hypervisor_7849_limits_of_discards_are_not_zero() {
    let disk = Disk::new(1 << 20);
    let limits = |client: &mut Client| {
        let answer = client.front_end.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]);
        let (_, space) = answer.expect("GET_CONFIG");
        let field = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().expect("four bytes"));
        // Sectors, ranges and alignment of discards; sectors and ranges of write-zeroes.
        ([field(36), field(40), field(44)], [field(48), field(52)])
    };
    let blank = disk.path("blank");
    let blank = ["--blank", "--delta", super::harness::text(&blank), "--create", "--size", "1M"];
    let volumes: [(&str, &dyn Fn() -> super::harness::Backend); 4] = [
        ("cow", &|| disk.serve()),
        ("ephemeral", &|| disk.serve_as(&["--ephemeral"])),
        ("read-only", &|| disk.serve_as(&["--read-only"])),
        ("blank", &|| {
            let socket = disk.path("blank.sock");
            let mut arguments = vec!["--socket-path", super::harness::text(&socket)];
            arguments.extend(blank);
            let mut backend = super::harness::Backend::start(&arguments, &socket);
            backend.wait_until_ready();
            backend
        }),
    ];
    for (kind, serve) in volumes {
        for features in [u64::MAX, !(DISCARD_FEATURE | WRITE_ZEROES_FEATURE)] {
            let backend = serve();
            let mut client = Client::start(&backend, &Profile { features, ..Profile::qemu() });
            let (discards, zeroes) = limits(&mut client);
            let offers = |feature| client.offered & feature != 0;
            assert_eq!(offers(DISCARD_FEATURE), kind != "read-only");
            assert!(!offers(DISCARD_FEATURE) || discards.iter().all(|limit| *limit > 0), "{kind}: {discards:?}");
            assert!(!offers(WRITE_ZEROES_FEATURE) || zeroes.iter().all(|limit| *limit > 0), "{kind}: {zeroes:?}");
            let queue = &mut client.queues[0];
            let status = if kind == "read-only" { IOERR } else { OK };
            for kind in [DISCARD, WRITE_ZEROES] {
                assert_eq!(answer(queue, kind, 0, &[], 0), (IOERR, 1), "no range");
                assert_eq!(answer(queue, kind, 0, &range_bytes(&[(8, 0, 0)]), 0), (status, 1), "no sectors");
                assert_eq!(answer(queue, kind, 0, &range_bytes(&[(8, 0, 0), (16, 0, 0)]), 0), (status, 1));
            }
            let expected = if kind == "blank" { vec![0; 16 << 10] } else { disk.contents[..16 << 10].to_vec() };
            assert!(queue.read(0, 16 << 10) == expected, "{kind}: nothing was zeroed");
        }
    }
}
