//! Pando: many virtual machines from one read-only operating-system image.
#![deny(unsafe_code)]

pub mod block;
pub mod cli;
pub mod sys;
pub mod units;
pub mod vhost_user;
