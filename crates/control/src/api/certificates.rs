//! Certificates that people bring: checked before they are written, the key sealed, and what is said of them.
//!
//! A key comes in the clear once and is sealed before anything else happens to it; `sealed` in its place keeps the one
//! that is there. Nothing that leaves the API holds a key in any form.

use super::{
    ApiState,
    error::{ApiError, ApiResult},
};
use axum::http::StatusCode;
use haven_model::{
    CertificateSpec, Name, Object, ObjectRef, Snapshot,
    certificate::SEALED,
    manifest::{Manifest, Problem},
    object::{Kind, Stored},
};
use haven_plan::tolerance::removal::users;
use haven_store::{
    certificate::{CertificateError, Chain, Facts, Key},
    seal::{ClusterKey, Plain, SealError},
};
use std::collections::BTreeMap;

/// A certificate that ends within so many days is a risk.
const SOON_DAYS: i64 = 30;
const DAY_MS: i64 = 86_400_000;

/// What is wrong with one field.
struct Wrong {
    field: &'static str,
    message: String,
    hint: String,
}

impl Wrong {
    fn new(field: &'static str, message: impl Into<String>, hint: &str) -> Self {
        Self { field, message: message.into(), hint: hint.into() }
    }
}

impl From<CertificateError> for Wrong {
    fn from(error: CertificateError) -> Self {
        let (field, hint) = match &error {
            CertificateError::KeyInChain => ("chain", "the private key goes into `key` alone"),
            CertificateError::NoCertificate | CertificateError::Unreadable { .. } => {
                ("chain", "give PEM: `-----BEGIN CERTIFICATE-----`, its own certificate first")
            }
            CertificateError::Order { .. } => {
                ("chain", "its own certificate comes first, then the one that signed it, and so on")
            }
            CertificateError::Passphrase => {
                ("key", "`openssl pkey -in FILE -out NEW` writes it without one")
            }
            CertificateError::OtherKey { .. } => {
                ("key", "give the key with which that certificate was requested")
            }
            CertificateError::UnusableKey { .. } => {
                ("key", "use RSA of 2048 bits or more, ECDSA P-256, P-384 or P-521, or Ed25519")
            }
            _ => (
                "key",
                "give PEM: `-----BEGIN PRIVATE KEY-----`, or `sealed` to keep the one there",
            ),
        };
        Self::new(field, error.to_string(), hint)
    }
}

/// What is wrong with the certificates among manifests.
pub(super) fn problems(
    state: &ApiState,
    manifests: &[Manifest],
    snapshot: &Snapshot,
    now_ms: i64,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    for manifest in manifests {
        let Object::Certificate(certificate) = &manifest.object else { continue };
        let old = snapshot.certificates.get(&certificate.meta.name);
        let old = old.map(|old| &old.spec);
        let checked = check(state.secrets.as_ref(), certificate, old, now_ms);
        if let Err(Wrong { field, message, hint }) = checked {
            problems.push(manifest.problem_at(field, "", message, &hint));
        }
    }
    problems
}

fn reference(name: &Name) -> ObjectRef {
    ObjectRef::new(Kind::Certificate, name.clone())
}

fn check(
    secrets: Option<&ClusterKey>,
    new: &Stored<CertificateSpec>,
    old: Option<&CertificateSpec>,
    now_ms: i64,
) -> Result<(), Wrong> {
    let name = &new.meta.name;
    let chain = Chain::read(&new.spec.chain)?;
    let key = match (new.spec.key.trim(), old) {
        (SEALED, None) => {
            let message = format!("`key` is `{SEALED}`, and there is no certificate `{name}` yet");
            return Err(Wrong::new("key", message, "give the private key itself, PEM"));
        }
        (SEALED, Some(old)) => {
            // The same chain with the same key was checked when it came.
            if old.chain == new.spec.chain {
                return Ok(());
            }
            let kept = secrets.map(|secrets| secrets.open(&reference(name), &old.key));
            match kept {
                Some(Ok(plain)) => Key::read(&plain)?,
                Some(Err(error)) => {
                    return Err(Wrong::new("key", error.to_string(), "give the private key again"));
                }
                None => {
                    let message = "this host cannot open the key that is there";
                    return Err(Wrong::new("key", message, "give the private key again"));
                }
            }
        }
        _ => Key::read(&Plain::new(new.spec.key.clone()))?,
    };
    key.belongs_to(&chain)?;
    // One that has ended since it came can still be applied with all else of its file.
    let ended = chain.facts().ends_ms <= now_ms;
    if ended && old.is_none_or(|old| old.chain != new.spec.chain) {
        let message = format!(
            "the certificate of `{}` ended on {}",
            chain.facts().subject,
            day(chain.facts().ends_ms)
        );
        return Err(Wrong::new("chain", message, "give the one that was issued after it"));
    }
    Ok(())
}

