//! Tests of planned work: what leaves a drained host, how, what blocks it, and what comes back.

use crate::{
    HostState, check, host_states, plan,
    testing::{World, at, name, vm_spec},
    tolerance::drain,
};
use haven_model::{
    Action, Bytes, ClusterSpec, Drain, DrainMove, HostStatus, Migration, MigrationOptions,
    MigrationPhase, MigrationStatus, MoveLimits, Placement, Plan, PoolDriverKind, PoolSpec,
    ProofKind, VmPhase, VmSpec, object::Kind, object::Object, plan::MoveStep, service::DRAIN_LABEL,
};

fn drained(world: &mut World, host: &str) {
    let drain = Drain {
        id: "d1".into(),
        by: "alice".into(),
        at_ms: 1,
        drained_ms: None,
        bringing_back: false,
    };
    world.snapshot.drains.insert(name(host), at(40, drain));
}

/// Hosts of 8 GiB, of which host1 is drained and runs these VMs of 1 GiB.
fn world(hosts: usize, vms: &[&str]) -> World {
    let mut world = World::new(hosts, Bytes::gib(8));
    for vm in vms {
        world.vm(vm, vm_spec(Bytes::gib(1)));
        world.run(vm, "host1");
    }
    drained(&mut world, "host1");
    world
}

fn planned(world: &World) -> Plan {
    let plan = plan(&world.snapshot, &world.seen);
    check(&world.snapshot, &plan).unwrap_or_else(|broken| panic!("{broken:?}"));
    plan
}

/// The moves of a plan: VM, where to, whether it restarts there.
fn moves(plan: &Plan) -> Vec<(String, String, bool)> {
    let begins = plan.actions.iter().filter_map(|planned| match &planned.action {
        Action::MoveVm { vm, placement, step: MoveStep::Begin, .. } => {
            let to = placement.moving_to.clone()?;
            Some((vm.to_string(), to.host.to_string(), to.restart))
        }
        _ => None,
    });
    begins.collect()
}

fn waits(plan: &Plan, vm: &str) -> String {
    let of = plan.waiting.iter().filter(|waiting| waiting.object.name.as_str() == vm);
    of.map(|waiting| waiting.reason.clone()).collect::<Vec<_>>().join("; ")
}

/// Every move of a plan is written as the manager does it, over records of this revision on.
fn commit(world: &mut World, plan: &Plan, mut revision: i64) {
    for planned in &plan.actions {
        revision += 1;
        match &planned.action {
            Action::MoveVm { vm, placement, record, .. } => {
                world.snapshot.placements.insert(vm.clone(), at(revision, placement.clone()));
                if let Some((migration, _)) = record {
                    let migration = at(revision, (**migration).clone());
                    world.snapshot.migrations.insert(vm.clone(), migration);
                }
            }
            Action::PlaceVm { vm, placement, .. } => {
                world.snapshot.placements.insert(vm.clone(), at(revision, placement.clone()));
            }
            Action::PutDrain { host, drain: Some(drain), .. } => {
                world.snapshot.drains.insert(host.clone(), at(revision, drain.clone()));
            }
            Action::PutDrain { host, drain: None, .. } => {
                world.snapshot.drains.remove(host);
            }
            Action::PutObject { object, .. } => {
                if let Object::Vm(vm) = &**object {
                    world.snapshot.vms.insert(vm.meta.name.clone(), at(revision, vm.clone()));
                }
            }
            _ => {}
        }
    }
}

fn says(world: &mut World, vm: &str, host: &str, phase: MigrationPhase) {
    let placement = &world.snapshot.placements[vm];
    let attempt = placement.moved_from.as_ref().map_or(placement.revision, |from| from.attempt);
    let (progress, machine, message) = (None, None, "the wire broke".into());
    let status = MigrationStatus {
        attempt,
        session: 1,
        phase,
        progress,
        machine,
        ports: false,
        heard: None,
        message,
    };
    let table = world.snapshot.migration_status.entry(name(vm)).or_default();
    table.insert(name(host), at(attempt + 1, status));
}

