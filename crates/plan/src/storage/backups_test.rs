//! Tests of [`super::backups`].

use super::backups::BY_SCHEDULE;
use crate::{
    plan,
    testing::{World, at, name, stored},
};
use haven_model::{
    Action, Bytes, Object, TargetSpec, VmPhase, VmSpec,
    backup::{BackupRun, TaskOutcome},
};
use proptest::prelude::*;
use serde_json::json;

const HOUR: i64 = 3_600_000;

/// VMs that are to be backed up every hour, all on one host of two.
fn world(vms: &[&str]) -> World {
    let mut world = World::new(2, Bytes::gib(64));
    world.current();
    world.seen.now_ms = 1_000 * HOUR;
    let target = TargetSpec { directory: Some("/backups".into()), s3: None };
    world.snapshot.targets.insert(name("nas"), at(3, stored("nas", target)));
    for vm in vms {
        let spec = json!({
            "memory": "1GiB", "disks": [{"name": "data", "size": "10GiB", "pool": "disks"}],
            "backup": {"to": "nas", "every": "1h"},
        });
        world.vm(vm, serde_json::from_value::<VmSpec>(spec).unwrap());
        world.run(vm, "host1");
    }
    world
}

/// The VMs whose backups a plan begins, and who asks for them.
fn begun(world: &World) -> Vec<(String, BackupRun)> {
    let actions = plan(&world.snapshot, &world.seen).actions.into_iter();
    actions
        .filter_map(|planned| match planned.action {
            Action::PutBackup { vm, run, .. } => Some((vm.to_string(), *run)),
            _ => None,
        })
        .collect()
}

fn waits(world: &World) -> String {
    let waiting = plan(&world.snapshot, &world.seen).waiting;
    waiting.iter().map(|one| one.reason.clone()).collect::<Vec<_>>().join("\n")
}

/// Writes the record of a backup that began and ended so long ago.
fn was(world: &mut World, vm: &str, begun_ms: i64, outcome: Option<(i64, bool)>) {
    let uid = world.snapshot.vms[vm].meta.uid.clone();
    let now = world.seen.now_ms;
    let run = BackupRun::new(&uid, name("nas"), BY_SCHEDULE.into(), now - begun_ms, None);
    let run = match outcome {
        Some((ago, well)) => run.ended(now - ago, well, "said".into()),
        None => run,
    };
    world.snapshot.backups.insert(name(vm), at(9, run));
}

#[test]
fn what_was_never_backed_up_is_at_once_one_at_a_time_on_each_host() {
    let mut world = world(&["db", "web"]);
    let first = begun(&world);
    assert_eq!(first.len(), 1, "{first:?}");
    assert_eq!((first[0].0.as_str(), first[0].1.by.as_str()), ("db", "schedule"));
    assert_eq!(first[0].1.id, "19700211T160000Z");
    assert!(waits(&world).contains("web is backed up after another VM of host1"));
    was(&mut world, "db", 1000, None);
    assert!(begun(&world).is_empty(), "the other one goes on");
    was(&mut world, "db", 1000, Some((0, true)));
    assert_eq!(begun(&world)[0].0, "web");
}

#[test]
fn the_next_one_is_due_an_hour_after_the_last_good_one_began() {
    let mut world = world(&["db"]);
    was(&mut world, "db", HOUR - 1000, Some((0, true)));
    assert!(begun(&world).is_empty());
    assert!(plan(&world.snapshot, &world.seen).wake_after_ms.is_some_and(|ms| ms <= 1000));
    world.seen.now_ms += 1000;
    let next = begun(&world);
    assert_eq!(next.len(), 1);
    assert_eq!(next[0].1.good_ms[&name("nas")], world.seen.now_ms - HOUR, "it is remembered");
}

#[test]
fn one_that_failed_is_tried_again_after_ten_minutes() {
    let mut world = world(&["db"]);
    was(&mut world, "db", 30 * 60_000, Some((9 * 60_000, false)));
    assert!(begun(&world).is_empty());
    world.seen.now_ms += 60_000;
    assert_eq!(begun(&world).len(), 1);
}

#[test]
fn a_backup_to_elsewhere_and_one_of_an_earlier_vm_do_not_count() {
    let mut world = world(&["db"]);
    was(&mut world, "db", 1000, Some((0, true)));
    let mut other = (*world.snapshot.backups["db"].value).clone();
    other.good_ms = [(name("tape"), world.seen.now_ms)].into();
    other.to = name("tape");
    world.snapshot.backups.insert(name("db"), at(9, other.clone()));
    assert_eq!(begun(&world).len(), 1, "none has come to nas");
    other.good_ms = [(name("nas"), world.seen.now_ms)].into();
    other.vm_uid = "another".into();
    other.outcome = None;
    world.snapshot.backups.insert(name("db"), at(9, other));
    let next = begun(&world);
    assert!(next[0].1.good_ms.is_empty(), "it was of a VM that is gone: {next:?}");
}

