//! One run: a cluster, its faults, the verdict.

use crate::{
    cluster::{Broken, Cluster, Setup},
    faults::Fault,
    invariants::{converged, drained},
    judge::{Facts, Judge},
    scenario::{Expect, Scenario},
    storm,
};
use haven_model::Name;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::Instant;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Its seed.
    pub seed: u64,
    /// Changes that were checked.
    pub steps: u64,
    /// What was broken.
    pub violations: Vec<String>,
    /// What happened, a line each.
    pub transcript: Vec<String>,
}

/// How long a cluster may take until everything runs, from nothing or after everything was mended.
const SETTLE: Duration = Duration::from_secs(60);
/// How often it is looked, and how often in a row all must be as wanted.
const LOOK: Duration = Duration::from_millis(250);
const STEADY: u32 = 12;
/// Runs in virtual time on this thread.
fn in_virtual_time<T>(seed: u64, future: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()))
        .build()?;
    Ok(runtime.block_on(future))
}

/// Runs a seed: everything about it is random and decided by the seed. A test may break a part on purpose.
///
/// # Errors
/// When the simulator itself cannot run.
pub fn seed(seed: u64, broken: Option<Broken>) -> anyhow::Result<Verdict> {
    scenario(&storm::of(seed), seed, broken)
}

/// No process is left that waits for a guest.
fn none_waits(cluster: &Cluster) {
    for host in cluster.names() {
        for (vm, epoch) in cluster.shared.world.idle_on(&host) {
            let what = format!("orphans: a process of {vm}, epoch {epoch}, waits on {host}");
            cluster.shared.judge.accuse(what);
        }
    }
}

/// No guest ran on a disk that lacks what it has written.
fn disks_are_whole(cluster: &Cluster, expect: &Expect) {
    let fewest = cluster.shared.world.mirrors.fewest_counted();
    if let Some(wanted) = expect.counted.filter(|wanted| fewest != Some(*wanted)) {
        cluster.shared.judge.accuse(format!(
            "expected {wanted} replicas to count all the time, and it was {fewest:?}"
        ));
    }
    for lost in cluster.shared.world.local_disks.lost() {
        cluster.shared.judge.accuse(format!("disks: {lost}"));
    }
    for lost in cluster.shared.world.mirrors.lost().iter().take(3) {
        cluster.shared.judge.accuse(format!("disks: {lost}"));
    }
}

/// With everything well, a host that is drained gets empty, and what it had comes back when that is asked.
async fn empty(cluster: &Arc<Cluster>, host: &str) {
    // A person's own move comes before a drain, also one that has no room yet.
    let asked: Vec<String> = cluster
        .shared
        .judge
        .read(|facts| facts.snapshot.migrations.keys().map(ToString::to_string).collect());
    for vm in asked {
        cluster.cancel_migration(&vm).await;
    }
    Fault::Drain(host.into()).happen(cluster).await;
    settle_as(cluster, "drained", |facts| {
        converged(facts)?;
        drained(facts, host)
    })
    .await;
    Fault::BringBack(host.into()).happen(cluster).await;
    settle_as(cluster, "brought back", |facts| {
        converged(facts)?;
        if facts.snapshot.drains.is_empty() {
            return Ok(());
        }
        Err(format!("the drain of {host} is not forgotten"))
    })
    .await;
}

/// Waits until all that is wanted has been so for a while.
async fn settle(cluster: &Cluster, when: &str) {
    settle_as(cluster, when, converged).await;
}

async fn settle_as(cluster: &Cluster, when: &str, is_so: impl Fn(&Facts) -> Result<(), String>) {
    let until = Instant::now() + SETTLE;
    let mut good = 0;
    while good < STEADY {
        tokio::time::sleep(LOOK).await;
        // A fence command that was under way may still have switched a host off; a person switches it on.
        cluster.power_on_all().await;
        match cluster.shared.judge.read(&is_so) {
            Ok(()) => good += 1,
            Err(what) if Instant::now() > until => {
                cluster.shared.judge.accuse(format!("convergence: {when}, after 60 s: {what}"));
                return;
            }
            Err(_) => good = 0,
        }
    }
    cluster.shared.judge.note(&format!("all is as wanted, {when}"));
}

fn verdict(seed: u64, cluster: &Cluster) -> Verdict {
    let (steps, violations, transcript) = cluster.shared.judge.verdict();
    Verdict { seed, steps, violations, transcript }
}

