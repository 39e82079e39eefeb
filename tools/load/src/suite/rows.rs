//! What is compared: one entry for each line of the tables.
//!
//! To add a line, add an entry. Every run has a backend process and a private file of its own.

use crate::drive::Wait;
use crate::workload::{Mix, Order, Workload};

const KIB: u32 = 1 << 10;
const MIB: u32 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The base that the lines below visit.
pub const BASE_BYTES: u64 = 2 * GIB;
/// How much of a base is read at most where none of it is in memory. More is none of the backend's time, where a hypervisor takes free pages back.
pub const COLD_BYTES: u64 = GIB / 2;

/// One line: what is done first, then what is measured.
pub struct Row {
    pub name: &'static str,
    /// Run in this order before the measurement, by the same driver on the same connection.
    pub before: &'static [Workload],
    pub measured: Workload,
    pub queues: usize,
    /// How the driver learns of completions, where that is the point of the line.
    pub wait: Option<Wait>,
    /// Over a base of which nothing is in memory when the backend starts.
    pub cold: bool,
    /// With a private file whose data goes past the page cache. The base stays in it.
    pub direct: bool,
}

impl Row {
    /// Whether it waits for the disk all the time, so that the machine's own limit is none of a loop's.
    pub fn waits(&self) -> bool {
        self.cold || self.direct
    }

    /// Whether it waits for the disk at all.
    pub fn is_on_disk(&self) -> bool {
        self.waits() || self.measured.mix == Mix::WriteFlush
    }

    /// Whether it takes a disk that can be written.
    pub fn writes(&self) -> bool {
        let mut all = self.before.iter().chain([&self.measured]);
        all.any(|workload| workload.mix != Mix::Read)
    }
}

