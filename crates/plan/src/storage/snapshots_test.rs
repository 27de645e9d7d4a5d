//! Tests of [`super::snapshots`]: what would lose a snapshot is not done, and that is said.

use crate::{
    plan,
    testing::{World, at, name, stored, vm_spec},
    tolerance::migration::immovable,
};
use haven_model::{
    Action, Bytes, Drain, Migration, Plan, PoolDriverKind, PoolSpec,
    plan::MoveStep,
    vm_snapshot::{SnapshotState, VmSnapshot},
};
use serde_json::json;

/// `db` runs on host1, with a disk on its own host and one that all hosts have.
fn world() -> World {
    let mut world = World::new(2, Bytes::gib(8));
    world.current();
    for (pool, driver) in [("fast", PoolDriverKind::Local), ("filer", PoolDriverKind::Shared)] {
        let spec: PoolSpec =
            serde_json::from_value(json!({"driver": driver, "path": format!("/{pool}")})).unwrap();
        world.snapshot.pools.insert(name(pool), at(3, stored(pool, spec)));
    }
    let mut spec = vm_spec(Bytes::gib(1));
    spec.disks = serde_json::from_value(json!([
        {"name": "root", "pool": "fast", "size": "1GiB"}, {"name": "data", "pool": "filer", "size": "1GiB"},
    ]))
    .unwrap();
    world.vm("db", spec);
    world.run("db", "host1");
    world
}

/// It has a snapshot of a disk.
fn keeps(world: &mut World, disk: &str, pool: &str, state: SnapshotState) {
    let record: VmSnapshot =
        serde_json::from_value(json!({"id": "s", "vm": "db", "by": "root", "atMs": 1,
        "disks": [{"name": disk, "pool": pool, "size": "1GiB"}], "state": state}))
        .unwrap();
    let of = world.snapshot.vm_snapshots.entry("uid-db".into()).or_default();
    of.insert(name("before"), at(8, record));
}

fn stays(world: &World) -> Option<String> {
    immovable(&world.snapshot, &world.snapshot.vms["db"])
}

fn steps(plan: &Plan) -> Vec<&MoveStep> {
    let of = plan.actions.iter().filter_map(|of| match &of.action {
        Action::MoveVm { step, .. } => Some(step),
        _ => None,
    });
    of.collect()
}

const WHY: &str = "its disk `root` is local to its host and holds the snapshot `before`, which would not go along; `haven vm snapshot rm db before` gives that up";

#[test]
fn a_snapshot_in_a_disk_of_one_host_keeps_its_vm_there() {
    let mut world = world();
    assert_eq!(stays(&world), None);
    for (state, keeps_it) in [
        (SnapshotState::Wanted, true),
        (SnapshotState::There, true),
        (SnapshotState::Reverting, true),
        (SnapshotState::Failed, false),
        (SnapshotState::Going, false),
    ] {
        keeps(&mut world, "root", "fast", state);
        assert_eq!(stays(&world).as_deref(), keeps_it.then_some(WHY), "{state}");
        keeps(&mut world, "data", "filer", state);
        assert_eq!(stays(&world), None, "all hosts have that one");
    }
    keeps(&mut world, "swap", "fast", SnapshotState::There);
    assert_eq!(stays(&world), None, "its VM has no such disk any more");
    world.snapshot.vm_snapshots.clear();
    world.snapshot.unreadable.insert("snapshots/uid-db/odd".into(), 9);
    assert!(stays(&world).unwrap().contains("the record snapshots/uid-db/odd cannot be read"));
}

#[test]
fn a_drain_says_what_it_waits_for() {
    let mut world = world();
    keeps(&mut world, "root", "fast", SnapshotState::There);
    let drain = Drain {
        id: "d".into(),
        by: "root".into(),
        at_ms: 1,
        drained_ms: None,
        bringing_back: false,
    };
    world.snapshot.drains.insert(name("host1"), at(7, drain));
    let planned = plan(&world.snapshot, &world.seen);
    assert!(steps(&planned).is_empty());
    let says = planned.waiting.iter().map(|of| of.reason.as_str()).collect::<Vec<_>>().join("; ");
    assert!(says.contains(&format!("waiting: db keeps host1 from being drained: {WHY}")), "{says}");
    keeps(&mut world, "root", "fast", SnapshotState::Going);
    assert_eq!(steps(&plan(&world.snapshot, &world.seen)), [&MoveStep::Begin]);
}

/// One that is asked for ends with the reason; one that had begun when the snapshot was taken is taken back.
#[test]
fn a_move_that_would_lose_it_ends_with_words() {
    let mut world = world();
    let migration: Migration = serde_json::from_value(
        json!({"id": "m", "from": "host1", "to": "host2", "options": {}, "by": "root", "atMs": 1}),
    )
    .unwrap();
    world.snapshot.migrations.insert(name("db"), at(7, migration));
    let begun = plan(&world.snapshot, &world.seen);
    assert_eq!(steps(&begun), [&MoveStep::Begin]);
    let mut moving = world.clone();
    keeps(&mut world, "root", "fast", SnapshotState::There);
    let ended = plan(&world.snapshot, &world.seen);
    let outcome = ended.actions.iter().find_map(|of| match &of.action {
        Action::PutMigration { migration, .. } => migration.outcome.clone(),
        _ => None,
    });
    assert_eq!(outcome.unwrap().message, format!("db is not moved: {WHY}"));
    let placement = begun.actions.iter().find_map(|of| match &of.action {
        Action::MoveVm { placement, .. } => Some(placement.clone()),
        _ => None,
    });
    moving.snapshot.placements.insert(name("db"), at(9, placement.unwrap()));
    keeps(&mut moving, "root", "fast", SnapshotState::Wanted);
    assert!(steps(&plan(&moving.snapshot, &moving.seen)).is_empty(), "it is taken where it goes");
    keeps(&mut moving, "root", "fast", SnapshotState::There);
    let back = plan(&moving.snapshot, &moving.seen);
    assert_eq!(steps(&back), [&MoveStep::TakeBack]);
    assert!(back.actions.iter().any(|of| of.reason == format!("db stays on host1: {WHY}")));
}
