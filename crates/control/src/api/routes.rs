//! Every route with its role, and what it does.

use super::{
    ApiState, apply, auth,
    auth::{Caller, Role, make_token},
    error::{ApiError, ApiResult},
    objects, overview, serve,
};
use axum::{
    Extension, Json, Router,
    body::Body,
    extract::{Path, Query, Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response, Sse, sse},
    routing::{MethodRouter, delete, get, post, put},
};
use futures::{Stream, TryStreamExt};
use haven_model::{
    Event, ImageSpec, Incident, Meta, Name, Object, ObjectRef,
    api::{
        Applied, ApplyRequest, Item, JoinAnswer, JoinRequest, List, Overview, Secret, TokenLine,
    },
    event::AuditEntry,
    keys,
    object::{Kind, Stored},
};
use haven_store::raw::{Compare, Op};
use serde::Deserialize;
use std::{collections::BTreeMap, convert::Infallible, time::Duration};

type Api = State<ApiState>;

/// A route: method, path, the least role, what it is for.
pub type Row = (&'static str, &'static str, Role, &'static str);

/// The table that both the router and the documentation are made from.
pub const TABLE: &[Row] = &[
    ("GET", "/v1/version", Role::Anyone, "which Haven this is"),
    (
        "POST",
        "/v1/join",
        Role::Anyone,
        "a host becomes part of the cluster; its join token is checked",
    ),
    ("GET", "/v1/status", Role::Viewer, "the cluster on one screen"),
    ("GET", "/v1/events", Role::Viewer, "the last events"),
    ("GET", "/v1/events/follow", Role::Viewer, "events as they come (server-sent)"),
    ("GET", "/v1/incidents", Role::Viewer, "all incidents"),
    ("GET", "/v1/explain/{kind}/{name}", Role::Viewer, "what there is to say of an object"),
    ("GET", "/v1/audit", Role::Admin, "who changed what"),
    ("POST", "/v1/apply", Role::Operator, "apply manifests"),
    ("POST", "/v1/invite", Role::Admin, "make a join token"),
    ("GET", "/v1/tokens", Role::Admin, "list tokens, without their secrets"),
    ("POST", "/v1/tokens/{name}", Role::Admin, "make a token"),
    ("DELETE", "/v1/tokens/{name}", Role::Admin, "end a token"),
    ("PUT", "/v1/import/{name}/{part}", Role::Operator, "import a file of an image"),
    ("GET", "/v1/blobs/{sha256}", Role::Admin, "a file of an image (for hosts)"),
    ("GET", "/v1/objects/{kind}", Role::Viewer, "list objects"),
    ("GET", "/v1/objects/{kind}/{name}", Role::Viewer, "one object"),
    (
        "PUT",
        "/v1/objects/{kind}/{name}",
        Role::Operator,
        "replace an object at a version, or create one at version 0",
    ),
    ("DELETE", "/v1/objects/{kind}/{name}", Role::Operator, "delete an object"),
    ("POST", "/v1/vms/{name}/{action}", Role::Operator, "start, stop or reset a VM"),
    ("GET", "/v1/vms/{name}/console", Role::Operator, "a VM's console (upgrade)"),
    ("GET", "/v1/vms/{name}/log", Role::Viewer, "what a VM's console said"),
    (
        "POST",
        "/v1/services/{name}/scale/{replicas}",
        Role::Operator,
        "change the number of members",
    ),
    ("POST", "/v1/services/{name}/restart", Role::Operator, "replace all members, a few at a time"),
];

fn handler(method: &str, path: &str) -> MethodRouter<ApiState> {
    match (method, path) {
        ("GET", "/v1/version") => get(version),
        ("POST", "/v1/join") => post(join),
        ("GET", "/v1/status") => get(status),
        ("GET", "/v1/events") => get(events),
        ("GET", "/v1/events/follow") => get(follow),
        ("GET", "/v1/incidents") => get(incidents),
        ("GET", "/v1/explain/{kind}/{name}") => get(explain),
        ("GET", "/v1/audit") => get(audit_log),
        ("POST", "/v1/apply") => post(apply_files),
        ("POST", "/v1/invite") => post(invite),
        ("GET", "/v1/tokens") => get(tokens),
        ("POST", "/v1/tokens/{name}") => post(new_token),
        ("DELETE", "/v1/tokens/{name}") => delete(end_token),
        ("PUT", "/v1/import/{name}/{part}") => put(import),
        ("GET", "/v1/blobs/{sha256}") => get(blob),
        ("GET", "/v1/objects/{kind}") => get(list),
        ("GET", "/v1/objects/{kind}/{name}") => get(one),
        ("PUT", "/v1/objects/{kind}/{name}") => put(replace),
        ("DELETE", "/v1/objects/{kind}/{name}") => delete(remove),
        ("POST", "/v1/vms/{name}/{action}") => post(act),
        ("GET", "/v1/vms/{name}/console") => get(console),
        ("GET", "/v1/vms/{name}/log") => get(log),
        ("POST", "/v1/services/{name}/scale/{replicas}") => post(scale),
        ("POST", "/v1/services/{name}/restart") => post(restart),
        _ => unreachable!("every row of TABLE has its handler here; a test builds the router"),
    }
}

/// The router. The caller stands in the request's extensions.
pub fn router(state: ApiState) -> Router {
    let mut router = Router::new();
    for (method, path, role, _) in TABLE {
        let gate = middleware::from_fn_with_state((state.clone(), *role), gate);
        router = router.route(path, handler(method, path).layer(gate));
    }
    router
        .fallback(|| async { ApiError::missing("such path in the API") })
        .layer(axum::extract::DefaultBodyLimit::max(16 << 20))
        .with_state(state)
}

/// Lets through who has the role, and writes the audit log for everything that is not a mere look.
async fn gate(
    State((state, least)): State<(ApiState, Role)>,
    Extension(caller): Extension<Caller>,
    request: Request,
    next: Next,
) -> Response {
    let what = format!("{} {}", request.method(), request.uri().path());
    let look = request.method() == axum::http::Method::GET;
    if caller.role < least {
        auth::audit(&state, &caller, what, "denied".into()).await;
        let (status, detail) = if caller.role == Role::Anyone {
            (StatusCode::UNAUTHORIZED, "this needs a token".to_owned())
        } else {
            (
                StatusCode::FORBIDDEN,
                format!("this needs the role {least:?}, and {} has {:?}", caller.who, caller.role)
                    .to_lowercase(),
            )
        };
        return ApiError::new(status, detail, "ask an admin for `haven token create --role …`")
            .into_response();
    }
    let response = next.run(request).await;
    if !look {
        let outcome = if response.status().is_success() {
            "ok".into()
        } else {
            response.status().to_string()
        };
        auth::audit(&state, &caller, what, outcome).await;
    }
    response
}

fn reference(kind: &str, name: &str) -> ApiResult<ObjectRef> {
    let bad = |error: haven_model::ModelError| ApiError::bad(error.to_string(), "");
    Ok(ObjectRef::new(kind.parse().map_err(bad)?, Name::new(name).map_err(bad)?))
}

async fn version() -> Json<BTreeMap<&'static str, &'static str>> {
    Json(BTreeMap::from([("version", env!("CARGO_PKG_VERSION"))]))
}

async fn status(State(state): Api) -> Json<Overview> {
    Json(overview::overview(&state))
}

#[derive(Deserialize)]
struct Limit {
    limit: Option<i64>,
}

async fn last<T: serde::de::DeserializeOwned>(
    state: &ApiState,
    prefix: &str,
    limit: Option<i64>,
) -> ApiResult<Vec<T>> {
    let mut found = state.store.last(prefix, limit.unwrap_or(100).clamp(1, 5000)).await?;
    found.reverse();
    Ok(found.iter().filter_map(|kv| serde_json::from_slice(&kv.value).ok()).collect())
}

async fn events(State(state): Api, Query(query): Query<Limit>) -> ApiResult<Json<Vec<Event>>> {
    last(&state, keys::EVENTS, query.limit).await.map(Json)
}

async fn audit_log(
    State(state): Api,
    Query(query): Query<Limit>,
) -> ApiResult<Json<Vec<AuditEntry>>> {
    last(&state, keys::AUDIT, query.limit).await.map(Json)
}

/// Events behind the last one known, asked for once a second while somebody listens.
async fn follow(State(state): Api) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let begin =
        state.store.last(keys::EVENTS, 1).await.ok().and_then(|last| last.into_iter().next());
    let after = begin.map(|kv| kv.key);
    let stream = futures::stream::unfold(
        (state, after, Vec::<Event>::new()),
        |(state, mut after, mut queue)| async move {
            while queue.is_empty() {
                if let Ok(page) = state.store.range(keys::EVENTS, after.as_deref(), 100, 0).await {
                    if let Some(kv) = page.kvs.last() {
                        after = Some(kv.key.clone());
                    }
                    queue = page
                        .kvs
                        .iter()
                        .rev()
                        .filter_map(|kv| serde_json::from_slice(&kv.value).ok())
                        .collect();
                }
                if queue.is_empty() {
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
            let event = queue.pop()?;
            let text = serde_json::to_string(&event).unwrap_or_default();
            Some((Ok(sse::Event::default().data(text)), (state, after, queue)))
        },
    );
    Sse::new(stream).keep_alive(sse::KeepAlive::default())
}

async fn incidents(State(state): Api) -> Json<Vec<Incident>> {
    Json(state.snapshot().incidents.values().map(|i| (*i.value).clone()).collect())
}

async fn explain(
    State(state): Api,
    Path((kind, name)): Path<(String, String)>,
) -> ApiResult<Json<Vec<String>>> {
    let reference = reference(&kind, &name)?;
    objects::get(&state, &reference)?;
    Ok(Json(state.explain(&reference)))
}

async fn apply_files(
    State(state): Api,
    Json(request): Json<ApplyRequest>,
) -> ApiResult<Json<Vec<Applied>>> {
    apply::apply(&state, &request).await.map(Json)
}

async fn invite(State(state): Api) -> ApiResult<Json<Secret>> {
    let id = Name::new(format!("join-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]))
        .map_err(|error| ApiError::bad(error.to_string(), ""))?;
    let (token, expires_ms) = make_token(&state, &id, Role::Anyone, true, 3_600_000).await?;
    Ok(Json(Secret { secret: format!("{token}.{}", state.invite.fingerprint), expires_ms }))
}

async fn join(State(state): Api, Json(request): Json<JoinRequest>) -> ApiResult<Json<JoinAnswer>> {
    let taken = state.snapshot().session_open(&request.host);
    if taken {
        let detail = format!("there is a host `{}` already", request.host);
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            detail,
            "give this one another name with --host-name",
        ));
    }
    auth::use_join_token(&state, &request.secret).await?;
    let failed = |why: String| {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why, "try again with a new token")
    };
    state.local.admit(&request).await.map(Json).map_err(failed)
}

#[derive(Deserialize)]
struct NewToken {
    role: Role,
    days: Option<i64>,
}

async fn new_token(
    State(state): Api,
    Path(name): Path<String>,
    Query(query): Query<NewToken>,
) -> ApiResult<Json<Secret>> {
    let name = Name::new(name).map_err(|error| ApiError::bad(error.to_string(), ""))?;
    let lifetime = query.days.unwrap_or(365).clamp(0, 3650) * 86_400_000;
    let (secret, expires_ms) = make_token(&state, &name, query.role, false, lifetime).await?;
    Ok(Json(Secret { secret, expires_ms }))
}

async fn tokens(State(state): Api) -> ApiResult<Json<Vec<TokenLine>>> {
    let found = state.store.all(keys::TOKENS).await?;
    let line = |kv: &haven_store::raw::RawKv| {
        let record: auth::TokenRecord = serde_json::from_slice(&kv.value).ok()?;
        let role = if record.join { "join".into() } else { format!("{:?}", record.role) };
        let name = kv.key.strip_prefix(keys::TOKENS)?.to_owned();
        Some(TokenLine { name, role: role.to_lowercase(), expires_ms: record.expires_ms })
    };
    Ok(Json(found.kvs.iter().filter_map(line).collect()))
}

async fn end_token(State(state): Api, Path(name): Path<String>) -> ApiResult<StatusCode> {
    let key = format!("{}{name}", keys::TOKENS);
    state.store.get(&key).await?.ok_or_else(|| ApiError::missing(&format!("token `{name}`")))?;
    state.store.txn(vec![], vec![Op::Delete(key)]).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
struct Page {
    limit: Option<usize>,
    after: Option<String>,
}

async fn list(
    State(state): Api,
    Path(kind): Path<String>,
    Query(page): Query<Page>,
) -> ApiResult<Json<List>> {
    let kind: Kind = kind
        .parse()
        .map_err(|error: haven_model::ModelError| ApiError::bad(error.to_string(), ""))?;
    let limit = page.limit.unwrap_or(500).clamp(1, 5000);
    Ok(Json(objects::list(&state, kind, limit, page.after.as_deref())))
}

async fn one(
    State(state): Api,
    Path((kind, name)): Path<(String, String)>,
) -> ApiResult<Json<Item>> {
    objects::get(&state, &reference(&kind, &name)?).map(Json)
}

async fn remove(
    State(state): Api,
    Path((kind, name)): Path<(String, String)>,
) -> ApiResult<Json<Item>> {
    objects::delete(&state, &reference(&kind, &name)?).await.map(Json)
}

async fn replace(
    State(state): Api,
    Path((kind, name)): Path<(String, String)>,
    Json(given): Json<Item>,
) -> ApiResult<Json<Item>> {
    let reference = reference(&kind, &name)?;
    if given.object.reference() != reference {
        return Err(ApiError::bad(
            format!("the body is {} and the path {reference}", given.object.reference()),
            "",
        ));
    }
    if given.resource_version == 0 {
        return objects::create(&state, given.object).await.map(Json);
    }
    let (_, now) = state
        .snapshot()
        .object(&reference)
        .ok_or_else(|| ApiError::missing(&reference.to_string()))?;
    let conflict = |now| ApiError::conflict(&reference.to_string(), given.resource_version, now);
    if now != given.resource_version {
        return Err(conflict(now));
    }
    let file = apply::replacement(&given.object);
    let problems = super::validate::validate(std::slice::from_ref(&file), &state.snapshot());
    if !problems.is_empty() {
        return Err(ApiError::manifests(problems));
    }
    let (old, _) = state
        .snapshot()
        .object(&reference)
        .ok_or_else(|| ApiError::missing(&reference.to_string()))?;
    let mut object = given.object.clone();
    apply::keep(&mut object, &old);
    let labels = std::mem::take(&mut object.meta_mut().labels);
    *object.meta_mut() = old.meta().clone();
    object.meta_mut().labels = labels;
    object.meta_mut().generation += 1;
    let key = keys::object(&reference);
    let compare = vec![Compare::ModRevision(key.clone(), given.resource_version)];
    let outcome = state.store.txn(compare, vec![Op::Put(key, object.to_store().into())]).await?;
    if !outcome.succeeded {
        return Err(conflict(outcome.revision));
    }
    Ok(Json(objects::item(&state.snapshot(), &(state.seen)(), object, outcome.revision)))
}

async fn act(
    State(state): Api,
    Path((name, action)): Path<(String, String)>,
) -> ApiResult<Json<Item>> {
    let reference = reference("vm", &name)?;
    let changed = objects::change(&state, &reference, |object| {
        let Object::Vm(vm) = object else {
            return Ok(());
        };
        match action.as_str() {
            "start" => vm.spec.running = true,
            "stop" => vm.spec.running = false,
            "reset" => vm.spec.resets += 1,
            other => {
                return Err(ApiError::bad(
                    format!("`{other}` cannot be done with a VM"),
                    "start, stop or reset",
                ));
            }
        }
        Ok(())
    });
    changed.await.map(Json)
}

async fn scale(
    State(state): Api,
    Path((name, replicas)): Path<(String, u32)>,
) -> ApiResult<Json<Item>> {
    if replicas > 500 {
        return Err(ApiError::bad(
            format!("{replicas} replicas are too many"),
            "a service has at most 500 members",
        ));
    }
    let reference = reference("service", &name)?;
    let changed = objects::change(&state, &reference, |object| {
        if let Object::Service(service) = object {
            service.spec.replicas = replicas;
        }
        Ok(())
    });
    changed.await.map(Json)
}

async fn restart(State(state): Api, Path(name): Path<String>) -> ApiResult<Json<Item>> {
    let reference = reference("service", &name)?;
    let changed = objects::change(&state, &reference, |object| {
        if let Object::Service(service) = object {
            service.spec.restarts += 1;
        }
        Ok(())
    });
    changed.await.map(Json)
}

#[derive(Deserialize)]
struct ImportQuery {
    checksum: Option<String>,
    cmdline: Option<String>,
}

async fn import(
    State(state): Api,
    Path((name, part)): Path<(String, String)>,
    Query(query): Query<ImportQuery>,
    request: Request,
) -> ApiResult<Json<Item>> {
    let reference = reference("image", &name)?;
    if !matches!(part.as_str(), "disk" | "kernel" | "initrd") {
        return Err(ApiError::bad(
            format!("an image has no part `{part}`"),
            "disk, kernel or initrd",
        ));
    }
    let stream = request.into_body().into_data_stream().map_err(std::io::Error::other);
    let reader = tokio_util::io::StreamReader::new(Box::pin(stream));
    let refused = |why: String| ApiError::bad(why, "");
    let file = state.local.import(Box::new(reader), query.checksum).await.map_err(refused)?;
    let key = keys::object(&reference);
    for _ in 0..5 {
        let record = state.store.get(&key).await?;
        let revision = record.as_ref().map_or(0, |kv| kv.mod_revision);
        let old: Option<Stored<ImageSpec>> =
            record.and_then(|kv| serde_json::from_slice(&kv.value).ok());
        let mut image = old.unwrap_or_else(|| Stored {
            meta: Meta::new(
                reference.name.clone(),
                uuid::Uuid::now_v7().to_string(),
                auth::now_ms(),
            ),
            spec: ImageSpec::default(),
        });
        match part.as_str() {
            "disk" => {
                image.spec.format = Some(state.local.disk_format(&file).await.map_err(refused)?);
                image.spec.disk = Some(file.clone());
            }
            "kernel" => image.spec.kernel = Some(file.clone()),
            _ => image.spec.initrd = Some(file.clone()),
        }
        if let Some(cmdline) = &query.cmdline {
            image.spec.cmdline.clone_from(cmdline);
        }
        let object = Object::Image(image);
        let compare = if revision == 0 {
            Compare::Absent(key.clone())
        } else {
            Compare::ModRevision(key.clone(), revision)
        };
        let outcome = state
            .store
            .txn(vec![compare], vec![Op::Put(key.clone(), object.to_store().into())])
            .await?;
        if outcome.succeeded {
            return Ok(Json(objects::item(
                &state.snapshot(),
                &(state.seen)(),
                object,
                outcome.revision,
            )));
        }
    }
    Err(ApiError::conflict(&reference.to_string(), 0, 0))
}

async fn blob(State(state): Api, Path(sha256): Path<String>) -> ApiResult<Response> {
    let path = state
        .local
        .blob(&sha256)
        .ok_or_else(|| ApiError::missing(&format!("file {sha256} on this host")))?;
    let file =
        tokio::fs::File::open(path).await.map_err(|error| ApiError::bad(error.to_string(), ""))?;
    Ok(Body::from_stream(tokio_util::io::ReaderStream::with_capacity(file, 1 << 16))
        .into_response())
}

/// The host that runs a VM, when it is not this one.
fn elsewhere(state: &ApiState, vm: &Name) -> ApiResult<Option<std::net::Ipv4Addr>> {
    let snapshot = state.snapshot();
    let missing = || ApiError::missing(&format!("running VM `{vm}`"));
    let placement = snapshot.placements.get(vm).ok_or_else(missing)?;
    if placement.host == state.me {
        return Ok(None);
    }
    Ok(Some(snapshot.hosts.get(&placement.host).ok_or_else(missing)?.spec.address))
}

async fn console(
    State(state): Api,
    Path(name): Path<String>,
    request: Request,
) -> ApiResult<Response> {
    let reference = reference("vm", &name)?;
    let failed = |why: String| {
        ApiError::new(StatusCode::BAD_GATEWAY, why, "is the VM running? `haven explain` tells")
    };
    let far: Box<dyn serve::Duplex> = match elsewhere(&state, &reference.name)? {
        Some(host) => {
            state.local.relay(host, &format!("/v1/vms/{name}/console")).await.map_err(failed)?
        }
        None => {
            let path = state.local.console(&name);
            let stream = tokio::net::UnixStream::connect(path).await;
            Box::new(stream.map_err(|error| {
                failed(format!("the console of {name} cannot be opened ({error})"))
            })?)
        }
    };
    serve::upgrade(request, far);
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, "haven-console")];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

async fn log(State(state): Api, Path(name): Path<String>) -> ApiResult<Vec<u8>> {
    let reference = reference("vm", &name)?;
    let failed = |why: String| ApiError::new(StatusCode::BAD_GATEWAY, why, "");
    if let Some(host) = elsewhere(&state, &reference.name)? {
        return state.local.fetch(host, &format!("/v1/vms/{name}/log")).await.map_err(failed);
    }
    let text = tokio::fs::read(state.local.log(&name)).await.unwrap_or_default();
    Ok(text[text.len().saturating_sub(64 << 10)..].to_vec())
}
