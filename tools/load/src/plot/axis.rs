//! A logarithmic axis: where a value lies on it, and at which values it has lines.

/// From `low` to `high` over the pixels from `left` to `right`.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    low: f64,
    high: f64,
    left: f64,
    right: f64,
}

impl Axis {
    /// Has room for all of these values, and ends at lines of its own.
    pub fn around(values: impl IntoIterator<Item = f64>, left: f64, right: f64) -> Self {
        let (least, most) =
            values.into_iter().fold((f64::INFINITY, 0.0_f64), |(least, most), it| (least.min(it), most.max(it)));
        let low = ticks().rev().find(|tick| *tick < least).unwrap_or(least);
        let high = ticks().find(|tick| *tick > most).unwrap_or(most);
        Self { low, high, left, right }
    }

    pub fn at(&self, value: f64) -> f64 {
        self.left + (value / self.low).ln() / (self.high / self.low).ln() * (self.right - self.left)
    }

    pub fn ticks(self) -> impl Iterator<Item = f64> {
        ticks().filter(move |tick| (self.low..=self.high).contains(tick))
    }
}

/// One, two and five times each power of ten, from a nanosecond to a second in µs.
fn ticks() -> impl DoubleEndedIterator<Item = f64> {
    (-3..=6).flat_map(|power| [1.0, 2.0, 5.0].map(|step| step * 10_f64.powi(power)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_lie_between_the_ends() {
        let axis = Axis::around([0.37, 206.0, 4.0], 100.0, 700.0);
        assert_eq!((axis.low, axis.high), (0.2, 500.0));
        assert!((axis.at(0.2) - 100.0).abs() < 1e-9 && (axis.at(500.0) - 700.0).abs() < 1e-9);
        // Equal ratios are equal distances.
        let step = |a, b| axis.at(b) - axis.at(a);
        assert!((step(1.0, 2.0) - step(50.0, 100.0)).abs() < 1e-9);
        assert!(axis.ticks().eq([0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0]));
    }
}
