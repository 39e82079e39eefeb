//! All integration tests, a module for each area.

mod cli;
mod host;
mod ring;
mod session;
mod store;
mod tidy;
mod volume;
