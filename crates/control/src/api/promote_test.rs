//! Promoting the new template of a service, asked through the API's server.

use super::testing::{Answer, World, name};
use axum::http::StatusCode;
use haven_model::{
    Meta, Object, ObjectRef, keys,
    object::{Kind, Stored},
    service::{RELEASE_LABEL, SERVICE_LABEL, TEMPLATE_LABEL},
};
use haven_plan::balance::services::template_hash;
use haven_store::raw::Op;
use serde_json::{Value, json};
use std::time::Duration;

/// A member that runs, and is ready or not.
async fn member(world: &World, vm: &str, template: &str, ready: bool) {
    let mut meta = Meta::new(name(vm), vm.into(), 0);
    meta.owner = Some(ObjectRef::new(Kind::Service, name("web")));
    meta.labels.insert(SERVICE_LABEL.into(), "web".into());
    meta.labels.insert(TEMPLATE_LABEL.into(), template.into());
    if template == "old" {
        meta.labels.insert(RELEASE_LABEL.into(), "1".into());
    }
    let spec = json!({"memory": "64MiB", "check": {"port": 80}});
    world.put(&Object::Vm(Stored { meta, spec: serde_json::from_value(spec).unwrap() })).await;
    let placement = json!({"host": "host1", "epoch": 1, "slot": 1, "nics": []});
    let status = json!({"host": "host1", "session": 1, "epoch": 1, "generation": 1,
        "phase": "running", "sinceMs": 1, "ready": ready, "readyMs": 1});
    let write = |key: String, value: &Value| Op::Put(key, value.to_string().into());
    let ops = vec![
        write(keys::placement(&name(vm)), &placement),
        write(keys::vm_status(&name(vm)), &status),
        write(keys::lease(&name("host1")), &json!({"session": 1, "count": 1})),
    ];
    world.state.store.txn(vec![], ops).await.unwrap();
}

/// Asks until the daemon's copy has what was written and the answer is of this kind.
async fn promote(world: &World, wanted: StatusCode, words: &str) -> Answer {
    for _ in 0..100 {
        let answer = world.operate("POST", "/v1/services/web/promote", "").await;
        let said = answer.body["detail"].as_str().unwrap_or_default();
        if answer.status == wanted && said.contains(words) {
            return answer;
        }
        assert_ne!(answer.status, StatusCode::OK, "it waits for `{words}`");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never {wanted} with `{words}`")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promoting_is_refused_with_a_sentence_until_there_is_something_to_promote() {
    let Some(world) = World::start().await else { return };
    let manifest = "kind: Service\nname: web\nreplicas: 1\nupdate: {strategy: canary}\n\
                    check: {port: 80}\ntemplate: {spec: {memory: 64MiB}}\n";
    world.apply(manifest).await.ok();
    let conflict = StatusCode::CONFLICT;
    promote(&world, conflict, "are made from its template already").await;
    member(&world, "web-1", "old", true).await;
    let refused = promote(&world, conflict, "not all ready yet").await;
    assert!(refused.body["hint"].as_str().unwrap().contains("haven service show web"));
    let item = world.operate("GET", "/v1/objects/service/web", "").await.ok();
    let spec = serde_json::from_value(item["spec"].clone()).unwrap();
    let template = template_hash(&spec);
    member(&world, "web-2", &template, true).await;
    let promoted = loop {
        let answer = world.operate("POST", "/v1/services/web/promote", "").await;
        if answer.status.is_success() {
            break answer.ok();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(promoted["spec"]["promoted"], template.as_str());
    assert_eq!(promoted["columns"]["strategy"], "canary");
    promote(&world, conflict, "is let in already").await;
    // The same manifest again takes nothing of that back; another template is another matter.
    world.apply(manifest).await.ok();
    let item = world.operate("GET", "/v1/objects/service/web", "").await.ok();
    assert_eq!(item["spec"]["promoted"], template.as_str());
    world.apply(&manifest.replace("64MiB", "65MiB")).await.ok();
    promote(&world, conflict, "not all ready yet").await;
    let unknown = world.operate("POST", "/v1/services/none/promote", "").await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
}
