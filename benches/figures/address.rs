//! A service of two members behind its address: the longest gap that a client sees when the holder of the address
//! dies, and when only a member's host does.

use crate::sample::Sample;
use anyhow::{Context, Result};
use haven_lab::{
    asking::{Asking, OFTEN, failures, longest_gap},
    drive::Driver,
};
use std::time::{Duration, Instant};

/// The service of these figures.
pub const SERVICE: &str = "kind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\n\
    kind: Service\nname: hello\nreplicas: 2\ntemplate:\n  spec:\n    image: tiny\n    memory: 128MiB\n    networks:\n    - network: front\n\
    check:\n  mode: http\n  port: 80\nfrontend:\n  address: 10.88.0.100\n  port: 80\n  mode: http\n";
/// Where it answers.
pub const ADDRESS: &str = "10.88.0.100:80";

/// The same, with guests on two of the three hosts only, so that the third can hold the address without a member.
pub const PINNED: &str =
    "template:\n  spec:\n    affinity:\n      hosts:\n        guests: \"yes\"\n";

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    for host in ["host2", "host3"] {
        lab.label(host, "guests", "yes")?;
    }
    let manifest = SERVICE.replace("template:\n  spec:\n", PINNED) + "spread:\n  required: true\n";
    lab.apply(&manifest, &["--wait", "--timeout", "300"])?;
    let (mut holder_gap, mut bare_gap) = (Sample::default(), Sample::default());
    let mut member_gap = Sample::default();
    // Which host takes the address next is not chosen here: it is gone on until both kinds were seen often enough.
    for run in 0..runs * 5 {
        if holder_gap.len() >= runs && bare_gap.len() >= runs && member_gap.len() >= runs {
            break;
        }
        well(lab)?;
        let holder = holder(lab)?;
        let with = has_member(lab, &holder)?;
        let (gap, failed) = kill(lab, &holder)?;
        println!(
            "  run {run}, address holder {holder}, member there {with}: gap {gap:.3} s, {failed}"
        );
        if with { &mut holder_gap } else { &mut bare_gap }.push(gap);
        if member_gap.len() >= runs {
            continue;
        }
        well(lab)?;
        let (holder, hosts) = (self::holder(lab)?, lab.hosts.clone());
        let mut others = hosts.iter().filter(|host| **host != holder);
        let member = others.find(|host| has_member(lab, host).unwrap_or(false));
        let Some(member) = member else { continue };
        let (gap, failed) = kill(lab, member)?;
        println!("  run {run}, member on {member}: gap {gap:.3} s, {failed}");
        member_gap.push(gap);
    }
    let what = "power cut of the address holder -> longest gap at the client";
    holder_gap.print(&format!("{what}, a member on it"), 1.6, 1.6);
    bare_gap.print(&format!("{what}, no member on it"), 1.6, 1.6);
    member_gap.print("only a member's host dies -> longest gap at the client", 0.5, 0.5);
    Ok(())
}

/// All hosts are online and both members ready.
pub fn well(lab: &Driver) -> Result<()> {
    for host in &lab.hosts {
        lab.online(host)?;
    }
    lab.wait("both members are ready", Duration::from_secs(180), |lab| {
        lab.overview().is_ok_and(|overview| {
            overview.services.iter().any(|s| s.ready == 2 && !s.holder.is_empty())
        })
    })?;
    // What boots beside it would be measured too.
    std::thread::sleep(Duration::from_secs(3));
    Ok(())
}

fn holder(lab: &Driver) -> Result<String> {
    let overview = lab.overview()?;
    Ok(overview.services.first().context("there is a service")?.holder.clone())
}

fn has_member(lab: &Driver, host: &str) -> Result<bool> {
    let overview = lab.overview()?;
    Ok(overview.hosts.iter().any(|line| line.name == host && line.vms > 0))
}

/// Cuts a host's power while a client asks; the longest gap, and how many questions failed.
fn kill(lab: &Driver, host: &str) -> Result<(f64, String)> {
    let asking = Asking::start(lab, ADDRESS, OFTEN)?;
    std::thread::sleep(Duration::from_secs(1));
    lab.haven(&["lab", "kill", host])?;
    let dead = Instant::now();
    std::thread::sleep(Duration::from_secs(5));
    let asked = asking.end()?;
    lab.haven(&["lab", "start", host])?;
    let late = asked.iter().filter(|a| !a.good && a.begin > dead).count();
    let failures = failures(&asked);
    Ok((longest_gap(&asked), format!("{failures} ({late} of them asked after the host was dead)")))
}
