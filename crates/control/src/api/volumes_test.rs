//! Comparisons of replicas over the API: asked for once, shown, ended; what is refused with a sentence.

use super::testing::{World, name};
use axum::http::StatusCode;
use haven_model::{
    Bytes, Placement, keys,
    volume::{Volume, VolumeRef},
};
use haven_store::raw::Op;
use serde_json::json;

const CHECK: &str = "/v1/volumes/db.data/check";

async fn put(world: &World, run: u64) {
    let hosts = [name("host1"), name("host2")];
    let volume = Volume { run, ..Volume::new("u1".into(), name("twins"), Bytes::gib(1), hosts) };
    let key = keys::volume(&VolumeRef { vm: name("db"), disk: name("data") });
    let op = Op::Put(key, serde_json::to_vec(&volume).unwrap().into());
    world.state.store.txn(vec![], vec![op]).await.unwrap();
}

#[tokio::test]
async fn a_comparison_is_asked_for_once_shown_and_ended() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1", "host2"]).await;
    let ask = async |body: &str| world.operate("POST", CHECK, body.to_owned()).await;
    assert_eq!(ask("{}").await.status, StatusCode::NOT_FOUND);
    put(&world, 0).await;
    let new = ask("{}").await;
    assert_eq!(new.status, StatusCode::CONFLICT);
    assert_eq!(new.body["detail"], "nobody has written to db.data yet");
    put(&world, 3).await;
    let nowhere = ask("{}").await;
    assert_eq!(nowhere.body["detail"], "db has no host that could compare its disks");
    let placement = serde_json::to_vec(&Placement::new(name("host1"), 1, 0, Vec::new())).unwrap();
    let put = Op::Put(keys::placement(&name("db")), placement.into());
    world.state.store.txn(vec![], vec![put]).await.unwrap();
    let older = ask("{}").await;
    assert_eq!(older.status, StatusCode::CONFLICT);
    assert!(older.body["detail"].as_str().unwrap().contains("runs an older Haven"));
    world.speak(&["host1", "host2"]).await;
    let begun = ask(&json!({"repair": true}).to_string()).await.ok();
    assert_eq!(begun["check"]["repair"], true);
    assert!(begun["check"]["outcome"].is_null());
    let twice = ask("{}").await;
    assert_eq!(twice.status, StatusCode::CONFLICT);
    assert_eq!(twice.body["detail"], "the replicas of db.data are being compared already");
    let shown = world.operate("GET", "/v1/volumes/db.data", "").await.ok();
    assert_eq!(shown["check"]["id"], begun["check"]["id"]);
    let ended = world.operate("DELETE", CHECK, "").await.ok();
    assert!(ended["check"]["outcome"]["message"].as_str().unwrap().ends_with("ended it"));
    assert_eq!(world.operate("DELETE", CHECK, "").await.status, StatusCode::NOT_FOUND);
    assert_ne!(ask("{}").await.ok()["check"]["id"], begun["check"]["id"]);
    // Only hosts tell each other what their disks hold.
    let told = world.operate("GET", "/v1/volumes/db.data/pieces?from=0&count=1", "").await;
    assert_eq!(told.status, StatusCode::FORBIDDEN);
}
