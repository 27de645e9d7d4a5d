//! The snapshots of a VM that its host takes, reverts to and removes (docs/decisions/0027-snapshots.md).
//!
//! ```text
//!   record: wanted ──► look what the disks keep ──► all of them have it ─────────────────────────► there
//!                              │       ▲   └─► none: take it, of all at one instant ──┘
//!                              │       └─ some: an attempt broke; it is removed and taken anew
//!                              └─ it cannot be taken: what there is of it is removed ─────────────► failed
//! ```
//!
//! A mirrored disk keeps nothing in itself: its snapshot is a copy beside the replica of the VM's host, made beside this task
//! (`copying.rs`), and other hosts fetch it (`mirrored/copies.rs`). It is gone back to by a word in the volume's record, by which
//! each host that has a copy puts that in the place of its replica.
//!
//! The record is the task. What the disks have is looked at before anything is done, so whatever was interrupted, the next turn,
//! the next daemon or the next host goes on from there. Each word about it compares the placement.

use super::{VmTask, copying::Copied};
use crate::{
    agent::{
        backup::job::Job,
        chain,
        mirrored::{self, Owner},
        storage::{SnapshotStep, StorageFailure, VolumeName},
    },
    storage::mirrored::{kept::Kept, steps},
    vm::{snapshots::Keeps, views::Keep},
};
use haven_model::{
    Bytes, Name, ObjectRef, PoolDriverKind, PoolSpec, Severity, Snapshot, Versioned, VmPhase,
    VmSpec,
    backup::Moment,
    keys,
    object::{Kind, Stored},
    vm_snapshot::{SnapshotDisk, SnapshotState, VmSnapshot},
    volume::{Volume, VolumeRef},
};
use haven_store::raw::{Compare, Op};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// When it is looked at again.
const AGAIN: Duration = Duration::from_secs(2);
/// The same while its disks are copied.
const COPIES: Duration = Duration::from_millis(300);
/// So long a disk may take to tell what it keeps.
const LOOK: Duration = Duration::from_secs(60);
/// So long a step on a disk that nobody has open may take; then its VM's other needs come first, and it is begun anew.
const LONGEST: Duration = Duration::from_secs(600);

/// A snapshot about which something is to be done.
pub(super) struct Due {
    name: Name,
    pub(super) record: VmSnapshot,
    /// The revision of the record.
    revision: i64,
    /// The revision of the placement under which it is this host's.
    placed: i64,
    /// The epoch of that.
    epoch: u64,
    pub(super) object: Arc<Stored<VmSpec>>,
}

/// Where a disk is.
enum At {
    /// Its VM's process has it open.
    Process,
    /// Nobody has.
    File(Box<PoolSpec>, VolumeName),
    /// It is mirrored: what it keeps are copies beside the replica of this host, whoever has that open.
    Replica(Copied),
}

/// A disk of a snapshot, and what it keeps.
struct Disk {
    name: Name,
    at: At,
    keeps: Keeps,
}

impl Disk {
    fn has(&self, tag: &str) -> bool {
        self.keeps.snapshots.contains_key(tag)
    }
}

/// What QEMU says when a disk has no room for it, and what to do.
fn full(said: String) -> String {
    match said.contains("No space left") {
        true => format!(
            "the pool of one of its disks is full; free some space or enlarge it, and take it again ({said})"
        ),
        false => said,
    }
}

impl VmTask {
    /// What is to be done here about its snapshots.
    fn due(&self, snapshot: &Snapshot) -> Vec<Due> {
        let placed = snapshot.placements.get(&self.vm).filter(|of| of.host == self.parts.me);
        let object = snapshot.vms.get(&self.vm).filter(|vm| !vm.meta.deleting);
        let Some((placed, object)) = placed.zip(object) else { return Vec::new() };
        if self.parts.current_session().is_none() {
            return Vec::new();
        }
        let all = snapshot.vm_snapshots.get(&object.meta.uid).into_iter().flatten();
        let due = all.filter(|(_, record)| record.is_due()).map(|(name, record)| Due {
            name: name.clone(),
            record: (*record.value).clone(),
            revision: record.revision,
            placed: placed.revision,
            epoch: placed.epoch,
            object: Arc::clone(&object.value),
        });
        let mut due: Vec<Due> = due.collect();
        // Its disks are made what they were before any is kept as it is.
        due.sort_by_key(|of| (of.record.state != SnapshotState::Reverting, of.record.at_ms));
        due
    }