/// A VM that was begun to be moved live arrives.
fn arrives(world: &mut World, vm: &str, revision: i64) {
    let to = world.snapshot.placements[vm].moving_to.clone().unwrap().host;
    let from = world.snapshot.placements[vm].host.clone();
    says(world, vm, to.as_str(), MigrationPhase::Listening);
    says(world, vm, from.as_str(), MigrationPhase::Stopped);
    let plan = planned(world);
    commit(world, &plan, revision);
    says(world, vm, from.as_str(), MigrationPhase::HandedOver);
    world.report(vm, VmPhase::Running, Some(true));
    let plan = planned(world);
    commit(world, &plan, revision + 20);
    assert_eq!(world.snapshot.placements[vm].host, to);
}

fn state(world: &World, host: &str) -> HostState {
    host_states(&world.snapshot, &world.seen)[host]
}

fn local_disk(mut spec: VmSpec) -> VmSpec {
    let disk = serde_json::json!({"name": "root", "size": "1GiB", "pool": "scratch"});
    spec.disks = vec![serde_json::from_value(disk).unwrap()];
    spec
}

fn scratch(world: &mut World) {
    let pool = PoolSpec::new(PoolDriverKind::Local, "/var/lib/haven");
    world.snapshot.pools.insert(name("scratch"), at(8, crate::testing::stored("scratch", pool)));
}

#[test]
fn a_few_at_a_time_leave_until_the_host_is_drained() {
    let mut world = world(3, &["db-1", "db-2", "db-3"]);
    assert_eq!(state(&world, "host1"), HostState::Draining);
    let plan = planned(&world);
    let begun = moves(&plan);
    assert_eq!(begun.len(), 2, "{begun:?}");
    assert!(begun.iter().all(|(_, to, restart)| to != "host1" && !restart), "{begun:?}");
    assert_eq!(
        waits(&plan, "db-3"),
        "waiting: db-3 leaves host1 later: host1 has a part in enough moves now (moves.perHost is 2)"
    );
    let reason = &plan.actions[0].reason;
    assert!(reason.starts_with("db-1 is to move from host1 to host2, because host1 is drained:"));
    commit(&mut world, &plan, 100);
    let record = world.snapshot.migrations["db-1"].clone();
    assert_eq!((record.from.as_str(), record.by.as_str()), ("host1", "the drain of host1"));
    assert_eq!(record.to.as_ref().map(|to| to.as_str()), Some("host2"));
    arrives(&mut world, "db-1", 200);
    arrives(&mut world, "db-2", 300);
    assert_eq!(world.snapshot.migrations["db-1"].outcome.clone().map(|o| o.moved), Some(true));
    let plan = planned(&world);
    commit(&mut world, &plan, 400);
    if world.snapshot.placements["db-3"].moving_to.is_some() {
        arrives(&mut world, "db-3", 500);
    }
    assert_eq!(state(&world, "host1"), HostState::Drained);
    let plan = planned(&world);
    commit(&mut world, &plan, 600);
    assert_eq!(world.snapshot.drains["host1"].drained_ms, Some(world.seen.now_ms));
    let plan = planned(&world);
    assert_eq!((plan.actions.len(), plan.waiting.len()), (0, 0), "{plan:?}");
}

#[test]
fn the_clusters_limit_counts_every_move() {
    let mut world = world(3, &["db-1", "db-2"]);
    let moves_limit = MoveLimits { per_host: 5, cluster: 1 };
    let spec = ClusterSpec { moves: moves_limit, ..ClusterSpec::default() };
    world.snapshot.cluster = Some(at(9, spec));
    let plan = planned(&world);
    assert_eq!(moves(&plan).len(), 1);
    assert!(waits(&plan, "db-2").ends_with("1 VMs are being moved (moves.cluster is 1)"));
}

#[test]
fn a_drained_host_takes_nothing_new() {
    let mut world = world(2, &[]);
    world.vm("new", vm_spec(Bytes::gib(7)));
    let plan = planned(&world);
    let Action::PlaceVm { placement, .. } = &plan.actions[0].action else {
        panic!("{plan:?}");
    };
    assert_eq!(placement.host.as_str(), "host2");
    world.run("new", "host2");
    world.vm("more", vm_spec(Bytes::gib(7)));
    assert!(waits(&planned(&world), "more").contains("1 host is drained"));
    // And the second line holds it, too.
    let mut forged = plan;
    if let Action::PlaceVm { placement, .. } = &mut forged.actions[0].action {
        placement.host = name("host1");
    }
    world.snapshot.placements.clear();
    let why = check(&world.snapshot, &forged).unwrap_err().why;
    assert_eq!(why, "new is placed on host1, which is drained");
}

