//! Tests of volumes, pools, images and seeds.

use super::{
    aside,
    backup::target::Targets,
    files::{Fetch, FileStorage},
    images::ImageStore,
    masters::DIRECTORY,
    pool::{self, MARK},
    says, seed,
};
use crate::agent::storage::{
    SeedNic, SeedWanted, SnapshotStep, Storage, StorageFailure, VolumeName, VolumeWanted,
};
use async_trait::async_trait;
use haven_model::{Bytes, PoolDriverKind, PoolSpec, image::ImageFile};
use nix::mount::{MntFlags, MsFlags};
use std::{
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

fn wanted() -> SeedWanted {
    SeedWanted {
        vm: "web-1".into(),
        instance_id: "i-1".into(),
        user_data: "#!/bin/sh\necho hello\n".into(),
        nics: vec![SeedNic {
            mac: "02:68:0a:4d:00:0a".into(),
            address: "10.77.0.10/24".parse().unwrap(),
            gateway: "10.77.0.1".parse().unwrap(),
            nameservers: vec!["10.0.0.53".parse().unwrap()],
        }],
        owner_uid: 200_000,
    }
}

#[test]
fn the_seed_holds_what_the_guest_needs() {
    use std::io::{Cursor, Read};
    let disk = seed::image(&wanted()).unwrap();
    let fs = fatfs::FileSystem::new(Cursor::new(disk), fatfs::FsOptions::new()).unwrap();
    assert_eq!(fs.volume_label(), "CIDATA");
    let mut text = String::new();
    fs.root_dir().open_file("network-config").unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("- 10.77.0.10/24") && text.contains("via: 10.77.0.1"), "{text}");
    text.clear();
    fs.root_dir().open_file("meta-data").unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("local-hostname: web-1"));
}

#[tokio::test]
async fn an_image_with_a_wrong_sum_is_refused_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = ImageStore::new(directory.path().into());
    let error = store.import(&b"abc"[..], Some("00")).await.unwrap_err();
    assert!(error.what.contains("checksum"), "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    let imported = store.import(&b"abc"[..], None).await.unwrap();
    assert_eq!(imported.size, 3);
    assert!(imported.sha256.starts_with("ba7816bf"));
    assert_eq!(store.list().len(), 1);
}

#[tokio::test]
async fn an_image_that_does_not_fit_says_so_and_leaves_nothing() {
    let Some(disk) = SmallDisk::new(4) else { return };
    let store = ImageStore::new(disk.path().into());
    let error = store.import(&vec![7u8; 6 << 20][..], None).await.unwrap_err();
    assert!(error.what.contains("is full (4 MiB free, more than 5 MiB needed): "), "{error}");
    assert!(error.what.contains("free some space there, or enlarge it"), "{error}");
    assert_eq!(names(disk.path()), [""; 0]);
}

