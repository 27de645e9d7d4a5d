//! What every route does; which routes there are stands in [`super::table`].

use super::{
    ApiState, admission, apply, auth,
    auth::{Caller, Role, make_token},
    body::{Asked, At, Given, GivenItem},
    error::{ApiError, ApiResult},
    objects, overview, serve, table,
};
use axum::{
    Extension, Json, Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response, Sse, sse},
};
use futures::{Stream, TryStreamExt};
use haven_model::{
    Event, ImageSpec, Incident, Meta, Name, Object, ObjectRef, VmPhase,
    api::{
        Applied, ApplyRequest, Item, JoinAnswer, JoinRequest, Overview, Page, Secret, TokenLine,
        Version,
    },
    event::AuditEntry,
    keys,
    object::{Kind, Stored},
};
use haven_plan::balance::services;
use haven_store::raw::{Compare, Op};
use schemars::JsonSchema;
use serde::Deserialize;
use std::{convert::Infallible, time::Duration};

type Api = State<ApiState>;

/// The router. The caller stands in the request's extensions.
pub fn router(state: ApiState) -> Router {
    let mut router = Router::new();
    for route in table::all() {
        let gate = middleware::from_fn_with_state((state.clone(), route.role), gate);
        router = router.route(route.path, (route.handler)().layer(gate));
    }
    router.fallback(no_path).method_not_allowed_fallback(no_method).with_state(state)
}

const PATHS: &str = "the API's description, docs/openapi.json, lists every path";

async fn no_path(request: Request) -> ApiError {
    let path = request.uri().path();
    ApiError::new(StatusCode::NOT_FOUND, format!("the API has no path `{path}`"), PATHS)
}

async fn no_method(request: Request) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    let detail = format!("`{path}` takes no {method}");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, detail, PATHS)
}

/// Lets through who has the role, and writes the audit log for everything that is not a mere look.
async fn gate(
    State((state, least)): State<(ApiState, Role)>,
    Extension(caller): Extension<Caller>,
    request: Request,
    next: Next,
) -> Response {
    let what = format!("{} {}", request.method(), request.uri().path());
    if caller.role < least {
        note(&state, &caller, what, "denied".into()).await;
        return denied(&caller, least).into_response();
    }
    if request.method() == axum::http::Method::GET {
        return next.run(request).await;
    }
    // A task of its own: a caller who hangs up must not keep a write that was done out of the log.
    let whole = tokio::spawn(async move {
        let response = next.run(request).await;
        let status = response.status();
        let outcome = if status.is_success() { "ok".into() } else { status.to_string() };
        note(&state, &caller, what, outcome).await;
        response
    });
    whole.await.unwrap_or_else(|_| {
        let hint = "look whether the change was made; the log of this host's daemon says more";
        let detail = "the daemon failed while it did this";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, detail, hint).into_response()
    })
}

/// Writes to the audit log what somebody did or tried. What nobody known tried in vain goes to the daemon's log
/// alone: whoever reaches the port could fill the store otherwise.
async fn note(state: &ApiState, caller: &Caller, what: String, outcome: String) {
    if caller.role > Role::Anyone || outcome == "ok" {
        auth::audit(state, caller, what, outcome).await;
    } else {
        tracing::warn!(what, from = caller.from, outcome, "somebody without a token was refused");
    }
}

fn denied(caller: &Caller, least: Role) -> ApiError {
    let hint = "ask an admin for `haven token create --role …`";
    if caller.role == Role::Anyone {
        return ApiError::new(StatusCode::UNAUTHORIZED, "this needs a token", hint);
    }
    let (who, role) = (&caller.who, caller.role);
    let detail = format!("this needs the role {least:?}, and {who} has {role:?}").to_lowercase();
    ApiError::new(StatusCode::FORBIDDEN, detail, hint)
}

fn reference(kind: &str, name: &str) -> ApiResult<ObjectRef> {
    Ok(ObjectRef::new(kind.parse()?, Name::new(name)?))
}

pub(super) async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION").into() })
}

pub(super) async fn status(State(state): Api) -> Json<Overview> {
    let leader = state.store.leader().await.ok().flatten();
    Json(overview::overview(&state, leader))
}

/// Which page of what happened is wanted.
#[derive(Deserialize, JsonSchema)]
pub(super) struct Latest {
    /// So many of the last entries, 1 to 5000; 100 when absent.
    limit: Option<i64>,
    /// Only entries older than this one: `next` of the page that was newer.
    before: Option<String>,
}

impl Latest {
    fn limit(&self) -> i64 {
        self.limit.unwrap_or(100).clamp(1, 5000)
    }
}

