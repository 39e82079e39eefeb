//! Front ends of all manners: every order of set-up, every feature set, every kind of memory.

use std::path::Path;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures as Protocol};

use super::client::{self, Client, Profile, Step, When};
use super::guest::{Backing, Guest, HUGE_PAGE};
use super::harness::{Backend, Disk, PATIENCE, SECTOR};
use super::queue::{IN, OK};

const DISK_BYTES: usize = 1 << 20;

#[track_caller]
fn work(client: &mut Client, model: &mut [u8], batches: usize) {
    let mut rng = SmallRng::seed_from_u64(batches as u64);
    let share = model.len() / SECTOR / client.queues.len();
    for (index, queue) in client.queues.iter_mut().enumerate() {
        queue.work(model, index * share..(index + 1) * share, &mut rng, batches);
    }
}

/// All orders of some steps.
fn orders(steps: &[Step]) -> Vec<Vec<Step>> {
    let Some((last, rest)) = steps.split_last() else { return vec![Vec::new()] };
    let with_last = |order: Vec<Step>| (0..=order.len()).map(move |at| [&order[..at], &[*last], &order[at..]].concat());
    orders(rest).into_iter().flat_map(with_last).collect()
}

#[test]
fn every_order_of_a_rings_setup_works() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let orders = orders(&[Step::Num, Step::Addr, Step::Base, Step::Call, Step::Kick]);
    assert_eq!(orders.len(), 120);
    for (number, steps) in orders.into_iter().enumerate() {
        // All four combinations come round, and every 16-bit index wraps in each session.
        let enable = if number % 2 == 0 { When::First } else { When::Last };
        let memory = if number % 4 < 2 { When::First } else { When::Last };
        let profile = Profile {
            steps,
            enable,
            memory,
            start: 65_530,
            ring_size: 64,
            need_reply: number % 3 == 0,
            slots: number % 5 == 0,
            ..Profile::qemu()
        };
        eprintln!("order {number}: {:?}, enabled {enable:?}, memory {memory:?}", profile.steps);
        let mut client = Client::start(&backend, &profile);
        work(&mut client, &mut model, 2);
    }
}

#[test]
fn requests_that_wait_before_any_order_of_setup_are_served_once() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let orders = orders(&[Step::Num, Step::Addr, Step::Base, Step::Call, Step::Kick]);
    for (number, steps) in orders.into_iter().enumerate() {
        // The entries before these were served by another backend; they name what is no request by now.
        let start = 5;
        let profile = Profile { steps, start, enable: When::First, ..Profile::qemu() };
        eprintln!("order {number}: {:?}", profile.steps);
        let mut client = Client::negotiate(backend.connect(), &profile, Guest::new());
        let queue = &mut client.queues[0];
        let heads: Vec<u16> = (0..3).map(|sector| queue.submit(IN, sector, &[], SECTOR)).collect();
        queue.ring.kick_anyway();
        client.tell_memory();
        client.enable(0, true);
        client.set_up(0, start);
        for (sector, head) in heads.into_iter().enumerate() {
            let (done, completed) = client.queues[0].wait(PATIENCE).expect("the request is served");
            assert_eq!((done, completed.status), (head, OK));
            assert!(completed.data == disk.contents[sector * SECTOR..][..SECTOR]);
        }
        assert_eq!((client.base(0), client.queues[0].ring.used_index()), (start + 3, start + 3));
    }
}

