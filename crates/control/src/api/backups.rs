//! Backups: asked for, listed, compared with their checksums, removed, and made into VMs again.
//!
//! What there is of them stands in their target and nowhere else, so that a target outlives its cluster. What is being
//! done stands in the store.

use super::{
    ApiState, apply,
    auth::{Caller, now_ms},
    body::{Asked, At, Given},
    error::{ApiError, ApiResult, conflict},
};
use axum::{
    Extension, Json,
    body::Body,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use haven_model::{
    Meta, Name, Object, Snapshot, VmSpec,
    api::{
        Applied, ApplyRequest, BackupAsked, BackupFiles, BackupList, BackupView, ManifestFile,
        RestoreAsked, VerifyAsked,
    },
    backup::{Backup, BackupRef, BackupRun, TaskOutcome, Verification},
    host::BACKUPS,
    keys,
    manifest::to_yaml,
    object::Stored,
};
use haven_plan::tolerance::migration::speaks_less;
use haven_store::raw::{Compare, Op};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, time::Duration};
use tokio_util::io::ReaderStream;

/// How long the live copy may take to show what was just written.
const SHOWS: Duration = Duration::from_secs(5);

type Api = State<ApiState>;

/// Those of one VM.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Of {
    /// Only this VM's.
    vm: Option<Name>,
}

fn view(snapshot: &Snapshot, vm: &Name) -> BackupView {
    let spec = snapshot.vms.get(vm).and_then(|vm| vm.spec.backup.clone());
    let run = snapshot.backups.get(vm).map(|run| (*run.value).clone());
    BackupView { vm: vm.clone(), spec, run }
}

fn known_vm(snapshot: &Snapshot, name: &str) -> ApiResult<Name> {
    let name = Name::new(name)?;
    match snapshot.vms.contains_key(&name) {
        true => Ok(name),
        false => Err(ApiError::missing(&format!("VM `{name}`"))),
    }
}

fn known_target(snapshot: &Snapshot, name: &str) -> ApiResult<Name> {
    let name = Name::new(name)?;
    match snapshot.targets.get(&name) {
        Some(target) if !target.meta.deleting => Ok(name),
        Some(_) => Err(conflict(
            format!("the target `{name}` is being deleted"),
            "`haven backup target ls` lists the others",
        )),
        None => Err(ApiError::missing(&format!("target `{name}`"))),
    }
}

fn understood(snapshot: &Snapshot) -> ApiResult<()> {
    let Some(host) = speaks_less(snapshot, BACKUPS) else { return Ok(()) };
    let detail = format!(
        "{host} has not said that it knows backups: it runs an older Haven, or has not come up yet"
    );
    Err(conflict(detail, "upgrade it (`haven host upgrade`)"))
}

/// Something of a target could not be done.
fn failed(why: String) -> ApiError {
    ApiError::new(StatusCode::BAD_GATEWAY, why, "`haven backup target ls` shows where it is")
}

/// Writes a record over the one that was read, and waits until the live copy shows it.
async fn put<T: Serialize>(state: &ApiState, key: String, over: i64, record: &T) -> ApiResult<()> {
    let compare = match over {
        0 => Compare::Absent(key.clone()),
        revision => Compare::ModRevision(key.clone(), revision),
    };
    let value = serde_json::to_vec(record).expect("a record is plain data");
    let outcome = state.store.txn(vec![compare], vec![Op::Put(key, value.into())]).await?;
    if !outcome.succeeded {
        return Err(ApiError::busy("the backup"));
    }
    let mut live = state.live.clone();
    let shown = live.wait_for(|live| live.revision >= outcome.revision);
    let _ = tokio::time::timeout(SHOWS, shown).await;
    Ok(())
}

/// How the backups of all VMs stand that have any, or should.
pub(super) async fn all(State(state): Api) -> Json<Vec<BackupView>> {
    let snapshot = state.snapshot();
    let asked = snapshot
        .vms
        .iter()
        .filter(|(name, vm)| vm.spec.backup.is_some() || snapshot.backups.contains_key(*name));
    Json(asked.map(|(name, _)| view(&snapshot, name)).collect())
}

/// How the last one of a VM stands.
pub(super) async fn show(State(state): Api, At(name): At<String>) -> ApiResult<Json<BackupView>> {
    let snapshot = state.snapshot();
    let vm = known_vm(&snapshot, &name)?;
    Ok(Json(view(&snapshot, &vm)))
}

