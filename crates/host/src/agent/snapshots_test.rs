//! A host takes, reverts to and removes snapshots of the VMs that are placed on it; the VMs are fakes, in virtual time.

use super::{
    fixture::{Fixture, name},
    storage::SnapshotStep,
};
use haven_model::{
    Name,
    backup::Moment,
    keys,
    object::Kind,
    vm_snapshot::{SnapshotDisk, SnapshotState, VmSnapshot},
};
use serde_json::json;

const UID: &str = "u-db";

/// A VM with two disks, in two pools; a daemon for it.
async fn world() -> Fixture {
    let mut fixture = Fixture::new().await;
    fixture.object(Kind::Host, "host1", json!({"address": "10.0.0.1"})).await;
    fixture.put(&keys::lease(&name("host1")), &json!({"session": 1, "count": 1})).await;
    fixture.object(Kind::Pool, "filer", json!({"driver": "shared", "path": "/pools/filer"})).await;
    fixture.vm("db", "good", disks(true)).await;
    write(&fixture, 1);
    fixture.start();
    fixture.pass(2).await;
    assert!(fixture.runs("db"));
    fixture
}

fn disks(running: bool) -> serde_json::Value {
    json!({"running": running, "restart": "always", "disks": [
        {"name": "root", "pool": "fast", "size": "1GiB"}, {"name": "data", "pool": "filer", "size": "1GiB"},
    ]})
}

/// Its guest writes to both of its disks.
fn write(fixture: &Fixture, what: u8) {
    fixture
        .world
        .disks
        .put("db", vec![("root".into(), vec![what; 8]), ("data".into(), vec![what; 4])]);
}

/// What its disks hold.
fn holds(fixture: &Fixture) -> Vec<u8> {
    fixture.world.disks.content("db").into_iter().map(|(_, content)| content[0]).collect()
}

fn asked(id: &str, of: &[&str]) -> VmSnapshot {
    let pool = |disk: &str| if disk == "root" { name("fast") } else { name("filer") };
    let disk = |disk: &&str| SnapshotDisk {
        name: name(disk),
        pool: pool(disk),
        size: haven_model::Bytes(0),
        copies: Vec::new(),
    };
    VmSnapshot {
        id: id.into(),
        vm: name("db"),
        by: "root".into(),
        at_ms: 1,
        disks: of.iter().map(disk).collect(),
        state: SnapshotState::Wanted,
        of_ms: None,
        moment: None,
        back: Vec::new(),
        reverted_ms: None,
        copy: None,
        failed: None,
        scheduled: false,
        made_for: None,
        message: String::new(),
    }
}

async fn put(fixture: &Fixture, called: &str, record: &VmSnapshot) {
    let key = keys::vm_snapshot(UID, &name(called));
    fixture.put(&key, &serde_json::to_value(record).unwrap()).await;
}

async fn ask(fixture: &Fixture, called: &str) {
    put(fixture, called, &asked(called, &["root", "data"])).await;
    fixture.pass(5).await;
}

fn found(fixture: &Fixture, called: &str) -> Option<VmSnapshot> {
    let value = fixture.peek(&keys::vm_snapshot(UID, &name(called)))?;
    Some(serde_json::from_value(value).unwrap())
}

fn is(fixture: &Fixture, called: &str) -> VmSnapshot {
    found(fixture, called).unwrap()
}

/// It is to be otherwise from now on.
async fn turn(fixture: &Fixture, called: &str, state: SnapshotState) {
    let back: Vec<Name> = match state {
        SnapshotState::Reverting => {
            is(fixture, called).disks.into_iter().map(|disk| disk.name).collect()
        }
        _ => Vec::new(),
    };
    let record = VmSnapshot { state, back, message: String::new(), ..is(fixture, called) };
    put(fixture, called, &record).await;
}

async fn run(fixture: &Fixture, runs: bool) {
    let mut spec = json!({"memory": "64MiB", "networks": [{"network": "good"}]});
    spec.as_object_mut().unwrap().extend(disks(runs).as_object().cloned().unwrap());
    fixture.object(Kind::Vm, "db", spec).await;
    fixture.pass(3).await;
    assert_eq!(fixture.runs("db"), runs);
}

