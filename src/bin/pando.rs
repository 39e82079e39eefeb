//! `pando`: the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    match pando::cli::run(std::env::args_os()) {
        Ok(Some(code)) => code,
        Ok(None) => ExitCode::FAILURE,
        Err(error) => {
            pando::cli::report(&error);
            ExitCode::FAILURE
        }
    }
}