/// Where a backup of a VM goes when nobody says.
fn usual(snapshot: &Snapshot, vm: &Name) -> ApiResult<Name> {
    let own = snapshot.vms.get(vm).and_then(|vm| vm.spec.backup.as_ref());
    if let Some(own) = own {
        return Ok(own.to.clone());
    }
    let mut targets = snapshot.targets.iter().filter(|(_, target)| !target.meta.deleting);
    match (targets.next(), targets.next()) {
        (Some((only, _)), None) => Ok(only.clone()),
        (None, _) => Err(conflict(
            "there is no target yet, so backups could go nowhere".into(),
            "`haven backup target create NAME --directory PATH` makes one",
        )),
        _ => {
            let names: Vec<&str> = snapshot.targets.keys().map(Name::as_str).collect();
            let detail = format!("there are several targets: {}", names.join(", "));
            Err(ApiError::bad(detail, "name one with `--to`"))
        }
    }
}

/// Asks for one.
pub(super) async fn run(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
    Given(asked): Given<BackupAsked>,
) -> ApiResult<Json<BackupView>> {
    let snapshot = state.current().await?;
    let vm = known_vm(&snapshot, &name)?;
    let to = match asked.to {
        Some(to) => known_target(&snapshot, to.as_str())?,
        None => usual(&snapshot, &vm)?,
    };
    understood(&snapshot)?;
    if !snapshot.placements.contains_key(&vm) {
        let detail = format!("{vm} has no host that could read its disks");
        return Err(conflict(detail, &format!("`haven explain vm/{vm}` tells what it waits for")));
    }
    let object = &snapshot.vms[&vm];
    if object.spec.disks.is_empty() {
        let detail = format!("{vm} has no disk, so there is nothing of it to be kept");
        return Err(conflict(detail, &format!("`haven get vm/{vm} -o yaml` is all that there is")));
    }
    if let Some((disk, pool, (of, hint))) = super::pools::bare_disk(&snapshot, &object.spec) {
        let detail = format!(
            "the disk `{disk}` of {vm} is in the pool `{pool}` of {of}, and disks there are not backed up yet"
        );
        return Err(conflict(detail, hint));
    }
    let last = snapshot.backups.get(&vm);
    if let Some(last) = last.filter(|last| last.outcome.is_none()) {
        let detail = format!("{vm} is being backed up to {} already", last.to);
        return Err(conflict(detail, &format!("`haven backup run {vm} --cancel` ends that")));
    }
    let over = last.map_or(0, |last| last.revision);
    let last = last.map(|last| &*last.value);
    let run = BackupRun::new(&object.meta.uid, to, caller.who, now_ms(), last);
    put(&state, keys::backup(&vm), over, &run).await?;
    Ok(Json(view(&state.snapshot(), &vm)))
}

/// Ends one that goes on.
pub(super) async fn cancel(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
) -> ApiResult<Json<BackupView>> {
    let snapshot = state.current().await?;
    let vm = known_vm(&snapshot, &name)?;
    let going = snapshot.backups.get(&vm).filter(|run| run.outcome.is_none());
    let going = going.ok_or_else(|| ApiError::missing(&format!("backup of `{vm}` under way")))?;
    let ended = going.ended(now_ms(), false, format!("{} ended it", caller.who));
    put(&state, keys::backup(&vm), going.revision, &ended).await?;
    Ok(Json(view(&state.snapshot(), &vm)))
}

/// Makes a target of what is there.
pub(super) async fn mark(State(state): Api, At(name): At<String>) -> ApiResult<StatusCode> {
    let target = known_target(&*state.current().await?, &name)?;
    state.local.mark_target(&target).await.map_err(failed)?;
    Ok(StatusCode::NO_CONTENT)
}

/// What a target holds.
pub(super) async fn list(
    State(state): Api,
    At(name): At<String>,
    Asked(of): Asked<Of>,
) -> ApiResult<Json<BackupList>> {
    let target = known_target(&*state.current().await?, &name)?;
    let mut list = state.local.backups(&target, of.vm.as_ref()).await.map_err(failed)?;
    for backup in &mut list.backups {
        // It may hold what only the VM's owner should read.
        backup.object = serde_json::Value::Null;
    }
    Ok(Json(list))
}