/// Set-ups as VMMs do them.
fn vmms() -> Vec<(&'static str, Profile)> {
    use Step::{Addr, Base, Call, Err, Kick, Num};
    let all = Protocol::all();
    let qemu_7 = Profile {
        slots: true,
        steps: vec![Call, Num, Base, Addr, Kick, Call, Err],
        protocol: all - Protocol::DEVICE_STATE,
        enable: When::First,
        queues: 4,
        ..Profile::qemu()
    };
    // Does not take the bit of the protocol features, though it uses them, and says nothing of enabling.
    let qemu_older = Profile {
        features: !client::PROTOCOL_FEATURES,
        protocol: all - Protocol::DEVICE_STATE - Protocol::CONFIGURE_MEM_SLOTS,
        slots: false,
        enable: When::Never,
        ..Profile::qemu()
    };
    let cloud_hypervisor = Profile {
        protocol: Protocol::CONFIG
            | Protocol::MQ
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::REPLY_ACK
            | Protocol::INFLIGHT_SHMFD
            | Protocol::LOG_SHMFD
            | Protocol::DEVICE_STATE,
        need_reply: true,
        slots: false,
        steps: vec![Num, Addr, Base, Call, Kick],
        enable: When::Last,
        queues: 2,
        ..Profile::qemu()
    };
    let firecracker = Profile {
        features: client::VERSION_1 | client::PROTOCOL_FEATURES | client::BLK_FLUSH | client::RO,
        protocol: Protocol::CONFIG,
        slots: false,
        steps: vec![Num, Addr, Base, Call, Kick],
        enable: When::Last,
        ring_size: 256,
        ..Profile::qemu()
    };
    let crosvm = Profile {
        protocol: Protocol::CONFIG
            | Protocol::MQ
            | Protocol::BACKEND_REQ
            | Protocol::DEVICE_STATE
            | Protocol::REPLY_ACK,
        slots: false,
        steps: vec![Num, Addr, Base, Call, Kick],
        ring_size: 1024,
        queues: 16,
        depth: 4,
        ..Profile::qemu()
    };
    let ovmf = Profile {
        features: client::PROTOCOL_FEATURES | client::BLK_SIZE | client::TOPOLOGY | client::BLK_FLUSH,
        ring_size: 16,
        depth: 4,
        ..Profile::qemu()
    };
    let legacy = Profile { features: 0, ring_size: 2, depth: 1, enable: When::Never, ..ovmf.clone() };
    let legacy = Profile { ring_size: 4, ..legacy };
    vec![
        ("QEMU 10", Profile::qemu()),
        ("QEMU 7.2", qemu_7),
        ("QEMU before 7.2", qemu_older),
        ("cloud-hypervisor", cloud_hypervisor),
        ("Firecracker", firecracker),
        ("crosvm", crosvm),
        ("OVMF in QEMU", ovmf),
        ("a driver of virtio 0.9 in an old front end", legacy),
    ]
}

#[test]
fn every_vmm_is_served() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    for (name, profile) in vmms() {
        eprintln!("{name}");
        let mut client = Client::start(&backend, &profile);
        work(&mut client, &mut model, 8);
        // Stops as it does to pause, and goes on where it was.
        let bases: Vec<u16> = (0..client.queues.len()).map(|index| client.base(index)).collect();
        for (index, base) in bases.into_iter().enumerate() {
            let ring = &client.queues[index].ring;
            assert_eq!((base, ring.used_index()), (ring.next_available, ring.next_available), "ring {index}");
            client.set_up(index, base);
        }
        work(&mut client, &mut model, 4);
    }
}

#[test]
fn features_are_what_the_front_ends_page_says() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut client = Client::negotiate(backend.connect(), &Profile::qemu(), Guest::new());
    let always = client::VERSION_1
        | client::EVENT_IDX
        | client::INDIRECT_DESC
        | client::BLK_FLUSH
        | client::CONFIG_WCE
        | client::BLK_SIZE
        | client::TOPOLOGY
        | client::SEG_MAX
        | client::SIZE_MAX
        | client::BLK_MQ
        | client::LOG_ALL
        | client::PROTOCOL_FEATURES;
    assert_eq!(client.offered, always | client::BLK_DISCARD | client::BLK_WRITE_ZEROES);
    let protocol = client.front_end.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
    let expected = Protocol::MQ
        | Protocol::CONFIG
        | Protocol::REPLY_ACK
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::BACKEND_REQ
        | Protocol::RESET_DEVICE;
    assert!(protocol.contains(expected), "{protocol:?}");
    drop(client);
    drop(backend);
    let backend = disk.serve_as(&["--read-only"]);
    let client = Client::negotiate(backend.connect(), &Profile::qemu(), Guest::new());
    assert_eq!(client.offered, always | client::RO);
}

