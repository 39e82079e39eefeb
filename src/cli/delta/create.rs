//! `pando delta create`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::ArgGroup;

use crate::block::delta::header::BaseIdentity;
use crate::block::delta::open::{self, NewDelta};
use crate::cli::image;
use crate::cli::output::print;
use crate::digest::Digest;
use crate::units::{ByteCount, ClusterSize, is_whole_sectors};

#[derive(clap::Args)]
#[command(
    group = ArgGroup::new("below").required(true).args(["base", "blank"]),
    after_help = "\
Examples:
  pando delta create vm1.delta --base debian.raw
  pando delta create vm1.delta --base debian.raw --size 20G
  pando delta create data.delta --blank --size 100G"
)]
pub struct Create {
    /// The file to create; an existing one is refused
    file: PathBuf,
    /// The image that the delta is for; it must never change, and the delta works over no other
    #[arg(long, value_name = "IMAGE")]
    base: Option<PathBuf>,
    /// No image: a plain private disk, all zeros
    #[arg(long, requires = "size")]
    blank: bool,
    /// Size of the volume, such as 20G; by default that of the image, and at least as large
    #[arg(long)]
    size: Option<ByteCount>,
    /// The copy-on-write unit: a power of two from 4K to 64K
    #[arg(long, value_name = "SIZE", default_value = "4K", value_parser = cluster_size)]
    cluster_size: ClusterSize,
    /// The image's digest, believed instead of computed
    #[arg(long, value_name = "DIGEST", requires = "base")]
    base_digest: Option<Digest>,
}

fn cluster_size(typed: &str) -> Result<ClusterSize, String> {
    let bytes: ByteCount = typed.parse().map_err(|error| format!("{error}"))?;
    ClusterSize::from_bytes(bytes.0).ok_or_else(|| format!("'{typed}' is not a power of two from 4K to 64K"))
}

impl Create {
    pub fn run(self) -> anyhow::Result<()> {
        let path = &self.file;
        // What is wrong is told ahead of reading an image of many GiB.
        if path.symlink_metadata().is_ok() {
            bail!("{} exists already, and stays as it is: choose another name, or remove it", path.display());
        }
        let mut new = NewDelta { base: None, virtual_bytes: self.size.map(|size| size.0), cluster: self.cluster_size };
        if let Some(base) = &self.base {
            let image = image::open(base)?;
            new.base = Some(BaseIdentity { digest: Digest([0; 32]), bytes: image.bytes });
            let header = new.header();
            if self.size.is_none() && !is_whole_sectors(image.bytes) {
                header.with_context(|| {
                    let whole = image.bytes.next_multiple_of(crate::units::SECTOR_BYTES);
                    format!(
                        "the image {} does not end with a whole sector: pass --size {whole} or more",
                        base.display()
                    )
                })?;
            } else {
                header?;
            }
            let digest = match self.base_digest {
                Some(digest) => digest,
                None => image::digest_of(&image, base)?.0,
            };
            new.base = Some(BaseIdentity { digest, bytes: image.bytes });
        }
        let header = open::create(path, &new)?;
        let size = ByteCount(header.layout.virtual_bytes());
        print(|out| match (&self.base, header.base) {
            (Some(base), Some(identity)) => {
                let (file, base, digest) = (path.display(), base.display(), identity.digest);
                Ok(writeln!(out, "created {file}: a volume of {size} over {base}, the image with digest {digest}")?)
            }
            _ => Ok(writeln!(out, "created {}: a volume of {size} over nothing", path.display())?),
        })
    }
}
