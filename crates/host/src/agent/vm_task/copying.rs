//! The copy of mirrored disks that a snapshot of a VM is of them: made by the VM's host from its own replica, beside the task of the
//! VM, while its guest runs or not (docs/decisions/0027-snapshots.md). Other hosts fetch theirs afterwards (`mirrored/copies.rs`).

use super::{
    VmTask,
    snapshots::{At, COPIES, Disk, Due, LOOK},
};
use crate::{
    agent::{
        AgentParts, chain, mirrored,
        storage::{StorageFailure, VolumeName},
    },
    storage::mirrored::{
        driver::Base,
        kept::{KeptOf, Source, ViewSource},
    },
    vm::{
        snapshots::Keeps,
        views::{Keep, ViewAsked},
    },
};
use async_trait::async_trait;
use haven_model::{
    Bytes, Name, PoolSpec, Snapshot, Versioned,
    backup::Moment,
    vm_snapshot::{SnapshotDisk, SnapshotState, VmSnapshot},
    volume::{Volume, VolumeRef},
};
use haven_store::clock::Mono;
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::task::JoinHandle;

/// A disk that is to be copied.
#[derive(Clone, Debug)]
pub(super) struct Copied {
    /// Its volume.
    pub of: VolumeRef,
    /// The replica of this host.
    pub replica: PathBuf,
    /// What its file is named after.
    pub volume: VolumeName,
    /// The run that its record says.
    pub run: u64,
    /// What it is to hold before anybody reads it.
    pub base: Option<Base>,
}

impl Copied {
    /// A copy of it.
    pub fn kept(&self, copy: &str) -> KeptOf {
        let (replica, volume) = (self.replica.clone(), self.volume.clone());
        KeptOf { replica, volume, copy: copy.to_owned() }
    }
}

/// Copies that are being made; none any more once this is dropped.
pub(super) struct Copying {
    /// What they are called.
    pub copy: String,
    /// Its guest runs.
    pub runs: bool,
    read: Arc<AtomicU64>,
    /// Of all its disks, bytes.
    total: u64,
    task: JoinHandle<Result<Moment, String>>,
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Copying {
    /// How far they are, in words and twentieths; nothing once they have come to an end.
    pub fn is_at(&self) -> Option<String> {
        let read = Bytes(self.read.load(Ordering::Relaxed));
        let percent = read.0.saturating_mul(20) / self.total.max(1) * 5;
        (!self.task.is_finished()).then(|| format!("its mirrored disks are copied: {percent} %"))
    }
}

/// What is read of a disk is counted.
struct Counted {
    source: ViewSource,
    read: Arc<AtomicU64>,
    before: u64,
}

#[async_trait]
impl Source for Counted {
    fn size(&self) -> u64 {
        self.source.size()
    }
    async fn next(&mut self, from: u64) -> std::io::Result<Option<(u64, Vec<u8>)>> {
        let next = self.source.next(from).await?;
        let end = next.as_ref().map_or(self.source.size(), |(at, of)| at + of.len() as u64);
        self.read.store(self.before + end, Ordering::Relaxed);
        Ok(next)
    }
}

/// Copies what its guest's disks hold at one instant, while that runs on.
async fn of_a_guest(
    parts: &AgentParts,
    copy: &str,
    disks: &[Copied],
    keep: Option<Keep>,
    read: &Arc<AtomicU64>,
) -> Result<Moment, String> {
    let Some(vm) = disks.first().map(|disk| disk.of.vm.clone()) else {
        return Ok(Moment::Running);
    };
    let names = disks.iter().map(|disk| disk.of.disk.to_string()).collect();
    let asked = ViewAsked { disks: names, marks: None, keep, stored: true };
    let view = parts.vms.open_view(vm.as_str(), &asked).await.map_err(|error| chain(&error))?;
    let at_ms = (parts.wall_ms)();
    let seen: Vec<String> = view.disks.iter().map(|(name, _)| name.clone()).collect();
    if let Some(disk) = disks.iter().find(|disk| !seen.contains(&disk.of.disk.to_string())) {
        return Err(format!("the disk `{}` is not attached", disk.of.disk));
    }
    let moment = if view.frozen { Moment::Frozen } else { Moment::Running };
    let mut left = disks.to_vec();
    let mut before = 0;
    for (name, view) in view.disks {
        let Some(at) = left.iter().position(|disk| disk.of.disk.as_str() == name) else { continue };
        let disk = left.swap_remove(at);
        let size = view.size();
        let source = ViewSource::new(view);
        let mut source = Counted { source, read: Arc::clone(read), before };
        let kept = parts.kept.keep_from(&disk.kept(copy), at_ms, &mut source).await;
        kept.map_err(|failure| failure.what)?;
        before += size;
    }
    Ok(moment)
}

/// Copies replicas that no process has open.
async fn at_rest(parts: &AgentParts, copy: &str, disks: &[Copied]) -> Result<(), String> {
    for disk in disks {
        // Nobody writes to it, wherever whatever runs that did.
        let (name, base) = (disk.volume.to_string(), disk.base.as_ref());
        let shut = parts.replicas.own(&name, &disk.replica, disk.run, base).await;
        shut.map_err(|error| chain(&error))?;
        let kept = parts.kept.keep(&disk.kept(copy), (parts.wall_ms)()).await;
        kept.map_err(|failure| failure.what)?;
    }
    Ok(())
}

impl VmTask {
    /// What this attempt is called. First it is written, so that nobody takes what it makes for something of another attempt, or for
    /// nobody's; then it is begun.
    pub(super) async fn begun(&mut self, due: &Due, message: &str) -> Option<String> {
        let ours = self.attempt.take().filter(|of| due.record.copy.as_ref() == Some(of));
        if ours.is_some() {
            return ours;
        }
        let copy = due.record.attempt(due.revision);
        let (named, message) = (Some(copy.clone()), message.to_owned());
        let record = VmSnapshot { copy: named, message, ..due.record.clone() };
        self.put_snapshot(due, Some(&record), None).await;
        self.attempt = Some(copy);
        None
    }

