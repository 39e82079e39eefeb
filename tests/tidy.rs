//! Style that matters: what a reader may rely on in every file.

use std::fs;
use std::path::{Path, PathBuf};

/// What lies at the top of the repository, of what is not hidden.
const TOP: [&str; 7] = ["Cargo.lock", "Cargo.toml", "LICENSE", "README.md", "src", "tests", "tools"];
/// What a build or an editor leaves there, and no one commits.
const TOP_LEFT_BEHIND: [&str; 1] = ["target"];

/// Where `unsafe` may be. The last is a client that takes raw addresses as buffers.
const UNSAFE: [&str; 3] = ["src/sys/", "tools/load/src/sys.rs", "tests/session/driver.rs"];

/// Names of layers that the files under a path do not mention in their code.
const ABSENT: [(&str, &[&str]); 8] = [
    ("src/units.rs", &["sys", "digest", "block", "vhost_user", "store", "daemon", "cli", "virtio"]),
    ("src/digest.rs", &["block", "vhost_user", "store", "daemon", "cli", "virtio"]),
    ("src/sys/", &["digest", "block", "vhost_user", "store", "daemon", "cli", "virtio"]),
    ("src/block/", &["vhost_user", "store", "daemon", "cli", "virtio", "vhost"]),
    ("src/store/", &["block", "vhost_user", "daemon", "cli", "virtio", "vhost"]),
    ("src/vhost_user/", &["store", "daemon", "cli"]),
    ("src/daemon/", &["cli"]),
    ("src/bin/pando-blk/", &["store", "daemon", "cli"]),
];

const LINES_MAX: usize = 700;

/// A source file.
struct Source {
    /// From the top of the repository.
    path: String,
    text: String,
}

impl Source {
    /// Its lines with their numbers, without comments that take whole lines.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().map(|(index, line)| (index + 1, line));
        lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
    }
}

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files of the repository, in a definite order.
fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    for directory in ["src", "tests", "tools"] {
        collect(&top().join(directory), &mut paths);
    }
    paths.sort();
    assert!(paths.len() > 50, "the files were found");
    let read = |path: &PathBuf| Source {
        path: path.strip_prefix(top()).unwrap().to_str().unwrap().to_owned(),
        text: fs::read_to_string(path).unwrap(),
    };
    paths.iter().map(read).collect()
}

fn collect(directory: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        if path.is_dir() && name != "target" {
            collect(&path, paths);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

/// Fails with all that was found, a line each.
#[track_caller]
fn is_empty(found: Vec<String>, rule: &str) {
    assert!(found.is_empty(), "{rule}:\n  {}", found.join("\n  "));
}

/// Whether `word` stands in `line` by itself, and not within a longer name.
fn has_word(line: &str, word: &str) -> bool {
    let part_of_name = |character: char| character.is_alphanumeric() || character == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(part_of_name) && !line[at + word.len()..].starts_with(part_of_name))
}

/// Whether a line of code refers to a layer: by a path through it, by an import, or as a crate of its family.
fn mentions(line: &str, layer: &str) -> bool {
    let starts_name = || line.match_indices(layer).any(|(at, _)| !line[..at].ends_with(char::is_alphanumeric));
    match layer {
        // Crates of several names.
        "virtio" => starts_name(),
        "vhost" => has_word(line, "vhost") && line.contains("vhost::"),
        layer => {
            let is_path = ["crate::", "pando::"].iter().any(|root| {
                line.match_indices(root).any(|(at, _)| {
                    let rest = &line[at + root.len()..];
                    rest.strip_prefix(layer)
                        .is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
                })
            });
            // Groups would hide what is in them from this test.
            is_path || line.contains(&format!("super::{layer}::")) || line.contains("use crate::{")
        }
    }
}

#[test]
fn every_file_says_what_it_is() {
    let without = sources().into_iter().filter(|source| !source.text.starts_with("//! "));
    is_empty(without.map(|source| source.path).collect(), "files that do not open with //!");
}

#[test]
fn unsafe_is_in_one_place() {
    let mut found = Vec::new();
    for source in sources() {
        if !UNSAFE.iter().any(|allowed| source.path.starts_with(allowed)) {
            let lines = source.code().filter(|(_, line)| has_word(line, concat!("un", "safe")));
            found.extend(lines.map(|(number, _)| format!("{}:{number}", source.path)));
        }
    }
    is_empty(found, "this word outside of its places");
}

#[test]
fn every_unsafe_block_has_its_proof() {
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| source.path.starts_with("src/")) {
        let lines: Vec<&str> = source.text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let opens = line.contains(concat!("un", "safe {")) || line.contains(concat!("un", "safe impl"));
            // A statement may begin a few lines ahead of the block in it.
            let near = &lines[index.saturating_sub(6)..=index];
            if opens && !line.trim_start().starts_with("//") && !near.iter().any(|line| line.contains("// SAFETY: ")) {
                found.push(format!("{}:{}", source.path, index + 1));
            }
        }
    }
    is_empty(found, "blocks without a SAFETY comment");
}

#[test]
fn layers_know_only_what_is_below_them() {
    let mut found = Vec::new();
    for source in sources() {
        for (_, layers) in ABSENT.iter().filter(|(path, _)| source.path.starts_with(path)) {
            for (number, line) in source.code() {
                let mentioned = layers.iter().filter(|layer| mentions(line, layer));
                found.extend(mentioned.map(|layer| format!("{}:{number}: {layer}", source.path)));
            }
        }
    }
    is_empty(found, "layers that a file must not know");
}

#[test]
fn the_rules_about_layers_see_what_they_are_to_see() {
    for line in [
        "use crate::cli::output;",
        "crate::cli::run()",
        "pub use pando::cli;",
        "use super::super::cli::output;",
        "use crate::{cli, sys};",
    ] {
        assert!(mentions(line, "cli"), "{line}");
    }
    for line in ["use clippy::cli;", "let client = 3;", "crate::client::run()", "click()"] {
        assert!(!mentions(line, "cli"), "{line}");
    }
    assert!(mentions("use virtio_bindings::virtio_blk;", "virtio"));
    assert!(mentions("use vhost::vhost_user::Frontend;", "vhost"));
    assert!(!mentions("pub mod vhost_user;", "vhost"));
}

#[test]
fn files_stay_small_enough_to_read() {
    let long = sources().into_iter().filter_map(|source| {
        let lines = source.text.lines().count();
        (lines > LINES_MAX).then(|| format!("{}: {lines}", source.path))
    });
    is_empty(long.collect(), "files of more than 700 lines");
}

#[test]
fn nothing_is_left_for_later() {
    let words = [
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("#[ign", "ore"),
    ];
    let mut found = Vec::new();
    for source in sources() {
        for (index, line) in source.text.lines().enumerate() {
            let here = words.iter().filter(|word| line.contains(**word));
            found.extend(here.map(|word| format!("{}:{}: {word}", source.path, index + 1)));
        }
    }
    is_empty(found, "things that wait for somebody");
}

#[test]
fn the_top_of_the_repository_holds_what_it_is_to_hold() {
    let names = fs::read_dir(top()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let other = names.filter(|name| {
        let known = TOP.contains(&name.as_str()) || TOP_LEFT_BEHIND.contains(&name.as_str());
        !known && !name.starts_with('.')
    });
    is_empty(other.collect(), "names that are not to be there");
}
