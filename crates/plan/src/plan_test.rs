//! Tests of the whole plan, rule by rule.

use crate::{
    check, plan,
    testing::{World, at, lease, name, stored, vm_spec},
};
use haven_model::{
    Action, Bytes, CertificateSpec, FrontendPlacement, Lease, Name, NicAddress, Plan,
    PoolDriverKind, PoolSpec, ProofKind, Versioned, VmPhase, VmSpec, host::PowerSpec,
    object::Stored, service::UpdateSpec, vm::DiskSpec,
};

fn planned(world: &World) -> Plan {
    let plan = plan(&world.snapshot, &world.seen);
    check(&world.snapshot, &plan).unwrap();
    plan
}

fn placed(plan: &Plan) -> Vec<(String, String, u64)> {
    plan.actions
        .iter()
        .filter_map(|p| match &p.action {
            Action::PlaceVm { vm, placement, .. } => {
                Some((vm.to_string(), placement.host.to_string(), placement.epoch))
            }
            _ => None,
        })
        .collect()
}

#[test]
fn a_new_vm_goes_where_most_is_free_and_says_why() {
    let mut world = World::new(3, Bytes::gib(8));
    world.vm("old", vm_spec(Bytes::gib(1)));
    world.run("old", "host1");
    world.vm("web", vm_spec(Bytes::gib(1)));
    let plan = planned(&world);
    assert_eq!(placed(&plan), [("web".into(), "host2".into(), 1)]);
    assert!(plan.actions[0].reason.contains("web starts on host2"), "{}", plan.actions[0].reason);
}

#[test]
fn what_runs_is_never_moved() {
    let mut world = World::new(2, Bytes::gib(8));
    for i in 0..6 {
        world.vm(&format!("vm{i}"), vm_spec(Bytes::gib(1)));
        world.run(&format!("vm{i}"), "host1");
    }
    assert!(planned(&world).actions.is_empty());
}

#[test]
fn what_does_not_fit_waits_with_its_reason() {
    let mut world = World::new(2, Bytes::gib(1));
    world.vm("db-2", vm_spec(Bytes::gib(2)));
    let plan = planned(&world);
    assert!(plan.actions.is_empty());
    assert!(
        plan.waiting[0].reason.contains("db-2 needs 2GiB, largest free is 1GiB on host2"),
        "{:?}",
        plan.waiting
    );
}

#[test]
fn a_silent_host_is_confirmed_then_closed_then_its_vms_move_under_the_next_epoch() {
    let mut world = World::new(3, Bytes::gib(8));
    world.vm("web", vm_spec(Bytes::gib(1)));
    world.run("web", "host1");
    world.silent("host1", 4000, false);
    let plan = planned(&world);
    assert!(plan.actions.is_empty());
    assert_eq!(plan.wake_after_ms, Some(1000));
    world.silent("host1", 5000, false);
    assert!(matches!(
        planned(&world).actions[0].action,
        Action::ConfirmLease { revision: 900, .. }
    ));
    world.silent("host1", 5010, true);
    let plan = planned(&world);
    assert!(
        matches!(&plan.actions[0].action, Action::CloseSession { lease_revision: 900, lost, .. }
        if lost.proof == ProofKind::LeaseExpired && lost.incident == 1)
    );
    assert!(placed(&plan).is_empty(), "no VM moves before the session is closed");
    world.lost("host1", ProofKind::LeaseExpired);
    assert_eq!(placed(&planned(&world)), [("web".into(), "host2".into(), 2)]);
}

#[test]
fn a_record_is_judged_by_the_time_that_it_states_itself() {
    let mut world = World::new(3, Bytes::gib(8));
    let longer = Lease { ttl_ms: 20_000, ..lease(false) };
    world.snapshot.leases.insert(name("host1"), at(900, longer));
    world.silent("host1", 19_000, true);
    let plan = planned(&world);
    assert!(plan.actions.is_empty(), "the cluster's 5 s do not count for it: {:?}", plan.actions);
    assert_eq!(plan.wake_after_ms, Some(1000));
    world.silent("host1", 20_000, true);
    assert!(matches!(planned(&world).actions[0].action, Action::CloseSession { .. }));
    // The age of another renewal says nothing of this one.
    world.snapshot.leases.insert(name("host1"), at(901, lease(false)));
    let plan = planned(&world);
    assert!(plan.actions.is_empty(), "{:?}", plan.actions);
    assert!(plan.wake_after_ms.is_some());
}

