//! What a host costs when nothing happens: memory and processor of daemon and guard, and writes to the store.

use crate::sample::Sample;
use anyhow::{Context, Result};
use haven_lab::drive::Driver;
use std::time::Duration;

/// One look.
///
/// It holds each of the daemon's regular comparisons with the machine (every 30 s) once.
const SPAN: Duration = Duration::from_secs(30);

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    for host in &lab.hosts {
        lab.online(host)?;
    }
    std::thread::sleep(Duration::from_secs(10));
    let (mut memory, mut cpu, mut writes) = (Vec::new(), Vec::new(), Sample::default());
    for _ in 0..runs {
        let (before, revision) = (ticks(lab)?, revision(lab)?);
        std::thread::sleep(SPAN);
        let (after, later) = (ticks(lab)?, self::revision(lab)?);
        for (one, two) in before.iter().zip(&after) {
            let percent = (two - one) as f64 / SPAN.as_secs_f64();
            cpu.push(percent);
        }
        memory.extend(resident(lab)?);
        writes.push((later - revision) as f64 / SPAN.as_secs_f64() / lab.hosts.len() as f64);
    }
    print("daemon + guard, resident", "MiB", &mut memory, 40.0);
    print("daemon + guard, with all that they run, processor", "% of a core", &mut cpu, 0.5);
    println!("writes to the store per host and second (not seconds):");
    writes.print("  writes", 2.5, 2.5);
    Ok(())
}

fn print(what: &str, unit: &str, values: &mut [f64], limit: f64) {
    values.sort_by(f64::total_cmp);
    let (min, median, max) = (values[0], values[values.len() / 2], values[values.len() - 1]);
    let met = if max <= limit { "met" } else { "MISSED" };
    println!(
        "{what}: median {median:.2}, min {min:.2}, max {max:.2} {unit}, {} looks (limit {limit}: {met})",
        values.len()
    );
}

/// The daemon and the guard; not what the daemon has forked and is about to become another program.
fn processes(lab: &Driver, host: &str) -> Vec<i32> {
    let found = [lab.pids(host, "haven daemon"), lab.pids(host, "haven-guard")].concat();
    let parent = |pid: i32| stat(pid).ok().and_then(|fields| fields[1].parse::<i32>().ok());
    let own = |pid: &i32| parent(*pid).is_some_and(|parent| !found.contains(&parent));
    found.iter().copied().filter(own).collect()
}

/// The fields of a process' `stat` that follow its name.
fn stat(pid: i32) -> Result<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(") ").context("a stat line")?.1;
    Ok(fields.split(' ').map(str::to_owned).collect())
}

/// Processor time per host, hundredths of a second, with that of the tools that they ran.
fn ticks(lab: &Driver) -> Result<Vec<u64>> {
    let of = |pid: i32| -> Result<u64> {
        let fields = stat(pid)?;
        fields[11..15].iter().map(|field| Ok(field.parse::<u64>()?)).sum()
    };
    lab.hosts.iter().map(|host| processes(lab, host).into_iter().map(of).sum()).collect()
}

/// Resident memory per host, MiB.
fn resident(lab: &Driver) -> Result<Vec<f64>> {
    let of = |pid: i32| -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("resident")?;
        Ok(line.split_whitespace().nth(1).context("a number")?.parse::<f64>()? / 1024.0)
    };
    lab.hosts.iter().map(|host| processes(lab, host).into_iter().map(of).sum()).collect()
}

/// The store's revision: each write counts it on.
fn revision(lab: &Driver) -> Result<i64> {
    Ok(lab.overview()?.revision)
}
