//! Real guests: QEMU boots operating systems from volumes that `pando serve` serves.
//!
//! Owns what only a guest's own kernel, file system and firmware can show. Knows pando by its two
//! programs' command lines alone, as a VMM or a shell script does. The tiny guest (busybox) serves
//! the short cases, Debian the long ones; both run a script of the test's and say on their serial
//! console what they saw (`tools/guest/build` tells how).
//!
//! Invariant: nothing that a test starts outlives it, and nothing waits without a limit.
//!
//! They start in the order of their names, two at a time as a rule: what takes longest had better not come last.

mod backend;
mod boots;
mod changes;
mod disks;
mod host;
mod material;
mod package;
mod process;
mod relay;
mod survival;
mod vm;
