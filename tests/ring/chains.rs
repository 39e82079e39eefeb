//! Chains of descriptors: the same heads, the same buffers in the same order, the same used rings.

use pando::vhost_user::ring::{CHAIN_DESCRIPTORS_MAX, Chain, Ring};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::guest::{BUFFERS, Guest, INDIRECT, NEXT, TABLES, WRITE, each_seed};

/// Writes random valid chains.
pub struct Driver {
    /// Descriptors of the ring that no chain uses, in random order.
    free: Vec<u16>,
    /// Descriptors of each chain, the first of which is its head.
    held: Vec<Vec<u16>>,
    /// Where the next indirect table may lie. Not aligned: the specification asks for none.
    table: u64,
}

impl Driver {
    pub fn new(size: u16, random: &mut StdRng) -> Driver {
        let mut free: Vec<u16> = (0..size).collect();
        free.shuffle(random);
        Driver { free, held: Vec::new(), table: TABLES.start + random.random_range(0..16) }
    }

    /// Offers a chain, when there are descriptors left for one.
    pub fn offer(&mut self, guest: &mut Guest, random: &mut StdRng) -> bool {
        if self.free.is_empty() {
            return false;
        }
        let table_room = (TABLES.end - self.table) / 16;
        let direct = random.random_range(1..=self.free.len().min(6));
        let held = self.free.split_off(self.free.len() - direct);
        let indirect = match random.random_range(0..100) {
            0..50 => 0,
            50..98 => random.random_range(1..=40),
            _ => random.random_range(1..=CHAIN_DESCRIPTORS_MAX),
        };
        let indirect = if indirect as u64 + 8 > table_room { 0 } else { indirect };
        // The last descriptor in the ring stands for the table, if there is one.
        let buffers = direct - usize::from(indirect > 0) + indirect;
        let readable = random.random_range(0..=buffers);
        let buffers: Vec<_> = (0..buffers).map(|index| random_buffer(random, index >= readable)).collect();
        let mut buffers = buffers.into_iter();
        let last = held.len() - 1;
        for (index, place) in held.iter().enumerate() {
            if index == last && indirect > 0 {
                // The specification has the device ignore the write flag here.
                let flags = INDIRECT | if random.random() { WRITE } else { 0 };
                let entries = self.write_table(guest, indirect, &mut buffers, random);
                guest.set_descriptor(*place, Descriptor::new(self.table, entries * 16, flags, random.random()));
                self.table += u64::from(entries) * 16;
            } else {
                let (address, len, flags) = buffers.next().unwrap();
                let (flags, next) =
                    if index == last { (flags, random.random()) } else { (flags | NEXT, held[index + 1]) };
                guest.set_descriptor(*place, Descriptor::new(address, len, flags, next));
            }
        }
        guest.offer(held[0]);
        self.held.push(held);
        true
    }

    /// Writes an indirect table of `used` descriptors in random order, and some that no chain reaches; says how many there are.
    fn write_table(
        &self,
        guest: &Guest,
        used: usize,
        buffers: &mut impl Iterator<Item = (u64, u32, u16)>,
        random: &mut StdRng,
    ) -> u32 {
        let entries = used as u16 + random.random_range(0..8);
        // A table is entered at its first descriptor; from there on it goes in any order.
        let mut order: Vec<u16> = (1..entries).collect();
        order.shuffle(random);
        order.insert(0, 0);
        for (index, place) in order.iter().enumerate() {
            let unreachable = (random.random(), random.random(), random.random());
            let (address, len, flags) = if index < used { buffers.next().unwrap() } else { unreachable };
            let (flags, next) =
                if index + 1 < used { (flags | NEXT, order[index + 1]) } else { (flags, random.random()) };
            guest.write_table(self.table, *place, Descriptor::new(address, len, flags, next));
        }
        entries.into()
    }

    /// Takes back the descriptors of the chain that starts at `head`.
    pub fn completed(&mut self, head: u16) {
        let index = self.held.iter().position(|held| held[0] == head).unwrap();
        self.free.extend(self.held.swap_remove(index));
        if self.held.is_empty() {
            self.table = TABLES.start;
        }
    }
}

