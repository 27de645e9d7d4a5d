//! A guest that moves live: the longest gap that a client sees who asks it every 10 ms, beside what QEMU itself says;
//! and a service of one member behind its address, under a load that asks every 40 ms.

use crate::sample::Sample;
use anyhow::{Context, Result};
use haven_lab::{
    asking::{Asking, OFTEN, STEADILY, longest_gap},
    drive::Driver,
};
use std::time::{Duration, Instant};

/// One member behind an address.
const SERVICE: &str = "kind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\n\
    kind: Service\nname: hello\nreplicas: 1\ntemplate:\n  spec:\n    image: tiny\n    memory: 128MiB\n    networks:\n    - network: front\n\
    check:\n  mode: http\n  port: 80\nfrontend:\n  address: 10.88.0.100\n  port: 80\n  mode: http\n";
/// Where it answers.
const ADDRESS: &str = "10.88.0.100:80";
/// What stands still longer than this is no live migration of a tiny guest.
const LIMIT: f64 = 0.150;

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    lab.apply(SERVICE, &["--wait", "--timeout", "300"])?;
    let (mut gaps, mut downtimes, mut wholes) =
        (Sample::default(), Sample::default(), Sample::default());
    for run in 0..runs {
        let asking = Asking::start(lab, ADDRESS, OFTEN)?;
        std::thread::sleep(Duration::from_secs(1));
        let (took, downtime) = migrate(lab)?;
        std::thread::sleep(Duration::from_secs(1));
        let asked = asking.end()?;
        let (gap, bad) = (longest_gap(&asked), asked.iter().filter(|a| !a.good).count());
        println!(
            "  run {run}: gap {gap:.3} s, QEMU's downtime {downtime:.3} s, {took:.2} s in all, {bad} of {} questions failed",
            asked.len()
        );
        gaps.push(gap);
        downtimes.push(downtime);
        wholes.push(took);
    }
    gaps.print("live migration, a new connection every 10 ms -> longest gap", LIMIT, LIMIT);
    downtimes.print("the same, QEMU's own downtime", f64::INFINITY, f64::INFINITY);
    wholes.print("the same, `haven vm migrate` in all", f64::INFINITY, f64::INFINITY);
    let asking = Asking::start(lab, ADDRESS, STEADILY)?;
    for _ in 0..runs {
        migrate(lab)?;
        std::thread::sleep(Duration::from_millis(500));
    }
    let asked = asking.end()?;
    let bad = asked.iter().filter(|a| !a.good).count();
    println!("{runs} moves under load: {bad} of {} requests failed (wanted: none)", asked.len());
    Ok(())
}

/// Moves the member; how long the whole took, and QEMU's own word for its downtime, seconds.
fn migrate(lab: &Driver) -> Result<(f64, f64)> {
    let begin = Instant::now();
    let said = lab.haven(&["vm", "migrate", "hello-1"])?;
    let took = begin.elapsed().as_secs_f64();
    let downtime =
        said.split("kept it stopped for ").nth(1).and_then(|rest| rest.split("ms").next());
    let downtime: f64 = downtime.context("it moved, with QEMU's downtime")?.parse()?;
    Ok((took, downtime / 1000.0))
}
