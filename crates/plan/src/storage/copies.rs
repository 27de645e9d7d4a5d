//! VMs that are made from the disks of others: where that can be done, and what stays only until it is
//! (docs/decisions/0028-clones.md).

use crate::work::{Work, vm_ref};
use haven_model::{
    Action, Name, PoolDriverKind, Snapshot,
    object::Stored,
    vm::{DiskSpec, VmSpec},
    vm_snapshot::{CopyRef, SnapshotState, VmSnapshot},
    volume::{ClonedFrom, VolumeRef},
};

/// The VM whose disks are on another host than this one, and from which a disk of `vm` is yet to be made.
#[must_use]
pub fn elsewhere<'a>(snapshot: &Snapshot, vm: &'a Stored<VmSpec>, host: &Name) -> Option<&'a Name> {
    // Every host reaches those in Ceph.
    let driver = |disk: &DiskSpec| snapshot.pools.get(&disk.pool).map(|pool| pool.spec.driver);
    let disks = vm.spec.disks.iter().filter(|disk| driver(disk) != Some(PoolDriverKind::Rbd));
    let mut copies = disks.filter_map(|disk| disk.copy_of.as_deref());
    let away = |copy: &&CopyRef| {
        let of_it = snapshot.vms.get(&copy.vm).is_some_and(|vm| vm.meta.uid == copy.vm_uid);
        // Of one that is gone nothing can be made anywhere, which its start tells.
        let placed = snapshot.placements.get(&copy.vm).filter(|_| of_it);
        placed.is_some_and(|placed| placed.host != *host)
    };
    copies.find(away).map(|copy| &copy.vm)
}

/// The copy that a mirrored disk is made from, and the hosts that have it; nothing when it is made from nothing of the kind.
///
/// # Errors
/// What is waited for, while `owner` has no such copy.
pub(super) fn source<'a>(
    snapshot: &'a Snapshot,
    disk: &DiskSpec,
    owner: &Name,
) -> Result<Option<(ClonedFrom, &'a [Name])>, String> {
    let Some(of) = disk.copy_of.as_deref() else { return Ok(None) };
    let name = &disk.name;
    let mut all = snapshot.vm_snapshots.get(&of.vm_uid).into_iter().flatten();
    let found = all.find(|(_, record)| record.id == of.snapshot);
    let Some((called, record)) = found.filter(|(_, of)| of.state != SnapshotState::Failed) else {
        let why = found.map_or("it is not there any more", |(_, record)| record.message.as_str());
        return Err(format!(
            "waiting: the disk `{name}` cannot be made from the {of}: its snapshot could not be taken, or was removed ({why}); delete this VM, and clone {} again",
            of.vm
        ));
    };
    let hosts = record.value.copies(&of.disk);
    match &record.copy {
        Some(copy) if hosts.contains(owner) => {
            let volume = VolumeRef { vm: of.vm.clone(), disk: of.disk.clone() };
            let from = ClonedFrom { volume, vm_uid: of.vm_uid.clone(), copy: copy.clone() };
            Ok(Some((from, hosts)))
        }
        _ if record.state == SnapshotState::There => Err(format!(
            "waiting: {owner} has no copy yet of the {of} as it was in `{called}`, from which the disk `{name}` is made"
        )),
        _ => Err(format!(
            "waiting: the snapshot `{called}` of {}, from which the disk `{name}` is made, is {}",
            of.vm, record.state
        )),
    }
}

/// The VM that is yet to be made from this snapshot.
#[must_use]
pub fn needed_by<'a>(
    snapshot: &'a Snapshot,
    vm_uid: &'a str,
    record: &VmSnapshot,
) -> Option<&'a Name> {
    snapshot.copies_of(vm_uid).find(|(_, copy)| copy.snapshot == record.id).map(|(vm, _)| vm)
}

/// Has snapshots removed that were taken only for a VM to be made, once it is.
pub(crate) fn plan(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    for (name, vm) in snapshot.vms.iter().filter(|(_, vm)| !vm.meta.deleting) {
        let all = snapshot.vm_snapshots.get(&vm.meta.uid).into_iter().flatten();
        for (called, record) in all {
            let Some(made) = &record.made_for else { continue };
            let rests = matches!(record.state, SnapshotState::There | SnapshotState::Failed);
            if !rests || needed_by(snapshot, &vm.meta.uid, record).is_some() {
                continue;
            }
            let reason = format!("{name} keeps `{called}` no longer: {made} needs it no more");
            let going = VmSnapshot {
                state: SnapshotState::Going,
                failed: None,
                message: String::new(),
                ..(*record.value).clone()
            };
            let action = Action::PutVmSnapshot {
                vm: name.clone(),
                name: called.clone(),
                record: Box::new(going),
                expected_revision: record.revision,
            };
            work.act(vm_ref(name), reason, action);
        }
    }
}
