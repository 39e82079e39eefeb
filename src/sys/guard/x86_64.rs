//! Guarded access on x86-64: the instruction that faults is left by the handler of the signal, at a place that was agreed
//! on beforehand.
//!
//! **Single numbers** are one instruction, and as the Linux kernel does, each is listed in a table: where it is, and where to go on
//! when it faults. The entries lie in a section of their own; as its name is one that C could use, the linker says where it begins and ends.
//! A guarded instruction costs what it would cost anyway.
//!
//! **Longer copies** are one instruction as well, where the processor says that it is quick at it: `rep movsb` takes a fifth less than `memcpy` for 1 MiB (on an AMD
//! EPYC, Zen 5), and as long for 4 KiB, where what comes behind it has to wait for its end.
//!
//! **Other copies, and fills,** are the C library's `memcpy` and `memset`. Nobody knows which of their instructions may fault, nor what they have done to the
//! registers; so they are called by a trampoline that saves those that a call has to preserve, and tells the handler, by a word
//! of the thread's own, where on the stack it has done so. That costs about a nanosecond.
//!
//! A fault of any other instruction finds the action restored that was there before, and happens again.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::arch::{asm, naked_asm};
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Fault, note_fault, take_fault};

/// The signals by which the kernel says that memory cannot be accessed.
const SIGNALS: [c_int; 2] = [libc::SIGBUS, libc::SIGSEGV];

/// What was done about the signals before.
static PREVIOUS: OnceLock<[libc::sigaction; SIGNALS.len()]> = OnceLock::new();

thread_local! {
    /// Where the trampoline has saved this thread's registers, while it is in a copy or a fill; 0: it is in none.
    static LANDING: Cell<usize> = const { Cell::new(0) };
}

/// From how many bytes on a copy is one instruction.
static STRING_FROM: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Whether the processor says of its string instructions that they are quick, for many bytes (ERMS) and for few (FSRM).
fn has_quick_strings() -> bool {
    const ERMS: u32 = 1 << 9;
    const FSRM: u32 = 1 << 4;
    const FEATURES: u32 = 7;
    if __cpuid(0).eax < FEATURES {
        return false;
    }
    let features = __cpuid_count(FEATURES, 0);
    features.ebx & ERMS != 0 && features.edx & FSRM != 0
}

/// Handles the signals.
pub fn install() -> io::Result<()> {
    if has_quick_strings() {
        STRING_FROM.store(8 << 10, Ordering::Relaxed);
    }
    // SAFETY: all-zero bytes are a valid action, and the call only fills it. It cannot fail for a signal that exists.
    let action_now = |signal| unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut action);
        action
    };
    // Once, ahead of the first change: an action that the handler falls back to must not be the handler.
    PREVIOUS.get_or_init(|| SIGNALS.map(action_now));
    for signal in SIGNALS {
        // SAFETY: all-zero bytes are a valid action, with no signals held back. The handler has the signature that `SA_SIGINFO` asks for,
        // and does nothing but what a handler may do.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as Handler as usize;
            // On the stack for signals, so that a stack that has overflowed gets as far as the action before this one, which says so.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);

/// Takes the thread out of a guarded access that has faulted.
///
/// Runs in the midst of any code: it allocates nothing, locks nothing, and uses of the thread's own only words that need no setting up.
extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: with `SA_SIGINFO` the kernel passes both, for as long as the handler runs, and nobody else has them.
    let (info, context) = unsafe { (&*info, &mut *context.cast::<libc::ucontext_t>()) };
    let registers = &mut context.uc_mcontext.gregs;
    // A signal that somebody has sent says nothing of where this thread is.
    if info.si_code > 0 {
        // SAFETY: the kernel fills the address for these signals when they come from itself.
        let fault = Fault { address: unsafe { info.si_addr() }.addr() };
        if let Some(continuation) = continuation_of(registers[libc::REG_RIP as usize] as usize) {
            note_fault(fault);
            registers[libc::REG_RIP as usize] = continuation as i64;
            return;
        }
        let landing = LANDING.get();
        if landing != 0 {
            registers[libc::REG_RIP as usize] = landed as *const () as i64;
            registers[libc::REG_RSP as usize] = landing as i64;
            registers[libc::REG_RAX as usize] = fault.address.max(1) as i64;
            // A call leaves with the direction forward, and the copy may have been at it backwards.
            const DIRECTION: i64 = 1 << 10;
            registers[libc::REG_EFL as usize] &= !DIRECTION;
            return;
        }
    }
    let previous = PREVIOUS.get().zip(SIGNALS.iter().position(|known| *known == signal));
    if let Some((previous, index)) = previous {
        // SAFETY: an action that was in force before. May be called by a handler.
        unsafe { libc::sigaction(signal, &raw const previous[index], std::ptr::null_mut()) };
    }
}

