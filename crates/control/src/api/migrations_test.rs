//! Live migrations over the API: what is refused with a sentence, what is written, and who may take one back.

use super::testing::{World, name};
use axum::http::StatusCode;
use haven_model::{
    Bytes, Meta, Placement, keys,
    migration::MovedFrom,
    object::{Object, Stored},
    volume::{Volume, VolumeRef},
};
use haven_store::raw::Op;
use serde_json::json;

const MOVE: &str = "/v1/vms/db/migration";
const VM: &str = "kind: VM\nname: db\nmemory: 64MiB\n";

async fn place(world: &World, placement: &Placement) {
    let value = serde_json::to_vec(placement).unwrap();
    let put = Op::Put(keys::placement(&name("db")), value.into());
    world.state.store.txn(vec![], vec![put]).await.unwrap();
}

#[tokio::test]
async fn a_move_is_asked_for_once_looked_at_and_taken_back() {
    let Some(world) = World::start().await else { return };
    assert_eq!(
        world.operate("POST", MOVE, json!({}).to_string()).await.status,
        StatusCode::NOT_FOUND
    );
    world.apply(VM).await.ok();
    let early = world.operate("POST", MOVE, json!({}).to_string()).await;
    assert_eq!(early.status, StatusCode::CONFLICT);
    assert_eq!(early.body["detail"], "db has no host yet");
    place(&world, &Placement::new(name("host1"), 1, 0, Vec::new())).await;
    let unknown = world.operate("POST", MOVE, json!({"to": "nowhere"}).to_string()).await;
    assert_eq!(unknown.status, StatusCode::BAD_REQUEST);
    assert_eq!(unknown.body["detail"], "there is no host `nowhere`");
    let begun = world
        .operate("POST", MOVE, json!({"options": {"downtime": "100ms"}}).to_string())
        .await
        .ok();
    assert_eq!(begun["migration"]["from"], "host1");
    assert_eq!(begun["migration"]["options"]["downtime"], "100ms");
    let shown = world.operate("GET", MOVE, "").await.ok();
    assert_eq!(shown["migration"]["id"], begun["migration"]["id"]);
    let back = world.operate("DELETE", MOVE, "").await.ok();
    assert_eq!(back["migration"]["outcome"]["moved"], false);
    assert!(back["migration"]["outcome"]["message"].as_str().unwrap().ends_with("took it back"));
    let again = world.operate("DELETE", MOVE, "").await;
    assert_eq!(again.status, StatusCode::NOT_FOUND, "there is none under way any more");
}

#[tokio::test]
async fn a_guest_is_not_sent_where_its_disk_is_not() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1", "host2"]).await;
    let spec = json!({"driver": "mirrored", "path": "/twins"});
    let meta = Meta::new(name("twins"), "u-twins".into(), 1);
    let spec = serde_json::from_value(spec).unwrap();
    world.put(&Object::Pool(Stored { meta, spec })).await;
    world.apply(&format!("{VM}disks: [{{name: data, size: 1GiB, pool: twins}}]\n")).await.ok();
    world.speak(&["host1", "host2"]).await;
    place(&world, &Placement::new(name("host1"), 1, 0, Vec::new())).await;
    let uid = world.state.current().await.unwrap().vms["db"].meta.uid.clone();
    let volume = Volume::new(uid, name("twins"), Bytes::gib(1), [name("host1")]);
    let key = keys::volume(&VolumeRef { vm: name("db"), disk: name("data") });
    let put = Op::Put(key, serde_json::to_vec(&volume).unwrap().into());
    world.state.store.txn(vec![], vec![put]).await.unwrap();
    let asked = world.operate("POST", MOVE, json!({"to": "host2"}).to_string()).await;
    assert_eq!(asked.status, StatusCode::CONFLICT);
    assert_eq!(asked.body["detail"], "host2 does not have all of its disk `data`");
    assert!(asked.body["hint"].as_str().unwrap().contains("haven volume show db.data"));
}

#[tokio::test]
async fn once_the_owner_has_changed_nobody_takes_it_back() {
    let Some(world) = World::start().await else { return };
    world.apply(VM).await.ok();
    place(&world, &Placement::new(name("host1"), 1, 0, Vec::new())).await;
    world.operate("POST", MOVE, json!({}).to_string()).await.ok();
    let from = MovedFrom { host: name("host1"), session: 1, attempt: 7 };
    let new =
        Placement { moved_from: Some(from), ..Placement::new(name("host2"), 2, 0, Vec::new()) };
    place(&world, &new).await;
    let late = world.operate("DELETE", MOVE, "").await;
    assert_eq!(late.status, StatusCode::CONFLICT);
    assert!(late.body["detail"].as_str().unwrap().contains("has changed its owner already"));
    let twice = world.operate("POST", MOVE, json!({}).to_string()).await;
    assert_eq!(twice.body["detail"], "db is being moved already");
    // Only hosts send guests, and only where they are to go.
    let way = world.operate("GET", "/v1/vms/db/incoming", "").await;
    assert_eq!(way.status, StatusCode::FORBIDDEN);
}
