//! Who gets a host first, what it waits for, and for how long.

use crate::{
    check, plan,
    testing::{World, at, name, vm_spec},
};
use haven_model::{
    Action, Bytes, Name, Plan, ProofKind, VmPhase,
    vm::{Priority, Wait},
};

fn planned(world: &World) -> Plan {
    let plan = plan(&world.snapshot, &world.seen);
    if let Err(broken) = check(&world.snapshot, &plan) {
        panic!("{broken:?}\n{plan:#?}");
    }
    plan
}

fn placed(plan: &Plan) -> Vec<&str> {
    let placed = plan.actions.iter().filter_map(|planned| match &planned.action {
        Action::PlaceVm { vm, .. } => Some(vm.as_str()),
        _ => None,
    });
    placed.collect()
}

fn waits<'a>(plan: &'a Plan, vm: &str) -> &'a str {
    let waits = plan.waiting.iter().find(|waiting| waiting.object.name.as_str() == vm);
    waits.map_or("", |waiting| &waiting.reason)
}

/// A VM of 1 GiB with QEMU's own part, as old as the number says.
fn add(world: &mut World, vm: &str, age: i64, priority: Priority, after: &[&str]) {
    let mut spec = vm_spec(Bytes::mib(960));
    spec.priority = priority;
    spec.after = after.iter().map(|what| World::reference(what)).collect();
    world.vm(vm, spec);
    let mut object = (*world.snapshot.vms[vm].value).clone();
    object.meta.created_ms = age;
    world.snapshot.vms.insert(name(vm), at(4, object));
}

/// Carries out the waits of a plan.
fn note_waits(world: &mut World, plan: &Plan) {
    for planned in &plan.actions {
        if let Action::PutWait { vm, wait, .. } = &planned.action {
            match wait {
                Some(wait) => _ = world.snapshot.waits.insert(vm.clone(), at(8, wait.clone())),
                None => _ = world.snapshot.waits.remove(vm),
            }
        }
    }
}

#[test]
fn higher_priorities_come_first_then_the_oldest_and_the_last_goes_without() {
    let mut world = World::new(3, Bytes::gib(2));
    add(&mut world, "old", 1, Priority::Normal, &[]);
    add(&mut world, "new", 2, Priority::Normal, &[]);
    add(&mut world, "batch", 0, Priority::Low, &[]);
    add(&mut world, "shop", 9, Priority::High, &[]);
    add(&mut world, "dns", 10, Priority::Critical, &[]);
    for vm in ["old", "new", "batch", "shop", "dns"] {
        world.run(vm, "host1");
    }
    world.lost("host1", ProofKind::LeaseExpired);
    let plan = planned(&world);
    assert_eq!(placed(&plan), ["dns", "shop", "old", "new"]);
    assert!(waits(&plan, "batch").starts_with("waiting: batch needs 960MiB"), "{:?}", plan.waiting);
}

#[test]
fn a_vm_waits_until_what_it_starts_after_has_run_or_passes_its_check() {
    let mut world = World::new(3, Bytes::gib(8));
    add(&mut world, "app", 0, Priority::Normal, &["vm/db"]);
    add(&mut world, "db", 1, Priority::Normal, &[]);
    world.run("app", "host1");
    world.run("db", "host1");
    world.lost("host1", ProofKind::LeaseExpired);
    let plan = planned(&world);
    assert_eq!(placed(&plan), ["db"]);
    assert_eq!(
        waits(&plan, "app"),
        "waiting: app starts after vm/db, of which host1 has not reported yet; it waits 5m at most"
    );
    note_waits(&mut world, &plan);
    assert_eq!(world.snapshot.waits["app"].since_ms, world.seen.now_ms);
    world.run("db", "host2");
    world.report("db", VmPhase::Starting, None);
    let plan = planned(&world);
    assert_eq!(placed(&plan), [""; 0]);
    assert!(
        waits(&plan, "app").contains("vm/db, which is starting on host2"),
        "{:?}",
        plan.waiting
    );
    assert!(!plan.actions.iter().any(|p| matches!(p.action, Action::PutWait { .. })));
    world.report("db", VmPhase::Running, None);
    assert_eq!(placed(&planned(&world)), ["app"]);
    // With a check, to run is not enough.
    let mut db = (*world.snapshot.vms["db"].value).clone();
    db.spec.check = Some(serde_json::from_value(serde_json::json!({"port": 80})).unwrap());
    world.snapshot.vms.insert(name("db"), at(4, db));
    let plan = planned(&world);
    assert!(waits(&plan, "app").contains("does not pass its health check on host2 yet"));
    world.report("db", VmPhase::Running, Some(true));
    assert_eq!(placed(&planned(&world)), ["app"]);
}

