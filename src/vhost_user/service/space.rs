//! How the file system of the delta stands, and what is told of it.

use std::time::{Duration, Instant};

use crate::sys::file;
use crate::units::ByteCount;
use crate::vhost_user::control::Event;

use super::Service;

/// What has been told of the delta's file system.
pub(super) struct Space {
    is_full: bool,
    last_full: Instant,
    is_low: bool,
    next_look: Instant,
}

impl Space {
    /// A file system with less than this left, or less than a twentieth if that is smaller, is worth a warning.
    pub(super) const LOW_WATER: u64 = 1 << 30;
    /// For so long no request may have waited: a ring that stops, or a worker that dies, interrupts the wait.
    pub(super) const SETTLED_AFTER: Duration = Duration::from_millis(900);
    /// Looked at when something is waited for, and no more often than this.
    pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(1);
}

impl Space {
    /// Nothing yet.
    pub(super) fn unknown() -> Space {
        Space { is_full: false, last_full: Instant::now(), is_low: false, next_look: Instant::now() }
    }
}

impl Service {
    /// Tells when requests begin to wait for room and when none waits any more, and ahead of that, when there is little left.
    pub(super) fn tell_space(&mut self) {
        let (held, now) = (self.watch.held(), Instant::now());
        if held > 0 {
            self.space.last_full = now;
            if !std::mem::replace(&mut self.space.is_full, true) {
                log::error!("the delta's file system is full: {held} requests wait for room");
                self.tell(Event::Full { held });
            }
        } else if self.space.is_full && now - self.space.last_full >= Space::SETTLED_AFTER {
            self.space.is_full = false;
            log::info!("there is room again in the delta's file system: no request waits");
            self.tell(Event::SpaceBack);
        }
        let Some(delta) = self.part.delta.as_ref().filter(|_| now >= self.space.next_look) else { return };
        self.space.next_look = now + Space::LOOK_INTERVAL;
        // A file system that does not say is none that is nearly full.
        let Ok(found) = file::space(&delta.file) else { return };
        let low_water = Space::LOW_WATER.min(found.all / 20);
        if found.free >= low_water {
            self.space.is_low = false;
        } else if !std::mem::replace(&mut self.space.is_low, true) {
            log::warn!("the delta's file system has {} left", ByteCount(found.free));
            self.tell(Event::LowSpace { bytes: found.free });
        }
    }
}
