//! [`Deaths`]: tells a worker that dies again and again of itself from one that is killed now and then.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The deaths of workers, to tell a worker that dies again and again from one that was killed.
pub(super) struct Deaths {
    pub(super) taken_over: Instant,
    /// In a row, each soon after taking over and without having got any further.
    in_vain: u32,
    recent: VecDeque<Instant>,
}

impl Deaths {
    /// A worker that dies so soon after taking over may have died of what it took over.
    pub(super) const SOON: Duration = Duration::from_secs(10);
    pub(super) const IN_VAIN_MAX: u32 = 5;
    /// So many within that time are too many in any case: one that dies of one ring's request gets further on others.
    pub(super) const RECENT_MAX: usize = 300;
    /// How long no other worker is started then.
    pub(super) const HOLD: Duration = Duration::from_secs(60);

    pub(super) fn none() -> Deaths {
        Deaths { taken_over: Instant::now(), in_vain: 0, recent: VecDeque::new() }
    }

    pub(super) fn note(&mut self, got_further: bool) {
        let now = Instant::now();
        let in_vain = !got_further && now - self.taken_over < Self::SOON;
        self.in_vain = if in_vain { self.in_vain + 1 } else { 0 };
        self.recent.push_back(now);
        while self.recent.front().is_some_and(|death| now - *death > Self::SOON) {
            self.recent.pop_front();
        }
    }

    pub(super) fn are_too_many(&self) -> bool {
        self.in_vain >= Self::IN_VAIN_MAX || self.recent.len() >= Self::RECENT_MAX
    }
}
