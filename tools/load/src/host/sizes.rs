//! Whether attaching takes longer where the image or the disk is larger.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::host::daemon::Daemon;
use crate::host::{milliseconds, volumes};
use crate::suite::progress;

const GIB: u64 = 1 << 30;
const IMAGES_BYTES: [u64; 2] = [GIB, 10 * GIB];
const DISKS_BYTES: [u64; 2] = [10 * GIB, 1 << 40];

/// One size of image under one size of disk.
pub struct Size {
    pub image_bytes: u64,
    pub disk_bytes: u64,
    /// From the call to the answer and a connection to the socket that it names.
    pub attach_ms: Vec<f64>,
}

/// All sizes in turn, so many times, with nothing else attached.
pub fn measure(daemon: &Daemon, directory: &Path, times: usize) -> Result<Vec<Size>> {
    let mut sizes = Vec::new();
    for image_bytes in IMAGES_BYTES {
        progress(&format!("importing a sparse image of {} GiB", image_bytes / GIB));
        let path = directory.join("sized.raw");
        File::create(&path)?.set_len(image_bytes)?;
        let (image, _) = daemon.import(&path)?;
        fs::remove_file(&path)?;
        for disk_bytes in DISKS_BYTES {
            sizes.push((image.clone(), Size { image_bytes, disk_bytes, attach_ms: Vec::new() }));
        }
    }
    for time in 0..times {
        progress(&format!("attaching disks of all sizes: {} of {times}", time + 1));
        for (index, (image, size)) in sizes.iter_mut().enumerate() {
            let volume = format!("sized-{index}-{time}");
            volumes::create(daemon, &volume, image, Some(size.disk_bytes))?;
            let since = Instant::now();
            let socket = volumes::attach(daemon, &volume)?;
            UnixStream::connect(&socket).with_context(|| socket.clone())?;
            size.attach_ms.push(milliseconds(since.elapsed()));
        }
        daemon.detach_all()?;
    }
    Ok(sizes.into_iter().map(|(_, size)| size).collect())
}
