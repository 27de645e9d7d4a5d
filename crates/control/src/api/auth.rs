//! Who calls, and what they may. Roles are checked in one place, from the table of routes.

use super::{
    ApiState,
    error::{ApiError, ApiResult},
};
use argon2::{
    Algorithm, Argon2, Params, PasswordHash, PasswordHasher, PasswordVerifier, Version,
    password_hash::{SaltString, rand_core::OsRng},
};
use axum::http::{HeaderMap, StatusCode};
use haven_model::{Name, event::AuditEntry, keys};
use haven_store::raw::{Compare, Op};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::Semaphore;

/// What somebody may do; each may do what those before may.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Nobody: only what needs no token.
    Anyone,
    /// Look.
    Viewer,
    /// Change what runs.
    Operator,
    /// Everything.
    Admin,
}

/// Who calls.
#[derive(Clone, Debug)]
pub struct Caller {
    /// A token's name, `root on HOST`, or a host's name.
    pub who: String,
    /// What they may do.
    pub role: Role,
    /// An address, or `local`.
    pub from: String,
}

/// Who calls with a host's certificate. No token has such a name.
pub const A_HOST: &str = "a host of the cluster";

/// A token as it stands in the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenRecord {
    /// What it is for.
    pub role: Role,
    /// Whether it lets a host join; then it works once.
    #[serde(default)]
    pub join: bool,
    /// Argon2 hash of its secret.
    pub hash: String,
    /// When it ends, milliseconds since 1970.
    pub expires_ms: i64,
}

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn token_key(name: &str) -> String {
    format!("{}{name}", keys::TOKENS)
}

/// Makes a token `NAME.SECRET` and writes its hash.
///
/// # Errors
/// When the store does not take it.
pub async fn make_token(
    state: &ApiState,
    name: &Name,
    role: Role,
    join: bool,
    lifetime_ms: i64,
) -> ApiResult<(String, i64)> {
    let secret =
        uuid::Uuid::new_v4().simple().to_string() + &uuid::Uuid::new_v4().simple().to_string();
    let expires_ms = now_ms().saturating_add(lifetime_ms);
    let record = TokenRecord { role, join, hash: hash(&secret)?, expires_ms };
    let key = token_key(name.as_str());
    let value = serde_json::to_vec(&record).expect("a token is plain data");
    let outcome = state
        .store
        .txn(vec![Compare::Absent(key.clone())], vec![Op::Put(key, value.into())])
        .await?;
    if outcome.succeeded {
        Ok((format!("{name}.{secret}"), expires_ms))
    } else {
        Err(ApiError::new(
            StatusCode::CONFLICT,
            format!("there is a token `{name}` already"),
            "choose another name",
        ))
    }
}

/// Kibibytes and passes of a token's hash. They make guessing dear, and nobody guesses 244 random bits: the hash only
/// keeps who reads the store from using its tokens. More would be paid by every request, in time and in memory that the
/// daemon keeps.
const HASHED_OVER: (u32, u32) = (1024, 2);

fn hash(secret: &str) -> ApiResult<String> {
    let salt = SaltString::generate(&mut OsRng);
    let params = Params::new(HASHED_OVER.0, HASHED_OVER.1, 1, None);
    let hashed = params.map_err(Into::into).and_then(|params| {
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password(secret.as_bytes(), &salt)
            .map(|hash| hash.to_string())
    });
    hashed.map_err(|error: argon2::password_hash::Error| {
        let detail = format!("the token cannot be made ({error})");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, detail, "try again")
    })
}

fn denied(detail: &str) -> ApiError {
    ApiError::new(
        StatusCode::UNAUTHORIZED,
        detail,
        "make a token with `haven token create` on a host of the cluster",
    )
}

/// So many secrets are verified at a time.
static VERIFYING: Semaphore = Semaphore::const_new(2);

/// Takes some milliseconds of a CPU, so it must not hold up the threads on which this host renews its lease,
/// whoever sends however many tokens.
async fn verify(hash: String, secret: String) -> bool {
    let _turn = VERIFYING.acquire().await;
    let right = tokio::task::spawn_blocking(move || {
        PasswordHash::new(&hash)
            .is_ok_and(|hash| Argon2::default().verify_password(secret.as_bytes(), &hash).is_ok())
    });
    right.await.unwrap_or(false)
}