async fn last<T: serde::de::DeserializeOwned>(
    state: &ApiState,
    prefix: &str,
    query: &Latest,
) -> ApiResult<Json<Page<T>>> {
    let before = query.before.as_ref().map(|id| format!("{prefix}{id}"));
    let found = state.store.last(prefix, before.as_deref(), query.limit()).await?;
    let oldest = found.kvs.last().filter(|_| found.more);
    let next = oldest.and_then(|kv| kv.key.strip_prefix(prefix)).map(str::to_owned);
    let entries = found.kvs.iter().rev();
    let items = entries.filter_map(|kv| serde_json::from_slice(&kv.value).ok()).collect();
    Ok(Json(Page { items, next }))
}

pub(super) async fn events(
    State(state): Api,
    Asked(query): Asked<Latest>,
) -> ApiResult<Json<Page<Event>>> {
    last(&state, keys::EVENTS, &query).await
}

pub(super) async fn audit_log(
    State(state): Api,
    Asked(query): Asked<Latest>,
) -> ApiResult<Json<Page<AuditEntry>>> {
    last(&state, keys::AUDIT, &query).await
}

/// Which event somebody had last who lost the connection; nothing for what cannot be one.
fn heard_last(headers: &HeaderMap) -> Option<String> {
    let id = headers.get("last-event-id")?.to_str().ok()?;
    // Every event's id begins with its time; one that sorts behind all of them would bring nothing for ever.
    id.starts_with(|first: char| first.is_ascii_digit()).then(|| keys::event(id))
}

/// Events behind the last one known, asked for twice a second while somebody listens. Whoever comes back with the id of
/// the last one that it had gets all that came since.
pub(super) async fn follow(
    State(state): Api,
    headers: HeaderMap,
) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let after = match heard_last(&headers) {
        Some(key) => Some(key),
        None => {
            let last = state.store.last(keys::EVENTS, None, 1).await.ok();
            last.and_then(|last| last.kvs.into_iter().next()).map(|kv| kv.key)
        }
    };
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
            Some((Ok(sse::Event::default().id(event.id).data(text)), (state, after, queue)))
        },
    );
    Sse::new(stream).keep_alive(sse::KeepAlive::default())
}

pub(super) async fn incidents(
    State(state): Api,
    Asked(query): Asked<Latest>,
) -> ApiResult<Json<Page<Incident>>> {
    let number = |text: &String| {
        let detail = format!("`before` is `{text}`, and incidents have numbers");
        text.parse().map_err(|_| ApiError::bad(detail, "give the `next` of another page"))
    };
    let before = query.before.as_ref().map(number).transpose()?.unwrap_or(u64::MAX);
    let snapshot = state.snapshot();
    let limit = usize::try_from(query.limit()).unwrap_or(1);
    let mut older = snapshot.incidents.range(..before).rev();
    let mut items: Vec<Incident> =
        older.by_ref().take(limit).map(|(_, incident)| (*incident.value).clone()).collect();
    items.reverse();
    let next = older.next().and(items.first()).map(|oldest| oldest.number.to_string());
    Ok(Json(Page { items, next }))
}

pub(super) async fn explain(
    State(state): Api,
    At((kind, name)): At<(String, String)>,
) -> ApiResult<Json<Vec<String>>> {
    let reference = reference(&kind, &name)?;
    objects::get(&state, &reference)?;
    Ok(Json(state.explain(&reference)))
}

pub(super) async fn apply_files(
    State(state): Api,
    Given(request): Given<ApplyRequest>,
) -> ApiResult<Json<Vec<Applied>>> {
    apply::apply(&state, &request).await.map(Json)
}

