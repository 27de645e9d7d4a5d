//! Objects as lists show them, and single writes.

use super::{
    ApiState, admission, auth, certificates, clones,
    error::{ApiError, ApiResult},
};
use axum::http::StatusCode;
use haven_model::{
    Meta, Name, Object, ObjectRef, Observations, Snapshot,
    api::{CHANGED, Item, Page},
    keys,
    object::Kind,
    service::{DRAIN_LABEL, ServiceSpec, TEMPLATE_LABEL},
};
use haven_plan::tolerance::removal;
use haven_store::raw::{Compare, Op};
use std::collections::BTreeMap;

/// An object with what is seen of it.
#[must_use]
pub fn item(
    snapshot: &Snapshot,
    seen: &Observations,
    object: Object,
    resource_version: i64,
) -> Item {
    let (mut state, mut host, mut columns) = (String::new(), None, BTreeMap::new());
    match &object {
        Object::Vm(vm) => {
            let name = &vm.meta.name;
            let placement = snapshot.placements.get(name);
            host = placement.map(|p| p.host.clone());
            state = vm_state(snapshot, name);
            columns.insert("memory".into(), vm.spec.memory.to_string());
            columns.insert("cpus".into(), vm.spec.cpus.to_string());
            let ips =
                placement.map(|p| p.nics.iter().map(|n| n.ip.to_string()).collect::<Vec<_>>());
            columns.insert("addresses".into(), ips.unwrap_or_default().join(","));
            // Only of the owner's own run: an older status says nothing of it.
            let status = snapshot.told_of(&vm.meta.name);
            if let Some(started) = status.and_then(|status| status.started_ms) {
                columns.insert("started-ms".into(), started.to_string());
            }
            let pending = snapshot.pending(name);
            if !pending.is_empty() {
                columns.insert(CHANGED.into(), pending.join(", "));
            }
            columns.insert("epoch".into(), placement.map_or(0, |p| p.epoch).to_string());
        }
        Object::Host(of) => {
            let states = haven_plan::host_states(snapshot, seen);
            state = states.get(&of.meta.name).map(ToString::to_string).unwrap_or_default();
            columns.insert("address".into(), of.spec.address.to_string());
            host_columns(snapshot, &of.meta.name, &mut columns);
        }
        Object::Service(service) => {
            let name = &service.meta.name;
            let ready =
                snapshot.members(name).filter(|(vm, _)| vm_state(snapshot, vm) == "ready").count();
            state = format!("{ready}/{} ready", service.spec.replicas);
            columns.insert("updated".into(), updated(snapshot, name, &service.spec));
            columns.insert("strategy".into(), service.spec.update.strategy.as_str().into());
            if let Some(progress) = haven_plan::balance::services::progress(snapshot, seen, name) {
                columns.extend(progress.step.map(|step| ("step".into(), step)));
                columns.extend(progress.traffic.map(|traffic| ("traffic".into(), traffic)));
            }
            host = snapshot.frontends.get(name).map(|f| f.holder.clone());
            if let Some(certificate) = service.spec.certificate() {
                columns.insert("certificate".into(), certificate.to_string());
            }
            if let Some(frontend) = &service.spec.frontend {
                columns.insert("address".into(), format!("{}:{}", frontend.address, frontend.port));
            }
        }
        Object::Image(image) => state = image_state(snapshot, &image.spec),
        Object::Network(network) => {
            columns.insert("subnet".into(), network.spec.subnet.to_string());
        }
        Object::Certificate(certificate) => {
            state = certificates::describe(snapshot, certificate, auth::now_ms(), &mut columns);
        }
        Object::Target(target) => {
            columns.insert("place".into(), target.spec.place());
            let used = removal::users(snapshot, Kind::Target, &target.meta.name);
            columns.insert("used-by".into(), used.join(","));
        }
        Object::Pool(pool) => {
            columns.insert("path".into(), pool.spec.place());
        }
    }
    if object.meta().deleting {
        state = "deleting".into();
    }
    let object = object.without_secrets();
    Item { resource_version, object, state, host, columns, warning: String::new() }
}

/// `3/3`: all members are from the current template, stay and are ready. `1/3, 2 going`: a rollout is under way.
fn updated(snapshot: &Snapshot, service: &Name, spec: &ServiceSpec) -> String {
    let template = haven_plan::balance::services::template_hash(spec);
    let (mut new, mut going) = (0, 0);
    for (vm, member) in snapshot.members(service) {
        let labels = &member.meta.labels;
        let stays = labels.get(TEMPLATE_LABEL) == Some(&template)
            && !labels.contains_key(DRAIN_LABEL)
            && !member.meta.deleting;
        new += usize::from(stays && vm_state(snapshot, vm) == "ready");
        going += usize::from(!stays);
    }
    match going {
        0 => format!("{new}/{}", spec.replicas),
        n => format!("{new}/{}, {n} going", spec.replicas),
    }
}

