//! Power control of hosts: what people write of it, its password sealed, and whether it would work.
//!
//! A password comes in the clear once and is sealed before anything else happens to it. `sealed` in its place, or
//! nothing, keeps the one that is there, as long as all else stays: whoever may write a spec could have it sent to an
//! address of their own otherwise.

use super::{
    ApiState,
    body::At,
    error::{ApiError, ApiResult},
};
use axum::{Json, extract::State, http::StatusCode};
use futures::{StreamExt, stream};
use haven_model::{
    HostSpec, Name, Object, ObjectRef, PowerProblem, PowerSpec, Snapshot,
    certificate::SEALED,
    manifest::{Manifest, Problem},
    object::Kind,
    power::{FenceTest, PowerReading},
};
use haven_store::seal::{Plain, is_sealed};
use std::{net::Ipv4Addr, time::Instant};

/// So many hosts are asked at most whether they reach a controller, the manager first: it has few connections to give.
const MOST: usize = 8;

/// Whether a spec leaves the password that is there.
fn keeps(password: &str) -> bool {
    password.is_empty() || password.trim() == SEALED
}

/// What is wrong with the power control among manifests.
pub(super) fn problems(manifests: &[Manifest], snapshot: &Snapshot) -> Vec<Problem> {
    let mut problems = Vec::new();
    for manifest in manifests {
        let Object::Host(host) = &manifest.object else { continue };
        let old = snapshot.hosts.get(&host.meta.name).and_then(|old| old.spec.power.as_ref());
        let Some(new) = &host.spec.power else { continue };
        let mut say = |field: &str, message: String, hint: &str| {
            problems.push(manifest.problem_at(field, "", message, hint));
        };
        // What an earlier version let in stays until it is changed.
        if old.is_none_or(|old| !old.same_place(new)) {
            new.problems().into_iter().for_each(|(field, what, hint)| say(field, what, hint));
        }
        if let Some((what, hint)) = password_problem(new, old) {
            say("password", what, hint);
        }
    }
    problems
}

fn password_problem(new: &PowerSpec, old: Option<&PowerSpec>) -> Option<(String, &'static str)> {
    if is_sealed(&new.password) {
        let what = "a password that begins with `sealed:` cannot be told from a sealed one";
        return Some((what.into(), "give the password itself, or `sealed` to keep the one there"));
    }
    if !keeps(&new.password) {
        return None;
    }
    match old.filter(|old| !old.password.is_empty()) {
        Some(old) if !old.same_place(new) => Some((
            "the password that is there belongs to the power control as it was, and does not go elsewhere".into(),
            "give the password again; to have none, apply the host without `power` first",
        )),
        None if !new.password.is_empty() => Some((
            format!("`password` is `{SEALED}`, and there is none yet"),
            "give the password itself",
        )),
        _ => None,
    }
}

/// Seals the password of a host that passed [`problems`], or keeps the one of `old` where it is the same. One that an
/// earlier version left in the clear is sealed along the way.
///
/// # Errors
/// 503 on a host that has no key to seal it under.
pub(super) fn seal(state: &ApiState, object: &mut Object, old: Option<&Object>) -> ApiResult<()> {
    let reference = object.reference();
    let Object::Host(new) = object else { return Ok(()) };
    let Some(new) = &mut new.spec.power else { return Ok(()) };
    let old = match old {
        Some(Object::Host(old)) => old.spec.power.as_ref(),
        _ => None,
    };
    let there = old.map(|old| old.password.as_str()).filter(|password| !password.is_empty());
    if keeps(&new.password) {
        let kept = there.unwrap_or_default();
        new.password = kept.to_owned();
        if kept.is_empty() || is_sealed(kept) || state.secrets.is_none() {
            return Ok(());
        }
    }
    let unable = |why: String| {
        let hint = "the log of this host's daemon says more; another host can do it";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why, hint)
    };
    let missing = || unable("this host has no key under which secrets are sealed".into());
    let secrets = state.secrets.as_ref().ok_or_else(missing)?;
    let same = there.filter(|there| {
        secrets.open(&reference, there).is_ok_and(|plain| plain.expose() == new.password)
    });
    new.password = match same {
        Some(there) => there.to_owned(),
        None => secrets
            .seal(&reference, &Plain::new(new.password.clone()))
            .map_err(|error| unable(error.to_string()))?,
    };
    Ok(())
}

