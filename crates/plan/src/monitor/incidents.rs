//! The story of every lost host, measured: failed, noticed, proof, then per VM placed, started, ready. That of a VM which
//! keeps failing stands in [`super::failing`].

use super::failing;
use crate::work::{Work, host_ref, vm_ref};
use haven_model::{
    Action, Incident, IncidentStep, LostSession, Name, ObjectRef, ProofKind, Snapshot, Versioned,
    VmSpec, object::Stored,
};

/// The number of the last incident, written or promised.
pub(crate) fn last_number(snapshot: &Snapshot) -> u64 {
    let written = snapshot.incidents.keys().next_back().copied().unwrap_or(0);
    let promised = snapshot.lost.values().map(|lost| lost.incident).max().unwrap_or(0);
    written.max(promised)
}

/// The number of the next incident.
pub(crate) fn next_number(work: &mut Work<'_>) -> u64 {
    work.incidents += 1;
    work.incidents
}

/// Opens the incidents of lost hosts and follows those that are open.
pub(crate) fn follow(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    for (host, lost) in &snapshot.lost {
        if !snapshot.incidents.contains_key(&lost.incident) {
            open(work, host, lost);
        }
    }
    failing::open(work);
    for incident in snapshot.incidents.values().filter(|i| i.closed_ms.is_none()) {
        let next = match &incident.vm {
            Some(vm) => failing::advance(work, incident, vm),
            None => advance(snapshot, incident, work.seen.now_ms),
        };
        if next != *incident.value {
            let reason = format!("incident {} goes on", incident.number);
            let action = Action::PutIncident {
                incident: Box::new(next),
                expected_revision: incident.revision,
            };
            work.act(host_ref(&incident.host), reason, action);
        }
    }
}

/// The proof that an incident's `proof` step tells of.
pub(crate) fn proof_of(step: &IncidentStep) -> ProofKind {
    if step.message.ends_with(proven(ProofKind::PoweredOff)) {
        ProofKind::PoweredOff
    } else {
        ProofKind::LeaseExpired
    }
}

fn proven(proof: ProofKind) -> &'static str {
    match proof {
        ProofKind::LeaseExpired => "its lease expired, its guard has stopped its VMs",
        ProofKind::PoweredOff => "its power was read as off",
        ProofKind::StorageFenced => "its disks are shut to it",
    }
}

pub(super) fn step(at_ms: i64, phase: &str, object: ObjectRef, message: String) -> IncidentStep {
    IncidentStep { at_ms, phase: phase.into(), object, message }
}

fn open(work: &mut Work<'_>, host: &Name, lost: &LostSession) {
    let snapshot = work.snapshot;
    let waiting_for: Vec<Name> = snapshot
        .placements
        .iter()
        .filter(|(name, placement)| placement.host == *host && wanted(snapshot, name).is_some())
        .map(|(name, _)| name.clone())
        .collect();
    let object = host_ref(host);
    let how = proven(lost.proof);
    let steps = vec![
        step(
            lost.last_heard_ms,
            "failed",
            object.clone(),
            format!("{host} renewed its lease for the last time"),
        ),
        step(lost.at_ms, "proof", object.clone(), format!("{host} is proven lost: {how}")),
    ];
    let incident = Incident {
        number: lost.incident,
        title: format!("{host} was lost with {} VMs", waiting_for.len()),
        host: host.clone(),
        session: lost.session,
        vm: None,
        waiting_for,
        steps,
        closed_ms: None,
    };
    let reason = format!("incident {}: {}", incident.number, incident.title);
    work.act(
        object,
        reason,
        Action::PutIncident { incident: Box::new(incident), expected_revision: 0 },
    );
}

fn wanted<'a>(snapshot: &'a Snapshot, vm: &Name) -> Option<&'a Versioned<Stored<VmSpec>>> {
    snapshot.vms.get(vm).filter(|vm| vm.spec.running && !vm.meta.deleting)
}

/// The incident with every step that the snapshot shows by now.
fn advance(snapshot: &Snapshot, incident: &Incident, now_ms: i64) -> Incident {
    let mut next = incident.clone();
    let mut open = Vec::new();
    for vm in &incident.waiting_for {
        let Some(object) = wanted(snapshot, vm) else {
            continue;
        };
        if !follow_vm(snapshot, &mut next, vm, object.spec.check.is_some(), now_ms) {
            open.push(vm.clone());
        }
    }
    next.steps.sort_by_key(|step| step.at_ms);
    if open.is_empty() {
        let last = next.steps.iter().map(|s| s.at_ms).max().unwrap_or(now_ms);
        let closed = if incident.waiting_for.is_empty() { now_ms } else { last };
        next.closed_ms = Some(closed);
        let object = host_ref(&incident.host);
        next.steps.push(step(closed, "closed", object, "everything it ran runs again".into()));
    }
    next
}

/// Adds the steps of one VM; true when it has recovered.
fn follow_vm(
    snapshot: &Snapshot,
    incident: &mut Incident,
    vm: &Name,
    has_check: bool,
    now_ms: i64,
) -> bool {
    let Some(placement) = snapshot.placements.get(vm) else {
        return false;
    };
    let proof_ms = incident.steps.iter().find(|s| s.phase == "proof").map_or(0, |s| s.at_ms);
    let host = &placement.host;
    if *host == incident.host
        && snapshot.leases.get(host).is_none_or(|l| l.session <= incident.session)
    {
        return false;
    }
    add(incident, now_ms, "placed", vm, format!("{vm} was given to {host}"));
    let Some(status) = snapshot.told_of(vm) else {
        return false;
    };
    let Some(started) = status.started_ms.filter(|at| *at >= proof_ms) else {
        return false;
    };
    add(incident, started, "started", vm, format!("{vm} runs on {host}"));
    if !has_check {
        return true;
    }
    let Some(ready) = status.ready_ms.filter(|at| *at >= started) else {
        return false;
    };
    add(incident, ready, "ready", vm, format!("{vm} passes its health check"));
    true
}

fn add(incident: &mut Incident, at_ms: i64, phase: &str, vm: &Name, message: String) {
    let object = vm_ref(vm);
    if !incident.steps.iter().any(|s| s.phase == phase && s.object == object) {
        incident.steps.push(step(at_ms, phase, object, message));
    }
}
