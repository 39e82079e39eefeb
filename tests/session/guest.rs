//! [`Guest`]: memory that a front end shares with a backend.
//!
//! Regions lie where a test wants them, in memfds, in files or on hugetlbfs. Memory is handed out once and never taken
//! back: a guest lives as long as its test.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Length of a page of hugetlbfs.
pub const HUGE_PAGE: u64 = 2 << 20;

/// What guest memory lies in.
#[derive(Clone, Copy)]
pub enum Backing<'p> {
    /// A memfd for each region.
    Memfd,
    /// A memfd of 2 MiB pages for each region.
    Huge,
    /// One file in this directory that holds all regions, one behind the other.
    File(&'p Path),
}

/// A guest's memory.
pub struct Guest {
    /// The memory.
    pub memory: GuestMemoryMmap<()>,
    next: AtomicU64,
}

impl Guest {
    /// 32 MiB of memory in memfds, in three regions: two that touch, and one beyond 4 GiB.
    pub fn new() -> Guest {
        Guest::with_regions(&[(0, 16 << 20), (16 << 20, 8 << 20), (4 << 30, 8 << 20)], Backing::Memfd).expect("memory")
    }

    /// Memory of regions: guest address and length of each, in order.
    pub fn with_regions(regions: &[(u64, u64)], backing: Backing<'_>) -> std::io::Result<Guest> {
        let shared = match backing {
            Backing::File(directory) => Some(tempfile::tempfile_in(directory)?),
            _ => None,
        };
        let mut ranges = Vec::new();
        let mut offset = 0;
        for (start, bytes) in regions {
            let (file, at) = match (&shared, backing) {
                (Some(file), _) => {
                    offset += bytes;
                    file.set_len(offset)?;
                    (file.try_clone()?, offset - bytes)
                }
                (None, Backing::Huge) => (memfd(*bytes, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?, 0),
                (None, _) => (memfd(*bytes, MemfdFlags::empty())?, 0),
            };
            ranges.push((GuestAddress(*start), *bytes as usize, Some(FileOffset::new(file, at))));
        }
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).map_err(std::io::Error::other)?;
        // A driver never uses address 0.
        Ok(Guest { memory, next: AtomicU64::new(regions[0].0 + 4096) })
    }

    /// A place of `bytes` bytes in the first region, aligned to `align`, that nobody else gets.
    #[track_caller]
    pub fn allocate(&self, bytes: u64, align: u64) -> u64 {
        let claim = |next: u64| next.next_multiple_of(align) + bytes;
        let before = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| Some(claim(next)));
        let end = claim(before.expect("the closure always has a value"));
        let first = self.memory.iter().next().expect("there is a region");
        assert!(end <= first.start_addr().raw_value() + first.len(), "the test's guest has too little memory");
        end - bytes
    }

    /// All regions, as a front end tells of them.
    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.memory.iter().map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).expect("a file")).collect()
    }

    /// The file that a region lies in.
    pub fn file_of(&self, region: usize) -> File {
        let region = self.memory.iter().nth(region).expect("a region");
        region.file_offset().expect("a file").file().try_clone().expect("a descriptor")
    }

    /// The front end's own address of a guest address.
    pub fn user_address(&self, guest_address: u64) -> u64 {
        self.memory.get_host_address(GuestAddress(guest_address)).expect("guest memory") as u64
    }

    /// Writes bytes.
    #[track_caller]
    pub fn write(&self, guest_address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(guest_address)).expect("guest memory");
    }

    /// Reads bytes.
    #[track_caller]
    pub fn read(&self, guest_address: u64, bytes: usize) -> Vec<u8> {
        let mut read = vec![0; bytes];
        self.memory.read_slice(&mut read, GuestAddress(guest_address)).expect("guest memory");
        read
    }

    /// Writes a 16-bit number, after everything written before.
    #[track_caller]
    pub fn store(&self, guest_address: u64, value: u16) {
        self.memory.store(value.to_le(), GuestAddress(guest_address), Ordering::SeqCst).expect("guest memory");
    }

    /// Reads a 16-bit number, before everything read after.
    #[track_caller]
    pub fn load(&self, guest_address: u64) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(guest_address), Ordering::SeqCst).expect("guest memory"))
    }
}

/// A memfd of a length.
pub fn memfd(bytes: u64, flags: MemfdFlags) -> std::io::Result<File> {
    let file = File::from(memfd_create("guest", flags | MemfdFlags::CLOEXEC)?);
    file.set_len(bytes)?;
    Ok(file)
}

impl Clone for Guest {
    /// The same memory; of what is left to hand out, each has its own idea.
    fn clone(&self) -> Guest {
        Guest { memory: self.memory.clone(), next: AtomicU64::new(self.next.load(Ordering::Relaxed)) }
    }
}
