//! What snapshots keep from being done: a disk that only its host has goes along with its guest as it is then, and nothing of
//! what it was before (docs/decisions/0027-snapshots.md).

use super::copies::needed_by;
use haven_model::{
    Name, PoolDriverKind, Snapshot,
    object::Stored,
    vm::VmSpec,
    vm_snapshot::{SnapshotDisk, SnapshotState, VmSnapshot},
};

/// Why these disks cannot be kept at one instant, if so.
#[must_use]
pub fn apart(disks: &[(&Name, PoolDriverKind)]) -> Option<String> {
    let first = |wanted| disks.iter().find(|(_, driver)| *driver == wanted).map(|(name, _)| name);
    let (mirrored, in_ceph) = (first(PoolDriverKind::Mirrored)?, first(PoolDriverKind::Rbd)?);
    Some(format!(
        "the disk `{mirrored}` is mirrored and the disk `{in_ceph}` is in Ceph, and such two are not kept at one instant yet"
    ))
}

/// The first snapshot of a VM that is in a disk which only its host has, and that disk.
fn held<'a>(
    snapshot: &'a Snapshot,
    vm: &Stored<VmSpec>,
    counts: impl Fn(&VmSnapshot) -> bool,
) -> Option<(&'a Name, &'a Name, &'a VmSnapshot)> {
    // One that its VM has no more is lost already.
    let local = |of: &SnapshotDisk| {
        let has = vm.spec.disks.iter().any(|disk| disk.name == of.name && disk.pool == of.pool);
        let pool = snapshot.pools.get(&of.pool).filter(|_| has);
        pool.is_some_and(|pool| pool.spec.driver == PoolDriverKind::Local)
    };
    let of = snapshot.vm_snapshots.get(&vm.meta.uid)?.iter();
    of.filter(|(_, of)| counts(of)).find_map(|(name, of)| {
        let disk = of.value.disks.iter().find(|disk| local(disk))?;
        Some((name, &disk.name, &*of.value))
    })
}

fn words(
    snapshot: &Snapshot,
    vm: &Stored<VmSpec>,
    (name, disk, of): (&Name, &Name, &VmSnapshot),
) -> String {
    if let Some(made) = needed_by(snapshot, &vm.meta.uid, of) {
        return format!(
            "{made} is made from its disk `{disk}`, which is local to its host; that goes on once its host has room for {made}, and `haven vm rm {made}` gives it up"
        );
    }
    let vm = &vm.meta.name;
    format!(
        "its disk `{disk}` is local to its host and holds the snapshot `{name}`, which would not go along; `haven vm snapshot rm {vm} {name}` gives that up"
    )
}

/// Why a VM is to stay on its host for the sake of its snapshots, if so.
#[must_use]
pub fn stays(snapshot: &Snapshot, vm: &Stored<VmSpec>) -> Option<String> {
    let key = snapshot.unreadable_under(&format!("snapshots/{}/", vm.meta.uid));
    if let Some(key) = key {
        return Some(format!(
            "the record {key} cannot be read by this version of Haven, and its disk may hold that snapshot; update the managing host"
        ));
    }
    let counts =
        |of: &VmSnapshot| !matches!(of.state, SnapshotState::Failed | SnapshotState::Going);
    held(snapshot, vm, counts).map(|found| words(snapshot, vm, found))
}

/// Why a move that is under way is taken back: it would lose a snapshot that is there. One that is wanted is taken by whoever
/// has the VM then.
#[must_use]
pub fn lost_by_a_move(snapshot: &Snapshot, vm: &Stored<VmSpec>) -> Option<String> {
    let there = |of: &VmSnapshot| of.state == SnapshotState::There;
    held(snapshot, vm, there).map(|found| words(snapshot, vm, found))
}
