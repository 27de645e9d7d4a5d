//! With a real NFS server: what is made, who may write, what is refused. `xtask/filer-lab.sh up-nfs`, `test nfs`, `down` runs it.

use super::{directory::Directory, node::node, volumes::NfsPools};
use crate::agent::storage::{FilerLaunch, VolumeName, VolumeReady, VolumeWanted};
use haven_model::{NfsSpec, PoolDriverKind, PoolSpec, pool::PoolRoom};
use std::{path::PathBuf, process::Command};

/// The address of a server whose exports the lab's script names; nothing where there is none.
fn server() -> Option<(String, String)> {
    let server = std::env::var("HAVEN_FILER_TEST").ok();
    let found = server.zip(std::env::var("HAVEN_FILER_EXPORT").ok());
    if found.is_none() {
        println!("skipped: needs an NFS server (xtask/filer-lab.sh up-nfs, then test nfs)");
    }
    found
}

fn spec(server: &str, path: &str) -> NfsSpec {
    NfsSpec { server: server.into(), path: path.into(), mark: None }
}

async fn pool(server: &str, export: &str) -> PoolSpec {
    let mut nfs = spec(server, &format!("{export}/disks"));
    nfs.mark = Some(NfsPools.check(&nfs, false).await.unwrap());
    PoolSpec { nfs: Some(nfs), ..PoolSpec::new(PoolDriverKind::Nfs, "") }
}

fn wanted(disk: &str, size_bytes: u64) -> VolumeWanted {
    let (vm, disk) = ("web".parse().unwrap(), disk.parse().unwrap());
    let vm_uid = "01890000-0000-7000-8000-000000000000".to_owned();
    VolumeWanted {
        name: VolumeName { vm, disk, vm_uid },
        size_bytes,
        image: None,
        backup: None,
        copy: None,
        key: None,
        progress: Default::default(),
        owner_uid: 200_000,
    }
}

