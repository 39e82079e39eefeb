//! Sessions: the real backend over a real socket, with front ends and drivers of our own and of others.
//!
//! What the tests talk with: a [`harness::Backend`] is the program on files of its own; a [`guest::Guest`] is memory that
//! both sides map; a [`ring::Ring`] is a virtqueue from the driver's side; a [`queue::Queue`] puts disk requests on it; a
//! [`storm::Storm`] is work that never pauses;
//! a [`client::Client`] is a whole front end; [`raw::RawFrontEnd`] sends what no front end should.

pub mod client;
pub mod guest;
pub mod harness;
mod managed;
pub mod queue;
mod raw;
mod ring;
mod storm;
mod target;

#[cfg(debug_assertions)]
mod attempts;
mod boots;
mod deaths;
mod direct;
mod drain;
mod driver;
mod full;
mod gone;
mod hostile;
mod lifecycle;
mod messages;
mod migration;
mod neighbours_bugs;
mod noisy_neighbour;
mod reference;
mod requests;
pub mod sandbox;
mod setup;
#[cfg(debug_assertions)]
mod tables;
mod upgrades;
#[cfg(debug_assertions)]
mod waiting;
