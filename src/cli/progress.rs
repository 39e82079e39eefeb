//! Following a long operation of the daemon to its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::daemon::api::types::{Job, JobState};

use super::client::Client;
use super::output::note;

/// How long the daemon may take to say that there is no news.
const NEWS_MS: u32 = 300;

/// A bar for bytes, on a terminal.
pub fn bar(total: Option<u64>, message: &'static str) -> anyhow::Result<ProgressBar> {
    let template = "{msg} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(template).context("cannot draw a progress bar")?;
    // Hidden unless standard error is a terminal.
    Ok(ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr()).with_style(style).with_message(message))
}

/// Waits for a job's end: its result. Ctrl-C cancels it.
pub fn follow(client: &Client, job: Job, message: &'static str) -> anyhow::Result<String> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&interrupted);
    // Ends with the process.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        if let Ok(runtime) = runtime
            && runtime.block_on(tokio::signal::ctrl_c()).is_ok()
        {
            noted.store(true, Ordering::Relaxed);
        }
    });
    let bar = bar(Some(job.total_bytes), message)?;
    let mut job = job;
    while job.state == JobState::Running {
        if interrupted.swap(false, Ordering::Relaxed) {
            note(format_args!("cancelling"));
            client.delete(&format!("/v1/jobs/{}", job.id))?;
        }
        job = client.get(&format!("/v1/jobs/{}?wait_ms={NEWS_MS}", job.id))?;
        bar.set_length(job.total_bytes);
        bar.set_position(job.done_bytes);
    }
    bar.finish_and_clear();
    match job.state {
        JobState::Done => Ok(job.result.unwrap_or_default()),
        JobState::Cancelled => bail!("cancelled; nothing is left of it"),
        _ => bail!("{}", job.error.unwrap_or_else(|| "it failed".to_owned())),
    }
}
