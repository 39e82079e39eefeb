//! The command line, through the binary, on real files.

mod damage;
mod disk;
mod hostile;
mod lookup;
mod session;
mod usage;

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use serde_json::Value;

/// What a run of `pando` came to.
#[derive(Debug)]
struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Ran {
    /// Standard output of a run that went well.
    #[track_caller]
    fn ok(&self) -> &str {
        assert_eq!(self.code, 0, "{self:?}");
        &self.out
    }

    /// Standard error of a run that was refused with exit code 1: one line, said once.
    #[track_caller]
    fn refused(&self) -> &str {
        assert_eq!((self.code, self.out.as_str()), (1, ""), "{self:?}");
        assert_eq!(self.err.lines().filter(|line| !line.contains(" is from the record ")).count(), 1, "{self:?}");
        &self.err
    }

    /// Standard output as JSON, whatever the exit code.
    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

fn pando<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Ran {
    run(Command::new(env!("CARGO_BIN_EXE_pando")).args(arguments))
}

fn run(command: &mut Command) -> Ran {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

/// Checks that `text` holds every one of `parts`.
#[track_caller]
fn holds(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "'{part}' expected in: {text}");
    }
}
