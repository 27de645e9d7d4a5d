//! The cluster on one screen.

use super::{ApiState, auth, certificates, objects::vm_state};
use haven_model::{
    Name, Observations, Snapshot,
    api::{HostLine, Overview, ServiceLine},
    vm::pending_words,
};
use haven_plan::{HostState, Losses, placement::capacity::Room};
use std::collections::BTreeMap;

/// Composes it from the live copy; `leader` is the store's leading member, where one is known.
#[must_use]
pub fn overview(state: &ApiState, leader: Option<u64>) -> Overview {
    let (snapshot, seen) = (state.snapshot(), (state.seen)());
    let states = haven_plan::host_states(&snapshot, &seen);
    let losses = haven_plan::losses(&snapshot, &seen);
    let mut overview = Overview {
        cluster: snapshot.cluster_spec().name.clone(),
        survivable: losses.both(),
        survivable_vms: losses.vms,
        survivable_store: losses.store,
        ..Overview::default()
    };
    hosts(&snapshot, &states, leader, &mut overview);
    services(&snapshot, &mut overview);
    vms(&snapshot, &mut overview);
    overview.risks.extend(certificates::risks(&snapshot, auth::now_ms()));
    let plan = haven_plan::plan(&snapshot, &seen);
    overview.risks.extend(plan.waiting.iter().map(|w| format!("{}: {}", w.object, w.reason)));
    overview.risks.extend(losses_words(&losses, overview.hosts.len()));
    overview.risks.extend(two_without_a_witness(&snapshot));
    overview.risks.extend(haven_plan::storage::risks(&snapshot));
    overview.advice.extend(uneven(&snapshot, &seen));
    overview.revision = snapshot.revision;
    let open = snapshot.incidents.values().filter(|i| i.closed_ms.is_none());
    overview.incidents = open.map(|i| format!("incident {}: {}", i.number, i.title)).collect();
    overview.headline = match overview.down.len() {
        0 if overview.risks.is_empty() => "everything is well".into(),
        0 => format!("everything runs, but {}", overview.risks[0]),
        1 => overview.down[0].clone(),
        n => format!("{n} things are down, the first: {}", overview.down[0]),
    };
    overview
}

/// The move that would help most, where nobody makes it by himself.
fn uneven(snapshot: &Snapshot, seen: &Observations) -> Option<String> {
    let best = haven_plan::advice(snapshot, seen)?;
    Some(format!("{}; `haven rebalance` does that", best.reason))
}

/// Two hosts alone have no majority once one is lost.
fn two_without_a_witness(snapshot: &Snapshot) -> Option<String> {
    let [one, other] = &*snapshot.hosts.keys().collect::<Vec<_>>() else { return None };
    Some(format!(
        "{one} and {other} cannot make up for the loss of each other: half of the votes is no majority; add a third host, or a small machine with `haven witness`"
    ))
}

/// What is at risk if another host is lost.
fn losses_words(losses: &Losses, hosts: usize) -> Vec<String> {
    let mut risks = Vec::new();
    if losses.store == 0 && hosts > 1 {
        risks.push("no further voter may be lost: the store would have no quorum".into());
    }
    match &losses.short {
        Some(short) => risks.push(format!(
            "memory is to be kept for the loss of {} hosts, and is there for {}: {short}",
            losses.reserved, losses.vms
        )),
        None if losses.vms == 0 && hosts > 1 => {
            risks.push("no further host may be lost: its VMs would find no place".into());
        }
        None => {}
    }
    risks
}

fn hosts(
    snapshot: &Snapshot,
    states: &BTreeMap<Name, HostState>,
    leader: Option<u64>,
    overview: &mut Overview,
) {
    let room = Room::of(snapshot, states);
    for (name, host) in &snapshot.hosts {
        let state = states.get(name).copied().unwrap_or(HostState::Joining);
        let mut roles = Vec::new();
        if snapshot.manager.as_ref().is_some_and(|m| m.holder == *name) {
            roles.push("manager".to_owned());
        }
        let status = snapshot.host_status.get(name);
        let member = status.and_then(|s| s.etcd_member);
        let answers = status.is_some_and(|s| !s.etcd_silent);
        if member.is_some() && member == leader {
            roles.push("store leader".into());
        }
        if member.is_some() {
            roles.push("voter".into());
            overview.voters.1 += 1;
            let online = state.well();
            overview.voters.0 += usize::from(online && answers);
        }
        for (service, frontend) in snapshot.frontends.iter().filter(|(_, f)| f.holder == *name) {
            let address = snapshot.services.get(service).and_then(|s| s.spec.frontend.as_ref());
            roles.push(address.map_or_else(
                || format!("holds {}", frontend.epoch),
                |f| format!("holds {}", f.address),
            ));
        }
        if let Some(drain) = haven_plan::tolerance::drain::stands(snapshot, name) {
            overview.risks.push(format!(
                "{name} is {state}, as {} asked: `haven host undrain {name}` lets it take VMs again",
                drain.by
            ));
            let cost = haven_plan::tolerance::drain::costs_quorum(snapshot, states, name);
            overview.risks.extend(cost);
        }
        if !state.well() {
            overview.down.push(format!("{name} is {state}"));
        }
        if let Some(status) = snapshot.host_status.get(name) {
            overview.risks.extend(status.problems.iter().map(|p| format!("{name}: {p}")));
        }
        let of = room.of_host(name);
        overview.hosts.push(HostLine {
            name: name.to_string(),
            address: host.spec.address.to_string(),
            state: state.to_string(),
            vms: snapshot.placements.values().filter(|p| p.host == *name).count(),
            memory_used: of.map_or(0, |r| r.memory_used),
            memory: of.map_or(0, |r| r.memory),
            roles,
        });
    }
}

fn services(snapshot: &Snapshot, overview: &mut Overview) {
    for (name, service) in &snapshot.services {
        let ready =
            snapshot.members(name).filter(|(vm, _)| vm_state(snapshot, vm) == "ready").count();
        let wanted = service.spec.replicas as usize;
        if ready == 0 && wanted > 0 {
            overview.down.push(format!("service {name} has no member ready"));
        } else if ready < wanted {
            overview.risks.push(format!("service {name} has {ready} of {wanted} members ready"));
        }
        let frontend = service.spec.frontend.as_ref();
        overview.services.push(ServiceLine {
            name: name.to_string(),
            ready,
            wanted,
            address: frontend.map(|f| format!("{}:{}", f.address, f.port)).unwrap_or_default(),
            holder: snapshot.frontends.get(name).map(|f| f.holder.to_string()).unwrap_or_default(),
        });
    }
}

fn vms(snapshot: &Snapshot, overview: &mut Overview) {
    for (name, vm) in snapshot.vms.iter().filter(|(_, vm)| vm.spec.running && !vm.meta.deleting) {
        let state = vm_state(snapshot, name);
        overview.vms.1 += 1;
        overview.vms.0 += usize::from(matches!(state.as_str(), "ready" | "running" | "unwell"));
        if vm.meta.owner.is_none() && !matches!(state.as_str(), "ready" | "running") {
            overview.down.push(format!("VM {name} is {state}"));
        }
        let pending = snapshot.pending(name);
        if !pending.is_empty() {
            overview.risks.push(pending_words(name, &pending));
        }
    }
}
