//! One drawing of a run: processor time for each request, a line for each kind of work and a mark for each contestant.
//!
//! Dots on a logarithmic axis and no bars: figures of the same drawing differ by a factor of several hundred, what matters is their ratio,
//! and a bar on such an axis has a length that means nothing. Owns what is drawn; [`figure`] draws it, [`axis`] says where a value lies.

mod axis;
mod figure;

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::arguments::PlotOptions;
use crate::suite::contestants::CONTESTANTS;
use crate::suite::record::{Record, RowRecord, Sample, median};

use figure::Mark;

/// The machine's own limit, and then everyone in the suite's order.
const SERIES: [Series; 6] = [
    Series { name: "limit", label: "limit: a bare loop", mark: Mark::Bar, colour: "#57606a" },
    Series { name: "pando", label: "pando", mark: Mark::Dot, colour: "#0a58ca" },
    Series { name: "qsd-raw", label: "qsd raw", mark: Mark::Square, colour: "#b35900" },
    Series { name: "qsd-qcow2", label: "qsd qcow2", mark: Mark::Triangle, colour: "#c0392b" },
    Series { name: "qsd-qcow2-ext", label: "qsd qcow2 extended_l2", mark: Mark::Diamond, colour: "#8e44ad" },
    Series { name: "reference", label: "reference", mark: Mark::Cross, colour: "#1a7f37" },
];
/// Places in [`SERIES`].
const LIMIT: usize = 0;
const OURS: usize = 1;

/// What is drawn of all lines, in groups: a line's name in the suite, and what a reader is told.
const GROUPS: [(&str, &[(&str, &str)]); 5] = [
    (
        "Reads from memory",
        &[
            ("4k random read, base, depth 32", "4k random read, depth 32"),
            ("4k random read, base, depth 32, driver takes interrupts", "the same, driver takes interrupts"),
            ("4k random read, base, depth 1", "4k random read, depth 1"),
            ("4k random read, base, 4 queues, depth 32 each", "4k random read, 4 queues, depth 32 each"),
            ("4k random read, half delta half base, depth 32", "4k random read, half private, depth 32"),
            ("64k sequential read, base, depth 8", "64k sequential read, depth 8"),
            ("1m sequential read, base, depth 4", "1m sequential read, depth 4"),
        ],
    ),
    (
        "Writes",
        &[
            ("4k first-touch write, random, depth 32", "4k first-touch write, depth 32"),
            ("4k overwrite, random, depth 32", "4k overwrite, depth 32"),
            ("4k 70/30 read/write, empty delta, depth 32", "4k 70/30 read/write, depth 32"),
        ],
    ),
    (
        "Writes that are flushed",
        &[
            ("4k write and flush, first touch, depth 1", "4k first-touch write and flush, depth 1"),
            ("4k overwrite and flush, depth 1", "4k overwrite and flush, depth 1"),
            ("4k overwrite and flush, 4 queues, depth 1 each", "4k overwrite and flush, 4 queues"),
        ],
    ),
    (
        "Reads of what is not in memory",
        &[
            ("4k random read, base, nothing in memory, depth 32", "4k random read, depth 32"),
            ("64k sequential read, base, nothing in memory, depth 8", "64k sequential read, depth 8"),
        ],
    ),
    (
        "Private data past the page cache",
        &[
            ("4k random read, delta past the page cache, depth 32", "4k random read, depth 32"),
            ("4k first-touch write, random, past the page cache, depth 32", "4k first-touch write, depth 32"),
            ("4k overwrite, random, past the page cache, depth 32", "4k overwrite, depth 32"),
        ],
    ),
];

/// A contestant, as it is drawn.
#[derive(Debug)]
struct Series {
    /// In the record.
    name: &'static str,
    label: &'static str,
    mark: Mark,
    colour: &'static str,
}

/// One line of the drawing: µs for each of [`SERIES`] that took part.
#[derive(Debug)]
struct Line {
    label: &'static str,
    values: [Option<f64>; SERIES.len()],
}

#[derive(Debug)]
struct Group {
    label: &'static str,
    lines: Vec<Line>,
}

impl Line {
    fn ours(&self) -> Option<f64> {
        self.values[OURS]
    }

    /// What the least of the others takes, as a multiple of ours.
    fn best_other(&self) -> Option<f64> {
        let others = self.values[OURS + 1..].iter().copied().flatten();
        others.min_by(f64::total_cmp).zip(self.ours()).map(|(other, ours)| other / ours)
    }
}

pub fn run(options: &PlotOptions) -> Result<()> {
    let record = Record::load(&options.record).context("a whole run of the suite leaves its record; draw after one")?;
    let groups = groups(&record);
    ensure!(!groups.is_empty(), "{} has none of the lines that are drawn", options.record.display());
    let svg = figure::draw(&groups, &caption(&record));
    if let Some(directory) = options.svg.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(&options.svg, svg).with_context(|| options.svg.display().to_string())?;
    println!("{}", options.svg.display());
    Ok(())
}

