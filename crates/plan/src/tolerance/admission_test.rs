//! How many hosts can be lost, and what is let in: by hand, and against every loss really planned for.

use super::{admission::losses, admit::admit};
use crate::{
    plan,
    testing::{World, at, name, stored, vm_spec},
};
use haven_model::{
    Action, AdmissionPolicy, Bytes, ClusterSpec, Name, Object, ObjectRef, ProofKind,
    object::Kind,
    vm::{AffinitySpec, Priority},
};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// So much memory for a guest that it takes whole GiB with QEMU's own part.
fn gib(n: u64) -> Bytes {
    Bytes::mib(n * 1024 - 64)
}

fn runs(world: &mut World, vm: &str, memory: Bytes, host: &str) {
    world.vm(vm, vm_spec(memory));
    world.run(vm, host);
}

/// One that is to be, as `haven apply` gives it.
fn asks(vm: &str, memory: Bytes) -> Object {
    Object::Vm(stored(vm, vm_spec(memory)))
}

fn change(
    world: &mut World,
    vm: &str,
    change: impl Fn(&mut haven_model::object::Stored<haven_model::VmSpec>),
) {
    let mut object = (*world.snapshot.vms[vm].value).clone();
    change(&mut object);
    world.snapshot.vms.insert(name(vm), at(4, object));
}

fn why(world: &World, wanted: &[Object]) -> String {
    admit(&world.snapshot, &world.seen, wanted).map_or("let in".into(), |much| much.why)
}

#[test]
fn a_vm_that_fits_into_the_sum_of_what_is_free_and_on_no_host_is_no_reserve() {
    let mut world = World::new(3, Bytes::gib(8));
    runs(&mut world, "db-1", gib(4), "host2");
    runs(&mut world, "web-1", gib(2), "host2");
    runs(&mut world, "app-1", gib(6), "host3");
    runs(&mut world, "app-2", gib(2), "host1");
    let now = losses(&world.snapshot, &world.seen);
    assert_eq!((now.vms, now.short), (1, None), "host1 has 6 GiB free");
    runs(&mut world, "app-3", Bytes::mib(3 * 512 - 64), "host1");
    let now = losses(&world.snapshot, &world.seen);
    assert_eq!(now.vms, 0);
    assert_eq!(
        now.short.unwrap().to_string(),
        "host3 lost: its 6 GiB do not fit on host1 (4.5 GiB free) and host2 (2 GiB free): \
         app-1 (5.93 GiB) finds no place"
    );
}

#[test]
fn what_would_use_up_the_reserve_is_told_with_the_arithmetic() {
    let mut world = World::new(3, Bytes::gib(8));
    for host in ["host1", "host2", "host3"] {
        runs(&mut world, &format!("vm-{host}"), gib(4), host);
    }
    assert_eq!(why(&world, &[asks("db-1", gib(4))]), "let in");
    assert_eq!(
        why(&world, &[asks("db-1", gib(4)), asks("db-2", gib(4))]),
        "the loss of 1 host would leave VMs without a place: host1 lost: its 8 GiB do not fit on \
         host3 (4 GiB free) and host2 (0 MiB free): db-1 (3.93 GiB) finds no place"
    );
    assert_eq!(
        why(&world, &[asks("db-1", gib(9))]),
        "no host has room for it now: db-1 (8.93 GiB) finds no place"
    );
    // Without a reserve, or with nobody to keep it, nothing is asked.
    for spec in [
        ClusterSpec { reserved_hosts: Some(0), ..ClusterSpec::default() },
        ClusterSpec { admission: AdmissionPolicy::Off, ..ClusterSpec::default() },
    ] {
        world.snapshot.cluster = Some(at(9, spec));
        assert_eq!(why(&world, &[asks("db-1", gib(9))]), "let in");
    }
}

#[test]
fn only_what_adds_load_is_asked_about() {
    let mut world = World::new(3, Bytes::gib(8));
    for host in ["host1", "host2", "host3"] {
        runs(&mut world, &format!("vm-{host}"), gib(7), host);
    }
    // It is short already. What takes less, or the same, is let in all the same.
    let mut less = (*world.snapshot.vms["vm-host1"].value).clone();
    less.spec.memory = gib(6);
    assert_eq!(why(&world, &[Object::Vm(less.clone())]), "let in");
    less.spec.memory = gib(7);
    less.spec.user_data = Some("#cloud-config".into());
    assert_eq!(why(&world, &[Object::Vm(less.clone())]), "let in");
    less.spec.running = false;
    assert_eq!(why(&world, &[Object::Vm(less)]), "let in");
    let mut stopped = stored("off", vm_spec(gib(7)));
    stopped.spec.running = false;
    assert_eq!(why(&world, &[Object::Vm(stopped)]), "let in");
    let more = why(&world, &[asks("one-more", Bytes::mib(64))]);
    assert!(more.ends_with("; it would not before this change, either"), "{more}");
}

