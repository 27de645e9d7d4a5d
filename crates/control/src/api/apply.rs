//! Applying manifests: checked whole before the first write, then written in the order in which kinds need each
//! other, each write compared with what was read.

use super::{
    ApiState,
    auth::now_ms,
    error::{ApiError, ApiResult},
    validate::validate,
};
use haven_model::{
    Object, Snapshot,
    api::{Applied, ApplyRequest},
    keys,
    manifest::{Manifest, parse, to_yaml},
};
use haven_store::raw::{Compare, Op};

/// The most operations that one transaction takes.
const BATCH: usize = 100;

/// An object that did not come from a file, for the same checks.
pub(super) fn replacement(object: &Object) -> Manifest {
    Manifest { object: object.clone(), file: "request".into(), line: 1 }
}

struct Write {
    applied: Applied,
    object: Object,
    /// Revision of what it replaces; 0 when there is none.
    revision: i64,
}

/// Applies, or only says what would happen.
///
/// # Errors
/// 422 with everything that is wrong; 409 when somebody changed one of the objects meanwhile.
pub async fn apply(state: &ApiState, request: &ApplyRequest) -> ApiResult<Vec<Applied>> {
    let files: Vec<(String, String)> =
        request.files.iter().map(|file| (file.name.clone(), file.text.clone())).collect();
    let manifests = parse(&files).map_err(ApiError::manifests)?;
    let snapshot = state.snapshot();
    let problems = validate(&manifests, &snapshot);
    if !problems.is_empty() {
        return Err(ApiError::manifests(problems));
    }
    if let Some(ending) = manifests.iter().find(|m| {
        snapshot.object(&m.object.reference()).is_some_and(|(old, _)| old.meta().deleting)
    }) {
        let detail = format!("{} is being deleted", ending.object.reference());
        let hint = "wait until it is gone (`haven delete … --wait`), then apply again";
        return Err(ApiError::new(axum::http::StatusCode::CONFLICT, detail, hint));
    }
    let mut writes: Vec<Write> =
        manifests.iter().map(|manifest| write(manifest, &snapshot)).collect();
    writes.sort_by_key(|write| write.object.kind());
    if !request.dry_run {
        let changed: Vec<&Write> =
            writes.iter().filter(|w| w.applied.outcome != "unchanged").collect();
        for batch in changed.chunks(BATCH) {
            commit(state, batch).await?;
        }
    }
    Ok(writes.into_iter().map(|write| write.applied).collect())
}

fn write(manifest: &Manifest, snapshot: &Snapshot) -> Write {
    let mut object = manifest.object.clone();
    let reference = object.reference();
    let after = to_yaml(&object);
    let Some((old, revision)) = snapshot.object(&reference) else {
        let meta = object.meta_mut();
        meta.uid = uuid::Uuid::now_v7().to_string();
        meta.created_ms = now_ms();
        let applied = Applied {
            object: reference.to_string(),
            outcome: "created".into(),
            before: String::new(),
            after,
            generation: object.meta().generation,
        };
        return Write { applied, object, revision: 0 };
    };
    keep(&mut object, &old);
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
        before: to_yaml(&old),
        after: to_yaml(&object),
        generation: object.meta().generation,
    };
    Write { applied, object, revision }
}

/// What a manifest does not say and commands have set stays: counters of resets and restarts, a host's password.
pub(super) fn keep(object: &mut Object, old: &Object) {
    match (object, old) {
        (Object::Vm(new), Object::Vm(old)) => {
            new.spec.resets = new.spec.resets.max(old.spec.resets)
        }
        (Object::Service(new), Object::Service(old)) => {
            new.spec.restarts = new.spec.restarts.max(old.spec.restarts);
        }
        (Object::Host(new), Object::Host(old)) => {
            if let (Some(new), Some(old)) = (&mut new.spec.power, &old.spec.power)
                && new.password.is_empty()
            {
                new.password.clone_from(&old.password);
            }
        }
        _ => {}
    }
}

async fn commit(state: &ApiState, batch: &[&Write]) -> ApiResult<()> {
    let (mut compares, mut ops) = (Vec::new(), Vec::new());
    for write in batch {
        let key = keys::object(&write.object.reference());
        compares.push(match write.revision {
            0 => Compare::Absent(key.clone()),
            revision => Compare::ModRevision(key.clone(), revision),
        });
        ops.push(Op::Put(key, write.object.to_store().into()));
    }
    if state.store.txn(compares, ops).await?.succeeded {
        return Ok(());
    }
    for write in batch {
        let key = keys::object(&write.object.reference());
        let now = state.store.get(&key).await?.map_or(0, |kv| kv.mod_revision);
        if now != write.revision {
            return Err(ApiError::conflict(&write.applied.object, write.revision, now));
        }
    }
    Err(ApiError::conflict("one of the objects", 0, 0))
}
