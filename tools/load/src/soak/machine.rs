//! [`Machine`]: what others see of a machine: its disk, its guest's seat, and how to have its front end do something.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::soak::disk::Disk;
use crate::soak::disturbance::Begun;
use crate::soak::front_end::FrontEnd;
use crate::soak::guest::{Guest, Seat};
use crate::soak::strikes::{Moment, Strikes};

/// What a front end has to do before it is asked for more.
const TASKS_MAX: usize = 2;

/// Something for a front end to do, in its own thread.
pub type Task = Box<dyn FnOnce(&mut FrontEnd) -> Result<()> + Send>;

pub struct Machine {
    pub number: usize,
    pub disk: Disk,
    pub seat: Seat,
    /// What was done to its keeper.
    pub keeper_strikes: Strikes,
    /// The times when its volume was not attached.
    pub absences: Strikes,
    /// As of when its front end is served by a keeper that has a worker; none: it may have none.
    served: Mutex<Option<Moment>>,
    tasks: Sender<Task>,
    pending: AtomicUsize,
    wake: EventFd,
}

/// The other end of a machine's tasks.
pub struct Tasks {
    pub machine: Arc<Machine>,
    tasks: Receiver<Task>,
}

impl Machine {
    /// A machine, and what it is given to do.
    pub fn with_tasks(number: usize, disk: Disk, guest: Guest) -> Result<Tasks> {
        let (sender, tasks) = channel();
        let machine = Self {
            number,
            disk,
            seat: Seat::new(guest)?,
            keeper_strikes: Strikes::default(),
            absences: Strikes::default(),
            served: Mutex::default(),
            tasks: sender,
            pending: AtomicUsize::new(0),
            wake: EventFd::new(EFD_NONBLOCK)?,
        };
        Ok(Tasks { machine: Arc::new(machine), tasks })
    }

    /// Has the front end do something when it comes to it; false when it has enough to do.
    pub fn ask(&self, task: Task) -> bool {
        if self.pending.load(Ordering::Acquire) >= TASKS_MAX {
            return false;
        }
        self.insist(task);
        true
    }

    /// Has the front end do something, however much it has to do.
    pub fn insist(&self, task: Task) {
        self.pending.fetch_add(1, Ordering::AcqRel);
        // Nobody is there any more only after a failure, which is told where it came from.
        let _ = self.tasks.send(task);
        let _ = self.wake.write(1);
    }

    fn lock_served(&self) -> MutexGuard<'_, Option<Moment>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the front end is served by a keeper that lived then, or that it may be served by none.
    pub fn note_served(&self, since: Option<Moment>) {
        *self.lock_served() = since;
    }

    fn is_alive(&self, served: Option<Moment>) -> bool {
        served.is_some_and(|since| !self.keeper_strikes.since(since))
    }

    /// Whether its front end is served by a keeper that nobody has struck at.
    pub fn is_served(&self) -> bool {
        self.is_alive(*self.lock_served())
    }

    /// Strikes at the machine's processes, if its front end is served at the moment, and stays so until the strike is over.
    pub fn strike(&self, strike: impl FnOnce() -> Result<Begun>) -> Result<Begun> {
        let served = self.lock_served();
        if self.is_alive(*served) { strike() } else { Ok(Begun::Missed("its front end may have no backend")) }
    }
}

impl Tasks {
    /// The next one, if there is one.
    pub fn take(&self) -> Option<Task> {
        // Looked for after the wake-up is taken back, so that none is missed.
        let _ = self.machine.wake.read();
        self.tasks.try_recv().ok()
    }

    /// Notes that the last one is done.
    pub fn done(&self) {
        self.machine.pending.fetch_sub(1, Ordering::AcqRel);
    }

    /// Can be read when there is another.
    pub fn wake(&self) -> &EventFd {
        &self.machine.wake
    }
}
