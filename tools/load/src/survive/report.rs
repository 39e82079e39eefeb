//! What was found, as Markdown tables for a page.

use std::fmt::Write;

use crate::arguments::SurviveOptions;
use crate::suite::record::{RowRecord, Sample, median, ratio};
use crate::survive::Record;
use crate::survive::neighbour::{Cycle, Figures, KINDS, Share, Turn};
use crate::survive::pauses::{Pauses, Seen};

pub fn report(options: &SurviveOptions, record: &Record) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut out, options, record);
    out
}

fn write(out: &mut String, options: &SurviveOptions, record: &Record) -> std::fmt::Result {
    let machine = &record.machine;
    writeln!(out, "{}, {} CPUs, Linux {}, {}", machine.cpu, machine.cpus, machine.kernel, machine.date)?;
    if !record.pauses.is_empty() {
        write_pauses(out, &record.pauses)?;
    }
    if !record.account.is_empty() {
        write_account(out, options, &record.account)?;
    }
    if let Some(neighbour) = &record.neighbour {
        write_neighbour(out, neighbour)?;
    }
    Ok(())
}

fn write_pauses(out: &mut String, all: &[Pauses]) -> std::fmt::Result {
    writeln!(
        out,
        "\nWhat a client of 4k random reads and writes sees of each strike, in ms. *Silence*: the longest time without any completion, on \
         any queue; *wait*: the longest that one request took. From before the strike until all went on as before; without any strike \
         over the same time.\n"
    )?;
    writeln!(
        out,
        "| strike | strikes | silence: median | 99th | most | wait: median | 99th | most |\n|---|---:|---:|---:|---:|---:|---:|---:|"
    )?;
    for pauses in all {
        let load = match (pauses.load.queues, pauses.load.depth) {
            (1, depth) => format!("1 queue, depth {depth}"),
            (queues, depth) => format!("{queues} queues, depth {depth} each"),
        };
        let kinds =
            [("none", &pauses.none), ("`kill -9` of the worker", &pauses.kills), ("`pando upgrade`", &pauses.upgrades)];
        for (strike, seen) in kinds.into_iter().filter(|(_, seen)| !seen.is_empty()) {
            write!(out, "| {strike}; {load} | {} |", seen.len())?;
            for figure in [|it: &Seen| it.silence_ms, |it: &Seen| it.wait_ms] {
                let [middle, high, most] = spread(seen, figure);
                write!(out, " {middle:.2} | {high:.2} | {most:.2} |")?;
            }
            writeln!(out)?;
        }
    }
    let requests: u64 = all.iter().map(|pauses| pauses.requests).sum();
    writeln!(out, "\n{requests} requests completed, all as they should; no wrong byte.")
}

/// The median, the 99th percentile and the largest.
fn spread<T>(samples: &[T], figure: impl Fn(&T) -> f64) -> [f64; 3] {
    let mut figures: Vec<f64> = samples.iter().map(figure).collect();
    figures.sort_by(f64::total_cmp);
    let at = |quantile: f64| {
        let rank = (figures.len() as f64 * quantile).ceil() as usize;
        figures.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
    };
    [at(0.5), at(0.99), at(1.0)]
}

fn write_account(out: &mut String, options: &SurviveOptions, rows: &[RowRecord]) -> std::fmt::Result {
    writeln!(
        out,
        "\n| backend CPU, µs per request; {} rounds of {} s in turn | with the account of what is in flight | without | ratio: median of \
         the rounds | least | most |\n|---|---:|---:|---:|---:|---:|",
        options.rounds, options.seconds
    )?;
    for row in rows {
        let [with, without] = &row.samples[..] else { continue };
        let cpu = |samples: &[Sample]| median(samples, |it| it.cpu_us).unwrap_or(f64::NAN);
        let middle = ratio(with, without, |it| it.cpu_us).unwrap_or(f64::NAN);
        let ratios = with.iter().zip(without).map(|(with, without)| with.cpu_us / without.cpu_us);
        let (least, most) = ratios.fold((f64::INFINITY, 0.0_f64), |(least, most), it| (least.min(it), most.max(it)));
        let (with, without) = (cpu(with), cpu(without));
        writeln!(out, "| {} | {with:.3} | {without:.3} | {middle:.3} | {least:.3} | {most:.3} |", row.name)?;
    }
    Ok(())
}

fn write_neighbour(out: &mut String, figures: &Figures) -> std::fmt::Result {
    writeln!(
        out,
        "\nWhat a client of verified 4k random reads and writes, depth {}, sees of its neighbours, in µs; medians of the turns that they \
         took. A neighbour that works takes two processors if it gets them, one for its driver and one for its backend, whatever it sends: \
         where all share all processors, the second line is what that costs, and the third is to be compared with it.\n",
        figures.depth
    )?;
    writeln!(
        out,
        "| the neighbour is | requests/s | p50 | p99 | p99.9 | longest of all | p99 to that at rest: median | most |\n|---|---:|---:|---:|---:|---:|---:|---:|"
    )?;
    for (share, cycles) in &figures.shares {
        let share = match share {
            Share::Own => "each VM has a CPU of its own",
            Share::All => "all share all CPUs",
        };
        for (kind, name) in KINDS.iter().enumerate() {
            let middle =
                |figure: fn(&Turn) -> f64| median(cycles, |cycle: &Cycle| figure(&cycle[kind])).unwrap_or(f64::NAN);
            let longest = cycles.iter().map(|cycle| cycle[kind].longest_us).fold(0.0, f64::max);
            let [ratio, _, most] = spread(cycles, |cycle| cycle[kind].p99_us / cycle[0].p99_us);
            writeln!(
                out,
                "| {name}; {share} | {:.0} | {:.1} | {:.1} | {:.1} | {longest:.0} | {ratio:.2} | {most:.2} |",
                middle(|it| it.iops),
                middle(|it| it.p50_us),
                middle(|it| it.p99_us),
                middle(|it| it.p999_us),
            )?;
        }
    }
    let noise = &figures.noise;
    writeln!(
        out,
        "\n{:.0} s of garbage: {} sessions, {} of them ended or a ring of theirs given up by the backend, {} chains, {} kicks, {} messages; \
         {} of its workers died. {} requests of the client's completed beside it, all as they should; no wrong byte.",
        figures.noise_seconds,
        noise.sessions,
        noise.refused,
        noise.chains,
        noise.kicks,
        noise.messages,
        figures.deaths,
        figures.requests
    )
}
