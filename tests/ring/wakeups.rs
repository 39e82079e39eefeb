//! Two threads and one ring: no wake-up is lost, in either direction, however the two meet.
//!
//! Finds a step that is missing or in the wrong order. A missing barrier shows only when both sides act within the same few
//! nanoseconds, which needs two idle processors and luck.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use pando::vhost_user::ring::Ring;
use virtio_queue::desc::split::Descriptor;

use super::guest::{BUFFERS, Guest, WRITE};

const REQUESTS: u32 = 60_000;
const TIMEOUT: Duration = Duration::from_secs(20);

/// An event: signals that nobody has waited for yet are one.
fn event() -> (SyncSender<()>, Receiver<()>) {
    sync_channel(1)
}

fn wait(event: &Receiver<()>, whom: &str) {
    assert!(event.recv_timeout(TIMEOUT).is_ok(), "{whom} was never woken");
}

/// Serves the ring as a queue does, without the requests.
fn device(mut ring: Ring, kick: Receiver<()>, call: SyncSender<()>) {
    let mut served = 0;
    ring.suspend_kicks();
    while served < REQUESTS {
        let waiting = ring.waiting().unwrap();
        if waiting > 0 {
            for _ in 0..waiting {
                let head = ring.take().unwrap();
                ring.complete(head, 0);
            }
            served += u32::from(waiting);
            if ring.publish() {
                let _ = call.try_send(());
            }
        } else if !ring.resume_kicks() {
            wait(&kick, "the device");
            ring.suspend_kicks();
        }
    }
}

/// Offers requests and waits for them, now few and now many, asking for notifications only to sleep.
fn driver(guest: &mut Guest, event_idx: bool, kick: &SyncSender<()>, call: &Receiver<()>) {
    let start = guest.available();
    let mut offered = 0;
    let completed = |guest: &Guest| u32::from(guest.used().wrapping_sub(start));
    let mut seen = 0u32;
    while seen < REQUESTS {
        let before = guest.available();
        let room = u32::from(guest.size) - (offered - seen);
        let count = room.min(1 + offered % 3).min(REQUESTS - offered);
        for _ in 0..count {
            guest.offer(guest.available() % guest.size);
        }
        offered += count;
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if count > 0 && guest.needs_kick(before) {
            let _ = kick.try_send(());
        }
        if offered - seen == u32::from(guest.size) || offered == REQUESTS {
            // Says what it waits for and looks once more, as drivers do.
            if event_idx {
                guest.set_used_event(start.wrapping_add(seen as u16));
            } else {
                guest.set_available_flags(0);
            }
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            if completed(guest) == u32::from(seen as u16) {
                wait(call, "the driver");
            }
            if !event_idx {
                guest.set_available_flags(1);
            }
        }
        seen += (completed(guest) as u16).wrapping_sub(seen as u16) as u32;
    }
}

#[test]
fn none_is_lost() {
    for (event_idx, size) in [(true, 1), (true, 8), (false, 1), (false, 8)] {
        let mut guest = Guest::new(size, event_idx, u16::MAX - 10);
        for head in 0..size {
            guest.set_descriptor(head, Descriptor::new(BUFFERS[0].start, 1, WRITE, 0));
        }
        let ring = guest.ring();
        let ((kick, kicked), (call, called)) = (event(), event());
        std::thread::scope(|scope| {
            scope.spawn(move || device(ring, kicked, call));
            driver(&mut guest, event_idx, &kick, &called);
        });
    }
}
