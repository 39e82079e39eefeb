//! Tables and texts for people: columns, times, sizes, images by the names that people gave them.

use std::time::{SystemTime, UNIX_EPOCH};

use comfy_table::{ContentArrangement, Table, presets};

use crate::daemon::api::types::ImageRef;
use crate::units::ByteCount;

/// A table with these headings, of these rows; a line says so when there are none.
pub fn table<const N: usize>(headings: [&str; N], rows: impl IntoIterator<Item = [String; N]>, none: &str) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(headings);
    for row in rows {
        table.add_row(row);
    }
    if table.row_count() == 0 {
        return format!("{none}\n");
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n") + "\n"
}

/// Names and what stands for them, one below the other.
pub fn fields<const N: usize>(fields: [(&str, String); N]) -> String {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let line = |(name, value): &(&str, String)| format!("{name:width$}  {value}").trim_end().to_owned() + "\n";
    fields.iter().map(line).collect()
}

/// An image by its newest version, or by the first digits of its digest.
pub fn image(image: &ImageRef) -> String {
    image.versions.last().cloned().unwrap_or_else(|| digits(&image.digest))
}

/// As [`image`], of an image that may not be.
pub fn image_or_dash(found: &Option<ImageRef>) -> String {
    found.as_ref().map_or("-".to_owned(), image)
}

/// As many digits of a digest as tell images apart.
pub fn digits(digest: &str) -> String {
    digest.chars().take(12).collect()
}

/// A size.
pub fn size(bytes: u64) -> String {
    ByteCount(bytes).to_string()
}

/// Words, or a dash.
pub fn list(words: &[String]) -> String {
    if words.is_empty() { "-".to_owned() } else { words.join(" ") }
}

/// How long ago something was.
pub fn ago(at: i64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_secs() as i64);
    let passed = (now - at).max(0);
    match passed {
        0..60 => format!("{passed} s ago"),
        60..3_600 => format!("{} min ago", passed / 60),
        3_600..172_800 => format!("{} h ago", passed / 3_600),
        _ => format!("{} days ago", passed / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_columns_and_say_when_they_are_empty() {
        let rows = [["a".to_owned(), "long value".to_owned()], ["bcd".to_owned(), "x".to_owned()]];
        assert_eq!(table(["ONE", "TWO"], rows, "none"), "ONE  TWO\na    long value\nbcd  x\n");
        assert_eq!(table(["ONE"], [], "there is nothing"), "there is nothing\n");
        assert_eq!(fields([("a", "1".to_owned()), ("long", "2".to_owned())]), "a     1\nlong  2\n");
    }
}
