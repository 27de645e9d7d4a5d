//! A host opens the mirrored disk of a VM, over fakes, in virtual time. The other replica is on host2, which a test plays.

use super::{
    fixture::{Fixture, name},
    storage::VolumeName,
};
use haven_model::{
    Bytes, VmPhase, keys,
    object::Kind,
    vm_snapshot::{SnapshotState, VmSnapshot},
    volume::{Based, ReplicaState, Volume, VolumeCheck, VolumeRef},
};
use serde_json::json;

const VOLUME: &str = "db.data.u-db";

fn data() -> VolumeRef {
    VolumeRef { vm: name("db"), disk: name("data") }
}

/// A VM with a mirrored disk, and a local one behind it; its record says this of its run.
async fn world(run: u64, clean: bool) -> Fixture {
    let fixture = Fixture::new().await;
    fixture.object(Kind::Pool, "twins", json!({"driver": "mirrored", "path": "/twins"})).await;
    fixture.object(Kind::Host, "host1", json!({"address": "10.0.0.1"})).await;
    fixture.object(Kind::Host, "host2", json!({"address": "10.0.0.2"})).await;
    fixture.put(&keys::lease(&name("host2")), &json!({"session": 1, "count": 1})).await;
    let hosts = [name("host1"), name("host2")];
    let mut volume = Volume::new("u-db".into(), name("twins"), Bytes::gib(1), hosts);
    (volume.run, volume.clean) = (run, clean);
    let volume = serde_json::to_value(volume).unwrap();
    fixture.put(&keys::volume(&data()), &volume).await;
    fixture.world.mirrors.make("host1", VOLUME);
    fixture.world.mirrors.make("host2", VOLUME);
    let disks = json!([
        {"name": "data", "pool": "twins", "size": "1GiB"}, {"name": "root", "pool": "fast", "size": "1GiB"}
    ]);
    fixture.vm("db", "good", json!({"disks": disks})).await;
    fixture
}

/// This host has its replica, which was open in a run before.
fn has(fixture: &Fixture, run: u64) {
    fixture.disks.here.lock().unwrap().insert(VolumeName::parse(VOLUME).unwrap());
    fixture.world.mirrors.own("host1", VOLUME, run).unwrap();
}

/// host2 serves its replica to a run, and says so.
async fn serves(fixture: &Fixture, run: u64) {
    let instance = fixture.world.mirrors.serve("host2", VOLUME, run).unwrap();
    let told = json!({"session": 1, "is": "served", "run": run, "port": 1, "instance": instance, "boot": "b"});
    fixture.put(&keys::replica_status(&data(), &name("host2")), &told).await;
}

