//! The daemon of one host: images, channels, volumes, who may have them and who has them, and the backends that serve them.
//!
//! The only layer that joins `store`, `block` and `vhost_user`. Never on the data path: it may stop, restart or be upgraded
//! with VMs running. Knows nothing of command lines.
//!
//! [`catalog`] holds what is known, [`backends`] the processes; [`Host`] joins them, with the images and a method for everything that can be
//! asked for, by noun: [`images`], [`channels`], [`volumes`], [`attachments`], [`deployments`], [`groups`], [`jobs`], [`events`]. [`api`]
//! translates requests into calls of these. [`reconcile`] brings all to agree after a daemon's return.

mod access;
pub mod api;
mod attachments;
mod backends;
mod catalog;
mod channels;
mod deployments;
mod error;
mod events;
mod groups;
mod host;
mod images;
mod jobs;
mod metrics;
mod names;
mod reconcile;
mod run;
mod upgrade;
mod volumes;

pub use access::Caller;
pub use backends::{Backends, Manner, UidRange};
pub use host::{Host, Places};
pub use run::{Options, RunError, run};
