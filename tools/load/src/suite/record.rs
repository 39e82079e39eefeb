//! What a run of the suite found: samples, their medians, and the ratios between contestants.
//!
//! Plain data, written as JSON and read again by `serde`. Knows nothing of how samples are taken or shown.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::drive::Tally;
use crate::process::Weight;

/// What the record of a run is called that had every line and every contestant, and that of any other.
pub const WHOLE_RUN: &str = "suite.json";
pub const PARTIAL_RUN: &str = "suite-part.json";

/// Everything that one run found.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    pub machine: Machine,
    pub settings: Settings,
    pub contestants: Vec<Identity>,
    pub rows: Vec<RowRecord>,
    pub standing: Vec<StandingRecord>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Machine {
    pub date: String,
    pub cpu: String,
    pub cpus: usize,
    pub kernel: String,
    pub memory_mib: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Settings {
    pub rounds: usize,
    pub rounds_on_disk: usize,
    pub seconds: f64,
    pub wait: String,
    pub buffer_bytes: usize,
}

impl Settings {
    /// How many rounds of how long.
    pub fn rounds(&self) -> String {
        let Settings { rounds, rounds_on_disk, seconds, .. } = self;
        if rounds == rounds_on_disk {
            return format!("{rounds} rounds of {seconds} s");
        }
        format!("{rounds} rounds of {seconds} s ({rounds_on_disk} where the disk is waited for)")
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Identity {
    pub name: String,
    pub about: String,
    pub version: String,
}

/// One line of the tables, a sample for each round.
#[derive(Debug, Serialize, Deserialize)]
pub struct RowRecord {
    pub name: String,
    pub limit: Vec<Sample>,
    /// The same by `pread`, for lines that only read.
    pub bare_pread: Vec<Sample>,
    /// In the contestants' order; a contestant that does not take part has no samples.
    pub samples: Vec<Vec<Sample>>,
}

/// One measurement.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Sample {
    pub requests: u64,
    pub iops: f64,
    pub mib_per_s: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// CPU time of all of the backend's processes, for each request.
    pub cpu_us: f64,
    /// What the backend held right after the work.
    pub weight: Option<Weight>,
}

/// What backends cost that stand and wait.
#[derive(Debug, Serialize, Deserialize)]
pub struct StandingRecord {
    pub name: String,
    pub samples: Vec<StandingSample>,
    pub residue: Option<Residue>,
}

/// What a backend holds of an image that its guest has read from end to end, once in a run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Residue {
    pub image_bytes: u64,
    /// Right after.
    pub then: Weight,
    /// And when the guest had been quiet for so long.
    pub rested: Weight,
    pub rest_seconds: f64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct StandingSample {
    /// From the start of the process to a connection, and to the answer to GET_CONFIG.
    pub listening_ms: f64,
    pub greeted_ms: f64,
    /// Before anyone connects.
    pub alone: Weight,
    /// With its queue running and nothing to do.
    pub attached: Weight,
    /// While attached: CPU time and context switches in each second.
    pub idle_cpu_us_per_s: f64,
    pub idle_switches_per_s: f64,
}

impl Record {
    pub fn save(&self, path: &Path) -> Result<()> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        Ok(serde_json::to_writer_pretty(file, self)?)
    }

    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| path.display().to_string())?;
        serde_json::from_slice(&text).with_context(|| format!("{} is no record of a run", path.display()))
    }
}

impl Sample {
    pub fn new(tally: &Tally, cpu_ns: u64) -> Self {
        let seconds = tally.elapsed.as_secs_f64();
        let requests = tally.requests as f64;
        Self {
            requests: tally.requests,
            iops: requests / seconds,
            mib_per_s: tally.bytes as f64 / seconds / f64::from(1 << 20),
            p50_us: tally.latency.quantile_ns(0.5) as f64 / 1e3,
            p99_us: tally.latency.quantile_ns(0.99) as f64 / 1e3,
            cpu_us: cpu_ns as f64 / 1e3 / requests,
            weight: None,
        }
    }
}

/// The median of one figure of some samples; none without samples.
pub fn median<T>(samples: &[T], figure: impl Fn(&T) -> f64) -> Option<f64> {
    let mut figures: Vec<f64> = samples.iter().map(figure).collect();
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match figures.len() {
        0 => None,
        count if count % 2 == 1 => Some(figures[middle]),
        _ => Some(f64::midpoint(figures[middle - 1], figures[middle])),
    }
}

/// The median over the rounds of one figure's ratio: `a` to `b`, both of the same round.
pub fn ratio<T>(a: &[T], b: &[T], figure: impl Fn(&T) -> f64) -> Option<f64> {
    let pairs: Vec<f64> = a.iter().zip(b).map(|(a, b)| figure(a) / figure(b)).collect();
    median(&pairs, |ratio| *ratio)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios() {
        let figure = |it: &f64| *it;
        assert_eq!(median(&[], figure), None);
        assert_eq!(median(&[3.0, 1.0, 2.0], figure), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0], figure), Some(2.5));
        // A round that was slow for both does not move their ratio.
        assert_eq!(ratio(&[2.0, 20.0, 2.0], &[1.0, 10.0, 1.0], figure), Some(2.0));
        assert_eq!(ratio(&[2.0], &[], figure), None);
    }
}
