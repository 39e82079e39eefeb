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

/// The generation whose bytes `data` begins with, if it is that of any at this place: what `fill` does, backwards.
pub fn generation_of(data: &[u8], offset: u64) -> Option<u32> {
    let (word, _) = data.split_first_chunk::<WORD_BYTES>()?;
    let mut x = u64::from_le_bytes(*word);
    x = (x ^ x >> 31 ^ x >> 62).wrapping_mul(inverse(SECOND));
    x = (x ^ x >> 27 ^ x >> 54).wrapping_mul(inverse(FIRST));
    x = x ^ x >> 30 ^ x >> 60;
    u32::try_from((x ^ offset).wrapping_mul(inverse(SPREAD))).ok()
}

const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
const FIRST: u64 = 0xbf58_476d_1ce4_e5b9;
const SECOND: u64 = 0x94d0_49bb_1331_11eb;

/// The finaliser of SplitMix64 over place and generation.
fn word_at(offset: u64, generation: u32) -> [u8; WORD_BYTES] {
    let mut x = offset ^ u64::from(generation).wrapping_mul(SPREAD);
    x = (x ^ x >> 30).wrapping_mul(FIRST);
    x = (x ^ x >> 27).wrapping_mul(SECOND);
    (x ^ x >> 31).to_le_bytes()
}

/// What undoes a multiplication by an odd number, modulo 2^64. Each round doubles the bits that are right, of which there are three at first.
const fn inverse(odd: u64) -> u64 {
    let mut inverse = odd;
    let mut bits = 3;
    while bits < u64::BITS {
        inverse = inverse.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(inverse)));
        bits *= 2;
    }
    inverse
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
    fn bytes_tell_their_generation_and_others_tell_none() {
        let mut data = vec![0; 64];
        for generation in [0, 1, 77, u32::MAX] {
            for offset in [0, 512, 1 << 40] {
                fill(&mut data, offset, generation);
                assert_eq!(generation_of(&data, offset), Some(generation));
                assert_eq!(generation_of(&data, offset + 8), None, "misplaced");
            }
        }
        assert_eq!(generation_of(&[0x55; 8], 0), None);
        assert_eq!(generation_of(&[0; 4], 0), None);
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
