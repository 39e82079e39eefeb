//! [`Strikes`]: how often something was done to a process, so that whoever suffers from it can tell whether somebody did.
//!
//! A connection that ends, or a question that nobody answers, is excused by a strike and by nothing else.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counted twice: as one begins, and when all that it does at once is over.
#[derive(Debug, Default)]
pub struct Strikes {
    begun: AtomicU64,
    over: AtomicU64,
}

/// A moment among strikes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment(u64);

impl Strikes {
    /// Carries one out.
    pub fn strike<T>(&self, strike: impl FnOnce() -> T) -> T {
        self.begin();
        let result = strike();
        self.end();
        result
    }

    /// One begins, which somebody else may end.
    pub fn begin(&self) {
        self.begun.fetch_add(1, Ordering::SeqCst);
    }

    /// It is over.
    pub fn end(&self) {
        self.over.fetch_add(1, Ordering::SeqCst);
    }

    /// Now: what is begun and not over counts as what comes later.
    pub fn now(&self) -> Moment {
        Moment(self.over.load(Ordering::SeqCst))
    }

    /// Whether there was one since then.
    pub fn since(&self, moment: Moment) -> bool {
        self.begun.load(Ordering::SeqCst) > moment.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_is_not_over_is_still_to_come() {
        let strikes = Strikes::default();
        let before = strikes.now();
        assert!(!strikes.since(before));
        let during = strikes.strike(|| strikes.now());
        assert!(strikes.since(before) && strikes.since(during));
        assert!(!strikes.since(strikes.now()));
    }
}
