//! What the operating system gives: mappings, file verbs, sockets that carry descriptors, processes and signals.
//!
//! The only place with `unsafe`. Everything that it hands out is safe to use: lengths are checked, and what points into
//! a mapping cannot outlive it. It knows nothing of virtio, of vhost-user or of what the files hold.

#![allow(unsafe_code)]

/// Has the processor fetch what is at an address into its caches, whatever is there and whether or not anything is.
#[inline]
fn fetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

pub mod apart;
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
