//! [`Polling`]: how long a queue that has nothing to do looks at its ring before it sleeps.
//!
//! A driver that waits for one request before it makes the next has its queue sleep and wake for each, which takes several times as long as the
//! request. Looking at the ring meanwhile costs the time of a processor; so it is done for as long as requests have lately come soon enough,
//! and not at all while nothing comes, nor while something else wants the processor.
//!
//! Where there is to be no polling, a glance of some microseconds still pays with drivers that make their next request as soon as they are
//! answered.
//!
//! Knows times and no ring.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::sys::process;

/// How long at most, if nobody says otherwise.
pub const POLL_DEFAULT: Duration = Duration::from_micros(50);
/// More than this is no polling.
pub const POLL_MAX: Duration = Duration::from_millis(10);

/// Of the time between requests, the part of the average that the last one makes up.
const WEIGHT: u32 = 8;
/// A time between requests counts as so many limits at most: one pause does not outweigh a burst.
const GAP_LIMITS: u32 = 4;
/// Between two looks at the clock pass some hundred nanoseconds. What takes longer than this has had the processor for something else.
const TAKEN_AWAY: Duration = Duration::from_micros(20);
/// For how long polling then ends, at first; twice as long each further time.
const YIELD_MIN: Duration = Duration::from_millis(1);
const YIELD_MAX: Duration = Duration::from_secs(1);

/// How long a glance takes at most: less than falling asleep and being woken.
const GLANCE: Duration = Duration::from_micros(5);
/// After one that has not paid, one is left out, and twice as many each further time, but never more than this.
const GLANCE_BACKOFF_MAX: u32 = 32;

/// Queues of this process that poll at the moment.
static POLLERS: AtomicU32 = AtomicU32::new(0);

/// What a queue knows of its driver's pace.
pub struct Polling {
    limit: Duration,
    /// Average time from running out of requests to the next one.
    gap: Duration,
    /// Until when the processor is somebody else's.
    yields_until: Option<Instant>,
    yields_for: Duration,
    pollers_max: u32,
    /// Glances still to be left out.
    glances_to_skip: u32,
    /// How many were to be after the last one.
    glance_backoff: u32,
}

/// One queue among those that poll.
pub struct Poller(());

impl Polling {
    /// Polls for at most `limit` at a time; zero: never. At first it sleeps.
    pub fn new(limit: Duration) -> Polling {
        let limit = limit.min(POLL_MAX);
        // The last processor is for whoever makes the requests.
        let pollers_max = process::processors().saturating_sub(1);
        Polling {
            limit,
            gap: limit * GAP_LIMITS,
            yields_until: None,
            yields_for: YIELD_MIN,
            pollers_max,
            glances_to_skip: 0,
            glance_backoff: 0,
        }
    }

    /// How long to look at the ring when the driver has been answered and there is to be no polling; `None`: not at all. What comes of it is
    /// for [`Polling::glanced`].
    ///
    /// Many a driver makes its next request at once, and then a glance costs less than falling asleep and being woken, whoever else wants the
    /// processor.
    pub fn glance(&mut self) -> Option<Duration> {
        if self.limit.is_zero() {
            return None;
        }
        if self.glances_to_skip > 0 {
            self.glances_to_skip -= 1;
            return None;
        }
        Some(self.limit.min(GLANCE))
    }

    /// Notes whether a request came during a glance.
    pub fn glanced(&mut self, paid: bool) {
        self.glance_backoff = if paid { 0 } else { (self.glance_backoff * 2).clamp(1, GLANCE_BACKOFF_MAX) };
        self.glances_to_skip = self.glance_backoff;
    }

    /// How long to poll from `now`, when requests have just run out; `None`: not at all.
    #[inline]
    pub fn window(&mut self, now: Instant) -> Option<Duration> {
        if self.gap > self.limit || self.limit.is_zero() {
            return None;
        }
        if self.yields_until.is_some_and(|until| now < until) {
            return None;
        }
        self.yields_until = None;
        // Twice the average has most of what comes soon.
        Some((self.gap * 2 + Duration::from_micros(2)).min(self.limit))
    }

    /// Takes a place among those that poll, if there is one.
    #[inline]
    pub fn enter(&self) -> Option<Poller> {
        if POLLERS.fetch_add(1, Ordering::Relaxed) < self.pollers_max {
            return Some(Poller(()));
        }
        POLLERS.fetch_sub(1, Ordering::Relaxed);
        None
    }

