//! [`Hold`]: requests that the host has no room for, and that wait for it.
//!
//! A guest that is told of an I/O error loses data, or its file system; one whose write takes a minute does not. So a request that meets
//! a full file system stays in flight, while the queue serves others, and is tried again until there is room or its time is up.
//! A request that waits is in the account of what is in flight, so it also waits over the death or replacement of its worker, and over a pause.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How often the first one is tried.
const TRY_INTERVAL: Duration = Duration::from_millis(100);

/// What waits on one ring.
pub struct Hold {
    /// How long a request waits; zero: not at all.
    limit: Duration,
    /// Heads, and since when each waits.
    held: VecDeque<(u16, Instant)>,
    next_try: Instant,
    /// Whether the last one that was tried found room.
    has_room: bool,
}

impl Hold {
    /// Nothing yet.
    pub fn new(limit: Duration) -> Hold {
        Hold { limit, held: VecDeque::new(), next_try: Instant::now(), has_room: false }
    }

    /// Whether nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Whether a request waits.
    #[inline]
    pub fn contains(&self, head: u16) -> bool {
        self.held.iter().any(|(held, _)| *held == head)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Notes that there is no room for a request. Whether it is to wait (on); if not, it is to fail.
    pub fn keep(&mut self, head: u16) -> bool {
        let now = Instant::now();
        self.has_room = false;
        match self.held.iter().position(|(held, _)| *held == head) {
            Some(index) if now - self.held[index].1 < self.limit => true,
            // It is complete, if not as anybody wanted.
            Some(_) => false,
            None if self.limit.is_zero() => false,
            None => {
                if self.held.is_empty() {
                    self.next_try = now + TRY_INTERVAL;
                }
                self.held.push_back((head, now));
                true
            }
        }
    }

    /// Notes that a request is complete, well or not.
    pub fn complete(&mut self, head: u16, well: bool) {
        if let Some(index) = self.held.iter().position(|(held, _)| *held == head) {
            self.held.remove(index);
            self.has_room |= well;
        }
    }

    /// Nothing waits any longer: what finds no room at the next try is to fail.
    pub fn give_up(&mut self) {
        self.limit = Duration::ZERO;
        self.next_try = Instant::now();
    }

    /// How long until something is to be tried again; `None`: nothing waits.
    pub fn until_try(&self) -> Option<Duration> {
        let until =
            if self.has_room { Duration::ZERO } else { self.next_try.saturating_duration_since(Instant::now()) };
        (!self.held.is_empty()).then_some(until)
    }

    /// Gives out what is to be tried now: all of it once there was room for one, or when all is to fail, else the first.
    pub fn take_tries(&mut self, to: &mut VecDeque<u16>) {
        self.next_try = Instant::now() + TRY_INTERVAL;
        let count = if self.has_room || self.limit.is_zero() { self.held.len() } else { 1 };
        to.extend(self.held.iter().take(count).map(|(head, _)| *head));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_tried_until_there_is_room_and_then_all_are() {
        let mut hold = Hold::new(Duration::from_secs(60));
        assert!(hold.until_try().is_none());
        assert!([3, 1, 2].into_iter().all(|head| hold.keep(head)));
        assert!(hold.until_try().is_some_and(|until| until > Duration::ZERO));
        let mut tries = VecDeque::new();
        hold.take_tries(&mut tries);
        assert_eq!(tries, [3]);
        assert!(hold.keep(3), "it waits on");
        hold.complete(3, true);
        assert_eq!(hold.until_try(), Some(Duration::ZERO));
        tries.clear();
        hold.take_tries(&mut tries);
        assert_eq!(tries, [1, 2]);
        hold.complete(1, true);
        hold.complete(2, true);
        assert!(hold.is_empty() && hold.until_try().is_none());
    }

    #[test]
    fn time_is_up_at_some_time_or_at_once() {
        let mut hold = Hold::new(Duration::from_millis(1));
        assert!(hold.keep(7));
        std::thread::sleep(Duration::from_millis(2));
        assert!(!hold.keep(7));
        hold.complete(7, false);
        assert!(hold.keep(7));
        hold.give_up();
        assert!(!hold.keep(7));
        assert!(!Hold::new(Duration::ZERO).keep(7));
    }
}