fn image_state(snapshot: &Snapshot, image: &haven_model::ImageSpec) -> String {
    let complete =
        |sums: &std::collections::BTreeSet<String>| image.files().all(|f| sums.contains(&f.sha256));
    let on = snapshot.host_status.values().filter(|s| complete(&s.images)).count();
    format!("on {on} hosts")
}

fn host_columns(snapshot: &Snapshot, host: &Name, columns: &mut BTreeMap<String, String>) {
    if let Some(status) = snapshot.host_status.get(host) {
        columns.insert("version".into(), status.version.clone());
        columns.insert("memory".into(), status.memory.to_string());
        columns.insert("accel".into(), status.accel.clone());
        columns.insert("qemu".into(), status.qemu.clone());
        columns.insert("problems".into(), status.problems.join("; "));
    }
}

/// A VM's state in a word: `ready` when it runs and passes its check (or has none).
#[must_use]
pub fn vm_state(snapshot: &Snapshot, name: &Name) -> String {
    let (Some(vm), placement) = (snapshot.vms.get(name), snapshot.placements.get(name)) else {
        return "unknown".into();
    };
    let Some(placement) = placement else {
        return if vm.spec.running { "waiting" } else { "stopped" }.into();
    };
    if !snapshot.session_open(&placement.host) {
        return "lost".into();
    }
    let Some(status) = snapshot.told_of(name) else {
        return "placed".into();
    };
    match (status.phase.as_str(), status.ready) {
        ("running", Some(true)) => "ready".into(),
        ("running", None) if vm.spec.check.is_none() => "ready".into(),
        ("running", Some(false)) => "unwell".into(),
        (phase, _) => phase.into(),
    }
}

/// A page of a kind's objects.
#[must_use]
pub fn list(state: &ApiState, kind: Kind, limit: usize, after: Option<&str>) -> Page<Item> {
    let (snapshot, seen) = (state.snapshot(), (state.seen)());
    let mut objects: Vec<(Object, i64)> = snapshot.objects(kind);
    if let Some(after) = after {
        objects.retain(|(object, _)| object.meta().name.as_str() > after);
    }
    let more = objects.len() > limit;
    objects.truncate(limit);
    let next = if more { objects.last().map(|(o, _)| o.meta().name.to_string()) } else { None };
    let items =
        objects.into_iter().map(|(o, revision)| item(&snapshot, &seen, o, revision)).collect();
    Page { items, next }
}

/// One object.
///
/// # Errors
/// 404.
pub fn get(state: &ApiState, reference: &ObjectRef) -> ApiResult<Item> {
    let snapshot = state.snapshot();
    let (object, revision) =
        snapshot.object(reference).ok_or_else(|| ApiError::missing(&reference.to_string()))?;
    Ok(item(&snapshot, &(state.seen)(), object, revision))
}

/// One object as it stands in the store now, with its version.
///
/// # Errors
/// 404.
pub async fn read(state: &ApiState, reference: &ObjectRef) -> ApiResult<(Object, i64)> {
    let key = keys::object(reference);
    let missing = || ApiError::missing(&reference.to_string());
    let record = state.store.get(&key).await?.ok_or_else(missing)?;
    let mut scratch = Snapshot::default();
    scratch.apply(&key, Some((&record.value, record.mod_revision)));
    scratch.object(reference).ok_or_else(|| {
        let detail = format!("the record of {reference} cannot be read by this version of Haven");
        let hint = "a newer Haven wrote it: update this host, or ask another with `--context`";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, detail, hint)
    })
}

/// Changes one object by a function, as often as somebody else is quicker (at most five times).
///
/// # Errors
/// 404; 409 when it cannot be written; 422 when it would use up what is kept for the loss of hosts.
pub async fn change(
    state: &ApiState,
    reference: &ObjectRef,
    change: impl Fn(&mut Object) -> ApiResult<()>,
) -> ApiResult<Item> {
    let key = keys::object(reference);
    for _ in 0..5 {
        let (mut object, revision) = read(state, reference).await?;
        change(&mut object)?;
        object.meta_mut().generation += 1;
        let admitted = admission::ask_now(state, &object).await?;
        let ops = vec![Op::Put(key.clone(), object.to_store().into())];
        let outcome =
            state.store.txn(vec![Compare::ModRevision(key.clone(), revision)], ops).await?;
        if outcome.succeeded {
            let item = item(&state.snapshot(), &(state.seen)(), object, outcome.revision);
            return Ok(Item { warning: admitted.warning(reference), ..item });
        }
    }
    Err(ApiError::busy(&reference.to_string()))
}

