//! What the account of requests in flight costs: the same work with it and without, in turn.

use std::time::Duration;

use anyhow::Result;

use crate::arguments::SurviveOptions;
use crate::drive::Wait;
use crate::suite::contestants::ACCOUNTS;
use crate::suite::record::RowRecord;
use crate::suite::rows::ROWS;
use crate::suite::site::Site;
use crate::suite::{Manner, Suite};

/// The cheapest read and the cheapest write, of which it is the largest part.
const LINES: [&str; 2] = ["4k random read, base, depth 32", "4k overwrite, random, depth 32"];

/// The samples of each line: with it, without it.
pub fn measure(options: &SurviveOptions, site: &Site) -> Result<Vec<RowRecord>> {
    let manner = Manner {
        rounds: options.rounds,
        rounds_on_disk: options.rounds,
        time: Duration::from_secs_f64(options.seconds),
        wait: Wait::Poll,
        buffer_bytes: 0,
        with_limit: false,
    };
    let contestants: Vec<_> = ACCOUNTS.iter().collect();
    let rows: Vec<_> = ROWS.iter().filter(|row| LINES.contains(&row.name)).collect();
    Suite { site, manner, contestants: &contestants }.measure(&rows)
}
