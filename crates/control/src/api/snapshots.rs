//! Snapshots of VMs: asked for, listed, reverted to and removed. The host of the VM carries out what is written here
//! (docs/decisions/0027-snapshots.md).

use super::{
    ApiState,
    auth::{Caller, now_ms},
    body::{At, Given},
    clones,
    error::{ApiError, ApiResult, conflict},
};
use axum::{Extension, Json, extract::State};
use haven_model::{
    Name, ObjectRef, Placement, PoolDriverKind, Snapshot, Versioned, VmPhase, VmSpec,
    api::{RevertAsked, SnapshotAsked, SnapshotView},
    host::{KEPT_COPIES, RBD_SNAPSHOTS, SNAPSHOTS},
    keys,
    object::{Kind, Stored},
    vm::DiskSpec,
    vm_snapshot::{MOST_SNAPSHOTS, SnapshotDisk, SnapshotState, VmSnapshot, usual_name},
};
use haven_plan::{storage::snapshots::apart, tolerance::migration::speaks_less};
use haven_store::raw::{Compare, Op};
use std::time::Duration;

/// How long the live copy may take to show what was just written.
const SHOWS: Duration = Duration::from_secs(5);

type Api = State<ApiState>;
type Record<'a> = &'a Versioned<VmSnapshot>;

/// A VM whose snapshots are asked about, as it stands.
pub(super) struct Of<'a> {
    pub(super) now: &'a Snapshot,
    pub(super) vm: &'a Name,
    pub(super) object: &'a Versioned<Stored<VmSpec>>,
}

impl<'a> Of<'a> {
    pub(super) fn find(now: &'a Snapshot, name: &str) -> ApiResult<Self> {
        let found = now.vms.get_key_value(&Name::new(name)?);
        let (vm, object) = found.ok_or_else(|| ApiError::missing(&format!("VM `{name}`")))?;
        Ok(Self { now, vm, object })
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (&'a Name, Record<'a>)> + use<'a> {
        self.now.vm_snapshots.get(&self.object.meta.uid).into_iter().flatten()
    }

    pub(super) fn one(&self, name: &str) -> ApiResult<(&'a Name, Record<'a>)> {
        let one = self.all().find(|(of, _)| of.as_str() == name);
        one.ok_or_else(|| ApiError::missing(&format!("snapshot `{name}` of `{}`", self.vm)))
    }

    fn view(&self, name: &Name, record: &VmSnapshot) -> SnapshotView {
        let host = self.now.placements.get(self.vm).map(|placed| &placed.host);
        let waiting = match host {
            _ if !record.is_due() => None,
            None => Some(format!("{} has no host", self.vm)),
            Some(host) if !self.now.session_open(host) => Some(format!("its host {host} is away")),
            Some(_) if record.message.is_empty() && self.is_being_started() => Some(format!(
                "{} is being started; it is done once it runs, or is stopped",
                self.vm
            )),
            Some(_) => Some(record.message.clone()).filter(|why| !why.is_empty()),
        };
        SnapshotView { name: name.clone(), snapshot: record.clone(), waiting }
    }

    fn is_being_started(&self) -> bool {
        let told = self.now.told_of(self.vm);
        self.object.spec.running && told.is_some_and(|told| told.phase != VmPhase::Running)
    }

