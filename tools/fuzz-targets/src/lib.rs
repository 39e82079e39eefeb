//! What the fuzz targets share: [`Choices`], which turns a fuzzer's bytes into mostly sensible decisions, files without a name, and a
//! count of descriptors.
//!
//! Bytes of zero, which is also what follows the end of the input, always mean the usual and valid thing, so that
//! breakage is rare and deliberate and the fuzzer gets past the first check.

pub mod session;

use std::fs::File;
use std::path::Path;

use arbitrary::{Arbitrary, Unstructured};

/// Decisions, taken from the fuzzer's bytes until they run out.
pub struct Choices<'a> {
    bytes: Unstructured<'a>,
}

impl<'a> Choices<'a> {
    pub fn new(bytes: &'a [u8]) -> Choices<'a> {
        Choices { bytes: Unstructured::new(bytes) }
    }

    /// Whether the input has run out.
    pub fn is_over(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Any value.
    pub fn any<T: for<'b> Arbitrary<'b> + Default>(&mut self) -> T {
        self.bytes.arbitrary().unwrap_or_default()
    }

    /// A number below `end`, which is at least one; at the end of the input zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.bytes.int_in_range(0..=end - 1).unwrap_or(0)
    }

    /// A number up to `last`.
    pub fn up_to(&mut self, last: u64) -> u64 {
        self.below(last + 1)
    }

    /// Yes, one time in sixteen.
    pub fn sometimes(&mut self) -> bool {
        self.any::<u8>() >= 240
    }

    /// Yes, one time in 128: for what breaks things.
    pub fn rarely(&mut self) -> bool {
        self.any::<u8>() >= 254
    }

    /// One of some values, the first of them at the end of the input.
    pub fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }

    /// Fills `to`, with zeros at the end of the input.
    pub fn fill(&mut self, to: &mut [u8]) {
        // Never an error, and zeros past the end: that is what the crate promises.
        let _ = self.bytes.fill_buffer(to);
    }

    /// Where to cut `len` bytes into up to `parts_max` parts, some of them empty: the lengths of the parts.
    pub fn cut(&mut self, len: usize, parts_max: u64) -> Vec<usize> {
        let mut cuts: Vec<usize> = (0..self.below(parts_max)).map(|_| self.up_to(len as u64) as usize).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        cuts.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }
}

/// How many descriptors this process has open.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("the kernel tells").count()
}

/// How many threads this process has.
pub fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").expect("the kernel tells").flatten();
    // The kernel keeps those for a while that it reads by where a file system cannot do otherwise.
    let is_kernels = |name: std::io::Result<String>| name.is_ok_and(|name| name.starts_with("iou-"));
    tasks.filter(|task| !is_kernels(std::fs::read_to_string(task.path().join("comm")))).count()
}

/// A file without a name, in memory where that is possible.
pub fn unnamed_file() -> File {
    let memory = Path::new("/dev/shm");
    pando::sys::file::open_unnamed(memory)
        .or_else(|_| pando::sys::file::open_unnamed(&std::env::temp_dir()))
        .expect("a place for files without a name")
}
