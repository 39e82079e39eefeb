//! `pando volume`: what VMs see as disks.

use serde_json::json;

use crate::daemon::api::types::{Volume as VolumeAnswer, VolumeKind};
use crate::units::ByteCount;

use super::Outcome;
use super::asking::Asking;
use super::client::part;
use super::table::{ago, fields, image_or_dash, list, size, table};

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Volume {
    #[command(flatten)]
    asking: Asking,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Create a volume over an image, over whatever a channel points to, or over nothing
    #[command(after_help = "\
Examples:
  pando volume create web-1 --channel debian-12/stable --kind cow --size 20G
  pando volume create os --channel debian-12/stable --kind read-only
  pando volume create scratch --image debian-12.7 --kind cow --ephemeral
  pando volume create web-1-data --kind blank --size 100G")]
    Create(Create),
    /// List volumes: on which image each is, and by which versions it is behind
    List,
    /// Show one volume
    Show {
        /// The volume
        name: String,
    },
    /// Empty a volume: a fresh delta on the image that it is on
    Reset {
        /// The volume
        name: String,
    },
    /// Bring a persistent volume to the image that it is to be on: a fresh delta there; what was written is gone
    Rebuild {
        /// The volume
        name: String,
    },
    /// Make a volume larger; a VM that runs from it is told
    Grow {
        /// The volume
        name: String,
        /// The new size, such as 40G
        size: ByteCount,
    },
    /// Remove a volume and what is in it
    Rm {
        /// The volume
        name: String,
    },
}

#[derive(clap::Args)]
struct Create {
    /// The volume: up to 40 letters, digits, '-', '_' and '.'
    name: String,
    /// What it is made of
    #[arg(long, value_enum)]
    kind: Kind,
    /// Pin it to an image: a version, a digest, or its first 8 digits or more
    #[arg(long, conflicts_with = "channel")]
    image: Option<String>,
    /// Let it follow a channel
    #[arg(long)]
    channel: Option<String>,
    /// Its writes last until the next attach or the next image
    #[arg(long)]
    ephemeral: bool,
    /// Its size, such as 20G; the image's own when left out
    #[arg(long)]
    size: Option<ByteCount>,
    /// The copy-on-write unit: 4K (the default) to 64K
    #[arg(long)]
    cluster_size: Option<ByteCount>,
    /// What becomes of a write that finds the file system of its delta full: it waits for room, or fails at once
    #[arg(long, value_enum, default_value = "hold")]
    on_full: OnFull,
    /// How long it waits before it fails, such as 90s or 10m [default: 60s]
    #[arg(long, value_name = "TIME")]
    hold_timeout: Option<humantime::Duration>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum OnFull {
    Hold,
    Error,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Kind {
    /// An image and a private delta over it
    Cow,
    /// An image alone, for any number of VMs
    ReadOnly,
    /// A private disk over nothing
    Blank,
}

impl Volume {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let Volume { asking, verb } = self;
        let client = asking.client()?;
        let at = |name: &str| format!("/v1/volumes/{}", part(name));
        match verb {
            Verb::Create(create) => {
                let request = json!({
                    "name": create.name,
                    "kind": match create.kind {
                        Kind::Cow => VolumeKind::Cow,
                        Kind::ReadOnly => VolumeKind::ReadOnly,
                        Kind::Blank => VolumeKind::Blank,
                    },
                    "image": create.image,
                    "channel": create.channel,
                    "ephemeral": create.ephemeral,
                    "bytes": create.size.map(|size| size.0),
                    "cluster_bytes": create.cluster_size.map(|size| size.0),
                    "on_full": match create.on_full {
                        OnFull::Hold => "hold",
                        OnFull::Error => "error",
                    },
                    "hold_timeout_s": create.hold_timeout.map(|time| time.as_secs()),
                });
                asking.show(client.post("/v1/volumes", Some(request))?, show_text)?;
            }
            Verb::List => asking.show(client.get("/v1/volumes")?, list_text)?,
            Verb::Show { name } => asking.show(client.get(&at(&name))?, show_text)?,
            Verb::Reset { name } => asking.show(client.post(&(at(&name) + "/reset"), None)?, show_text)?,
            Verb::Rebuild { name } => asking.show(client.post(&(at(&name) + "/rebuild"), None)?, show_text)?,
            Verb::Grow { name, size } => {
                let request = json!({ "bytes": size.0 });
                asking.show(client.post(&(at(&name) + "/grow"), Some(request))?, show_text)?;
            }
            Verb::Rm { name } => _ = client.delete(&at(&name))?,
        }
        Ok(Outcome::Done)
    }
}

fn kind_word(volume: &VolumeAnswer) -> String {
    let kind = match volume.kind {
        VolumeKind::Cow => "cow",
        VolumeKind::ReadOnly => "read-only",
        VolumeKind::Blank => "blank",
    };
    if volume.ephemeral { format!("{kind}, ephemeral") } else { kind.to_owned() }
}

/// By what a volume is behind, and what changes that.
fn behind_words(volume: &VolumeAnswer) -> String {
    if volume.behind.is_empty() {
        return "-".to_owned();
    }
    let when = if volume.needs_rebuild { "rebuild" } else { "next boot" };
    format!("{} ({when})", volume.behind.join(" "))
}

fn list_text(volumes: Vec<VolumeAnswer>) -> String {
    let row = |volume: VolumeAnswer| {
        [
            kind_word(&volume),
            image_or_dash(&volume.image),
            volume.channel.clone().unwrap_or_else(|| "-".to_owned()),
            behind_words(&volume),
            size(volume.bytes),
            volume.delta_bytes.map_or("-".to_owned(), size),
            volume.state.clone(),
            list(&volume.vms),
        ]
    };
    let rows = volumes.into_iter().map(|volume| {
        let name = volume.name.clone();
        let [kind, image, channel, behind, bytes, delta, state, vms] = row(volume);
        [name, kind, image, channel, behind, bytes, delta, state, vms]
    });
    let headings = ["VOLUME", "KIND", "IMAGE", "FOLLOWS", "BEHIND BY", "SIZE", "DELTA", "STATE", "VMS"];
    table(headings, rows, "there are no volumes; 'pando volume create' makes one")
}

fn when_full(volume: &VolumeAnswer) -> String {
    match volume.hold_timeout_s {
        _ if volume.kind == VolumeKind::ReadOnly => "-".to_owned(),
        0 => "writes fail at once".to_owned(),
        seconds => format!("writes wait {seconds} s"),
    }
}

fn show_text(volume: VolumeAnswer) -> String {
    fields([
        ("volume", volume.name.clone()),
        ("kind", kind_word(&volume)),
        ("image", image_or_dash(&volume.image)),
        ("follows", volume.channel.clone().unwrap_or_else(|| "-".to_owned())),
        ("behind by", behind_words(&volume)),
        ("size", format!("{} ({} bytes)", size(volume.bytes), volume.bytes)),
        ("delta", volume.delta_bytes.map_or("-".to_owned(), size)),
        ("when full", when_full(&volume)),
        ("state", volume.state.clone()),
        ("VMs", list(&volume.vms)),
        ("created", format!("{} by {}", ago(volume.created_at), volume.created_by)),
    ])
}
