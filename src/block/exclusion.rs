//! [`Exclusion`]: who may change what a stretch of clusters has: one that fills in what a write leaves out, or makes it zero; or any number that write whole clusters.

use std::sync::{Condvar, Mutex, MutexGuard};

/// Of one stretch, or of several.
pub struct Exclusion {
    shares: Mutex<Shares>,
    free: Condvar,
}

/// Who has a share, and who waits until nobody has.
pub struct Shares {
    held: u32,
    waiting: u32,
}

impl Exclusion {
    /// Nobody's.
    pub const fn new() -> Exclusion {
        Exclusion { shares: Mutex::new(Shares { held: 0, waiting: 0 }), free: Condvar::new() }
    }

    /// Waits until it is the caller's alone, and stays so while the guard lives.
    pub fn take(&self) -> MutexGuard<'_, Shares> {
        let mut shares = self.shares.lock().expect("no holder of this lock panics");
        while shares.held > 0 {
            shares.waiting += 1;
            shares = self.free.wait(shares).expect("no holder of this lock panics");
            shares.waiting -= 1;
        }
        shares
    }

    /// Takes a share, unless somebody has it alone or waits for that. Whether it did.
    pub fn try_share(&self) -> bool {
        let Ok(mut shares) = self.shares.try_lock() else { return false };
        let free = shares.waiting == 0;
        shares.held += u32::from(free);
        free
    }

    /// Gives a share back.
    pub fn give_back(&self) {
        let mut shares = self.shares.lock().expect("no holder of this lock panics");
        shares.held -= 1;
        if shares.held == 0 && shares.waiting > 0 {
            self.free.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn shares_go_together_and_whoever_wants_it_alone_is_not_overtaken() {
        let (exclusion, has_it) = (Exclusion::new(), AtomicBool::new(false));
        assert!(exclusion.try_share() && exclusion.try_share());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _alone = exclusion.take();
                has_it.store(true, Ordering::Release);
            });
            while exclusion.shares.lock().unwrap().waiting == 0 {
                std::thread::yield_now();
            }
            assert!(!exclusion.try_share(), "one waits");
            exclusion.give_back();
            assert!(!has_it.load(Ordering::Acquire), "the other share is held");
            exclusion.give_back();
        });
        assert!(has_it.load(Ordering::Acquire));
        let alone = exclusion.take();
        assert!(!exclusion.try_share());
        drop(alone);
        assert!(exclusion.try_share());
    }
}
