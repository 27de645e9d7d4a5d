//! Tests of disks that are made from an image by way of the pool's master of it.

use super::{
    backup::target::Targets,
    files::{Fetch, FileStorage},
    images::ImageStore,
    masters::{self, DIRECTORY},
    pool, qemu_img, says,
};
use crate::agent::storage::{Storage, StorageFailure, VolumeName, VolumeWanted};
use async_trait::async_trait;
use haven_model::{Bytes, PoolDriverKind, PoolSpec, image::ImageFile};
use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, SystemTime},
};

struct Nobody;

#[async_trait]
impl Fetch for Nobody {
    async fn fetch(&self, _file: &ImageFile, _into: &ImageStore) -> Result<(), StorageFailure> {
        Err(says("no other host has it"))
    }
}

/// An XFS of its own, which can share blocks; only for this thread and those that it starts.
pub(super) struct Xfs(tempfile::TempDir);

impl Xfs {
    pub(super) fn new() -> Option<Self> {
        let base = tempfile::tempdir().unwrap();
        let (disk, at) = (base.path().join("disk"), base.path().join("at"));
        std::fs::create_dir(&at).unwrap();
        File::create(&disk).unwrap().set_len(512 << 20).unwrap();
        let ran = |program: &str, args: &[&str]| {
            let ran = Command::new(program).args(args).output();
            ran.is_ok_and(|output| output.status.success())
        };
        let disk = disk.to_str().unwrap();
        let private = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_ok()
            && ran("mount", &["--make-rprivate", "/"]);
        let at = at.to_str().unwrap();
        if !private || !ran("mkfs.xfs", &["-q", disk]) || !ran("mount", &["-o", "loop", disk, at]) {
            println!("skipped: needs root, loop devices and mkfs.xfs");
            return None;
        }
        Some(Self(base))
    }

