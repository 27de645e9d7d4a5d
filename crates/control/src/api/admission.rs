//! Whether a change leaves enough free for the loss of hosts; decided by [`haven_plan::admit`], answered here.

use super::{
    ApiState,
    error::{ApiError, ApiResult},
};
use axum::http::StatusCode;
use haven_model::{AdmissionPolicy, Object, ObjectRef, Snapshot};

/// What is to be said of a change that is made all the same.
#[derive(Debug, Default)]
pub(super) struct Admitted {
    adds: Vec<ObjectRef>,
    why: String,
}

impl Admitted {
    /// What the answer says of one of the objects.
    pub fn warning(&self, object: &ObjectRef) -> String {
        if self.adds.contains(object) { self.why.clone() } else { String::new() }
    }
}

/// Asks for one object as it would be written, by what stands in the store now.
///
/// # Errors
/// As [`ask`]; 503 when the store does not answer.
pub(super) async fn ask_now(state: &ApiState, wanted: &Object) -> ApiResult<Admitted> {
    if wanted.meta().deleting || !matches!(wanted, Object::Vm(_) | Object::Service(_)) {
        return Ok(Admitted::default());
    }
    let snapshot = state.current().await?;
    ask(state, &snapshot, std::slice::from_ref(wanted))
}

/// Asks for objects as they would be written.
///
/// # Errors
/// 422 with the arithmetic, when the cluster's policy is to refuse what would use up the reserve.
pub(super) fn ask(state: &ApiState, snapshot: &Snapshot, wanted: &[Object]) -> ApiResult<Admitted> {
    let Some(much) = haven_plan::admit(snapshot, &(state.seen)(), wanted) else {
        return Ok(Admitted::default());
    };
    if snapshot.cluster_spec().admission == AdmissionPolicy::Warn {
        return Ok(Admitted { adds: much.adds, why: much.why });
    }
    let detail = format!("this is too much for the cluster, and nothing was changed: {}", much.why);
    let hint = "ask for less, stop what is not needed or add a host; `haven edit cluster` changes \
                `reservedHosts`, or `admission` to `warn`";
    Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, detail, hint))
}
