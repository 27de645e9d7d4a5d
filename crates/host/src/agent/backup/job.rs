//! One backup of one VM: reads a view of its disks and stores what the target does not have.

use crate::{
    agent::{
        AgentParts, chain,
        disk_keys::{self, Missing},
        mirrored,
        storage::{StorageFailure, VolumeName},
    },
    storage::{
        backup::{
            repository::{CHUNK, ChunkId, Index, Repository},
            served::Served,
            target,
        },
        in_words, pool, says,
        sparse::Sparse,
    },
    vm::views::{DiskView, Extent, Marks, ViewAsked},
};
use futures::{FutureExt, StreamExt, stream::FuturesOrdered};
use haven_model::{
    Bytes, Name, ObjectRef, PoolSpec, Severity, Snapshot,
    backup::{Backup, BackupDisk, BackupRun, BackupSpec, Moment},
    keys,
    object::{Kind, Stored},
    vm::{DiskSpec, VmSpec},
    volume::VolumeRef,
};
use haven_store::{
    clock::Mono,
    raw::{Compare, Op, StoreError},
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    future::Future,
    pin::Pin,
    sync::Arc,
    time::Duration,
};
use tokio::task::JoinHandle;

/// How often it is told how far it is.
const TELL: Duration = Duration::from_secs(1);
/// So many chunks are stored at once; the guests need the processors, too.
const AT_ONCE: usize = 3;
/// So much is asked about in one go, bytes.
const SPAN: u64 = 1 << 30;
/// A pool on which less is free has no room for what guests overwrite meanwhile, bytes; or less than a tenth of it.
const ROOM: u64 = 1 << 30;
/// How often that is looked at.
const LOOKS: Duration = Duration::from_millis(300);
/// How long the store may not answer.
const PATIENT: Duration = Duration::from_secs(60);
/// The pause before it is asked again.
const ASKS: Duration = Duration::from_secs(1);

/// A job, which ends when this is dropped.
pub struct Job {
    id: String,
    task: JoinHandle<()>,
}

impl Drop for Job {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A backup that is wanted of this host.
pub struct Due {
    /// Its record.
    pub run: BackupRun,
    /// The revision of that.
    pub revision: i64,
    /// The revision of the placement under which it is this host's.
    pub placed: i64,
}

/// The backup that is wanted of this host now.
#[must_use]
pub fn due(parts: &AgentParts, now: &Snapshot, vm: &Name) -> Option<Due> {
    parts.current_session()?;
    let placed = now.placements.get(vm).filter(|placed| placed.host == parts.me)?.revision;
    let object = now.vms.get(vm).filter(|vm| !vm.meta.deleting)?;
    let run = now.backups.get(vm).filter(|run| run.outcome.is_none())?;
    let due = || Due { run: (*run.value).clone(), revision: run.revision, placed };
    (run.vm_uid == object.meta.uid).then(due)
}

impl Job {
    /// Begins; `runs`: its guest does.
    #[must_use]
    pub fn begin(
        parts: &Arc<AgentParts>,
        object: Arc<Stored<VmSpec>>,
        due: Due,
        runs: bool,
    ) -> Self {
        let Due { run, revision, placed } = due;
        let id = run.id.clone();
        let work = Work {
            parts: Arc::clone(parts),
            vm: object.meta.name.clone(),
            object: Arc::clone(&object),
            begun: parts.clock.now(),
            told: parts.clock.now(),
            run,
            revision,
            placed,
            runs,
        };
        Self { id, task: tokio::spawn(work.run()) }
    }

    /// The id of its backup.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Nothing of it goes on any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }

    /// Ends it; returns when nothing of it goes on any more.
    pub async fn end(mut self) {
        self.task.abort();
        // That it was given up is what was wanted.
        let _ = (&mut self.task).await;
    }
}

/// The record is somebody else's by now.
struct Over;

/// Why it goes no further.
enum Stop {
    Over,
    Fails(StorageFailure),
}

impl From<Over> for Stop {
    fn from(_: Over) -> Self {
        Self::Over
    }
}

impl From<StorageFailure> for Stop {
    fn from(failure: StorageFailure) -> Self {
        Self::Fails(failure)
    }
}

struct Work {
    parts: Arc<AgentParts>,
    vm: Name,
    object: Arc<Stored<VmSpec>>,
    begun: Mono,
    told: Mono,
    run: BackupRun,
    revision: i64,
    /// The revision of the placement under which it is this host's.
    placed: i64,
    runs: bool,
}

/// A chunk that is being stored: its id, and how much of the target it took.
type Storing<'a> =
    Pin<Box<dyn Future<Output = Result<(Option<ChunkId>, u64), StorageFailure>> + Send + 'a>>;

impl Work {
    async fn run(mut self) {
        tracing::info!(vm = %self.vm, to = %self.run.to, "it is backed up");
        let (parts, pools) = (Arc::clone(&self.parts), self.pools());
        let runs = self.runs;
        let made = tokio::select! {
            biased;
            made = self.make() => made,
            why = full(&parts, &pools), if runs => Err(Stop::Fails(why)),
        };
        if self.runs
            && let Err(error) = self.parts.vms.close_view(self.vm.as_str()).await
        {
            tracing::warn!(vm = %self.vm, why = chain(&error), "its disks are still held as they were");
        }
        let (well, message) = match made {
            Ok(message) => (true, message),
            Err(Stop::Over) => {
                tracing::info!(vm = %self.vm, "its backup is given up: it is not wanted here any more");
                return;
            }
            Err(Stop::Fails(failure)) => (false, failure.what),
        };
        let severity = if well { Severity::Info } else { Severity::Warning };
        let event = match well {
            true => format!("backed up to {} as {}: {message}", self.run.to, self.run.id),
            false => format!("could not be backed up to {}: {message}", self.run.to),
        };
        let event = self.parts.event(&ObjectRef::new(Kind::Vm, self.vm.clone()), severity, event);
        self.run = self.run.ended((self.parts.wall_ms)(), well, message);
        if self.tell(Some(event)).await.is_err() || !well {
            return;
        }
        // It stands and is told; what is too old may go, whoever ends this job.
        tokio::spawn(async move {
            if let Err(failure) = self.prune().await {
                tracing::warn!(vm = %self.vm, %failure, "its old backups cannot be removed");
            }
        });
    }

    /// The pools of its disks.
    fn pools(&self) -> BTreeMap<Name, PoolSpec> {
        let live = self.parts.live.borrow();
        let pools =
            self.object.spec.disks.iter().filter_map(|disk| {
                Some((disk.pool.clone(), live.pools.get(&disk.pool)?.spec.clone()))
            });
        pools.collect()
    }

    /// Makes it; what it came to, in words.
    async fn make(&mut self) -> Result<String, Stop> {
        let live = Arc::clone(&self.parts.live.borrow());
        let repository = target::repository(&live, self.parts.secrets.as_ref(), &self.run.to)?;
        repository.ready().await?;
        let base = self.base(&repository).await?;
        if let Some(there) = base.as_ref().filter(|base| base.id == self.run.id) {
            // An attempt before this one had come to its end, and could not say so.
            return Ok(words(there));
        }
        let mut backup = self.begun((self.parts.wall_ms)());
        let (moment, disks) = self.open(&live, base.as_ref(), &backup.mark).await?;
        backup.moment = moment;
        self.run.total = Bytes(disks.iter().map(|(_, disk)| disk.size()).sum());
        self.tell(None).await?;
        let mut indexes = Vec::new();
        for (name, view) in disks {
            let before = match base.as_ref().filter(|_| view.is_marked()) {
                // Without it all of the disk is read.
                Some(base) => match repository.index(base, &name).await {
                    Ok(index) => (!repository.lacks(&index).await?).then_some(index),
                    Err(failure) => {
                        tracing::warn!(vm = %self.vm, %failure, "the backup before is not built on");
                        None
                    }
                },
                None => None,
            };
            let (disk, index) = self.disk(&repository, &name, view, before).await?;
            indexes.push((name, index));
            backup.disks.push(disk);
        }
        backup.ended_ms = (self.parts.wall_ms)();
        let took = self.parts.clock.now().since(self.begun);
        let on = base.as_ref().map(|base| base.id.as_str());
        repository.prepare(&mut backup, &indexes, on, took).await?;
        // Whether it is still wanted of this host, right before it is made to count.
        self.tell(None).await?;
        repository.seal(&backup, on).await?;
        Ok(words(&backup))
    }

    fn begun(&self, at_ms: i64) -> Backup {
        Backup {
            id: self.run.id.clone(),
            vm: self.vm.clone(),
            vm_uid: self.run.vm_uid.clone(),
            at_ms,
            ended_ms: at_ms,
            by: self.run.by.clone(),
            moment: Moment::Stopped,
            mark: uuid::Uuid::new_v4().simple().to_string(),
            object: serde_json::json!({
                "labels": self.object.meta.labels,
                "spec": self.object.spec,
            }),
            disks: Vec::new(),
        }
    }

