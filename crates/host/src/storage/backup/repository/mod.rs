//! A place of backups, a directory or a bucket, in which the same data stands only once.
//!
//! ```text
//! haven-backups.json               what makes the place one; without it nothing is read or written here
//! haven-clock                      written to learn what time it is at the place
//! chunks/<2 digits>/<sha256>       at most 4 MiB of a disk, under the sum of its content (`chunks.rs`)
//! vms/<vm>/<id>/<disk>.<sum>.index the list of a disk's chunks (`index.rs`), under the beginning of its own sum
//! vms/<vm>/<id>/backup.json        written last: a backup without it does not exist
//! aside/<when>-<uuid>/<sha256>     chunks that no backup named when they were swept (`sweep.rs`)
//! damaged/<sha256>                 chunks whose content was another; the next backup that reads it writes it again
//! ```
//!
//! # What is promised
//!
//! A backup that is listed is whole: its chunks and lists reached the disk before its `backup.json` was written, and no
//! sweep takes a chunk that it names. Whatever is damaged is told by the name of the object and hides nothing else.
//!
//! # Why no lock is needed
//!
//! Any number of hosts write, remove and sweep at the same time. Two rules keep the chunks of a backup that is still
//! being made, and that therefore nobody can see:
//!
//! 1. A writer relies only on what it has seen under `chunks/` since it began, and on what its base names, a backup that
//!    must still be there when its own `backup.json` is. It ends within [`LONGEST`] (3 days) or not at all.
//! 2. A chunk goes in two steps. A sweep first moves what no backup names to `aside/`, into a folder of its own, never
//!    used again. Only a sweep that begins [`ASIDE`] (4 days) or more after the one that moved it removes it, if still
//!    no backup names it; one that a backup names by then is put back. Until then readers find it there too.
//!
//! A chunk is thus lost only if a sweep that did not see a backup removes what its writer relied on. Not seen, the
//! backup ended after that sweep had begun, so its writer began at most 3 days before that, when what the sweep removes
//! had stood aside for a day already. But a writer does not see what stands aside: what it saw was another copy, which
//! at the earliest now is in the folder of a later sweep, with its own 4 days before it. What the base names the sweep
//! saw too, since the base was there before it and after it. Nor does it harm if a removal is late and meets a chunk
//! that was just written again (an S3 move is a copy and a removal): the copy stands aside.
//!
//! The day between the two covers the length of a sweep (it stops moving after [`SWEEPS`], 6 hours) and the caches of
//! network file systems. All times are by the clock of the place, which a sweep learns by writing `haven-clock`, so that
//! hosts whose clocks are wrong harm nothing. Rejected: removing what is unnamed and old at once, because a writer may
//! write it again between the look at its age and its removal; and marks of running writers, which outlive crashes.

mod chunks;
mod index;
mod store;
mod sweep;

#[cfg(test)]
mod repository_test;
#[cfg(test)]
mod s3_test;

use crate::{agent::storage::StorageFailure, storage::says};
use bytes::Bytes;
use futures::{StreamExt, stream};
use haven_model::{backup::Backup, name::Name};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};
use store::{Object, Store};

pub use index::Index;
pub use sweep::Swept;

/// The size of a chunk, in bytes; the last one of a disk may be shorter.
pub const CHUNK: u64 = 4 << 20;

/// A backup that has taken longer is not finished.
pub const LONGEST: Duration = Duration::from_secs(3 * 86_400);

/// So long a chunk that no backup names stands aside before it is removed.
pub const ASIDE: Duration = Duration::from_secs(4 * 86_400);

/// After so long a sweep moves nothing aside any more.
pub const SWEEPS: Duration = Duration::from_secs(6 * 3_600);

/// What makes a place one of backups.
const MARK: &str = "haven-backups.json";

/// The format of everything here.
const FORMAT: u64 = 1;

/// A larger JSON file is not one of ours.
const JSON_BYTES: u64 = 16 << 20;

/// So many small objects are read at a time.
const AT_ONCE: usize = 8;

/// SHA-256 of a chunk's content.
pub type ChunkId = [u8; 32];

/// Where backups are.
#[derive(Clone, Debug)]
pub enum Place {
    /// An absolute path.
    Directory(PathBuf),
    /// A bucket.
    S3(S3Place),
}

/// A bucket that speaks S3.
#[derive(Clone)]
pub struct S3Place {
    /// `https://HOST[:PORT]` or `http://HOST[:PORT]`, without the bucket.
    pub endpoint: String,
    /// The bucket, which is there already.
    pub bucket: String,
    /// What the names of all objects begin with.
    pub prefix: Option<String>,
    /// Its region; many servers take any.
    pub region: String,
    /// The id of the key.
    pub access_key: String,
    /// The key.
    pub secret_key: String,
    /// Authorities of its certificate besides those that the host trusts, PEM.
    pub ca: Option<String>,
}

