//! One volume: a base, a delta over it, and the union of both.
//!
//! Knows nothing of virtio, sockets, image stores or channels: a volume takes byte ranges and buffers, so that tests
//! hand it byte vectors. What lies below it is [`storage::Storage`], five verbs of a file, so that tests hand it a
//! simulated disk that loses, tears and reorders.

pub mod base;
mod begun;
pub mod cached;
pub mod delta;
mod direct;
mod error;
mod exclusion;
pub mod storage;
mod volume;
pub mod writes;

pub use begun::{Begun, BegunWrite};
pub use error::Error;
pub use storage::DeltaCache;
pub use volume::{Batch, Place, Places, Sources, Volume, VolumeFile};