#[test]
fn what_blocks_is_said_in_words() {
    let mut full = world(2, &["big"]);
    full.vm("big", vm_spec(Bytes::gib(6)));
    full.vm("other", vm_spec(Bytes::gib(4)));
    full.run("other", "host2");
    assert_eq!(
        waits(&planned(&full), "big"),
        "waiting: big needs 6GiB, largest free is 4032MiB on host2; 1 host has too little free memory; it stays on host1, which is drained"
    );
    let mut pinned = world(2, &["db"]);
    let mut spec = vm_spec(Bytes::gib(1));
    spec.affinity.hosts.insert("ssd".into(), "yes".into());
    pinned.vm("db", spec);
    assert!(waits(&planned(&pinned), "db").contains("lacks the labels {\"ssd\": \"yes\"}"));
    let mut local = world(2, &["db"]);
    scratch(&mut local);
    local.vm("db", local_disk(vm_spec(Bytes::gib(1))));
    let plan = planned(&local);
    assert!(moves(&plan).is_empty());
    assert_eq!(
        waits(&plan, "db"),
        "waiting: db keeps host1 from being drained: its disk `root` lives in the pool `scratch`, which is local to its host, and host1 has not said that it can take such a disk along; stop or delete it"
    );
    local.current();
    assert_eq!(moves(&planned(&local)).len(), 1, "it goes along");
    local.report("db", VmPhase::Failed, None);
    assert!(
        waits(&planned(&local), "db").contains("goes along only while it runs; stop or delete")
    );
    // Once it is stopped it keeps nobody.
    let mut spec = local_disk(vm_spec(Bytes::gib(1)));
    spec.running = false;
    local.vm("db", spec);
    local.report("db", VmPhase::Stopped, None);
    assert_eq!(state(&local, "host1"), HostState::Drained);
    assert!(waits(&planned(&local), "db").is_empty());
}

/// A VM that does not run has its place moved: its owner says first that nothing of it runs.
#[test]
fn a_stopped_vm_has_its_place_elsewhere() {
    let mut world = world(2, &["db"]);
    let mut spec = vm_spec(Bytes::gib(1));
    spec.running = false;
    world.vm("db", spec);
    world.report("db", VmPhase::Stopped, None);
    assert_eq!(state(&world, "host1"), HostState::Drained, "nothing runs there");
    let plan = planned(&world);
    assert_eq!(moves(&plan), [("db".to_owned(), "host2".to_owned(), true)]);
    commit(&mut world, &plan, 100);
    let plan = planned(&world);
    assert!(moves(&plan).is_empty());
    assert_eq!(waits(&plan, "db"), "db moves from host1 to host2 once it has ended");
    says(&mut world, "db", "host1", MigrationPhase::Gone);
    let plan = planned(&world);
    let change = plan.actions.iter().find_map(|planned| match &planned.action {
        Action::MoveVm { placement, step: step @ MoveStep::Restart { .. }, .. } => {
            Some((placement.clone(), step.clone()))
        }
        _ => None,
    });
    let (placement, step) = change.unwrap_or_else(|| panic!("{plan:?}"));
    assert_eq!((placement.host.as_str(), placement.epoch), ("host2", 2));
    assert_eq!(step, MoveStep::Restart { from: name("host1"), told: 102 });
    // The same change without the owner's word is refused.
    world.snapshot.migration_status.clear();
    let why = check(&world.snapshot, &plan).unwrap_err().why;
    assert_eq!(why, "db changes its owner before host1 has stopped it");
    says(&mut world, "db", "host1", MigrationPhase::Gone);
    commit(&mut world, &plan, 200);
    assert_eq!(world.snapshot.placements["db"].moving_to, None);
    assert!(world.snapshot.migrations["db"].outcome.clone().unwrap().moved);
}