    /// Where the VM is, when something can be done with its disks.
    pub(super) fn placed(&self) -> ApiResult<&'a Versioned<Placement>> {
        let vm = self.vm;
        if self.object.meta.deleting {
            let hint = "what is deleted takes its snapshots along";
            return Err(conflict(format!("{vm} is being deleted"), hint));
        }
        if let Some(host) = speaks_less(self.now, SNAPSHOTS) {
            let detail = format!(
                "{host} has not said that it knows snapshots: it runs an older Haven, or has not come up yet"
            );
            return Err(conflict(detail, "upgrade it (`haven host upgrade`)"));
        }
        let key = format!("snapshots/{}/", self.object.meta.uid);
        if let Some(key) = self.now.unreadable_under(&key) {
            let detail = format!("the record {key} cannot be read by this version of Haven");
            return Err(conflict(detail, "upgrade this host (`haven host upgrade`)"));
        }
        let placed = self.now.placements.get(vm).ok_or_else(|| {
            let detail = format!("{vm} has no host that could do anything with its disks");
            conflict(detail, &format!("`haven explain vm/{vm}` tells what it waits for"))
        })?;
        if placed.moving_to.is_some() || placed.moved_from.is_some() {
            let hint = format!("wait, or take it back: `haven vm migrate {vm} --cancel`");
            return Err(conflict(format!("{vm} is being moved"), &hint));
        }
        let run = self.now.backups.get(vm).filter(|run| run.vm_uid == self.object.meta.uid);
        if let Some(run) = run.filter(|run| run.outcome.is_none()) {
            let hint = format!("wait, or end that: `haven backup run {vm} --cancel`");
            return Err(conflict(format!("{vm} is being backed up to {}", run.to), &hint));
        }
        Ok(placed)
    }

    /// What must be as it was for a record to be written: another one does not come between.
    pub(super) fn unchanged(&self, placed: &Versioned<Placement>) -> Vec<Compare> {
        let object = ObjectRef::new(Kind::Vm, self.vm.clone());
        vec![
            Compare::ModRevision(keys::object(&object), self.object.revision),
            Compare::ModRevision(keys::placement(self.vm), placed.revision),
        ]
    }

    pub(super) fn key(&self, name: &Name) -> String {
        keys::vm_snapshot(&self.object.meta.uid, name)
    }

    /// Whether one more can be taken.
    pub(super) fn may_keep_one_more(&self) -> ApiResult<()> {
        let vm = self.vm;
        if let Some((name, _)) = self.all().find(|(_, r)| r.state == SnapshotState::Reverting) {
            let detail = format!("the disks of {vm} are being made what they were in `{name}`");
            let hint = format!("`haven vm snapshot ls {vm}` tells how that stands");
            return Err(conflict(detail, &hint));
        }
        if self.all().count() >= MOST_SNAPSHOTS {
            let detail = format!("{vm} has {MOST_SNAPSHOTS} snapshots, and no more are kept");
            return Err(conflict(detail, &format!("`haven vm snapshot rm {vm} NAME` removes one")));
        }
        Ok(())
    }

    /// The disks that a new one is of.
    pub(super) fn disks(&self, asked: &[Name]) -> ApiResult<Vec<SnapshotDisk>> {
        let vm = self.vm;
        let all = &self.object.spec.disks;
        if let Some(unknown) = asked.iter().find(|name| all.iter().all(|d| d.name != **name)) {
            let names: Vec<&str> = all.iter().map(|disk| disk.name.as_str()).collect();
            let hint = format!("it has: {}", names.join(", "));
            return Err(ApiError::bad(format!("{vm} has no disk `{unknown}`"), hint));
        }
        let mut disks = Vec::new();
        // What its guest does not see is kept when somebody names it.
        let wanted = |disk: &&DiskSpec| match asked {
            [] => !disk.detached,
            some => some.contains(&disk.name),
        };
        let runs = self.now.told_of(vm).is_some_and(|told| told.phase != VmPhase::Stopped);
        for disk in all.iter().filter(wanted) {
            if disk.detached && runs {
                let detail = format!("the disk `{}` of {vm} is detached", disk.name);
                let hint = format!("`haven volume attach {vm}.{}`, or stop the VM", disk.name);
                return Err(conflict(detail, &hint));
            }
            let pool = self.now.pools.get(&disk.pool).map(|pool| pool.spec.driver);
            match pool {
                Some(PoolDriverKind::Local | PoolDriverKind::Shared | PoolDriverKind::Gluster) => {}
                Some(PoolDriverKind::Mirrored) => {
                    if let Some(host) = speaks_less(self.now, KEPT_COPIES) {
                        let detail = format!(
                            "the disk `{}` of {vm} lives in the mirrored pool `{}`, and {host} has not said that it knows snapshots of such disks",
                            disk.name, disk.pool
                        );
                        return Err(conflict(detail, "upgrade it (`haven host upgrade`)"));
                    }
                }
                Some(driver @ PoolDriverKind::Nfs) => {
                    let (whose, hint) = super::pools::bare(driver).unwrap_or_default();
                    let detail = format!(
                        "the disk `{}` of {vm} lives in the pool `{}` of {whose}, whose disks keep no snapshots of Haven's yet",
                        disk.name, disk.pool
                    );
                    let hint = format!(
                        "{hint}; `haven volume snapshot {vm}.DISK` keeps one disk of another pool"
                    );
                    return Err(conflict(detail, &hint));
                }
                Some(PoolDriverKind::Rbd) => self.known_in_ceph(&disk.name)?,
                None => return Err(ApiError::missing(&format!("pool `{}`", disk.pool))),
            }
            disks.push(SnapshotDisk {
                name: disk.name.clone(),
                pool: disk.pool.clone(),
                size: disk.size,
                copies: Vec::new(),
            });
        }
        let drivers = disks.iter().filter_map(|disk: &SnapshotDisk| {
            let pool = self.now.pools.get(&disk.pool)?;
            Some((&disk.name, pool.spec.driver))
        });
        if let Some(detail) = apart(&drivers.collect::<Vec<_>>()) {
            let hint = format!("`haven volume snapshot {vm}.DISK` keeps one disk");
            return Err(conflict(detail, &hint));
        }
        if disks.is_empty() {
            let detail = format!("{vm} has no disk, so there is nothing of it to be kept");
            let hint = format!("`haven get vm/{vm} -o yaml` is all that there is");
            return Err(conflict(detail, &hint));
        }
        Ok(disks)
    }

    /// The disks that are to be what they were in `called`.
    fn back(&self, called: &Name, there: &VmSnapshot, asked: &[Name]) -> ApiResult<Vec<Name>> {
        let vm = self.vm;
        if let Some(unknown) = asked.iter().find(|n| there.disks.iter().all(|d| d.name != **n)) {
            let names: Vec<&str> = there.disks.iter().map(|disk| disk.name.as_str()).collect();
            let hint = format!("it is of: {}", names.join(", "));
            return Err(ApiError::bad(format!("`{called}` is not of the disk `{unknown}`"), hint));
        }
        let wanted = |name: &Name| asked.is_empty() || asked.contains(name);
        let mut back = Vec::new();
        for disk in there.disks.iter().filter(|disk| wanted(&disk.name)) {
            let now = self.object.spec.disks.iter().find(|now| now.name == disk.name);
            if now.is_none_or(|now| now.pool != disk.pool) {
                let detail = format!(
                    "{vm} has no disk `{}` in the pool `{}` any more, and `{called}` is of that",
                    disk.name, disk.pool
                );
                let hint = format!("`haven volume revert {vm}.DISK {called}` reverts one disk");
                return Err(conflict(detail, &hint));
            }
            self.has_copy(called, disk)?;
            back.push(disk.name.clone());
        }
        Ok(back)
    }
}

