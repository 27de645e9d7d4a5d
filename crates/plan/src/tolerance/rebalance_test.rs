//! Which loads move which VMs, and what keeps them where they are.

use super::rebalance::balance;
use crate::{
    check, plan,
    testing::{World, at, name, stored, vm_spec},
};
use haven_model::{
    Action, Bytes, ClusterSpec, Drain, HostLoad, Incident, Migration, Pressure, RebalancePolicy,
    VmLoad,
    api::Balance,
    migration::{MigrationOptions, MigrationOutcome},
    plan::MoveStep,
    units::Millis,
};
use proptest::prelude::*;

const WINDOW: Millis = Millis(300_000);

/// Three hosts of 8 CPUs with VMs `(name, host, CPUs that it uses, thousandths)`, and the policy `auto`.
fn world(vms: &[(&str, &str, u32)]) -> World {
    let mut world = World::new(3, Bytes::gib(16));
    for (vm, host, _) in vms {
        world.vm(vm, vm_spec(Bytes::gib(1)));
        world.run(vm, host);
    }
    policy(&mut world, RebalancePolicy::Auto);
    for host in ["host1", "host2", "host3"] {
        let here = vms.iter().filter(|(_, on, _)| *on == host);
        measured(&mut world, host, &here.map(|(vm, _, cpu)| (*vm, *cpu)).collect::<Vec<_>>());
    }
    world
}

fn policy(world: &mut World, rebalance: RebalancePolicy) {
    let spec = ClusterSpec { rebalance, rebalance_window: WINDOW, ..ClusterSpec::default() };
    world.snapshot.cluster = Some(at(1, spec));
}

fn measured(world: &mut World, host: &str, vms: &[(&str, u32)]) {
    let load = |cpu: u32| VmLoad { cpu, memory: Bytes::gib(1), over: WINDOW };
    let load = HostLoad {
        session: 1,
        at_ms: world.seen.now_ms - 1000,
        over: WINDOW,
        pressure: Some(Pressure::default()),
        vms: vms.iter().map(|(vm, cpu)| (name(vm), load(*cpu))).collect(),
    };
    world.snapshot.loads.insert(name(host), at(8, load));
}

fn pressed(world: &mut World, host: &str, cpu: u32, memory: u32) {
    let mut load = (*world.snapshot.loads[host].value).clone();
    load.pressure = Some(Pressure { cpu, memory });
    world.snapshot.loads.insert(name(host), at(8, load));
}

/// The moves that the plan begins, as `vm host`, with their reasons.
fn moves(world: &World) -> Vec<(String, String)> {
    let plan = plan(&world.snapshot, &world.seen);
    check(&world.snapshot, &plan).unwrap();
    let moves = plan.actions.into_iter().filter_map(|planned| match planned.action {
        Action::MoveVm { vm, placement, step: MoveStep::Begin, record, .. } => {
            let (record, _) = record.unwrap();
            assert!(record.balances && record.by == "balancing", "{record:?}");
            Some((format!("{vm} {}", placement.moving_to.unwrap().host), planned.reason))
        }
        _ => None,
    });
    moves.collect()
}

fn told(world: &World) -> Balance {
    balance(&world.snapshot, &world.seen)
}

/// `db` and `mail` keep `host1` at 90 percent.
fn busy() -> World {
    world(&[
        ("db", "host1", 4000),
        ("mail", "host1", 3200),
        ("web", "host2", 800),
        ("wiki", "host3", 2400),
    ])
}

