//! Bytes that tell where they belong and which write put them there.
//!
//! Every eight bytes are a function of their place on the disk and of a generation, so that a block
//! that is stale, misplaced, torn or zero shows itself, and no copy of a disk has to be kept. The
//! benchmark's base image is generation `BASE` of this.

/// The generation of the base image's bytes; writes have higher ones.
pub const BASE: u32 = 0;

const WORD_BYTES: usize = 8;

/// Fills `data`, which lies at `offset` on the disk, both multiples of eight.
pub fn fill(data: &mut [u8], offset: u64, generation: u32) {
    for (index, word) in data.chunks_exact_mut(WORD_BYTES).enumerate() {
        word.copy_from_slice(&word_at(offset + (index * WORD_BYTES) as u64, generation));
    }
}

/// Where on the disk `data` first differs from what `fill` made of it.
pub fn mismatch(data: &[u8], offset: u64, generation: u32) -> Option<u64> {
    let offsets = (offset..).step_by(WORD_BYTES);
    let mut words = data.chunks_exact(WORD_BYTES).zip(offsets);
    words.find(|(word, at)| **word != word_at(*at, generation)).map(|(_, at)| at)
}

/// The finaliser of SplitMix64 over place and generation.
fn word_at(offset: u64, generation: u32) -> [u8; WORD_BYTES] {
    let mut x = offset ^ u64::from(generation).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ x >> 31).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_stale_misplaced_and_torn_bytes() {
        let mut data = vec![0; 4096];
        fill(&mut data, 8192, 3);
        assert_eq!(mismatch(&data, 8192, 3), None);
        assert_eq!(mismatch(&data, 8192, 2), Some(8192), "stale");
        assert_eq!(mismatch(&data, 4096, 3), Some(4096), "misplaced");
        fill(&mut data[512..1024], 8192 + 512, 4);
        assert_eq!(mismatch(&data, 8192, 3), Some(8192 + 512), "torn");
        assert_eq!(mismatch(&[0; 512], 0, 1), Some(0), "zero");
    }

    #[test]
    fn parts_agree_with_the_whole() {
        let mut whole = vec![0; 2048];
        fill(&mut whole, 0, 9);
        let mut part = vec![0; 512];
        fill(&mut part, 1024, 9);
        assert_eq!(whole[1024..1536], part);
    }
}
