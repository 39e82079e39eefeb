//! `pando image`: images of the daemon, and digests of files.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use crate::daemon::api::types::{Image as ImageAnswer, ImageState, Job, Status};
use crate::digest::{self, Digest, Origin};

use super::Outcome;
use super::asking::Asking;
use super::client::{Client, SparseFile, part, query};
use super::output::{note, print, print_json};
use super::progress::{bar, follow};
use super::table::{ago, digits, fields, list, size, table};

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Image {
    #[command(flatten)]
    asking: Asking,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Import an image from a file or, with '-', from standard input; prints its digest
    #[command(after_help = "\
Examples:
  pando image import debian-12.qcow2 --version debian-12.7
  zstd -dc debian.raw.zst | pando image import - --version debian-12.8")]
    Import(Import),
    /// List images: what they are called, take, and are used for
    List,
    /// Show one image
    Show {
        /// A version, a digest, or its first 8 digits or more
        image: String,
    },
    /// Read all of an image and see that it is what it was
    Verify {
        /// A version, a digest, or its first 8 digits or more
        image: String,
    },
    /// Remove an image that nothing uses
    Rm {
        /// A version, a digest, or its first 8 digits or more
        image: String,
    },
    /// Write an image to a new file or, with '-', to standard output, as raw bytes
    Export {
        /// A version, a digest, or its first 8 digits or more
        image: String,
        /// The file; there must be none
        file: PathBuf,
    },
    /// Print a file's digest: BLAKE3 of its contents, which is what a delta is bound to (asks no daemon)
    ///
    /// The digest is remembered beside the image, in FILE.digest, and believed for as long as the image's size, modification
    /// time and inode stay the same; standard error says when it was. Without that, all of the image is read.
    #[command(after_help = "\
Examples:
  pando image digest debian.raw
  pando image digest debian.raw --json")]
    Digest {
        /// The image
        file: PathBuf,
    },
}

#[derive(clap::Args)]
struct Import {
    /// The file, or '-'
    file: PathBuf,
    /// What to call it, such as debian-12.7; a version that exists moves to the new image
    #[arg(long)]
    version: Option<String>,
    /// raw, qcow2 or vmdk; found out by the contents when left out
    #[arg(long)]
    format: Option<String>,
    /// Do not wait for the end; prints the job
    #[arg(long)]
    no_wait: bool,
}

impl Image {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let Image { asking, verb } = self;
        let image_path = |image: &str| format!("/v1/images/{}", part(image));
        match verb {
            Verb::Digest { file } => print_digest(&file, asking.json)?,
            Verb::Import(import) => import.run(&asking)?,
            Verb::List => asking.show(asking.client()?.get("/v1/images")?, list_text)?,
            Verb::Show { image } => asking.show(asking.client()?.get(&image_path(&image))?, show_text)?,
            Verb::Verify { image } => {
                let client = asking.client()?;
                let job: Job = client.post(&(image_path(&image) + "/verify"), None)?;
                let digest = follow(&client, job, "verify")?;
                note(format_args!("image {digest} is whole"));
            }
            Verb::Rm { image } => _ = asking.client()?.delete(&image_path(&image))?,
            Verb::Export { image, file } => export(&asking.client()?, &image, &file)?,
        }
        Ok(Outcome::Done)
    }
}

impl Import {
    fn run(self, asking: &Asking) -> anyhow::Result<()> {
        let client = asking.client()?;
        let job: Value = if self.file.as_os_str() == "-" {
            ensure!(
                !io::stdin().is_terminal(),
                "standard input is a terminal: expected an image from a pipe or a file"
            );
            self.upload(&client, io::stdin(), None)?
        } else {
            let cannot_open = || format!("cannot open the image {}", self.file.display());
            let file = File::open(&self.file).with_context(cannot_open)?;
            let metadata = file.metadata().with_context(cannot_open)?;
            ensure!(
                metadata.is_file() || metadata.file_type().is_block_device() || metadata.file_type().is_fifo(),
                "{} is no image: expected a file, a block device or a pipe",
                self.file.display()
            );
            if metadata.is_file() && reads_any_file(&client)? {
                let path = std::path::absolute(&self.file).with_context(cannot_open)?;
                let request = json!({ "path": path, "version": self.version, "format": self.format });
                client.post("/v1/images", Some(request))?
            } else {
                self.upload(&client, file, metadata.is_file().then_some(metadata.len()))?
            }
        };
        if self.no_wait {
            return print_json(&job);
        }
        let job: Job = serde_json::from_value(job).context("the daemon's answer cannot be read")?;
        let digest = follow(&client, job, "import")?;
        let image: Value = client.get(&format!("/v1/images/{digest}"))?;
        asking.show(image, |_: Value| match self.version {
            Some(version) => format!("{digest}  {version}\n"),
            None => format!("{digest}\n"),
        })
    }

