//! Tests of live migrations: every step, and everything that takes one back (docs/decisions/0011-live-migration.md).

use crate::{
    check, plan,
    testing::{World, at, name, vm_spec},
};
use haven_model::{
    Action, Bytes, HostStatus, Migration, MigrationOptions, MigrationPhase, MigrationStatus, Name,
    Placement, PoolDriverKind, PoolSpec, ProofKind, VmPhase, plan::MoveStep,
};

/// One VM that runs on host1, and somebody who wants it to move.
fn asked(to: Option<&str>) -> World {
    let mut world = World::new(3, Bytes::gib(8));
    world.vm("db", vm_spec(Bytes::gib(1)));
    world.run("db", "host1");
    let migration = Migration {
        id: "m1".into(),
        from: name("host1"),
        to: to.map(name),
        options: MigrationOptions::default(),
        by: "alice".into(),
        at_ms: 1,
        drain: None,
        balances: false,
        outcome: None,
    };
    world.snapshot.migrations.insert(name("db"), at(20, migration));
    world
}

/// What the plan does with the VM's placement: the step, the new record, its reason.
fn step(world: &World) -> Option<(MoveStep, Placement, String)> {
    let plan = plan(&world.snapshot, &world.seen);
    check(&world.snapshot, &plan).unwrap_or_else(|broken| panic!("{broken:?}"));
    plan.actions.into_iter().find_map(|planned| match planned.action {
        Action::MoveVm { step, placement, .. } => Some((step, placement, planned.reason)),
        _ => None,
    })
}

/// The step happens.
fn take(world: &mut World, revision: i64) -> String {
    let (_, placement, reason) = step(world).expect("a step");
    world.snapshot.placements.insert(name("db"), at(revision, placement));
    reason
}

fn says(world: &mut World, host: &str, attempt: i64, phase: MigrationPhase, message: &str) {
    let status = MigrationStatus {
        attempt,
        session: 1,
        phase,
        progress: None,
        machine: None,
        ports: false,
        heard: None,
        message: message.into(),
    };
    let table = world.snapshot.migration_status.entry(name("db")).or_default();
    table.insert(name(host), at(attempt + 1, status));
}

fn waiting(world: &World) -> Vec<String> {
    let plan = plan(&world.snapshot, &world.seen);
    plan.waiting.into_iter().map(|waiting| waiting.reason).collect()
}

/// Begun, and both sides as far as before the change of the owner.
fn ready_to_change() -> World {
    let mut world = asked(Some("host2"));
    take(&mut world, 30);
    says(&mut world, "host2", 30, MigrationPhase::Listening, "");
    says(&mut world, "host1", 30, MigrationPhase::Stopped, "");
    world
}

#[test]
fn a_move_goes_from_step_to_step_and_ends_with_its_outcome() {
    let mut world = asked(None);
    let reason = take(&mut world, 30);
    assert!(reason.starts_with("db is to move from host1 to host2, as alice asked"), "{reason}");
    let moving = world.snapshot.placements["db"].moving_to.clone().unwrap();
    assert_eq!((moving.host.as_str(), moving.migration.as_str()), ("host2", "m1"));
    assert_eq!(step(&world), None);
    assert_eq!(waiting(&world), ["db is being moved from host1 to host2: host2 makes ready"]);
    says(&mut world, "host2", 30, MigrationPhase::Listening, "");
    says(&mut world, "host1", 30, MigrationPhase::Copying, "");
    assert_eq!(step(&world), None, "nothing changes before the guest is stopped");
    says(&mut world, "host1", 30, MigrationPhase::Stopped, "");
    let (change, new, _) = step(&world).unwrap();
    assert_eq!(change, MoveStep::Commit { source_told: 31, target_told: 31 });
    assert_eq!((new.host.as_str(), new.epoch, new.moving_to), ("host2", 2, None));
    assert_eq!(new.moved_from.unwrap().attempt, 30);
    take(&mut world, 40);
    assert_eq!(step(&world), None, "it waits for host1's word");
    let told = world.snapshot.told_of(&name("db")).expect("what host1 said still counts");
    assert_eq!(told.phase, VmPhase::Running);
    says(&mut world, "host1", 30, MigrationPhase::HandedOver, "");
    assert_eq!(step(&world), None, "and for the new owner's first word");
    world.report("db", VmPhase::Running, Some(true));
    let reason = take(&mut world, 50);
    assert_eq!(reason, "db was moved from host1 to host2");
    assert_eq!(world.snapshot.placements["db"].moved_from, None);
}

/// What was sent is gone with the process that it was sent to; one that came after it has nothing.
#[test]
fn a_guest_is_never_handed_over_to_a_process_that_came_after_its_copy() {
    let mut world = ready_to_change();
    let hosts = world.snapshot.migration_status.get_mut(&name("db")).unwrap();
    let mut stopped = (*hosts[&name("host1")].value).clone();
    stopped.heard = Some(31);
    hosts.insert(name("host1"), at(31, stopped.clone()));
    assert!(matches!(step(&world), Some((MoveStep::Commit { .. }, ..))));
    stopped.heard = Some(29);
    let hosts = world.snapshot.migration_status.get_mut(&name("db")).unwrap();
    hosts.insert(name("host1"), at(31, stopped));
    let (change, _, reason) = step(&world).unwrap();
    assert_eq!(change, MoveStep::TakeBack, "{reason}");
}

