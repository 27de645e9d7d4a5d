//! A guest that moves live, seen from outside: how long its kernel does not answer, knocked at every 10 ms from a third
//! host; how long a client of its service behind the balancer sees no answer, who asks every 10 ms with a new
//! connection; what QEMU itself says; and how many questions fail under a steady load.

use crate::sample::Sample;
use anyhow::{Context, Result, bail};
use haven_lab::{
    asking::{Asking, OFTEN, STEADILY, longest_gap},
    drive::Driver,
};
use haven_model::object::Kind;
use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

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
    let mut knocked = Sample::default();
    for run in 0..runs {
        let gap = knock(lab)?;
        println!("  run {run}: its kernel did not answer for {gap:.3} s");
        knocked.push(gap);
    }
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
    knocked.print(
        "live migration, the guest's kernel knocked at every 10 ms -> longest gap",
        LIMIT,
        LIMIT,
    );
    let what = "live migration, a new connection over the balancer every 10 ms -> longest gap";
    gaps.print(what, f64::INFINITY, f64::INFINITY);
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

/// Moves the member while a host that has no part in it knocks at it; the longest gap, seconds.
fn knock(lab: &Driver) -> Result<f64> {
    let (from, guest) = whereabouts(lab)?;
    let [to, third] = &*lab.hosts.iter().filter(|host| **host != from).collect::<Vec<_>>() else {
        bail!("this figure needs three hosts, and there are {}", lab.hosts.len())
    };
    let asking = Asking::knock(lab, third, guest, OFTEN)?;
    std::thread::sleep(Duration::from_secs(1));
    lab.haven(&["vm", "migrate", "hello-1", "--to", to])?;
    std::thread::sleep(Duration::from_secs(1));
    Ok(longest_gap(&asking.end()?))
}

/// The member's host and address.
fn whereabouts(lab: &Driver) -> Result<(String, Ipv4Addr)> {
    let vms = lab.ask(|client| async move { client.list(Kind::Vm).await })?;
    let vm = vms.first().context("there is a member")?;
    let host = vm.host.as_ref().context("it has a host")?.to_string();
    Ok((host, vm.columns.get("addresses").context("it has an address")?.parse()?))
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
