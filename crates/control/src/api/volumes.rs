//! Disks of VMs: how they stand towards their guests, and of mirrored ones on which hosts they are and which replicas count.

use super::{
    ApiState,
    auth::{A_HOST, Caller, now_ms},
    body::{Asked, At, Given},
    clones,
    error::{ApiError, ApiResult, conflict},
    objects,
};
use axum::{Extension, Json, body::Bytes as Body, extract::State, http::StatusCode};
use haven_model::{
    Bytes, Name, Object, ObjectRef, Snapshot, Versioned, VmPhase, VmStatus,
    api::{CheckAsked, ReplicaLine, VolumeView},
    host::{MIRRORS_MOVE, PLUGS},
    keys,
    object::Kind,
    vm::{DiskSpec, DiskState},
    volume::{GoneVolume, ReplicaIs, ReplicaState, Volume, VolumeCheck, VolumeRef},
};
use haven_plan::tolerance::migration::speaks_less;
use haven_store::raw::{Compare, Op};
use schemars::JsonSchema;
use serde::Deserialize;
use std::{collections::BTreeSet, time::Duration};

/// The most pieces that are told in one answer.
const MOST_PIECES: u64 = 4096;
/// How long the live copy may take to show what was just written.
const SHOWS: Duration = Duration::from_secs(5);

type Api = State<ApiState>;

/// The replicas of a mirrored volume.
fn replicas(snapshot: &Snapshot, of: &VolumeRef, volume: &Volume) -> Vec<ReplicaLine> {
    let owner = snapshot.placements.get(&of.vm).map(|placed| &placed.host);
    let line = |host: &Name| {
        let counted = volume.counts(host);
        let told = snapshot.replica_told(of, host);
        let failed = match told {
            Some(ReplicaIs::Failed { why }) => Some(why.clone()),
            _ => None,
        };
        let is = match (failed, counted) {
            _ if owner == Some(host) => "its VM's own".to_owned(),
            (Some(why), _) => why,
            _ if !snapshot.session_open(host) => "its host is away".to_owned(),
            (None, true) => "has all that was written".to_owned(),
            (None, false) if volume.replicas.get(host) == Some(&ReplicaState::Returning) => {
                "is copied to".to_owned()
            }
            (None, false) => "lacks what was written since it broke away".to_owned(),
        };
        ReplicaLine { host: host.clone(), counted, is }
    };
    volume.replicas.keys().map(line).collect()
}

/// A disk; nothing when there is none of this name.
fn view(snapshot: &Snapshot, of: &VolumeRef) -> Option<VolumeView> {
    let vm = snapshot.vms.get(&of.vm);
    let disk = vm.and_then(|vm| vm.spec.disks.iter().find(|disk| disk.name == of.disk));
    let uid = |volume: &&Versioned<Volume>| vm.is_none_or(|vm| vm.meta.uid == volume.vm_uid);
    let volume = snapshot.volumes.get(of).filter(uid);
    // One may be left of a disk that its VM has no more.
    let (size, pool) = match (disk, volume) {
        (Some(disk), _) => (disk.size, &disk.pool),
        (None, Some(volume)) => (volume.size, &volume.pool),
        (None, None) => return None,
    };
    let state = disk.map_or(DiskState::Detached, |disk| snapshot.disk_state(&of.vm, disk));
    let told = snapshot.told_of(&of.vm).filter(|_| state == DiskState::Changing);
    Some(VolumeView {
        name: of.clone(),
        size,
        pool: pool.clone(),
        encrypted: disk.map_or_else(|| volume.is_some_and(|of| of.encrypted), |of| of.encrypted),
        state,
        message: told.map(|told| told.message.clone()).unwrap_or_default(),
        owner: snapshot.placements.get(&of.vm).map(|placed| placed.host.clone()),
        replicas: volume.map(|volume| replicas(snapshot, of, volume)).unwrap_or_default(),
        volume: volume.map(|volume| (*volume.value).clone()),
        check: snapshot.checks.get(of).map(|check| (*check.value).clone()),
    })
}

/// All of them.
pub(super) async fn list(State(state): Api) -> Json<Vec<VolumeView>> {
    let snapshot = state.snapshot();
    let disks = snapshot.vms.iter().flat_map(|(vm, object)| {
        let of = |disk: &DiskSpec| VolumeRef { vm: vm.clone(), disk: disk.name.clone() };
        object.spec.disks.iter().map(of).collect::<Vec<_>>()
    });
    let all: BTreeSet<VolumeRef> = disks.chain(snapshot.volumes.keys().cloned()).collect();
    Json(all.iter().filter_map(|of| view(&snapshot, of)).collect())
}

/// One of them.
pub(super) async fn show(State(state): Api, At(name): At<String>) -> ApiResult<Json<VolumeView>> {
    let snapshot = state.snapshot();
    let of = parse(&name)?;
    let missing = || ApiError::missing(&format!("volume `{name}`"));
    view(&snapshot, &of).map(Json).ok_or_else(missing)
}

