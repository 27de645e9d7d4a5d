//! When snapshots of VMs are taken by themselves, and which of those are removed again.
//!
//! Only while the VM runs: the disks of one that rests do not change, and what they were before would be given up for more of the
//! same. There is never more than one that is yet to be taken, and what people have asked for is never touched
//! (docs/decisions/0027-snapshots.md).

use super::{copies::needed_by, snapshots::apart};
use crate::work::{Work, vm_ref};
use haven_model::{
    Action, Name, PoolDriverKind, Snapshot, Versioned, VmPhase,
    host::{CLONES, RBD_SNAPSHOTS},
    object::Stored,
    units::Millis,
    vm::VmSpec,
    vm_snapshot::{
        BY_SCHEDULE, MOST_SNAPSHOTS, SnapshotDisk, SnapshotSpec, SnapshotState, VmSnapshot,
        usual_name,
    },
};
use std::collections::BTreeSet;

/// The longest pause after one that failed.
const AGAIN: Millis = Millis(600_000);

/// A snapshot that is under way for longer holds up no other VM's, milliseconds.
const LONG: i64 = 600_000;

type Kept<'a> = (&'a Name, &'a Versioned<VmSnapshot>);

/// All snapshots of a VM, those that were asked for first before the others. What lies ahead was written by a clock that was wrong,
/// and is taken for the oldest: otherwise it would be the newest for as long.
fn all<'a>(work: &Work<'a>, vm: &Stored<VmSpec>) -> Vec<Kept<'a>> {
    let mut all: Vec<Kept<'a>> =
        work.snapshot.vm_snapshots.get(&vm.meta.uid).into_iter().flatten().collect();
    all.sort_by_key(|(_, record)| (record.at_ms <= work.seen.now_ms, record.at_ms));
    all
}

/// Milliseconds until the next one is due; nothing when it is.
fn rest(work: &Work<'_>, spec: &SnapshotSpec, last: Option<&VmSnapshot>) -> Option<u64> {
    let last = last?;
    let failed = last.state == SnapshotState::Failed || last.failed.is_some();
    let pause = if failed { spec.every.0.min(AGAIN.0) } else { spec.every.0 };
    // What lies ahead was written by a clock that is wrong.
    let passed = work.passed_ms(last.at_ms)?;
    pause.checked_sub(passed).filter(|rest| *rest > 0)
}

/// The disks that one is of.
///
/// # Errors
/// Why there can be none.
fn disks(snapshot: &Snapshot, vm: &Stored<VmSpec>) -> Result<Vec<SnapshotDisk>, String> {
    let (mut disks, mut drivers) = (Vec::new(), Vec::new());
    for disk in vm.spec.plugged() {
        let pool = snapshot.pools.get(&disk.pool);
        let pool = pool.ok_or_else(|| format!("the pool `{}` is not there", disk.pool))?;
        if pool.spec.driver == PoolDriverKind::Nfs {
            return Err(format!(
                "its disk `{}` lives in the pool `{}`, whose disks keep no snapshots",
                disk.name, disk.pool
            ));
        }
        drivers.push((&disk.name, pool.spec.driver));
        let (name, pool, size) = (disk.name.clone(), disk.pool.clone(), disk.size);
        disks.push(SnapshotDisk { name, pool, size, copies: Vec::new() });
    }
    if disks.is_empty() {
        return Err("it has no disk".into());
    }
    match apart(&drivers) {
        Some(why) => Err(why),
        None => Ok(disks),
    }
}

