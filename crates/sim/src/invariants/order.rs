//! Order: a VM gets a host only once what it starts after was ready a moment ago, or after it has waited for as long as
//! it may.

use super::Invariant;
use crate::judge::{Facts, Step};
use haven_model::{
    Name, ObjectRef, Snapshot, VmPhase,
    object::{Kind, Stored},
    vm::DEFAULT_AFTER_TIMEOUT,
};
use std::{collections::BTreeMap, time::Duration};

/// A plan may be so much older than its commit.
const OLD: Duration = Duration::from_secs(3);

#[derive(Default)]
pub(super) struct Order {
    /// When something was ready last.
    ready: BTreeMap<ObjectRef, Duration>,
    /// When it was first noted that a VM waits, and since when it says so.
    waits: BTreeMap<Name, (i64, Duration)>,
}

impl Invariant for Order {
    fn check(&mut self, facts: &Facts, step: &Step<'_>) -> Result<(), String> {
        let Step::Transaction(before) = step else { return Ok(()) };
        let orders = |vm: &Stored<haven_model::VmSpec>| !vm.spec.after.is_empty();
        if !facts.snapshot.vms.values().any(|vm| orders(vm)) {
            return Ok(());
        }
        self.look(before, facts.now);
        for (name, placement) in &facts.snapshot.placements {
            let Some(vm) = facts.snapshot.vms.get(name).filter(|vm| orders(vm)) else { continue };
            let old = before.placements.get(name);
            // It runs already where a live move takes it from, and a record that could not be read was no change.
            let goes_on = old
                .is_some_and(|old| old.host == placement.host || placement.moved_from.is_some())
                || before.unreadable.contains_key(&format!("placement/vm/{name}"));
            if goes_on {
                continue;
            }
            let limit = vm.spec.after_timeout.unwrap_or(DEFAULT_AFTER_TIMEOUT).duration();
            let long = self.waits.get(name).is_some_and(|(_, at)| facts.now + OLD >= *at + limit);
            let ready = |what: &&ObjectRef| {
                self.ready.get(*what).is_some_and(|at| facts.now <= *at + OLD)
                    || nobody_wants(&facts.snapshot, what)
                    || nobody_wants(before, what)
            };
            if let Some(what) = vm.spec.after.iter().find(|what| !ready(what)).filter(|_| !long) {
                return Err(format!("order: {name} gets a host, and {what} is not ready"));
            }
        }
        self.look(&facts.snapshot, facts.now);
        Ok(())
    }
}

impl Order {
    fn look(&mut self, snapshot: &Snapshot, now: Duration) {
        for (name, vm) in &snapshot.vms {
            if is_ready(snapshot, name) {
                let owner = vm.meta.owner.clone();
                let own = ObjectRef::new(Kind::Vm, name.clone());
                self.ready.extend(owner.into_iter().chain([own]).map(|of| (of, now)));
            }
        }
        self.waits.retain(|vm, (since, _)| {
            snapshot.waits.get(vm).is_some_and(|wait| wait.since_ms == *since)
        });
        for (vm, wait) in &snapshot.waits {
            self.waits.entry(vm.clone()).or_insert((wait.since_ms, now));
        }
    }
}

fn is_ready(snapshot: &Snapshot, vm: &Name) -> bool {
    let Some((object, told)) = snapshot.vms.get(vm).zip(snapshot.told_of(vm)) else { return false };
    let checked = object.spec.check.is_none() || told.ready == Some(true);
    checked && matches!(told.phase, VmPhase::Running | VmPhase::Stopping | VmPhase::Stopped)
}

fn nobody_wants(snapshot: &Snapshot, what: &ObjectRef) -> bool {
    match what.kind {
        Kind::Service => snapshot
            .services
            .get(&what.name)
            .is_none_or(|service| service.meta.deleting || service.spec.replicas == 0),
        _ => {
            let vm = snapshot.vms.get(&what.name);
            vm.is_none_or(|vm| vm.meta.deleting || !vm.spec.running)
        }
    }
}