    pub(super) fn path(&self) -> PathBuf {
        self.0.path().join("at")
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// What a disk holds at an offset, eight bytes as numbers.
fn at(path: &Path, format: &str, offset: &str) -> String {
    let read = format!("read -v {offset} 8");
    let told = Command::new("qemu-io").args(["-r", "-f", format, "-c", &read]).arg(path).output();
    let told = String::from_utf8(told.unwrap().stdout).unwrap();
    told.lines().next().unwrap_or_default().chars().take(34).collect()
}

fn write(path: &Path, format: &str, command: &str) {
    let ran = Command::new("qemu-io").args(["-f", format, "-c", command]).arg(path).output();
    let ran = ran.unwrap();
    assert!(ran.status.success(), "{ran:?}");
}

struct Fixture {
    storage: FileStorage,
    image: (ImageFile, String),
    _base: tempfile::TempDir,
}

async fn fixture() -> Fixture {
    let base = tempfile::tempdir().unwrap();
    let images = ImageStore::new(base.path().join("images"));
    let content: Vec<u8> = (0..4 << 20).map(|i: usize| ((i * 7919) >> 8) as u8 | 1).collect();
    let imported = images.import(&content[..], None).await.unwrap();
    let image = ImageFile { sha256: imported.sha256, size: Bytes(imported.size) };
    let (run, peers) = (base.path().join("vms"), Arc::new(Nobody));
    let storage = FileStorage::new(images, run, peers, Targets::none());
    Fixture { storage, image: (image, "raw".into()), _base: base }
}

impl Fixture {
    fn wanted(&self, uid: &str) -> VolumeWanted {
        VolumeWanted {
            name: VolumeName::parse(&format!("web-1.root.{uid}")).unwrap(),
            size_bytes: 64 << 20,
            image: Some(self.image.clone()),
            backup: None,
            copy: None,
            key: None,
            progress: Default::default(),
            owner_uid: nix::unistd::geteuid().as_raw(),
        }
    }

    async fn disk(&self, pool: &PoolSpec, uid: &str) -> PathBuf {
        self.storage.volume(pool, &self.wanted(uid)).await.unwrap().path
    }

    fn master(&self, pool: &PoolSpec) -> PathBuf {
        let name = format!("{}.{}", self.image.0.sha256, pool::format(pool));
        Path::new(&pool.path).join(DIRECTORY).join(name)
    }
}

fn pool_at(path: &Path, driver: PoolDriverKind) -> PoolSpec {
    std::fs::create_dir_all(path).unwrap();
    let pool = PoolSpec::new(driver, path.to_str().unwrap());
    if driver == PoolDriverKind::Shared {
        pool::create_shared(&pool).unwrap();
    }
    pool
}

/// Two disks of one image: each has all of it, and what is written to one is not in the other.
async fn two_disks(fixture: &Fixture, pool: &PoolSpec) -> (PathBuf, PathBuf) {
    let format = pool::format(pool);
    let (one, two) = (fixture.disk(pool, "u-1").await, fixture.disk(pool, "u-2").await);
    let image = fixture.storage.images.path(&fixture.image.0.sha256);
    let first = at(&image, "raw", "1M");
    assert!(first.starts_with("00100000:"), "{first}");
    for disk in [&one, &two] {
        assert_eq!(at(disk, format, "1M"), first);
        assert_eq!(qemu_img::size_of(disk, format).await.unwrap(), 64 << 20);
        assert_eq!(std::fs::metadata(disk).unwrap().mode() & 0o777, 0o600);
    }
    write(&one, format, "write -P 9 1M 64k");
    assert_ne!(at(&one, format, "1M"), first);
    assert_eq!((at(&two, format, "1M"), at(&image, "raw", "1M")), (first.clone(), first));
    (one, two)
}

#[tokio::test]
async fn disks_of_a_shared_pool_stand_on_one_master_where_blocks_cannot_be_shared() {
    let (fixture, base) = (fixture().await, tempfile::tempdir().unwrap());
    // ext4 and tmpfs cannot.
    let pool = pool_at(&base.path().join("pool"), PoolDriverKind::Shared);
    let (one, two) = two_disks(&fixture, &pool).await;
    let master = fixture.master(&pool);
    let found = std::fs::metadata(&master).unwrap();
    assert_eq!(found.mode() & 0o777, 0o444);
    for disk in [&one, &two] {
        let told = qemu_img::run(&["info", "--output=json", disk.to_str().unwrap()]).await.unwrap();
        let told: serde_json::Value = serde_json::from_slice(&told).unwrap();
        let on = format!("{DIRECTORY}/{}", master.file_name().unwrap().to_str().unwrap());
        // By a name that is the same wherever the pool is mounted.
        assert_eq!(told["backing-filename"], on, "{told}");
        assert!(std::fs::metadata(disk).unwrap().blocks() * 512 < 1 << 20);
    }
    // It is made once, and is neither a volume nor forgotten in what the pool takes.
    fixture.disk(&pool, "u-3").await;
    assert_eq!(std::fs::metadata(&master).unwrap().ino(), found.ino());
    assert!(pool::room(&pool).unwrap().unwrap().used.0 >= found.blocks() * 512);
    fixture.storage.delete_volume(&pool, &fixture.wanted("u-1").name).await.unwrap();
    assert!(master.exists());
    assert_eq!(at(&two, "qcow2", "0").len(), 34);
}

#[tokio::test]
async fn a_replica_stands_on_nothing_and_is_copied_where_blocks_cannot_be_shared() {
    let (fixture, base) = (fixture().await, tempfile::tempdir().unwrap());
    let pool = pool_at(&base.path().join("pool"), PoolDriverKind::Mirrored);
    two_disks(&fixture, &pool).await;
    let masters = Path::new(&pool.path).join(DIRECTORY);
    assert_eq!(std::fs::read_dir(masters).unwrap().count(), 0);
}

#[tokio::test]
async fn disks_share_the_blocks_of_their_master_where_the_file_system_can() {
    let Some(xfs) = Xfs::new() else { return };
    let fixture = fixture().await;
    for driver in [PoolDriverKind::Shared, PoolDriverKind::Mirrored] {
        let pool = pool_at(&xfs.path().join(format!("{driver:?}")), driver);
        let (one, two) = two_disks(&fixture, &pool).await;
        let master = fixture.master(&pool);
        assert!(std::fs::metadata(&two).unwrap().blocks() * 512 >= 4 << 20);
        // They stand on their own: nothing is lost with the master.
        let before = at(&two, pool::format(&pool), "2M");
        std::fs::remove_file(&master).unwrap();
        assert_eq!(at(&two, pool::format(&pool), "2M"), before);
        assert_ne!(at(&one, pool::format(&pool), "1M"), at(&two, pool::format(&pool), "1M"));
        // It is made again, and what nobody has used for long goes, unless a disk may stand on it.
        fixture.disk(&pool, "u-3").await;
        let old = SystemTime::now() - Duration::from_secs(31 * 24 * 3600);
        let directory = master.parent().unwrap();
        for name in ["old.raw", "old.qcow2", "old.part"] {
            File::create(directory.join(name)).unwrap().set_modified(old).unwrap();
        }
        std::fs::remove_file(&master).unwrap();
        fixture.disk(&pool, "u-4").await;
        let left = |name: &str| directory.join(name).exists();
        assert_eq!((left("old.raw"), left("old.qcow2"), left("old.part")), (false, true, false));
        assert!(master.exists());
    }
}

#[tokio::test]
async fn a_master_that_cannot_be_made_leaves_nothing_and_two_that_want_it_make_one() {
    let (mut fixture, base) = (fixture().await, tempfile::tempdir().unwrap());
    let pool = pool_at(&base.path().join("pool"), PoolDriverKind::Shared);
    let (good, bad) = (fixture.image.clone(), (fixture.image.0.clone(), "qcow2".to_owned()));
    fixture.image = bad;
    let said = fixture.storage.volume(&pool, &fixture.wanted("u-1")).await.unwrap_err().what;
    assert!(said.contains("is not a disk of the format qcow2"), "{said}");
    fixture.image = good;
    let master = fixture.master(&pool);
    let (one, two) = (fixture.wanted("u-1"), fixture.wanted("u-2"));
    let (one, two) =
        tokio::join!(fixture.storage.volume(&pool, &one), fixture.storage.volume(&pool, &two));
    assert!(one.is_ok() && two.is_ok(), "{one:?} {two:?}");
    let names = std::fs::read_dir(master.parent().unwrap()).unwrap().count();
    assert_eq!(names, 1);
}

#[test]
fn blocks_are_shared_only_where_that_is_known_and_no_link_is_followed() {
    let base = tempfile::tempdir().unwrap();
    let [from, to, link] = ["from", "to", "link"].map(|name| base.path().join(name));
    std::fs::write(&from, "content").unwrap();
    if !masters::reflink(&from, &to).unwrap() {
        assert!(!to.exists());
    }
    std::os::unix::fs::symlink(&to, &link).unwrap();
    assert!(masters::reflink(&from, &link).is_err());
    assert!(masters::reflink(&link, &base.path().join("other")).is_err());
}
