//! What all commands that ask the daemon have in common: where it is, and how its answers are shown.

use std::path::PathBuf;

use anyhow::Context;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::client::Client;
use super::output::{print, print_json};

/// Where the daemon answers when nobody says otherwise.
const SOCKET: &str = "/run/pando/api.sock";
/// The variable that says otherwise.
const SOCKET_VARIABLE: &str = "PANDO_API";

/// Where to ask, and how to show what comes.
#[derive(clap::Args, Clone, Debug)]
pub struct Asking {
    /// The daemon's socket; else what PANDO_API says, else /run/pando/api.sock
    #[arg(long, global = true, value_name = "SOCKET")]
    api: Option<PathBuf>,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
}

impl Asking {
    /// The daemon.
    pub fn client(&self) -> anyhow::Result<Client> {
        let socket = self.api.clone().or_else(|| std::env::var_os(SOCKET_VARIABLE).map(PathBuf::from));
        Client::new(&socket.unwrap_or_else(|| PathBuf::from(SOCKET)))
    }

    /// Prints an answer: as it is for programs, or as `text` has it for people.
    pub fn show<T: DeserializeOwned>(&self, answer: Value, text: impl FnOnce(T) -> String) -> anyhow::Result<()> {
        if self.json {
            return print_json(&answer);
        }
        let answer = serde_json::from_value(answer);
        let text = text(answer.context("the daemon's answer cannot be read: it may be of another version")?);
        print(|out| Ok(write!(out, "{text}")?))
    }
}
