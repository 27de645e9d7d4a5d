//! Tests of where wishes about hosts and neighbours lead, and that `check` finds a plan that breaks one.

use crate::{
    check, plan,
    testing::{World, at, name},
};
use haven_model::{Action, Bytes, Plan, ProofKind, VmSpec};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Adds a VM of 1 GiB with labels and wishes.
fn add(world: &mut World, vm: &str, labels: Value, affinity: Value) {
    let spec: VmSpec =
        serde_json::from_value(json!({"memory": "1GiB", "affinity": affinity})).unwrap();
    world.vm(vm, spec);
    let mut object = (*world.snapshot.vms[vm].value).clone();
    object.meta.labels = serde_json::from_value(labels).unwrap();
    world.snapshot.vms.insert(name(vm), at(4, object));
}

fn label(world: &mut World, host: &str, key: &str, value: &str) {
    let mut object = (*world.snapshot.hosts[host].value).clone();
    object.meta.labels.insert(key.into(), value.into());
    world.snapshot.hosts.insert(name(host), at(1, object));
}

fn planned(world: &World) -> Plan {
    let plan = plan(&world.snapshot, &world.seen);
    check(&world.snapshot, &plan).unwrap();
    plan
}

/// `vm@host`, or why there is none.
fn outcome(world: &World) -> Vec<String> {
    let plan = planned(world);
    let places = plan.actions.iter().filter_map(|planned| match &planned.action {
        Action::PlaceVm { vm, placement, .. } => Some(format!("{vm}@{}", placement.host)),
        _ => None,
    });
    places.chain(plan.waiting.iter().map(|waiting| waiting.reason.clone())).collect()
}

fn reason(world: &World) -> String {
    planned(world).actions[0].reason.clone()
}

/// What `check` says of the world's plan once its first placement leads to another host.
fn moved(world: &World, host: &str) -> String {
    let mut plan = planned(world);
    let Action::PlaceVm { placement, .. } = &mut plan.actions[0].action else {
        panic!("{:?}", plan.actions)
    };
    placement.host = name(host);
    check(&world.snapshot, &plan).unwrap_err().why
}

/// `a` runs on host1; a newcomer would go to host1 too, where more is free. A host has room for four.
fn beside(labels: Value, affinity: Value) -> World {
    let mut world = World::new(2, Bytes::mib(4400));
    add(&mut world, "a", labels, affinity);
    world.run("a", "host1");
    for _ in 0..2 {
        let filler = format!("filler{}", world.snapshot.vms.len());
        add(&mut world, &filler, json!({}), json!({}));
        world.run(&filler, "host2");
    }
    world
}

#[test]
fn apart_holds_whoever_comes_second() {
    let mut world = beside(json!({"role": "db"}), json!({}));
    add(&mut world, "b", json!({}), json!({}));
    assert_eq!(outcome(&world), ["b@host1"], "without a wish it goes where most is free");
    for (first, second) in [
        (json!({}), json!({"apart": {"role": "db"}})),
        (json!({"apart": {"role": "web"}}), json!({})),
    ] {
        let mut world = beside(json!({"role": "db"}), first);
        add(&mut world, "b", json!({"role": "web"}), second);
        assert_eq!(outcome(&world), ["b@host2"]);
        assert_eq!(moved(&world, "host1"), "b is placed on host1 beside a, and they must be apart");
        world.snapshot.leases.remove("host2");
        let waits = outcome(&world);
        assert!(waits.len() == 1 && waits[0].starts_with("waiting: b needs 1GiB"), "{waits:?}");
        assert!(waits[0].contains("apart from"), "{waits:?}");
    }
}

#[test]
fn a_soft_wish_is_kept_where_it_can_be_and_broken_with_words() {
    for (first, second) in [
        (json!({}), json!({"apart": {"role": "db"}, "soft": true})),
        (json!({"apart": {"role": "web"}, "soft": true}), json!({})),
    ] {
        let mut world = beside(json!({"role": "db"}), first);
        add(&mut world, "b", json!({"role": "web"}), second);
        assert_eq!(outcome(&world), ["b@host2"]);
        world.snapshot.leases.remove("host2");
        assert_eq!(outcome(&world), ["b@host1"]);
        assert!(reason(&world).contains("1 soft affinity wishes are broken"), "{}", reason(&world));
    }
}

