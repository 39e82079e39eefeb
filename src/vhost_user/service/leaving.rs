//! [`AllLeaving`]: workers that do nothing more and are still to be waited for.
//!
//! The kernel takes long to unmap the memory of a large guest. Neither that guest, nor who has something to say to the keeper, nor the next
//! death need wait meanwhile.

use std::process::ExitStatus;

use crate::sys::process::Running;

use super::worker_process::WorkerError;

/// Why a worker leaves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// Of itself. How it ended is to be told.
    Died,
    /// Another one has been given its place.
    Replaced,
}

/// How a worker ended that has left.
pub(super) struct End {
    pub(super) why: Why,
    pub(super) status: Result<ExitStatus, WorkerError>,
}

/// A worker that leaves. Waited for when it is dropped.
pub(super) struct Leaving {
    process: Option<Running>,
    why: Why,
}

/// All of them.
#[derive(Default)]
pub(super) struct AllLeaving(Vec<Leaving>);

impl AllLeaving {
    pub(super) fn add(&mut self, leaving: Leaving) {
        self.0.push(leaving);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ends of those that are gone.
    pub(super) fn take_gone(&mut self) -> Vec<End> {
        let mut ends = Vec::new();
        for leaving in std::mem::take(&mut self.0) {
            match leaving.wait_no_longer() {
                Ok(end) => ends.push(end),
                Err(leaving) => self.0.push(leaving),
            }
        }
        ends
    }

    /// The ends of all, once they are gone.
    pub(super) fn wait(&mut self) -> Vec<End> {
        std::mem::take(&mut self.0).into_iter().filter_map(Leaving::wait).collect()
    }
}

impl Leaving {
    pub(super) fn new(process: Running, why: Why) -> Leaving {
        Leaving { process: Some(process), why }
    }

    /// Its end, or it as it was when it is not gone.
    fn wait_no_longer(mut self) -> Result<End, Leaving> {
        let Some(process) = self.process.take() else { return Err(self) };
        match process.wait_no_longer() {
            Ok(status) => Ok(End { why: self.why, status: status.map_err(WorkerError::Wait) }),
            Err(process) => {
                self.process = Some(process);
                Err(self)
            }
        }
    }

    fn wait(mut self) -> Option<End> {
        let status = self.process.take()?.wait().map_err(WorkerError::Wait);
        Some(End { why: self.why, status })
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.process.take().map(Running::wait) {
            log::warn!("cannot wait for the last worker: {error}");
        }
    }
}
