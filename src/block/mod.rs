//! One volume: a base, a delta over it, and the union of both.
//!
//! Knows nothing of virtio, sockets, image stores or channels: a volume takes byte ranges and buffers, so that tests
//! hand it byte vectors. What lies below it is [`storage::Storage`], five verbs of a file, so that tests hand it a
//! simulated disk that loses, tears and reorders.

pub mod base;
pub mod cached;
pub mod delta;
mod error;
pub mod storage;
mod volume;
pub mod writes;

pub use error::Error;
pub use volume::{Batch, Place, Sources, Volume, VolumeFile};