#[test]
fn near_leads_to_the_other_and_binds_only_who_asks() {
    let mut world = beside(json!({}), json!({}));
    add(&mut world, "filler9", json!({"role": "db"}), json!({}));
    world.run("filler9", "host2");
    add(&mut world, "b", json!({}), json!({"near": {"role": "db"}}));
    assert_eq!(outcome(&world), ["b@host2"]);
    assert_eq!(moved(&world, "host1"), "b is placed on host1, away from what it must be near to");
    add(&mut world, "big", json!({}), json!({}));
    world.run("big", "host2");
    let waits = outcome(&world);
    assert!(waits[0].contains("does not run the VM it must be near"), "{waits:?}");

    // The other way: what has no wish goes where it is asked for, and runs elsewhere rather than not at all.
    let mut world = beside(json!({}), json!({}));
    add(&mut world, "b", json!({}), json!({"near": {"role": "db"}}));
    world.run("b", "host2");
    add(&mut world, "c", json!({"role": "db"}), json!({}));
    assert_eq!(outcome(&world), ["c@host2"]);
    add(&mut world, "big", json!({}), json!({}));
    world.run("big", "host2");
    assert_eq!(outcome(&world), ["c@host1"]);
    assert!(reason(&world).contains("b asks to be near it and stays apart on host2"));
    // One that has somebody near it asks for no second one.
    world.run("c", "host1");
    world.snapshot.placements.remove("big");
    add(&mut world, "big", json!({}), json!({"near": {"role": "db"}}));
    world.run("big", "host1");
    world.snapshot.vms.remove("b");
    add(&mut world, "d", json!({"role": "db"}), json!({}));
    assert_eq!(outcome(&world), ["d@host2"]);
}

#[test]
fn wishes_hold_when_a_host_is_lost() {
    let mut world = World::new(3, Bytes::gib(8));
    add(&mut world, "a", json!({"role": "db"}), json!({"apart": {"role": "web"}}));
    add(&mut world, "b", json!({"role": "web"}), json!({}));
    add(&mut world, "c", json!({}), json!({"near": {"role": "db"}}));
    for (vm, host) in [("a", "host1"), ("b", "host2"), ("c", "host1")] {
        world.run(vm, host);
    }
    world.lost("host1", ProofKind::LeaseExpired);
    assert_eq!(outcome(&world), ["a@host3", "c@host3"]);
    world.lost("host3", ProofKind::LeaseExpired);
    let waits = outcome(&world);
    assert!(waits.iter().any(|w| w.starts_with("waiting: a needs")), "{waits:?}");
    assert!(waits.contains(&"c@host2".to_owned()), "nobody is left to be near to: {waits:?}");
}

#[test]
fn labels_of_hosts_bind() {
    let mut world = World::new(3, Bytes::gib(4));
    label(&mut world, "host3", "disk", "ssd");
    add(&mut world, "a", json!({}), json!({"hosts": {"disk": "ssd"}}));
    assert_eq!(outcome(&world), ["a@host3"]);
    assert_eq!(moved(&world, "host1"), "a is placed on host1, which lacks the labels it asks for");
    world.snapshot.leases.remove("host3");
    assert!(outcome(&world)[0].contains("2 hosts each: lacks the labels"), "{:?}", outcome(&world));
}

/// A service of two members on three hosts in two zones; the first runs on host1 of the west, and the host with the
/// most room is the other one of the west.
fn zones(required: bool) -> World {
    let mut world = World::new(2, Bytes::gib(4));
    world.host("host3", Bytes::gib(16));
    for (host, zone) in [("host1", "west"), ("host2", "east"), ("host3", "west")] {
        label(&mut world, host, "zone", zone);
    }
    world.service("web", 2);
    let mut service = (*world.snapshot.services["web"].value).clone();
    service.spec.spread =
        serde_json::from_value(json!({"by": "zone", "required": required})).unwrap();
    world.snapshot.services.insert(name("web"), at(7, service));
    for planned in planned(&world).actions {
        if let Action::PutObject { object, .. } = planned.action {
            let key = haven_model::keys::object(&object.reference());
            world.snapshot.apply(&key, Some((&object.to_store(), 1001)));
        }
    }
    world.run("web-1", "host1");
    world
}

