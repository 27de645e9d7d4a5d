//! Power control over the API: passwords sealed, kept with their place and never shown; and whether it would work.

use super::{
    auth::Role,
    testing::{Answer, World, name},
};
use crate::manager::{commit::Author, sealing::seal_one};
use axum::http::StatusCode;
use haven_model::{Lease, Meta, ObjectRef, Snapshot, keys, object::Kind};
use haven_store::raw::Op;
use serde_json::{Value, json};

const HOST1: &str = "/v1/objects/host/host1";

/// A host as a version before the drivers wrote it.
async fn old_host(world: &World, host: &str, power: Value) {
    let spec = json!({"address": "10.0.0.1", "power": power});
    let object = json!({"meta": Meta::new(name(host), "u".into(), 0), "spec": spec});
    let key = keys::object(&ObjectRef::new(Kind::Host, name(host)));
    world.state.store.txn(vec![], vec![Op::Put(key, object.to_string().into())]).await.unwrap();
    world.state.current().await.unwrap();
}

fn manifest(power: &str) -> String {
    format!("kind: Host\nname: host1\naddress: 10.0.0.1\npower: {power}\n")
}

async fn stored(world: &World) -> String {
    let key = keys::object(&ObjectRef::new(Kind::Host, name("host1")));
    let record = world.state.store.get(&key).await.unwrap().unwrap();
    let record: Value = serde_json::from_slice(&record.value).unwrap();
    record["spec"]["power"]["password"].as_str().unwrap().to_owned()
}

fn opened(world: &World, sealed: &str) -> String {
    let of = ObjectRef::new(Kind::Host, name("host1"));
    world.state.secrets.as_ref().unwrap().open(&of, sealed).unwrap().expose().to_owned()
}

fn outcome(answer: Answer) -> String {
    answer.ok()[0]["outcome"].as_str().unwrap().to_owned()
}

