//! Encrypted volumes, with the real `qemu-img`.

use super::{
    backup::{served::Served, target::Targets},
    files::{Fetch, FileStorage},
    images::ImageStore,
    luks, pool,
    sparse::Sparse,
};
use crate::{
    agent::storage::{
        CopyFrom, SnapshotStep, Storage, StorageFailure, VolumeName, VolumeReady, VolumeWanted,
    },
    vm::views::DiskView,
};
use async_trait::async_trait;
use haven_model::{Bytes, PoolDriverKind, PoolSpec, image::ImageFile, volume::LUKS_HEAD_BYTES};
use haven_store::seal::Plain;
use std::{path::Path, sync::Arc};

const SIZE: u64 = 16 << 20;
/// All kinds of pools whose disks can be encrypted.
const KINDS: [PoolDriverKind; 3] =
    [PoolDriverKind::Local, PoolDriverKind::Shared, PoolDriverKind::Mirrored];
/// What nobody may find in a file.
const WORDS: &[u8] = b"what a guest wrote and nobody else shall read";

struct Nobody;

#[async_trait]
impl Fetch for Nobody {
    async fn fetch(&self, _: &ImageFile, _: &ImageStore) -> Result<(), StorageFailure> {
        Err(super::says("nobody has it"))
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

fn a_pool(fixture: &Fixture, driver: PoolDriverKind) -> PoolSpec {
    let path = fixture.base.path().join(format!("{driver:?}"));
    std::fs::create_dir_all(&path).unwrap();
    let pool = PoolSpec::new(driver, path.to_str().unwrap());
    if driver == PoolDriverKind::Shared {
        pool::create_shared(&pool).unwrap();
    }
    pool
}

fn key(of: u8) -> Plain {
    Plain::new(format!("{of:02x}").repeat(32))
}

fn wanted(vm: &str, key: Option<Plain>) -> VolumeWanted {
    VolumeWanted {
        name: VolumeName::parse(&format!("{vm}.data.u-{vm}")).unwrap(),
        size_bytes: SIZE,
        image: None,
        backup: None,
        copy: None,
        key,
        progress: Default::default(),
        owner_uid: nix::unistd::geteuid().as_raw(),
    }
}

/// As a guest writes and reads.
async fn write(ready: &VolumeReady, key: &Plain, offset: u64, content: &[u8]) {
    let mut disk = Served::open(&ready.path, &ready.format, true, Some(key)).await.unwrap();
    assert!(disk.size() >= SIZE, "{}", disk.size());
    disk.write(offset, &sectors(content)).await.unwrap();
    disk.finish().await.unwrap();
}

/// Such a disk is written in whole sectors.
fn sectors(content: &[u8]) -> Vec<u8> {
    let mut content = content.to_vec();
    content.resize(content.len().next_multiple_of(512), 0);
    content
}

async fn read(ready: &VolumeReady, key: &Plain, offset: u64, length: usize) -> Vec<u8> {
    let mut disk = Served::open(&ready.path, &ready.format, false, Some(key)).await.unwrap();
    let mut content = vec![0; length.next_multiple_of(512)];
    disk.read(offset, &mut content).await.unwrap();
    content.truncate(length);
    content
}

fn holds(path: &Path, what: &[u8]) -> bool {
    std::fs::read(path).unwrap().windows(what.len()).any(|part| part == what)
}

#[tokio::test]
async fn what_is_written_lies_encrypted_in_every_pool_and_is_read_with_the_key() {
    let fixture = fixture();
    for kind in KINDS {
        let pool = a_pool(&fixture, kind);
        let mut one = wanted("db", Some(key(1)));
        let ready = fixture.storage.volume(&pool, &one).await.unwrap();
        let size = Served::open(&ready.path, &ready.format, false, Some(&key(1))).await.unwrap();
        assert_eq!(size.size(), SIZE, "{kind:?}: exactly what was asked for");
        drop(size);
        write(&ready, &key(1), 4096, WORDS).await;
        assert!(!holds(&ready.path, WORDS), "{kind:?}");
        // Asked for again, by this daemon or the next, it is what it was; and it grows.
        one.size_bytes = SIZE + (4 << 20);
        let again = fixture.storage.volume(&pool, &one).await.unwrap();
        assert_eq!(read(&again, &key(1), 4096, WORDS.len()).await, WORDS, "{kind:?}");
        let size = Served::open(&ready.path, &ready.format, false, Some(&key(1))).await.unwrap();
        assert_eq!(size.size(), one.size_bytes, "{kind:?}");
        drop(size);
        // The same without a key is found: the test can fail.
        let plain = fixture.storage.volume(&pool, &wanted("open", None)).await.unwrap();
        let mut disk = Served::open(&plain.path, &plain.format, true, None).await.unwrap();
        disk.write(4096, &sectors(WORDS)).await.unwrap();
        disk.finish().await.unwrap();
        assert!(holds(&plain.path, WORDS), "{kind:?}");
    }
}

#[tokio::test]
async fn another_key_is_told_in_words_and_changes_nothing() {
    let fixture = fixture();
    for kind in KINDS {
        let pool = a_pool(&fixture, kind);
        let mut one = wanted("db", Some(key(1)));
        let ready = fixture.storage.volume(&pool, &one).await.unwrap();
        write(&ready, &key(1), 0, WORDS).await;
        let before = std::fs::read(&ready.path).unwrap();
        one.key = Some(key(2));
        one.size_bytes = SIZE + (4 << 20);
        let said = fixture.storage.volume(&pool, &one).await.unwrap_err().what;
        assert!(said.contains("nothing was changed in it"), "{kind:?}: {said}");
        let Err(said) = Served::open(&ready.path, &ready.format, false, Some(&key(2))).await else {
            panic!("{kind:?}: another key opens it")
        };
        assert!(said.what.contains("does not open it"), "{kind:?}: {}", said.what);
        assert!(before == std::fs::read(&ready.path).unwrap(), "{kind:?}");
        // What is not encrypted is not given a head either.
        let plain = fixture.storage.volume(&pool, &wanted("open", None)).await.unwrap();
        let before = std::fs::read(&plain.path).unwrap();
        let mut mine = wanted("open", Some(key(1)));
        mine.size_bytes = SIZE + (4 << 20);
        let said = fixture.storage.volume(&pool, &mine).await.unwrap_err().what;
        assert!(!said.is_empty() && before == std::fs::read(&plain.path).unwrap(), "{kind:?}");
    }
}

#[tokio::test]
async fn a_disk_of_an_image_holds_it_encrypted() {
    let fixture = fixture();
    let content: Vec<u8> = WORDS.iter().copied().cycle().take(3 << 20).collect();
    let imported = fixture.storage.images.import(&content[..], None).await.unwrap();
    let image = ImageFile { sha256: imported.sha256, size: Bytes(imported.size) };
    for kind in KINDS {
        let pool = a_pool(&fixture, kind);
        let mut one = wanted("db", Some(key(1)));
        one.image = Some((image.clone(), "raw".into()));
        let ready = fixture.storage.volume(&pool, &one).await.unwrap();
        assert!(read(&ready, &key(1), 0, content.len()).await == content, "{kind:?}");
        assert!(!holds(&ready.path, WORDS), "{kind:?}");
        write(&ready, &key(1), 1 << 20, b"over it").await;
        assert_eq!(read(&ready, &key(1), 1 << 20, 7).await, b"over it");
        assert!(!holds(&ready.path, b"over it"), "{kind:?}");
    }
}

/// Two hosts, and a host that makes it a second time: whoever makes a replica makes the same bytes.
#[tokio::test]
async fn replicas_are_the_same_whoever_makes_them() {
    let (here, there) = (fixture(), fixture());
    let content = vec![7; 3 << 20];
    let one = async |fixture: &Fixture, image: bool| {
        let pool = a_pool(fixture, PoolDriverKind::Mirrored);
        let mut one = wanted(if image { "web" } else { "db" }, Some(key(1)));
        if image {
            let imported = fixture.storage.images.import(&content[..], None).await.unwrap();
            let file = ImageFile { sha256: imported.sha256, size: Bytes(imported.size) };
            one.image = Some((file, "raw".into()));
        }
        fixture.storage.volume(&pool, &one).await.unwrap()
    };
    for image in [false, true] {
        let (mine, theirs) = (one(&here, image).await, one(&there, image).await);
        let same = std::fs::read(&mine.path).unwrap() == std::fs::read(&theirs.path).unwrap();
        assert!(same, "image: {image}");
        assert_eq!(std::fs::metadata(&mine.path).unwrap().len(), SIZE + LUKS_HEAD_BYTES);
    }
}

/// What a daemon that was killed left of a disk that it was making is no disk; the next one begins with the same key.
#[tokio::test]
async fn half_a_disk_is_made_anew() {
    let fixture = fixture();
    for kind in KINDS {
        let pool = a_pool(&fixture, kind);
        let one = wanted("db", Some(key(1)));
        let part = Path::new(&pool.path).join(format!("{}.part", one.name));
        std::fs::write(&part, &luks::head(&key(9)).unwrap()[..100_000]).unwrap();
        let ready = fixture.storage.volume(&pool, &one).await.unwrap();
        assert!(!part.exists());
        write(&ready, &key(1), 0, WORDS).await;
        assert_eq!(read(&ready, &key(1), 0, WORDS.len()).await, WORDS, "{kind:?}");
    }
}

#[tokio::test]
async fn snapshots_and_copies_have_the_same_key() {
    let fixture = fixture();
    let pool = a_pool(&fixture, PoolDriverKind::Local);
    let one = wanted("db", Some(key(1)));
    let ready = fixture.storage.volume(&pool, &one).await.unwrap();
    let step = |step, key: &Plain| {
        let key = key.clone();
        let (storage, pool, name) = (&fixture.storage, &pool, &one.name);
        async move { storage.snapshot(pool, name, step, "haven-1", Some(&key)).await }
    };
    write(&ready, &key(1), 0, WORDS).await;
    step(SnapshotStep::Take, &key(1)).await.unwrap();
    write(&ready, &key(1), 0, b"something else, written after the snapshot").await;
    let said = step(SnapshotStep::Revert, &key(2)).await.unwrap_err().what;
    assert!(said.contains("does not open it"), "{said}");
    let mut copy = wanted("copy", Some(key(1)));
    copy.copy = Some(CopyFrom { name: one.name.clone(), tag: "haven-1".into() });
    let copied = fixture.storage.volume(&pool, &copy).await.unwrap();
    assert_eq!(read(&copied, &key(1), 0, WORDS.len()).await, WORDS);
    assert!(!holds(&copied.path, WORDS) && !holds(&copied.path, b"something else"));
    assert!(read(&ready, &key(1), 0, 9).await == b"something");
    step(SnapshotStep::Revert, &key(1)).await.unwrap();
    assert_eq!(read(&ready, &key(1), 0, WORDS.len()).await, WORDS);
    step(SnapshotStep::Remove, &key(1)).await.unwrap();
    let keeps = fixture.storage.keeps(&pool, &one.name).await.unwrap().unwrap();
    assert!(keeps.snapshots.is_empty() && keeps.size == SIZE);
}

#[tokio::test]
async fn the_key_is_in_no_argument_and_in_one_file_for_the_vm_alone() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = fixture();
    let one = wanted("db", Some(key(1)));
    let (plain, owner) = (key(1), one.owner_uid);
    let file = fixture.storage.disk_secret("db", &one.name.disk, &plain, owner).await.unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o037, 0);
    let pool = a_pool(&fixture, PoolDriverKind::Mirrored);
    let ready = fixture.storage.volume(&pool, &one).await.unwrap();
    assert!(!luks::opened(&ready.path, "raw").unwrap().contains(plain.expose()));
    assert!(!luks::secret().contains(plain.expose()));
    fixture.storage.forget("db").await.unwrap();
    assert!(!file.exists());
}

