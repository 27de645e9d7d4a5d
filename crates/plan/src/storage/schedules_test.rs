//! Tests of [`super::schedules`] and [`super::copies`].

use crate::{
    plan,
    testing::{World, at, name, stored},
};
use haven_model::{
    Action, Bytes, Drain, PoolDriverKind, PoolSpec, VmPhase, VmSpec,
    backup::BackupRun,
    vm_snapshot::{SnapshotState, VmSnapshot},
};
use proptest::prelude::*;
use serde_json::json;

const HOUR: i64 = 3_600_000;

/// VMs of which a snapshot is to be taken every hour, and three kept, all on one host of two.
fn world(vms: &[&str]) -> World {
    let mut world = World::new(2, Bytes::gib(64));
    world.current();
    world.seen.now_ms = 1_000 * HOUR;
    for (pool, driver) in [("filer", PoolDriverKind::Shared), ("twins", PoolDriverKind::Mirrored)] {
        let spec: PoolSpec =
            serde_json::from_value(json!({"driver": driver, "path": format!("/{pool}")})).unwrap();
        world.snapshot.pools.insert(name(pool), at(3, stored(pool, spec)));
    }
    for vm in vms {
        let spec = json!({
            "memory": "1GiB", "disks": [{"name": "data", "size": "10GiB", "pool": "filer"}],
            "snapshot": {"every": "1h", "keep": 3},
        });
        world.vm(vm, serde_json::from_value::<VmSpec>(spec).unwrap());
        world.run(vm, "host1");
    }
    world
}

fn drain() -> Drain {
    let (id, by) = ("d".into(), "ann".into());
    Drain { id, by, at_ms: 1, drained_ms: None, bringing_back: false }
}

/// It has a snapshot that was asked for so long ago.
fn was(world: &mut World, called: &str, ago: i64, state: SnapshotState, scheduled: bool) {
    let uid = world.snapshot.vms["db"].meta.uid.clone();
    let by = if scheduled { "schedule" } else { "root" };
    let record: VmSnapshot = serde_json::from_value(json!({"id": called, "vm": "db", "by": by,
        "atMs": world.seen.now_ms - ago, "state": state, "scheduled": scheduled,
        "disks": [{"name": "data", "pool": "filer", "size": "10GiB"}]}))
    .unwrap();
    world.snapshot.vm_snapshots.entry(uid).or_default().insert(name(called), at(8, record));
}

/// What a plan writes of snapshots: of which VM, what it is called, and how it is to stand.
fn written(world: &World) -> Vec<(String, String, VmSnapshot)> {
    let actions = plan(&world.snapshot, &world.seen).actions.into_iter();
    let each = actions.filter_map(|planned| match planned.action {
        Action::PutVmSnapshot { vm, name, record, .. } => {
            Some((vm.to_string(), name.to_string(), *record))
        }
        _ => None,
    });
    each.collect()
}

/// Those that are taken, and those that are removed.
fn steps(world: &World) -> (usize, Vec<String>) {
    let written = written(world);
    let taken = written.iter().filter(|(_, _, record)| record.state == SnapshotState::Wanted);
    let going = written.iter().filter(|(_, _, record)| record.state == SnapshotState::Going);
    (taken.count(), going.map(|(_, called, _)| called.clone()).collect())
}

fn waits(world: &World) -> String {
    let waiting = plan(&world.snapshot, &world.seen).waiting;
    waiting.iter().map(|one| one.reason.clone()).collect::<Vec<_>>().join("\n")
}

