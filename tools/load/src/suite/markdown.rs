//! A run's record as Markdown: tables with a line for each workload and a column for each contestant.

use std::fmt::Write;

use crate::suite::record::{Record, RowRecord, Sample, median, ratio};
use crate::suite::text::{digits, standing_lines};

/// Everything, for a page.
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
        "{}, {} CPUs, Linux {}; medians of {}, all in one run. In \
         brackets: the first backend's ratio to the limit, the others' to the first.\n",
        machine.cpu,
        machine.cpus,
        machine.kernel,
        settings.rounds()
    )?;
    for identity in &record.contestants {
        writeln!(out, "- `{}`: {} ({})", identity.name, identity.about, identity.version)?;
    }
    let limit = |row: &RowRecord| median(&row.limit, |it| it.cpu_us);
    table(out, record, "Backend CPU, µs per request", Some(limit), |it| it.cpu_us)?;
    let limit = |row: &RowRecord| median(&row.limit, |it| it.iops);
    table(out, record, "Requests per second", Some(limit), |it| it.iops)?;
    table(out, record, "Latency, median, µs", None, |it| it.p50_us)?;
    table(out, record, "Latency, 99th percentile, µs", None, |it| it.p99_us)?;
    if record.standing.is_empty() {
        return Ok(());
    }
    let names = record.standing.iter().map(|standing| standing.name.as_str());
    head(out, "Start-up and rest", names)?;
    for (name, values) in standing_lines(&record.standing) {
        write!(out, "| {name} |")?;
        for value in values {
            write!(out, " {value:.*} |", digits(value))?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn head<'a>(out: &mut String, title: &str, columns: impl Iterator<Item = &'a str>) -> std::fmt::Result {
    let columns: Vec<_> = columns.collect();
    writeln!(out, "\n| {title} | {} |", columns.join(" | "))?;
    writeln!(out, "|---|{}", "---:|".repeat(columns.len()))
}

fn table(
    out: &mut String,
    record: &Record,
    title: &str,
    limit: Option<fn(&RowRecord) -> Option<f64>>,
    figure: fn(&Sample) -> f64,
) -> std::fmt::Result {
    let names = record.contestants.iter().map(|identity| identity.name.as_str());
    head(out, title, limit.map(|_| "limit").into_iter().chain(names))?;
    for row in &record.rows {
        write!(out, "| {} |", row.name)?;
        if let Some(limit) = limit {
            match limit(row) {
                Some(value) => write!(out, " {value:.*} |", digits(value))?,
                None => write!(out, " |")?,
            }
        }
        for (index, samples) in row.samples.iter().enumerate() {
            let Some(value) = median(samples, figure) else {
                write!(out, " |")?;
                continue;
            };
            write!(out, " {value:.*}", digits(value))?;
            let ours = row.samples.first().filter(|_| index > 0);
            let compared = if index == 0 { limit.map(|_| &row.limit) } else { ours };
            if let Some(ratio) = compared.and_then(|it| ratio(samples, it, figure)) {
                write!(out, " ({ratio:.2})")?;
            }
            write!(out, " |")?;
        }
        writeln!(out)?;
    }
    Ok(())
}
