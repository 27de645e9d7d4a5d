//! Planned work: a host is emptied and nobody outside notices, and what breaks meanwhile makes no second copy. And a
//! rehearsal says beforehand what a power cut then does.

use crate::{
    lab::{HOSTS, Lab},
    witness::Witness,
};
use anyhow::{Context, Result, bail};
use haven_lab::asking::{Asking, STEADILY, failures};
use haven_model::{Incident, api::Rehearsal};
use std::time::Duration;

/// Two members behind an address.
const PAIR: &str = "kind: Service\nname: pair\nreplicas: 2\ntemplate:\n  spec:\n    image: tiny\n    memory: 128MiB\n    networks:\n    - network: front\ncheck:\n  mode: http\n  port: 80\nfrontend:\n  address: 10.88.0.101\n  port: 80\n  mode: http\n";

/// The host that holds the address of the service.
fn holder(lab: &Lab) -> Result<String> {
    let services = lab.overview()?.services;
    let holder = services.first().map(|service| service.holder.clone());
    holder.context("nobody holds the address")
}

/// A host that runs a member of the service and does not hold its address.
fn beside_the_address(lab: &Lab) -> Result<String> {
    let holder = holder(lab)?;
    for member in ["pair-1", "pair-2"] {
        let host = lab.host_of(member)?;
        if host != holder {
            return Ok(host);
        }
    }
    bail!("both members run on {holder}, which holds the address")
}

/// A host is emptied under load, and gets back what it had; then the one that holds the address.
pub fn drained(lab: &mut Lab, witness: &Witness) -> Result<()> {
    lab.apply(PAIR, &["--wait", "--timeout", "120"])?;
    witness.moves(true);
    let before = witness.newest();
    let lost = there_and_back(lab, &beside_the_address(lab)?)?;
    if !lost.is_empty() {
        bail!("a drain under load lost questions: {lost}");
    }
    // An address that moves may cost a question that is under way: known fault 37.
    let holder = holder(lab)?;
    let lost = there_and_back(lab, &holder)?;
    println!("  {holder} held the address; questions that were lost: {lost:?}");
    for (vm, copy) in witness.newest() {
        if before.get(&vm).is_none_or(|before| before.boot != copy.boot) {
            bail!("{vm} was started anew instead of moved");
        }
    }
    lab.haven(&["delete", "service/pair", "--wait"])?;
    alone(lab, witness)
}

/// Empties a host under load and brings back what it had; how questions failed meanwhile.
fn there_and_back(lab: &Lab, host: &str) -> Result<String> {
    let at = |lab: &Lab| -> Result<Vec<(&str, String)>> {
        let vms = ["tick-1", "tick-2", "pair-1", "pair-2"];
        vms.into_iter().map(|vm| Ok((vm, lab.host_of(vm)?))).collect()
    };
    let places = at(lab)?;
    let asking = Asking::start(lab, "10.88.0.101:80", STEADILY)?;
    std::thread::sleep(Duration::from_secs(1));
    let said = lab.haven(&["host", "drain", host, "--wait", "--timeout", "180"])?;
    println!("  {}", said.lines().last().unwrap_or_default());
    let left = lab.pids(host, "guest=");
    if !left.is_empty() || holder(lab)? == host {
        bail!("{host} is not empty: processes {left:?}, the address on {}", holder(lab)?);
    }
    let shown = lab.haven(&["host", "ls"])?;
    if !shown.lines().any(|line| line.contains(host) && line.contains("drained")) {
        bail!("`haven host ls` does not say that {host} is drained:\n{shown}");
    }
    lab.haven(&["host", "undrain", host, "--bring-back", "--wait", "--timeout", "180"])?;
    std::thread::sleep(Duration::from_secs(1));
    let asked = asking.end()?;
    let bad = asked.iter().filter(|a| !a.good).count();
    println!("  {} questions while {host} was drained and came back, {bad} failed", asked.len());
    if at(lab)? != places {
        bail!("not all is back where it was: {places:?}, now {:?}", at(lab)?);
    }
    Ok(if bad == 0 { String::new() } else { failures(&asked) })
}

/// After a while there is one process for each VM.
fn alone(lab: &Lab, witness: &Witness) -> Result<()> {
    lab.wait("each VM has one process", Duration::from_secs(20), |_| witness.running() == 2)?;
    witness.moves(false);
    Ok(())
}