#[test]
fn members_stand_in_different_zones() {
    for required in [false, true] {
        let world = zones(required);
        assert_eq!(outcome(&world), ["web-2@host2"], "required: {required}");
    }
    let mut world = zones(true);
    assert_eq!(moved(&world, "host3"), "web-2 and web-1 of service web share a zone");
    world.snapshot.leases.remove("host2");
    assert!(outcome(&world)[0].contains("shares its zone with another member"));
    let mut world = zones(false);
    world.snapshot.leases.remove("host2");
    assert_eq!(outcome(&world), ["web-2@host3"], "a zone that is only wished for holds up nothing");
}

#[test]
fn virtual_cpus_fit() {
    let with = |cpus: u32| {
        let mut world = World::new(1, Bytes::gib(64));
        world.vm("a", serde_json::from_value(json!({"memory": "1GiB", "cpus": cpus})).unwrap());
        world
    };
    assert_eq!(outcome(&with(8)), ["a@host1"]);
    assert!(outcome(&with(9))[0].contains("has too few CPUs"), "a host has 8");
    let mut world = with(8);
    for i in 0..4 {
        let vm = format!("vm{i}");
        world.vm(&vm, serde_json::from_value(json!({"memory": "1GiB", "cpus": 6})).unwrap());
        world.run(&vm, "host1");
    }
    assert_eq!(outcome(&world), ["a@host1"], "32 are promised of 8, four times as many");
    world.vm("b", serde_json::from_value(json!({"memory": "1GiB"})).unwrap());
    assert!(outcome(&world)[1].contains("has too few CPUs"), "{:?}", outcome(&world));
}

fn wish() -> impl Strategy<Value = Value> {
    let one = prop::option::weighted(0.3, 0u8..3);
    (one.clone(), one, prop::bool::weighted(0.2), prop::bool::weighted(0.2)).prop_map(
        |(near, apart, soft, west)| {
            let select =
                |kind: Option<u8>| kind.map_or(json!({}), |kind| json!({"kind": kind.to_string()}));
            let hosts = if west { json!({"zone": "0"}) } else { json!({}) };
            json!({"near": select(near), "apart": select(apart), "soft": soft, "hosts": hosts})
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_plan_breaks_a_wish(
        hosts in 1usize..5,
        vms in prop::collection::vec((0u8..3, wish(), prop::option::of(0usize..5)), 1..12),
        lost in prop::option::of(0usize..5),
    ) {
        let mut world = World::new(0, Bytes(0));
        for i in 0..hosts {
            world.host(&format!("host{i}"), Bytes::gib(6));
            label(&mut world, &format!("host{i}"), "zone", &(i % 2).to_string());
        }
        for (i, (kind, affinity, host)) in vms.iter().enumerate() {
            let vm = format!("vm{i:02}");
            add(&mut world, &vm, json!({"kind": kind.to_string()}), affinity.clone());
            if let Some(host) = host.filter(|host| *host < hosts) {
                world.run(&vm, &format!("host{host}"));
            }
        }
        if let Some(host) = lost.filter(|host| *host < hosts) {
            world.lost(&format!("host{host}"), ProofKind::LeaseExpired);
        }
        let plan = plan(&world.snapshot, &world.seen);
        if let Err(broken) = check(&world.snapshot, &plan) {
            prop_assert!(false, "{broken:?}");
        }
        // Whoever has no host is placed or is told why not.
        for vm in world.snapshot.vms.keys().filter(|vm| !world.snapshot.placements.contains_key(*vm)) {
            let said = plan.actions.iter().any(|planned| planned.object.name == *vm)
                || plan.waiting.iter().any(|waiting| waiting.object.name == *vm);
            prop_assert!(said, "nothing is said of {vm}");
        }
    }
}
