//! Privileges and limits.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{self, CapabilitySet, CapabilitySets};

use super::SandboxError;

fn system(action: &'static str) -> impl Fn(rustix::io::Errno) -> SandboxError {
    move |source| SandboxError::System { action, source: source.into() }
}

/// Gives up all privileges: capabilities of every kind, and those that the owner of a program would lend.
///
/// The user stays who it is.
pub fn give_up() -> Result<(), SandboxError> {
    thread::set_no_new_privs(true).map_err(system("give up the privileges of other programs"))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    let held = thread::capabilities(None).map_err(system("ask for capabilities"))?;
    if held.permitted.contains(CapabilitySet::SETPCAP) {
        empty_bounding_set().map_err(system("give up the bounding set of capabilities"))?;
    }
    // Without that capability the bounding set stays, and means nothing: it is only ever what an execution could bring back, and
    // none does any more.
    if held != none {
        thread::clear_ambient_capability_set().map_err(system("give up ambient capabilities"))?;
        thread::set_capabilities(None, none).map_err(system("give up capabilities"))?;
    }
    Ok(())
}

fn empty_bounding_set() -> rustix::io::Result<()> {
    for number in 0..u64::BITS {
        match thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            // The first that the kernel does not know.
            Err(rustix::io::Errno::INVAL) if number > 0 => break,
            result => result?,
        }
    }
    Ok(())
}

/// Lets the process have at most `max` descriptors from now on, or as many as before if that was less.
pub fn limit_descriptors(max: u64) -> Result<(), SandboxError> {
    let least = |limit: Option<u64>| Some(limit.map_or(max, |limit| limit.min(max)));
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let limit = Rlimit { current: least(current), maximum: least(maximum) };
    setrlimit(Resource::Nofile, limit).map_err(system("limit the number of open descriptors"))
}

/// Leaves out of a core dump all memory that is shared with others. Programs that are executed later do the same.
///
/// # Errors
/// When the kernel dumps no core at all, among others.
pub fn keep_shared_memory_out_of_cores() -> io::Result<()> {
    // core(5): private memory without a file, and the first pages of programs, by which a debugger knows them.
    std::fs::write("/proc/self/coredump_filter", "0x11")
}
