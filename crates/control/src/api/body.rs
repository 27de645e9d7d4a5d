//! What comes with a request: JSON bodies, query parameters, the names in a path. What cannot be read is answered
//! with a problem that names the place.

use super::error::{ApiError, ApiResult};
use axum::{
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{StatusCode, request::Parts},
};
use futures::TryStreamExt;
use haven_model::{
    Object,
    manifest::Problem,
    object::{Kind, Meta, Stored},
};
use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};

/// The largest JSON body that is read, bytes. Manifests are at most 1 MiB, and JSON may write a byte as two or more.
pub const LARGEST_BODY: usize = 4 << 20;
/// So much of a body that is too large is taken in and thrown away, so that its sender gets to read the answer.
const DISCARDED: usize = 64 << 20;

async fn read(request: Request) -> ApiResult<Vec<u8>> {
    let mut frames = request.into_body().into_data_stream();
    let (mut body, mut size) = (Vec::new(), 0);
    let ended = |error| ApiError::bad(format!("the body ended early ({error})"), "send it again");
    while size <= DISCARDED
        && let Some(frame) = frames.try_next().await.map_err(ended)?
    {
        size += frame.len();
        if size <= LARGEST_BODY {
            body.extend_from_slice(&frame);
        }
    }
    if size <= LARGEST_BODY {
        return Ok(body);
    }
    let detail = format!("the body is too large: at most {} MiB are read", LARGEST_BODY >> 20);
    let hint = "apply manifests in several steps; images are imported with `haven image import`";
    Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, detail, hint))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> ApiResult<T> {
    serde_json::from_slice(body).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        let full = error.to_string();
        let place = format!(" at line {line} column {column}");
        let message = full.strip_suffix(&place).unwrap_or(&full).to_owned();
        let status = if error.is_data() {
            StatusCode::UNPROCESSABLE_ENTITY
        } else {
            StatusCode::BAD_REQUEST
        };
        let detail = format!("the body cannot be read: line {line}, column {column}: {message}");
        let hint = "docs/openapi.json describes the body of every request";
        let mut refused = ApiError::new(status, detail, hint);
        refused.0.problems = vec![Problem {
            file: "body".into(),
            line: line as u64,
            column: column as u64,
            message,
            hint: String::new(),
        }];
        refused
    })
}

/// A JSON body.
pub struct Given<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Given<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request, _: &S) -> ApiResult<Self> {
        parse(&read(request).await?).map(Self)
    }
}

/// An object with the version that the writer saw. Read in two passes over the same text (its kind, then the rest as
/// that kind), since that alone keeps the place of what is wrong.
pub struct GivenItem {
    /// The object.
    pub object: Object,
    /// The version.
    pub resource_version: i64,
}

#[derive(Deserialize)]
struct Head {
    kind: Kind,
}

/// [`haven_model::api::Item`] of one kind. What is seen of an object may stand there and is not read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Whole<S> {
    #[serde(rename = "kind")]
    _kind: IgnoredAny,
    resource_version: i64,
    meta: Meta,
    spec: S,
    #[serde(default, rename = "state")]
    _state: IgnoredAny,
    #[serde(default, rename = "host")]
    _host: IgnoredAny,
    #[serde(default, rename = "columns")]
    _columns: IgnoredAny,
    #[serde(default, rename = "warning")]
    _warning: IgnoredAny,
}

fn whole<S: DeserializeOwned>(body: &[u8], of: fn(Stored<S>) -> Object) -> ApiResult<GivenItem> {
    let whole: Whole<S> = parse(body)?;
    let object = of(Stored { meta: whole.meta, spec: whole.spec });
    Ok(GivenItem { object, resource_version: whole.resource_version })
}

impl<S: Send + Sync> FromRequest<S> for GivenItem {
    type Rejection = ApiError;
    async fn from_request(request: Request, _: &S) -> ApiResult<Self> {
        let body = read(request).await?;
        match parse::<Head>(&body)?.kind {
            Kind::Host => whole(&body, Object::Host),
            Kind::Pool => whole(&body, Object::Pool),
            Kind::Image => whole(&body, Object::Image),
            Kind::Network => whole(&body, Object::Network),
            Kind::Certificate => whole(&body, Object::Certificate),
            Kind::Target => whole(&body, Object::Target),
            Kind::Vm => whole(&body, Object::Vm),
            Kind::Service => whole(&body, Object::Service),
        }
    }
}

/// Query parameters.
pub struct Asked<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> ApiResult<Self> {
        let asked = Query::<T>::from_request_parts(parts, state).await;
        let hint = "docs/openapi.json lists the parameters of every path";
        asked
            .map(|Query(asked)| Self(asked))
            .map_err(|error| ApiError::bad(error.body_text(), hint))
    }
}

/// The names in a path.
pub struct At<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for At<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> ApiResult<Self> {
        let at = Path::<T>::from_request_parts(parts, state).await;
        let hint = "docs/openapi.json describes every path";
        at.map(|Path(at)| Self(at)).map_err(|error| ApiError::bad(error.body_text(), hint))
    }
}
