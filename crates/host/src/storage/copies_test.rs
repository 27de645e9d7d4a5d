//! Tests of disks that are made from a snapshot in a disk of another VM.

use super::{
    backup::target::Targets,
    files::{self, Fetch, FileStorage},
    images::ImageStore,
    masters_test::Xfs,
    pool, qemu_img, says,
};
use crate::agent::storage::{
    CopyFrom, SnapshotStep, Storage, StorageFailure, VolumeName, VolumeWanted,
};
use async_trait::async_trait;
use haven_model::{Bytes, PoolDriverKind, PoolSpec, image::ImageFile};
use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

const BEFORE: &str = "haven-a1";

struct Nobody;

#[async_trait]
impl Fetch for Nobody {
    async fn fetch(&self, _file: &ImageFile, _into: &ImageStore) -> Result<(), StorageFailure> {
        Err(says("no other host has it"))
    }
}

struct Fixture {
    storage: FileStorage,
    pool: PoolSpec,
    image: (ImageFile, String),
    _base: tempfile::TempDir,
}

async fn fixture(directory: &Path, driver: PoolDriverKind) -> Fixture {
    let base = tempfile::tempdir().unwrap();
    let images = ImageStore::new(base.path().join("images"));
    let imported = images.import(&vec![5; 4 << 20][..], None).await.unwrap();
    let image = ImageFile { sha256: imported.sha256, size: Bytes(imported.size) };
    let (run, peers) = (base.path().join("vms"), Arc::new(Nobody));
    let storage = FileStorage::new(images, run, peers, Targets::none());
    let path = directory.join(format!("{driver:?}"));
    std::fs::create_dir_all(&path).unwrap();
    let pool = PoolSpec::new(driver, path.to_str().unwrap());
    if driver == PoolDriverKind::Shared {
        pool::create_shared(&pool).unwrap();
    }
    Fixture { storage, pool, image: (image, "raw".into()), _base: base }
}

fn named(vm: &str) -> VolumeName {
    VolumeName::parse(&format!("{vm}.root.u-{vm}")).unwrap()
}

impl Fixture {
    fn wanted(&self, vm: &str) -> VolumeWanted {
        VolumeWanted {
            name: named(vm),
            size_bytes: 64 << 20,
            image: None,
            backup: None,
            copy: None,
            key: None,
            progress: Default::default(),
            owner_uid: nix::unistd::geteuid().as_raw(),
        }
    }

    /// The disk of `db`: from its image, with 7 in it when the snapshot was taken and 8 since.
    async fn source(&self) -> PathBuf {
        let wanted = VolumeWanted { image: Some(self.image.clone()), ..self.wanted("db") };
        let path = self.storage.volume(&self.pool, &wanted).await.unwrap().path;
        io(&path, "write -P 7 1M 64k");
        io(&path, "write -P 7 20M 64k");
        let step = |step, tag| self.storage.snapshot(&self.pool, &wanted.name, step, tag, None);
        step(SnapshotStep::Take, "haven-older").await.unwrap();
        step(SnapshotStep::Take, BEFORE).await.unwrap();
        io(&path, "write -P 8 1M 64k");
        io(&path, "write -P 8 40M 64k");
        path
    }

    async fn copy(&self, vm: &str, tag: &str) -> Result<PathBuf, StorageFailure> {
        let copy = Some(CopyFrom { name: named("db"), tag: tag.into() });
        let wanted = VolumeWanted { copy, ..self.wanted(vm) };
        self.storage.volume(&self.pool, &wanted).await.map(|ready| ready.path)
    }
}

fn io(path: &Path, command: &str) {
    let ran = Command::new("qemu-io").args(["-f", "qcow2", "-c", command]).arg(path).output();
    let ran = ran.unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert!(ran.status.success() && !said.contains("failed"), "{command}: {said} {ran:?}");
}

/// A program that has a disk open, as its VM's QEMU has, and does what it is told.
struct Guest(Child, BufReader<std::process::ChildStdout>);