/// Without the key.
impl fmt::Debug for S3Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("S3Place");
        shown.field("endpoint", &self.endpoint).field("bucket", &self.bucket);
        shown.field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// The backups of a place.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Listed {
    /// Those that can be read, by VM and id.
    pub backups: Vec<Backup>,
    /// Those that cannot: the `backup.json`, and why.
    pub unreadable: Vec<(String, String)>,
}

/// A place of backups. Clones share what they know of it.
#[derive(Clone, Debug)]
pub struct Repository {
    store: Store,
}

/// `haven-backups.json`.
#[derive(Serialize, Deserialize)]
struct Mark {
    format: u64,
    id: String,
    made_ms: i64,
}

/// `backup.json`. The sum is that of the text of `backup` as it stands there.
#[derive(Serialize, Deserialize)]
struct Record {
    format: u64,
    sum: String,
    backup: Box<RawValue>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sum(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Work that would keep others from running.
async fn apart<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only when the runtime ends, and this with it.
            Err(_) => std::future::pending().await,
        },
    }
}

/// An id becomes part of a path.
fn folder(vm: &Name, id: &str) -> Result<String, StorageFailure> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if id.is_empty() || id.len() > 80 || !id.chars().all(fits) {
        return Err(says(format!(
            "`{id}` cannot be the id of a backup: it has letters, digits, `-` and `_` only, at most 80"
        )));
    }
    Ok(format!("vms/{vm}/{id}"))
}

/// Where the list of a disk's chunks stands. Another attempt of the same backup has other ones.
fn list(folder: &str, disk: &Name, sum: &str) -> String {
    format!("{folder}/{disk}.{}.index", &sum[..sum.len().min(16)])
}

/// Reads a `backup.json` that stands in this folder.
fn parse(vm: &str, id: &str, stored: &[u8]) -> Result<Backup, String> {
    let record: Record =
        serde_json::from_slice(stored).map_err(|error| format!("it is damaged: {error}"))?;
    if record.format != FORMAT {
        return Err(format!(
            "its format is {}, of which this version of Haven knows nothing: update Haven",
            record.format
        ));
    }
    let text = record.backup.get();
    if sum(text.as_bytes()) != record.sum {
        return Err("it is damaged: its content does not have its checksum".to_owned());
    }
    let backup: Backup =
        serde_json::from_str(text).map_err(|error| format!("it cannot be understood: {error}"))?;
    if backup.vm.as_str() != vm || backup.id != id {
        return Err(format!(
            "it is that of the backup {} of {}: it was moved",
            backup.id, backup.vm
        ));
    }
    Ok(backup)
}

impl Repository {
    /// The backups at a place. Nothing is read or written yet.
    ///
    /// # Errors
    /// A sentence, when it cannot be a place.
    pub fn open(place: &Place) -> Result<Self, StorageFailure> {
        Ok(Self { store: Store::open(place)? })
    }

    /// Makes the place one of backups. Fine when it is one already.
    ///
    /// # Errors
    /// A sentence, when it is not there, holds something else, or cannot be written.
    pub async fn create(&self, now_ms: i64) -> Result<(), StorageFailure> {
        if self.marked().await? {
            return Ok(());
        }
        if let Some(other) = self.store.other(MARK).await? {
            return Err(says(format!(
                "{} holds something else already (`{other}`): name an empty directory, or a bucket with a prefix, for backups alone",
                self.store
            )));
        }
        let mark = Mark { format: FORMAT, id: uuid::Uuid::now_v7().to_string(), made_ms: now_ms };
        let mark = serde_json::to_vec(&mark).expect("it can be written as JSON");
        // Another host may have made it meanwhile, which is as good.
        self.store.put_new(MARK, Bytes::from(mark)).await?;
        self.ready().await
    }

    /// Whether it is a place of backups that this version can use.
    async fn marked(&self) -> Result<bool, StorageFailure> {
        let Some(stored) = self.store.get(MARK, JSON_BYTES).await? else { return Ok(false) };
        let shown = self.store.shown(MARK);
        let mark: Mark = serde_json::from_slice(&stored).map_err(|error| {
            says(format!(
                "{shown} is damaged ({error}): restore it, it is the same for all backups"
            ))
        })?;
        if mark.format != FORMAT {
            return Err(says(format!(
                "{shown} says format {}, of which this version of Haven knows nothing: update Haven",
                mark.format
            )));
        }
        self.store.found();
        Ok(true)
    }