    /// Takes each of its snapshots one step further.
    pub(super) async fn keep_snapshots(&mut self, snapshot: &Snapshot) {
        let moves = snapshot
            .placements
            .get(&self.vm)
            .is_some_and(|of| of.moving_to.is_some() || of.moved_from.is_some());
        let all = self.due(snapshot);
        let is_wanted = |id: &str| {
            let wanted = |due: &&Due| due.record.state == SnapshotState::Wanted;
            !moves && all.iter().filter(wanted).any(|due| due.record.id == id)
        };
        if self.copying.as_ref().is_some_and(|copying| !is_wanted(&copying.id)) {
            self.drop_copies().await;
        }
        if !all.is_empty() {
            if self.backup.as_ref().is_some_and(Job::is_over) {
                self.drop_backup().await;
            }
            self.close_views().await;
        }
        for due in all {
            if due.record.state == SnapshotState::Reverting && self.running.is_some() {
                self.not_reverted(&due).await;
                continue;
            }
            let read = self.backup.is_some() || self.running.is_some() && self.unclosed;
            let waits = match () {
                () if moves => Some("its VM is being moved"),
                () if read => Some("its VM is being backed up"),
                () if self.running.is_some() && (self.hot.is_busy() || self.hot.changes) => {
                    Some("its disks are being changed")
                }
                () => None,
            };
            if let Some(why) = waits {
                self.waits_for(&due, why).await;
                self.look_again(AGAIN);
                continue;
            }
            // One step in a turn: its disks and its guest need this task, too. What it came to wakes the next.
            if !self.further(snapshot, &due).await {
                self.look_again(AGAIN);
            }
            return;
        }
    }

    /// The VM was started after all: what it has written since is not taken from it at whatever end it comes to.
    async fn not_reverted(&mut self, due: &Due) {
        let message = "the VM was started meanwhile, so nothing was changed".to_owned();
        let event = format!("its snapshot `{}` is not reverted to: {message}", due.name);
        let (state, back) = (SnapshotState::There, Vec::new());
        let there = VmSnapshot { state, back, message, ..due.record.clone() };
        if !self.put_snapshot(due, Some(&there), Some((Severity::Warning, event))).await {
            self.look_again(AGAIN);
        }
    }

    /// Whether some of its disks may be of a snapshot and some of now.
    pub(super) fn is_reverting(&self, snapshot: &Snapshot) -> bool {
        self.due(snapshot).iter().any(|due| due.record.state == SnapshotState::Reverting)
    }

    /// Whether its disks are what they are to be when it starts: one that is half of before and half of now never runs.
    pub(super) async fn reverted(&mut self, snapshot: &Snapshot) -> bool {
        if self.parts.current_session().is_none() {
            return false;
        }
        let reverts = |due: &Due| due.record.state == SnapshotState::Reverting;
        let uid = snapshot.vms.get(&self.vm).map(|vm| vm.meta.uid.clone()).unwrap_or_default();
        if let Some(key) = snapshot.unreadable_under(&format!("snapshots/{uid}/")) {
            let words = format!(
                "waiting: the record {key} of one of its snapshots, which its disks may be made to, cannot be read by this host's version of Haven; update this host"
            );
            self.report(snapshot, VmPhase::Starting, &words).await;
            self.look_again(AGAIN);
            return false;
        }
        let Some(due) = self.due(snapshot).into_iter().find(reverts) else { return true };
        self.further(snapshot, &due).await;
        self.look_again(AGAIN);
        // It starts only once the live copy tells that it is done: an old one would have it done again, after the guest has run.
        let now = Arc::clone(&self.parts.live.borrow());
        let why = self.due(&now).into_iter().find(reverts).map(|due| due.record.message);
        let why = why.filter(|why| !why.is_empty()).map_or(String::new(), |why| format!(": {why}"));
        let words = format!(
            "waiting: its disks are made what they were in the snapshot `{}`{why}",
            due.name
        );
        self.report(snapshot, VmPhase::Starting, &words).await;
        false
    }

