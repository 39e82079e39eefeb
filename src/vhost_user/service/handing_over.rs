//! What of a [`Service`] goes to another program, and comes from one ([`crate::vhost_user::handover`]); and the worker by which that program
//! replaces the last one's.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::sys::process::Running;
use crate::sys::socket::PacketListener;
use crate::sys::uring::RingFiles;
use crate::vhost_user::attachment::{Offer, Part};
use crate::vhost_user::control::Controllers;
use crate::vhost_user::conversation::Conversation;
use crate::vhost_user::device::Device;
use crate::vhost_user::handover::{Further, HandoverError, Keeping, Kept, RingsState, ServiceState};
use crate::vhost_user::order::{Opened, Order};
use crate::vhost_user::vitals::Watch;

use super::deaths::Deaths;
use super::leaving::{AllLeaving, Why};
use super::space::Space;
use super::worker_process::{Worker, WorkerError};
use super::{Equipment, Inflight, Management, Service, chain_of};

/// A worker that waits to be told what to serve.
pub struct Successor(Worker);

impl Successor {
    /// Does without it.
    pub fn dismiss(self) -> Result<(), WorkerError> {
        self.0.end().map(drop)
    }
}

impl Service {
    /// Starts a worker that is to serve in place of the one that does, and sees that it is there.
    pub fn prepare_successor(&mut self) -> Result<Successor, WorkerError> {
        let mut worker = Worker::execute(&self.equipment)?;
        match worker.exchange(&mut self.watch, &Order::Hello, &[]) {
            Ok(_) => Ok(Successor(worker)),
            Err(error) => {
                worker.end()?;
                Err(error)
            }
        }
    }

    /// Has a worker take the place of the one that serves, whose rings have stopped. It has to be told how the guest's side stands.
    pub fn succeed(&mut self, successor: Successor) -> Result<(), WorkerError> {
        if self.elsewhere {
            // There is nothing to serve yet.
            return successor.dismiss();
        }
        // Nothing is made durable that was not: its successor has the same page cache.
        if let Some(last) = self.worker.take() {
            self.leaving.add(last.leave(Why::Replaced));
        }
        match successor.0.open(&self.part, &self.offer, &self.equipment, &mut self.watch) {
            Ok((worker, opened)) => {
                self.deaths.taken_over = Instant::now();
                self.watch.taken_over();
                self.worker = Some(worker);
                self.replace_device(&opened);
            }
            Err(error) => {
                log::error!("the next worker cannot serve: {}", chain_of(&error));
                self.deaths.note(false);
                self.replace()?;
            }
        }
        Ok(())
    }

    /// All that another program needs to know to go on here.
    pub fn freeze(&self, keeping: &mut Keeping) -> ServiceState {
        let [vitals, _] = self.watch.files();
        let description = self.device.description();
        let [listener, controller] = self.management.controllers.descriptors();
        ServiceState {
            worker: self.worker.as_ref().map(|worker| (worker.process.number(), keeping.keep(&worker.conversation))),
            elsewhere: self.elsewhere,
            latch_told: self.latch_told,
            vitals: keeping.keep(vitals),
            counters: keeping.keep(&self.equipment.counters),
            inflight: self.inflight.as_ref().map(|own| (own.shape, keeping.keep(&own.file))),
            part: self.part.freeze(keeping),
            staged: self.staged.as_ref().map(|part| part.freeze(keeping)),
            history: self.history.clone(),
            queues: self.offer.queues,
            ring_size_max: self.offer.ring_size_max,
            hold_ms: self.offer.hold.as_millis() as u64,
            bytes: description.bytes,
            read_only: description.read_only,
            cluster_bytes: description.cluster_bytes,
            serial: description.serial,
            writeback: self.device.writeback(),
            name: self.management.name.clone(),
            controllers: (
                listener.map(|listener| keeping.keep(&listener)),
                controller.map(|controller| keeping.keep(&controller)),
            ),
        }
    }

    /// What earlier versions of that do not have.
    pub fn freeze_further(&self, keeping: &mut Keeping) -> Further {
        let rings = self.equipment.rings.as_ref().map(|rings| RingsState {
            files: rings.files().iter().map(|ring| keeping.keep(ring)).collect(),
            shape: rings.shape(),
        });
        let mut direct = |part: Option<&Part>| part.and_then(|part| part.freeze_direct(keeping));
        let directs = (direct(Some(&self.part)), direct(self.staged.as_ref()));
        Further { poll_us: self.offer.poll.as_micros() as u64, rings, directs }
    }

    /// The same in that program.
    pub fn thaw(
        state: ServiceState,
        further: Further,
        signals: OwnedFd,
        front_ends: Option<OwnedFd>,
    ) -> Result<Service, HandoverError> {
        let system = |action| move |source| HandoverError::System { action, source };
        let worker = match state.worker {
            Some((process, conversation)) => Some(Worker {
                conversation: Conversation::over(conversation.take()?.into(), "worker"),
                process: Running::from_number(process),
                // Another one takes its place at once. If none can, the end of the conversation tells of its end.
                watch: None,
            }),
            None => None,
        };
        let vitals = File::from(state.vitals.take()?);
        let inflight = match state.inflight {
            Some((shape, file)) => Some(Inflight { shape, file: file.take()?.into() }),
            None => None,
        };
        let offer = Offer {
            queues: state.queues,
            ring_size_max: state.ring_size_max,
            tracks_inflight: inflight.is_some(),
            hold: Duration::from_millis(state.hold_ms),
            poll: Duration::from_micros(further.poll_us),
            incoming: false,
        };
        let opened = Opened {
            bytes: state.bytes,
            read_only: state.read_only,
            cluster_bytes: state.cluster_bytes,
            serial: state.serial,
        };
        let rings = match further.rings {
            Some(RingsState { files, shape }) => {
                let files = files.into_iter().map(Kept::take).collect::<Result<_, _>>()?;
                Some(RingFiles::resume(files, shape))
            }
            None => None,
        };
        let device = Device::new(opened.description(offer.queues));
        device.set_writeback(state.writeback);
        let listener = state.controllers.0.map(|listener| listener.take().map(PacketListener::from)).transpose()?;
        let current = match state.controllers.1 {
            Some(controller) => Some(Conversation::over(controller.take()?.into(), "controller")),
            None => None,
        };
        Ok(Service {
            worker,
            elsewhere: state.elsewhere,
            watch: Watch::resume(vitals, offer.queues).map_err(system("map the signs of life"))?,
            leaving: AllLeaving::default(),
            deaths: Deaths::none(),
            latch_told: state.latch_told,
            space: Space::unknown(),
            device,
            part: Part::thaw(state.part, further.directs.0)?,
            staged: state.staged.map(|staged| Part::thaw(staged, further.directs.1)).transpose()?,
            history: state.history,
            equipment: Equipment { counters: state.counters.take()?.into(), rings },
            inflight,
            management: Management {
                controllers: Controllers::resumed(listener, current),
                signals,
                name: state.name,
                front_ends,
                connected: false,
                stops: false,
                stop_is_awaited: false,
            },
            offer,
        })
    }
}
