//! One guest's device: vhost-user with the front end on one side, a [`crate::block::Volume`] on the other.
//!
//! Knows a volume, and never what is behind it. Two processes, of one program:
//!
//! - the **keeper** ([`keeper`], [`session`], [`service`]) speaks with the front end and holds what it has said;
//! - the **worker** ([`worker`], [`queue`], [`ring`], [`request`]) maps the guest's memory and moves the bytes.
//!
//! [`order`] is all that they say to each other. [`device`] is what a driver gets to know; both use it. Who starts a keeper may go on
//! talking with it ([`control`]), have it serve another image from the guest's next boot on ([`boot`] says when that is), and read what the
//! worker counts ([`counters`]). What is left to either of the two when it has been taken over is in [`sandbox`].

pub mod attachment;
pub mod boot;
pub mod control;
pub mod conversation;
pub mod counters;
pub mod device;
pub mod errands;
pub mod foresight;
pub mod handover;
pub mod hold;
pub mod inflight;
pub mod keeper;
pub mod order;
pub mod polling;
pub mod queue;
pub mod request;
pub mod rest;
pub mod ring;
pub mod sandbox;
pub mod service;
pub mod session;
pub mod state;
pub mod steps;
pub mod transfers;
pub mod vitals;
pub mod worker;
