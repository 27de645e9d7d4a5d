//! A host backs up the VMs that are placed on it, into a real directory; the VMs are fakes, in virtual time.

use super::fixture::{Fixture, name};
use crate::storage::backup::repository::{Place, Repository};
use haven_model::{
    Name,
    backup::{Backup, BackupRun, Verification},
    keys,
    object::Kind,
};
use serde_json::json;
use std::path::Path;

const SIZE: usize = 9 << 20;

/// A VM that runs, its disk and a target that is a directory; a daemon for it.
async fn world(place: &Path) -> Fixture {
    let mut fixture = Fixture::new().await;
    let repository = repository(place);
    repository.create(1).await.unwrap();
    fixture.object(Kind::Host, "host1", json!({"address": "10.0.0.1"})).await;
    fixture.put(&keys::lease(&name("host1")), &json!({"session": 1, "count": 1})).await;
    fixture.object(Kind::Target, "nas", json!({"directory": place})).await;
    fixture.vm("db", "good", json!({"backup": {"to": "nas", "keep": "1ms"}})).await;
    fixture.world.disks.put("db", vec![("root".into(), content(1))]);
    fixture.start();
    fixture.pass(2).await;
    assert!(fixture.runs("db"));
    fixture
}

fn repository(place: &Path) -> Repository {
    Repository::open(&Place::Directory(place.to_owned())).unwrap()
}

/// A disk of two chunks and a bit, the second of zeros.
fn content(of: u8) -> Vec<u8> {
    let mut content = vec![of; SIZE];
    content[4 << 20..8 << 20].fill(0);
    content
}

async fn held(place: &Path) -> Vec<Backup> {
    let listed = repository(place).list(None).await.unwrap();
    assert_eq!(listed.unreadable, []);
    listed.backups
}

fn run(fixture: &Fixture) -> BackupRun {
    serde_json::from_value(fixture.peek(&keys::backup(&name("db"))).unwrap()).unwrap()
}

async fn ask(fixture: &Fixture, id: &str) {
    let mut run = BackupRun::new("u-db", name("nas"), "root".into(), 1, None);
    run.id = id.into();
    fixture.put(&keys::backup(&name("db")), &serde_json::to_value(run).unwrap()).await;
}

/// Work on a real disk takes real time, which virtual time passes by.
async fn until(fixture: &Fixture, what: &str, holds: impl Fn(&Fixture) -> bool) {
    for _ in 0..400 {
        if holds(fixture) {
            return;
        }
        tokio::task::spawn_blocking(|| std::thread::sleep(std::time::Duration::from_millis(5)))
            .await
            .unwrap();
        fixture.pass(1).await;
    }
    panic!("not within 400 s: {what}");
}

fn ended(fixture: &Fixture) -> bool {
    run(fixture).outcome.is_some()
}

/// What a disk of a backup holds.
async fn found(place: &Path, backup: &Backup) -> Vec<u8> {
    let repository = repository(place);
    let index = repository.index(backup, &name("root")).await.unwrap();
    let mut found = Vec::new();
    for (i, chunk) in index.chunks.iter().enumerate() {
        let length = (4 << 20).min(SIZE - i * (4 << 20));
        match chunk {
            Some(id) => found.extend_from_slice(&repository.get(id).await.unwrap()),
            None => found.extend_from_slice(&vec![0; length]),
        }
    }
    found
}