#[test]
fn one_that_neither_runs_nor_rests_is_left_alone_and_keeps_nobody_waiting() {
    let mut world = world(&["db", "web"]);
    let mut told = (*world.snapshot.vm_status["db"].value).clone();
    told.phase = VmPhase::Failed;
    world.snapshot.vm_status.insert(name("db"), at(9, told));
    assert_eq!(begun(&world)[0].0, "web");
    was(&mut world, "db", 1000, None);
    assert_eq!(begun(&world)[0].0, "web", "what was asked of it before does not count");
}

#[test]
fn a_vm_that_has_run_forgets_the_backup_that_it_was_made_from() {
    let mut world = world(&["db"]);
    let mut spec = world.snapshot.vms["db"].spec.clone();
    let from = json!({"target": "nas", "vm": "old", "id": "b1", "disk": "data"});
    spec.disks[0].backup = Some(serde_json::from_value(from).unwrap());
    world.vm("new", spec.clone());
    let forgets = |world: &World| {
        let actions = plan(&world.snapshot, &world.seen).actions.into_iter();
        let put = actions.filter_map(|planned| match planned.action {
            Action::PutObject { object, .. } => Some(*object),
            _ => None,
        });
        put.collect::<Vec<_>>()
    };
    assert!(forgets(&world).is_empty(), "its disks may not be made yet");
    assert_eq!(world.snapshot.made_from(&name("nas"), &name("old"), "b1"), Some(&name("new")));
    world.run("new", "host1");
    let mut now = forgets(&world);
    assert_eq!(now.len(), 1, "{now:?}");
    let Object::Vm(now) = now.remove(0) else { panic!("a VM") };
    assert_eq!(now.spec.disks[0].backup, None);
    assert_eq!(now.spec.hardware(), spec.hardware(), "nothing of the machine has changed");
    // One that its guest has not seen is yet to be made from it.
    let mut later = world.snapshot.vms["new"].clone();
    let mut object = (*later.value).clone();
    object.spec.disks[0].detached = true;
    later.value = std::sync::Arc::new(object);
    world.snapshot.vms.insert(name("new"), later);
    assert!(forgets(&world).is_empty());
    assert_eq!(world.snapshot.made_from(&name("nas"), &name("old"), "b1"), Some(&name("new")));
    world.vm("new", now.spec);
    assert_eq!(world.snapshot.made_from(&name("nas"), &name("old"), "b1"), None);
}

#[test]
fn what_cannot_be_backed_up_says_why() {
    let mut lacks = world(&["db"]);
    lacks.snapshot.targets.clear();
    assert!(begun(&lacks).is_empty());
    assert!(waits(&lacks).contains("there is no such target"), "{}", waits(&lacks));
    let mut older = world(&["db"]);
    let mut told = (*older.snapshot.host_status["host1"].value).clone();
    told.speaks = 4;
    older.snapshot.host_status.insert(name("host1"), at(9, told));
    assert!(begun(&older).is_empty());
    assert!(waits(&older).contains("host1 runs an older Haven"), "{}", waits(&older));
}

proptest! {
    /// Whatever happened before: never two at once on a host, never one beside one that goes on, and always one in the end.
    #[test]
    fn there_is_one_at_a_time_and_always_a_next(
        past in prop::collection::vec((0i64..200, prop::option::of((0i64..100, any::<bool>()))), 3),
    ) {
        let vms = ["a", "b", "c"];
        let mut world = world(&vms);
        for (vm, (begun_min, outcome)) in vms.iter().zip(past) {
            let outcome = outcome.map(|(ago, well)| (ago.min(begun_min) * 60_000, well));
            was(&mut world, vm, begun_min * 60_000, outcome);
        }
        let mut made = std::collections::BTreeSet::new();
        for _ in 0..400 {
            let goes_on = world.snapshot.backups.values().filter(|r| r.outcome.is_none()).count();
            let next = begun(&world);
            prop_assert!(next.len() + goes_on.min(1) <= 1, "{next:?} beside {goes_on}");
            for (vm, run) in next {
                world.snapshot.backups.insert(name(&vm), at(10, run));
                made.insert(vm);
            }
            world.seen.now_ms += 60_000;
            // Those that went on from before end as well.
            let now = world.seen.now_ms;
            for run in world.snapshot.backups.values_mut() {
                if run.outcome.is_none() {
                    let mut ended = run.ended(now, true, "said".into());
                    ended.outcome = Some(TaskOutcome { at_ms: now, well: true, message: "said".into() });
                    *run = at(11, ended);
                }
            }
        }
        prop_assert_eq!(made.len(), 3);
    }
}
