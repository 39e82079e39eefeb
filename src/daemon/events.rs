//! Events: what has happened, told to whoever may everything.

use super::Host;
use super::access::{Call, Caller};
use super::api::types::Event;
use super::error::Error;

impl Host {
    /// The newest events behind `after`, the oldest of them first.
    pub fn list_events(&self, caller: &Caller, after: Option<i64>, limit: Option<u32>) -> Result<Vec<Event>, Error> {
        Call::look(self, caller, "event.list", "event:*", |call| {
            call.require_admin("see events")?;
            self.catalog.read(|facts| Ok(facts.events(after.unwrap_or(0), limit)?))
        })
    }

    /// The next events behind `after`, for a follower that was let in by [`Host::list_events`].
    pub fn next_events(&self, after: i64) -> Result<Vec<Event>, Error> {
        self.catalog.read(|facts| Ok(facts.events_next(after)?))
    }
}
