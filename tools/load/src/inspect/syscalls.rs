//! How many system calls pando's worker makes for each batch of requests, and which.
//!
//! A batch is as many requests as a queue has in flight: what a driver may hand over at once. The kernel counts at its tracepoints, each call once,
//! and stops nobody for it as a tracer would.

use std::fs;

use anyhow::{Context, Result, bail};

use super::perf::{PERMISSION, Watch};
use super::{Inspection, lines};
use crate::arguments::InspectOptions;
use crate::drive::Tally;
use crate::suite::rows::Row;

/// Where everything is in memory and batches are large: what is hot.
const LINES: [&str; 1] = ["4k random read, base, depth 32"];
/// What is counted by its name, beside all calls together: what data, waiting and memory take. Not every name there is: the kernel waits some
/// milliseconds for each tracepoint and thread that is no longer watched.
const NAMES: [&str; 20] = [
    "read",
    "readv",
    "pread64",
    "preadv",
    "preadv2",
    "write",
    "writev",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "fdatasync",
    "fallocate",
    "epoll_wait",
    "epoll_pwait",
    "epoll_pwait2",
    "io_uring_enter",
    "futex",
    "mmap",
    "munmap",
    "madvise",
];
const ALL: &str = "raw_syscalls:sys_enter";
const PREFIX: &str = "syscalls:sys_enter_";

/// What was counted.
#[derive(Debug, PartialEq, Eq)]
struct Counts {
    all: u64,
    /// Those of [`NAMES`] that were made, from the most to the least.
    by_name: Vec<(String, u64)>,
}

impl Counts {
    fn others(&self) -> u64 {
        // A thread may be in the middle of a call when the counting begins or ends.
        self.all.saturating_sub(self.by_name.iter().map(|(_, count)| count).sum())
    }
}

pub fn run(options: &InspectOptions) -> Result<()> {
    let inspection = Inspection::new(options)?;
    for row in lines(&options.only, &LINES)? {
        let (counts, tally) = count(&inspection, row).with_context(|| row.name)?;
        print(row, &counts, &tally);
    }
    Ok(())
}

fn count(inspection: &Inspection, row: &Row) -> Result<(Counts, Tally)> {
    let (counted, said) = (inspection.file("perf.counts"), inspection.file("perf.log"));
    let output = counted.to_str().context("a path that is no text")?;
    let names = NAMES.iter().map(|name| format!("{PREFIX}{name}"));
    let events = std::iter::once(ALL.to_owned()).chain(names).collect::<Vec<_>>().join(",");
    let words = ["stat", "--field-separator", ",", "--event", &events, "--output", output];
    let tally = inspection.watch(row, |backend, work| {
        // The keeper, which was started first, has no part in requests.
        let processes = backend.processes();
        let [_keeper, worker] = processes.as_slice() else {
            bail!("{} processes; a keeper and its worker are expected", processes.len());
        };
        let watch = Watch::start(words, &[*worker], &said)?;
        let tally = work()?;
        watch.finish()?;
        Ok(tally)
    })?;
    let text = fs::read_to_string(&counted)?;
    let counts = parse(&text).with_context(|| format!("{PERMISSION}. It counted:\n{text}"))?;
    Ok((counts, tally))
}

/// Reads lines of `perf stat`: a count, its unit, the event, and more. `None` where it did not count all calls: it gives an event that it may
/// only partly see another name.
fn parse(text: &str) -> Option<Counts> {
    let mut all = None;
    let mut by_name = Vec::new();
    for line in text.lines() {
        let mut fields = line.split(',');
        // What was not counted has a remark in place of a number.
        let Some(count) = fields.next().and_then(|field| field.parse::<u64>().ok()) else { continue };
        let Some(event) = fields.nth(1) else { continue };
        match event.strip_prefix(PREFIX) {
            Some(name) if count > 0 => by_name.push((name.to_owned(), count)),
            None if event == ALL => all = Some(count),
            _ => {}
        }
    }
    by_name.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    all.map(|all| Counts { all, by_name })
}

fn print(row: &Row, counts: &Counts, tally: &Tally) {
    let depth = row.measured.depth;
    let batches = tally.requests as f64 / depth as f64;
    println!("{}: {} requests in {:.1} s", row.name, tally.requests, tally.elapsed.as_secs_f64());
    let calls = |count: u64| format!("{:>9.4}  {count:>9}", count as f64 / batches);
    println!("  for each {depth} requests   all");
    println!("  {}  all of the worker's system calls", calls(counts.all));
    for (name, count) in &counts.by_name {
        println!("  {}  {name}", calls(*count));
    }
    println!("  {}  others", calls(counts.others()));
    println!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read() {
        let text = "# started on Thu\n\n48,,raw_syscalls:sys_enter,1000,100.00,,\n2,,syscalls:sys_enter_read,1000,100.00,,\n\
                    0,,syscalls:sys_enter_open,1000,100.00,,\n<not counted>,,syscalls:sys_enter_close,0,100.00,,\n\
                    43,,syscalls:sys_enter_epoll_pwait,1000,100.00,,\n";
        let expected = [("epoll_pwait".to_owned(), 43), ("read".to_owned(), 2)];
        let counts = Counts { all: 48, by_name: expected.to_vec() };
        assert_eq!(counts.others(), 3);
        assert_eq!(parse(text), Some(counts));
        // Where it may not see the kernel's part.
        assert_eq!(parse(&text.replace("enter,", "enter:u,")), None);
        assert_eq!(parse(&text.replace("48,,", "<not counted>,,")), None);
    }
}