/// A buffer of any length, also none, and whether the device may write it.
fn random_buffer(random: &mut StdRng, writable: bool) -> (u64, u32, u16) {
    let range = BUFFERS[random.random_range(0..BUFFERS.len())].clone();
    let len: u64 = match random.random_range(0..8) {
        0 => 0,
        1 => 1,
        2 => 16,
        3 => random.random_range(1..70_000),
        _ => 512 * random.random_range(1..16),
    };
    let address = random.random_range(range.start..=range.end - len);
    (address, len as u32, if writable { WRITE } else { 0 })
}

/// Takes all that waits from both sides and sees that it is the same; gives the heads.
pub fn take_all(guest: &Guest, ring: &mut Ring, queue: &mut Queue) -> Vec<u16> {
    let mut heads = Vec::new();
    let expected: Vec<(u16, Vec<Descriptor>)> =
        queue.iter(&guest.mmap).unwrap().map(|chain| (chain.head_index(), chain.collect())).collect();
    assert_eq!(usize::from(ring.waiting().unwrap()), expected.len());
    let mut chain = Chain::default();
    for (head, descriptors) in expected {
        assert_eq!(ring.take(), Ok(head));
        ring.chain(head, &guest.memory, &mut chain).unwrap();
        guest.check_buffers(&chain, &descriptors);
        heads.push(head);
    }
    assert_eq!(ring.next_available(), queue.next_avail());
    heads
}

/// Completes requests on both sides; says whether each wants to notify the driver.
pub fn complete_all(
    guest: &Guest,
    ring: &mut Ring,
    queue: &mut Queue,
    heads: &[u16],
    random: &mut StdRng,
) -> [bool; 2] {
    let before = guest.used();
    for head in heads {
        let len = random.random();
        ring.complete(*head, len);
        queue.add_used(&guest.mmap, *head, len).unwrap();
    }
    assert_eq!(guest.used(), before, "a completion that is not published is not seen");
    let notifications = [ring.publish(), queue.needs_notification(&guest.mmap).unwrap()];
    let [ours, reference] = guest.used_rings();
    assert!(ours == reference, "the used rings differ");
    assert_eq!(guest.used(), queue.next_used());
    notifications
}

#[test]
fn every_valid_chain_is_read_as_the_reference_reads_it() {
    for exponent in 0..=15u16 {
        let size = 1 << exponent;
        println!("size {size}");
        each_seed(3, |random| {
            let mut guest = Guest::new(size, random.random(), random.random());
            let (mut ring, mut queue) = (guest.ring(), guest.queue());
            let mut driver = Driver::new(size, random);
            let mut running = Vec::new();
            for _ in 0..12 {
                let count = random.random_range(1..60);
                (0..count).take_while(|_| driver.offer(&mut guest, random)).count();
                running.extend(take_all(&guest, &mut ring, &mut queue));
                // Some of them, in any order.
                running.shuffle(random);
                let heads = running.split_off(random.random_range(0..=running.len()));
                complete_all(&guest, &mut ring, &mut queue, &heads, random);
                heads.into_iter().for_each(|head| driver.completed(head));
            }
        });
    }
}

#[test]
fn a_chain_may_take_the_whole_ring() {
    let random = &mut StdRng::seed_from_u64(1);
    for exponent in 0..=15u16 {
        let size = 1 << exponent;
        let mut guest = Guest::new(size, true, 0);
        let (mut ring, mut queue) = (guest.ring(), guest.queue());
        for index in 0..size {
            let flags = if index + 1 < size { NEXT } else { WRITE };
            let address = random.random_range(BUFFERS[0].clone());
            guest.set_descriptor(index, Descriptor::new(address, 1, flags, index + 1));
        }
        guest.offer(0);
        assert_eq!(take_all(&guest, &mut ring, &mut queue), [0]);
    }
}

#[test]
fn a_ring_of_requests_may_wait() {
    let random = &mut StdRng::seed_from_u64(1);
    for exponent in 0..=15u16 {
        let size = 1 << exponent;
        let mut guest = Guest::new(size, true, u16::MAX - size / 2);
        let (mut ring, mut queue) = (guest.ring(), guest.queue());
        for head in (0..size).rev() {
            guest.set_descriptor(head, Descriptor::new(BUFFERS[0].start + u64::from(head), 1, WRITE, 0));
            guest.offer(head);
        }
        let heads = take_all(&guest, &mut ring, &mut queue);
        assert_eq!(heads, (0..size).rev().collect::<Vec<_>>());
        complete_all(&guest, &mut ring, &mut queue, &heads, random);
    }
}
