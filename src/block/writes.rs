//! [`Writes`]: writes of one batch that are put off, so that those which follow on each other go to the file together.
//!
//! A driver that writes a file from its start to its end makes many small requests of it. Each by itself costs a system call, which takes several times as long as its bytes.
//!
//! What is new to the delta is written piece by piece all the same. The page cache takes a piece of memory as large as the first write of it, and a file system that tracks the
//! blocks of such a piece one by one (ext4) has each later write of a single one pay for all: random writes over what had been written 64 KiB at a time took 1.8 us
//! for 1.3.

use std::ops::Range;

use crate::sys::buffers::{Readable, total_len_readable};

use super::storage::Storage;
use super::{Batch, Error, Volume};

/// What is written at a time at most: as many buffers as one system call takes, and not so many bytes that others wait for long.
const BUFFERS_MAX: usize = 1024;
const BYTES_MAX: u64 = 1 << 20;

/// Writes that are put off, in order.
#[derive(Default)]
pub struct Writes<'m> {
    writes: Vec<Write>,
    buffers: Vec<Readable<'m>>,
}

struct Write {
    offset: u64,
    len: u64,
    buffers: Range<usize>,
    /// What whoever asked for it calls it.
    tag: usize,
}

impl<'m> Writes<'m> {
    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Puts off a write of some buffers, one after another, at `offset`.
    pub fn put_off(&mut self, offset: u64, from: &[Readable<'m>], tag: usize) {
        let start = self.buffers.len();
        self.buffers.extend_from_slice(from);
        self.writes.push(Write { offset, len: total_len_readable(from), buffers: start..self.buffers.len(), tag });
    }

    /// Carries out all that was put off, as [`Volume::write`], and calls `failed` with the tag of each that fails. None is left.
    pub fn carry_out<S: Storage>(
        &mut self,
        volume: &Volume<S>,
        batch: &mut Batch,
        mut failed: impl FnMut(usize, Error),
    ) {
        let mut rest = &self.writes[..];
        while let Some(first) = rest.first() {
            let count = neighbours(rest, |write| volume.holds(write.offset, write.len));
            let (together, behind) = rest.split_at(count);
            let buffers = first.buffers.start..together[count - 1].buffers.end;
            let result = volume.write(first.offset, &self.buffers[buffers], batch);
            match result {
                Ok(()) => {}
                Err(error) if count == 1 => failed(first.tag, error),
                // One may be the reason, and the others have no part in it.
                Err(_) => {
                    for write in together {
                        let result = volume.write(write.offset, &self.buffers[write.buffers.clone()], batch);
                        result.unwrap_or_else(|error| failed(write.tag, error));
                    }
                }
            }
            rest = behind;
        }
        self.writes.clear();
        self.buffers.clear();
    }
}

/// How many of these, from the first, go together: of those that are all over bytes that the delta holds.
fn neighbours(writes: &[Write], is_held: impl Fn(&Write) -> bool) -> usize {
    let first = &writes[0];
    let follows = |pair: &&[Write]| {
        let [one, next] = pair else { return false };
        one.offset.checked_add(one.len) == Some(next.offset)
            && next.buffers.end - first.buffers.start <= BUFFERS_MAX
            && next.offset + next.len - first.offset <= BYTES_MAX
            && is_held(one)
            && is_held(next)
    };
    1 + writes.windows(2).take_while(follows).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::base::Base;
    use crate::block::delta::header::Header;
    use crate::block::delta::layout::Layout;
    use crate::block::delta::{self, Delta, Lifetime};
    use crate::block::storage::FileStorage;
    use crate::sys::buffers::Writable;
    use crate::units::ClusterSize;
    use std::io;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// At the start of the volume the delta holds nothing.
    const NEW_BYTES: u64 = 100 * 512;

    /// Writes of so many sectors each at these, and how they go together.
    fn together(writes: &[(u64, u64)]) -> Vec<usize> {
        let bytes = vec![0; 2 << 20];
        let mut put_off = Writes::default();
        for (tag, (sector, count)) in writes.iter().enumerate() {
            put_off.put_off(sector * 512, &[Readable::from_slice(&bytes[..*count as usize * 512])], tag);
        }
        let mut rest = &put_off.writes[..];
        let mut counts = Vec::new();
        while !rest.is_empty() {
            let count = neighbours(rest, |write| write.offset >= NEW_BYTES);
            counts.push(count);
            rest = &rest[count..];
        }
        counts
    }

    /// A file that counts writes, and takes none of certain bytes.
    struct Picky {
        file: FileStorage,
        writes: AtomicUsize,
    }

    const REFUSED: u8 = 13;

    impl Storage for Picky {
        fn read_at(&self, into: Writable<'_>, offset: u64) -> io::Result<()> {
            self.file.read_at(into, offset)
        }

        fn write_at(&self, from: &[Readable<'_>], offset: u64) -> io::Result<()> {
            self.writes.fetch_add(1, Ordering::Relaxed);
            let mut byte = [0];
            let is_refused = |buffer: &Readable<'_>| buffer.copy_to_slice(&mut byte).is_ok() && byte == [REFUSED];
            if from.iter().any(is_refused) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.file.write_at(from, offset)
        }

        fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
            self.file.punch_hole(offset, len)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.file.set_len(len)
        }

        fn sync(&self) -> io::Result<()> {
            self.file.sync()
        }
    }

    #[test]
    fn neighbours_take_one_write_and_one_that_fails_fails_alone() {
        let layout = Layout::new(ClusterSize::DEFAULT, 1 << 20).unwrap();
        let header = Header { layout, uuid: [0; 16], base: None };
        let file = tempfile::tempfile().unwrap();
        file.set_len(layout.file_bytes()).unwrap();
        let storage =
            || Picky { file: FileStorage::new(file.try_clone().unwrap()).unwrap(), writes: AtomicUsize::new(0) };
        delta::format(&storage(), &header).unwrap();
        let delta = Delta::start(storage(), "test".into(), header, Lifetime::Persistent).unwrap();
        let volume = Volume::cow(Base::empty(), delta);
        let count = || volume.delta_storage().writes.swap(0, Ordering::Relaxed);
        count();
        let blocks: Vec<_> = (0..16).map(|number: u8| vec![number; 4096]).collect();
        let (mut writes, mut batch) = (Writes::default(), Batch::default());
        for (refused, expected) in [(false, 15), (false, 1), (true, 1 + 16)] {
            for (tag, block) in blocks.iter().enumerate().filter(|(tag, _)| refused || *tag != usize::from(REFUSED)) {
                // Without that one, those behind it move up.
                let place = if refused || tag < usize::from(REFUSED) { tag } else { tag - 1 };
                writes.put_off(4096 * place as u64, &[Readable::from_slice(block)], tag);
            }
            let mut failed = Vec::new();
            writes.carry_out(&volume, &mut batch, |tag, error| failed.push((tag, error.is_full())));
            assert_eq!(count(), expected);
            assert_eq!(failed, if refused { vec![(usize::from(REFUSED), true)] } else { vec![] });
            volume.commit(&mut batch).unwrap();
            count();
        }
        let mut found = vec![0; 16 * 4096];
        volume.read(0, &[Writable::from_mut_slice(&mut found)]).unwrap();
        // What was there from the first time.
        let expected = blocks.iter().map(|block| if block[0] == REFUSED { &blocks[14] } else { block });
        assert!(found == expected.flatten().copied().collect::<Vec<_>>());
    }

    #[test]
    fn what_follows_on_the_last_goes_with_it_and_nothing_else() {
        assert_eq!(together(&[(200, 8), (208, 8), (216, 1), (218, 1), (217, 1), (218, 1)]), [3, 1, 2]);
        assert_eq!(together(&[(208, 8), (200, 8)]), [1, 1], "order stays");
        assert_eq!(together(&[(208, 8), (208, 8)]), [1, 1], "the second is to win");
        assert_eq!(together(&[(200, 2000), (2200, 48), (2248, 1), (2249, 1)]), [2, 2], "1 MiB at most");
        assert_eq!(together(&[(200, 4000), (4200, 1)]), [1, 1]);
        assert_eq!(together(&[(84, 8), (92, 8), (100, 8), (108, 8)]), [1, 1, 2], "not what is new");
    }
}
