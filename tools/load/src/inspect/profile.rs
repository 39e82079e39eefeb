//! Where the processor's time goes in pando's processes, line by line: a flame graph, and the symbols that have the most of it.
//!
//! The backend has to be built with symbols and frame pointers; stacks are followed by these. The C library's copies have none, so that
//! in a drawing they lie on what called their caller.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use inferno::collapse::Collapse;
use inferno::collapse::perf::Folder;
use inferno::flamegraph;

use super::folded::{self, SelfTime};
use super::perf::Watch;
use super::{Inspection, lines};
use crate::arguments::ProfileOptions;
use crate::suite::rows::Row;

/// The cheapest read, the cheapest write, and what copies the most: a change in any of them is seen here first.
const LINES: [&str; 3] =
    ["4k random read, base, depth 32", "64k sequential read, base, depth 8", "4k overwrite, random, depth 32"];
/// Samples a second: no multiple of anything that happens by a clock of the kernel's.
const FREQUENCY: &str = "1999";
const SYMBOLS: usize = 12;

pub fn run(options: &ProfileOptions) -> Result<()> {
    fs::create_dir_all(&options.results_dir).with_context(|| options.results_dir.display().to_string())?;
    let inspection = Inspection::new(&options.inspect)?;
    let clock = clock();
    for row in lines(&options.inspect.only, &LINES)? {
        let folded = record(&inspection, row, clock).with_context(|| row.name)?;
        let svg = options.results_dir.join(file_name(row.name));
        draw(&folded, row.name, clock.unit, &svg)?;
        print(row.name, clock, &folded::self_time(&folded), &svg);
    }
    Ok(())
}

/// What samples are taken by, and what each then stands for a number of.
#[derive(Clone, Copy, Debug)]
struct Clock {
    event: &'static str,
    unit: &'static str,
}

/// The processor's own cycles, or where it has no counters (as in most virtual machines) a timer.
fn clock() -> Clock {
    match Path::new("/sys/bus/event_source/devices/cpu").exists() {
        true => Clock { event: "cycles", unit: "cycles" },
        false => Clock { event: "cpu-clock", unit: "ns" },
    }
}

/// The stacks of a backend at work, folded.
fn record(inspection: &Inspection, row: &Row, clock: Clock) -> Result<String> {
    let (data, said) = (inspection.file("perf.data"), inspection.file("perf.log"));
    let output = data.to_str().context("a path that is no text")?;
    let words =
        ["record", "--quiet", "--event", clock.event, "--freq", FREQUENCY, "--call-graph", "fp", "--output", output];
    inspection.watch(row, |backend, work| {
        let watch = Watch::start(words, &backend.processes(), &said)?;
        work()?;
        watch.finish()
    })?;
    fold(&data, &said)
}

fn fold(data: &Path, said: &Path) -> Result<String> {
    let mut script = Command::new("perf")
        .args(["script", "--no-inline", "--input"])
        .arg(data)
        .stdout(Stdio::piped())
        .stderr(File::create(said)?)
        .spawn()?;
    let output = script.stdout.take().context("perf script has an output")?;
    let mut folded = Vec::new();
    Folder::default().collapse(BufReader::new(output), &mut folded)?;
    let status = script.wait()?;
    ensure!(status.success(), "perf script: {status}\n{}", fs::read_to_string(said).unwrap_or_default());
    ensure!(!folded.is_empty(), "perf saw nothing");
    Ok(String::from_utf8(folded)?)
}

fn draw(folded: &str, title: &str, unit: &str, svg: &Path) -> Result<()> {
    let mut options = flamegraph::Options::default();
    options.title = title.to_owned();
    options.count_name = unit.to_owned();
    // The same symbols have the same colours in every drawing.
    options.hash = true;
    let file = File::create(svg).with_context(|| svg.display().to_string())?;
    flamegraph::from_lines(&mut options, folded.lines(), BufWriter::new(file))?;
    Ok(())
}

fn print(name: &str, clock: Clock, time: &SelfTime, svg: &Path) {
    println!("{name}: {} {} of {}; {}", time.whole, clock.unit, clock.event, svg.display());
    for (symbol, own) in time.symbols.iter().take(SYMBOLS) {
        println!("  {:>5.1} %  {symbol}", time.share(*own));
    }
    println!();
}

/// A line's name as that of a file: `4k random read, base` is `4k-random-read-base.svg`.
fn file_name(line: &str) -> String {
    let words: Vec<_> = line.split(|letter: char| !letter.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    format!("flame-{}.svg", words.join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::rows::ROWS;

    #[test]
    fn every_line_has_a_file_of_its_own() {
        assert_eq!(file_name("4k 70/30 read/write, empty delta"), "flame-4k-70-30-read-write-empty-delta.svg");
        let mut names: Vec<_> = ROWS.iter().map(|row| file_name(row.name)).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), ROWS.len());
    }

    #[test]
    fn stacks_are_drawn() {
        let directory = tempfile::tempdir().unwrap();
        let svg = directory.path().join("flame.svg");
        draw("worker;serve;copy 30\nworker;serve 5\n", "a line", "ns", &svg).unwrap();
        let text = fs::read_to_string(&svg).unwrap();
        assert!(text.contains("a line") && text.contains("copy (30 ns"), "{text}");
    }
}