#[test]
fn a_service_is_judged_by_all_the_members_that_it_will_have() {
    let mut world = World::new(3, Bytes::gib(4));
    world.service("web", 3);
    let mut service = (*world.snapshot.services["web"].value).clone();
    service.spec.template.spec.memory = gib(1);
    let scaled = |replicas: u32| {
        let mut service = service.clone();
        service.spec.replicas = replicas;
        Object::Service(service)
    };
    assert_eq!(why(&world, &[scaled(8)]), "let in");
    let much = admit(&world.snapshot, &world.seen, &[scaled(9)]).unwrap();
    assert_eq!(much.adds, [ObjectRef::new(Kind::Service, name("web"))]);
    assert!(much.why.contains("finds no place"), "{}", much.why);
    // Fewer of them are always let in.
    world.snapshot.services.insert(name("web"), at(7, service.clone()));
    assert_eq!(why(&world, &[scaled(0)]), "let in");
    // Members that must stand apart leave nobody a place beside them.
    service.spec.spread.required = true;
    let spread = why(&world, &[Object::Service(service)]);
    assert!(
        spread.ends_with(
            "web-1 (960 MiB: 1 host is lost; 2 hosts each: shares its host with another member) \
             finds no place"
        ),
        "{spread}"
    );
}

#[test]
fn a_lost_host_counts_no_more_and_what_it_ran_counts_where_it_goes() {
    let mut world = World::new(4, Bytes::gib(4));
    for (i, host) in ["host1", "host2", "host3", "host4"].into_iter().enumerate() {
        runs(&mut world, &format!("vm-{i}"), gib(2), host);
    }
    assert_eq!(losses(&world.snapshot, &world.seen).vms, 2);
    world.lost("host1", ProofKind::LeaseExpired);
    assert_eq!(losses(&world.snapshot, &world.seen).vms, 1, "vm-0 goes to one of the others");
    world.lost("host2", ProofKind::LeaseExpired);
    assert_eq!(losses(&world.snapshot, &world.seen).vms, 0);
}

#[test]
fn what_cannot_move_needs_no_room_elsewhere() {
    let mut world = World::new(3, Bytes::gib(4));
    let pool = serde_json::json!({"driver": "local", "path": "/var/lib/p"});
    let pool = serde_json::from_value(pool).unwrap();
    world.snapshot.pools.insert(name("fast"), at(3, stored("fast", pool)));
    let disk = serde_json::json!({"memory": "3GiB", "disks": [{"name": "root", "size": "1GiB", "pool": "fast"}]});
    for host in ["host1", "host2", "host3"] {
        world.vm(&format!("vm-{host}"), serde_json::from_value(disk.clone()).unwrap());
        world.run(&format!("vm-{host}"), host);
    }
    assert_eq!(losses(&world.snapshot, &world.seen).vms, 2);
}

#[derive(Clone, Debug)]
struct Case {
    memory_mib: u64,
    host: usize,
    labels: u8,
    wish: u8,
    age: i64,
    priority: usize,
    service: bool,
}

const PRIORITIES: [Priority; 4] =
    [Priority::Low, Priority::Normal, Priority::High, Priority::Critical];

fn case() -> impl Strategy<Value = Case> {
    let order = (0i64..4, 0usize..4);
    (200u64..2500, 0usize..6, 0u8..3, 0u8..12, order, prop::bool::weighted(0.3)).prop_map(
        |(memory_mib, host, labels, wish, (age, priority), service)| Case {
            memory_mib,
            host,
            labels,
            wish,
            age,
            priority,
            service,
        },
    )
}

