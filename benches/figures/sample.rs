//! Figures of one kind, and how they are printed.

/// Seconds, one per run.
#[derive(Default)]
pub struct Sample(Vec<f64>);

impl Sample {
    /// One more run.
    pub fn push(&mut self, seconds: f64) {
        self.0.push(seconds);
    }

    /// A line with median, min, max and whether the limits are kept.
    pub fn print(&self, what: &str, median_limit: f64, max_limit: f64) {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else {
            return println!("{what}: no runs");
        };
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        let met = if median <= median_limit && *max <= max_limit { "met" } else { "MISSED" };
        println!(
            "{what}: median {median:.3} s, min {min:.3} s, max {max:.3} s, {} runs (limits {median_limit} / {max_limit}: {met})",
            sorted.len()
        );
    }
}
