//! Long operations: at work on threads of their own, watched and cancelled by any client.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::Host;
use super::access::Caller;
use super::api::types::{Job, JobState};
use super::catalog::now;
use super::error::{Error, chain};

/// Jobs at work at once; more would only be slower together.
const RUNNING_MAX: usize = 8;

/// The jobs at work.
#[derive(Default)]
pub struct Jobs {
    running: Mutex<BTreeMap<i64, Arc<Running>>>,
}

/// A job at work.
pub struct Running {
    id: i64,
    kind: &'static str,
    object: String,
    by: String,
    started_at: i64,
    started: Instant,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    /// Asked to stop.
    pub cancelled: AtomicBool,
}

impl Running {
    /// Notes how far it is.
    pub fn progress(&self, done_bytes: u64, total_bytes: u64) {
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
        self.done_bytes.store(done_bytes, Ordering::Relaxed);
    }

    fn view(&self) -> Job {
        let (done, total) = (self.done_bytes.load(Ordering::Relaxed), self.total_bytes.load(Ordering::Relaxed));
        let passed = self.started.elapsed().as_secs_f64();
        let eta =
            (done > 0 && total > 0).then(|| (passed * total.saturating_sub(done) as f64 / done as f64).ceil() as u64);
        Job {
            id: self.id,
            kind: self.kind.to_owned(),
            object: self.object.clone(),
            state: JobState::Running,
            done_bytes: done,
            total_bytes: total,
            eta_seconds: eta,
            result: None,
            error: None,
            started_at: self.started_at,
            started_by: self.by.clone(),
        }
    }
}

impl Jobs {
    fn running(&self) -> MutexGuard<'_, BTreeMap<i64, Arc<Running>>> {
        self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// How many are at work.
    pub fn count(&self) -> usize {
        self.running().len()
    }
}

impl Host {
    /// Starts a job: `work` runs on a thread of its own, and what it returns is the job's result.
    pub fn start_job(
        self: &Arc<Self>,
        kind: &'static str,
        object: String,
        by: String,
        work: impl FnOnce(&Host, &Running) -> Result<String, Error> + Send + 'static,
    ) -> Result<Job, Error> {
        if self.jobs.count() >= RUNNING_MAX {
            return Err(Error::Busy { what: "as many jobs are at work as can be at once" });
        }
        let id = self.catalog.change(|facts| facts.insert_job(kind, &object, &by))?;
        let running = Arc::new(Running {
            id,
            kind,
            object,
            by,
            started_at: now(),
            started: Instant::now(),
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
        });
        self.jobs.running().insert(id, Arc::clone(&running));
        let view = running.view();
        let host = Arc::clone(self);
        let spawned = std::thread::Builder::new().name(format!("job {id}")).spawn(move || {
            let result = work(&host, &running);
            let (state, result, error) = match result {
                Ok(result) => ("done", Some(result), None),
                Err(_) if running.cancelled.load(Ordering::Relaxed) => ("cancelled", None, None),
                Err(error) => ("failed", None, Some(chain(&error))),
            };
            let noted = host.catalog.change(|facts| facts.end_job(id, state, result.as_deref(), error.as_deref()));
            if let Err(error) = noted {
                log::error!("the end of job {id} could not be noted: {}", chain(&error));
            }
            host.jobs.running().remove(&id);
            if let Some(error) = error {
                host.event("job.failed", &format!("job:{id}"), &error);
            }
        });
        if let Err(source) = spawned {
            self.jobs.running().remove(&id);
            return Err(Error::Io { action: "start", path: format!("a thread for job {id}"), source });
        }
        Ok(view)
    }

    /// The caller's jobs, the newest first; all of them for who may everything.
    pub fn list_jobs(&self, caller: &Caller) -> Result<Vec<Job>, Error> {
        let past = self.catalog.read(|facts| Ok::<_, Error>(facts.jobs()?))?;
        let running = self.jobs.running();
        let jobs = past.into_iter().map(|job| running.get(&job.id).map_or(job, |running| running.view()));
        Ok(jobs.filter(|job| self.is_admin(caller) || job.started_by == caller.principal()).collect())
    }

    /// One of the caller's jobs.
    pub fn show_job(&self, caller: &Caller, id: i64) -> Result<Job, Error> {
        // Asked for while it runs by whoever follows it, many times a second.
        let running = self.jobs.running().get(&id).map(|running| running.view());
        let is_own = |job: &Job| self.is_admin(caller) || job.started_by == caller.principal();
        if let Some(job) = running.filter(is_own) {
            return Ok(job);
        }
        let job = self.list_jobs(caller)?.into_iter().find(|job| job.id == id);
        job.ok_or_else(|| Error::NotFound { kind: "job", name: id.to_string(), nearest: None })
    }

    /// Asks one of the caller's jobs to stop.
    pub fn cancel_job(&self, caller: &Caller, id: i64) -> Result<Job, Error> {
        let job = self.show_job(caller, id)?;
        if let Some(running) = self.jobs.running().get(&id) {
            running.cancelled.store(true, Ordering::Relaxed);
        }
        Ok(job)
    }
}
