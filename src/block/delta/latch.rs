//! [`Latch`]: remembers that a sync has failed.
//!
//! The kernel reports a lost write once and forgets it, so whoever goes on with the file has to be told by somebody else. A latch may
//! therefore lie in memory that outlives this process. It never opens again: only another opening of the file finds out what the disk holds.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::shared::SharedNumbers;

/// Closed once a sync has failed.
pub struct Latch(Place);

enum Place {
    /// Goes with the process.
    Own(AtomicU64),
    /// Number `index` of memory that others have too.
    Shared { numbers: SharedNumbers, index: usize },
}

impl Default for Latch {
    fn default() -> Latch {
        Latch(Place::Own(AtomicU64::new(0)))
    }
}

impl Latch {
    /// One that is number `index` of `numbers`: zero as long as it is open.
    pub fn shared(numbers: SharedNumbers, index: usize) -> Latch {
        Latch(Place::Shared { numbers, index })
    }

    fn number(&self) -> &AtomicU64 {
        match &self.0 {
            Place::Own(number) => number,
            Place::Shared { numbers, index } => numbers.at(*index),
        }
    }

    /// Closes it for good.
    pub fn close(&self) {
        self.number().store(1, Ordering::Release);
    }

    /// Whether a sync has failed.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.number().load(Ordering::Acquire) != 0
    }
}
