//! The story of a VM that keeps failing: failed, placed on another host, started, ready, and closed once it runs well.

use super::incidents::{next_number, step};
use crate::{
    tolerance::failing::{failing, words},
    work::{Work, vm_ref},
};
use haven_model::{
    Action, Incident, Name, VmPhase,
    vm::{KEEPS_HANGING, RUNS_WELL},
};

/// Opens an incident for each that has none.
pub(super) fn open(work: &mut Work<'_>) {
    for (name, _, placement, told) in failing(work) {
        let is_open = |incident: &Incident| {
            incident.closed_ms.is_none() && incident.vm.as_ref() == Some(name)
        };
        if work.snapshot.incidents.values().any(|incident| is_open(incident)) {
            continue;
        }
        let title = format!("{name} keeps failing on {}", placement.host);
        let message = match told.message.is_empty() {
            true => format!("it {}", words(told)),
            false => format!("it {}: {}", words(told), told.message),
        };
        let incident = Incident {
            number: next_number(work),
            title,
            host: placement.host.clone(),
            session: told.session,
            vm: Some(name.clone()),
            waiting_for: vec![name.clone()],
            steps: vec![step(told.since_ms, "failed", vm_ref(name), message)],
            closed_ms: None,
        };
        let reason = format!("incident {}: {}", incident.number, incident.title);
        let incident = Box::new(incident);
        work.act(vm_ref(name), reason, Action::PutIncident { incident, expected_revision: 0 });
    }
}

/// The incident with every step that the snapshot shows by now.
pub(super) fn advance(work: &mut Work<'_>, incident: &Incident, name: &Name) -> Incident {
    let (snapshot, now_ms) = (work.snapshot, work.seen.now_ms);
    let mut next = incident.clone();
    let close = |next: &mut Incident, words: String| {
        next.steps.push(step(now_ms, "closed", vm_ref(name), words));
        next.closed_ms = Some(now_ms);
    };
    let Some(vm) = snapshot.vms.get(name).filter(|vm| vm.spec.running && !vm.meta.deleting) else {
        close(&mut next, format!("nobody wants {name} to run any more"));
        return next;
    };
    let Some(placement) = snapshot.placements.get(name) else { return next };
    if placement.host != incident.host {
        add(&mut next, now_ms, "placed", name, format!("{name} was given to {}", placement.host));
    }
    let runs = snapshot.told_of(name).filter(|told| told.phase == VmPhase::Running);
    let Some((told, started)) = runs.and_then(|told| Some((told, told.started_ms?))) else {
        return next;
    };
    let well = told.failures == 0
        && told.hung < KEEPS_HANGING
        && (vm.spec.check.is_none() || told.ready == Some(true));
    let ran_ms = (now_ms - started).max(0).unsigned_abs();
    if well && ran_ms >= RUNS_WELL.0 {
        let (host, long) = (&placement.host, RUNS_WELL);
        add(&mut next, started, "started", name, format!("{name} runs on {host}"));
        close(&mut next, format!("{name} has run for {long} on {host}"));
    } else if well {
        work.wake(RUNS_WELL.0 - ran_ms);
    }
    next
}

fn add(incident: &mut Incident, at_ms: i64, phase: &str, vm: &Name, message: String) {
    if !incident.steps.iter().any(|step| step.phase == phase) {
        incident.steps.push(step(at_ms, phase, vm_ref(vm), message));
    }
}