/// What a record has of what is drawn.
fn groups(record: &Record) -> Vec<Group> {
    let line = |(name, label): &(&str, &'static str)| {
        let row = record.rows.iter().find(|row| row.name == *name)?;
        Some(Line { label, values: values(record, row) })
    };
    let groups = GROUPS.iter().map(|(label, lines)| Group { label, lines: lines.iter().filter_map(line).collect() });
    groups.filter(|group| !group.lines.is_empty()).collect()
}

fn values(record: &Record, row: &RowRecord) -> [Option<f64>; SERIES.len()] {
    let figure = |sample: &Sample| sample.cpu_us;
    let mut values = SERIES.map(|series| {
        let index = record.contestants.iter().position(|identity| identity.name == series.name)?;
        median(row.samples.get(index)?, figure)
    });
    values[LIMIT] = median(&row.limit, figure);
    // A logarithmic axis has no place for what took nothing.
    values.map(|value| value.filter(|value| value.is_finite() && *value > 0.0))
}

/// Where, when and how it was measured.
fn caption(record: &Record) -> [String; 2] {
    let (machine, settings) = (&record.machine, &record.settings);
    let date = machine.date.split(' ').next().unwrap_or_default();
    let mut versions: Vec<_> = record
        .contestants
        .iter()
        .filter(|identity| CONTESTANTS.iter().any(|it| it.name == identity.name))
        .map(|identity| identity.version.split(" (").next().unwrap_or_default())
        .collect();
    versions.dedup();
    [
        format!("{date}; {}, {} CPUs, Linux {}", machine.cpu, machine.cpus, machine.kernel),
        format!("Medians of {}, in turn; {}", settings.rounds(), versions.join(", ")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::record::{Identity, Machine, Settings};
    use crate::suite::rows::ROWS;

    fn sample(cpu_us: f64) -> Sample {
        Sample { requests: 1, iops: 1.0, mib_per_s: 1.0, p50_us: 1.0, p99_us: 1.0, cpu_us, weight: None }
    }

    /// Everyone takes part in all that the suite has, but the second one in no writes.
    fn record() -> Record {
        let rows = ROWS.iter().enumerate().map(|(index, row)| RowRecord {
            name: row.name.to_owned(),
            limit: if row.waits() { Vec::new() } else { vec![sample(0.5)] },
            bare_pread: Vec::new(),
            samples: (0..CONTESTANTS.len())
                .map(|it| if it == 1 && row.writes() { Vec::new() } else { vec![sample((index + it + 1) as f64)] })
                .collect(),
        });
        Record {
            machine: Machine {
                date: "2026-01-02 03:04".to_owned(),
                cpu: "A & B <C>".to_owned(),
                cpus: 2,
                kernel: "6.1".to_owned(),
                memory_mib: 1,
            },
            settings: Settings { rounds: 2, rounds_on_disk: 6, seconds: 0.5, wait: "poll".to_owned(), buffer_bytes: 0 },
            contestants: CONTESTANTS
                .iter()
                .map(|it| Identity { name: it.name.to_owned(), about: String::new(), version: "x 1 (y)".to_owned() })
                .collect(),
            rows: rows.collect(),
            standing: Vec::new(),
        }
    }

    #[test]
    fn every_line_and_contestant_that_is_drawn_is_the_suites() {
        for (_, lines) in GROUPS {
            for (name, _) in lines {
                assert!(ROWS.iter().any(|row| row.name == *name), "{name}");
            }
        }
        assert_eq!(SERIES[OURS].name, CONTESTANTS[0].name);
        assert!(SERIES[OURS..].iter().map(|it| it.name).eq(CONTESTANTS.iter().map(|it| it.name)));
    }

    #[test]
    fn every_figure_has_a_mark() {
        let record = record();
        let groups = groups(&record);
        let lines = || groups.iter().flat_map(|group| &group.lines);
        assert_eq!(lines().count(), GROUPS.iter().map(|(_, lines)| lines.len()).sum::<usize>());
        let svg = figure::draw(&groups, &caption(&record));
        for (index, series) in SERIES.iter().enumerate() {
            let figures = lines().filter(|line| line.values[index].is_some()).count();
            // And one of the legend.
            assert_eq!(svg.matches(&format!("class=\"{}\"", series.name)).count(), figures + 1, "{}", series.name);
        }
        assert!(svg.contains("A &amp; B &lt;C&gt;") && svg.contains("2026-01-02"), "{svg}");
    }

    #[test]
    fn a_part_of_a_record_is_drawn_without_the_rest() {
        let mut record = record();
        record.rows.retain(|row| row.name == "4k overwrite, random, depth 32");
        record.rows[0].samples[0] = vec![sample(2.0), sample(4.0)];
        let groups = groups(&record);
        let [group] = groups.as_slice() else { panic!("{groups:?}") };
        let [line] = group.lines.as_slice() else { panic!("{group:?}") };
        assert_eq!(line.ours(), Some(3.0));
        assert_eq!(line.values[2], None);
        let least = line.values[3].unwrap();
        assert_eq!(line.best_other(), Some(least / 3.0));
    }
}
