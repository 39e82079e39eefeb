//! The system calls that a process may still make, by seccomp.

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_long};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter_all_threads,
};

use super::SandboxError;

/// A system call, or one way of making it, that is still allowed.
#[derive(Clone, Copy)]
pub struct Call {
    /// The system call's name, and what is special about it if not all ways of making it are meant. No two of a list are called the same.
    pub name: &'static str,
    number: c_long,
    /// All of these have to be so.
    arguments: &'static [Argument],
    /// What it is needed for.
    pub why: &'static str,
}

impl Call {
    /// A system call, whatever its arguments.
    pub const fn any(name: &'static str, number: c_long, why: &'static str) -> Call {
        Call { name, number, arguments: &[], why }
    }

    /// A system call with arguments that are all as said.
    pub const fn with(name: &'static str, number: c_long, arguments: &'static [Argument], why: &'static str) -> Call {
        Call { name, number, arguments, why }
    }
}

/// What an argument of a system call has to be.
#[derive(Clone, Copy)]
pub struct Argument {
    index: u8,
    is: Is,
}

#[derive(Clone, Copy)]
enum Is {
    /// A number of 32 bits, or its bits of the mask.
    Number { mask: u32, value: u32 },
    /// A pointer to nothing.
    Null,
    /// The number of the process that closes the sandbox.
    OwnProcess,
}

/// Argument `index` (the first is 0) is this number.
pub const fn is(index: u8, value: c_int) -> Argument {
    has(index, -1, value)
}

/// Of the bits of `mask`, argument `index` has those of `value` and no others.
pub const fn has(index: u8, mask: c_int, value: c_int) -> Argument {
    Argument { index, is: Is::Number { mask: mask.cast_unsigned(), value: value.cast_unsigned() } }
}

/// Argument `index` has none of these bits.
pub const fn lacks(index: u8, mask: c_int) -> Argument {
    has(index, mask, 0)
}

/// Argument `index` points to nothing.
pub const fn null(index: u8) -> Argument {
    Argument { index, is: Is::Null }
}

/// Argument `index` is the process that closes the sandbox.
pub const fn own_process(index: u8) -> Argument {
    Argument { index, is: Is::OwnProcess }
}

impl Argument {
    fn condition(self) -> Result<SeccompCondition, seccompiler::BackendError> {
        // The kernel looks at the lower half of what it takes for an `int`, and of flags that fit into it: so does the filter.
        let (len, operator, value) = match self.is {
            Is::Number { mask: u32::MAX, value } => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value),
            Is::Number { mask, value } => (SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask.into()), value),
            Is::Null => (SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0),
            Is::OwnProcess => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, std::process::id()),
        };
        SeccompCondition::new(self.index, len, operator, value.into())
    }
}

/// Lets these system calls be made, and has every other end the process with SIGSYS, at once and without a handler.
///
/// `clone3` is answered as by a kernel that has none, whether it is in the list or not: its flags lie in memory, where no filter sees them, and C libraries then call
/// `clone`, whose flags can be checked.
pub fn give_up_all_but<'c>(calls: impl Iterator<Item = &'c Call>) -> Result<(), SandboxError> {
    let [first, second] = filters(calls)?;
    apply_filter_all_threads(&first)?;
    apply_filter_all_threads(&second)?;
    Ok(())
}

/// As [`give_up_all_but`], in a process with one thread. Gives a descriptor, if the kernel has it, that can be waited for in any process: it hangs up when
/// none of this process's threads will ever make a system call or run an instruction again.
///
/// From Linux 6.11 on (and 6.10.10) that is when it dies: each thread lets go of the filter in `do_exit`, behind its last system call, however long that took,
/// and ahead of its memory and its descriptors. Those are closed, and it can be waited for, only when its memory is unmapped, which takes a tenth of a
/// second for each gibibyte of small pages. Older kernels let go of the filter when it has been waited for, and before 5.9 the descriptor never hangs up: whoever
/// waits for it has to learn of the death in another way as well.
pub fn give_up_all_but_watched<'c>(calls: impl Iterator<Item = &'c Call>) -> Result<Option<OwnedFd>, SandboxError> {
    let [first, second] = filters(calls)?;
    apply_filter_all_threads(&first)?;
    let watch = apply_watched(&second);
    if watch.is_none() {
        apply_filter_all_threads(&second)?;
    }
    Ok(watch)
}

/// Applies a filter so that its listener is given, which is told of system calls that the filter leaves to it (this one leaves none) and of the filter's
/// end (seccomp_unotify(2)). Nothing is applied when it is `None`: an older kernel, or one that has a listener for a filter of a process around this one.
fn apply_watched(filter: &BpfProgram) -> Option<OwnedFd> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).ok()?,
        filter: filter.as_ptr().cast_mut().cast::<libc::sock_filter>(),
    };
    // SAFETY: `program` says where the filter is and how long; the kernel copies it and changes nothing. Its instructions are laid out as C has them.
    let descriptor = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    let descriptor = RawFd::try_from(descriptor).ok().filter(|descriptor| *descriptor >= 0)?;
    // SAFETY: the call succeeded, so it is an open descriptor that nobody else owns.
    Some(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// What is applied, one after the other.
fn filters<'c>(calls: impl Iterator<Item = &'c Call>) -> Result<[BpfProgram; 2], SandboxError> {
    let no_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let answer = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    // Of what several filters say, the kernel takes the strictest.
    let first = compile(no_clone3, SeccompAction::Allow, answer).map_err(seccompiler::Error::Backend)?;
    let second = rules(calls)
        .and_then(|rules| compile(rules, SeccompAction::KillProcess, SeccompAction::Allow))
        .map_err(seccompiler::Error::Backend)?;
    Ok([first, second])
}

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

fn rules<'c>(calls: impl Iterator<Item = &'c Call>) -> Result<Rules, seccompiler::BackendError> {
    let mut rules = Rules::new();
    let mut in_any_way = vec![libc::SYS_clone3];
    for call in calls {
        if call.arguments.is_empty() {
            in_any_way.push(call.number);
        } else {
            let conditions = call.arguments.iter().map(|argument| argument.condition());
            let way = SeccompRule::new(conditions.collect::<Result<_, _>>()?)?;
            rules.entry(call.number).or_default().push(way);
        }
    }
    // No condition at all.
    rules.extend(in_any_way.into_iter().map(|number| (number, Vec::new())));
    Ok(rules)
}

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    when_found: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, otherwise, when_found, TargetArch::try_from(std::env::consts::ARCH)?)?.try_into()
}
