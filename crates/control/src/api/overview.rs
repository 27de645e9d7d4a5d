//! The cluster on one screen.

use super::{ApiState, auth, certificates, objects::vm_state};
use haven_model::{
    Name, Snapshot,
    api::{HostLine, Overview, ServiceLine},
    vm::pending_words,
};
use haven_plan::{HostState, placement::capacity::Room};
use std::collections::BTreeMap;

/// Composes it from the live copy; `leader` is the store's leading member, where one is known.
#[must_use]
pub fn overview(state: &ApiState, leader: Option<u64>) -> Overview {
    let (snapshot, seen) = (state.snapshot(), (state.seen)());
    let states = haven_plan::host_states(&snapshot, &seen);
    let mut overview = Overview {
        cluster: snapshot.cluster_spec().name.clone(),
        survivable: haven_plan::losses_survivable(&snapshot, &seen),
        ..Overview::default()
    };
    hosts(&snapshot, &states, leader, &mut overview);
    services(&snapshot, &mut overview);
    vms(&snapshot, &mut overview);
    overview.risks.extend(certificates::risks(&snapshot, auth::now_ms()));
    let plan = haven_plan::plan(&snapshot, &seen);
    overview.risks.extend(plan.waiting.iter().map(|w| format!("{}: {}", w.object, w.reason)));
    if overview.survivable == 0 && overview.hosts.len() > 1 {
        overview.risks.push(
            "no further host may be lost: too few voters or too little memory would be left".into(),
        );
    }
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
            let online = matches!(state, HostState::Online | HostState::Cordoned);
            overview.voters.0 += usize::from(online && answers);
        }
        for (service, frontend) in snapshot.frontends.iter().filter(|(_, f)| f.holder == *name) {
            let address = snapshot.services.get(service).and_then(|s| s.spec.frontend.as_ref());
            roles.push(address.map_or_else(
                || format!("holds {}", frontend.epoch),
                |f| format!("holds {}", f.address),
            ));
        }
        if !matches!(state, HostState::Online | HostState::Cordoned) {
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