    /// Opens its disks as they are at one instant.
    async fn open(
        &self,
        live: &Snapshot,
        base: Option<&Backup>,
        mark: &str,
    ) -> Result<(Moment, Vec<(Name, Box<dyn DiskView>)>), StorageFailure> {
        if !self.runs {
            return Ok((Moment::Stopped, self.closed(live, |_| true).await?));
        }
        let marks = Marks {
            owner: self.run.to.to_string(),
            mark: mark.to_owned(),
            since: base.map(|base| base.mark.clone()).filter(|mark| !mark.is_empty()),
        };
        let asked = ViewAsked { disks: Vec::new(), marks: Some(marks), keep: None, stored: false };
        let view = self.parts.vms.open_view(self.vm.as_str(), &asked).await;
        let view = view.map_err(|error| says(chain(&error)))?;
        let moment = if view.frozen { Moment::Frozen } else { Moment::Running };
        let named = view.disks.into_iter().map(|(name, disk)| Ok((Name::new(name)?, disk)));
        let named = named.collect::<Result<Vec<_>, haven_model::ModelError>>();
        let mut disks = named.map_err(|error| says(error.to_string()))?;
        // None of them comes or goes as long as this goes on.
        let open: BTreeSet<Name> = disks.iter().map(|(name, _)| name.clone()).collect();
        let closed = |disk: &DiskSpec| disk.detached && !open.contains(&disk.name);
        disks.extend(self.closed(live, closed).await?);
        Ok((moment, disks))
    }

    /// The disks that no process has open.
    async fn closed(
        &self,
        live: &Snapshot,
        which: impl Fn(&DiskSpec) -> bool,
    ) -> Result<Vec<(Name, Box<dyn DiskView>)>, StorageFailure> {
        let mut disks: Vec<(Name, Box<dyn DiskView>)> = Vec::new();
        let placed = live.placements.get(&self.vm);
        let uid = placed.map_or(0, |placed| placed.unix_uid());
        for disk in self.object.spec.disks.iter().filter(|disk| which(disk)) {
            let Some(pool) = live.pools.get(&disk.pool) else {
                return Err(says(format!("the pool `{}` is not there", disk.pool)));
            };
            let name = VolumeName {
                vm: self.vm.clone(),
                disk: disk.name.clone(),
                vm_uid: self.run.vm_uid.clone(),
            };
            let of = VolumeRef { vm: self.vm.clone(), disk: disk.name.clone() };
            if let Some(volume) = live.volumes.get(&of)
                && !volume.counts(&self.parts.me)
            {
                return Err(says(format!(
                    "the replica of the disk `{}` on {} lacks something; start the VM, or move it (`haven vm migrate {}`)",
                    disk.name, self.parts.me, self.vm
                )));
            }
            let path = self.parts.storage.has_volume(&pool.spec, &name, uid).await?;
            let Some(path) = path else {
                // Its guest has never seen it.
                if disk.detached {
                    continue;
                }
                return Err(says(format!(
                    "the disk `{}` is not made yet; start the VM, and its disks are there to be kept",
                    disk.name
                )));
            };
            // What was made what it was in a snapshot is so once somebody opens it.
            if let Some(volume) = live.volumes.get(&of)
                && let Some(base) = mirrored::base(&self.parts.me, volume, &name, &path)
            {
                let of = name.to_string();
                let shut = self.parts.replicas.own(&of, &path, volume.run, Some(&base));
                shut.await.map_err(|error| says(chain(&error)))?;
            }
            let format = pool::format(&pool.spec);
            let key = match disk.encrypted {
                true => Some(disk_keys::key(&self.parts, &name, Missing::Refused).await?),
                false => None,
            };
            let served = Served::open(&path, format, false, key.as_ref()).await?;
            let mut view: Box<dyn DiskView> = Box::new(served);
            if key.is_some() && format == "raw" {
                let sparse = Sparse::new(view, &path);
                let unread = |error| says(format!("{} cannot be read ({error})", path.display()));
                view = Box::new(sparse.map_err(unread)?);
            }
            disks.push((disk.name.clone(), view));
        }
        Ok(disks)
    }

    /// The newest backup of this VM.
    async fn base(&self, repository: &Repository) -> Result<Option<Backup>, StorageFailure> {
        let list = repository.list(Some(&self.vm)).await?;
        for (key, why) in &list.unreadable {
            tracing::warn!(vm = %self.vm, key, why, "a backup of it cannot be read");
        }
        Ok(list.backups.into_iter().rev().find(|backup| backup.vm_uid == self.run.vm_uid))
    }