/// What an older session said, or another attempt, is no word for this one.
#[test]
fn only_the_word_of_this_attempt_and_session_counts() {
    for (session, attempt) in [(2, 101), (1, 99)] {
        let mut world = world(2, &["db"]);
        let mut spec = vm_spec(Bytes::gib(1));
        spec.running = false;
        world.vm("db", spec);
        world.report("db", VmPhase::Stopped, None);
        let plan = planned(&world);
        commit(&mut world, &plan, 100);
        let (progress, machine, message) = (None, None, String::new());
        let phase = MigrationPhase::Gone;
        let status = MigrationStatus {
            attempt,
            session,
            phase,
            progress,
            machine,
            ports: false,
            heard: None,
            message,
        };
        let table = world.snapshot.migration_status.entry(name("db")).or_default();
        table.insert(name("host1"), at(150, status));
        let plan = planned(&world);
        assert!(plan.actions.is_empty(), "{plan:?}");
    }
}

fn qemu(world: &mut World, host: &str, version: &str) {
    let old = world.snapshot.host_status[host].clone();
    let status = HostStatus { qemu: version.into(), ..(*old.value).clone() };
    world.snapshot.host_status.insert(name(host), at(2, status));
}

#[test]
fn where_nothing_newer_can_take_it_it_restarts() {
    let mut world = world(3, &["db"]);
    for (host, version) in [("host1", "11.1.0"), ("host2", "10.0.3"), ("host3", "10.0.3")] {
        qemu(&mut world, host, version);
    }
    let plan = planned(&world);
    assert_eq!(moves(&plan), [("db".to_owned(), "host2".to_owned(), true)]);
    let reason = &plan.actions[0].reason;
    assert!(
        reason.starts_with(
            "db restarts, because QEMU on host3 (10.0.3) is older than on host1 (11.1.0), and moves from host1 to host2"
        ),
        "{reason}"
    );
    // One that can take it is enough for it to go live.
    qemu(&mut world, "host3", "11.1.0");
    assert_eq!(moves(&planned(&world)), [("db".to_owned(), "host3".to_owned(), false)]);
}

#[test]
fn a_move_that_fails_is_tried_again_after_a_pause() {
    let mut world = world(3, &["db"]);
    let plan = planned(&world);
    commit(&mut world, &plan, 100);
    says(&mut world, "db", "host1", MigrationPhase::Failed);
    let plan = planned(&world);
    commit(&mut world, &plan, 110);
    let outcome = world.snapshot.migrations["db"].outcome.clone().unwrap();
    assert!(!outcome.moved && outcome.message.contains("the wire broke"), "{outcome:?}");
    world.seen.now_ms += 4_000;
    let plan = planned(&world);
    assert!(moves(&plan).is_empty());
    assert_eq!(plan.wake_after_ms, Some(1_000));
    assert!(waits(&plan, "db").starts_with("waiting: db is moved again in 1 s: db stays on host1"));
    // Nobody waits for an hour because a clock was set back by one.
    let mut set_back = world.clone();
    set_back.seen.now_ms -= 3_600_000;
    assert_eq!(moves(&planned(&set_back)).len(), 1);
    world.seen.now_ms += 1_000;
    let plan = planned(&world);
    assert_eq!(moves(&plan).len(), 1);
    commit(&mut world, &plan, 120);
    let of = world.snapshot.migrations["db"].drain.clone();
    assert_eq!(of, Some(DrainMove { drain: "d1".into(), failed: 1, back: false }));
}

#[test]
fn a_persons_own_move_comes_first() {
    let mut world = world(3, &["db"]);
    let migration = Migration {
        id: "m1".into(),
        from: name("host1"),
        to: Some(name("host1")),
        options: MigrationOptions::default(),
        by: "bob".into(),
        at_ms: 1,
        drain: None,
        balances: false,
        outcome: None,
    };
    world.snapshot.migrations.insert(name("db"), at(20, migration));
    assert!(moves(&planned(&world)).is_empty());
    assert!(waits(&planned(&world), "db").contains("db first moves as bob asked"));
}

