//! A replica whose host stays away is made anew on another host, and is as good as the one before.

use crate::{
    Lab,
    played::{anew, same, settled, volume},
};
use anyhow::{Context, Result, ensure};
use haven_model::{ClusterSpec, units::Millis, volume::ReplicaState};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

const VM: &str = "two";
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a host has to be lost.
const AFTER: Millis = Millis(3_000);

/// Where it counts.
fn counted(lab: &Lab) -> BTreeSet<String> {
    let volume = volume(lab, VM).ok();
    let replicas = volume.map(|volume| volume.replicas).unwrap_or_default();
    let counted = replicas.iter().filter(|(_, state)| **state == ReplicaState::Counted);
    counted.map(|(host, _)| host.to_string()).collect()
}

/// A host with a replica is lost; its place is taken by the third one, which then runs the VM when the other is lost too.
pub fn elsewhere(lab: &Lab) -> Result<()> {
    lab.change_cluster(|spec| spec.rebuild_after = AFTER)?;
    let owner = lab.host_of(VM)?;
    let lost = counted(lab).into_iter().find(|host| *host != owner).context("another replica")?;
    let third = lab.hosts.iter().find(|host| **host != owner && **host != lost);
    let third = third.context("a third host")?.clone();
    let begin = Instant::now();
    lab.haven(&["lab", "kill", &lost])?;
    let now = BTreeSet::from([owner.clone(), third.clone()]);
    lab.wait("its replica is made anew", PATIENCE, |_| counted(lab) == now)
        .with_context(|| format!("{:?}", volume(lab, VM)))?;
    println!(
        "  the replica on {lost} is made anew on {third}, {:.1} s after {lost} lost its power (it had to be lost for {AFTER})",
        begin.elapsed().as_secs_f64()
    );
    lab.haven(&["lab", "start", &lost])?;
    settled(lab)?;
    ensure!(counted(lab) == now, "the old host has a place again");
    same(lab)?;
    let boots = lab.judge().of(VM).boots;
    lab.haven(&["lab", "kill", &owner])?;
    lab.wait("it starts where its new replica is", PATIENCE, |_| {
        lab.judge().of(VM).boots > boots && lab.judge().of(VM).host == third
    })?;
    lab.haven(&["lab", "start", &owner])?;
    settled(lab)?;
    ensure!(lab.host_of(VM)? == third, "it went back");
    lab.change_cluster(|spec| spec.rebuild_after = ClusterSpec::default().rebuild_after)?;
    anew(lab)?;
    same(lab)
}
