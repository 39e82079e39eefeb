//! Files without the zeros: whole blocks of nothing but zeros become holes.
//!
//! Knows a file, and the bytes that it has or is to have; not where those come from.

use std::fs::File;
use std::io;

use crate::sys::buffers::Readable;
use crate::sys::file;

/// What a file system allocates at a time; shorter runs of zeros would save nothing.
pub(super) const BLOCK_BYTES: usize = 4096;

/// How much is written at a time. The page cache takes a piece of memory as large as the write, and a large one is more
/// often memory that a hypervisor took back and has to give again: in a virtual machine, writes of 1 MiB took three times as long.
const WRITE_BYTES_MAX: usize = 128 << 10;
const _: () = assert!(WRITE_BYTES_MAX.is_multiple_of(BLOCK_BYTES));

/// Writes `bytes` at `offset` of a new file, except for the blocks that are all zeros. `offset` is a multiple of a block.
pub(super) fn write(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        let len = run(&bytes[at..], is_zero);
        at += len;
        let len = run(&bytes[at..], |block| !is_zero(block)).min(WRITE_BYTES_MAX);
        if len > 0 {
            file::write_at(file, &[Readable::from_slice(&bytes[at..at + len])], offset + at as u64)?;
        }
        at += len;
    }
    Ok(())
}

/// A hole of less than this would cost more, as one more thing that the file system keeps in mind, than it gives back.
const HOLE_BYTES_MIN: usize = 64 << 10;

/// Gives back the space of longer runs of zeros in `bytes`, which are what the file has at `offset`, a multiple of a block.
pub(super) fn punch(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        let len = run(&bytes[at..], is_zero);
        if len >= HOLE_BYTES_MIN {
            file::punch_hole(file, offset + at as u64, len as u64)?;
        }
        at += len;
        at += run(&bytes[at..], |block| !is_zero(block));
    }
    Ok(())
}

/// How many bytes at the start are in blocks of one kind.
fn run(bytes: &[u8], is_kind: impl Fn(&[u8]) -> bool) -> usize {
    bytes.chunks(BLOCK_BYTES).take_while(|block| is_kind(block)).map(<[u8]>::len).sum()
}

fn is_zero(block: &[u8]) -> bool {
    // In pieces that fill vector registers, and over at the first that is not zero.
    block.chunks(64).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn blocks_of_zeros_take_no_space() {
        let mut file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; 64 * BLOCK_BYTES + 100];
        bytes[3 * BLOCK_BYTES + 4095] = 1;
        bytes[10 * BLOCK_BYTES] = 2;
        bytes[64 * BLOCK_BYTES + 99] = 3;
        write(&file, &bytes, 0).unwrap();
        assert!(
            file.metadata().unwrap().blocks() * 512 <= 6 * BLOCK_BYTES as u64,
            "three blocks, and some for the map"
        );
        let mut found = Vec::new();
        file.read_to_end(&mut found).unwrap();
        assert!(found == bytes);
    }
}
