//! A rolling restart of a service under load: no request may fail.

use crate::address::{ADDRESS, SERVICE, well};
use anyhow::Result;
use haven_lab::{
    asking::{Asking, OFTEN, longest_gap},
    drive::Driver,
};
use std::time::Duration;

const BEFORE: Duration = Duration::from_secs(5);

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    lab.apply(SERVICE, &["--wait", "--timeout", "300"])?;
    let (mut total, mut failed) = (0, 0);
    for run in 0..runs {
        well(lab)?;
        let asking = Asking::start(lab, ADDRESS, OFTEN)?;
        // What the guests cannot answer without any update is not the update's doing.
        std::thread::sleep(BEFORE);
        let begin = std::time::Instant::now();
        lab.haven(&["service", "restart", "hello", "--wait", "--timeout", "240"])?;
        well(lab)?;
        let asked = asking.end()?;
        let bad = asked.iter().filter(|a| !a.good).count();
        let t = |i: std::time::Instant| {
            if i < begin { -(begin - i).as_secs_f64() } else { (i - begin).as_secs_f64() }
        };
        let mut hist = std::collections::BTreeMap::<(i64, String), usize>::new();
        for a in &asked {
            *hist.entry((t(a.begin).floor() as i64, format!("{:?}", a.how))).or_default() += 1;
        }
        for ((s, h), n) in hist {
            println!("    {s} {h} {n}");
        }
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
