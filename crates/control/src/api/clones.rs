//! VMs that are made from others: of the disks of a VM as a snapshot keeps them (docs/decisions/0028-clones.md).

use super::{
    ApiState, apply,
    auth::{Caller, now_ms},
    body::{At, Given},
    error::{ApiError, ApiResult, conflict},
    snapshots::{Of, put_op},
};
use axum::{Extension, Json, extract::State};
use haven_model::{
    Meta, Name, Object, ObjectRef, PoolDriverKind, Snapshot, VmSpec,
    api::{Applied, ApplyRequest, CloneAsked, ManifestFile},
    host::CLONES,
    keys,
    manifest::to_yaml,
    object::{Kind, Stored},
    vm::DiskSpec,
    vm_snapshot::{CopyRef, SnapshotDisk, SnapshotState, VmSnapshot, usual_name},
};
use haven_plan::{storage::copies, tolerance::migration::speaks_less};
use haven_store::raw::{Compare, Op};

/// Makes a VM of another one.
pub(super) async fn make(
    State(state): State<ApiState>,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
    Given(asked): Given<CloneAsked>,
) -> ApiResult<Json<Vec<Applied>>> {
    let snapshot = state.current().await?;
    let of = Of::find(&snapshot, &name)?;
    may_be(&of, &asked.name)?;
    let spec = &of.object.spec;
    if spec.plugged().next().is_none() && asked.snapshot.is_none() {
        // All that there is of it is written down.
        let object = copied(&of, &asked, None);
        let over = vec![is_new(&asked.name)];
        return Ok(Json(write(&state, &object, over, Vec::new()).await?));
    }
    kept_where_it_can_be(&of)?;
    let placed = of.placed()?;
    let mut over = of.unchanged(placed);
    over.push(is_new(&asked.name));
    let (called, record) = match &asked.snapshot {
        Some(named) => {
            let (called, there) = of.one(named.as_str())?;
            // It is written again, so that nobody removes it over what he has read before.
            over.push(Compare::ModRevision(of.key(called), there.revision));
            (called.clone(), usable(&of, called, there)?)
        }
        None => {
            of.may_keep_one_more()?;
            let now = now_ms();
            let is_free = |name: &Name| of.all().all(|(other, _)| other != name);
            let usual = |later: i64| Name::new(format!("clone-{}", usual_name(now + later * 1000)));
            let called = (0..).filter_map(|later| usual(later).ok()).find(is_free);
            let called = called.expect("there are more seconds than snapshots");
            over.push(Compare::Absent(of.key(&called)));
            let id = uuid::Uuid::new_v4().simple().to_string();
            let (vm, disks) = (of.vm.clone(), of.disks(&[])?);
            let made_for = Some(asked.name.clone());
            let wanted = VmSnapshot::wanted(id, vm, caller.who, now, disks);
            (called, VmSnapshot { made_for, ..wanted })
        }
    };
    let object = copied(&of, &asked, Some(&record));
    let ops = vec![put_op(of.key(&called), &record)];
    let applied = write(&state, &object, over, ops).await?;
    // Somebody else made one of this name a moment ago.
    match applied.iter().all(|one| one.outcome == "created") {
        true => Ok(Json(applied)),
        false => Err(taken(&asked.name)),
    }
}

fn taken(new: &Name) -> ApiError {
    let hint = "give the new one another name, or delete that one first";
    conflict(format!("there is a VM `{new}` already"), hint)
}

/// Nobody makes a VM of this name meanwhile: it would be changed.
fn is_new(name: &Name) -> Compare {
    Compare::Absent(keys::object(&ObjectRef::new(Kind::Vm, name.clone())))
}

/// Whether a VM of this name may be made of another one.
fn may_be(of: &Of<'_>, new: &Name) -> ApiResult<()> {
    let vm = of.vm;
    if let Some(service) = of.object.meta.member_of() {
        let detail = format!("{vm} is a member of {service}, which makes and removes its members");
        let hint = format!("`haven service scale {} N` makes more of them", service.name);
        return Err(conflict(detail, &hint));
    }
    if of.now.vms.contains_key(new) {
        return Err(taken(new));
    }
    if of.object.meta.deleting {
        return Err(conflict(format!("{vm} is being deleted"), "`haven vm ls` lists the others"));
    }
    if let Some(host) = speaks_less(of.now, CLONES) {
        let detail = format!(
            "{host} has not said that it can make a VM of another one: it runs an older Haven, or has not come up yet"
        );
        return Err(conflict(detail, "upgrade it (`haven host upgrade`)"));
    }
    Ok(())
}

