//! Both ways of guarded access, on the one processor that has both: against a vector of bytes, and with pages that are gone.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use super::*;

const PAGE: usize = 4096;

/// A way of guarded access.
struct Way {
    name: &'static str,
    install: fn() -> std::io::Result<()>,
    copy: unsafe fn(*const u8, *mut u8, usize) -> Result<(), Fault>,
    fill_zero: unsafe fn(*mut u8, usize) -> Result<(), Fault>,
    load_u16: unsafe fn(*const u16) -> u16,
    store_u16: unsafe fn(*mut u16, u16),
    load_u64: unsafe fn(*const u64) -> u64,
    store_u64: unsafe fn(*mut u64, u64),
    or_u8: unsafe fn(*mut u8, u8),
}

/// All of them, ready.
fn ways() -> Vec<Way> {
    macro_rules! way {
        ($module:ident) => {
            Way {
                name: stringify!($module),
                install: $module::install,
                copy: $module::copy,
                fill_zero: $module::fill_zero,
                load_u16: $module::load_u16,
                store_u16: $module::store_u16,
                load_u64: $module::load_u64,
                store_u64: $module::store_u64,
                or_u8: $module::or_u8,
            }
        };
    }
    let ways = vec![
        #[cfg(target_arch = "x86_64")]
        way!(x86_64),
        way!(portable),
    ];
    ways.iter().for_each(|way| (way.install)().unwrap());
    ways
}

/// Pages of a file, mapped. What each page holds: its number, from 1.
pub(super) struct Pages {
    file: File,
    start: *mut u8,
    count: usize,
}

impl Pages {
    fn in_file(file: File, count: usize) -> Pages {
        let contents: Vec<u8> = (0..count * PAGE).map(|at| (at / PAGE + 1) as u8).collect();
        std::os::unix::fs::FileExt::write_all_at(&file, &contents, 0).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), contents.len(), protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        Pages { file, start: start.cast(), count }
    }

    /// As a base or a delta lies in one.
    fn in_temporary_file(count: usize) -> Pages {
        Pages::in_file(tempfile::tempfile().unwrap(), count)
    }

    /// As a front end shares one.
    pub(super) fn in_memfd(count: usize) -> Pages {
        // SAFETY: a string that ends.
        let descriptor = unsafe { libc::memfd_create(c"pages".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(descriptor >= 0);
        // SAFETY: the call succeeded, so it is an open descriptor that nobody else owns.
        Pages::in_file(unsafe { std::os::fd::FromRawFd::from_raw_fd(descriptor) }, count)
    }

    /// Of both kinds.
    fn of_each_kind(count: usize) -> [Pages; 2] {
        [Pages::in_temporary_file(count), Pages::in_memfd(count)]
    }

    /// The address of a byte.
    pub(super) fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.count * PAGE);
        // SAFETY: within the mapping, or at its end.
        unsafe { self.start.add(offset) }
    }

    /// Takes the pages from `first` on away from under the mapping.
    pub(super) fn cut(&self, first: usize) {
        self.file.set_len((first * PAGE) as u64).unwrap();
    }

    /// What the file holds.
    fn contents(&self) -> Vec<u8> {
        let mut contents = vec![0; self.file.metadata().unwrap().len() as usize];
        std::os::unix::fs::FileExt::read_exact_at(&self.file, &mut contents, 0).unwrap();
        contents
    }

    /// Sees that a fault is of the pages from `first` on.
    #[track_caller]
    fn is_lost(&self, fault: Fault, first: usize) {
        let lost = self.at(first * PAGE).addr()..self.at(self.count * PAGE).addr();
        assert!(lost.contains(&fault.address), "{fault} is none of {lost:x?}");
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that was made; nothing refers to it any more.
        unsafe { libc::munmap(self.start.cast(), self.count * PAGE) };
    }
}

