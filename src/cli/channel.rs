//! `pando channel`: names that point to images.

use serde_json::json;

use crate::daemon::api::types::{Channel as ChannelAnswer, ChannelMove};

use super::Outcome;
use super::asking::Asking;
use super::client::part;
use super::table::{ago, fields, image, image_or_dash, table};

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Channel {
    #[command(flatten)]
    asking: Asking,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Point a channel to an image: volumes that follow it have the image from their VMs' next boot on
    #[command(after_help = "Example:\n  pando channel set debian-12/stable debian-12.7")]
    Set {
        /// The channel, such as debian-12/stable; one that does not exist is created
        name: String,
        /// A version, a digest, or its first 8 digits or more
        image: String,
    },
    /// List channels, where they point, and how many volumes are not there yet
    List,
    /// Show one channel
    Show {
        /// The channel
        name: String,
    },
    /// List a channel's moves, the newest first
    History {
        /// The channel
        name: String,
    },
    /// Point a channel to where it pointed before
    Rollback {
        /// The channel
        name: String,
    },
    /// Remove a channel that no volume follows
    Rm {
        /// The channel
        name: String,
    },
}

impl Channel {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let Channel { asking, verb } = self;
        let client = asking.client()?;
        let at = |name: &str| format!("/v1/channels/{}", part(name));
        match verb {
            Verb::Set { name, image } => {
                asking.show(client.put(&at(&name), Some(json!({ "image": image })))?, show_text)?;
            }
            Verb::List => asking.show(client.get("/v1/channels")?, list_text)?,
            Verb::Show { name } => asking.show(client.get(&at(&name))?, show_text)?,
            Verb::History { name } => asking.show(client.get(&(at(&name) + "/history"))?, history_text)?,
            Verb::Rollback { name } => asking.show(client.post(&(at(&name) + "/rollback"), None)?, show_text)?,
            Verb::Rm { name } => _ = client.delete(&at(&name))?,
        }
        Ok(Outcome::Done)
    }
}

fn list_text(channels: Vec<ChannelAnswer>) -> String {
    let row = |channel: ChannelAnswer| {
        [
            channel.name,
            image(&channel.image),
            channel.volumes.to_string(),
            channel.volumes_behind.to_string(),
            ago(channel.moved_at),
            channel.moved_by,
        ]
    };
    let headings = ["CHANNEL", "IMAGE", "VOLUMES", "BEHIND", "MOVED", "BY"];
    table(headings, channels.into_iter().map(row), "there are no channels; 'pando channel set' makes one")
}

fn show_text(channel: ChannelAnswer) -> String {
    fields([
        ("channel", channel.name),
        ("image", image(&channel.image)),
        ("digest", channel.image.digest),
        ("moved", format!("{} by {}", ago(channel.moved_at), channel.moved_by)),
        ("volumes", channel.volumes.to_string()),
        ("behind", channel.volumes_behind.to_string()),
    ])
}

fn history_text(moves: Vec<ChannelMove>) -> String {
    let row =
        |step: ChannelMove| [ago(step.at), step.action, image_or_dash(&step.previous), image(&step.image), step.by];
    table(["WHEN", "ACTION", "FROM", "TO", "BY"], moves.into_iter().map(row), "it has never moved")
}