    /// Writes the record over the one that this wrote last, as long as the VM has the place that it had. A store that does not
    /// answer is asked again for a while.
    async fn tell(&mut self, event: Option<Op>) -> Result<(), Over> {
        let until = self.parts.clock.now().plus(PATIENT);
        loop {
            match self.put(event.clone()).await {
                Ok(told) => return told,
                Err(error) if self.parts.clock.now() >= until => {
                    tracing::warn!(vm = %self.vm, %error, "how far its backup is cannot be written");
                    return Err(Over);
                }
                Err(_) => self.parts.clock.sleep(ASKS).await,
            }
        }
    }

    /// The same, once.
    async fn put(&mut self, event: Option<Op>) -> Result<Result<(), Over>, StoreError> {
        let (key, placement) = (keys::backup(&self.vm), keys::placement(&self.vm));
        let value = serde_json::to_vec(&self.run).expect("a record is plain data");
        let mut ops = vec![Op::Put(key.clone(), value.clone().into())];
        ops.extend(event);
        let over = vec![
            Compare::ModRevision(key.clone(), self.revision),
            Compare::ModRevision(placement, self.placed),
        ];
        let outcome = self.parts.store.txn(over, ops).await?;
        if outcome.succeeded {
            self.revision = outcome.revision;
            return Ok(Ok(()));
        }
        // The answer to an earlier try may have been lost.
        let there = self.parts.store.get(&key).await?;
        match there.filter(|there| there.value == value) {
            Some(own) => {
                self.revision = own.mod_revision;
                Ok(Ok(()))
            }
            None => Ok(Err(Over)),
        }
    }

    /// Tells now and then how far it is, and looks whether it may go on.
    async fn further(&mut self, bytes: u64) -> Result<(), Stop> {
        self.run.done = Bytes(self.run.done.0 + bytes);
        let now = self.parts.clock.now();
        if now.since(self.told) < TELL {
            return Ok(());
        }
        self.told = now;
        match self.put(None).await {
            Ok(told) => Ok(told?),
            // Later will do.
            Err(error) => {
                tracing::debug!(vm = %self.vm, %error, "how far its backup is could not be written");
                Ok(())
            }
        }
    }

    /// Reads a disk and stores what of it is new.
    async fn disk(
        &mut self,
        repository: &Repository,
        name: &Name,
        mut view: Box<dyn DiskView>,
        before: Option<Index>,
    ) -> Result<(BackupDisk, Index), Stop> {
        let size = view.size();
        let before = before.filter(|before| before.size == size);
        let unread = |error: std::io::Error| {
            says(format!(
                "the disk `{name}` cannot be read as it was ({error}); if its pool is nearly full, there was no room for what the guest overwrote meanwhile"
            ))
        };
        let mut extents = Extents::default();
        let mut index = Index { size, chunks: Vec::new() };
        let mut storing: FuturesOrdered<Storing<'_>> = FuturesOrdered::new();
        let (mut read, mut stored) = (0, 0);
        for (i, offset) in (0..size).step_by(CHUNK as usize).enumerate() {
            let length = CHUNK.min(size - offset);
            let parts = extents.of(&mut *view, offset, length).await.map_err(unread)?;
            let same = before.as_ref().filter(|_| parts.iter().all(|part| !part.dirty));
            let chunk: Storing<'_> = if let Some(before) = same {
                let id = before.chunks.get(i).copied().flatten();
                async move { Ok((id, 0)) }.boxed()
            } else if parts.iter().all(|part| part.zero) {
                async move { Ok((None, 0)) }.boxed()
            } else {
                let content = content(&mut *view, offset, length, &parts).await.map_err(unread)?;
                read += length;
                async move { repository.put(content.into()).await }.boxed()
            };
            view.release(offset, length as u32).await.map_err(unread)?;
            storing.push_back(chunk);
            while storing.len() > AT_ONCE {
                let Some(done) = storing.next().await else { break };
                let (id, took) = done?;
                index.chunks.push(id);
                stored += took;
            }
            self.further(length).await?;
        }
        while let Some(done) = storing.next().await {
            let (id, took) = done?;
            index.chunks.push(id);
            stored += took;
        }
        let used = index.chunks.iter().flatten().count() as u64 * CHUNK;
        let disk = BackupDisk {
            name: name.clone(),
            size: Bytes(size),
            index: String::new(),
            used: Bytes(used.min(size)),
            read: Bytes(read),
            stored: Bytes(stored),
        };
        Ok((disk, index))
    }