#[test]
fn one_is_taken_when_its_time_has_come_and_says_that_nobody_asked_for_it() {
    let mut world = world(&["db"]);
    let first = written(&world);
    let [(vm, called, record)] = first.as_slice() else { panic!("{first:?}") };
    assert_eq!((vm.as_str(), record.by.as_str(), record.scheduled), ("db", "schedule", true));
    assert_eq!((record.disks.len(), record.at_ms), (1, world.seen.now_ms));
    // Its name in the disks is neither a number nor another one's.
    assert!(record.tag().starts_with("haven-s"), "{}", record.tag());
    was(&mut world, called, HOUR / 2, SnapshotState::There, true);
    assert_eq!(steps(&world), (0, vec![]));
    let rest = plan(&world.snapshot, &world.seen).wake_after_ms.unwrap();
    assert!(rest <= HOUR as u64 / 2, "{rest}");
    world.seen.now_ms += HOUR / 2;
    assert_eq!(steps(&world), (1, vec![]));
    // One of the future was written by a clock that is wrong, and holds nothing up.
    was(&mut world, called, -9 * HOUR, SnapshotState::There, true);
    assert_eq!(steps(&world).0, 1);
    // Beside it the next is taken when its time has come, and it is the first to go.
    for (called, hours) in [("a", 0), ("b", 1), ("c", 2)] {
        was(&mut world, called, hours * HOUR, SnapshotState::There, true);
    }
    let ahead = called.clone();
    assert_eq!(steps(&world), (0, vec![ahead]));
}

#[test]
fn none_is_taken_while_another_is_under_way_or_the_vm_does_not_run() {
    use SnapshotState::{Failed, Going, Reverting, Wanted};
    for (state, scheduled) in [(Wanted, true), (Wanted, false), (Going, true), (Reverting, false)] {
        let mut world = world(&["db"]);
        was(&mut world, "old", 9 * HOUR, state, scheduled);
        assert_eq!(steps(&world), (0, vec![]), "{state}");
    }
    // One that failed is tried again after ten minutes, and not before.
    let mut failed = world(&["db"]);
    was(&mut failed, "old", HOUR / 10, Failed, true);
    assert_eq!(steps(&failed), (0, vec![]));
    was(&mut failed, "old", HOUR / 5, Failed, true);
    assert_eq!(steps(&failed), (1, vec![]));
    was(&mut failed, "new", HOUR / 60, SnapshotState::There, true);
    assert_eq!(steps(&failed), (0, vec!["old".into()]), "what could not be taken is forgotten");
    for phase in [VmPhase::Stopped, VmPhase::Starting, VmPhase::Failed] {
        let mut world = world(&["db"]);
        world.report("db", phase, None);
        assert_eq!(steps(&world), (0, vec![]), "{phase:?}");
    }
    let mut drained = world(&["db"]);
    drained.snapshot.drains.insert(name("host1"), at(9, drain()));
    assert_eq!(steps(&drained).0, 0);
    let mut backed_up = world(&["db"]);
    let run = BackupRun::new("uid-db", name("nas"), "ann".into(), 5, None);
    backed_up.snapshot.backups.insert(name("db"), at(9, run));
    assert_eq!(steps(&backed_up).0, 0);
}

#[test]
fn those_that_are_too_many_go_and_no_others() {
    use SnapshotState::{Failed, There};
    let mut world = world(&["db"]);
    for (called, hours) in [("a", 5), ("b", 4), ("c", 3), ("d", 2), ("e", 1)] {
        was(&mut world, called, hours * HOUR - 1, There, true);
    }
    for (called, hours) in [("mine", 99), ("also-mine", 98)] {
        was(&mut world, called, hours * HOUR, There, false);
    }
    was(&mut world, "mine-failed", 97 * HOUR, Failed, false);
    assert_eq!(steps(&world), (0, vec!["b".into(), "a".into()]));
    // What a VM is being made from stays until it is.
    let mut spec = world.snapshot.vms["db"].spec.clone();
    spec.snapshot = None;
    spec.disks[0].copy_of = Some(
        serde_json::from_value(
            json!({"vm": "db", "vmUid": "uid-db", "disk": "data", "snapshot": "b"}),
        )
        .unwrap(),
    );
    world.vm("copy", spec);
    assert_eq!(steps(&world), (0, vec!["a".into()]));
    // Without a schedule nothing is removed.
    let mut object = (*world.snapshot.vms["db"].value).clone();
    object.spec.snapshot = None;
    world.snapshot.vms.insert(name("db"), at(4, object));
    assert_eq!(steps(&world), (0, vec![]));
}