/// What QEMU has written and reads, by its own driver.
fn qemu_io(ready: &VolumeReady, commands: &[&str]) -> Result<String, String> {
    let Some(FilerLaunch::Nfs(of)) = ready.filer.as_deref() else { panic!("{ready:?}") };
    let mut command = Command::new("qemu-io");
    let of = node("d0", of);
    let of = serde_json::json!({ "driver": "raw", "file": of["file"] });
    command.arg("-t").arg("none").args(commands.iter().flat_map(|one| ["-c", one]));
    let output = command.arg(format!("json:{of}")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.success() && !complained.contains("rror") {
        true => Ok(said),
        false => Err(said + &complained),
    }
}

#[tokio::test]
async fn what_cannot_be_a_pool_is_refused_in_one_sentence() {
    let Some((server, export)) = server() else { return };
    for (of, says) in [
        (spec("10.86.8.3", "/x"), "nobody answers as an NFS server at 10.86.8.3"),
        (spec(&server, "/nothing"), "does not give /nothing to this host"),
        (spec(&server, &format!("{export}/none")), "does not give"),
        (spec(&server, &format!("{export}/full")), "is not empty (it holds foreign)"),
        (spec(&server, &export.replace("export", "squash/disks")), "no_root_squash"),
        (spec(&server, &format!("{export}/closed")), "chmod 711"),
    ] {
        let said = NfsPools.check(&of, false).await.unwrap_err().what;
        println!("  {said}");
        assert!(said.contains(says), "{says}: {said}");
    }
    let of = spec(&server, &format!("{export}/closed"));
    let names = Directory::open(&of, 0).await.unwrap().names().await.unwrap();
    assert!(names.is_empty(), "something was left there: {names:?}");
}

#[tokio::test]
async fn disks_are_made_written_grown_and_removed() {
    let Some((server, export)) = server() else { return };
    let pool = pool(&server, &export).await;
    let again = NfsPools.check(pool.nfs.as_ref().unwrap(), false).await.unwrap();
    assert_eq!(Some(&*again), pool.mark(), "it is the pool that it was");
    let disk = wanted("root", 8 << 20);
    assert!(NfsPools.has(&pool, &disk.name).await.unwrap().is_none());
    let ready = NfsPools.volume(&pool, &disk, None).await.unwrap();
    qemu_io(&ready, &["write -P 7 1M 64k", "flush"]).unwrap();
    let larger = VolumeWanted { size_bytes: 16 << 20, ..disk.clone() };
    let ready = NfsPools.volume(&pool, &larger, None).await.unwrap();
    qemu_io(&ready, &["read -P 7 1M 64k", "read -P 0 15M 1M", "length"]).unwrap();
    let PoolRoom { total, free, used } = NfsPools.room(&pool).await.unwrap();
    assert!(total >= free && free.0 > 0 && used.0 >= 64 << 10, "{total} {free} {used}");
    // From an image.
    let image = std::env::temp_dir().join("image.qcow2");
    let raw = std::env::temp_dir().join("image.raw");
    std::fs::write(&raw, [b"marked".repeat(1 << 16), vec![0; 1 << 20]].concat()).unwrap();
    let convert = ["convert", "-O", "qcow2"];
    assert!(
        Command::new("qemu-img").args(convert).args([&raw, &image]).status().unwrap().success()
    );
    let made = wanted("system", 4 << 20);
    let ready = NfsPools.volume(&pool, &made, Some((image, "qcow2".into()))).await.unwrap();
    let said = qemu_io(&ready, &["read -v 0 512"]).unwrap();
    assert!(said.contains("markedmarked"), "{said}");
    let small = wanted("small", 1 << 10);
    let image = Some((PathBuf::from(&raw), "raw".to_owned()));
    let said = NfsPools.volume(&pool, &small, image).await.unwrap_err().what;
    assert!(said.contains("make the disk at least that large"), "{said}");
    let huge = wanted("huge", 1 << 60);
    let said = NfsPools.volume(&pool, &huge, None).await.unwrap_err().what;
    assert!(said.contains("is full"), "{said}");
    for disk in [&disk, &made] {
        NfsPools.delete(&pool, &disk.name).await.unwrap();
        NfsPools.delete(&pool, &disk.name).await.unwrap();
    }
    let mut directory = Directory::open(pool.nfs.as_ref().unwrap(), 0).await.unwrap();
    assert_eq!(directory.names().await.unwrap(), [".haven-pool"]);
}

#[tokio::test]
async fn who_was_shut_out_writes_nothing_more() {
    let Some((server, export)) = server() else { return };
    let pool = pool(&server, &export).await;
    let disk = wanted("shut", 1 << 20);
    let before = NfsPools.volume(&pool, &disk, None).await.unwrap();
    qemu_io(&before, &["write -P 1 0 64k"]).unwrap();
    let Some(FilerLaunch::Nfs(then)) = before.filer.as_deref() else { panic!() };
    let mut late = Directory::open(pool.nfs.as_ref().unwrap(), then.owner).await.unwrap();
    let name = then.path.rsplit_once('/').unwrap().1;
    let file = late.find(name).await.unwrap().unwrap();
    assert!(late.write(&file, name, &[1]).await.unwrap(), "it may write until then");
    NfsPools.shut_out(&pool, &disk.name).await.unwrap();
    assert!(!late.write(&file, name, b"late").await.unwrap(), "what it had open is open yet");
    let refused = qemu_io(&before, &["write -P 2 0 64k"]).unwrap_err();
    assert!(refused.contains("ACCESS denied"), "{refused}");
    let after = NfsPools.volume(&pool, &disk, None).await.unwrap();
    qemu_io(&after, &["read -P 1 0 64k", "write -P 3 0 64k", "flush"]).unwrap();
    assert!(!late.write(&file, name, b"late").await.unwrap());
    qemu_io(&after, &["read -P 3 0 64k"]).unwrap();
    // One that moves has the same owner.
    let taker = NfsPools.volume(&pool, &disk, None).await.unwrap();
    assert_eq!(taker.filer, after.filer);
    NfsPools.delete(&pool, &disk.name).await.unwrap();
}

#[tokio::test]
async fn nothing_is_made_where_the_mark_is_missing_or_anothers() {
    let Some((server, export)) = server() else { return };
    let right = pool(&server, &export).await;
    let disk = wanted("lost", 1 << 20);
    let mut another = right.clone();
    another.set_mark(Some("another".into()));
    let said = NfsPools.volume(&another, &disk, None).await.unwrap_err().what;
    assert!(said.contains("is not this pool but another one"), "{said}");
    let mut directory = Directory::open(right.nfs.as_ref().unwrap(), 0).await.unwrap();
    let mark = right.mark().unwrap().to_owned();
    directory.remove(".haven-pool").await.unwrap();
    for said in [
        NfsPools.volume(&right, &disk, None).await.unwrap_err().what,
        NfsPools.delete(&right, &disk.name).await.unwrap_err().what,
        NfsPools.room(&right).await.unwrap_err().what,
    ] {
        assert!(said.contains("the right file system is not mounted there"), "{said}");
    }
    assert!(directory.names().await.unwrap().is_empty(), "something was made");
    let made = directory.create(".haven-pool", 0, 0).await.unwrap();
    assert!(directory.write(&made, ".haven-pool", mark.as_bytes()).await.unwrap());
    assert!(NfsPools.has(&right, &disk.name).await.unwrap().is_none());
}
