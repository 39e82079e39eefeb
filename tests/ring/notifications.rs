//! Who wakes whom: both ways of saying it, over indexes that wrap, with rings of every size.
//!
//! Where we differ from the reference, on purpose:
//!
//! - the first completions after a start are always notified, because nobody knows what the last device has told;
//! - without event indexes, the driver's "no interrupts" flag is honoured, which the reference does not support.

use rand::RngExt;
use virtio_queue::QueueT;
use virtio_queue::desc::split::Descriptor;

use super::chains::{complete_all, take_all};
use super::guest::{BUFFERS, Guest, WRITE, each_seed};

/// Offers `count` requests, takes and completes them on both sides, and gives what both decide.
struct Pair {
    guest: Guest,
    ring: pando::vhost_user::ring::Ring,
    queue: virtio_queue::Queue,
}

impl Pair {
    fn new(size: u16, event_idx: bool, index: u16) -> Pair {
        let guest = Guest::new(size, event_idx, index);
        for head in 0..size {
            guest.set_descriptor(head, Descriptor::new(BUFFERS[0].start, 1, WRITE, 0));
        }
        let (ring, queue) = (guest.ring(), guest.queue());
        Pair { guest, ring, queue }
    }

    fn serve(&mut self, count: u16, random: &mut rand::rngs::StdRng) -> [bool; 2] {
        for head in 0..count {
            self.guest.offer(head);
        }
        let heads = take_all(&self.guest, &mut self.ring, &mut self.queue);
        complete_all(&self.guest, &mut self.ring, &mut self.queue, &heads, random)
    }
}

#[test]
fn event_indexes_decide_as_the_reference_does() {
    for exponent in 0..=15u16 {
        let size = 1 << exponent;
        println!("size {size}");
        each_seed(2, |random| {
            let mut pair = Pair::new(size, true, random.random_range(u16::MAX - 300..=u16::MAX));
            assert!(pair.serve(1, random)[0], "the first is always notified");
            for round in 0..150 {
                let used = pair.guest.used();
                let near = used.wrapping_add(random.random_range(0..12)).wrapping_sub(6);
                pair.guest.set_used_event(if random.random_range(0..10) < 9 { near } else { random.random() });
                let count = random.random_range(0..=size.min(9));
                let [ours, reference] = pair.serve(count, random);
                assert_eq!(ours, reference, "round {round}: used index {used}, {count} requests");
            }
        });
    }
}

#[test]
fn all_indexes_are_passed_and_the_used_ring_stays_the_same() {
    for size in [1, 2, 64, 1024, 32768] {
        println!("size {size}");
        each_seed(0, |random| {
            let mut pair = Pair::new(size, true, random.random());
            pair.serve(1, random);
            let mut served = 0;
            let mut notified = 0;
            while served < (1 << 16) + 5 {
                let count = random.random_range(1..=size.min(300));
                pair.guest.set_used_event(pair.guest.used().wrapping_add(random.random_range(0..700)));
                // The check of every buffer is in another test, and there is but one here.
                let [ours, reference] = pair.serve(count, random);
                assert_eq!(ours, reference, "after {served} requests");
                served += u32::from(count);
                notified += u32::from(ours);
            }
            assert!(notified > 0, "both answers occur");
        });
    }
}

#[test]
fn flags_are_honoured() {
    for size in [1, 8, 256] {
        each_seed(2, |random| {
            let mut pair = Pair::new(size, false, random.random());
            pair.guest.set_available_flags(1);
            assert_eq!(pair.serve(1, random), [true, true], "the first is always notified");
            for _ in 0..50 {
                let silent: bool = random.random();
                pair.guest.set_available_flags(u16::from(silent) | (random.random::<u16>() & !1));
                let count = random.random_range(1..=size);
                assert_eq!(pair.serve(count, random), [!silent, true]);
            }
            assert!(!pair.serve(0, random)[0], "nothing to notify of");
        });
    }
}

#[test]
fn kicks_are_asked_for_as_the_reference_asks() {
    for event_idx in [false, true] {
        for size in [1, 2, 128, 32768] {
            each_seed(2, |random| {
                let mut pair = Pair::new(size, event_idx, random.random_range(u16::MAX - 100..=u16::MAX));
                for _ in 0..200 {
                    pair.ring.suspend_kicks();
                    pair.queue.disable_notification(&pair.guest.mmap).unwrap();
                    pair.serve(random.random_range(0..=size.min(5)), random);
                    let late = random.random_range(0..=size.min(2));
                    for head in 0..late {
                        pair.guest.offer(head);
                    }
                    let missed = pair.ring.resume_kicks();
                    assert_eq!(missed, pair.queue.enable_notification(&pair.guest.mmap).unwrap());
                    assert_eq!(missed, late > 0);
                    let [ours, reference] = pair.guest.used_rings();
                    assert!(ours == reference, "the used rings differ, in flags or event index");
                    let before = pair.guest.available();
                    assert!(!event_idx || missed || !pair.guest.needs_kick(before), "no requests, no kick");
                    if !missed {
                        pair.guest.offer(0);
                        assert!(pair.guest.needs_kick(before), "the next request comes with a kick");
                    }
                    let heads = take_all(&pair.guest, &mut pair.ring, &mut pair.queue);
                    complete_all(&pair.guest, &mut pair.ring, &mut pair.queue, &heads, random);
                }
            });
        }
    }
}

/// A device that sleeps may be woken by something else than the kick that it has asked for.
#[test]
fn none_is_asked_for_while_suspended() {
    for event_idx in [false, true] {
        each_seed(2, |random| {
            let mut pair = Pair::new(8, event_idx, random.random_range(u16::MAX - 100..=u16::MAX));
            for _ in 0..200 {
                assert!(!pair.ring.resume_kicks());
                pair.ring.suspend_kicks();
                for _ in 0..3 {
                    let before = pair.guest.available();
                    pair.guest.offer(0);
                    assert!(!pair.guest.needs_kick(before), "event index {event_idx}");
                    let head = pair.ring.take().unwrap();
                    pair.ring.complete(head, 0);
                    pair.ring.publish();
                }
            }
        });
    }
}