#[test]
fn the_end_of_a_drain_takes_back_what_is_under_way() {
    let mut world = world(3, &["db"]);
    let plan = planned(&world);
    commit(&mut world, &plan, 100);
    world.snapshot.drains.clear();
    let plan = planned(&world);
    let Action::MoveVm { step: MoveStep::TakeBack, placement, .. } = &plan.actions[0].action else {
        panic!("{plan:?}");
    };
    assert_eq!((placement.host.as_str(), &placement.moving_to), ("host1", &None));
    assert_eq!(plan.actions[0].reason, "db stays on host1: the drain of host1 was ended");
}

#[test]
fn a_host_that_dies_while_it_is_drained_is_recovered_as_any_other() {
    let mut world = world(3, &["db-1", "db-2", "db-3"]);
    let plan = planned(&world);
    commit(&mut world, &plan, 100);
    world.lost("host1", ProofKind::LeaseExpired);
    let plan = planned(&world);
    assert!(moves(&plan).is_empty());
    let places = plan.actions.iter().filter_map(|planned| match &planned.action {
        Action::PlaceVm { placement, taken_from: Some(_), .. } => Some(placement.clone()),
        _ => None,
    });
    let places: Vec<Placement> = places.collect();
    assert_eq!(places.len(), 3);
    assert!(places.iter().all(|p| p.host.as_str() != "host1" && p.moving_to.is_none()));
    commit(&mut world, &plan, 200);
    // What was begun with the drain's own record is over.
    let plan = planned(&world);
    let ends = plan.actions.iter().filter(|p| matches!(p.action, Action::PutMigration { .. }));
    assert_eq!(ends.count(), 2, "{plan:?}");
}

#[test]
fn when_the_other_host_dies_it_goes_elsewhere() {
    let mut world = world(3, &["db"]);
    let plan = planned(&world);
    assert_eq!(moves(&plan)[0].1, "host2");
    commit(&mut world, &plan, 100);
    world.seen.suspected.insert(name("host2"));
    let plan = planned(&world);
    assert_eq!(plan.actions[0].reason, "db stays on host1: host2 is suspected");
    commit(&mut world, &plan, 110);
    world.seen.now_ms += 60_000;
    let plan = planned(&world);
    assert_eq!(moves(&plan)[0].1, "host3");
}

/// A service of members with local disks of which two are on host1, which is drained.
fn service(max_surge: u32, max_unavailable: u32) -> World {
    let mut world = World::new(3, Bytes::gib(8));
    scratch(&mut world);
    world.service("web", 3);
    let mut service = (*world.snapshot.services["web"].value).clone();
    service.spec.update.max_surge = max_surge;
    service.spec.update.max_unavailable = max_unavailable;
    service.spec.template.spec = local_disk(vm_spec(Bytes::mib(128)));
    world.snapshot.services.insert(name("web"), at(7, service));
    let plan = plan(&world.snapshot, &world.seen);
    commit(&mut world, &plan, 10);
    for (vm, host) in [("web-1", "host1"), ("web-2", "host1"), ("web-3", "host2")] {
        world.run(vm, host);
    }
    drained(&mut world, "host1");
    world
}

/// What becomes of members in a plan: made, drained of their traffic, deleted.
fn members(world: &World) -> Vec<(String, &'static str)> {
    let plan = planned(world);
    let puts = plan.actions.into_iter().filter_map(|planned| match planned.action {
        Action::PutObject { object, expected_revision } => match *object {
            Object::Vm(vm) => {
                let what = match expected_revision {
                    0 => "made",
                    _ if vm.meta.deleting => "deleted",
                    _ if vm.meta.labels.contains_key(DRAIN_LABEL) => "drained",
                    _ => "changed",
                };
                Some((vm.meta.name.to_string(), what))
            }
            _ => None,
        },
        _ => None,
    });
    puts.collect()
}

fn done(vm: &str, what: &'static str) -> (String, &'static str) {
    (vm.to_owned(), what)
}

