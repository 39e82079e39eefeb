//! Sectors, clusters and byte counts: the units of a disk and their checked conversions.
//!
//! A leaf: knows nothing of files, guests or formats. Every conversion that can lose something says so in its name or
//! returns `None`.

use std::fmt;

/// Bytes in a sector, virtio's unit for every offset and length on the wire.
pub const SECTOR_BYTES: u64 = 512;

/// Bytes of `sectors`, or `None` when that does not fit in 64 bits.
pub const fn sectors_to_bytes(sectors: u64) -> Option<u64> {
    sectors.checked_mul(SECTOR_BYTES)
}

/// Whether `bytes` is a whole number of sectors.
pub const fn is_whole_sectors(bytes: u64) -> bool {
    bytes.is_multiple_of(SECTOR_BYTES)
}

/// The size of a copy-on-write cluster: a power of two from 4 KiB to 64 KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClusterSize {
    shift: u32,
}

impl ClusterSize {
    /// The default, and the page size of the machines that Pando runs on.
    pub const DEFAULT: ClusterSize = ClusterSize { shift: 12 };
    /// The smallest cluster, in bytes.
    pub const BYTES_MIN: u64 = 4 << 10;
    /// The largest cluster, in bytes.
    pub const BYTES_MAX: u64 = 64 << 10;

    /// The cluster size of `bytes` bytes, or `None` when `bytes` is not one that exists.
    pub const fn from_bytes(bytes: u64) -> Option<ClusterSize> {
        if bytes.is_power_of_two() && bytes >= Self::BYTES_MIN && bytes <= Self::BYTES_MAX {
            Some(ClusterSize { shift: bytes.trailing_zeros() })
        } else {
            None
        }
    }

    /// Bytes in one cluster.
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// The cluster that the byte at `offset` lies in.
    pub const fn containing(self, offset: u64) -> u64 {
        offset >> self.shift
    }

    /// The byte offset at which `cluster` starts. `cluster` comes from [`ClusterSize::containing`] or
    /// [`ClusterSize::count_for`], so that the result fits.
    pub const fn start_of(self, cluster: u64) -> u64 {
        cluster << self.shift
    }

    /// Bytes between the start of the cluster of `offset` and `offset`.
    pub const fn offset_within(self, offset: u64) -> u64 {
        offset & (self.bytes() - 1)
    }

    /// How many clusters hold `bytes` bytes, the last one perhaps in part.
    pub const fn count_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }
}

/// A number of bytes, shown as a person writes it: `20 GiB`, `1.5 MiB`, `512 B`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteCount(pub u64);

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let mut unit = 0;
        while unit + 1 < NAMES.len() && self.0 >> (10 * (unit + 1)) != 0 {
            unit += 1;
        }
        let whole = 1u64 << (10 * unit);
        if self.0.is_multiple_of(whole) {
            write!(f, "{} {}", self.0 / whole, NAMES[unit])
        } else {
            write!(f, "{:.1} {}", self.0 as f64 / whole as f64, NAMES[unit])
        }
    }
}

impl fmt::Debug for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a size that somebody typed is not one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{typed}' is not a size: expected a number of bytes, or one with K, M, G or T behind it, such as 20G")]
pub struct SizeError {
    typed: String,
}

impl std::str::FromStr for ByteCount {
    type Err = SizeError;

    /// Reads `20G`, `512M`, `4096`, `1TiB`; K, M, G, T are powers of 1024, as `qemu-img` and `truncate` read them.
    fn from_str(typed: &str) -> Result<ByteCount, SizeError> {
        let error = || SizeError { typed: typed.to_owned() };
        let digits = typed.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = typed[..digits].parse().map_err(|_| error())?;
        let shift = match typed[digits..].to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(error()),
        };
        number.checked_mul(1 << shift).map(ByteCount).ok_or_else(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for (typed, bytes) in [("0", 0), ("4096", 4096), ("20G", 20 << 30), ("1TiB", 1 << 40), ("512m", 512 << 20)] {
            assert_eq!(typed.parse(), Ok(ByteCount(bytes)), "{typed}");
        }
        for typed in ["", "G", "-1", "1.5G", "20X", "99999999999999999999", "18446744073709551615K"] {
            assert!(typed.parse::<ByteCount>().is_err(), "{typed}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit() {
        for (bytes, shown) in
            [(0, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (20 << 30, "20 GiB"), (u64::MAX, "16.0 EiB")]
        {
            assert_eq!(ByteCount(bytes).to_string(), shown);
        }
    }

    #[test]
    fn cluster_sizes_are_powers_of_two_in_range() {
        assert_eq!(ClusterSize::from_bytes(4096), Some(ClusterSize::DEFAULT));
        for bytes in [0, 512, 2048, 4097, 128 << 10] {
            assert_eq!(ClusterSize::from_bytes(bytes), None, "{bytes}");
        }
    }
}