#[test]
fn the_move_that_helps_most_is_made_with_its_reason() {
    let mut world = busy();
    let begun = moves(&world);
    assert_eq!(begun.len(), 1, "{begun:?}");
    assert_eq!(begun[0].0, "mail host2");
    assert_eq!(
        begun[0].1,
        "mail is to move from host1 to host2 for balance: the CPUs of host1 are 90 % busy; then 50 % of the CPUs of host1 and 50 % of those of host2 are in use, where it is 90 % and 10 % now"
    );
    let balance = told(&world);
    assert_eq!(balance.moves.len(), 1);
    assert_eq!((balance.moves[0].gain, balance.moves[0].vm.as_str()), (400, "mail"));
    let cpu: Vec<_> = balance.hosts.iter().map(|host| (host.cpu, host.cpu_after)).collect();
    assert_eq!(cpu, [(Some(900), Some(500)), (Some(100), Some(500)), (Some(300), Some(300))]);
    policy(&mut world, RebalancePolicy::Off);
    assert!(moves(&world).is_empty() && told(&world).moves.is_empty());
    // Advice is told alike and carries nothing out.
    policy(&mut world, RebalancePolicy::Advise);
    assert!(moves(&world).is_empty());
    assert_eq!(told(&world).moves, balance.moves);
    let said = crate::explain(&world.snapshot, &world.seen, &World::reference("vm/mail"));
    assert!(said.contains(&format!("would help: {}", balance.moves[0].reason)), "{said:?}");
}

#[test]
fn what_no_move_makes_better_stays() {
    // Even; one VM that takes all wherever it is; a gain too small to be worth it; busier, and not half busy.
    for vms in [
        &[("a", "host1", 5000), ("b", "host2", 5000), ("c", "host3", 4000)][..],
        &[("a", "host1", 7600)],
        &[("a", "host1", 7000), ("b", "host1", 600), ("c", "host2", 6600), ("d", "host3", 6600)],
        &[("a", "host1", 2000), ("b", "host1", 1900)],
    ] {
        let world = world(vms);
        assert!(moves(&world).is_empty(), "{vms:?}");
        assert!(told(&world).moves.is_empty(), "{vms:?}");
    }
    let uneven = world(&[("a", "host1", 2500), ("b", "host1", 1600)]);
    assert_eq!(
        moves(&uneven)[0].0,
        "b host2",
        "either helps as much, and this one takes less there"
    );
    // Of two hosts the emptier one, where both would do.
    let two = world(&[("a", "host1", 3000), ("b", "host1", 3000), ("c", "host2", 500)]);
    assert_eq!(moves(&two)[0].0, "a host3");
    assert!(moves(&uneven)[0].1.contains("the CPUs of host1 are 51 % busy, those of host2 0 %"));
}

#[test]
fn work_that_stands_still_moves_to_where_it_does_not() {
    let mut world = world(&[("a", "host1", 2200), ("b", "host1", 1600), ("c", "host2", 100)]);
    // Host 1 has less than it seems: another program takes its CPUs.
    pressed(&mut world, "host1", 400, 0);
    pressed(&mut world, "host2", 300, 0);
    let begun = moves(&world);
    assert_eq!(begun[0].0, "b host3", "host2 is nearly as tight");
    assert!(begun[0].1.contains("work on host1 waits for a CPU 40 % of the time"), "{begun:?}");
    pressed(&mut world, "host3", 300, 0);
    assert!(moves(&world).is_empty(), "it would wait there as well");
}

#[test]
fn a_host_that_lacks_memory_gives_some_of_it_away() {
    let mut world = world(&[("a", "host1", 100), ("b", "host1", 100)]);
    let mut load = (*world.snapshot.loads["host1"].value).clone();
    for (vm, gib) in [("a", 2), ("b", 5)] {
        load.vms.get_mut(vm).unwrap().memory = Bytes::gib(gib);
    }
    load.pressure = Some(Pressure { cpu: 0, memory: 150 });
    world.snapshot.loads.insert(name("host1"), at(8, load));
    let begun = moves(&world);
    assert_eq!(begun[0].0, "a host2", "with b gone the other host would be the fuller one");
    assert!(begun[0].1.contains("work on host1 waits for memory 15 % of the time"), "{begun:?}");
}

