//! Pools of Ceph clusters: checked before they are written, also by asking the cluster, and the key of their user sealed.
//!
//! A key comes in the clear once and is sealed before anything else happens to it. `sealed` in its place keeps the one that is
//! there, as long as all else stays.

use super::{
    ApiState,
    error::{ApiError, ApiResult},
    validate::Say,
};
use axum::http::StatusCode;
use haven_model::{
    Name, Object, PoolDriverKind, PoolSpec, RbdSpec, Snapshot, VmSpec, certificate::SEALED,
    host::RBD,
};
use haven_plan::tolerance::migration::speaks_less;
use haven_store::seal::{Plain, is_sealed};

/// What is wrong with a pool.
pub(super) fn validate(snapshot: &Snapshot, name: &Name, spec: &PoolSpec, say: &mut Say<'_>) {
    let old = snapshot.pools.get(name).map(|old| &old.spec);
    if old.is_some_and(|old| !may_become(old, spec)) {
        say(
            ("name", name),
            "a pool cannot be changed once it is there".into(),
            "make a new pool under another name; of one of Ceph's its monitors, user and key may change",
        );
    }
    match (&spec.rbd, spec.driver) {
        (Some(rbd), PoolDriverKind::Rbd) => of_ceph(snapshot, spec, rbd, old, say),
        (None, PoolDriverKind::Rbd) => say(
            ("driver", &"rbd"),
            "it does not say where the Ceph cluster is".into(),
            "write `rbd:` with `monitors`, `user`, `key` and `pool`",
        ),
        (Some(_), _) => say(
            ("rbd", &""),
            "`rbd` belongs to pools of Ceph clusters".into(),
            "write `driver: rbd`, or leave `rbd` out",
        ),
        (None, _) if !spec.path.starts_with('/') => say(
            ("path", &spec.path),
            format!("`path` is `{}`, which is not absolute", spec.path),
            "begin it with `/`",
        ),
        (None, _) => {}
    }
}

/// Of a pool of Ceph's only the way to it changes.
fn may_become(old: &PoolSpec, new: &PoolSpec) -> bool {
    match (&old.rbd, &new.rbd) {
        (Some(of), Some(now)) => {
            let rest = |spec: &PoolSpec| PoolSpec { rbd: None, ..spec.clone() };
            of.place() == now.place() && rest(old) == rest(new)
        }
        _ => old == new,
    }
}

fn of_ceph(
    snapshot: &Snapshot,
    spec: &PoolSpec,
    rbd: &RbdSpec,
    old: Option<&PoolSpec>,
    say: &mut Say<'_>,
) {
    if !spec.path.is_empty() {
        let message = format!("`path` is `{}`, and a pool of Ceph's has no directory", spec.path);
        say(("path", &spec.path), message, "leave it out");
    }
    for (key, text) in [("user", &rbd.user), ("key", &rbd.key), ("pool", &rbd.pool)] {
        if text.is_empty() {
            say(
                (key, &""),
                format!("`{key}` is empty"),
                "whoever runs that cluster gives it to you",
            );
        }
    }
    if let Some(host) = speaks_less(snapshot, RBD).filter(|_| old.is_none()) {
        let message = format!(
            "{host} has not said that it knows pools of Ceph clusters: it runs an older Haven, or has not come up yet"
        );
        say(("driver", &"rbd"), message, "wait until all hosts are up and upgraded");
    }
}

/// The first disk of a VM in a pool of Ceph's, with that pool.
pub(super) fn disk_in_ceph<'a>(
    snapshot: &Snapshot,
    spec: &'a VmSpec,
) -> Option<(&'a Name, &'a Name)> {
    let is = |pool: &Name| {
        snapshot.pools.get(pool).is_some_and(|pool| pool.spec.driver == PoolDriverKind::Rbd)
    };
    let disk = spec.disks.iter().find(|disk| is(&disk.pool))?;
    Some((&disk.name, &disk.pool))
}

/// Seals the key of a pool of Ceph's, or keeps the sealed one of `old`.
///
/// # Errors
/// 422 when there is none to keep; 503 on a host that has no key to seal it under.
pub(super) fn seal(state: &ApiState, object: &mut Object, old: Option<&Object>) -> ApiResult<()> {
    let reference = object.reference();
    let Object::Pool(new) = object else { return Ok(()) };
    let Some(new) = &mut new.spec.rbd else { return Ok(()) };
    let old = match old {
        Some(Object::Pool(old)) => old.spec.rbd.as_ref(),
        _ => None,
    };
    new.fsid = old.and_then(|old| old.fsid.clone());
    if new.key.trim() == SEALED || is_sealed(&new.key) {
        let refused = |detail: String| {
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, detail, "give the key itself")
        };
        new.key = match old {
            Some(old) if old.same_place(new) => old.key.clone(),
            Some(_) => {
                let detail = format!(
                    "`key` is `{SEALED}`, and the cluster or the user is another one than that of {reference}"
                );
                return Err(refused(detail));
            }
            None => {
                return Err(refused(format!("`key` is `{SEALED}`, and {reference} has none yet")));
            }
        };
        return Ok(());
    }
    let unable = |why: String| {
        let hint = "the log of this host's daemon says more; another host can do it";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why, hint)
    };
    let missing = || unable("this host has no key under which secrets are sealed".into());
    let secrets = state.secrets.as_ref().ok_or_else(missing)?;
    let plain = Plain::new(new.key.trim().to_owned());
    let same = old.map(|old| old.key.as_str()).filter(|old| {
        secrets.open(&reference, old).is_ok_and(|there| there.expose() == plain.expose())
    });
    new.key = match same {
        Some(old) => old.to_owned(),
        None => secrets.seal(&reference, &plain).map_err(|error| unable(error.to_string()))?,
    };
    Ok(())
}

/// Asks the Ceph cluster of a pool that is new or is reached in another way, from this host; the key is sealed by now. It must be
/// the cluster that it was: in another one each disk would be made anew, and nobody be shut out.
///
/// # Errors
/// 422 with the first thing that is wrong.
pub(super) async fn check(
    state: &ApiState,
    object: &mut Object,
    old: Option<&Object>,
) -> ApiResult<()> {
    if old.is_some_and(|old| old.same_spec(object)) {
        return Ok(());
    }
    let Object::Pool(pool) = object else { return Ok(()) };
    let Some(rbd) = &mut pool.spec.rbd else { return Ok(()) };
    let refused = |why: String| {
        let hint = format!("asked by {}; nothing was changed", state.me);
        ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, why, hint)
    };
    let is = state.local.check_ceph(&pool.meta.name, rbd).await.map_err(refused)?;
    match &rbd.fsid {
        Some(was) if *was != is => Err(refused(format!(
            "these monitors are of the Ceph cluster {is}, and the pool is in {was}; make a new pool under another name"
        ))),
        _ => {
            rbd.fsid = Some(is);
            Ok(())
        }
    }
}
