//! Rings: what arrives, what is left behind, and what is refused.

use super::rings::register;
use super::*;
use crate::sys::file;
use crate::sys::guest::RegionPlace;
use std::fs::File;
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;

fn guest() -> Arc<GuestMemory> {
    let file = tempfile::tempfile().unwrap();
    let bytes = 64 * PAGE as u64;
    file.set_len(bytes).unwrap();
    let place = RegionPlace { guest_address: 0, user_address: 0, bytes, file_offset: 0 };
    Arc::new(GuestMemory::map(vec![(place, file)]).unwrap())
}

fn buffers(memory: &GuestMemory, at: u64, len: u64) -> Vec<Writable<'_>> {
    let mut found = Vec::new();
    assert!(memory.writable(at, len, &mut found));
    found
}

/// A ring, or none where there are none to be had.
fn ring() -> Option<(Arc<OwnedFd>, Shape)> {
    match RingFiles::create(1) {
        Ok(rings) => Some((Arc::new(rings.files()[0].try_clone().unwrap()), rings.shape())),
        Err(error) => {
            println!("skipped: no io_uring here: {error}");
            None
        }
    }
}

fn image() -> File {
    let file = tempfile::tempfile().unwrap();
    let contents: Vec<u8> = (0..8 * PAGE).map(|at| (at / 512) as u8 + 1).collect();
    file.write_all_at(&contents, 0).unwrap();
    file
}

#[test]
fn reads_arrive_whole_and_by_their_tags() {
    let Some((ring, shape)) = ring() else { return };
    let (image, memory) = (image(), guest());
    let mut uring = Uring::adopt(ring, shape, [Some(image.as_fd()), None]).unwrap();
    let mut scattered = buffers(&memory, 0, 512);
    scattered.extend(buffers(&memory, 4 * PAGE as u64, 512));
    assert!(uring.read(0, 512, &scattered, &memory, 7));
    assert!(uring.read(0, 8 * PAGE as u64 - 512, &buffers(&memory, 8 * PAGE as u64, 1024), &memory, 8));
    assert!(uring.read(1, 0, &buffers(&memory, 0, 512), &memory, 9), "there is no such file, as is seen later");
    let mut own = vec![0; 512];
    assert!(!uring.read(0, 0, &[Writable::from_mut_slice(&mut own)], &memory, 1), "nobody keeps that mapped");
    uring.submit().unwrap();
    let mut ended = Vec::new();
    while ended.len() < 3 {
        uring.wait().unwrap();
        ended.extend(std::iter::from_fn(|| uring.next_ended()).map(|read| (read.tag, read.result.ok())));
    }
    ended.sort_unstable();
    assert_eq!(ended, [(7, Some(1024)), (8, Some(512)), (9, None)]);
    let mut found = [0; 512];
    for (at, expected) in [(0, 2), (4 * PAGE as u64, 3), (8 * PAGE as u64, 64)] {
        assert!(memory.read(at, &mut found));
        assert_eq!(found, [expected; 512]);
    }
    assert_eq!((uring.under_way(), uring.room()), (0, UNDER_WAY_MAX as usize));
}

#[test]
fn there_is_room_for_so_many_reads_and_those_that_nobody_was_told_of_can_be_taken_back() {
    let Some((ring, shape)) = ring() else { return };
    let (image, memory) = (image(), guest());
    let mut uring = Uring::adopt(ring, shape, [Some(image.as_fd()), None]).unwrap();
    let buffer = buffers(&memory, 0, 512);
    for tag in 0..10 {
        assert!(uring.read(0, 0, &buffer, &memory, tag));
    }
    assert_eq!(std::iter::from_fn(|| uring.withdraw()).collect::<Vec<_>>(), (0..10).rev().collect::<Vec<_>>());
    for round in 0..5 {
        for tag in 0..UNDER_WAY_MAX {
            assert!(uring.read(0, 0, &buffer, &memory, tag), "round {round}, read {tag}");
        }
        assert!(!uring.read(0, 0, &buffer, &memory, 0));
        uring.submit().unwrap();
        let mut ended = Vec::new();
        while ended.len() < UNDER_WAY_MAX as usize {
            uring.wait().unwrap();
            ended.extend(std::iter::from_fn(|| uring.next_ended()).map(|read| read.tag));
        }
        ended.sort_unstable();
        assert_eq!(ended, (0..UNDER_WAY_MAX).collect::<Vec<_>>());
    }
}

