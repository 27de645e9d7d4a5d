//! How an action becomes a transaction: what it compares, what it writes, and the event that tells of it.
//!
//! Pure. Every transaction compares the manager's own record, so that a manager that was replaced commits nothing,
//! and the record that it replaces, so that nothing that happened meanwhile is overwritten.

use haven_model::{
    Action, Drain, Event, LostSession, Meta, Migration, Name, ObjectRef, Placement, Planned,
    ProofKind, Severity, Snapshot,
    host::Lease,
    keys,
    object::{Kind, Object},
    plan::{MoveStep, TakenFrom},
    service::DRAIN_LABEL,
    vm_snapshot::VmSnapshot,
};
use haven_store::raw::{Compare, Op};
use serde::Serialize;

/// Who commits, for the comparisons and for the events.
#[derive(Clone, Debug)]
pub struct Author {
    /// The managing host.
    pub me: Name,
    /// Its term.
    pub term: u64,
    /// The revision of the manager record under which it manages.
    pub record_revision: i64,
}

/// A transaction ready to be sent.
#[derive(Debug)]
pub struct Commit {
    /// All must hold.
    pub compares: Vec<Compare>,
    /// Then all of these are done.
    pub ops: Vec<Op>,
}

/// The JSON of a record. Records are plain data, so this cannot fail.
pub(crate) fn json<T: Serialize>(record: &T) -> Vec<u8> {
    serde_json::to_vec(record).expect("records are plain data")
}

fn put<T: Serialize>(key: String, record: &T) -> Op {
    Op::Put(key, json(record).into())
}

/// A comparison with a record as the snapshot had it; revision 0 means that there was none.
fn unchanged(key: String, revision: i64) -> Compare {
    if revision == 0 { Compare::Absent(key) } else { Compare::ModRevision(key, revision) }
}

/// A host's session is closed, and why is said beside it.
fn close(
    snapshot: &Snapshot,
    host: &Name,
    lease_revision: i64,
    lost: &LostSession,
) -> Option<(Vec<Compare>, Vec<Op>)> {
    let lease = snapshot.leases.get(host)?;
    let closed = Lease { session: lost.session, closed: true, ..(*lease.value).clone() };
    Some((
        vec![Compare::ModRevision(keys::lease(host), lease_revision)],
        vec![put(keys::lease(host), &closed), put(keys::lost(host), lost)],
    ))
}

/// Where a VM may run hangs on which replicas of its disks count, which its owner says: nothing of that has changed since.
fn same_replicas(snapshot: &Snapshot, vm: &Name) -> Vec<Compare> {
    let volumes = snapshot.volumes.iter().filter(|(of, _)| of.vm == *vm);
    volumes.map(|(of, volume)| Compare::ModRevision(keys::volume(of), volume.revision)).collect()
}

/// A snapshot of a VM as it stands: no move of it has begun since, and nobody has changed it.
fn keep(
    snapshot: &Snapshot,
    vm: &Name,
    name: &Name,
    record: &VmSnapshot,
    expected_revision: i64,
) -> Option<(Vec<Compare>, Vec<Op>)> {
    let object = snapshot.vms.get(vm)?;
    let key = keys::vm_snapshot(&object.meta.uid, name);
    let placed = snapshot.placements.get(vm).map_or(0, |placed| placed.revision);
    let of = keys::object(&ObjectRef::new(Kind::Vm, vm.clone()));
    let compares = vec![
        unchanged(key.clone(), expected_revision),
        unchanged(of, object.revision),
        unchanged(keys::placement(vm), placed),
    ];
    Some((compares, vec![put(key, record)]))
}

/// A VM gets an owner, and waits for nothing any more.
fn place(
    snapshot: &Snapshot,
    vm: &Name,
    placement: &Placement,
    expected_revision: i64,
    taken_from: Option<&TakenFrom>,
) -> (Vec<Compare>, Vec<Op>) {
    let mut compares = vec![unchanged(keys::placement(vm), expected_revision)];
    compares.extend(same_replicas(snapshot, vm));
    let clients = snapshot.clients.get(vm);
    compares.extend(clients.map(|of| Compare::ModRevision(keys::clients(vm), of.revision)));
    // A VM whose disks are shut is taken over their records, which are among those above.
    let lost = taken_from.filter(|from| from.proof != ProofKind::StorageFenced);
    if let Some(TakenFrom { host, lease_revision, .. }) = lost {
        compares.push(Compare::ModRevision(keys::lease(host), *lease_revision));
    }
    let mut ops = vec![put(keys::placement(vm), placement)];
    ops.extend(snapshot.waits.get(vm).map(|_| Op::Delete(keys::wait(vm))));
    (compares, ops)
}

