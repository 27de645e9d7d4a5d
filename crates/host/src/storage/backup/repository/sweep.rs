//! Takes away what no backup names. The head of `mod.rs` says why this needs no lock.

use super::{
    ASIDE, AT_ONCE, ChunkId, LONGEST, Repository, SWEEPS, apart, chunks, says,
    store::{Object, Store},
};
use crate::agent::storage::StorageFailure;
use futures::{StreamExt, TryStreamExt, stream};
use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// So many chunks, which no backup names, were moved aside; they are removed by the first sweep 4 days later.
    pub set_aside: u64,
    /// Their size, in bytes.
    pub set_aside_bytes: u64,
    /// So many chunks that stood aside were put back, because a backup names them.
    pub put_back: u64,
    /// So many chunks were removed.
    pub removed: u64,
    /// Their size, in bytes: so much space is free again.
    pub removed_bytes: u64,
    /// So many parts of backups that never became whole, and unfinished files, were removed.
    pub leftovers: u64,
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// When the sweep began that made this folder under `aside/`.
fn stamp(folder: &str) -> Option<i64> {
    folder.split('-').next()?.parse().ok()
}

/// Unfinished files of writers that crashed, in the folders of a directory, older than this. Listings pass over them.
fn unfinished(directory: &Path, older: SystemTime) -> u64 {
    let mut removed = 0;
    let mut folders = vec![(directory.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let known = depth > 0 || ["chunks", "vms", "aside"].contains(&&*name);
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_folder {
                if known && depth < 4 {
                    folders.push((entry.path(), depth + 1));
                }
                continue;
            }
            let ours = depth > 0 || name.starts_with("haven-");
            let digits = name.rsplit_once('#').map(|(_, digits)| digits).unwrap_or_default();
            let made_here = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
            let old = entry.metadata().and_then(|file| file.modified()).is_ok_and(|at| at < older);
            if ours && made_here && old && fs::remove_file(entry.path()).is_ok() {
                removed += 1;
                // Only if it is empty.
                let _ = fs::remove_dir(&folder);
            }
        }
    }
    removed
}

impl Repository {
    /// Moves aside the chunks that no backup names, and removes those that have stood aside for long enough, and what is
    /// left of backups that never became whole. Any number of hosts may do so while others write.
    ///
    /// # Errors
    /// A sentence, when a backup cannot be read: then nobody knows what it names, and nothing is taken. Also when the
    /// place cannot be read or written.
    pub async fn sweep(&self) -> Result<Swept, StorageFailure> {
        self.ready().await?;
        let began = Instant::now();
        // First the time, then the names: what is 4 days old now was so when the backups were read.
        let now = self.store.clock().await?;
        let folders = self.folders(None).await?;
        let named = self.named(&folders).await?;
        let mut swept = Swept::default();
        self.clear_aside(&named, now, &mut swept).await?;
        self.set_aside(&named, now, began, &mut swept).await?;
        let late = now - millis(ASIDE);
        for objects in folders.into_values() {
            let whole = objects.iter().any(|object| object.key.ends_with("/backup.json"));
            if !whole && objects.iter().all(|object| object.at_ms < late) {
                for object in objects {
                    self.store.delete(&object.key).await?;
                    swept.leftovers += 1;
                }
            }
        }
        if let Some(directory) = self.store.directory().map(Path::to_owned) {
            let late = SystemTime::UNIX_EPOCH + Duration::from_millis(late.unsigned_abs());
            swept.leftovers += apart(move || unfinished(&directory, late)).await;
        }
        Ok(swept)
    }

    /// The chunks that any backup names.
    async fn named(
        &self,
        folders: &BTreeMap<(String, String), Vec<Object>>,
    ) -> Result<HashSet<ChunkId>, StorageFailure> {
        let listed = self.read_all(folders).await;
        let refused = |key: &str, why: &str| {
            says(format!(
                "nothing was swept from {}, because {} cannot be read and it is not known which chunks it names ({why}): remove that backup, or repair it",
                self.store,
                self.store.shown(key)
            ))
        };
        if let Some((key, why)) = listed.unreadable.first() {
            return Err(refused(key, why));
        }
        let mut named = HashSet::new();
        for backup in &listed.backups {
            for disk in &backup.disks {
                match self.index(backup, &disk.name).await {
                    Ok(index) => named.extend(index.chunks.into_iter().flatten()),
                    Err(failure) => {
                        let key = format!("vms/{}/{}/backup.json", backup.vm, backup.id);
                        // Removed meanwhile, it names nothing.
                        if self.store.head(&key).await?.is_some() {
                            return Err(refused(&key, &failure.what));
                        }
                    }
                }
            }
        }
        Ok(named)
    }

    /// Of what stands aside, puts back what is named, and removes what has stood there for long enough.
    async fn clear_aside(
        &self,
        named: &HashSet<ChunkId>,
        now: i64,
        swept: &mut Swept,
    ) -> Result<(), StorageFailure> {
        let late = now - millis(ASIDE);
        let mut due = Vec::new();
        let note = |object: Object| {
            let ["aside", folder, name] = *object.key.split('/').collect::<Vec<_>>() else {
                return;
            };
            let (Some(at), Some(id)) = (stamp(folder), chunks::parse(name)) else { return };
            let wanted = named.contains(&id);
            if wanted || at <= late {
                due.push((object, id, wanted, at <= late));
            }
        };
        self.store.each("aside", note).await?;
        let store = &self.store;
        let work = due.into_iter().map(|(object, id, wanted, old)| async move {
            let home = chunks::key(&id);
            if wanted && store.head(&home).await?.is_none() {
                return Ok((u64::from(store.rename(&object.key, &home).await?), None));
            }
            if old {
                store.delete(&object.key).await?;
            }
            Ok::<_, StorageFailure>((0, old.then_some(object.size)))
        });
        let mut work = stream::iter(work).buffer_unordered(AT_ONCE);
        while let Some((put_back, removed)) = work.try_next().await? {
            swept.put_back += put_back;
            swept.removed += u64::from(removed.is_some());
            swept.removed_bytes += removed.unwrap_or_default();
        }
        Ok(())
    }

    /// Moves aside what is not named. What is young may belong to a backup that is being made; to move that would harm
    /// nothing, but be work for nothing.
    async fn set_aside(
        &self,
        named: &HashSet<ChunkId>,
        now: i64,
        began: Instant,
        swept: &mut Swept,
    ) -> Result<(), StorageFailure> {
        let young = now - millis(LONGEST);
        let mut unnamed = Vec::new();
        let note = |object: Object| {
            let id = object.key.rsplit('/').next().and_then(chunks::parse);
            if object.at_ms < young && id.is_some_and(|id| !named.contains(&id)) {
                unnamed.push(object);
            }
        };
        self.store.each("chunks", note).await?;
        let folder = &format!("aside/{now:014}-{}", uuid::Uuid::new_v4());
        let move_one = |store: Store, object: Object| async move {
            let name = object.key.rsplit('/').next().unwrap_or_default();
            let late = began.elapsed() > SWEEPS;
            let moved = !late && store.rename(&object.key, &format!("{folder}/{name}")).await?;
            Ok::<_, StorageFailure>(moved.then_some(object.size))
        };
        let work = unnamed.into_iter().map(|object| move_one(self.store.clone(), object));
        let mut work = stream::iter(work).buffer_unordered(AT_ONCE);
        while let Some(moved) = work.try_next().await? {
            swept.set_aside += u64::from(moved.is_some());
            swept.set_aside_bytes += moved.unwrap_or_default();
        }
        Ok(())
    }
}