#[test]
fn copies_and_fills_do_what_a_vector_does() {
    let source: Vec<u8> = (0..3 * PAGE).map(|at| (at * 31 % 251) as u8).collect();
    let lengths = (0..=130).chain([255, 256, 257, 511, 512, 513, 1000, 2048, 4095, 4096, 4097, 8000]);
    for way in ways() {
        for len in lengths.clone() {
            for (from, to) in [(0, 0), (1, 0), (0, 1), (7, 3), (13, 64), (511, 1), (PAGE - 1, PAGE - 3)] {
                let mut found = vec![0xaa; 3 * PAGE];
                let mut expected = found.clone();
                // SAFETY: within two vectors.
                unsafe { (way.copy)(source.as_ptr().add(from), found.as_mut_ptr().add(to), len) }.unwrap();
                expected[to..to + len].copy_from_slice(&source[from..from + len]);
                assert!(found == expected, "{}: {len} bytes from {from} to {to}", way.name);
                // SAFETY: within the vector.
                unsafe { (way.fill_zero)(found.as_mut_ptr().add(from), len) }.unwrap();
                expected[from..from + len].fill(0);
                assert!(found == expected, "{}: {len} zeros at {from}", way.name);
            }
        }
        // More than a fill of one piece, and more than the kernel copies at once.
        let source: Vec<u8> = (0..5usize << 20).map(|at| (at * 31 % 251) as u8).collect();
        let mut found = vec![0xaa; source.len()];
        // SAFETY: two vectors of the same length.
        unsafe { (way.copy)(source.as_ptr(), found.as_mut_ptr(), source.len()) }.unwrap();
        assert!(found == source, "{}: 5 MiB", way.name);
        // SAFETY: all of the vector but its ends.
        unsafe { (way.fill_zero)(found.as_mut_ptr().add(1), source.len() - 2) }.unwrap();
        assert!(found[0] == source[0] && found.last() == source.last(), "{}: 5 MiB of zeros", way.name);
        assert!(found[1..found.len() - 1].iter().all(|byte| *byte == 0), "{}: 5 MiB of zeros", way.name);
        assert_eq!(take_fault(), None);
    }
}

#[test]
fn a_source_that_is_cut_off_is_a_fault_and_the_rest_still_reads() {
    for way in ways() {
        for pages in Pages::of_each_kind(8) {
            pages.cut(5);
            let mut bytes = vec![0xaa; 8 * PAGE + 1];
            for start in [0, 1, PAGE - 1, 4 * PAGE, 5 * PAGE - 1, 5 * PAGE, 6 * PAGE + 77] {
                for len in [1, 2, 3, 16, 17, 100, 512, PAGE, 2 * PAGE, 3 * PAGE, 8 * PAGE] {
                    if start + len > 8 * PAGE {
                        continue;
                    }
                    // SAFETY: within the mapping, to a vector that is as long.
                    let result = unsafe { (way.copy)(pages.at(start), bytes.as_mut_ptr(), len) };
                    if start + len <= 5 * PAGE {
                        assert_eq!(result, Ok(()), "{}: {len} bytes at {start}", way.name);
                        let expected = (start..start + len).map(|at| (at / PAGE + 1) as u8);
                        assert!(bytes[..len].iter().copied().eq(expected), "{}: {len} bytes at {start}", way.name);
                    } else {
                        pages.is_lost(result.unwrap_err(), 5);
                    }
                }
            }
            assert_eq!(bytes[8 * PAGE], 0xaa, "{}: behind the destination", way.name);
            assert_eq!(take_fault(), None, "a copy says so itself");
        }
    }
}

