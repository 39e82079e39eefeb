//! [`Clerk`]: reads the daemon's events as they come, and compares them with what was done.
//!
//! What was done is told to it as it is done. An event may be lost with a daemon that is killed about that time, or with a keeper
//! that dies before it has told it; so of each kind there is a least number and a most. Nothing else may happen at all: a worker
//! that dies without having been killed is one event too many.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::soak::site::Site;
use crate::soak::watch::Watch;

/// How often events are read: more than come in that time fit into one answer.
const READ_INTERVAL: Duration = Duration::from_millis(500);
/// An event is certain when nothing else has happened to who tells it, nor to the daemon, from so long before until so long after.
const CALM_BEFORE: Duration = Duration::from_secs(2);
const CALM_AFTER: Duration = Duration::from_secs(8);
/// What is older than this is settled.
const SETTLED_AFTER: Duration = Duration::from_secs(60);
/// Events of which none may come.
const NEVER: [&str; 8] = [
    "backend.failed",
    "worker.held",
    "volume.latched",
    NO_IMAGE,
    "image.corrupt",
    "job.failed",
    "file.unknown",
    "job.interrupted",
];
/// An image could not be staged, which may be for want of room.
const NO_IMAGE: &str = "image.failed";
/// What the system says then.
pub const NO_ROOM: &str = "No space left on device";
/// Requests wait for room.
const FULL: &str = "volume.full";
/// Events that are counted.
const COUNTED: [&str; 8] = [
    "worker.died",
    "backend.died",
    "backend.restarted",
    "backend.upgraded",
    "backend.upgrade-failed",
    "image.active",
    "channel.moved",
    "front-end.connected",
];

/// A kind of event, and what it is about.
type Key = (String, String);

/// Something that was done, of which an event tells.
#[derive(Debug)]
struct Expected {
    at: Instant,
    key: Key,
}

/// What events can be lost over.
#[derive(Debug)]
struct Upset {
    cause: Cause,
    from: Instant,
    to: Instant,
}

#[derive(Debug)]
enum Cause {
    /// There was no daemon.
    Outage,
    /// The keeper of an attachment died. What the daemon itself has to tell of that it does.
    Death(String),
    /// Something was done about an attachment or its backend in which more may happen than is told.
    Change(String),
}

impl Cause {
    fn concerns(&self, (kind, object): &Key) -> bool {
        match self {
            Self::Outage => true,
            Self::Death(whose) => whose == object && !kind.starts_with("backend."),
            Self::Change(whose) => whose == object,
        }
    }
}

#[derive(Debug, Default)]
struct Book {
    /// Not settled yet, the oldest first.
    expected: VecDeque<Expected>,
    /// What can have made events be lost, the oldest first.
    upsets: VecDeque<Upset>,
    least: BTreeMap<Key, u64>,
    most: BTreeMap<Key, u64>,
    found: BTreeMap<Key, u64>,
    last_event: i64,
    /// How often requests have begun to wait for room.
    waits: u64,
}

#[derive(Default)]
pub struct Clerk {
    book: Mutex<Book>,
}

impl Clerk {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is done, of which an event is going to tell.
    pub fn expect(&self, kind: &'static str, object: &str) {
        let key = (kind.to_owned(), object.to_owned());
        let mut book = self.book();
        *book.most.entry(key.clone()).or_default() += 1;
        book.expected.push_back(Expected { at: Instant::now(), key });
    }

    /// Something may have been done, of which an event may tell.
    pub fn allow(&self, kind: &'static str, object: &str) {
        *self.book().most.entry((kind.to_owned(), object.to_owned())).or_default() += 1;
    }

    /// There is no daemon while this is done.
    pub fn outage<T>(&self, work: impl FnOnce() -> T) -> T {
        self.upset(Cause::Outage, work)
    }

    /// An attachment's keeper dies of this.
    pub fn death<T>(&self, object: &str, work: impl FnOnce() -> T) -> T {
        self.upset(Cause::Death(object.to_owned()), work)
    }

    /// This is done about an attachment: its events may be lost over it.
    pub fn change<T>(&self, object: &str, work: impl FnOnce() -> T) -> T {
        self.upset(Cause::Change(object.to_owned()), work)
    }

    fn upset<T>(&self, cause: Cause, work: impl FnOnce() -> T) -> T {
        let from = Instant::now();
        let result = work();
        self.book().upsets.push_back(Upset { cause, from, to: Instant::now() });
        result
    }

    /// Reads the events that have come since the last time, if there is a daemon.
    fn read(&self, site: &Site) -> Result<()> {
        let after = self.book().last_event;
        let Some(answer) = site.try_ask("GET", &format!("/v1/events?after={after}"), None) else { return Ok(()) };
        ensure!(answer.is_success(), "GET /v1/events: {}, {}", answer.status, answer.reason());
        let mut book = self.book();
        for event in answer.body.as_array().context("events are a list")? {
            book.take(event)?;
        }
        book.settle(Instant::now().checked_sub(SETTLED_AFTER));
        Ok(())
    }

    /// Compares what was found with what was done, both complete.
    fn compare(&self) -> Result<()> {
        let mut book = self.book();
        book.settle(Some(Instant::now()));
        let keys: Vec<Key> = book.most.keys().chain(book.found.keys()).cloned().collect();
        for key in keys {
            let number = |map: &BTreeMap<Key, u64>| map.get(&key).copied().unwrap_or(0);
            let (least, most, found) = (number(&book.least), number(&book.most), number(&book.found));
            let (kind, object) = &key;
            ensure!(
                (least..=most).contains(&found),
                "{object}: {found} events {kind}, expected {least} to {most} by what was done"
            );
        }
        Ok(())
    }