    /// One step with one snapshot. False when it is to be looked at again.
    async fn further(&mut self, snapshot: &Snapshot, due: &Due) -> bool {
        if let Some(copying) = self.copying.as_ref().filter(|of| of.id == due.record.id) {
            let Some(at) = copying.is_at() else {
                let moment = self.copied().await;
                return self.taken(due, moment).await;
            };
            self.look_again(COPIES);
            return self.waits_for(due, &at).await;
        }
        let disks = match self.disks_of(snapshot, due).await {
            Ok(disks) => disks,
            Err(why) => return self.waits_for(due, &format!("{why}; it is tried again")).await,
        };
        match due.record.state {
            SnapshotState::Wanted => self.take(due, disks).await,
            SnapshotState::Reverting => self.revert(due, disks).await,
            SnapshotState::Going => self.remove(due, disks).await,
            SnapshotState::There | SnapshotState::Failed => true,
        }
    }

    /// Its disks that are there, and what each keeps.
    async fn disks_of(&self, snapshot: &Snapshot, due: &Due) -> Result<Vec<Disk>, String> {
        let mut open = BTreeMap::new();
        if self.running.is_some() {
            let told = self.parts.vms.keeps(self.vm.as_str()).await;
            open = told.map_err(|error| chain(&error))?;
        }
        let mut disks = Vec::new();
        for SnapshotDisk { name, pool, .. } in &due.record.disks {
            if let Some(keeps) = open.remove(name.as_str()) {
                disks.push(Disk { name: name.clone(), at: At::Process, keeps });
                continue;
            }
            let mirrored = snapshot.pools.get(pool);
            let mirrored = mirrored.filter(|of| of.spec.driver == PoolDriverKind::Mirrored);
            if let Some(pool) = mirrored {
                disks.extend(self.replica(snapshot, due, name, &pool.spec).await?);
                continue;
            }
            let named = due.object.spec.disks.iter().any(|disk| disk.name == *name);
            if self.running.is_some() && named {
                // A file may hang, and the VM's other disks need this task.
                return Err(format!(
                    "the disk `{name}` is not attached; that is done once it is, or once the VM is stopped"
                ));
            }
            // One that is no more keeps nothing.
            let Some(pool) = snapshot.pools.get(pool) else { continue };
            let (vm, disk) = (self.vm.clone(), name.clone());
            let volume = VolumeName { vm, disk, vm_uid: due.object.meta.uid.clone() };
            let kept = tokio::select! {
                biased;
                kept = self.parts.storage.keeps(&pool.spec, &volume) => kept,
                () = self.parts.clock.sleep(LOOK) => {
                    return Err(format!("the disk `{name}` does not answer"));
                }
            };
            if let Some(keeps) = kept.map_err(|failure| failure.what)? {
                let at = At::File(Box::new(pool.spec.clone()), volume);
                disks.push(Disk { name: name.clone(), at, keeps });
            }
        }
        Ok(disks)
    }

    /// A mirrored disk whose replica is here, and the copies of it.
    async fn replica(
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
        let patience = if self.running.is_some() { AGAIN } else { LOOK };
        let found = tokio::select! {
            biased;
            found = look => found.map_err(|failure: StorageFailure| failure.what)?,
            () = self.parts.clock.sleep(patience) => {
                return Err(format!("the disk `{name}` does not answer"));
            }
        };
        let Some((replica, kept)) = found else { return Ok(None) };
        let size = kept.get(&due.record.id).map_or(record.size.0, |kept| kept.size);
        let tag = |(id, kept): (&String, &Kept)| (VmSnapshot::tag_of(id), kept.at_ms);
        let keeps = Keeps { size, snapshots: kept.iter().map(tag).collect() };
        let base = mirrored::base(&self.parts.me, record, &volume, &replica);
        let at = At::Replica(Copied { of, replica, volume, run: record.run, base });
        Ok(Some(Disk { name: name.clone(), at, keeps }))
    }

    /// Takes it, unless the disks have it already.
    async fn take(&mut self, due: &Due, disks: Vec<Disk>) -> bool {
        let tag = due.record.tag();
        if let Some(why) = self.lacks(due, &disks) {
            return self.fail(due, disks, why).await;
        }
        if disks.iter().all(|disk| disk.has(&tag)) {
            // Whether the file systems were frozen nobody remembers.
            return self.there(due, &disks, Moment::Running).await;
        }
        if disks.iter().any(|disk| disk.has(&tag))
            && let Err(why) = self.remove_from(due, &disks).await
        {
            return self.waits_for(due, &format!("{why}; it is tried again")).await;
        }
        if disks.iter().any(|disk| matches!(disk.at, At::Replica(_))) {
            return self.take_with_copies(due, &disks).await;
        }
        let moment = self.take_now(due, &disks).await;
        self.taken(due, moment).await
    }

