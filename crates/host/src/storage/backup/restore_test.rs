//! Disks made from backups, with the real `qemu-nbd`, and targets whose key is sealed.

use super::{
    repository::{CHUNK, Index, Place, Repository},
    restore::Restore,
    target::Targets,
};
use crate::storage::qemu_img;
use haven_model::{
    Bytes, Name, ObjectRef, Snapshot,
    backup::{Backup, BackupDisk, BackupRef, Moment},
    keys,
    object::Kind,
};
use haven_store::{
    pki::Authority,
    seal::{ClusterKey, Plain},
};
use serde_json::json;
use std::{path::Path, sync::Arc, time::Duration};
use tokio::sync::watch;

/// Two chunks, one of zeros, and a bit.
const SIZE: usize = (3 << 22) + 12_288;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn content() -> Vec<u8> {
    let mut content: Vec<u8> = (0..SIZE).map(|i| ((i * 7919) >> 7) as u8).collect();
    content[1 << 22..2 << 22].fill(0);
    content
}

async fn kept(place: &Path) -> (Repository, Vec<Option<[u8; 32]>>) {
    let repository = Repository::open(&Place::Directory(place.to_owned())).unwrap();
    repository.create(1).await.unwrap();
    let mut index = Index { size: SIZE as u64, chunks: Vec::new() };
    for chunk in content().chunks(CHUNK as usize) {
        index.chunks.push(repository.put(chunk.to_vec().into()).await.unwrap().0);
    }
    let disk = BackupDisk {
        name: name("root"),
        size: Bytes(SIZE as u64),
        index: String::new(),
        used: Bytes(0),
        read: Bytes(0),
        stored: Bytes(0),
    };
    let mut backup = Backup {
        id: "b1".into(),
        vm: name("db"),
        vm_uid: "u1".into(),
        at_ms: 1,
        ended_ms: 2,
        by: "test".into(),
        moment: Moment::Running,
        mark: String::new(),
        object: serde_json::Value::Null,
        disks: vec![disk],
    };
    let lists = [(name("root"), index.clone())];
    repository.finish(&mut backup, &lists, None, Duration::ZERO).await.unwrap();
    (repository, index.chunks)
}

fn from(repository: &Repository, id: &str) -> Restore {
    let of = BackupRef { target: name("nas"), vm: name("db"), id: id.into(), disk: name("root") };
    Restore { repository: repository.clone(), of, progress: Default::default() }
}

fn there(program: &str) -> bool {
    let there = std::process::Command::new(program).arg("--version").output().is_ok();
    if !there {
        println!("skipped: needs {program}, from the package qemu-utils");
    }
    there
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_made_of_what_a_backup_holds() {
    if !there("qemu-nbd") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("place");
    std::fs::create_dir(&place).unwrap();
    let (repository, chunks) = kept(&place).await;
    let size = SIZE as u64 + 65_536;
    let make = async |format: &str| {
        let path = directory.path().join(format!("disk.{format}"));
        let text = path.to_str().unwrap().to_owned();
        let _ = std::fs::remove_file(&path);
        qemu_img::make(&["create", "-q", "-f", format, &text, &size.to_string()]).await.unwrap();
        path
    };
    for format in ["raw", "qcow2"] {
        let path = make(format).await;
        let restore = from(&repository, "b1");
        restore.fill(&path, format, size, None).await.unwrap();
        assert!(restore.progress.percent() > 50);
        let raw = directory.path().join("as-raw");
        let (path, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
        qemu_img::make(&["convert", "-f", format, "-O", "raw", path, to]).await.unwrap();
        let found = std::fs::read(&raw).unwrap();
        assert!(found[..SIZE] == content(), "{format}");
        assert!(found.len() as u64 == size && found[SIZE..].iter().all(|byte| *byte == 0));
    }
    let path = make("raw").await;
    let small = from(&repository, "b1").fill(&path, "raw", 4096, None).await.unwrap_err();
    assert!(small.what.contains("make the disk at least that large"), "{small}");
    let none = from(&repository, "b9").fill(&path, "raw", size, None).await.unwrap_err();
    assert!(none.what.contains("has no backup b9 of db"), "{none}");
    let hex: String = chunks[0].unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    let chunk = place.join("chunks").join(&hex[..2]).join(&hex);
    let mut stored = std::fs::read(&chunk).unwrap();
    stored[100] ^= 1;
    std::fs::write(&chunk, stored).unwrap();
    let damaged = from(&repository, "b1").fill(&path, "raw", size, None).await.unwrap_err();
    assert!(damaged.what.contains(&hex) && damaged.what.contains("is damaged"), "{damaged}");
}

#[test]
fn a_target_is_opened_with_its_key_and_without_it_says_so() {
    let key = ClusterKey::derive(&Authority::create("test").unwrap()).unwrap();
    let object = ObjectRef::new(Kind::Target, name("far"));
    let sealed = key.seal(&object, &Plain::new("KEY".into())).unwrap();
    let mut snapshot = Snapshot::default();
    let spec = json!({"s3": {"endpoint": "https://s3.example.net", "bucket": "b", "accessKey": "A", "secretKey": sealed}});
    let meta = json!({"name": "far", "uid": "u", "generation": 1});
    let record = json!({"meta": meta, "spec": spec}).to_string();
    snapshot.apply(&keys::object(&object), Some((record.as_bytes(), 3)));
    let live = watch::channel(Arc::new(snapshot)).1;
    assert!(Targets::new(live.clone(), Some(key)).repository(&name("far")).is_ok());
    let said = |targets: &Targets, target: &str| {
        targets.repository(&name(target)).err().map(|failure| failure.what).unwrap_or_default()
    };
    let without = said(&Targets::new(live.clone(), None), "far");
    assert!(without.contains("cannot derive the cluster's key"), "{without}");
    let other = ClusterKey::derive(&Authority::create("other").unwrap()).unwrap();
    let other = said(&Targets::new(live.clone(), Some(other)), "far");
    assert!(other.contains("cannot be opened") && !other.contains("KEY"), "{other}");
    let none = said(&Targets::new(live, None), "near");
    assert!(none.contains("there is no target `near`"), "{none}");
}
