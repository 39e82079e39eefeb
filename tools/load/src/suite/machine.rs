//! The machine that a run was made on, in words.

use std::fs;
use std::process::Command;

use anyhow::Result;

use crate::suite::record::Machine;

pub fn describe() -> Result<Machine> {
    let date = Command::new("date").arg("+%Y-%m-%d %H:%M").output()?.stdout;
    Ok(Machine {
        date: String::from_utf8_lossy(&date).trim().to_owned(),
        cpu: field("/proc/cpuinfo", "model name")?,
        cpus: std::thread::available_parallelism()?.get(),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        memory_mib: memory_kib("MemTotal")? / 1024,
    })
}

/// What can be had without taking it from anyone: what is free, and page cache that can be dropped.
pub fn memory_available_bytes() -> Result<u64> {
    Ok(memory_kib("MemAvailable")? * 1024)
}

/// A figure of the kernel's account of memory; 0 when it is not there.
fn memory_kib(name: &str) -> Result<u64> {
    let value = field("/proc/meminfo", name)?;
    Ok(value.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0))
}

/// The first value with this name in a file of lines `name: value`.
fn field(path: &str, name: &str) -> Result<String> {
    let text = fs::read_to_string(path)?;
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let value = lines.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim());
    Ok(value.unwrap_or("unknown").to_owned())
}