impl Of<'_> {
    /// Whether all hosts know what to do with a disk in Ceph.
    pub(super) fn known_in_ceph(&self, disk: &Name) -> ApiResult<()> {
        let Some(host) = speaks_less(self.now, RBD_SNAPSHOTS) else { return Ok(()) };
        let detail = format!(
            "the disk `{disk}` of {} is in Ceph, and {host} has not said that it knows snapshots of such disks: it runs an older Haven, or has not come up yet",
            self.vm
        );
        Err(conflict(detail, "upgrade it (`haven host upgrade`)"))
    }

    /// Whether the host of the VM has what a mirrored disk is to hold again.
    fn has_copy(&self, called: &Name, disk: &SnapshotDisk) -> ApiResult<()> {
        let (vm, name) = (self.vm, &disk.name);
        let pool = self.now.pools.get(&disk.pool).map(|pool| pool.spec.driver);
        if pool == Some(PoolDriverKind::Rbd) {
            return self.known_in_ceph(name);
        }
        if pool != Some(PoolDriverKind::Mirrored) {
            return Ok(());
        }
        // One that does not know of it would go on with what its replica holds.
        if let Some(host) = speaks_less(self.now, KEPT_COPIES) {
            let detail = format!("{host} has not said that it knows snapshots of mirrored disks");
            return Err(conflict(detail, "upgrade it (`haven host upgrade`)"));
        }
        let host = self.now.placements.get(vm).map(|placed| &placed.host);
        if host.is_some_and(|host| disk.copies.contains(host)) {
            return Ok(());
        }
        let host = host.map_or_else(String::new, ToString::to_string);
        let copies: Vec<&str> = disk.copies.iter().map(Name::as_str).collect();
        match copies.as_slice() {
            [] => {
                let detail = format!(
                    "no host has a copy of the disk `{name}` of {vm} any more as it was in `{called}`"
                );
                Err(conflict(
                    detail,
                    "`haven vm snapshot ls` lists others; a backup can be restored under another name",
                ))
            }
            copies => {
                let detail = format!(
                    "{host} has no copy yet of the disk `{name}` of {vm} as it was in `{called}`; {} has one",
                    copies.join(" and ")
                );
                let hint = format!(
                    "{host} fetches one; `haven vm snapshot ls {vm}` tells which hosts have it"
                );
                Err(conflict(detail, &hint))
            }
        }
    }
}