fn parse(name: &str) -> ApiResult<VolumeRef> {
    VolumeRef::parse(name).ok_or_else(|| {
        ApiError::bad(format!("`{name}` is no volume"), "write VM.DISK, as `haven volume ls` does")
    })
}

/// The mirrored volume of this name.
fn known<'a>(snapshot: &'a Snapshot, name: &str) -> ApiResult<(VolumeRef, &'a Versioned<Volume>)> {
    let of = parse(name)?;
    if let Some(volume) = snapshot.volumes.get(&of) {
        return Ok((of, volume));
    }
    Err(match view(snapshot, &of) {
        Some(view) => ApiError::missing(&format!(
            "volume `{name}` with replicas (its disk is in the pool `{}`, or has no hosts yet)",
            view.pool
        )),
        None => ApiError::missing(&format!("volume `{name}`")),
    })
}

/// Removes a disk that is detached, with all that is on it.
pub(super) async fn remove(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
) -> ApiResult<StatusCode> {
    let of = parse(&name)?;
    for _ in 0..5 {
        let snapshot = state.current().await?;
        let object = ObjectRef::new(Kind::Vm, of.vm.clone());
        let (Object::Vm(mut vm), revision) = objects::read(&state, &object).await? else {
            return Err(ApiError::missing(&format!("volume `{name}`")));
        };
        let at = vm.spec.disks.iter().position(|disk| disk.name == of.disk);
        let at = at.ok_or_else(|| ApiError::missing(&format!("volume `{name}`")))?;
        may_be_removed(&snapshot, &of, &vm.spec.disks[at])?;
        clones::needed(&snapshot, &vm.meta.uid, Some(&of.disk), None)?;
        let gone = vm.spec.disks.remove(at);
        vm.meta.generation += 1;
        let gone_uid = vm.meta.uid.clone();
        let record = GoneVolume {
            vm_uid: gone_uid.clone(),
            pool: gone.pool,
            by: caller.who.clone(),
            at_ms: now_ms(),
        };
        let record = serde_json::to_vec(&record).expect("a record is plain data");
        let vm = Object::Vm(vm);
        let mut compare = vec![Compare::ModRevision(keys::object(&object), revision)];
        let mut ops = vec![
            Op::Put(keys::object(&object), vm.to_store().into()),
            Op::Put(keys::gone(&of), record.into()),
        ];
        if let Some(volume) = snapshot.volumes.get(&of) {
            compare.push(Compare::ModRevision(keys::volume(&of), volume.revision));
            ops.push(Op::Delete(keys::volume(&of)));
        }
        let hosts = snapshot.replica_status.get(&of).into_iter().flat_map(|told| told.keys());
        ops.extend(hosts.map(|host| Op::Delete(keys::replica_status(&of, host))));
        if gone.encrypted {
            // What is left of it anywhere can be read by nobody from here on.
            ops.push(Op::Delete(keys::disk_key(&gone_uid, &of.disk)));
        }
        ops.extend(snapshot.checks.get(&of).map(|_| Op::Delete(keys::check(&of))));
        // A snapshot of this disk alone is gone with it.
        for (name, kept) in snapshot.vm_snapshots.get(&gone_uid).into_iter().flatten() {
            if kept.disks.iter().all(|disk| disk.name == of.disk) {
                let key = keys::vm_snapshot(&gone_uid, name);
                compare.push(Compare::ModRevision(key.clone(), kept.revision));
                ops.push(Op::Delete(key));
            }
        }
        if state.store.txn(compare, ops).await?.succeeded {
            return Ok(StatusCode::NO_CONTENT);
        }
    }
    Err(ApiError::busy(&format!("volume `{name}`")))
}

fn may_be_removed(snapshot: &Snapshot, of: &VolumeRef, disk: &DiskSpec) -> ApiResult<()> {
    if let Some(older) = speaks_less(snapshot, PLUGS) {
        let detail = format!(
            "{older} has not said that it can remove a disk: it runs an older Haven, or has not come up yet"
        );
        return Err(conflict(detail, "wait until all hosts are up and upgraded"));
    }
    let told = snapshot.told_of(&of.vm);
    let generation = snapshot.vms.get(&of.vm).map_or(0, |vm| vm.meta.generation);
    let knows = |told: &VmStatus| {
        let rests = matches!(told.phase, VmPhase::Running | VmPhase::Stopped);
        rests && told.generation >= generation
    };
    if snapshot.placements.contains_key(&of.vm) && !told.is_some_and(knows) {
        let phase = told.map_or("placed", |told| told.phase.as_str());
        let detail = format!(
            "{} is {phase}, and its host has not said that it is without {of}; nothing was removed",
            of.vm
        );
        return Err(conflict(detail, "wait until it runs or is stopped, and its host is there"));
    }
    let in_use = !disk.detached || snapshot.disk_state(&of.vm, disk) != DiskState::Detached;
    if in_use {
        let detail = format!("{of} is attached to {}; nothing was removed", of.vm);
        let hint = format!("`haven volume detach {of}` first; what is on it is lost then");
        return Err(conflict(detail, &hint));
    }
    Ok(())
}

