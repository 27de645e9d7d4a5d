//! Mirrored volumes: on which hosts they are, and which of their replicas count.

use super::{
    ApiState,
    error::{ApiError, ApiResult},
};
use axum::{
    Json,
    extract::{Path, State},
};
use haven_model::{
    Name, Snapshot, Versioned,
    api::{ReplicaLine, VolumeView},
    volume::{ReplicaIs, ReplicaState, Volume, VolumeRef},
};
use std::collections::BTreeSet;

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
    }
}

/// All of them.
pub(super) async fn list(State(state): Api) -> Json<Vec<VolumeView>> {
    let snapshot = state.snapshot();
    Json(snapshot.volumes.iter().map(|(of, volume)| view(&snapshot, of, volume)).collect())
}

/// One of them.
pub(super) async fn show(
    State(state): Api,
    Path(name): Path<String>,
) -> ApiResult<Json<VolumeView>> {
    let snapshot = state.snapshot();
    let of = VolumeRef::parse(&name).ok_or_else(|| {
        ApiError::bad(format!("`{name}` is no volume"), "write VM.DISK, as `haven volume ls` does")
    })?;
    if let Some(volume) = snapshot.volumes.get(&of) {
        return Ok(Json(view(&snapshot, &of, volume)));
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
