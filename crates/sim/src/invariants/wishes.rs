//! Wishes: no VM is placed beside one that it must be apart from, away from one that it must be near to, or on a host
//! that lacks the labels it asks for; members that must stand apart do.

use super::Invariant;
use crate::judge::{Facts, Step};
use haven_model::{Name, Snapshot, VmSpec, object::Stored, vm::Selector};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::Instant;

#[derive(Default)]
pub(super) struct Wishes {
    /// When placements, or what the VMs ask for, could not be read last, by VM: a plan may be older than what tells of them
    /// now.
    unread: BTreeMap<Name, Instant>,
}

/// A VM is there to be near to once it has run for so long: a plan may be older than its start.
const THERE: Duration = Duration::from_secs(3);

impl Invariant for Wishes {
    fn check(&mut self, facts: &Facts, step: &Step<'_>) -> Result<(), String> {
        let Step::Transaction(before) = step else { return Ok(()) };
        let of = |key: &String| {
            let name = key.strip_prefix("placement/vm/").or(key.strip_prefix("spec/vm/"))?;
            Name::new(name).ok()
        };
        let unread = before.unreadable.keys().filter_map(of);
        let now = Instant::now();
        self.unread.extend(unread.map(|vm| (vm, now)));
        self.unread.retain(|_, at| at.elapsed() < THERE);
        for (name, placement) in &facts.snapshot.placements {
            let host = placement.host.as_str();
            let stays = before.placements.get(name).is_some_and(|old| old.host.as_str() == host)
                // Nobody placed it now: the record that a fault had made unreadable is what it was.
                || before.unreadable.contains_key(&format!("placement/vm/{name}"));
            if let Some(vm) = facts.snapshot.vms.get(name).filter(|_| !stays) {
                placed(facts, vm, host, &self.unread).map_err(|what| format!("wishes: {what}"))?;
            }
        }
        Ok(())
    }
}

fn placed(
    facts: &Facts,
    vm: &Stored<VmSpec>,
    host: &str,
    unread: &BTreeMap<Name, Instant>,
) -> Result<(), String> {
    let (name, wish) = (&vm.meta.name, &vm.spec.affinity);
    let labels = facts.snapshot.hosts.get(host).map(|host| &host.meta.labels);
    if !wish.hosts.is_empty() && !labels.is_some_and(|labels| has(labels, &wish.hosts)) {
        return Err(format!("{name} goes to {host}, which lacks its labels"));
    }
    let (mut near_here, mut near_elsewhere) = (false, false);
    for (other_host, other) in others(&facts.snapshot, vm) {
        let beside = other_host == host;
        let apart = [(vm, other), (other, vm)].iter().any(|(asks, of)| {
            let wish = &asks.spec.affinity;
            !wish.soft && !wish.apart.is_empty() && has(&of.meta.labels, &wish.apart)
        });
        // A lost host's VMs are recovered although nobody knows where others are that cannot be read.
        if beside && apart && !unread.contains_key(&other.meta.name) {
            return Err(format!("{name} goes to {host} beside {}", other.meta.name));
        }
        if !wish.soft && !wish.near.is_empty() && has(&other.meta.labels, &wish.near) {
            near_here |= beside;
            let key = (other_host.to_owned(), other.meta.name.to_string());
            let runs = facts.executing(other.meta.name.as_str()).contains(&other_host);
            let long = |since: Instant| since.elapsed() >= THERE;
            near_elsewhere |= runs && facts.running.get(&key).is_some_and(|r| long(r.since));
        }
        if must_differ(&facts.snapshot, vm, other)
            && domains_match(&facts.snapshot, vm, host, other_host)
        {
            return Err(format!("{name} and {} share what they must not", other.meta.name));
        }
    }
    if near_elsewhere && !near_here {
        return Err(format!("{name} goes to {host}, and what it must be near to is elsewhere"));
    }
    Ok(())
}

/// The other VMs on hosts that are not lost.
fn others<'a>(
    snapshot: &'a Snapshot,
    vm: &'a Stored<VmSpec>,
) -> impl Iterator<Item = (&'a str, &'a Stored<VmSpec>)> {
    snapshot.placements.iter().filter_map(|(name, placement)| {
        let open = snapshot.leases.get(&placement.host).is_some_and(|lease| !lease.closed);
        // A manager that came after its record became unreadable knows none of its labels, and recovers others anyway.
        let known = !snapshot.unreadable.contains_key(&format!("spec/vm/{name}"));
        let counts = open && known && *name != vm.meta.name;
        let other = snapshot.vms.get(name).filter(|_| counts)?;
        Some((placement.host.as_str(), &*other.value))
    })
}

fn has(labels: &BTreeMap<String, String>, wanted: &Selector) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn must_differ(snapshot: &Snapshot, vm: &Stored<VmSpec>, other: &Stored<VmSpec>) -> bool {
    let Some(owner) = vm.meta.owner.as_ref().filter(|_| vm.meta.owner == other.meta.owner) else {
        return false;
    };
    snapshot.services.get(&owner.name).is_some_and(|service| service.spec.spread.required)
}

fn domains_match(snapshot: &Snapshot, vm: &Stored<VmSpec>, one: &str, other: &str) -> bool {
    let service = vm.meta.owner.as_ref().and_then(|owner| snapshot.services.get(&owner.name));
    let Some(by) = service.map(|service| service.spec.spread.by.as_str()) else { return false };
    let domain = |host: &str| snapshot.hosts.get(host)?.meta.labels.get(by).cloned();
    one == other || (by != "host" && domain(one).is_some() && domain(one) == domain(other))
}