/// Writes, and waits until the live copy shows it.
async fn put(state: &ApiState, over: Vec<Compare>, ops: Vec<Op>, vm: &Name) -> ApiResult<()> {
    let outcome = state.store.txn(over, ops).await?;
    if !outcome.succeeded {
        return Err(ApiError::busy(&format!("vm/{vm}")));
    }
    let mut live = state.live.clone();
    let shown = live.wait_for(|live| live.revision >= outcome.revision);
    let _ = tokio::time::timeout(SHOWS, shown).await;
    Ok(())
}

pub(super) fn put_op(key: String, record: &VmSnapshot) -> Op {
    Op::Put(key, serde_json::to_vec(record).expect("a record is plain data").into())
}

/// Those of a VM, older ones first.
pub(super) async fn list(
    State(state): Api,
    At(name): At<String>,
) -> ApiResult<Json<Vec<SnapshotView>>> {
    let snapshot = state.snapshot();
    let of = Of::find(&snapshot, &name)?;
    let mut all: Vec<SnapshotView> = of.all().map(|(name, record)| of.view(name, record)).collect();
    all.sort_by_key(|view| view.snapshot.at_ms);
    Ok(Json(all))
}

/// Asks for one.
pub(super) async fn take(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
    Given(asked): Given<SnapshotAsked>,
) -> ApiResult<Json<SnapshotView>> {
    let snapshot = state.current().await?;
    let of = Of::find(&snapshot, &name)?;
    let vm = of.vm;
    if let Some(service) = of.object.meta.member_of() {
        let detail = format!("{vm} is a member of {service}, which makes and removes its members");
        let hint = "what must be kept belongs to a VM of its own; `haven backup run` keeps a member outside the cluster";
        return Err(conflict(detail, hint));
    }
    let placed = of.placed()?;
    let disks = of.disks(&asked.disks)?;
    let now = now_ms();
    // Two may be asked for within a second.
    let is_free = |name: &Name| of.all().all(|(other, _)| other != name);
    let usual = || (0..).map(|later| usual_name(now + later * 1000)).find(is_free);
    let called = asked.name.or_else(usual).expect("there are more seconds than snapshots");
    let there = of.all().find(|(of, _)| **of == called).map(|(_, record)| record);
    if let Some(there) = there.filter(|there| there.state != SnapshotState::Failed) {
        let detail = format!("{vm} has a snapshot `{called}` already, which is {}", there.state);
        let hint = format!("name another one, or remove it: `haven vm snapshot rm {vm} {called}`");
        return Err(conflict(detail, &hint));
    }
    of.may_keep_one_more()?;
    let id = uuid::Uuid::new_v4().simple().to_string();
    let record = VmSnapshot::wanted(id, vm.clone(), caller.who, now, disks);
    let key = of.key(&called);
    let mut over = of.unchanged(placed);
    over.push(match there {
        None => Compare::Absent(key.clone()),
        Some(there) => Compare::ModRevision(key.clone(), there.revision),
    });
    put(&state, over, vec![put_op(key, &record)], vm).await?;
    Ok(Json(of.view(&called, &record)))
}

/// Why a VM's disks cannot be made what they were.
fn at_rest(of: &Of<'_>) -> ApiResult<()> {
    let vm = of.vm;
    let stop = format!("stop it first: `haven vm stop {vm}`");
    if of.object.spec.running {
        let detail = format!("{vm} shall run; only while it does not its disks are reverted");
        return Err(conflict(detail, &stop));
    }
    match of.now.told_of(vm) {
        // What its host said before it knew of all that was asked of it may be of the end before this one.
        Some(told)
            if told.phase == VmPhase::Stopped && told.generation >= of.object.meta.generation =>
        {
            Ok(())
        }
        Some(_) => {
            let detail = format!("{vm} has not come to its end yet");
            Err(conflict(detail, &format!("`haven vm show {vm}` tells when it is stopped")))
        }
        None => {
            let detail = format!("it is not known whether {vm} has come to its end");
            Err(conflict(detail, "once its host is back it can be reverted"))
        }
    }
}

