//! How even the load of hosts is: looked at, and evened out when somebody asks.

use super::{
    ApiState,
    auth::{Caller, now_ms},
    error::{ApiError, ApiResult},
    migrations,
};
use axum::{Extension, Json, extract::State, http::StatusCode};
use haven_model::{
    Migration, MigrationOptions, RebalancePolicy, Snapshot, api::Balance, api::BalancingMove,
};
use haven_store::raw::{Compare, Op};

/// The loads, and the moves that would help.
pub(super) async fn show(State(state): State<ApiState>) -> ApiResult<Json<Balance>> {
    look(&state).await.map(|(_, balance)| Json(balance))
}

/// Begins these moves, whatever the policy.
pub(super) async fn rebalance(
    State(state): State<ApiState>,
    Extension(caller): Extension<Caller>,
) -> ApiResult<Json<Balance>> {
    let (snapshot, balance) = look(&state).await?;
    let conflict =
        |detail: String, hint: &str| Err(ApiError::new(StatusCode::CONFLICT, detail, hint));
    if balance.policy == RebalancePolicy::Off {
        let hint = "write `rebalance: advise` or `auto` with `haven edit cluster`";
        return conflict("loads are not measured, because `rebalance` is off".into(), hint);
    }
    if let Some(why) = balance.held {
        return conflict(why, "ask again once that is over");
    }
    let asked = balance.moves.iter().map(|of| begin(&snapshot, of, &caller.who));
    let (compares, ops): (Vec<_>, Vec<_>) = asked.unzip();
    let compares = compares.into_iter().flatten().collect();
    if !ops.is_empty() && !state.store.txn(compares, ops).await?.succeeded {
        return Err(ApiError::busy("the balance of the cluster"));
    }
    Ok(Json(balance))
}

async fn look(state: &ApiState) -> ApiResult<(std::sync::Arc<Snapshot>, Balance)> {
    let snapshot = state.current().await?;
    let seen = (state.seen)();
    let of = std::sync::Arc::clone(&snapshot);
    // Several rounds of planning: they keep no other request waiting.
    let balance = tokio::task::spawn_blocking(move || haven_plan::balance(&of, &seen)).await;
    let balance = balance.map_err(|error| {
        tracing::error!(%error, "the balance could not be looked at");
        let hint = "please report it with this host's log";
        let detail = "the balance could not be looked at";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, detail, hint)
    })?;
    Ok((snapshot, balance))
}

/// The record of one move, over what was read.
fn begin(snapshot: &Snapshot, of: &BalancingMove, who: &str) -> (Vec<Compare>, Op) {
    let migration = Migration {
        id: uuid::Uuid::now_v7().to_string(),
        from: of.from.clone(),
        to: Some(of.to.clone()),
        options: MigrationOptions::default(),
        by: who.to_owned(),
        at_ms: now_ms(),
        drain: None,
        balances: true,
        outcome: None,
    };
    migrations::wanted(snapshot, &of.vm, &migration)
}
