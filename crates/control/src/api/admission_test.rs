//! What the cluster has no room for after the loss of a host: refused with the arithmetic, or told, over every way in.

use super::testing::{Answer, World, name};
use axum::http::StatusCode;
use haven_model::{
    AdmissionPolicy, Bytes, ClusterSpec, HostStatus, Lease, Placement, api::ApplyRequest, keys,
    object::Kind,
};
use haven_store::raw::Op;
use serde::Serialize;
use serde_json::{Value, json};

fn put<T: Serialize>(key: String, record: &T) -> Op {
    Op::Put(key, serde_json::to_vec(record).unwrap().into())
}

/// Three hosts of 2 GiB, and a VM of 1 GiB on two of them.
async fn cluster(world: &World, admission: AdmissionPolicy) {
    let mut ops = vec![put(
        keys::CLUSTER.into(),
        &ClusterSpec { name: "lab".into(), admission, ..ClusterSpec::default() },
    )];
    for (i, host) in ["host1", "host2", "host3"].into_iter().enumerate() {
        let object = json!({
            "meta": {"name": host, "uid": host, "generation": 1},
            "spec": {"address": format!("10.0.0.{}", i + 1), "reservedMemory": "0B"},
        });
        ops.push(put(format!("{}{host}", keys::objects(Kind::Host)), &object));
        let host = name(host);
        let lease = Lease { session: 1, count: 1, closed: false, ttl_ms: 5000 };
        ops.push(put(keys::lease(&host), &lease));
        let status =
            HostStatus { session: 1, cpus: 8, memory: Bytes::gib(2), ..HostStatus::default() };
        ops.push(put(keys::host_status(&host), &status));
    }
    world.state.store.txn(vec![], ops).await.unwrap();
    world.apply(&[vm("db-1", 960), vm("db-2", 960)].join("---\n")).await.ok();
    for (slot, (vm, host)) in [("db-1", "host1"), ("db-2", "host2")].into_iter().enumerate() {
        let placement = Placement::new(name(host), 1, slot as u32, Vec::new());
        let op = put(keys::placement(&name(vm)), &placement);
        world.state.store.txn(vec![], vec![op]).await.unwrap();
    }
}

fn vm(name: &str, mib: u32) -> String {
    format!("kind: VM\nname: {name}\nmemory: {mib}MiB\n")
}

fn service(replicas: u32) -> String {
    format!(
        "kind: Service\nname: web\nreplicas: {replicas}\ntemplate:\n  spec:\n    memory: 448MiB\n"
    )
}

async fn names(world: &World, kind: &str) -> Vec<String> {
    let all = world.operate("GET", &format!("/v1/objects/{kind}"), "").await.ok();
    let name = |item: &Value| item["meta"]["name"].as_str().unwrap().to_owned();
    all["items"].as_array().unwrap().iter().map(name).collect()
}

fn refused(answer: &Answer) {
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{}", answer.body);
    let detail = answer.body["detail"].as_str().unwrap();
    assert!(detail.starts_with("this is too much for the cluster, and nothing was changed: the loss of 1 host would leave VMs without a place: host"), "{detail}");
    assert!(answer.body["hint"].as_str().unwrap().contains("`haven edit cluster`"));
}

#[tokio::test]
async fn what_would_use_up_the_reserve_is_refused_whatever_way_it_comes() {
    let Some(world) = World::start().await else { return };
    cluster(&world, AdmissionPolicy::Refuse).await;
    let much = world.apply(&[vm("db-3", 960), vm("big", 1984)].join("---\n")).await;
    refused(&much);
    assert_eq!(
        much.body["detail"],
        "this is too much for the cluster, and nothing was changed: the loss of 1 host would leave \
         VMs without a place: host3 lost: its 2 GiB do not fit on host2 (1 GiB free) and host1 \
         (0 MiB free): big (1.93 GiB) finds no place"
    );
    assert_eq!(names(&world, "vm").await, ["db-1", "db-2"]);
    // Only to look is answered in the same way.
    let file = haven_model::api::ManifestFile { name: "x".into(), text: vm("big", 1984) };
    let look = serde_json::to_string(&ApplyRequest { files: vec![file], dry_run: true }).unwrap();
    refused(&world.operate("POST", "/v1/apply", look).await);
    // What fits is let in.
    world.apply(&[vm("db-3", 960), service(1)].join("---\n")).await.ok();
    refused(&world.operate("POST", "/v1/services/web/scale/2", "").await);
    world.operate("POST", "/v1/services/web/scale/0", "").await.ok();
    world.operate("POST", "/v1/services/web/scale/1", "").await.ok();
    let new = |name: &str, running: bool| {
        let meta = json!({"name": name, "uid": "", "generation": 1});
        let spec = json!({"memory": "960MiB", "running": running});
        json!({"kind": "VM", "resourceVersion": 0, "meta": meta, "spec": spec}).to_string()
    };
    refused(&world.operate("PUT", "/v1/objects/vm/db-4", new("db-4", true)).await);
    world.operate("PUT", "/v1/objects/vm/db-4", new("db-4", false)).await.ok();
    refused(&world.operate("POST", "/v1/vms/db-4/start", "").await);
    let mut more = world.operate("GET", "/v1/objects/vm/db-2", "").await.ok();
    more["spec"]["memory"] = "1984MiB".into();
    refused(&world.operate("PUT", "/v1/objects/vm/db-2", more.to_string()).await);
    let stands = world.operate("GET", "/v1/objects/vm/db-4", "").await.ok();
    assert_eq!(stands["spec"]["running"], false);
}

#[tokio::test]
async fn by_another_policy_it_is_let_in_and_told() {
    let Some(world) = World::start().await else { return };
    cluster(&world, AdmissionPolicy::Warn).await;
    let told = world.apply(&[vm("db-3", 960), vm("big", 1984)].join("---\n")).await.ok();
    let warning = |of: &Value| of["warning"].as_str().unwrap_or_default().to_owned();
    for applied in told.as_array().unwrap() {
        let warning = warning(applied);
        assert!(warning.contains("big (1.93 GiB) finds no place"), "{warning}");
    }
    let started = world.operate("POST", "/v1/vms/db-1/start", "").await.ok();
    assert_eq!(warning(&started), "", "it adds nothing");
    let status = world.operate("GET", "/v1/status", "").await.ok();
    assert_eq!((&status["survivable_vms"], &status["survivable"]), (&json!(0), &json!(0)));
    let risks = status["risks"].to_string();
    assert!(risks.contains("memory is to be kept for the loss of 1 hosts, and is there for 0: host3 lost: its 2 GiB do not fit"), "{risks}");
}