impl Guest {
    fn of(path: &Path) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let told = BufReader::new(child.stdout.take().unwrap());
        let mut guest = Self(child, told);
        guest.does("write -P 9 1M 64k");
        guest
    }

    fn does(&mut self, command: &str) {
        writeln!(self.0.stdin.as_mut().unwrap(), "{command}").unwrap();
        let mut line = String::new();
        while !line.contains("ops;") {
            line.clear();
            assert!(self.1.read_line(&mut line).unwrap() > 0, "it has ended");
            assert!(!line.contains("failed"), "{line}");
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the snapshot kept is in the copy, whole and alone, and the source goes on.
async fn copied(fixture: &Fixture) {
    let source = fixture.source().await;
    let mut guest = Guest::of(&source);
    let copy = fixture.copy("copy", BEFORE).await.unwrap();
    guest.does("write -P 10 1M 64k");
    guest.does("write -P 10 60M 64k");
    for (value, at) in [(7, "1M"), (7, "20M"), (5, "2M"), (0, "40M"), (0, "60M")] {
        io(&copy, &format!("read -P {value} {at} 64k"));
    }
    let keeps = fixture.storage.keeps(&fixture.pool, &named("copy")).await.unwrap().unwrap();
    assert_eq!((keeps.size, keeps.snapshots.len()), (64 << 20, 0));
    let check = qemu_img::run(&["check", "-q", "-f", "qcow2", copy.to_str().unwrap()]).await;
    assert_eq!(check, Ok(Vec::new()));
    // It is a disk of its own: what is written on one is not on the other, also once the source is gone.
    io(&copy, "write -P 3 2M 64k");
    drop(guest);
    io(&source, "read -P 10 1M 64k");
    io(&source, "read -P 5 2M 64k");
    io(&source, "read -P 8 40M 64k");
    fixture.storage.delete_volume(&fixture.pool, &named("db")).await.unwrap();
    for (value, at) in [(7, "1M"), (3, "2M"), (5, "3M")] {
        io(&copy, &format!("read -P {value} {at} 64k"));
    }
    // It is there, and is not made again from what is there no more.
    assert_eq!(fixture.copy("copy", BEFORE).await.unwrap(), copy);
    let said = fixture.copy("other", BEFORE).await.unwrap_err().what;
    assert!(
        said.contains("the disk `root` of db, from which a disk is to be made, is not on"),
        "{said}"
    );
    assert!(!files::path(&fixture.pool, &named("other")).exists());
}

#[tokio::test]
async fn a_disk_is_copied_from_one_that_is_in_use() {
    let base = tempfile::tempdir().unwrap();
    for driver in [PoolDriverKind::Local, PoolDriverKind::Shared] {
        let fixture = fixture(base.path(), driver).await;
        copied(&fixture).await;
        // Only what is not in the image was copied.
        let source = fixture.source().await;
        let copy = fixture.copy("small", BEFORE).await.unwrap();
        let taken =
            std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&copy).unwrap()) * 512;
        assert!(taken < 2 << 20, "{taken} {}", source.display());
    }
}

#[tokio::test]
async fn a_disk_shares_the_blocks_of_one_that_is_in_use() {
    let Some(xfs) = Xfs::new() else { return };
    for driver in [PoolDriverKind::Local, PoolDriverKind::Shared] {
        let fixture = fixture(&xfs.path(), driver).await;
        copied(&fixture).await;
    }
}

#[tokio::test]
async fn a_snapshot_that_is_gone_is_told_and_nothing_is_made() {
    let base = tempfile::tempdir().unwrap();
    let fixture = fixture(base.path(), PoolDriverKind::Local).await;
    fixture.source().await;
    let said = fixture.copy("copy", "haven-other").await.unwrap_err().what;
    assert!(said.contains("the disk `root` of db does not keep any more what"), "{said}");
    let names = std::fs::read_dir(&fixture.pool.path).unwrap().count();
    assert_eq!(names, 1);
}
