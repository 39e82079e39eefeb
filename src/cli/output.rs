//! Where results and remarks go: standard output and standard error, either of which may be closed.

use std::fmt::Arguments;
use std::io::{self, BufWriter, Write};

use anyhow::Context;
use serde::Serialize;

/// A remark to the person at the terminal.
pub fn note(text: Arguments<'_>) {
    // Not `eprintln`, which panics when nobody listens.
    let _ = writeln!(io::stderr(), "pando: {text}");
}

/// Lets `write` write the result. A reader that goes away early (`| head`) has what it wanted: no error.
pub fn print(write: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    match write(&mut out).and_then(|()| out.flush().context("cannot write to standard output")) {
        Err(error)
            if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) =>
        {
            // What is still buffered has no reader either.
            let _ = out.into_parts();
            Ok(())
        }
        result => result,
    }
}

/// Writes a value as JSON, for people to read too.
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value).context("cannot write JSON")?;
    print(|out| Ok(writeln!(out, "{text}")?))
}

/// `1 fault`, `2 faults`.
pub fn counted(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}
