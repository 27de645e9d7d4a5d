//! Which VMs need a host: new ones, and those of a host that is proven lost. And which start with other network cards
//! than they had.

use crate::{
    placement::{self, Wish},
    storage::shutting,
    tolerance::{
        hosts::HostState,
        order::{self, Order, Turn},
    },
    work::{Work, vm_ref},
};
use haven_model::{
    Action, Name, NicAddress, Placement, PoolDriverKind, ProofKind, Snapshot, Versioned, VmPhase,
    VmSpec, VmStatus, object::Stored, plan::TakenFrom, vm::RestartPolicy,
};

/// Places every VM that should run and has no host that can run it.
pub(crate) fn plan(work: &mut Work<'_>) {
    let vms = queue(work);
    let mut names: Vec<Name> = vms.iter().map(|(name, _)| (*name).clone()).collect();
    names.sort();
    order::forget(work, &names);
    for (name, vm) in vms {
        match work.snapshot.placements.get(name) {
            None => place_new(work, name, vm),
            Some(placement) => recover(work, name, vm, placement),
        }
    }
    for (name, vm) in work.snapshot.vms.iter().filter(|(_, vm)| !vm.meta.deleting) {
        let Some(placement) = work.snapshot.placements.get(name) else { continue };
        if !placement.fits(&vm.spec) && !needs_host(work, name) {
            renew(work, name, vm, placement);
        }
    }
}

/// The VMs that should run and have no host that can run them, in the order in which they get one.
pub(crate) fn queue<'a>(work: &Work<'a>) -> Vec<(&'a Name, &'a Versioned<Stored<VmSpec>>)> {
    let vms = work.snapshot.vms.iter();
    let mut vms: Vec<_> = vms
        .filter(|(name, vm)| vm.spec.running && !vm.meta.deleting && needs_host(work, name))
        .collect();
    let order = if vms.is_empty() { Order::default() } else { Order::of(work.snapshot) };
    vms.sort_by_cached_key(|(name, vm)| order.place(name, vm));
    vms
}

/// Whether a VM is at a point where it takes up other network cards: it does not run, or is being started or reset. One
/// that ended and is left so is not: a new placement would start it.
fn takes_up(vm: &VmSpec, status: &VmStatus) -> bool {
    let ended = match status.phase {
        VmPhase::Preparing | VmPhase::Starting => true,
        VmPhase::Failed => vm.restart == RestartPolicy::Always,
        VmPhase::Stopped => !vm.running,
        VmPhase::Running | VmPhase::Stopping => false,
    };
    ended || vm.running && vm.resets > status.resets
}

/// Gives a VM the network cards that are wanted of it now. It stays where it is; the next epoch makes its host start it
/// anew with them.
fn renew(work: &mut Work<'_>, name: &Name, vm: &Stored<VmSpec>, old: &Versioned<Placement>) {
    let moves = old.moving_to.is_some() || old.moved_from.is_some();
    if moves || !work.snapshot.told_of(name).is_some_and(|status| takes_up(&vm.spec, status)) {
        return;
    }
    let nics = match placement::address::renewed(work, name, &vm.spec, &old.nics) {
        Ok(nics) => nics,
        Err(why) => return work.wait(vm_ref(name), why),
    };
    let placement = Placement { epoch: old.epoch + 1, nics, ..(*old.value).clone() };
    let reason = format!("{name} takes up its changed network cards on {}", old.host);
    let action = Action::PlaceVm {
        vm: name.clone(),
        placement,
        expected_revision: old.revision,
        taken_from: None,
    };
    work.act(vm_ref(name), reason, action);
}

/// The cards with which a VM restarts elsewhere: those wanted now, or if they cannot be given those that it had.
fn cards(
    work: &mut Work<'_>,
    name: &Name,
    vm: &Stored<VmSpec>,
    old: &Placement,
) -> Vec<NicAddress> {
    if old.fits(&vm.spec) {
        return old.nics.clone();
    }
    placement::address::renewed(work, name, &vm.spec, &old.nics).unwrap_or_else(|why| {
        work.wait(vm_ref(name), why);
        old.nics.clone()
    })
}

fn needs_host(work: &Work<'_>, vm: &Name) -> bool {
    match work.snapshot.placements.get(vm) {
        None => true,
        Some(placement) => {
            let state = work.states.get(&placement.host);
            state.is_none_or(|state| matches!(state, HostState::Lost(_)))
                || shutting::fenced(work, vm)
        }
    }
}

