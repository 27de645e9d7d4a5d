//! VMs that are made of others, over the API: what is written, and what is refused with a sentence.

use super::testing::{Answer, World, name};
use axum::http::StatusCode;
use haven_model::{Placement, keys};
use haven_store::raw::Op;
use serde_json::{Value, json};

const CLONE: &str = "/v1/vms/db/clone";
const BASE: &str = "kind: Pool\nname: fast\ndriver: local\npath: /pools/fast\n---\nkind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\nkind: VM\nname: db\nmemory: 64MiB\nlabels: {tier: data}\nuserData: '#!/bin/sh'\nnetworks: [{network: front, address: 10.77.0.9}]\ndisks: [{name: root, size: 1GiB, pool: fast}, {name: data, size: 2GiB, pool: fast}]\n";

async fn world() -> Option<World> {
    let world = World::start().await?;
    world.hosts(&["host1"]).await;
    world.apply(BASE).await.ok();
    Some(world)
}

async fn write(world: &World, key: String, value: &Value) {
    let put = Op::Put(key, value.to_string().into());
    world.state.store.txn(vec![], vec![put]).await.unwrap();
}

/// It has a host, which is there and knows all.
async fn place(world: &World, more: Value) {
    world.speak(&["host1"]).await;
    let placement = Placement::new(name("host1"), 1, 0, Vec::new());
    let mut placement = serde_json::to_value(placement).unwrap();
    placement.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
    write(world, keys::placement(&name("db")), &placement).await;
}

async fn vm(world: &World, of: &str) -> Value {
    world.operate("GET", &format!("/v1/objects/vm/{of}"), "").await.ok()
}

async fn snapshots(world: &World) -> Vec<Value> {
    world.operate("GET", "/v1/vms/db/snapshots", "").await.ok().as_array().cloned().unwrap()
}

async fn ask(world: &World, body: Value) -> Answer {
    world.operate("POST", CLONE, body.to_string()).await
}

fn says(answer: &Answer, words: &str) {
    let detail = answer.body["detail"].as_str().unwrap_or_default();
    assert!(!answer.status.is_success() && detail.contains(words), "{words}: {answer:?}");
}

/// The same disks in another VM, which has nothing that only one can have.
#[tokio::test]
async fn a_clone_is_a_vm_of_its_own_with_a_snapshot_to_be_made_from() {
    let Some(world) = world().await else { return };
    place(&world, json!({})).await;
    let applied = ask(&world, json!({"name": "copy"})).await.ok();
    assert_eq!(
        (&applied[0]["object"], &applied[0]["outcome"]),
        (&json!("vm/copy"), &json!("created"))
    );
    let all = snapshots(&world).await;
    let [kept] = all.as_slice() else { panic!("{all:?}") };
    assert!(kept["name"].as_str().unwrap().starts_with("clone-20"), "{kept}");
    let record = &kept["snapshot"];
    assert_eq!((&record["state"], &record["madeFor"]), (&json!("wanted"), &json!("copy")));
    assert_eq!(record["disks"].as_array().unwrap().len(), 2);
    let (source, copy) = (vm(&world, "db").await, vm(&world, "copy").await);
    assert_ne!(source["meta"]["uid"], copy["meta"]["uid"]);
    assert_eq!(copy["meta"]["labels"], json!({"tier": "data"}));
    let spec = &copy["spec"];
    assert_eq!(
        (&spec["userData"], &spec["networks"]),
        (&json!("#!/bin/sh"), &json!([{"network": "front"}]))
    );
    assert_eq!((&spec["running"], &spec["disks"][0]["slot"]), (&json!(true), &json!(0)));
    let of = json!({"vm": "db", "vmUid": source["meta"]["uid"], "disk": "data", "snapshot": record["id"]});
    assert_eq!(spec["disks"][1]["copyOf"], of);
    // The source stays as it is, and what the clone is made from stays until it is.
    assert_eq!(source["meta"]["generation"], 1);
    let called = kept["name"].as_str().unwrap();
    let removed = world.operate("DELETE", &format!("/v1/vms/db/snapshots/{called}"), "").await;
    says(&removed, "copy is being made from it; nothing was changed");
    let deleted = world.operate("DELETE", "/v1/objects/vm/db", "").await;
    assert_eq!(deleted.status, StatusCode::CONFLICT);
    says(&deleted, "copy is being made from it; nothing was changed");
    world.operate("DELETE", "/v1/objects/vm/copy", "").await.ok();
    world.operate("DELETE", &format!("/v1/vms/db/snapshots/{called}"), "").await.ok();
    world.operate("DELETE", "/v1/objects/vm/db", "").await.ok();
}