#[test]
fn the_outcome_is_written_with_the_last_step() {
    let mut world = ready_to_change();
    take(&mut world, 40);
    says(&mut world, "host1", 30, MigrationPhase::Gone, "");
    let plan = plan(&world.snapshot, &world.seen);
    let Action::MoveVm { step: MoveStep::Settle, record: Some((migration, 20)), .. } =
        &plan.actions[0].action
    else {
        panic!("{plan:?}");
    };
    let outcome = migration.outcome.clone().unwrap();
    assert!(
        !outcome.moved && outcome.message.starts_with("db starts anew on host2"),
        "{outcome:?}"
    );
}

#[test]
fn whatever_goes_wrong_before_the_change_takes_it_back_with_the_reason() {
    type Wrong = fn(&mut World);
    let cases: [(Wrong, &str); 7] = [
        (|w| says(w, "host1", 30, MigrationPhase::Failed, "the copy broke"), "the copy broke"),
        (
            |w| says(w, "host2", 30, MigrationPhase::Failed, "no room on its disk"),
            "host2 could not make ready: no room on its disk",
        ),
        (|w| _ = w.seen.suspected.insert(name("host2")), "host2 is suspected"),
        (|w| w.lost("host2", ProofKind::PoweredOff), "host2 is lost (powered-off)"),
        (|w| _ = w.snapshot.migrations.remove("db"), "nobody wants it to move any more"),
        (
            |w| {
                let ended = w.snapshot.migrations["db"].ended(5, false, "bob took it back".into());
                w.snapshot.migrations.insert(name("db"), at(21, ended));
            },
            "bob took it back",
        ),
        (|w| w.report("db", VmPhase::Failed, None), "it does not run at the moment"),
    ];
    for (wrong, why) in cases {
        let mut world = ready_to_change();
        wrong(&mut world);
        let (back, placement, reason) = step(&world).unwrap_or_else(|| panic!("{why}"));
        assert_eq!(back, MoveStep::TakeBack, "{why}");
        assert_eq!(reason, format!("db stays on host1: {why}"));
        assert_eq!((placement.host.as_str(), placement.epoch), ("host1", 1));
        assert!(placement.moving_to.is_none() && placement.moved_from.is_none());
    }
}

#[test]
fn words_of_another_attempt_or_an_earlier_session_change_no_owner() {
    let changes = |world: &World| {
        step(world).is_some_and(|(step, _, _)| matches!(step, MoveStep::Commit { .. }))
    };
    assert!(changes(&ready_to_change()));
    let mut world = ready_to_change();
    says(&mut world, "host1", 29, MigrationPhase::Stopped, "");
    assert!(!changes(&world));
    let mut world = ready_to_change();
    says(&mut world, "host2", 29, MigrationPhase::Listening, "");
    assert!(!changes(&world));
    let mut world = ready_to_change();
    let reopened = haven_model::Lease { session: 2, ..crate::testing::lease(false) };
    world.snapshot.leases.insert(name("host2"), at(960, reopened));
    assert!(!changes(&world), "host2 has lost what it had made ready");
}

#[test]
fn a_vm_that_was_handed_over_is_recovered_only_once_its_old_copy_can_run_no_more() {
    let mut world = ready_to_change();
    take(&mut world, 40);
    world.lost("host2", ProofKind::LeaseExpired);
    let placed = |world: &World| {
        let plan = plan(&world.snapshot, &world.seen);
        plan.actions.iter().any(|planned| matches!(planned.action, Action::PlaceVm { .. }))
    };
    assert!(!placed(&world), "host1 may still run it");
    assert_eq!(step(&world), None);
    says(&mut world, "host1", 30, MigrationPhase::Gone, "");
    take(&mut world, 50);
    assert!(placed(&world));
    // The same once the old host is proven lost.
    let mut world = ready_to_change();
    take(&mut world, 40);
    world.lost("host1", ProofKind::LeaseExpired);
    let (settle, placement, reason) = step(&world).unwrap();
    assert_eq!((settle, placement.host.as_str()), (MoveStep::Settle, "host2"));
    assert!(reason.starts_with("db starts anew on host2"), "{reason}");
}

