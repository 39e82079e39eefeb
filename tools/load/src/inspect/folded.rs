//! Sampled stacks, folded: a line for each different one, its frames from the outermost, and then how much of the time it had.

use std::collections::HashMap;

/// How much of the time each symbol was the innermost frame, in whatever unit the samples are.
#[derive(Debug)]
pub struct SelfTime {
    /// From the most to the least.
    pub symbols: Vec<(String, u64)>,
    pub whole: u64,
}

impl SelfTime {
    /// Of the whole, in per cent.
    pub fn share(&self, own: u64) -> f64 {
        own as f64 * 100.0 / self.whole as f64
    }
}

pub fn self_time(folded: &str) -> SelfTime {
    let mut symbols = HashMap::new();
    for line in folded.lines() {
        // A frame may have blanks of its own.
        let Some((stack, count)) = line.rsplit_once(' ') else { continue };
        let Ok(count) = count.parse::<u64>() else { continue };
        let innermost = stack.rsplit(';').next().unwrap_or(stack);
        *symbols.entry(innermost.to_owned()).or_insert(0) += count;
    }
    let whole = symbols.values().sum();
    let mut symbols: Vec<_> = symbols.into_iter().collect();
    // By name where they are equal, so that the same samples always read the same.
    symbols.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    SelfTime { symbols, whole }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_frame_has_the_time() {
        let time =
            self_time("worker;serve;copy 30\nworker;serve 5\nworker;wait;<a as b>::copy it 5\nworker;other;copy 10\n");
        assert_eq!(time.whole, 50);
        let expected = [("copy", 40), ("<a as b>::copy it", 5), ("serve", 5)];
        assert!(time.symbols.iter().map(|(name, count)| (name.as_str(), *count)).eq(expected), "{time:?}");
        assert!((time.share(40) - 80.0).abs() < 1e-9);
        assert!(self_time("").symbols.is_empty());
    }
}
