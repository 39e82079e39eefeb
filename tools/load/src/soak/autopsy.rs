//! What is found at the end of a run that has failed, ahead of its being cleared away: how all of its processes stand, and all rings.
//!
//! One who waits for ever leaves no word in any log; where each thread sleeps, and which index of a ring stands still, is what there is to go by.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::process::tree;
use crate::soak::watch::Watch;

/// Writes it down in a directory.
pub fn write(directory: &Path, watch: &Watch) -> Result<()> {
    let path = directory.join("standing");
    fs::write(&path, processes() + &watch.testimonies()).with_context(|| path.display().to_string())
}

/// This process and all that descend from it: where each of their threads is, and what they have open. What ends meanwhile is left out.
fn processes() -> String {
    let mut text = String::new();
    for pid in tree(std::process::id()) {
        let read = |path: String| fs::read_to_string(format!("/proc/{pid}/{path}")).unwrap_or_default();
        // Into a string, which takes everything.
        let _ = writeln!(text, "process {pid}: {}", read("cmdline".to_owned()).replace('\0', " "));
        for task in names(&format!("/proc/{pid}/task")) {
            let of_task = |file: &str| read(format!("task/{task}/{file}")).trim_end().to_owned();
            let status = of_task("status");
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
            let _ = writeln!(
                text,
                "  thread {task} {}: {}; in {}; system call {}",
                field("Name:"),
                field("State:"),
                of_task("wchan"),
                of_task("syscall")
            );
        }
        for descriptor in names(&format!("/proc/{pid}/fd")) {
            let file = fs::read_link(format!("/proc/{pid}/fd/{descriptor}")).unwrap_or_default();
            // Counts of event descriptors, and what others wait for.
            let info = read(format!("fdinfo/{descriptor}"));
            let told =
                info.lines().filter(|line| !["pos", "flags", "mnt_id", "ino"].iter().any(|it| line.starts_with(it)));
            let told: Vec<&str> = told.map(str::trim).take(8).collect();
            let _ = writeln!(text, "  descriptor {descriptor}: {} {}", file.display(), told.join("; "));
        }
    }
    text
}

/// The names in a directory that are numbers, in order.
fn names(directory: &str) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn threads_and_descriptors_of_this_process_are_told() {
        let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        event.write(7777).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("who waits".to_owned()).spawn(move || receiver.recv()).unwrap();
        let ends = Instant::now() + Duration::from_secs(10);
        let found = loop {
            let found = processes();
            // It may not have got that far.
            if found.contains("who waits: S") || Instant::now() > ends {
                break found;
            }
        };
        assert!(found.contains("who waits: S"), "{found}");
        assert!(found.contains("eventfd-count:             1e61"), "{found}");
        drop(sender);
        thread.join().unwrap().unwrap_err();
    }
}