/// Backs it up under this id: the newest backup that there is then.
async fn backed_up(fixture: &Fixture, place: &Path, id: &str) -> Backup {
    ask(fixture, id).await;
    until(fixture, "it ends", ended).await;
    let outcome = run(fixture).outcome.unwrap();
    assert!(outcome.well, "{outcome:?}");
    assert!(!fixture.world.disks.is_open("db"), "its disks are still held");
    held(place).await.pop().unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_is_asked_for_is_made_told_and_found_whole() {
    let place = tempfile::tempdir().unwrap();
    let fixture = world(place.path()).await;
    let backup = backed_up(&fixture, place.path(), "b1").await;
    let first = run(&fixture);
    let outcome = first.outcome.clone().unwrap();
    assert!(outcome.message.contains("as a power cut would have left them"), "{outcome:?}");
    assert_eq!((first.done, first.total), (first.total, haven_model::Bytes(SIZE as u64)));
    assert_eq!(first.good_ms[&name("nas")], 1);
    assert_eq!((backup.id.as_str(), backup.vm.as_str(), backup.by.as_str()), ("b1", "db", "root"));
    assert_eq!(backup.object["spec"]["memory"], "64MiB");
    assert!(found(place.path(), &backup).await == content(1));
    fixture.world.disks.put("db", vec![("root".into(), content(2))]);
    backed_up(&fixture, place.path(), "b2").await;
    assert_eq!(held(place.path()).await.len(), 2);
    let verification = json!({"id": "v", "by": "root", "atMs": 1, "done": 0, "total": 0});
    fixture.put(&keys::verification(&name("nas")), &verification).await;
    let verified = |fixture: &Fixture| -> Verification {
        serde_json::from_value(fixture.peek(&keys::verification(&name("nas"))).unwrap()).unwrap()
    };
    until(&fixture, "it is verified", |fixture| verified(fixture).outcome.is_some()).await;
    let said = verified(&fixture).outcome.unwrap();
    assert!(said.well && said.message == "2 are whole (4 chunks read)", "{said:?}");
}

/// Whatever attempts went before: what is read and what is taken over from the one before make up the disk.
#[tokio::test(start_paused = true)]
async fn what_changed_is_read_and_the_rest_is_that_of_the_one_before() {
    let place = tempfile::tempdir().unwrap();
    let fixture = world(place.path()).await;
    backed_up(&fixture, place.path(), "b1").await;
    let mut now = content(1);
    now[(8 << 20) + 5] = 9;
    fixture.world.disks.put("db", vec![("root".into(), now.clone())]);
    let second = backed_up(&fixture, place.path(), "b2").await;
    assert_eq!(second.disks[0].read.0, 1 << 20, "only the last chunk has changed");
    assert!(found(place.path(), &second).await == now);
    // It stands, and that it does was never told: it is not made anew.
    let opened = fixture.world.disks.opened("db");
    now[7] = 3;
    fixture.world.disks.put("db", vec![("root".into(), now.clone())]);
    let again = backed_up(&fixture, place.path(), "b2").await;
    assert_eq!((again.mark, fixture.world.disks.opened("db")), (second.mark, opened));
    let third = backed_up(&fixture, place.path(), "b3").await;
    assert_eq!(third.disks[0].read.0, 4 << 20);
    assert!(found(place.path(), &third).await == now);
    // Another process knows of no marks.
    fixture.world.disks.forget("db");
    now[(8 << 20) + 1] = 4;
    fixture.world.disks.put("db", vec![("root".into(), now.clone())]);
    let fourth = backed_up(&fixture, place.path(), "b4").await;
    assert_eq!((fourth.disks[0].read.0, fourth.disks[0].stored.0 < 9000), (5 << 20, true));
    assert!(found(place.path(), &fourth).await == now);
    // What the one before names is gone: it is not built on.
    let index = repository(place.path()).index(&fourth, &name("root")).await.unwrap();
    let lost = index.chunks[0].unwrap();
    let hex: String = lost.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = place.path().join("chunks").join(&hex[..2]).join(&hex);
    std::fs::write(&path, b"rubbish").unwrap();
    assert!(repository(place.path()).condemn(&lost).await.unwrap());
    let fifth = backed_up(&fixture, place.path(), "b5").await;
    assert!(found(place.path(), &fifth).await == now);
}

#[tokio::test(start_paused = true)]
async fn those_that_are_too_old_go_unless_a_vm_is_made_from_them() {
    let place = tempfile::tempdir().unwrap();
    let fixture = world(place.path()).await;
    let first = backed_up(&fixture, place.path(), "b1").await;
    let repository = repository(place.path());
    let index = repository.index(&first, &name("root")).await.unwrap();
    for (id, uid) in [("a1", "u-db"), ("a2", "u-db"), ("a3", "u-other")] {
        let mut old = Backup { id: id.into(), vm_uid: uid.into(), at_ms: -10, ..first.clone() };
        let lists = [(name("root"), index.clone())];
        repository.finish(&mut old, &lists, None, std::time::Duration::ZERO).await.unwrap();
    }
    let from = json!({"target": "nas", "vm": "db", "id": "a2", "disk": "root"});
    let disks = json!([{"name": "root", "pool": "fast", "size": "1GiB", "backup": from}]);
    fixture.object(Kind::Vm, "copy", json!({"memory": "64MiB", "disks": disks})).await;
    backed_up(&fixture, place.path(), "b2").await;
    for _ in 0..200 {
        if held(place.path()).await.len() == 4 {
            break;
        }
        fixture.pass(1).await;
    }
    let left: Vec<String> = held(place.path()).await.into_iter().map(|one| one.id).collect();
    assert_eq!(left, ["a2", "a3", "b1", "b2"]);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_ended_or_of_another_vm_or_of_one_that_moves_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let fixture = world(place.path()).await;
    let other = BackupRun::new("u-older", name("nas"), "root".into(), 1, None);
    let key = keys::backup(&name("db"));
    fixture.put(&key, &serde_json::to_value(other).unwrap()).await;
    fixture.pass(30).await;
    assert!(!ended(&fixture), "it is of a VM that is gone");
    fixture.world.disks.hangs.store(true, std::sync::atomic::Ordering::Release);
    ask(&fixture, "b1").await;
    until(&fixture, "it begins", |fixture| fixture.world.disks.is_open("db")).await;
    let stopped = run(&fixture).ended(2, false, "root ended it".into());
    fixture.put(&key, &serde_json::to_value(stopped).unwrap()).await;
    fixture.pass(30).await;
    assert!(held(place.path()).await.is_empty());
    assert!(!fixture.world.disks.is_open("db"));
    assert_eq!(run(&fixture).outcome.unwrap().message, "root ended it");
    let mut placement = fixture.peek(&keys::placement(&name("db"))).unwrap();
    placement["movingTo"] = json!({"host": "host2", "restart": true});
    fixture.put(&keys::placement(&name("db")), &placement).await;
    ask(&fixture, "b2").await;
    fixture.pass(30).await;
    assert!(!ended(&fixture) && held(place.path()).await.is_empty(), "its move comes first");
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_made_says_why() {
    let place = tempfile::tempdir().unwrap();
    let fixture = world(place.path()).await;
    std::fs::remove_file(place.path().join("haven-backups.json")).unwrap();
    ask(&fixture, "b1").await;
    until(&fixture, "it ends", ended).await;
    let outcome = run(&fixture).outcome.unwrap();
    assert!(!outcome.well && outcome.message.contains("is not a place of backups"), "{outcome:?}");
    let elsewhere: Name = name("tape");
    let mut of = BackupRun::new("u-db", elsewhere, "root".into(), 1, None);
    of.id = "b2".into();
    fixture.put(&keys::backup(&name("db")), &serde_json::to_value(of).unwrap()).await;
    until(&fixture, "it ends", ended).await;
    let outcome = run(&fixture).outcome.unwrap();
    assert!(outcome.message.contains("there is no target `tape`"), "{outcome:?}");
    assert!(fixture.runs("db"));
}

/// What was noted of the disks' changes is void once they are what they were: all is read, and what is kept is what they hold.
#[tokio::test(start_paused = true)]
async fn after_a_disk_was_reverted_the_next_one_reads_all_of_it() {
    let place = tempfile::tempdir().unwrap();
    let fixture = world(place.path()).await;
    let before = content(1);
    let key = keys::vm_snapshot("u-db", &name("before"));
    let disk = json!({"name": "root", "pool": "fast", "size": "1GiB"});
    let record =
        json!({"id": "s", "vm": "db", "by": "root", "atMs": 1, "disks": [disk], "state": "wanted"});
    fixture.put(&key, &record).await;
    fixture.pass(5).await;
    assert_eq!(fixture.peek(&key).unwrap()["state"], "there");
    // The newest backup is of after the snapshot, and holds what will be no more.
    let mut now = before.clone();
    now[(8 << 20) + 5] = 9;
    fixture.world.disks.put("db", vec![("root".into(), now.clone())]);
    let newest = backed_up(&fixture, place.path(), "b1").await;
    assert!(found(place.path(), &newest).await == now);
    let vm = |runs: bool| json!({"running": runs, "backup": {"to": "nas", "keep": "1ms"}});
    fixture.vm("db", "good", vm(false)).await;
    fixture.pass(3).await;
    let mut reverting = fixture.peek(&key).unwrap();
    reverting["state"] = "reverting".into();
    reverting["back"] = json!(["root"]);
    fixture.put(&key, &reverting).await;
    fixture.pass(5).await;
    assert_eq!(fixture.peek(&key).unwrap()["revertedMs"], 1);
    fixture.vm("db", "good", vm(true)).await;
    fixture.pass(3).await;
    assert!(fixture.runs("db"));
    let after = backed_up(&fixture, place.path(), "b2").await;
    assert_eq!(after.disks[0].read.0, 5 << 20, "all that is not zeros");
    assert!(found(place.path(), &after).await == before);
}

/// Neither is kept while the other reads: a snapshot waits, and says for what.
#[tokio::test(start_paused = true)]
async fn a_snapshot_waits_until_the_backup_has_ended() {
    let place = tempfile::tempdir().unwrap();
    let fixture = world(place.path()).await;
    fixture.world.disks.hangs.store(true, std::sync::atomic::Ordering::Release);
    ask(&fixture, "b1").await;
    until(&fixture, "it begins", |fixture| fixture.world.disks.is_open("db")).await;
    let key = keys::vm_snapshot("u-db", &name("now"));
    let disk = json!({"name": "root", "pool": "fast", "size": "1GiB"});
    let record =
        json!({"id": "s", "vm": "db", "by": "root", "atMs": 1, "disks": [disk], "state": "wanted"});
    fixture.put(&key, &record).await;
    fixture.pass(10).await;
    let now = fixture.peek(&key).unwrap();
    assert_eq!(
        (&now["state"], &now["message"]),
        (&json!("wanted"), &json!("its VM is being backed up"))
    );
    let stopped = run(&fixture).ended(2, false, "root ended it".into());
    fixture.put(&keys::backup(&name("db")), &serde_json::to_value(stopped).unwrap()).await;
    fixture.pass(10).await;
    assert_eq!(fixture.peek(&key).unwrap()["state"], "there");
}
