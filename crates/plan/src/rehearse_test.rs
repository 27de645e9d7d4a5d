//! Tests of rehearsals.

use crate::{
    Event, rehearse,
    testing::{World, at, name, vm_spec},
};
use haven_model::{
    Bytes, HostStatus, Incident, IncidentStep, Name, Observations, Snapshot, api::Rehearsal,
};
use std::collections::BTreeSet;

fn fail(hosts: &[&str]) -> Event {
    Event::Fail(hosts.iter().map(|host| name(host)).collect::<BTreeSet<Name>>())
}

/// Three hosts of 8 GiB; host1 runs `small` and `large`, host2 `other`.
fn world() -> World {
    let mut world = World::new(3, Bytes::gib(8));
    for (vm, gib, host) in [("small", 1, "host1"), ("large", 5, "host1"), ("other", 4, "host2")] {
        world.vm(vm, vm_spec(Bytes::gib(gib)));
        world.run(vm, host);
    }
    world
}

fn line<'a>(of: &'a Rehearsal, vm: &str) -> &'a haven_model::api::RehearsedVm {
    of.vms.iter().find(|line| line.vm.as_str() == vm).unwrap_or_else(|| panic!("{of:?}"))
}

#[test]
fn a_failure_is_played_with_the_timers_where_nothing_was_measured() {
    let world = world();
    let told = rehearse(&world.snapshot, &world.seen, &fail(&["host1"]));
    let large = line(&told, "large");
    assert_eq!(large.from, Some(name("host1")));
    assert_eq!(large.to, Some(name("host3")), "the only one with room for it");
    // The lease, the placement, the start.
    assert_eq!(large.after_ms, Some(5_000 + 50 + 1_000));
    assert!(line(&told, "small").to.is_some());
    assert!(!told.vms.iter().any(|line| line.vm.as_str() == "other"), "it is not concerned");
    let said: Vec<&str> = told.steps.iter().map(|step| step.message.as_str()).collect();
    assert_eq!(said[0], "host1 is suspected");
    assert!(said[1].starts_with("host1 is lost: its lease was not renewed for 5.0 s"), "{said:?}");
    assert!(said.iter().any(|s| s.starts_with("large restarts on host3 because host1 is lost")));
    assert_eq!(*said.last().unwrap(), "small runs on host2");
    assert!(told.figures.starts_with("nothing was measured here yet"));
}

#[test]
fn who_does_not_fit_is_told_with_the_arithmetic() {
    let mut world = world();
    world.vm("other", vm_spec(Bytes::gib(6)));
    world.vm("more", vm_spec(Bytes::gib(6)));
    world.run("more", "host3");
    let told = rehearse(&world.snapshot, &world.seen, &fail(&["host1"]));
    let large = line(&told, "large");
    assert_eq!((&large.to, large.after_ms), (&None, None));
    assert!(large.why.starts_with("waiting: large needs 5GiB, largest free is"), "{}", large.why);
    assert!(line(&told, "small").after_ms.is_some(), "that keeps nobody else waiting");
}

/// An incident in which the proof took 7 s, the placement 0.1 s, a start 2 s.
fn learn(world: &mut World) {
    let step = |at_ms, phase: &str, of: &str, message: &str| IncidentStep {
        at_ms,
        phase: phase.into(),
        object: World::reference(of),
        message: message.into(),
    };
    let proof = "host2 is proven lost: its lease expired, its guard has stopped its VMs";
    let incident = Incident {
        vm: None,
        number: 3,
        title: "host2 was lost".into(),
        host: name("host2"),
        session: 1,
        waiting_for: vec![],
        steps: vec![
            step(1_000, "failed", "host/host2", ""),
            step(8_000, "proof", "host/host2", proof),
            step(8_100, "placed", "vm/small", ""),
            step(10_100, "started", "vm/small", ""),
        ],
        closed_ms: Some(10_100),
    };
    world.snapshot.incidents.insert(3, at(60, incident));
}

#[test]
fn times_are_those_of_past_incidents() {
    let mut world = world();
    learn(&mut world);
    let told = rehearse(&world.snapshot, &world.seen, &fail(&["host1"]));
    assert_eq!(line(&told, "small").after_ms, Some(7_000 + 100 + 2_000));
    assert!(told.figures.contains("medians of 1 past incidents"), "{}", told.figures);
}

#[test]
fn a_drain_is_played_and_leaves_the_host_empty() {
    let world = world();
    let told = rehearse(&world.snapshot, &world.seen, &Event::Drain(name("host1")));
    for vm in ["small", "large"] {
        let line = line(&told, vm);
        assert!(line.to.is_some() && line.to != line.from && line.after_ms.is_some(), "{line:?}");
    }
    assert_eq!(told.steps.last().unwrap().message, "host1 is drained: no VM runs there any more");
    assert!(told.ends_after_ms > 1_000, "{told:?}");
}

#[test]
fn what_blocks_a_drain_is_told() {
    let mut world = world();
    let mut spec = vm_spec(Bytes::gib(1));
    spec.affinity.hosts.insert("ssd".into(), "yes".into());
    world.vm("small", spec);
    let told = rehearse(&world.snapshot, &world.seen, &Event::Drain(name("host1")));
    let small = line(&told, "small");
    assert_eq!((small.to.clone(), small.after_ms), (Some(name("host1")), None));
    assert!(small.why.contains("lacks the labels"), "{}", small.why);
}

#[test]
fn without_a_majority_of_the_store_nothing_starts() {
    let mut world = world();
    for (i, host) in ["host1", "host2", "host3"].into_iter().enumerate() {
        let old = world.snapshot.host_status[host].clone();
        let status = HostStatus { etcd_member: Some(i as u64), ..(*old.value).clone() };
        world.snapshot.host_status.insert(name(host), at(2, status));
    }
    let told = rehearse(&world.snapshot, &world.seen, &fail(&["host1", "host3"]));
    assert_eq!(told.vms.len(), 3);
    assert!(
        told.vms.iter().all(|line| line.to.is_none() && line.why.starts_with("1 of 3 members"))
    );
}

#[test]
fn nothing_of_the_snapshot_changes() {
    let world = world();
    let before = serde_json::to_string(&world.snapshot).unwrap();
    let seen: Observations = world.seen.clone();
    let snapshot: &Snapshot = &world.snapshot;
    let (one, two) = (
        rehearse(snapshot, &seen, &fail(&["host1"])),
        rehearse(snapshot, &seen, &fail(&["host1"])),
    );
    assert_eq!(one, two);
    assert_eq!(serde_json::to_string(snapshot).unwrap(), before);
    assert_eq!(seen, world.seen);
}
