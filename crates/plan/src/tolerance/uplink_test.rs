//! Tests of hosts that lost an uplink: what moves, where nothing is placed, and what stays and why.

use crate::{
    check, plan,
    testing::{World, at, name, vm_spec},
};
use haven_model::{
    Action, Bytes, FrontendPlacement, Placement, Plan, PoolDriverKind, PoolSpec, VmPhase, VmSpec,
    migration::MigrationOutcome, placement::NicAddress, plan::MoveStep,
};
use serde_json::{from_value, json};

/// Three hosts of 8 GiB; `db` of 1 GiB with a card in `lan` runs on host1, and `other` without one.
fn world() -> World {
    let mut world = World::new(3, Bytes::gib(8));
    let mut spec = vm_spec(Bytes::gib(1));
    world.vm("other", spec.clone());
    world.run("other", "host1");
    spec.networks = from_value(json!([{"network": "lan"}])).unwrap();
    world.vm("db", spec);
    world.run("db", "host1");
    world.network("lan");
    let nics = vec![NicAddress::new(name("lan"), "10.77.0.9".parse().unwrap())];
    let placement = Placement::new(name("host1"), 1, 1, nics);
    world.snapshot.placements.insert(name("db"), at(5, placement));
    world
}

fn cut(world: &mut World, hosts: &[&str]) {
    let all: Vec<_> = world.snapshot.host_status.keys().cloned().collect();
    for host in all {
        let mut status = (*world.snapshot.host_status[&host].value).clone();
        status.cut_off.clear();
        if hosts.contains(&host.as_str()) {
            status.cut_off = ["network/lan", "service/web"].map(World::reference).into();
        }
        world.snapshot.host_status.insert(host, at(60, status));
    }
}

fn planned(world: &World) -> Plan {
    let plan = plan(&world.snapshot, &world.seen);
    check(&world.snapshot, &plan).unwrap_or_else(|broken| panic!("{broken:?}\n{plan:#?}"));
    plan
}

fn moves(plan: &Plan) -> Vec<(String, String, String)> {
    let begins = plan.actions.iter().filter_map(|planned| match &planned.action {
        Action::MoveVm { vm, placement, step: MoveStep::Begin, record, .. } => {
            let (to, record) = (placement.moving_to.clone()?, record.as_ref()?);
            assert_eq!((to.restart, &record.0.id), (false, &to.migration));
            Some((vm.to_string(), to.host.to_string(), planned.reason.clone()))
        }
        _ => None,
    });
    begins.collect()
}

fn waits(plan: &Plan, vm: &str) -> String {
    let of = plan.waiting.iter().filter(|waiting| waiting.object.name.as_str() == vm);
    of.map(|waiting| waiting.reason.clone()).collect::<Vec<_>>().join("; ")
}

#[test]
fn what_is_cut_off_moves_live_and_nothing_else_does() {
    let mut world = world();
    assert!(moves(&planned(&world)).is_empty());
    cut(&mut world, &["host1", "host2"]);
    let plan = planned(&world);
    let reason = "db is to move from host1 to host3, because host1 is cut off from the network `lan`: no other member is there, 8GiB was free";
    assert_eq!(moves(&plan), [("db".into(), "host3".into(), reason.into())]);
    let [haven_model::plan::Planned { action: Action::MoveVm { placement, record, .. }, .. }] =
        &plan.actions[..]
    else {
        panic!("{plan:#?}")
    };
    world.snapshot.placements.insert(name("db"), at(70, placement.clone()));
    let (record, expected) = record.clone().unwrap();
    assert_eq!((expected, record.by.as_str()), (0, "the loss of host1's uplink"));
    world.snapshot.migrations.insert(name("db"), at(70, *record));
    assert!(moves(&planned(&world)).is_empty(), "it is under way");
}

#[test]
fn where_all_are_cut_off_alike_nothing_moves() {
    let mut world = world();
    cut(&mut world, &["host1", "host2", "host3"]);
    let plan = planned(&world);
    assert!(plan.actions.is_empty() && plan.waiting.is_empty(), "{plan:#?}");
    // A host that is not usable is no better place.
    cut(&mut world, &["host1", "host2"]);
    world.silent("host3", 3_000, false);
    assert!(moves(&planned(&world)).is_empty());
}

