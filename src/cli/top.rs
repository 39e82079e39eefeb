//! `pando top`: a live view of volumes by load.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Row, Table};

use crate::daemon::api::types::Load;

use super::Outcome;
use super::asking::Asking;
use super::client::Client;
use super::output::print;
use super::table::{size, table};

/// Watch volumes by load: requests and bytes a second, latency, errors
#[derive(clap::Args)]
pub struct Top {
    #[command(flatten)]
    asking: Asking,
    /// Print one table, of one second, and end
    #[arg(long)]
    once: bool,
}

const INTERVAL: Duration = Duration::from_secs(1);
const HEADINGS: [&str; 9] =
    ["VOLUME", "VM", "READS/S", "WRITES/S", "READ/S", "WRITTEN/S", "LATENCY", "ERRORS", "DELTA"];

/// What rows are sorted by.
#[derive(Clone, Copy, PartialEq)]
enum By {
    Requests,
    Reads,
    Writes,
    Latency,
    Delta,
}

/// What a volume did in one interval.
struct Rate {
    load: Load,
    reads: f64,
    writes: f64,
    read_bytes: f64,
    written_bytes: f64,
    latency_us: f64,
}

impl Rate {
    fn row(&self) -> [String; 9] {
        [
            self.load.volume.clone(),
            self.load.vm.clone(),
            format!("{:.0}", self.reads),
            format!("{:.0}", self.writes),
            size(self.read_bytes as u64),
            size(self.written_bytes as u64),
            format!("{:.1} us", self.latency_us),
            self.load.errors.to_string(),
            size(self.load.delta_bytes),
        ]
    }

    fn key(&self, by: By) -> f64 {
        match by {
            By::Requests => self.reads + self.writes,
            By::Reads => self.reads,
            By::Writes => self.writes,
            By::Latency => self.latency_us,
            By::Delta => self.load.delta_bytes as f64,
        }
    }
}

/// What happened between two looks, the most of it first.
fn rates(before: &[Load], after: Vec<Load>, seconds: f64, by: By) -> Vec<Rate> {
    let name = |load: &Load| (load.vm.clone(), load.volume.clone());
    let before: BTreeMap<_, _> = before.iter().map(|load| (name(load), load)).collect();
    let rate = |load: Load| {
        let last = before.get(&name(&load));
        // A backend that was attached anew counts from nothing.
        let more = |of: fn(&Load) -> u64| of(&load).saturating_sub(last.map_or(0, |last| of(last))) as f64;
        let requests = more(|load| load.reads) + more(|load| load.writes) + more(|load| load.flushes);
        let latency_ns = more(|load| load.latency_ns);
        Rate {
            reads: more(|load| load.reads) / seconds,
            writes: more(|load| load.writes) / seconds,
            read_bytes: more(|load| load.read_bytes) / seconds,
            written_bytes: more(|load| load.written_bytes) / seconds,
            latency_us: if requests > 0.0 { latency_ns / requests / 1e3 } else { 0.0 },
            load,
        }
    };
    let mut rates: Vec<Rate> = after.into_iter().map(rate).collect();
    rates.sort_by(|a, b| b.key(by).total_cmp(&a.key(by)));
    rates
}

impl Top {
    pub fn run(self) -> anyhow::Result<Outcome> {
        let client = self.asking.client()?;
        let look = |client: &Client| client.get::<Vec<Load>>("/v1/load");
        if self.once {
            let (before, begun) = (look(&client)?, Instant::now());
            std::thread::sleep(INTERVAL);
            let rates = rates(&before, look(&client)?, begun.elapsed().as_secs_f64(), By::Requests);
            let text = table(HEADINGS, rates.iter().map(Rate::row), "nothing is attached");
            print(|out| Ok(write!(out, "{text}")?))?;
            return Ok(Outcome::Done);
        }
        // Before the terminal is taken over: that nobody answers is said on a plain one.
        let first = look(&client)?;
        let mut terminal =
            ratatui::try_init().context("this is no terminal that can be drawn on; --once prints a table")?;
        let result = watch(&client, &mut terminal, first);
        ratatui::restore();
        result.map(|()| Outcome::Done)
    }
}

fn watch(client: &Client, terminal: &mut ratatui::DefaultTerminal, first: Vec<Load>) -> anyhow::Result<()> {
    let (mut before, mut looked) = (first, Instant::now());
    let mut by = By::Requests;
    let mut shown: Vec<Rate> = Vec::new();
    loop {
        terminal.draw(|frame| draw(frame, &shown)).context("cannot draw on the terminal")?;
        let rest = INTERVAL.saturating_sub(looked.elapsed());
        if event::poll(rest).context("cannot read from the terminal")? {
            if let Event::Key(key) = event::read().context("cannot read from the terminal")?
                && key.kind == KeyEventKind::Press
            {
                match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                    KeyCode::Char('a') => by = By::Requests,
                    KeyCode::Char('r') => by = By::Reads,
                    KeyCode::Char('w') => by = By::Writes,
                    KeyCode::Char('l') => by = By::Latency,
                    KeyCode::Char('d') => by = By::Delta,
                    _ => {}
                }
                shown.sort_by(|a, b| b.key(by).total_cmp(&a.key(by)));
            }
            continue;
        }
        let after: Vec<Load> = client.get("/v1/load")?;
        shown = rates(&before, after.clone(), looked.elapsed().as_secs_f64(), by);
        (before, looked) = (after, Instant::now());
    }
}

fn draw(frame: &mut ratatui::Frame<'_>, rates: &[Rate]) {
    let [title, body, help] =
        Layout::vertical([Constraint::Length(1), Constraint::Fill(1), Constraint::Length(1)]).areas(frame.area());
    let requests: f64 = rates.iter().map(|rate| rate.reads + rate.writes).sum();
    frame.render_widget(Line::from(format!("pando: {} volumes, {requests:.0} requests/s", rates.len())), title);
    let widths = [
        Constraint::Fill(2),
        Constraint::Fill(2),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(10),
        Constraint::Length(10),
        Constraint::Length(11),
        Constraint::Length(7),
        Constraint::Length(10),
    ];
    let header = Row::new(HEADINGS).style(Style::new().add_modifier(Modifier::BOLD));
    frame.render_widget(Table::new(rates.iter().map(|rate| Row::new(rate.row())), widths).header(header), body);
    frame.render_widget(Line::from("sort: a all, r reads, w writes, l latency, d delta; q quits"), help);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_what_came_in_between() {
        let load = |volume: &str, reads: u64| Load {
            volume: volume.to_owned(),
            vm: "vm".to_owned(),
            reads,
            writes: 0,
            flushes: 0,
            read_bytes: reads * 4096,
            written_bytes: 0,
            errors: 0,
            latency_ns: reads * 2000,
            delta_bytes: 0,
        };
        let rates =
            rates(&[load("a", 10), load("b", 0)], vec![load("a", 20), load("b", 100), load("c", 4)], 2.0, By::Reads);
        let found: Vec<_> = rates.iter().map(|rate| (rate.load.volume.as_str(), rate.reads, rate.latency_us)).collect();
        assert_eq!(found, [("b", 50.0, 2.0), ("a", 5.0, 2.0), ("c", 2.0, 2.0)]);
    }
}
