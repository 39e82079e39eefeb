//! The benchmark: every contestant on every line, in turn, on the same files, in the same run.
//!
//! Rounds go over all lines, and each line over the limit and all contestants, so that what else the
//! machine does strikes all of them alike. Every measurement has a fresh backend process and a fresh
//! private file. Owns the order of events; the tables of who and what are `contestants` and `rows`.

pub mod contestants;
mod limit;
pub mod machine;
mod markdown;
pub mod record;
mod residue;
pub mod rows;
pub mod site;
mod standing;
pub mod text;

use std::fs;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::arguments::SuiteOptions;
use crate::content;
use crate::device::{Greeting, Setup};
use crate::drive::{self, Tally, Wait};
use crate::process::Backend;
use crate::run::{self, Driver};
use crate::suite::contestants::{CONTESTANTS, Contestant, Programs, Volume};
use crate::suite::limit::{Bench, Reading};
use crate::suite::record::{Identity, Record, RowRecord, Sample, Settings};
use crate::suite::rows::{BASE_BYTES, COLD_BYTES, ROWS, Row};
use crate::suite::site::Site;
use crate::sys;
use crate::turns;
use crate::verify::{Base, Verifier};
use crate::workload::Mix;

const QUEUE_SIZE: u16 = 256;
/// The check of each contestant before anything is measured.
const CHECK_RANGE_BYTES: u64 = 128 << 20;
const CHECK_BLOCK_BYTES: u32 = 64 << 10;
const CHECK_REQUESTS: u64 = 10_000;
const CHECK_DEPTH: usize = 32;

pub fn run(options: &SuiteOptions) -> Result<()> {
    let programs = Programs {
        pando_blk: options.pando_blk.clone(),
        qemu_storage_daemon: options.qemu_storage_daemon.clone(),
        qemu_img: options.qemu_img.clone(),
        load: std::env::current_exe()?,
    };
    fs::create_dir_all(&options.results_dir).with_context(|| options.results_dir.display().to_string())?;
    let site = Site::new(&options.work_dir, programs)?;
    let mut contestants = Vec::new();
    let mut identities = Vec::new();
    for contestant in CONTESTANTS.iter().filter(|it| wanted(&options.contestants, it.name)) {
        match (contestant.version)(&site.programs) {
            Ok(version) => {
                let (name, about) = (contestant.name.to_owned(), contestant.about.to_owned());
                identities.push(Identity { name, about, version });
                contestants.push(contestant);
            }
            Err(error) => eprintln!("{} does not take part: {error:#}", contestant.name),
        }
    }
    ensure!(!contestants.is_empty(), "no contestant is there");
    let rows: Vec<_> = ROWS.iter().filter(|row| wanted(&options.only, row.name)).collect();
    let manner = Manner {
        rounds: options.rounds(),
        rounds_on_disk: options.rounds_on_disk(),
        time: Duration::from_secs_f64(options.seconds()),
        wait: options.wait,
        buffer_bytes: usize::try_from(options.buffers)?,
        with_limit: true,
    };
    let suite = Suite { site: &site, manner, contestants: &contestants };

    for contestant in &contestants {
        progress(&format!("checking {}", contestant.name));
        suite.check(contestant).with_context(|| format!("{} serves wrongly", contestant.name))?;
    }
    let mut record = Record {
        machine: machine::describe()?,
        settings: Settings {
            rounds: options.rounds(),
            rounds_on_disk: options.rounds_on_disk(),
            seconds: options.seconds(),
            wait: format!("{:?}", options.wait).to_lowercase(),
            buffer_bytes: manner.buffer_bytes,
        },
        contestants: identities,
        rows: suite.measure(&rows)?,
        standing: Vec::new(),
    };
    if wanted(&options.only, standing::NAME) {
        record.standing = standing::measure(&suite)?;
    }
    progress("");
    let is_whole = options.only.is_empty() && options.contestants.is_empty();
    let kept = options.results_dir.join(if is_whole { record::WHOLE_RUN } else { record::PARTIAL_RUN });
    for path in options.json.iter().chain([&kept]) {
        record.save(path)?;
    }
    let report = if options.markdown { markdown::report(&record) } else { text::report(&record) };
    print!("{report}");
    Ok(())
}

