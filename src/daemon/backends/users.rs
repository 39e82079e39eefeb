//! [`UidRange`]: the users that backends may run as, so that one that has been taken over finds no other of its own kind.

use std::fmt;
use std::str::FromStr;

/// Users with consecutive numbers, each with a group of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UidRange {
    first: u32,
    last: u32,
}

/// Why something is no range of users.
#[derive(Debug, thiserror::Error)]
#[error("'{found}': expected the first and the last of some users that nobody else is, such as 700000-765535")]
pub struct UidRangeError {
    found: String,
}

impl UidRange {
    /// Whether a user is among them.
    pub fn contains(&self, uid: u32) -> bool {
        (self.first..=self.last).contains(&uid)
    }

    /// All of them, once, beginning with number `start` of them and going round.
    pub fn from(&self, start: u64) -> impl Iterator<Item = u32> {
        let (first, count) = (self.first, u64::from(self.last - self.first) + 1);
        // Less than `count`, so that it fits.
        (0..count).map(move |index| first + ((start % count + index) % count) as u32)
    }
}

impl FromStr for UidRange {
    type Err = UidRangeError;

    fn from_str(text: &str) -> Result<UidRange, UidRangeError> {
        let parse = || {
            let (first, last) = text.split_once('-')?;
            let (first, last) = (first.parse().ok()?, last.parse().ok()?);
            // Neither root, nor the number that stands for no user.
            (0 < first && first <= last && last < u32::MAX).then_some(UidRange { first, last })
        };
        parse().ok_or_else(|| UidRangeError { found: text.to_owned() })
    }
}

impl fmt::Display for UidRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_two_users_in_order_and_not_root() {
        assert_eq!("7-9".parse::<UidRange>().unwrap().to_string(), "7-9");
        assert!("1-4294967294".parse::<UidRange>().is_ok());
        for text in ["", "7", "-", "7-", "-7", "9-7", "0-7", "7-4294967295", "7-99999999999", "a-b", "7-9-11"] {
            assert!(text.parse::<UidRange>().is_err(), "{text}");
        }
    }

    #[test]
    fn all_users_come_once_whatever_the_first() {
        let range: UidRange = "7-9".parse().unwrap();
        assert_eq!(range.from(1).collect::<Vec<_>>(), [8, 9, 7]);
        assert_eq!(range.from(u64::MAX).count(), 3);
        let all: UidRange = "1-4294967294".parse().unwrap();
        assert_eq!(all.from(4_294_967_293).take(2).collect::<Vec<_>>(), [4_294_967_294, 1]);
        assert!(range.contains(7) && range.contains(9) && !range.contains(6) && !range.contains(10));
    }
}
