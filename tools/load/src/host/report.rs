//! What was found, as Markdown tables for a page.

use std::fmt::Write;

use crate::arguments::HostOptions;
use crate::host::{Figures, SPARSE_BYTES};
use crate::process::Weight;
use crate::suite::record::{Machine, median};

pub fn report(machine: &Machine, options: &HostOptions, figures: &Figures) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut out, machine, options, figures);
    out
}

fn write(out: &mut String, machine: &Machine, options: &HostOptions, figures: &Figures) -> std::fmt::Result {
    writeln!(out, "{}, {} CPUs, Linux {}, {}\n", machine.cpu, machine.cpus, machine.kernel, machine.date)?;

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

    let many = &figures.many;
    writeln!(out, "\n| {} volumes attached at once | |", many.count)?;
    writeln!(out, "|---|---:|")?;
    line(out, "attaching all of them, one after the other, s", many.attach_seconds)?;
    let middle = |weights: &[Weight], figure: fn(&Weight) -> u64| {
        median(weights, |weight| figure(weight) as f64).unwrap_or(f64::NAN)
    };
    line(out, "private memory of each, waiting (keeper and worker), KiB", middle(&many.waiting, |it| it.private_kib))?;
    line(out, "private memory of each, its queue running, KiB", middle(&many.attached, |it| it.private_kib))?;
    line(out, "page tables of each, its queue running, KiB", middle(&many.attached, |it| it.page_tables_kib))?;
    line(out, "threads of each", middle(&many.attached, |it| it.threads))?;
    line(out, "private memory of the daemon, KiB", many.daemon.private_kib as f64)?;
    line(out, "resident memory of the daemon, KiB", many.daemon.resident_kib as f64)?;
    line(out, "descriptors of the daemon", many.daemon.descriptors as f64)?;
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