#[test]
fn what_the_last_one_has_left_in_a_ring_is_nothing_to_the_next() {
    let Some((ring, shape)) = ring() else { return };
    let (image, memory) = (image(), guest());
    let mut dead = Uring::adopt(Arc::clone(&ring), shape, [Some(image.as_fd()), None]).unwrap();
    // As if it were another process's.
    dead.mark = !std::process::id();
    for tag in 0..30 {
        assert!(dead.read(0, 0, &buffers(&memory, 0, 512), &memory, tag));
        if tag == 9 {
            dead.submit().unwrap();
        }
    }
    std::mem::forget(dead);
    let other = image_of(9);
    let mut uring = Uring::adopt(ring, shape, [Some(other.as_fd()), None]).unwrap();
    assert!(uring.next_ended().is_none());
    assert!(uring.read(0, 0, &buffers(&memory, 0, 512), &memory, 1));
    uring.submit().unwrap();
    uring.wait().unwrap();
    let read = uring.next_ended().unwrap();
    assert_eq!((read.tag, read.result.unwrap()), (1, 512));
    assert!(uring.next_ended().is_none());
    let mut found = [0; 512];
    assert!(memory.read(0, &mut found));
    assert_eq!(found, [9; 512], "from its own file");
}

fn image_of(byte: u8) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[byte; PAGE], 0).unwrap();
    file
}

/// A thread that ends is to the kernel what a process is that dies: what its disk is told of goes on.
#[test]
fn what_the_last_one_has_under_way_is_waited_for() {
    const PIECE: usize = 256 << 10;
    let Some((ring, shape)) = ring() else { return };
    let bytes = SUBMISSIONS as usize * PIECE;
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![7; bytes], 0).unwrap();
    file.sync_all().unwrap();
    let Ok(direct) = file::reopen_direct(&file) else {
        println!("skipped: no O_DIRECT here");
        return;
    };
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(bytes as u64).unwrap();
    let place = RegionPlace { guest_address: 0, user_address: 0, bytes: bytes as u64, file_offset: 0 };
    let memory = Arc::new(GuestMemory::map(vec![(place, memory)]).unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut dead = Uring::adopt(Arc::clone(&ring), shape, [Some(direct.as_fd()), None]).unwrap();
            for piece in 0..u64::from(SUBMISSIONS) {
                let at = piece * PIECE as u64;
                assert!(dead.read(0, at, &buffers(&memory, at, PIECE as u64), &memory, 0));
            }
            dead.submit().unwrap();
            std::mem::forget(dead);
        });
    });
    wait_for_last(&ring, &shape).unwrap();
    let read = || {
        let mut found = vec![0; bytes];
        assert!(memory.read(0, &mut found));
        found
    };
    let found = read();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(found == read(), "something has been read since");
    let mut uring = Uring::adopt(ring, shape, [Some(direct.as_fd()), None]).unwrap();
    assert!(uring.next_ended().is_none(), "nothing is left of it");
}

#[test]
fn a_ring_does_nothing_but_reads_and_writes_of_its_files() {
    let Some((ring, shape)) = ring() else { return };
    let (image, memory) = (image(), guest());
    let mut uring = Uring::adopt(Arc::clone(&ring), shape, [Some(image.as_fd()), None]).unwrap();
    assert!(uring.read(0, 0, &buffers(&memory, 0, 512), &memory, 1));
    // SAFETY: a submission that is there, and that the kernel has not been told of.
    let submission = unsafe { &mut *uring.memory.submission(uring.tail.wrapping_sub(1) % shape.submissions) };
    submission.opcode = raw::io_uring_op::IORING_OP_FALLOCATE as u8;
    uring.submit().unwrap();
    uring.wait().unwrap();
    assert_eq!(
        uring.next_ended().unwrap().result.unwrap_err().raw_os_error(),
        Some(libc::EACCES),
        "it would make it longer"
    );

    assert!(uring.read(0, 0, &buffers(&memory, 0, 512), &memory, 1));
    // SAFETY: as above.
    let submission = unsafe { &mut *uring.memory.submission(uring.tail.wrapping_sub(1) % shape.submissions) };
    (submission.flags, submission.fd) = (0, image.as_raw_fd());
    uring.submit().unwrap();
    uring.wait().unwrap();
    assert_eq!(uring.next_ended().unwrap().result.unwrap_err().raw_os_error(), Some(libc::EACCES), "any open file");

    let operation = raw::io_uring_register_op::IORING_UNREGISTER_FILES;
    // SAFETY: takes no pointer.
    let error = unsafe { register(&ring, operation, std::ptr::null(), 0) }.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EACCES), "others could be registered in place of them");
}
