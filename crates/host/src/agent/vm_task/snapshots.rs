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
//! What is kept of a disk in Ceph has a name of its own for each attempt, too (`snapshots/ceph.rs`).
//!
//! The record is the task. What the disks have is looked at before anything is done, so whatever was interrupted, the next turn,
//! the next daemon or the next host goes on from there. Each word about it compares the placement.

mod ceph;

use super::{
    VmTask,
    copying::{Copied, Putting},
};
use crate::{
    agent::{
        backup::job::Job,
        chain,
        disk_keys::{self, Missing},
        mirrored::Owner,
        storage::{SnapshotStep, VolumeName},
    },
    storage::mirrored::steps,
    vm::{snapshots::Keeps, views::Keep},
};
use haven_model::{
    Bytes, Name, ObjectRef, PoolDriverKind, PoolSpec, Severity, Snapshot, VmPhase, VmSpec,
    backup::Moment,
    keys,
    object::{Kind, Stored},
    vm::DiskSpec,
    vm_snapshot::{SnapshotDisk, SnapshotState, VmSnapshot},
    volume::{ReplicaIs, VolumeRef},
};
use haven_store::raw::{Compare, Op};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// When it is looked at again.
const AGAIN: Duration = Duration::from_secs(2);
/// The same while its disks are copied.
pub(super) const COPIES: Duration = Duration::from_millis(300);
/// So long other hosts are waited for that make their replicas what they were.
const PATIENCE: Duration = Duration::from_secs(900);
/// So long a disk may take to tell what it keeps.
pub(super) const LOOK: Duration = Duration::from_secs(60);
/// So long a step on a disk that nobody has open may take; then its VM's other needs come first, and it is begun anew.
pub(super) const LONGEST: Duration = Duration::from_secs(600);

/// A snapshot about which something is to be done.
pub(super) struct Due {
    name: Name,
    pub(super) record: VmSnapshot,
    /// The revision of the record.
    pub(super) revision: i64,
    /// The revision of the placement under which it is this host's.
    placed: i64,
    /// The epoch of that.
    epoch: u64,
    pub(super) object: Arc<Stored<VmSpec>>,
}

/// Where a disk is.
pub(super) enum At {
    /// Its VM's process has it open.
    Process,
    /// Nobody has.
    File(Box<PoolSpec>, VolumeName),
    /// It is mirrored: what it keeps are copies beside the replica of this host, whoever has that open.
    Replica(Copied),
    /// It is in Ceph, where each attempt has a name of its own, whoever has it open.
    Image(ceph::Image),
}

/// A disk of a snapshot, and what it keeps.
pub(super) struct Disk {
    pub name: Name,
    pub at: At,
    pub keeps: Keeps,
}

impl Disk {
    fn has(&self, tag: &str) -> bool {
        self.keeps.snapshots.contains_key(tag)
    }

    /// The replica of a mirrored one.
    fn replica(&self) -> Option<&Copied> {
        match &self.at {
            At::Replica(copied) => Some(copied),
            At::Process | At::File(..) | At::Image(_) => None,
        }
    }

    /// The image of one in Ceph.
    pub fn image(&self) -> Option<&ceph::Image> {
        match &self.at {
            At::Image(image) => Some(image),
            At::Process | At::File(..) | At::Replica(_) => None,
        }
    }

    /// Whether there is anything in it of this snapshot.
    fn has_of(&self, tag: &str) -> bool {
        self.has(tag) || self.image().is_some_and(|image| !image.attempts.is_empty())
    }
}

/// Why disks are not what they were.
enum Stuck {
    /// Nothing was changed yet.
    Unchanged(String),
    /// Something may have been.
    Changed(String),
}