fn kept(fixture: &Fixture, tag: &str) -> Vec<bool> {
    let has = |disk: &&str| fixture.world.kept.content("db", disk, tag).is_some();
    ["root", "data"].iter().map(has).collect()
}

#[tokio::test(start_paused = true)]
async fn one_is_taken_of_all_disks_reverted_to_at_rest_and_removed() {
    let fixture = world().await;
    ask(&fixture, "first").await;
    let first = is(&fixture, "first");
    assert_eq!(
        (first.state, first.moment, first.of_ms),
        (SnapshotState::There, Some(Moment::Running), Some(7))
    );
    assert_eq!(first.disks.iter().map(|disk| disk.size.0).collect::<Vec<_>>(), [8, 4]);
    fixture.world.kept.freeze();
    write(&fixture, 2);
    ask(&fixture, "second").await;
    assert_eq!(is(&fixture, "second").moment, Some(Moment::Frozen));
    write(&fixture, 3);
    run(&fixture, false).await;
    ask(&fixture, "third").await;
    assert_eq!(is(&fixture, "third").moment, Some(Moment::Stopped));
    for (called, held) in [("first", 1), ("third", 3), ("second", 2)] {
        turn(&fixture, called, SnapshotState::Reverting).await;
        fixture.pass(5).await;
        let of = is(&fixture, called);
        assert_eq!((of.state, of.back.len(), of.reverted_ms), (SnapshotState::There, 0, Some(1)));
        assert_eq!(holds(&fixture), [held, held]);
    }
    run(&fixture, true).await;
    // While it runs and while it does not.
    turn(&fixture, "first", SnapshotState::Going).await;
    fixture.pass(5).await;
    run(&fixture, false).await;
    turn(&fixture, "second", SnapshotState::Going).await;
    fixture.pass(5).await;
    assert!(found(&fixture, "first").is_none() && found(&fixture, "second").is_none());
    assert_eq!(kept(&fixture, "haven-first"), [false, false]);
    assert_eq!(kept(&fixture, "haven-second"), [false, false]);
    assert_eq!(kept(&fixture, "haven-third"), [true, true]);
    assert_eq!(holds(&fixture), [2, 2], "the VM stays as it is");
}