/// A host is drained, and the one to which its guest moves loses its power.
pub fn power_cut(lab: &mut Lab, witness: &Witness) -> Result<()> {
    witness.moves(true);
    let host = lab.host_of("tick-1")?;
    lab.haven(&["host", "drain", &host])?;
    let mut to = String::new();
    let others: Vec<&str> = HOSTS.into_iter().filter(|other| *other != host).collect();
    let begin = std::time::Instant::now();
    while to.is_empty() {
        let takes = |other: &&&str| !lab.pids(other, "guest=tick-1").is_empty();
        to = others.iter().find(takes).map(ToString::to_string).unwrap_or_default();
        if begin.elapsed() > Duration::from_secs(30) {
            bail!("no host makes ready to take tick-1 from {host}");
        }
    }
    lab.haven(&["lab", "kill", &to])?;
    println!("  {to} lost its power while it took tick-1 from {host}, which is drained");
    let third = others.into_iter().find(|other| *other != to).unwrap_or_default();
    lab.wait("both guests count on the third host", Duration::from_secs(90), |_| {
        ["tick-1", "tick-2"].into_iter().all(|vm| witness.counts_now(vm, third))
    })?;
    lab.haven(&["host", "drain", &host, "--wait", "--timeout", "60"])?;
    witness.verdict()?;
    lab.haven(&["lab", "start", &to])?;
    lab.haven(&["host", "undrain", &host])?;
    lab.all_well(witness)?;
    alone(lab, witness)
}

/// Cuts the power of a host and waits until what it ran counts elsewhere; the incident of it.
fn cut(lab: &Lab, witness: &Witness, host: &str) -> Result<Incident> {
    let incidents = || -> Result<Vec<Incident>> {
        Ok(serde_json::from_str(&lab.haven(&["incidents", "ls", "-o", "json"])?)?)
    };
    let before = incidents()?.last().map_or(0, |incident| incident.number);
    lab.haven(&["lab", "kill", host])?;
    lab.wait("the incident is over", Duration::from_secs(60), |_| {
        incidents()
            .is_ok_and(|all| all.iter().any(|one| one.number > before && one.closed_ms.is_some()))
    })?;
    let all = incidents()?;
    lab.haven(&["lab", "start", host])?;
    lab.all_well(witness)?;
    let one = all.into_iter().find(|one| one.number > before);
    one.context("the power cut made no incident")
}

/// After a power cut has been measured, a rehearsal says where the guests of the next one go, and when.
pub fn rehearsed(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let host = lab.host_of("tick-1")?;
    cut(lab, witness, &host)?;
    witness.forget();
    let host = lab.host_of("tick-1")?;
    let told = lab.haven(&["rehearse", "fail", &host, "-o", "json"])?;
    let told: Rehearsal = serde_json::from_str(&told)?;
    let real = cut(lab, witness, &host)?;
    let failed = real.steps.iter().find(|step| step.phase == "failed").map_or(0, |s| s.at_ms);
    if told.vms.is_empty() {
        bail!("the rehearsal names no VM, and {host} ran tick-1");
    }
    for vm in &told.vms {
        let name = vm.vm.as_str();
        let now = lab.host_of(name)?;
        let started = real
            .steps
            .iter()
            .find(|step| step.phase == "started" && step.object.name == vm.vm)
            .with_context(|| format!("{name} was rehearsed and did not start anew: {real:?}"))?;
        let (said, took) = (vm.after_ms.unwrap_or(0) as f64, (started.at_ms - failed) as f64);
        println!(
            "  {name}: rehearsed on {:?} after {said} ms, really on {now} after {took} ms",
            vm.to
        );
        if vm.to.as_ref().map(ToString::to_string).as_ref() != Some(&now) {
            bail!("{name} was to go to {:?} and is on {now}", vm.to);
        }
        if (said - took).abs() > 0.2 * took {
            bail!("{name} was to run after {said} ms and took {took} ms");
        }
    }
    let restarted = real.steps.iter().filter(|step| step.phase == "started").count();
    if restarted != told.vms.len() {
        bail!("{} VMs were rehearsed and {restarted} restarted", told.vms.len());
    }
    Ok(())
}
