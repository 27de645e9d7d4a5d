//! Every route by role, and what the API promises of writes, lists, logs and bodies, asked through its HTTP server.

use super::{
    ApiState,
    auth::{Role, make_token},
    body::LARGEST_BODY,
    certificates_test::any_certificate,
    serve::{serve_listener, serve_unix},
    table::{self, Takes},
    testing::{Answer, World, name},
};
use crate::manager::commit::put_event;
use axum::http::StatusCode;
use haven_client::{Client, ClientError, Pin};
use haven_model::{
    Event, Meta, Object, ObjectRef, Severity, Snapshot,
    api::ManifestFile,
    keys,
    object::{Kind, Stored},
    volume::VolumeRef,
};
use haven_store::{
    pki::{Authority, fingerprint, request, server_config},
    raw::{Identity, Op},
    server::MAX_TXN_OPS,
};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::watch};

fn vm(name: &str) -> String {
    format!("kind: VM\nname: {name}\nmemory: 64MiB\n")
}

fn vms(names: impl Iterator<Item = String>) -> String {
    names.map(|name| vm(&name)).collect::<Vec<_>>().join("---\n")
}

/// A path of the table with something that does not exist in its braces.
fn example(path: &str) -> String {
    path.replace("{kind}", "vm")
        .replace("{name}", "absent")
        .replace("{vm}/{id}", "old/b1")
        .replace("{part}", "disk")
        .replace("{sha256}", &"0".repeat(64))
        .replace("{action}", "start")
        .replace("{replicas}", "3")
        .replace("/tokens/absent", "/tokens/absent?role=viewer")
}

