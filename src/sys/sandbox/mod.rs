//! What a process gives up for good before it touches anything that an enemy may have made: privileges, files, system calls.
//!
//! Knows no policy: whoever closes a sandbox says which files can still be reached ([`files::Reach`]) and which system calls are still made
//! ([`calls::Call`]). What is given up cannot be had again, not by the process, not by its threads, and not by a program that it executes: that one
//! starts in the sandbox of whoever started it, and can only close another within.
//!
//! The parts, each of which would hold without the others:
//!
//! - [`privileges`]: no program that is executed gets more than it would without; no capabilities; no more descriptors than are needed.
//! - [`files`]: nothing is opened but what is named, nothing is connected to, nobody outside is signalled (Landlock, as far as the kernel has it).
//! - [`calls`]: a system call that is not in the list ends the process, with SIGSYS (seccomp).

use std::io;

pub mod calls;
pub mod files;
pub mod privileges;

#[cfg(debug_assertions)]
pub mod attempt;

/// Why a sandbox is not closed. The process must do nothing that needs one.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The system refused.
    #[error("cannot {action}")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    /// A path that is to stay within reach cannot be opened.
    #[error("cannot keep {path} within reach")]
    Path {
        path: String,
        #[source]
        source: landlock::PathFdError,
    },
    /// The kernel has Landlock, and refused.
    #[error("cannot give up files")]
    Files(#[from] landlock::RulesetError),
    /// The kernel has no seccomp, or refused.
    #[error("cannot give up system calls")]
    Calls(#[from] seccompiler::Error),
}
