//! What a backend keeps of an image that its guest has read from end to end and then leaves alone: page tables, and pages mapped.
//!
//! Whoever reads by mapping the image has page tables for all of it, which no memory pressure takes back. They are the largest where the
//! page cache holds it in the smallest pages, as it does here: as after reads at random, and with file systems that know no others. Where
//! readahead brought pages of 2 MiB, they are next to nothing. The image is read twice, since what is mapped may depend on what was seen.
//! All contestants rest at the same time, because resting takes longer than reading.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::device::{Device, Greeting, Setup};
use crate::process::{Backend, Weight};
use crate::run;
use crate::suite::contestants::{Contestant, Volume};
use crate::suite::record::Residue;
use crate::suite::{QUEUE_SIZE, Suite, progress};
use crate::workload::{Mix, Order, Workload};

const REST: Duration = Duration::from_secs(30);
const BLOCK_BYTES: u32 = 1 << 20;
const DEPTH: usize = 4;
const PASSES: usize = 2;

/// A backend whose guest has read everything.
struct Reader {
    backend: Backend,
    device: Device,
    then: Weight,
}

/// What each contestant keeps, in their order.
pub fn measure(suite: &Suite) -> Result<Vec<Residue>> {
    progress("reading a large image");
    let image_bytes = suite.site.fill_large_base()?;
    let volumes: Vec<_> = (0..suite.contestants.len()).map(|index| suite.site.large_volume(index)).collect();
    let mut readers = Vec::new();
    for (contestant, volume) in suite.contestants.iter().zip(&volumes) {
        progress(&format!("reading a large image: {}", contestant.name));
        readers.push(read(suite, contestant, volume, image_bytes).with_context(|| contestant.name)?);
    }
    progress("resting after that");
    let since = Instant::now();
    thread::sleep(REST);
    let rest_seconds = since.elapsed().as_secs_f64().round();
    let mut residues = Vec::new();
    for (reader, volume) in readers.into_iter().zip(&volumes) {
        let Reader { backend, device, then } = reader;
        residues.push(Residue { image_bytes, then, rested: backend.weight()?, rest_seconds });
        device.stop()?;
        backend.stop()?;
        suite.site.clean(volume)?;
    }
    suite.site.drop_large_base()?;
    Ok(residues)
}

/// Starts a backend and reads the first so many bytes of its disk, in order.
fn read(suite: &Suite, contestant: &Contestant, volume: &Volume, bytes: u64) -> Result<Reader> {
    (contestant.prepare)(&suite.site.programs, volume).context("making the private file")?;
    let command = (contestant.command)(&suite.site.programs, volume);
    let mut backend = Backend::start(&command, &volume.socket, &suite.site.log())?;
    let (stream, _) = backend.connect()?;
    let setup = Setup {
        queues: 1,
        queue_size: QUEUE_SIZE,
        area_bytes: run::area_bytes(BLOCK_BYTES, DEPTH, 0, BLOCK_BYTES),
        segment_bytes: None,
        indirect: true,
    };
    let mut device = Greeting::new(stream)?.start(&setup)?;
    let workload = Workload {
        order: Order::Pass,
        mix: Mix::Read,
        block_bytes: BLOCK_BYTES,
        depth: DEPTH,
        range_bytes: bytes,
        requests_max: None,
    };
    for _ in 0..PASSES {
        run::measure(&mut device, &workload, &suite.driver(0), None)?;
    }
    let then = backend.weight()?;
    Ok(Reader { backend, device, then })
}
