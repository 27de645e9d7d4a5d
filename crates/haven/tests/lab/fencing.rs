//! Fencing by a power controller, as a person sets it up: the lab machine offers one for each host.

use crate::{
    lab::{HOSTS, Lab},
    witness::Witness,
};
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

/// The record of a host, with its power control or without.
fn record(number: usize, power: &str) -> String {
    format!("kind: Host\nname: host{number}\naddress: 10.88.0.{number}\n{power}")
}

fn power(number: usize, password: &str) -> String {
    let url = format!("http://10.88.0.254:8000/redfish/v1/Systems/host{number}");
    record(number, &format!("power:\n  url: {url}\n  user: lab\n  password: {password}\n"))
}

/// A test of fencing tells on and off and a wrong password and switches nothing; a host that loses its power is
/// recovered as soon as its controller says that it is off.
pub fn by_power(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let host = lab.host_of("tick-1")?;
    let fence = |lab: &Lab| lab.command(&["host", "fence", "test", &host]).output();
    for number in 1..=3 {
        lab.apply(&power(number, "wrong"), &[])?;
    }
    let wrong = fence(lab)?;
    let said = String::from_utf8_lossy(&wrong.stderr).into_owned();
    ensure!(!wrong.status.success() && said.contains("refuses the user `lab`"), "{said}");
    for number in 1..=3 {
        lab.apply(&power(number, "lab"), &[])?;
    }
    let before = witness.newest()["tick-1"].boot.clone();
    let told = fence(lab)?;
    let said = String::from_utf8_lossy(&told.stdout).into_owned();
    ensure!(told.status.success(), "{said}{}", String::from_utf8_lossy(&told.stderr));
    for other in HOSTS.into_iter().filter(|other| *other != host) {
        let reads = |line: &str| line.starts_with(other) && line.contains(" on ");
        ensure!(said.lines().any(reads), "{other} reads no power: {said}");
    }
    std::thread::sleep(Duration::from_secs(1));
    ensure!(witness.newest()["tick-1"].boot == before, "a test of fencing disturbed a guest");
    let begin = Instant::now();
    lab.haven(&["lab", "kill", &host])?;
    let (from, limit) = (host.clone(), Duration::from_secs(90));
    witness.until(limit, "tick-1 runs elsewhere", move |newest| {
        newest.get("tick-1").is_some_and(|copy| copy.host != from)
    })?;
    println!(
        "  the new copy's first sign {:.2} s after the power cut",
        begin.elapsed().as_secs_f64()
    );
    let told = lab.overview()?;
    let line = told.hosts.iter().find(|line| line.name == host);
    let state = line.map(|line| line.state.clone()).unwrap_or_default();
    ensure!(state == "lost (powered-off)", "{host} is {state}");
    let told = String::from_utf8_lossy(&fence(lab)?.stdout).into_owned();
    ensure!(told.contains(" off "), "{told}");
    lab.haven(&["lab", "start", &host])?;
    lab.online(&host)?;
    for number in 1..=3 {
        lab.apply(&record(number, ""), &[])?;
    }
    Ok(())
}
