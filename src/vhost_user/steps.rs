//! The steps at which a worker may die, and a way to have it die at one of them: in builds with debug assertions, and nowhere else.
//!
//! A test names a file in the environment of a backend. The next worker reads it, removes it, and dies at the step that it says:
//! `NAME COUNT`, the step's name and how many times it is to be reached first. Its successor finds no file and lives.
//!
//! In builds for fuzzers (`cfg(fuzzing)`) a worker is a thread, or a model of one, and unwinds in place of dying: what is in memory then is what
//! a death there leaves.

/// A step behind which a death finds the ring and its inflight slot in a state of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Step {
    /// A slot is filled in, and does not count yet.
    Begin,
    /// Taking: the request has a number, and is not in flight.
    TakeNumber,
    /// Taking: it is in flight.
    TakeFlag,
    /// The request has been carried out, and is not complete.
    Executed,
    /// Completing: the head says which one was before it.
    CompleteBefore,
    /// Completing: it is the last one.
    CompleteLast,
    /// Completing: its used element is written.
    UsedElement,
    /// The used index is not written yet.
    Unpublished,
    /// The used index is written.
    Published,
    /// A head is no longer in flight.
    ShownClear,
    /// The used index is noted.
    ShownUsed,
    /// The driver has been notified.
    Notified,
    /// Recovering: a head is no longer in flight.
    RecoverClear,
    /// Recovering: the used index is noted.
    RecoverUsed,
    /// Recovering: the ring is about to be served.
    Recovered,
    /// An order of the keeper's has been carried out, and is not answered.
    Unanswered,
}

/// All of them.
pub const ALL: [Step; 16] = [
    Step::Begin,
    Step::TakeNumber,
    Step::TakeFlag,
    Step::Executed,
    Step::CompleteBefore,
    Step::CompleteLast,
    Step::UsedElement,
    Step::Unpublished,
    Step::Published,
    Step::ShownClear,
    Step::ShownUsed,
    Step::Notified,
    Step::RecoverClear,
    Step::RecoverUsed,
    Step::Recovered,
    Step::Unanswered,
];

/// The environment's name for the file that says where to die.
pub const ABORT_VARIABLE: &str = "PANDO_ABORT_AT";

/// Says that a step has been reached.
#[inline(always)]
pub fn reach(step: Step) {
    #[cfg(debug_assertions)]
    chosen::reach(step);
    let _ = step;
}

/// What whoever dies unwinds with.
#[cfg(fuzzing)]
pub struct Death;

/// From now on, whoever reaches `step` for the `count`th time unwinds with [`Death`]; with a count of 0, nobody does.
#[cfg(fuzzing)]
pub fn unwind_at(step: Step, count: u64) {
    chosen::unwind_at(step, count);
}

/// Finds out where this process is to die, if anywhere.
pub fn choose() {
    #[cfg(debug_assertions)]
    chosen::choose();
}

#[cfg(debug_assertions)]
mod chosen {
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    use super::{ABORT_VARIABLE, ALL, Step};

    const NONE: usize = usize::MAX;
    static STEP: AtomicUsize = AtomicUsize::new(NONE);
    static LEFT: AtomicU64 = AtomicU64::new(0);

    pub fn choose() {
        let Some(path) = std::env::var_os(ABORT_VARIABLE) else { return };
        let Ok(text) = std::fs::read_to_string(&path) else { return };
        let mut words = text.split_whitespace();
        let (name, count) = (words.next().unwrap_or(""), words.next().and_then(|count| count.parse().ok()));
        let step = ALL.into_iter().find(|step| format!("{step:?}") == name);
        let (Some(step), Some(count)) = (step, count) else { panic!("{text:?} says no step and count") };
        std::fs::remove_file(&path).expect("a file of the test's");
        LEFT.store(count, Ordering::Relaxed);
        STEP.store(step as usize, Ordering::Relaxed);
    }

    #[cfg(fuzzing)]
    pub fn unwind_at(step: Step, count: u64) {
        STEP.store(NONE, Ordering::Relaxed);
        LEFT.store(count, Ordering::Relaxed);
        STEP.store(if count == 0 { NONE } else { step as usize }, Ordering::Relaxed);
    }

    /// As a death at this very instruction: nothing is tidied up.
    #[cfg(not(fuzzing))]
    fn die() -> ! {
        std::process::abort()
    }

    #[cfg(fuzzing)]
    fn die() -> ! {
        crate::sys::stand_in::fall();
        std::panic::resume_unwind(Box::new(super::Death))
    }

    pub fn reach(step: Step) {
        if STEP.load(Ordering::Relaxed) == step as usize && LEFT.fetch_sub(1, Ordering::Relaxed) == 1 {
            die();
        }
    }
}