fn refused(answer: &Answer) -> bool {
    matches!(answer.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_route_answers_exactly_whom_its_role_lets_in() {
    let Some(world) = World::start().await else { return };
    for route in table::all() {
        for role in [Role::Anyone, Role::Viewer, Role::Operator, Role::Admin] {
            // A body of the right kind that says nothing, so that no handler gets far.
            let body = if matches!(route.takes, Takes::Json(_)) { "{}" } else { "" };
            let answer =
                world.ask(world.token(role), route.method, &example(route.path), body).await;
            let what = format!("{} {} as {role:?}: {answer:?}", route.method, route.path);
            assert_eq!(refused(&answer), role < route.role, "{what}");
            if refused(&answer) {
                let right = if role == Role::Anyone {
                    StatusCode::UNAUTHORIZED
                } else {
                    StatusCode::FORBIDDEN
                };
                assert_eq!(answer.status, right, "{what}");
            }
        }
    }
    let unknown = world.ask(world.token(Role::Admin), "GET", "/v1/nothing", "").await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    let method = world.ask(world.token(Role::Admin), "PATCH", "/v1/status", "").await;
    assert_eq!(method.status, StatusCode::METHOD_NOT_ALLOWED);
}

/// A service, a VM that is placed here, a network, an event and an incident.
async fn furnish(world: &World) {
    world.apply(&any_certificate()).await.ok();
    world
        .apply(
            "kind: Service\nname: web\nreplicas: 1\ntemplate: {spec: {memory: 64MiB}}\n---\n\
             kind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\n\
             kind: Pool\nname: fast\ndriver: shared\npath: /srv\n---\n\
             kind: Target\nname: nas\ndirectory: /backups\n---\n\
             kind: VM\nname: alone\nmemory: 64MiB\nlabels: {tier: web}\nnetworks: [{network: front}]\n\
             disks: [{name: data, size: 1GiB, pool: fast}]\n",
        )
        .await
        .ok();
    let host = json!({"meta": Meta::new(name("host1"), "uid".into(), 0), "spec": {"address": "10.0.0.1",
        "power": {"url": "https://10.0.0.9", "user": "root", "password": "secret"}}});
    let placement = json!({"host": "host1", "epoch": 1, "slot": 0, "nics": []});
    let step = json!({"at_ms": 1, "phase": "noticed", "object": "host/host1", "message": "silent"});
    let incident = json!({"number": 1, "title": "host1 was lost", "host": "host1", "session": 1,
        "waiting_for": ["alone"], "steps": [step], "closed_ms": null});
    let volume = json!({"vmUid": "uid", "pool": "fast", "size": "1GiB", "replicas": {"host1": "counted", "host2": "stale"},
        "run": 3, "clean": false});
    let put = |key: String, value: Value| Op::Put(key, value.to_string().into());
    let ops = vec![
        put(keys::CLUSTER.into(), json!({"name": "tests"})),
        put(keys::object(&ObjectRef::new(Kind::Host, name("host1"))), host),
        put(keys::placement(&name("alone")), placement),
        put(keys::incident(1), incident),
        put(keys::volume(&VolumeRef { vm: name("alone"), disk: name("data") }), volume),
        put_event(&event("something happened")),
    ];
    world.state.store.txn(vec![], ops).await.unwrap();
    world.state.current().await.unwrap();
}

/// The path of a route to what is there.
fn furnished(route: &super::table::Route) -> String {
    let there = |absent: &str| example(route.path).replace("absent", absent);
    match route.id {
        "deleteObject" => "/v1/objects/network/front".to_owned(),
        "volumePieces" => there("alone.data") + "?from=0&count=1",
        "volumeKept" => there("alone.data") + "?uid=u&copy=a1&from=0",
        "backupFile" => there("nas") + "?at=root:/etc/hosts",
        "endToken" => "/v1/tokens/viewer".to_owned(),
        "rehearse" => "/v1/rehearse/fail?hosts=host1".to_owned(),
        _ if route.path.starts_with("/v1/volumes/") => there("alone.data"),
        _ if route.path.starts_with("/v1/targets/") => there("nas"),
        _ if route.path.starts_with("/v1/services") => there("web"),
        _ if route.path.starts_with("/v1/tokens") => example(route.path),
        _ if route.path.starts_with("/v1/hosts") => there("host1"),
        _ => there("alone"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_answer_that_went_well_is_what_the_description_says() {
    let Some(world) = World::start().await else { return };
    furnish(&world).await;
    let admin = world.token(Role::Admin);
    let join = make_token(&world.state, &name("join-1"), Role::Anyone, true, 60_000).await.unwrap();
    let join = json!({"secret": join.0, "host": "host2", "address": "10.0.0.2", "request": "PEM"});
    let files = json!({"files": [{"name": "a", "text": vm("new")}], "dryRun": true});
    let item = world.ask(admin, "GET", "/v1/objects/vm/alone", "").await.ok();
    let cluster = world.ask(admin, "GET", "/v1/cluster", "").await.ok();
    let mut missed = Vec::new();
    for route in table::all() {
        let path = furnished(route);
        let body = match route.id {
            "join" => join.to_string(),
            "apply" => files.to_string(),
            "importImage" => "a disk".into(),
            "migrateVm" | "checkVolume" | "runBackup" | "verifyBackups" | "takeSnapshot"
            | "revertSnapshot" => "{}".into(),
            "beginMaintenance" => json!({"work": "reboot"}).to_string(),
            "replaceObject" => item.to_string(),
            "replaceCluster" => cluster.to_string(),
            _ => String::new(),
        };
        let answer = world.ask(admin, route.method, &path, body).await;
        if !answer.status.is_success() {
            missed.push(route.id);
        }
    }
    // Only hosts ask for promises. No image file is kept here, no guest comes in, no VM runs whose console could be opened, there is no other host
    // that could read this one's power (`power_test.rs`), no update waits (`promote_test.rs`), and an
    // incident is open (`balance_test.rs`), and no host says what it understands (`maintenance_test.rs`, `volumes_test.rs`,
    // `backups_test.rs`, `snapshots_test.rs`).
    assert_eq!(
        missed,
        [
            "promise",
            "blob",
            "rebalance",
            "beginMaintenance",
            "resumeMaintenance",
            "endMaintenance",
            "vmIncoming",
            "vmIncomingDisks",
            "vmConsole",
            "testFence",
            "promoteService",
            "removeVolume",
            "checkVolume",
            "cancelCheck",
            "volumePieces",
            "volumeKept",
            "runBackup",
            "cancelBackup",
            "takeSnapshot",
            "revertSnapshot",
            "removeSnapshot",
            "cloneVm",
            "removeBackup",
            "showVerification",
            "verifyBackups",
            "cancelVerification",
            "restoreBackup"
        ]
    );
    for kind in Kind::ALL {
        let list = world.ask(admin, "GET", &format!("/v1/objects/{kind}"), "").await.ok();
        assert!(!list["items"].as_array().unwrap().is_empty(), "there is no {kind} to look at");
        assert!(!list.to_string().contains("secret"), "a password is shown: {list}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_rests_on_an_old_version_is_refused_with_both_versions() {
    let Some(world) = World::start().await else { return };
    world.apply(&vm("web")).await.ok();
    let path = "/v1/objects/vm/web";
    let seen = world.operate("GET", path, "").await.ok();
    let with = |cpus: u32| {
        let mut body = seen.clone();
        body["spec"]["cpus"] = json!(cpus);
        body.to_string()
    };
    let first = world.operate("PUT", path, with(2)).await.ok();
    assert_eq!(first["spec"]["cpus"], 2);
    assert_eq!(first["meta"]["generation"], 2);
    let second = world.operate("PUT", path, with(3)).await;
    assert_eq!(second.status, StatusCode::CONFLICT);
    let (old, new) = (&seen["resourceVersion"], &first["resourceVersion"]);
    assert_eq!(second.body["conflict"], json!({"object": "vm/web", "given": old, "now": new}));
    let detail = second.body["detail"].as_str().unwrap();
    assert!(detail.contains(&old.to_string()) && detail.contains(&new.to_string()), "{detail}");
    // What was answered can be written back at once, without a look in between.
    let mut again = first.clone();
    again["spec"]["cpus"] = json!(4);
    let again = world.operate("PUT", path, again.to_string()).await.ok();
    assert_eq!(again["spec"]["cpus"], 4);
    // Of two that write at the same time one wins.
    let bodies = [5, 6].map(|cpus| {
        let mut body = again.clone();
        body["spec"]["cpus"] = json!(cpus);
        body.to_string()
    });
    let [one, other] = bodies.map(|body| world.operate("PUT", path, body));
    let (one, other) = tokio::join!(one, other);
    let won = [&one, &other].iter().filter(|a| a.status == StatusCode::OK).count();
    let lost = [&one, &other].iter().filter(|a| a.status == StatusCode::CONFLICT).count();
    assert_eq!((won, lost), (1, 1), "{one:?} {other:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_clusters_spec_changes_whole_at_a_version_and_only_into_a_safe_one() {
    let Some(world) = World::start().await else { return };
    let admin = world.token(Role::Admin);
    let put = async |body: &Value| world.ask(admin, "PUT", "/v1/cluster", body.to_string()).await;
    let absent = world.ask(admin, "GET", "/v1/cluster", "").await;
    assert_eq!(absent.status, StatusCode::NOT_FOUND);
    furnish(&world).await;
    let seen = world.ask(admin, "GET", "/v1/cluster", "").await.ok();
    assert_eq!(seen["spec"]["timers"]["lease"], "5s");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut body = seen.clone();
        change(&mut body["spec"]);
        body
    };
    for (wrong, word) in [
        (with(&|spec| spec["timers"]["lease"] = json!("4500ms")), "margin (400ms) must not exceed"),
        (with(&|spec| spec["timers"]["guard"] = json!("3s")), "worst election"),
        (with(&|spec| spec["fencing"] = json!([])), "`fencing` is empty"),
        (with(&|spec| spec["fencing"] = json!(["storage-fenced"])), "storage-fenced alone"),
        (with(&|spec| spec["voters"] = json!(2)), "write 1, 3 or 5"),
        (with(&|spec| spec["replaceVoterAfter"] = json!("1s")), "at least 10s"),
        (with(&|spec| spec["timres"] = json!({})), "timres"),
    ] {
        let answer = put(&wrong).await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{answer:?}");
        assert!(answer.body.to_string().contains(word), "{word}: {answer:?}");
    }
    let now = world.ask(admin, "GET", "/v1/cluster", "").await.ok();
    assert_eq!(now, seen, "what was refused has changed nothing");
    let longer = with(&|spec| {
        spec["timers"]["lease"] = json!("10s");
        spec["timers"]["margin"] = json!("1s");
        spec["timers"]["guard"] = json!("9s");
        spec["fencing"] = json!(["lease-expired"]);
    });
    let changed = put(&longer).await.ok();
    let copy = world.state.current().await.unwrap();
    assert_eq!(copy.cluster_spec().timers.lease.0, 10_000);
    assert_eq!(
        copy.cluster.as_ref().map(|spec| json!(spec.revision)).as_ref(),
        Some(&changed["resourceVersion"])
    );
    let late = put(&longer).await;
    assert_eq!(late.status, StatusCode::CONFLICT);
    let (old, new) = (&seen["resourceVersion"], &changed["resourceVersion"]);
    assert_eq!(late.body["conflict"], json!({"object": "cluster", "given": old, "now": new}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_comes_in_pages_that_miss_nothing() {
    let Some(world) = World::start().await else { return };
    let names: Vec<String> = (0..25).map(|i| format!("vm-{i:02}")).collect();
    world.apply(&vms(names.iter().cloned())).await.ok();
    let (mut found, mut after, mut pages) = (Vec::new(), String::new(), Vec::new());
    loop {
        let page = world.operate("GET", &format!("/v1/objects/vm?limit=10{after}"), "").await.ok();
        let items = page["items"].as_array().unwrap();
        pages.push(items.len());
        let of = |item: &Value| item["meta"]["name"].as_str().unwrap().to_owned();
        found.extend(items.iter().map(of));
        let Some(next) = page["next"].as_str() else { break };
        after = format!("&after={next}");
    }
    assert_eq!(pages, [10, 10, 5]);
    assert_eq!(found, names);
    let exact = world.operate("GET", "/v1/objects/vms?limit=25", "").await.ok();
    assert!(exact["next"].is_null(), "the last page names no next one");
    let bad = world.operate("GET", "/v1/objects/vm?limit=many", "").await;
    assert_eq!(bad.status, StatusCode::BAD_REQUEST);
    assert!(bad.body["detail"].as_str().unwrap().contains("limit"), "{bad:?}");
}

/// Follows `next` from page to page of three; what `word` says of each entry, page by page.
async fn pages(world: &World, path: &str, step: &str, word: &str) -> Vec<Vec<String>> {
    let (mut found, mut next) = (Vec::new(), String::new());
    loop {
        let asked = format!("{path}?limit=3{next}");
        let page = world.ask(world.token(Role::Admin), "GET", &asked, "").await.ok();
        let entries = page["items"].as_array().unwrap().iter();
        found.push(entries.map(|e| e[word].to_string().replace('"', "")).collect());
        let Some(more) = page["next"].as_str() else { return found };
        next = format!("&{step}={more}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happened_is_paged_from_the_newest_back_and_tokens_by_name() {
    let Some(world) = World::start().await else { return };
    let events = (1..=7).map(|n| Event { id: format!("{n:014}-x"), ..event(&n.to_string()) });
    let mut ops: Vec<Op> = events.map(|event| put_event(&event)).collect();
    ops.extend((1..=7).map(|number| {
        let record = json!({"number": number, "title": "a loss", "host": "host9", "session": number,
            "waiting_for": [], "steps": [], "closed_ms": 1});
        Op::Put(keys::incident(number), record.to_string().into())
    }));
    world.state.store.txn(vec![], ops).await.unwrap();
    let newest_first = [vec!["5", "6", "7"], vec!["2", "3", "4"], vec!["1"]];
    assert_eq!(pages(&world, "/v1/events", "before", "message").await, newest_first);
    while world.state.snapshot().incidents.len() < 7 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(pages(&world, "/v1/incidents", "before", "number").await, newest_first);
    let bad = world.operate("GET", "/v1/incidents?before=first", "").await;
    assert_eq!(bad.status, StatusCode::BAD_REQUEST, "{bad:?}");
    for n in 0..4 {
        let path = format!("/v1/tokens/robot-{n}?role=viewer");
        world.ask(world.token(Role::Admin), "POST", &path, "").await.ok();
    }
    let log = pages(&world, "/v1/audit", "before", "what").await;
    assert_eq!(
        log,
        [
            vec!["POST /v1/tokens/robot-1", "POST /v1/tokens/robot-2", "POST /v1/tokens/robot-3"],
            vec!["POST /v1/tokens/robot-0"]
        ]
    );
    let tokens = pages(&world, "/v1/tokens", "after", "name").await;
    let names = ["admin", "operator", "robot-0", "robot-1", "robot-2", "robot-3", "viewer"];
    assert_eq!(tokens, [&names[..3], &names[3..6], &names[6..]]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_write_and_every_refusal_stands_in_the_audit_log() {
    let Some(world) = World::start().await else { return };
    let admin = world.token(Role::Admin);
    let log = async || {
        let entries = world.ask(admin, "GET", "/v1/audit?limit=5000", "").await.ok();
        entries["items"].as_array().unwrap().clone()
    };
    for route in table::all().filter(|route| route.method != "GET") {
        let before = log().await.len();
        let path = example(route.path);
        let body = if matches!(route.takes, Takes::Json(_)) { "{}" } else { "" };
        let answer = world.ask(admin, route.method, &path, body).await;
        let entries = log().await;
        assert_eq!(entries.len(), before + 1, "{} {path}", route.method);
        let entry = entries.last().unwrap();
        let what = format!("{} {}", route.method, path.split('?').next().unwrap());
        assert_eq!(entry["what"], what);
        assert_eq!((&entry["who"], &entry["from"]), (&json!("admin"), &json!("192.0.2.7")));
        assert_eq!(entry["outcome"] == "ok", answer.status.is_success(), "{entry}");
    }
    let before = log().await.len();
    world.ask(world.token(Role::Viewer), "DELETE", "/v1/objects/vm/web", "").await;
    let entries = log().await;
    assert_eq!(entries.len(), before + 1);
    let entry = entries.last().unwrap();
    assert_eq!((&entry["who"], &entry["outcome"]), (&json!("viewer"), &json!("denied")));
    // Whoever reaches the port and has no token cannot fill the store.
    for (method, path) in [("DELETE", "/v1/objects/vm/web"), ("POST", "/v1/join")] {
        world.ask(None, method, path, "{}").await;
    }
    assert_eq!(log().await.len(), before + 1);
    // A caller who hangs up does not keep what was done out of the log.
    let files = json!({"files": [{"name": "a", "text": vm("hasty")}]}).to_string();
    let mut hasty = Box::pin(world.operate("POST", "/v1/apply", files));
    while vms_in_store(&world.state).await == 0 {
        let _ = tokio::time::timeout(Duration::from_micros(200), &mut hasty).await;
    }
    drop(hasty);
    let begin = std::time::Instant::now();
    while log().await.len() < before + 2 {
        assert!(begin.elapsed() < Duration::from_secs(10), "the apply is not in the log");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_no_longer_good_is_told_why() {
    let Some(world) = World::start().await else { return };
    let make = async |of: &str, join: bool, lifetime_ms: i64| {
        make_token(&world.state, &name(of), Role::Admin, join, lifetime_ms).await.unwrap().0
    };
    let expired = make("old", false, -1000).await;
    let answer = world.ask(Some(&expired), "GET", "/v1/status", "").await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
    let detail = answer.body["detail"].as_str().unwrap();
    assert!(detail.starts_with("the token `old` expired on 20"), "{detail}");
    assert!(!detail.contains(['\n', '.']), "one sentence: {detail}");
    assert!(answer.body["hint"].as_str().unwrap().contains("haven token create"), "{answer:?}");
    let good = world.token(Role::Admin).unwrap();
    for (token, why) in [
        (format!("{good}x"), "secret is wrong"),
        ("absent.0123".into(), "does not exist"),
        ("rubbish".into(), "not a token"),
    ] {
        let answer = world.ask(Some(&token), "GET", "/v1/status", "").await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
        assert!(answer.body["detail"].as_str().unwrap().contains(why), "{answer:?}");
    }
    // A join token lets nobody do anything but join, whatever its role.
    let join = make("join-1", true, 60_000).await;
    assert!(refused(&world.ask(Some(&join), "GET", "/v1/status", "").await));
    // And one that lets join only as long as it is good, and only once.
    let late = make("join-2", true, -1000).await;
    let anybody = make("person", false, 60_000).await;
    for (secret, why) in [
        (&late, "the token `join-2` expired on 20"),
        (&anybody, "this token does not let a host join"),
        (&"join-9.0123".to_owned(), "this token does not exist or was used already"),
    ] {
        let body =
            json!({"secret": secret, "host": "host2", "address": "10.0.0.2", "request": "PEM"});
        let answer = world.ask(None, "POST", "/v1/join", body.to_string()).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
        assert!(answer.body["detail"].as_str().unwrap().starts_with(why), "{answer:?}");
        assert!(answer.body["hint"].as_str().unwrap().contains("haven host invite"), "{answer:?}");
    }
    world.ask(Some(good), "DELETE", "/v1/tokens/admin", "").await.ok();
    assert!(refused(&world.ask(Some(good), "GET", "/v1/status", "").await));
}

fn first_problem(answer: &Answer) -> (u64, u64, String) {
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{answer:?}");
    let problem = &answer.body["problems"][0];
    let number = |field: &str| problem[field].as_u64().unwrap();
    (number("line"), number("column"), problem["message"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_knows_is_named_with_line_and_column() {
    let Some(world) = World::start().await else { return };
    let field = world.apply(&(vm("web") + "cpu: 2\n")).await;
    let (line, column, message) = first_problem(&field);
    assert_eq!((line, column), (4, 1));
    assert!(message.contains("cpu") && message.contains("cpus"), "{message}");
    assert_eq!(field.body["problems"][0]["file"], "test.yaml");
    let kind = first_problem(&world.apply("name: web\nkind: Machine\n").await);
    assert_eq!((kind.0, kind.1), (2, 7));
    assert!(kind.2.contains("`Machine` is not a kind"), "{kind:?}");
    // The same of JSON bodies.
    world.apply(&vm("web")).await.ok();
    let head = "{\"resourceVersion\": 1, \"kind\": \"VM\",\n\"meta\": {\"name\": \"web\", \"uid\": \"\", \"generation\": 1},\n";
    let put = async |body: String| world.operate("PUT", "/v1/objects/vm/web", body).await;
    let field = first_problem(
        &put(format!("{head}\"spec\": {{\"memory\": \"1GiB\", \"cpu\": 2}}}}")).await,
    );
    assert_eq!((field.0, field.1), (3, 32), "{field:?}");
    assert!(field.2.contains("unknown field `cpu`"), "{field:?}");
    let unit = first_problem(&put(format!("{head}\"spec\": {{\"memory\": \"1gig\"}}}}")).await);
    assert!(unit.0 == 3 && unit.2.contains("512MiB"), "{unit:?}");
    let kind = first_problem(&put(head.replace("VM", "Machine") + "\"spec\": {}}").await);
    assert!(kind.0 == 1 && kind.2.contains("`Machine`"), "{kind:?}");
    let broken = put("{\"kind\": \"VM\",".into()).await;
    assert_eq!(broken.status, StatusCode::BAD_REQUEST);
    let typo = "{\"files\": [],\n\"dryrun\": true}";
    let typo = first_problem(&world.operate("POST", "/v1/apply", typo).await);
    assert!(typo.0 == 2 && typo.2.contains("dryRun"), "{typo:?}");
    for path in ["/v1/objects/machine", "/v1/objects/machine/web"] {
        let answer = world.operate("GET", path, "").await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert!(answer.body["detail"].as_str().unwrap().contains("is not a kind"), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_megabytes_are_refused_with_413() {
    let Some(world) = World::start().await else { return };
    let large = json!({"files": [{"name": "a", "text": "#".repeat(10 << 20)}]}).to_string();
    let answer = world.operate("POST", "/v1/apply", large).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(answer.body["hint"].as_str().unwrap().contains("haven image import"), "{answer:?}");
    let just_read = world.operate("POST", "/v1/apply", " ".repeat(LARGEST_BODY)).await;
    assert_eq!(just_read.status, StatusCode::BAD_REQUEST, "{just_read:?}");
    let one_more = world.operate("POST", "/v1/apply", " ".repeat(LARGEST_BODY + 1)).await;
    assert_eq!(one_more.status, StatusCode::PAYLOAD_TOO_LARGE);
}

async fn vms_in_store(state: &ApiState) -> usize {
    state.store.all(&keys::objects(Kind::Vm)).await.unwrap().kvs.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_objects_are_applied_whole_or_not_at_all() {
    let Some(world) = World::start().await else { return };
    let names = || (0..300).map(|i| format!("vm-{i:03}"));
    // A host whose copy of the store is behind: it does not know what somebody else makes meanwhile.
    let behind = watch::channel(Arc::new(Snapshot::clone(&world.state.snapshot()))).1;
    let behind = world.with_copy(behind);
    world.apply(&vm("vm-250")).await.ok();
    let answer = behind.apply(&vms(names())).await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert_eq!(answer.body["conflict"]["object"], "vm/vm-250");
    assert_eq!(answer.body["conflict"]["given"], 0);
    assert_eq!(vms_in_store(&world.state).await, 1, "nothing of it may be there");
    // Nothing in the way: all of it in one change of the store.
    assert_eq!(world.apply(&vms(names())).await.ok().as_array().unwrap().len(), 300);
    let all = world.state.store.all(&keys::objects(Kind::Vm)).await.unwrap().kvs;
    let mut revisions: Vec<i64> = all.iter().map(|kv| kv.mod_revision).collect();
    revisions.sort_unstable();
    revisions.dedup();
    assert_eq!((all.len(), revisions.len()), (300, 2), "vm-250 and all others");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_wrong_document_or_a_dry_run_changes_nothing() {
    let Some(world) = World::start().await else { return };
    let everything = async || {
        let all = world.state.store.all(keys::ROOT).await.unwrap().kvs;
        let what = all.into_iter().map(|kv| (kv.key, kv.mod_revision));
        what.filter(|(key, _)| !key.starts_with(keys::AUDIT)).collect::<Vec<_>>()
    };
    let before = everything().await;
    let answer = world.apply(&format!("{}---\n{}image: debian\n", vm("good"), vm("bad"))).await;
    let (line, column, message) = first_problem(&answer);
    assert_eq!((line, column), (8, 8));
    assert_eq!(message, "image `debian` does not exist");
    assert!(everything().await == before, "a wrong document was with it");
    let files = json!([{"name": "test.yaml", "text": vm("good")}]);
    let body = json!({"files": files, "dryRun": true}).to_string();
    let said = world.operate("POST", "/v1/apply", body).await.ok();
    assert_eq!((&said[0]["object"], &said[0]["outcome"]), (&json!("vm/good"), &json!("created")));
    assert!(everything().await == before, "a dry run wrote");
    world.apply(&vm("good")).await.ok();
    assert!(everything().await != before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_apply_is_taken_and_a_larger_one_is_refused() {
    let Some(world) = World::start().await else { return };
    let names = |n: usize| (0..n).map(|i| format!("v{i}"));
    let answer = world.apply(&vms(names(MAX_TXN_OPS + 1))).await;
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY);
    let detail = answer.body["detail"].as_str().unwrap();
    assert!(detail.contains("1025 objects are too many") && detail.contains("1024"), "{detail}");
    assert!(answer.body["hint"].as_str().unwrap().contains("several steps"), "{answer:?}");
    assert_eq!(vms_in_store(&world.state).await, 0);
    let taken = world.apply(&vms(names(MAX_TXN_OPS))).await.ok();
    assert_eq!(taken.as_array().unwrap().len(), MAX_TXN_OPS);
    assert_eq!(vms_in_store(&world.state).await, MAX_TXN_OPS);
    // One object that is small enough as YAML and too large as it stands in the store.
    let text = format!("{}userData: '{}'\n", vm("large"), "\"".repeat(900_000));
    let answer = world.apply(&text).await;
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{}", answer.body["detail"]);
    let detail = answer.body["detail"].as_str().unwrap();
    assert!(detail.starts_with("the objects take 18") && detail.contains("1507328"), "{detail}");
    assert_eq!(vms_in_store(&world.state).await, MAX_TXN_OPS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_a_service_cannot_be_deleted_alone() {
    let Some(world) = World::start().await else { return };
    world
        .apply("kind: Service\nname: web\nreplicas: 1\ntemplate: {spec: {memory: 64MiB}}\n")
        .await
        .ok();
    let service = ObjectRef::new(Kind::Service, name("web"));
    let mut meta = Meta::new(name("web-1"), "uid".into(), 0);
    meta.owner = Some(service);
    let spec = serde_json::from_value(json!({"memory": "64MiB"})).unwrap();
    world.put(&Object::Vm(Stored { meta, spec })).await;
    let answer = world.operate("DELETE", "/v1/objects/vm/web-1", "").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert!(
        answer.body["detail"].as_str().unwrap().contains("member of service/web"),
        "{answer:?}"
    );
    let hint = answer.body["hint"].as_str().unwrap();
    assert!(hint.contains("scale or delete the service"), "{hint}");
    let member = world.operate("GET", "/v1/objects/vm/web-1", "").await.ok();
    assert!(member["meta"]["deleting"].is_null(), "{member}");
    // A VM of nobody, and one whose service is on its way out, may go.
    world.apply(&vm("alone")).await.ok();
    world.operate("DELETE", "/v1/objects/vm/alone", "").await.ok();
    world.operate("DELETE", "/v1/objects/service/web", "").await.ok();
    let gone = world.operate("DELETE", "/v1/objects/vm/web-1", "").await.ok();
    assert_eq!(gone["meta"]["deleting"], true);
}

/// A TLS listener of the API with certificates of its own: its address and its authority's fingerprint.
async fn listener(world: &World) -> (String, Pin) {
    let authority = Authority::create("test").unwrap();
    let (key, asked) = request("host1").unwrap();
    let certificate = authority.sign(&asked, "host1", &[]).unwrap();
    let identity = Identity { ca: authority.certificate.clone(), certificate, key };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let tls = Arc::new(server_config(&identity).unwrap());
    tokio::spawn(serve_listener(listener, tls, world.state.clone(), world.cancel()));
    (address, Pin(fingerprint(&authority.certificate).unwrap()))
}

fn event(message: &str) -> Event {
    let id = format!("{:014}-000001-000001", super::auth::now_ms());
    Event {
        at_ms: 0,
        object: ObjectRef::new(Kind::Vm, name("web")),
        severity: Severity::Info,
        message: message.into(),
        by: "manager on host1".into(),
        id,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tls_tokens_bodies_and_events_work_as_in_memory() {
    let Some(world) = World::start().await else { return };
    let (address, pin) = listener(&world).await;
    let client = |token: Option<&str>| Client::remote(address.clone(), &pin, token.map(Into::into));
    assert_eq!(client(None).version().await.unwrap(), env!("CARGO_PKG_VERSION"));
    let status = |error: ClientError| match error {
        ClientError::Refused(body) => (body.status, body.hint),
        other => panic!("{other}"),
    };
    assert_eq!(status(client(None).status().await.unwrap_err()).0, 401);
    let expired = make_token(&world.state, &name("old"), Role::Admin, false, -1).await.unwrap().0;
    let (code, hint) = status(client(Some(&expired)).status().await.unwrap_err());
    assert!(code == 401 && hint.contains("haven token create"), "{code} {hint}");
    let viewer = client(world.token(Role::Viewer));
    viewer.status().await.unwrap();
    let file = |text: String| vec![ManifestFile { name: "a.yaml".into(), text }];
    assert_eq!(status(viewer.apply(file(vm("web")), false).await.unwrap_err()).0, 403);
    let operator = client(world.token(Role::Operator));
    assert_eq!(operator.apply(file(vm("web")), false).await.unwrap()[0].outcome, "created");
    // The sender of a body that is too large gets to read why, over a real connection too.
    let (code, hint) = status(operator.apply(file("#".repeat(10 << 20)), false).await.unwrap_err());
    assert!(code == 413 && hint.contains("several steps"), "{code} {hint}");
    // Somebody else's authority is not believed.
    let stranger = Client::remote(address.clone(), &Pin("0".repeat(64)), None);
    assert!(matches!(stranger.version().await, Err(ClientError::Unreachable { .. })));
    let mut heard = viewer.follow(None).await.unwrap();
    let mut told = 0;
    let first = loop {
        told += 1;
        let op = put_event(&event(&format!("change {told}")));
        world.state.store.txn(vec![], vec![op]).await.unwrap();
        match tokio::time::timeout(Duration::from_secs(1), heard.next()).await {
            Ok(event) => break event.unwrap(),
            Err(_) => assert!(told < 20, "no event came in {told} s"),
        }
    };
    assert_eq!(first.message, format!("change {told}"));
    // What came while nobody listened comes when the connection is back: all of it, once, in order.
    drop(heard);
    let more = |from: usize, to: usize| {
        let ops = (from..to).map(|n| Event { id: format!("{n:014}-x"), ..event(&format!("{n}")) });
        let ops = ops.map(|event| put_event(&event)).collect();
        world.state.store.txn(vec![], ops)
    };
    let base = first.id[..14].parse::<usize>().unwrap() + 10;
    for n in 0..3 {
        more(base + 100 * n, base + 100 * (n + 1)).await.unwrap();
    }
    let mut heard = viewer.follow(Some(&format!("{:014}-x", base + 4))).await.unwrap();
    for n in 5..300 {
        assert_eq!(heard.next().await.unwrap().message, format!("{}", base + n));
    }
    more(base + 300, base + 301).await.unwrap();
    assert_eq!(heard.next().await.unwrap().message, format!("{}", base + 300));
    // What is no event's id counts as none: only what comes from now on.
    let mut heard = viewer.follow(Some("zzz")).await.unwrap();
    let quiet = tokio::time::timeout(Duration::from_secs(2), heard.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_added_to_a_store_that_is_nearly_full() {
    let Some(world) = World::start().await else { return };
    world.apply(&vm("old")).await.ok();
    world.state.store.note_used(haven_store::server::NEARLY_FULL + 1);
    let create = json!({"resourceVersion": 0, "kind": "VM", "spec": {"memory": "64MiB"},
        "meta": {"name": "new", "uid": "", "generation": 1}});
    let answers = [
        world.apply(&vm("new")).await,
        world.operate("PUT", "/v1/objects/vm/new", create.to_string()).await,
    ];
    for answer in answers {
        assert_eq!(answer.status, StatusCode::INSUFFICIENT_STORAGE, "{answer:?}");
        let said = answer.body["detail"].as_str().unwrap();
        assert!(said.starts_with("the store is nearly full"), "{said}");
    }
    let key = keys::object(&ObjectRef::new(Kind::Vm, name("new")));
    assert!(world.state.store.get(&key).await.unwrap().is_none());
    // What makes room, or keeps the VMs as people want them, is done.
    for (method, path) in [("POST", "/v1/vms/old/stop"), ("DELETE", "/v1/objects/vm/old")] {
        let answer = world.operate(method, path, "").await;
        assert!(answer.status.is_success(), "{method} {path}: {answer:?}");
    }
    world.state.store.note_used(0);
    world.apply(&vm("new")).await.ok();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_ended_by_itself_is_started_again() {
    let Some(world) = World::start().await else { return };
    world.apply(&vm("once")).await.ok();
    let start = async || {
        let item = world.operate("POST", "/v1/vms/once/start", "").await.ok();
        item["spec"]["resets"].as_u64().unwrap_or(0)
    };
    let told = async |phase: &str| {
        let status = json!({"host": "host1", "session": 1, "epoch": 1, "generation": 1, "phase": phase,
            "sinceMs": 1});
        let placement = json!({"host": "host1", "epoch": 1, "slot": 1, "nics": []});
        let lease = json!({"session": 1, "count": 1});
        let ops = [
            (keys::lease(&name("host1")), lease),
            (keys::placement(&name("once")), placement),
            (keys::vm_status(&name("once")), status),
        ];
        let ops = ops.map(|(key, value)| Op::Put(key, value.to_string().into())).into();
        let revision = world.state.store.txn(vec![], ops).await.unwrap().revision;
        while world.state.snapshot().revision < revision {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert_eq!(start().await, 0, "nothing of it was told");
    told("running").await;
    assert_eq!(start().await, 0, "it runs");
    told("stopped").await;
    assert_eq!(start().await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_of_the_host_is_an_admin_on_the_unix_socket() {
    let Some(world) = World::start().await else { return };
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let (path, state, cancel) = (socket.clone(), world.state.clone(), world.cancel());
    tokio::spawn(async move { serve_unix(&path, state, cancel).await });
    while !socket.exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    if !is_root(&directory) {
        println!("skipped: needs root");
        return;
    }
    let client = Client::local(socket);
    client.end_token("viewer").await.unwrap();
    let log = client.audit(10).await.unwrap();
    let last = log.last().unwrap();
    assert_eq!((last.who.as_str(), last.from.as_str()), ("root on host1", "local"));
    assert!(refused(&world.ask(world.token(Role::Viewer), "GET", "/v1/status", "").await));
}

fn is_root(of: &tempfile::TempDir) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(of.path()).unwrap().uid() == 0
}
