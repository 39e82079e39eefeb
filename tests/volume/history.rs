//! Histories: what a guest asks of a volume, step by step, scripted or random.

use std::ops::Range;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// One step. Ranges are of sectors.
#[derive(Clone, Debug)]
pub enum Step {
    Write(Range<u64>),
    Zeroes {
        range: Range<u64>,
        give_back: bool,
    },
    Discard(Range<u64>),
    /// Completes the requests since the last one.
    Commit,
    Flush,
    /// Closes the volume in good order and opens it again.
    Reopen,
    /// The process dies; its successor carries out again, in order, what had not completed.
    Kill,
    /// The process completes what it has and hands over to another, as an upgrade does: nothing is closed or made durable.
    HandOver,
}

/// Random steps that stay within `watched`, a commit behind every few.
pub fn random(rng: &mut StdRng, watched: &[Range<u64>], count: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    while steps.len() < count {
        for _ in 0..rng.random_range(1..4) {
            let within = &watched[rng.random_range(0..watched.len())];
            let start = rng.random_range(within.clone());
            let len = if rng.random_bool(0.5) { rng.random_range(1..9) } else { rng.random_range(1..40) };
            let range = start..(start + len).min(within.end);
            steps.push(match rng.random_range(0..10) {
                0 => Step::Discard(range),
                1 => Step::Discard(start / 8 * 8..(range.end.next_multiple_of(8)).min(within.end)),
                2 => Step::Zeroes { range, give_back: rng.random() },
                _ => Step::Write(range),
            });
        }
        steps.push(Step::Commit);
        match rng.random_range(0..14) {
            0..4 => steps.push(Step::Flush),
            4 => steps.push(Step::Reopen),
            5 => steps.push(Step::HandOver),
            // Ahead of what would have completed, or behind it.
            6 => steps.insert(steps.len() - 1, Step::Kill),
            7 => steps.push(Step::Kill),
            _ => {}
        }
    }
    steps
}

/// The seeds of a test: some fixed ones, and one from the clock.
pub fn seeds(fixed: Range<u64>) -> Vec<u64> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    fixed.chain([now as u64]).collect()
}

/// A generator from a seed, which is printed when the test fails.
pub fn seeded(seed: u64) -> (StdRng, Context) {
    (StdRng::seed_from_u64(seed), Context(format!("seed {seed}")))
}

/// Something to be printed when the test fails while this lives.
pub struct Context(pub String);

impl Drop for Context {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("with {}", self.0);
        }
    }
}
