//! What a transaction compares: on this rests that two things exclude each other.

use super::commit::{Author, commit_of};
use haven_model::{
    Action, Bytes, Placement, Planned, ProofKind,
    plan::TakenFrom,
    vm::Wait,
    vm_snapshot::VmSnapshot,
    volume::{Volume, VolumeRef},
};
use haven_plan::testing::{World, at, name, vm_spec};
use haven_store::raw::{Compare, Op};

fn author() -> Author {
    Author { me: name("host3"), term: 4, record_revision: 40 }
}

fn of_db(action: Action) -> Planned {
    Planned { object: World::reference("vm/db"), reason: "a test".into(), action }
}

/// A host that starts it meanwhile has written its status anew: then nothing is committed.
#[test]
fn a_vm_is_tried_elsewhere_only_over_what_its_host_said_last() {
    let mut world = World::new(2, Bytes::gib(1));
    world.vm("db", vm_spec(Bytes::mib(64)));
    let placement = Placement::new(name("host2"), 2, 0, Vec::new());
    let action = Action::TryElsewhere { vm: name("db"), placement, expected_revision: 7, told: 8 };
    let commit = commit_of(&of_db(action), &world.snapshot, &author()).unwrap();
    for compare in [
        Compare::ModRevision("/haven/placement/vm/db".into(), 7),
        Compare::ModRevision("/haven/status/vm/db".into(), 8),
        Compare::ModRevision("/haven/manager".into(), 40),
    ] {
        assert!(commit.compares.contains(&compare), "{:?}", commit.compares);
    }
}

/// That of a VM whose disks are shut rests on the records of its volumes: its host's record may change at any moment.
#[test]
fn a_vm_is_taken_over_the_closed_record_of_its_host_or_those_of_its_volumes() {
    let mut world = World::new(2, Bytes::gib(1));
    world.vm("db", vm_spec(Bytes::mib(64)));
    world.run("db", "host1");
    let volume = Volume::new("uid-db".into(), name("twins"), Bytes::gib(1), [name("host2")]);
    let of = VolumeRef { vm: name("db"), disk: name("data") };
    world.snapshot.volumes.insert(of, at(11, volume));
    for (proof, lease) in [
        (ProofKind::LeaseExpired, true),
        (ProofKind::PoweredOff, true),
        (ProofKind::StorageFenced, false),
    ] {
        let placement = Placement::new(name("host2"), 2, 0, Vec::new());
        let from = TakenFrom { host: name("host1"), lease_revision: 900, proof };
        let taken_from = Some(from);
        let action =
            Action::PlaceVm { vm: name("db"), placement, expected_revision: 5, taken_from };
        let compares = commit_of(&of_db(action), &world.snapshot, &author()).unwrap().compares;
        let has = |key: &str, at| compares.contains(&Compare::ModRevision(key.into(), at));
        assert!(has("/haven/placement/vm/db", 5) && has("/haven/volumes/db.data", 11));
        assert_eq!(has("/haven/leases/host1", 900), lease, "{compares:?}");
    }
}

#[test]
fn a_wait_goes_with_the_placement_that_ends_it() {
    let mut world = World::new(2, Bytes::gib(1));
    world.vm("db", vm_spec(Bytes::mib(64)));
    world.snapshot.waits.insert(name("db"), at(9, Wait { since_ms: 1 }));
    let placement = Placement::new(name("host2"), 1, 0, Vec::new());
    let action =
        Action::PlaceVm { vm: name("db"), placement, expected_revision: 0, taken_from: None };
    let commit = commit_of(&of_db(action), &world.snapshot, &author()).unwrap();
    let gone = |op: &Op| matches!(op, Op::Delete(key) if key == "/haven/waits/db");
    assert!(commit.ops.iter().any(gone), "{:?}", commit.ops);
}

/// Whoever is retired because it does not serve must not have begun to serve meanwhile.
#[test]
fn a_member_is_retired_only_over_what_its_host_said_last() {
    let mut world = World::new(2, Bytes::gib(1));
    world.vm("db", vm_spec(Bytes::mib(64)));
    world.run("db", "host1");
    let told = world.snapshot.vm_status["db"].revision;
    let of = |change: &dyn Fn(&mut haven_model::Meta)| {
        let mut object = (*world.snapshot.vms["db"].value).clone();
        change(&mut object.meta);
        let object = Box::new(haven_model::Object::Vm(object));
        let action = Action::PutObject { object, expected_revision: 4 };
        let commit = commit_of(&of_db(action), &world.snapshot, &author()).unwrap();
        commit.compares.contains(&Compare::ModRevision("/haven/status/vm/db".into(), told))
    };
    let drain = haven_model::service::DRAIN_LABEL;
    assert!(of(&|meta| _ = meta.labels.insert(drain.into(), "1".into())));
    assert!(of(&|meta| meta.deleting = true));
    assert!(!of(&|meta| _ = meta.labels.insert("team".into(), "a".into())));
    // One that is drained already has had its time, whatever it says.
    let mut drained = (*world.snapshot.vms["db"].value).clone();
    drained.meta.labels.insert(drain.into(), "1".into());
    world.snapshot.vms.insert(name("db"), at(4, drained.clone()));
    drained.meta.deleting = true;
    let object = Box::new(haven_model::Object::Vm(drained));
    let action = Action::PutObject { object, expected_revision: 4 };
    let commit = commit_of(&of_db(action), &world.snapshot, &author()).unwrap();
    assert_eq!(commit.compares.len(), 2, "{:?}", commit.compares);
}