/// Asks for the disks of a VM to be what they were.
pub(super) async fn revert(
    State(state): Api,
    At((name, called)): At<(String, String)>,
    Given(asked): Given<RevertAsked>,
) -> ApiResult<Json<SnapshotView>> {
    let snapshot = state.current().await?;
    let of = Of::find(&snapshot, &name)?;
    let vm = of.vm;
    let (called, there) = of.one(&called)?;
    if there.state != SnapshotState::There {
        let detail = format!("the snapshot `{called}` of {vm} is {}", there.state);
        return Err(conflict(
            detail,
            &format!("`haven vm snapshot ls {vm}` lists those that are there"),
        ));
    }
    let placed = of.placed()?;
    at_rest(&of)?;
    if let Some((wanted, _)) = of.all().find(|(_, of)| of.state == SnapshotState::Wanted) {
        let detail = format!("the snapshot `{wanted}` of {vm} is not taken yet");
        let hint = format!(
            "`haven vm snapshot ls {vm}` tells what it waits for; it would show what the disks hold after that"
        );
        return Err(conflict(detail, &hint));
    }
    let back = of.back(called, there, &asked.disks)?;
    let record = VmSnapshot {
        state: SnapshotState::Reverting,
        back,
        message: String::new(),
        ..(*there.value).clone()
    };
    let mut over = of.unchanged(placed);
    over.push(Compare::ModRevision(of.key(called), there.revision));
    // A start that has begun meanwhile has told so.
    let told = of.now.vm_status.get(vm).map(|told| told.revision);
    over.extend(told.map(|revision| Compare::ModRevision(keys::vm_status(vm), revision)));
    let mut ops = vec![put_op(of.key(called), &record)];
    // What did not come to its end gives way: nobody is left with disks of which some are of before.
    for (other, before) in of.all().filter(|(_, of)| of.state == SnapshotState::Reverting) {
        let left = before.back.iter().find(|disk| !record.back.contains(disk));
        if let Some(disk) = left {
            let detail =
                format!("the disk `{disk}` of {vm} is being made what it was in `{other}`");
            let hint = format!(
                "`haven vm snapshot ls {vm}` tells how that stands; revert to a snapshot of all its disks to give it up"
            );
            return Err(conflict(detail, &hint));
        }
        let given_up = VmSnapshot {
            state: SnapshotState::There,
            back: Vec::new(),
            message: format!("given up for `{called}`"),
            ..(*before.value).clone()
        };
        over.push(Compare::ModRevision(of.key(other), before.revision));
        ops.push(put_op(of.key(other), &given_up));
    }
    put(&state, over, ops, vm).await?;
    Ok(Json(of.view(called, &record)))
}

/// Asks for one to be removed.
pub(super) async fn remove(
    State(state): Api,
    At((name, called)): At<(String, String)>,
) -> ApiResult<Json<SnapshotView>> {
    let snapshot = state.current().await?;
    let of = Of::find(&snapshot, &name)?;
    let vm = of.vm;
    let (called, there) = of.one(&called)?;
    if there.state == SnapshotState::Reverting {
        let detail = format!("the disks of {vm} are being made what they were in `{called}`");
        return Err(conflict(
            detail,
            &format!("`haven vm snapshot ls {vm}` tells how that stands"),
        ));
    }
    let placed = of.placed()?;
    clones::needed(&snapshot, &of.object.meta.uid, None, Some(there))?;
    let record = VmSnapshot {
        state: SnapshotState::Going,
        failed: None,
        message: String::new(),
        ..(*there.value).clone()
    };
    let mut over = of.unchanged(placed);
    over.push(Compare::ModRevision(of.key(called), there.revision));
    put(&state, over, vec![put_op(of.key(called), &record)], vm).await?;
    Ok(Json(of.view(called, &record)))
}
