//! Properties of every plan, over generated worlds.

use crate::{
    check, plan,
    testing::{World, name, vm_spec},
};
use haven_model::{
    Action, Bytes, ProofKind,
    vm::{KEEPS_FAILING, Priority},
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct VmCase {
    memory_mib: u64,
    host: Option<usize>,
    running: bool,
    deleting: bool,
    /// Its priority, and how many VMs before it, by number, is the one that it starts after; itself is none.
    order: (u8, usize),
    /// How often it failed in a row, and whether its host says that nothing of it is there.
    failures: Option<bool>,
}

fn vm_case() -> impl Strategy<Value = VmCase> {
    let flags = (prop::bool::weighted(0.9), prop::bool::weighted(0.1));
    let failures = prop::option::weighted(0.15, any::<bool>());
    (64u64..3000, prop::option::of(0usize..6), flags, (0u8..4, 0usize..12), failures).prop_map(
        |(memory_mib, host, (running, deleting), order, failures)| VmCase {
            memory_mib,
            host,
            running,
            deleting,
            order,
            failures,
        },
    )
}

fn world(hosts: &[(u64, u8)], vms: &[VmCase]) -> World {
    let mut world = World::new(0, Bytes(0));
    for (i, (memory, _)) in hosts.iter().enumerate() {
        world.host(&format!("host{i}"), Bytes::mib(*memory));
    }
    for (i, case) in vms.iter().enumerate() {
        let vm = format!("vm{i}");
        let mut spec = vm_spec(Bytes::mib(case.memory_mib));
        spec.running = case.running;
        spec.priority = match case.order.0 {
            0 => Priority::Low,
            1 => Priority::Normal,
            2 => Priority::High,
            _ => Priority::Critical,
        };
        if let Some(before) = i.checked_sub(case.order.1).filter(|_| (1..4).contains(&case.order.1))
        {
            spec.after = vec![World::reference(&format!("vm/vm{before}"))];
        }
        world.vm(&vm, spec);
        if case.deleting {
            let mut object = (*world.snapshot.vms[vm.as_str()].value).clone();
            object.meta.deleting = true;
            world.snapshot.vms.insert(name(&vm), crate::testing::at(4, object));
        }
        if let Some(host) = case.host.filter(|h| *h < hosts.len()) {
            world.run(&vm, &format!("host{host}"));
            if let Some(idle) = case.failures {
                let mut status = (*world.snapshot.vm_status[vm.as_str()].value).clone();
                status.phase = haven_model::VmPhase::Failed;
                (status.failures, status.idle) = (KEEPS_FAILING, idle);
                world.snapshot.vm_status.insert(name(&vm), crate::testing::at(6, status));
            }
        }
    }
    for (i, (_, state)) in hosts.iter().enumerate() {
        let host = format!("host{i}");
        if state % 5 == 4 {
            let drain = haven_model::Drain {
                id: format!("d{i}"),
                by: "a person".into(),
                at_ms: 1,
                drained_ms: None,
                bringing_back: state % 3 == 0,
            };
            world.snapshot.drains.insert(name(&host), crate::testing::at(9, drain));
        }
        match state % 6 {
            0 => world.lost(&host, ProofKind::LeaseExpired),
            1 => world.silent(&host, 6000, false),
            2 => world.silent(&host, 6000, true),
            3 => {
                world.seen.suspected.insert(name(&host));
            }
            _ => {}
        }
    }
    world
}

/// Adds wishes that nobody can fulfil, last in every order.
fn wish_badly(world: &mut World, wishes: &[u8]) {
    world.network("front");
    for (i, wish) in wishes.iter().enumerate() {
        let bad = match wish % 4 {
            // The same fixed address for several.
            0 => {
                serde_json::json!({"memory": "16MiB", "networks": [{"network": "front", "address": "10.77.0.9"}]})
            }
            1 => serde_json::json!({"memory": "16MiB", "networks": [{"network": "nowhere"}]}),
            2 => serde_json::json!({"memory": "9000GiB"}),
            _ => {
                // No room for its members' names, and one address for several.
                let service = format!("{}{i:02}", "s".repeat(38));
                world.service(&service, 12);
                let mut object = (*world.snapshot.services[service.as_str()].value).clone();
                object.spec.template.spec.memory = Bytes::mib(16);
                object.spec.frontend = Some(
                    serde_json::from_value(
                        serde_json::json!({"address": "10.88.0.99", "port": 80 + i}),
                    )
                    .unwrap(),
                );
                object.meta.created_ms = i64::MAX;
                world.snapshot.services.insert(name(&service), crate::testing::at(4, object));
                continue;
            }
        };
        let vm = format!("bad{i}");
        world.vm(&vm, serde_json::from_value(bad).unwrap());
        let mut object = (*world.snapshot.vms[vm.as_str()].value).clone();
        object.meta.created_ms = i64::MAX;
        object.spec.priority = Priority::Low;
        world.snapshot.vms.insert(name(&vm), crate::testing::at(4, object));
    }
}

/// A member of a service that is being updated, as generated.
#[derive(Clone, Debug)]
struct MemberCase {
    template: u8,
    host: usize,
    /// 0: not placed, 1: boots, 2: was ready, 3 and more: is ready.
    health: u8,
    released: bool,
    drains: bool,
    deleting: bool,
}

fn member_case() -> impl Strategy<Value = MemberCase> {
    let flags = (any::<bool>(), prop::bool::weighted(0.1), prop::bool::weighted(0.1));
    (0u8..3, 0usize..4, 0u8..8, flags).prop_map(|(template, host, health, flags)| {
        let (released, drains, deleting) = flags;
        MemberCase { template, host, health, released, drains, deleting }
    })
}

/// How a generated service is updated.
#[derive(Clone, Debug)]
struct UpdateCase {
    update: serde_json::Value,
    replicas: u32,
    address: bool,
    promoted: bool,
    /// Percent per template; all evenly when none.
    traffic: Option<(u8, u32)>,
}

fn update_case() -> impl Strategy<Value = UpdateCase> {
    let canary =
        (1u32..4, 1u32..100, prop::option::of(0u64..3)).prop_map(|(members, weight, hold)| {
            let hold = hold.map(|minutes| format!("{minutes}m"));
            let mut canary = serde_json::json!({"members": members, "weight": weight});
            if let Some(hold) = hold {
                canary["hold"] = hold.into();
            }
            serde_json::json!({"strategy": "canary", "canary": canary})
        });
    let blue_green = any::<bool>().prop_map(|manual| {
        let promote = if manual { "manual" } else { "automatic" };
        serde_json::json!({"strategy": "blue-green", "promote": promote, "keepOld": "10s"})
    });
    let update = prop_oneof![Just(serde_json::json!({})), canary, blue_green];
    let traffic = prop::option::of((0u8..3, prop_oneof![Just(0u32), Just(10), Just(100)]));
    (update, 0u32..5, 0u32..2, any::<bool>(), any::<bool>(), traffic).prop_map(
        |(mut update, replicas, missing, address, promoted, traffic)| {
            update["maxUnavailable"] = missing.into();
            UpdateCase { update, replicas, address, promoted, traffic }
        },
    )
}

/// The memory of each template's members; the service wants the last.
fn memory(template: u8) -> Bytes {
    Bytes::mib(32 + u64::from(template))
}

/// A service in the middle of an update that may have come from anywhere.
fn updating(world: &mut World, hosts: usize, case: &UpdateCase, members: &[MemberCase]) {
    use haven_model::service::{DRAIN_LABEL, RELEASE_LABEL, SERVICE_LABEL, TEMPLATE_LABEL};
    world.service("web", case.replicas);
    let mut service = (*world.snapshot.services["web"].value).clone();
    service.spec.template.spec.memory = memory(2);
    service.spec.update = serde_json::from_value(case.update.clone()).unwrap();
    service.spec.check = Some(serde_json::from_value(serde_json::json!({"port": 80})).unwrap());
    let hash = |template: u8| {
        let mut spec = service.spec.clone();
        spec.template.spec.memory = memory(template);
        crate::balance::services::template_hash(&spec)
    };
    let traffic: std::collections::BTreeMap<String, u32> =
        case.traffic.iter().map(|(template, percent)| (hash(*template), *percent)).collect();
    for (i, member) in members.iter().enumerate() {
        let vm = format!("web-{}", i + 1);
        let mut spec = vm_spec(memory(member.template));
        spec.check.clone_from(&service.spec.check);
        world.vm(&vm, spec);
        let mut object = (*world.snapshot.vms[vm.as_str()].value).clone();
        object.meta.owner = Some(World::reference("service/web"));
        object.meta.deleting = member.deleting;
        let labels = &mut object.meta.labels;
        labels.insert(SERVICE_LABEL.into(), "web".into());
        labels.insert(TEMPLATE_LABEL.into(), hash(member.template));
        labels.extend(member.released.then(|| (RELEASE_LABEL.into(), "900000".into())));
        labels.extend(member.drains.then(|| (DRAIN_LABEL.into(), "999000".into())));
        world.snapshot.vms.insert(name(&vm), crate::testing::at(4, object));
        if member.health > 0 {
            world.run(&vm, &format!("host{}", member.host % hosts));
            let ready = (member.health > 1).then_some(member.health > 2);
            world.report(&vm, haven_model::VmPhase::Running, ready);
        }
    }
    service.spec.promoted = case.promoted.then(|| hash(2));
    if case.address {
        let frontend = serde_json::json!({"address": "10.88.0.99", "port": 80});
        service.spec.frontend = Some(serde_json::from_value(frontend).unwrap());
        let held = serde_json::json!({"holder": "host0", "epoch": 1, "candidates": [], "traffic": traffic});
        let held = serde_json::from_value(held).unwrap();
        world.snapshot.frontends.insert(name("web"), crate::testing::at(4, held));
    }
    world.snapshot.services.insert(name("web"), crate::testing::at(4, service));
}

/// Ready members of `web` that get traffic; one on a suspected host gets none.
fn getting(world: &World) -> usize {
    use haven_model::service::{DRAIN_LABEL, TEMPLATE_LABEL};
    let snapshot = &world.snapshot;
    let frontend = snapshot.frontends.get("web");
    let members = snapshot.vms.iter().filter(|(_, vm)| vm.meta.owner.is_some());
    let gets = |(vm, object): &(&haven_model::Name, &haven_model::Versioned<_>)| {
        let object: &haven_model::object::Stored<haven_model::VmSpec> = object;
        let labels = &object.meta.labels;
        let idle = frontend.is_some_and(|f| f.gets_nothing(&labels[TEMPLATE_LABEL]));
        let goes = object.meta.deleting || labels.contains_key(DRAIN_LABEL);
        let told = snapshot.told_of(vm).is_some_and(|status| status.ready == Some(true));
        let host = snapshot.placements.get(*vm).map(|placement| &placement.host);
        told && !idle && !goes && !host.is_some_and(|host| world.seen.suspected.contains(host))
    };
    members.filter(gets).count()
}

/// What an action writes, in the world.
fn commit(world: &mut World, action: &Action) {
    use haven_model::keys;
    let (key, value) = match action {
        Action::PutObject { object, .. } => (keys::object(&object.reference()), object.to_store()),
        Action::PlaceFrontend { service, placement, .. } => {
            (keys::frontend(service), serde_json::to_vec(placement).unwrap())
        }
        _ => return,
    };
    world.snapshot.revision += 1;
    let revision = world.snapshot.revision;
    world.snapshot.apply(&key, Some((&value, revision)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_update_takes_traffic_from_too_many(
        hosts in prop::collection::vec((1024u64..8192, 0u8..24), 1..4),
        case in update_case(),
        members in prop::collection::vec(member_case(), 0..10),
    ) {
        let mut world = world(&hosts, &[]);
        updating(&mut world, hosts.len(), &case, &members);
        let missing = case.update["maxUnavailable"].as_u64().unwrap() as u32;
        let floor = case.replicas.saturating_sub(missing) as usize;
        // Each action alone, in its order, and so for a few plans of which each follows the one before.
        for _ in 0..5 {
            let next = plan(&world.snapshot, &world.seen);
            prop_assert_eq!(&next, &plan(&world.snapshot, &world.seen));
            if let Err(broken) = check(&world.snapshot, &next) {
                prop_assert!(false, "{broken:?}");
            }
            for planned in &next.actions {
                let before = getting(&world);
                commit(&mut world, &planned.action);
                let after = getting(&world);
                prop_assert!(
                    before < floor || after >= floor,
                    "`{}` leaves {after} of {before}, and {floor} must get traffic", planned.reason
                );
                if let Action::PlaceFrontend { placement, .. } = &planned.action {
                    prop_assert!(placement.traffic.values().sum::<u32>() <= 100, "{:?}", placement);
                }
            }
            world.seen.now_ms += 3000;
        }
    }

    #[test]
    fn plans_keep_the_invariants_and_are_deterministic(
        hosts in prop::collection::vec((256u64..8192, 0u8..12), 1..6),
        vms in prop::collection::vec(vm_case(), 0..24),
    ) {
        let world = world(&hosts, &vms);
        let first = plan(&world.snapshot, &world.seen);
        prop_assert_eq!(&first, &plan(&world.snapshot, &world.seen));
        // Invariant 6 holds for what a plan adds; a world that is overfull already cannot be judged by it.
        if let Err(why) = check(&world.snapshot, &first) {
            prop_assert!(false, "{why:?}");
        }
        for planned in &first.actions {
            if let Action::PlaceVm { vm, placement, .. } = &planned.action {
                let state = crate::host_states(&world.snapshot, &world.seen)[&placement.host];
                prop_assert!(state.usable(), "{vm} is placed on {} which is {state}", placement.host);
                let old = world.snapshot.placements.get(vm);
                if let Some(old) = old {
                    prop_assert!(world.snapshot.leases[&old.host].closed, "{vm} leaves {} that may run it", old.host);
                }
            }
        }
    }

    /// Whatever else is so: nothing sets out for a drained host or leaves one that it is not on, limits hold, and what
    /// is left on a drained host that is well is on its way or says why it is not.
    #[test]
    fn a_drain_keeps_its_limits_and_its_word(
        hosts in prop::collection::vec((1024u64..8192, 0u8..60), 2..6),
        vms in prop::collection::vec(vm_case(), 0..24),
        per_host in 1u32..4,
        cluster in 1u32..6,
    ) {
        use crate::tolerance::drain::{left, stands};
        let mut world = world(&hosts, &vms);
        let moves = haven_model::MoveLimits { per_host, cluster };
        let spec = haven_model::ClusterSpec { moves, ..haven_model::ClusterSpec::default() };
        world.snapshot.cluster = Some(crate::testing::at(1, spec));
        let plan = plan(&world.snapshot, &world.seen);
        if let Err(why) = check(&world.snapshot, &plan) {
            prop_assert!(false, "{why:?}");
        }
        let mut sets_out = std::collections::BTreeMap::new();
        for planned in &plan.actions {
            if let Action::MoveVm { vm, placement, .. } = &planned.action {
                let to = placement.moving_to.as_ref().map(|to| to.host.clone());
                let Some(to) = to else { continue };
                prop_assert!(stands(&world.snapshot, &to).is_none(), "{}", planned.reason);
                let from = world.snapshot.placements[vm].host.clone();
                prop_assert!(stands(&world.snapshot, &from).is_some(), "{}", planned.reason);
                sets_out.insert(vm.clone(), [from, to]);
            }
        }
        prop_assert!(sets_out.len() <= cluster as usize);
        for host in world.snapshot.hosts.keys() {
            let busy = sets_out.values().filter(|hosts| hosts.contains(host)).count();
            prop_assert!(busy <= per_host as usize, "{host} has a part in {busy} moves");
            let well = crate::host_states(&world.snapshot, &world.seen)[host].well();
            if stands(&world.snapshot, host).is_none() || !well {
                continue;
            }
            for vm in left(&world.snapshot, host) {
                let object = &world.snapshot.vms[vm];
                let ends = object.meta.deleting || !object.spec.running;
                let told = plan.waiting.iter().any(|waiting| waiting.object.name == *vm);
                // What keeps failing there starts elsewhere, whether or not the host is drained.
                let tried = plan.actions.iter().any(|planned| matches!(
                    &planned.action, Action::TryElsewhere { vm: of, .. } if of == vm
                ));
                let leaves = tried || sets_out.contains_key(vm);
                prop_assert!(ends || told || leaves, "{vm} is left on {host} without a word");
            }
        }
    }

    #[test]
    fn bad_wishes_keep_nobody_from_being_placed_or_recovered(
        hosts in prop::collection::vec((256u64..8192, 0u8..12), 1..6),
        vms in prop::collection::vec(vm_case(), 0..24),
        wishes in prop::collection::vec(0u8..4, 1..8),
    ) {
        let good = world(&hosts, &vms);
        let mut bad = good.clone();
        wish_badly(&mut bad, &wishes);
        let placed = |world: &World| -> Vec<_> {
            let plan = plan(&world.snapshot, &world.seen);
            let old = |vm: &haven_model::Name| good.snapshot.vms.contains_key(vm);
            let places = plan.actions.into_iter().filter_map(|planned| match planned.action {
                Action::PlaceVm { vm, placement, .. } if old(&vm) => Some((vm, placement.host, placement.epoch)),
                _ => None,
            });
            places.collect()
        };
        prop_assert_eq!(placed(&good), placed(&bad));
        let whole = plan(&bad.snapshot, &bad.seen);
        if let Err(broken) = check(&bad.snapshot, &whole) {
            prop_assert!(false, "{broken:?}");
        }
        let mut holders = std::collections::BTreeSet::new();
        for planned in &whole.actions {
            if let Action::PlaceFrontend { service, .. } = &planned.action {
                let address = bad.snapshot.services[service].spec.frontend.as_ref().unwrap().address;
                prop_assert!(holders.insert(address), "{address} gets two holders");
            }
        }
    }
}
