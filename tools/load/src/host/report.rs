//! What was found, as Markdown tables for a page.

use std::fmt::Write;

use crate::arguments::HostOptions;
use crate::host::many::{Call, Many, Pair};
use crate::host::{Crowd, Figures, SPARSE_BYTES};
use crate::process::Weight;
use crate::suite::record::{Machine, median};

/// So many at the beginning and at the end tell whether more of them make one slower.
const EDGE: usize = 100;

/// A figure of one process.
type Figure = fn(&Weight) -> u64;

pub fn report(machine: &Machine, options: &HostOptions, figures: &Figures) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut out, machine, options, figures);
    out
}

fn write(out: &mut String, machine: &Machine, options: &HostOptions, figures: &Figures) -> std::fmt::Result {
    write_machine(out, machine)?;
    let mib = options.image >> 20;
    let imports = &figures.imports;
    let rounds = options.rounds;
    writeln!(
        out,
        "| {mib} MiB of random bytes from the page cache; {rounds} rounds in turn | median | least | most |"
    )?;
    writeln!(out, "|---|---:|---:|---:|")?;
    row(out, "`pando image import`: durable, and known by its digest, s", &imports.pando)?;
    row(out, "`cp`: in the page cache, s", &imports.copy)?;
    row(out, "`cp` and `sync` of the copy: durable, s", &imports.durable_copy)?;

    let gib = SPARSE_BYTES >> 30;
    writeln!(out, "\n| a `cow` volume over a sparse image of {gib} GiB | median | least | most |")?;
    writeln!(out, "|---|---:|---:|---:|")?;
    row(out, "attach: from the API call to a connection to its socket, ms", &figures.attach_ms)?;
    row(out, "the same by `pando attach`, from its start to its end, ms", &figures.attach_by_command_ms)?;
    row(out, "import of that image, ms", &[figures.sparse_import_ms])?;

    write_many(out, &figures.many)
}

/// What was found with many volumes.
pub fn crowd(machine: &Machine, figures: &Crowd) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_crowd(&mut out, machine, figures);
    out
}

fn write_crowd(out: &mut String, machine: &Machine, figures: &Crowd) -> std::fmt::Result {
    write_machine(out, machine)?;
    writeln!(out, "| attach: from the API call to a connection to its socket, ms | median | least | most |")?;
    writeln!(out, "|---|---:|---:|---:|")?;
    for size in &figures.sizes {
        let (image, disk) = (size.image_bytes >> 30, size.disk_bytes >> 30);
        row(out, &format!("a disk of {disk} GiB over an image of {image} GiB"), &size.attach_ms)?;
    }
    write_many(out, &figures.many)
}

fn write_machine(out: &mut String, machine: &Machine) -> std::fmt::Result {
    writeln!(out, "{}, {} CPUs, Linux {}, {}\n", machine.cpu, machine.cpus, machine.kernel, machine.date)
}

fn write_many(out: &mut String, many: &Many) -> std::fmt::Result {
    let count = many.attaches.len();
    // As many at either end, and none in both.
    let edge = EDGE.min(count / 2).max(1);
    writeln!(out, "\n| {count} volumes, one after the other | median | least | most |")?;
    writeln!(out, "|---|---:|---:|---:|")?;
    for (what, calls) in [("making", &many.creations), ("attaching", &many.attaches)] {
        for (end, calls) in [("first", &calls[..edge]), ("last", &calls[count - edge..])] {
            let of = |figure: fn(&Call) -> f64| calls.iter().map(figure).collect::<Vec<_>>();
            row(out, &format!("{what} each of the {end} {edge}, ms"), &of(|call| call.ms))?;
            row(out, "of that, CPU time of the daemon, ms", &of(|call| call.daemon_cpu_ms))?;
        }
    }

    writeln!(out, "\n| {count} volumes attached at once | each: keeper | worker | both |")?;
    writeln!(out, "|---|---:|---:|---:|")?;
    let lines: [(&str, &[Pair], Figure); 6] = [
        ("private memory, waiting, KiB", &many.waiting, |it| it.private_kib),
        ("private memory, its queue running, KiB", &many.attached, |it| it.private_kib),
        ("page tables, its queue running, KiB", &many.attached, |it| it.page_tables_kib),
        ("processes", &many.attached, |it| it.processes),
        ("threads", &many.attached, |it| it.threads),
        ("descriptors", &many.attached, |it| it.descriptors),
    ];
    for (name, pairs, figure) in lines {
        let middle = |figure: &dyn Fn(&Pair) -> u64| median(pairs, |pair| figure(pair) as f64).unwrap_or(f64::NAN);
        let keeper = middle(&|pair| figure(&pair.keeper));
        let worker = middle(&|pair| figure(&pair.worker));
        writeln!(out, "| {name} | {keeper:.0} | {worker:.0} | {:.0} |", middle(&|pair| pair.sum(figure)))?;
    }

    writeln!(out, "\n| all {count} together | |")?;
    writeln!(out, "|---|---:|")?;
    line(out, "attaching all of them, s", many.attaches.iter().map(|call| call.ms).sum::<f64>() / 1e3)?;
    line(out, "detaching and removing all of them, s", many.detach_seconds)?;
    line(out, "private memory of the daemon, KiB", many.daemon.private_kib as f64)?;
    line(out, "resident memory of the daemon, KiB", many.daemon.resident_kib as f64)?;
    line(out, "descriptors of the daemon", many.daemon.descriptors as f64)?;
    line(out, "threads of the daemon", many.daemon.threads as f64)?;
    let seconds = many.idle_seconds;
    line(out, &format!("CPU time of the daemon in {seconds:.0} s of rest, ms"), many.daemon_rest.cpu_ns as f64 / 1e6)?;
    line(out, "its context switches in that time", many.daemon_rest.switches as f64)?;
    line(out, "CPU time of all backends in that time, ms", many.backends_rest.cpu_ns as f64 / 1e6)?;
    line(out, "their context switches in that time", many.backends_rest.switches as f64)
}

fn row(out: &mut String, name: &str, samples: &[f64]) -> std::fmt::Result {
    let middle = median(samples, |it| *it).unwrap_or(f64::NAN);
    let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let most = samples.iter().copied().fold(0.0, f64::max);
    writeln!(out, "| {name} | {middle:.2} | {least:.2} | {most:.2} |")
}

fn line(out: &mut String, name: &str, value: f64) -> std::fmt::Result {
    writeln!(out, "| {name} | {value:.*} |", crate::suite::text::digits(value))
}
