//! Live migrations: asked for, looked at, taken back; and the way in for a guest that another host sends.

use super::{
    ApiState,
    auth::{A_HOST, Caller, now_ms},
    body::{At, Given},
    error::{ApiError, ApiResult, conflict},
    objects, serve,
};
use axum::{
    Extension, Json,
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use haven_model::{
    Migration, Name, ObjectRef, Placement, Snapshot, Versioned,
    api::{MigrationAsked, MigrationView},
    host::POSTCOPY,
    keys,
    object::Kind,
};
use haven_plan::{
    storage::replicas::lacks,
    tolerance::migration::{immovable, speaks_less, usual_options},
};
use haven_store::raw::{Compare, Op};
use tokio::net::UnixStream;

type Api = State<ApiState>;

fn vm_of(name: &str) -> ApiResult<ObjectRef> {
    let name =
        Name::new(name).map_err(|error| ApiError::bad(error.to_string(), "check the name"))?;
    Ok(ObjectRef::new(Kind::Vm, name))
}

/// What stands in the way of a move that is asked for, and that no waiting mends.
fn allowed(
    snapshot: &Snapshot,
    vm: &Name,
    asked: &MigrationAsked,
) -> ApiResult<Versioned<Placement>> {
    let object = snapshot.vms.get(vm).ok_or_else(|| ApiError::missing(&format!("VM `{vm}`")))?;
    if !object.spec.running || object.meta.deleting {
        let hint = format!("`haven vm start {vm}` starts it, wherever there is room");
        return Err(conflict(
            format!("{vm} shall not run, so it cannot move while it runs"),
            &hint,
        ));
    }
    let placement = snapshot.placements.get(vm).ok_or_else(|| {
        conflict(format!("{vm} has no host yet"), &format!("`haven explain vm/{vm}` tells why"))
    })?;
    if placement.moving_to.is_some() || placement.moved_from.is_some() {
        let hint = format!("`haven vm migrate {vm} --cancel` takes it back");
        return Err(conflict(format!("{vm} is being moved already"), &hint));
    }
    if let Some(why) = immovable(snapshot, object) {
        return Err(conflict(
            format!("{vm} cannot move while it runs: {why}"),
            "mend that, or stop it and start it elsewhere; a disk in a shared pool does not keep it",
        ));
    }
    if let Some(to) = &asked.to {
        let known: Vec<&str> = snapshot.hosts.keys().map(Name::as_str).collect();
        if !snapshot.hosts.contains_key(to) {
            let hint = format!("there are: {}", known.join(", "));
            return Err(ApiError::bad(format!("there is no host `{to}`"), hint));
        }
        if *to == placement.host {
            return Err(conflict(
                format!("{vm} runs on {to} already"),
                "name another host, or none",
            ));
        }
        if let Some(disk) = lacks(snapshot, object, to) {
            let hint = format!("`haven volume show {vm}.{}` tells where it can go", disk.name);
            let detail = format!("{to} does not have all of its disk `{}`", disk.name);
            return Err(conflict(detail, &hint));
        }
    }
    Ok(placement.clone())
}

/// The record of a move that is asked for, over the last one and the placement as they were read.
pub(super) fn wanted(snapshot: &Snapshot, vm: &Name, migration: &Migration) -> (Vec<Compare>, Op) {
    let key = keys::migration(vm);
    let unchanged = match snapshot.migrations.get(vm) {
        None => Compare::Absent(key.clone()),
        Some(last) => Compare::ModRevision(key.clone(), last.revision),
    };
    let placement = snapshot.placements.get(vm).map_or(0, |placement| placement.revision);
    let stays = Compare::ModRevision(keys::placement(vm), placement);
    let value = serde_json::to_vec(migration).expect("a migration is plain data");
    (vec![unchanged, stays], Op::Put(key, value.into()))
}

/// Asks for a VM to be moved while it runs.
pub(super) async fn migrate(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
    Given(asked): Given<MigrationAsked>,
) -> ApiResult<Json<MigrationView>> {
    let reference = vm_of(&name)?;
    let vm = &reference.name;
    let snapshot = state.current().await?;
    let placement = allowed(&snapshot, vm, &asked)?;
    let by_hand = asked.options.postcopy;
    let options = asked.options.over(&usual_options(&snapshot, vm));
    if by_hand && let Some(host) = speaks_less(&snapshot, POSTCOPY) {
        let detail = format!(
            "{host} has not said that it knows of guests whose memory follows them: it runs an older Haven, or has not come up yet"
        );
        return Err(conflict(detail, "upgrade Haven there, or move it without `--postcopy`"));
    }
    let migration = Migration {
        id: uuid::Uuid::now_v7().to_string(),
        from: placement.host.clone(),
        to: asked.to,
        options,
        by: caller.who,
        at_ms: now_ms(),
        drain: None,
        balances: false,
        outcome: None,
    };
    let (compares, op) = wanted(&snapshot, vm, &migration);
    if !state.store.txn(compares, vec![op]).await?.succeeded {
        return Err(ApiError::busy(&reference.to_string()));
    }
    Ok(Json(MigrationView {
        migration: Some(migration),
        host: Some(placement.host.clone()),
        ..MigrationView::default()
    }))
}

/// How the last migration of a VM stands.
pub(super) async fn show(
    State(state): Api,
    At(name): At<String>,
) -> ApiResult<Json<MigrationView>> {
    let reference = vm_of(&name)?;
    let vm = &reference.name;
    objects::read(&state, &reference).await?;
    let snapshot = state.current().await?;
    let placement = snapshot.placements.get(vm);
    let to = placement.and_then(|placement| {
        let to = placement.moving_to.as_ref().map(|to| &to.host);
        to.or_else(|| placement.moved_from.as_ref().map(|_| &placement.host))
    });
    let told = |host: Option<&Name>| {
        let told = snapshot.migration_status.get(vm)?.get(host?)?;
        let attempt = placement.map(|p| p.moved_from.as_ref().map_or(p.revision, |f| f.attempt));
        (Some(told.attempt) == attempt).then(|| (*told.value).clone())
    };
    let from = placement
        .map(|placement| placement.moved_from.as_ref().map_or(&placement.host, |from| &from.host));
    Ok(Json(MigrationView {
        migration: snapshot.migrations.get(vm).map(|migration| (*migration.value).clone()),
        host: placement.map(|placement| placement.host.clone()),
        to: to.cloned(),
        source: told(from),
        target: told(to),
        waiting: haven_plan::explain(&snapshot, &(state.seen)(), &reference)
            .into_iter()
            .find(|line| line.starts_with("waiting")),
    }))
}

/// Takes a migration back, as long as the owner has not changed.
pub(super) async fn cancel(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
) -> ApiResult<Json<MigrationView>> {
    let reference = vm_of(&name)?;
    let vm = &reference.name;
    let snapshot = state.current().await?;
    let under_way = snapshot.migrations.get(vm).filter(|migration| migration.outcome.is_none());
    let migration =
        under_way.ok_or_else(|| ApiError::missing(&format!("migration of `{vm}` under way")))?;
    let placement = snapshot.placements.get(vm);
    if placement.is_some_and(|placement| placement.moved_from.is_some()) {
        let detail = format!("{vm} has changed its owner already, so it cannot be taken back");
        return Err(conflict(detail, "move it again once it runs there"));
    }
    let ended = migration.ended(now_ms(), false, format!("{} took it back", caller.who));
    let value = serde_json::to_vec(&ended).expect("a migration is plain data");
    let mut compares = vec![Compare::ModRevision(keys::migration(vm), migration.revision)];
    // The change of the owner and this exclude each other.
    compares.extend(placement.map(|p| Compare::ModRevision(keys::placement(vm), p.revision)));
    let ops = vec![Op::Put(keys::migration(vm), value.into())];
    if !state.store.txn(compares, ops).await?.succeeded {
        return Err(ApiError::busy(&reference.to_string()));
    }
    let host = placement.map(|placement| placement.host.clone());
    Ok(Json(MigrationView { migration: Some(ended), host, ..MigrationView::default() }))
}

/// The way in for a guest that its owner sends to this host.
pub(super) async fn incoming(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
    request: Request,
) -> ApiResult<Response> {
    let vm = comes_here(&state, &caller, &name).await?;
    let far = state.local.way_in(vm.as_str()).map_err(taken_back)?;
    Ok(joined(request, far))
}

/// The way in for the contents of a disk of a guest that its owner sends to this host.
pub(super) async fn incoming_disk(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    At(name): At<String>,
    request: Request,
) -> ApiResult<Response> {
    let vm = comes_here(&state, &caller, &name).await?;
    let none = || taken_back(format!("{vm} takes no disks on {}", state.me));
    let path = state.local.disks_in(vm.as_str()).ok_or_else(none)?;
    let far = UnixStream::connect(&path).await.map_err(|error| taken_back(error.to_string()))?;
    Ok(joined(request, Box::new(far)))
}

fn taken_back(why: String) -> ApiError {
    ApiError::new(StatusCode::BAD_GATEWAY, why, "the move is taken back; ask for it again")
}

fn joined(request: Request, far: Box<dyn serve::Duplex>) -> Response {
    serve::upgrade(request, far);
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, "haven-console")];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// The VM, when it is on its way to this host and a host asks.
async fn comes_here(state: &ApiState, caller: &Caller, name: &str) -> ApiResult<Name> {
    let vm = vm_of(name)?.name;
    let snapshot = state.current().await?;
    let moves = snapshot.placements.get(&vm).is_some_and(|placement| {
        placement.moving_to.as_ref().is_some_and(|to| to.host == state.me)
    });
    if !moves || caller.who != A_HOST {
        let detail = format!("{vm} is not being moved by {} to {}", caller.who, state.me);
        return Err(conflict(detail, "only hosts send VMs, and only where they are to go"));
    }
    Ok(vm)
}