/// An entry of the table of guarded instructions: distances from the place of each field to what it names.
#[repr(C)]
struct Entry {
    instruction: i32,
    continuation: i32,
}

/// Where to go on when the instruction at an address faults, if it is guarded.
fn continuation_of(instruction: usize) -> Option<usize> {
    let named = |field: &i32| (&raw const *field).addr().wrapping_add_signed(*field as isize);
    table().iter().find(|entry| named(&entry.instruction) == instruction).map(|entry| named(&entry.continuation))
}

fn table() -> &'static [Entry] {
    let (start, end): (*const Entry, *const Entry);
    // SAFETY: takes the addresses of two symbols. An entry of this function's own names itself, which is no instruction, and
    // sees to it that there is a section, for otherwise there are no symbols.
    unsafe {
        asm!(
            ".pushsection pando_guard, \"aR\", @progbits",
            ".balign 4",
            ".long 0, 0",
            ".popsection",
            "lea {start}, [rip + __start_pando_guard]",
            "lea {end}, [rip + __stop_pando_guard]",
            start = out(reg) start,
            end = out(reg) end,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    // SAFETY: the section holds nothing but entries, one behind the other, and nobody writes it.
    unsafe { std::slice::from_raw_parts(start, (end.addr() - start.addr()) / size_of::<Entry>()) }
}

/// One instruction that may fault, with an entry in the table that says to go on behind it.
///
/// The compiler takes it to read and write any memory, and keeps all accesses on their side of it; the processor keeps
/// loads in the order of loads, and stores behind all that is ahead of them. So each load acquires and each store releases.
/// The section's entries are kept although no code refers to them ("R").
macro_rules! guarded {
    ($instruction:literal, $($operands:tt)*) => {
        asm!(
            concat!("2: ", $instruction),
            "3:",
            ".pushsection pando_guard, \"aR\", @progbits",
            ".balign 4",
            ".long 2b - .",
            ".long 3b - .",
            ".popsection",
            $($operands)*
            options(nostack),
        )
    };
}

/// Reads a number, before anything that is read after it; 0, and a note of it, when that faults.
///
/// # Safety
/// Two bytes at `at` are mapped readable, whether or not their page can be had.
#[inline]
pub unsafe fn load_u16(at: *const u16) -> u16 {
    let mut value = 0u32;
    // SAFETY: reads what the caller may read, and changes nothing but the register.
    unsafe { guarded!("movzx {value:e}, word ptr [{at}]", at = in(reg) at, value = inout(reg) value,) };
    value as u16
}

/// Writes a number, after everything that was written before it; a note of it when that faults.
///
/// # Safety
/// Two bytes at `at` are mapped writable, whether or not their page can be had, and no reference to them is live.
#[inline]
pub unsafe fn store_u16(at: *mut u16, value: u16) {
    // SAFETY: writes what the caller may write.
    unsafe { guarded!("mov word ptr [{at}], {value:x}", at = in(reg) at, value = in(reg) value,) };
}

/// As [`load_u16`], eight bytes at any address, without an order among others.
///
/// # Safety
/// As there.
#[inline]
pub unsafe fn load_u64(at: *const u64) -> u64 {
    let mut value = 0u64;
    // SAFETY: reads what the caller may read, and changes nothing but the register.
    unsafe { guarded!("mov {value}, qword ptr [{at}]", at = in(reg) at, value = inout(reg) value,) };
    value
}

/// As [`store_u16`], eight bytes at any address, without an order among others.
///
/// # Safety
/// As there.
#[inline]
pub unsafe fn store_u64(at: *mut u64, value: u64) {
    // SAFETY: writes what the caller may write.
    unsafe { guarded!("mov qword ptr [{at}], {value}", at = in(reg) at, value = in(reg) value,) };
}

/// Sets bits of a byte in one step, after everything that was written before it; a note of it when that faults.
///
/// # Safety
/// A byte at `at` is mapped writable, whether or not its page can be had, and no reference to it is live.
#[inline]
pub unsafe fn or_u8(at: *mut u8, bits: u8) {
    // SAFETY: writes what the caller may write.
    unsafe { guarded!("lock or byte ptr [{at}], {bits}", at = in(reg) at, bits = in(reg_byte) bits,) };
}

/// Copies bytes. After a fault some of them may have been copied, in any order.
///
/// # Safety
/// `len` bytes are mapped readable at `from` and writable at `to`, whether or not their pages can be had. They do not overlap, and no
/// reference to those at `to` is live.
#[inline]
pub unsafe fn copy(from: *const u8, to: *mut u8, len: usize) -> Result<(), Fault> {
    if len >= STRING_FROM.load(Ordering::Relaxed) {
        // SAFETY: by this function's condition.
        return unsafe { copy_by_string(from, to, len) };
    }
    // SAFETY: `memcpy` with what it asks for.
    result(LANDING.with(|landing| unsafe {
        call_guarded(to.addr(), from.addr(), len, libc::memcpy as *const () as usize, landing.as_ptr())
    }))
}

/// # Safety
/// As for [`copy`].
#[inline]
unsafe fn copy_by_string(from: *const u8, to: *mut u8, len: usize) -> Result<(), Fault> {
    // What was noted of a single number is still to be asked for.
    let noted = take_fault();
    let left: usize;
    // SAFETY: reads and writes what the caller may. The direction is forward, as everywhere.
    unsafe {
        guarded!("rep movsb", inout("rcx") len => left, inout("rsi") from => _, inout("rdi") to => _,);
    }
    let fault = if left > 0 { take_fault() } else { None };
    if let Some(noted) = noted {
        note_fault(noted);
    }
    // A fault that has an address of zero is one all the same.
    if left == 0 { Ok(()) } else { Err(fault.unwrap_or(Fault { address: to.addr() })) }
}

/// Writes zeros. After a fault some may have been written.
///
/// # Safety
/// `len` bytes at `to` are mapped writable, whether or not their pages can be had, and no reference to them is live.
#[inline]
pub unsafe fn fill_zero(to: *mut u8, len: usize) -> Result<(), Fault> {
    // SAFETY: `memset` with what it asks for.
    result(LANDING.with(|landing| unsafe {
        call_guarded(to.addr(), 0, len, libc::memset as *const () as usize, landing.as_ptr())
    }))
}

#[inline]
fn result(fault: usize) -> Result<(), Fault> {
    if fault == 0 { Ok(()) } else { Err(Fault { address: fault }) }
}

/// Calls `function(to, what, len)` such that a fault in it ends the call: 0, or the address of the fault.
///
/// # Safety
/// `function` is C's `memcpy` or `memset`, or takes as little harm from being left in the midst, and `landing` is this
/// thread's [`LANDING`].
#[unsafe(naked)]
unsafe extern "C" fn call_guarded(to: usize, what: usize, len: usize, function: usize, landing: *mut usize) -> usize {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        // Seven words and the return address: the stack is aligned as a call has to find it.
        "push r8",
        "mov [r8], rsp",
        "call rcx",
        "xor eax, eax",
        "jmp {landed}",
        landed = sym landed,
    )
}

