//! Daemons that are killed at any moment while people make and delete VMs.

use crate::{
    lab::{HOSTS, Lab},
    witness::Witness,
};
use anyhow::{Result, bail, ensure};
use haven_lab::drive::Driver;
use haven_model::object::Kind;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(120);
/// VMs that are made; each is deleted two turns later.
const TURNS: usize = 12;
/// The volumes' directory on every host.
const POOL: &str = "/var/lib/haven/scratch";

/// What was acknowledged stands, what was deleted is gone, and no host keeps anything of it.
pub fn killed_at_any_moment(lab: &mut Lab, _: &Witness) -> Result<()> {
    lab.haven(&["pool", "create", "scratch", "--driver", "local", "--path", POOL])?;
    let stop = AtomicBool::new(false);
    let (made, deleted, killed) = std::thread::scope(|scope| {
        let killer = scope.spawn(|| killing(lab, &stop));
        let (made, deleted) = make_and_delete(lab);
        stop.store(true, Ordering::Relaxed);
        (made, deleted, killer.join().unwrap_or_default())
    });
    println!(
        "  {killed} daemons killed; of {TURNS} creations {} and of {} deletions {} were acknowledged",
        made.len(),
        TURNS - 2,
        deleted.len(),
    );
    ensure!(killed >= 5 && made.len() >= 5, "too little happened to show anything");
    for host in HOSTS {
        lab.online(host)?;
    }
    let asked: BTreeSet<String> = (0..TURNS - 2).map(name).collect();
    let phase = |lab: &Driver, vm: &str| lab.haven(&["get", &format!("vm/{vm}")]).ok();
    for vm in made.difference(&asked) {
        lab.wait(&format!("{vm}, which was acknowledged, runs"), PATIENCE, |lab| {
            phase(lab, vm).is_some_and(|text| text.contains("running"))
        })?;
    }
    let is_gone = |lab: &Driver, vm: &str| {
        let list = lab.ask(|client| async move { client.list(Kind::Vm).await });
        list.is_ok_and(|list| list.iter().all(|item| item.object.meta().name.as_str() != vm))
    };
    for vm in &deleted {
        let what = format!("{vm}, whose deletion was acknowledged, is gone");
        lab.wait(&what, PATIENCE, |lab| is_gone(lab, vm))?;
    }
    for vm in (0..TURNS).map(name) {
        if !is_gone(lab, &vm) {
            lab.haven(&["vm", "rm", &vm])?;
        }
        lab.wait(&format!("{vm} is gone"), PATIENCE, |lab| is_gone(lab, &vm))?;
    }
    nothing_left(lab)?;
    lab.haven(&["pool", "rm", "scratch", "--wait"]).map(|_| ())
}

fn name(turn: usize) -> String {
    format!("made-{turn}")
}

/// Ends one daemon after another, each at another moment of what it does; how many.
fn killing(lab: &Driver, stop: &AtomicBool) -> usize {
    let (mut killed, mut pause) = (0, 400);
    for host in HOSTS.into_iter().cycle() {
        // Between 0.5 and 1.5 s, never twice the same: no round is like another.
        pause = (pause * 7 + 331) % 1_000;
        std::thread::sleep(Duration::from_millis(500 + pause));
        if stop.load(Ordering::Relaxed) {
            break;
        }
        for pid in lab.pids(host, "haven daemon") {
            killed += usize::from(kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok());
        }
    }
    killed
}

/// Makes VMs and deletes each two turns later; the names of what was acknowledged.
fn make_and_delete(lab: &Driver) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut made, mut deleted) = (BTreeSet::new(), BTreeSet::new());
    for turn in 0..TURNS {
        let vm = name(turn);
        let disk = ["--disk", "root:8MiB:scratch", "--network", "front"];
        let args = ["vm", "create", &vm, "--memory", "128MiB", "--image", "tiny"];
        match lab.haven(&[&args[..], &disk[..]].concat()) {
            Ok(_) => _ = made.insert(vm),
            // Whether it was done is not known, and both are right.
            Err(why) => println!("  not acknowledged: {why:#}"),
        }
        std::thread::sleep(Duration::from_millis(700));
        if let Some(before) = turn.checked_sub(2).map(name)
            && lab.haven(&["vm", "rm", &before]).is_ok()
        {
            deleted.insert(before);
        }
    }
    (made, deleted)
}

/// Waits until every host has the processes, taps, run directories and volumes of its VMs, and of no others.
fn nothing_left(lab: &Lab) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        let left = left_over(lab)?;
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > until {
            bail!("left behind by VMs that are gone: {left:?}");
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn left_over(lab: &Lab) -> Result<BTreeMap<String, Vec<String>>> {
    let mut left = BTreeMap::new();
    let ticks = ["tick-1", "tick-2"];
    for host in HOSTS {
        let here = |vm: &&str| lab.host_of(vm).is_ok_and(|on| on == host);
        let placed = ticks.iter().filter(|vm| here(vm)).count();
        let shown = |directory: &str| -> Result<Vec<String>> {
            let command = format!("ls -A {directory} 2> /dev/null || true");
            let text = lab.haven(&["lab", "exec", host, "--", "sh", "-c", &command])?;
            Ok(text.lines().map(str::to_owned).collect())
        };
        let mut found: Vec<String> = lab
            .pids(host, "guest=made")
            .into_iter()
            .map(|pid| format!("the QEMU with the number {pid}"))
            .collect();
        let taps: Vec<String> = shown("/sys/class/net")?
            .into_iter()
            .filter(|link| link.starts_with("hv") && link.ends_with("n0"))
            .collect();
        if taps.len() != placed {
            found.push(format!("taps {taps:?} for {placed} VMs"));
        }
        let runs = shown("/run/haven/vms")?;
        found.extend(runs.into_iter().filter(|run| !ticks.iter().any(|vm| run.starts_with(vm))));
        let volumes = shown(POOL)?;
        // What a host finds of a VM that was deleted while it was away it puts aside for a day.
        found.extend(volumes.into_iter().filter(|file| !file.ends_with(".aside")));
        if !found.is_empty() {
            left.insert(host.to_owned(), found);
        }
    }
    Ok(left)
}
