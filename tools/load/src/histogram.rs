//! A histogram of durations with logarithmic buckets, 64 to each doubling: any quantile within 1.6 %.
//!
//! Knows nothing of requests. Recording is a shift, an add and a store; nothing is allocated after
//! `new`.

/// Buckets for each doubling of the value; must be a power of two.
const STEPS: u64 = 64;
const STEPS_BITS: u32 = STEPS.trailing_zeros();
/// Enough for every `u64`: the first `STEPS` values one each, then `STEPS` to a doubling.
const BUCKETS: usize = (STEPS as usize) * (64 - STEPS_BITS as usize + 1);

/// Counts of durations in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS].into_boxed_slice(), total: 0 }
    }
}

impl Histogram {
    pub fn record(&mut self, value_ns: u64) {
        self.counts[bucket(value_ns)] += 1;
        self.total += 1;
    }

    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
    }

    /// The value that the fraction `quantile` of all durations does not exceed, in nanoseconds; 0
    /// when nothing was recorded.
    pub fn quantile_ns(&self, quantile: f64) -> u64 {
        let wanted = (quantile * self.total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return middle(index);
            }
        }
        0
    }
}

/// The bucket of a value: exact below `STEPS`, then by its leading bits.
fn bucket(value: u64) -> usize {
    if value < STEPS {
        return value as usize;
    }
    let doubling = value.ilog2() - STEPS_BITS;
    let step = (value >> doubling) - STEPS;
    (STEPS as usize) * (doubling as usize + 1) + step as usize
}

/// The middle of a bucket: the inverse of `bucket`.
fn middle(index: usize) -> u64 {
    let (row, step) = (index as u64 / STEPS, index as u64 % STEPS);
    if row == 0 {
        return step;
    }
    let doubling = row - 1;
    let low = (STEPS + step) << doubling;
    low + ((1 << doubling) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_falls_near_its_buckets_middle() {
        let mut value = 1_u64;
        while value < 1 << 62 {
            for value in [value, value + value / 3, value + value / 2] {
                let middle = middle(bucket(value));
                assert!(middle.abs_diff(value) as f64 <= value as f64 / 64.0, "{value} -> {middle}");
            }
            value *= 2;
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn buckets_grow_with_values() {
        let mut last = 0;
        for value in 0..100_000 {
            let bucket = bucket(value);
            assert!(bucket == last || bucket == last + 1, "{value}");
            last = bucket;
        }
    }

    #[test]
    fn quantiles_of_a_known_spread() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile_ns(0.5), 0);
        for value in 1..=1000 {
            histogram.record(value * 1000);
        }
        assert!(histogram.quantile_ns(0.5).abs_diff(500_000) < 8_000);
        assert!(histogram.quantile_ns(0.99).abs_diff(990_000) < 16_000);
        let mut sum = Histogram::default();
        sum.add(&histogram);
        sum.add(&histogram);
        assert_eq!(sum.total, 2000);
        assert_eq!(sum.quantile_ns(0.5), histogram.quantile_ns(0.5));
    }
}
