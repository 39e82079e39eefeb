//! A run's record as plain text: one small table for each line.

use std::fmt::Write;

use crate::process::Weight;
use crate::suite::record::{Record, RowRecord, Sample, StandingRecord, StandingSample, median, ratio};

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
        "medians of {}; the driver learns of completions by {}",
        settings.rounds(),
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

const STANDING: &[Figure] = &[
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

/// A figure of what a backend keeps: its name, its unit, and where it is found.
type Kept = (&'static str, &'static str, fn(&Weight) -> f64);

const KEPT: [Kept; 2] =
    [("page tables", "KiB", |it| it.page_tables_kib as f64), ("mapped files", "MiB", |it| it.file_kib as f64 / 1024.0)];

/// Every figure of standing backends: its name, and a value for each of them.
pub fn standing_lines(records: &[StandingRecord]) -> Vec<(String, Vec<f64>)> {
    let values = |figure: &dyn Fn(&StandingRecord) -> Option<f64>| {
        records.iter().map(|record| figure(record).unwrap_or(f64::NAN)).collect()
    };
    let samples = STANDING.iter();
    let mut lines: Vec<_> =
        samples.map(|(name, figure)| ((*name).to_owned(), values(&|record| median(&record.samples, figure)))).collect();
    if let Some(residue) = records.iter().find_map(|record| record.residue) {
        let (gib, seconds) = (residue.image_bytes >> 30, residue.rest_seconds);
        for (name, unit, figure) in KEPT {
            let then = values(&|record| record.residue.map(|it| figure(&it.then)));
            let rested = values(&|record| record.residue.map(|it| figure(&it.rested)));
            lines.push((format!("{name} after reading {gib} GiB, {unit}"), then));
            lines.push((format!("the same after {seconds} s of rest"), rested));
        }
    }
    lines
}

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
    for (name, values) in standing_lines(&record.standing) {
        write!(out, "  {name:<40}")?;
        for value in values {
            write!(out, " {value:>13.*}", digits(value))?;
        }
        writeln!(out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::record::Residue;

    #[test]
    fn what_is_kept_has_lines_where_it_was_measured() {
        let kept = |kib| Weight { page_tables_kib: kib, file_kib: 2048, ..Weight::default() };
        let residue = Residue { image_bytes: 10 << 30, then: kept(20), rested: kept(4), rest_seconds: 30.0 };
        let record = |residue| StandingRecord { name: String::new(), samples: Vec::new(), residue };
        assert_eq!(standing_lines(&[record(None)]).len(), STANDING.len());
        let lines = standing_lines(&[record(Some(residue)), record(None)]);
        let (name, values) = &lines[STANDING.len()];
        assert_eq!((name.as_str(), values[0]), ("page tables after reading 10 GiB, KiB", 20.0));
        assert!(values[1].is_nan());
        let (name, values) = &lines[STANDING.len() + 1];
        assert_eq!((name.as_str(), values[0]), ("the same after 30 s of rest", 4.0));
        assert_eq!(lines[STANDING.len() + 2].1[0], 2.0);
    }
}
