//! Tests of [`super::steps::keep`].

use super::steps::{Around, Keep, keep};
use crate::vm::mirrors::{Catching, DiskMirror, Linked, Print};
use haven_model::{
    Bytes, Name,
    volume::{
        ReplicaState::{self, Counted, Returning, Stale},
        Volume,
    },
};
use std::collections::BTreeSet;

fn name(host: &str) -> Name {
    Name::new(host).unwrap()
}

fn volume(second: ReplicaState) -> Volume {
    let mut volume = Volume::new("u1".into(), name("pool"), Bytes::gib(1), [name("host1")]);
    volume.run = 4;
    volume.with(&name("host2"), second)
}

fn print(instance: &str) -> Print {
    Print::of("boot", instance)
}

fn linked(broken: bool, catching: Catching) -> DiskMirror {
    let linked = Linked { print: print("one"), broken, catching };
    DiskMirror { linked: [(name("host2"), linked)].into(), stopped: broken }
}

fn around(served: Option<&str>, silent: bool) -> Around {
    Around {
        leaves: false,
        served: served.map(|instance| (name("host2"), print(instance))).into_iter().collect(),
        silent: if silent { BTreeSet::from([name("host2")]) } else { BTreeSet::new() },
    }
}

fn next(volume: &Volume, disk: &DiskMirror, around: &Around) -> Keep {
    keep(volume, &name("host1"), disk, around)
}

fn without() -> DiskMirror {
    DiskMirror::default()
}

#[test]
fn a_replica_that_fails_is_left_out_only_once_it_counts_no_more() {
    let broken = linked(true, Catching::Not);
    let lost = BTreeSet::from([name("host2")]);
    let step = next(&volume(Counted), &broken, &around(Some("one"), false));
    assert_eq!(step, Keep::Write(lost.clone(), volume(Stale)));
    let step = next(&volume(Stale), &broken, &around(Some("one"), false));
    assert_eq!(step, Keep::LeaveOut(name("host2")));
    // Left out, its guest stands until it is let run.
    let stopped = DiskMirror { stopped: true, ..without() };
    assert_eq!(next(&volume(Stale), &stopped, &around(None, false)), Keep::GoOn);
    assert_eq!(next(&volume(Stale), &without(), &around(None, false)), Keep::Well);
    // The same for one that is served by another process by now, before any write fails.
    let well = linked(false, Catching::Not);
    let step = next(&volume(Counted), &well, &around(Some("another"), false));
    assert_eq!(step, Keep::Write(lost, volume(Stale)));
    assert_eq!(next(&volume(Counted), &well, &around(Some("one"), false)), Keep::Well);
    assert_eq!(next(&volume(Counted), &well, &around(None, false)), Keep::Well, "not known yet");
}

#[test]
fn one_that_is_silent_is_cut_before_anything_waits_for_it() {
    let well = linked(false, Catching::Not);
    let step = next(&volume(Counted), &well, &around(Some("one"), true));
    assert_eq!(step, Keep::Cut(BTreeSet::from([name("host2")])));
    // Nor is it taken in again before it is heard.
    assert_eq!(next(&volume(Stale), &without(), &around(Some("one"), true)), Keep::Well);
}

#[test]
fn one_that_returns_is_announced_taken_in_copied_to_and_then_counts() {
    let back = around(Some("one"), false);
    let said = Keep::Write(BTreeSet::new(), volume(Returning));
    assert_eq!(next(&volume(Stale), &without(), &back), said);
    assert_eq!(next(&volume(Returning), &without(), &back), Keep::TakeIn(name("host2")));
    let goes = linked(false, Catching::Goes { total: 9, done: 3 });
    assert_eq!(next(&volume(Returning), &goes, &back), Keep::Well);
    let done = linked(false, Catching::Done);
    assert_eq!(next(&volume(Returning), &done, &back), Keep::Count(name("host2"), volume(Counted)));
    assert_eq!(next(&volume(Counted), &done, &back), Keep::Settle(name("host2")));
}

/// That it counts may be on its way to the store: it is left out only over that.
#[test]
fn one_that_was_announced_is_left_out_only_once_that_was_taken_back() {
    let back = around(Some("one"), false);
    let taken_back = Keep::Write(BTreeSet::new(), volume(Stale));
    assert_eq!(next(&volume(Returning), &linked(true, Catching::Done), &back), taken_back);
    let broke = linked(false, Catching::Broke("no way".into()));
    assert_eq!(next(&volume(Returning), &broke, &back), taken_back);
    assert_eq!(next(&volume(Returning), &linked(false, Catching::Not), &back), taken_back);
    assert_eq!(next(&volume(Returning), &without(), &around(None, false)), taken_back);
    assert_eq!(next(&volume(Stale), &broke, &back), Keep::LeaveOut(name("host2")));
}