#[test]
fn members_that_cannot_move_go_once_others_are_ready() {
    let mut world = service(1, 0);
    assert_eq!(members(&world), [done("web-4", "made")]);
    let plan = planned(&world);
    assert!(moves(&plan).is_empty(), "{plan:?}");
    assert_eq!(waits(&plan, "web-1"), "");
    commit(&mut world, &plan, 100);
    // The other one is not ready, so that nobody goes.
    assert_eq!(members(&world), []);
    assert_eq!(
        waits(&planned(&world), "web-2"),
        "waiting: web-2 leaves host1, which is drained, once another member takes its place: 3 of web are ready, and 3 must be"
    );
    world.run("web-4", "host3");
    assert_eq!(members(&world), [done("web-2", "drained")]);
    let plan = planned(&world);
    commit(&mut world, &plan, 200);
    world.seen.now_ms += 3_000;
    assert_eq!(members(&world), [done("web-2", "deleted")]);
    let plan = planned(&world);
    commit(&mut world, &plan, 300);
    let made = members(&world);
    assert_eq!(made, [done("web-5", "made")], "and the next one takes its turn");
}

#[test]
fn where_no_member_may_be_missing_and_none_may_be_more_they_stay() {
    let world = service(0, 0);
    assert_eq!(members(&world), []);
    assert!(waits(&planned(&world), "web-1").contains("3 of web are ready, and 3 must be"));
}

#[test]
fn where_none_may_be_more_one_goes_first() {
    let mut world = service(0, 1);
    assert_eq!(members(&world), [done("web-2", "drained")]);
    let plan = planned(&world);
    commit(&mut world, &plan, 100);
    assert_eq!(members(&world), [], "never two at once");
}

#[test]
fn members_without_a_disk_of_their_host_move_live() {
    let mut world = World::new(3, Bytes::gib(8));
    world.service("web", 2);
    let plan = plan(&world.snapshot, &world.seen);
    commit(&mut world, &plan, 10);
    for (vm, host) in [("web-1", "host1"), ("web-2", "host2")] {
        world.run(vm, host);
    }
    drained(&mut world, "host1");
    let plan = planned(&world);
    assert_eq!(moves(&plan), [("web-1".to_owned(), "host3".to_owned(), false)]);
    assert_eq!(members(&world), []);
}

#[test]
fn no_more_members_of_a_service_move_at_once_than_may_be_missing() {
    for (may_be_missing, at_once) in [(0, 1), (1, 1), (2, 2)] {
        let mut world = World::new(3, Bytes::gib(8));
        world.service("web", 3);
        let mut service = (*world.snapshot.services["web"].value).clone();
        service.spec.update.max_unavailable = may_be_missing;
        world.snapshot.services.insert(name("web"), at(7, service));
        let plan = plan(&world.snapshot, &world.seen);
        commit(&mut world, &plan, 10);
        for vm in ["web-1", "web-2", "web-3"] {
            world.run(vm, "host1");
        }
        drained(&mut world, "host1");
        let begun = planned(&world);
        assert_eq!(moves(&begun).len(), at_once, "{:?}", moves(&begun));
        if at_once == 1 {
            assert_eq!(
                waits(&begun, "web-2"),
                "waiting: web-2 leaves host1 later: 1 member of service/web moves now, and no more may"
            );
        }
        commit(&mut world, &begun, 200);
        assert_eq!(moves(&planned(&world)), [], "those that are under way count");
        arrives(&mut world, "web-1", 300);
        let mut status = (*world.snapshot.vm_status["web-1"].value).clone();
        status.unproven = true;
        world.snapshot.vm_status.insert(name("web-1"), at(400, status));
        assert_eq!(moves(&planned(&world)), [], "it did not answer yet where it is now");
        world.report("web-1", VmPhase::Running, Some(true));
        assert_eq!(moves(&planned(&world)).len(), 1);
    }
}