/// Whether its disks are where a copy of one can be made.
fn kept_where_it_can_be(of: &Of<'_>) -> ApiResult<()> {
    for disk in of.object.spec.plugged() {
        let driver = of.now.pools.get(&disk.pool).map(|pool| pool.spec.driver);
        match driver {
            Some(driver @ PoolDriverKind::Nfs) => {
                let (whose, hint) = super::pools::bare(driver).unwrap_or_default();
                let detail = format!(
                    "the disk `{}` of {} lives in the pool `{}` of {whose}; disks there are not cloned yet",
                    disk.name, of.vm, disk.pool
                );
                return Err(conflict(
                    detail,
                    &format!("make another VM with disks of its own; {hint}"),
                ));
            }
            Some(PoolDriverKind::Rbd) => of.known_in_ceph(&disk.name)?,
            Some(_) => {}
            None => return Err(ApiError::missing(&format!("pool `{}`", disk.pool))),
        }
    }
    Ok(())
}

/// A snapshot that is there, or will be, of all disks of a VM.
fn usable(of: &Of<'_>, called: &Name, there: &VmSnapshot) -> ApiResult<VmSnapshot> {
    let vm = of.vm;
    if !matches!(there.state, SnapshotState::There | SnapshotState::Wanted) {
        let detail = format!("the snapshot `{called}` of {vm} is {}", there.state);
        let hint = format!("`haven vm snapshot ls {vm}` lists those that are there");
        return Err(conflict(detail, &hint));
    }
    let has = |disk: &DiskSpec| {
        let same = |kept: &SnapshotDisk| kept.name == disk.name && kept.pool == disk.pool;
        there.disks.iter().any(same)
    };
    if let Some(disk) = of.object.spec.plugged().find(|disk| !has(disk)) {
        let detail = format!("the snapshot `{called}` of {vm} is not of its disk `{}`", disk.name);
        let hint = format!("`haven vm snapshot ls {vm}` tells of which disks each is");
        return Err(conflict(detail, &hint));
    }
    Ok(there.clone())
}

/// The new VM: all that is written of the source but what only one can have, and what nobody asked for a second time.
fn copied(of: &Of<'_>, asked: &CloneAsked, from: Option<&VmSnapshot>) -> Object {
    let source = &of.object.spec;
    let copy = |disk: &DiskSpec| DiskSpec {
        image: None,
        backup: None,
        // Chosen anew.
        slot: None,
        copy_of: from.map(|record| {
            Box::new(CopyRef {
                vm: of.vm.clone(),
                vm_uid: of.object.meta.uid.clone(),
                disk: disk.name.clone(),
                snapshot: record.id.clone(),
            })
        }),
        ..disk.clone()
    };
    let mut spec = VmSpec {
        // What its guest does not see is no part of the machine that is cloned.
        disks: source.plugged().map(copy).collect(),
        running: !asked.stopped,
        resets: 0,
        backup: None,
        snapshot: None,
        ..source.clone()
    };
    for nic in &mut spec.networks {
        nic.address = None;
    }
    let mut meta = Meta::new(asked.name.clone(), String::new(), 0);
    meta.labels.clone_from(&of.object.meta.labels);
    Object::Vm(Stored { meta, spec })
}

async fn write(
    state: &ApiState,
    object: &Object,
    over: Vec<Compare>,
    ops: Vec<Op>,
) -> ApiResult<Vec<Applied>> {
    let file = ManifestFile { name: "request".into(), text: to_yaml(object) };
    let request = ApplyRequest { files: vec![file], dry_run: false };
    apply::apply_with(state, &request, over, ops).await
}

/// Refuses what would take away the disks that a VM is yet to be made from: all of them, one disk, or a snapshot.
pub(super) fn needed(
    snapshot: &Snapshot,
    vm_uid: &str,
    disk: Option<&Name>,
    record: Option<&VmSnapshot>,
) -> ApiResult<()> {
    let mut copies = snapshot.copies_of(vm_uid);
    let needing = match (disk, record) {
        (_, Some(record)) => copies::needed_by(snapshot, vm_uid, record),
        (Some(disk), _) => copies.find(|(_, copy)| copy.disk == *disk).map(|(vm, _)| vm),
        (None, None) => copies.next().map(|(vm, _)| vm),
    };
    let Some(needing) = needing else { return Ok(()) };
    let hint = format!("wait until {needing} runs, or delete it first");
    Err(conflict(format!("{needing} is being made from it; nothing was changed"), &hint))
}