#[test]
fn power_goes_off_after_half_of_the_time_that_the_record_states_itself() {
    let mut world = World::new(3, Bytes::gib(8));
    let mut host = (*world.snapshot.hosts["host1"].value).clone();
    host.spec.power = Some(PowerSpec::redfish("http://x", "", ""));
    world.snapshot.hosts.insert(name("host1"), at(1, host));
    let longer = Lease { ttl_ms: 20_000, ..lease(false) };
    world.snapshot.leases.insert(name("host1"), at(900, longer));
    world.seen.suspected.insert(name("host1"));
    world.silent("host1", 9_000, false);
    let early = planned(&world);
    assert!(matches!(early.actions[0].action, Action::ReadPower { .. }));
    assert_eq!(early.actions.len(), 1);
    assert_eq!(early.wake_after_ms, Some(1_000), "a daemon that lives by longer timers restarts");
    world.silent("host1", 10_000, false);
    assert!(matches!(planned(&world).actions[0].action, Action::PowerOff { .. }));
    world.snapshot.leases.insert(name("host1"), at(901, lease(false)));
    assert!(planned(&world).actions.is_empty(), "it has renewed since");
}

#[test]
fn suspicion_moves_nothing_but_switches_the_power_off() {
    let mut world = World::new(3, Bytes::gib(8));
    world.vm("web", vm_spec(Bytes::gib(1)));
    world.run("web", "host1");
    world.seen.suspected.insert(name("host1"));
    assert!(planned(&world).actions.is_empty());
    let mut host = (*world.snapshot.hosts["host1"].value).clone();
    host.spec.power = Some(PowerSpec::redfish("http://x", "", ""));
    world.snapshot.hosts.insert(name("host1"), at(1, host));
    // One that renews is only unreachable from here, and one whose daemon restarts is back in time: its power stays on.
    // Whether it is off already is asked once it has missed two renewals.
    world.silent("host1", 900, false);
    assert!(planned(&world).actions.is_empty());
    assert_eq!(planned(&world).wake_after_ms, Some(100));
    for silent_ms in [1000, 2400] {
        world.silent("host1", silent_ms, false);
        let plan = planned(&world);
        let [only] = &plan.actions[..] else { panic!("{:?}", plan.actions) };
        assert!(matches!(only.action, Action::ReadPower { session: 1, .. }), "{only:?}");
    }
    world.silent("host1", 2600, false);
    assert!(matches!(planned(&world).actions[0].action, Action::PowerOff { session: 1, .. }));
    world.seen.powered_off.insert(name("host1"), 1);
    // A promise lets a host run on that cannot renew; this one does not run.
    world.seen.promised.insert(name("host1"), 2000);
    assert!(matches!(&planned(&world).actions[0].action, Action::CloseSession { lost, .. }
        if lost.proof == ProofKind::PoweredOff));
}

#[test]
fn a_proof_about_an_earlier_session_proves_nothing() {
    let mut world = World::new(2, Bytes::gib(8));
    world.seen.powered_off.insert(name("host1"), 0);
    assert!(planned(&world).actions.is_empty());
}

#[test]
fn a_local_disk_keeps_its_vm_waiting_for_its_host() {
    let mut world = World::new(2, Bytes::gib(8));
    let pool = PoolSpec::new(PoolDriverKind::Local, "/p");
    world.snapshot.pools.insert(name("fast"), at(1, stored("fast", pool)));
    let mut spec = vm_spec(Bytes::gib(1));
    spec.disks.push(DiskSpec::new(name("root"), Bytes::gib(1), name("fast")));
    world.vm("db", spec);
    world.run("db", "host1");
    world.lost("host1", ProofKind::PoweredOff);
    let plan = planned(&world);
    assert!(placed(&plan).is_empty());
    assert!(plan.waiting.iter().any(|w| w.reason.contains("returns with host1")));
}

