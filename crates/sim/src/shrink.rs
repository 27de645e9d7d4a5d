//! Makes a run that breaks an invariant shorter: fewer faults, as long as the same invariant breaks.

use crate::{
    cluster::Broken,
    run::{self, Verdict},
    scenario::{Event, Scenario},
};

/// How many runs it may take.
const RUNS: u32 = 400;

/// The shortest that was found.
pub struct Shrunk {
    /// The run.
    pub scenario: Scenario,
    /// How it ends.
    pub verdict: Verdict,
    /// How many runs were tried.
    pub tried: u32,
}

/// The invariant that a violation names.
fn invariant(violation: &str) -> &str {
    violation.split(':').next().unwrap_or(violation)
}

struct Search {
    seed: u64,
    broken: Option<Broken>,
    invariant: String,
    best: Shrunk,
}

impl Search {
    /// Whether it breaks the same invariant; then it is the best so far.
    fn take(&mut self, scenario: Scenario) -> anyhow::Result<bool> {
        if self.best.tried >= RUNS {
            return Ok(false);
        }
        self.best.tried += 1;
        let verdict = run::scenario(&scenario, self.seed, self.broken)?;
        let same = |what: &String| invariant(what) == self.invariant;
        let breaks = verdict.violations.iter().any(same);
        if breaks {
            (self.best.scenario, self.best.verdict) = (scenario, verdict);
        }
        Ok(breaks)
    }

    /// Leaves out ever smaller parts of the faults, until none of them can be left out (delta debugging: Zeller,
    /// Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002).
    fn leave_out(&mut self) -> anyhow::Result<()> {
        let mut part = self.best.scenario.events.len().div_ceil(2).max(1);
        loop {
            let (mut at, mut left_out) = (0, false);
            while at < self.best.scenario.events.len() {
                let mut fewer = self.best.scenario.clone();
                let end = (at + part).min(fewer.events.len());
                fewer.events.drain(at..end);
                // What follows has moved up when it was left out.
                match self.take(fewer)? {
                    true => left_out = true,
                    false => at += part,
                }
            }
            if part == 1 && !left_out {
                return Ok(());
            }
            part = part.div_ceil(2);
        }
    }
}

/// Shrinks a run whose verdict broke something; as it is when nothing can be left out.
///
/// # Errors
/// When the simulator itself cannot run.
pub fn shrink(
    scenario: &Scenario,
    verdict: &Verdict,
    broken: Option<Broken>,
) -> anyhow::Result<Shrunk> {
    let invariant = verdict.violations.first().map_or("", |what| invariant(what)).to_owned();
    let best = Shrunk { scenario: scenario.clone(), verdict: verdict.clone(), tried: 0 };
    let mut search = Search { seed: verdict.seed, broken, invariant, best };
    search.take(Scenario { empties: None, ..scenario.clone() })?;
    search.leave_out()?;
    // What comes after the last fault may be needed, and most of the time is not.
    let last = search.best.scenario.events.last().map_or(0.0, |event: &Event| event.at);
    let soon = Scenario { lasts: last.ceil() as u64 + 10, ..search.best.scenario.clone() };
    if soon.lasts < search.best.scenario.lasts {
        search.take(soon)?;
        search.leave_out()?;
    }
    Ok(search.best)
}
