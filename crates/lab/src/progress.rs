//! What a person sees while the lab is made: a line per step that is done, and on a terminal a bar below them.

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use std::time::{Duration, Instant};

/// So often the bar's clock is drawn anew.
const TICK: Duration = Duration::from_millis(200);

/// The steps of one command.
#[derive(Debug)]
pub struct Progress(ProgressBar);

/// A step that goes on.
#[derive(Debug)]
pub struct Step<'a> {
    progress: &'a Progress,
    what: String,
    begin: Instant,
}

impl Progress {
    /// A bar for so many steps; nothing is drawn where there is no terminal.
    #[must_use]
    pub fn new(steps: u32) -> Self {
        let bar = ProgressBar::new(u64::from(steps));
        if let Ok(style) =
            ProgressStyle::with_template("  [{bar:24}] {pos}/{len} {elapsed}  {msg}…")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.enable_steady_tick(TICK);
        Self(bar)
    }

    /// A line of its own above the bar.
    pub fn say(&self, line: &str) {
        self.0.suspend(|| println!("{line}"));
    }

    /// Begins a step; it counts once it is ended.
    pub fn begin(&self, what: &str) -> Step<'_> {
        self.0.set_message(what.to_owned());
        Step { progress: self, what: what.to_owned(), begin: Instant::now() }
    }

    /// One step from begin to end.
    ///
    /// # Errors
    /// Those of the step.
    pub fn step<T>(&self, what: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
        let step = self.begin(what);
        let result = run()?;
        step.end();
        Ok(result)
    }
}

impl Step<'_> {
    /// It is done: its line with the time that it took.
    pub fn end(self) {
        let took = self.begin.elapsed().as_secs_f64();
        self.progress.0.inc(1);
        self.progress.say(&format!("  {} ({took:.1} s)", self.what));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
