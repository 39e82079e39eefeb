//! Rings that cannot be served, or not any further: every [`RingError`], at a start and while running.

use pando::vhost_user::ring::{RING_SIZE_MAX, Ring, RingError, RingPlace};
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};

use super::guest::Guest;

fn start(guest: &Guest, place: RingPlace, event_idx: bool) -> Result<(), RingError> {
    Ring::new(&guest.memory, &place, 0, event_idx).map(|_| ())
}

#[test]
fn sizes_are_those_of_the_reference() {
    let guest = Guest::new(RING_SIZE_MAX, false, 0);
    for size in 0..=u16::MAX {
        let ours = start(&guest, RingPlace { size, ..guest.place() }, false);
        let allowed = Queue::new(RING_SIZE_MAX).unwrap().try_set_size(size).is_ok();
        assert_eq!(ours, if allowed { Ok(()) } else { Err(RingError::Size { size }) });
    }
}

#[test]
fn parts_outside_of_memory_are_named() {
    let guest = Guest::new(16, true, 0);
    let place = guest.place();
    // Where the region ends for the front end, and where another one that is the guest's next begins.
    let end = 0x7200_0000_0000 + (2 << 20);
    let seam = 0x7000_0000_0000 + (1 << 20);
    for outside in [0, 1 << 20, end, end + 4096, seam - 16, u64::MAX - 15, !0xfff] {
        let broken = [
            (RingPlace { descriptors: outside, ..place }, "descriptor table", 256, 16),
            (RingPlace { available: outside, ..place }, "available ring", 4 + 32 + 2, 2),
            (RingPlace { used: outside, ..place }, "used ring", 4 + 128 + 2, 4),
        ];
        for (place, part, bytes, align) in broken {
            let expected = RingError::Outside { part, address: outside, bytes, align };
            assert_eq!(start(&guest, place, true), Err(expected));
        }
    }
    for (misaligned, part) in [
        (RingPlace { descriptors: place.descriptors + 8, ..place }, "descriptor table"),
        (RingPlace { available: place.available + 1, ..place }, "available ring"),
        (RingPlace { used: place.used + 2, ..place }, "used ring"),
    ] {
        assert!(
            matches!(start(&guest, misaligned, true), Err(RingError::Outside { part: found, .. }) if found == part)
        );
    }
}

#[test]
fn parts_may_end_where_memory_does() {
    let guest = Guest::new(16, true, 0);
    let end = 0x7200_0000_0000 + (2 << 20);
    let place = guest.place();
    let (with_event, without) = ((4 + 32 + 2), (4 + 32));
    assert_eq!(start(&guest, RingPlace { available: end - with_event, ..place }, true), Ok(()));
    assert_eq!(start(&guest, RingPlace { available: end - without, ..place }, false), Ok(()));
    assert!(start(&guest, RingPlace { available: end - without, ..place }, true).is_err());
    assert_eq!(start(&guest, RingPlace { descriptors: end - 256, ..place }, true), Ok(()));
    assert!(start(&guest, RingPlace { descriptors: end - 240, ..place }, true).is_err());
}

#[test]
fn an_index_that_jumps_is_refused_where_the_reference_refuses_it() {
    for (size, from) in [(1, 0), (4, u16::MAX), (256, 77), (32768, 40_000)] {
        let mut guest = Guest::new(size, false, from);
        let (mut ring, mut queue) = (guest.ring(), guest.queue());
        for ahead in 0..=u16::MAX {
            let to = from.wrapping_add(ahead);
            guest.claim(to);
            let reference = match queue.iter(&guest.mmap) {
                Ok(_) => Ok(ahead),
                Err(Error::InvalidAvailRingIndex) => Err(RingError::Jumped { from, to, size }),
                Err(other) => panic!("{other}"),
            };
            assert_eq!(ring.waiting(), reference);
        }
        guest.claim(from);
        guest.offer(0);
        assert_eq!((ring.waiting(), ring.take()), (Ok(1), Ok(0)), "nothing was taken meanwhile");
    }
}

/// The reference goes on with a chain that is empty; a driver that names such a descriptor has lost its mind, and nobody could complete it.
#[test]
fn a_head_that_does_not_exist_ends_the_ring() {
    for (size, head) in [(1, 1), (8, 8), (8, u16::MAX), (32768, 32768)] {
        let mut guest = Guest::new(size, true, 0);
        let (mut ring, mut queue) = (guest.ring(), guest.queue());
        guest.offer(head);
        assert_eq!(ring.waiting(), Ok(1));
        assert_eq!(ring.take(), Err(RingError::Head { head, size }));
        assert_eq!(ring.next_available(), 0, "it has not been taken");
        assert_eq!(queue.pop_descriptor_chain(&guest.mmap).unwrap().count(), 0);
    }
}