    /// Reads what is left, until all that is certain to come has come, and compares.
    pub fn finish(&self, site: &Site, patience: Duration) -> Result<()> {
        let ends = Instant::now() + patience;
        loop {
            self.read(site)?;
            match self.compare() {
                Err(_) if Instant::now() < ends => thread::sleep(Duration::from_millis(100)),
                result => return result.context("the daemon's events"),
            }
        }
    }

    /// Reads what has come since all was compared: nothing of it may be what must not happen.
    pub fn finish_reading(&self, site: &Site) -> Result<()> {
        self.read(site)
    }

    /// How many events were read, and how many of them told that requests wait for room.
    pub fn events(&self) -> (i64, u64) {
        let book = self.book();
        (book.last_event, book.waits)
    }

    /// Reads events until told to stop.
    pub fn start(self: &Arc<Self>, site: &Arc<Site>, watch: &Arc<Watch>) -> Result<()> {
        let (clerk, site, failed) = (self.clone(), site.clone(), watch.clone());
        watch.spawn("clerk", move || {
            while failed.failure().is_none() {
                clerk.read(&site)?;
                thread::sleep(READ_INTERVAL);
            }
            Ok(())
        })?;
        Ok(())
    }
}

impl Book {
    fn take(&mut self, event: &Value) -> Result<()> {
        let id = event["id"].as_i64().context("an event has a number")?;
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        let (kind, object) = (text("kind"), text("object"));
        if id <= self.last_event {
            // Read by somebody else at the same time.
            return Ok(());
        }
        ensure!(id == self.last_event + 1, "event {id} follows event {}: some are missing", self.last_event);
        self.last_event = id;
        let detail = text("detail");
        if NEVER.contains(&kind.as_str()) && !(kind == NO_IMAGE && detail.contains(NO_ROOM)) {
            bail!("event {kind} of {object}: {detail}");
        }
        self.waits += u64::from(kind == FULL);
        if COUNTED.contains(&kind.as_str()) {
            *self.found.entry((kind, object)).or_default() += 1;
        }
        Ok(())
    }

    /// Decides of what was done before `until` whether its events are certain.
    fn settle(&mut self, until: Option<Instant>) {
        let Some(until) = until else { return };
        while self.expected.front().is_some_and(|expected| expected.at <= until) {
            let Some(Expected { at, key }) = self.expected.pop_front() else { return };
            let (from, to) = (at.checked_sub(CALM_BEFORE), at + CALM_AFTER);
            let is_close = |upset: &Upset| upset.from <= to && from.is_none_or(|from| from <= upset.to);
            if !self.upsets.iter().any(|upset| is_close(upset) && upset.cause.concerns(&key)) {
                *self.least.entry(key).or_default() += 1;
            }
        }
        let horizon = until.checked_sub(SETTLED_AFTER);
        self.upsets.retain(|upset| horizon.is_none_or(|horizon| upset.to >= horizon));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(clerk: &Clerk, id: i64, kind: &str) -> Result<()> {
        clerk.book().take(&json!({ "id": id, "kind": kind, "object": "a", "detail": "" }))
    }

    #[test]
    fn what_was_done_in_calm_is_told_exactly_once() {
        let clerk = Clerk::default();
        clerk.expect("worker.died", "a");
        assert!(clerk.compare().is_err(), "none was told");
        let clerk = Clerk::default();
        clerk.expect("worker.died", "a");
        event(&clerk, 1, "worker.died").unwrap();
        clerk.compare().unwrap();
        event(&clerk, 2, "worker.died").unwrap();
        assert!(clerk.compare().unwrap_err().to_string().contains("2 events worker.died, expected 1 to 1"));
    }

    #[test]
    fn what_was_done_about_an_outage_may_be_lost() {
        let clerk = Clerk::default();
        clerk.outage(|| clerk.expect("worker.died", "a"));
        clerk.compare().unwrap();
        for (whose, kind, is_lost) in
            [("a", "worker.died", true), ("b", "worker.died", false), ("a", "backend.died", false)]
        {
            let clerk = Clerk::default();
            clerk.death(whose, || clerk.expect(kind, "a"));
            assert_eq!(clerk.compare().is_ok(), is_lost, "{whose} dies, and {kind} of a is not told");
        }
    }

    #[test]
    fn what_must_not_happen_and_what_is_missing_are_failures() {
        let clerk = Clerk::default();
        event(&clerk, 1, "image.imported").unwrap();
        assert!(event(&clerk, 2, "backend.failed").is_err());
        let clerk = Clerk::default();
        assert!(event(&clerk, 2, "image.imported").is_err());
        let clerk = Clerk::default();
        assert!(event(&clerk, 1, NO_IMAGE).is_err());
    }

    #[test]
    fn an_image_that_finds_no_room_is_no_failure_and_waits_are_counted() {
        let clerk = Clerk::default();
        let detail = "cannot write a.delta: No space left on device (os error 28)";
        let no_room = json!({ "id": 1, "kind": NO_IMAGE, "object": "a", "detail": detail });
        clerk.book().take(&no_room).unwrap();
        event(&clerk, 2, FULL).unwrap();
        clerk.compare().unwrap();
        assert_eq!(clerk.events(), (2, 1));
    }
}
