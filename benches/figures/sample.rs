//! Figures of one kind, and how they are printed.

/// Seconds, one per run.
#[derive(Default)]
pub struct Sample(Vec<f64>);

impl Sample {
    /// One more run.
    pub fn push(&mut self, seconds: f64) {
        self.0.push(seconds);
    }

    /// How many runs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The median; not a number without runs.
    #[must_use]
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            n if n % 2 == 1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        }
    }

    /// A line with median, min, max and whether the limits are kept; infinite ones are none.
    pub fn print(&self, what: &str, median_limit: f64, max_limit: f64) {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else {
            return println!("{what}: no runs");
        };
        let median = self.median();
        let figures = format!(
            "{what}: median {median:.3} s, min {min:.3} s, max {max:.3} s, {} runs",
            sorted.len()
        );
        if median_limit.is_infinite() {
            return println!("{figures}");
        }
        let met = if median <= median_limit && *max <= max_limit { "met" } else { "MISSED" };
        println!("{figures} (limits {median_limit} / {max_limit}: {met})");
    }
}