    /// Takes it of a VM some of whose disks are mirrored: it is begun here.
    async fn take_with_copies(&mut self, due: &Due, disks: &[Disk]) -> bool {
        let copied = disks.iter().filter_map(|disk| match &disk.at {
            At::Replica(copied) => Some(copied.clone()),
            At::Process | At::File(..) => None,
        });
        let copied: Vec<Copied> = copied.collect();
        let others = || disks.iter().filter(|disk| !matches!(disk.at, At::Replica(_)));
        let mut keep = None;
        if self.running.is_some() {
            let disks = others().map(|disk| disk.name.to_string()).collect();
            keep = Some(Keep { snapshot: due.record.tag(), disks });
        } else {
            for disk in others() {
                if let Err(why) = self.step_on(due, disk, SnapshotStep::Take).await {
                    return self.taken(due, Err(why)).await;
                }
            }
        }
        self.copy(due, copied, keep);
        self.look_again(COPIES);
        false
    }

    /// It was taken, or could not be.
    async fn taken(&mut self, due: &Due, moment: Result<Moment, String>) -> bool {
        let tag = due.record.tag();
        let moment = match moment {
            Ok(moment) => moment,
            Err(why) => {
                // What there is of it now is another thing than what there was before.
                let live = Arc::clone(&self.parts.live.borrow());
                return match self.disks_of(&live, due).await {
                    Ok(disks) => self.fail(due, disks, why).await,
                    Err(blind) => self.waits_for(due, &format!("{why}; {blind}")).await,
                };
            }
        };
        let live = Arc::clone(&self.parts.live.borrow());
        match self.disks_of(&live, due).await {
            Ok(disks) if !disks.is_empty() && disks.iter().all(|disk| disk.has(&tag)) => {
                self.there(due, &disks, moment).await
            }
            Ok(disks) => self.fail(due, disks, "a disk did not keep it".into()).await,
            Err(why) => self.waits_for(due, &why).await,
        }
    }

    /// Why it cannot be taken of all its disks.
    fn lacks(&self, due: &Due, disks: &[Disk]) -> Option<String> {
        for SnapshotDisk { name, .. } in &due.record.disks {
            let runs = self.running.is_some();
            match disks.iter().find(|disk| disk.name == *name) {
                None => {
                    return Some(format!(
                        "the disk `{name}` is not made yet, or is no disk that keeps snapshots; start the VM, and its disks are there"
                    ));
                }
                Some(Disk { at: At::File(..), .. }) if runs => {
                    return Some(format!(
                        "the disk `{name}` is none of the machine that runs; `haven vm reset {}` takes up what was changed",
                        self.vm
                    ));
                }
                Some(_) => {}
            }
        }
        None
    }

    async fn take_now(&mut self, due: &Due, disks: &[Disk]) -> Result<Moment, String> {
        let tag = due.record.tag();
        if self.running.is_some() {
            let names: Vec<String> = disks.iter().map(|disk| disk.name.to_string()).collect();
            let taken = self.parts.vms.take_snapshot(self.vm.as_str(), &names, &tag).await;
            return match taken {
                Ok(true) => Ok(Moment::Frozen),
                Ok(false) => Ok(Moment::Running),
                Err(error) => Err(full(chain(&error))),
            };
        }
        for disk in disks {
            self.step_on(due, disk, SnapshotStep::Take).await?;
        }
        // One that shall run has not come to its end as it should.
        Ok(if due.object.spec.running { Moment::Running } else { Moment::Stopped })
    }