/// The second half of [`call_guarded`], which the handler jumps to, with the stack as it was ahead of the call and the answer in rax.
///
/// # Safety
/// Not to be called.
#[unsafe(naked)]
unsafe extern "C" fn landed() {
    naked_asm!(
        "pop r8",
        "mov qword ptr [r8], 0",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::guard::tests::Pages;

    /// Calls [`call_guarded`] with a value of its own in each register that a call preserves, and writes to `found` what they hold
    /// afterwards, and the flags.
    #[unsafe(naked)]
    unsafe extern "C" fn registers_after(
        to: usize,
        what: usize,
        len: usize,
        function: usize,
        landing: *mut usize,
        found: *mut [u64; 7],
    ) -> usize {
        naked_asm!(
            "push rbx; push rbp; push r12; push r13; push r14; push r15; push r9",
            "mov ebx, 1; mov ebp, 2; mov r12d, 3; mov r13d, 4; mov r14d, 5; mov r15d, 6",
            "call {call_guarded}",
            "mov r9, [rsp]",
            "mov [r9], rbx; mov [r9 + 8], rbp; mov [r9 + 16], r12; mov [r9 + 24], r13; mov [r9 + 32], r14; mov [r9 + 40], r15",
            "pushfq; pop qword ptr [r9 + 48]",
            "cld",
            "pop r9; pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
            "ret",
            call_guarded = sym call_guarded,
        )
    }

    /// Leaves nothing as it was, and then reads from `to`.
    #[unsafe(naked)]
    unsafe extern "C" fn spoil() {
        naked_asm!(
            "push rax; push rax; std",
            "xor ebx, ebx; xor ebp, ebp; xor r12d, r12d; xor r13d, r13d; xor r14d, r14d; xor r15d, r15d",
            "mov al, [rdi]",
            "ud2",
        )
    }

    #[test]
    fn registers_are_as_they_were_whatever_the_copy_was_at() {
        install().unwrap();
        let pages = Pages::in_memfd(2);
        pages.cut(1);
        let mut found = [0; 7];
        let gone = pages.at(4096).addr() + 7;
        // SAFETY: what is called reads from an address that is mapped, and is left there.
        let fault = LANDING.with(|landing| unsafe {
            registers_after(gone, 0, 0, spoil as *const () as usize, landing.as_ptr(), &raw mut found)
        });
        assert_eq!(fault, gone);
        assert_eq!(found[..6], [1, 2, 3, 4, 5, 6]);
        assert_eq!(found[6] & 1 << 10, 0, "the direction is forward");
        assert_eq!(LANDING.get(), 0, "a fault elsewhere is none of a copy's");
    }
}
