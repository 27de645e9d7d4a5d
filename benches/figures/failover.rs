//! Host power cut until its VM is started on another host, whichever role the dead host had; proof `lease-expired`.
//!
//! The VMs have no guest, so that only Haven and QEMU are measured. The start is when the other host's QEMU runs, as
//! its agent noted it right after `cont`; the power cut is the instant before the command that cuts it.

use crate::sample::Sample;
use anyhow::{Context, Result, bail};
use haven_lab::drive::Driver;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// The roles that the dead host may have had.
const ROLES: [&str; 4] = ["manager", "store leader", "address holder", "none"];

/// Six VMs without a guest, and an address.
pub(super) fn manifest() -> String {
    let mut manifest = String::from(
        "kind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\n\
         kind: Service\nname: held\nreplicas: 0\ntemplate:\n  spec:\n    image: tiny\n    memory: 128MiB\n    networks:\n    - network: front\nfrontend:\n  address: 10.88.0.100\n  port: 80\n",
    );
    for i in 1..=6 {
        manifest += &format!("---\nkind: VM\nname: empty-{i}\nmemory: 64MiB\n");
    }
    manifest
}

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    lab.apply(&manifest(), &[])?;
    let mut samples: BTreeMap<&str, Sample> = BTreeMap::new();
    let (mut all, mut from_proof) = (Sample::default(), Sample::default());
    for run in 0..runs {
        for role in ROLES {
            well(lab)?;
            let Some(host) = with_role(lab, role)? else {
                println!("  run {run}, {role}: no host has this role alone now");
                continue;
            };
            let took = fail(lab, &host)?;
            println!(
                "  run {run}, {role} ({host}): {:.3} s, {:.3} s of it after the proof",
                took.whole, took.from_proof
            );
            samples.entry(role).or_default().push(took.whole);
            all.push(took.whole);
            from_proof.push(took.from_proof);
        }
    }
    for (role, sample) in &samples {
        sample.print(&format!("host power cut -> VM started elsewhere, {role}"), 5.5, 6.5);
    }
    all.print("host power cut -> VM started elsewhere, all roles", 5.5, 6.5);
    from_proof.print("proof lease-expired -> VM started elsewhere", f64::INFINITY, f64::INFINITY);
    Ok(())
}

/// All hosts are online and every host runs a VM.
pub(super) fn well(lab: &Driver) -> Result<()> {
    for host in &lab.hosts {
        lab.online(host)?;
    }
    lab.voting()?;
    // Placement is stable, so what moved away does not come back by itself: the VMs are placed anew.
    lab.wait("every VM runs", Duration::from_secs(60), |lab| vms(lab).is_ok_and(|v| v.len() == 6))?;
    let placed = vms(lab)?;
    let empty = lab.hosts.iter().find(|host| !placed.values().any(|(on, _)| on == *host));
    if empty.is_none() {
        return Ok(());
    }
    for name in placed.keys() {
        lab.haven(&["vm", "rm", name])?;
    }
    lab.wait("every VM is gone", Duration::from_secs(30), |lab| {
        vms(lab).is_ok_and(|v| v.is_empty())
    })?;
    let names: Vec<String> = placed.keys().cloned().collect();
    let text: Vec<String> =
        names.iter().map(|name| format!("kind: VM\nname: {name}\nmemory: 64MiB\n")).collect();
    lab.apply(&text.join("---\n"), &[])?;
    lab.wait("every VM runs", Duration::from_secs(60), |lab| vms(lab).is_ok_and(|v| v.len() == 6))
}

/// The VMs that run: host, and when they were started, milliseconds since 1970.
pub(super) fn vms(lab: &Driver) -> Result<BTreeMap<String, (String, i64)>> {
    let text = lab.haven(&["vm", "ls", "-o", "json"])?;
    let list: serde_json::Value = serde_json::from_str(&text).context("a list is JSON")?;
    let items = list.as_array().context("a list is an array")?;
    let mut found = BTreeMap::new();
    for item in items {
        let name = item["meta"]["name"].as_str().context("a VM has a name")?;
        let started = item["columns"]["started-ms"].as_str().and_then(|t| t.parse().ok());
        if let (Some(host), Some(started)) = (item["host"].as_str(), started) {
            found.insert(name.to_owned(), (host.to_owned(), started));
        }
    }
    Ok(found)
}

fn with_role(lab: &Driver, role: &str) -> Result<Option<String>> {
    let overview = lab.overview()?;
    let roles = |host: &str| {
        let line = overview.hosts.iter().find(|line| line.name == host);
        line.map(|line| line.roles.clone()).unwrap_or_default()
    };
    let has = |host: &str, role: &str| {
        let word = if role == "address holder" { "holds" } else { role };
        roles(host).iter().any(|r| r.starts_with(word))
    };
    let placed = vms(lab)?;
    let mut hosts = lab.hosts.iter().filter(|host| placed.values().any(|(on, _)| on == *host));
    let found = hosts.find(|host| match role {
        "none" => ROLES[..3].iter().all(|role| !has(host, role)),
        role => has(host, role),
    });
    Ok(found.cloned())
}

/// How long a loss took, seconds.
pub(super) struct Took {
    /// From the power cut until the last of the VMs was started elsewhere.
    pub(super) whole: f64,
    /// From the proof of the loss until then.
    pub(super) from_proof: f64,
    /// Which proof that was, in words.
    pub(super) proof: String,
}

/// Cuts the power, and waits until all of its VMs were started elsewhere.
pub(super) fn fail(lab: &Driver, host: &str) -> Result<Took> {
    let before = vms(lab)?;
    let lost: Vec<&String> =
        before.iter().filter(|(_, (on, _))| on == host).map(|(name, _)| name).collect();
    let cut = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
    lab.haven(&["lab", "kill", host])?;
    let until = Instant::now() + Duration::from_secs(40);
    let started = loop {
        let now = vms(lab).unwrap_or_default();
        let again = lost
            .iter()
            .map(|name| now.get(*name).filter(|(on, _)| on != host).map(|(_, started)| *started));
        if let Some(all) = again.collect::<Option<Vec<i64>>>() {
            break all.into_iter().max().context("the host had a VM")?;
        }
        if Instant::now() > until {
            bail!("the VMs of {host} do not run again after 40 s");
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    lab.haven(&["lab", "start", host])?;
    let incident = lab.ask(|client| async move { client.incidents().await })?.pop();
    let steps = incident.map(|incident| incident.steps).unwrap_or_default();
    let proof = steps.iter().find(|step| step.phase == "proof").context("a lost host")?;
    let seconds = |since: i64| (started - since) as f64 / 1000.0;
    let proven = seconds(proof.at_ms);
    Ok(Took { whole: seconds(cut), from_proof: proven, proof: proof.message.clone() })
}