#[test]
fn one_at_a_time_on_a_host_and_words_for_what_cannot_be() {
    let world = world(&["db", "web"]);
    assert_eq!(steps(&world).0, 1);
    let mut spec = world.snapshot.vms["db"].spec.clone();
    spec.disks[0].pool = name("twins");
    let mut mirrored = world.clone();
    mirrored.vm("db", spec);
    mirrored.run("db", "host1");
    assert_eq!(steps(&mirrored).0, 1, "{}", waits(&mirrored));
    let mut both = mirrored.clone();
    let mut spec = both.snapshot.vms["db"].spec.clone();
    let in_ceph = haven_model::vm::DiskSpec {
        name: name("far"),
        pool: name("ceph"),
        ..spec.disks[0].clone()
    };
    let mut pool = (*both.snapshot.pools["twins"].value).clone();
    pool.spec.driver = haven_model::PoolDriverKind::Rbd;
    both.snapshot.pools.insert(name("ceph"), at(3, pool));
    spec.disks.push(in_ceph.clone());
    both.vm("db", spec.clone());
    both.run("db", "host1");
    assert!(waits(&both).contains("is mirrored and the disk `far` is in Ceph"), "{}", waits(&both));
    spec.disks = vec![in_ceph];
    both.vm("db", spec);
    both.run("db", "host1");
    assert_eq!(steps(&both).0, 1, "{}", waits(&both));
    let status = both.snapshot.host_status.get_mut("host1").unwrap();
    let mut old = (*status.value).clone();
    old.speaks = haven_model::host::RBD_SNAPSHOTS - 1;
    status.value = std::sync::Arc::new(old);
    assert!(waits(&both).contains("host1 runs an older Haven"), "{}", waits(&both));
    let mut spec = world.snapshot.vms["db"].spec.clone();
    spec.disks[0].pool = name("gone");
    let mut nowhere = world.clone();
    nowhere.vm("db", spec);
    nowhere.run("db", "host1");
    assert!(waits(&nowhere).contains("a snapshot of db is due, and the pool `gone` is not there"));
    let mut older = world.clone();
    let status = older.snapshot.host_status.get_mut("host1").unwrap();
    let mut old = (*status.value).clone();
    old.speaks = haven_model::host::SNAPSHOTS;
    status.value = std::sync::Arc::new(old);
    assert!(waits(&older).contains("host1 runs an older Haven"), "{}", waits(&older));
}

proptest! {
    /// However the clock goes and whatever becomes of them: one at most is under way, no more are kept than are wanted once all has
    /// come to rest, and what people asked for is there to the end.
    #[test]
    fn they_never_pile_up(turns in prop::collection::vec((-2i64..=9, 0u8..5), 1..60)) {
        let mut world = world(&["db"]);
        was(&mut world, "mine", 2_000 * HOUR, SnapshotState::There, false);
        for (quarters, fate) in turns {
            world.seen.now_ms += quarters * HOUR / 4;
            for (_, called, record) in written(&world) {
                let of = world.snapshot.vm_snapshots.get_mut("uid-db").unwrap();
                prop_assert!(record.scheduled && called != "mine");
                of.insert(name(&called), at(8, record));
            }
            let of = world.snapshot.vm_snapshots.get_mut("uid-db").unwrap();
            let under_way = |record: &&haven_model::Versioned<VmSnapshot>| record.state == SnapshotState::Wanted;
            prop_assert!(of.values().filter(under_way).count() <= 1);
            // Its host does something, or nothing.
            let all: Vec<_> = of.iter().map(|(name, record)| (name.clone(), (*record.value).clone())).collect();
            for (called, mut record) in all {
                match (record.state, fate) {
                    (SnapshotState::Wanted, 1 | 2) => record.state = SnapshotState::There,
                    (SnapshotState::Wanted, 3) => record.state = SnapshotState::Failed,
                    (SnapshotState::Going, 2..) => {
                        of.remove(&called);
                        continue;
                    }
                    _ => continue,
                }
                of.insert(called, at(8, record));
            }
            let scheduled = of.values().filter(|record| record.scheduled && record.state != SnapshotState::Going).count();
            // Three, the one that was just taken, and one that could not be.
            prop_assert!(scheduled <= 5, "{scheduled}");
        }
        let (_, going) = steps(&world);
        let of = &world.snapshot.vm_snapshots["uid-db"];
        prop_assert!(of.contains_key(&name("mine")) && !going.contains(&"mine".to_owned()));
        let kept = of.iter().filter(|(called, record)| {
            record.scheduled && record.state == SnapshotState::There && !going.contains(&called.to_string())
        });
        prop_assert!(kept.count() <= 3);
    }
}

