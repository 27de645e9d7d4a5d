//! A rolling restart of a service under load: no request may fail.

use crate::address::{ADDRESS, SERVICE, well};
use anyhow::{Context, Result};
use haven_lab::{
    asking::{Asked, Asking, failures, longest_gap},
    drive::Driver,
};
use std::time::{Duration, Instant};

/// The load alone, before the restart: what the guests of this machine cannot answer then is not the restart's doing,
/// and the figure says so.
const ALONE: Duration = Duration::from_secs(5);

/// A request each time, with a new connection. Four times as many leave two cores that emulate three guests, one of
/// which boots, nothing to spare: then members that nobody touches stop taking connections for seconds
/// (`benches/README.md`), and the restart is not what is measured.
const LOAD: Duration = Duration::from_millis(40);

/// A request fails when it is not answered within this. On two cores that emulate three guests, one of which boots,
/// an answer may take longer than a second; how long the slowest took is printed.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest time that a good answer took, seconds.
fn slowest(asked: &[Asked]) -> f64 {
    let times = asked.iter().filter(|a| a.good).map(|a| (a.end - a.begin).as_secs_f64());
    times.fold(0.0, f64::max)
}

/// Time that all cores together had nothing to do, seconds.
fn idle() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let ticks: f64 = stat.split_whitespace().nth(4).context("idle time")?.parse()?;
    Ok(ticks / 100.0)
}

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    lab.apply(SERVICE, &["--wait", "--timeout", "300"])?;
    let (mut total, mut failed) = (0, 0);
    for run in 0..runs {
        well(lab)?;
        let asking = Asking::patient(lab, ADDRESS, LOAD, PATIENCE)?;
        std::thread::sleep(ALONE);
        let idle = idle()?;
        let begin = Instant::now();
        lab.haven(&["service", "restart", "hello", "--wait", "--timeout", "240"])?;
        let took = begin.elapsed().as_secs_f64();
        let unused = (self::idle()? - idle) / took;
        let asked = asking.end()?;
        let (alone, during): (Vec<Asked>, Vec<Asked>) = asked.iter().partition(|a| a.end < begin);
        println!(
            "  run {run}: {took:.1} s, {unused:.2} cores unused, {} requests, longest gap {:.3} s, slowest answer {:.3} s ({:.3} s before), failed: {} (of {} before: {})",
            during.len(),
            longest_gap(&during),
            slowest(&during),
            slowest(&alone),
            failures(&during),
            alone.len(),
            failures(&alone),
        );
        total += during.len();
        failed += during.iter().filter(|a| !a.good).count();
    }
    let met = if failed == 0 { "met" } else { "MISSED" };
    println!(
        "rolling restart under load: {failed} of {total} requests failed in {runs} runs (limit 0: {met})"
    );
    Ok(())
}
