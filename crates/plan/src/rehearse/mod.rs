//! What would happen: the real plan on a copy of the snapshot, in which hosts are lost or drained, until nothing more
//! is to be done. Nothing is written.
//!
//! ```text
//!   snapshot ─► copy, altered ─► plan ─► committed in the copy ─► what its agents would do, and when (figures) ─┐
//!                                 ▲                                                                              │
//!                                 └───────────────────────── the clock of the copy goes on ◄────────────────────┘
//! ```
//!
//! What it promises: where each VM goes, and in which order, is what the plan would decide if that happened now and
//! nothing else did. How long it takes is taken from past incidents and moves, where there were any, and from the timers
//! otherwise; each answer says which.
//!
//! Rejected: a formula beside the plan. It would say something else than what then happens, at the worst moment.

mod figures;
mod stage;

use crate::{HostState, host_states};
use figures::Figures;
use haven_model::{
    Drain, Name, Observations, ProofKind, Snapshot, VmPhase,
    api::{Rehearsal, RehearsedVm},
};
use stage::{Happens, Stage};
use std::collections::BTreeSet;

/// What is rehearsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// These hosts lose their power at one instant.
    Fail(BTreeSet<Name>),
    /// This host is drained.
    Drain(Name),
}

/// Plays it.
#[must_use]
pub fn rehearse(snapshot: &Snapshot, seen: &Observations, event: &Event) -> Rehearsal {
    let figures = Figures::of(snapshot);
    let mut stage = Stage::new(snapshot, seen, &figures);
    match event {
        Event::Fail(hosts) => {
            if let Some(why) = no_quorum(snapshot, seen, hosts) {
                return stalled(snapshot, hosts, &why);
            }
            for host in hosts {
                fail(&mut stage, host);
            }
        }
        Event::Drain(host) => {
            let drain = Drain {
                id: "rehearsal".into(),
                by: "a rehearsal".into(),
                at_ms: seen.now_ms,
                drained_ms: None,
                bringing_back: false,
            };
            stage.drain(host, &drain);
        }
    }
    stage.play();
    let vms = vms(snapshot, &stage, event);
    Rehearsal { ends_after_ms: stage.last_ms(), figures: figures.words(), vms, steps: stage.steps }
}

/// A host falls silent; when it would be suspected, and when proven lost.
fn fail(stage: &mut Stage<'_>, host: &Name) {
    let snapshot = &stage.snapshot;
    let Some(lease) = snapshot.leases.get(host).filter(|lease| !lease.closed) else { return };
    let spec = snapshot.cluster_spec();
    let power = snapshot.hosts.get(host).is_some_and(|host| host.spec.power.is_some());
    let by_power = power && spec.fencing.contains(&ProofKind::PoweredOff);
    let suspect = spec.timers.suspect.0;
    // It is switched off once it was suspected for half of its lease.
    let off = suspect.max(lease.ttl_ms / 2);
    let expected = |kind: ProofKind, default: u64| (kind, stage.figures.proof(kind, default));
    let proofs = [
        by_power.then(|| expected(ProofKind::PoweredOff, off + figures::POWER_MS)),
        spec.fencing
            .contains(&ProofKind::LeaseExpired)
            .then(|| expected(ProofKind::LeaseExpired, lease.ttl_ms)),
    ];
    let proof = proofs.into_iter().flatten().min_by_key(|(_, ms)| *ms);
    stage.later(suspect, Happens::Suspected(host.clone()));
    stage.later(suspect + figures::CLAIM_MS, Happens::Claimed);
    if let Some((kind, ms)) = proof {
        stage.later(ms.max(suspect), Happens::Proven(host.clone(), kind));
    }
}