fn record(fixture: &Fixture) -> Volume {
    serde_json::from_value(fixture.peek(&keys::volume(&data())).unwrap()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_is_new_is_opened_once_each_has_made_its_replica_and_serves_the_first_run() {
    let mut fixture = world(0, true).await;
    fixture.start();
    fixture.pass(20).await;
    assert!(!fixture.runs("db"));
    assert_eq!(record(&fixture).run, 0, "host2 may still be making its replica");
    serves(&fixture, 0).await;
    fixture.pass(2).await;
    let now = record(&fixture);
    assert_eq!((now.run, now.clean, now.counted().count()), (1, false, 2));
    assert!(!fixture.runs("db"));
    serves(&fixture, 1).await;
    fixture.pass(2).await;
    assert!(fixture.runs("db"), "{:?}", fixture.status("db"));
}

#[tokio::test(start_paused = true)]
async fn one_that_does_not_serve_in_time_counts_no_more() {
    let mut fixture = world(3, true).await;
    has(&fixture, 3);
    fixture.start();
    fixture.pass(3).await;
    assert!(!fixture.runs("db") && record(&fixture).counted().count() == 2);
    fixture.pass(5).await;
    assert!(fixture.runs("db"), "{:?}", fixture.status("db"));
    assert_eq!(record(&fixture).replicas[&name("host2")], ReplicaState::Stale);
}

#[tokio::test(start_paused = true)]
async fn a_host_without_its_replica_takes_out_no_other_one() {
    let mut fixture = world(3, false).await;
    let before = record(&fixture);
    fixture.start();
    fixture.pass(20).await;
    let status = fixture.status("db").unwrap();
    assert_eq!(status.phase, VmPhase::Failed);
    assert!(
        status.message.contains("is missing in /twins on host1 although it counts"),
        "{status:?}"
    );
    assert_eq!(record(&fixture), before);
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_was_away_while_others_were_written_to_is_refused() {
    let mut fixture = world(9, false).await;
    has(&fixture, 3);
    let before = record(&fixture);
    fixture.start();
    fixture.pass(20).await;
    let status = fixture.status("db").unwrap();
    assert!(status.message.contains("is older than it should be (run 3 of 9)"), "{status:?}");
    assert_eq!(record(&fixture), before);
}

/// Run 9 is nobody's, so run 8 was the last in which anybody may have written. What becomes of a VM whose replica here was open
/// last in this run: whether it runs, and its volume's run after that.
async fn after_a_run_that_is_nobodys(lowest: u64) -> (bool, u64) {
    let mut fixture = world(9, false).await;
    let shut = Volume { shut: true, ..record(&fixture) };
    fixture.put(&keys::volume(&data()), &serde_json::to_value(shut).unwrap()).await;
    has(&fixture, lowest);
    fixture.start();
    fixture.pass(20).await;
    let now = record(&fixture);
    assert_eq!(now.shut, now.run == 9);
    (fixture.runs("db"), now.run)
}

#[tokio::test(start_paused = true)]
async fn a_replica_lacks_nothing_for_not_having_served_a_run_that_is_nobodys() {
    assert_eq!(after_a_run_that_is_nobodys(7).await, (true, 10));
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_lacks_a_run_before_one_that_is_nobodys_is_refused() {
    assert_eq!(after_a_run_that_is_nobodys(6).await, (false, 9));
}

#[tokio::test(start_paused = true)]
async fn a_start_that_fails_costs_no_replica() {
    let mut fixture = world(3, true).await;
    has(&fixture, 3);
    *fixture.disks.refuses.lock().unwrap() = Some("the disk is full".into());
    fixture.start();
    fixture.pass(1).await;
    serves(&fixture, 4).await;
    fixture.pass(60).await;
    assert!(fixture.status("db").unwrap().failures > 3);
    let now = record(&fixture);
    assert_eq!((now.run, now.counted().count()), (4, 2), "it is one run until a process begins");
    *fixture.disks.refuses.lock().unwrap() = None;
    fixture.pass(40).await;
    assert!(fixture.runs("db"), "{:?}", fixture.status("db"));
    assert_eq!((record(&fixture).run, record(&fixture).counted().count()), (4, 2));
}

/// Asks for a comparison.
async fn compare(fixture: &Fixture, id: &str, repair: bool) {
    let check = json!({"id": id, "by": "a person", "atMs": 1, "repair": repair, "done": "0B"});
    fixture.put(&keys::check(&data()), &check).await;
}

fn outcome(fixture: &Fixture) -> (bool, String) {
    let check: VolumeCheck =
        serde_json::from_value(fixture.peek(&keys::check(&data())).unwrap()).unwrap();
    let outcome = check.outcome.expect("it has ended");
    (outcome.well, outcome.message)
}

#[tokio::test(start_paused = true)]
async fn replicas_are_compared_while_the_guest_writes_and_one_that_rotted_is_copied_anew() {
    let mut fixture = world(3, true).await;
    has(&fixture, 3);
    serves(&fixture, 4).await;
    fixture.start();
    fixture.pass(5).await;
    assert!(fixture.runs("db"), "{:?}", fixture.status("db"));
    compare(&fixture, "one", false).await;
    fixture.pass(20).await;
    assert_eq!(outcome(&fixture), (true, "all of it is the same on host1 and host2".into()));
    // All blocks are written all the time, so the guest rests for this.
    let disks = json!([{"name": "data", "pool": "twins", "size": "1GiB"}]);
    let spec = json!({"memory": "64MiB", "networks": [{"network": "good"}], "disks": disks, "running": false});
    fixture.object(Kind::Vm, "db", spec).await;
    fixture.pass(15).await;
    assert!(!fixture.runs("db"));
    fixture.world.mirrors.rot("host2", VOLUME, 2);
    compare(&fixture, "two", false).await;
    fixture.pass(20).await;
    let (well, why) = outcome(&fixture);
    let differs = "the replica on host2 differs from that on host1 in 1 piece of 64 KiB (at byte 131072); its guest reads the replica on host1.";
    assert!(!well && why.starts_with(differs), "{why}");
    assert!(why.contains("`haven volume check db.data --repair`"), "{why}");
    assert_eq!(record(&fixture).counted().count(), 2, "nobody asked for that");
    compare(&fixture, "three", true).await;
    fixture.pass(20).await;
    let (well, why) = outcome(&fixture);
    assert!(
        well && why.ends_with("those on host2 are copied anew from it once the VM runs"),
        "{why}"
    );
    assert_eq!(record(&fixture).replicas[&name("host2")], ReplicaState::Stale);
    compare(&fixture, "four", false).await;
    fixture.pass(20).await;
    let (well, why) = outcome(&fixture);
    assert!(!well && why.contains("nothing to compare"), "{why}");
}

async fn shall_run(fixture: &Fixture, running: bool) {
    let disks = json!([
        {"name": "data", "pool": "twins", "size": "1GiB"}, {"name": "root", "pool": "fast", "size": "1GiB"}
    ]);
    let spec = json!({"memory": "64MiB", "networks": [{"network": "good"}], "disks": disks, "running": running});
    fixture.object(Kind::Vm, "db", spec).await;
}

/// A snapshot of its mirrored disk.
fn snapshot_record(state: &str) -> serde_json::Value {
    json!({"id": "a1", "vm": "db", "by": "root", "atMs": 1, "state": state,
        "disks": [{"name": "data", "pool": "twins", "size": "1GiB"}]})
}

fn snapshot_told(fixture: &Fixture) -> VmSnapshot {
    let key = keys::vm_snapshot("u-db", &name("before"));
    serde_json::from_value(fixture.peek(&key).unwrap()).unwrap()
}

/// What its replica on a host holds.
fn blocks(fixture: &Fixture, host: &str) -> Vec<[u8; 32]> {
    fixture.world.mirrors.hashes(host, "db.data").unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_mirrored_disk_is_copied_while_its_guest_runs_and_holds_that_again() {
    let mut fixture = world(0, true).await;
    serves(&fixture, 0).await;
    fixture.start();
    fixture.pass(3).await;
    serves(&fixture, 1).await;
    fixture.pass(3).await;
    assert!(fixture.runs("db"), "{:?}", fixture.status("db"));
    let key = keys::vm_snapshot("u-db", &name("before"));
    fixture.put(&key, &snapshot_record("wanted")).await;
    fixture.pass(5).await;
    let there = snapshot_told(&fixture);
    assert_eq!(there.state, SnapshotState::There, "{there:?}");
    assert_eq!(there.copies(&name("data")), [name("host1")]);
    let copy = there.copy.clone().unwrap();
    let kept = fixture.world.mirrors.kept("host1", VOLUME, &copy).unwrap();
    // Its guest writes all the time.
    fixture.pass(2).await;
    shall_run(&fixture, false).await;
    fixture.pass(15).await;
    assert!(!fixture.runs("db"));
    let before = (record(&fixture), blocks(&fixture, "host1"));
    let mut back = serde_json::to_value(&there).unwrap();
    (back["state"], back["back"]) = (json!("reverting"), json!(["data"]));
    fixture.put(&key, &back).await;
    fixture.pass(5).await;
    let (now, told) = (record(&fixture), snapshot_told(&fixture));
    assert_eq!(told.state, SnapshotState::There, "{told:?}");
    assert!(told.reverted_ms.is_some() && told.message.is_empty());
    // host2 has no copy, so its replica counts no more.
    assert_eq!(now.based, Some(Based { copy, run: now.run }));
    assert!(now.run > before.0.run && now.shut && now.clean);
    assert_eq!(now.counted().collect::<Vec<_>>(), [&name("host1")]);
    let holds = blocks(&fixture, "host1");
    assert_ne!(holds, before.1);
    let as_kept = kept.chunks(8).zip(&holds).all(|(id, block)| block[..8] == *id);
    assert!(as_kept, "{kept:?} {holds:?}");
    shall_run(&fixture, true).await;
    fixture.pass(10).await;
    assert!(fixture.runs("db"), "{:?}", fixture.status("db"));
    assert!(fixture.world.mirrors.lost().is_empty(), "{:?}", fixture.world.mirrors.lost());
}

#[tokio::test(start_paused = true)]
async fn a_host_fetches_a_copy_and_removes_what_no_snapshot_names() {
    let mut fixture = world(3, true).await;
    has(&fixture, 3);
    fixture.world.mirrors.put_kept("host2", VOLUME, "a1", 7, vec![1; 32]);
    fixture.world.mirrors.put_kept("host1", VOLUME, "old", 7, vec![2; 32]);
    let mut there = snapshot_record("there");
    (there["copy"], there["disks"][0]["copies"]) = (json!("a1"), json!(["host2"]));
    let key = keys::vm_snapshot("u-db", &name("before"));
    fixture.put(&key, &there).await;
    fixture.start();
    fixture.pass(5).await;
    let told = snapshot_told(&fixture);
    assert_eq!(told.copies(&name("data")), [name("host2"), name("host1")]);
    assert_eq!(fixture.world.mirrors.kept("host1", VOLUME, "a1").unwrap(), [1; 32]);
    assert_eq!(fixture.world.mirrors.kept("host1", VOLUME, "old"), None);
    // One that somebody removed by hand is told as gone, and fetched again.
    fixture.world.mirrors.forget_kept("host1", VOLUME, "a1");
    fixture.pass(65).await;
    assert_eq!(snapshot_told(&fixture).copies(&name("data")).len(), 2);
    assert!(fixture.world.mirrors.kept("host1", VOLUME, "a1").is_some());
    fixture.delete(&key).await;
    fixture.pass(5).await;
    assert!(fixture.world.mirrors.all_kept("host1").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_is_to_be_what_it_was_is_put_back_by_whoever_opens_it() {
    let mut fixture = world(9, true).await;
    let based = Based { copy: "a1".into(), run: 9 };
    let back = Volume { shut: true, based: Some(based), ..record(&fixture) };
    fixture.put(&keys::volume(&data()), &serde_json::to_value(back).unwrap()).await;
    // It was away in the runs before, and lacks nothing for that.
    has(&fixture, 6);
    fixture.start();
    fixture.pass(15).await;
    let status = fixture.status("db").unwrap();
    assert!(status.message.contains("cannot be made what it was in its snapshot"), "{status:?}");
    let kept: Vec<u8> = [0_u64; 4].iter().flat_map(|id| id.to_be_bytes()).collect();
    fixture.world.mirrors.put_kept("host1", VOLUME, "a1", 7, kept);
    fixture.pass(60).await;
    assert!(fixture.runs("db"), "{:?}", fixture.status("db"));
    assert!(fixture.world.mirrors.lost().is_empty(), "{:?}", fixture.world.mirrors.lost());
}

/// Its guest runs, with both replicas.
async fn running() -> Fixture {
    let mut fixture = world(0, true).await;
    serves(&fixture, 0).await;
    fixture.start();
    fixture.pass(3).await;
    serves(&fixture, 1).await;
    fixture.pass(3).await;
    assert!(fixture.runs("db"), "{:?}", fixture.status("db"));
    fixture
}

/// A snapshot of it is taken.
async fn taken(fixture: &Fixture) -> VmSnapshot {
    let key = keys::vm_snapshot("u-db", &name("before"));
    fixture.put(&key, &snapshot_record("wanted")).await;
    fixture.pass(5).await;
    let there = snapshot_told(fixture);
    assert_eq!(there.state, SnapshotState::There, "{there:?}");
    there
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_waits_for_a_disk_that_grows_under_its_guest() {
    let fixture = running().await;
    let disks = json!([
        {"name": "data", "pool": "twins", "size": "2GiB"}, {"name": "root", "pool": "fast", "size": "1GiB"}
    ]);
    let spec = json!({"memory": "64MiB", "networks": [{"network": "good"}], "disks": disks});
    fixture.object(Kind::Vm, "db", spec).await;
    let key = keys::vm_snapshot("u-db", &name("before"));
    fixture.pass(1).await;
    fixture.put(&key, &snapshot_record("wanted")).await;
    fixture.pass(2).await;
    let waits = snapshot_told(&fixture);
    assert_eq!(waits.state, SnapshotState::Wanted, "its guest stands: {waits:?}");
    assert!(waits.message.contains("its disks are being changed"), "{waits:?}");
    serves(&fixture, 2).await;
    fixture.pass(6).await;
    let there = snapshot_told(&fixture);
    assert_eq!(there.state, SnapshotState::There, "{there:?}");
    assert_eq!((record(&fixture).run, record(&fixture).counted().count()), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_revert_for_which_there_is_no_room_changes_nothing() {
    let fixture = running().await;
    let there = taken(&fixture).await;
    shall_run(&fixture, false).await;
    fixture.pass(15).await;
    let before = (record(&fixture), blocks(&fixture, "host1"));
    fixture.world.kept.refuse("data", Some("/twins has 1 MiB free"));
    let mut back = serde_json::to_value(&there).unwrap();
    (back["state"], back["back"]) = (json!("reverting"), json!(["data"]));
    fixture.put(&keys::vm_snapshot("u-db", &name("before")), &back).await;
    fixture.pass(5).await;
    let told = snapshot_told(&fixture);
    assert_eq!(told.state, SnapshotState::There);
    assert_eq!(told.message, "it could not be reverted to: /twins has 1 MiB free");
    assert_eq!((record(&fixture), blocks(&fixture, "host1")), before);
    shall_run(&fixture, true).await;
    fixture.pass(10).await;
    assert!(fixture.runs("db"), "{:?}", fixture.status("db"));
}

#[tokio::test(start_paused = true)]
async fn a_start_that_was_given_up_keeps_no_disk_from_being_put_back() {
    let fixture = running().await;
    let there = taken(&fixture).await;
    fixture.pass(2).await;
    shall_run(&fixture, false).await;
    fixture.pass(15).await;
    // Its replica was shut for a run that was never written.
    let run = record(&fixture).run;
    fixture.world.mirrors.own("host1", VOLUME, run + 1).unwrap();
    let before = blocks(&fixture, "host1");
    let mut back = serde_json::to_value(&there).unwrap();
    (back["state"], back["back"]) = (json!("reverting"), json!(["data"]));
    fixture.put(&keys::vm_snapshot("u-db", &name("before")), &back).await;
    fixture.pass(5).await;
    assert!(snapshot_told(&fixture).reverted_ms.is_some(), "{:?}", snapshot_told(&fixture));
    assert_ne!(blocks(&fixture, "host1"), before);
}