/// A step of a migration: a change of the owner rests on what both sides said last.
fn step_of(
    snapshot: &Snapshot,
    vm: &Name,
    placement: &Placement,
    expected_revision: i64,
    step: &MoveStep,
    record: Option<&(Box<Migration>, i64)>,
) -> Option<(Vec<Compare>, Vec<Op>)> {
    let mut compares = vec![unchanged(keys::placement(vm), expected_revision)];
    compares.extend(told(vm, placement, step)?);
    compares.extend(same_replicas(snapshot, vm));
    let mut ops = vec![put(keys::placement(vm), placement)];
    if let Some((migration, revision)) = record {
        compares.push(unchanged(keys::migration(vm), *revision));
        ops.push(put(keys::migration(vm), migration.as_ref()));
    }
    Some((compares, ops))
}

/// A record in place of the one that was read; or none any more.
fn one<T: Serialize>(key: String, read: i64, record: Option<&T>) -> (Vec<Compare>, Vec<Op>) {
    let op = match record {
        Some(record) => put(key.clone(), record),
        None => Op::Delete(key.clone()),
    };
    (vec![unchanged(key, read)], vec![op])
}

/// A VM has no owner any more.
fn release(vm: &Name, expected_revision: i64) -> (Vec<Compare>, Vec<Op>) {
    let ops = vec![Op::Delete(keys::placement(vm)), Op::Delete(keys::vm_status(vm))];
    (vec![unchanged(keys::placement(vm), expected_revision)], ops)
}

/// What of this plan goes to the store; `None` for actions that change nothing there.
#[must_use]
pub fn commit_of(planned: &Planned, snapshot: &Snapshot, author: &Author) -> Option<Commit> {
    let (mut compares, ops) = match &planned.action {
        Action::ConfirmLease { .. } | Action::ReadPower { .. } | Action::PowerOff { .. } => {
            return None;
        }
        Action::CloseSession { host, lease_revision, lost } => {
            close(snapshot, host, *lease_revision, lost)?
        }
        Action::PlaceVm { vm, placement, expected_revision, taken_from } => {
            place(snapshot, vm, placement, *expected_revision, taken_from.as_ref())
        }
        Action::TryElsewhere { vm, placement, expected_revision, told } => {
            let (mut compares, ops) = place(snapshot, vm, placement, *expected_revision, None);
            compares.push(Compare::ModRevision(keys::vm_status(vm), *told));
            (compares, ops)
        }
        Action::PutWait { vm, wait, expected_revision } => {
            one(keys::wait(vm), *expected_revision, wait.as_ref())
        }
        Action::MoveVm { vm, placement, expected_revision, step, record } => {
            step_of(snapshot, vm, placement, *expected_revision, step, record.as_ref())?
        }
        Action::PutMigration { vm, migration, expected_revision } => {
            one(keys::migration(vm), *expected_revision, Some(migration.as_ref()))
        }
        Action::PutDrain { host, drain, expected_revision } => {
            let (mut compares, ops) = one(keys::drain(host), *expected_revision, drain.as_ref());
            compares.extend(still_wanted(host, drain.as_ref(), snapshot));
            (compares, ops)
        }
        Action::PutMaintenance { maintenance, expected_revision } => {
            one(keys::MAINTENANCE.into(), *expected_revision, Some(maintenance.as_ref()))
        }
        Action::ReleaseVm { vm, expected_revision } => release(vm, *expected_revision),
        Action::PutObject { object, expected_revision } => {
            let key = keys::object(&object.reference());
            let mut compares = vec![unchanged(key.clone(), *expected_revision)];
            compares.extend(newly_retired(object, snapshot).into_iter().flatten());
            (compares, vec![Op::Put(key, object.to_store().into())])
        }
        Action::RemoveObject { object, expected_revision } => {
            let ops = removal(object, snapshot);
            (vec![unchanged(keys::object(object), *expected_revision)], ops)
        }
        Action::PlaceFrontend { service, placement, expected_revision } => {
            one(keys::frontend(service), *expected_revision, Some(placement))
        }
        Action::ReleaseFrontend { service, expected_revision } => {
            one::<()>(keys::frontend(service), *expected_revision, None)
        }
        Action::PutVolume { volume, record, expected_revision } => {
            one(keys::volume(volume), *expected_revision, Some(record.as_ref()))
        }
        Action::PutClients { vm, record, expected_revision } => {
            one(keys::clients(vm), *expected_revision, Some(record.as_ref()))
        }
        Action::PutBackup { vm, run, expected_revision } => {
            one(keys::backup(vm), *expected_revision, Some(run.as_ref()))
        }
        Action::PutVmSnapshot { vm, name, record, expected_revision } => {
            keep(snapshot, vm, name, record, *expected_revision)?
        }
        Action::PutIncident { incident, expected_revision } => {
            one(keys::incident(incident.number), *expected_revision, Some(incident.as_ref()))
        }
    };
    compares.push(Compare::ModRevision(keys::MANAGER.to_owned(), author.record_revision));
    Some(Commit { compares, ops })
}

