//! Which host holds each service's address, and who takes it next.
//!
//! The quick takeover on mere suspicion is the agents' (they can probe for the address); the plan chooses the first
//! holder, moves an address from a host that is proven lost, and keeps the list of candidates. The split of the traffic
//! stands in the same record, as the service's update wants it, so that every host sees it at one instant.

use crate::{
    tolerance::hosts::HostState,
    work::{Work, service_ref},
};
use haven_model::{Action, FrontendPlacement, Name, Snapshot, Versioned};
use std::{collections::BTreeMap, net::Ipv4Addr};

/// Plans every frontend.
pub(crate) fn plan(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    let usable: Vec<Name> = work
        .states
        .iter()
        .filter(|(_, state)| state.usable())
        .map(|(host, _)| host.clone())
        .collect();
    let mut held: BTreeMap<Name, usize> = usable.iter().map(|host| (host.clone(), 0)).collect();
    for placement in snapshot.frontends.values() {
        *held.entry(placement.holder.clone()).or_default() += 1;
    }
    let owners = owners(snapshot);
    for (name, service) in &snapshot.services {
        let placement = snapshot.frontends.get(name);
        let frontend = service.spec.frontend.as_ref().filter(|_| !service.meta.deleting);
        let wanted = frontend.filter(|f| owners.get(&f.address) == Some(&name));
        if let Some((owner, of)) = frontend.and_then(|f| Some((owners.get(&f.address)?, f)))
            && wanted.is_none()
        {
            let why = format!(
                "waiting: the address {} is that of service/{owner}; give {name} one of its own",
                of.address
            );
            work.wait(service_ref(name), why);
        }
        match (wanted, placement) {
            (None, Some(placement)) => {
                let action = Action::ReleaseFrontend {
                    service: name.clone(),
                    expected_revision: placement.revision,
                };
                work.act(service_ref(name), format!("{name} no longer has an address"), action);
            }
            (None, None) => {}
            (Some(frontend), placement) => {
                let reached = |host: &&Name| !work.cut_off.is(host, &service_ref(name));
                let usable: Vec<Name> = usable.iter().filter(reached).cloned().collect();
                keep(work, name, frontend.address, placement, &usable, &mut held);
            }
        }
    }
}

/// Whose an address is: an address has one holder, so it belongs to one service, the one that has it or is older.
fn owners(snapshot: &Snapshot) -> BTreeMap<Ipv4Addr, &Name> {
    let mut services: Vec<_> = snapshot
        .services
        .iter()
        // One that goes has its address until it is released.
        .filter(|(name, service)| !service.meta.deleting || snapshot.frontends.contains_key(*name))
        .filter_map(|(name, service)| Some((name, service, service.spec.frontend.as_ref()?)))
        .collect();
    services.sort_by_key(|(name, service, _)| {
        (!snapshot.frontends.contains_key(*name), service.meta.created_ms, *name)
    });
    let mut owners = BTreeMap::new();
    for (name, _, frontend) in services {
        owners.entry(frontend.address).or_insert(name);
    }
    owners
}

/// Keeps one frontend: its holder as long as it is not lost, and the list of candidates.
fn keep(
    work: &mut Work<'_>,
    name: &Name,
    address: Ipv4Addr,
    placement: Option<&Versioned<FrontendPlacement>>,
    usable: &[Name],
    held: &mut BTreeMap<Name, usize>,
) {
    let split = work.splits.remove(name);
    let traffic = match (&split, placement) {
        (Some(split), _) => split.traffic.clone(),
        (None, now) => now.map(|now| now.traffic.clone()).unwrap_or_default(),
    };
    let drained = placement.map(|p| &p.holder).filter(|holder| is_drained(work, holder));
    let service = service_ref(name);
    let holds = |holder: &Name| stays(work, holder, usable) && !work.cut_off.is(holder, &service);
    let next = match placement.filter(|p| holds(&p.holder)) {
        Some(now) => {
            if let Some(holder) = drained {
                let why = format!(
                    "waiting: {address} stays on {holder}, which is drained: no other host is online"
                );
                work.wait(service_ref(name), why);
            }
            let may = |host: &&Name| !is_drained(work, host) && !work.cut_off.is(host, &service);
            let line: Vec<Name> = now.candidates.iter().filter(may).cloned().collect();
            let candidates = candidates(&line, usable, &now.holder);
            FrontendPlacement { candidates, traffic, ..(*now.value).clone() }
        }
        None => {
            let Some(holder) = least(held, usable) else {
                let why = format!("waiting: no host is online to hold {address}");
                return work.wait(service_ref(name), why);
            };
            *held.entry(holder.clone()).or_default() += 1;
            let epoch = placement.map_or(1, |old| old.epoch + 1);
            FrontendPlacement {
                candidates: candidates(&[], usable, &holder),
                holder,
                from: drained.cloned(),
                epoch,
                traffic,
            }
        }
    };
    if placement.is_some_and(|now| *now.value == next) {
        return;
    }
    let reason = match placement {
        Some(now) if now.traffic != next.traffic && now.holder == next.holder => {
            split.map(|split| split.why).unwrap_or_default()
        }
        Some(now) if now.holder == next.holder => {
            format!("the hosts that may take {address} are now {}", list(&next.candidates))
        }
        Some(now) => {
            let why = match (&drained, work.cut_off.is(&now.holder, &service)) {
                (Some(_), _) => "is drained",
                (None, true) => "is cut off from its network",
                (None, false) => "is lost",
            };
            format!("{} takes {address} because {} {why}", next.holder, now.holder)
        }
        None => format!("{} holds {address}", next.holder),
    };
    let expected_revision = placement.map_or(0, |p| p.revision);
    let action =
        Action::PlaceFrontend { service: name.clone(), placement: next, expected_revision };
    work.act(service_ref(name), reason, action);
}

fn list(hosts: &[Name]) -> String {
    hosts.iter().map(Name::as_str).collect::<Vec<_>>().join(", ")
}

/// A holder keeps an address unless it is proven lost or gone, or is drained and there is another; agents deal with a
/// suspected one. One whose uplink has no link is asked for beside this.
fn stays(work: &Work<'_>, holder: &Name, usable: &[Name]) -> bool {
    let leaves = is_drained(work, holder) && !usable.is_empty();
    !leaves && work.states.get(holder).is_some_and(|state| !matches!(state, HostState::Lost(_)))
}

fn is_drained(work: &Work<'_>, host: &Name) -> bool {
    matches!(work.states.get(host), Some(HostState::Draining | HostState::Drained))
}

fn least(held: &BTreeMap<Name, usize>, usable: &[Name]) -> Option<Name> {
    usable
        .iter()
        .min_by_key(|host| (held.get(*host).copied().unwrap_or(0), (*host).clone()))
        .cloned()
}

/// The usable hosts: the holder first, then those that were candidates already in their order, then the others. While
/// hosts are missing the list stays as it was, so that a short silence writes nothing.
fn candidates(now: &[Name], usable: &[Name], holder: &Name) -> Vec<Name> {
    if !now.is_empty()
        && now.first() == Some(holder)
        && usable.iter().all(|host| now.contains(host))
    {
        return now.to_vec();
    }
    let mut next = vec![holder.clone()];
    next.extend(now.iter().filter(|host| usable.contains(host) && *host != holder).cloned());
    for host in usable {
        if !next.contains(host) {
            next.push(host.clone());
        }
    }
    next
}
