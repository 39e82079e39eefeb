//! The machine that a run was made on, in words.

use std::fs;
use std::process::Command;

use anyhow::Result;

use crate::suite::record::Machine;

pub fn describe() -> Result<Machine> {
    let date = Command::new("date").arg("+%Y-%m-%d %H:%M").output()?.stdout;
    let memory_kib = field("/proc/meminfo", "MemTotal")?;
    let memory_kib = memory_kib.split_whitespace().next().and_then(|word| word.parse().ok());
    Ok(Machine {
        date: String::from_utf8_lossy(&date).trim().to_owned(),
        cpu: field("/proc/cpuinfo", "model name")?,
        cpus: std::thread::available_parallelism()?.get(),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        memory_mib: memory_kib.unwrap_or(0_u64) / 1024,
    })
}

/// The first value with this name in a file of lines `name: value`.
fn field(path: &str, name: &str) -> Result<String> {
    let text = fs::read_to_string(path)?;
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let value = lines.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim());
    Ok(value.unwrap_or("unknown").to_owned())
}