/// Removes one.
pub(super) async fn remove(
    State(state): Api,
    At((target, vm, id)): At<(String, String, String)>,
) -> ApiResult<StatusCode> {
    let snapshot = state.current().await?;
    let (target, vm) = (known_target(&snapshot, &target)?, Name::new(&vm)?);
    let there = found(&state, &target, &vm, Some(&id)).await?;
    if let Some(needed) = snapshot.made_from(&target, &vm, &there.id) {
        let detail = format!("{needed} is being made from that backup");
        return Err(conflict(detail, "wait until it runs"));
    }
    state.local.remove_backup(&target, &vm, &there.id).await.map_err(failed)?;
    Ok(StatusCode::NO_CONTENT)
}

/// A backup of a VM; the newest when none is named.
async fn found(state: &ApiState, target: &Name, vm: &Name, id: Option<&str>) -> ApiResult<Backup> {
    let list = state.local.backups(target, Some(vm)).await.map_err(failed)?;
    let mut backups = list.backups.into_iter().rev();
    let id = id.filter(|id| *id != NEWEST);
    let one = backups.find(|backup| id.is_none_or(|id| backup.id == id));
    one.ok_or_else(|| {
        let damaged = list.unreadable.first().map_or(String::new(), |why| format!(" ({why})"));
        let which = id.map_or_else(|| "backup".to_owned(), |id| format!("backup `{id}`"));
        ApiError::missing(&format!("{which} of `{vm}` in the target `{target}`{damaged}"))
    })
}

/// What a person calls the last one.
const NEWEST: &str = "newest";

/// Where in a backup; all places when absent.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Where {
    /// `DISK[:PARTITION]:/PATH`.
    at: Option<String>,
}

/// Where in a backup.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Place {
    /// `DISK[:PARTITION]:/PATH`.
    at: String,
}

/// The backup that a path of the API names.
async fn named(
    state: &ApiState,
    (target, vm, id): (String, String, String),
) -> ApiResult<(Name, Name, String)> {
    let snapshot = state.current().await?;
    let (target, vm) = (known_target(&snapshot, &target)?, Name::new(&vm)?);
    let id = match id.as_str() {
        NEWEST => found(state, &target, &vm, None).await?.id,
        _ => id,
    };
    Ok((target, vm, id))
}

/// Something of a backup cannot be had.
fn unfound(why: String) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, why, "`haven backup files VM BACKUP` names the places")
}

/// What stands at a place of a backup.
pub(super) async fn files(
    State(state): Api,
    At(which): At<(String, String, String)>,
    Asked(asked): Asked<Where>,
) -> ApiResult<Json<BackupFiles>> {
    let (target, vm, id) = named(&state, which).await?;
    let files = state.local.backup_files(&target, &vm, &id, asked.at.as_deref()).await;
    Ok(Json(files.map_err(unfound)?))
}

/// A file of a backup.
pub(super) async fn file(
    State(state): Api,
    At(which): At<(String, String, String)>,
    Asked(asked): Asked<Place>,
) -> ApiResult<Response> {
    let (target, vm, id) = named(&state, which).await?;
    let file = state.local.backup_file(&target, &vm, &id, &asked.at).await;
    let (length, file) = file.map_err(unfound)?;
    let body = Body::from_stream(ReaderStream::with_capacity(file, 1 << 16));
    // With it an end that comes early is noticed.
    let kind = HeaderValue::from_static("application/octet-stream");
    let head = [(header::CONTENT_LENGTH, length.into()), (header::CONTENT_TYPE, kind)];
    Ok((head, body).into_response())
}

/// Asks for the backups in a target to be compared with their checksums.
pub(super) async fn verify(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
    Given(asked): Given<VerifyAsked>,
) -> ApiResult<Json<Verification>> {
    let snapshot = state.current().await?;
    let target = known_target(&snapshot, &name)?;
    understood(&snapshot)?;
    let last = snapshot.verifications.get(&target);
    if last.is_some_and(|last| last.outcome.is_none()) {
        let detail = format!("the backups in {target} are being compared already");
        let hint = format!("`haven backup verify --in {target} --cancel` ends that");
        return Err(conflict(detail, &hint));
    }
    if let Some(vm) = &asked.vm {
        found(&state, &target, vm, asked.backup.as_deref()).await?;
    }
    let record = Verification {
        id: uuid::Uuid::new_v4().to_string(),
        vm: asked.vm,
        backup: asked.backup,
        by: caller.who,
        at_ms: now_ms(),
        done: 0,
        total: 0,
        damaged: Vec::new(),
        outcome: None,
    };
    let over = last.map_or(0, |last| last.revision);
    put(&state, keys::verification(&target), over, &record).await?;
    Ok(Json(record))
}

