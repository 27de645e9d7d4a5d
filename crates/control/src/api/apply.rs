//! Applying manifests: checked whole, then written in one transaction that compares every object with what was read,
//! so that all of it happens or nothing.

use super::{
    ApiState, admission,
    auth::now_ms,
    certificates, chosen,
    error::{ApiError, ApiResult},
    pools, power, targets,
    validate::validate,
};
use axum::http::StatusCode;
use haven_model::{
    Object, Snapshot,
    api::{Applied, ApplyRequest},
    keys,
    manifest::{Manifest, parse, to_yaml},
};
use haven_store::{
    raw::{Compare, Op},
    server::{MAX_REQUEST_BYTES, MAX_TXN_OPS},
};
use std::collections::BTreeSet;

/// Objects that one apply may hold: each is one operation of the transaction.
pub const MOST_OBJECTS: usize = MAX_TXN_OPS;
/// Bytes that one apply may write; the rest of what the store takes is room for the transaction's own words.
const MOST_BYTES: usize = MAX_REQUEST_BYTES - (64 << 10);
/// What a comparison and a write cost beside key and value, bytes.
const OVERHEAD: usize = 64;

/// An object that did not come from a file, for the same checks.
pub(super) fn replacement(object: &Object) -> Manifest {
    Manifest::without_text(object.clone(), "request")
}

struct Write {
    applied: Applied,
    object: Object,
    /// Revision of what it replaces; 0 when there is none.
    revision: i64,
}

/// Nothing is added to a store that is nearly full.
pub(super) fn has_room(state: &ApiState) -> ApiResult<()> {
    if state.store.nearly_full() {
        return Err(ApiError::new(
            StatusCode::INSUFFICIENT_STORAGE,
            "the store is nearly full, and its last quarter is kept for what keeps the VMs running; nothing was changed",
            "delete objects that nobody needs; `haven get KIND` lists them",
        ));
    }
    Ok(())
}

/// Applies, or only says what would happen.
///
/// # Errors
/// 422 with everything that is wrong, or when it would use up what is kept for the loss of hosts; 409 when somebody changed one of the objects meanwhile.
pub async fn apply(state: &ApiState, request: &ApplyRequest) -> ApiResult<Vec<Applied>> {
    apply_with(state, request, Vec::new(), Vec::new()).await
}

/// The same, and in the same transaction something more, which must hold and is written.
pub(super) async fn apply_with(
    state: &ApiState,
    request: &ApplyRequest,
    over: Vec<Compare>,
    more: Vec<Op>,
) -> ApiResult<Vec<Applied>> {
    let files: Vec<(String, String)> =
        request.files.iter().map(|file| (file.name.clone(), file.text.clone())).collect();
    let manifests = parse(&files).map_err(ApiError::manifests)?;
    if manifests.len() > MOST_OBJECTS {
        return Err(too_much(format!(
            "{} objects are too many for one apply: at most {MOST_OBJECTS}",
            manifests.len()
        )));
    }
    has_room(state)?;
    let snapshot = state.current().await?;
    check(state, &manifests, &snapshot)?;
    for manifest in &manifests {
        if let Some((old, _)) = snapshot.object(&manifest.object.reference()) {
            not_deleting(&old)?;
        }
    }
    let mut vnis = chosen::vnis(&snapshot);
    let mut writes: Vec<Write> = manifests
        .iter()
        .map(|manifest| write(state, manifest, &snapshot, &mut vnis))
        .collect::<ApiResult<_>>()?;
    for write in &mut writes {
        let old = snapshot.object(&write.object.reference()).map(|(old, _)| old);
        pools::check(state, &mut write.object, old.as_ref(), request.dry_run).await?;
    }
    writes.sort_by_key(|write| write.object.kind());
    let objects: Vec<Object> = writes.iter().map(|write| write.object.clone()).collect();
    let admitted = admission::ask(state, &snapshot, &objects)?;
    for write in &mut writes {
        write.applied.warning = admitted.warning(&write.object.reference());
    }
    let changed: Vec<&Write> = writes.iter().filter(|w| w.applied.outcome != "unchanged").collect();
    let (mut compares, mut ops) = transaction(&changed)?;
    compares.extend(over);
    ops.extend(more);
    if !request.dry_run && !changed.is_empty() && !state.store.txn(compares, ops).await?.succeeded {
        return Err(conflict(state, &changed).await?);
    }
    Ok(writes.into_iter().map(|write| write.applied).collect())
}

/// 422 with everything that is wrong with what would be written.
pub(super) fn check(
    state: &ApiState,
    manifests: &[Manifest],
    snapshot: &Snapshot,
) -> ApiResult<()> {
    let mut problems = validate(manifests, snapshot);
    problems.extend(certificates::problems(state, manifests, snapshot, now_ms()));
    problems.extend(power::problems(manifests, snapshot));
    if problems.is_empty() { Ok(()) } else { Err(ApiError::manifests(problems)) }
}

fn too_much(detail: String) -> ApiError {
    let hint =
        "apply them in several steps; nothing was changed, since an apply is whole or not at all";
    ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, detail, hint)
}