/// The record of a token, if its secret is right and it has not ended.
///
/// # Errors
/// 401 with the reason.
pub async fn check_token(state: &ApiState, token: &str) -> ApiResult<(String, TokenRecord)> {
    let (name, secret) = token.split_once('.').ok_or_else(|| denied("this is not a token"))?;
    let name = Name::new(name).map_err(|_| denied("this is not a token"))?;
    let record = state.store.get(&token_key(name.as_str())).await?;
    let record = record.ok_or_else(|| denied("this token does not exist or was used already"))?;
    let record: TokenRecord =
        serde_json::from_slice(&record.value).map_err(|_| denied("this token cannot be read"))?;
    if record.expires_ms < now_ms() {
        let when = jiff::Timestamp::from_millisecond(record.expires_ms).unwrap_or_default();
        let when = when.strftime("%Y-%m-%d at %H:%M UTC");
        return Err(denied(&format!("the token `{name}` expired on {when}")));
    }
    if verify(record.hash.clone(), secret.to_owned()).await {
        Ok((name.to_string(), record))
    } else {
        Err(denied("this token's secret is wrong"))
    }
}

/// Checks a join token and uses it up.
///
/// # Errors
/// 401 with the reason.
pub async fn use_join_token(state: &ApiState, token: &str) -> ApiResult<()> {
    let invite = |mut error: ApiError| {
        if error.0.status == StatusCode::UNAUTHORIZED.as_u16() {
            error.0.hint = "make one with `haven host invite` on a host of the cluster".into();
        }
        error
    };
    let (name, record) = check_token(state, token).await.map_err(invite)?;
    if !record.join {
        return Err(invite(denied("this token does not let a host join")));
    }
    let key = token_key(&name);
    let value = serde_json::to_vec(&record).expect("a token is plain data");
    let outcome = state
        .store
        .txn(vec![Compare::Value(key.clone(), value.into())], vec![Op::Delete(key)])
        .await?;
    if outcome.succeeded { Ok(()) } else { Err(invite(denied("this token was used already"))) }
}

/// The caller of a TLS request.
///
/// # Errors
/// 401 when a token is wrong.
pub async fn caller(
    state: &ApiState,
    headers: &HeaderMap,
    from: String,
    host: Option<String>,
) -> ApiResult<Caller> {
    if let Some(who) = host {
        return Ok(Caller { who, role: Role::Admin, from });
    }
    let bearer = headers
        .get("authorization")
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.strip_prefix("Bearer "));
    match bearer {
        None => Ok(Caller { who: "nobody".into(), role: Role::Anyone, from }),
        Some(token) => {
            let (who, record) = check_token(state, token).await?;
            let role = if record.join { Role::Anyone } else { record.role };
            Ok(Caller { who, role, from })
        }
    }
}

/// Writes a line of the audit log; a failure is logged, since the change itself is done.
pub async fn audit(state: &ApiState, caller: &Caller, what: String, outcome: String) {
    let entry = AuditEntry {
        id: uuid::Uuid::now_v7().to_string(),
        at_ms: now_ms(),
        who: caller.who.clone(),
        from: caller.from.clone(),
        what,
        outcome,
    };
    let key = format!("{}{}", keys::AUDIT, entry.id);
    let value = serde_json::to_vec(&entry).expect("an audit entry is plain data");
    if let Err(error) = state.store.txn(vec![], vec![Op::Put(key, value.into())]).await {
        tracing::warn!(%error, ?entry, "the audit log was not written");
    }
}

/// What a person did, as an event.
pub(super) fn event(
    host: &haven_model::ObjectRef,
    caller: &Caller,
    message: String,
) -> haven_store::raw::Op {
    let at_ms = now_ms();
    crate::manager::commit::put_event(&haven_model::Event {
        id: format!("{at_ms:014}-{}", uuid::Uuid::now_v7()),
        at_ms,
        object: host.clone(),
        severity: haven_model::Severity::Info,
        message,
        by: format!("user {}", caller.who),
    })
}