/// A disk of its own is a disk of its own.
#[tokio::test(start_paused = true)]
async fn one_disk_is_kept_and_reverted_alone() {
    let fixture = world().await;
    put(&fixture, "data", &asked("data", &["data"])).await;
    fixture.pass(5).await;
    ask(&fixture, "both").await;
    write(&fixture, 2);
    run(&fixture, false).await;
    turn(&fixture, "data", SnapshotState::Reverting).await;
    fixture.pass(5).await;
    assert_eq!(holds(&fixture), [2, 1]);
    assert_eq!(kept(&fixture, "haven-data"), [false, true]);
    let both = VmSnapshot {
        state: SnapshotState::Reverting,
        back: vec![name("root")],
        ..is(&fixture, "both")
    };
    write(&fixture, 3);
    put(&fixture, "both", &both).await;
    fixture.pass(5).await;
    assert_eq!(holds(&fixture), [1, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_revert_that_a_start_came_before_is_ended_and_takes_nothing_later() {
    let fixture = world().await;
    ask(&fixture, "first").await;
    write(&fixture, 2);
    let reverting = VmSnapshot {
        state: SnapshotState::Reverting,
        back: vec![name("root"), name("data")],
        ..is(&fixture, "first")
    };
    put(&fixture, "first", &reverting).await;
    fixture.pass(5).await;
    let first = is(&fixture, "first");
    assert_eq!(first.state, SnapshotState::There);
    assert!(first.message.contains("was started meanwhile"), "{}", first.message);
    run(&fixture, false).await;
    fixture.pass(5).await;
    assert_eq!(holds(&fixture), [2, 2], "what it wrote is not taken from it at its end");
}

#[tokio::test(start_paused = true)]
async fn one_that_cannot_be_taken_says_why_and_leaves_nothing() {
    let fixture = world().await;
    fixture.world.kept.refuse("data", Some("No space left on device"));
    ask(&fixture, "full").await;
    let full = is(&fixture, "full");
    assert_eq!(full.state, SnapshotState::Failed);
    assert!(full.message.starts_with("the pool of one of its disks is full"), "{}", full.message);
    assert_eq!(kept(&fixture, "haven-full"), [false, false]);
    run(&fixture, false).await;
    // One disk after another: the first has it, the second does not take it.
    ask(&fixture, "again").await;
    assert_eq!(is(&fixture, "again").state, SnapshotState::Failed);
    assert_eq!(kept(&fixture, "haven-again"), [false, false]);
    let steps = fixture.disks.steps.lock().unwrap().clone();
    assert_eq!(steps, [("root".into(), SnapshotStep::Take), ("root".into(), SnapshotStep::Remove)]);
    put(&fixture, "other", &asked("other", &["root", "swap"])).await;
    fixture.pass(5).await;
    assert!(is(&fixture, "other").message.contains("the disk `swap` is not made yet"));
    assert_eq!(kept(&fixture, "haven-other"), [false, false]);
}

/// The daemon ended in the middle: what the disks have by then is looked at first.
#[tokio::test(start_paused = true)]
async fn whatever_was_interrupted_becomes_whole_or_nothing() {
    let mut fixture = world().await;
    let held = |what: u8| (5, vec![what; 8]);
    for runs in [true, false] {
        if !runs {
            run(&fixture, false).await;
        }
        let tag = |of: &str| format!("{of}-{runs}");
        fixture.end().await;
        // Both disks had it, and nobody could say so.
        for disk in ["root", "data"] {
            fixture.world.kept.keep("db", disk, &format!("haven-{}", tag("whole")), held(9));
        }
        put(&fixture, &tag("whole"), &asked(&tag("whole"), &["root", "data"])).await;
        // Only one had it: it is of another moment than what is taken now.
        fixture.world.kept.keep("db", "root", &format!("haven-{}", tag("half")), held(9));
        put(&fixture, &tag("half"), &asked(&tag("half"), &["root", "data"])).await;
        // It was being removed, and one disk did not have it any more.
        fixture.world.kept.keep("db", "data", &format!("haven-{}", tag("going")), held(9));
        let going =
            VmSnapshot { state: SnapshotState::Going, ..asked(&tag("going"), &["root", "data"]) };
        put(&fixture, &tag("going"), &going).await;
        fixture.start();
        fixture.pass(10).await;
        let whole = is(&fixture, &tag("whole"));
        assert_eq!((whole.state, whole.of_ms), (SnapshotState::There, Some(5)));
        assert_eq!(whole.moment, Some(Moment::Running), "nobody knows better");
        assert_eq!(is(&fixture, &tag("half")).state, SnapshotState::There);
        for disk in ["root", "data"] {
            let now = fixture.world.kept.content("db", disk, &format!("haven-{}", tag("half")));
            assert_eq!(now.unwrap()[0], 1, "{disk} holds what it held before");
        }
        assert!(found(&fixture, &tag("going")).is_none());
        assert_eq!(kept(&fixture, &format!("haven-{}", tag("going"))), [false, false]);
    }
}

/// The store is not to be told anything by a host that has lost the VM.
#[tokio::test(start_paused = true)]
async fn a_host_that_lost_the_vm_does_and_says_nothing() {
    let fixture = world().await;
    fixture.place("db", "good", "host2", 2).await;
    fixture.pass(5).await;
    assert!(!fixture.runs("db"));
    ask(&fixture, "late").await;
    let late = is(&fixture, "late");
    assert_eq!((late.state, late.message.as_str()), (SnapshotState::Wanted, ""));
    assert_eq!(kept(&fixture, "haven-late"), [false, false]);
    assert!(fixture.disks.steps.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn it_waits_for_a_move_and_says_so() {
    let fixture = world().await;
    let key = keys::placement(&name("db"));
    let stays = fixture.peek(&key).unwrap();
    let mut moves = stays.clone();
    moves["movingTo"] = json!({"host": "host2", "migration": "m", "options": {}, "restart": false});
    fixture.put(&key, &moves).await;
    ask(&fixture, "now").await;
    let now = is(&fixture, "now");
    assert_eq!((now.state, now.message.as_str()), (SnapshotState::Wanted, "its VM is being moved"));
    fixture.put(&key, &stays).await;
    fixture.pass(5).await;
    assert_eq!(is(&fixture, "now").state, SnapshotState::There);
}

/// One half of before and one half of now is no VM.
#[tokio::test(start_paused = true)]
async fn a_vm_does_not_start_before_all_of_its_disks_are_reverted() {
    let fixture = world().await;
    ask(&fixture, "first").await;
    write(&fixture, 2);
    run(&fixture, false).await;
    fixture.world.kept.refuse("data", Some("the filer does not answer"));
    turn(&fixture, "first", SnapshotState::Reverting).await;
    fixture.pass(5).await;
    let first = is(&fixture, "first");
    assert_eq!((first.state, holds(&fixture)), (SnapshotState::Reverting, vec![1, 2]));
    assert!(first.message.starts_with("the filer does not answer"), "{}", first.message);
    let mut spec = json!({"memory": "64MiB", "networks": [{"network": "good"}]});
    spec.as_object_mut().unwrap().extend(disks(true).as_object().cloned().unwrap());
    fixture.object(Kind::Vm, "db", spec).await;
    fixture.pass(20).await;
    assert!(!fixture.runs("db"), "its disks are of two times");
    let why = fixture.status("db").unwrap().message;
    assert!(why.contains("`first`") && why.contains("the filer does not answer"), "{why}");
    fixture.world.kept.refuse("data", None);
    fixture.pass(5).await;
    assert!(fixture.runs("db"));
    assert_eq!((is(&fixture, "first").state, holds(&fixture)), (SnapshotState::There, vec![1, 1]));
    // What its guest writes now stays, however often it is started.
    write(&fixture, 4);
    run(&fixture, false).await;
    run(&fixture, true).await;
    assert_eq!(holds(&fixture), [4, 4]);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_does_not_have_it_is_told_before_any_is_touched() {
    let fixture = world().await;
    ask(&fixture, "first").await;
    write(&fixture, 2);
    run(&fixture, false).await;
    assert!(fixture.world.kept.drop_kept("db", "data", "haven-first"));
    turn(&fixture, "first", SnapshotState::Reverting).await;
    fixture.pass(5).await;
    let first = is(&fixture, "first");
    assert_eq!((first.state, holds(&fixture)), (SnapshotState::There, vec![2, 2]));
    assert!(first.message.contains("the disk `data` does not have it"), "{}", first.message);
    run(&fixture, true).await;
}

#[tokio::test(start_paused = true)]
async fn a_process_that_does_not_answer_is_asked_again() {
    let fixture = world().await;
    fixture.world.set_silent("host1", "db");
    ask(&fixture, "later").await;
    let later = is(&fixture, "later");
    assert_eq!(later.state, SnapshotState::Wanted);
    assert!(later.message.ends_with("it is tried again"), "{}", later.message);
    turn(&fixture, "later", SnapshotState::Going).await;
    run(&fixture, false).await;
    fixture.pass(5).await;
    assert!(found(&fixture, "later").is_none(), "nobody wants it any more");
}

/// A disk that was taken away, or deleted by hand, keeps nothing; what is of the others is removed all the same.
#[tokio::test(start_paused = true)]
async fn a_disk_that_is_no_more_holds_nothing_up() {
    let fixture = world().await;
    ask(&fixture, "first").await;
    run(&fixture, false).await;
    fixture.disks.here.lock().unwrap().retain(|name| name.disk.as_str() != "data");
    turn(&fixture, "first", SnapshotState::Reverting).await;
    fixture.pass(5).await;
    let first = is(&fixture, "first");
    assert!(first.message.contains("the disk `data` does not have it"), "{}", first.message);
    turn(&fixture, "first", SnapshotState::Going).await;
    fixture.pass(5).await;
    assert!(found(&fixture, "first").is_none());
    assert_eq!(kept(&fixture, "haven-first"), [false, true]);
    let steps = fixture.disks.steps.lock().unwrap().clone();
    assert_eq!(steps, [("root".into(), SnapshotStep::Remove)], "no disk was reverted");
}
