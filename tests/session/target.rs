//! A [`Target`] of hostile tests: after each attack it has to serve the next front end.

use super::client::{Client, Profile, check_served};
use super::harness::{Backend, Disk};
use super::raw::RawFrontEnd;

/// Bytes of its disk.
pub const DISK_BYTES: usize = 1 << 20;

/// A backend that has to outlive all that is done to it.
pub struct Target {
    pub disk: Disk,
    pub backend: Backend,
    pub model: Vec<u8>,
    pub cases: u64,
}

impl Target {
    pub fn new() -> Target {
        Target::with(&[])
    }

    /// As [`Target::new`], with more arguments.
    pub fn with(arguments: &[&str]) -> Target {
        let disk = Disk::new(DISK_BYTES);
        let backend = disk.serve_with(arguments);
        let model = disk.contents.clone();
        Target { disk, backend, model, cases: 0 }
    }

    /// Does something hostile over a connection of a front end that is set up, and sees that nothing comes of it.
    #[track_caller]
    pub fn guest(&mut self, name: &str, words: &[&str], attack: impl FnOnce(&mut Client)) {
        eprintln!("{name}");
        let mark = self.backend.log().mark();
        let mut client = Client::start(&self.backend, &Profile::qemu());
        attack(&mut client);
        if !words.is_empty() {
            self.backend.log().expect_after(mark, words);
        }
        drop(client);
        self.check(name);
    }

    /// As [`Target::guest`], with messages as bytes, on a connection on which nothing has been said.
    #[track_caller]
    pub fn front_end(&mut self, name: &str, words: &[&str], attack: impl FnOnce(&mut RawFrontEnd)) {
        eprintln!("{name}");
        let mark = self.backend.log().mark();
        let mut front_end = RawFrontEnd { stream: self.backend.connect() };
        attack(&mut front_end);
        if !words.is_empty() {
            self.backend.log().expect_after(mark, words);
        }
        drop(front_end);
        self.check(name);
    }

    #[track_caller]
    pub fn check(&mut self, name: &str) {
        self.cases += 1;
        assert!(self.backend.is_running(), "the backend ended after: {name}");
        check_served(&self.backend, &mut self.model, self.cases);
    }

    /// Sees that the worker is still the one that it was.
    #[track_caller]
    pub fn same_worker(&self, worker: u32) {
        assert_eq!(self.backend.worker(), worker, "the worker died");
    }
}
