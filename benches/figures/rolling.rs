//! A rolling restart of a service under load: no request may fail.

use crate::address::{ADDRESS, SERVICE, well};
use anyhow::Result;
use haven_lab::{
    asking::{Asking, longest_gap},
    drive::Driver,
};
use std::time::Duration;

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    lab.apply(SERVICE, &["--wait", "--timeout", "300"])?;
    let (mut total, mut failed) = (0, 0);
    for run in 0..runs {
        well(lab)?;
        let before = lab.haven(&["vm", "ls"])?;
        let asking = Asking::start(lab, ADDRESS)?;
        lab.haven(&["service", "restart", "hello"])?;
        // Both members are new and ready, and the old ones gone.
        let new = |lab: &Driver| {
            let now = lab.haven(&["vm", "ls"]).unwrap_or_default();
            let first = |text: &str| -> Vec<String> {
                let words = text.lines().skip(1).filter_map(|l| l.split_whitespace().next());
                words.map(str::to_owned).collect()
            };
            let (old, now) = (first(&before), first(&now));
            now.len() == 2 && now.iter().all(|name| !old.contains(name))
        };
        lab.wait("the rolling restart is over", Duration::from_secs(240), new)?;
        well(lab)?;
        let asked = asking.end()?;
        let bad = asked.iter().filter(|a| !a.good).count();
        println!(
            "  run {run}: {} requests, {bad} failed, longest gap {:.3} s",
            asked.len(),
            longest_gap(&asked)
        );
        total += asked.len();
        failed += bad;
    }
    let met = if failed == 0 { "met" } else { "MISSED" };
    println!(
        "rolling restart under load: {failed} of {total} requests failed in {runs} runs (limit 0: {met})"
    );
    Ok(())
}
