//! Balance over the API: viewers look, operators move, and what stands in the way is told.

use super::{
    auth::Role,
    testing::{World, name},
};
use axum::http::StatusCode;
use haven_model::keys;
use haven_store::raw::Op;
use serde_json::{Value, json};

async fn put(world: &World, records: &[(String, Value)]) {
    let ops = records.iter().map(|(key, value)| Op::Put(key.clone(), value.to_string().into()));
    world.state.store.txn(vec![], ops.collect()).await.unwrap();
    world.state.current().await.unwrap();
}

/// Two hosts, and two VMs on the first that keep it busy.
async fn busy() -> Option<World> {
    let world = World::start().await?;
    world.hosts(&["host1", "host2"]).await;
    put(&world, &[(keys::CLUSTER.into(), json!({"name": "tests"}))]).await;
    for (vm, slot) in [("db", 1), ("mail", 2)] {
        world.apply(&format!("kind: VM\nname: {vm}\nmemory: 64MiB\n")).await.ok();
        let placement = json!({"host": "host1", "epoch": 1, "slot": slot, "nics": []});
        let status = json!({"host": "host1", "session": 1, "epoch": 1, "generation": 1, "phase": "running",
            "sinceMs": 1, "restarts": 0, "message": ""});
        let placed = (keys::placement(&name(vm)), placement);
        put(&world, &[placed, (keys::vm_status(&name(vm)), status)]).await;
    }
    let load =
        |vms: Value| json!({"session": 1, "atMs": super::auth::now_ms(), "over": "5m", "vms": vms});
    let one = |cpu: u32| json!({"cpu": cpu, "memory": "64MiB", "over": "5m"});
    for host in ["host1", "host2"] {
        let status = json!({"session": 1, "memory": "4GiB", "cpus": 8});
        let lease = json!({"session": 1, "count": 1});
        put(&world, &[(keys::lease(&name(host)), lease), (keys::host_status(&name(host)), status)])
            .await;
    }
    let all = 8000;
    let here = load(json!({"db": one(all / 2), "mail": one(all * 2 / 5)}));
    let there = load(json!({}));
    let of = |host: &str| keys::host_load(&name(host));
    put(&world, &[(of("host1"), here), (of("host2"), there)]).await;
    Some(world)
}

#[tokio::test]
async fn a_viewer_looks_and_an_operator_moves() {
    let Some(world) = busy().await else { return };
    let viewer = world.token(Role::Viewer);
    let told = world.ask(viewer, "GET", "/v1/balance", "").await.ok();
    assert_eq!(told["policy"], "advise");
    let step = &told["moves"][0];
    assert_eq!((&step["vm"], &step["to"]), (&json!("mail"), &json!("host2")), "{told}");
    assert!(world.state.current().await.unwrap().migrations.is_empty());
    let refused = world.ask(viewer, "POST", "/v1/balance", "").await;
    assert_eq!(refused.status, StatusCode::FORBIDDEN);
    let begun = world.operate("POST", "/v1/balance", "").await.ok();
    assert_eq!(begun["moves"], told["moves"]);
    let snapshot = world.state.current().await.unwrap();
    let record = &snapshot.migrations["mail"];
    assert!(record.balances && record.to.as_ref().unwrap().as_str() == "host2", "{record:?}");
    // It is on its way: nothing more is asked for.
    let again = world.ask(viewer, "GET", "/v1/balance", "").await.ok();
    assert!(again["moves"].as_array().unwrap().iter().all(|of| of["vm"] != "mail"), "{again}");
}

#[tokio::test]
async fn what_stands_in_the_way_is_told() {
    let Some(world) = busy().await else { return };
    let drain = json!({"id": "d1", "by": "alice", "atMs": 1});
    put(&world, &[(keys::drain(&name("host1")), drain)]).await;
    let answer = world.operate("POST", "/v1/balance", "").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    let why = "nothing is moved for balance while host1 is draining";
    assert_eq!(answer.body["detail"], why);
    put(&world, &[(keys::CLUSTER.into(), json!({"name": "tests", "rebalance": "off"}))]).await;
    let answer = world.operate("POST", "/v1/balance", "").await;
    assert_eq!(answer.body["detail"], "loads are not measured, because `rebalance` is off");
    assert!(answer.body["hint"].as_str().unwrap().contains("haven edit cluster"));
}