    /// Refuses a place that is not one of backups.
    ///
    /// # Errors
    /// A sentence: what is not as it should be.
    pub async fn ready(&self) -> Result<(), StorageFailure> {
        if self.marked().await? {
            return Ok(());
        }
        Err(says(format!(
            "{} is not a place of backups (it has no {MARK}): if its file system is not mounted, mount it; otherwise make it one first",
            self.store
        )))
    }

    /// As `ready`; of a bucket it is asked once, since it is never unmounted.
    async fn here(&self) -> Result<(), StorageFailure> {
        if self.store.is_found() { Ok(()) } else { self.ready().await }
    }

    /// Makes the backup exist: [`Repository::prepare`], then [`Repository::seal`].
    ///
    /// # Errors
    /// As both.
    pub async fn finish(
        &self,
        backup: &mut Backup,
        indexes: &[(Name, Index)],
        base: Option<&str>,
        took: Duration,
    ) -> Result<(), StorageFailure> {
        self.prepare(backup, indexes, base, took).await?;
        self.seal(backup, base).await
    }

    /// Writes the lists of the chunks of its disks and fills in their sums, and brings all to the disk. All chunks that they
    /// name were put since this one began, `took` ago, or are named by its base, another backup of this VM.
    ///
    /// # Errors
    /// A sentence, when it took too long, one of that id is there, its base is not, a list does not fit its disk, or it
    /// cannot be written.
    pub async fn prepare(
        &self,
        backup: &mut Backup,
        indexes: &[(Name, Index)],
        base: Option<&str>,
        took: Duration,
    ) -> Result<(), StorageFailure> {
        self.ready().await?;
        if took > LONGEST {
            return Err(says(format!(
                "the backup {} of {} took longer than {} days, so that its first data may have been swept: check what slows it down, and back up again",
                backup.id,
                backup.vm,
                LONGEST.as_secs() / 86_400
            )));
        }
        let key = format!("{}/backup.json", folder(&backup.vm, &backup.id)?);
        let taken = says(format!("{} is there already: back up again", self.store.shown(&key)));
        if self.store.head(&key).await?.is_some() {
            return Err(taken);
        }
        self.write_indexes(backup, indexes).await?;
        self.builds_on(backup, base).await?;
        self.store.sync().await
    }

    /// Makes a backup exist that is prepared: writes its `backup.json`.
    ///
    /// # Errors
    /// A sentence, when one of that id is there, its base is not, or it cannot be written.
    pub async fn seal(&self, backup: &Backup, base: Option<&str>) -> Result<(), StorageFailure> {
        self.ready().await?;
        let key = format!("{}/backup.json", folder(&backup.vm, &backup.id)?);
        let taken = says(format!("{} is there already: back up again", self.store.shown(&key)));
        let text = serde_json::to_string(backup).expect("a backup can be written as JSON");
        let sum = sum(text.as_bytes());
        let text = RawValue::from_string(text).expect("it was just written as JSON");
        let record = Record { format: FORMAT, sum, backup: text };
        let record = serde_json::to_vec(&record).expect("it can be written as JSON");
        // In a directory both it and its name are on the disk when this returns.
        if !self.store.put_new(&key, Bytes::from(record)).await? {
            return Err(taken);
        }
        // A sweep that did not see this one saw its base if that is still there.
        let built = self.builds_on(backup, base).await;
        if built.is_err() {
            self.store.delete(&key).await?;
        }
        built
    }

    async fn write_indexes(
        &self,
        backup: &mut Backup,
        indexes: &[(Name, Index)],
    ) -> Result<(), StorageFailure> {
        if indexes.len() != backup.disks.len() {
            return Err(says(format!(
                "the backup {} has {} disks but {} lists of chunks: this is a fault of Haven",
                backup.id,
                backup.disks.len(),
                indexes.len()
            )));
        }
        let folder = folder(&backup.vm, &backup.id)?;
        for disk in &mut backup.disks {
            let index = indexes.iter().find(|(name, _)| *name == disk.name).map(|(_, index)| index);
            let Some(index) = index.filter(|index| index.fits(disk.size.0)) else {
                return Err(says(format!(
                    "the list of the chunks of disk `{}` does not fit its size: this is a fault of Haven",
                    disk.name
                )));
            };
            let index = index.clone();
            let stored = apart(move || index.encode()).await;
            disk.index = sum(&stored);
            let key = list(&folder, &disk.name, &disk.index);
            self.store.put(&key, Bytes::from(stored)).await?;
        }
        Ok(())
    }

    async fn builds_on(&self, backup: &Backup, base: Option<&str>) -> Result<(), StorageFailure> {
        let Some(base) = base else { return Ok(()) };
        let key = format!("{}/backup.json", folder(&backup.vm, base)?);
        if self.store.head(&key).await?.is_some() {
            return Ok(());
        }
        Err(says(format!(
            "the backup {base} of {}, on which {} builds, was removed meanwhile: back up again",
            backup.vm, backup.id
        )))
    }

