//! Rehearsals: what would happen, by the plan's own code on the live copy. Nothing is written.

use super::{
    ApiState,
    body::{Asked, At},
    error::{ApiError, ApiResult},
};
use axum::{Json, extract::State};
use haven_model::{Name, Snapshot, api::Rehearsal};
use haven_plan::Event;
use schemars::JsonSchema;
use serde::Deserialize;
use std::collections::BTreeSet;

/// Which hosts.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Hosts {
    /// Their names, with commas between them; one for `drain`.
    hosts: String,
}

/// Plays what is asked for.
pub(super) async fn rehearse(
    State(state): State<ApiState>,
    At(what): At<String>,
    Asked(asked): Asked<Hosts>,
) -> ApiResult<Json<Rehearsal>> {
    let snapshot = state.current().await?;
    let hosts = named(&snapshot, &asked.hosts)?;
    let one = hosts.first().cloned().filter(|_| hosts.len() == 1);
    let event = match (what.as_str(), one) {
        ("fail", _) => Event::Fail(hosts),
        ("drain", Some(host)) => Event::Drain(host),
        ("drain", None) => {
            let detail = "one host is drained at a time in a rehearsal";
            return Err(ApiError::bad(detail, "name one host"));
        }
        (other, _) => {
            let detail = format!("`{other}` cannot be rehearsed");
            return Err(ApiError::bad(detail, "`fail` and `drain` can be"));
        }
    };
    let seen = (state.seen)();
    // Many rounds of planning: they keep no other request waiting.
    let played =
        tokio::task::spawn_blocking(move || haven_plan::rehearse(&snapshot, &seen, &event));
    let played = played.await.map_err(|error| {
        tracing::error!(%error, "a rehearsal has failed");
        let (detail, hint) = ("the rehearsal has failed", "please report it with this host's log");
        ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, detail, hint)
    })?;
    Ok(Json(played))
}

/// Hosts of the cluster by their names.
fn named(snapshot: &Snapshot, names: &str) -> ApiResult<BTreeSet<Name>> {
    let mut hosts = BTreeSet::new();
    for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let known: Vec<&str> = snapshot.hosts.keys().map(Name::as_str).collect();
        if !known.contains(&name) {
            let hint = format!("there are: {}", known.join(", "));
            return Err(ApiError::bad(format!("there is no host `{name}`"), hint));
        }
        hosts.insert(Name::new(name)?);
    }
    if hosts.is_empty() {
        return Err(ApiError::bad(
            "no host is named",
            "name at least one, as in `hosts=host1,host2`",
        ));
    }
    Ok(hosts)
}