/// Makes an object that must not be there yet.
///
/// # Errors
/// 409 when there is one of that name; 422 with what is wrong with it, or when it would use up what is kept for the loss
/// of hosts; 507 when the store is nearly full.
pub async fn create(state: &ApiState, given: Object) -> ApiResult<Item> {
    let reference = given.reference();
    let taken = || {
        ApiError::new(
            StatusCode::CONFLICT,
            format!("{reference} exists already; nothing was changed"),
            format!("choose another name, or change it with `haven edit {reference}`"),
        )
    };
    super::apply::has_room(state)?;
    let snapshot = state.current().await?;
    if snapshot.object(&reference).is_some() {
        return Err(taken());
    }
    let manifest = super::apply::replacement(&given);
    super::apply::check(state, std::slice::from_ref(&manifest), &snapshot)?;
    let mut object = given;
    super::apply::seal(state, &mut object, None)?;
    super::pools::check(state, &mut object, None, false).await?;
    super::chosen::choose(&mut object, &mut super::chosen::vnis(&snapshot), &snapshot);
    let labels = std::mem::take(&mut object.meta_mut().labels);
    let uid = uuid::Uuid::now_v7().to_string();
    *object.meta_mut() = Meta::new(reference.name.clone(), uid, auth::now_ms());
    object.meta_mut().labels = labels;
    let admitted = admission::ask(state, &snapshot, std::slice::from_ref(&object))?;
    let key = keys::object(&reference);
    let ops = vec![Op::Put(key.clone(), object.to_store().into())];
    let outcome = state.store.txn(vec![Compare::Absent(key)], ops).await?;
    if !outcome.succeeded {
        return Err(taken());
    }
    let item = item(&snapshot, &(state.seen)(), object, outcome.revision);
    Ok(Item { warning: admitted.warning(&reference), ..item })
}

/// Marks an object for deletion.
///
/// # Errors
/// 404, or 409 for a member of a service: the service would only make another one.
pub async fn delete(state: &ApiState, reference: &ObjectRef) -> ApiResult<Item> {
    let snapshot = state.current().await?;
    change(state, reference, |object| {
        if let Some(owner) = object.meta().member_of()
            && snapshot.services.get(&owner.name).is_some_and(|service| !service.meta.deleting)
        {
            let detail = format!("{reference} is a member of {owner}, which would replace it");
            return Err(ApiError::new(StatusCode::CONFLICT, detail, member_hint(owner)));
        }
        if object.kind() == Kind::Vm {
            clones::needed(&snapshot, &object.meta().uid, None, None)?;
        }
        object.meta_mut().deleting = true;
        Ok(())
    })
    .await
}

fn member_hint(owner: &ObjectRef) -> String {
    let name = &owner.name;
    format!(
        "scale or delete the service: `haven service scale {name} N`, `haven delete {owner}`; \
         `haven service restart {name}` replaces its members"
    )
}

#[cfg(test)]
mod tests {
    use super::updated;
    use haven_model::{
        Bytes, ObjectRef,
        object::Kind,
        service::{DRAIN_LABEL, TEMPLATE_LABEL},
    };
    use haven_plan::{
        balance::services::template_hash,
        testing::{World, at, name, stored, vm_spec},
    };

    #[test]
    fn a_rollout_is_over_when_no_old_member_is_left() {
        let mut world = World::new(3, Bytes::gib(8));
        world.service("hello", 2);
        let spec = world.snapshot.services["hello"].spec.clone();
        let new = template_hash(&spec);
        let mut add = |vm: &str, template: &str, drained: bool| {
            let mut member = stored(vm, vm_spec(Bytes::mib(128)));
            member.meta.owner = Some(ObjectRef::new(Kind::Service, name("hello")));
            member.meta.labels.insert(TEMPLATE_LABEL.into(), template.into());
            if drained {
                member.meta.labels.insert(DRAIN_LABEL.into(), "1".into());
            }
            world.snapshot.vms.insert(name(vm), at(4, member));
            world.run(vm, "host1");
            updated(&world.snapshot, &name("hello"), &spec)
        };
        // Two old ones that are ready are no sign that the new template runs.
        add("hello-1", "old", false);
        assert_eq!(add("hello-2", "old", false), "0/2, 2 going");
        add("hello-3", &new, false);
        assert_eq!(add("hello-4", &new, false), "2/2, 2 going");
        // A new one that is drained goes, too.
        assert_eq!(add("hello-5", &new, true), "2/2, 3 going");
        for old in ["hello-1", "hello-2", "hello-5"] {
            world.snapshot.vms.remove(old);
        }
        assert_eq!(updated(&world.snapshot, &name("hello"), &spec), "2/2");
    }
}