/// 409 for an object that is on its way out.
pub(super) fn not_deleting(old: &Object) -> ApiResult<()> {
    if !old.meta().deleting {
        return Ok(());
    }
    let detail = format!("{} is being deleted", old.reference());
    let hint = "wait until it is gone (`haven delete … --wait`), then apply again";
    Err(ApiError::new(StatusCode::CONFLICT, detail, hint))
}

/// Seals the secrets of an object that was checked, or keeps those of `old`.
pub(super) fn seal(state: &ApiState, object: &mut Object, old: Option<&Object>) -> ApiResult<()> {
    certificates::seal(state, object, old)?;
    targets::seal(state, object, old)?;
    pools::seal(state, object, old)?;
    power::seal(state, object, old)
}

/// An object as people may see it, as a manifest.
fn shown(object: &Object) -> String {
    to_yaml(&object.clone().without_secrets())
}

fn write(
    state: &ApiState,
    manifest: &Manifest,
    snapshot: &Snapshot,
    vnis: &mut BTreeSet<u32>,
) -> ApiResult<Write> {
    let mut object = manifest.object.clone();
    let reference = object.reference();
    let Some((old, revision)) = snapshot.object(&reference) else {
        chosen::choose(&mut object, vnis, snapshot);
        seal(state, &mut object, None)?;
        let after = shown(&object);
        let meta = object.meta_mut();
        meta.uid = uuid::Uuid::now_v7().to_string();
        meta.created_ms = now_ms();
        let applied = Applied {
            object: reference.to_string(),
            outcome: "created".into(),
            before: String::new(),
            after,
            generation: object.meta().generation,
            warning: String::new(),
        };
        return Ok(Write { applied, object, revision: 0 });
    };
    keep(&mut object, &old, snapshot);
    seal(state, &mut object, Some(&old))?;
    let same = object.same_spec(&old);
    let meta = object.meta_mut();
    let labels = std::mem::take(&mut meta.labels);
    *meta = old.meta().clone();
    meta.labels = labels;
    if !same {
        meta.generation += 1;
    }
    let outcome = if same { "unchanged" } else { "changed" };
    let applied = Applied {
        object: reference.to_string(),
        outcome: outcome.into(),
        before: shown(&old),
        after: shown(&object),
        generation: object.meta().generation,
        warning: String::new(),
    };
    Ok(Write { applied, object, revision })
}

/// What a manifest does not say and commands or Haven have set stays: counters of resets and restarts, what was
/// promoted, a network's identifier, the ports of disks, the disks that they are made from.
pub(super) fn keep(object: &mut Object, old: &Object, snapshot: &Snapshot) {
    match (object, old) {
        (Object::Vm(new), Object::Vm(old)) => {
            new.spec.resets = new.spec.resets.max(old.spec.resets);
            chosen::ports(&mut new.spec, Some(&old.spec), snapshot);
            // Without it a disk would be made empty, and one that is made needs it no more.
            for disk in &mut new.spec.disks {
                let before = old.spec.disks.iter().find(|before| before.name == disk.name);
                if let Some(before) = before {
                    disk.copy_of.clone_from(&before.copy_of);
                }
            }
        }
        (Object::Service(new), Object::Service(old)) => {
            new.spec.restarts = new.spec.restarts.max(old.spec.restarts);
            new.spec.promoted = new.spec.promoted.take().or_else(|| old.spec.promoted.clone());
        }
        (Object::Network(new), Object::Network(old)) => {
            new.spec.vni =
                new.spec.vni.or(old.spec.vni).filter(|_| new.spec.vni_in_use().is_some());
        }
        _ => {}
    }
}

/// What the store shall do, and what must hold for it.
fn transaction(changed: &[&Write]) -> ApiResult<(Vec<Compare>, Vec<Op>)> {
    let (mut compares, mut ops, mut bytes) = (Vec::new(), Vec::new(), 0);
    for write in changed {
        let key = keys::object(&write.object.reference());
        let value = write.object.to_store();
        bytes += value.len() + 2 * key.len() + OVERHEAD;
        compares.push(match write.revision {
            0 => Compare::Absent(key.clone()),
            revision => Compare::ModRevision(key.clone(), revision),
        });
        ops.push(Op::Put(key, value.into()));
    }
    if bytes > MOST_BYTES {
        return Err(too_much(format!(
            "the objects take {bytes} bytes in the store, and one apply writes at most {MOST_BYTES}"
        )));
    }
    Ok((compares, ops))
}

/// Which object it was that somebody else changed.
async fn conflict(state: &ApiState, changed: &[&Write]) -> ApiResult<ApiError> {
    let keys: Vec<String> = changed.iter().map(|w| keys::object(&w.object.reference())).collect();
    let records = state.store.get_many(&keys).await?;
    let versions = records.iter().map(|kv| kv.as_ref().map_or(0, |kv| kv.mod_revision));
    let other = changed.iter().zip(versions).find(|(write, now)| write.revision != *now);
    Ok(match other {
        Some((write, now)) => ApiError::conflict(&write.applied.object, write.revision, now),
        None => ApiError::busy("the objects"),
    })
}
