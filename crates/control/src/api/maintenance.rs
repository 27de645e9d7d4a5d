//! Hosts that are restarted or upgraded, one after another: asked for, looked at, let go on, ended.

use super::{
    ApiState,
    auth::{Caller, event, now_ms},
    body::Given,
    error::{ApiError, ApiResult, conflict},
};
use crate::manager::commit::json;
use axum::{Extension, Json, extract::State};
use haven_model::{
    Maintenance, Name, ObjectRef, Snapshot,
    api::{MaintenanceAsked, MaintenanceView},
    host::MAINTENANCE,
    keys,
    maintenance::{Phase, Turn},
    object::Kind,
};
use haven_plan::tolerance::maintenance::{in_turn, resumed};
use haven_store::raw::{Compare, Op};

type Api = State<ApiState>;

fn host_ref(host: &Name) -> ObjectRef {
    ObjectRef::new(Kind::Host, host.clone())
}

/// How it stands.
fn view(state: &ApiState, snapshot: &Snapshot) -> MaintenanceView {
    let of = snapshot.maintenance.as_ref().map(|of| (*of.value).clone());
    let turn = of.as_ref().and_then(Maintenance::turn).map(|turn| turn.host.clone());
    let now = turn.map(|host| {
        let plan = haven_plan::plan(snapshot, &(state.seen)());
        let host = ObjectRef::new(Kind::Host, host);
        let waits = plan.waiting.into_iter().filter(|w| w.object == host).map(|w| w.reason);
        let acts = plan.actions.into_iter().filter(|a| a.object == host).map(|a| a.reason);
        waits.chain(acts).next().unwrap_or_default()
    });
    let ours = |of: &Maintenance, host: &Name| {
        let drain = snapshot.drains.get(host).filter(|drain| !drain.bringing_back);
        drain.is_some_and(|drain| drain.id == of.drain_id(host))
    };
    let drained = of.iter().flat_map(|of| {
        let hosts = of.hosts.iter().map(|turn| &turn.host);
        hosts.filter(|host| ours(of, host)).cloned()
    });
    let drained = drained.collect();
    MaintenanceView { maintenance: of, now: now.filter(|now| !now.is_empty()), drained }
}

/// How it stands.
pub(super) async fn show(State(state): Api) -> ApiResult<Json<MaintenanceView>> {
    let snapshot = state.current().await?;
    Ok(Json(view(&state, &snapshot)))
}

/// The hosts that are meant, in the order in which they have their turn: the one that manages comes last.
fn order(snapshot: &Snapshot, asked: &MaintenanceAsked) -> ApiResult<Vec<Name>> {
    let known: Vec<&str> = snapshot.hosts.keys().map(Name::as_str).collect();
    for name in &asked.hosts {
        if !snapshot.hosts.contains_key(name) {
            let hint = format!("there are: {}", known.join(", "));
            return Err(ApiError::bad(format!("there is no host `{name}`"), hint));
        }
        if snapshot.hosts.get(name).is_some_and(|host| host.spec.witness) {
            return Err(ApiError::bad(
                format!("{name} is a witness, and other clusters may rest on the same machine"),
                "upgrade or restart it by hand, while no other host is worked on",
            ));
        }
        if asked.hosts.iter().filter(|other| *other == name).count() > 1 {
            return Err(ApiError::bad(format!("{name} is named twice"), "name each host once"));
        }
    }
    let hosts = if asked.hosts.is_empty() { in_turn(snapshot) } else { asked.hosts.clone() };
    let speaks = |host: &&Name| {
        snapshot.host_status.get(*host).is_none_or(|status| status.speaks < MAINTENANCE)
    };
    if let Some(host) = hosts.iter().find(speaks) {
        let detail = format!(
            "{host} has not said that it understands this: it runs an older Haven, or has not come up yet"
        );
        let hint =
            "upgrade Haven there by hand: `haven host drain`, the package, `haven host undrain`";
        return Err(conflict(detail, hint));
    }
    Ok(hosts)
}

