//! [`Rest`]: what a worker lets go of when none of its queues has had anything to do for a while.
//!
//! Page tables are memory too: 2 MiB for each gibibyte that was read through a mapping of small pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::block::Volume;

/// How long a queue has nothing to do before it counts as being at rest.
pub const AFTER: Duration = Duration::from_secs(10);
/// A queue that has read less than this has not made enough page tables for anyone to look.
const WORTH_BYTES: u64 = 16 << 20;

/// The queues of a worker that are not at rest.
pub struct Rest {
    volume: Arc<Volume>,
    awake: AtomicU32,
}

/// A queue's part in that.
pub struct Repose {
    rest: Arc<Rest>,
    /// Bytes that it has read since it last rested.
    read: u64,
}

impl Rest {
    /// All queues of a volume are at rest.
    pub fn new(volume: Arc<Volume>) -> Rest {
        Rest { volume, awake: AtomicU32::new(0) }
    }
}

impl Repose {
    /// Of a queue that has not done anything yet.
    pub fn new(rest: Arc<Rest>) -> Repose {
        Repose { rest, read: 0 }
    }

    /// Notes that bytes have been read.
    #[inline]
    pub fn note_read(&mut self, bytes: u64) {
        let was_awake = self.is_awake();
        self.read = self.read.saturating_add(bytes);
        if !was_awake && self.is_awake() {
            self.rest.awake.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether it is to be told when the queue comes to rest.
    #[inline]
    pub fn is_awake(&self) -> bool {
        self.read >= WORTH_BYTES
    }

    /// Notes that the queue is at rest. The last one lets go of what it can, until it `is_wanted`.
    pub fn begin(&mut self, is_wanted: impl FnMut() -> bool) {
        if self.end() {
            self.rest.volume.let_go(is_wanted);
        }
    }

    /// Whether it was awake, as the last one.
    fn end(&mut self) -> bool {
        let was_awake = self.is_awake();
        self.read = 0;
        was_awake && self.rest.awake.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

impl Drop for Repose {
    fn drop(&mut self) {
        self.end();
    }
}