/// A cluster in which all that is placed fits where it is.
fn cluster(hosts: &[u64], cases: &[Case], spread: bool) -> World {
    let mut world = World::new(0, Bytes(0));
    for (i, memory) in hosts.iter().enumerate() {
        world.host(&format!("host{i}"), Bytes::mib(*memory));
    }
    let members = cases.iter().filter(|case| case.service).count();
    world.service("web", u32::try_from(members).unwrap());
    let mut service = (*world.snapshot.services["web"].value).clone();
    service.spec.spread.required = spread;
    world.snapshot.services.insert(name("web"), at(7, service));
    let mut used: BTreeMap<usize, u64> = BTreeMap::new();
    for (i, case) in cases.iter().enumerate() {
        let vm = format!("vm{i}");
        world.vm(&vm, vm_spec(Bytes::mib(case.memory_mib)));
        change(&mut world, &vm, |object| {
            object.meta.created_ms = case.age;
            object.spec.priority = PRIORITIES[case.priority];
            object.meta.labels.insert("group".into(), case.labels.to_string());
            if case.service {
                object.meta.owner = Some(ObjectRef::new(Kind::Service, name("web")));
            }
            let of = |n: u8| BTreeMap::from([("group".to_owned(), n.to_string())]);
            object.spec.affinity = match case.wish {
                0 => AffinitySpec { apart: of(0), ..AffinitySpec::default() },
                1 => AffinitySpec { apart: of(1), soft: true, ..AffinitySpec::default() },
                2 => AffinitySpec { near: of(2), ..AffinitySpec::default() },
                _ => AffinitySpec::default(),
            };
        });
        let (host, takes) = (case.host % hosts.len(), case.memory_mib + 64);
        let used = used.entry(host).or_default();
        if *used + takes <= hosts[host] {
            *used += takes;
            world.run(&vm, &format!("host{host}"));
        }
    }
    world
}

/// The members of a service come and go by its own rules; what is looked at here is who finds a place.
fn places(world: &World) -> BTreeMap<Name, Name> {
    let actions = plan(&world.snapshot, &world.seen).actions.into_iter();
    let placed = actions.filter_map(|planned| match planned.action {
        Action::PlaceVm { vm, placement, .. } => Some((vm, placement.host)),
        _ => None,
    });
    placed.collect()
}

/// The world with this plan carried out.
fn settled(mut world: World) -> World {
    for (vm, host) in places(&world) {
        world.run(vm.as_str(), host.as_str());
    }
    world
}

/// Whether the plan finds a place for all that these hosts run, once they are lost.
fn survives(world: &World, lost: &[String]) -> bool {
    let mut after = world.clone();
    for host in lost {
        after.lost(host, ProofKind::LeaseExpired);
    }
    let placed = places(&after);
    let ran = |host: &Name| lost.iter().any(|lost| lost == host.as_str());
    world.snapshot.placements.iter().all(|(vm, p)| !ran(&p.host) || placed.contains_key(vm))
}

fn subsets(hosts: usize, count: usize) -> Vec<Vec<String>> {
    let all = (0u32..1 << hosts).filter(|set| set.count_ones() as usize == count);
    let names = |set: u32| (0..hosts).filter(move |i| set & (1 << i) != 0);
    all.map(|set| names(set).map(|i| format!("host{i}")).collect()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The number that is told is the one that comes out when every loss is planned for, one after another.
    #[test]
    fn losses_are_as_many_as_the_plan_makes_up_for(
        hosts in prop::collection::vec(1024u64..6144, 2..6),
        cases in prop::collection::vec(case(), 0..14),
        spread in prop::bool::weighted(0.2),
    ) {
        let world = cluster(&hosts, &cases, spread);
        let told = losses(&world.snapshot, &world.seen).vms;
        let world = settled(world);
        let good = |count: &usize| subsets(hosts.len(), *count).iter().all(|set| survives(&world, set));
        let true_number = (1..hosts.len()).take(3).take_while(good).count();
        prop_assert_eq!(told, true_number);
    }

    /// What is let in can all be started, and again after the loss of any host.
    #[test]
    fn what_is_let_in_finds_a_place_after_any_loss(
        hosts in prop::collection::vec(1024u64..6144, 3..6),
        cases in prop::collection::vec(case(), 0..8),
        more in prop::collection::vec((100u64..3000, prop::bool::ANY), 1..8),
    ) {
        let mut world = settled(cluster(&hosts, &cases, false));
        prop_assume!(losses(&world.snapshot, &world.seen).vms > 0);
        for (i, (memory, member)) in more.iter().enumerate() {
            let mut object = stored(&format!("more{i}"), vm_spec(Bytes::mib(*memory)));
            object.meta.created_ms = 100 + i as i64;
            if *member {
                object.meta.labels.insert("group".into(), "0".into());
            }
            if admit(&world.snapshot, &world.seen, &[Object::Vm(object.clone())]).is_some() {
                continue;
            }
            world.snapshot.vms.insert(object.meta.name.clone(), at(4, object));
            world = settled(world);
            let vm = name(&format!("more{i}"));
            prop_assert!(world.snapshot.placements.contains_key(&vm), "{} waits", vm);
            for set in subsets(hosts.len(), 1) {
                prop_assert!(survives(&world, &set), "{:?} is lost and somebody finds no place", set);
            }
        }
    }
}