#[test]
fn a_guest_goes_over_only_with_all_that_count_whole_and_nothing_under_way() {
    let (me, well) = (name("host1"), linked(false, Catching::Not));
    let why = |volume: &Volume, disk: &DiskMirror, around: &Around| {
        super::steps::unlike(volume, &me, disk, around)
    };
    let back = around(Some("one"), false);
    assert_eq!(why(&volume(Counted), &well, &back), None);
    assert_eq!(why(&volume(Stale), &without(), &back), None);
    let failed = "its replica on host2 has just failed";
    assert_eq!(why(&volume(Counted), &linked(true, Catching::Not), &back).as_deref(), Some(failed));
    assert_eq!(why(&volume(Counted), &without(), &back).as_deref(), Some(failed));
    let another = around(Some("another"), false);
    assert_eq!(why(&volume(Counted), &well, &another).as_deref(), Some(failed));
    let goes = linked(false, Catching::Goes { total: 9, done: 3 });
    let said = why(&volume(Returning), &goes, &back).unwrap();
    assert!(said.contains("on host2 is being brought up"), "{said}");
    let stopped = DiskMirror { stopped: true, ..without() };
    assert_eq!(why(&volume(Stale), &stopped, &back), None, "what it waits to write goes with it");
    // Nor is a copy begun that would not come to its end.
    let leaves = Around { leaves: true, ..back };
    assert_eq!(next(&volume(Stale), &without(), &leaves), Keep::Well);
    assert_eq!(
        next(&volume(Returning), &without(), &leaves),
        Keep::Write(BTreeSet::new(), volume(Stale))
    );
}

/// Nobody wrote since its guest stood still: all that count stay, and only who does not serve it in time is left out.
#[test]
fn who_takes_a_guest_over_keeps_all_replicas_that_count() {
    use super::steps::{Open, Other, arrive};
    let (me, other) = (name("host1"), name("host2"));
    let volume = volume(Counted);
    let begun = volume.run + 1;
    let Open::Write(next) = arrive(&volume, &me, None, &[].into()) else { panic!("a new run") };
    assert_eq!((next.run, next.clean, next.counts(&other)), (begun, false, true));
    let waits =
        arrive(&next, &me, Some(begun), &[(other.clone(), Other::Serves(begun - 1))].into());
    assert_eq!(waits, Open::Wait(BTreeSet::from([other.clone()])));
    let with = arrive(&next, &me, Some(begun), &[(other.clone(), Other::Serves(begun))].into());
    assert_eq!(with, Open::With(BTreeSet::from([other.clone()])));
    let gone = arrive(&next, &me, Some(begun), &[(other.clone(), Other::Gone)].into());
    assert_eq!(gone, Open::Write(next.without([&other])));
    assert!(!next.without([&other]).clean);
    assert_eq!(arrive(&volume.without([&me]), &me, None, &[].into()), Open::NotHere);
}

#[test]
fn one_that_the_plan_gave_elsewhere_is_left_out() {
    let mut gone = volume(Counted);
    gone.replicas.remove(&name("host2"));
    let step = next(&gone, &linked(false, Catching::Not), &around(Some("one"), false));
    assert_eq!(step, Keep::LeaveOut(name("host2")));
}

#[test]
fn what_was_shut_to_its_process_is_no_more_its_to_say() {
    assert_eq!(volume(Counted).shut_out(), None, "nobody has it open");
    let open_there = Volume { clean: false, ..volume(Counted) };
    let volume = open_there.shut_out().unwrap();
    assert_eq!((volume.run, volume.shut), (5, true));
    assert_eq!(volume.shut_out(), None, "once is enough");
    for disk in [linked(false, Catching::Not), linked(true, Catching::Not), without()] {
        assert_eq!(next(&volume, &disk, &around(Some("one"), true)), Keep::End);
    }
    use super::steps::{Open, arrive, closed, open};
    let (me, other) = (name("host1"), name("host2"));
    assert_eq!(
        closed(&volume, &me, &[other.clone()].into()),
        None,
        "it may have ended in the middle"
    );
    // Its owner begins a run of its own, whatever it had begun before; nobody else is known to have the same.
    for begun in [None, Some(4), Some(5)] {
        for step in [open(&volume, &me, begun, &[].into()), arrive(&volume, &me, begun, &[].into())]
        {
            let Open::Write(next) = step else { panic!("a new run") };
            assert_eq!((next.run, next.shut, next.counts(&other)), (6, false, false));
        }
    }
}
