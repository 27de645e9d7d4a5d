//! Drains over the API: asked for once, looked at, ended; and who may.

use super::testing::{World, name};
use axum::http::StatusCode;
use haven_model::{Drain, keys};
use haven_store::raw::Op;

const DRAIN: &str = "/v1/hosts/host1/drain";

async fn messages(world: &World) -> Vec<String> {
    let events = world.operate("GET", "/v1/events", "").await.ok();
    let items = events["items"].as_array().unwrap().clone();
    items.iter().map(|event| event["message"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_host_is_drained_once_and_that_is_ended() {
    let Some(world) = World::start().await else { return };
    let unknown = world.operate("POST", DRAIN, "").await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    world.hosts(&["host1", "host2"]).await;
    let none = world.operate("DELETE", DRAIN, "").await;
    assert_eq!(none.status, StatusCode::NOT_FOUND, "{}", none.body);
    let begun = world.operate("POST", DRAIN, "").await.ok();
    assert_eq!(begun["drain"]["by"], "operator");
    let again = world.operate("POST", DRAIN, "").await.ok();
    assert_eq!(again["drain"]["id"], begun["drain"]["id"], "it stays the same one");
    let shown = world.operate("GET", DRAIN, "").await.ok();
    assert_eq!(shown["drain"]["id"], begun["drain"]["id"]);
    let ended = world.operate("DELETE", DRAIN, "").await.ok();
    assert_eq!(ended["drain"], serde_json::Value::Null);
    let said = messages(&world).await;
    assert!(said[0].starts_with("host1 is to be drained"), "{said:?}");
    assert!(said[1].starts_with("the drain of host1 was ended: it takes VMs again"), "{said:?}");
}

#[tokio::test]
async fn what_it_moved_may_come_back() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1", "host2"]).await;
    let begun = world.operate("POST", DRAIN, "").await.ok();
    let back = world.operate("DELETE", &format!("{DRAIN}?bringBack=true"), "").await.ok();
    assert_eq!(back["drain"]["bringingBack"], true);
    assert_eq!(back["drain"]["id"], begun["drain"]["id"]);
    let wrong = world.operate("DELETE", &format!("{DRAIN}?bringBack=perhaps"), "").await;
    assert_eq!(wrong.status, StatusCode::BAD_REQUEST);
    // A drain that is asked for meanwhile is another one.
    let anew = world.operate("POST", DRAIN, "").await.ok();
    assert_ne!(anew["drain"]["id"], begun["drain"]["id"]);
    assert_eq!(anew["drain"].get("bringingBack"), None);
}

#[tokio::test]
async fn viewers_look_and_nobody_writes_over_what_cannot_be_read() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1", "host2"]).await;
    let viewer = world.token(super::auth::Role::Viewer);
    let refused = world.ask(viewer, "POST", DRAIN, "").await;
    assert_eq!(refused.status, StatusCode::FORBIDDEN);
    world.ask(viewer, "GET", DRAIN, "").await.ok();
    let put = Op::Put(keys::drain(&name("host1")), "{\"newer\":true}".into());
    world.state.store.txn(vec![], vec![put]).await.unwrap();
    for method in ["POST", "DELETE"] {
        let answer = world.operate(method, DRAIN, "").await;
        assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR, "{}", answer.body);
        assert!(answer.body["detail"].as_str().unwrap().contains("drains/host1 cannot be read"));
    }
    let kept = world.state.store.get(&keys::drain(&name("host1"))).await.unwrap().unwrap();
    assert!(serde_json::from_slice::<Drain>(&kept.value).is_err());
}
