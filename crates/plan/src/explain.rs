//! Answers in words, from the same code that decides.

use crate::{
    host_states, plan,
    tolerance::{drain, hosts::HostState, recovery::bound_by, removal::users},
};
use haven_model::{Name, ObjectRef, Observations, Snapshot, object::Kind, vm::pending_words};

/// What there is to say of an object now, a sentence each.
#[must_use]
pub fn explain(snapshot: &Snapshot, seen: &Observations, object: &ObjectRef) -> Vec<String> {
    let mut said = match object.kind {
        Kind::Vm => vm(snapshot, seen, &object.name),
        Kind::Host => host(snapshot, seen, &object.name),
        Kind::Service => service(snapshot, seen, &object.name),
        Kind::Pool | Kind::Image | Kind::Network | Kind::Certificate | Kind::Target => {
            let users = users(snapshot, object.kind, &object.name);
            let mut said = match users.is_empty() {
                true => vec![format!("nothing uses {object}")],
                false => vec![format!("{object} is used by {}", users.join(", "))],
            };
            if object.kind == Kind::Pool {
                said.extend(crate::storage::in_words(snapshot, &object.name));
            }
            said
        }
    };
    if matches!(object.kind, Kind::Vm | Kind::Host) {
        let about = crate::advice(snapshot, seen).filter(|of| {
            of.vm == object.name && object.kind == Kind::Vm
                || of.from == object.name && object.kind == Kind::Host
        });
        said.extend(about.map(|of| format!("would help: {}", of.reason)));
    }
    let plan = plan(snapshot, seen);
    said.extend(
        plan.actions.iter().filter(|a| a.object == *object).map(|a| format!("next: {}", a.reason)),
    );
    said.extend(plan.waiting.iter().filter(|w| w.object == *object).map(|w| w.reason.clone()));
    if object.kind == Kind::Service {
        // What its members wait for, it waits for.
        let member = |of: &ObjectRef| {
            let vm = snapshot.vms.get(&of.name).filter(|_| of.kind == Kind::Vm);
            vm.is_some_and(|vm| vm.meta.owner.as_ref() == Some(object))
        };
        said.extend(plan.waiting.iter().filter(|w| member(&w.object)).map(|w| w.reason.clone()));
    }
    said
}

fn vm(snapshot: &Snapshot, seen: &Observations, name: &Name) -> Vec<String> {
    let Some(vm) = snapshot.vms.get(name) else {
        return vec![format!("there is no VM `{name}`")];
    };
    let mut said = Vec::new();
    if !vm.spec.running {
        said.push(format!("{name} is switched off; `haven vm start {name}` starts it"));
    }
    let Some(placement) = snapshot.placements.get(name) else {
        said.push(format!("{name} has no host yet"));
        return said;
    };
    let states = host_states(snapshot, seen);
    let host = &placement.host;
    let state = states.get(host).copied().unwrap_or(HostState::Joining);
    said.push(format!("{name} belongs to {host} ({state}) under epoch {}", placement.epoch));
    match snapshot.told_of(name) {
        Some(status) => {
            let ready = match (status.ready, vm.spec.check.is_some()) {
                (Some(true), _) => ", its health check passes",
                (Some(false), _) => ", its health check fails",
                (None, true) => ", its health check has not passed yet",
                (None, false) => "",
            };
            said.push(format!("{host} reports it {}{ready}", status.phase.as_str()));
            let pending = snapshot.pending(name);
            if !pending.is_empty() {
                said.push(pending_words(name, &pending));
            }
            if !status.message.is_empty() {
                said.push(format!("{host} says: {}", status.message));
            }
            if status.restarts > 0 {
                said.push(format!("it ended by itself {} times there", status.restarts));
            }
        }
        _ => said.push(format!("{host} has not reported it under this epoch")),
    }
    said.push(if let Some((disk, pool)) = bound_by(snapshot, vm) {
        format!(
            "if {host} dies it waits for {host}: its disk `{disk}` lives in the local pool `{pool}`"
        )
    } else {
        format!("if {host} dies it restarts elsewhere once that is proven")
    });
    said
}

fn host(snapshot: &Snapshot, seen: &Observations, name: &Name) -> Vec<String> {
    let Some(state) = host_states(snapshot, seen).get(name).copied() else {
        return vec![format!("there is no host `{name}`")];
    };
    let vms = snapshot.placements.values().filter(|p| p.host == *name).count();
    let mut said = vec![format!("{name} is {state} and has {vms} VMs")];
    if let Some(lease) = snapshot.leases.get(name) {
        let word = if lease.closed { "closed" } else { "open" };
        said.push(format!("its session {} is {word}", lease.session));
    }
    said.extend(drained(snapshot, seen, name));
    if let Some(status) = snapshot.host_status.get(name) {
        said.extend(status.problems.iter().cloned());
    }
    said
}

/// What there is to say of the drain of a host.
fn drained(snapshot: &Snapshot, seen: &Observations, host: &Name) -> Vec<String> {
    let view = drain::view(snapshot, seen, host);
    let Some(of) = &view.drain else { return Vec::new() };
    let mut said = vec![if of.bringing_back {
        format!("its drain was ended, and {} VMs are still to come back", view.away.len())
    } else {
        format!(
            "it is {}, as {} asked: {} VMs are left, {} were moved; `haven host undrain {host}` ends that",
            view.state,
            of.by,
            view.left.len(),
            view.moved.len()
        )
    }];
    said.extend(view.left.iter().chain(&view.away).map(|left| left.why.clone()));
    if !view.addresses.is_empty() && !of.bringing_back {
        said.extend(view.addresses.iter().cloned());
    }
    if !view.resting.is_empty() {
        let names: Vec<&str> = view.resting.iter().map(Name::as_str).collect();
        said.push(format!("these do not run and have their place there: {}", names.join(", ")));
    }
    said.extend(view.quorum);
    said
}

fn service(snapshot: &Snapshot, seen: &Observations, name: &Name) -> Vec<String> {
    let Some(service) = snapshot.services.get(name) else {
        return vec![format!("there is no service `{name}`")];
    };
    let members: Vec<&Name> = snapshot.members(name).map(|(vm, _)| vm).collect();
    let ready = members
        .iter()
        .filter(|vm| snapshot.told_of(vm).is_some_and(|s| s.ready == Some(true)))
        .count();
    let mut said = vec![format!("{name} has {ready} of {} members ready", service.spec.replicas)];
    if let (Some(frontend), Some(placement)) =
        (&service.spec.frontend, snapshot.frontends.get(name))
    {
        let next: Vec<&str> = placement
            .candidates
            .iter()
            .filter(|c| **c != placement.holder)
            .map(Name::as_str)
            .collect();
        said.push(format!(
            "{} holds {}:{}; next in line: {}",
            placement.holder,
            frontend.address,
            frontend.port,
            if next.is_empty() { "nobody".into() } else { next.join(", ") }
        ));
    }
    let progress = crate::balance::services::progress(snapshot, seen, name);
    said.extend(progress.and_then(|progress| progress.traffic));
    said
}
