//! [`Format`]: what a file is, told by its first bytes.
//!
//! Knows marks only; what follows them is not looked at here. Formats that are recognised and not read are named in the
//! refusal: taken as raw, they would become images that no guest can boot.

use std::fmt;
use std::fs::File;
use std::io;

use crate::sys::buffers::Writable;
use crate::sys::file;

/// A format that images are imported from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// The bytes of the disk as they are.
    Raw,
    /// QEMU's, of version 2 or 3.
    Qcow2,
    /// VMware's, all of a disk in one file.
    Vmdk,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 3] = [Format::Raw, Format::Qcow2, Format::Vmdk];

    /// The format that is called `name`, if one is.
    pub fn named(name: &str) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.to_string() == name)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
        })
    }
}

/// What was found at the start of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Found {
    Known(Format),
    /// Recognised, and not read.
    Foreign {
        name: &'static str,
        advice: &'static str,
    },
}

impl Found {
    pub(super) fn name(self) -> &'static str {
        match self {
            Found::Known(Format::Raw) => "something else: it does not begin with that format's mark",
            Found::Known(Format::Qcow2) => "qcow2",
            Found::Known(Format::Vmdk) => "vmdk",
            Found::Foreign { name, .. } => name,
        }
    }
}

/// Other disk formats: where their mark is, the mark, their name.
const DISKS: [(usize, &[u8], &str); 8] = [
    (0, b"QFI\xfb\0\0\0\x01", "qcow of version 1"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor, whose data are in other files"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0, b"QED\0", "QED"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"WithoutFreeSpace", "a Parallels disk"),
];
const DISK_ADVICE: &str = "convert it first, with 'qemu-img convert -O qcow2'";

/// Compressed files and archives.
const PACKED: [(usize, &[u8], &str); 6] = [
    (0, b"\xfd7zXZ\0", "compressed with xz"),
    (0, b"\x1f\x8b\x08", "compressed with gzip"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (0, b"BZh", "compressed with bzip2"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (257, b"ustar", "a tar archive, as OVA files are"),
];
const PACKED_ADVICE: &str = "unpack it first";

const QCOW2: &[u8] = b"QFI\xfb";
const VMDK: &[u8] = b"KDMV";
/// The mark of a fixed VHD is in the last sector only; before it are the disk's bytes.
const VHD_FOOTER: &[u8] = b"conectix";
const HEAD_BYTES: usize = 512;

/// What the file of `file_bytes` bytes is. What has no mark is raw.
pub(super) fn probe(file: &File, file_bytes: u64) -> io::Result<Found> {
    let mut head = [0; HEAD_BYTES];
    file::read_at(file, Writable::from_mut_slice(&mut head), 0)?;
    let foreign = |of: &[(usize, &[u8], &'static str)], advice| {
        let found = of.iter().find(|(at, mark, _)| head[*at..].starts_with(mark));
        found.map(|(_, _, name)| Found::Foreign { name, advice })
    };
    if let Some(found) = foreign(&DISKS, DISK_ADVICE).or_else(|| foreign(&PACKED, PACKED_ADVICE)) {
        return Ok(found);
    }
    if head.starts_with(QCOW2) {
        return Ok(Found::Known(Format::Qcow2));
    }
    if head.starts_with(VMDK) {
        return Ok(Found::Known(Format::Vmdk));
    }
    if let Some(last) = file_bytes.checked_sub(HEAD_BYTES as u64) {
        file::read_at(file, Writable::from_mut_slice(&mut head), last)?;
        if head.starts_with(VHD_FOOTER) {
            return Ok(Found::Foreign { name: "VHD", advice: DISK_ADVICE });
        }
    }
    Ok(Found::Known(Format::Raw))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn found(bytes: &[u8]) -> Found {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        probe(&file, bytes.len() as u64).unwrap()
    }

    #[test]
    fn marks_are_told_apart() {
        assert_eq!(found(b""), Found::Known(Format::Raw));
        assert_eq!(found(&[0x55; 4096]), Found::Known(Format::Raw));
        assert_eq!(found(b"QFI\xfb\0\0\0\x03"), Found::Known(Format::Qcow2));
        assert_eq!(found(b"QFI\xfb\0\0\0\x02"), Found::Known(Format::Qcow2));
        assert_eq!(found(b"QFI\xfb\0\0\0\x01").name(), "qcow of version 1");
        assert_eq!(found(b"KDMV\x01"), Found::Known(Format::Vmdk));
        assert_eq!(found(b"COWD\x01").name(), "VMDK");
        assert_eq!(found(b"\xfd7zXZ\0\0").name(), "compressed with xz");
        let mut vhd = vec![7; 8192];
        vhd[8192 - 512..][..8].copy_from_slice(VHD_FOOTER);
        assert_eq!(found(&vhd).name(), "VHD");
        let mut vdi = vec![0; 512];
        vdi[0x40..0x44].copy_from_slice(b"\x7f\x10\xda\xbe");
        assert_eq!(found(&vdi).name(), "VDI");
    }
}