/// Why none is taken of a VM whose time has come; in words where people can do something about it.
fn unready(
    work: &Work<'_>,
    name: &Name,
    vm: &Stored<VmSpec>,
    all: &[Kept<'_>],
) -> Result<(), Option<String>> {
    let snapshot = work.snapshot;
    let placed = snapshot.placements.get(name).ok_or(None)?;
    let told = snapshot.told_of(name).filter(|told| told.phase == VmPhase::Running).ok_or(None)?;
    let busy = placed.moving_to.is_some()
        || placed.moved_from.is_some()
        || told.generation < vm.meta.generation
        || told.disks_change
        // It is to leave, and would have to wait for what is kept in a disk of its host.
        || !work.states.get(&placed.host).is_some_and(|state| state.usable())
        || snapshot.backups.get(name).is_some_and(|run| run.vm_uid == vm.meta.uid && run.outcome.is_none());
    // One at a time, and none of what is just being put back.
    let due = all.iter().any(|(_, record)| record.is_due());
    if busy || due {
        return Err(None);
    }
    let in_ceph = vm.spec.plugged().any(|disk| {
        let pool = snapshot.pools.get(&disk.pool);
        pool.is_some_and(|pool| pool.spec.driver == PoolDriverKind::Rbd)
    });
    let needs = if in_ceph { RBD_SNAPSHOTS } else { CLONES };
    if snapshot.host_status.get(&placed.host).is_none_or(|told| told.speaks < needs) {
        return Err(Some(format!("{} runs an older Haven", placed.host)));
    }
    if all.len() >= MOST_SNAPSHOTS {
        return Err(Some(format!(
            "it has {MOST_SNAPSHOTS} snapshots; `haven vm snapshot rm {name} NAME` removes one"
        )));
    }
    Ok(())
}

/// Has those removed that are more than are to be kept, and those that could not be taken and were followed by others.
fn give_up(
    work: &mut Work<'_>,
    name: &Name,
    vm: &Stored<VmSpec>,
    spec: &SnapshotSpec,
    all: &[Kept<'_>],
) {
    let snapshot = work.snapshot;
    let mut kept = 0;
    let mut followed = false;
    for (called, record) in all.iter().rev().filter(|(_, record)| record.scheduled) {
        let goes = match record.state {
            SnapshotState::There => {
                kept += 1;
                kept > spec.keep && needed_by(snapshot, &vm.meta.uid, record).is_none()
            }
            SnapshotState::Failed => followed,
            SnapshotState::Wanted | SnapshotState::Reverting | SnapshotState::Going => false,
        };
        followed = true;
        if !goes {
            continue;
        }
        let reason = match record.state {
            SnapshotState::Failed => format!("{name} forgets `{called}`, which could not be taken"),
            _ => format!("{name} keeps {} snapshots, and `{called}` is older", spec.keep),
        };
        let going = VmSnapshot {
            state: SnapshotState::Going,
            failed: None,
            message: String::new(),
            ..(*record.value).clone()
        };
        let action = Action::PutVmSnapshot {
            vm: name.clone(),
            name: (*called).clone(),
            record: Box::new(going),
            expected_revision: record.revision,
        };
        work.act(vm_ref(name), reason, action);
    }
}

/// Has snapshots taken whose time has come.
pub(crate) fn plan(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    let now = work.seen.now_ms;
    let taken = |name: &Name, vm: &Stored<VmSpec>| {
        let host = &snapshot.placements.get(name)?.host;
        let of = snapshot.vm_snapshots.get(&vm.meta.uid)?;
        let wanted = |record: &VmSnapshot| {
            let long = now.saturating_sub(record.at_ms) > LONG;
            record.scheduled && record.state == SnapshotState::Wanted && !long
        };
        of.values().any(|record| wanted(record)).then_some(host)
    };
    // One at a time on each host: it counts what is in use of the disk. One that waits for long waits for something else.
    let mut busy: BTreeSet<&Name> =
        snapshot.vms.iter().filter_map(|(name, vm)| taken(name, vm)).collect();
    // Who has waited for longest comes first.
    let mut vms: Vec<_> = snapshot.vms.iter().filter(|(_, vm)| !vm.meta.deleting).collect();
    vms.sort_by_key(|(_, vm)| {
        let all = all(work, vm);
        let last = all.iter().rev().find(|(_, record)| record.scheduled);
        last.map(|(_, record)| record.at_ms)
    });
    for (name, vm) in vms {
        let Some(spec) = vm.spec.snapshot.as_ref().filter(|_| vm.meta.member_of().is_none()) else {
            continue;
        };
        let all = all(work, vm);
        give_up(work, name, vm, spec, &all);
        let last = all.iter().rev().find(|(_, record)| record.scheduled);
        if let Some(rest) = rest(work, spec, last.map(|(_, record)| &*record.value)) {
            work.wake(rest);
            if let Some((called, last)) = last.filter(|(_, of)| of.state == SnapshotState::Failed) {
                let why = &last.message;
                let why = format!(
                    "the snapshot `{called}` of {name}, which is taken every {}, could not be: {why}; it is tried again",
                    spec.every
                );
                work.wait(vm_ref(name), why);
            }
            continue;
        }
        let ready = unready(work, name, vm, &all).and_then(|()| disks(snapshot, vm).map_err(Some));
        let disks = match ready {
            Ok(disks) => disks,
            Err(None) => continue,
            Err(Some(why)) => {
                work.wait(vm_ref(name), format!("waiting: a snapshot of {name} is due, and {why}"));
                continue;
            }
        };
        let Some(host) = snapshot.placements.get(name).map(|placed| &placed.host) else { continue };
        if !busy.insert(host) {
            continue;
        }
        let is_free = |name: &Name| all.iter().all(|(other, _)| *other != name);
        let called = (0..).map(|later| usual_name(now + later * 1000)).find(is_free);
        let called = called.expect("there are more seconds than snapshots");
        // Unique within the VM, as the name is; a name in the disks is not used again within its life.
        let id = format!("s{now}-{called}");
        let by = BY_SCHEDULE.to_owned();
        let record =
            VmSnapshot { scheduled: true, ..VmSnapshot::wanted(id, name.clone(), by, now, disks) };
        let reason = format!("a snapshot of {name} is taken, as it is every {}", spec.every);
        let action = Action::PutVmSnapshot {
            vm: name.clone(),
            name: called,
            record: Box::new(record),
            expected_revision: 0,
        };
        work.act(vm_ref(name), reason, action);
    }
}
