//! [`Worker`]: the keeper's side of a worker process, from its execution to its end.
//!
//! Knows one worker, and neither what came before it nor what comes behind.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use crate::block::delta::open;
use crate::sys::process::Running;
use crate::sys::uring::RingFiles;
use crate::sys::{process, socket};
use crate::vhost_user::attachment::{AttachedDelta, Offer, Part};
use crate::vhost_user::conversation::{Conversation, ConversationError};
use crate::vhost_user::order::{Answer, Opened, Order, VolumeOrder};
use crate::vhost_user::sandbox;
use crate::vhost_user::vitals::Watch;
use crate::vhost_user::worker::RING_ARGUMENT;

use super::leaving::{Leaving, Why};

/// Why the worker did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The conversation failed; most often because the worker is gone.
    #[error("the worker did not answer")]
    Conversation(#[from] ConversationError),
    /// It said why.
    #[error("{reason}")]
    Refused { reason: String },
    /// It answered something else.
    #[error("the worker answered another question")]
    Answer,
    /// It could not be started.
    #[error("cannot start the worker")]
    Start(#[source] io::Error),
    /// It could not be waited for.
    #[error("cannot wait for the worker")]
    Wait(#[source] io::Error),
    /// There is nothing that could become larger.
    #[error("the volume is as large as its image: only one with a delta grows")]
    NoDelta,
    /// There is none right now.
    #[error("there is no worker")]
    Absent,
    /// There is none until an operator acts or a while has passed.
    #[error("too many workers have died: held")]
    Held,
    /// Asked to stop while there was none.
    #[error("asked to stop")]
    Stopped,
    /// The driver has been told what kind of disk it has.
    #[error("it is {found}, and the driver has been told that its disk is {told}")]
    Kind { found: &'static str, told: &'static str },
    /// The delta cannot be had, or could not become larger.
    #[error(transparent)]
    Open(#[from] open::OpenError),
    /// The delta's lock could not be let go.
    #[error("cannot unlock the delta")]
    Lock(#[source] io::Error),
}

impl WorkerError {
    /// Whether the worker is gone, or does not say anything that can be understood, which is as good.
    pub fn is_death(&self) -> bool {
        matches!(self, WorkerError::Conversation(_) | WorkerError::Answer | WorkerError::Absent)
    }
}

/// What every worker of a keeper gets, whatever it serves.
pub struct Equipment {
    /// Where it counts what it does.
    pub counters: File,
    /// By what it has the kernel read and write meanwhile; none: threads do.
    pub rings: Option<RingFiles>,
}

impl Equipment {
    fn rings(&self) -> &[OwnedFd] {
        self.rings.as_ref().map_or(&[], RingFiles::files)
    }
}

/// The keeper's side of a worker process.
pub(super) struct Worker {
    pub(super) conversation: Conversation,
    pub(super) process: Running,
    /// Came with its first answer: readable when it does nothing more, long before its process is gone. Without one, the end of the conversation tells.
    pub(super) watch: Option<OwnedFd>,
}

/// How long a worker may take over an order when none of its queues is stuck. What an order waits for is what the queues do.
pub(super) const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

impl Worker {
    /// Starts a worker for a volume.
    pub(super) fn start(
        part: &Part,
        offer: &Offer,
        equipment: &Equipment,
        watch: &mut Watch,
    ) -> Result<(Worker, Opened), WorkerError> {
        Worker::execute(equipment)?.open(part, offer, equipment, watch)
    }

    /// Starts a worker that waits to be told what to serve.
    pub(super) fn execute(equipment: &Equipment) -> Result<Worker, WorkerError> {
        let (conversation, theirs) = Conversation::with("worker").map_err(WorkerError::Start)?;
        let rings: Vec<RawFd> = equipment.rings().iter().map(AsRawFd::as_raw_fd).collect();
        let numbers: Vec<String> = rings.iter().map(RawFd::to_string).collect();
        let mut arguments = sandbox::worker_arguments().to_vec();
        arguments.extend(numbers.iter().flat_map(|number| [RING_ARGUMENT, number]));
        let keep = |keep| rings.iter().try_for_each(|ring| process::keep_on_exec(*ring, keep));
        let process = keep(true).and_then(|()| process::execute_self("pando-blk", &arguments, theirs));
        keep(false).map_err(WorkerError::Start)?;
        Ok(Worker { conversation, process: process.map_err(WorkerError::Start)?, watch: None })
    }

    /// Has it open a volume.
    pub(super) fn open(
        mut self,
        part: &Part,
        offer: &Offer,
        equipment: &Equipment,
        watch: &mut Watch,
    ) -> Result<(Worker, Opened), WorkerError> {
        let order = VolumeOrder {
            base: part.base.as_ref().map(|base| base.label.clone()),
            delta: part.delta.as_ref().map(AttachedDelta::order),
            direct: part.is_direct(),
            queues: offer.queues,
            serial: part.serial,
            hold_ms: offer.hold.as_millis() as u64,
            poll_us: offer.poll.as_micros() as u64,
            log_level: log::max_level() as u8,
            kernel_rings: equipment.rings.as_ref().map(RingFiles::shape),
            boot: process::boot_id().map_err(WorkerError::Start)?,
        };
        let result = {
            let ours = [&equipment.counters].into_iter().chain(watch.files());
            let files: Vec<OwnedFd> = ours
                .map(|file| file.as_fd().try_clone_to_owned())
                .collect::<io::Result<_>>()
                .map_err(WorkerError::Start)?;
            let descriptors: Vec<BorrowedFd> = files.iter().map(AsFd::as_fd).chain(part.descriptors()).collect();
            self.exchange(watch, &Order::Open(order), &descriptors)
        };
        match result {
            Ok(Answer::Opened(opened)) => Ok((self, opened)),
            other => {
                // Whatever it is at: nobody else may open the delta while it lives.
                let status = self.bury()?;
                if !status.success() {
                    log::error!("the worker has died at its start ({status}){}", sandbox::remark_on(status));
                }
                Err(other.err().unwrap_or(WorkerError::Answer))
            }
        }
    }

    pub(super) fn exchange(
        &mut self,
        watch: &mut Watch,
        order: &Order,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer, WorkerError> {
        self.conversation.send(order, descriptors)?;
        self.wait_for_answer(watch)?;
        let (answer, mut descriptors) = self.conversation.receive()?;
        if self.watch.is_none() {
            self.watch = descriptors.take_if(!descriptors.is_empty())?;
        }
        descriptors.finish()?;
        match answer {
            Answer::Failed(reason) => Err(WorkerError::Refused { reason }),
            answer => Ok(answer),
        }
    }

    /// Waits until there is an answer or none will come. A worker that is stuck is killed, which is as good as its death.
    pub(super) fn wait_for_answer(&mut self, watch: &mut Watch) -> Result<(), WorkerError> {
        const SLICE_MS: i32 = 1000;
        let ends = Instant::now() + ANSWER_PATIENCE;
        let mut killed = false;
        loop {
            let watched = [Some(self.conversation.as_fd()), self.watch.as_ref().map(AsFd::as_fd)];
            let found = socket::wait_readable(watched, if killed { -1 } else { SLICE_MS });
            let [answered, died] = found.map_err(WorkerError::Wait)?;
            if answered {
                return Ok(());
            }
            if died {
                return Err(ConversationError::Gone("worker").into());
            }
            let stuck = watch.look().map(|ring| format!("ring {ring} is stuck in a batch"));
            let silent = (Instant::now() > ends && !watch.is_busy()).then(|| "it does not answer".to_owned());
            if let Some(reason) = stuck.or(silent) {
                log::error!("the worker is killed: {reason}");
                self.process.kill();
                killed = true;
            }
        }
    }

    /// Sees that the process is gone, and says how it went.
    pub(super) fn end(self) -> Result<ExitStatus, WorkerError> {
        self.process.kill();
        self.process.wait().map_err(WorkerError::Wait)
    }

    /// Ends one that does nothing more, and does not wait for it: nothing is left of it but memory to be unmapped.
    pub(super) fn leave(self, why: Why) -> Leaving {
        self.process.kill();
        Leaving::new(self.process, why)
    }

    /// Whether it does nothing more, if that can be told before its process is gone.
    pub(super) fn is_still(&self) -> bool {
        let found = self.watch.as_ref().map(|watch| socket::wait_readable([Some(watch.as_fd())], 0));
        matches!(found, Some(Ok([true])))
    }

    /// As [`Worker::end`], of one that has ended its side of the conversation, and so is about to end.
    pub(super) fn bury(self) -> Result<ExitStatus, WorkerError> {
        let Worker { conversation, process, .. } = self;
        drop(conversation);
        process.end_soon().map_err(WorkerError::Wait)
    }

    /// Has it make everything durable and end. One that refuses is given back: it goes on.
    pub(super) fn close(mut self, watch: &mut Watch) -> Result<(), Box<Unclosed>> {
        let answer = self.exchange(watch, &Order::Close, &[]);
        if let Err(error @ WorkerError::Refused { .. }) = answer {
            return Err(Unclosed::boxed(error, Some(self)));
        }
        // It ends by itself, unless it does not answer.
        if answer.is_err() {
            self.process.kill();
        }
        let status = self.process.wait().map_err(|error| Unclosed::boxed(WorkerError::Wait(error), None))?;
        if !status.success() {
            log::error!("the worker has died at its end ({status}){}", sandbox::remark_on(status));
        }
        answer.map(drop).map_err(|error| Unclosed::boxed(error, None))
    }
}

/// A worker that did not end in good order.
pub(super) struct Unclosed {
    /// Why.
    pub(super) error: WorkerError,
    /// The worker, if it still lives.
    pub(super) worker: Option<Worker>,
}

impl Unclosed {
    fn boxed(error: WorkerError, worker: Option<Worker>) -> Box<Unclosed> {
        Box::new(Unclosed { error, worker })
    }
}
