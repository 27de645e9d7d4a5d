//! A host makes a VM of the disks of another one, as a snapshot keeps them; the VMs are fakes, in virtual time.

use super::fixture::{Fixture, name};
use crate::vm::driver::Exit;
use haven_model::{
    VmPhase, keys,
    object::Kind,
    vm_snapshot::{SnapshotState, VmSnapshot},
};
use serde_json::json;
use std::sync::atomic::Ordering;

/// `db` runs, with two disks; a daemon for it.
async fn world() -> Fixture {
    let mut fixture = Fixture::new().await;
    fixture.object(Kind::Host, "host1", json!({"address": "10.0.0.1"})).await;
    fixture.put(&keys::lease(&name("host1")), &json!({"session": 1, "count": 1})).await;
    let disks = json!({"disks": [{"name": "root", "pool": "fast", "size": "1GiB"}, {"name": "data", "pool": "fast", "size": "1GiB"}]});
    fixture.vm("db", "good", disks).await;
    fixture.start();
    fixture.pass(2).await;
    assert!(fixture.runs("db"));
    write(&fixture, 1);
    fixture
}

/// The guest of `db` writes to both of its disks.
fn write(fixture: &Fixture, what: u8) {
    let disks = vec![("root".into(), vec![what; 8]), ("data".into(), vec![what; 4])];
    fixture.world.disks.put("db", disks);
}

fn holds(fixture: &Fixture, vm: &str) -> Vec<u8> {
    fixture.world.disks.content(vm).into_iter().map(|(_, content)| content[0]).collect()
}

/// What the API writes of a clone: the snapshot and the VM.
async fn clone(fixture: &Fixture) {
    ask(fixture).await;
    let copy = |disk: &str| {
        let of = json!({"vm": "db", "vmUid": "u-db", "disk": disk, "snapshot": "s1"});
        json!({"name": disk, "pool": "fast", "size": "1GiB", "copyOf": of})
    };
    fixture.vm("copy", "good", json!({"disks": [copy("root"), copy("data")]})).await;
}

async fn ask(fixture: &Fixture) {
    let disk = |disk: &str| json!({"name": disk, "pool": "fast", "size": "1GiB"});
    let record = json!({"id": "s1", "vm": "db", "by": "root", "atMs": 1, "madeFor": "copy",
        "disks": [disk("root"), disk("data")], "state": "wanted"});
    fixture.put(&keys::vm_snapshot("u-db", &name("for-copy")), &record).await;
}

fn kept(fixture: &Fixture) -> Option<VmSnapshot> {
    let value = fixture.peek(&keys::vm_snapshot("u-db", &name("for-copy")))?;
    Some(serde_json::from_value(value).unwrap())
}

fn says(fixture: &Fixture, words: &str) {
    let status = fixture.status("copy").unwrap();
    assert!(status.message.contains(words), "{words}: {status:?}");
}

#[tokio::test(start_paused = true)]
async fn a_clone_holds_what_its_source_held_at_one_instant_and_is_made_once() {
    let mut fixture = world().await;
    clone(&fixture).await;
    fixture.pass(5).await;
    assert!(fixture.runs("copy") && fixture.runs("db"));
    assert_eq!((holds(&fixture, "copy"), holds(&fixture, "db")), (vec![1, 1], vec![1, 1]));
    write(&fixture, 2);
    assert_eq!(holds(&fixture, "copy"), [1, 1]);
    let made = [Fixture::volume("copy", "u-copy").disk.to_string(), "data".into()];
    let copies = |fixture: &Fixture| -> Vec<String> {
        fixture.disks.copies.lock().unwrap().iter().map(|of| of.disk.to_string()).collect()
    };
    assert_eq!(copies(&fixture), made);
    // The snapshot goes, the VM is started anew, by another daemon: its disks are its own.
    let mut record = kept(&fixture).unwrap();
    record.state = SnapshotState::Going;
    let key = keys::vm_snapshot("u-db", &name("for-copy"));
    fixture.put(&key, &serde_json::to_value(&record).unwrap()).await;
    fixture.pass(5).await;
    assert!(kept(&fixture).is_none());
    fixture.world.end("host1", "copy", Exit::Crashed);
    fixture.end().await;
    fixture.start();
    fixture.pass(5).await;
    assert!(fixture.runs("copy"));
    assert_eq!((copies(&fixture), holds(&fixture, "copy")), (made.to_vec(), vec![1, 1]));
}