/// `copy` is to be made from `db`, which is on host2.
fn cloning(state: SnapshotState, ago: i64) -> World {
    let mut world = world(&[]);
    let disks = json!([{"name": "data", "size": "10GiB", "pool": "filer"}]);
    let spec = |disks: &serde_json::Value| {
        serde_json::from_value::<VmSpec>(json!({"memory": "1GiB", "disks": disks})).unwrap()
    };
    world.vm("db", spec(&disks));
    world.run("db", "host2");
    was(&mut world, "for-copy", ago, state, false);
    let of = world.snapshot.vm_snapshots.get_mut("uid-db").unwrap();
    let mut record = (*of[&name("for-copy")].value).clone();
    record.made_for = Some(name("copy"));
    of.insert(name("for-copy"), at(8, record));
    let from = json!({"vm": "db", "vmUid": "uid-db", "disk": "data", "snapshot": "for-copy"});
    let disks = json!([{"name": "data", "size": "10GiB", "pool": "filer", "copyOf": from}]);
    world.vm("copy", spec(&disks));
    world
}

fn placed(world: &World) -> Option<String> {
    let actions = plan(&world.snapshot, &world.seen).actions.into_iter();
    actions.into_iter().find_map(|planned| match planned.action {
        Action::PlaceVm { placement, .. } => Some(placement.host.to_string()),
        _ => None,
    })
}

#[test]
fn a_vm_that_is_made_from_another_is_placed_where_that_is() {
    let mut world = cloning(SnapshotState::Wanted, 0);
    assert_eq!(placed(&world).as_deref(), Some("host2"));
    // Where there is no room it waits, and says for which host.
    world.snapshot.drains.insert(name("host2"), at(9, drain()));
    assert_eq!(placed(&world), None);
    let said = waits(&world);
    assert!(said.contains("1 host is not the host of db, from whose disks it is made"), "{said}");
    // Every host reaches a disk in Ceph.
    let mut pool = (*world.snapshot.pools["filer"].value).clone();
    pool.spec.driver = PoolDriverKind::Rbd;
    world.snapshot.pools.insert(name("filer"), at(3, pool));
    assert_eq!(placed(&world).as_deref(), Some("host1"), "{}", waits(&world));
}

#[test]
fn what_was_kept_only_for_a_vm_goes_once_that_is_made_or_gone() {
    use SnapshotState::{Failed, There, Wanted};
    let going = |world: &World| steps(world).1;
    for state in [There, Failed, Wanted] {
        assert_eq!(going(&cloning(state, 9 * HOUR)), [""; 0], "{state}");
    }
    // It runs: its disk needs its origin no more, and after that nothing needs the snapshot.
    let mut made = cloning(There, 9 * HOUR);
    made.run("copy", "host2");
    assert_eq!(going(&made), [""; 0]);
    let forgets = plan(&made.snapshot, &made.seen).actions.into_iter().find_map(|planned| {
        match planned.action {
            Action::PutObject { object, .. } => Some(*object),
            _ => None,
        }
    });
    let Some(haven_model::Object::Vm(vm)) = forgets else { panic!("{forgets:?}") };
    assert_eq!(vm.spec.disks[0].copy_of, None);
    made.snapshot.vms.insert(name("copy"), at(5, vm));
    assert_eq!(going(&made), ["for-copy"]);
    // The VM is gone.
    for state in [There, Failed] {
        let mut alone = cloning(state, 9 * HOUR);
        alone.snapshot.vms.remove(&name("copy"));
        assert_eq!(going(&alone), ["for-copy"], "{state}");
    }
    let mut deleted = cloning(There, 30_000);
    let mut copy = (*deleted.snapshot.vms["copy"].value).clone();
    copy.meta.deleting = true;
    deleted.snapshot.vms.insert(name("copy"), at(5, copy));
    assert_eq!(going(&deleted), ["for-copy"]);
}
