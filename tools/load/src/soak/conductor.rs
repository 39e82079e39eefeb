//! [`Conductor`]: carries a plan out, in time, and what follows from it later.
//!
//! It never waits for what it has begun: what takes time is done by front ends and by the warden, so that one thing happens while
//! another does.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::soak::clerk::Clerk;
use crate::soak::disturbance::{ALL, Begun};
use crate::soak::front_end::FrontEnd;
use crate::soak::household;
use crate::soak::journal::Journal;
use crate::soak::machine::Machine;
use crate::soak::operator::Operator;
use crate::soak::plan::{Kind, Plan};
use crate::soak::site::Site;
use crate::soak::warden::Warden;
use crate::soak::watch::Watch;
use crate::sys::ProcessHandle;

/// How often it looks whether the run has failed.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Something to do at a time.
struct Later {
    at: Instant,
    act: Box<dyn FnOnce() -> Result<()> + Send>,
}

/// All that can be disturbed.
pub struct Conductor {
    pub machines: Vec<Arc<Machine>>,
    pub site: Arc<Site>,
    pub clerk: Arc<Clerk>,
    pub journal: Arc<Journal>,
    pub warden: Warden,
    pub operator: Operator,
    watch: Arc<Watch>,
    /// Each machine's keeper, as far as it is known.
    keepers: Vec<Option<u32>>,
    later: Vec<Later>,
}

impl Conductor {
    pub fn new(
        machines: Vec<Arc<Machine>>,
        site: Arc<Site>,
        clerk: Arc<Clerk>,
        journal: Arc<Journal>,
        warden: Warden,
        operator: Operator,
        watch: Arc<Watch>,
    ) -> Self {
        let keepers = vec![None; machines.len()];
        Self { machines, site, clerk, journal, warden, operator, watch, keepers, later: Vec::new() }
    }

    /// Disturbs for so long, and then until nothing follows any more.
    pub fn run(&mut self, seed: u64, time: Duration) -> Result<()> {
        let targets = |fits: &dyn Fn(&Machine) -> bool| {
            (0..self.machines.len()).filter(|index| fits(&self.machines[*index])).collect()
        };
        let kinds = ALL.map(|it| Kind {
            weight: it.weight(),
            targets: targets(&|machine| it.fits(&machine.disk)),
            spacing: it.spacing(),
        });
        let start = Instant::now();
        for planned in Plan::new(kinds.to_vec(), seed).take_while(|planned| planned.at < time) {
            self.wait_until(start + planned.at)?;
            if self.watch.failure().is_some() {
                break;
            }
            self.begin(planned.kind, planned.target, fastrand::Rng::with_seed(planned.seed))?;
        }
        while let Some(last) = self.later.iter().map(|later| later.at).max()
            && self.watch.failure().is_none()
        {
            self.wait_until(last)?;
        }
        Ok(())
    }

    fn begin(&mut self, kind: usize, target: usize, random: fastrand::Rng) -> Result<()> {
        let disturbance = ALL[kind];
        let begun = disturbance.begin(self, kind, target, random).with_context(|| disturbance.name())?;
        let whom = &self.machines[target].disk.volume;
        let what = match begun {
            Begun::Done => {
                self.journal.done(kind);
                "done".to_owned()
            }
            Begun::Asked => "asked for".to_owned(),
            Begun::Missed(why) => {
                self.journal.missed(kind);
                format!("missed: {why}")
            }
        };
        self.journal.say(&format!("{whom}: {}: {what}", disturbance.name()));
        Ok(())
    }

    /// Waits, and does what is due meanwhile.
    fn wait_until(&mut self, until: Instant) -> Result<()> {
        loop {
            let now = Instant::now();
            while let Some(due) = self.later.iter().position(|later| later.at <= now) {
                (self.later.swap_remove(due).act)()?;
            }
            if now >= until || self.watch.failure().is_some() {
                return Ok(());
            }
            let next = self.later.iter().map(|later| later.at).fold(until, Instant::min);
            thread::sleep(next.saturating_duration_since(now).min(LOOK_INTERVAL));
        }
    }

    /// Has something done after so long.
    pub fn later(&mut self, after: Duration, act: impl FnOnce() -> Result<()> + Send + 'static) {
        self.later.push(Later { at: Instant::now() + after, act: Box::new(act) });
    }

    /// Has a machine's front end do something when it comes to it.
    pub fn ask(
        &self,
        kind: usize,
        target: usize,
        task: impl FnOnce(&mut FrontEnd) -> Result<()> + Send + 'static,
    ) -> Begun {
        let machine = &self.machines[target];
        let (journal, name) = (self.journal.clone(), ALL[kind].name());
        let is_asked = machine.ask(Box::new(move |front_end| {
            let ongoing = journal.begin(kind, Some(front_end.machine.number));
            task(front_end).context(name)?;
            journal.end(ongoing);
            journal.done(kind);
            journal.say(&format!("{}: {name}: done", front_end.disk().volume));
            Ok(())
        }));
        if is_asked { Begun::Asked } else { Begun::Missed("its front end has enough to do") }
    }

    /// A machine's keeper and its process number, or why there is none.
    pub fn keeper(&mut self, target: usize) -> Result<(u32, ProcessHandle), Begun> {
        let known = self.keepers[target].and_then(|pid| Some((pid, household::keeper(pid)?)));
        if let Some(known) = known {
            return Ok(known);
        }
        let answer = self.site.try_ask("GET", &self.machines[target].disk.attachment(), None);
        let answer = answer.ok_or(Begun::Missed("there is no daemon to ask for its keeper"))?;
        let pid = answer.body["process"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        let found = pid.and_then(|pid| Some((pid, household::keeper(pid)?)));
        self.keepers[target] = pid;
        found.ok_or(Begun::Missed("its keeper is not known yet"))
    }

    /// A machine's worker, or why there is not exactly one: one may be about to take over from another.
    pub fn worker(&mut self, target: usize) -> Result<ProcessHandle, Begun> {
        let (keeper, _) = self.keeper(target)?;
        let mut workers = household::workers(keeper);
        match (workers.pop(), workers.len()) {
            (Some(worker), 0) => Ok(worker),
            (Some(_), _) => Err(Begun::Missed("one worker takes over from another")),
            (None, _) => Err(Begun::Missed("its worker has not started yet")),
        }
    }
}
