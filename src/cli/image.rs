//! `pando image`: digests.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::digest::{self, Digest, Origin};

use super::Outcome;
use super::output::{note, print, print_json};

#[derive(clap::Subcommand)]
pub enum Image {
    /// Print an image's digest: BLAKE3 of its contents, which is what a delta is bound to
    ///
    /// The digest is remembered beside the image, in FILE.digest, and believed for as long as the image's size, modification
    /// time and inode stay the same; standard error says when it was. Without that, all of the image is read.
    #[command(after_help = "\
Examples:
  pando image digest debian.raw
  pando image digest debian.raw --json")]
    Digest(DigestArguments),
}

#[derive(clap::Args)]
pub struct DigestArguments {
    /// The image
    file: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Image {
    pub fn run(self) -> anyhow::Result<Outcome> {
        match self {
            Image::Digest(arguments) => print_digest(&arguments)?,
        }
        Ok(Outcome::Done)
    }
}

#[derive(Serialize)]
struct DigestJson {
    file: String,
    bytes: u64,
    digest: String,
    origin: &'static str,
}

fn print_digest(arguments: &DigestArguments) -> anyhow::Result<()> {
    let path = &arguments.file;
    let image = open(path)?;
    let (digest, origin) = digest_of(&image, path)?;
    if arguments.json {
        let origin = match origin {
            Origin::Record => "record",
            Origin::Computed => "computed",
        };
        print_json(&DigestJson {
            file: path.display().to_string(),
            bytes: image.bytes,
            digest: digest.to_string(),
            origin,
        })
    } else {
        print(|out| Ok(writeln!(out, "{digest}  {}", path.display())?))
    }
}

/// An image that is open for reading.
pub struct OpenImage {
    file: File,
    /// Length in bytes.
    pub bytes: u64,
}

/// Opens an image.
pub fn open(path: &Path) -> anyhow::Result<OpenImage> {
    let cannot_open = || format!("cannot open the image {}", path.display());
    let file = File::open(path).with_context(cannot_open)?;
    let metadata = file.metadata().with_context(cannot_open)?;
    ensure!(metadata.is_file(), "{} is no regular file, and an image has to be one", path.display());
    Ok(OpenImage { file, bytes: metadata.len() })
}

/// The digest of an image, with a progress bar on a terminal while it is read, and a remark when that was not needed.
pub fn digest_of(image: &OpenImage, path: &Path) -> anyhow::Result<(Digest, Origin)> {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left")
        .context("cannot draw a progress bar")?;
    // Hidden unless standard error is a terminal.
    let bar = ProgressBar::with_draw_target(Some(image.bytes), ProgressDrawTarget::stderr())
        .with_style(style)
        .with_message("digest");
    let found = digest::of_image(&image.file, path, &|bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let (digest, origin) = found?;
    if origin == Origin::Record {
        note(format_args!("the digest of {0} is from the record {0}.digest", path.display()));
    }
    Ok((digest, origin))
}
