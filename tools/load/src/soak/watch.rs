//! [`Watch`]: sees that everybody gets on, and keeps the first thing that went wrong.
//!
//! Whoever waits for something says so with a [`Pulse`]; a wait that lasts too long ends the run, with all that the others wait for.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long anybody may wait for anything. A stopped worker, a daemon's death and a backend's one after the other are far below it.
const PATIENCE: Duration = Duration::from_secs(90);

/// What one thread waits for.
#[derive(Debug)]
pub struct Pulse {
    who: String,
    /// Since when, and for what; none: for nothing that has to come.
    waits: Mutex<Option<(Instant, String)>>,
}

impl Pulse {
    /// From now on it waits for this.
    pub fn waits_for(&self, what: impl Into<String>) {
        *self.waits.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), what.into()));
    }

    /// It waits for nothing.
    pub fn rests(&self) {
        *self.waits.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn waiting(&self) -> Option<(Duration, String)> {
        let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        waits.as_ref().map(|(since, what)| (since.elapsed(), what.clone()))
    }
}

/// What somebody can tell of how things stand.
type Testimony = Box<dyn Fn() -> String + Send>;

#[derive(Default)]
pub struct Watch {
    pulses: Mutex<Vec<Arc<Pulse>>>,
    failure: Mutex<Option<String>>,
    witnesses: Mutex<Vec<(String, Testimony)>>,
}

impl Watch {
    /// The pulse of a thread.
    pub fn pulse(&self, who: impl Into<String>) -> Arc<Pulse> {
        let pulse = Arc::new(Pulse { who: who.into(), waits: Mutex::default() });
        self.pulses.lock().unwrap_or_else(PoisonError::into_inner).push(pulse.clone());
        pulse
    }

    /// Has somebody tell how things stand after a failure.
    pub fn call_witness(&self, who: impl Into<String>, testimony: impl Fn() -> String + Send + 'static) {
        let mut witnesses = self.witnesses.lock().unwrap_or_else(PoisonError::into_inner);
        witnesses.push((who.into(), Box::new(testimony)));
    }

    /// What they all tell.
    pub fn testimonies(&self) -> String {
        let witnesses = self.witnesses.lock().unwrap_or_else(PoisonError::into_inner);
        witnesses.iter().map(|(who, testimony)| format!("{who}:\n{}", testimony())).collect()
    }

    /// Notes that something went wrong. What goes wrong afterwards mostly follows from it.
    pub fn fail(&self, who: &str, error: &anyhow::Error) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| format!("{who}: {error:#}"));
    }

    /// What went wrong, if anything.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks whether somebody has waited for too long, which is a failure.
    pub fn look(&self) {
        let pulses = self.pulses.lock().unwrap_or_else(PoisonError::into_inner);
        let mut waiting: Vec<_> = pulses.iter().filter_map(|pulse| Some((pulse.waiting()?, &pulse.who))).collect();
        if waiting.iter().all(|((waited, _), _)| *waited < PATIENCE) {
            return;
        }
        waiting.sort_by_key(|((waited, _), _)| std::cmp::Reverse(*waited));
        let mut text = format!("nobody may wait longer than {PATIENCE:?}; these wait:");
        for ((waited, what), who) in waiting {
            text += &format!("\n  {who}: {:.1} s for {what}", waited.as_secs_f64());
        }
        self.fail("watchdog", &anyhow::anyhow!(text));
    }

    /// Does something in a thread of its own; its error, or its panic, is a failure.
    pub fn spawn(
        self: &Arc<Self>,
        who: &str,
        work: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
    ) -> std::io::Result<std::thread::JoinHandle<()>> {
        let (watch, who) = (self.clone(), who.to_owned());
        std::thread::Builder::new().name(who.clone()).spawn(move || {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            match result {
                Ok(Ok(())) => {}
                Ok(Err(error)) => watch.fail(&who, &error),
                Err(_) => watch.fail(&who, &anyhow::anyhow!("a panic, which is told above")),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_is_kept_and_a_panic_is_one() {
        let watch = Arc::new(Watch::default());
        watch.spawn("one", || anyhow::bail!("broken")).unwrap().join().unwrap();
        watch.spawn("two", || panic!("for a test")).unwrap().join().unwrap();
        assert_eq!(watch.failure().unwrap(), "one: broken");
        let watch = Arc::new(Watch::default());
        watch.spawn("two", || panic!("for a test")).unwrap().join().unwrap();
        assert!(watch.failure().unwrap().starts_with("two: a panic"));
    }

    #[test]
    fn a_long_wait_is_told_with_all_others() {
        let watch = Watch::default();
        let (slow, quick) = (watch.pulse("slow"), watch.pulse("quick"));
        slow.waits_for("an answer");
        watch.look();
        assert!(watch.failure().is_none());
        *slow.waits.lock().unwrap() = Some((Instant::now() - PATIENCE, "an answer".to_owned()));
        quick.waits_for("a completion");
        watch.look();
        let failure = watch.failure().unwrap();
        assert!(failure.contains("slow: 90.0 s for an answer") && failure.contains("quick: 0.0 s for a completion"));
    }
}
