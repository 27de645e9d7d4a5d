//! How an action becomes a transaction: what it compares, what it writes, and the event that tells of it.
//!
//! Pure. Every transaction compares the manager's own record, so that a manager that was replaced commits nothing,
//! and the record that it replaces, so that nothing that happened meanwhile is overwritten.

use haven_model::{
    Action, Event, Name, ObjectRef, Planned, Severity, Snapshot,
    host::Lease,
    keys,
    object::{Kind, Object},
    plan::{MoveStep, TakenFrom},
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

/// What of this plan goes to the store; `None` for actions that change nothing there.
#[must_use]
pub fn commit_of(planned: &Planned, snapshot: &Snapshot, author: &Author) -> Option<Commit> {
    let (mut compares, ops) = match &planned.action {
        Action::ConfirmLease { .. } | Action::PowerOff { .. } => return None,
        Action::CloseSession { host, lease_revision, lost } => {
            let lease = snapshot.leases.get(host)?;
            let closed = Lease { session: lost.session, closed: true, ..(*lease.value).clone() };
            (
                vec![Compare::ModRevision(keys::lease(host), *lease_revision)],
                vec![put(keys::lease(host), &closed), put(keys::lost(host), lost)],
            )
        }
        Action::PlaceVm { vm, placement, expected_revision, taken_from } => {
            let mut compares = vec![unchanged(keys::placement(vm), *expected_revision)];
            if let Some(TakenFrom { host, lease_revision, .. }) = taken_from {
                compares.push(Compare::ModRevision(keys::lease(host), *lease_revision));
            }
            (compares, vec![put(keys::placement(vm), placement)])
        }
        Action::MoveVm { vm, placement, expected_revision, step, ended } => {
            let mut compares = vec![unchanged(keys::placement(vm), *expected_revision)];
            let mut ops = vec![put(keys::placement(vm), placement)];
            if let MoveStep::Commit { source_told, target_told } = step {
                let from = placement.moved_from.as_ref()?;
                let told = |host: &Name, revision: i64| {
                    Compare::ModRevision(keys::migration_status(vm, host), revision)
                };
                compares.push(told(&from.host, *source_told));
                compares.push(told(&placement.host, *target_told));
            }
            if let Some((migration, revision)) = ended {
                compares.push(unchanged(keys::migration(vm), *revision));
                ops.push(put(keys::migration(vm), migration.as_ref()));
            }
            (compares, ops)
        }
        Action::PutMigration { vm, migration, expected_revision } => (
            vec![unchanged(keys::migration(vm), *expected_revision)],
            vec![put(keys::migration(vm), migration.as_ref())],
        ),
        Action::ReleaseVm { vm, expected_revision } => (
            vec![unchanged(keys::placement(vm), *expected_revision)],
            vec![Op::Delete(keys::placement(vm)), Op::Delete(keys::vm_status(vm))],
        ),
        Action::PutObject { object, expected_revision } => {
            let key = keys::object(&object.reference());
            (
                vec![unchanged(key.clone(), *expected_revision)],
                vec![Op::Put(key, object.to_store().into())],
            )
        }
        Action::RemoveObject { object, expected_revision } => {
            let ops = removal(object, snapshot);
            (vec![unchanged(keys::object(object), *expected_revision)], ops)
        }
        Action::PlaceFrontend { service, placement, expected_revision } => (
            vec![unchanged(keys::frontend(service), *expected_revision)],
            vec![put(keys::frontend(service), placement)],
        ),
        Action::ReleaseFrontend { service, expected_revision } => (
            vec![unchanged(keys::frontend(service), *expected_revision)],
            vec![Op::Delete(keys::frontend(service))],
        ),
        Action::PutIncident { incident, expected_revision } => {
            let key = keys::incident(incident.number);
            (vec![unchanged(key.clone(), *expected_revision)], vec![put(key, incident.as_ref())])
        }
    };
    compares.push(Compare::ModRevision(keys::MANAGER.to_owned(), author.record_revision));
    Some(Commit { compares, ops })
}

/// An object takes with it what only it explains.
fn removal(object: &ObjectRef, snapshot: &Snapshot) -> Vec<Op> {
    let mut ops = vec![Op::Delete(keys::object(object))];
    match object.kind {
        Kind::Vm => {
            ops.push(Op::Delete(keys::vm_status(&object.name)));
            ops.push(Op::Delete(keys::migration(&object.name)));
            let told = snapshot.migration_status.get(&object.name);
            let hosts = told.into_iter().flat_map(|hosts| hosts.keys());
            ops.extend(hosts.map(|host| Op::Delete(keys::migration_status(&object.name, host))));
        }
        Kind::Host => {
            ops.push(Op::Delete(keys::host_status(&object.name)));
            ops.push(Op::Delete(keys::lease(&object.name)));
            ops.push(Op::Delete(keys::lost(&object.name)));
        }
        Kind::Service => ops.push(Op::Delete(keys::frontend(&object.name))),
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
        Action::PlaceVm { taken_from: Some(_), .. } => Severity::Warning,
        Action::PlaceFrontend { service, placement, .. } => {
            let old = snapshot.frontends.get(service);
            if old.is_some_and(|old| old.epoch < placement.epoch) {
                Severity::Warning
            } else {
                Severity::Info
            }
        }
        Action::PutObject { object, .. } if matches!(**object, Object::Vm(_)) => Severity::Info,
        Action::MoveVm { step: MoveStep::TakeBack, .. } => Severity::Warning,
        Action::MoveVm { step: MoveStep::Settle, ended: Some((migration, _)), .. }
            if migration.outcome.as_ref().is_some_and(|outcome| !outcome.moved) =>
        {
            Severity::Warning
        }
        Action::MoveVm { .. }
        | Action::PutMigration { .. }
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
