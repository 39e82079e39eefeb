//! What the operating system gives: mappings, file verbs, sockets that carry descriptors, processes and signals.
//!
//! The only place with `unsafe`. Everything that it hands out is safe to use: lengths are checked, and what points into
//! a mapping cannot outlive it. It knows nothing of virtio, of vhost-user or of what the files hold.

#![allow(unsafe_code)]

pub mod array;
pub mod buffers;
pub mod events;
pub mod file;
pub mod guard;
pub mod guest;
pub mod mapping;
pub mod process;
pub mod sandbox;
pub mod shared;
pub mod socket;
#[cfg(fuzzing)]
pub mod stand_in;
pub mod uring;
pub mod watch;
