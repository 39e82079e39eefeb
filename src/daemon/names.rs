//! Names of volumes, VMs, groups, channels and versions: what one may look like, and which one was meant.

use super::error::Error;

/// Longest name of a volume, a VM or a group: the path of a socket, which has two of them, is limited to 107 bytes.
pub const NAME_BYTES_MAX: usize = 40;
/// Longest name of a channel or a version.
pub const PATH_NAME_BYTES_MAX: usize = 64;
/// Longest name of an add-on: with `addon-` before it, it is a disk's serial number.
pub const ADDON_BYTES_MAX: usize = 14;

/// How much of a name that was refused is repeated to who sent it.
const SHOWN_BYTES_MAX: usize = 60;

fn is_plain(name: &str, bytes_max: usize) -> bool {
    name.len() <= bytes_max
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// Sees that `name` can be the name of a `kind` (`volume`, `VM`, `group`).
pub fn check_name(kind: &'static str, name: &str) -> Result<(), Error> {
    check(
        kind,
        name,
        is_plain(name, NAME_BYTES_MAX),
        "up to 40 letters, digits, '-', '_' and '.', with a letter or digit first",
    )
}

/// Sees that `name` can be the name of an add-on.
pub fn check_addon(name: &str) -> Result<(), Error> {
    check(
        "add-on",
        name,
        is_plain(name, ADDON_BYTES_MAX),
        "up to 14 letters, digits, '-', '_' and '.', with a letter or digit first",
    )
}

/// Sees that `name` can be a version.
pub fn check_version(name: &str) -> Result<(), Error> {
    let fine = name.len() <= PATH_NAME_BYTES_MAX
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'+' | b'~' | b':'));
    check("version", name, fine, "up to 64 letters, digits and '-_.+~:', with a letter or digit first")
}

/// Sees that `name` can be the name of a channel: names with slashes between them.
pub fn check_channel(name: &str) -> Result<(), Error> {
    let fine = name.len() <= PATH_NAME_BYTES_MAX && name.split('/').all(|part| is_plain(part, PATH_NAME_BYTES_MAX));
    check(
        "channel",
        name,
        fine,
        "up to 64 letters, digits, '-', '_' and '.', in parts with '/' between them, such as debian-12/stable",
    )
}

fn check(kind: &'static str, name: &str, fine: bool, expected: &'static str) -> Result<(), Error> {
    if fine { Ok(()) } else { Err(Error::Name { kind, found: shown(name), expected }) }
}

/// A name as it can be repeated in a message, whatever it is.
pub fn shown(name: &str) -> String {
    let cut: String = name
        .chars()
        .map(|character| if character.is_control() { '?' } else { character })
        .take(SHOWN_BYTES_MAX)
        .collect();
    if cut.len() < name.len() { format!("{cut}... ({} bytes)", name.len()) } else { cut }
}

/// A name as it stands in records: whole, unless it is none that can be.
pub fn recorded(name: &str) -> String {
    if name.len() <= PATH_NAME_BYTES_MAX && !name.contains(char::is_control) { name.to_owned() } else { shown(name) }
}

/// The name among `names` that is so near to `name` that it may have been meant.
pub fn nearest(name: &str, names: impl IntoIterator<Item = String>) -> Option<String> {
    const NEAR: f64 = 0.75;
    if name.len() > PATH_NAME_BYTES_MAX {
        return None;
    }
    let scored = names.into_iter().map(|other| (strsim::jaro_winkler(name, &other), other));
    scored.filter(|(score, _)| *score >= NEAR).max_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, other)| other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_sockets_and_files_can_hold() {
        for name in ["a", "web-1", "1.2_3", &"x".repeat(40)] {
            assert!(check_name("volume", name).is_ok(), "{name}");
        }
        for name in ["", ".", "..", "-a", "a/b", "a b", "ä", "a\0", "a\n", &"x".repeat(41), &"x".repeat(10_000)] {
            let error = check_name("volume", name).unwrap_err().to_string();
            assert!(error.len() < 300, "{error}");
        }
    }

    #[test]
    fn records_have_names_that_can_be() {
        let digest = "ab".repeat(32);
        for name in ["", "debian-12/stable", digest.as_str()] {
            assert_eq!(recorded(name), name);
        }
        assert_eq!(recorded("a\nb"), "a?b");
        assert!(recorded(&"~".repeat(10_000)).len() < 100);
    }

    #[test]
    fn channels_have_parts() {
        assert!(check_channel("debian-12/stable").is_ok());
        for name in ["", "/", "a/", "/a", "a//b", "a/../b", "../a"] {
            assert!(check_channel(name).is_err(), "{name}");
        }
    }

    #[test]
    fn the_nearest_name_is_found_if_there_is_one() {
        let names = || ["web-1", "web-2", "database"].map(str::to_owned);
        assert_eq!(nearest("databse", names()).as_deref(), Some("database"));
        assert_eq!(nearest("zzz", names()), None);
    }
}