    /// A step on a disk that nobody has open, as long as the VM is this host's and nobody takes the task back.
    async fn step_on(&self, due: &Due, disk: &Disk, step: SnapshotStep) -> Result<(), String> {
        let tag = due.record.tag();
        let (pool, volume) = match &disk.at {
            At::File(pool, volume) => (pool, volume),
            At::Process => {
                let (vm, name) = (self.vm.as_str(), disk.name.as_str());
                let removed = self.parts.vms.remove_snapshot(vm, name, &tag).await;
                return removed.map_err(|error| chain(&error));
            }
            // What else is done with copies is not done in one step.
            At::Replica(copied) => {
                let removed = self.parts.kept.forget(&copied.kept(&due.record.id)).await;
                return removed.map_err(|failure| failure.what);
            }
        };
        let (mut live, mut sessions) = (self.parts.live.clone(), self.parts.session.clone());
        let (placement, uid) = (due.placed, due.object.meta.uid.as_str());
        let changed = async {
            tokio::select! {
                _ = live.wait_for(|live| {
                    let placed = live.placements.get(&self.vm).is_none_or(|of| of.revision != placement);
                    let gone = live.vms.get(&self.vm).is_none_or(|vm| vm.meta.deleting || vm.meta.uid != uid);
                    placed || gone
                }) => {}
                _ = sessions.wait_for(Option::is_none) => {}
            }
        };
        tokio::select! {
            biased;
            () = changed => Err(format!("{} is not this host's any more", self.vm)),
            done = self.parts.storage.snapshot(pool, volume, step, &tag) => done.map_err(|failure| failure.what),
            () = self.parts.clock.sleep(LONGEST) => Err(format!("the disk `{}` takes too long", disk.name)),
        }
    }

    /// Removes it from those that have it.
    async fn remove_from(&self, due: &Due, disks: &[Disk]) -> Result<(), String> {
        let tag = due.record.tag();
        // Of a copy there may be half.
        let has = |disk: &&Disk| disk.has(&tag) || matches!(disk.at, At::Replica(_));
        for disk in disks.iter().filter(has) {
            self.step_on(due, disk, SnapshotStep::Remove).await?;
        }
        Ok(())
    }

    async fn there(&mut self, due: &Due, disks: &[Disk], moment: Moment) -> bool {
        let tag = due.record.tag();
        let mut record = VmSnapshot {
            state: SnapshotState::There,
            moment: Some(moment),
            of_ms: disks.iter().filter_map(|disk| disk.keeps.snapshots.get(&tag).copied()).max(),
            message: String::new(),
            ..due.record.clone()
        };
        for of in &mut record.disks {
            if let Some(disk) = disks.iter().find(|disk| disk.name == of.name) {
                of.size = Bytes(disk.keeps.size);
                if matches!(disk.at, At::Replica(_)) {
                    of.copies = vec![self.parts.me.clone()];
                }
            }
        }
        let event = format!("its snapshot `{}` was taken, {}", due.name, record.shows());
        self.put_snapshot(due, Some(&record), Some((Severity::Info, event))).await
    }

    /// It cannot be taken: nothing of it stays.
    async fn fail(&mut self, due: &Due, disks: Vec<Disk>, why: String) -> bool {
        let failed = match self.remove_from(due, &disks).await {
            Ok(()) => VmSnapshot {
                state: SnapshotState::Failed,
                message: why.clone(),
                ..due.record.clone()
            },
            Err(left) => VmSnapshot {
                state: SnapshotState::Going,
                failed: Some(why.clone()),
                message: format!(
                    "it could not be taken ({why}), and what there is of it cannot be removed yet: {left}"
                ),
                ..due.record.clone()
            },
        };
        let event = format!("its snapshot `{}` could not be taken: {why}", due.name);
        self.put_snapshot(due, Some(&failed), Some((Severity::Warning, event))).await
    }

    /// Makes its disks what they were, or none of them when one does not have it.
    async fn revert(&mut self, due: &Due, disks: Vec<Disk>) -> bool {
        let (tag, back) = (due.record.tag(), &due.record.back);
        let there =
            VmSnapshot { state: SnapshotState::There, back: Vec::new(), ..due.record.clone() };
        let find = |name: &Name| disks.iter().find(|disk| disk.name == *name && disk.has(&tag));
        if let Some(lacks) = back.iter().find(|name| find(name).is_none()) {
            let message =
                format!("it could not be reverted to: the disk `{lacks}` does not have it");
            let event = format!("its snapshot `{}`: {message}", due.name);
            let there = VmSnapshot { message, ..there };
            return self.put_snapshot(due, Some(&there), Some((Severity::Error, event))).await;
        }
        for disk in back.iter().filter_map(find) {
            let done = match &disk.at {
                At::Replica(copied) => self.revert_replica(due, copied).await,
                At::Process | At::File(..) => self.step_on(due, disk, SnapshotStep::Revert).await,
            };
            if let Err(why) = done {
                let why = format!("{why}; it is tried again, and until then the VM does not start");
                return self.waits_for(due, &why).await;
            }
        }
        let event = format!("its disks are what they were in the snapshot `{}`", due.name);
        let reverted_ms = Some((self.parts.wall_ms)());
        let there = VmSnapshot { reverted_ms, message: String::new(), ..there };
        self.put_snapshot(due, Some(&there), Some((Severity::Info, event))).await
    }

