//! The daemon through its API, with real backends and front ends: what an operator does, and what becomes of it.
//!
//! [`daemon::Daemon`] is the program in directories of its own; front ends are those of the sessions' tests.

mod daemon;

mod access;
mod commands;
mod crash;
mod hostile;
mod life;
mod many;
mod model;
mod sandbox;
mod starting;
mod updates;
mod upgrades;
