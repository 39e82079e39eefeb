//! The daemon of one host: images, channels, volumes, who may have them and who has them, and the backends that serve them.
//!
//! The only layer that joins `store`, `block` and `vhost_user`. Never on the data path: it may stop, restart or be upgraded
//! with VMs running. Knows nothing of command lines.

pub mod api;
