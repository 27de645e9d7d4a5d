//! A place of backups: round trips, damage, interruptions, sweeps and clocks.

use super::*;
use haven_model::{
    backup::{BackupDisk, Moment},
    units,
};
use proptest::prelude::*;
use std::{fs, path::Path, sync::atomic::Ordering};

const DAY: i64 = 86_400_000;

pub(super) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// Content that does not compress, another for each seed.
pub(super) fn noise(seed: u64, bytes: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

pub(super) fn backup(vm: &str, id: &str, sizes: &[u64]) -> Backup {
    let disk = |(at, size): (usize, &u64)| BackupDisk {
        name: name(&format!("d{at}")),
        size: units::Bytes(*size),
        index: String::new(),
        used: units::Bytes(0),
        read: units::Bytes(0),
        stored: units::Bytes(0),
    };
    Backup {
        id: id.into(),
        vm: name(vm),
        vm_uid: "uid".into(),
        at_ms: 1,
        ended_ms: 2,
        by: "alice".into(),
        moment: Moment::Running,
        mark: String::new(),
        object: serde_json::json!({"spec": {"memory": "1GiB", "b": 0.1, "a": 1}}),
        disks: sizes.iter().enumerate().map(disk).collect(),
    }
}

async fn made(directory: &Path) -> Repository {
    let repository = Repository::open(&Place::Directory(directory.to_owned())).unwrap();
    repository.create(1).await.unwrap();
    repository
}

/// Puts the chunks of one disk and gives their list.
pub(super) async fn write(repository: &Repository, chunks: &[Bytes]) -> Index {
    let mut index = Index { size: 0, chunks: vec![] };
    for chunk in chunks {
        index.size += chunk.len() as u64;
        index.chunks.push(repository.put(chunk.clone()).await.unwrap().0);
    }
    index
}

/// A backup of one disk.
pub(super) async fn back_up(
    repository: &Repository,
    vm: &str,
    id: &str,
    chunks: &[Bytes],
) -> Backup {
    let index = write(repository, chunks).await;
    let mut backup = backup(vm, id, &[index.size]);
    let indexes = [(name("d0"), index)];
    repository.finish(&mut backup, &indexes, None, Duration::ZERO).await.unwrap();
    backup
}

pub(super) async fn restored(repository: &Repository, backup: &Backup) -> Result<Vec<u8>, String> {
    let index = repository.index(backup, &name("d0")).await.map_err(|error| error.what)?;
    let mut disk = Vec::new();
    for chunk in &index.chunks {
        let rest = (index.size - disk.len() as u64).min(CHUNK) as usize;
        match chunk {
            None => disk.resize(disk.len() + rest, 0),
            Some(id) => {
                disk.extend_from_slice(&repository.get(id).await.map_err(|error| error.what)?)
            }
        }
    }
    Ok(disk)
}

fn pass(repository: &Repository, ms: i64) {
    repository.store.ahead_ms.fetch_add(ms, Ordering::Relaxed);
}

fn of(directory: &Path, id: &ChunkId) -> std::path::PathBuf {
    directory.join(chunks::key(id))
}

/// The list of the chunks of the disk `d0` of the backup `1` of `a`.
fn list_of(directory: &Path) -> std::path::PathBuf {
    let all = fs::read_dir(directory.join("vms/a/1")).unwrap();
    let mut all = all.map(|entry| entry.unwrap().path());
    all.find(|path| path.extension().is_some_and(|ending| ending == "index")).unwrap()
}

fn flip(path: &Path) {
    let mut content = fs::read(path).unwrap();
    let at = content.len() / 2;
    content[at] ^= 1;
    fs::write(path, content).unwrap();
}

fn zeros(bytes: u64) -> Bytes {
    vec![0; bytes as usize].into()
}

fn text() -> Bytes {
    b"the same words again and again ".repeat(1000).into()
}

/// What must hold at every place.
pub(super) async fn exercise(repository: &Repository) {
    let whole = [noise(1, CHUNK as usize), zeros(CHUNK), noise(2, CHUNK as usize), text()];
    let (id, stored) = repository.put(whole[0].clone()).await.unwrap();
    assert_eq!(stored, CHUNK + 1);
    assert_eq!(repository.put(whole[0].clone()).await.unwrap(), (id, 0));
    assert_eq!(repository.put(zeros(CHUNK)).await.unwrap(), (None, 0));
    let (_, stored) = repository.put(text()).await.unwrap();
    assert!(stored < text().len() as u64 / 10, "{stored}");

    let first = back_up(repository, "web", "0001", &whole).await;
    let second = back_up(repository, "web", "0002", &whole[..2]).await;
    let other = back_up(repository, "db", "0001", &whole[2..]).await;
    assert_eq!(restored(repository, &first).await.unwrap(), whole.concat());
    let all = repository.list(None).await.unwrap();
    assert_eq!(all.unreadable, []);
    assert_eq!(all.backups, [other.clone(), first.clone(), second.clone()]);
    let web = repository.list(Some(&name("web"))).await.unwrap();
    assert_eq!(web.backups, [first.clone(), second.clone()]);
    assert_eq!(repository.read(&name("web"), "0002").await.unwrap(), second);

    let mut again = second.clone();
    let index = repository.index(&second, &name("d0")).await.unwrap();
    let list = [(name("d0"), index)];
    let failure = repository.finish(&mut again, &list, None, Duration::ZERO).await.unwrap_err();
    assert!(failure.what.contains("vms/web/0002/backup.json is there already"), "{failure}");

    repository.remove(&name("web"), "0001").await.unwrap();
    let failure = repository.read(&name("web"), "0001").await.unwrap_err();
    assert!(failure.what.contains("has no backup 0001 of web"), "{failure}");
    assert_eq!(repository.sweep().await.unwrap(), Swept::default());

    // All of these are named; a day after the first sweep that moves one, a reader still finds it.
    let lone = repository.put(noise(9, 1000)).await.unwrap().0.unwrap();
    pass(repository, 3 * DAY + 10_000);
    let swept = repository.sweep().await.unwrap();
    assert_eq!((swept.set_aside, swept.set_aside_bytes, swept.removed), (1, 1001, 0));
    pass(repository, DAY);
    assert_eq!(repository.get(&lone).await.unwrap(), noise(9, 1000));
    assert_eq!(repository.sweep().await.unwrap(), Swept::default());
    pass(repository, 3 * DAY);
    let swept = repository.sweep().await.unwrap();
    assert_eq!((swept.set_aside, swept.removed, swept.removed_bytes), (0, 1, 1001));
    let failure = repository.get(&lone).await.unwrap_err();
    assert!(failure.what.contains(&chunks::key(&lone)), "{failure}");
    assert!(failure.what.contains("is missing"), "{failure}");
    assert_eq!(restored(repository, &second).await.unwrap(), whole[..2].concat());
    assert_eq!(restored(repository, &other).await.unwrap(), whole[2..].concat());
}

#[tokio::test]
async fn a_directory() {
    // A name that a URL would write otherwise.
    let above = tempfile::tempdir().unwrap();
    let directory = above.path().join("bäck ups%20#1");
    fs::create_dir_all(directory.join("lost+found")).unwrap();
    let repository = made(&directory).await;
    exercise(&repository).await;
    repository.create(2).await.unwrap();
    assert!(directory.join("vms/web/0002/backup.json").is_file());
    assert!(!directory.join("vms/web/0001").exists());
}

#[tokio::test]
async fn only_a_place_of_backups() {
    let at = tempfile::tempdir().unwrap();
    let open = |path: &Path| Repository::open(&Place::Directory(path.to_owned()));
    let failure = open(Path::new("relative")).unwrap_err();
    assert!(failure.what.contains("relative cannot be a directory of backups"), "{failure}");

    let nowhere = open(&at.path().join("nowhere")).unwrap();
    let failure = nowhere.create(1).await.unwrap_err();
    assert!(failure.what.contains("make it, or mount it"), "{failure}");
    assert!(!at.path().join("nowhere").exists());

    fs::write(at.path().join("photo.jpg"), "").unwrap();
    let foreign = open(at.path()).unwrap();
    let failure = foreign.create(1).await.unwrap_err();
    assert!(failure.what.contains("something else already (`photo.jpg`)"), "{failure}");
    fs::remove_file(at.path().join("photo.jpg")).unwrap();

    // Not made yet, or unmounted: nothing is written.
    for failed in [
        foreign.ready().await.unwrap_err(),
        foreign.put(text()).await.unwrap_err(),
        foreign.get(&[1; 32]).await.unwrap_err(),
        foreign.list(None).await.unwrap_err(),
        foreign.sweep().await.unwrap_err(),
        foreign.remove(&name("web"), "1").await.unwrap_err(),
    ] {
        assert!(failed.what.contains("is not a place of backups"), "{failed}");
    }
    assert_eq!(fs::read_dir(at.path()).unwrap().count(), 0);

    foreign.create(1).await.unwrap();
    let mark = fs::read(at.path().join(MARK)).unwrap();
    foreign.create(2).await.unwrap();
    assert_eq!(fs::read(at.path().join(MARK)).unwrap(), mark);
    fs::write(at.path().join(MARK), r#"{"format":2,"id":"x","made_ms":1}"#).unwrap();
    let failure = foreign.create(2).await.unwrap_err();
    assert!(failure.what.contains("format 2"), "{failure}");
    fs::write(at.path().join(MARK), "").unwrap();
    let failure = foreign.create(2).await.unwrap_err();
    assert!(failure.what.contains("is damaged"), "{failure}");
}

#[tokio::test]
async fn hosts_make_it_at_the_same_time() {
    let at = tempfile::tempdir().unwrap();
    let open = || Repository::open(&Place::Directory(at.path().to_owned())).unwrap();
    let (one, other, third) = (open(), open(), open());
    let (one, other, third) = tokio::join!(one.create(1), other.create(20), third.create(300));
    for made in [one, other, third] {
        made.unwrap();
    }
    let names = fs::read_dir(at.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), [MARK]);
}

#[tokio::test]
async fn a_flipped_bit_is_told() {
    let at = tempfile::tempdir().unwrap();
    let repository = made(at.path()).await;
    let disk = [noise(1, 5000), text()];
    let [disk0, disk1] = disk.clone().map(|one| vec![one]);
    let plain = back_up(&repository, "a", "1", &disk0).await;
    let packed = back_up(&repository, "b", "1", &disk1).await;
    for backup in [&plain, &packed] {
        let id = repository.index(backup, &name("d0")).await.unwrap().chunks[0].unwrap();
        assert!(!repository.condemn(&id).await.unwrap());
        flip(&of(at.path(), &id));
        let failure = repository.get(&id).await.unwrap_err();
        assert!(failure.what.contains(&chunks::key(&id)), "{failure}");
        assert!(failure.what.contains("is damaged"), "{failure}");
        fs::write(of(at.path(), &id), "").unwrap();
        let failure = repository.get(&id).await.unwrap_err();
        assert!(failure.what.contains("it is empty"), "{failure}");
        // One that is empty is written again; one that is damaged otherwise is when it was found out.
        fs::write(of(at.path(), &id), "xx").unwrap();
        assert!(repository.condemn(&id).await.unwrap());
        let again = if backup == &plain { disk0[0].clone() } else { disk1[0].clone() };
        assert!(repository.put(again.clone()).await.unwrap().1 > 0);
        assert_eq!(repository.get(&id).await.unwrap(), again);
    }

    let index = list_of(at.path());
    flip(&index);
    let failure = repository.index(&plain, &name("d0")).await.unwrap_err();
    let named = format!("{} is damaged", index.display());
    assert!(failure.what.contains(&named), "{failure}");
    let failure = repository.sweep().await.unwrap_err();
    assert!(failure.what.contains("vms/a/1/backup.json"), "{failure}");
    fs::remove_file(&index).unwrap();
    let failure = repository.index(&plain, &name("d0")).await.unwrap_err();
    assert!(failure.what.contains("it is missing"), "{failure}");

    let record = at.path().join("vms/a/1/backup.json");
    let good = fs::read_to_string(&record).unwrap();
    let newer = good.replace("\"format\":1", "\"format\":2");
    let moved = good.replace("alice", "mally");
    for (bad, why) in [(&newer, "format is 2"), (&moved, "checksum"), (&good[..50].into(), "EOF")] {
        fs::write(&record, bad).unwrap();
        let listed = repository.list(None).await.unwrap();
        assert_eq!(listed.backups, std::slice::from_ref(&packed));
        assert_eq!(listed.unreadable[0].0, "vms/a/1/backup.json");
        assert!(listed.unreadable[0].1.contains(why), "{listed:?}");
        let failure = repository.read(&name("a"), "1").await.unwrap_err();
        assert!(failure.what.contains("vms/a/1/backup.json"), "{failure}");
        assert!(failure.what.contains(why), "{failure}");
    }
    fs::create_dir_all(at.path().join("vms/c/1")).unwrap();
    fs::write(at.path().join("vms/c/1/backup.json"), &good).unwrap();
    let listed = repository.list(Some(&name("c"))).await.unwrap();
    assert!(listed.unreadable[0].1.contains("it was moved"), "{listed:?}");
}

#[tokio::test]
async fn every_bit_of_an_index_and_a_record_counts() {
    let at = tempfile::tempdir().unwrap();
    let repository = made(at.path()).await;
    let good = back_up(&repository, "a", "1", &[text()]).await;
    for path in [at.path().join("vms/a/1/backup.json"), list_of(at.path())] {
        let file = path.display().to_string();
        let content = fs::read(&path).unwrap();
        for byte in 0..content.len() {
            let mut bad = content.clone();
            bad[byte] ^= 1 << (byte % 8);
            fs::write(&path, &bad).unwrap();
            let read = repository.read(&name("a"), "1").await;
            let Ok(read) = read else { continue };
            let index = repository.index(&read, &name("d0")).await;
            assert!(index.is_err() && read == good, "{file} {byte}");
        }
        fs::write(&path, &content).unwrap();
    }
}

#[tokio::test]
async fn an_interrupted_backup_is_none() {
    let at = tempfile::tempdir().unwrap();
    let repository = made(at.path()).await;
    let first = back_up(&repository, "web", "1", &[text()]).await;
    let index = write(&repository, &[noise(5, 100)]).await;
    let mut second = backup("web", "2", &[100]);
    repository.write_indexes(&mut second, &[(name("d0"), index)]).await.unwrap();
    // As a crash in the middle of a write leaves it.
    fs::write(at.path().join("chunks/aa#3"), "").unwrap();
    fs::write(at.path().join("vms/web/2/backup.json#1"), "{").unwrap();
    fs::write(at.path().join("haven-clock#1"), "").unwrap();
    fs::write(at.path().join("mine#1"), "").unwrap();

    let listed = repository.list(None).await.unwrap();
    assert_eq!((listed.backups.len(), listed.unreadable.len()), (1, 0));
    assert!(repository.read(&name("web"), "2").await.is_err());
    assert_eq!(repository.sweep().await.unwrap(), Swept::default());
    pass(&repository, 4 * DAY + 60_000);
    let swept = repository.sweep().await.unwrap();
    assert_eq!((swept.set_aside, swept.leftovers), (1, 4));
    assert!(!at.path().join("vms/web/2").exists());
    assert!(at.path().join("mine#1").exists());
    assert_eq!(restored(&repository, &first).await.unwrap(), text());
}

#[tokio::test]
async fn a_sweep_refuses_what_it_cannot_read() {
    let at = tempfile::tempdir().unwrap();
    let repository = made(at.path()).await;
    back_up(&repository, "web", "1", &[text()]).await;
    let lone = repository.put(noise(7, 100)).await.unwrap().0.unwrap();
    pass(&repository, 30 * DAY);
    let record = at.path().join("vms/web/1/backup.json");
    let good = fs::read(&record).unwrap();
    flip(&record);
    let failure = repository.sweep().await.unwrap_err();
    assert!(failure.what.contains("vms/web/1/backup.json cannot be read"), "{failure}");
    assert!(of(at.path(), &lone).exists());
    fs::write(&record, good).unwrap();
    assert_eq!(repository.sweep().await.unwrap().set_aside, 1);
    // What cannot be read can be removed.
    flip(&record);
    repository.remove(&name("web"), "1").await.unwrap();
    assert_eq!(repository.sweep().await.unwrap().set_aside, 1);
}

/// A writer finds a chunk, a sweep moves it, the backup is finished: readers find it, and the next sweep puts it back.
#[tokio::test]
async fn what_a_sweep_moved_from_under_a_writer_comes_back() {
    let at = tempfile::tempdir().unwrap();
    let repository = made(at.path()).await;
    repository.put(text()).await.unwrap();
    pass(&repository, 10 * DAY);
    let index = write(&repository, &[text()]).await;
    let id = index.chunks[0].unwrap();
    assert_eq!(repository.sweep().await.unwrap().set_aside, 1);
    assert!(!of(at.path(), &id).exists());
    // Nearly as late as it may.
    pass(&repository, 3 * DAY);
    let mut backup = backup("web", "1", &[index.size]);
    let list = [(name("d0"), index)];
    repository.finish(&mut backup, &list, None, LONGEST).await.unwrap();
    assert_eq!(restored(&repository, &backup).await.unwrap(), text());
    pass(&repository, 30 * DAY);
    let swept = repository.sweep().await.unwrap();
    assert_eq!((swept.put_back, swept.removed, swept.set_aside), (1, 0, 0));
    assert!(of(at.path(), &id).exists());
    assert_eq!(restored(&repository, &backup).await.unwrap(), text());
}

/// Another writer has written again what stands aside: the copy goes, the chunk stays.
#[tokio::test]
async fn what_was_written_again_stays() {
    let at = tempfile::tempdir().unwrap();
    let repository = made(at.path()).await;
    repository.put(text()).await.unwrap();
    pass(&repository, 10 * DAY);
    assert_eq!(repository.sweep().await.unwrap().set_aside, 1);
    let backup = back_up(&repository, "web", "1", &[text()]).await;
    assert_eq!(repository.sweep().await.unwrap(), Swept::default());
    pass(&repository, 4 * DAY);
    let swept = repository.sweep().await.unwrap();
    assert_eq!((swept.put_back, swept.removed, swept.set_aside), (0, 1, 0));
    assert_eq!(restored(&repository, &backup).await.unwrap(), text());
    assert_eq!(fs::read_dir(at.path().join("aside")).map_or(0, Iterator::count), 0);
}

#[tokio::test]
async fn what_finish_refuses() {
    let at = tempfile::tempdir().unwrap();
    let repository = made(at.path()).await;
    let index = write(&repository, &[text()]).await;
    let list = [(name("d0"), index.clone())];
    let mut made = backup("web", "2", &[index.size]);
    let late = LONGEST + Duration::from_millis(1);
    let failure = repository.finish(&mut made, &list, None, late).await.unwrap_err();
    assert!(failure.what.contains("longer than 3 days"), "{failure}");
    let failure = repository.finish(&mut made, &[], None, LONGEST).await.unwrap_err();
    assert!(failure.what.contains("1 disks but 0 lists"), "{failure}");
    let mut larger = backup("web", "2", &[index.size + CHUNK]);
    let failure = repository.finish(&mut larger, &list, None, LONGEST).await.unwrap_err();
    assert!(failure.what.contains("does not fit"), "{failure}");
    let mut stray = backup("web", "../x", &[index.size]);
    let failure = repository.finish(&mut stray, &list, None, LONGEST).await.unwrap_err();
    assert!(failure.what.contains("cannot be the id"), "{failure}");
    let failure = repository.finish(&mut made, &list, Some("1"), LONGEST).await.unwrap_err();
    assert!(failure.what.contains("the backup 1 of web, on which 2 builds"), "{failure}");
    assert_eq!(repository.list(None).await.unwrap(), Listed::default());

    back_up(&repository, "web", "1", &[text()]).await;
    repository.finish(&mut made, &list, Some("1"), LONGEST).await.unwrap();
    assert_eq!(repository.read(&name("web"), "2").await.unwrap(), made);
    assert!(repository.put(zeros(CHUNK + 1)).await.is_err());
    assert!(repository.put(Bytes::new()).await.is_err());
}

/// Chunks that decompress to more than a chunk are refused.
#[tokio::test]
async fn a_bomb_is_refused() {
    let at = tempfile::tempdir().unwrap();
    let repository = made(at.path()).await;
    let id: ChunkId = [7; 32];
    fs::create_dir_all(at.path().join("chunks/07")).unwrap();
    let bomb = zstd::bulk::compress(&vec![1; 64 << 20], 3).unwrap();
    fs::write(of(at.path(), &id), [&[1], &*bomb].concat()).unwrap();
    let failure = repository.get(&id).await.unwrap_err();
    assert!(failure.what.contains("cannot be decompressed"), "{failure}");
    fs::write(of(at.path(), &id), vec![0; CHUNK as usize + 2]).unwrap();
    let failure = repository.get(&id).await.unwrap_err();
    assert!(failure.what.contains("4194305 are the most"), "{failure}");
}

#[tokio::test]
async fn writers_and_sweeps_together() {
    let at = tempfile::tempdir().unwrap();
    let repository = made(at.path()).await;
    let contents: Vec<Bytes> = (0..12).map(|seed| noise(seed, 2000)).collect();
    let old = std::time::SystemTime::now() - Duration::from_secs(10 * 86_400);
    for content in &contents {
        let id = repository.put(content.clone()).await.unwrap().0.unwrap();
        fs::File::open(of(at.path(), &id)).unwrap().set_modified(old).unwrap();
    }
    let writer = |vm: usize| {
        let (repository, contents) = (repository.clone(), contents.clone());
        async move {
            let mut made = vec![];
            for round in 0..5 {
                let from = (vm * 3 + round) % 8;
                let disk = contents[from..from + 4].concat();
                // Chunks of 2000 bytes are put alone, so that they meet those of others.
                for content in &contents[from..from + 4] {
                    repository.put(content.clone()).await.unwrap();
                }
                let (vm, id) = (format!("v{vm}"), format!("{round}"));
                let backup = back_up(&repository, &vm, &id, &[disk.into()]).await;
                made.push((backup, from));
            }
            made
        }
    };
    let sweeper = async {
        for _ in 0..10 {
            repository.sweep().await.unwrap();
        }
    };
    let (one, two, ()) = tokio::join!(writer(0), writer(1), sweeper);
    pass(&repository, 3 * DAY);
    repository.sweep().await.unwrap();
    for (backup, from) in one.into_iter().chain(two) {
        let disk = contents[from..from + 4].concat();
        assert_eq!(restored(&repository, &backup).await.unwrap(), disk);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn an_index_comes_back(
        flags in proptest::collection::vec(any::<Option<[u8; 32]>>(), 1..200),
        short in 0..CHUNK,
        cut in any::<prop::sample::Index>(),
    ) {
        let size = flags.len() as u64 * CHUNK - short;
        let index = Index { size, chunks: flags };
        let stored = index.encode();
        prop_assert!(stored.len() as u64 <= Index::most(size));
        prop_assert_eq!(Index::decode(&stored, size).unwrap(), index);
        prop_assert!(Index::decode(&stored, size + CHUNK).is_err());
        prop_assert!(Index::decode(&stored[..cut.index(stored.len())], size).is_err());
    }

    #[test]
    fn a_chunk_comes_back(content in proptest::collection::vec(0..4_u8, 1..20_000)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let at = tempfile::tempdir().unwrap();
            let repository = made(at.path()).await;
            let content = Bytes::from(content);
            let (id, stored) = repository.put(content.clone()).await.unwrap();
            assert!(stored <= content.len() as u64 + 1);
            match id {
                Some(id) => assert_eq!(repository.get(&id).await.unwrap(), content),
                None => assert!(content.iter().all(|byte| *byte == 0)),
            }
        });
    }

    #[test]
    fn names_of_chunks(id in any::<[u8; 32]>(), other in "[0-9a-fg#]{62,66}") {
        prop_assert_eq!(chunks::parse(&hex(&id)), Some(id));
        prop_assert_eq!(chunks::parse(&other).map(|id| hex(&id)), chunks::parse(&other).map(|_| other.clone()));
    }
}
