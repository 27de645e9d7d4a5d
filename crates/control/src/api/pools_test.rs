//! Pools of Ceph clusters over the API: asked before they are written, their key sealed, what is refused with a sentence.

use super::testing::{Answer, World, name};
use axum::http::StatusCode;
use haven_model::{ObjectRef, Placement, keys, object::Kind};
use haven_store::raw::Op;

const KEY: &str = "AQBSAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==";

fn ceph(change: impl FnOnce(String) -> String) -> String {
    change(format!(
        "kind: Pool\nname: ceph\ndriver: rbd\nrbd:\n  monitors: [10.0.0.1, 10.0.0.2]\n  user: haven\n  key: {KEY}\n  pool: vm\n"
    ))
}

fn same(text: String) -> String {
    text
}

fn refused(answer: &Answer, why: &str) {
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{answer:?}");
    assert!(answer.body.to_string().contains(why), "{why}: {}", answer.body);
}

#[tokio::test]
async fn a_pool_of_cephs_is_asked_and_its_key_is_never_shown() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1"]).await;
    refused(&world.apply(&ceph(same)).await, "it runs an older Haven");
    world.speak(&["host1"]).await;
    let wrong = [
        (ceph(|text| text + "path: /x\n"), "a pool of Ceph's has no directory"),
        (ceph(|text| text + "replicas: 2\n"), "belongs to mirrored pools"),
        (ceph(|text| text.replace("driver: rbd", "driver: shared")), "belongs to pools of Ceph"),
        (ceph(|text| text.replace(KEY, "''")), "`key` is empty"),
        (ceph(|text| text.replace(KEY, "sealed")), "has none yet"),
        (ceph(|text| text.replace("pool: vm", "pool: nopool")), "Ceph has no pool nopool"),
        ("kind: Pool\nname: ceph\ndriver: rbd\n".into(), "does not say where the Ceph cluster is"),
    ];
    for (manifest, why) in &wrong {
        refused(&world.apply(manifest).await, why);
    }
    let key = keys::object(&ObjectRef::new(Kind::Pool, name("ceph")));
    let stored = async || world.state.store.get(&key).await.unwrap();
    assert!(stored().await.is_none(), "nothing was changed");
    world.apply(&ceph(same)).await.ok();
    let text = String::from_utf8(stored().await.unwrap().value.to_vec()).unwrap();
    assert!(text.contains("sealed:v1:") && !text.contains(KEY), "{text}");
    let shown = world.operate("GET", "/v1/objects/pool/ceph", "").await.ok();
    assert_eq!(shown["spec"]["rbd"]["key"], "sealed");
    assert_eq!(shown["columns"]["path"], "vm of the Ceph cluster at 10.0.0.1, 10.0.0.2");
    for again in [ceph(same), ceph(|text| text.replace(KEY, "sealed"))] {
        assert_eq!(world.apply(&again).await.ok()[0]["outcome"], "unchanged");
    }
    // The key does not go elsewhere; what lies in a pool stays there.
    let away = ceph(|text| text.replace(KEY, "sealed").replace("10.0.0.2", "10.9.9.9"));
    refused(&world.apply(&away).await, "the cluster or the user is another one");
    let other = ceph(|text| text.replace("pool: vm", "pool: other"));
    refused(&world.apply(&other).await, "a pool cannot be changed once it is there");
    let more = ceph(|text| text.replace("10.0.0.2", "10.0.0.2, 10.0.0.3"));
    assert_eq!(world.apply(&more).await.ok()[0]["outcome"], "changed");
}

#[tokio::test]
async fn what_disks_in_ceph_cannot_do_yet_is_refused() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1", "host2"]).await;
    world.speak(&["host1", "host2"]).await;
    world.apply(&ceph(same)).await.ok();
    world.apply("kind: Target\nname: nas\ndirectory: /backups\n").await.ok();
    let vm = |more: &str, disk: &str| {
        format!(
            "kind: VM\nname: web\nmemory: 64MiB\n{more}disks: [{{name: root, size: 1GiB, pool: ceph{disk}}}]\n"
        )
    };
    refused(&world.apply(&vm("backup: {to: nas}\n", "")).await, "are not backed up yet");
    let from = ", backup: {target: nas, vm: a, id: b, disk: root}";
    refused(&world.apply(&vm("", from)).await, "does not take that yet");
    world.apply(&vm("isolation: keep\n", "")).await.ok();
    let placement = serde_json::to_vec(&Placement::new(name("host1"), 1, 0, Vec::new())).unwrap();
    let put = Op::Put(keys::placement(&name("web")), placement.into());
    world.state.store.txn(vec![], vec![put]).await.unwrap();
    let refuses = async |path: &str, body: &str, why: &str| {
        let answer = world.operate("POST", path, body.to_owned()).await;
        assert_eq!(answer.status, StatusCode::CONFLICT, "{answer:?}");
        assert!(answer.body["detail"].as_str().unwrap().contains(why), "{}", answer.body);
    };
    refuses("/v1/vms/web/backup", "{\"to\": \"nas\"}", "are not backed up yet").await;
    let key = keys::host_status(&name("host1"));
    let there = world.state.store.get(&key).await.unwrap().unwrap();
    let mut old: serde_json::Value = serde_json::from_slice(&there.value).unwrap();
    old["speaks"] = (haven_model::host::RBD_SNAPSHOTS - 1).into();
    let put = Op::Put(key, old.to_string().into());
    world.state.store.txn(vec![], vec![put]).await.unwrap();
    let older = "host1 has not said that it knows snapshots of such disks";
    refuses("/v1/vms/web/snapshots", "{}", older).await;
    refuses("/v1/vms/web/clone", "{\"name\": \"copy\"}", older).await;
    let by_schedule = vm("isolation: keep\nsnapshot: {every: 1h, keep: 3}\n", "");
    refused(&world.apply(&by_schedule).await, "it runs an older Haven");
    world.speak(&["host1", "host2"]).await;
    world.apply(&by_schedule).await.ok();
    for (path, body) in [("snapshots", "{}"), ("clone", "{\"name\": \"copy\"}")] {
        world.operate("POST", &format!("/v1/vms/web/{path}"), body.to_owned()).await.ok();
    }
    // A mirrored disk beside it is of another instant.
    let twins = "kind: Pool\nname: twins\ndriver: mirrored\npath: /pools/twins\n---\n";
    let both = twins.to_owned()
        + "kind: VM\nname: both\nmemory: 64MiB\ndisks: [{name: far, size: 1GiB, pool: ceph}, {name: near, size: 1GiB, pool: twins}]\n";
    world.apply(&both).await.ok();
    let placement = serde_json::to_vec(&Placement::new(name("host1"), 1, 0, Vec::new())).unwrap();
    let put = Op::Put(keys::placement(&name("both")), placement.into());
    world.state.store.txn(vec![], vec![put]).await.unwrap();
    let apart = "the disk `near` is mirrored and the disk `far` is in Ceph";
    refuses("/v1/vms/both/snapshots", "{}", apart).await;
    refuses("/v1/vms/both/clone", "{\"name\": \"other\"}", apart).await;
    refused(&world.apply(&(both + "snapshot: {every: 1h, keep: 3}\n")).await, apart);
    world.operate("POST", "/v1/vms/both/snapshots", "{\"disks\": [\"far\"]}").await.ok();
}