    /// The backups of all VMs or of one.
    ///
    /// # Errors
    /// A sentence, when the place cannot be listed. Of what cannot be read `unreadable` tells.
    pub async fn list(&self, vm: Option<&Name>) -> Result<Listed, StorageFailure> {
        self.here().await?;
        Ok(self.read_all(&self.folders(vm).await?).await)
    }

    /// What is in each folder of a backup, by VM and id.
    async fn folders(
        &self,
        vm: Option<&Name>,
    ) -> Result<BTreeMap<(String, String), Vec<Object>>, StorageFailure> {
        let mut folders = BTreeMap::<_, Vec<Object>>::new();
        let under = vm.map_or_else(|| "vms".to_owned(), |vm| format!("vms/{vm}"));
        let note = |object: Object| {
            if let ["vms", vm, id, _] = *object.key.split('/').collect::<Vec<_>>() {
                folders.entry((vm.to_owned(), id.to_owned())).or_default().push(object);
            }
        };
        self.store.each(&under, note).await?;
        Ok(folders)
    }

    /// Reads the `backup.json` of those folders that have one.
    async fn read_all(&self, folders: &BTreeMap<(String, String), Vec<Object>>) -> Listed {
        let whole = folders
            .iter()
            .filter(|(_, objects)| objects.iter().any(|one| one.key.ends_with("/backup.json")));
        let reading = whole.map(|((vm, id), _)| async move {
            let key = format!("vms/{vm}/{id}/backup.json");
            match self.store.get(&key, JSON_BYTES).await {
                Ok(Some(stored)) => Some(parse(vm, id, &stored).map_err(|why| (key, why))),
                // Removed meanwhile.
                Ok(None) => None,
                Err(failure) => Some(Err((key, failure.what))),
            }
        });
        let reading = reading.collect::<Vec<_>>();
        let mut listed = Listed::default();
        let mut reading = stream::iter(reading).buffered(AT_ONCE);
        while let Some(read) = reading.next().await {
            match read {
                Some(Ok(backup)) => listed.backups.push(backup),
                Some(Err(unreadable)) => listed.unreadable.push(unreadable),
                None => {}
            }
        }
        listed
    }

    /// One backup.
    ///
    /// # Errors
    /// A sentence, when there is none, or it cannot be read.
    pub async fn read(&self, vm: &Name, id: &str) -> Result<Backup, StorageFailure> {
        self.here().await?;
        let key = format!("{}/backup.json", folder(vm, id)?);
        let Some(stored) = self.store.get(&key, JSON_BYTES).await? else {
            return Err(says(format!(
                "{} has no backup {id} of {vm}: list those that it has",
                self.store
            )));
        };
        parse(vm.as_str(), id, &stored)
            .map_err(|why| says(format!("{} cannot be used: {why}", self.store.shown(&key))))
    }

    /// The list of the chunks of a disk of a backup.
    ///
    /// # Errors
    /// A sentence, when the backup has no such disk, or the list is missing or damaged.
    pub async fn index(&self, backup: &Backup, disk: &Name) -> Result<Index, StorageFailure> {
        self.here().await?;
        let Some(known) = backup.disks.iter().find(|one| one.name == *disk) else {
            return Err(says(format!(
                "the backup {} of {} has no disk `{disk}`",
                backup.id, backup.vm
            )));
        };
        let key = list(&folder(&backup.vm, &backup.id)?, disk, &known.index);
        let damaged = |why: &str| {
            says(format!(
                "{} is damaged ({why}): this disk cannot be restored from this backup, use another and remove this one",
                self.store.shown(&key)
            ))
        };
        let size = known.size.0;
        let stored = self.store.get(&key, Index::most(size)).await?;
        let stored = stored.ok_or_else(|| damaged("it is missing"))?;
        let expected = known.index.clone();
        let index = apart(move || {
            if sum(&stored) != expected {
                return Err("it does not have its checksum".to_owned());
            }
            Index::decode(&stored, size)
        });
        index.await.map_err(|why| damaged(&why))
    }

    /// Removes a backup. It does not exist from the first moment on; its chunks go with the sweeps. Fine when there is
    /// none.
    ///
    /// # Errors
    /// A sentence, when it cannot be removed.
    pub async fn remove(&self, vm: &Name, id: &str) -> Result<(), StorageFailure> {
        self.here().await?;
        let folder = folder(vm, id)?;
        self.store.delete(&format!("{folder}/backup.json")).await?;
        let mut rest = Vec::new();
        self.store.each(&folder, |object| rest.push(object.key)).await?;
        for key in rest {
            self.store.delete(&key).await?;
        }
        Ok(())
    }
}