    /// A mirrored disk whose replica is here, and the copies of it.
    pub(super) async fn replica(
        &self,
        snapshot: &Snapshot,
        due: &Due,
        name: &Name,
        pool: &PoolSpec,
    ) -> Result<Option<Disk>, String> {
        let of = VolumeRef { vm: self.vm.clone(), disk: name.clone() };
        let uid = due.object.meta.uid.as_str();
        let record = snapshot.volumes.get(&of).filter(|record| record.vm_uid == uid);
        let here = |record: &&Versioned<Volume>| {
            record.run > 0 && record.replicas.contains_key(&self.parts.me)
        };
        let Some(record) = record.filter(here) else { return Ok(None) };
        if due.record.state == SnapshotState::Wanted && !record.counts(&self.parts.me) {
            return Err(format!("the replica of the disk `{name}` here lacks something"));
        }
        let volume = mirrored::name(&of, record);
        let placed = snapshot.placements.get(&self.vm);
        let uid = placed.map_or(0, |placed| placed.unix_uid());
        let look = async {
            let replica = self.parts.storage.has_volume(pool, &volume, uid).await?;
            let Some(replica) = replica else { return Ok(None) };
            let kept = self.parts.kept.of(&volume, &replica).await?;
            Ok(Some((replica, kept)))
        };
        // Its VM's other disks need this task.
        let patience = if self.running.is_some() { COPIES } else { LOOK };
        let found = tokio::select! {
            biased;
            found = look => found.map_err(|failure: StorageFailure| failure.what)?,
            () = self.parts.clock.sleep(patience) => {
                return Err(format!("the disk `{name}` does not answer"));
            }
        };
        let Some((replica, kept)) = found else { return Ok(None) };
        // Copies of other attempts show other moments.
        let kept = due.record.copy.as_ref().and_then(|copy| kept.get(copy));
        let head = record.stored_bytes() - record.size.0;
        let size = kept.map_or(record.size.0, |kept| kept.size.saturating_sub(head));
        let snapshots = kept.map(|kept| (due.record.tag(), kept.at_ms)).into_iter().collect();
        let keeps = Keeps { size, snapshots };
        let base = mirrored::base(&self.parts.me, record, &volume, &replica);
        let at = At::Replica(Copied { of, replica, volume, run: record.run, base });
        Ok(Some(Disk { name: name.clone(), at, keeps }))
    }