/// How the last comparison of a target stands.
pub(super) async fn verification(
    State(state): Api,
    At(name): At<String>,
) -> ApiResult<Json<Verification>> {
    let snapshot = state.snapshot();
    let target = known_target(&snapshot, &name)?;
    let last = snapshot.verifications.get(&target);
    let last = last.ok_or_else(|| ApiError::missing(&format!("comparison of `{target}`")))?;
    Ok(Json((*last.value).clone()))
}

/// Ends one that goes on.
pub(super) async fn cancel_verify(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
) -> ApiResult<Json<Verification>> {
    let snapshot = state.current().await?;
    let target = known_target(&snapshot, &name)?;
    let going = snapshot.verifications.get(&target).filter(|of| of.outcome.is_none());
    let missing = || ApiError::missing(&format!("comparison of `{target}` under way"));
    let going = going.ok_or_else(missing)?;
    let message = format!("{} ended it", caller.who);
    let outcome = Some(TaskOutcome { at_ms: now_ms(), well: false, message });
    let ended = Verification { outcome, ..(*going.value).clone() };
    put(&state, keys::verification(&target), going.revision, &ended).await?;
    Ok(Json(ended))
}

/// What of a VM stands in its backup.
#[derive(Deserialize)]
struct Kept {
    #[serde(default)]
    labels: BTreeMap<String, String>,
    spec: VmSpec,
}

/// Makes a VM from a backup.
pub(super) async fn restore(
    State(state): Api,
    Given(asked): Given<RestoreAsked>,
) -> ApiResult<Json<Vec<Applied>>> {
    let snapshot = state.current().await?;
    let target = known_target(&snapshot, asked.target.as_str())?;
    understood(&snapshot)?;
    let backup = found(&state, &target, &asked.vm, asked.backup.as_deref()).await?;
    let name = asked.name.clone().unwrap_or_else(|| asked.vm.clone());
    if snapshot.vms.contains_key(&name) {
        let hint = "give it another name with `--as`, or delete the one that is there first";
        return Err(conflict(format!("there is a VM `{name}` already"), hint));
    }
    let kept: Kept = serde_json::from_value(backup.object.clone()).map_err(|error| {
        let detail =
            format!("what the backup {} says of {} cannot be read ({error})", backup.id, backup.vm);
        ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, detail, "upgrade this host's Haven first")
    })?;
    let object = restored(&snapshot, &backup, &asked, kept, name)?;
    let file = ManifestFile { name: "request".into(), text: to_yaml(&object) };
    let request = ApplyRequest { files: vec![file], dry_run: false };
    Ok(Json(apply::apply(&state, &request).await?))
}

/// The VM of a backup under its new name. Addresses that are in use by now are given up.
fn restored(
    snapshot: &Snapshot,
    backup: &Backup,
    asked: &RestoreAsked,
    kept: Kept,
    name: Name,
) -> ApiResult<Object> {
    let mut spec = kept.spec;
    for disk in &mut spec.disks {
        // Chosen anew, if hosts know of ports by now.
        disk.slot = None;
        if let Some(pool) = &asked.pool {
            disk.pool = pool.clone();
        }
        let Some(of) = backup.disks.iter().find(|of| of.name == disk.name) else {
            // It was never seen by a guest, so it begins here as it would have there.
            if disk.detached {
                continue;
            }
            let detail =
                format!("the backup {} holds nothing of the disk `{}`", backup.id, disk.name);
            let hint = "take another backup of it";
            return Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, detail, hint));
        };
        // What it held is only there once its guest has it.
        disk.detached = false;
        disk.size = of.size;
        disk.image = None;
        disk.backup = Some(BackupRef {
            target: asked.target.clone(),
            vm: backup.vm.clone(),
            id: backup.id.clone(),
            disk: disk.name.clone(),
        });
    }
    let taken = |address: &std::net::Ipv4Addr| {
        let mut nics = snapshot.placements.values().flat_map(|placed| placed.nics.iter());
        let mut wished = snapshot.vms.values().flat_map(|vm| vm.spec.networks.iter());
        nics.any(|nic| nic.ip == *address) || wished.any(|nic| nic.address == Some(*address))
    };
    for nic in &mut spec.networks {
        nic.address = nic.address.filter(|address| !taken(address));
    }
    // Two of them beside each other would overwrite nothing, and still nobody asked for it.
    if name != backup.vm {
        spec.backup = None;
    }
    spec.running = !asked.stopped;
    spec.resets = 0;
    let mut meta = Meta::new(name, String::new(), 0);
    meta.labels = kept.labels;
    Ok(Object::Vm(Stored { meta, spec }))
}
