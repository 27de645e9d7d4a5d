//! A VM that keeps failing: once to another host, never blindly, and always told.

use crate::{
    check, plan,
    testing::{World, at, name, vm_spec},
};
use haven_model::{Action, Bytes, Incident, Placement, Plan, VmPhase, placement::FailedOn};

fn world() -> World {
    let mut world = World::new(3, Bytes::gib(8));
    world.vm("db", vm_spec(Bytes::gib(1)));
    world.run("db", "host1");
    world
}

/// What its host says of it.
fn says(world: &mut World, phase: VmPhase, failures: u32, idle: bool) {
    world.report("db", phase, None);
    let mut status = (*world.snapshot.vm_status["db"].value).clone();
    status.failures = failures;
    status.idle = idle;
    status.message = "its process ended unexpectedly".into();
    world.snapshot.vm_status.insert(name("db"), at(77, status));
}

fn planned(world: &World) -> Plan {
    let plan = plan(&world.snapshot, &world.seen);
    if let Err(broken) = check(&world.snapshot, &plan) {
        panic!("{broken:?}\n{plan:#?}");
    }
    plan
}

fn tried(plan: &Plan) -> Option<(&Placement, i64)> {
    plan.actions.iter().find_map(|planned| match &planned.action {
        Action::TryElsewhere { placement, told, .. } => Some((placement, *told)),
        _ => None,
    })
}

fn incident(plan: &Plan) -> Option<&Incident> {
    plan.actions.iter().find_map(|planned| match &planned.action {
        Action::PutIncident { incident, .. } => Some(&**incident),
        _ => None,
    })
}

#[test]
fn one_that_hangs_again_is_tried_elsewhere_and_told() {
    let mut world = world();
    for (hung, elsewhere) in [(1, false), (2, true)] {
        says(&mut world, VmPhase::Failed, 1, true);
        let mut status = (*world.snapshot.vm_status["db"].value).clone();
        status.hung = hung;
        status.message = "it hung again".into();
        world.snapshot.vm_status.insert(name("db"), at(78, status));
        let plan = planned(&world);
        assert_eq!(tried(&plan).is_some(), elsewhere, "{hung}");
        if !elsewhere {
            continue;
        }
        let (placement, told) = tried(&plan).unwrap();
        assert_eq!((placement.host.as_str(), told), ("host2", 78));
        let other = |planned: &&haven_model::plan::Planned| {
            matches!(planned.action, Action::TryElsewhere { .. })
        };
        let reason = &plan.actions.iter().find(other).unwrap().reason;
        assert!(
            reason.starts_with("db is tried on host2 because it hung 2 times on host1"),
            "{reason}"
        );
        assert_eq!(incident(&plan).unwrap().steps[0].message, "it hung 2 times: it hung again");
    }
}

#[test]
fn it_is_tried_elsewhere_once_and_told_of_as_long_as_it_fails() {
    let mut world = world();
    says(&mut world, VmPhase::Failed, 4, true);
    assert!(tried(&planned(&world)).is_none());
    says(&mut world, VmPhase::Failed, 5, true);
    let plan = planned(&world);
    let (placement, told) = tried(&plan).unwrap();
    assert_eq!((placement.host.as_str(), placement.epoch, told), ("host2", 2, 77));
    assert_eq!(placement.failed_on.as_ref().unwrap().host.as_str(), "host1");
    let opened = incident(&plan).unwrap().clone();
    assert_eq!(opened.title, "db keeps failing on host1");
    let placement = placement.clone();
    world.snapshot.placements.insert(name("db"), at(80, placement));
    world.snapshot.incidents.insert(opened.number, at(81, opened));
    says(&mut world, VmPhase::Failed, 6, true);
    let plan = planned(&world);
    assert!(tried(&plan).is_none());
    assert_eq!(
        plan.waiting[0].reason,
        "db failed 6 times in a row on host2, the last time: its process ended unexpectedly; it failed on host1, \
         too: it is tried further, with pauses; `haven vm log db` may tell why"
    );
    // Much later it may be tried once more, where it was not yet.
    world.seen.now_ms += 3_600_000;
    assert_eq!(tried(&planned(&world)).unwrap().0.host.as_str(), "host3");
}

#[test]
fn nothing_is_taken_from_a_host_that_may_have_a_process_of_it() {
    let mut world = world();
    for (phase, idle) in
        [(VmPhase::Failed, false), (VmPhase::Starting, true), (VmPhase::Running, true)]
    {
        says(&mut world, phase, 9, idle);
        let plan = planned(&world);
        assert!(tried(&plan).is_none(), "{phase:?}");
        assert!(plan.waiting[0].reason.contains("once it has failed again"), "{:?}", plan.waiting);
    }
    // The second line says so, too, of a plan that does.
    says(&mut world, VmPhase::Failed, 9, true);
    let good = planned(&world);
    for (phase, idle, revision) in
        [(VmPhase::Failed, false, 77), (VmPhase::Running, true, 77), (VmPhase::Failed, true, 78)]
    {
        says(&mut world, phase, 9, idle);
        let status = (*world.snapshot.vm_status["db"].value).clone();
        world.snapshot.vm_status.insert(name("db"), at(revision, status));
        let broken = check(&world.snapshot, &good).unwrap_err();
        assert!(broken.why.contains("has not said that nothing of it is there"), "{broken:?}");
    }
}

#[test]
fn what_cannot_move_stays_and_says_so() {
    let mut world = world();
    let pool = serde_json::json!({"driver": "local", "path": "/var/lib/p"});
    let pool = crate::testing::stored("fast", serde_json::from_value(pool).unwrap());
    world.snapshot.pools.insert(name("fast"), at(3, pool));
    let disk = serde_json::json!({"memory": "1GiB", "disks": [{"name": "root", "size": "1GiB", "pool": "fast"}]});
    world.vm("db", serde_json::from_value(disk).unwrap());
    says(&mut world, VmPhase::Failed, 5, true);
    let plan = planned(&world);
    assert!(tried(&plan).is_none());
    assert!(plan.waiting[0].reason.contains("lives in the local pool `fast`, so it stays"));
}

#[test]
fn its_incident_is_closed_once_it_runs_well() {
    let mut world = world();
    says(&mut world, VmPhase::Failed, 5, true);
    let opened = incident(&planned(&world)).unwrap().clone();
    world.snapshot.incidents.insert(opened.number, at(81, opened));
    let failed = FailedOn { host: name("host1"), at_ms: world.seen.now_ms };
    let placement =
        Placement { failed_on: Some(failed), ..Placement::new(name("host2"), 2, 0, vec![]) };
    world.snapshot.placements.insert(name("db"), at(80, placement));
    says(&mut world, VmPhase::Running, 0, false);
    let plan = planned(&world);
    assert_eq!(incident(&plan).unwrap().steps.last().unwrap().phase, "placed");
    assert_eq!(plan.wake_after_ms, Some(60_000));
    world.seen.now_ms += 60_000;
    let plan = planned(&world);
    let closed = incident(&plan).unwrap();
    let phases: Vec<&str> = closed.steps.iter().map(|step| step.phase.as_str()).collect();
    assert_eq!(phases, ["failed", "placed", "started", "closed"]);
    assert!(closed.closed_ms.is_some());
}
