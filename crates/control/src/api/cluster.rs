//! The spec of the cluster as a whole: its timers, its fencing policy, its voters.

use super::{
    ApiState,
    body::Given,
    error::{ApiError, ApiResult},
};
use axum::{Json, extract::State, http::StatusCode};
use haven_model::{ClusterSpec, ProofKind, api::ClusterItem, host::SHUTS, keys, manifest::Problem};
use haven_plan::tolerance::migration::speaks_less;
use haven_store::raw::{Compare, Op};

async fn read(state: &ApiState) -> ApiResult<ClusterItem> {
    let missing = || ApiError::missing("cluster spec");
    let record = state.store.get(keys::CLUSTER).await?.ok_or_else(missing)?;
    let spec: ClusterSpec = serde_json::from_slice(&record.value).map_err(|error| {
        let detail = format!("the cluster's spec in the store cannot be read: {error}");
        let hint = "a newer Haven may have written it: bring all hosts to one version";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, detail, hint)
    })?;
    Ok(ClusterItem { resource_version: record.mod_revision, spec })
}

/// The spec with its version.
pub(super) async fn get(State(state): State<ApiState>) -> ApiResult<Json<ClusterItem>> {
    read(&state).await.map(Json)
}

/// Puts a spec over the version that the writer saw, unless something is wrong with it.
pub(super) async fn replace(
    State(state): State<ApiState>,
    Given(given): Given<ClusterItem>,
) -> ApiResult<Json<ClusterItem>> {
    let before = read(&state).await?;
    let mut wrong = given.spec.problems();
    wrong.extend(unknown_proof(&state, &before.spec, &given.spec));
    let problems: Vec<Problem> = wrong.into_iter().map(problem).collect();
    if !problems.is_empty() {
        return Err(ApiError::manifests(problems));
    }
    let conflict = |now| ApiError::conflict("cluster", given.resource_version, now);
    let now = before.resource_version;
    if now != given.resource_version {
        return Err(conflict(now));
    }
    let compare = vec![Compare::ModRevision(keys::CLUSTER.into(), now)];
    let value = crate::manager::commit::json(&given.spec);
    let write = vec![Op::Put(keys::CLUSTER.into(), value.into())];
    let outcome = state.store.txn(compare, write).await?;
    if !outcome.succeeded {
        return Err(conflict(read(&state).await?.resource_version));
    }
    Ok(Json(ClusterItem { resource_version: outcome.revision, spec: given.spec }))
}

/// An older Haven could not read a spec that names a proof which it does not know.
fn unknown_proof(state: &ApiState, before: &ClusterSpec, spec: &ClusterSpec) -> Option<String> {
    let names = |spec: &ClusterSpec| spec.fencing.contains(&ProofKind::StorageFenced);
    let named = names(spec) && !names(before);
    let live = state.live.borrow();
    let host = speaks_less(&live, SHUTS).filter(|_| named)?;
    Some(format!(
        "`fencing` names storage-fenced, and {host} has not said that it knows what that is: wait until all hosts are up and upgraded"
    ))
}

/// A sentence about the spec; it came in no file.
fn problem(message: String) -> Problem {
    let hint = "the cluster keeps the spec that it has".into();
    Problem { file: "request".into(), line: 0, column: 0, message, hint }
}
