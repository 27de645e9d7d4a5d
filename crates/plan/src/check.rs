//! The invariants that every plan keeps, checked apart from the code that makes plans.
//!
//! The manager checks each plan before it commits; the property tests and the simulator check with the same code.

use crate::placement::capacity::cost;
use haven_model::{Action, Name, Placement, Plan, Snapshot};
use std::collections::{BTreeMap, BTreeSet};

/// Checks.
///
/// # Errors
/// The broken invariant, in words.
pub fn check(snapshot: &Snapshot, plan: &Plan) -> Result<(), String> {
    let mut placements: BTreeMap<Name, Placement> =
        snapshot.placements.iter().map(|(n, p)| (n.clone(), (*p.value).clone())).collect();
    let mut touched = BTreeSet::new();
    for planned in &plan.actions {
        if planned.reason.is_empty() {
            return Err(format!("an action on {} has no reason", planned.object));
        }
        let Action::PlaceVm { vm, placement, expected_revision, taken_from } = &planned.action
        else {
            continue;
        };
        if !touched.insert(vm.clone()) {
            return Err(format!("{vm} is placed twice in one plan"));
        }
        let old = placements.get(vm);
        if placement.epoch != old.map_or(0, |p| p.epoch) + 1 {
            return Err(format!(
                "{vm} goes from epoch {:?} to {}",
                old.map(|p| p.epoch),
                placement.epoch
            ));
        }
        if *expected_revision != snapshot.placements.get(vm).map_or(0, |p| p.revision) {
            return Err(format!("{vm} is placed over a revision that was not read"));
        }
        if let Some(old) = old
            && old.host != placement.host
        {
            proven(snapshot, vm, old, taken_from.as_ref())?;
        }
        placements.insert(vm.clone(), placement.clone());
    }
    unique(&placements)?;
    capacity(snapshot, &placements, &touched)
}

fn proven(
    snapshot: &Snapshot,
    vm: &Name,
    old: &Placement,
    proof: Option<&haven_model::plan::TakenFrom>,
) -> Result<(), String> {
    let proof = proof.ok_or_else(|| format!("{vm} is taken from {} without a proof", old.host))?;
    let lease = snapshot.leases.get(&old.host);
    let closed = lease.is_some_and(|l| {
        l.closed
            && l.revision == proof.lease_revision
            && snapshot.lost.get(&old.host).is_some_and(|lost| lost.session == l.session)
    });
    if proof.host == old.host && closed {
        Ok(())
    } else {
        Err(format!("{vm} is taken from {} whose session is not closed under a proof", old.host))
    }
}

fn unique(placements: &BTreeMap<Name, Placement>) -> Result<(), String> {
    let (mut slots, mut addresses) = (BTreeMap::new(), BTreeMap::new());
    for (vm, placement) in placements {
        if let Some(other) = slots.insert(placement.slot, vm) {
            return Err(format!("{vm} and {other} have the same slot {}", placement.slot));
        }
        for nic in &placement.nics {
            if let Some(other) = addresses.insert((&nic.network, nic.ip), vm) {
                return Err(format!("{vm} and {other} have the same address {}", nic.ip));
            }
        }
    }
    Ok(())
}

/// No host that this plan adds to is promised more memory than it has.
fn capacity(
    snapshot: &Snapshot,
    placements: &BTreeMap<Name, Placement>,
    touched: &BTreeSet<Name>,
) -> Result<(), String> {
    let mut used: BTreeMap<&Name, u64> = BTreeMap::new();
    for (name, placement) in placements {
        if let Some(vm) = snapshot.vms.get(name) {
            *used.entry(&placement.host).or_default() += cost(&vm.spec).memory;
        }
    }
    let added: BTreeSet<&Name> =
        touched.iter().filter_map(|vm| placements.get(vm)).map(|p| &p.host).collect();
    for host in added {
        let Some((status, object)) = snapshot.host_status.get(host).zip(snapshot.hosts.get(host))
        else {
            return Err(format!("a VM is placed on {host}, which has not reported"));
        };
        let has = status.memory.0.saturating_sub(object.spec.reserved_memory.0);
        let promised = used.get(host).copied().unwrap_or(0);
        if promised > has {
            return Err(format!("{host} is promised {promised} bytes of {has}"));
        }
    }
    Ok(())
}