/// Asks for a part of the configuration space.
#[track_caller]
fn config(client: &mut Client, offset: u32, size: usize) -> Vec<u8> {
    let asked = client.front_end.get_config(offset, size as u32, VhostUserConfigFlags::empty(), &vec![0; size]);
    asked.unwrap_or_else(|error| panic!("GET_CONFIG of {size} bytes at {offset}: {error}")).1
}

#[test]
fn the_configuration_space_can_be_read_in_any_parts() {
    let disk = Disk::new(DISK_BYTES + 3 * SECTOR);
    let backend = disk.serve_with(&["--queues", "5"]);
    let mut client = Client::negotiate(backend.connect(), &Profile::qemu(), Guest::new());
    let all = config(&mut client, 0, 256);
    let field =
        |at: usize, len: usize| all[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
    assert_eq!(field(0, 8), 2048 + 3, "capacity");
    assert!(field(8, 4) > 0, "size_max");
    assert!(field(12, 4) >= 126, "seg_max");
    assert_eq!(field(20, 4), 512, "blk_size");
    assert_eq!((field(24, 1), field(25, 1)), (3, 0), "physical_block_exp, alignment_offset");
    assert_eq!(field(32, 1), 1, "writeback");
    assert_eq!(field(34, 2), 5, "num_queues");
    assert!((36..56).step_by(4).all(|at| field(at, 4) > 0), "limits of discard and write-zeroes");
    assert_eq!(field(44, 4), 8, "discard_sector_alignment");
    assert_eq!(field(56, 1), 1, "write_zeroes_may_unmap");
    assert!(all[57..].iter().all(|byte| *byte == 0));
    // The sizes that versions of QEMU ask for, what Firecracker asks for, and what nobody does.
    for size in [8, 36, 48, 57, 60, 96, 256] {
        assert_eq!(config(&mut client, 0, size), all[..size]);
        if size <= 60 {
            assert_eq!(config(&mut client, 0x100, size), all[..size], "the offset of older cloud-hypervisor");
        }
    }
    for (offset, size) in [(0, 1), (8, 4), (32, 1), (33, 60), (59, 1), (60, 1), (61, 100), (255, 1)] {
        assert_eq!(config(&mut client, offset, size), all[offset as usize..][..size]);
    }
    // The largest that fits into a message.
    assert!(config(&mut client, 300, 3000).iter().all(|byte| *byte == 0));
    assert_eq!(client.front_end.get_queue_num().expect("GET_QUEUE_NUM"), 5);
}

#[test]
fn four_queues_work_at_once() {
    let disk = Disk::new(4 * DISK_BYTES);
    let backend = disk.serve();
    let mut client = Client::start(&backend, &Profile::qemu().queues(4));
    let share = disk.contents.len() / 4;
    let mut shares: Vec<Vec<u8>> = disk.contents.chunks(share).map(<[u8]>::to_vec).collect();
    std::thread::scope(|scope| {
        for (index, (queue, share_bytes)) in client.queues.iter_mut().zip(&mut shares).enumerate() {
            scope.spawn(move || {
                // A model of the whole disk of which only a share is used.
                let mut model = vec![0; 4 * share];
                model[index * share..][..share].copy_from_slice(share_bytes);
                let sectors = index * share / SECTOR..(index + 1) * share / SECTOR;
                queue.work(&mut model, sectors, &mut SmallRng::seed_from_u64(index as u64), 40);
                share_bytes.copy_from_slice(&model[index * share..][..share]);
            });
        }
    });
    // What one queue wrote, another reads.
    let model = shares.concat();
    for (at, expected) in model.chunks(64 << 10).enumerate() {
        assert!(client.queues[(at + 1) % 4].read((at * 128) as u64, 64 << 10) == expected);
    }
}

#[test]
fn rings_can_run_in_part() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    // The last of the offered rings alone.
    let profile = Profile { queues: 16, depth: 2, ..Profile::qemu() };
    let mut client = Client::negotiate(backend.connect(), &profile, Guest::new());
    client.tell_memory();
    client.set_up(15, 0);
    client.enable(15, true);
    client.queues[15].work(&mut model, 0..2048, &mut SmallRng::seed_from_u64(15), 4);
    // A ring that is kicked and not enabled is not served, until it is.
    client.set_up(3, 0);
    client.settle();
    client.queues[3].submit(IN, 0, &[], 512);
    client.queues[3].ring.kick_anyway();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(client.queues[3].ring.used_index(), 0, "a ring is served that was never enabled");
    client.enable(3, true);
    let (_, completed) = client.queues[3].wait(PATIENCE).expect("the request is served at last");
    assert!(completed.data == model[..512]);
}

