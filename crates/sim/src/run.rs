//! One run: a cluster, its faults, the verdict.

use crate::{
    cluster::{Broken, Cluster, Setup},
    faults::{self, Fault},
    invariants::{converged, drained},
    judge::{Facts, Judge},
    scenario::{Expect, Scenario},
};
use haven_model::{Name, RebalancePolicy};
use rand::{Rng, SeedableRng, rngs::StdRng};
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
/// How long the faults of a random run go on, seconds.
const STORM_S: u64 = 60;

/// The manifest of a random run: a service behind an address, and single VMs.
#[must_use]
pub fn random_manifest(replicas: u32, vms: u32) -> String {
    let mut text = format!(
        "kind: Pool\nname: scratch\ndriver: local\npath: /local\n---\n\
         kind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\n\
         kind: Network\nname: lan\ndriver: bridge\nsubnet: 10.78.0.0/24\n---\n\
         kind: Service\nname: web\nreplicas: {replicas}\n\
         template:\n  spec:\n    memory: 128MiB\n    networks:\n    - network: front\n\
         check:\n  mode: http\n  port: 80\n\
         frontend:\n  address: 10.88.0.100\n  port: 80\n  mode: http\n"
    );
    for i in 1..=vms {
        // Only the first of each pair knows of its wish, and only the second is what it asks about.
        let wish = match i {
            1 => "affinity: {apart: {pair: '2'}}\n",
            3 => "affinity: {near: {pair: '4'}}\n",
            _ => "",
        };
        // One has a disk that only its host has.
        let disk = match i {
            2 => "disks: [{name: data, size: 1GiB, pool: scratch}]\n",
            _ => "",
        };
        let card = if i % 2 == 1 { "networks: [{network: lan}]\n" } else { "" };
        text.push_str(&format!(
            "---\nkind: VM\nname: db-{i}\nlabels: {{pair: '{i}'}}\nmemory: 512MiB\n{card}{disk}{wish}"
        ));
    }
    text
}

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
    in_virtual_time(seed, storm(seed, broken))?
}

async fn storm(seed: u64, broken: Option<Broken>) -> anyhow::Result<Verdict> {
    let mut random = StdRng::seed_from_u64(seed);
    let hosts = random.random_range(2..=5);
    let vms = random.random_range(0..=4);
    let setup = Setup {
        hosts,
        seed,
        watchdog: random.random_bool(0.7),
        power_control: random.random_bool(0.6),
        clock_skew_percent: if random.random_bool(0.5) { 1.0 } else { 4.0 },
        manifest: random_manifest(random.random_range(1..=4), vms),
        rebalance: match seed % 3 {
            0 => RebalancePolicy::Auto,
            _ => RebalancePolicy::Advise,
        },
        broken,
    };
    let watchdog = setup.watchdog;
    let cluster = Cluster::start(setup).await?;
    settle(&cluster, "at the beginning").await;
    let mut left = Duration::from_secs(STORM_S);
    let calm = random.random_range(1..=12);
    loop {
        let pause = Duration::from_millis(random.random_range(10..1_500 * calm));
        if pause >= left {
            break;
        }
        left -= pause;
        tokio::time::sleep(pause).await;
        let fault = faults::random(&mut random, hosts, vms);
        fault.happen(&cluster).await;
        // Without a watchdog a paused host that nobody resumes would be off for good in every way but one.
        if !watchdog && let Fault::Pause(host) = fault {
            let wake = Duration::from_millis(random.random_range(100..12_000));
            let cluster = Arc::clone(&cluster);
            tokio::spawn(async move {
                tokio::time::sleep(wake).await;
                Fault::Resume(host).happen(&cluster).await;
            });
        }
    }
    tokio::time::sleep(left).await;
    cluster.mend().await;
    settle(&cluster, "after everything was mended").await;
    if hosts > 2 && random.random_bool(0.5) {
        empty(&cluster, &format!("host{}", random.random_range(1..=hosts))).await;
    }
    cluster.shared.judge.end();
    for host in cluster.names() {
        for (vm, epoch) in cluster.shared.world.idle_on(&host) {
            let what = format!("orphans: a process of {vm}, epoch {epoch}, waits on {host}");
            cluster.shared.judge.accuse(what);
        }
    }
    disks_are_whole(&cluster);
    Ok(verdict(seed, &cluster))
}

/// No guest ran on a disk that lacks what it has written.
fn disks_are_whole(cluster: &Cluster) {
    for lost in cluster.shared.world.local_disks.lost() {
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
        seed,
        watchdog: scenario.watchdog,
        power_control: scenario.power_control,
        clock_skew_percent: 1.0,
        manifest: scenario.manifest.clone(),
        rebalance: scenario.rebalance,
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
    if expect.converged {
        judge.end();
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
    disks_are_whole(&cluster);
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