    /// The next request has come, so long after they ran out, whether it was waited for by polling or asleep.
    #[inline]
    pub fn came_after(&mut self, gap: Duration) {
        let gap = gap.min(self.limit * GAP_LIMITS);
        self.gap = self.gap - self.gap / WEIGHT + gap / WEIGHT;
    }

    /// Whether between two looks at the clock something else has had the processor. Then polling ends for a while.
    #[inline]
    pub fn was_taken_away(&mut self, last: Instant, now: Instant) -> bool {
        if now - last < TAKEN_AWAY {
            return false;
        }
        self.yield_from(now);
        true
    }

    #[cold]
    fn yield_from(&mut self, now: Instant) {
        self.yields_until = Some(now + self.yields_for);
        self.yields_for = (self.yields_for * 2).min(YIELD_MAX);
    }

    /// It has polled without being disturbed.
    #[inline]
    pub fn was_left_alone(&mut self) {
        if self.yields_for > YIELD_MIN {
            self.yields_for = self.yields_for.mul_f32(0.99).max(YIELD_MIN);
        }
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        POLLERS.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn it_polls_while_requests_come_soon_and_not_when_they_do_not() {
        let now = Instant::now();
        let mut polling = Polling::new(POLL_DEFAULT);
        assert_eq!(polling.window(now), None, "nothing is known yet");
        (0..40).for_each(|_| polling.came_after(micros(5)));
        let window = polling.window(now).unwrap();
        assert!(window > micros(10) && window < micros(20), "{window:?}");
        polling.came_after(Duration::from_secs(60));
        assert!(polling.window(now).is_some(), "one pause is not the end");
        (0..20).for_each(|_| polling.came_after(micros(300)));
        assert_eq!(polling.window(now), None, "nothing comes that soon");
        (0..40).for_each(|_| polling.came_after(micros(40)));
        assert_eq!(polling.window(now), Some(POLL_DEFAULT), "never longer than it may");
    }

    #[test]
    fn it_never_polls_when_it_may_not() {
        let mut polling = Polling::new(Duration::ZERO);
        (0..40).for_each(|_| polling.came_after(Duration::ZERO));
        assert_eq!(polling.window(Instant::now()), None);
        assert_eq!(polling.glance(), None);
    }

    #[test]
    fn it_leaves_the_processor_to_others_and_longer_each_time() {
        let now = Instant::now();
        let mut polling = Polling::new(POLL_DEFAULT);
        (0..40).for_each(|_| polling.came_after(micros(1)));
        assert!(!polling.was_taken_away(now, now + micros(1)));
        assert!(polling.was_taken_away(now, now + micros(900)));
        let now = now + micros(900);
        assert_eq!(polling.window(now + micros(999)), None);
        assert!(polling.window(now + micros(1000)).is_some());
        assert!(polling.was_taken_away(now, now + micros(900)));
        let now = now + micros(900);
        assert_eq!(polling.window(now + micros(1999)), None);
        assert!(polling.window(now + micros(2000)).is_some());
        (0..500).for_each(|_| polling.was_left_alone());
        assert_eq!(polling.yields_for, YIELD_MIN);
    }

    #[test]
    fn it_glances_while_that_pays_and_now_and_then_when_it_does_not() {
        let mut polling = Polling::new(POLL_DEFAULT);
        for _ in 0..100 {
            assert_eq!(polling.glance(), Some(GLANCE), "it has always paid");
            polling.glanced(true);
        }
        let mut glance = |pays| {
            let looks = polling.glance().is_some();
            if looks {
                polling.glanced(pays);
            }
            looks
        };
        let useless = (0..1000).filter(|_| glance(false)).count();
        assert!((1000 / 33..40).contains(&useless), "{useless} of 1,000 that do not pay");
        let useful = (0..1000).filter(|_| glance(true)).count();
        assert!(useful >= 1000 - 32, "{useful} of 1,000: once one pays again, so may all");
        assert!(glance(false));
        assert!(!glance(true), "one is left out");
        assert!(glance(true));
        assert!(glance(true), "and none after one that has paid");
    }

    #[test]
    fn one_processor_is_left_for_those_who_make_requests() {
        let mut polling = Polling::new(POLL_DEFAULT);
        polling.pollers_max = 0;
        assert!(polling.enter().is_none());
        polling.pollers_max = u32::MAX;
        assert!(polling.enter().is_some());
    }
}