#[test]
fn members_are_made_spread_and_named() {
    let mut world = World::new(3, Bytes::gib(8));
    world.service("web", 3);
    let made: Vec<String> = planned(&world).actions.iter().map(|a| a.object.to_string()).collect();
    assert_eq!(made, ["vm/web-1", "vm/web-2", "vm/web-3"]);
    apply_objects(&mut world);
    let mut hosts: Vec<String> = placed(&planned(&world)).into_iter().map(|p| p.1).collect();
    hosts.sort();
    assert_eq!(hosts, ["host1", "host2", "host3"]);
}

fn apply_objects(world: &mut World) {
    for planned in plan(&world.snapshot, &world.seen).actions {
        world.snapshot.revision += 1;
        let revision = world.snapshot.revision;
        let (key, value) = match planned.action {
            Action::PutObject { object, .. } => {
                (haven_model::keys::object(&object.reference()), Some(object.to_store()))
            }
            Action::PlaceVm { vm, placement, .. } => {
                (haven_model::keys::placement(&vm), Some(serde_json::to_vec(&placement).unwrap()))
            }
            Action::ReleaseVm { vm, .. } => (haven_model::keys::placement(&vm), None),
            Action::RemoveObject { object, .. } => (haven_model::keys::object(&object), None),
            _ => continue,
        };
        world.snapshot.apply(&key, value.as_deref().map(|v| (v, revision)));
    }
}

/// Every agent does at once what it is told.
fn agents(world: &mut World) {
    let vms: Vec<_> = world.snapshot.placements.keys().cloned().collect();
    for vm in vms {
        let gone = world.snapshot.vms[&vm].meta.deleting;
        world.report(
            vm.as_str(),
            if gone { VmPhase::Stopped } else { VmPhase::Running },
            Some(!gone),
        );
        if gone {
            let mut status = (*world.snapshot.vm_status[&vm].value).clone();
            status.message = "deleted".into();
            world.snapshot.vm_status.insert(vm, at(8, status));
        }
    }
}

/// What a rolling update of three members did: the fewest that served, the most that there were. The clock is set back
/// by so much before the third second.
fn roll(max_unavailable: u32, max_surge: u32, set_back_ms: i64) -> (usize, usize) {
    let mut world = World::new(3, Bytes::gib(8));
    world.service("web", 3);
    for _ in 0..3 {
        apply_objects(&mut world);
        agents(&mut world);
    }
    assert_eq!(world.snapshot.vms.len(), 3);
    let mut service = (*world.snapshot.services["web"].value).clone();
    service.spec.template.spec.memory = Bytes::mib(256);
    let update = UpdateSpec { max_unavailable, max_surge, ..UpdateSpec::default() };
    service.spec.update = Box::new(update);
    world.snapshot.services.insert(name("web"), at(9, service));
    let (mut fewest, mut most) = (usize::MAX, 0);
    for second in 0..60 {
        if second == 2 {
            world.seen.now_ms -= set_back_ms;
        }
        let vms = &world.snapshot.vms;
        if vms.len() == 3 && vms.values().all(|vm| vm.spec.memory == Bytes::mib(256)) {
            return (fewest, most);
        }
        apply_objects(&mut world);
        let serves = |(vm, object): &(&Name, &Versioned<Stored<VmSpec>>)| {
            let labels = &object.meta.labels;
            let drains = labels.contains_key(haven_model::service::DRAIN_LABEL);
            let told = world.snapshot.vm_status.get(*vm);
            !object.meta.deleting && !drains && told.is_some_and(|s| s.phase == VmPhase::Running)
        };
        fewest = fewest.min(world.snapshot.vms.iter().filter(serves).count());
        // One that is being deleted is as good as gone.
        most = most.max(world.snapshot.vms.values().filter(|vm| !vm.meta.deleting).count());
        agents(&mut world);
        world.seen.now_ms += 1000;
    }
    panic!("the update does not end with {max_unavailable} missing and {max_surge} more");
}

#[test]
fn a_rolling_update_keeps_to_its_limits_uses_them_and_ends() {
    for (max_unavailable, max_surge) in
        [(0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0), (1, 1), (2, 2)]
    {
        let limits = (3 - max_unavailable as usize, 3 + max_surge as usize);
        let words = format!("{max_unavailable} missing, {max_surge} more");
        assert_eq!(roll(max_unavailable, max_surge, 0), limits, "{words}");
        // Nobody waits for an hour because a clock was set back by one.
        assert_eq!(roll(max_unavailable, max_surge, 3_600_000), limits, "{words}, set back");
    }
}