/// A drain for work on hosts is written only over the record of that work: once it was ended, nobody would end the drain.
fn still_wanted(host: &Name, drain: Option<&Drain>, snapshot: &Snapshot) -> Option<Compare> {
    let of = snapshot.maintenance.as_ref()?;
    let ours = drain.is_some_and(|drain| drain.id == of.drain_id(host));
    ours.then(|| Compare::ModRevision(keys::MAINTENANCE.into(), of.revision))
}

/// A member that is to get no more traffic, or is to go, was chosen by what its host told of it: one that does not serve
/// costs nothing. So it must not have begun to since; nor may a person have asked for more members since.
fn newly_retired(object: &Object, snapshot: &Snapshot) -> Option<Vec<Compare>> {
    let Object::Vm(vm) = object else { return None };
    let name = &vm.meta.name;
    let retired = |meta: &Meta| meta.deleting || meta.labels.contains_key(DRAIN_LABEL);
    // One that is drained already has had its time.
    let before = snapshot.vms.get(name).is_some_and(|before| retired(&before.meta));
    (retired(&vm.meta) && !before).then(|| {
        let told = snapshot.vm_status.get(name).map_or(0, |told| told.revision);
        let service = vm.meta.member_of().and_then(|service| {
            let revision = snapshot.services.get(&service.name)?.revision;
            Some(Compare::ModRevision(keys::object(service), revision))
        });
        [unchanged(keys::vm_status(name), told)].into_iter().chain(service).collect()
    })
}

/// What a change of a VM's owner compares beside its placement: the last words of those that it rests on.
fn told(vm: &Name, placement: &Placement, step: &MoveStep) -> Option<Vec<Compare>> {
    let told = |host: &Name, revision: i64| {
        Compare::ModRevision(keys::migration_status(vm, host), revision)
    };
    Some(match step {
        MoveStep::Commit { source_told, target_told } => {
            let from = placement.moved_from.as_ref()?;
            vec![told(&from.host, *source_told), told(&placement.host, *target_told)]
        }
        MoveStep::Restart { from, told: revision } => vec![told(from, *revision)],
        MoveStep::Begin | MoveStep::TakeBack | MoveStep::Settle => Vec::new(),
    })
}

