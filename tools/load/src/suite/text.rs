//! A run's record as plain text: one small table for each line.

use std::fmt::Write;

use crate::suite::record::{Record, RowRecord, Sample, StandingSample, median, ratio};

/// Everything, for a terminal.
pub fn report(record: &Record) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut out, record);
    out
}

fn write(out: &mut String, record: &Record) -> std::fmt::Result {
    let (machine, settings) = (&record.machine, &record.settings);
    writeln!(
        out,
        "{}, {}, {} CPUs, {} MiB, Linux {}",
        machine.date, machine.cpu, machine.cpus, machine.memory_mib, machine.kernel
    )?;
    writeln!(
        out,
        "medians of {} rounds of {} s; the driver learns of completions by {}",
        settings.rounds,
        settings.seconds,
        if settings.wait == "poll" { "polling" } else { "interrupts" }
    )?;
    for identity in &record.contestants {
        writeln!(out, "  {:<14} {}; {}", identity.name, identity.about, identity.version)?;
    }
    for row in &record.rows {
        write_row(out, record, row)?;
    }
    if !record.standing.is_empty() {
        write_standing(out, record)?;
    }
    Ok(())
}

fn write_row(out: &mut String, record: &Record, row: &RowRecord) -> std::fmt::Result {
    writeln!(out, "\n{}", row.name)?;
    let first = record.contestants.first().map_or("", |identity| identity.name.as_str());
    writeln!(
        out,
        "  {:<14} {:>9} {:>8} {:>9} {:>9} {:>8} {:>8} {:>20}",
        "",
        "IOPS",
        "MiB/s",
        "p50 µs",
        "p99 µs",
        "CPU µs",
        "x limit",
        format!("IOPS, CPU : {first}")
    )?;
    let middle = |samples: &[Sample], figure: fn(&Sample) -> f64| median(samples, figure).unwrap_or(f64::NAN);
    for (name, samples) in [("limit", &row.limit), ("bare pread", &row.bare_pread)] {
        if !samples.is_empty() {
            writeln!(
                out,
                "  {name:<14} {:>9.0} {:>8.0} {:>9} {:>9} {:>8.2}",
                middle(samples, |it| it.iops),
                middle(samples, |it| it.mib_per_s),
                "",
                "",
                middle(samples, |it| it.cpu_us)
            )?;
        }
    }
    for (index, (identity, samples)) in record.contestants.iter().zip(&row.samples).enumerate() {
        if samples.is_empty() {
            continue;
        }
        write!(
            out,
            "  {:<14} {:>9.0} {:>8.0} {:>9.1} {:>9.1} {:>8.2}",
            identity.name,
            middle(samples, |it| it.iops),
            middle(samples, |it| it.mib_per_s),
            middle(samples, |it| it.p50_us),
            middle(samples, |it| it.p99_us),
            middle(samples, |it| it.cpu_us)
        )?;
        match ratio(samples, &row.limit, |it| it.cpu_us) {
            Some(limits) => write!(out, " {limits:>8.2}")?,
            None => write!(out, " {:>8}", "")?,
        }
        let ours = row.samples.first().filter(|_| index > 0);
        let iops = ours.and_then(|ours| ratio(samples, ours, |it| it.iops));
        let cpu = ours.and_then(|ours| ratio(samples, ours, |it| it.cpu_us));
        if let Some((iops, cpu)) = iops.zip(cpu) {
            write!(out, " {:>20}", format!("{iops:.2}, {cpu:.2}"))?;
        }
        writeln!(out)?;
    }
    Ok(())
}

/// A figure of a standing backend: its name, and where it is found.
type Figure = (&'static str, fn(&StandingSample) -> f64);

pub const STANDING: &[Figure] = &[
    ("start to listening, ms", |it| it.listening_ms),
    ("start to configuration, ms", |it| it.greeted_ms),
    ("private memory, waiting, KiB", |it| it.alone.private_kib as f64),
    ("private memory, attached and idle, KiB", |it| it.attached.private_kib as f64),
    ("page tables, attached and idle, KiB", |it| it.attached.page_tables_kib as f64),
    ("processes", |it| it.attached.processes as f64),
    ("threads", |it| it.attached.threads as f64),
    ("descriptors", |it| it.attached.descriptors as f64),
    ("idle CPU, µs each second", |it| it.idle_cpu_us_per_s),
    ("idle context switches each second", |it| it.idle_switches_per_s),
];

/// Digits after the point that a figure of this size deserves.
pub fn digits(value: f64) -> usize {
    match value {
        ..100.0 if value.fract() != 0.0 => 2,
        _ => 0,
    }
}

fn write_standing(out: &mut String, record: &Record) -> std::fmt::Result {
    writeln!(out, "\n{} (8 at once; 10 GiB base, 1 TiB disk)", super::standing::NAME)?;
    write!(out, "  {:<40}", "")?;
    for standing in &record.standing {
        write!(out, " {:>13}", standing.name)?;
    }
    writeln!(out)?;
    for (name, figure) in STANDING {
        write!(out, "  {name:<40}")?;
        for standing in &record.standing {
            let value = median(&standing.samples, figure).unwrap_or(f64::NAN);
            write!(out, " {value:>13.*}", digits(value))?;
        }
        writeln!(out)?;
    }
    Ok(())
}
