//! A member of the store that no longer runs.

use crate::{lab::Lab, witness::Witness};
use anyhow::{Result, bail};
use haven_lab::drive::Driver;
use haven_model::units::Millis;
use nix::sys::signal::Signal;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(90);

fn voters(lab: &Driver, wanted: (usize, usize)) -> bool {
    lab.overview().is_ok_and(|seen| seen.voters == wanted)
}

fn told(lab: &Driver, words: &str) -> bool {
    lab.overview().is_ok_and(|seen| seen.risks.iter().any(|risk| risk.contains(words)))
}

/// Changes after how long a voter is replaced.
fn replaced_after(lab: &Lab, time: Millis) -> Result<()> {
    let mut item = lab.ask(|client| async move { client.cluster().await })?;
    item.spec.replace_voter_after = time;
    let item = &item;
    lab.ask(|client| async move { client.replace_cluster(item).await }).map(|_| ())
}

/// A member that cannot run is told and goes on once it can; one whose data are gone is replaced by a new one.
pub fn member_broken(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let overview = lab.overview()?;
    let host = overview.hosts.iter().find(|host| !host.roles.iter().any(|role| role == "manager"));
    let Some(host) = host.map(|host| host.name.clone()) else { bail!("every host manages") };
    let run = |args: &[&str]| lab.haven(&[&["lab", "exec", &host, "--"], args].concat());
    let before = witness.newest();
    run(&["mv", "/usr/bin/etcd", "/usr/bin/etcd.away"])?;
    lab.signal(&host, "etcd --name", Signal::SIGKILL)?;
    lab.wait("a member that cannot be started is told", PATIENCE, |lab| {
        voters(lab, (2, 3)) && told(lab, "does not answer (etcd cannot be started")
    })?;
    if lab.overview()?.survivable != 0 {
        bail!("with two of three members no host may be lost, and status says one may");
    }
    run(&["mv", "/usr/bin/etcd.away", "/usr/bin/etcd"])?;
    lab.wait("it votes again", PATIENCE, |lab| voters(lab, (3, 3)))?;
    let usual = lab.ask(|client| async move { client.cluster().await })?.spec.replace_voter_after;
    replaced_after(lab, Millis(10_000))?;
    run(&["rm", "-rf", "/var/lib/haven/etcd"])?;
    lab.signal(&host, "etcd --name", Signal::SIGKILL)?;
    lab.wait("a member without its data is told", PATIENCE, |lab| voters(lab, (2, 3)))?;
    lab.wait("a new member votes in its place", PATIENCE, |lab| voters(lab, (3, 3)))?;
    replaced_after(lab, usual)?;
    for (vm, copy) in witness.newest() {
        if before.get(&vm).is_none_or(|old| old.boot != copy.boot) {
            bail!("{vm} was disturbed by what befell the store");
        }
    }
    Ok(())
}