/// A person who asks for more members than before keeps those that were about to go.
#[test]
fn a_member_is_retired_only_over_what_its_service_asks_for() {
    let mut world = World::new(2, Bytes::gib(1));
    world.service("web", 1);
    world.vm("web-1", vm_spec(Bytes::mib(64)));
    let mut member = (*world.snapshot.vms["web-1"].value).clone();
    member.meta.owner = Some(World::reference("service/web"));
    world.snapshot.vms.insert(name("web-1"), at(4, member.clone()));
    member.meta.labels.insert(haven_model::service::DRAIN_LABEL.into(), "1".into());
    let object = Box::new(haven_model::Object::Vm(member));
    let action = Action::PutObject { object, expected_revision: 4 };
    let commit = commit_of(&of_db(action), &world.snapshot, &author()).unwrap();
    let service = world.snapshot.services["web"].revision;
    let over = Compare::ModRevision("/haven/spec/service/web".into(), service);
    assert!(commit.compares.contains(&over), "{:?}", commit.compares);
}

/// Whoever ends the work on hosts and then a drain of it finds no other one afterwards.
#[test]
fn a_drain_for_work_on_hosts_is_written_only_while_that_is_wanted() {
    let mut world = World::new(2, Bytes::gib(1));
    let work: haven_model::Maintenance = serde_json::from_value(serde_json::json!({
        "id": "m1", "work": "reboot", "by": "ann", "atMs": 1,
        "hosts": [{"host": "host1", "phase": "draining", "sinceMs": 1}],
    }))
    .unwrap();
    world.snapshot.maintenance = Some(at(50, work));
    let compares = |id: &str| {
        let drain = haven_model::Drain {
            id: id.into(),
            by: "ann".into(),
            at_ms: 1,
            drained_ms: None,
            bringing_back: false,
        };
        let (host, drain) = (name("host1"), Some(drain));
        let action = Action::PutDrain { host, drain, expected_revision: 0 };
        let commit = commit_of(&of_db(action), &world.snapshot, &author()).unwrap();
        commit.compares.contains(&Compare::ModRevision("/haven/maintenance".into(), 50))
    };
    assert!(compares("m1/host1"));
    assert!(!compares("a person's own"));
}

/// Its snapshots go with a VM, and those of one that had its name before, or has another one, stay.
#[test]
fn a_vm_takes_its_snapshots_along() {
    let mut world = World::new(1, Bytes::gib(1));
    world.vm("db", vm_spec(Bytes::mib(64)));
    let record: VmSnapshot = serde_json::from_value(serde_json::json!({
        "id": "s", "vm": "db", "by": "root", "atMs": 1, "disks": [], "state": "there",
    }))
    .unwrap();
    for (uid, called) in [("uid-db", "a"), ("uid-db", "b"), ("uid-older", "c")] {
        let of = world.snapshot.vm_snapshots.entry(uid.into()).or_default();
        of.insert(name(called), at(8, record.clone()));
    }
    let object = World::reference("vm/db");
    let action = Action::RemoveObject { object, expected_revision: 4 };
    let commit = commit_of(&of_db(action), &world.snapshot, &author()).unwrap();
    let keys = commit.ops.iter().filter_map(|op| match op {
        Op::Delete(key) => key.strip_prefix("/haven/snapshots/"),
        _ => None,
    });
    assert_eq!(keys.collect::<Vec<_>>(), ["uid-db/a", "uid-db/b"]);
}

/// A snapshot is asked for, or given up, only of the VM as it was read and where it was: whoever needs one writes it anew.
#[test]
fn a_snapshot_is_written_over_itself_its_vm_and_its_place() {
    let mut world = World::new(1, Bytes::gib(1));
    world.vm("db", vm_spec(Bytes::mib(64)));
    let (at_ms, disks) = (1, Vec::new());
    let record = VmSnapshot::wanted("s".into(), name("db"), "schedule".into(), at_ms, disks);
    let key = "/haven/snapshots/uid-db/hourly".to_owned();
    let commit = |world: &World, expected_revision| {
        let (vm, called, record) = (name("db"), name("hourly"), Box::new(record.clone()));
        let action = Action::PutVmSnapshot { vm, name: called, record, expected_revision };
        commit_of(&of_db(action), &world.snapshot, &author())
    };
    let unplaced = commit(&world, 0).unwrap().compares;
    let object = Compare::ModRevision("/haven/spec/vm/db".into(), 4);
    assert!(unplaced.contains(&Compare::Absent(key.clone())) && unplaced.contains(&object));
    assert!(unplaced.contains(&Compare::Absent("/haven/placement/vm/db".into())), "{unplaced:?}");
    world.run("db", "host1");
    let placed = commit(&world, 8).unwrap();
    for compare in [
        Compare::ModRevision(key.clone(), 8),
        object,
        Compare::ModRevision("/haven/placement/vm/db".into(), 5),
        Compare::ModRevision("/haven/manager".into(), 40),
    ] {
        assert!(placed.compares.contains(&compare), "{:?}", placed.compares);
    }
    assert!(matches!(placed.ops.as_slice(), [Op::Put(of, _)] if *of == key), "{:?}", placed.ops);
    world.snapshot.vms.clear();
    assert!(commit(&world, 8).is_none(), "there is no VM any more");
}