fn problem(answer: &Answer) -> String {
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{answer:?}");
    let all = answer.body["problems"].as_array().unwrap();
    assert_eq!(all.len(), 1, "{all:?}");
    assert_ne!(all[0]["hint"], "", "{all:?}");
    all[0]["message"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_is_sealed_and_what_get_prints_keeps_it() {
    let Some(world) = World::start().await else { return };
    old_host(&world, "host1", Value::Null).await;
    let apply = async |power: &str| {
        world.state.current().await.unwrap();
        world.apply(&manifest(power)).await
    };
    let mut said = Vec::new();
    let with =
        |password: &str| format!("{{url: 'http://10.0.0.9', user: root, password: {password}}}");
    assert!(problem(&apply(&with("sealed")).await).contains("there is none yet"));
    assert!(problem(&apply(&with("'sealed:v1:AAAA'")).await).contains("begins with `sealed:`"));
    let set = apply(&with("hush")).await;
    said.push(set.body.to_string());
    assert_eq!(outcome(set), "changed");
    let sealed = stored(&world).await;
    assert!(sealed.starts_with("sealed:v1:"), "{sealed}");
    assert_eq!(opened(&world, &sealed), "hush");
    // The same again, what `get` prints, and a manifest that never held it: nothing changes.
    for again in [with("hush"), with("sealed"), "{url: 'http://10.0.0.9', user: root}".into()] {
        assert_eq!(outcome(apply(&again).await), "unchanged", "{again}");
        assert_eq!(stored(&world).await, sealed);
    }
    let mut item = world.operate("GET", HOST1, "").await.ok();
    assert_eq!(item["spec"]["power"]["password"], "sealed", "it shows that one is set");
    item["spec"]["cordoned"] = true.into();
    said.push(item.to_string());
    said.push(world.operate("PUT", HOST1, item.to_string()).await.ok().to_string());
    assert_eq!(stored(&world).await, sealed, "`edit` keeps it");
    let changed = apply(&with("louder")).await;
    said.push(changed.body.to_string());
    assert_eq!(outcome(changed), "changed");
    assert_eq!(opened(&world, &stored(&world).await), "louder");
    for path in ["/v1/objects/host", "/v1/explain/host/host1", "/v1/events", "/v1/status"] {
        said.push(world.operate("GET", path, "").await.ok().to_string());
    }
    said.push(world.ask(world.token(Role::Admin), "GET", "/v1/audit", "").await.ok().to_string());
    for text in &said {
        for secret in ["hush", "louder", "sealed:v1"] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
    let other = world.with_secrets(None);
    let unable = other.apply(&manifest(&with("third"))).await;
    assert_eq!(unable.status, StatusCode::SERVICE_UNAVAILABLE, "{unable:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_goes_nowhere_else_than_it_was_given_for() {
    let Some(world) = World::start().await else { return };
    old_host(&world, "host1", Value::Null).await;
    let place = "{url: 'https://10.0.0.9', insecure: true, user: root, password: hush}";
    assert_eq!(outcome(world.apply(&manifest(place)).await), "changed");
    world.state.current().await.unwrap();
    let pin = format!("fingerprint: '{}'", "ab".repeat(32));
    for elsewhere in [
        "{url: 'https://10.0.0.66', insecure: true, user: root, password: sealed}",
        "{url: 'https://10.0.0.66', insecure: true, user: root}",
        "{driver: agent, agent: fence_ipmilan, address: 10.0.0.66, user: root}",
        &format!("{{url: 'https://10.0.0.9', {pin}, user: root}}"),
    ] {
        let said = problem(&world.apply(&manifest(elsewhere)).await);
        assert!(said.contains("does not go elsewhere"), "{elsewhere}: {said}");
    }
    // Given again, it may.
    let again = format!("{{url: 'https://10.0.0.9', {pin}, user: root, password: hush}}");
    assert_eq!(outcome(world.apply(&manifest(&again)).await), "changed");
    // What cannot work is refused before it is written, and what an earlier version let in does no harm.
    let unverified = "{url: 'https://10.0.0.9', user: root, password: x}";
    assert!(problem(&world.apply(&manifest(unverified)).await).contains("is verified"));
    let program = "{driver: agent, agent: fence_ipmilan, options: {ipmitool_path: /bin/sh}}";
    assert!(
        problem(
            &world
                .apply(&manifest(&format!("{}, password: x}}", &program[..program.len() - 1])))
                .await
        )
        .contains("as root")
    );
    old_host(
        &world,
        "host1",
        json!({"url": "https://10.0.0.9", "user": "root", "password": "hush"}),
    )
    .await;
    let mut item = world.operate("GET", HOST1, "").await.ok();
    item["spec"]["cordoned"] = true.into();
    world.operate("PUT", HOST1, item.to_string()).await.ok();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_that_stands_in_the_clear_is_sealed_by_the_next_write_or_by_the_manager() {
    let Some(world) = World::start().await else { return };
    let clear = json!({"url": "http://10.0.0.9", "user": "root", "password": "hush"});
    old_host(&world, "host1", clear.clone()).await;
    let shown = world.operate("GET", HOST1, "").await.ok();
    assert_eq!(shown["spec"]["power"]["password"], "sealed", "nobody sees that it is not yet");
    let text = manifest("{url: 'http://10.0.0.9', user: root}") + "cordoned: true\n";
    assert_eq!(outcome(world.apply(&text).await), "changed");
    assert_eq!(opened(&world, &stored(&world).await), "hush");
    // The manager does it where nobody writes; as a former manager it can not.
    old_host(&world, "host1", clear).await;
    let (store, secrets) = (world.state.store.clone(), world.state.secrets.clone().unwrap());
    let put =
        vec![Op::Put(keys::MANAGER.into(), r#"{"term":1,"holder":"host1","session":1}"#.into())];
    let record_revision = store.txn(vec![], put).await.unwrap().revision;
    let snapshot = world.state.current().await.unwrap();
    let author = |record_revision| Author { me: name("host1"), term: 1, record_revision };
    let former = seal_one(&store, &secrets, &snapshot, &author(record_revision - 1)).await.unwrap();
    assert_eq!((former, stored(&world).await.as_str()), (None, "hush"));
    let generation = |snapshot: &Snapshot| snapshot.hosts["host1"].meta.generation;
    let done = seal_one(&store, &secrets, &snapshot, &author(record_revision)).await.unwrap();
    assert!(done.is_some());
    assert_eq!(opened(&world, &stored(&world).await), "hush");
    let after = world.state.current().await.unwrap();
    assert_eq!(generation(&after), generation(&snapshot));
    assert_eq!(seal_one(&store, &secrets, &after, &author(record_revision)).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_test_of_fencing_reads_from_the_other_hosts_and_is_audited() {
    let Some(world) = World::start().await else { return };
    let test =
        async |host: &str| world.operate("POST", &format!("/v1/hosts/{host}/fence/test"), "").await;
    let lease = |host: &str| {
        let lease = Lease { session: 1, count: 1, closed: false, ttl_ms: 5000 };
        Op::Put(keys::lease(&name(host)), serde_json::to_vec(&lease).unwrap().into())
    };
    let power = |user: &str| json!({"url": "http://10.0.0.9", "user": user, "password": ""});
    old_host(&world, "host1", power("root")).await;
    old_host(&world, "host2", power("root")).await;
    old_host(&world, "host3", Value::Null).await;
    assert_eq!(test("host9").await.status, StatusCode::NOT_FOUND);
    let none = test("host3").await;
    assert_eq!(none.status, StatusCode::CONFLICT);
    assert!(none.body["detail"].as_str().unwrap().contains("nothing controls"), "{none:?}");
    // No host is there to ask.
    assert_eq!(test("host2").await.status, StatusCode::CONFLICT);
    let manager = r#"{"term":1,"holder":"host3","session":1}"#;
    let ops = vec![
        lease("host1"),
        lease("host2"),
        lease("host3"),
        Op::Put(keys::MANAGER.into(), manager.into()),
    ];
    world.state.store.txn(vec![], ops).await.unwrap();
    let told = test("host2").await.ok();
    assert_eq!((&told["driver"], &told["at"]), (&json!("redfish"), &json!("http://10.0.0.9")));
    let readings = told["readings"].as_array().unwrap();
    // The manager first, which cannot be reached in this test; then this host; never the tested one.
    let from: Vec<&Value> = readings.iter().map(|reading| &reading["from"]).collect();
    assert_eq!(from, ["host3", "host1"]);
    assert_eq!((&readings[0]["manages"], &readings[0]["state"]), (&json!(true), &Value::Null));
    assert!(readings[0]["problem"]["message"].as_str().unwrap().contains("host3 cannot be asked"));
    assert_eq!((&readings[1]["state"], &readings[1]["problem"]), (&json!("on"), &Value::Null));
    old_host(&world, "host2", power("nobody")).await;
    let told = test("host2").await.ok();
    assert_eq!(told["readings"][1]["problem"]["message"], "no such user");
    let viewer =
        world.ask(world.token(Role::Viewer), "POST", "/v1/hosts/host2/fence/test", "").await;
    assert_eq!(viewer.status, StatusCode::FORBIDDEN);
    let log = world.ask(world.token(Role::Admin), "GET", "/v1/audit", "").await.ok().to_string();
    assert!(log.contains("POST /v1/hosts/host2/fence/test"), "{log}");
}