/// An object takes with it what only it explains.
fn removal(object: &ObjectRef, snapshot: &Snapshot) -> Vec<Op> {
    let mut ops = vec![Op::Delete(keys::object(object))];
    match object.kind {
        Kind::Vm => {
            ops.push(Op::Delete(keys::vm_status(&object.name)));
            ops.push(Op::Delete(keys::migration(&object.name)));
            ops.push(Op::Delete(keys::wait(&object.name)));
            ops.extend(
                snapshot.clients.get(&object.name).map(|_| Op::Delete(keys::clients(&object.name))),
            );
            ops.extend(
                snapshot.backups.get(&object.name).map(|_| Op::Delete(keys::backup(&object.name))),
            );
            let uid = snapshot.vms.get(&object.name).map(|vm| vm.meta.uid.as_str());
            // With its key what is on an encrypted disk is gone for good.
            let disks = snapshot.vms.get(&object.name).into_iter().flat_map(|vm| &vm.spec.disks);
            let encrypted = uid.into_iter().flat_map(|uid| {
                let encrypted = disks.clone().filter(|disk| disk.encrypted);
                encrypted.map(move |disk| keys::disk_key(uid, &disk.name))
            });
            ops.extend(encrypted.map(Op::Delete));
            let kept = uid.and_then(|uid| Some((uid, snapshot.vm_snapshots.get(uid)?)));
            let kept = kept.into_iter().flat_map(|(uid, of)| of.keys().map(move |n| (uid, n)));
            ops.extend(kept.map(|(uid, name)| Op::Delete(keys::vm_snapshot(uid, name))));
            let volumes = snapshot.volumes.keys().filter(|volume| volume.vm == object.name);
            ops.extend(volumes.map(|volume| Op::Delete(keys::volume(volume))));
            let checks = snapshot.checks.keys().filter(|volume| volume.vm == object.name);
            ops.extend(checks.map(|volume| Op::Delete(keys::check(volume))));
            let gone = snapshot.gone.keys().filter(|volume| volume.vm == object.name);
            ops.extend(gone.map(|volume| Op::Delete(keys::gone(volume))));
            let replicas = snapshot.replica_status.iter().filter(|(of, _)| of.vm == object.name);
            for (volume, hosts) in replicas {
                let told = hosts.keys().map(|host| keys::replica_status(volume, host));
                ops.extend(told.map(Op::Delete));
            }
            let told = snapshot.migration_status.get(&object.name);
            let hosts = told.into_iter().flat_map(|hosts| hosts.keys());
            ops.extend(hosts.map(|host| Op::Delete(keys::migration_status(&object.name, host))));
        }
        Kind::Host => {
            ops.push(Op::Delete(keys::host_status(&object.name)));
            ops.push(Op::Delete(keys::host_load(&object.name)));
            ops.push(Op::Delete(keys::host_rooms(&object.name)));
            ops.push(Op::Delete(keys::work_status(&object.name)));
            ops.push(Op::Delete(keys::lease(&object.name)));
            ops.push(Op::Delete(keys::lost(&object.name)));
            ops.push(Op::Delete(keys::drain(&object.name)));
        }
        Kind::Service => ops.push(Op::Delete(keys::frontend(&object.name))),
        Kind::Target => {
            let last = snapshot.verifications.get(&object.name);
            ops.extend(last.map(|_| Op::Delete(keys::verification(&object.name))));
        }
        Kind::Pool | Kind::Image | Kind::Network | Kind::Certificate => {}
    }
    ops
}

/// The event of an action, or none where it would only be noise.
#[must_use]
pub fn event_of(
    planned: &Planned,
    snapshot: &Snapshot,
    author: &Author,
    at_ms: i64,
    number: u64,
) -> Option<Event> {
    let severity = match &planned.action {
        Action::CloseSession { .. } => Severity::Error,
        Action::PlaceVm { taken_from: Some(_), .. } | Action::TryElsewhere { .. } => {
            Severity::Warning
        }
        Action::PlaceFrontend { service, placement, .. } => {
            let old = snapshot.frontends.get(service);
            // One that a drained host gives up is taken by plan.
            if placement.from.is_none() && old.is_some_and(|old| old.epoch < placement.epoch) {
                Severity::Warning
            } else {
                Severity::Info
            }
        }
        Action::PutObject { object, .. } if matches!(**object, Object::Vm(_)) => Severity::Info,
        Action::MoveVm { step: MoveStep::TakeBack, .. } => Severity::Warning,
        Action::MoveVm { step: MoveStep::Settle, record: Some((migration, _)), .. }
            if migration.outcome.as_ref().is_some_and(|outcome| !outcome.moved) =>
        {
            Severity::Warning
        }
        Action::PutMaintenance { maintenance, .. } if maintenance.stopped.is_some() => {
            Severity::Warning
        }
        Action::MoveVm { .. }
        | Action::PutMaintenance { .. }
        | Action::PutWait { wait: Some(_), .. }
        | Action::PutMigration { .. }
        | Action::PutDrain { .. }
        | Action::PutVolume { .. }
        | Action::PutClients { .. }
        | Action::PlaceVm { .. }
        | Action::RemoveObject { .. } => Severity::Info,
        _ => return None,
    };
    Some(Event {
        // Sorts by time; the term and the number keep two managers and two events of one instant apart.
        id: format!("{at_ms:014}-{:06}-{number:06}", author.term),
        at_ms,
        object: planned.object.clone(),
        severity,
        message: planned.reason.clone(),
        by: format!("manager on {}", author.me),
    })
}

/// The operation that writes an event.
#[must_use]
pub fn put_event(event: &Event) -> Op {
    put(keys::event(&event.id), event)
}