#[test]
fn a_destination_that_is_cut_off_is_a_fault_and_the_rest_is_still_written() {
    let source = vec![0x55; 8 * PAGE];
    for way in ways() {
        for pages in Pages::of_each_kind(8) {
            pages.cut(3);
            for start in [0, 1, PAGE + 9, 2 * PAGE, 3 * PAGE - 1, 3 * PAGE, 7 * PAGE + 4095] {
                for len in [1, 2, 9, 16, 33, 100, 512, PAGE, 2 * PAGE, 5 * PAGE, 8 * PAGE] {
                    if start + len > 8 * PAGE {
                        continue;
                    }
                    // SAFETY: within the mapping, from a vector that is as long.
                    let copied = unsafe { (way.copy)(source.as_ptr(), pages.at(start), len) };
                    if start + len <= 3 * PAGE {
                        assert_eq!(copied, Ok(()), "{}: {len} bytes to {start}", way.name);
                        assert!(pages.contents()[start..start + len].iter().all(|byte| *byte == 0x55));
                    } else {
                        pages.is_lost(copied.unwrap_err(), 3);
                    }
                    // SAFETY: within the mapping.
                    let filled = unsafe { (way.fill_zero)(pages.at(start), len) };
                    if start + len <= 3 * PAGE {
                        assert_eq!(filled, Ok(()), "{}: {len} zeros to {start}", way.name);
                        assert!(pages.contents()[start..start + len].iter().all(|byte| *byte == 0));
                    } else {
                        pages.is_lost(filled.unwrap_err(), 3);
                    }
                }
            }
            assert_eq!(pages.contents().len(), 3 * PAGE, "writing makes no file longer");
        }
    }
}

#[test]
fn both_sides_cut_off_are_a_fault_of_one() {
    for way in ways() {
        let (from, to) = (Pages::in_temporary_file(2), Pages::in_memfd(2));
        from.cut(1);
        to.cut(1);
        // SAFETY: within both mappings.
        let fault = unsafe { (way.copy)(from.at(PAGE), to.at(PAGE), PAGE) }.unwrap_err();
        if (from.at(PAGE).addr()..from.at(2 * PAGE).addr()).contains(&fault.address) {
            from.is_lost(fault, 1);
        } else {
            to.is_lost(fault, 1);
        }
    }
}

#[test]
fn numbers_are_read_and_written_and_faults_of_them_are_noted() {
    for way in ways() {
        for pages in Pages::of_each_kind(3) {
            let (there, gone) = (pages.at(PAGE), pages.at(2 * PAGE));
            pages.cut(2);
            // SAFETY: numbers within the mapping; those of two bytes are at its start or 100 bytes further.
            unsafe {
                (way.store_u16)(there.cast(), 0x1234);
                (way.store_u16)(there.add(2).cast(), 0xffff);
                assert_eq!((way.load_u16)(there.cast()), 0x1234, "{}", way.name);
                assert_eq!((way.load_u64)(there.cast()), 0x0202_0202_ffff_1234, "{}", way.name);
                (way.store_u64)(there.add(5).cast(), 0x0123_4567_89ab_cdef);
                assert_eq!((way.load_u64)(there.add(5).cast()), 0x0123_4567_89ab_cdef, "{}: at any address", way.name);
                assert_eq!((way.load_u16)(there.add(2).cast()), 0xffff, "{}", way.name);
                (way.or_u8)(there.add(200), 0b1001_0000);
                assert_eq!((way.load_u16)(there.add(200).cast()), 0b0000_0010_1001_0010, "{}: bits are set", way.name);
                assert_eq!(take_fault(), None, "{}", way.name);

                assert_eq!((way.load_u16)(gone.add(100).cast()), 0, "{}", way.name);
                assert!(has_fault(), "{}", way.name);
                assert_eq!(take_fault(), Some(Fault { address: gone.addr() + 100 }), "{}", way.name);
                assert_eq!(take_fault(), None, "{}: it is told once", way.name);
                (way.store_u16)(gone.cast(), 1);
                assert_eq!(take_fault(), Some(Fault { address: gone.addr() }), "{}", way.name);
                assert_eq!((way.load_u64)(gone.cast()), 0, "{}", way.name);
                pages.is_lost(take_fault().unwrap(), 2);
                (way.store_u64)(gone.cast(), 1);
                pages.is_lost(take_fault().unwrap(), 2);
                (way.or_u8)(gone.add(9), 1);
                assert_eq!(take_fault(), Some(Fault { address: gone.addr() + 9 }), "{}", way.name);
                // In part: nothing of it is read.
                assert_eq!((way.load_u64)(gone.sub(4).cast()), 0, "{}", way.name);
                pages.is_lost(take_fault().unwrap(), 2);
                assert_eq!((way.load_u16)(there.cast()), 0x1234, "{}: and the rest goes on", way.name);
                assert_eq!(take_fault(), None, "{}", way.name);
            }
        }
    }
}