#[test]
fn after_a_move_all_is_measured_anew_and_what_moved_stays_for_long() {
    let mut world = busy();
    let ended = |world: &mut World, vm: &str, ago: u64, balances: bool| {
        let at_ms = world.seen.now_ms - i64::try_from(ago).unwrap();
        let outcome = MigrationOutcome { at_ms, moved: true, message: String::new() };
        let migration = Migration {
            id: "m".into(),
            from: name("host3"),
            to: None,
            options: MigrationOptions::default(),
            by: "balancing".into(),
            at_ms,
            drain: None,
            balances,
            outcome: Some(outcome),
        };
        world.snapshot.migrations.insert(name(vm), at(9, migration));
    };
    world.seen.now_ms = 100_000_000;
    for host in ["host1", "host2", "host3"] {
        let mut load = (*world.snapshot.loads[host].value).clone();
        load.at_ms = world.seen.now_ms;
        world.snapshot.loads.insert(name(host), at(8, load));
    }
    ended(&mut world, "wiki", WINDOW.0 - 1000, true);
    assert!(moves(&world).is_empty());
    let why = "what came of the last move is measured first: 1 s more";
    assert_eq!(told(&world).rests.as_deref(), Some(why));
    ended(&mut world, "wiki", WINDOW.0, true);
    assert_eq!(moves(&world)[0].0, "mail host2");
    // It was moved for balance itself, and not so long ago: another one goes.
    ended(&mut world, "mail", 12 * WINDOW.0 - 1, true);
    assert_eq!(moves(&world)[0].0, "db host2");
    ended(&mut world, "mail", 12 * WINDOW.0, true);
    assert_eq!(moves(&world)[0].0, "mail host2");
    // What a person moved is measured first as well, and does not stay for long.
    ended(&mut world, "mail", 1000, false);
    assert!(moves(&world).is_empty());
    ended(&mut world, "mail", WINDOW.0, false);
    assert_eq!(moves(&world)[0].0, "mail host2");
}

#[test]
fn nothing_moves_for_balance_beside_what_matters_more() {
    let held = |change: &dyn Fn(&mut World)| {
        let mut world = busy();
        change(&mut world);
        assert!(moves(&world).is_empty());
        told(&world).held.unwrap_or_default()
    };
    let suspected = |world: &mut World| _ = world.seen.suspected.insert(name("host3"));
    assert_eq!(held(&suspected), "nothing is moved for balance while host3 is suspected");
    let silent = |world: &mut World| world.silent("host3", 2000, false);
    assert_eq!(held(&silent), "nothing is moved for balance while host3 is silent for 2.0 s");
    let drain = Drain {
        id: "d".into(),
        by: "ann".into(),
        at_ms: 1,
        drained_ms: None,
        bringing_back: false,
    };
    let draining = |world: &mut World| {
        world.snapshot.drains.insert(name("host3"), at(9, drain.clone()));
    };
    // A proof that comes just now: nobody suspects the host yet.
    let mut world = busy();
    world.seen.powered_off.insert(name("host3"), 1);
    assert!(moves(&world).is_empty());
    // The drain's own move begins; the one for balance does not.
    let mut world = busy();
    draining(&mut world);
    let why = "nothing is moved for balance while host3 is draining";
    assert_eq!(told(&world).held.as_deref(), Some(why));
    let incident = |world: &mut World| {
        let incident: Incident = serde_json::from_value(serde_json::json!({
            "number": 7, "title": "host9 was lost", "host": "host9", "session": 1, "waiting_for": [], "steps": [],
            "closed_ms": null,
        }))
        .unwrap();
        world.snapshot.incidents.insert(7, at(9, incident));
    };
    assert!(held(&incident).starts_with("nothing is moved for balance before incident 7 is over"));
    let unreadable = |world: &mut World| {
        world.snapshot.unreadable.insert("spec/pool/new".into(), 9);
    };
    assert!(held(&unreadable).contains("the record spec/pool/new cannot be read"));
}

#[test]
fn what_is_not_measured_now_is_neither_relieved_nor_given_more() {
    let stale = |change: &dyn Fn(&mut HostLoad)| {
        let mut world = busy();
        let mut load = (*world.snapshot.loads["host2"].value).clone();
        change(&mut load);
        world.snapshot.loads.insert(name("host2"), at(8, load));
        assert_eq!(told(&world).hosts[1].cpu, None);
        moves(&world)[0].0.clone()
    };
    assert_eq!(stale(&|load| load.session = 0), "mail host3");
    assert_eq!(stale(&|load| load.at_ms -= 6 * WINDOW.0 as i64), "mail host3");
    assert_eq!(stale(&|load| load.over = Millis(WINDOW.0 / 2)), "mail host3");
    // A VM that has just come is not known well enough.
    let mut world = busy();
    let mut load = (*world.snapshot.loads["host1"].value).clone();
    load.vms.get_mut("mail").unwrap().over = Millis(1000);
    world.snapshot.loads.insert(name("host1"), at(8, load));
    assert_eq!(moves(&world)[0].0, "db host2");
}