#[test]
fn an_address_leaves_without_waiting_for_a_loss() {
    let mut world = World::new(3, Bytes::gib(8));
    world.service("web", 0);
    let mut service = (*world.snapshot.services["web"].value).clone();
    let frontend = serde_json::json!({"address": "10.88.0.99", "port": 80});
    service.spec.frontend = Some(serde_json::from_value(frontend).unwrap());
    world.snapshot.services.insert(name("web"), at(7, service));
    let candidates = serde_json::json!({"holder": "host1", "epoch": 4, "candidates": ["host1", "host2", "host3"]});
    let placement = serde_json::from_value(candidates).unwrap();
    world.snapshot.frontends.insert(name("web"), at(7, placement));
    assert!(planned(&world).actions.is_empty());
    drained(&mut world, "host1");
    assert_eq!(state(&world, "host1"), HostState::Draining, "it holds the address");
    let plan = planned(&world);
    let Action::PlaceFrontend { placement, .. } = &plan.actions[0].action else {
        panic!("{plan:?}");
    };
    assert_eq!((placement.holder.as_str(), placement.epoch), ("host2", 5));
    assert_eq!(placement.from, Some(name("host1")));
    assert_eq!(placement.candidates, [name("host2"), name("host3")]);
    assert_eq!(plan.actions[0].reason, "host2 takes 10.88.0.99 because host1 is drained");
    world.snapshot.frontends.insert(name("web"), at(8, placement.clone()));
    let quiet = |world: &World| {
        let plan = planned(world);
        !plan.actions.iter().any(|a| matches!(a.action, Action::PlaceFrontend { .. }))
    };
    assert!(quiet(&world));
    assert_eq!(state(&world, "host1"), HostState::Drained);
    // Where nobody else is, it stays, and says so.
    world.snapshot.frontends.insert(
        name("web"),
        at(8, haven_model::FrontendPlacement { holder: name("host1"), ..placement.clone() }),
    );
    for host in ["host2", "host3"] {
        drained(&mut world, host);
    }
    assert!(waits(&planned(&world), "web").contains("stays on host1, which is drained"));
    let view = drain::view(&world.snapshot, &world.seen, &name("host1"));
    assert_eq!(view.addresses.len(), 1, "{view:?}");
}

#[test]
fn only_what_is_still_where_the_drain_put_it_comes_back() {
    let mut world = world(3, &["db-1", "db-2", "db-3"]);
    let spec = MoveLimits { per_host: 3, cluster: 8 };
    world.snapshot.cluster = Some(at(9, ClusterSpec { moves: spec, ..ClusterSpec::default() }));
    let plan = planned(&world);
    commit(&mut world, &plan, 100);
    for (i, vm) in ["db-1", "db-2", "db-3"].into_iter().enumerate() {
        arrives(&mut world, vm, 200 + 100 * i as i64);
    }
    // One went further since.
    let further = world.snapshot.placements["db-2"].host.clone();
    let further = if further.as_str() == "host2" { "host3" } else { "host2" };
    let placement = Placement::new(name(further), 9, 1, Vec::new());
    world.snapshot.placements.insert(name("db-2"), at(600, placement));
    world.report("db-2", VmPhase::Running, Some(true));
    let back = Drain { bringing_back: true, ..(*world.snapshot.drains["host1"].value).clone() };
    world.snapshot.drains.insert(name("host1"), at(601, back));
    assert_eq!(state(&world, "host1"), HostState::Online);
    let plan = planned(&world);
    let back = moves(&plan);
    let expected = ["db-1", "db-3"].map(|vm| (vm.to_owned(), "host1".to_owned(), false));
    assert_eq!(back, expected);
    commit(&mut world, &plan, 700);
    assert!(world.snapshot.drains.contains_key("host1"), "it is remembered until they are back");
    arrives(&mut world, "db-1", 800);
    arrives(&mut world, "db-3", 900);
    let plan = planned(&world);
    commit(&mut world, &plan, 1000);
    assert!(!world.snapshot.drains.contains_key("host1"), "{plan:?}");
    assert!(planned(&world).actions.is_empty());
}

#[test]
fn what_has_no_place_any_more_stays_and_the_drain_is_forgotten() {
    let mut world = world(2, &["db-1"]);
    let plan = planned(&world);
    commit(&mut world, &plan, 100);
    arrives(&mut world, "db-1", 200);
    // Meanwhile somebody has filled the host.
    world.vm("large", vm_spec(Bytes::mib(7 * 1024 + 512)));
    world.run("large", "host1");
    let back = Drain { bringing_back: true, ..(*world.snapshot.drains["host1"].value).clone() };
    world.snapshot.drains.insert(name("host1"), at(601, back));
    let plan = planned(&world);
    let ends =
        plan.actions.iter().find(|planned| matches!(planned.action, Action::PutDrain { .. }));
    let reason = &ends.expect("the drain ends").reason;
    assert!(reason.contains("what has no place there now stays: db-1 ("), "{reason}");
    commit(&mut world, &plan, 700);
    assert!(!world.snapshot.drains.contains_key("host1"));
}

