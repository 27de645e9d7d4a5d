//! Errors of the API.

use axum::{
    Json,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use haven_model::{
    ModelError,
    api::{Conflict, ProblemBody},
    manifest::Problem,
};
use haven_store::raw::StoreError;
use std::error::Error;

/// An answer that says what is wrong.
#[derive(Debug)]
pub struct ApiError(pub Box<ProblemBody>);

/// What every handler returns.
pub type ApiResult<T> = Result<T, ApiError>;

/// As things are it cannot be done; with what is in the way, and what a person can do.
pub(super) fn conflict(detail: String, hint: &str) -> ApiError {
    ApiError::new(StatusCode::CONFLICT, detail, hint)
}

impl ApiError {
    /// With a status, a sentence and what to do.
    #[must_use]
    pub fn new(status: StatusCode, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self(Box::new(ProblemBody {
            title: status.canonical_reason().unwrap_or("error").to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            hint: hint.into(),
            problems: Vec::new(),
            conflict: None,
        }))
    }

    /// 400.
    #[must_use]
    pub fn bad(detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail, hint)
    }

    /// 404.
    #[must_use]
    pub fn missing(what: &str) -> Self {
        let hint = "list what there is with `haven get KIND`";
        Self::new(StatusCode::NOT_FOUND, format!("there is no {what}"), hint)
    }

    /// 422 with everything that is wrong with manifests.
    #[must_use]
    pub fn manifests(problems: Vec<Problem>) -> Self {
        let detail = match problems.len() {
            1 => "one thing is wrong with the manifests; nothing was changed".to_owned(),
            n => format!("{n} things are wrong with the manifests; nothing was changed"),
        };
        let mut error = Self::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            detail,
            "mend all of them, then apply again",
        );
        error.0.problems = problems;
        error
    }

    /// 409: somebody else changed it meanwhile. Version 0 stands for an object that is not there.
    #[must_use]
    pub fn conflict(what: &str, given: i64, now: i64) -> Self {
        let detail = match (given, now) {
            (0, now) => format!("{what} was made by somebody else meanwhile, at version {now}"),
            (given, 0) => format!("{what} was removed meanwhile: you saw version {given}"),
            (given, now) => {
                format!("{what} was changed meanwhile: you saw version {given}, it is at {now}")
            }
        };
        let mut error =
            Self::new(StatusCode::CONFLICT, detail, "read it again and repeat your change");
        error.0.conflict = Some(Conflict { object: what.to_owned(), given, now });
        error
    }

    /// 409: others were quicker again and again.
    #[must_use]
    pub fn busy(what: &str) -> Self {
        let detail = format!("others keep changing {what}, so that this change was not made");
        Self::new(StatusCode::CONFLICT, detail, "try again in a moment")
    }
}

impl From<ModelError> for ApiError {
    fn from(error: ModelError) -> Self {
        Self::bad(error.to_string(), "a path looks like /v1/objects/vm/web-1")
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let why = error.source().map(ToString::to_string).unwrap_or_default();
        tracing::warn!(%error, why, "the store did not do what the API asked");
        let hint = match &error {
            StoreError::Refused { .. } => "the log of this host's daemon says why",
            _ => "`haven status` tells whether the cluster has a quorum",
        };
        Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string(), hint)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, [(header::CONTENT_TYPE, "application/problem+json")], Json(self.0)).into_response()
    }
}
