//! Drains: a host is emptied, that is looked at, and ended. What moves, and where to, is the plan's to decide.

use super::{
    ApiState,
    auth::{Caller, event, now_ms},
    body::{Asked, At},
    error::{ApiError, ApiResult},
};
use crate::manager::commit::json;
use axum::{Extension, Json, extract::State, http::StatusCode};
use haven_model::{
    Drain, Name, ObjectRef, Snapshot, Versioned, api::DrainView, keys, maintenance::Phase,
    object::Kind,
};
use haven_plan::tolerance::drain::view;
use haven_store::raw::{Compare, Op};
use schemars::JsonSchema;
use serde::Deserialize;

type Api = State<ApiState>;

/// Whether what a drain moved comes back.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct BringBack {
    /// Bring back live what the drain moved and what is still where it put it; not when absent.
    bring_back: Option<bool>,
}

/// A host that is there, and the drain of it.
fn host_of(snapshot: &Snapshot, name: &str) -> ApiResult<(ObjectRef, Option<Versioned<Drain>>)> {
    let name =
        Name::new(name).map_err(|error| ApiError::bad(error.to_string(), "check the name"))?;
    if !snapshot.hosts.contains_key(&name) {
        return Err(ApiError::missing(&format!("host `{name}`")));
    }
    let key = format!("drains/{name}");
    if snapshot.unreadable.contains_key(&key) {
        let detail = format!("the record {key} cannot be read by this version of Haven");
        let hint = "a newer Haven wrote it: ask another host with `--context`, or update this one";
        return Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, detail, hint));
    }
    let drain = snapshot.drains.get(&name).cloned();
    Ok((ObjectRef::new(Kind::Host, name), drain))
}

/// Writes over the record that was read; the view afterwards.
async fn write(
    state: &ApiState,
    snapshot: &Snapshot,
    host: &ObjectRef,
    was: Option<&Versioned<Drain>>,
    ops: Vec<Op>,
) -> ApiResult<Json<DrainView>> {
    let key = keys::drain(&host.name);
    let host_revision = snapshot.hosts.get(&host.name).map_or(0, |host| host.revision);
    let compare = was.map_or_else(
        || Compare::Absent(key.clone()),
        |was| Compare::ModRevision(key.clone(), was.revision),
    );
    // A drain of a host that is removed meanwhile would stay for ever.
    let there = Compare::ModRevision(keys::object(host), host_revision);
    if !state.store.txn(vec![compare, there], ops).await?.succeeded {
        return Err(ApiError::busy(&host.to_string()));
    }
    let snapshot = state.current().await?;
    Ok(Json(view(&snapshot, &(state.seen)(), &host.name)))
}

/// Asks for a host to be emptied. One that is drained already stays as it is.
pub(super) async fn drain(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
) -> ApiResult<Json<DrainView>> {
    let snapshot = state.current().await?;
    let (host, was) = host_of(&snapshot, &name)?;
    if was.as_ref().is_some_and(|was| !was.bringing_back) {
        return Ok(Json(view(&snapshot, &(state.seen)(), &host.name)));
    }
    let drain = Drain {
        id: uuid::Uuid::now_v7().to_string(),
        by: caller.who.clone(),
        at_ms: now_ms(),
        drained_ms: None,
        bringing_back: false,
    };
    let said =
        format!("{} is to be drained: it takes nothing new, and what runs there leaves", host.name);
    let put = Op::Put(keys::drain(&host.name), json(&drain).into());
    let ops = vec![put, event(&host, &caller, said)];
    write(&state, &snapshot, &host, was.as_ref(), ops).await
}

/// How the drain of a host stands.
pub(super) async fn show(State(state): Api, At(name): At<String>) -> ApiResult<Json<DrainView>> {
    let snapshot = state.current().await?;
    let (host, _) = host_of(&snapshot, &name)?;
    Ok(Json(view(&snapshot, &(state.seen)(), &host.name)))
}

/// Ends a drain.
pub(super) async fn undrain(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
    Asked(asked): Asked<BringBack>,
) -> ApiResult<Json<DrainView>> {
    let snapshot = state.current().await?;
    let (host, was) = host_of(&snapshot, &name)?;
    let was = was.ok_or_else(|| ApiError::missing(&format!("drain of {host}")))?;
    let work = snapshot.maintenance.as_ref().filter(|of| {
        let turn = of.turn().filter(|turn| turn.host == host.name && of.stopped.is_none());
        turn.is_some_and(|turn| matches!(turn.phase, Phase::Draining | Phase::Working))
    });
    if let Some(of) = work {
        let detail = format!("{} is drained for its {}, which is under way", host.name, of.work);
        let hint = "`haven host maintenance --end` ends that first";
        return Err(ApiError::new(StatusCode::CONFLICT, detail, hint));
    }
    let key = keys::drain(&host.name);
    let back = asked.bring_back.unwrap_or(false);
    if back && was.bringing_back {
        return Ok(Json(view(&snapshot, &(state.seen)(), &host.name)));
    }
    let (op, said) = if back {
        let drain = Drain { bringing_back: true, ..(*was.value).clone() };
        let said = format!("the drain of {} was ended, and what it moved comes back", host.name);
        (Op::Put(key, json(&drain).into()), said)
    } else {
        let said = format!("the drain of {} was ended: it takes VMs again", host.name);
        (Op::Delete(key), said)
    };
    let ops = vec![op, event(&host, &caller, said)];
    write(&state, &snapshot, &host, Some(&was), ops).await
}