/// Seals the key of a certificate that passed [`problems`], or keeps the sealed one of `old` where it is the same.
///
/// # Errors
/// 503 on a host that has no key to seal it under.
pub(super) fn seal(state: &ApiState, object: &mut Object, old: Option<&Object>) -> ApiResult<()> {
    let Object::Certificate(new) = object else { return Ok(()) };
    let old = match old {
        Some(Object::Certificate(old)) => Some(&old.spec.key),
        _ => None,
    };
    if let (SEALED, Some(old)) = (new.spec.key.trim(), old) {
        new.spec.key.clone_from(old);
        return Ok(());
    }
    let reference = reference(&new.meta.name);
    let unable = |why: String| {
        let hint = "the log of this host's daemon says more; another host can do it";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why, hint)
    };
    let missing = || unable("this host has no key under which secrets are sealed".into());
    let secrets = state.secrets.as_ref().ok_or_else(missing)?;
    // It was read once already, when it was checked.
    let key = Key::read(&Plain::new(new.spec.key.clone()));
    let key = key.map_err(|error| ApiError::bad(error.to_string(), "give PEM"))?;
    let same = old.filter(|old| {
        let opened = secrets.open(&reference, old).ok();
        opened.and_then(|old| Key::read(&old).ok()).is_some_and(|old| old == key)
    });
    new.spec.key = match same {
        Some(old) => old.clone(),
        None => secrets
            .seal(&reference, &key.pem())
            .map_err(|error: SealError| unable(error.to_string()))?,
    };
    Ok(())
}

/// A day, UTC.
fn day(at_ms: i64) -> String {
    let time = jiff::Timestamp::from_millisecond(at_ms);
    time.map(|time| time.strftime("%Y-%m-%d").to_string()).unwrap_or_default()
}

/// In words, until when one is good.
fn validity(facts: &Facts, now_ms: i64) -> String {
    let left = facts.ends_ms - now_ms;
    match left / DAY_MS {
        _ if left <= 0 => "ended".into(),
        _ if facts.begins_ms > now_ms => format!("begins on {}", day(facts.begins_ms)),
        0 => "ends today".into(),
        1 => "ends in 1 day".into(),
        days if days <= SOON_DAYS => format!("ends in {days} days"),
        _ => "valid".into(),
    }
}

/// Its state in words; what it says of itself, and who uses it, become columns.
pub(super) fn describe(
    snapshot: &Snapshot,
    of: &Stored<CertificateSpec>,
    now_ms: i64,
    columns: &mut BTreeMap<String, String>,
) -> String {
    let used = users(snapshot, Kind::Certificate, &of.meta.name);
    columns.insert("used-by".into(), used.join(","));
    let chain = match Chain::read(&of.spec.chain) {
        Ok(chain) => chain,
        Err(error) => return error.to_string(),
    };
    let facts = chain.facts();
    columns.insert("subject".into(), facts.subject.clone());
    columns.insert("names".into(), facts.names.join(","));
    columns.insert("issuer".into(), facts.issuer.clone());
    columns.insert("ends".into(), day(facts.ends_ms));
    columns.insert("fingerprint".into(), chain.fingerprint());
    validity(facts, now_ms)
}

/// The certificates that services use and that end soon, or have ended, a sentence each.
pub(super) fn risks(snapshot: &Snapshot, now_ms: i64) -> Vec<String> {
    let risk = |name: &Name, spec: &CertificateSpec| {
        let users = users(snapshot, Kind::Certificate, name);
        if users.is_empty() {
            return None;
        }
        let (of, chain) = (users.join(" and "), Chain::read(&spec.chain).ok()?);
        let facts = chain.facts();
        let ends = day(facts.ends_ms);
        let left = facts.ends_ms - now_ms;
        if left > SOON_DAYS * DAY_MS {
            return None;
        }
        let when = if left <= 0 {
            format!("ended on {ends}, and clients refuse it")
        } else {
            format!("{} ({ends})", validity(facts, now_ms))
        };
        Some(format!(
            "certificate {name} of {of} {when}: replace it with `haven certificate add {name} --chain FILE --key FILE`"
        ))
    };
    snapshot.certificates.iter().filter_map(|(name, of)| risk(name, &of.spec)).collect()
}