#[test]
fn a_move_that_can_never_be_ends_at_once_and_one_that_cannot_be_now_waits() {
    let outcome = |world: &World| {
        let plan = plan(&world.snapshot, &world.seen);
        plan.actions.into_iter().find_map(|planned| match planned.action {
            Action::PutMigration { migration, .. } => Some(migration.outcome?.message),
            _ => None,
        })
    };
    assert_eq!(
        outcome(&asked(Some("host1"))).unwrap(),
        "db is not moved: it runs on host1 already"
    );
    assert_eq!(
        outcome(&asked(Some("host9"))).unwrap(),
        "db is not moved: there is no host `host9`"
    );
    let mut world = asked(None);
    let pool = PoolSpec::new(PoolDriverKind::Local, "/pool");
    world.snapshot.pools.insert(name("fast"), at(3, crate::testing::stored("fast", pool)));
    let disk = serde_json::json!({"memory": "1GiB", "disks": [{"name": "root", "size": "1GiB", "pool": "fast"}]});
    world.vm("db", serde_json::from_value(disk).unwrap());
    let why = outcome(&world).unwrap();
    assert_eq!(
        why,
        "db is not moved: its disk `root` lives in the pool `fast`, which is local to its host, and host1 has not said that it can take such a disk along"
    );
    world.current();
    assert_eq!(outcome(&world), None, "it goes along");
    assert!(matches!(step(&world), Some((MoveStep::Begin, ..))));
    // The other side would make another machine than the one that runs; another seed is no other machine.
    let mut world = asked(None);
    let mut status = (*world.snapshot.vm_status["db"].value).clone();
    status.started_with = world.snapshot.vms["db"].spec.hardware();
    world.snapshot.vm_status.insert(name("db"), at(4, status));
    let mut spec = world.snapshot.vms["db"].spec.clone();
    spec.user_data = Some("#!/bin/sh".into());
    world.vm("db", spec.clone());
    assert_eq!(outcome(&world), None);
    spec.memory = Bytes::gib(2);
    world.vm("db", spec);
    assert_eq!(
        outcome(&world).unwrap(),
        "db is not moved: it was changed since it was started (memory); `haven vm reset db` takes that up"
    );
    let mut world = asked(Some("host2"));
    let of = |qemu: &str| HostStatus {
        qemu: qemu.into(),
        ..(*world.snapshot.host_status["host1"].value).clone()
    };
    let (old, new) = (of("10.0.2 (Debian 1:10.0.2)"), of("11.1.0 (Debian 1:11.1.0)"));
    world.snapshot.host_status.insert(name("host1"), at(2, new));
    world.snapshot.host_status.insert(name("host2"), at(2, old));
    let why = outcome(&world).unwrap();
    assert!(why.starts_with("db is not moved: QEMU on host2 (10.0.2"), "{why}");
    // No room: it waits and says so.
    let mut world = asked(Some("host2"));
    world.vm("big", vm_spec(Bytes::gib(7)));
    world.run("big", "host2");
    assert_eq!(outcome(&world), None);
    assert_eq!(step(&world), None);
    let why = waiting(&world).join("; ");
    assert!(why.contains("waiting: db needs 1GiB, largest free is"), "{why}");
    // Somewhere else by now: it was about leaving host1.
    let mut world = asked(None);
    world.run("db", "host3");
    assert_eq!(outcome(&world).unwrap(), "db is not moved: it runs on host3 by now");
}

/// Handed over although part of its memory is yet to come.
fn follows() -> World {
    let mut world = ready_to_change();
    take(&mut world, 40);
    says(&mut world, "host1", 30, MigrationPhase::Following, "");
    world
}

#[test]
fn what_follows_a_guest_is_waited_for_and_nothing_of_it_is_ended_before() {
    let mut world = follows();
    world.report("db", VmPhase::Running, Some(true));
    assert_eq!(step(&world), None);
    let why = waiting(&world).join("; ");
    assert!(why.contains("db runs on host2, and its memory follows from host1"), "{why}");
    says(&mut world, "host1", 30, MigrationPhase::HandedOver, "its memory followed it");
    let reason = take(&mut world, 50);
    assert_eq!(reason, "db was moved from host1 to host2; its memory followed it");
}

#[test]
fn what_a_lost_host_was_to_get_is_lost_with_it_and_the_guest_starts_elsewhere() {
    let mut world = follows();
    world.report("db", VmPhase::Running, Some(true));
    world.lost("host2", ProofKind::PoweredOff);
    let reason = take(&mut world, 50);
    assert!(reason.contains("lost before all of its memory had come"), "{reason}");
    // The host that sent it is lost: its new owner starts it anew by itself.
    let mut world = follows();
    world.report("db", VmPhase::Running, Some(true));
    world.lost("host1", ProofKind::PoweredOff);
    let (change, new, reason) = step(&world).unwrap();
    assert_eq!((change, new.host.as_str(), new.epoch), (MoveStep::Settle, "host2", 2));
    assert!(reason.starts_with("db starts anew on host2"), "{reason}");
}

#[test]
fn a_vm_takes_room_on_both_hosts_while_it_moves() {
    let mut world = asked(Some("host2"));
    take(&mut world, 30);
    world.vm("big", vm_spec(Bytes::mib(7 * 1024)));
    let plan = plan(&world.snapshot, &world.seen);
    let host: Vec<Name> = plan
        .actions
        .iter()
        .filter_map(|planned| match &planned.action {
            Action::PlaceVm { placement, .. } => Some(placement.host.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(host, [name("host3")], "neither where it is nor where it goes has room for big");
}