#[test]
fn a_move_that_failed_is_tried_again_after_a_pause_and_a_persons_comes_first() {
    let mut world = world();
    cut(&mut world, &["host1"]);
    let plan = planned(&world);
    let Action::MoveVm { record: Some((record, _)), .. } = &plan.actions[0].action else {
        panic!("{plan:#?}")
    };
    let mut record = (**record).clone();
    let outcome =
        |at_ms| MigrationOutcome { at_ms, moved: false, message: "the copy broke".into() };
    record.outcome = Some(outcome(world.seen.now_ms - 10_000));
    world.snapshot.migrations.insert(name("db"), at(70, record.clone()));
    let plan = planned(&world);
    assert!(moves(&plan).is_empty());
    assert_eq!(
        waits(&plan, "db"),
        "db is cut off from the network `lan` on host1: it is moved again in 20 s: the copy broke"
    );
    assert!(plan.wake_after_ms.is_some_and(|ms| ms <= 20_000));
    // Nobody waits for an hour because a clock was set back by one.
    let mut set_back = world.clone();
    set_back.seen.now_ms -= 3_600_000;
    assert_eq!(moves(&planned(&set_back)).len(), 1);
    record.outcome = Some(outcome(world.seen.now_ms - 30_000));
    world.snapshot.migrations.insert(name("db"), at(71, record.clone()));
    assert_eq!(moves(&planned(&world)).len(), 1);
    record.outcome = None;
    record.by = "alice".into();
    record.to = Some(name("host2"));
    world.snapshot.migrations.insert(name("db"), at(72, record));
    let plan = planned(&world);
    assert!(moves(&plan).is_empty(), "its own step is not this one's: {plan:#?}");
    assert!(waits(&plan, "db").contains("it first moves as alice asked"), "{}", waits(&plan, "db"));
}

#[test]
fn what_cannot_move_stays_and_says_so() {
    let mut world = world();
    cut(&mut world, &["host1"]);
    let pool = PoolSpec::new(PoolDriverKind::Local, "/disks");
    world.snapshot.pools.insert(name("fast"), at(3, crate::testing::stored("fast", pool)));
    let mut object = (*world.snapshot.vms["db"].value).clone();
    object.spec.disks =
        from_value(json!([{"name": "root", "size": "1GiB", "pool": "fast"}])).unwrap();
    world.snapshot.vms.insert(name("db"), at(61, object));
    let plan = planned(&world);
    assert!(moves(&plan).is_empty());
    assert_eq!(
        waits(&plan, "db"),
        "db is cut off from the network `lan` on host1: its disk `root` lives in the pool `fast`, which is local to its host, and host1 has not said that it can take such a disk along, so it stays"
    );
    // One that does not run is left to its host.
    world.report("db", VmPhase::Failed, None);
    assert_eq!(waits(&planned(&world), "db"), "");
}

#[test]
fn nothing_is_placed_where_it_would_be_cut_off() {
    let mut world = world();
    cut(&mut world, &["host2", "host3"]);
    let mut spec: VmSpec = vm_spec(Bytes::gib(1));
    spec.networks = from_value(json!([{"network": "lan"}])).unwrap();
    world.vm("new", spec);
    let plan = planned(&world);
    let host = plan.actions.iter().find_map(|planned| match &planned.action {
        Action::PlaceVm { vm, placement, .. } if vm.as_str() == "new" => Some(&placement.host),
        _ => None,
    });
    // The fullest of the three.
    assert_eq!(host, Some(&name("host1")), "{plan:#?}");
}

#[test]
fn an_address_goes_to_a_host_that_is_reached_and_stays_there() {
    let mut world = world();
    world.service("web", 0);
    let mut service = (*world.snapshot.services["web"].value).clone();
    service.spec.frontend =
        Some(from_value(json!({"address": "10.88.0.100", "port": 80})).unwrap());
    world.snapshot.services.insert(name("web"), at(8, service));
    let held = FrontendPlacement {
        holder: name("host1"),
        candidates: ["host1", "host2", "host3"].map(name).into(),
        epoch: 4,
        ..from_value(json!({"holder": "host1", "epoch": 4, "candidates": []})).unwrap()
    };
    world.snapshot.frontends.insert(name("web"), at(9, held));
    let next = |world: &World| {
        planned(world).actions.into_iter().find_map(|planned| match planned.action {
            Action::PlaceFrontend { placement, .. } => Some((placement, planned.reason)),
            _ => None,
        })
    };
    assert_eq!(next(&world), None);
    cut(&mut world, &["host1", "host2"]);
    let (now, reason) = next(&world).unwrap();
    assert_eq!(reason, "host3 takes 10.88.0.100 because host1 is cut off from its network");
    assert_eq!((now.holder.as_str(), now.epoch, &now.from), ("host3", 5, &None));
    assert_eq!(now.candidates, [name("host3")]);
    world.snapshot.frontends.insert(name("web"), at(10, now));
    assert_eq!(next(&world), None);
    // Once the others are reached again they may take it, and it stays.
    cut(&mut world, &[]);
    let (now, _) = next(&world).unwrap();
    assert_eq!((now.holder.as_str(), now.candidates.len()), ("host3", 3));
    world.snapshot.frontends.insert(name("web"), at(11, now));
    cut(&mut world, &["host1", "host2", "host3"]);
    assert_eq!(next(&world), None, "no host is better");
}