/// What nobody wrote is no content; all else is.
#[tokio::test]
async fn a_view_of_one_that_is_nothing_but_luks_knows_what_was_never_written() {
    let fixture = fixture();
    let pool = a_pool(&fixture, PoolDriverKind::Mirrored);
    let ready = fixture.storage.volume(&pool, &wanted("db", Some(key(1)))).await.unwrap();
    write(&ready, &key(1), 5 << 20, &vec![0; 1 << 20]).await;
    write(&ready, &key(1), 8 << 20, WORDS).await;
    let served = Served::open(&ready.path, "raw", false, Some(&key(1))).await.unwrap();
    let mut view = Sparse::new(Box::new(served), &ready.path).unwrap();
    let (mut at, mut data) = (0, Vec::new());
    while at < view.size() {
        for extent in view.status(at, (view.size() - at) as u32).await.unwrap() {
            if !extent.zero {
                data.push((at, at + extent.length));
            }
            at += extent.length;
        }
    }
    let within = |offset: u64| data.iter().any(|(from, to)| (*from..*to).contains(&offset));
    assert!(within(5 << 20) && within((6 << 20) - 1) && within(8 << 20), "{data:?}");
    let told: u64 = data.iter().map(|(from, to)| to - from).sum();
    assert!(told < 2 << 20, "{data:?}");
    let mut zeros = vec![1; 1 << 20];
    view.read(5 << 20, &mut zeros).await.unwrap();
    assert!(zeros.iter().all(|byte| *byte == 0), "zeros that a guest wrote are zeros");
}