#[tokio::test(start_paused = true)]
async fn it_waits_for_the_snapshot_and_says_so_and_the_daemon_after_it_goes_on() {
    let mut fixture = world().await;
    fixture.world.kept.refuse("data", Some("No space left on device"));
    fixture.end().await;
    // Nobody takes it yet: its disks are not made of anything else meanwhile.
    clone(&fixture).await;
    let mut other = kept(&fixture).unwrap();
    other.message = "its VM is being backed up".into();
    let key = keys::vm_snapshot("u-db", &name("for-copy"));
    fixture.put(&key, &serde_json::to_value(&other).unwrap()).await;
    fixture.world.kept.refuse("data", None);
    fixture.disks.hangs.store(true, Ordering::Release);
    fixture.start();
    fixture.pass(8).await;
    assert_eq!(kept(&fixture).unwrap().state, SnapshotState::There);
    assert!(!fixture.runs("copy"));
    says(&fixture, "the disk `root` in the pool `fast`");
    // Its daemon ends half-way; what the next one makes is whole, and of that instant.
    write(&fixture, 2);
    fixture.end().await;
    fixture.disks.hangs.store(false, Ordering::Release);
    fixture.start();
    fixture.pass(5).await;
    assert!(fixture.runs("copy"));
    assert_eq!((holds(&fixture, "copy"), holds(&fixture, "db")), (vec![1, 1], vec![2, 2]));
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_kept_is_told_and_nothing_is_made() {
    let fixture = world().await;
    fixture.world.kept.refuse("data", Some("No space left on device"));
    clone(&fixture).await;
    fixture.pass(5).await;
    assert_eq!(kept(&fixture).unwrap().state, SnapshotState::Failed);
    assert_eq!(fixture.status("copy").unwrap().phase, VmPhase::Failed);
    says(&fixture, "the disk `root` cannot be made from the disk `root` of db: its snapshot could");
    says(&fixture, "free some space or enlarge it");
    assert!(fixture.disks.copies.lock().unwrap().is_empty() && fixture.runs("db"));
    // Nor of one that somebody has removed, whatever stands in the spec.
    fixture.delete(&keys::vm_snapshot("u-db", &name("for-copy"))).await;
    fixture.pass(40).await;
    says(&fixture, "it is not there any more");
    assert!(!fixture.runs("copy"));
    // Once it can be kept after all, and is asked for again, the VM is made.
    fixture.world.kept.refuse("data", None);
    ask(&fixture).await;
    fixture.pass(40).await;
    assert!(fixture.runs("copy"));
    assert_eq!(holds(&fixture, "copy"), [1, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_clone_that_is_deleted_while_it_is_made_leaves_nothing() {
    let fixture = world().await;
    fixture.disks.hangs.store(true, Ordering::Release);
    clone(&fixture).await;
    fixture.pass(5).await;
    let key = keys::object(&haven_model::ObjectRef::new(Kind::Vm, name("copy")));
    let mut vm = fixture.peek(&key).unwrap();
    vm["meta"]["deleting"] = true.into();
    fixture.put(&key, &vm).await;
    fixture.disks.hangs.store(false, Ordering::Release);
    fixture.pass(5).await;
    let status = fixture.status("copy").unwrap();
    assert_eq!((status.phase, status.message.as_str()), (VmPhase::Stopped, "deleted"));
    let here = fixture.disks.here.lock().unwrap();
    assert!(here.iter().all(|of| of.vm.as_str() == "db"), "{here:?}");
    assert!(fixture.runs("db"));
}