    /// Begins to copy these disks for a snapshot; `keep`: what its other disks are to keep at the same instant.
    pub(super) fn copy(&mut self, due: &Due, copy: &str, disks: Vec<Copied>, keep: Option<Keep>) {
        let (parts, called) = (Arc::clone(&self.parts), copy.to_owned());
        let read = Arc::new(AtomicU64::new(0));
        let (counts, runs) = (Arc::clone(&read), self.running.is_some());
        let named = |of: &&SnapshotDisk| disks.iter().any(|disk| disk.of.disk == of.name);
        let total = due.record.disks.iter().filter(named).map(|disk| disk.size.0).sum();
        // One that shall run has not come to its end as it should.
        let rests = if due.object.spec.running { Moment::Running } else { Moment::Stopped };
        let task = tokio::spawn(async move {
            if !runs {
                return at_rest(&parts, &called, &disks).await.map(|()| rests);
            }
            let made = of_a_guest(&parts, &called, &disks, keep, &counts).await;
            if let Some(disk) = disks.first()
                && let Err(error) = parts.vms.close_view(disk.of.vm.as_str()).await
            {
                tracing::warn!(vm = %disk.of.vm, why = chain(&error), "its disks are still held as they were");
            }
            made
        });
        self.copying = Some(Copying { copy: copy.to_owned(), runs, read, total, task });
    }

    /// What copies came to that have come to an end.
    pub(super) async fn copied(&mut self) -> Result<Moment, String> {
        let Some(mut copying) = self.copying.take() else {
            return Err("they were given up".into());
        };
        self.unclosed |= copying.runs;
        let made = (&mut copying.task).await;
        self.close_views().await;
        made.unwrap_or_else(|error| Err(format!("they were given up ({error})")))
    }

    /// Ends the copies that are being made, so that nobody reads the disks any more.
    pub(super) async fn drop_copies(&mut self) {
        let Some(mut copying) = self.copying.take() else { return };
        copying.task.abort();
        // That it was given up is what was wanted.
        let _ = (&mut copying.task).await;
        self.unclosed |= copying.runs;
        self.close_views().await;
    }
}

/// Copies that are put in the place of their replicas, beside the task of their VM, which does not run; no longer once this is dropped.
pub(super) struct Putting {
    /// What they are called.
    pub copy: String,
    /// Only made ready; the replicas are what they are.
    pub prepares: bool,
    /// Since when.
    pub begun: Mono,
    done: Option<Result<(), String>>,
    task: JoinHandle<Result<(), String>>,
}

impl Drop for Putting {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Putting {
    /// Makes ready what is to be put in the place of replicas.
    pub fn prepare(parts: &Arc<AgentParts>, copy: &str, disks: Vec<Copied>) -> Self {
        let begun = parts.clock.now();
        let (parts, called) = (Arc::clone(parts), copy.to_owned());
        let task = tokio::spawn(async move {
            for disk in &disks {
                let ready = parts.kept.prepare(&disk.kept(&called)).await;
                ready.map_err(|failure| failure.what)?;
            }
            Ok(())
        });
        Self { copy: copy.to_owned(), prepares: true, begun, done: None, task }
    }

    /// Puts it there, as the records of these volumes say.
    pub fn put(parts: &Arc<AgentParts>, copy: &str, disks: Vec<Copied>) -> Self {
        let begun = parts.clock.now();
        let parts = Arc::clone(parts);
        let task = tokio::spawn(async move {
            for disk in &disks {
                let (name, base) = (disk.volume.to_string(), disk.base.as_ref());
                let put = parts.replicas.own(&name, &disk.replica, disk.run, base).await;
                put.map_err(|error| chain(&error))?;
            }
            Ok(())
        });
        Self { copy: copy.to_owned(), prepares: false, begun, done: None, task }
    }

    /// What it came to; nothing while it goes on.
    pub async fn outcome(&mut self) -> Option<Result<(), String>> {
        if self.done.is_none() && self.task.is_finished() {
            let done = (&mut self.task).await;
            let given_up = |error| Err(format!("it was given up ({error})"));
            self.done = Some(done.unwrap_or_else(given_up));
        }
        self.done.clone()
    }
}