/// Members that have more to do than they can look unwell; while a new one boots they are all that answers.
#[test]
fn an_update_keeps_old_members_that_are_not_well_until_new_ones_are() {
    let mut world = World::new(3, Bytes::gib(8));
    world.service("web", 2);
    let mut service = (*world.snapshot.services["web"].value).clone();
    service.spec.check =
        Some(serde_json::from_value(serde_json::json!({"mode": "http", "port": 80})).unwrap());
    world.snapshot.services.insert(name("web"), at(8, service.clone()));
    for _ in 0..3 {
        apply_objects(&mut world);
        agents(&mut world);
    }
    service.spec.template.spec.memory = Bytes::mib(256);
    world.snapshot.services.insert(name("web"), at(9, service));
    for vm in ["web-1", "web-2"] {
        world.report(vm, VmPhase::Running, Some(false));
    }
    apply_objects(&mut world);
    apply_objects(&mut world);
    world.report("web-3", VmPhase::Running, None);
    let kept = |world: &World, vm: &str| {
        let meta = &world.snapshot.vms[vm].meta;
        !meta.deleting && !meta.labels.contains_key(haven_model::service::DRAIN_LABEL)
    };
    apply_objects(&mut world);
    assert!(kept(&world, "web-1") && kept(&world, "web-2"), "the new member is not ready yet");
    world.report("web-3", VmPhase::Running, Some(true));
    apply_objects(&mut world);
    assert!(kept(&world, "web-1") != kept(&world, "web-2"), "one goes for the one that came");
    // What never answered serves nobody, and goes without one in its place.
    let left = if kept(&world, "web-1") { "web-1" } else { "web-2" };
    world.report(left, VmPhase::Running, None);
    apply_objects(&mut world);
    assert!(world.snapshot.vms[left].meta.deleting, "it waits for nothing");
}

#[test]
fn scaling_down_drains_the_highest_number() {
    let mut world = World::new(3, Bytes::gib(8));
    world.service("web", 3);
    for _ in 0..3 {
        apply_objects(&mut world);
        agents(&mut world);
    }
    let mut service = (*world.snapshot.services["web"].value).clone();
    service.spec.replicas = 2;
    world.snapshot.services.insert(name("web"), at(9, service));
    let first = planned(&world);
    assert_eq!(first.actions.len(), 1);
    assert!(first.actions[0].reason.contains("web-3 is drained"), "{}", first.actions[0].reason);
}

fn waits_for(plan: &Plan, words: &str) -> bool {
    plan.waiting.iter().any(|waiting| waiting.reason.contains(words))
}

#[test]
fn what_cannot_be_read_is_left_as_it_is_and_told() {
    let mut world = World::new(2, Bytes::gib(8));
    for vm in ["web", "other"] {
        world.vm(vm, vm_spec(Bytes::gib(1)));
        world.run(vm, "host1");
    }
    world.vm("new", vm_spec(Bytes::gib(1)));
    world.lost("host1", ProofKind::LeaseExpired);
    world.snapshot.placements.remove("web");
    world.snapshot.unreadable.insert("placement/vm/web".into(), 9);
    let plan = planned(&world);
    let epochs: Vec<_> = placed(&plan).into_iter().map(|(vm, _, epoch)| (vm, epoch)).collect();
    assert_eq!(epochs, [("other".to_owned(), 2)], "web may run anywhere; new may take its number");
    assert!(waits_for(&plan, "placement/vm/web cannot be read"), "{:?}", plan.waiting);
    world.snapshot.unreadable.clear();
    assert_eq!(placed(&planned(&world)).len(), 3);
    world.snapshot.unreadable.insert("cluster".into(), 9);
    let plan = planned(&world);
    assert!(plan.actions.is_empty(), "without the cluster's fencing policy nothing is decided");
}