/// A host with its power control.
async fn controlled(
    state: &ApiState,
    name: &str,
) -> ApiResult<(std::sync::Arc<Snapshot>, Name, PowerSpec)> {
    let host = Name::new(name)?;
    let snapshot = state.current().await?;
    let of = |spec: &HostSpec| {
        let hint = format!(
            "put it under `power:` with `haven edit host/{host}`; docs/guide/fencing.md says how"
        );
        let none = || {
            ApiError::new(
                StatusCode::CONFLICT,
                format!("nothing controls the power of {host}"),
                hint,
            )
        };
        spec.power.clone().ok_or_else(none)
    };
    let missing = || ApiError::missing(&ObjectRef::new(Kind::Host, host.clone()).to_string());
    let power = of(&snapshot.hosts.get(&host).ok_or_else(missing)?.spec)?;
    Ok((snapshot, host, power))
}

fn manager(snapshot: &Snapshot) -> Option<&Name> {
    snapshot.manager.as_ref().map(|record| &record.holder)
}

async fn reading(
    state: &ApiState,
    host: &Name,
    power: &PowerSpec,
    snapshot: &Snapshot,
) -> PowerReading {
    let begin = Instant::now();
    let answer = state.power.state(host, power).await;
    let took_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
    let (read, problem) = match answer {
        Ok(read) => (Some(read), None),
        Err(problem) => (None, Some(problem)),
    };
    let manages = manager(snapshot) == Some(&state.me);
    PowerReading { from: state.me.clone(), manages, state: read, problem, took_ms }
}

/// Reads a host's power from this one.
pub(super) async fn read(
    State(state): State<ApiState>,
    At(name): At<String>,
) -> ApiResult<Json<PowerReading>> {
    let (snapshot, host, power) = controlled(&state, &name).await?;
    Ok(Json(reading(&state, &host, &power, &snapshot).await))
}

/// Reads a host's power from the hosts that could have to switch it off, and switches nothing.
pub(super) async fn test(
    State(state): State<ApiState>,
    At(name): At<String>,
) -> ApiResult<Json<FenceTest>> {
    let (snapshot, host, power) = controlled(&state, &name).await?;
    let open = |(name, of): (&Name, _)| {
        (*name != host && snapshot.session_open(name)).then(|| (name.clone(), of))
    };
    let addresses = snapshot.hosts.iter().map(|(name, of)| (name, of.spec.address));
    let mut others: Vec<(Name, Ipv4Addr)> = addresses.filter_map(open).collect();
    others.sort_by_key(|(name, _)| (manager(&snapshot) != Some(name), name.clone()));
    others.truncate(MOST);
    if others.is_empty() {
        let hint = "a host is never switched off by itself: join another one, or start it";
        let detail = format!("there is no other host from which the power of {host} could be read");
        return Err(ApiError::new(StatusCode::CONFLICT, detail, hint));
    }
    let asked = others.into_iter().map(|(from, address)| {
        let (state, host, power, snapshot) = (&state, &host, &power, &snapshot);
        async move {
            if from == state.me {
                return reading(state, host, power, snapshot).await;
            }
            from_afar(state, host, from, address, snapshot).await
        }
    });
    let readings = stream::iter(asked).buffered(MOST).collect().await;
    Ok(Json(FenceTest { host, driver: power.driver, at: power.at(), readings }))
}

async fn from_afar(
    state: &ApiState,
    host: &Name,
    from: Name,
    address: Ipv4Addr,
    snapshot: &Snapshot,
) -> PowerReading {
    let manages = manager(snapshot) == Some(&from);
    let answer = state.local.fetch(address, &format!("/v1/hosts/{host}/power")).await;
    let answer = answer.and_then(|text| {
        serde_json::from_slice::<PowerReading>(&text).map_err(|error| error.to_string())
    });
    match answer {
        Ok(reading) => PowerReading { from, manages, ..reading },
        Err(why) => PowerReading {
            problem: Some(PowerProblem {
                message: format!("{from} cannot be asked: {why}"),
                hint: format!("`haven host show {from}` says more; it may run an earlier version"),
            }),
            from,
            manages,
            state: None,
            took_ms: 0,
        },
    }
}
