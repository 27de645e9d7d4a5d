//! When VMs are backed up by themselves.
//!
//! Each in its own rhythm, counted from the beginning of the last one that became whole; one that failed is tried again
//! soon. One at a time on each host. How it is made is its host's doing (docs/decisions/0023-backups.md).

use crate::work::{Work, vm_ref};
use haven_model::{
    Action, Name, VmPhase,
    backup::{BackupRun, BackupSpec},
    host::BACKUPS,
    object::Object,
    units::Millis,
    vm::{DiskSpec, DiskState},
};
use std::collections::BTreeSet;

/// The longest pause after one that failed.
const AGAIN: Millis = Millis(600_000);
/// Who asks for them.
pub const BY_SCHEDULE: &str = "schedule";

/// Milliseconds until the next one is due; nothing when it is.
fn rest(work: &Work<'_>, spec: &BackupSpec, last: Option<&BackupRun>) -> Option<u64> {
    let last = last?;
    let pause = Millis(spec.every.0.min(AGAIN.0));
    let failed = last.outcome.as_ref().filter(|outcome| !outcome.well && last.to == spec.to);
    let (since_ms, pause) = match (failed, last.good_ms.get(&spec.to)) {
        (Some(failed), _) => (failed.at_ms, pause),
        (None, Some(begun)) => (*begun, spec.every),
        (None, None) => return None,
    };
    // What lies ahead was written by a clock that is wrong.
    let passed = work.passed_ms(since_ms)?;
    pause.0.checked_sub(passed).filter(|rest| *rest > 0)
}

/// A disk that its guest has seen is made, and needs the backup or the disk no more that it was made from: neither does anybody
/// keep that in vain, nor is a disk made from it a second time.
fn forget_origins(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    let mut made = Vec::new();
    for (name, vm) in snapshot.vms.iter().filter(|(_, vm)| !vm.meta.deleting) {
        let is_made = |disk: &DiskSpec| {
            let origin = disk.backup.is_some() || disk.copy_of.is_some();
            origin && snapshot.disk_state(name, disk) == DiskState::Attached
        };
        if vm.spec.disks.iter().any(is_made) {
            made.push((name, vm));
        }
    }
    for (name, vm) in made {
        let mut now = (*vm.value).clone();
        for disk in &mut now.spec.disks {
            if snapshot.disk_state(name, disk) == DiskState::Attached {
                (disk.backup, disk.copy_of) = (None, None);
            }
        }
        now.meta.generation += 1;
        let reason =
            format!("{name} runs, so its disks are made from what they were to be made from");
        let (object, expected_revision) = (Box::new(Object::Vm(now)), vm.revision);
        work.act(vm_ref(name), reason, Action::PutObject { object, expected_revision });
    }
}

/// Has VMs backed up whose time has come.
pub(crate) fn plan(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    // What neither runs nor rests has no disks that could be read, and keeps nobody waiting.
    let is_settled = |name: &Name| {
        let told = snapshot.told_of(name);
        told.is_some_and(|told| [VmPhase::Running, VmPhase::Stopped].contains(&told.phase))
    };
    let under_way = |name: &Name| {
        let run = snapshot.backups.get(name).filter(|_| is_settled(name))?;
        let host = &snapshot.placements.get(name)?.host;
        let of_it = snapshot.vms.get(name).is_some_and(|vm| vm.meta.uid == run.vm_uid);
        (of_it && run.outcome.is_none()).then_some(host)
    };
    forget_origins(work);
    let mut busy: BTreeSet<&Name> = snapshot.backups.keys().filter_map(under_way).collect();
    for (name, vm) in snapshot.vms.iter().filter(|(_, vm)| !vm.meta.deleting) {
        let Some(spec) = &vm.spec.backup else { continue };
        let last = snapshot.backups.get(name);
        let of_it = last.filter(|last| last.vm_uid == vm.meta.uid);
        if of_it.is_some_and(|last| last.outcome.is_none()) {
            continue;
        }
        if let Some(rest) = rest(work, spec, of_it.map(|last| &**last)) {
            work.wake(rest);
            continue;
        }
        // One without a host has nothing to be backed up, or nobody who could.
        let Some(host) = snapshot.placements.get(name).map(|placed| &placed.host) else { continue };
        if !snapshot.session_open(host) || !is_settled(name) {
            continue;
        }
        if snapshot.host_status.get(host).is_none_or(|told| told.speaks < BACKUPS) {
            let why = format!("waiting: {name} is to be backed up, and {host} runs an older Haven");
            work.wait(vm_ref(name), why);
            continue;
        }
        if snapshot.targets.get(&spec.to).is_none_or(|target| target.meta.deleting) {
            let why = format!(
                "waiting: {name} is to be backed up to `{}`, and there is no such target; `haven backup target ls` lists them",
                spec.to
            );
            work.wait(vm_ref(name), why);
            continue;
        }
        if !busy.insert(host) {
            work.wait(
                vm_ref(name),
                format!("waiting: {name} is backed up after another VM of {host}"),
            );
            continue;
        }
        let run = BackupRun::new(
            &vm.meta.uid,
            spec.to.clone(),
            BY_SCHEDULE.into(),
            work.seen.now_ms,
            of_it.map(|last| &**last),
        );
        let reason = format!("{name} is backed up to {}, as it is every {}", spec.to, spec.every);
        let expected_revision = last.map_or(0, |last| last.revision);
        let action = Action::PutBackup { vm: name.clone(), run: Box::new(run), expected_revision };
        work.act(vm_ref(name), reason, action);
    }
}