    /// Removes the backups of this VM that are older than its spec keeps, counted from the newest, which stays.
    async fn prune(&self) -> Result<(), StorageFailure> {
        let spec: Option<&BackupSpec> = self.object.spec.backup.as_ref();
        let Some(keep) = spec.filter(|spec| spec.to == self.run.to).and_then(|spec| spec.keep)
        else {
            return Ok(());
        };
        let live = Arc::clone(&self.parts.live.borrow());
        let repository = target::repository(&live, self.parts.secrets.as_ref(), &self.run.to)?;
        let list = repository.list(Some(&self.vm)).await?;
        let of_it = list.backups.into_iter().filter(|one| one.vm_uid == self.run.vm_uid);
        let mut of_it: Vec<Backup> = of_it.collect();
        let Some(newest) = of_it.pop() else { return Ok(()) };
        let before = newest.at_ms.saturating_sub(i64::try_from(keep.0).unwrap_or(i64::MAX));
        let needed = |old: &Backup| live.made_from(&self.run.to, &old.vm, &old.id).is_some();
        for old in of_it.iter().filter(|old| old.at_ms < before && !needed(old)) {
            repository.remove(&old.vm, &old.id).await?;
            tracing::info!(vm = %self.vm, id = old.id, "a backup of it is older than is kept: it is removed");
        }
        Ok(())
    }
}

/// Waits until a pool has no room left for what guests overwrite meanwhile; what is to be said then.
async fn full(parts: &AgentParts, pools: &BTreeMap<Name, PoolSpec>) -> StorageFailure {
    loop {
        for (name, pool) in pools {
            let room = parts.storage.room(pool).await.ok().flatten();
            if let Some(room) = room.filter(|room| room.free.0 < ROOM.min(room.total.0 / 10)) {
                return says(format!(
                    "the pool `{name}` has {} free, too little for what the guest overwrites while it is backed up; free some space there, or enlarge it",
                    in_words(room.free.0)
                ));
            }
        }
        parts.clock.sleep(LOOKS).await;
    }
}

/// What a backup came to, in words.
fn words(backup: &Backup) -> String {
    let sum = |of: fn(&BackupDisk) -> u64| in_words(backup.disks.iter().map(of).sum());
    let how = match backup.moment {
        Moment::Frozen => "its file systems frozen by the guest's agent",
        Moment::Running => "its disks as a power cut would have left them",
        Moment::Stopped => "the VM did not run",
    };
    let named = backup.object["spec"]["disks"].as_array().into_iter().flatten();
    let named = named.filter_map(|disk| disk["name"].as_str());
    let has = |name: &&str| backup.disks.iter().all(|disk| disk.name.as_str() != *name);
    let without: Vec<String> = named.filter(has).map(|name| format!("`{name}`")).collect();
    let without = match without.as_slice() {
        [] => String::new(),
        names => format!("; without {}, of which nothing is there yet", names.join(" and ")),
    };
    format!(
        "{} in use, {} read, {} new in the target, in {:.1} s; {how}{without}",
        sum(|disk| disk.used.0),
        sum(|disk| disk.read.0),
        sum(|disk| disk.stored.0),
        (backup.ended_ms - backup.at_ms) as f64 / 1000.0
    )
}

/// Extents that were asked for in one go.
#[derive(Default)]
struct Extents {
    known: VecDeque<Extent>,
}

impl Extents {
    /// Those of the next part of the disk; parts are asked for one after another.
    async fn of(
        &mut self,
        view: &mut dyn DiskView,
        offset: u64,
        length: u64,
    ) -> std::io::Result<Vec<Extent>> {
        let (mut found, mut covered) = (Vec::new(), 0);
        while covered < length {
            let Some(mut next) = self.known.pop_front() else {
                let from = offset + covered;
                let span = SPAN.min(view.size() - from);
                self.known = view.status(from, span as u32).await?.into();
                if self.known.iter().all(|extent| extent.length == 0) {
                    return Err(std::io::Error::other("it tells nothing of its content"));
                }
                continue;
            };
            let take = next.length.min(length - covered);
            found.push(Extent { length: take, ..next });
            covered += take;
            next.length -= take;
            if next.length > 0 {
                self.known.push_front(next);
            }
        }
        Ok(found)
    }
}

/// What a part of a disk holds.
async fn content(
    view: &mut dyn DiskView,
    offset: u64,
    length: u64,
    parts: &[Extent],
) -> std::io::Result<Vec<u8>> {
    let mut content = vec![0; length as usize];
    let mut at = 0;
    for part in parts {
        let next = at + part.length as usize;
        if !part.zero {
            view.read(offset + at as u64, &mut content[at..next]).await?;
        }
        at = next;
    }
    Ok(content)
}
