//! What a host that cannot renew asks of this one. It touches no store: that is what is stuck.

use super::{
    ApiState,
    auth::{A_HOST, Caller},
    body::Asked,
    error::{ApiError, ApiResult},
};
use axum::{Extension, Json, extract::State, http::StatusCode};
use haven_model::failsafe::{PromiseAnswer, PromiseQuestion};

/// Promises not to close the asker's session for a while, or says why not.
pub(super) async fn promise(
    State(state): State<ApiState>,
    Extension(caller): Extension<Caller>,
    Asked(question): Asked<PromiseQuestion>,
) -> ApiResult<Json<PromiseAnswer>> {
    if caller.who != A_HOST {
        let detail = format!("{} is no host of the cluster", caller.who);
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            detail,
            "only hosts ask this of each other",
        ));
    }
    Ok(Json(state.promises.answer(&question, &state.snapshot())))
}
