//! The proof `storage-fenced`: a VM with `isolation: keep` whose host is not heard starts elsewhere as soon as all its disks are
//! shut to what opened them there. Nothing is proven of the host; its copy may go on for a moment, and can write nothing.
//!
//! ```text
//!   its host is suspected, and has missed two renewals ─► each volume begins a run that is nobody's (the store)
//!                       ─► a host that counts serves that run, and none before ─► placed elsewhere, over the same records
//! ```
//!
//! One replica that counts and is shut is enough for each disk: what opened it there acknowledges only what all have that counted,
//! and goes on without one only by a record that it cannot write any more. But not while another returns, unless that is shut, too
//! (docs/decisions/0024-storage-fenced.md).

use super::replicas::{mirrored, record, volume_of};
use crate::{
    HostState,
    placement::{self, Wish},
    work::{Work, vm_ref},
};
use haven_model::{
    Action, Name, Placement, ProofKind, Snapshot, Versioned, VmSpec,
    host::SHUTS,
    object::Stored,
    vm::Isolation,
    volume::{ReplicaIs, ReplicaState, Volume, VolumeRef},
};

/// The volumes of a VM that may be shut to its host, all of them; nothing when it has another disk, or one whose record is not
/// known.
fn volumes<'a>(
    snapshot: &'a Snapshot,
    vm: &'a Stored<VmSpec>,
) -> Option<Vec<(VolumeRef, &'a Versioned<Volume>)>> {
    if vm.spec.isolation != Isolation::Keep || vm.spec.disks.is_empty() {
        return None;
    }
    let of = |disk| Some((volume_of(&vm.meta.name, disk), record(snapshot, vm, disk)?));
    let volumes: Option<Vec<_>> = mirrored(snapshot, &vm.spec).map(|(disk, _)| of(disk)).collect();
    volumes.filter(|volumes| volumes.len() == vm.spec.disks.len())
}

/// Whether no process that a host has started can write any more to the disks of a VM that is placed there. Holds as long as the
/// records of its volumes stand.
#[must_use]
pub fn shut(snapshot: &Snapshot, vm: &Stored<VmSpec>, placed: &Placement) -> bool {
    let accepted = snapshot.cluster_spec().fencing.contains(&ProofKind::StorageFenced);
    // Of a guest that goes over two hosts may have a process.
    let stays = placed.moving_to.is_none() && placed.moved_from.is_none();
    let volumes = volumes(snapshot, vm).filter(|_| accepted && stays);
    volumes.is_some_and(|volumes| {
        volumes.iter().all(|(of, volume)| volume.shut && shut_by(snapshot, of, volume, placed))
    })
}

/// Whether a host that counts, and is another one, serves the run that is nobody's; and each one that returns. While one is taken
/// in, a process may for a moment have one child more than must have a write, and would do without the one that is shut (known
/// fault 58).
///
/// A word of an earlier volume of this name may be of a higher run. One that counts has overwritten it: at run 0 its owner opens it
/// only with those that say that they serve run 0.
fn shut_by(snapshot: &Snapshot, of: &VolumeRef, volume: &Volume, placed: &Placement) -> bool {
    let shut = |host: &Name| {
        let told = snapshot.replica_told(of, host);
        matches!(told, Some(ReplicaIs::Served { run, .. }) if *run >= volume.run)
    };
    let others = || volume.replicas.iter().filter(|(host, _)| **host != placed.host);
    let counts = others().any(|(host, state)| *state == ReplicaState::Counted && shut(host));
    let returns = others().filter(|(_, state)| **state == ReplicaState::Returning);
    counts && returns.map(|(host, _)| host).all(shut)
}

/// Whether a VM is to be taken from its host for that.
pub(crate) fn fenced(work: &Work<'_>, vm: &Name) -> bool {
    let snapshot = work.snapshot;
    let placed = snapshot.placements.get(vm).zip(snapshot.vms.get(vm));
    placed.is_some_and(|(placed, object)| {
        unheard(work, &placed.host) && shut(snapshot, object, placed)
    })
}

/// Whether a host is not heard and has missed two renewals. One that renews lives, whatever its heartbeats say.
fn unheard(work: &Work<'_>, host: &Name) -> bool {
    let suspected = work.states.get(host) == Some(&HostState::Suspected);
    let age = work.seen.leases.get(host).zip(work.snapshot.leases.get(host));
    let current = age.filter(|(age, lease)| age.revision == lease.revision);
    suspected && current.is_some_and(|(age, _)| age.unchanged_ms >= 2 * work.timers.renew.0)
}

/// Shuts the disks of VMs whose host is not heard.
pub(crate) fn plan(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    if !snapshot.cluster_spec().fencing.contains(&ProofKind::StorageFenced) {
        return;
    }
    for (name, vm) in &snapshot.vms {
        let Some(placed) = snapshot.placements.get(name).filter(|_| vm.spec.running) else {
            continue;
        };
        let host = &placed.host;
        let stays = placed.moving_to.is_none() && placed.moved_from.is_none();
        // What is worked on is expected to be silent for a moment.
        let worked_on = snapshot.maintenance.as_ref().is_some_and(|of| of.works_on(host));
        if vm.meta.deleting || !stays || worked_on || !knows(snapshot, host) {
            continue;
        }
        let Some(volumes) = volumes(snapshot, vm) else { continue };
        if work.states.get(host) != Some(&HostState::Suspected) {
            continue;
        }
        if !unheard(work, host) {
            let age = work.seen.leases.get(host).map_or(0, |age| age.unchanged_ms);
            work.wake((2 * work.timers.renew.0).saturating_sub(age).max(5));
            continue;
        }
        // It is to gain by it.
        if placement::choose(work, name, &Wish::of(vm)).is_err() {
            continue;
        }
        for (of, volume) in volumes {
            let Some(record) = volume.shut_out() else { continue };
            let reason = format!(
                "{host} is not heard: the disk `{}` of {name} is shut to what runs there, so that {name} can start elsewhere",
                of.disk
            );
            let action = Action::PutVolume {
                volume: of,
                record: Box::new(record),
                expected_revision: volume.revision,
            };
            work.act(vm_ref(name), reason, action);
        }
    }
}

/// Whether a host leaves alone what was shut to it. An older Haven would write its record anew, and go on.
fn knows(snapshot: &Snapshot, host: &Name) -> bool {
    snapshot.host_status.get(host).is_some_and(|told| told.speaks >= SHUTS)
}