#[tokio::test]
async fn a_clone_of_a_snapshot_uses_that_and_leaves_it() {
    let Some(world) = world().await else { return };
    place(&world, json!({})).await;
    let taken =
        world.operate("POST", "/v1/vms/db/snapshots", json!({"name": "before"}).to_string());
    let id = taken.await.ok()["snapshot"]["id"].clone();
    let one = json!({"name": "one", "disks": ["data"]}).to_string();
    world.operate("POST", "/v1/vms/db/snapshots", one).await.ok();
    says(
        &ask(&world, json!({"name": "copy", "snapshot": "one"})).await,
        "the snapshot `one` of db is not of its disk `root`",
    );
    let unknown = ask(&world, json!({"name": "copy", "snapshot": "never"})).await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    let asked = json!({"name": "copy", "snapshot": "before", "stopped": true});
    ask(&world, asked).await.ok();
    let all = snapshots(&world).await;
    assert!(
        all.len() == 2 && all.iter().all(|one| one["snapshot"]["madeFor"].is_null()),
        "{all:?}"
    );
    let copy = vm(&world, "copy").await;
    assert_eq!(
        (&copy["spec"]["running"], &copy["spec"]["disks"][0]["copyOf"]["snapshot"]),
        (&json!(false), &id)
    );
    world.operate("DELETE", "/v1/vms/db/snapshots/one", "").await.ok();
    says(&world.operate("DELETE", "/v1/vms/db/snapshots/before", "").await, "copy is being made");
    // One that is being removed is none.
    let key =
        keys::vm_snapshot(vm(&world, "db").await["meta"]["uid"].as_str().unwrap(), &name("before"));
    let there = world.state.store.get(&key).await.unwrap().unwrap();
    let mut record: Value = serde_json::from_slice(&there.value).unwrap();
    for state in ["going", "failed", "reverting"] {
        record["state"] = state.into();
        write(&world, key.clone(), &record).await;
        let asked = json!({"name": "other", "snapshot": "before"});
        says(&ask(&world, asked).await, &format!("the snapshot `before` of db is {state}"));
    }
}

#[tokio::test]
async fn what_cannot_be_cloned_is_refused_and_nothing_is_changed() {
    let Some(world) = world().await else { return };
    let copy = || json!({"name": "copy"});
    says(&ask(&world, copy()).await, "host1 has not said that it can make a VM of another one");
    world.speak(&["host1"]).await;
    says(&ask(&world, copy()).await, "db has no host");
    place(
        &world,
        json!({"movingTo": {"host": "host2", "migration": "m", "options": {}, "restart": false}}),
    )
    .await;
    says(&ask(&world, copy()).await, "db is being moved");
    place(&world, json!({})).await;
    says(&ask(&world, json!({"name": "db"})).await, "there is a VM `db` already");
    let none = world.operate("POST", "/v1/vms/web/clone", copy().to_string()).await;
    assert_eq!(none.status, StatusCode::NOT_FOUND);
    let bad = ask(&world, json!({"name": "Not A Name"})).await;
    assert!(bad.status.is_client_error(), "{bad:?}");
    assert!(snapshots(&world).await.is_empty());
    let lives = |pool: &str, driver: &str| {
        format!(
            "kind: Pool\nname: {pool}\ndriver: {driver}\npath: /pools/{pool}\n---\nkind: VM\nname: {pool}\nmemory: 64MiB\ndisks: [{{name: root, size: 1GiB, pool: {pool}}}]\n"
        )
    };
    world.hosts(&["host1", "host2"]).await;
    world.speak(&["host1", "host2"]).await;
    world.apply(&lives("twins", "mirrored")).await.ok();
    let unplaced = world.operate("POST", "/v1/vms/twins/clone", copy().to_string()).await;
    says(&unplaced, "twins has no host that could do anything with its disks");
    // A VM without disks has nothing that a host would have to keep.
    world.apply("kind: VM\nname: bare\nmemory: 64MiB\n").await.ok();
    world.operate("POST", "/v1/vms/bare/clone", json!({"name": "bare-2"}).to_string()).await.ok();
    assert_eq!(vm(&world, "bare-2").await["spec"]["memory"], "64MiB");
    // Two at once: one of them is made.
    let (one, two) = tokio::join!(ask(&world, copy()), ask(&world, copy()));
    assert!(one.status.is_success() != two.status.is_success(), "{one:?} {two:?}");
    assert_eq!(snapshots(&world).await.len(), 1);
}

#[tokio::test]
async fn a_schedule_that_cannot_be_is_refused_with_words() {
    let Some(world) = world().await else { return };
    let asked = |snapshot: &str| {
        format!(
            "kind: VM\nname: web\nmemory: 64MiB\ndisks: [{{name: root, size: 1GiB, pool: fast}}]\nsnapshot: {snapshot}\n"
        )
    };
    let said = |answer: &Answer| answer.body.to_string();
    let older = world.apply(&asked("{every: 1h, keep: 3}")).await;
    assert!(said(&older).contains("host1 has not said that it knows of that"), "{older:?}");
    world.speak(&["host1"]).await;
    let often = world.apply(&asked("{every: 10s, keep: 3}")).await;
    assert!(said(&often).contains("more often than snapshots are taken"), "{often:?}");
    for keep in ["0", "33"] {
        let answer = world.apply(&asked(&format!("{{every: 1h, keep: {keep}}}"))).await;
        assert!(said(&answer).contains("1 to 32 snapshots are kept"), "{answer:?}");
    }
    world.apply(&asked("{every: 1h, keep: 3}")).await.ok();
    let service = "kind: Service\nname: shop\nreplicas: 1\ntemplate: {spec: {memory: 64MiB, snapshot: {every: 1h, keep: 3}}}\n";
    let answer = world.apply(service).await;
    assert!(said(&answer).contains("members of services have no snapshots"), "{answer:?}");
    let two = "kind: VM\nname: odd\nmemory: 64MiB\ndisks: [{name: root, size: 1GiB, pool: fast, backup: {target: nas, vm: a, id: b, disk: c}, copyOf: {vm: db, vmUid: u, disk: root, snapshot: s}}]\n";
    let answer = world.apply(two).await;
    assert!(said(&answer).contains("is made from the disk `root` of db and from"), "{answer:?}");
}
