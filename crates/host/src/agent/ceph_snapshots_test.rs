//! Snapshots of disks in Ceph over fakes, in virtual time: what an attempt has left is no part of the next one, and nobody who may
//! still write is there while one is taken or put back at rest.

use super::{
    fixture::{Fixture, name},
    storage::{SnapshotStep, VolumeName},
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

/// A VM with two disks in Ceph and one that all hosts have; a daemon for it.
async fn world() -> Fixture {
    let mut fixture = Fixture::new().await;
    fixture.object(Kind::Host, "host1", json!({"address": "10.0.0.1"})).await;
    fixture.put(&keys::lease(&name("host1")), &json!({"session": 1, "count": 1})).await;
    let rbd = json!({"monitors": ["10.0.0.1"], "user": "haven", "key": "sealed", "pool": "vm"});
    fixture.object(Kind::Pool, "ceph", json!({"driver": "rbd", "rbd": rbd})).await;
    fixture.object(Kind::Pool, "filer", json!({"driver": "shared", "path": "/pools/filer"})).await;
    fixture.vm("db", "good", spec(true)).await;
    write(&fixture, 1);
    fixture.start();
    fixture.pass(3).await;
    assert!(fixture.runs("db"));
    fixture
}

fn spec(running: bool) -> serde_json::Value {
    json!({"running": running, "restart": "always", "disks": [
        {"name": "root", "pool": "ceph", "size": "1GiB"}, {"name": "data", "pool": "ceph", "size": "1GiB"},
        {"name": "swap", "pool": "filer", "size": "1GiB"},
    ]})
}

const DISKS: [&str; 3] = ["root", "data", "swap"];

fn write(fixture: &Fixture, what: u8) {
    let held = DISKS.iter().map(|disk| ((*disk).to_owned(), vec![what; 8]));
    fixture.world.disks.put("db", held.collect());
}

fn holds(fixture: &Fixture) -> Vec<u8> {
    fixture.world.disks.content("db").into_iter().map(|(_, content)| content[0]).collect()
}

async fn put(fixture: &Fixture, called: &str, record: &VmSnapshot) {
    let key = keys::vm_snapshot(UID, &name(called));
    fixture.put(&key, &serde_json::to_value(record).unwrap()).await;
    fixture.pass(6).await;
}

fn asked(id: &str) -> VmSnapshot {
    let disk = |disk: &&str| SnapshotDisk {
        name: name(disk),
        pool: name(if *disk == "swap" { "filer" } else { "ceph" }),
        size: haven_model::Bytes(0),
        copies: Vec::new(),
    };
    let disks = DISKS.iter().map(disk).collect();
    VmSnapshot::wanted(id.into(), name("db"), "root".into(), 1, disks)
}

fn found(fixture: &Fixture, called: &str) -> Option<VmSnapshot> {
    let value = fixture.peek(&keys::vm_snapshot(UID, &name(called)))?;
    Some(serde_json::from_value(value).unwrap())
}

fn is(fixture: &Fixture, called: &str) -> VmSnapshot {
    found(fixture, called).unwrap()
}

async fn turn(fixture: &Fixture, called: &str, state: SnapshotState) {
    let back: Vec<Name> = match state {
        SnapshotState::Reverting => DISKS.iter().map(|disk| name(disk)).collect(),
        _ => Vec::new(),
    };
    let record = VmSnapshot { state, back, message: String::new(), ..is(fixture, called) };
    put(fixture, called, &record).await;
}

async fn run(fixture: &Fixture, runs: bool) {
    let mut all = json!({"memory": "64MiB", "networks": [{"network": "good"}]});
    all.as_object_mut().unwrap().extend(spec(runs).as_object().cloned().unwrap());
    fixture.object(Kind::Vm, "db", all).await;
    fixture.pass(6).await;
    assert_eq!(fixture.runs("db"), runs);
}

/// What a disk keeps under a name.
fn kept(fixture: &Fixture, disk: &str, tag: &str) -> Option<u8> {
    fixture.world.kept.content("db", disk, tag).map(|content| content[0])
}

/// What the disks keep of a snapshot.
fn keep(fixture: &Fixture, called: &str) -> Vec<Option<u8>> {
    let record = is(fixture, called);
    let in_ceph = record.tag_in_ceph().unwrap_or_default();
    let tag = |disk: &str| if disk == "swap" { record.tag() } else { in_ceph.clone() };
    DISKS.iter().map(|disk| kept(fixture, disk, &tag(disk))).collect()
}

fn refuse(fixture: &Fixture, why: Option<&str>) {
    fixture.disks.ceph.lock().unwrap().refuses = why.map(str::to_owned);
}

#[tokio::test(start_paused = true)]
async fn one_is_taken_under_the_name_of_its_attempt_put_back_and_removed() {
    let fixture = world().await;
    put(&fixture, "first", &asked("first")).await;
    let first = is(&fixture, "first");
    assert_eq!((first.state, first.moment), (SnapshotState::There, Some(Moment::Running)));
    assert!(first.is_attempt(&first.tag_in_ceph().unwrap()), "{first:?}");
    assert_eq!(keep(&fixture, "first"), [Some(1); 3]);
    assert_eq!(fixture.disks.ceph.lock().unwrap().shut.len(), 0, "its own process goes on");
    write(&fixture, 2);
    run(&fixture, false).await;
    put(&fixture, "second", &asked("second")).await;
    assert_eq!(is(&fixture, "second").moment, Some(Moment::Stopped));
    assert_eq!(keep(&fixture, "second"), [Some(2); 3]);
    turn(&fixture, "first", SnapshotState::Reverting).await;
    assert_eq!((is(&fixture, "first").state, holds(&fixture)), (SnapshotState::There, vec![1; 3]));
    turn(&fixture, "second", SnapshotState::Reverting).await;
    run(&fixture, true).await;
    assert_eq!(holds(&fixture), [2; 3]);
    turn(&fixture, "first", SnapshotState::Going).await;
    assert!(found(&fixture, "first").is_none());
    assert_eq!(kept(&fixture, "root", &first.tag_in_ceph().unwrap()), None);
    assert_eq!(kept(&fixture, "swap", &first.tag()), None);
    assert_eq!(keep(&fixture, "second"), [Some(2); 3]);
}

/// Of what an attempt before has asked, some is done when the guest has gone on, and some later yet.
#[tokio::test(start_paused = true)]
async fn what_an_attempt_has_left_is_removed_and_never_taken_for_the_next() {
    let mut fixture = world().await;
    fixture.end().await;
    let left = VmSnapshot { copy: Some("firstr4".into()), ..asked("first") };
    for (disk, tag, held) in [
        ("root", "haven-firstr4", 8),
        ("data", "haven-firstr4", 9),
        ("data", "haven-firstr2", 7),
        ("swap", "haven-first", 8),
        ("root", "haven-other", 6),
    ] {
        fixture.world.kept.keep("db", disk, tag, (7, vec![held; 8]));
    }
    put(&fixture, "first", &left).await;
    fixture.start();
    fixture.pass(6).await;
    assert!(fixture.runs("db"));
    let first = is(&fixture, "first");
    assert_eq!(first.state, SnapshotState::There, "{first:?}");
    assert_ne!(first.copy, left.copy);
    assert_eq!(keep(&fixture, "first"), [Some(1); 3]);
    for (disk, tag) in
        [("root", "haven-firstr4"), ("data", "haven-firstr4"), ("data", "haven-firstr2")]
    {
        assert_eq!(kept(&fixture, disk, tag), None, "{disk} {tag}");
    }
    // What was asked then and is done only now goes with the snapshot.
    fixture.world.kept.keep("db", "root", "haven-firstr4", (7, vec![5; 8]));
    turn(&fixture, "first", SnapshotState::Going).await;
    assert!(found(&fixture, "first").is_none());
    assert_eq!(kept(&fixture, "root", "haven-firstr4"), None);
    assert_eq!(kept(&fixture, "root", "haven-other"), Some(6), "another's");
}

#[tokio::test(start_paused = true)]
async fn one_that_ceph_refuses_leaves_nothing_and_its_guest_runs_on() {
    let fixture = world().await;
    fixture.world.kept.refuse("data", Some("the image vm/db.data: no room"));
    put(&fixture, "first", &asked("first")).await;
    // What the others keep cannot be removed from that one either, which it has not.
    let first = is(&fixture, "first");
    assert_eq!(first.state, SnapshotState::Failed, "{first:?}");
    assert!(first.message.contains("no room"), "{first:?}");
    assert!(fixture.runs("db") && fixture.world.starts()["db"] == 1);
    for disk in DISKS {
        assert_eq!(fixture.world.kept.of("db", disk, 8).snapshots.len(), 0, "{disk}");
    }
    fixture.world.kept.refuse("data", None);
    put(&fixture, "second", &asked("second")).await;
    assert_eq!(keep(&fixture, "second"), [Some(1); 3]);
}

/// Who had the disks open may write until he is shut out, wherever he is.
#[tokio::test(start_paused = true)]
async fn nothing_is_kept_or_put_back_at_rest_before_all_are_shut_out() {
    let fixture = world().await;
    put(&fixture, "first", &asked("first")).await;
    write(&fixture, 2);
    run(&fixture, false).await;
    refuse(&fixture, Some("the monitors do not answer"));
    put(&fixture, "second", &asked("second")).await;
    let second = is(&fixture, "second");
    assert_eq!(second.state, SnapshotState::Failed);
    assert!(second.message.contains("the monitors do not answer"), "{second:?}");
    turn(&fixture, "first", SnapshotState::Reverting).await;
    let first = is(&fixture, "first");
    assert_eq!((first.state, holds(&fixture)), (SnapshotState::Reverting, vec![2; 3]));
    assert!(first.message.contains("until then the VM does not start"), "{first:?}");
    let mut all = json!({"memory": "64MiB", "networks": [{"network": "good"}]});
    all.as_object_mut().unwrap().extend(spec(true).as_object().cloned().unwrap());
    fixture.object(Kind::Vm, "db", all).await;
    fixture.pass(6).await;
    assert!(!fixture.runs("db"), "its disks are not what they were yet");
    assert!(
        fixture.disks.steps.lock().unwrap().iter().all(|(_, step)| *step != SnapshotStep::Revert)
    );
    // One that nobody has noted had it open, too.
    let volume = VolumeName { vm: name("db"), disk: name("data"), vm_uid: UID.into() };
    let unknown = "10.0.0.3:0/9".to_owned();
    fixture.disks.ceph.lock().unwrap().open.entry(volume).or_default().insert(unknown.clone());
    refuse(&fixture, None);
    fixture.pass(40).await;
    assert_eq!(is(&fixture, "first").state, SnapshotState::There);
    assert!(fixture.disks.ceph.lock().unwrap().shut.contains(&unknown));
    assert!(fixture.runs("db"));
    assert_eq!(holds(&fixture), [1; 3]);
}