fn place_new<'a>(work: &mut Work<'a>, name: &Name, vm: &'a Stored<VmSpec>) {
    let Turn::Now(without) = order::turn(work, name, vm) else { return };
    let nics = match placement::address::nics(work, name, &vm.spec) {
        Ok(nics) => nics,
        Err(why) => return work.wait(vm_ref(name), why),
    };
    let choice = match placement::choose(work, name, &Wish::of(vm)) {
        Ok(choice) => choice,
        Err(why) => {
            work.taken.give_back(&nics);
            return work.wait(vm_ref(name), why);
        }
    };
    crate::storage::replicas::place(work, vm, &choice.host);
    let placement = Placement::new(choice.host.clone(), 1, work.taken.slot(), nics);
    work.room.use_up(&choice.host, vm);
    let reason = format!("{name} starts on {}: {}{without}", choice.host, choice.reason);
    let action =
        Action::PlaceVm { vm: name.clone(), placement, expected_revision: 0, taken_from: None };
    work.act(vm_ref(name), reason, action);
}

/// The first disk of a VM that only its host has, and its pool.
pub(crate) fn local_disk<'a>(snapshot: &Snapshot, vm: &'a VmSpec) -> Option<(&'a Name, &'a Name)> {
    vm.disks
        .iter()
        .find(|disk| {
            snapshot.pools.get(&disk.pool).is_some_and(|p| p.spec.driver == PoolDriverKind::Local)
        })
        .map(|disk| (&disk.name, &disk.pool))
}

/// The disk that keeps a VM from leaving its host, if there is one. Members of a service are alike, so theirs are
/// made anew elsewhere.
#[must_use]
pub fn bound_by<'a>(
    snapshot: &'a Snapshot,
    vm: &'a Stored<VmSpec>,
) -> Option<(&'a Name, &'a Name)> {
    if vm.meta.member_of().is_some() {
        return None;
    }
    local_disk(snapshot, &vm.spec)
}

fn recover<'a>(
    work: &mut Work<'a>,
    name: &Name,
    vm: &'a Stored<VmSpec>,
    old: &Versioned<Placement>,
) {
    let lost = proof_of(work, &old.host);
    let shut = || shutting::fenced(work, name);
    let fenced = || shut().then(|| (lease_of(work, &old.host), ProofKind::StorageFenced));
    let Some((lease_revision, proof)) = lost.or_else(fenced) else {
        return;
    };
    if let Some(from) = &old.moved_from {
        // Settled first, as soon as its copy there can run no more.
        let why = format!(
            "waiting: {name} was being handed over by {}, which has not said that its copy ended",
            from.host
        );
        return work.wait(vm_ref(name), why);
    }
    if let Some((disk, pool)) = bound_by(work.snapshot, vm) {
        let why = format!(
            "waiting: the disk `{disk}` of {name} lives in the local pool `{pool}` on {}; it returns with {}",
            old.host, old.host
        );
        return work.wait(vm_ref(name), why);
    }
    let Turn::Now(without) = order::turn(work, name, vm) else { return };
    let choice = match placement::choose(work, name, &Wish::of(vm)) {
        Ok(choice) => choice,
        Err(why) => return work.wait(vm_ref(name), why),
    };
    let nics = cards(work, name, vm, old);
    let placement = Placement::new(choice.host.clone(), old.epoch + 1, old.slot, nics);
    work.room.use_up(&choice.host, vm);
    let because = match proof {
        ProofKind::StorageFenced => {
            format!("its disks are shut to {} and that is not heard", old.host)
        }
        _ => format!("{} is lost", old.host),
    };
    let reason = format!(
        "{name} restarts on {} because {because} ({proof}): {}{without}",
        choice.host, choice.reason
    );
    let action = Action::PlaceVm {
        vm: name.clone(),
        placement,
        expected_revision: old.revision,
        taken_from: Some(TakenFrom { host: old.host.clone(), lease_revision, proof }),
    };
    work.act(vm_ref(name), reason, action);
}

fn lease_of(work: &Work<'_>, host: &Name) -> i64 {
    work.snapshot.leases.get(host).map_or(0, |lease| lease.revision)
}

/// The revision of the closed record of a lost host and the proof under which it was closed.
fn proof_of(work: &Work<'_>, host: &Name) -> Option<(i64, ProofKind)> {
    let lease = work.snapshot.leases.get(host)?;
    let lost = work.snapshot.lost.get(host)?;
    (lease.closed && lost.session == lease.session).then_some((lease.revision, lost.proof))
}