#[test]
fn of_two_that_ask_for_one_address_the_older_gets_it_and_the_other_says_why_it_waits() {
    let mut world = World::new(1, Bytes::gib(8));
    world.network("front");
    for vm in ["a", "b"] {
        let nics = serde_json::json!([{"network": "front", "address": "10.77.0.9"}]);
        let spec = serde_json::json!({"memory": "64MiB", "networks": nics});
        world.vm(vm, serde_json::from_value(spec).unwrap());
    }
    let plan = planned(&world);
    assert_eq!(placed(&plan), [("a".into(), "host1".into(), 1)]);
    assert!(waits_for(&plan, "b asks for the address 10.77.0.9"), "{:?}", plan.waiting);
}

#[test]
fn a_person_s_vm_that_is_called_like_a_member_is_left_alone() {
    let mut world = World::new(1, Bytes::gib(8));
    world.vm("web-1", vm_spec(Bytes::gib(1)));
    world.service("web", 2);
    let plan = planned(&world);
    let made: Vec<String> = plan
        .actions
        .iter()
        .filter(|planned| matches!(planned.action, Action::PutObject { .. }))
        .map(|planned| planned.object.name.to_string())
        .collect();
    assert_eq!(made, ["web-2", "web-3"]);
}

#[test]
fn an_address_goes_to_the_next_service_only_once_it_is_released() {
    let mut world = World::new(2, Bytes::gib(8));
    let frontend = |port: u16| {
        serde_json::from_value(serde_json::json!({"address": "10.88.0.100", "port": port})).unwrap()
    };
    for (service, deleting) in [("old", true), ("new", false)] {
        world.service(service, 0);
        let mut object = (*world.snapshot.services[service].value).clone();
        object.spec.frontend = Some(frontend(80));
        object.meta.deleting = deleting;
        world.snapshot.services.insert(name(service), at(7, object));
    }
    let holder = serde_json::json!({"holder": "host1", "epoch": 1, "candidates": []});
    let holder: FrontendPlacement = serde_json::from_value(holder).unwrap();
    world.snapshot.frontends.insert(name("old"), at(8, holder));
    let about = |plan: &Plan| -> Vec<String> {
        let frontends = plan.actions.iter().filter_map(|planned| match &planned.action {
            Action::PlaceFrontend { service, .. } => Some(format!("place {service}")),
            Action::ReleaseFrontend { service, .. } => Some(format!("release {service}")),
            _ => None,
        });
        frontends.collect()
    };
    let plan = planned(&world);
    assert_eq!(about(&plan), ["release old"]);
    assert!(waits_for(&plan, "is that of service/old"), "{:?}", plan.waiting);
    world.snapshot.frontends.remove("old");
    assert_eq!(about(&planned(&world)), ["place new"]);
}

#[test]
fn a_service_whose_members_have_no_room_for_a_name_waits_and_says_so() {
    let mut world = World::new(1, Bytes::gib(8));
    let service = "s".repeat(38);
    world.service(&service, 12);
    let plan = planned(&world);
    let made = plan.actions.iter().filter(|p| matches!(p.action, Action::PutObject { .. }));
    assert_eq!(made.count(), 9);
    assert!(waits_for(&plan, "leaves no room for the names of 3 members"), "{:?}", plan.waiting);
}

#[test]
fn one_placement_that_breaks_an_invariant_is_left_out_and_the_others_stay() {
    let mut world = World::new(1, Bytes::gib(8));
    for vm in ["a", "b", "c"] {
        world.vm(vm, vm_spec(Bytes::gib(1)));
    }
    let mut plan = planned(&world);
    for action in &mut plan.actions {
        if let Action::PlaceVm { vm, placement, .. } = &mut action.action
            && vm.as_str() == "b"
        {
            placement.slot = 0;
        }
    }
    let (sound, left_out) = crate::sound(&world.snapshot, plan);
    let names: Vec<String> = placed(&sound).into_iter().map(|(vm, _, _)| vm).collect();
    assert_eq!(names, ["a", "c"]);
    assert_eq!(left_out.len(), 1);
    assert!(waits_for(&sound, "b and a have the same slot"), "{:?}", sound.waiting);
    check(&world.snapshot, &sound).unwrap();
}