#[test]
fn what_a_reboot_would_cost_the_store_is_said() {
    let mut world = world(3, &[]);
    for (i, host) in ["host1", "host2", "host3"].into_iter().enumerate() {
        let old = world.snapshot.host_status[host].clone();
        let status = HostStatus { etcd_member: Some(i as u64), ..(*old.value).clone() };
        world.snapshot.host_status.insert(name(host), at(2, status));
    }
    let cost = |world: &World| {
        let states = host_states(&world.snapshot, &world.seen);
        drain::costs_quorum(&world.snapshot, &states, &name("host1"))
    };
    assert_eq!(cost(&world), None);
    world.lost("host2", ProofKind::LeaseExpired);
    assert_eq!(
        cost(&world).unwrap(),
        "host1 runs one of 3 members of the store, and without it 1 would answer, fewer than the 2 it needs: a reboot of host1 would stop the cluster's management"
    );
}

#[test]
fn a_drain_that_cannot_be_read_keeps_new_vms_away() {
    let mut world = world(2, &["db"]);
    world.snapshot.drains.clear();
    world.snapshot.unreadable.insert("drains/host1".into(), 7);
    assert_eq!(state(&world, "host1"), HostState::Cordoned);
    assert!(moves(&planned(&world)).is_empty());
}

#[test]
fn the_view_tells_who_is_left_and_why() {
    let mut world = world(2, &["db", "local", "rest"]);
    scratch(&mut world);
    world.vm("local", local_disk(vm_spec(Bytes::gib(1))));
    let mut spec = local_disk(vm_spec(Bytes::gib(1)));
    spec.running = false;
    world.vm("rest", spec);
    world.report("rest", VmPhase::Stopped, None);
    let plan = planned(&world);
    commit(&mut world, &plan, 100);
    let view = drain::view(&world.snapshot, &world.seen, &name("host1"));
    assert_eq!(view.state, "draining");
    let left: Vec<_> = view.left.iter().map(|left| (left.vm.as_str(), left.to.is_some())).collect();
    assert_eq!(left, [("db", true), ("local", false)]);
    assert!(view.left[1].why.contains("its disk `root` lives in the pool `scratch`"));
    assert_eq!(view.resting, [name("rest")]);
    let object = haven_model::ObjectRef::new(Kind::Host, name("host1"));
    let said = crate::explain(&world.snapshot, &world.seen, &object).join("\n");
    assert!(
        said.contains("it is draining, as alice asked: 2 VMs are left, 0 were moved"),
        "{said}"
    );
    assert!(said.contains("these do not run and have their place there: rest"), "{said}");
}

#[test]
fn what_was_changed_takes_that_up_where_it_restarts() {
    let mut world = world(3, &["db"]);
    let mut status = (*world.snapshot.vm_status["db"].value).clone();
    status.started_with = world.snapshot.vms["db"].spec.hardware();
    world.snapshot.vm_status.insert(name("db"), at(4, status));
    let mut spec = world.snapshot.vms["db"].spec.clone();
    spec.cpus = 2;
    world.vm("db", spec.clone());
    let plan = planned(&world);
    let begun = moves(&plan);
    assert!(begun.len() == 1 && begun[0].2, "{begun:?}");
    let reason = &plan.actions[0].reason;
    assert!(reason.contains("it was changed since it was started (cpus)"), "{reason}");
    // What only its host has would be lost by that, also what it is not to have at its next start.
    scratch(&mut world);
    world.current();
    let local = local_disk(spec.clone());
    for (has, wanted) in [(&spec, &local), (&local, &spec)] {
        let mut status = (*world.snapshot.vm_status["db"].value).clone();
        status.started_with = has.hardware();
        world.snapshot.vm_status.insert(name("db"), at(4, status));
        world.vm("db", wanted.clone());
        assert!(moves(&planned(&world)).is_empty());
        let why = waits(&planned(&world), "db");
        assert!(why.contains("it was changed since it was started (disks)"), "{why}");
    }
}
