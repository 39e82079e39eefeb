//! One workload, or one verification, against a backend that somebody else started.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::arguments::{DriverOptions, RunOptions, VerifyOptions};
use crate::device::{Config, Device, Greeting, Queue, Setup};
use crate::drive::{self, Client, Tally, Wait};
use crate::request::{SECTOR_BYTES, Shape, Slots};
use crate::sys;
use crate::verify::{Base, Verifier};
use crate::workload::Workload;

/// How a session's queues are driven, as opposed to what is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    pub wait: Wait,
    pub threads: usize,
    pub buffer_bytes: usize,
    pub seed: u64,
}

pub fn run(options: &RunOptions) -> Result<()> {
    let (driver, setup) = split(&options.driver, options.block, options.depth)?;
    let mut device = connect(&options.socket_path, &setup)?;
    let workload = Workload {
        order: options.order,
        mix: options.mix,
        block_bytes: u32::try_from(options.block)?,
        depth: options.depth,
        range_bytes: options.range.unwrap_or(device.config.capacity_bytes),
        requests_max: options.requests,
    };
    let cpu_ns = || options.pid.map(sys::process_cpu_ns).transpose();
    let cpu_before = cpu_ns()?;
    let time = Duration::from_secs_f64(options.seconds);
    let tally = measure(&mut device, &workload, &driver, Some(time))?;
    let cpu = cpu_ns()?.zip(cpu_before).map(|(after, before)| after - before);
    print(&tally, cpu);
    device.stop()
}

pub fn verify(options: &VerifyOptions) -> Result<()> {
    let (driver, setup) = split(&options.driver, options.block, options.depth)?;
    let mut device = connect(&options.socket_path, &setup)?;
    let range_bytes = options.range.unwrap_or(device.config.capacity_bytes);
    let base = match &options.base {
        Some(path) => Base::File(File::open(path).with_context(|| path.display().to_string())?),
        None => Base::Unknown,
    };
    let block_bytes = u32::try_from(options.block)?;
    let mut verifier = Verifier::new(device.config, base, range_bytes, block_bytes, driver.seed);
    let earlier = options.state.as_ref().filter(|path| path.exists());
    if let Some(path) = earlier {
        verifier.load(path)?;
    }
    check_range(&device.config, range_bytes, block_bytes)?;
    for queue in &mut device.queues {
        queue.reshape(block_bytes, options.depth, 0)?;
    }
    if earlier.is_some() {
        verifier.start_pass();
        drive::drive(&mut device.queues, &mut verifier, driver.wait, None).context("what an earlier run wrote")?;
    }
    verifier.start_random(options.requests);
    let tally = drive::drive(&mut device.queues, &mut verifier, driver.wait, None)?;
    print(&tally, None);
    verifier.start_pass();
    let tally = drive::drive(&mut device.queues, &mut verifier, driver.wait, None)?;
    println!("all of {} MiB read back as written", tally.bytes >> 20);
    if let Some(path) = &options.state {
        verifier.save(path).with_context(|| path.display().to_string())?;
    }
    device.stop()
}

/// Runs `workload` on all queues of `device`, for `time` or until it ends.
pub fn measure(device: &mut Device, workload: &Workload, driver: &Driver, time: Option<Duration>) -> Result<Tally> {
    check_range(&device.config, workload.range_bytes, workload.block_bytes)?;
    for queue in &mut device.queues {
        queue.reshape(workload.block_bytes, workload.depth, driver.buffer_bytes)?;
    }
    let queues = device.queues.len();
    let drive = |share: &mut [Queue], mut client: Share<_>| drive::drive(share, &mut client, driver.wait, time);
    let share = |first| Share { client: workload.walker(queues, driver.seed), first };
    if driver.threads <= 1 {
        return drive(&mut device.queues, share(0));
    }
    let per_thread = queues.div_ceil(driver.threads);
    std::thread::scope(|scope| {
        let parts = device.queues.chunks_mut(per_thread).enumerate();
        let threads: Vec<_> = parts
            .map(|(index, part)| {
                let client = share(index * per_thread);
                scope.spawn(move || drive(part, client))
            })
            .collect();
        let mut sum = Tally::default();
        for thread in threads {
            let tally = thread.join().map_err(|_| anyhow::anyhow!("a driver thread panicked"))?;
            sum.add(&tally?);
        }
        Ok(sum)
    })
}

/// A client for some of a device's queues, the first of which is `first`.
struct Share<C> {
    client: C,
    first: usize,
}

impl<C: Client> Client for Share<C> {
    fn next(&mut self, queue: usize, slot: usize) -> Option<crate::request::Request> {
        self.client.next(self.first + queue, slot)
    }

    fn is_timed(&self, request: &crate::request::Request) -> bool {
        self.client.is_timed(request)
    }
}

/// Shared memory that each queue needs for requests of this size and depth.
pub fn area_bytes(block_bytes: u32, depth: usize, buffer_bytes: usize, segment: u32) -> usize {
    let buffers = buffer_bytes / block_bytes as usize;
    let shape = Shape { block_bytes, segment_bytes: segment, buffers, indirect: true };
    Slots::bytes(&shape, depth)
}

fn split(options: &DriverOptions, block: u64, depth: usize) -> Result<(Driver, Setup)> {
    let (block_bytes, segment) = (u32::try_from(block)?, options.segment.unwrap_or(block));
    ensure!(
        block > 0 && block.is_multiple_of(SECTOR_BYTES) && segment > 0,
        "a block of {block} bytes; a multiple of {SECTOR_BYTES} is expected"
    );
    let segment_bytes = u32::try_from(segment)?;
    let driver = Driver {
        wait: options.wait,
        threads: options.threads,
        buffer_bytes: usize::try_from(options.buffers)?,
        seed: options.seed,
    };
    let setup = Setup {
        queues: options.queues,
        queue_size: options.queue_size,
        area_bytes: area_bytes(block_bytes, depth, driver.buffer_bytes, segment_bytes),
        segment_bytes: Some(segment_bytes),
        indirect: !options.direct_descriptors,
    };
    Ok((driver, setup))
}

fn connect(socket: &Path, setup: &Setup) -> Result<Device> {
    let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    Greeting::new(stream)?.start(setup)
}

fn check_range(config: &Config, range_bytes: u64, block_bytes: u32) -> Result<()> {
    let capacity = config.capacity_bytes;
    ensure!(range_bytes <= capacity, "a range of {range_bytes} bytes, the disk has {capacity}");
    ensure!(range_bytes >= u64::from(block_bytes), "a range of {range_bytes} bytes is less than one block");
    Ok(())
}

fn print(tally: &Tally, cpu_ns: Option<u64>) {
    let seconds = tally.elapsed.as_secs_f64();
    println!(
        "{} requests in {seconds:.2} s: {:.0} IOPS, {:.0} MiB/s; p50 {:.1} µs, p99 {:.1} µs",
        tally.requests,
        tally.requests as f64 / seconds,
        tally.bytes as f64 / seconds / f64::from(1 << 20),
        tally.latency.quantile_ns(0.5) as f64 / 1e3,
        tally.latency.quantile_ns(0.99) as f64 / 1e3,
    );
    if let Some(cpu_ns) = cpu_ns {
        let per_request = cpu_ns as f64 / 1e3 / tally.requests as f64;
        println!("backend CPU: {per_request:.2} µs per request");
    }
}
