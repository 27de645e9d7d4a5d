//! Mirrored volumes: on which hosts they are, and which of their replicas count.

use super::{
    ApiState,
    auth::{A_HOST, Caller, now_ms},
    body::{Asked, At, Given},
    error::{ApiError, ApiResult, conflict},
};
use axum::{Extension, Json, body::Bytes as Body, extract::State, http::StatusCode};
use haven_model::{
    Bytes, Name, Snapshot, Versioned,
    api::{CheckAsked, ReplicaLine, VolumeView},
    host::MIRRORS_MOVE,
    keys,
    volume::{ReplicaIs, ReplicaState, Volume, VolumeCheck, VolumeRef},
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

fn view(snapshot: &Snapshot, of: &VolumeRef, volume: &Versioned<Volume>) -> VolumeView {
    let owner = snapshot.placements.get(&of.vm).map(|placed| placed.host.clone());
    let line = |host: &Name| {
        let counted = volume.counts(host);
        let told = snapshot.replica_told(of, host);
        let failed = match told {
            Some(ReplicaIs::Failed { why }) => Some(why.clone()),
            _ => None,
        };
        let is = match (failed, counted) {
            _ if owner.as_ref() == Some(host) => "its VM's own".to_owned(),
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
    VolumeView {
        name: of.clone(),
        owner: owner.clone(),
        replicas: volume.replicas.keys().map(line).collect(),
        volume: (*volume.value).clone(),
        check: snapshot.checks.get(of).map(|check| (*check.value).clone()),
    }
}

/// All of them.
pub(super) async fn list(State(state): Api) -> Json<Vec<VolumeView>> {
    let snapshot = state.snapshot();
    Json(snapshot.volumes.iter().map(|(of, volume)| view(&snapshot, of, volume)).collect())
}

/// One of them.
pub(super) async fn show(State(state): Api, At(name): At<String>) -> ApiResult<Json<VolumeView>> {
    let snapshot = state.snapshot();
    let (of, volume) = known(&snapshot, &name)?;
    Ok(Json(view(&snapshot, &of, volume)))
}

/// The volume of this name.
fn known<'a>(snapshot: &'a Snapshot, name: &str) -> ApiResult<(VolumeRef, &'a Versioned<Volume>)> {
    let of = VolumeRef::parse(name).ok_or_else(|| {
        ApiError::bad(format!("`{name}` is no volume"), "write VM.DISK, as `haven volume ls` does")
    })?;
    if let Some(volume) = snapshot.volumes.get(&of) {
        return Ok((of, volume));
    }
    let pools: BTreeSet<&Name> = snapshot
        .vms
        .get(&of.vm)
        .into_iter()
        .flat_map(|vm| vm.spec.disks.iter())
        .filter(|disk| disk.name == of.disk)
        .map(|disk| &disk.pool)
        .collect();
    Err(match pools.first() {
        Some(pool) => ApiError::missing(&format!(
            "volume `{name}` with replicas (its disk is in the pool `{pool}`, or has no hosts yet)"
        )),
        None => ApiError::missing(&format!("volume `{name}`")),
    })
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
    let (of, volume) = known(&snapshot, name)?;
    Ok(Json(view(&snapshot, &of, volume)))
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

/// Tells another host what pieces of the replica here hold.
pub(super) async fn pieces(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
    Asked(which): Asked<Which>,
) -> ApiResult<Body> {
    if caller.who != A_HOST {
        let detail = format!("{} is no host of the cluster", caller.who);
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            detail,
            "`haven volume check` compares replicas",
        ));
    }
    let snapshot = state.snapshot();
    let (of, _) = known(&snapshot, &name)?;
    let told = state.local.pieces(&of, which.from, which.count.min(MOST_PIECES)).await;
    told.map(Body::from)
        .map_err(|why| conflict(why, "`haven volume show` tells how its replicas are"))
}