pub const ROWS: &[Row] = &[
    Row { name: "4k random read, base, depth 32", ..READ },
    Row { name: "4k random read, base, depth 32, driver takes interrupts", wait: Some(Wait::Call), ..READ },
    Row {
        // Without the pass over the base that maps all of it: what a guest sees that just booted.
        name: "4k random read, base, depth 32, backend just started",
        before: &[],
        measured: Workload { requests_max: Some(100_000), ..READ.measured },
        ..READ
    },
    Row { name: "4k random read, base, depth 1", measured: Workload { depth: 1, ..READ.measured }, ..READ },
    Row { name: "4k random read, base, 4 queues, depth 32 each", queues: 4, ..READ },
    Row {
        name: "4k random read, half delta half base, depth 32",
        before: &[Workload { order: Order::Alternate, mix: Mix::Write, block_bytes: 64 * KIB, ..HALF_PASS }, HALF_PASS],
        measured: Workload { range_bytes: HALF_PASS.range_bytes, ..READ.measured },
        ..READ
    },
    Row {
        name: "64k sequential read, base, depth 8",
        measured: Workload { order: Order::Sequential, block_bytes: 64 * KIB, depth: 8, ..READ.measured },
        ..READ
    },
    Row {
        name: "1m sequential read, base, depth 4",
        measured: Workload { order: Order::Sequential, block_bytes: MIB, depth: 4, ..READ.measured },
        ..READ
    },
    Row {
        name: "4k first-touch write, random, depth 32",
        before: &[],
        measured: Workload { order: Order::Once, mix: Mix::Write, requests_max: Some(65_536), ..READ.measured },
        ..READ
    },
    Row {
        name: "4k overwrite, random, depth 32",
        before: &[OVERWRITE_FILL],
        measured: Workload { mix: Mix::Write, range_bytes: OVERWRITE_FILL.range_bytes, ..READ.measured },
        ..READ
    },
    Row {
        name: "4k overwrite, sequential, depth 32",
        before: &[OVERWRITE_FILL],
        measured: Workload {
            order: Order::Sequential,
            mix: Mix::Write,
            range_bytes: OVERWRITE_FILL.range_bytes,
            ..READ.measured
        },
        ..READ
    },
    Row {
        // The kernel keeps what was written in one piece in large folios, and a file system that
        // tracks their blocks one by one makes each later small write to them pay for all.
        name: "4k overwrite of what was written 1m at a time, depth 32",
        before: &[LARGE_FILL],
        measured: Workload { mix: Mix::Write, range_bytes: OVERWRITE_FILL.range_bytes, ..READ.measured },
        ..READ
    },
    Row {
        name: "4k 70/30 read/write, empty delta, depth 32",
        measured: Workload { mix: Mix::ReadWrite, requests_max: Some(200_000), ..READ.measured },
        ..READ
    },
    Row {
        name: "4k write and flush, first touch, depth 1",
        before: &[],
        measured: Workload { order: Order::Once, mix: Mix::WriteFlush, depth: 1, ..READ.measured },
        ..READ
    },
    Row {
        name: "4k overwrite and flush, depth 1",
        before: &[SMALL_FILL, FLUSH],
        measured: Workload { mix: Mix::WriteFlush, depth: 1, range_bytes: SMALL_FILL.range_bytes, ..READ.measured },
        ..READ
    },
    Row {
        name: "4k overwrite and flush, 4 queues, depth 1 each",
        before: &[SMALL_FILL, FLUSH],
        measured: Workload { mix: Mix::WriteFlush, depth: 1, range_bytes: SMALL_FILL.range_bytes, ..READ.measured },
        queues: 4,
        ..READ
    },
    Row {
        // So few that hardly any has been read before.
        name: "4k random read, base, nothing in memory, depth 32",
        before: &[],
        measured: Workload { requests_max: Some(COLD_BYTES / (16 << 10)), ..READ.measured },
        cold: true,
        ..READ
    },
    Row {
        name: "64k sequential read, base, nothing in memory, depth 8",
        before: &[],
        measured: Workload {
            order: Order::Sequential,
            block_bytes: 64 * KIB,
            depth: 8,
            requests_max: Some(COLD_BYTES / (64 << 10)),
            ..READ.measured
        },
        cold: true,
        ..READ
    },
    Row {
        // Its latency is that of the nine: what a guest notices of another one's read that waits for the disk.
        name: "4k random read, base, every tenth not in memory, depth 32",
        before: &[Workload { range_bytes: BASE_BYTES / 8, ..PASS }],
        measured: Workload { order: Order::MostlyFront, ..READ.measured },
        cold: true,
        ..READ
    },
    Row {
        name: "4k random read, delta past the page cache, depth 32",
        before: &[LARGE_FILL],
        measured: Workload { range_bytes: LARGE_FILL.range_bytes, ..READ.measured },
        direct: true,
        ..READ
    },
    Row {
        name: "4k first-touch write, random, past the page cache, depth 32",
        before: &[],
        measured: Workload { order: Order::Once, mix: Mix::Write, ..READ.measured },
        direct: true,
        ..READ
    },
    Row {
        name: "4k overwrite, random, past the page cache, depth 32",
        before: &[LARGE_FILL],
        measured: Workload { mix: Mix::Write, range_bytes: LARGE_FILL.range_bytes, ..READ.measured },
        direct: true,
        ..READ
    },
    Row {
        name: "64k overwrite, sequential, past the page cache, depth 8",
        before: &[LARGE_FILL],
        measured: Workload {
            order: Order::Sequential,
            mix: Mix::Write,
            block_bytes: 64 * KIB,
            depth: 8,
            range_bytes: LARGE_FILL.range_bytes,
            ..READ.measured
        },
        direct: true,
        ..READ
    },
];

/// What the lines vary: random 4 KiB reads of a base that has been read once.
const READ: Row = Row {
    name: "",
    before: &[PASS],
    measured: Workload {
        order: Order::Random,
        mix: Mix::Read,
        block_bytes: 4 * KIB,
        depth: 32,
        range_bytes: BASE_BYTES,
        requests_max: None,
    },
    queues: 1,
    wait: None,
    cold: false,
    direct: false,
};

/// Reads all of the base once, in order.
const PASS: Workload = Workload {
    order: Order::Pass,
    mix: Mix::Read,
    block_bytes: MIB,
    depth: 4,
    range_bytes: BASE_BYTES,
    requests_max: None,
};
const HALF_PASS: Workload = Workload { range_bytes: GIB, ..PASS };
const OVERWRITE_FILL: Workload =
    Workload { mix: Mix::Write, block_bytes: 4 * KIB, depth: 32, range_bytes: GIB / 2, ..PASS };
/// The same in large pieces.
const LARGE_FILL: Workload = Workload { block_bytes: MIB, depth: 4, ..OVERWRITE_FILL };
/// For what is flushed, so that the run does not wait for the disk.
const SMALL_FILL: Workload = Workload { range_bytes: GIB / 16, ..OVERWRITE_FILL };
const FLUSH: Workload = Workload { mix: Mix::Flush, requests_max: Some(1), depth: 1, ..PASS };