/// Writes the record of a comparison over the one that was read, and shows the volume once that is seen.
async fn put(
    state: &ApiState,
    name: &str,
    check: &VolumeCheck,
    over: i64,
) -> ApiResult<Json<VolumeView>> {
    let of = known(&state.snapshot(), name)?.0;
    let key = keys::check(&of);
    let compare = match over {
        0 => Compare::Absent(key.clone()),
        revision => Compare::ModRevision(key.clone(), revision),
    };
    let value = serde_json::to_vec(check).expect("a record is plain data");
    let outcome = state.store.txn(vec![compare], vec![Op::Put(key, value.into())]).await?;
    if !outcome.succeeded {
        return Err(ApiError::busy(&format!("volume `{name}`")));
    }
    let mut live = state.live.clone();
    let shown = live.wait_for(|live| live.revision >= outcome.revision);
    let _ = tokio::time::timeout(SHOWS, shown).await;
    let snapshot = state.snapshot();
    let (of, _) = known(&snapshot, name)?;
    let missing = || ApiError::missing(&format!("volume `{name}`"));
    view(&snapshot, &of).map(Json).ok_or_else(missing)
}

/// Asks for the replicas to be compared.
pub(super) async fn check(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
    Given(asked): Given<CheckAsked>,
) -> ApiResult<Json<VolumeView>> {
    let snapshot = state.current().await?;
    let (of, volume) = known(&snapshot, &name)?;
    if volume.run == 0 {
        let detail = format!("nobody has written to {name} yet");
        return Err(conflict(detail, "start its VM first"));
    }
    if !snapshot.placements.contains_key(&of.vm) {
        let detail = format!("{} has no host that could compare its disks", of.vm);
        return Err(conflict(detail, "`haven explain` tells what it waits for"));
    }
    if let Some(host) = speaks_less(&snapshot, MIRRORS_MOVE) {
        let detail = format!(
            "{host} has not said that it can compare replicas: it runs an older Haven, or has not come up yet"
        );
        return Err(conflict(detail, "upgrade it (`haven host upgrade`)"));
    }
    let last = snapshot.checks.get(&of);
    if last.is_some_and(|last| last.outcome.is_none()) {
        let hint = format!("`haven volume check {name} --cancel` ends that");
        return Err(conflict(format!("the replicas of {name} are being compared already"), &hint));
    }
    let check = VolumeCheck {
        id: uuid::Uuid::new_v4().to_string(),
        by: caller.who,
        at_ms: now_ms(),
        repair: asked.repair,
        done: Bytes(0),
        differs: Default::default(),
        alone: 0,
        outcome: None,
    };
    put(&state, &name, &check, last.map_or(0, |last| last.revision)).await
}

/// Ends a comparison that goes on.
pub(super) async fn cancel_check(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
) -> ApiResult<Json<VolumeView>> {
    let snapshot = state.current().await?;
    let (of, _) = known(&snapshot, &name)?;
    let under_way = snapshot.checks.get(&of).filter(|check| check.outcome.is_none());
    let check =
        under_way.ok_or_else(|| ApiError::missing(&format!("comparison of `{name}` under way")))?;
    let ended = check.ended(now_ms(), false, format!("{} ended it", caller.who));
    put(&state, &name, &ended, check.revision).await
}

/// Which pieces.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Which {
    /// The number of the first.
    from: u64,
    /// How many.
    count: u64,
}

/// Which part of which copy.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct WhichKept {
    /// The uid of its VM.
    uid: String,
    /// What the copy is called.
    copy: String,
    /// Bytes before it.
    from: u64,
}

fn is_a_host(caller: &Caller, hint: &'static str) -> ApiResult<()> {
    match caller.who == A_HOST {
        true => Ok(()),
        false => {
            let detail = format!("{} is no host of the cluster", caller.who);
            Err(ApiError::new(StatusCode::FORBIDDEN, detail, hint))
        }
    }
}

/// Gives another host a part of a copy that is here.
pub(super) async fn kept(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
    Asked(which): Asked<WhichKept>,
) -> ApiResult<Body> {
    is_a_host(&caller, "`haven vm snapshot ls` tells which hosts have a copy")?;
    let snapshot = state.snapshot();
    let (of, _) = known(&snapshot, &name)?;
    let told = state.local.kept(&of, &which.uid, &which.copy, which.from).await;
    told.map(Body::from)
        .map_err(|why| conflict(why, "`haven vm snapshot ls` tells which hosts have a copy"))
}

/// Tells another host what pieces of the replica here hold.
pub(super) async fn pieces(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
    Asked(which): Asked<Which>,
) -> ApiResult<Body> {
    is_a_host(&caller, "`haven volume check` compares replicas")?;
    let snapshot = state.snapshot();
    let (of, _) = known(&snapshot, &name)?;
    let told = state.local.pieces(&of, which.from, which.count.min(MOST_PIECES)).await;
    told.map(Body::from)
        .map_err(|why| conflict(why, "`haven volume show` tells how its replicas are"))
}