#[test]
fn no_wish_and_no_reserve_is_given_up_for_balance() {
    let mut world = busy();
    // `mail` and `web` keep apart, and so `mail` goes where `web` is not.
    let mut apart = stored("mail", vm_spec(Bytes::gib(1)));
    apart.spec.affinity.apart = [("app".to_owned(), "web".to_owned())].into();
    world.snapshot.vms.insert(name("mail"), at(4, apart));
    let mut web = stored("web", vm_spec(Bytes::gib(1)));
    web.meta.labels.insert("app".into(), "web".into());
    world.snapshot.vms.insert(name("web"), at(4, web));
    assert_eq!(moves(&world)[0].0, "db host2");
    // Hosts of 16 GiB. With `mail` on `host2` nobody could take `wiki` if `host3` were lost.
    let mut world = busy();
    for (vm, gib) in [("web", 2), ("wiki", 10), ("mail", 5), ("db", 9)] {
        world.snapshot.vms.insert(name(vm), at(4, stored(vm, vm_spec(Bytes::gib(gib)))));
    }
    assert_eq!(crate::losses(&world.snapshot, &world.seen).vms, 1);
    assert_eq!(moves(&world)[0].0, "db host2");
    assert_eq!(told(&world).moves[0].vm.as_str(), "db");
}

proptest! {
    /// However the work is spread: moving on until nothing more moves ends, moves nothing twice, and each move leaves
    /// the busiest host of the two less busy by what it promises.
    #[test]
    fn moves_come_to_an_end(work in prop::collection::vec((0_usize..3, 0_u32..6000), 1..14)) {
        let names: Vec<String> = (0..work.len()).map(|i| format!("vm-{i:02}")).collect();
        let hosts = ["host1", "host2", "host3"];
        let vms: Vec<(&str, &str, u32)> = work
            .iter()
            .zip(&names)
            .map(|((host, cpu), vm)| (vm.as_str(), hosts[*host], *cpu))
            .collect();
        let world = world(&vms);
        let told = told(&world);
        let mut seen = std::collections::BTreeSet::new();
        let mut busy: std::collections::BTreeMap<&str, u32> = hosts.iter().map(|h| (*h, 0)).collect();
        for (_, host, cpu) in &vms {
            *busy.get_mut(host).unwrap() += cpu;
        }
        for step in &told.moves {
            prop_assert!(seen.insert(step.vm.clone()), "{} twice: {told:?}", step.vm);
            let cpu = vms.iter().find(|(vm, ..)| step.vm.as_str() == *vm).unwrap().2;
            let (from, to) = (step.from.as_str(), step.to.as_str());
            let most = busy[from].max(busy[to]);
            *busy.get_mut(from).unwrap() -= cpu;
            *busy.get_mut(to).unwrap() += cpu;
            let after = busy[from].max(busy[to]);
            prop_assert!(most >= after + 780, "{most} {after} {step:?}");
        }
    }
}

#[test]
fn what_was_changed_is_not_moved_for_balance() {
    let mut world = busy();
    let mut status = (*world.snapshot.vm_status["mail"].value).clone();
    status.started_with = world.snapshot.vms["mail"].spec.hardware();
    world.snapshot.vm_status.insert(name("mail"), at(4, status));
    let mut spec = world.snapshot.vms["mail"].spec.clone();
    let disk = serde_json::json!({"name": "root", "size": "1GiB", "pool": "fast"});
    spec.disks = vec![serde_json::from_value(disk).unwrap()];
    world.vm("mail", spec);
    let begun = moves(&world);
    assert!(begun.iter().all(|(what, _)| !what.starts_with("mail")), "{begun:?}");
}