pub(super) async fn invite(State(state): Api) -> ApiResult<Json<Secret>> {
    let id = Name::new(format!("join-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]))?;
    let (token, expires_ms) = make_token(&state, &id, Role::Anyone, true, 3_600_000).await?;
    Ok(Json(Secret { secret: format!("{token}.{}", state.invite.fingerprint), expires_ms }))
}

pub(super) async fn join(
    State(state): Api,
    Given(request): Given<JoinRequest>,
) -> ApiResult<Json<JoinAnswer>> {
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

/// A token to be made.
#[derive(Deserialize, JsonSchema)]
pub(super) struct NewToken {
    /// What it lets its owner do.
    role: Role,
    /// How long it is good for, 0 to 3650; 365 when absent.
    days: Option<i64>,
}

pub(super) async fn new_token(
    State(state): Api,
    At(name): At<String>,
    Asked(query): Asked<NewToken>,
) -> ApiResult<Json<Secret>> {
    let name = Name::new(name)?;
    let lifetime = query.days.unwrap_or(365).clamp(0, 3650) * 86_400_000;
    let (secret, expires_ms) = make_token(&state, &name, query.role, false, lifetime).await?;
    Ok(Json(Secret { secret, expires_ms }))
}

pub(super) async fn tokens(
    State(state): Api,
    Asked(query): Asked<Following>,
) -> ApiResult<Json<Page<TokenLine>>> {
    let after = query.after.as_ref().map(|name| format!("{}{name}", keys::TOKENS));
    let limit = i64::try_from(query.limit()).unwrap_or(1);
    let found = state.store.range(keys::TOKENS, after.as_deref(), limit, 0).await?;
    let line = |kv: &haven_store::raw::RawKv| {
        let record: auth::TokenRecord = serde_json::from_slice(&kv.value).ok()?;
        let role = if record.join { "join".into() } else { format!("{:?}", record.role) };
        let name = kv.key.strip_prefix(keys::TOKENS)?.to_owned();
        Some(TokenLine { name, role: role.to_lowercase(), expires_ms: record.expires_ms })
    };
    let last = found.kvs.last().filter(|_| found.more);
    let next = last.and_then(|kv| kv.key.strip_prefix(keys::TOKENS)).map(str::to_owned);
    Ok(Json(Page { items: found.kvs.iter().filter_map(line).collect(), next }))
}

pub(super) async fn end_token(State(state): Api, At(name): At<String>) -> ApiResult<StatusCode> {
    let key = format!("{}{name}", keys::TOKENS);
    if state.store.get(&key).await?.is_none() {
        let hint = "it may have been ended already; `haven token create` makes one";
        let detail = format!("there is no token `{name}`");
        return Err(ApiError::new(StatusCode::NOT_FOUND, detail, hint));
    }
    state.store.txn(vec![], vec![Op::Delete(key)]).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Which page of a list is wanted.
#[derive(Deserialize, JsonSchema)]
pub(super) struct Following {
    /// So many at most, 1 to 5000; 500 when absent.
    limit: Option<usize>,
    /// Only what comes behind this name: `next` of the page before.
    after: Option<String>,
}

impl Following {
    fn limit(&self) -> usize {
        self.limit.unwrap_or(500).clamp(1, 5000)
    }
}

pub(super) async fn list(
    State(state): Api,
    At(kind): At<String>,
    Asked(query): Asked<Following>,
) -> ApiResult<Json<Page<Item>>> {
    let kind: Kind = kind.parse()?;
    Ok(Json(objects::list(&state, kind, query.limit(), query.after.as_deref())))
}

pub(super) async fn one(
    State(state): Api,
    At((kind, name)): At<(String, String)>,
) -> ApiResult<Json<Item>> {
    objects::get(&state, &reference(&kind, &name)?).map(Json)
}

pub(super) async fn remove(
    State(state): Api,
    At((kind, name)): At<(String, String)>,
) -> ApiResult<Json<Item>> {
    objects::delete(&state, &reference(&kind, &name)?).await.map(Json)
}

pub(super) async fn replace(
    State(state): Api,
    At((kind, name)): At<(String, String)>,
    GivenItem { mut object, resource_version }: GivenItem,
) -> ApiResult<Json<Item>> {
    let reference = reference(&kind, &name)?;
    if object.reference() != reference {
        return Err(ApiError::bad(
            format!("the body is {} and the path {reference}", object.reference()),
            "send an object to its own path; `haven apply` makes new ones",
        ));
    }
    if resource_version == 0 {
        return objects::create(&state, object).await.map(Json);
    }
    let snapshot = state.current().await?;
    let (old, now) = objects::read(&state, &reference).await?;
    let conflict = |now| ApiError::conflict(&reference.to_string(), resource_version, now);
    if now != resource_version {
        return Err(conflict(now));
    }
    apply::not_deleting(&old)?;
    let file = apply::replacement(&object);
    apply::check(&state, std::slice::from_ref(&file), &snapshot)?;
    apply::keep(&mut object, &old, &snapshot);
    apply::seal(&state, &mut object, Some(&old))?;
    super::pools::check(&state, &mut object, Some(&old), false).await?;
    let labels = std::mem::take(&mut object.meta_mut().labels);
    *object.meta_mut() = old.meta().clone();
    object.meta_mut().labels = labels;
    object.meta_mut().generation += 1;
    let admitted = admission::ask(&state, &snapshot, std::slice::from_ref(&object))?;
    let key = keys::object(&reference);
    let compare = vec![Compare::ModRevision(key.clone(), resource_version)];
    let write = vec![Op::Put(key.clone(), object.to_store().into())];
    let outcome = state.store.txn(compare, write).await?;
    if !outcome.succeeded {
        return Err(conflict(state.store.get(&key).await?.map_or(0, |kv| kv.mod_revision)));
    }
    let item = objects::item(&snapshot, &(state.seen)(), object, outcome.revision);
    Ok(Json(Item { warning: admitted.warning(&reference), ..item }))
}

pub(super) async fn act(
    State(state): Api,
    At((name, action)): At<(String, String)>,
) -> ApiResult<Json<Item>> {
    let reference = reference("vm", &name)?;
    let changed = objects::change(&state, &reference, |object| {
        let Object::Vm(vm) = object else {
            return Ok(());
        };
        match action.as_str() {
            // One that ended by itself, and that its restart policy leaves so, is wanted anew.
            "start" if vm.spec.running && has_ended(&state, &vm.meta.name) => vm.spec.resets += 1,
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

fn has_ended(state: &ApiState, vm: &Name) -> bool {
    state.snapshot().told_of(vm).is_some_and(|status| status.phase == VmPhase::Stopped)
}

pub(super) async fn scale(
    State(state): Api,
    At((name, replicas)): At<(String, u32)>,
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
            let update = &service.spec.update;
            super::validate::names_of_members(&service.meta.name, replicas, update)
                .map_err(|(message, hint)| ApiError::bad(message, hint))?;
            service.spec.replicas = replicas;
        }
        Ok(())
    });
    changed.await.map(Json)
}

pub(super) async fn restart(State(state): Api, At(name): At<String>) -> ApiResult<Json<Item>> {
    let reference = reference("service", &name)?;
    let changed = objects::change(&state, &reference, |object| {
        if let Object::Service(service) = object {
            service.spec.restarts += 1;
        }
        Ok(())
    });
    changed.await.map(Json)
}

/// Lets the new template of a service go on, the one that this daemon shows and no other.
pub(super) async fn promote(State(state): Api, At(name): At<String>) -> ApiResult<Json<Item>> {
    let reference = reference("service", &name)?;
    let changed = objects::change(&state, &reference, |object| {
        let Object::Service(service) = object else {
            return Ok(());
        };
        let snapshot = state.snapshot();
        let refuse = |(why, hint): (String, String)| ApiError::new(StatusCode::CONFLICT, why, hint);
        let template = services::promotable(&snapshot, &(state.seen)(), &service.meta.name);
        let template = template.map_err(refuse)?;
        if template != services::template_hash(&service.spec) {
            let why = format!("{} was changed just now", service.meta.name);
            return Err(refuse((why, "look at it again, then promote".into())));
        }
        service.spec.promoted = Some(template);
        Ok(())
    });
    changed.await.map(Json)
}

/// What goes along with a file of an image.
#[derive(Deserialize, JsonSchema)]
pub(super) struct ImportQuery {
    /// SHA-256 that the file must have, lower-case hexadecimal.
    checksum: Option<String>,
    /// Kernel command line for direct boot; kept as it is when absent.
    cmdline: Option<String>,
}

pub(super) async fn import(
    State(state): Api,
    At((name, part)): At<(String, String)>,
    Asked(query): Asked<ImportQuery>,
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
    let refused = |why: String| {
        ApiError::bad(
            why,
            "check the file and its checksum, then import it again; nothing was kept",
        )
    };
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
    Err(ApiError::busy(&reference.to_string()))
}

pub(super) async fn blob(State(state): Api, At(sha256): At<String>) -> ApiResult<Response> {
    let path = state
        .local
        .blob(&sha256)
        .ok_or_else(|| ApiError::missing(&format!("file {sha256} on this host")))?;
    let file = tokio::fs::File::open(path).await.map_err(|error| {
        let detail = format!("file {sha256} cannot be read on this host ({error})");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, detail, "ask another host for it")
    })?;
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

pub(super) async fn console(
    State(state): Api,
    At(name): At<String>,
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

pub(super) async fn log(State(state): Api, At(name): At<String>) -> ApiResult<Vec<u8>> {
    let reference = reference("vm", &name)?;
    let failed = |why: String| {
        ApiError::new(
            StatusCode::BAD_GATEWAY,
            why,
            "`haven status` tells whether its host is online",
        )
    };
    if let Some(host) = elsewhere(&state, &reference.name)? {
        return state.local.fetch(host, &format!("/v1/vms/{name}/log")).await.map_err(failed);
    }
    let text = tokio::fs::read(state.local.log(&name)).await.unwrap_or_default();
    Ok(text[text.len().saturating_sub(64 << 10)..].to_vec())
}