/// Whether some of its mirrored disks were reverted already.
fn is_begun(snapshot: &Snapshot, due: &Due) -> bool {
    let Some(copy) = due.record.copy.as_deref() else { return false };
    due.record.back.iter().any(|disk| {
        let of = VolumeRef { vm: due.record.vm.clone(), disk: disk.clone() };
        snapshot.volumes.get(&of).is_some_and(|volume| steps::is_reverted(volume, copy))
    })
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
        // What goes may make the room that others need, and its disks are made what they were before any is kept as it is.
        let order = |state| match state {
            SnapshotState::Going => 0,
            SnapshotState::Reverting => 1,
            _ => 2,
        };
        due.sort_by_key(|of| (order(of.record.state), of.record.at_ms));
        due
    }

    /// Takes each of its snapshots one step further.
    pub(super) async fn keep_snapshots(&mut self, snapshot: &Snapshot) {
        let moves = snapshot
            .placements
            .get(&self.vm)
            .is_some_and(|of| of.moving_to.is_some() || of.moved_from.is_some());
        let all = self.due(snapshot);
        let is = |state: SnapshotState, copy: &str| {
            let mut so = all.iter().filter(|due| due.record.state == state);
            so.any(|due| due.record.copy.as_deref() == Some(copy))
        };
        let wanted = |copy: &str| !moves && is(SnapshotState::Wanted, copy);
        if self.copying.as_ref().is_some_and(|copying| !wanted(&copying.copy)) {
            self.drop_copies().await;
        }
        if self.putting.as_ref().is_some_and(|of| !is(SnapshotState::Reverting, &of.copy)) {
            self.putting = None;
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
                // They wait for copies that are being made.
                () if self.copying.is_some() || self.running.is_none() => None,
                () if self.hot.is_busy() || self.hot.changes => Some("its disks are being changed"),
                () => None,
            };
            if let Some(why) = waits {
                self.waits_for(&due, why).await;
                self.look_again(AGAIN);
                continue;
            }
            // One step in a turn: its disks and its guest need this task, too. What it came to wakes the next.
            let done = self.further(snapshot, &due).await;
            if !done {
                self.look_again(AGAIN);
            }
            if done || due.record.state != SnapshotState::Going {
                return;
            }
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
        let all = self.due(snapshot);
        let Some(due) = all.iter().find(|due| reverts(due)) else {
            self.putting = None;
            return true;
        };
        for going in all.iter().filter(|due| due.record.state == SnapshotState::Going) {
            self.further(snapshot, going).await;
        }
        self.further(snapshot, due).await;
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
        let copy = due.record.copy.as_deref();
        if let Some(copying) = self.copying.as_ref().filter(|of| Some(of.copy.as_str()) == copy) {
            let (at, ran) = (copying.is_at(), copying.runs);
            self.look_again(COPIES);
            if let Some(at) = at {
                return self.waits_for(due, &at).await;
            }
            let moment = self.copied().await;
            return match moment {
                Err(_) if ran && self.running.is_none() => {
                    self.waits_for(due, "its guest has ended; it is taken anew").await
                }
                moment => self.taken(due, moment).await,
            };
        }
        let disks = match self.disks_of(snapshot, due).await {
            Ok(disks) => disks,
            Err(why) => return self.waits_for(due, &format!("{why}; it is tried again")).await,
        };
        match due.record.state {
            SnapshotState::Wanted => self.take(due, disks).await,
            SnapshotState::Reverting => self.revert(snapshot, due, disks).await,
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
        let of = |pool: &Name| snapshot.pools.get(pool).map(|pool| &pool.spec);
        for SnapshotDisk { name, pool, .. } in &due.record.disks {
            if let Some(pool) = of(pool).filter(|of| of.driver == PoolDriverKind::Rbd) {
                disks.extend(self.image(due, name, pool).await?);
                continue;
            }
            if let Some(keeps) = open.remove(name.as_str()) {
                disks.push(Disk { name: name.clone(), at: At::Process, keeps });
                continue;
            }
            if let Some(pool) = of(pool).filter(|of| of.driver == PoolDriverKind::Mirrored) {
                // What no record names any more is removed by `mirrored/copies.rs`, on all hosts.
                if due.record.state != SnapshotState::Going {
                    disks.extend(self.replica(snapshot, due, name, pool).await?);
                }
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
            let Some(pool) = of(pool) else { continue };
            let (vm, disk) = (self.vm.clone(), name.clone());
            let volume = VolumeName { vm, disk, vm_uid: due.object.meta.uid.clone() };
            let kept = tokio::select! {
                biased;
                kept = self.parts.storage.keeps(pool, &volume) => kept,
                () = self.parts.clock.sleep(LOOK) => {
                    return Err(format!("the disk `{name}` does not answer"));
                }
            };
            if let Some(keeps) = kept.map_err(|failure| failure.what)? {
                let at = At::File(Box::new(pool.clone()), volume);
                disks.push(Disk { name: name.clone(), at, keeps });
            }
        }
        Ok(disks)
    }

    /// Takes it, unless the disks have it already.
    async fn take(&mut self, due: &Due, disks: Vec<Disk>) -> bool {
        let tag = due.record.tag();
        if let Some(why) = self.lacks(due, &disks) {
            return self.fail(due, disks, why).await;
        }
        let in_ceph = disks.iter().any(|disk| disk.image().is_some());
        // What an attempt of before has left in Ceph may be of several instants.
        if !in_ceph && disks.iter().all(|disk| disk.has(&tag)) {
            // Whether the file systems were frozen nobody remembers.
            return self.there(due, &disks, Moment::Running).await;
        }
        // Named first: who goes by a record that is another one by now is refused that, and removes nothing of what was taken.
        let attempt = match in_ceph {
            true => match self.begun(due, "").await {
                Some(attempt) => Some(attempt),
                None => return false,
            },
            false => None,
        };
        if disks.iter().any(|disk| disk.has_of(&tag))
            && let Err(why) = self.remove_from(due, &disks).await
        {
            return self.waits_for(due, &format!("{why}; it is tried again")).await;
        }
        if let Some(attempt) = attempt {
            return self.take_in_ceph(due, &disks, &attempt).await;
        }
        if disks.iter().any(|disk| disk.replica().is_some()) {
            return self.take_with_copies(due, &disks).await;
        }
        let moment = self.take_now(due, &disks).await;
        self.taken(due, moment).await
    }

    /// Takes it of a VM some of whose disks are mirrored.
    async fn take_with_copies(&mut self, due: &Due, disks: &[Disk]) -> bool {
        let Some(copy) = self.begun(due, "its mirrored disks are copied").await else {
            return false;
        };
        let others = || disks.iter().filter(|disk| disk.replica().is_none());
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
        let copied = disks.iter().filter_map(|disk| disk.replica().cloned()).collect();
        self.copy(due, &copy, copied, keep);
        self.look_again(COPIES);
        false
    }

    /// It was taken, or could not be.
    pub(super) async fn taken(&mut self, due: &Due, moment: Result<Moment, String>) -> bool {
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
        let is = |what: fn(&Disk) -> bool| disks.iter().find(|disk| what(disk));
        let mirrored = is(|disk| disk.replica().is_some());
        if let Some((one, other)) = mirrored.zip(is(|disk| disk.image().is_some())) {
            return Some(format!(
                "the disk `{}` is mirrored and the disk `{}` is in Ceph, and such two are not kept at one instant yet; `haven volume snapshot {}.DISK` keeps one",
                one.name, other.name, self.vm
            ));
        }
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
    pub(super) async fn step_on(
        &self,
        due: &Due,
        disk: &Disk,
        step: SnapshotStep,
    ) -> Result<(), String> {
        let tag = due.record.tag();
        let (pool, volume) = match &disk.at {
            At::File(pool, volume) => (pool, volume),
            At::Process => {
                let (vm, name) = (self.vm.as_str(), disk.name.as_str());
                let removed = self.parts.vms.remove_snapshot(vm, name, &tag).await;
                return removed.map_err(|error| chain(&error));
            }
            // What is done with copies is not done in one step, and who removes them is `mirrored/copies.rs`.
            At::Replica(_) => return Ok(()),
            At::Image(image) => return self.step_on_image(due, image, step).await,
        };
        let encrypted = |of: &DiskSpec| of.name == disk.name && of.encrypted;
        let encrypted = due.object.spec.disks.iter().any(encrypted);
        let done = async {
            let key = match encrypted {
                true => Some(disk_keys::key(&self.parts, volume, Missing::Refused).await?),
                false => None,
            };
            self.parts.storage.snapshot(pool, volume, step, &tag, key.as_ref()).await
        };
        let done = async { done.await.map_err(|failure| failure.what) };
        self.as_long_as_ours(due, &disk.name, LONGEST, done).await
    }

    /// Does that as long as the VM is this host's and nobody takes the task back.
    pub(super) async fn as_long_as_ours(
        &self,
        due: &Due,
        disk: &Name,
        longest: Duration,
        done: impl Future<Output = Result<(), String>>,
    ) -> Result<(), String> {
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
            done = done => done,
            () = self.parts.clock.sleep(longest) => Err(format!("the disk `{disk}` takes too long")),
        }
    }

    /// Removes it from those that have it.
    async fn remove_from(&self, due: &Due, disks: &[Disk]) -> Result<(), String> {
        let tag = due.record.tag();
        for disk in disks.iter().filter(|disk| disk.has_of(&tag)) {
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
                if disk.replica().is_some() {
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
                copy: None,
                message: why.clone(),
                ..due.record.clone()
            },
            Err(left) => VmSnapshot {
                state: SnapshotState::Going,
                copy: None,
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
    async fn revert(&mut self, snapshot: &Snapshot, due: &Due, disks: Vec<Disk>) -> bool {
        let (tag, back) = (due.record.tag(), &due.record.back);
        let there =
            VmSnapshot { state: SnapshotState::There, back: Vec::new(), ..due.record.clone() };
        let find = |name: &Name| disks.iter().find(|disk| disk.name == *name && disk.has(&tag));
        if let Some(lacks) = back.iter().find(|name| find(name).is_none()) {
            let why = format!("the disk `{lacks}` does not have it");
            if is_begun(snapshot, due) {
                return self.waits_for(due, &format!("{why}, and others were reverted")).await;
            }
            return self.not_possible(due, there, &why).await;
        }
        let mirrored = back.iter().filter_map(find).filter_map(|disk| disk.replica().cloned());
        match self.revert_replicas(snapshot, due, mirrored.collect()).await {
            Ok(true) => {}
            Ok(false) => {
                self.look_again(COPIES);
                return false;
            }
            Err(Stuck::Changed(why)) => {
                let why = format!("{why}; it is tried again, and until then the VM does not start");
                return self.waits_for(due, &why).await;
            }
            Err(Stuck::Unchanged(why)) => return self.not_possible(due, there, &why).await,
        }
        for disk in back.iter().filter_map(find).filter(|disk| disk.replica().is_none()) {
            if let Err(why) = self.step_on(due, disk, SnapshotStep::Revert).await {
                let why = format!("{why}; it is tried again, and until then the VM does not start");
                return self.waits_for(due, &why).await;
            }
        }
        let event = format!("its disks are what they were in the snapshot `{}`", due.name);
        let reverted_ms = Some((self.parts.wall_ms)());
        let there = VmSnapshot { reverted_ms, message: String::new(), ..there };
        self.put_snapshot(due, Some(&there), Some((Severity::Info, event))).await
    }

    /// Nothing was changed, and nothing is.
    async fn not_possible(&mut self, due: &Due, there: VmSnapshot, why: &str) -> bool {
        let message = format!("it could not be reverted to: {why}");
        let event = format!("its snapshot `{}`: {message}", due.name);
        let there = VmSnapshot { message, ..there };
        self.put_snapshot(due, Some(&there), Some((Severity::Error, event))).await
    }

    /// Makes mirrored disks hold what they held. What is to be put in the place of the replicas of this host is made ready; then the
    /// records of all of them say what they hold, at once; then it is put there, and so do the other hosts that have copies. True
    /// once all have that can be waited for.
    async fn revert_replicas(
        &mut self,
        snapshot: &Snapshot,
        due: &Due,
        disks: Vec<Copied>,
    ) -> Result<bool, Stuck> {
        let Some(copy) = due.record.copy.as_deref().filter(|_| !disks.is_empty()) else {
            return Ok(true);
        };
        let says = |of: &VolumeRef| snapshot.volumes.get(of);
        let is_so = |disk: &Copied| says(&disk.of).is_some_and(|v| steps::is_reverted(v, copy));
        let prepares = !disks.iter().all(is_so);
        let same = |of: &Putting| of.copy == copy && of.prepares == prepares;
        let Some(putting) = self.putting.as_mut().filter(|of| same(of)) else {
            self.putting = Some(match prepares {
                true => Putting::prepare(&self.parts, copy, disks),
                false => Putting::put(&self.parts, copy, disks),
            });
            return Ok(false);
        };
        match putting.outcome().await {
            None => return Ok(false),
            Some(Ok(())) if prepares => {}
            Some(Ok(())) => {
                let since = self.parts.clock.now().since(putting.begun);
                return Ok(
                    since >= PATIENCE || !disks.iter().any(|disk| self.others(snapshot, disk))
                );
            }
            Some(Err(why)) => {
                self.putting = None;
                return Err(if prepares { Stuck::Unchanged(why) } else { Stuck::Changed(why) });
            }
        }
        self.write_reverted(snapshot, due, copy, &disks).await.map_err(Stuck::Changed)?;
        Ok(false)
    }

    /// Whether another host is putting its copy in the place of its replica.
    fn others(&self, snapshot: &Snapshot, disk: &Copied) -> bool {
        let Some(volume) = snapshot.volumes.get(&disk.of) else { return false };
        let silent = self.parts.heard.silent.borrow();
        let mut others = volume.counted().filter(|host| **host != self.parts.me);
        others.any(|host| {
            let heard = snapshot.session_open(host) && !silent.contains(host);
            heard
                && match snapshot.replica_told(&disk.of, host) {
                    Some(ReplicaIs::Served { run, .. }) => *run != volume.run,
                    Some(ReplicaIs::Failed { .. }) => false,
                    None => true,
                }
        })
    }

    /// Writes into the records of volumes that they hold what they held, into all or none.
    async fn write_reverted(
        &self,
        snapshot: &Snapshot,
        due: &Due,
        copy: &str,
        disks: &[Copied],
    ) -> Result<(), String> {
        let me = &self.parts.me;
        let lost = |of: &VolumeRef| format!("the record of {of} cannot be written here any more");
        let (mut over, mut ops) = (Vec::new(), Vec::new());
        for Copied { of, .. } in disks {
            let session = self.parts.current_session().ok_or_else(|| lost(of))?.number;
            let owner = Owner { epoch: due.epoch, session };
            let volume = snapshot.volumes.get(of).ok_or_else(|| lost(of))?;
            let next = steps::reverted(volume, me, copy, due.record.copies(&of.disk));
            let next = next.ok_or_else(|| format!("{me} has no copy of {of}"))?;
            let written = owner.over(&self.parts, snapshot, of, &next);
            let (compare, op) = written.ok_or_else(|| lost(of))?;
            over.extend(compare);
            ops.push(op);
        }
        over.push(Compare::ModRevision(
            keys::vm_snapshot(&due.object.meta.uid, &due.name),
            due.revision,
        ));
        let outcome = self.parts.store.txn(over, ops).await.map_err(|error| chain(&error))?;
        match outcome.succeeded {
            true => Ok(()),
            false => Err("something has changed meanwhile".into()),
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
    pub(super) async fn put_snapshot(
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
