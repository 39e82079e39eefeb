//! What a run has: images whose contents are known, and disks over them, each with a front end of its own manners.
//!
//! All of it follows from the seed. Knows nothing of how any of it is made or driven.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::content;
use crate::verify::Base;

const MIB: u64 = 1 << 20;

/// An image: its bytes are `content` of the generation that is its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    pub number: u32,
    pub bytes: u64,
}

/// The images. Not all are of one size, and not all sizes are whole clusters of 64 KiB.
pub const IMAGES: [Image; 3] = [
    Image { number: 1, bytes: 8 * MIB },
    Image { number: 2, bytes: 8 * MIB },
    Image { number: 3, bytes: 11 * MIB + 4096 },
];

impl Image {
    pub fn numbered(number: u32) -> Self {
        IMAGES[number as usize - 1]
    }

    /// What people call it.
    pub fn version(&self) -> String {
        format!("soak-{}", self.number)
    }

    /// Writes it to a file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let file = OpenOptions::new().create(true).truncate(true).write(true).open(path);
        let file = file.with_context(|| path.display().to_string())?;
        let mut block = vec![0; MIB as usize];
        for offset in (0..self.bytes).step_by(block.len()) {
            let bytes = MIB.min(self.bytes - offset) as usize;
            content::fill(&mut block[..bytes], offset, self.number);
            file.write_all_at(&block[..bytes], offset)?;
        }
        Ok(())
    }
}

/// What a disk is made of, and how long it keeps what is written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Cow,
    Blank,
    /// A cow volume whose delta lasts until the next image or the next attach.
    Ephemeral,
    ReadOnly,
}

/// How a front end tells of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// All of it at once (SET_MEM_TABLE).
    Table,
    /// Region by region (ADD_MEM_REG, REM_MEM_REG).
    Slots,
}

/// How a front end pauses its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// Rings are disabled, stopped, and told where to go on, as QEMU does.
    Stop,
    /// Rings are disabled and enabled, as cloud-hypervisor does.
    Disable,
}

/// The manners of a front end and its guest's driver.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    pub queues: usize,
    pub queue_size: u16,
    pub segment_bytes: Option<u32>,
    pub indirect: bool,
    /// Whether it keeps account of what is in flight over the backend's death, and so survives that.
    pub keeps_inflight: bool,
    pub memory: Memory,
    pub pause: Pause,
    /// Whether every message asks for an answer.
    pub answered: bool,
    /// Whether a reset is told by RESET_DEVICE too.
    pub tells_reset: bool,
}

/// A volume and the machine that it belongs to.
#[derive(Clone, Debug)]
pub struct Disk {
    pub volume: String,
    pub kind: Kind,
    /// The image that it is on at first.
    pub image: Option<Image>,
    /// Size when it is made; its image's own without one.
    pub bytes: Option<u64>,
    pub bytes_max: u64,
    pub cluster_bytes: u64,
    /// Whether what is written goes past the page cache, where that can be.
    pub direct: bool,
    pub manner: Manner,
}

impl Disk {
    /// The machine's name.
    pub fn vm(&self) -> String {
        format!("vm-{}", self.volume)
    }

    /// The channel that it follows, which is its own.
    pub fn channel(&self) -> Option<String> {
        matches!(self.kind, Kind::Ephemeral | Kind::ReadOnly).then(|| format!("soak/{}", self.volume))
    }

    pub fn is_writable(&self) -> bool {
        self.kind != Kind::ReadOnly
    }

    /// Where the API has its attachment.
    pub fn attachment(&self) -> String {
        format!("/v1/attachments/{}/{}", self.vm(), self.volume)
    }

    /// What the daemon calls its attachment in events.
    pub fn object(&self) -> String {
        format!("attachment:{}/{}", self.vm(), self.volume)
    }

    /// How large it is on an image, when nobody has made it grow to more than `grown`.
    pub fn bytes_on(&self, image: Option<Image>, grown: Option<u64>) -> u64 {
        grown.or(self.bytes).unwrap_or(0).max(image.map_or(0, |image| image.bytes))
    }

    /// What it holds on an image before anything is written.
    pub fn base_on(&self, image: Option<Image>) -> Base {
        let (generation, bytes) = image.map_or((content::BASE, 0), |image| (image.number, image.bytes));
        Base::Content { generation, bytes }
    }

    /// The request to make it.
    pub fn request(&self) -> Value {
        let mut request = json!({ "name": self.volume, "kind": match self.kind {
            Kind::Cow | Kind::Ephemeral => "cow",
            Kind::Blank => "blank",
            Kind::ReadOnly => "read-only",
        }});
        if self.kind != Kind::ReadOnly {
            request["ephemeral"] = json!(self.kind == Kind::Ephemeral);
            request["bytes"] = json!(self.bytes);
            request["cluster_bytes"] = json!(self.cluster_bytes);
        }
        match (self.channel(), self.image) {
            (Some(channel), _) => request["channel"] = json!(channel),
            (None, Some(image)) => request["image"] = json!(image.version()),
            (None, None) => {}
        }
        request
    }
}

/// The disks of a run: so many persistent cow volumes, and one of each other kind.
pub fn fleet(cow_volumes: usize, random: &mut fastrand::Rng) -> Vec<Disk> {
    let cow = (0..cow_volumes).map(|index| (format!("cow-{}", index + 1), Kind::Cow));
    let others = [("blank", Kind::Blank), ("ephemeral", Kind::Ephemeral), ("read-only", Kind::ReadOnly)];
    let disks = cow.chain(others.map(|(name, kind)| (name.to_owned(), kind))).enumerate();
    disks.map(|(index, (volume, kind))| disk(index, volume, kind, random)).collect()
}

fn disk(index: usize, volume: String, kind: Kind, random: &mut fastrand::Rng) -> Disk {
    let image = (kind != Kind::Blank).then(|| IMAGES[index % IMAGES.len()]);
    // Of the persistent ones the first is as most are, and the others differ from it in one thing or another.
    let is_first = index == 0;
    let manner = Manner {
        queues: random.usize(2..=4),
        queue_size: [64, 128, 256][random.usize(..3)],
        segment_bytes: [None, Some(4096), Some(16384)][random.usize(..3)],
        indirect: is_first || random.bool(),
        keeps_inflight: is_first || index != 1,
        memory: if random.bool() { Memory::Table } else { Memory::Slots },
        pause: if index == 1 { Pause::Disable } else { Pause::Stop },
        answered: random.bool(),
        tells_reset: random.bool(),
    };
    Disk {
        volume,
        kind,
        image,
        bytes: (kind != Kind::ReadOnly).then(|| random.u64(14..=18) * MIB),
        bytes_max: 40 * MIB,
        cluster_bytes: if is_first { 4096 } else { [4096, 4096, 8192, 65536][random.usize(..4)] },
        direct: !is_first && kind != Kind::ReadOnly && random.bool(),
        manner,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_makes_the_same_fleet_again_with_one_of_each_kind() {
        let fleet = |seed| fleet(3, &mut fastrand::Rng::with_seed(seed));
        let (one, again) = (fleet(7), fleet(7));
        assert_eq!(format!("{one:?}"), format!("{again:?}"));
        assert_ne!(format!("{one:?}"), format!("{:?}", fleet(8)));
        let count = |kind| one.iter().filter(|disk| disk.kind == kind).count();
        assert_eq!((count(Kind::Cow), count(Kind::Blank), count(Kind::Ephemeral), count(Kind::ReadOnly)), (3, 1, 1, 1));
    }
}
