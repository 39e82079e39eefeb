//! [`DirectFile`]: a file that is read and written past the page cache (`O_DIRECT`).
//!
//! The disk moves whole blocks to and from memory that lies at multiples of one. What a guest gives is nearly always such, and moved without a copy; everything else is
//! copied, a piece at a time. The kernel keeps this file and the page cache's view of it coherent, as long as all of a block is written here or all of it there.

use std::fs::File;
use std::io;

use crate::sys::buffers::{self, Readable, Writable, total_len_readable, total_len_writable};
use crate::sys::file;

/// What is copied at a time.
const PIECE_BYTES: usize = 256 << 10;

/// Blocks that there are: a disk's sectors, of either size.
const BLOCKS: [usize; 2] = [512, 4096];

/// A file, opened to be read and written past the page cache.
pub struct DirectFile {
    file: File,
    /// In bytes: of this the file's offsets, lengths and the memory are to be multiples.
    block: usize,
}

impl DirectFile {
    /// Takes over `file`, which has been opened by [`file::reopen_direct`], and finds out what its disk can move by reading its first bytes.
    pub fn new(file: File) -> io::Result<DirectFile> {
        let mut result = Err(io::ErrorKind::InvalidInput.into());
        for block in BLOCKS {
            // At no multiple of a larger one.
            let mut memory = Aligned::new(2 * block, 2 * BLOCKS[1]);
            let first = Writable::from_mut_slice(&mut memory.bytes(u64::MAX)[block..]);
            match file::read_at(&file, first, 0) {
                Ok(()) => return Ok(DirectFile { file, block }),
                Err(error) => result = Err(error),
            }
        }
        result
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Fills `into` with the bytes at `offset`, all of which the file has to have.
    pub fn read_at(&self, into: &[Writable<'_>], offset: u64) -> io::Result<()> {
        if self.is_whole(offset) && into.iter().all(|buffer| buffer.is_aligned(self.block)) {
            return self.read_blocks(into, offset);
        }
        let end = offset + total_len_writable(into);
        let mut at = offset - offset % self.block as u64;
        let mut piece = self.piece(end - at);
        while at < end {
            let bytes = piece.bytes((end - at).next_multiple_of(self.block as u64));
            self.read_blocks(&[Writable::from_mut_slice(bytes)], at)?;
            let next = at + bytes.len() as u64;
            let wanted = &bytes[(at.max(offset) - at) as usize..(next.min(end) - at) as usize];
            buffers::scatter(wanted, into, at.saturating_sub(offset)).map_err(io::Error::other)?;
            at = next;
        }
        Ok(())
    }

    /// Writes the buffers, one after another, at `offset`. `false`, and nothing is written, if these are not whole blocks of the file.
    pub fn write_at(&self, from: &[Readable<'_>], offset: u64) -> io::Result<bool> {
        let len = total_len_readable(from);
        if !self.is_whole(offset) || !self.is_whole(len) {
            return Ok(false);
        }
        if from.iter().all(|buffer| buffer.is_aligned(self.block)) {
            return file::write_at(&self.file, from, offset).map(|()| true);
        }
        let mut done = 0;
        let mut piece = self.piece(len);
        while done < len {
            let bytes = piece.bytes(len - done);
            buffers::gather(from, done, bytes).map_err(io::Error::other)?;
            file::write_at(&self.file, &[Readable::from_slice(bytes)], offset + done)?;
            done += bytes.len() as u64;
        }
        Ok(true)
    }

    fn read_blocks(&self, into: &[Writable<'_>], offset: u64) -> io::Result<()> {
        let count = file::read_to_end_at(&self.file, into, offset)?;
        if count < total_len_writable(into) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file has become shorter"));
        }
        Ok(())
    }

    fn is_whole(&self, bytes: u64) -> bool {
        bytes.is_multiple_of(self.block as u64)
    }

    /// Memory to copy so many bytes by, or as many of them as are copied at a time.
    fn piece(&self, len: u64) -> Aligned {
        let len = len.min(PIECE_BYTES as u64) as usize;
        Aligned::new(len.next_multiple_of(self.block), self.block)
    }
}

/// Memory that begins at a multiple of something.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize, multiple: usize) -> Aligned {
        let memory = vec![0; len + multiple];
        let start = memory.as_ptr().align_offset(multiple);
        Aligned { memory, start, len }
    }

    /// So many of its bytes, or all.
    fn bytes(&mut self, len: u64) -> &mut [u8] {
        &mut self.memory[self.start..][..len.min(self.len as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with blocks of 4 KiB, as far as this module asks: what it moves by them any disk moves.
    #[test]
    fn parts_of_large_blocks_are_read_and_left_to_others_to_write() {
        let file = tempfile::tempfile().unwrap();
        let mut contents: Vec<u8> = (0..1 << 20).map(|at| (at / 512) as u8).collect();
        file::write_at(&file, &[Readable::from_slice(&contents)], 0).unwrap();
        let Ok(direct) = file::reopen_direct(&file) else {
            println!("skipped: no O_DIRECT here");
            return;
        };
        let direct = DirectFile { file: direct, block: 4096 };
        for (offset, len) in [(512, 512), (4096, 8192), (3584, 1024), (512, 600 << 10), ((1 << 20) - 512, 512)] {
            let mut found = vec![0; len];
            let (one, other) = found.split_at_mut(len / 3);
            let into = [Writable::from_mut_slice(one), Writable::from_mut_slice(other)];
            direct.read_at(&into, offset as u64).unwrap();
            assert!(found == contents[offset..][..len], "{len} bytes at {offset}");
        }
        for (offset, len, is_whole) in [(512, 4096, false), (4096, 512, false), (8192, 300 << 10, true)] {
            let new = vec![0xee; len];
            let from = [Readable::from_slice(&new[..len / 3]), Readable::from_slice(&new[len / 3..])];
            assert_eq!(direct.write_at(&from, offset as u64).unwrap(), is_whole, "{len} bytes at {offset}");
            if is_whole {
                contents[offset..][..len].copy_from_slice(&new);
            }
        }
        let mut found = vec![0; contents.len()];
        file::read_at(&file, Writable::from_mut_slice(&mut found), 0).unwrap();
        assert!(found == contents, "the page cache has the same");
        let behind = direct.read_at(&[Writable::from_mut_slice(&mut found[..4096])], 1 << 20);
        assert_eq!(behind.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
