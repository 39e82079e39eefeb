//! The ring, against the `virtio-queue` crate as reference: the same guest memory in, the same requests, used rings and
//! notifications out. What that crate takes in silence and ours names is in [`malformed`].

mod chains;
mod guest;
mod malformed;
mod notifications;
mod places;
mod wakeups;
