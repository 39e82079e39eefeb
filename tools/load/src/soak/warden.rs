//! [`Warden`]: has the daemon, kills it, and starts another in its place, in a thread of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::Result;

use crate::host::daemon::Daemon;
use crate::soak::clerk::Clerk;
use crate::soak::journal::Journal;
use crate::soak::site::Site;
use crate::soak::watch::{Pulse, Watch};

enum Order {
    /// Kill the daemon, which is a disturbance of that kind, and start another after so long.
    Replace(usize, Duration),
    End(Sender<Daemon>),
}

pub struct Warden {
    orders: Sender<Order>,
    is_busy: Arc<AtomicBool>,
}

impl Warden {
    pub fn start(
        daemon: Daemon,
        site: &Arc<Site>,
        clerk: &Arc<Clerk>,
        journal: &Arc<Journal>,
        watch: &Arc<Watch>,
    ) -> Result<Self> {
        let (orders, taken) = channel();
        let is_busy = Arc::new(AtomicBool::new(false));
        let (site, clerk, journal) = (site.clone(), clerk.clone(), journal.clone());
        let (pulse, busy) = (watch.pulse("warden"), is_busy.clone());
        watch.spawn("warden", move || {
            let mut daemon = daemon;
            while let Ok(order) = taken.recv() {
                match order {
                    Order::Replace(kind, after) => {
                        let killed = journal.begin(kind, None);
                        replace(&mut daemon, after, &site, &clerk, &pulse)?;
                        journal.end(killed);
                        busy.store(false, Ordering::Release);
                    }
                    Order::End(back) => {
                        // Nobody waits for it any more only after a failure.
                        let _ = back.send(daemon);
                        return Ok(());
                    }
                }
            }
            Ok(())
        })?;
        Ok(Self { orders, is_busy })
    }

    /// Has the daemon killed now and another one started after so long; false when that is being done already.
    pub fn replace(&self, kind: usize, after: Duration) -> bool {
        let is_free = !self.is_busy.swap(true, Ordering::AcqRel);
        is_free && self.orders.send(Order::Replace(kind, after)).is_ok()
    }

    /// Gives the daemon back, which runs.
    pub fn end(self) -> Result<Daemon> {
        let (sender, daemon) = channel();
        // When nobody is there to take it, nobody answers either.
        let _ = self.orders.send(Order::End(sender));
        Ok(daemon.recv()?)
    }
}

fn replace(daemon: &mut Daemon, after: Duration, site: &Site, clerk: &Clerk, pulse: &Pulse) -> Result<()> {
    site.outages.strike(|| {
        clerk.outage(|| {
            daemon.kill()?;
            thread::sleep(after);
            pulse.waits_for("another daemon to be ready");
            daemon.start_again()
        })
    })?;
    pulse.rests();
    Ok(())
}
