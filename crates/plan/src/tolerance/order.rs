//! Who gets a host first: by priority, then by age; and what a VM waits for.
//!
//! What others start after goes with the highest priority and the age of those that wait for it, and before them: else it
//! could find the room taken by what waits for it. A VM that waits keeps the room it will need, so that nothing of a lower
//! priority takes it meanwhile. And it never waits for ever: what is not ready in time is passed over, and this is told.

use crate::{
    placement::{self, Wish},
    work::{Work, vm_ref},
};
use haven_model::{
    Action, Name, ObjectRef, Snapshot, VmPhase, VmSpec,
    object::{Kind, Stored},
    vm::{DEFAULT_AFTER_TIMEOUT, Priority, Wait},
};
use std::{cmp::Reverse, collections::BTreeMap};

/// Longer chains are not followed; a circle, which the API lets nobody write, is one.
const LONGEST_CHAIN: usize = 64;

/// What nobody starts after.
const NOBODY: (Priority, i64) = (Priority::Low, i64::MAX);

/// The place of a VM in the order. The smallest comes first.
pub(crate) type Place = (Reverse<Priority>, i64, usize, Name);

/// How VMs and services stand to each other by what they start after.
#[derive(Default)]
pub(crate) struct Order {
    /// The highest priority of those that start after it, and when the oldest of them was made.
    wanted_by: BTreeMap<ObjectRef, (Priority, i64)>,
    /// How many come before it, one after another.
    depth: BTreeMap<ObjectRef, usize>,
}

impl Order {
    pub fn of(snapshot: &Snapshot) -> Self {
        let mut order = Self::default();
        let waits = |vm: &Stored<VmSpec>| vm.spec.running && !vm.spec.after.is_empty();
        let waiting: Vec<(&Name, &Stored<VmSpec>)> = snapshot
            .vms
            .iter()
            .filter(|(_, vm)| waits(vm) && !vm.meta.deleting)
            .map(|(name, vm)| (name, &*vm.value))
            .collect();
        for _ in 0..LONGEST_CHAIN {
            let rounds = waiting.iter().filter(|(name, vm)| order.follow(name, vm));
            if rounds.count() == 0 {
                break;
            }
        }
        order
    }

    /// Takes in what a VM starts after; true when something changed by it.
    fn follow(&mut self, name: &Name, vm: &Stored<VmSpec>) -> bool {
        let (priority, made_ms) = self.rank(name, vm);
        let mut changed = false;
        let mut deepest = 0;
        for before in &vm.spec.after {
            let wanted = self.wanted_by.entry(before.clone()).or_insert(NOBODY);
            let new = (priority.max(wanted.0), made_ms.min(wanted.1));
            changed |= *wanted != new;
            *wanted = new;
            deepest = deepest.max(1 + self.depth.get(before).copied().unwrap_or(0));
        }
        let service = vm.meta.member_of().cloned();
        for of in std::iter::once(vm_ref(name)).chain(service) {
            let depth = self.depth.entry(of).or_default();
            changed |= *depth < deepest;
            *depth = deepest.max(*depth);
        }
        changed
    }

    /// Its priority and its age, with those of what waits for it.
    fn rank(&self, name: &Name, vm: &Stored<VmSpec>) -> (Priority, i64) {
        let own = (vm.spec.priority, vm.meta.created_ms);
        if self.wanted_by.is_empty() {
            return own;
        }
        let of = vm.meta.member_of().cloned().into_iter().chain([vm_ref(name)]);
        let wanted = of.filter_map(|of| self.wanted_by.get(&of).copied());
        wanted.fold(own, |a, b| (a.0.max(b.0), a.1.min(b.1)))
    }

    /// The place of a VM.
    pub fn place(&self, name: &Name, vm: &Stored<VmSpec>) -> Place {
        let depth = match self.depth.is_empty() {
            true => 0,
            false => self.depth.get(&vm_ref(name)).copied().unwrap_or(0),
        };
        let (priority, made_ms) = self.rank(name, vm);
        // Of like ones the oldest, so that a newcomer never takes the place of what ran before.
        (Reverse(priority), made_ms, depth, name.clone())
    }
}

