//! A random order of the numbers below `n`, each exactly once, without a table.
//!
//! A Feistel network over the next power of four, walked until it lands below `n`: a bijection by
//! construction. Knows nothing of blocks or disks.

/// A permutation of `0..n`, chosen by a seed.
#[derive(Clone, Debug)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    pub fn new(n: u64, seed: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let mut random = fastrand::Rng::with_seed(seed);
        Self { n, half_bits: bits.div_ceil(2).max(1), keys: std::array::from_fn(|_| random.u64(..)) }
    }

    /// The number at `index`, which must be below `n`.
    pub fn at(&self, index: u64) -> u64 {
        debug_assert!(index < self.n);
        let mut value = index;
        // The network permutes a range of at most 4n numbers, so following it from a number below
        // n leads back below n, after four steps at worst on average.
        loop {
            value = self.mix(value);
            if value < self.n {
                return value;
            }
        }
    }

    fn mix(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            let mixed = (right ^ key).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (left, right) = (right, left ^ ((mixed >> 29) & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_once() {
        for n in [1, 2, 3, 5, 64, 1000, 65_536, 100_003] {
            for seed in 0..3 {
                let permutation = Permutation::new(n, seed);
                let mut seen = vec![false; n as usize];
                for index in 0..n {
                    let value = permutation.at(index) as usize;
                    assert!(!std::mem::replace(&mut seen[value], true), "{n} {seed} {index}");
                }
            }
        }
    }

    #[test]
    fn neighbours_are_scattered() {
        let permutation = Permutation::new(1 << 19, 7);
        let near =
            (1..10_000).filter(|&index| permutation.at(index).abs_diff(permutation.at(index - 1)) < 1 << 9).count();
        // By chance two numbers of 2^19 lie within 2^9 of each other once in 512 times.
        assert!(near < 60, "{near} of 10000");
    }
}
