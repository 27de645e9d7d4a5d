//! Properties of every plan, over generated worlds.

use crate::{
    check, plan,
    testing::{World, name, vm_spec},
};
use haven_model::{Action, Bytes, ProofKind};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct VmCase {
    memory_mib: u64,
    host: Option<usize>,
    running: bool,
    deleting: bool,
}

fn vm_case() -> impl Strategy<Value = VmCase> {
    (64u64..3000, prop::option::of(0usize..6), prop::bool::weighted(0.9), prop::bool::weighted(0.1))
        .prop_map(|(memory_mib, host, running, deleting)| VmCase {
            memory_mib,
            host,
            running,
            deleting,
        })
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
        world.vm(&vm, spec);
        if case.deleting {
            let mut object = (*world.snapshot.vms[vm.as_str()].value).clone();
            object.meta.deleting = true;
            world.snapshot.vms.insert(name(&vm), crate::testing::at(4, object));
        }
        if let Some(host) = case.host.filter(|h| *h < hosts.len()) {
            world.run(&vm, &format!("host{host}"));
        }
    }
    for (i, (_, state)) in hosts.iter().enumerate() {
        let host = format!("host{i}");
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

/// Adds wishes that nobody can fulfil, younger than all others.
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
        world.snapshot.vms.insert(name(&vm), crate::testing::at(4, object));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

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