/// When each guest was started, as its host says; a live move changes nothing about it.
fn booted(facts: &Facts) -> BTreeMap<Name, Option<i64>> {
    let all = facts.snapshot.vm_status.iter();
    all.map(|(vm, status)| (vm.clone(), status.started_ms)).collect()
}

/// Runs a scenario with one seed.
///
/// # Errors
/// When the scenario's manifest is wrong.
pub fn scenario(scenario: &Scenario, seed: u64, broken: Option<Broken>) -> anyhow::Result<Verdict> {
    in_virtual_time(seed, play(scenario, seed, broken))?
}

async fn play(scenario: &Scenario, seed: u64, broken: Option<Broken>) -> anyhow::Result<Verdict> {
    let setup = Setup {
        hosts: scenario.hosts,
        witness: scenario.witness,
        seed,
        watchdog: scenario.watchdog,
        power_control: scenario.power_control,
        clock_skew_percent: scenario.clock_skew_percent,
        manifest: scenario.manifest.clone(),
        rebalance: scenario.rebalance,
        fencing: scenario.fencing.clone(),
        broken,
    };
    let cluster = Cluster::start(setup).await?;
    let judge = &cluster.shared.judge;
    settle(&cluster, "at the beginning").await;
    let begin = Instant::now();
    let guests = judge.read(booted);
    for event in &scenario.events {
        tokio::time::sleep_until(begin + Duration::from_secs_f64(event.at)).await;
        event.fault.happen(&cluster).await;
    }
    tokio::time::sleep_until(begin + Duration::from_secs(scenario.lasts)).await;
    if scenario.mend {
        cluster.mend().await;
        settle(&cluster, "after everything was mended").await;
    }
    let expect = &scenario.expect;
    let first = begin + Duration::from_secs_f64(scenario.events.first().map_or(0.0, |e| e.at));
    let (executing, latest) = judge.read(|facts| {
        let on = |host: &str| facts.power.get(host) == Some(&crate::net::Power::On);
        let executing = facts.running.keys().filter(|(host, _)| on(host)).count();
        let latest = facts.running.values().map(|r| r.since).filter(|at| *at > first).max();
        (executing, latest)
    });
    if let Some(host) = &scenario.empties {
        empty(&cluster, host).await;
    }
    if expect.converged {
        judge.end();
        none_waits(&cluster);
    }
    if let Some(host) = &expect.drained
        && let Err(what) = judge.read(|facts| drained(facts, host))
    {
        judge.accuse(format!("expected {host} to be drained: {what}"));
    }
    if let Some(running) = expect.running
        && running != executing
    {
        judge.accuse(format!("expected {running} VMs to execute, and {executing} do"));
    }
    for vm in expect.runs.iter().filter(|vm| judge.read(|facts| facts.executing(vm).is_empty())) {
        judge.accuse(format!("expected {vm} to execute, and it does not"));
    }
    on_hosts(&cluster, expect).await;
    if expect.undisturbed && latest.is_some() {
        judge.accuse("expected no VM to be disturbed, and one was started again".into());
    }
    if expect.none_rebooted && judge.read(booted) != guests {
        judge.accuse("expected no guest to be started anew, and one was".into());
    }
    if let Some(within) = expect.recovered_within {
        recovered(judge, within, latest.map(|at| (at - first).as_secs_f64()));
    }
    disks_are_whole(&cluster, expect);
    Ok(verdict(seed, &cluster))
}

/// Whether what had to be recovered was so in time, seconds.
fn recovered(judge: &Judge, within: f64, after: Option<f64>) {
    match after {
        None => judge.accuse("expected a VM to be recovered, and none was".into()),
        Some(after) if after > within => {
            judge.accuse(format!("expected recovery within {within} s, and it took {after:.2} s"))
        }
        Some(after) => judge.note(&format!("recovered in {after:.2} s")),
    }
}

/// What must be so of single hosts.
async fn on_hosts(cluster: &Arc<Cluster>, expect: &Expect) {
    let judge = &cluster.shared.judge;
    for host in &expect.restarted {
        if cluster.host(host).lock().await.boots() < 2 {
            judge.accuse(format!("expected {host} to be restarted, and it was not"));
        }
    }
    for host in &expect.uses {
        let executes = |facts: &Facts| facts.running.keys().any(|(on, _)| on == host);
        if !judge.read(executes) {
            judge.accuse(format!("expected a VM to execute on {host}, and none does"));
        }
    }
}