/// Why the store would serve nobody without these hosts, if so.
fn no_quorum(snapshot: &Snapshot, seen: &Observations, hosts: &BTreeSet<Name>) -> Option<String> {
    let states = host_states(snapshot, seen);
    let votes = |name: &&Name| {
        snapshot.host_status.get(*name).is_some_and(|status| status.etcd_member.is_some())
    };
    let answers = |name: &&Name| {
        let silent = snapshot.host_status.get(*name).is_none_or(|status| status.etcd_silent);
        let well = states.get(*name).copied().is_some_and(HostState::well);
        well && !silent && !hosts.contains(*name)
    };
    let all = snapshot.hosts.keys().filter(votes).count();
    let left = snapshot.hosts.keys().filter(votes).filter(answers).count();
    (all > 0 && left < all / 2 + 1).then(|| {
        format!(
            "{left} of {all} members of the store would answer, and it needs {}: nothing starts anywhere, and every host ends its VMs, until enough are back",
            all / 2 + 1
        )
    })
}

/// Without a store nothing is decided.
fn stalled(snapshot: &Snapshot, hosts: &BTreeSet<Name>, why: &str) -> Rehearsal {
    let runs =
        |vm: &&Name| snapshot.vms.get(*vm).is_some_and(|vm| vm.spec.running && !vm.meta.deleting);
    let vm = |vm: &Name| RehearsedVm {
        vm: vm.clone(),
        from: snapshot.placements.get(vm).map(|p| p.host.clone()),
        to: None,
        after_ms: None,
        why: why.to_owned(),
    };
    let guard = snapshot.cluster_spec().timers.guard.0;
    let steps = hosts.iter().take(1).map(|host| stage::step(guard, host, why.to_owned()));
    Rehearsal {
        steps: steps.collect(),
        vms: snapshot.placements.keys().filter(runs).map(vm).collect(),
        ends_after_ms: guard,
        figures: "the time is that of the guards, from the timers".into(),
    }
}

/// What became of the VMs that it concerned.
fn vms(before: &Snapshot, stage: &Stage<'_>, event: &Event) -> Vec<RehearsedVm> {
    let after = &stage.snapshot;
    let mut lines = Vec::new();
    for vm in before.vms.keys().chain(after.vms.keys().filter(|vm| !before.vms.contains_key(*vm))) {
        let from = before.placements.get(vm).map(|p| p.host.clone());
        let to = after.placements.get(vm).map(|p| p.host.clone());
        let hit = match event {
            Event::Fail(hosts) => from.as_ref().is_some_and(|from| hosts.contains(from)),
            Event::Drain(host) => from.as_ref() == Some(host),
        };
        if !hit && from == to {
            continue;
        }
        if !after.vms.contains_key(vm) {
            let why = "its service has replaced it".to_owned();
            lines.push(RehearsedVm { vm: vm.clone(), from, to: None, after_ms: None, why });
            continue;
        }
        let serves = serves(after, vm);
        let stays = from == to && matches!(event, Event::Drain(_));
        let after_ms = stage.served_ms.get(vm).copied().filter(|_| serves && !stays);
        let why = if after_ms.is_some() { String::new() } else { stage.why_not(vm, stays) };
        let to = to.filter(|_| after_ms.is_some() || stays || !wanted(after, vm));
        lines.push(RehearsedVm { vm: vm.clone(), from, to, after_ms, why });
    }
    lines.sort_by_key(|line| (line.after_ms.is_none(), line.after_ms, line.vm.clone()));
    lines
}

fn wanted(snapshot: &Snapshot, vm: &Name) -> bool {
    snapshot.vms.get(vm).is_some_and(|vm| vm.spec.running && !vm.meta.deleting)
}

/// Whether a VM runs, and is well where it has a check.
fn serves(snapshot: &Snapshot, vm: &Name) -> bool {
    let checked = snapshot.vms.get(vm).is_some_and(|vm| vm.spec.check.is_some());
    snapshot.told_of(vm).is_some_and(|status| {
        status.phase == VmPhase::Running && (!checked || status.ready == Some(true))
    })
}