/// Whether a VM is there for others to start after: it passes its health check, or it has none and has run.
#[must_use]
pub fn is_ready(snapshot: &Snapshot, vm: &Name) -> bool {
    let Some((object, told)) = snapshot.vms.get(vm).zip(snapshot.told_of(vm)) else { return false };
    match told.phase {
        VmPhase::Running if object.spec.check.is_some() => told.ready == Some(true),
        VmPhase::Running | VmPhase::Stopping => true,
        // It did what it had to do, and its restart policy leaves it.
        VmPhase::Stopped => object.spec.check.is_none(),
        VmPhase::Preparing | VmPhase::Starting | VmPhase::Failed => false,
    }
}

/// How something stands that is not ready; nothing when it is, or when nobody wants it to run.
fn unready(snapshot: &Snapshot, before: &ObjectRef) -> Option<String> {
    let name = &before.name;
    if before.kind == Kind::Service {
        let service = snapshot.services.get(name).filter(|service| !service.meta.deleting)?;
        let ready = snapshot.members(name).any(|(vm, _)| is_ready(snapshot, vm));
        return (service.spec.replicas > 0 && !ready)
            .then(|| format!("{before}, which has no member ready"));
    }
    let vm = snapshot.vms.get(name).filter(|vm| vm.spec.running && !vm.meta.deleting)?;
    if is_ready(snapshot, name) {
        return None;
    }
    Some(match (snapshot.placements.get(name), snapshot.told_of(name)) {
        (None, _) => format!("{before}, which has no host yet"),
        (Some(placement), None) => {
            format!("{before}, of which {} has not reported yet", placement.host)
        }
        (Some(placement), Some(told))
            if told.phase == VmPhase::Running && vm.spec.check.is_some() =>
        {
            format!("{before}, which does not pass its health check on {} yet", placement.host)
        }
        (Some(placement), Some(told)) => {
            format!("{before}, which is {} on {}", told.phase.as_str(), placement.host)
        }
    })
}

/// Whether a VM that has no host may get one now.
pub(crate) enum Turn {
    /// It may; what was passed over, as the end of a sentence.
    Now(String),
    /// It waits, and this was said.
    Later,
}

/// Whether it is a VM's turn. One that waits keeps its room.
pub(crate) fn turn<'a>(work: &mut Work<'a>, name: &Name, vm: &'a Stored<VmSpec>) -> Turn {
    let snapshot = work.snapshot;
    let unready: Vec<String> =
        vm.spec.after.iter().filter_map(|before| unready(snapshot, before)).collect();
    if unready.is_empty() {
        return Turn::Now(String::new());
    }
    let unready = unready.join(" and ");
    let limit = vm.spec.after_timeout.unwrap_or(DEFAULT_AFTER_TIMEOUT);
    let record = snapshot.waits.get(name);
    // A clock that was set back must not make it wait longer.
    let since = record.map(|wait| wait.since_ms).filter(|since| *since <= work.seen.now_ms);
    let waited = since.map_or(0, |since| (work.seen.now_ms - since).unsigned_abs());
    if waited >= limit.0 {
        return Turn::Now(format!(", after {limit} without {unready}"));
    }
    if since.is_none() {
        let reason = format!("{name} waits for {unready}");
        let action = Action::PutWait {
            vm: name.clone(),
            wait: Some(Wait { since_ms: work.seen.now_ms }),
            expected_revision: record.map_or(0, |wait| wait.revision),
        };
        work.act(vm_ref(name), reason, action);
    }
    work.wake(limit.0 - waited);
    let why = format!("waiting: {name} starts after {unready}; it waits {limit} at most");
    work.wait(vm_ref(name), why);
    let found = placement::find(work, &Wish::of(vm), &|_| true);
    let host = found.ok().map(|found| found.host.clone());
    if let Some(host) = host {
        work.room.use_up(&host, vm);
    }
    Turn::Later
}

/// Forgets waits that have ended without a host: the VM is not wanted now, or has nothing to wait for.
pub(crate) fn forget(work: &mut Work<'_>, queue: &[Name]) {
    let snapshot = work.snapshot;
    for (name, wait) in &snapshot.waits {
        let waits = snapshot.vms.get(name).is_some_and(|vm| !vm.spec.after.is_empty())
            && queue.binary_search(name).is_ok();
        if !waits && snapshot.unreadable_of(&vm_ref(name)).is_none() {
            let action =
                Action::PutWait { vm: name.clone(), wait: None, expected_revision: wait.revision };
            work.act(vm_ref(name), format!("{name} waits for nothing any more"), action);
        }
    }
}