    fn upload(&self, client: &Client, from: impl Read + Send + 'static, bytes: Option<u64>) -> anyhow::Result<Value> {
        let bar = bar(bytes, "upload")?;
        let sent = bar.clone();
        let parts = [("version", self.version.clone()), ("format", self.format.clone())];
        let job = client.upload(&format!("/v1/images/upload{}", query(&parts)), from, move |bytes| sent.inc(bytes));
        bar.finish_and_clear();
        job
    }
}

/// Whether the daemon reads and writes files for this user: they could read and write any, then.
fn reads_any_file(client: &Client) -> anyhow::Result<bool> {
    let status: Status = client.get("/v1/status")?;
    let own = std::fs::metadata("/proc/self").context("cannot find out which user this is")?.uid();
    Ok(own == 0 || own == status.uid)
}

fn export(client: &Client, image: &str, file: &Path) -> anyhow::Result<()> {
    let path = format!("/v1/images/{}", part(image));
    let about: ImageAnswer = client.get(&path)?;
    if file.as_os_str() == "-" {
        ensure!(!io::stdout().is_terminal(), "standard output is a terminal: expected a pipe or a file");
        return print(|out| {
            client.download(&(path + "/content"), |bytes| {
                out.write_all(bytes).context("cannot write to standard output")?;
                Ok(true)
            })
        });
    }
    let cannot_write = || format!("cannot write {}", file.display());
    let mut out = SparseFile::create(file).with_context(cannot_write)?;
    let bar = bar(Some(about.bytes), "export")?;
    let mut written = 0;
    let result = client
        .download(&(path + "/content"), |bytes| {
            bar.inc(bytes.len() as u64);
            written += bytes.len() as u64;
            out.write(bytes).with_context(cannot_write)?;
            Ok(true)
        })
        .and_then(|()| {
            ensure!(written == about.bytes, "the daemon sent {written} bytes of an image of {}", about.bytes);
            out.finish().with_context(cannot_write)
        });
    bar.finish_and_clear();
    if let Err(error) = result {
        // Nothing half-made stays.
        let _ = std::fs::remove_file(file);
        bail!(error);
    }
    Ok(())
}

fn state_word(state: ImageState) -> &'static str {
    match state {
        ImageState::Verified => "verified",
        ImageState::Corrupt => "CORRUPT",
    }
}

fn list_text(images: Vec<ImageAnswer>) -> String {
    let row = |image: ImageAnswer| {
        [
            list(&image.versions),
            digits(&image.digest),
            size(image.bytes),
            size(image.stored_bytes),
            state_word(image.state).to_owned(),
            list(&image.channels),
            image.volumes.len().to_string(),
            image.vms.len().to_string(),
            ago(image.imported_at),
        ]
    };
    let headings = ["VERSION", "DIGEST", "SIZE", "ON DISK", "STATE", "CHANNELS", "VOLUMES", "VMS", "IMPORTED"];
    table(headings, images.into_iter().map(row), "there are no images; 'pando image import' brings one")
}

fn show_text(image: ImageAnswer) -> String {
    fields([
        ("digest", image.digest),
        ("versions", list(&image.versions)),
        ("size", format!("{} ({} bytes)", size(image.bytes), image.bytes)),
        ("on disk", size(image.stored_bytes)),
        ("format", image.format),
        ("state", format!("{}, {}", state_word(image.state), ago(image.verified_at))),
        ("fs-verity", if image.verity { "yes" } else { "no" }.to_owned()),
        ("imported", format!("{} by {}", ago(image.imported_at), image.imported_by)),
        ("channels", list(&image.channels)),
        ("volumes", list(&image.volumes)),
        ("VMs", list(&image.vms)),
    ])
}

#[derive(Serialize)]
struct DigestJson {
    file: String,
    bytes: u64,
    digest: String,
    origin: &'static str,
}

fn print_digest(path: &Path, json: bool) -> anyhow::Result<()> {
    let image = open(path)?;
    let (digest, origin) = digest_of(&image, path)?;
    if json {
        let origin = match origin {
            Origin::Record => "record",
            Origin::Computed => "computed",
        };
        let file = path.display().to_string();
        print_json(&DigestJson { file, bytes: image.bytes, digest: digest.to_string(), origin })
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
    let bar = bar(Some(image.bytes), "digest")?;
    let found = digest::of_image(&image.file, path, &|bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let (digest, origin) = found?;
    if origin == Origin::Record {
        note(format_args!("the digest of {0} is from the record {0}.digest", path.display()));
    }
    Ok((digest, origin))
}
