//! Warming: an image that has just been written is read again, so that the page cache holds it in large pages.
//!
//! The page cache takes pieces of memory as small as an import's writes. Read through a mapping that asks for it, an image comes in pieces of 2 MiB, each of which one entry
//! of a page table maps. A backend then reads it a third faster at random, and needs no page tables for it. Written in such pieces it would too, but then
//! the import waits while the kernel makes room for each.

use std::fs::File;
use std::io;

use crate::digest::Digest;
use crate::sys::file;
use crate::sys::mapping::FileMapping;

use super::{Store, StoreError, allocated_bytes};

/// What one entry of a page table maps.
const LARGE_PAGE_BYTES: u64 = 2 << 20;

impl Store {
    /// Has an image in the page cache by large pages, if nearly all of it is there anyway. Whether that was tried.
    ///
    /// What others have mapped of it stays as it is. For nothing but speed: after an error all is well but slower.
    pub fn warm(&self, digest: &Digest) -> Result<bool, StoreError> {
        let path = self.path(digest);
        let image = self.open_image(digest, None)?;
        warm(&image).map_err(StoreError::io("read", &path))
    }
}

fn warm(image: &File) -> io::Result<bool> {
    let held = allocated_bytes(image)?;
    // A large image that is not all in memory would drive others out of it.
    if file::cached_bytes(image)? < held - held / 8 {
        return Ok(false);
    }
    let bytes = file::len(image)?;
    let mapping = FileMapping::new(image, bytes)?;
    mapping.prefer_large_pages()?;
    file::drop_cached(image)?;
    let mut at = 0;
    while let Some(data) = file::next_data(image, at)? {
        at = data.start - data.start % LARGE_PAGE_BYTES;
        while at < data.end {
            let end = (at + LARGE_PAGE_BYTES).min(bytes);
            mapping.populate(at..end)?;
            at = end;
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_warm_image_is_in_memory_whole_and_its_holes_are_not() {
        let file = tempfile::tempfile().unwrap();
        let bytes = 9 * LARGE_PAGE_BYTES + 4096;
        file.set_len(bytes).unwrap();
        let (early, late) = (LARGE_PAGE_BYTES + 4096, 8 * LARGE_PAGE_BYTES);
        file.write_all_at(&[7; 8192], early).unwrap();
        file.write_all_at(&vec![8; (bytes - late) as usize], late).unwrap();
        file.sync_all().unwrap();
        match warm(&file) {
            Ok(tried) => assert!(tried, "all that was written is in memory"),
            Err(error) => {
                println!("skipped: the kernel cannot: {error}");
                return;
            }
        }
        let cached = file::cached_bytes(&file).unwrap();
        assert!((8192 + bytes - late..=6 * LARGE_PAGE_BYTES).contains(&cached), "{cached} bytes of {bytes}");
        let mut found = [0; 4096];
        file.read_exact_at(&mut found, early).unwrap();
        assert_eq!(found, [7; 4096]);

        file::drop_cached(&file).unwrap();
        if file::cached_bytes(&file).unwrap() == 0 {
            assert!(!warm(&file).unwrap(), "an image that is not in memory stays where it is");
            assert_eq!(file::cached_bytes(&file).unwrap(), 0);
        }
    }
}
