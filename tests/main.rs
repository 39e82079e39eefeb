//! All integration tests, a module for each area.

mod cli;
mod ring;
mod session;
mod tidy;
mod volume;