/// Waits until so much is free, bytes: a process that another test has just started may hold a file that was removed, until it is
/// another program.
async fn is_free(base: &Path, bytes: u64) {
    for _ in 0..1000 {
        let stat = nix::sys::statvfs::statvfs(base).unwrap();
        if stat.blocks_available() * stat.fragment_size() >= bytes {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} has no {bytes} bytes free", base.display());
}

#[tokio::test]
async fn a_copy_that_nobody_waits_for_leaves_a_tenth_of_the_disk_free() {
    let Some(disk) = SmallDisk::new(20) else { return };
    let base = disk.path();
    let directory = tempfile::tempdir().unwrap();
    let elsewhere = ImageStore::new(directory.path().into());
    let content = vec![3u8; 15 << 20];
    let imported = elsewhere.import(&content[..], None).await.unwrap();
    let file = ImageFile { sha256: imported.sha256, size: Bytes(imported.size) };
    let meanwhile = base.join("other");
    let peers = Arc::new(Slow { content, meanwhile: meanwhile.clone() });
    let images = ImageStore::new(base.join("images"));
    let storage = FileStorage::new(images, base.join("vms"), peers, Targets::none());
    // It would leave 1 MiB: nothing is fetched at all.
    std::fs::write(base.join("large"), vec![0; 4 << 20]).unwrap();
    let said = storage.copy_image(&file).await.unwrap_err().what;
    assert!(said.contains("has 16 MiB free, of which 2 MiB are kept for the store and"), "{said}");
    assert!(!meanwhile.exists());
    // There is room when it begins, and not when it goes on.
    std::fs::remove_file(base.join("large")).unwrap();
    is_free(base, 19 << 20).await;
    let said = storage.copy_image(&file).await.unwrap_err().what;
    assert!(said.contains("of which 2 MiB are kept for the store and the VMs, so that"), "{said}");
    assert_eq!(names(&base.join("images")), [""; 0]);
    // A VM that waits for it may have the rest, and what is here needs no room.
    std::fs::remove_file(&meanwhile).unwrap();
    std::fs::write(base.join("large"), vec![0; 4 << 20]).unwrap();
    storage.images.import(&vec![3u8; 15 << 20][..], None).await.unwrap();
    storage.copy_image(&file).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_import_that_stalls_or_is_given_up_ends_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = ImageStore::new(directory.path().into());
    let (_open, stalls) = tokio::io::duplex(1);
    let error = store.import(stalls, None).await.unwrap_err();
    assert!(error.what.contains("nothing of it came for 60 s"), "{error}");
    assert_eq!(names(directory.path()), [""; 0]);
    let (_open, stalls) = tokio::io::duplex(1);
    let import = tokio::time::timeout(Duration::from_secs(1), store.import(stalls, None));
    assert!(import.await.is_err());
    // A thread removes it.
    let until = std::time::Instant::now() + Duration::from_secs(10);
    while !names(directory.path()).is_empty() {
        assert!(std::time::Instant::now() < until);
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A file system of a few MiB, only for this thread and those it starts.
struct SmallDisk {
    at: tempfile::TempDir,
}

impl SmallDisk {
    fn new(mib: u32) -> Option<Self> {
        let at = tempfile::tempdir().unwrap();
        let private = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).and_then(|()| {
            let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            nix::mount::mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        });
        let options = format!("size={mib}m");
        let mounted = private.and_then(|()| {
            let kind = Some("tmpfs");
            nix::mount::mount(kind, at.path(), kind, MsFlags::empty(), Some(options.as_str()))
        });
        if mounted.is_err() {
            println!("skipped: needs root, to mount a small tmpfs");
            return None;
        }
        Some(Self { at })
    }
    fn path(&self) -> &Path {
        self.at.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.at.path(), MntFlags::MNT_DETACH);
    }
}

struct Nobody;

#[async_trait]
impl Fetch for Nobody {
    async fn fetch(&self, _file: &ImageFile, _into: &ImageStore) -> Result<(), StorageFailure> {
        Err(says("no other host has it"))
    }
}

/// A host that has an image; while it sends it, a file grows here.
struct Slow {
    content: Vec<u8>,
    meanwhile: PathBuf,
}

#[async_trait]
impl Fetch for Slow {
    async fn fetch(&self, file: &ImageFile, into: &ImageStore) -> Result<(), StorageFailure> {
        std::fs::write(&self.meanwhile, vec![0; 5 << 20]).unwrap();
        into.import(&self.content[..], Some(&file.sha256)).await.map(drop)
    }
}

struct Fixture {
    base: tempfile::TempDir,
    storage: FileStorage,
}

fn fixture() -> Fixture {
    let base = tempfile::tempdir().unwrap();
    let images = ImageStore::new(base.path().join("images"));
    let storage =
        FileStorage::new(images, base.path().join("vms"), Arc::new(Nobody), Targets::none());
    Fixture { base, storage }
}

fn pool_at(path: &Path, driver: PoolDriverKind) -> PoolSpec {
    PoolSpec::new(driver, path.to_str().unwrap())
}

fn volume(size_bytes: u64) -> VolumeWanted {
    VolumeWanted {
        name: named("u-1"),
        size_bytes,
        image: None,
        backup: None,
        copy: None,
        key: None,
        progress: Default::default(),
        owner_uid: me(),
    }
}

/// The disk `root` of the VM `web-1` with this uid.
fn named(uid: &str) -> VolumeName {
    VolumeName::parse(&format!("web-1.root.{uid}")).unwrap()
}

fn me() -> u32 {
    nix::unistd::geteuid().as_raw()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

async fn with_image(storage: &FileStorage, bytes: usize) -> (ImageFile, String) {
    let content: Vec<u8> = (0..bytes).map(|i| ((i * 7919) >> 8) as u8 | 1).collect();
    let imported = storage.images.import(&content[..], None).await.unwrap();
    (ImageFile { sha256: imported.sha256, size: Bytes(imported.size) }, "raw".into())
}

#[tokio::test]
async fn a_volume_grows_and_never_shrinks() {
    let fixture = fixture();
    for driver in [PoolDriverKind::Local, PoolDriverKind::Mirrored] {
        let pool = pool_at(&fixture.base.path().join(format!("{driver:?}")), driver);
        let mut wanted = volume(64 << 20);
        wanted.image = Some(with_image(&fixture.storage, 1 << 20).await);
        let ready = fixture.storage.volume(&pool, &wanted).await.unwrap();
        let holds = async || super::qemu_img::size_of(&ready.path, &ready.format).await.unwrap();
        assert_eq!(holds().await, 64 << 20);
        wanted.size_bytes = 80 << 20;
        fixture.storage.volume(&pool, &wanted).await.unwrap();
        assert_eq!(holds().await, 80 << 20);
        wanted.size_bytes = 64 << 20;
        fixture.storage.volume(&pool, &wanted).await.unwrap();
        assert_eq!(holds().await, 80 << 20);
        std::fs::write(&ready.path, b"rubbish, and shorter than a head of a disk").unwrap();
        let said = fixture.storage.volume(&pool, &wanted).await;
        if driver == PoolDriverKind::Local {
            assert!(said.unwrap_err().what.contains("it is no disk of QEMU's"));
        }
    }
}

/// Writes to a disk that nobody has open, or reads: eight bytes at its beginning.
fn io(path: &Path, command: &str) -> String {
    let told = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", command])
        .arg(path)
        .output()
        .unwrap();
    assert!(told.status.success(), "{told:?}");
    String::from_utf8(told.stdout).unwrap()
}

fn holds(path: &Path, pattern: u8) {
    let said = io(path, &format!("read -P {pattern} 0 64k"));
    assert!(!said.contains("verification failed"), "{said}");
}

#[tokio::test]
async fn a_volume_is_made_what_it_was_and_is_as_large_as_it_is_wanted() {
    let fixture = fixture();
    let pool = pool_at(&fixture.base.path().join("pool"), PoolDriverKind::Local);
    let mut wanted = volume(64 << 20);
    wanted.image = Some(with_image(&fixture.storage, 1 << 20).await);
    let (storage, name) = (&fixture.storage, &wanted.name);
    assert_eq!(storage.keeps(&pool, name).await.unwrap(), None);
    let path = storage.volume(&pool, &wanted).await.unwrap().path;
    assert!(storage.keeps(&pool, name).await.unwrap().unwrap().snapshots.is_empty());
    let step = |step, of: &'static str| storage.snapshot(&pool, name, step, of, None);
    io(&path, "write -P 7 0 64k");
    step(SnapshotStep::Take, "haven-1").await.unwrap();
    wanted.size_bytes = 80 << 20;
    storage.volume(&pool, &wanted).await.unwrap();
    io(&path, "write -P 8 0 64k");
    io(&path, "write -P 8 70M 64k");
    step(SnapshotStep::Take, "haven-2").await.unwrap();
    let keeps = storage.keeps(&pool, name).await.unwrap().unwrap();
    assert_eq!(keeps.size, 80 << 20);
    assert_eq!(keeps.snapshots.keys().collect::<Vec<_>>(), ["haven-1", "haven-2"]);
    assert!(keeps.snapshots.values().all(|at_ms| *at_ms > 1_600_000_000_000), "{keeps:?}");
    // It was smaller then; it is made as large as it is wanted, and what comes to it is empty.
    step(SnapshotStep::Revert, "haven-1").await.unwrap();
    assert_eq!(storage.keeps(&pool, name).await.unwrap().unwrap().size, 64 << 20);
    storage.volume(&pool, &wanted).await.unwrap();
    assert_eq!(storage.keeps(&pool, name).await.unwrap().unwrap().size, 80 << 20);
    holds(&path, 7);
    assert!(!io(&path, "read -P 0 70M 64k").contains("verification failed"));
    step(SnapshotStep::Revert, "haven-2").await.unwrap();
    holds(&path, 8);
    step(SnapshotStep::Remove, "haven-1").await.unwrap();
    let said = step(SnapshotStep::Revert, "haven-1").await.unwrap_err().what;
    assert!(said.contains("the snapshot cannot be put back in"), "{said}");
    assert!(step(SnapshotStep::Remove, "haven-1").await.is_err());
    holds(&path, 8);
    let left = storage.keeps(&pool, name).await.unwrap().unwrap();
    assert_eq!(left.snapshots.keys().collect::<Vec<_>>(), ["haven-2"]);
    std::fs::write(&path, b"rubbish").unwrap();
    let said = storage.keeps(&pool, name).await.unwrap_err().what;
    assert!(said.contains("the snapshots in") && said.contains("cannot be told"), "{said}");
}

#[tokio::test]
async fn a_full_pool_says_so_and_the_volume_stays_as_it_is() {
    let Some(disk) = SmallDisk::new(8) else { return };
    let fixture = fixture();
    let pool = pool_at(disk.path(), PoolDriverKind::Local);
    let wanted = volume(4 << 20);
    let path = fixture.storage.volume(&pool, &wanted).await.unwrap().path;
    io(&path, "write -P 7 0 4M");
    let fills = vec![0; 4 << 20];
    // As much as there is room for.
    let _ = std::fs::write(disk.path().join("other"), fills);
    let taken =
        fixture.storage.snapshot(&pool, &wanted.name, SnapshotStep::Take, "haven-1", None).await;
    let said = taken.unwrap_err().what;
    assert!(said.contains("is full; free some space or enlarge it"), "{said}");
    holds(&path, 7);
    let keeps = fixture.storage.keeps(&pool, &wanted.name).await.unwrap().unwrap();
    assert!(keeps.snapshots.is_empty(), "{keeps:?}");
    std::fs::remove_file(disk.path().join("other")).unwrap();
    fixture
        .storage
        .snapshot(&pool, &wanted.name, SnapshotStep::Take, "haven-1", None)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_volume_is_whole_and_only_its_vms() {
    let fixture = fixture();
    let directory = fixture.base.path().join("deep/pool");
    let pool = pool_at(&directory, PoolDriverKind::Local);
    // What a daemon left that was killed, and a link that would lead elsewhere.
    let victim = fixture.base.path().join("victim");
    std::fs::write(&victim, "as it was").unwrap();
    std::fs::create_dir_all(&directory).unwrap();
    symlink(&victim, directory.join("web-1.root.u-1.part")).unwrap();
    let mut wanted = volume(64 << 20);
    wanted.image = Some(with_image(&fixture.storage, 1 << 20).await);
    let ready = fixture.storage.volume(&pool, &wanted).await.unwrap();
    let found = std::fs::symlink_metadata(&ready.path).unwrap();
    assert!(found.is_file());
    assert_eq!((found.mode() & 0o777, found.uid()), (0o600, me()));
    assert_eq!(names(&directory), ["web-1.root.u-1.qcow2"]);
    assert_eq!(std::fs::read(&victim).unwrap(), b"as it was");
    // It is kept, not made again.
    let inode = found.ino();
    fixture.storage.volume(&pool, &wanted).await.unwrap();
    assert_eq!(std::fs::metadata(&ready.path).unwrap().ino(), inode);
    fixture.storage.delete_volume(&pool, &named("u-1")).await.unwrap();
    fixture.storage.delete_volume(&pool, &named("u-1")).await.unwrap();
    assert_eq!(names(&directory), [""; 0]);
}

#[tokio::test]
async fn a_volume_that_cannot_fit_is_refused_in_both_kinds_of_pool() {
    let Some(disk) = SmallDisk::new(8) else { return };
    let fixture = fixture();
    for driver in [PoolDriverKind::Local, PoolDriverKind::Shared] {
        let pool = pool_at(disk.path(), driver);
        if driver == PoolDriverKind::Shared {
            pool::create_shared(&pool).unwrap();
        }
        let before = names(disk.path());
        let said = fixture.storage.volume(&pool, &volume(64 << 20)).await.unwrap_err().what;
        assert!(said.contains("is full (8 MiB free, 65 MiB needed for the disk `root`"), "{said}");
        assert!(said.contains("free some space, enlarge the pool, or"), "{said}");
        assert_eq!(names(disk.path()), before);
        fixture.storage.volume(&pool, &volume(2 << 20)).await.unwrap();
        fixture.storage.delete_volume(&pool, &named("u-1")).await.unwrap();
    }
}

#[tokio::test]
async fn a_volume_that_fails_half_way_leaves_nothing() {
    let Some(disk) = SmallDisk::new(8) else { return };
    let mut fixture = fixture();
    let pool = pool_at(disk.path(), PoolDriverKind::Shared);
    pool::create_shared(&pool).unwrap();
    let other = disk.path().join("other");
    let (content, peer) = (vec![7; 6 << 20], fixture.base.path().join("peer"));
    let imported = ImageStore::new(peer).import(&content[..], None).await.unwrap();
    let file = ImageFile { sha256: imported.sha256, size: Bytes(imported.size) };
    let mut wanted = volume(6 << 20);
    wanted.image = Some((file, "raw".into()));
    // There is room when it begins; while its image is fetched somebody else takes it.
    fixture.storage.peers = Arc::new(Slow { content, meanwhile: other.clone() });
    let said = fixture.storage.volume(&pool, &wanted).await.unwrap_err().what;
    assert!(said.contains("is full (") && said.contains("7 MiB needed for the disk"), "{said}");
    assert_eq!(names(disk.path()), [MARK, DIRECTORY, "other"]);
    assert_eq!(names(&disk.path().join(DIRECTORY)), [""; 0]);
    std::fs::remove_file(&other).unwrap();
    // As soon as there is room again it goes on by itself.
    fixture.storage.volume(&pool, &wanted).await.unwrap();
    assert_eq!(names(disk.path()), [MARK, DIRECTORY, "web-1.root.u-1.qcow2"]);
}

#[tokio::test]
async fn a_disk_smaller_than_its_image_is_refused() {
    let fixture = fixture();
    let pool = pool_at(&fixture.base.path().join("pool"), PoolDriverKind::Local);
    let mut wanted = volume(2 << 20);
    wanted.image = Some(with_image(&fixture.storage, 3 << 20).await);
    let said = fixture.storage.volume(&pool, &wanted).await.unwrap_err().what;
    assert!(said.contains("the disk `root` of web-1 is 2 MiB and its image holds 3 MiB"), "{said}");
    assert_eq!(names(Path::new(&pool.path)), [""; 0]);
    wanted.size_bytes = 3 << 20;
    fixture.storage.volume(&pool, &wanted).await.unwrap();
}

#[tokio::test]
async fn no_vm_gets_the_volume_of_an_earlier_one_of_its_name() {
    let fixture = fixture();
    let pool = pool_at(&fixture.base.path().join("pool"), PoolDriverKind::Local);
    let first = fixture.storage.volume(&pool, &volume(1 << 20)).await.unwrap();
    let mut second = volume(1 << 20);
    second.name = named("u-2");
    let ready = fixture.storage.volume(&pool, &second).await.unwrap();
    assert_ne!(ready.path, first.path);
    assert_eq!(fixture.storage.volumes(&pool).await.unwrap(), [named("u-1"), named("u-2")]);
    // One of an earlier build tells no uid: it is neither given to anybody nor passed over.
    let directory = Path::new(&pool.path);
    std::fs::write(directory.join("web-1.root.qcow2"), "").unwrap();
    second.name = named("u-3");
    let said = fixture.storage.volume(&pool, &second).await.unwrap_err().what;
    assert!(said.contains("rename it to ") && said.contains("web-1.root.u-3.qcow2"), "{said}");
}

#[test]
fn only_a_disk_of_this_host_alone_is_swept() {
    use nix::sys::statfs::{FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC};
    assert_eq!(aside::of_several_hosts(NFS_SUPER_MAGIC), Some("NFS"));
    assert_eq!(aside::of_several_hosts(FUSE_SUPER_MAGIC), Some("FUSE"));
    assert_eq!([TMPFS_MAGIC, XFS_SUPER_MAGIC].map(aside::of_several_hosts), [None; 2]);
}

#[tokio::test]
async fn what_nobody_has_is_put_aside_and_removed_a_day_later() {
    let fixture = fixture();
    let pool = pool_at(&fixture.base.path().join("pool"), PoolDriverKind::Local);
    let directory = Path::new(&pool.path);
    assert_eq!(fixture.storage.volumes(&pool).await.unwrap(), []);
    fixture.storage.put_aside(&pool, &[]).await.unwrap();
    fixture.storage.volume(&pool, &volume(1 << 20)).await.unwrap();
    for file in ["web-1.root.u-2.part", "notes.txt", "a.b.qcow2", "mine.aside"] {
        std::fs::write(directory.join(file), "").unwrap();
    }
    assert_eq!(fixture.storage.volumes(&pool).await.unwrap(), [named("u-1"), named("u-2")]);
    fixture.storage.put_aside(&pool, &[named("u-1"), named("u-2")]).await.unwrap();
    let foreign = ["a.b.qcow2", "mine.aside", "notes.txt"];
    let with = ["a.b.qcow2", "mine.aside", "notes.txt", "web-1.root.u-1.aside"];
    assert_eq!(names(directory), with);
    assert_eq!(fixture.storage.volumes(&pool).await.unwrap(), []);
    let later = |hours: u64| SystemTime::now() + Duration::from_secs(hours * 3600);
    aside::put(&pool, &[], later(23)).unwrap();
    assert_eq!(names(directory), with);
    aside::put(&pool, &[], later(25)).unwrap();
    assert_eq!(names(directory), foreign);
}

#[tokio::test]
async fn a_shared_pool_is_used_only_under_its_own_mark() {
    let fixture = fixture();
    let directory = fixture.base.path().join("shared");
    let pool = pool_at(&directory, PoolDriverKind::Shared);
    let refused = async || {
        let said = fixture.storage.volume(&pool, &volume(1 << 20)).await.unwrap_err().what;
        let deleted = fixture.storage.delete_volume(&pool, &named("u-1")).await.unwrap_err().what;
        assert_eq!(said, deleted);
        said
    };
    assert!(refused().await.contains("cannot be read"));
    // An empty directory: perhaps a mount point on which nothing is mounted.
    std::fs::create_dir(&directory).unwrap();
    let said = refused().await;
    let command = format!("`haven pool mark {}`", pool.path);
    assert!(said.contains("not mounted there, or is new") && said.contains(&command), "{said}");
    assert_eq!(names(&directory), [""; 0]);
    // What that command does.
    pool::create_shared(&pool).unwrap();
    fixture.storage.volume(&pool, &volume(1 << 20)).await.unwrap();
    pool::create_shared(&pool).unwrap();
    // Another pool is mounted there by mistake, or one whose mark says nothing.
    std::fs::write(directory.join(MARK), "/srv/other\n").unwrap();
    assert!(refused().await.contains("its .haven-pool names the pool /srv/other"));
    assert!(pool::create_shared(&pool).is_err());
    std::fs::write(directory.join(MARK), "").unwrap();
    assert!(refused().await.contains("names no pool"));
}

#[test]
fn a_shared_pool_is_made_only_of_an_empty_directory() {
    let directory = tempfile::tempdir().unwrap();
    let pool = pool_at(directory.path(), PoolDriverKind::Shared);
    std::fs::write(directory.path().join("file"), "").unwrap();
    let said = pool::create_shared(&pool).unwrap_err().what;
    assert!(said.contains("not empty (it holds file)"), "{said}");
    std::fs::remove_file(directory.path().join("file")).unwrap();
    std::fs::create_dir(directory.path().join("lost+found")).unwrap();
    pool::create_shared(&pool).unwrap();
    pool::create_shared(&pool).unwrap();
    assert_eq!(pool::ready(&pool).unwrap(), PathBuf::from(&pool.path));
}

#[tokio::test]
async fn the_seed_is_roots_and_only_its_vm_reads_it() {
    let fixture = fixture();
    let mut wanted = wanted();
    wanted.owner_uid = me();
    let path = fixture.storage.seed(&wanted).await.unwrap();
    let found = std::fs::symlink_metadata(&path).unwrap();
    assert_eq!((found.mode() & 0o777, found.uid(), found.gid()), (0o640, me(), me()));
    wanted.user_data = "x".repeat(2 << 20);
    assert!(fixture.storage.seed(&wanted).await.unwrap_err().what.contains("too long"));
}

#[test]
fn without_qemu_img_the_package_is_named() {
    const EMPTY: &str = "HAVEN_TEST_WITHOUT_QEMU_IMG";
    if std::env::var_os(EMPTY).is_none() {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "storage::storage_test::without_qemu_img_the_package_is_named"])
            .env(EMPTY, "1")
            .env("PATH", "/nonexistent")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let fixture = fixture();
    let pool = pool_at(&fixture.base.path().join("pool"), PoolDriverKind::Local);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let failed = runtime.block_on(fixture.storage.volume(&pool, &volume(1 << 20))).unwrap_err();
    assert!(failed.what.contains("install the package qemu-utils"), "{failed}");
}

#[test]
fn the_room_in_a_pool_is_what_its_file_system_and_its_files_say() {
    let Some(disk) = SmallDisk::new(16) else { return };
    let local = pool_at(&disk.path().join("fast"), PoolDriverKind::Local);
    assert_eq!(pool::room(&local).unwrap(), None, "nothing was made there yet");
    std::fs::create_dir(disk.path().join("fast")).unwrap();
    let empty = pool::room(&local).unwrap().unwrap();
    assert_eq!((empty.used, empty.full()), (Bytes(0), 0));
    std::fs::write(disk.path().join("fast/a"), vec![1; 8 << 20]).unwrap();
    // A hole takes nothing.
    std::fs::File::create(disk.path().join("fast/b")).unwrap().set_len(1 << 30).unwrap();
    let half = pool::room(&local).unwrap().unwrap();
    assert_eq!((half.used, half.full()), (Bytes(8 << 20), 50));
    assert_eq!(half.total, empty.total);
    assert_eq!(half.free.0, empty.free.0 - (8 << 20));
    // A shared one that is not mounted would tell of the disk beneath.
    let shared = pool_at(&disk.path().join("fast"), PoolDriverKind::Shared);
    assert_eq!(pool::room(&shared).unwrap(), None);
}