/// A VM that runs with one card, of which `networks` are wanted now.
fn with_cards(world: &mut World, vm: &str, host: &str, has: &[&str], networks: serde_json::Value) {
    let spec = serde_json::json!({"memory": "1GiB", "networks": networks});
    world.vm(vm, serde_json::from_value(spec).unwrap());
    world.run(vm, host);
    let mut placement = (*world.snapshot.placements[vm].value).clone();
    let nic = |ip: &&str| NicAddress::new(name("front"), ip.parse().unwrap());
    placement.nics = has.iter().map(nic).collect();
    world.snapshot.placements.insert(name(vm), at(5, placement));
}

fn cards(plan: &Plan, vm: &str) -> Option<Vec<String>> {
    plan.actions.iter().find_map(|p| match &p.action {
        Action::PlaceVm { vm: of, placement, .. } if *of == name(vm) => {
            Some(placement.nics.iter().map(|nic| nic.ip.to_string()).collect())
        }
        _ => None,
    })
}

#[test]
fn changed_cards_are_given_when_the_vm_does_not_run_and_not_before() {
    let mut world = World::new(2, Bytes::gib(8));
    world.network("front");
    let two =
        serde_json::json!([{"network": "front"}, {"network": "front", "address": "10.77.0.50"}]);
    with_cards(&mut world, "web", "host1", &["10.77.0.30"], two.clone());
    assert!(planned(&world).actions.is_empty(), "it runs");
    assert_eq!(world.snapshot.pending(&name("web")), ["networks"]);
    let say =
        |world: &World| crate::explain(&world.snapshot, &world.seen, &World::reference("vm/web"));
    let told = "web was changed (networks): that takes effect at its next start; run `haven vm reset web`, or stop and start it";
    assert!(say(&world).iter().any(|said| said == told), "{:?}", say(&world));
    let new = Some(vec!["10.77.0.30".to_owned(), "10.77.0.50".into()]);
    for phase in [VmPhase::Starting, VmPhase::Failed] {
        world.report("web", phase, None);
        let plan = planned(&world);
        assert_eq!(placed(&plan), [("web".into(), "host1".into(), 2)], "{phase:?}");
        assert_eq!(cards(&plan, "web"), new, "the card that stays keeps its address");
    }
    // One that ended and is left so would be started by a new placement.
    world.report("web", VmPhase::Stopped, None);
    assert!(planned(&world).actions.is_empty());
    let mut spec = world.snapshot.vms["web"].spec.clone();
    spec.running = false;
    world.vm("web", spec.clone());
    assert_eq!(cards(&planned(&world), "web"), new, "it is switched off");
    // A reset counts as a start; a VM that has what it wants is left alone.
    (spec.running, spec.resets) = (true, 1);
    world.vm("web", spec);
    world.report("web", VmPhase::Running, Some(true));
    assert_eq!(cards(&planned(&world), "web"), new);
    with_cards(&mut world, "web", "host1", &["10.77.0.30", "10.77.0.50"], two);
    world.report("web", VmPhase::Starting, None);
    assert!(planned(&world).actions.is_empty());
    assert!(world.snapshot.pending(&name("web")).is_empty());
}

#[test]
fn a_changed_address_stays_unique_and_a_recovery_never_waits_for_it() {
    let mut world = World::new(3, Bytes::gib(8));
    world.network("front");
    let fixed = |ip: &str| serde_json::json!([{"network": "front", "address": ip}]);
    with_cards(&mut world, "a", "host1", &["10.77.0.20"], fixed("10.77.0.21"));
    with_cards(&mut world, "b", "host2", &["10.77.0.21"], fixed("10.77.0.22"));
    world.report("a", VmPhase::Starting, None);
    // B runs and has the address yet.
    let plan = planned(&world);
    assert!(plan.actions.is_empty());
    let why = &plan.waiting[0].reason;
    assert!(
        why.contains("a asks for the address 10.77.0.21 of network `front`, which vm/b has"),
        "{why}"
    );
    // What a keeps meanwhile is given to nobody else in the same plan.
    let spec = serde_json::json!({"memory": "1GiB", "networks": fixed("10.77.0.20")});
    world.vm("c", serde_json::from_value(spec).unwrap());
    assert!(placed(&planned(&world)).is_empty());
    // Its host is lost: it restarts with what it had.
    world.lost("host1", ProofKind::LeaseExpired);
    let plan = planned(&world);
    assert_eq!(cards(&plan, "a").unwrap(), ["10.77.0.20"]);
    // B takes up its own, then a can.
    world.report("b", VmPhase::Starting, None);
    assert_eq!(cards(&planned(&world), "b").unwrap(), ["10.77.0.22"]);
    with_cards(&mut world, "b", "host2", &["10.77.0.22"], fixed("10.77.0.22"));
    assert_eq!(cards(&planned(&world), "a").unwrap(), ["10.77.0.21"]);
}