/// How everything is measured.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    pub rounds: usize,
    /// The same for lines that wait for the disk.
    pub rounds_on_disk: usize,
    /// For each measurement.
    pub time: Duration,
    /// How the driver learns of completions, where the line does not say it.
    pub wait: Wait,
    /// Memory over which each queue's buffers are spread.
    pub buffer_bytes: usize,
    /// Whether the machine's own limit takes its turn too.
    pub with_limit: bool,
}

/// What all measurements share.
pub struct Suite<'a> {
    pub site: &'a Site,
    pub manner: Manner,
    pub contestants: &'a [&'a Contestant],
}

impl Suite<'_> {
    fn driver(&self, round: usize) -> Driver {
        let Manner { wait, buffer_bytes, .. } = self.manner;
        // Another order in every round, the same for all contestants.
        Driver { wait, threads: 1, buffer_bytes, seed: round as u64 + 1 }
    }

    /// Every contestant on these lines, in turn.
    pub fn measure(&self, rows: &[&Row]) -> Result<Vec<RowRecord>> {
        let mut records: Vec<_> = rows
            .iter()
            .map(|row| RowRecord {
                name: row.name.to_owned(),
                limit: Vec::new(),
                bare_pread: Vec::new(),
                samples: self.contestants.iter().map(|_| Vec::new()).collect(),
            })
            .collect();
        let rounds_of = |row: &Row| if row.is_on_disk() { self.manner.rounds_on_disk } else { self.manner.rounds };
        for round in 0..rows.iter().map(|row| rounds_of(row)).max().unwrap_or(0) {
            for (row, record) in rows.iter().zip(&mut records) {
                let rounds = rounds_of(row);
                if round >= rounds {
                    continue;
                }
                let label = format!("round {} of {rounds}: {}", round + 1, row.name);
                progress(&label);
                if self.manner.with_limit && !row.waits() {
                    record.limit.push(self.limit(row, round, Reading::Copy)?);
                }
                if self.manner.with_limit && !row.waits() && row.measured.mix == Mix::Read {
                    record.bare_pread.push(self.limit(row, round, Reading::Pread)?);
                }
                if row.cold {
                    self.site.read_cold_base()?;
                }
                let takes_part = |index: &usize| self.contestants[*index].writable || !row.writes();
                let entered: Vec<_> = (0..self.contestants.len()).filter(takes_part).collect();
                for index in turns::order(entered.len(), round).into_iter().map(|turn| entered[turn]) {
                    let contestant = self.contestants[index];
                    progress(&format!("{label}: {}", contestant.name));
                    let sample = self.sample(contestant, row, round);
                    let sample = sample.with_context(|| format!("{}: {}", contestant.name, row.name))?;
                    record.samples[index].push(sample);
                }
            }
        }
        Ok(records)
    }

    fn limit(&self, row: &Row, round: usize, reading: Reading) -> Result<Sample> {
        let driver = self.driver(round);
        let bench = Bench {
            base: &self.site.base,
            base_mapped: &self.site.base_mapped,
            reading,
            private: &self.site.volume(0, 1).private,
            buffer_bytes: driver.buffer_bytes,
            seed: driver.seed,
        };
        bench.measure(row, self.manner.time)
    }

    fn sample(&self, contestant: &Contestant, row: &Row, round: usize) -> Result<Sample> {
        self.on_line(contestant, row, round, |backend, work| {
            let cpu_before = backend.cpu_ns()?;
            let tally = work()?;
            let mut sample = Sample::new(&tally, backend.cpu_ns()? - cpu_before);
            sample.weight = Some(backend.weight()?);
            Ok(sample)
        })
    }

    /// Starts a backend, does what comes before a line's work, and gives both backend and work to `watch`.
    pub fn on_line<T>(
        &self,
        contestant: &Contestant,
        row: &Row,
        round: usize,
        watch: impl FnOnce(&Backend, &mut dyn FnMut() -> Result<Tally>) -> Result<T>,
    ) -> Result<T> {
        let volume = if row.cold { self.site.cold_volume(row.queues)? } else { self.site.volume(0, row.queues) };
        let volume = Volume { direct: row.direct, ..volume };
        (contestant.prepare)(&self.site.programs, &volume).context("making the private file")?;
        let command = (contestant.command)(&self.site.programs, &volume);
        let mut backend = Backend::start(&command, &volume.socket, &self.site.log())?;
        let watched = self.drive(&mut backend, row, round, watch);
        let seen = watched.with_context(|| format!("the backend said:\n{}", backend.said()))?;
        backend.stop()?;
        self.site.clean(&volume)?;
        Ok(seen)
    }

    fn drive<T>(
        &self,
        backend: &mut Backend,
        row: &Row,
        round: usize,
        watch: impl FnOnce(&Backend, &mut dyn FnMut() -> Result<Tally>) -> Result<T>,
    ) -> Result<T> {
        let mut driver = self.driver(round);
        driver.wait = row.wait.unwrap_or(driver.wait);
        let areas = row.before.iter().chain([&row.measured]).map(|workload| {
            let block_bytes = workload.block_bytes;
            run::area_bytes(block_bytes, workload.depth, driver.buffer_bytes, block_bytes)
        });
        let setup = Setup {
            queues: row.queues,
            queue_size: QUEUE_SIZE,
            area_bytes: areas.max().unwrap_or(0),
            segment_bytes: None,
            indirect: true,
        };
        let (stream, _) = backend.connect()?;
        let mut device = Greeting::new(stream)?.start(&setup)?;
        for workload in row.before {
            run::measure(&mut device, workload, &driver, None).context("preparing")?;
        }
        if row.is_on_disk() {
            self.site.settle().context("waiting for the disk")?;
        }
        if row.cold {
            sys::warm_free_memory(2 * COLD_BYTES as usize).context("writing to free memory")?;
        }
        let mut work = || run::measure(&mut device, &row.measured, &driver, Some(self.manner.time));
        let seen = watch(backend, &mut work)?;
        device.stop()?;
        Ok(seen)
    }

    /// Random checked requests: whoever serves wrong bytes need not be fast.
    fn check(&self, contestant: &Contestant) -> Result<()> {
        let volume = self.site.volume(0, 1);
        (contestant.prepare)(&self.site.programs, &volume).context("making the private file")?;
        let command = (contestant.command)(&self.site.programs, &volume);
        let mut backend = Backend::start(&command, &volume.socket, &self.site.log())?;
        let (stream, _) = backend.connect()?;
        let setup = Setup {
            queues: 1,
            queue_size: QUEUE_SIZE,
            area_bytes: run::area_bytes(CHECK_BLOCK_BYTES, CHECK_DEPTH, 0, CHECK_BLOCK_BYTES),
            segment_bytes: None,
            indirect: true,
        };
        let mut device = Greeting::new(stream)?.start(&setup)?;
        for queue in &mut device.queues {
            queue.reshape(CHECK_BLOCK_BYTES, CHECK_DEPTH, 0)?;
        }
        let base = Base::Content { generation: content::BASE, bytes: BASE_BYTES };
        let config = device.config;
        let mut verifier = Verifier::new(config, base, CHECK_RANGE_BYTES, CHECK_BLOCK_BYTES, 1);
        verifier.start_random(CHECK_REQUESTS);
        drive::drive(&mut device.queues, &mut verifier, Wait::Call, None)?;
        verifier.start_pass();
        drive::drive(&mut device.queues, &mut verifier, Wait::Poll, None)?;
        device.stop()?;
        backend.stop()?;
        self.site.clean(&volume)
    }
}

/// Whether a name was asked for: all are when nothing was, else those that contain a pattern.
pub fn wanted(patterns: &[String], name: &str) -> bool {
    patterns.is_empty() || patterns.iter().any(|pattern| name.contains(pattern.as_str()))
}

/// Says on one line of a terminal what is being done; an empty text clears it.
pub fn progress(text: &str) {
    use std::io::IsTerminal;
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{text}");
        // A terminal that cannot be written to takes nothing away from the measurement.
        let _ = std::io::stderr().flush();
    }
}