/// Writes over the record that was read.
async fn write(
    state: &ApiState,
    snapshot: &Snapshot,
    next: &Maintenance,
    more: impl IntoIterator<Item = Op>,
) -> ApiResult<Json<MaintenanceView>> {
    let key = keys::MAINTENANCE.to_owned();
    let unchanged = snapshot.maintenance.as_ref().map_or_else(
        || Compare::Absent(key.clone()),
        |was| Compare::ModRevision(key.clone(), was.revision),
    );
    let mut ops = vec![Op::Put(key, json(next).into())];
    ops.extend(more);
    if !state.store.txn(vec![unchanged], ops).await?.succeeded {
        return Err(ApiError::busy("the work on hosts"));
    }
    let snapshot = state.current().await?;
    Ok(Json(view(state, &snapshot)))
}

/// Asks for hosts to be worked on.
pub(super) async fn begin(
    State(state): Api,
    Extension(caller): Extension<Caller>,
    Given(asked): Given<MaintenanceAsked>,
) -> ApiResult<Json<MaintenanceView>> {
    let snapshot = state.current().await?;
    if let Some(of) = snapshot.maintenance.as_ref().filter(|of| of.turn().is_some()) {
        let detail = format!("the {} that {} asked for is not over", of.work, of.by);
        return Err(conflict(detail, "`haven host maintenance` tells how it stands, and ends it"));
    }
    let hosts = order(&snapshot, &asked)?;
    let at_ms = now_ms();
    let turn = |host: &Name| Turn {
        host: host.clone(),
        phase: Phase::Waiting,
        since_ms: at_ms,
        boot_id: String::new(),
        version: String::new(),
        problems: Vec::new(),
        voted: false,
    };
    let next = Maintenance {
        id: uuid::Uuid::now_v7().to_string(),
        work: asked.work,
        by: caller.who.clone(),
        at_ms,
        hosts: hosts.iter().map(turn).collect(),
        stopped: None,
        ended_ms: None,
    };
    let names: Vec<&str> = hosts.iter().map(Name::as_str).collect();
    let said = format!("{} of {}, one after another", asked.work, names.join(", "));
    let event = hosts.first().map(|host| event(&host_ref(host), &caller, said));
    write(&state, &snapshot, &next, event).await
}

/// The record of work that is not over.
fn open(snapshot: &Snapshot) -> ApiResult<(Maintenance, Turn)> {
    let of = snapshot.maintenance.as_ref();
    let found = of.and_then(|of| Some(((*of.value).clone(), of.turn()?.clone())));
    found.ok_or_else(|| ApiError::missing("work on hosts that is not over"))
}

/// Lets it go on after it has stopped.
pub(super) async fn resume(
    State(state): Api,
    Extension(caller): Extension<Caller>,
) -> ApiResult<Json<MaintenanceView>> {
    let snapshot = state.current().await?;
    let (of, turn) = open(&snapshot)?;
    if of.stopped.is_none() {
        return Err(conflict("it has not stopped".into(), "there is nothing to resume"));
    }
    let host = turn.host;
    let (next, anew) = resumed(&snapshot, &of, now_ms());
    let forget = anew.then(|| Op::Delete(keys::work_status(&host)));
    let said = format!("{} lets the {} go on", caller.who, next.work);
    let ops = std::iter::once(event(&host_ref(&host), &caller, said)).chain(forget);
    write(&state, &snapshot, &next, ops).await
}

/// Ends it: no further host has its turn. A host that is drained for it stays so.
pub(super) async fn end(
    State(state): Api,
    Extension(caller): Extension<Caller>,
) -> ApiResult<Json<MaintenanceView>> {
    let snapshot = state.current().await?;
    let (mut next, turn) = open(&snapshot)?;
    next.ended_ms = Some(now_ms());
    let before = next.stopped.take().map(|why| format!("; it had stopped: {why}"));
    next.stopped = Some(format!("{} ended it{}", caller.who, before.unwrap_or_default()));
    let said = format!("{} ended the {} of hosts", caller.who, next.work);
    write(&state, &snapshot, &next, Some(event(&host_ref(&turn.host), &caller, said))).await
}
