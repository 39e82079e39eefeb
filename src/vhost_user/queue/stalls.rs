//! [`Stalls`]: tells whether copies that were to take no time have waited for the disk.
//!
//! Time alone does not say so. A thread that others take the processor from loses as much, and what it has read is in memory as before; if that were forgotten, all of it would be
//! left to the kernel once more, page by page.

use std::time::Duration;

use crate::sys::process;

/// What a thread has waited for, as far as it has looked.
pub(super) struct Stalls {
    faults: u64,
}

/// A batch of copies that takes longer than this has waited for something.
const fn copies_at_most(bytes: u64) -> Duration {
    const NANOSECONDS_PER_BYTE: u64 = 1;
    Duration::from_nanos(200_000 + bytes.saturating_mul(NANOSECONDS_PER_BYTE))
}

impl Stalls {
    /// Of the calling thread, for it alone.
    pub(super) fn new() -> Stalls {
        Stalls { faults: process::major_faults() }
    }

    /// Whether copies of so many bytes, that took so long, have waited for the disk: they, or others since the last that took long.
    #[inline]
    pub(super) fn waited(&mut self, took: Duration, bytes: u64) -> bool {
        took > copies_at_most(bytes) && self.has_faulted()
    }

    #[cold]
    fn has_faulted(&mut self) -> bool {
        let before = std::mem::replace(&mut self.faults, process::major_faults());
        self.faults != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::cached::CachedFile;
    use crate::sys::buffers::{Readable, Writable};
    use crate::sys::file;

    const LONG: Duration = Duration::from_millis(9);
    const BYTES: u64 = 4 << 20;

    #[test]
    fn who_was_kept_from_the_processor_has_not_waited_for_the_disk() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file::write_at(&file, &[Readable::from_slice(&vec![7; BYTES as usize])], 0).unwrap();
        file.sync_all().unwrap();
        let mut stalls = Stalls::new();
        let mut sleeps_and_waited = || {
            std::thread::sleep(LONG);
            stalls.waited(LONG, 0)
        };
        // The program itself is in memory, once it has run.
        sleeps_and_waited();
        assert!(!sleeps_and_waited(), "it has slept");
        if rustix::fs::fstatfs(&file).unwrap().f_type == libc::TMPFS_MAGIC {
            // There it stays in memory, for there it is.
            return;
        }
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let cached = CachedFile::new(file).unwrap();
        cached.read(Writable::from_mut_slice(&mut [0; 9]), BYTES / 2).unwrap();
        assert!(!stalls.waited(Duration::from_micros(99), 0), "nobody looks");
        assert!(stalls.waited(LONG, 0), "the disk was waited for");
        assert!(!stalls.waited(LONG, 0), "and is not for ever");
        cached.read(Writable::from_mut_slice(&mut [0; 9]), BYTES / 2).unwrap();
        assert!(!stalls.waited(LONG, 0), "what was read is in memory");
    }
}
