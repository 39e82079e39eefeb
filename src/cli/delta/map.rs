//! `pando delta map`.

use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;

use crate::block::delta::extents::{Extent, Place};
use crate::block::delta::survey::Survey;
use crate::cli::output::print;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pando delta map vm1.delta
  pando delta map vm1.delta --base debian.raw --json

The table lists what holds data; what it leaves out reads as zeros. JSON lists everything: depth 0 is the delta and 1 the
base; 'present' is false for what neither has. A file in use can be listed: the result is a snapshot.")]
pub struct Map {
    /// The delta
    file: PathBuf,
    /// What to call the base; it is not opened
    #[arg(long, value_name = "IMAGE")]
    base: Option<PathBuf>,
    /// Print JSON; the same as --output json
    #[arg(long)]
    json: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t = Output::Human, conflicts_with = "json")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Human,
    Json,
}

/// One extent, with the names of `qemu-img map --output json` and the file.
#[derive(Serialize)]
struct ExtentJson<'n> {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'n str>,
}

impl Map {
    pub fn run(self) -> anyhow::Result<()> {
        let survey = Survey::of(&self.file)?;
        let base = self.base.as_ref().map_or("base".to_owned(), |base| base.display().to_string());
        let names = Names { delta: survey.label(), base: &base };
        let json = self.json || self.output == Output::Json;
        print(|out| if json { write_json(out, &survey, names) } else { write_table(out, &survey, names) })
    }
}

#[derive(Clone, Copy)]
struct Names<'n> {
    delta: &'n str,
    base: &'n str,
}

impl<'n> Names<'n> {
    /// Where an extent's bytes are: the file, and the offset in it.
    fn source(self, extent: &Extent) -> Option<(&'n str, u64)> {
        match extent.place {
            Place::Delta { offset } => Some((self.delta, offset)),
            Place::Base => Some((self.base, extent.start)),
            Place::Zero | Place::Absent => None,
        }
    }
}

fn write_table(out: &mut dyn Write, survey: &Survey, names: Names<'_>) -> anyhow::Result<()> {
    writeln!(out, "{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to")?;
    survey.extents(|extent| {
        if let Some((file, offset)) = names.source(&extent) {
            writeln!(out, "{:<16}{:<16}{:<16}{file}", hex(extent.start), hex(extent.len), hex(offset))?;
        }
        Ok(())
    })
}

/// As `qemu-img` shows a number.
fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}

fn write_json(out: &mut dyn Write, survey: &Survey, names: Names<'_>) -> anyhow::Result<()> {
    let mut separator = "[";
    survey.extents(|extent| {
        let source = names.source(&extent);
        let extent = ExtentJson {
            start: extent.start,
            length: extent.len,
            depth: u32::from(extent.place == Place::Base),
            present: extent.place != Place::Absent,
            zero: source.is_none(),
            data: source.is_some(),
            offset: source.map(|(_, offset)| offset),
            file: source.map(|(file, _)| file),
        };
        write!(out, "{separator}{}", serde_json::to_string(&extent)?)?;
        separator = ",\n";
        anyhow::Ok(())
    })?;
    // Without any extent, the list has not been opened yet.
    Ok(writeln!(out, "{}]", if separator == "[" { "[" } else { "" })?)
}