fn check_memory(backend: &Backend, model: &mut [u8], guest: Guest) {
    let mut client = Client::start_on(backend.connect(), &Profile::qemu(), guest);
    work(&mut client, model, 20);
}

#[test]
fn guest_memory_may_lie_in_files() {
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let directory = disk.path("");
    // Two regions of one file; the second begins in the middle of it, and neither length is a multiple of much.
    for regions in [&[(0, 8 << 20)][..], &[(0, (8 << 20) + 4096), (1 << 30, 12288)]] {
        for backing in [Backing::File(&directory), Backing::File(Path::new("/dev/shm")), Backing::Memfd] {
            check_memory(&backend, &mut model, Guest::with_regions(regions, backing).expect("guest memory"));
        }
    }
}

#[test]
fn guest_memory_may_lie_on_huge_pages() {
    let _pages = match HugePages::reserve(16) {
        Ok(pages) => pages,
        Err(reason) => {
            eprintln!("SKIPPED: guest memory on hugetlbfs: {reason}");
            return;
        }
    };
    let disk = Disk::new(DISK_BYTES);
    let backend = disk.serve();
    let mut model = disk.contents.clone();
    let regions = [(0, 4 * HUGE_PAGE), (1 << 30, HUGE_PAGE)];
    match Guest::with_regions(&regions, Backing::Huge) {
        Ok(guest) => check_memory(&backend, &mut model, guest),
        Err(error) => eprintln!("SKIPPED: guest memory on hugetlbfs: {error}"),
    }
    // A region that is a part of a page, as a front end has it that splits its memory around a hole.
    match Guest::with_regions(&[(0, 4 * HUGE_PAGE)], Backing::Huge) {
        Ok(guest) => {
            let mut client = Client::negotiate(backend.connect(), &Profile::qemu(), guest);
            let whole = client.guest.regions()[0];
            let cut = HUGE_PAGE + 4096;
            let first = vhost::VhostUserMemoryRegionInfo { memory_size: cut, ..whole };
            let second = vhost::VhostUserMemoryRegionInfo {
                guest_phys_addr: whole.guest_phys_addr + cut,
                memory_size: whole.memory_size - cut,
                userspace_addr: whole.userspace_addr + cut,
                mmap_offset: whole.mmap_offset + cut,
                ..whole
            };
            client.front_end.add_mem_region(&first).expect("ADD_MEM_REG");
            client.front_end.add_mem_region(&second).expect("ADD_MEM_REG");
            client.set_up(0, 0);
            client.enable(0, true);
            work(&mut client, &mut model, 10);
        }
        Err(error) => eprintln!("SKIPPED: guest memory on a part of hugetlbfs's page: {error}"),
    }
}

/// Pages of hugetlbfs that the machine has been asked to set aside, given back when dropped.
struct HugePages {
    before: String,
}

impl HugePages {
    const COUNT: &str = "/proc/sys/vm/nr_hugepages";

    fn reserve(count: u64) -> Result<HugePages, String> {
        let read = || std::fs::read_to_string(Self::COUNT).map_err(|error| format!("{}: {error}", Self::COUNT));
        let before = read()?;
        let had: u64 = before.trim().parse().map_err(|error| format!("{}: {error}", Self::COUNT))?;
        let pages = HugePages { before };
        std::fs::write(Self::COUNT, (had + count).to_string())
            .map_err(|error| format!("{} cannot be raised (root can): {error}", Self::COUNT))?;
        let has = read()?;
        if has.trim() != (had + count).to_string() {
            return Err(format!("the machine has no {count} pages of 2 MiB to set aside, only {}", has.trim()));
        }
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // The next boot gives them back in any case.
        let _ = std::fs::write(Self::COUNT, &self.before);
    }
}
