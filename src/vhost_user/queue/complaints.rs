//! [`Complaints`]: what a queue logs about requests.

use std::time::{Duration, Instant};

use crate::vhost_user::request::RequestError;

/// Log lines about requests, at most one a second: what a guest can cause a million times must not fill the log.
pub(super) struct Complaints {
    ring: u16,
    last: Option<Instant>,
    held_back: u64,
}

impl Complaints {
    const INTERVAL: Duration = Duration::from_secs(1);

    pub(super) fn new(ring: u16) -> Complaints {
        Complaints { ring, last: None, held_back: 0 }
    }

    #[cold]
    pub(super) fn request(&mut self, error: &RequestError) {
        if error.is_hosts() { self.hosts(error) } else { self.guests(error) }
    }

    /// About something that the guest did.
    #[cold]
    pub(super) fn guests(&mut self, error: &dyn std::error::Error) {
        self.say(log::Level::Warn, error);
    }

    /// About something that the host's operators have to see to.
    #[cold]
    pub(super) fn hosts(&mut self, error: &dyn std::error::Error) {
        self.say(log::Level::Error, error);
    }

    fn say(&mut self, level: log::Level, error: &dyn std::error::Error) {
        if self.last.is_some_and(|last| last.elapsed() < Self::INTERVAL) {
            self.held_back += 1;
            return;
        }
        self.last = Some(Instant::now());
        let causes = std::iter::successors(error.source(), |error| error.source())
            .fold(String::new(), |causes, cause| causes + ": " + &cause.to_string());
        match std::mem::take(&mut self.held_back) {
            0 => log::log!(level, "ring {}: {error}{causes}", self.ring),
            count => log::log!(level, "ring {}: {error}{causes} ({count} more held back)", self.ring),
        }
    }
}
