//! [`Plan`]: what happens when to whom, by a seed alone.
//!
//! Each kind of disturbance comes as often as its weight says: from a bag with all of them, which is filled again when it is empty.
//! One that may not come yet is put back. Some follow each other at once on the same machine, so that they meet. Knows nothing of how any of it is done.

use std::time::Duration;

/// The longest time between two, and between two that are to meet.
const GAP_MAX: Duration = Duration::from_millis(500);
const GAP_MAX_MEETING: Duration = Duration::from_millis(20);
/// One in so many meets the one before.
const MEETS: u8 = 3;

/// What a plan has to know of a kind of disturbance.
#[derive(Clone, Debug)]
pub struct Kind {
    pub weight: u32,
    /// The machines that it fits.
    pub targets: Vec<usize>,
    /// How much time there has to be between two of one machine.
    pub spacing: Duration,
}

/// One disturbance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// From the start of the run.
    pub at: Duration,
    pub kind: usize,
    pub target: usize,
    /// For what else is random about it.
    pub seed: u64,
}

/// Disturbances in their order, without end.
#[derive(Debug)]
pub struct Plan {
    kinds: Vec<Kind>,
    random: fastrand::Rng,
    bag: Vec<usize>,
    at: Duration,
    last_target: usize,
    /// By kind and machine: before when it comes to nothing more of it.
    not_before: Vec<Vec<Duration>>,
}

impl Plan {
    /// For kinds of which at least one may come at any time.
    pub fn new(kinds: Vec<Kind>, seed: u64) -> Self {
        let machines = kinds.iter().flat_map(|kind| &kind.targets).max().map_or(0, |most| most + 1);
        let not_before = vec![vec![Duration::ZERO; machines]; kinds.len()];
        let random = fastrand::Rng::with_seed(seed);
        Self { kinds, random, bag: Vec::new(), at: Duration::ZERO, last_target: 0, not_before }
    }

    /// A kind whose time has come, and the machines for which it has.
    fn draw(&mut self) -> (usize, Vec<usize>) {
        loop {
            let mut put_back = Vec::new();
            while let Some(kind) = self.bag.pop() {
                let is_due = |target: &&usize| self.not_before[kind][**target] <= self.at;
                let targets: Vec<usize> = self.kinds[kind].targets.iter().filter(is_due).copied().collect();
                if !targets.is_empty() {
                    self.bag.extend(put_back);
                    return (kind, targets);
                }
                put_back.push(kind);
            }
            // All that is left in the bag has to wait, and so a new one is not far ahead of it.
            let all = self.kinds.iter().enumerate();
            self.bag = all.flat_map(|(kind, it)| std::iter::repeat_n(kind, it.weight as usize)).collect();
            self.random.shuffle(&mut self.bag);
            self.bag.extend(put_back);
        }
    }
}

impl Iterator for Plan {
    type Item = Planned;

    fn next(&mut self) -> Option<Planned> {
        let meets = self.random.u8(..MEETS) == 0;
        let gap = if meets { GAP_MAX_MEETING } else { GAP_MAX };
        self.at += gap.mul_f64(self.random.f64());
        let (kind, targets) = self.draw();
        let meets = meets && targets.contains(&self.last_target);
        let target = if meets { self.last_target } else { targets[self.random.usize(..targets.len())] };
        self.not_before[kind][target] = self.at + self.kinds[kind].spacing;
        self.last_target = target;
        Some(Planned { at: self.at, kind, target, seed: self.random.u64(..) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds() -> Vec<Kind> {
        let kind = |weight, targets, seconds| Kind { weight, targets, spacing: Duration::from_secs(seconds) };
        vec![kind(3, vec![0, 1, 2], 0), kind(1, vec![1], 0), kind(2, vec![0, 1, 2], 1)]
    }

    #[test]
    fn a_seed_makes_the_same_plan_again() {
        let plan = |seed| Plan::new(kinds(), seed).take(1000).collect::<Vec<_>>();
        assert_eq!(plan(1), plan(1));
        assert_ne!(plan(1), plan(2));
    }

    #[test]
    fn a_plan_keeps_to_weights_spacing_and_targets() {
        let planned: Vec<_> = Plan::new(kinds(), 3).take(600).collect();
        let count = |kind| planned.iter().filter(|it| it.kind == kind).count();
        assert!(count(0).abs_diff(300) <= 6 && count(1).abs_diff(100) <= 3 && count(2).abs_diff(200) <= 6);
        assert!(planned.iter().all(|it| it.kind != 1 || it.target == 1));
        assert!(planned.is_sorted_by_key(|it| it.at));
        for target in 0..3 {
            let times: Vec<_> =
                planned.iter().filter(|it| (it.kind, it.target) == (2, target)).map(|it| it.at).collect();
            assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= Duration::from_secs(1)));
        }
        let meeting = planned
            .windows(2)
            .filter(|pair| pair[0].target == pair[1].target && pair[1].at - pair[0].at < GAP_MAX_MEETING);
        assert!(meeting.count() > 60);
    }
}