#[test]
fn a_certificate_goes_once_no_service_uses_it() {
    let mut world = World::new(1, Bytes::gib(8));
    let spec = CertificateSpec { chain: String::new(), key: String::new() };
    let mut certificate = stored("shop", spec);
    certificate.meta.deleting = true;
    world.snapshot.certificates.insert(name("shop"), at(9, certificate));
    world.service("web", 0);
    let mut service = (*world.snapshot.services["web"].value).clone();
    let frontend = r#"{"address": "10.88.0.100", "port": 443, "tls": {"certificate": "shop"}}"#;
    service.spec.frontend = Some(serde_json::from_str(frontend).unwrap());
    let removed = |world: &World| {
        let plan = planned(world);
        let waits = plan.waiting.iter().find(|w| w.object.to_string() == "certificate/shop");
        let goes = plan.actions.iter().any(
            |a| matches!(&a.action, Action::RemoveObject { object, .. } if object.to_string() == "certificate/shop"),
        );
        (goes, waits.map(|w| w.reason.clone()))
    };
    world.snapshot.services.insert(name("web"), at(10, service.clone()));
    let why = "certificate/shop is removed once nothing uses it: service/web";
    assert_eq!(removed(&world), (false, Some(why.into())));
    service.spec.frontend = None;
    world.snapshot.services.insert(name("web"), at(11, service));
    assert_eq!(removed(&world), (true, None));
}

/// It votes and counts as a host that may be lost; nothing is ever put there, and it is in no sum.
#[test]
fn a_witness_gets_nothing_and_is_no_room() {
    let mut world = World::new(3, Bytes::gib(4));
    let mut host = (*world.snapshot.hosts["host3"].value).clone();
    host.spec.witness = true;
    world.snapshot.hosts.insert(name("host3"), at(1, host));
    for i in 1..=8 {
        world.vm(&format!("vm-{i}"), vm_spec(Bytes::gib(1)));
    }
    world.service("web", 0);
    let mut service = (*world.snapshot.services["web"].value).clone();
    service.spec.frontend = Some(
        serde_json::from_value(serde_json::json!({"address": "10.88.0.100", "port": 80})).unwrap(),
    );
    world.snapshot.services.insert(name("web"), at(8, service));
    let plan = plan(&world.snapshot, &world.seen);
    let states = crate::host_states(&world.snapshot, &world.seen);
    assert_eq!(states["host3"].to_string(), "witness");
    assert!(states["host3"].well() && !states["host3"].usable());
    // A drain of it ends at once, as one of a host without VMs does.
    let drain = haven_model::Drain {
        id: "d1".into(),
        by: "alice".into(),
        at_ms: 1,
        drained_ms: None,
        bringing_back: false,
    };
    world.snapshot.drains.insert(name("host3"), at(40, drain));
    assert_eq!(crate::host_states(&world.snapshot, &world.seen)["host3"].to_string(), "drained");
    let mut placed = 0;
    for planned in &plan.actions {
        match &planned.action {
            Action::PlaceVm { placement, .. } => {
                assert_ne!(placement.host, name("host3"));
                placed += 1;
            }
            Action::PlaceFrontend { placement, .. } => {
                assert!(!placement.candidates.contains(&name("host3")), "{placement:?}");
            }
            _ => {}
        }
    }
    assert!(placed > 0 && placed < 8, "two hosts carry some of them: {placed}");
    let waits = plan.waiting.iter().find(|waiting| waiting.reason.contains("1 host is a witness"));
    assert!(waits.is_some(), "{:#?}", plan.waiting);
}