#[test]
fn nobody_waits_for_ever() {
    let mut world = World::new(2, Bytes::gib(8));
    add(&mut world, "app", 0, Priority::Normal, &["vm/db"]);
    add(&mut world, "db", 1, Priority::Normal, &[]);
    world.run("db", "host1");
    world.report("db", VmPhase::Failed, None);
    let begun = planned(&world);
    note_waits(&mut world, &begun);
    world.seen.now_ms += 299_000;
    let plan = planned(&world);
    assert_eq!((placed(&plan), plan.wake_after_ms), (vec![], Some(1000)));
    world.seen.now_ms += 1000;
    let plan = planned(&world);
    assert_eq!(placed(&plan), ["app"]);
    let reason = &plan.actions.iter().find(|p| p.object.name.as_str() == "app").unwrap().reason;
    assert!(reason.ends_with(", after 5m without vm/db, which is failed on host1"), "{reason}");
    // A clock that was set back begins it anew.
    world.snapshot.waits.insert(name("app"), at(8, Wait { since_ms: world.seen.now_ms + 1 }));
    let plan = planned(&world);
    note_waits(&mut world, &plan);
    assert_eq!(world.snapshot.waits["app"].since_ms, world.seen.now_ms);
    // What nobody wants to run is not waited for, nor what is not there.
    let mut db = (*world.snapshot.vms["db"].value).clone();
    db.spec.running = false;
    world.snapshot.vms.insert(name("db"), at(4, db));
    assert_eq!(placed(&planned(&world)), ["app"]);
    world.snapshot.vms.remove("db");
    assert_eq!(placed(&planned(&world)), ["app"]);
    // A wait that has ended without a host is forgotten.
    let mut app = (*world.snapshot.vms["app"].value).clone();
    app.spec.running = false;
    world.snapshot.vms.insert(name("app"), at(4, app));
    let plan = planned(&world);
    note_waits(&mut world, &plan);
    assert!(world.snapshot.waits.is_empty());
}

#[test]
fn what_is_waited_for_goes_with_the_priority_of_those_that_wait_and_their_room_is_kept() {
    let mut world = World::new(2, Bytes::gib(2));
    add(&mut world, "shop", 0, Priority::High, &["service/db"]);
    add(&mut world, "db-1", 5, Priority::Low, &[]);
    let mut db = (*world.snapshot.vms["db-1"].value).clone();
    world.service("db", 1);
    db.meta.owner = Some(World::reference("service/db"));
    world.snapshot.vms.insert(name("db-1"), at(4, db));
    add(&mut world, "other", 1, Priority::Normal, &[]);
    for vm in ["shop", "db-1", "other"] {
        world.run(vm, "host1");
    }
    world.lost("host1", ProofKind::LeaseExpired);
    let first = planned(&world);
    let of_db = |planned: &&str| planned.starts_with("db");
    assert_eq!(placed(&first).into_iter().filter(of_db).count(), 1, "{first:#?}");
    assert!(!placed(&first).contains(&"other"), "its room is the shop's: {first:#?}");
    assert!(waits(&first, "shop").contains("service/db, which has no member ready"));
    world.run("db-1", "host2");
    assert_eq!(placed(&planned(&world)), ["shop"]);
}

#[test]
fn a_circle_that_came_about_all_the_same_ends() {
    let mut world = World::new(2, Bytes::gib(8));
    add(&mut world, "a", 0, Priority::Normal, &["vm/b"]);
    add(&mut world, "b", 0, Priority::Normal, &["vm/a"]);
    let plan = planned(&world);
    assert_eq!(placed(&plan), [""; 0]);
    note_waits(&mut world, &plan);
    world.seen.now_ms += 300_000;
    let both: Vec<Name> = placed(&planned(&world)).into_iter().map(name).collect();
    assert_eq!(both.len(), 2);
}
