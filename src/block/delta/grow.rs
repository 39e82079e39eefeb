//! Making a delta's volume larger.
//!
//! A group of clusters has a place that follows from its number, and states of its own, so a larger volume is a longer file and another
//! number in the header. The file becomes longer first and durably so, then the header's one sector is written over: whatever ends the
//! process in between leaves a delta of the old size, in a file that is longer than it needs to be.
//!
//! What is new reads as zeros: new groups are holes, the base ends where it ended, and the bytes behind the volume's old end within its
//! last cluster were zeros whenever that cluster was written.

use std::fs::File;

use crate::block::storage::{FileStorage, Storage};
use crate::sys::buffers::Readable;
use crate::units::{ByteCount, is_whole_sectors};

use super::OpenError;
use super::header::{HEADER_AT, Header};
use super::layout::Layout;

/// Makes the volume of a delta `bytes` large. The caller has its lock, and nobody has it open as a [`super::Delta`].
///
/// # Errors
/// When it is larger already, when `bytes` is no size of a volume, or when the file system refuses.
pub fn grow(file: &File, label: &str, header: &Header, bytes: u64) -> Result<Header, OpenError> {
    let found = header.layout.virtual_bytes();
    if bytes < found {
        return Err(OpenError::Shrink { file: label.to_owned(), found, asked: bytes });
    }
    if !is_whole_sectors(bytes) {
        return Err(OpenError::Size { bytes, expected: "the size has to be a multiple of 512, the sector" });
    }
    let layout = Layout::new(header.layout.cluster(), bytes)
        .ok_or(OpenError::Size { bytes, expected: "the size has to be at most 64 TiB" })?;
    let grown = Header { layout, ..header.clone() };
    let io = |action, offset| {
        let file = label.to_owned();
        move |source| OpenError::Io { action, file, offset, source }
    };
    // Never shorter: a growth that was cut off may have left more.
    let file_bytes = layout.file_bytes().max(file.metadata().map_err(io("examine", 0))?.len());
    file.set_len(file_bytes).map_err(|source| match source.raw_os_error() {
        Some(libc::EFBIG | libc::EINVAL) => OpenError::TooLargeForFileSystem { file: label.to_owned(), bytes, source },
        _ => io("lengthen", file_bytes)(source),
    })?;
    let copy = file.try_clone().map_err(io("open", 0))?;
    let storage = FileStorage::new(copy).map_err(io("map", 0))?;
    write_header(&storage, &grown).map_err(io("write the header of", HEADER_AT))?;
    log::info!("{label}: grown from {} to {}", ByteCount(found), ByteCount(bytes));
    Ok(grown)
}

fn write_header(storage: &impl Storage, header: &Header) -> std::io::Result<()> {
    storage.sync()?;
    storage.write_at(&[Readable::from_slice(&header.encode())], HEADER_AT)?;
    storage.sync()
}

#[cfg(test)]
mod tests {
    use super::super::{Delta, Lifetime, open};
    use super::*;
    use crate::block::base::Base;
    use crate::block::{Batch, Volume};
    use crate::sys::buffers::Writable;
    use crate::units::ClusterSize;

    const OLD: u64 = (1 << 20) + 512;

    fn delta(path: &std::path::Path) -> Volume {
        let (file, header) = open::open_locked(path).unwrap();
        let storage = FileStorage::new(file).unwrap();
        let delta = Delta::start(storage, "delta".to_owned(), header, Lifetime::Persistent).unwrap();
        Volume::cow(Base::empty(), delta)
    }

    fn read(volume: &Volume, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; len];
        volume.read(offset, &[Writable::from_mut_slice(&mut bytes)]).unwrap();
        bytes
    }

    #[test]
    fn what_was_there_stays_and_what_is_new_is_zeros() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("delta");
        let new = open::NewDelta { base: None, virtual_bytes: Some(OLD), cluster: ClusterSize::DEFAULT };
        open::create(&path, &new).unwrap();
        let volume = delta(&path);
        let mut batch = Batch::default();
        let bytes = vec![7; 1024];
        // The last sectors, in a cluster that ends behind the volume.
        volume.write(OLD - 1024, &[Readable::from_slice(&bytes)], &mut batch).unwrap();
        volume.commit(&mut batch).unwrap();
        volume.close().unwrap();
        drop(volume);

        let (file, header) = open::open_locked(&path).unwrap();
        let size = 3 << 30;
        assert!(matches!(grow(&file, "delta", &header, OLD - 512), Err(OpenError::Shrink { .. })));
        assert!(matches!(grow(&file, "delta", &header, OLD + 1), Err(OpenError::Size { .. })));
        assert!(matches!(grow(&file, "delta", &header, u64::MAX - 511), Err(OpenError::Size { .. })));
        // A growth that died before the header was written.
        file.set_len(header.layout.file_bytes() + (1 << 20)).unwrap();
        let grown = grow(&file, "delta", &header, size).unwrap();
        assert_eq!(open::read_header(&file, "delta").unwrap(), grown);
        assert_eq!(grown.uuid, header.uuid);
        drop(file);

        let volume = delta(&path);
        assert_eq!(volume.bytes(), size);
        assert_eq!(read(&volume, OLD - 1024, 8192), [vec![7; 1024], vec![0; 7168]].concat());
        assert_eq!(read(&volume, size - 4096, 4096), vec![0; 4096]);
        volume.write(size - 512, &[Readable::from_slice(&[9; 512])], &mut batch).unwrap();
        volume.commit(&mut batch).unwrap();
        assert_eq!(read(&volume, size - 512, 512), vec![9; 512]);
        volume.close().unwrap();
    }
}