#[test]
fn a_fault_is_of_its_own_thread_and_leaves_nothing_behind() {
    for way in ways() {
        let pages = Pages::in_memfd(2);
        pages.cut(1);
        let (there, gone) = (pages.at(0).addr(), pages.at(PAGE).addr());
        std::thread::scope(|scope| {
            for number in 0..4u64 {
                let way = &way;
                scope.spawn(move || {
                    // Numbers that a compiler keeps in the registers that a call preserves.
                    let (mut sum, mut faults) = (number, 0u64);
                    for round in 0..2000u64 {
                        let mut bytes = [0; 700];
                        let from = if (round ^ number) % 2 == 0 { gone } else { there };
                        let len = 1 + (round % 700) as usize;
                        // SAFETY: within the mapping, to an array that is as long.
                        let result = unsafe { (way.copy)(from as *const u8, bytes.as_mut_ptr(), len) };
                        faults += u64::from(result.is_err());
                        sum += round;
                        assert_eq!(result.is_err(), from == gone);
                        assert!(from == gone || bytes[..len].iter().all(|byte| *byte == 1));
                        assert_eq!(take_fault(), None);
                    }
                    assert_eq!((sum, faults), (number + 1999 * 1000, 1000));
                });
            }
        });
    }
}

#[test]
fn the_first_page_that_is_gone_is_found() {
    install().unwrap();
    let pages = Pages::in_memfd(6);
    pages.cut(4);
    let found = |start: usize, len| {
        // SAFETY: within the mapping.
        unsafe { find_fault(pages.at(start), len) }.map(|fault| fault.address - pages.at(0).addr())
    };
    assert_eq!(found(0, 4 * PAGE), None);
    assert_eq!(found(0, 4 * PAGE + 1), Some(4 * PAGE));
    assert_eq!(found(100, 5 * PAGE), Some(4 * PAGE));
    assert_eq!(found(4 * PAGE - 1, 1), None);
    assert_eq!(found(4 * PAGE - 1, 2), Some(4 * PAGE));
    assert_eq!(found(4 * PAGE + 5, 10), Some(4 * PAGE + 5));
    assert_eq!(found(5 * PAGE, 0), None);
}

/// Also after a guarded one, and with the signal that it always was.
#[test]
fn a_fault_that_is_not_guarded_ends_the_process() {
    const ASKED: &str = "PANDO_TEST_FAULTS";
    if std::env::var_os(ASKED).is_none() {
        let this = ["--exact", "sys::guard::tests::a_fault_that_is_not_guarded_ends_the_process"];
        let mut child = Command::new(std::env::current_exe().unwrap());
        let status = child.args(this).env(ASKED, "1").output().unwrap().status;
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
        return;
    }
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a structure to read; the second takes no pointers.
    unsafe {
        libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
        // A fault that happens again and again.
        libc::alarm(30);
    }
    install().unwrap();
    let pages = Pages::in_memfd(2);
    pages.cut(1);
    let mut byte = 0;
    // SAFETY: within the mapping, to a byte of our own.
    let _ = unsafe { copy(pages.at(PAGE), &raw mut byte, 1) }.unwrap_err();
    // SAFETY: nothing that could come of it is used: the process ends.
    unsafe { pages.at(PAGE).read_volatile() };
}
