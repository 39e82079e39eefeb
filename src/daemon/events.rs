//! Events: what has happened, told to whoever may everything.

use super::Host;
use super::access::{Call, Caller};
use super::api::types::Event;
use super::catalog::RECORDS_MAX;
use super::error::Error;

impl Host {
    /// The newest events behind `after`, the oldest of them first.
    pub fn list_events(&self, caller: &Caller, after: Option<i64>, limit: Option<u32>) -> Result<Vec<Event>, Error> {
        Call::look(self, caller, "event.list", "event:*", |call| {
            call.require_admin("see events")?;
            check_limit(limit)?;
            self.catalog.read(|facts| Ok(facts.events(after.unwrap_or(0), limit)?))
        })
    }

    /// The next events behind `after`, for a follower that was let in by [`Host::list_events`].
    pub fn next_events(&self, after: i64) -> Result<Vec<Event>, Error> {
        self.catalog.read(|facts| Ok(facts.events_next(after)?))
    }
}

/// Sees that no more of a log is asked for than one answer has.
pub fn check_limit(limit: Option<u32>) -> Result<(), Error> {
    match limit.filter(|limit| *limit > RECORDS_MAX) {
        Some(found) => {
            Err(Error::Invalid { field: "limit", found: found.to_string(), expected: format!("at most {RECORDS_MAX}") })
        }
        None => Ok(()),
    }
}
