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
//!
//! Disks in pools of Ceph clusters are shut by a host that is heard: it has Ceph refuse all clients by which they are open. Those
//! must be known, so nothing is shut while a process is being begun (docs/decisions/0026-rbd.md).

use super::replicas::{mirrored, record, volume_of};
use crate::{
    HostState,
    placement::{self, Wish},
    work::{Work, vm_ref},
};
use haven_model::{
    Action, Name, Placement, PoolDriverKind, ProofKind, Snapshot, Versioned, VmSpec,
    clients::DiskClients,
    host::{RBD, SHUTS},
    object::Stored,
    vm::{DiskSpec, Isolation},
    volume::{ReplicaIs, ReplicaState, Volume, VolumeRef},
};

/// What is shut of a VM to its host: all of its disks.
struct Disks<'a> {
    /// Those that are mirrored.
    volumes: Vec<(VolumeRef, &'a Versioned<Volume>)>,
    /// Who has those in Ceph open, if there are any.
    clients: Option<&'a Versioned<DiskClients>>,
}

/// The disks of a VM in pools of Ceph clusters.
fn in_ceph<'a>(snapshot: &Snapshot, vm: &'a VmSpec) -> impl Iterator<Item = &'a DiskSpec> {
    let is = |disk: &&DiskSpec| {
        snapshot.pools.get(&disk.pool).is_some_and(|p| p.spec.driver == PoolDriverKind::Rbd)
    };
    vm.disks.iter().filter(is)
}

/// The disks of a VM that may be shut to its host, all of them; nothing when it has another disk, or one whose record is not
/// known, or is in Ceph and it is not known by which client it is open there.
fn disks<'a>(
    snapshot: &'a Snapshot,
    vm: &'a Stored<VmSpec>,
    placed: &Placement,
) -> Option<Disks<'a>> {
    if vm.spec.isolation != Isolation::Keep || vm.spec.disks.is_empty() {
        return None;
    }
    let of = |disk| Some((volume_of(&vm.meta.name, disk), record(snapshot, vm, disk)?));
    let volumes: Option<Vec<_>> = mirrored(snapshot, &vm.spec).map(|(disk, _)| of(disk)).collect();
    let volumes = volumes?;
    let in_ceph: Vec<&DiskSpec> = in_ceph(snapshot, &vm.spec).collect();
    if volumes.len() + in_ceph.len() != vm.spec.disks.len() {
        return None;
    }
    if in_ceph.is_empty() {
        return Some(Disks { volumes, clients: None });
    }
    let clients = snapshot.clients.get(&vm.meta.name).filter(|of| of.vm_uid == vm.meta.uid)?;
    let known = |disk: &&DiskSpec| disk.detached || clients.knows(&disk.name, &placed.host);
    let all = clients.begins.is_empty() && in_ceph.iter().all(known);
    all.then_some(Disks { volumes, clients: Some(clients) })
}

/// Whether no process that a host has started can write any more to the disks of a VM that is placed there. Holds as long as the
/// records of its volumes stand.
#[must_use]
pub fn shut(snapshot: &Snapshot, vm: &Stored<VmSpec>, placed: &Placement) -> bool {
    let accepted = snapshot.cluster_spec().fencing.contains(&ProofKind::StorageFenced);
    // Of a guest that goes over two hosts may have a process.
    let stays = placed.moving_to.is_none() && placed.moved_from.is_none();
    let disks = disks(snapshot, vm, placed).filter(|_| accepted && stays);
    disks.is_some_and(|Disks { volumes, clients }| {
        clients.is_none_or(|of| of.is_shut())
            && volumes
                .iter()
                .all(|(of, volume)| volume.shut && shut_by(snapshot, of, volume, placed))
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
        let Some(Disks { volumes, clients }) = disks(snapshot, vm, placed) else { continue };
        if clients.is_some() && !speaks(snapshot, host, RBD) {
            continue;
        }
        if work.states.get(host) != Some(&HostState::Suspected) {
            continue;
        }
        if !unheard(work, host) {
            let age = work.seen.leases.get(host).map_or(0, |age| age.unchanged_ms);
            work.wake((2 * work.timers.renew.0).saturating_sub(age).max(5));
            continue;
        }
        // It is to gain by it.
        let Ok(choice) = placement::choose(work, name, &Wish::of(vm)) else { continue };
        if let Some(record) = clients {
            shut_clients(work, name, host, record, choice.host);
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

/// Has the host on which a VM is to start shut its disks in Ceph, if nobody who is heard does.
fn shut_clients(
    work: &mut Work<'_>,
    vm: &Name,
    host: &Name,
    record: &Versioned<DiskClients>,
    by: Name,
) {
    let heard = |by: &Name| {
        use HostState::{Cordoned, Drained, Draining, Online};
        matches!(work.states.get(by), Some(Online | Cordoned | Draining | Drained))
    };
    if record.shut.as_ref().is_some_and(|shut| shut.done || heard(&shut.by)) {
        return;
    }
    let reason = format!(
        "{host} is not heard: {by} shuts the disks of {vm} in Ceph to what runs there, so that {vm} can start elsewhere"
    );
    let action = Action::PutClients {
        vm: vm.clone(),
        record: Box::new(record.shut_by(by)),
        expected_revision: record.revision,
    };
    work.act(vm_ref(vm), reason, action);
}

/// Whether a host leaves alone what was shut to it. An older Haven would write its record anew, and go on.
fn knows(snapshot: &Snapshot, host: &Name) -> bool {
    speaks(snapshot, host, SHUTS)
}

fn speaks(snapshot: &Snapshot, host: &Name, what: u32) -> bool {
    snapshot.host_status.get(host).is_some_and(|told| told.speaks >= what)
}