    /// Makes a mirrored disk hold what it held: its record says so, and then the copy of this host is put in the place of its
    /// replica. Other hosts that have one do the same before they serve theirs.
    async fn revert_replica(&self, due: &Due, copied: &Copied) -> Result<(), String> {
        let (id, me) = (due.record.id.as_str(), &self.parts.me);
        let live = Arc::clone(&self.parts.live.borrow());
        let lost = || format!("the record of {} cannot be written here any more", copied.of);
        let mut volume = (*live.volumes.get(&copied.of).ok_or_else(lost)?.value).clone();
        if !steps::is_reverted(&volume, id) {
            let copies = due.record.copies(&copied.of.disk);
            // Whose record is not written yet has the copy nevertheless.
            let mut copies = copies.to_vec();
            copies.push(me.clone());
            let next = steps::reverted(&volume, me, id, &copies);
            volume = next.ok_or_else(|| format!("{} was never opened", copied.of))?;
            let session = self.parts.current_session().ok_or_else(lost)?.number;
            let owner = Owner { epoch: due.epoch, session };
            let written = owner.write(&self.parts, &live, &copied.of, &volume).await;
            let revision = written.map_err(|error| chain(&error))?.ok_or_else(lost)?;
            let mut live = self.parts.live.clone();
            let shown = live.wait_for(|live| live.revision >= revision).await;
            shown.map_err(|_| "this host's daemon ends".to_owned())?;
        }
        let base = mirrored::base(me, &volume, &copied.volume, &copied.replica);
        let (name, run) = (copied.volume.to_string(), volume.run);
        let put = self.parts.replicas.own(&name, &copied.replica, run, base.as_ref());
        tokio::select! {
            biased;
            put = put => put.map_err(|error| chain(&error)),
            () = self.parts.clock.sleep(LONGEST) => {
                Err(format!("the disk `{}` takes too long", copied.of.disk))
            }
        }
    }

    async fn remove(&mut self, due: &Due, disks: Vec<Disk>) -> bool {
        if let Err(why) = self.remove_from(due, &disks).await {
            return self.waits_for(due, &format!("{why}; it is tried again")).await;
        }
        let Some(why) = &due.record.failed else {
            let event = format!("its snapshot `{}` was removed", due.name);
            return self.put_snapshot(due, None, Some((Severity::Info, event))).await;
        };
        let (state, message) = (SnapshotState::Failed, why.clone());
        let failed = VmSnapshot { state, message, failed: None, ..due.record.clone() };
        self.put_snapshot(due, Some(&failed), None).await
    }

    /// Says what it waits for, once. Never done.
    async fn waits_for(&mut self, due: &Due, why: &str) -> bool {
        if due.record.message != why {
            let record = VmSnapshot { message: why.to_owned(), ..due.record.clone() };
            self.put_snapshot(due, Some(&record), None).await;
        }
        false
    }

    /// Writes the record over the one that was read, as long as the VM has the place that it had. True when the store has it.
    async fn put_snapshot(
        &self,
        due: &Due,
        record: Option<&VmSnapshot>,
        event: Option<(Severity, String)>,
    ) -> bool {
        let key = keys::vm_snapshot(&due.object.meta.uid, &due.name);
        let over = vec![
            Compare::ModRevision(key.clone(), due.revision),
            Compare::ModRevision(keys::placement(&self.vm), due.placed),
        ];
        let mut ops = vec![match record {
            Some(record) => {
                let value = serde_json::to_vec(record).expect("a record is plain data");
                Op::Put(key, value.into())
            }
            None => Op::Delete(key),
        }];
        let object = ObjectRef::new(Kind::Vm, self.vm.clone());
        ops.extend(event.map(|(severity, words)| self.parts.event(&object, severity, words)));
        match self.parts.store.txn(over, ops).await {
            Ok(outcome) => outcome.succeeded,
            Err(error) => {
                tracing::debug!(vm = %self.vm, %error, "how its snapshot stands could not be written");
                false
            }
        }
    }
}
