//! The drawing itself, as SVG: places, colours, letters.
//!
//! It has a background of its own, so that it can be read on pages of any colour, and names no font that a reader might lack. Knows
//! nothing of records; what is drawn is the parent module's.

use svg::Document;
use svg::node::element::{Circle, Group as Node, Path, Rectangle, Style, Text, Title};

use super::axis::Axis;
use super::{Group, LIMIT, Line, OURS, SERIES, Series};

const WIDTH: f64 = 1000.0;
const MARGIN: f64 = 28.0;
/// Where the axis begins and ends, and where columns of figures end.
const AXIS_LEFT: f64 = 336.0;
const AXIS_RIGHT: f64 = 796.0;
const OURS_RIGHT: f64 = 892.0;
const OTHER_RIGHT: f64 = WIDTH - MARGIN;
const LEGEND_Y: f64 = 92.0;
const LEGEND_COLUMNS: [f64; SERIES.len()] = [0.0, 176.0, 274.0, 384.0, 510.0, 726.0];
const HEAD_BOTTOM: f64 = 142.0;
const GROUP_HEIGHT: f64 = 32.0;
const LINE_HEIGHT: f64 = 25.0;
const FOOT_HEIGHT: f64 = 84.0;

const STYLE: &str = "\
text { font-family: system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif; font-size: 14px; fill: #1f2328 }
.title { font-size: 19px; font-weight: 600 }
.small { font-size: 12.5px; fill: #57606a }
.group { font-weight: 600 }
.ours { font-weight: 600; fill: #0a58ca }
.end { text-anchor: end }
.middle { text-anchor: middle }";

/// The shape of a contestant's mark, so that colour alone tells nothing apart.
#[derive(Clone, Copy, Debug)]
pub enum Mark {
    Bar,
    Dot,
    Square,
    Triangle,
    Diamond,
    Cross,
}

/// Draws these lines; the caption stands below.
pub fn draw(groups: &[Group], caption: &[String]) -> String {
    let lines = || groups.iter().flat_map(|group| &group.lines);
    let values = lines().flat_map(|line| line.values).flatten();
    let axis = Axis::around(values, AXIS_LEFT, AXIS_RIGHT);
    let body = groups.len() as f64 * GROUP_HEIGHT + lines().count() as f64 * LINE_HEIGHT;
    let bottom = HEAD_BOTTOM + body + LINE_HEIGHT / 2.0;
    let height = bottom + FOOT_HEIGHT;

    let mut document = Document::new()
        .set("viewBox", (0, 0, WIDTH, height))
        .set("width", WIDTH)
        .set("height", height)
        .set("role", "img")
        .add(Title::new("Processor time of each backend for each request, for several kinds of work"))
        .add(Style::new(STYLE))
        .add(
            Rectangle::new()
                .set("x", 0.5)
                .set("y", 0.5)
                .set("width", WIDTH - 1.0)
                .set("height", height - 1.0)
                .set("rx", 8)
                .set("fill", "#ffffff")
                .set("stroke", "#d0d7de"),
        )
        .add(head())
        .add(grid(&axis, bottom));
    let mut y = HEAD_BOTTOM;
    for group in groups {
        y += GROUP_HEIGHT;
        document = document.add(text(group.label, MARGIN, y - 7.0, "group"));
        for line in &group.lines {
            y += LINE_HEIGHT;
            document = document.add(row(line, &axis, y - LINE_HEIGHT / 2.0));
        }
    }
    let captions = caption.iter().enumerate();
    for (index, words) in captions {
        let y = bottom + 50.0 + index as f64 * 18.0;
        document = document.add(text(words, MARGIN, y, "small"));
    }
    document.to_string()
}

/// The title and the legend, and what the columns of figures are.
fn head() -> Node {
    let mut node = Node::new().add(text("Processor time of the backend for each request", MARGIN, 40.0, "title")).add(
        text("µs of all its processes, user and system; logarithmic, further left is better", MARGIN, 62.0, "small"),
    );
    for (series, column) in SERIES.iter().zip(LEGEND_COLUMNS) {
        let x = MARGIN + column + 7.0;
        node = node.add(mark(series, x, LEGEND_Y)).add(text(series.label, x + 14.0, LEGEND_Y + 5.0, "legend"));
    }
    node.add(text("pando, µs", OURS_RIGHT, HEAD_BOTTOM, "small end")).add(text(
        "best other",
        OTHER_RIGHT,
        HEAD_BOTTOM,
        "small end",
    ))
}

fn grid(axis: &Axis, bottom: f64) -> Node {
    let mut node = Node::new();
    for tick in axis.ticks() {
        let x = axis.at(tick);
        let is_power = tick.log10().fract().abs() < 1e-9;
        let colour = if is_power { "#b6bec7" } else { "#e4e8ec" };
        let line = Path::new().set("d", format!("M{x:.1} {:.1}V{bottom:.1}", HEAD_BOTTOM + 8.0)).set("stroke", colour);
        let name = tick.to_string();
        node = node.add(line).add(text(&name, x, HEAD_BOTTOM, "small middle")).add(text(
            &name,
            x,
            bottom + 18.0,
            "small middle",
        ));
    }
    node
}

fn row(line: &Line, axis: &Axis, y: f64) -> Node {
    let baseline = y + 5.0;
    let mut node = Node::new().add(text(line.label, AXIS_LEFT - 14.0, baseline, "end"));
    let present = || line.values.iter().copied().flatten();
    // From the least to the most, so that the eye keeps to its line.
    let (from, to) = present().fold((AXIS_RIGHT, AXIS_LEFT), |(from, to), value| {
        let x = axis.at(value);
        (x.min(from), x.max(to))
    });
    if from < to {
        node = node.add(
            Path::new().set("d", format!("M{from:.1} {y:.1}H{to:.1}")).set("stroke", "#d0d7de").set("stroke-width", 2),
        );
    }
    // Ours last, above the others.
    let drawn = (LIMIT..SERIES.len()).filter(|index| *index != OURS).chain([OURS]);
    for index in drawn {
        if let Some(value) = line.values[index] {
            let title = Title::new(format!("{}: {value:.*} µs", SERIES[index].label, places(value)));
            node = node.add(mark(&SERIES[index], axis.at(value), y).add(title));
        }
    }
    if let Some(ours) = line.ours() {
        node = node.add(text(&format!("{ours:.*}", places(ours)), OURS_RIGHT, baseline, "ours end"));
    }
    if let Some(ratio) = line.best_other() {
        node = node.add(text(&format!("{ratio:.1} ×"), OTHER_RIGHT, baseline, "end"));
    }
    node
}

/// Digits after the point that make three in all.
fn places(value: f64) -> usize {
    match value {
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    }
}

fn mark(series: &Series, x: f64, y: f64) -> Node {
    let outline = |path: String| {
        Path::new().set("d", path).set("fill", "#ffffff").set("stroke", series.colour).set("stroke-width", 2)
    };
    let node = Node::new().set("class", series.name);
    match series.mark {
        Mark::Bar => node.add(outline(format!("M{x:.1} {:.1}v16", y - 8.0)).set("stroke-width", 3)),
        Mark::Dot => {
            node.add(Circle::new().set("cx", format!("{x:.1}")).set("cy", y).set("r", 6.5).set("fill", series.colour))
        }
        Mark::Square => node.add(outline(format!("M{:.1} {:.1}h9v9h-9z", x - 4.5, y - 4.5))),
        Mark::Triangle => node.add(outline(format!("M{x:.1} {:.1}l5.5 9.5h-11z", y - 5.5))),
        Mark::Diamond => node.add(outline(format!("M{x:.1} {:.1}l6 6l-6 6l-6 -6z", y - 6.0))),
        Mark::Cross => {
            node.add(outline(format!("M{:.1} {:.1}l9 9m0 -9l-9 9", x - 4.5, y - 4.5)).set("stroke-width", 2.5))
        }
    }
}

fn text(words: &str, x: f64, y: f64, class: &str) -> Text {
    Text::new(words).set("x", format!("{x:.1}")).set("y", format!("{y:.1}")).set("class", class)
}
