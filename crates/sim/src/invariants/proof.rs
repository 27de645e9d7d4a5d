//! No start without proof: a VM changes its owner only when the old owner's session is closed under a proof, and a
//! session is closed only when the proof is true: nothing of that host executes any more, and it answers for no service
//! address, so that the next holder is the only one. Or all its disks are shut to whatever runs there, and it is one that may be
//! taken over then: that nothing is written any more is for the disks themselves to see (`haven_host::vm::fake_mirrors`).

use super::Invariant;
use crate::{
    judge::{Facts, Step},
    net::Power,
};
use haven_model::{Name, ObjectRef, Snapshot, object::Kind};
use haven_plan::storage::shutting;

pub(super) struct Proof;

impl Invariant for Proof {
    fn check(&mut self, facts: &Facts, step: &Step<'_>) -> Result<(), String> {
        let Step::Transaction(before) = step else { return Ok(()) };
        for (host, lease) in &facts.snapshot.leases {
            let newly = before.leases.get(host).is_none_or(|old| old.revision != lease.revision);
            if newly && lease.closed {
                closed(facts, host.as_str(), lease.session)?;
            }
        }
        for (vm, placement) in &facts.snapshot.placements {
            let Some(old) = before.placements.get(vm) else { continue };
            if old.host == placement.host {
                continue;
            }
            // One that was not to be moved live was stopped first.
            let restarts =
                old.moving_to.as_ref().is_some_and(|to| to.restart && to.host == placement.host);
            if restarts && facts.snapshot.session_open(&old.host) {
                moved(facts, vm.as_str(), old.host.as_str())?;
                continue;
            }
            if let Some(from) = placement.moved_from.as_ref().filter(|from| from.host == old.host) {
                moved(facts, vm.as_str(), from.host.as_str())?;
                continue;
            }
            if placement.failed_on.as_ref().is_some_and(|from| from.host == old.host) {
                given_up(facts, before, vm, old.host.as_str())?;
                continue;
            }
            let shut = facts.snapshot.leases.get(&old.host).is_some_and(|lease| {
                let lost = facts.snapshot.lost.get(&old.host);
                lease.closed && lost.is_some_and(|lost| lost.session == lease.session)
            });
            // Nothing of a host is proven where a VM is taken from it for its disks' sake.
            let object = before.vms.get(vm);
            if object.is_some_and(|vm| shutting::shut(before, vm, old)) {
                continue;
            }
            if !shut {
                return Err(format!(
                    "proof: {vm} went from {} to {} and {}'s session is open",
                    old.host, placement.host, old.host
                ));
            }
        }
        for (vm, old) in &before.placements {
            let key = (old.host.to_string(), vm.to_string());
            let executes = facts.running.contains_key(&key)
                && facts.power.get(old.host.as_str()) == Some(&Power::On);
            let there = facts.snapshot.placements.contains_key(vm)
                || facts.snapshot.unreadable_of(&ObjectRef::new(Kind::Vm, vm.clone())).is_some();
            if !there && executes {
                return Err(format!("proof: {vm} was released while it runs on {}", old.host));
            }
        }
        Ok(())
    }
}

/// A VM that is taken from a host that lives has no process there, and that host has said so.
fn given_up(facts: &Facts, before: &Snapshot, vm: &Name, from: &str) -> Result<(), String> {
    // Also in the session before, when it has just opened another one: whoever starts a VM says so first, and the change
    // of owner compares what was said last.
    let said = before.vm_status.get(vm);
    let said = said.is_some_and(|told| told.idle && told.host.as_str() == from);
    if !said {
        return Err(format!("proof: {vm} is taken from {from}, which did not say that it is idle"));
    }
    if facts.running.contains_key(&(from.to_owned(), vm.to_string())) {
        return Err(format!("proof: {vm} is taken from {from}, which has a process of it"));
    }
    Ok(())
}

/// A guest that changes its owner live executes nowhere at that instant.
fn moved(facts: &Facts, vm: &str, from: &str) -> Result<(), String> {
    match facts.executing(vm).first() {
        Some(host) => {
            Err(format!("proof: {vm} was handed over by {from} while it executes on {host}"))
        }
        None => Ok(()),
    }
}

fn closed(facts: &Facts, host: &str, session: u64) -> Result<(), String> {
    let executes = facts.power.get(host) == Some(&Power::On);
    let addresses = facts.segment.held_by(host);
    if let Some(ip) = addresses.first().filter(|_| executes) {
        return Err(format!(
            "proof: session {session} of {host} was closed while it answers for {ip}"
        ));
    }
    let running = facts.running.keys().find(|(on, _)| on == host);
    match running {
        Some((_, vm)) if executes => {
            Err(format!("proof: session {session} of {host} was closed while {vm} executes there"))
        }
        _ => Ok(()),
    }
}
