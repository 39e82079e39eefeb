//! What a run did, as a table for people.

use std::fmt::Write;
use std::time::Duration;

use crate::drive::Tally;
use crate::soak::disturbance::ALL;
use crate::soak::journal::Journal;

/// What there is to tell at the end of a run in which nothing was lost.
pub struct Summary {
    pub seed: u64,
    pub disks: usize,
    pub time: Duration,
    /// Of all guests.
    pub tally: Tally,
    pub read_back_bytes: u64,
    pub events: i64,
    /// How many of them told that requests wait for room.
    pub waits: u64,
}

pub fn report(summary: &Summary, journal: &Journal) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut out, summary, journal);
    out
}

fn write(out: &mut String, summary: &Summary, journal: &Journal) -> std::fmt::Result {
    // Stalls: the longest without a completion, with that as the only cause that there was, and with others besides.
    writeln!(out, "{:<32} {:>6} {:>7} {:>14} {:>14}", "disturbance", "done", "missed", "longest stall", "with others")?;
    for (kind, disturbance) in ALL.iter().enumerate() {
        let row = journal.row(kind);
        let (alone, longest) = (seconds(row.longest_alone), seconds(row.longest));
        writeln!(out, "{:<32} {:>6} {:>7} {alone:>14} {longest:>14}", disturbance.name(), row.done, row.missed)?;
    }
    writeln!(out, "{:<32} {:>6} {:>7} {:>14}", "none of these", "", "", seconds(journal.longest_otherwise()))?;

    let Summary { seed, disks, time, tally, read_back_bytes, events, waits } = summary;
    let quantile = |q| tally.latency.quantile_ns(q) as f64 / 1e3;
    writeln!(
        out,
        "\n{disks} disks, {:.0} s: {} requests, {} MiB; p50 {:.0} µs, p99 {:.0} µs",
        time.as_secs_f64(),
        tally.requests,
        tally.bytes >> 20,
        quantile(0.5),
        quantile(0.99)
    )?;
    writeln!(
        out,
        "{} MiB read back after a fresh attach; {events} events of the daemon's read, {waits} of requests that wait for room",
        read_back_bytes >> 20
    )?;
    writeln!(out, "seed {seed}: nothing was lost")
}

fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}
