//! Work on hosts over the API: asked for once, in a good order, and taken further or ended by a person only.

use super::{
    auth::Role,
    testing::{World, name},
};
use axum::http::StatusCode;
use haven_model::keys;
use haven_store::raw::Op;
use serde_json::{Value, json};

async fn put(world: &World, key: String, value: Value) {
    let ops = vec![Op::Put(key, value.to_string().into())];
    world.state.store.txn(vec![], ops).await.unwrap();
    world.state.current().await.unwrap();
}

/// Three hosts that understand it; the first one manages.
async fn three() -> Option<World> {
    let world = World::start().await?;
    let hosts = ["host1", "host2", "host3"];
    world.hosts(&hosts).await;
    for host in hosts {
        let status = json!({"session": 1, "speaks": 1});
        put(&world, keys::host_status(&name(host)), status).await;
    }
    let manager = json!({"term": 1, "holder": "host1", "session": 1});
    put(&world, keys::MANAGER.into(), manager).await;
    Some(world)
}

fn hosts(view: &Value) -> Vec<&str> {
    let turns = view["maintenance"]["hosts"].as_array().unwrap();
    turns.iter().map(|turn| turn["host"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn all_hosts_have_their_turn_and_the_managing_one_is_the_last() {
    let Some(world) = three().await else { return };
    let admin = world.token(Role::Admin);
    let body = r#"{"work": "reboot"}"#;
    let refused = world.operate("POST", "/v1/maintenance", body).await;
    assert_eq!(refused.status, StatusCode::FORBIDDEN, "only an admin restarts hosts");
    let begun = world.ask(admin, "POST", "/v1/maintenance", body).await.ok();
    assert_eq!(hosts(&begun), ["host2", "host3", "host1"]);
    assert!(begun["now"].as_str().unwrap().contains("the reboot of host2 waits"), "{begun}");
    let again = world.ask(admin, "POST", "/v1/maintenance", body).await;
    assert_eq!(again.status, StatusCode::CONFLICT);
    let early = world.ask(admin, "POST", "/v1/maintenance/resume", "").await;
    assert_eq!(early.body["detail"], "it has not stopped");
    let ended = world.ask(admin, "POST", "/v1/maintenance/end", "").await.ok();
    assert!(ended["maintenance"]["endedMs"].is_i64(), "{ended}");
    assert_eq!(ended["now"], Value::Null);
    let over = world.ask(admin, "POST", "/v1/maintenance/end", "").await;
    assert_eq!(over.status, StatusCode::NOT_FOUND);
    let chosen = r#"{"work": "upgrade", "hosts": ["host3", "host1"]}"#;
    let begun = world.ask(admin, "POST", "/v1/maintenance", chosen).await.ok();
    assert_eq!(hosts(&begun), ["host3", "host1"]);
}

#[tokio::test]
async fn what_failed_is_tried_again_when_a_person_says_so() {
    let Some(world) = three().await else { return };
    let admin = world.token(Role::Admin);
    world.ask(admin, "POST", "/v1/maintenance", r#"{"work": "upgrade"}"#).await.ok();
    let record = world.state.current().await.unwrap().maintenance.clone().unwrap();
    let mut stopped = serde_json::to_value(&*record.value).unwrap();
    stopped["hosts"][0]["phase"] = json!("working");
    stopped["stopped"] = json!("the upgrade of host2 failed: no space left");
    put(&world, keys::MAINTENANCE.into(), stopped).await;
    let told = json!({"maintenance": record.id, "state": "failed", "message": "no space left"});
    put(&world, keys::work_status(&name("host2")), told).await;
    let resumed = world.ask(admin, "POST", "/v1/maintenance/resume", "").await.ok();
    assert_eq!(resumed["maintenance"]["stopped"], Value::Null);
    assert_eq!(resumed["maintenance"]["hosts"][0]["phase"], "draining");
    assert_eq!(resumed["maintenance"]["id"], json!(record.id), "the drain is still its own");
    let now = world.state.current().await.unwrap();
    assert!(now.work_status.is_empty(), "its agent begins anew");
}

#[tokio::test]
async fn what_is_done_or_under_way_is_not_done_twice() {
    let Some(world) = three().await else { return };
    let admin = world.token(Role::Admin);
    world.ask(admin, "POST", "/v1/maintenance", r#"{"work": "reboot"}"#).await.ok();
    let record = world.state.current().await.unwrap().maintenance.clone().unwrap();
    let resumed = async |work: &str, told: &str| {
        let mut stopped = serde_json::to_value(&*record.value).unwrap();
        stopped["hosts"][0]["phase"] = json!("working");
        stopped["hosts"][0]["bootId"] = json!("first");
        stopped["work"] = json!(work);
        stopped["stopped"] = json!("it took too long");
        put(&world, keys::MAINTENANCE.into(), stopped).await;
        let told = json!({"maintenance": record.id, "state": told});
        put(&world, keys::work_status(&name("host2")), told).await;
        let view = world.ask(admin, "POST", "/v1/maintenance/resume", "").await.ok();
        view["maintenance"]["hosts"][0]["phase"].as_str().unwrap().to_owned()
    };
    let boot = async |boot: &str| {
        let status = json!({"session": 1, "speaks": 1, "bootId": boot});
        put(&world, keys::host_status(&name("host2")), status).await;
    };
    boot("first").await;
    assert_eq!(resumed("reboot", "begun").await, "working", "it may still come");
    assert_eq!(resumed("upgrade", "begun").await, "working");
    assert_eq!(resumed("upgrade", "done").await, "settling");
    boot("second").await;
    assert_eq!(resumed("reboot", "begun").await, "settling");
}

#[tokio::test]
async fn a_host_stays_drained_while_it_is_worked_on() {
    let Some(world) = three().await else { return };
    let admin = world.token(Role::Admin);
    world.ask(admin, "POST", "/v1/maintenance", r#"{"work": "reboot"}"#).await.ok();
    let record = world.state.current().await.unwrap().maintenance.clone().unwrap();
    let mut working = serde_json::to_value(&*record.value).unwrap();
    working["hosts"][0]["phase"] = json!("working");
    put(&world, keys::MAINTENANCE.into(), working).await;
    let drain = json!({"id": format!("{}/host2", record.id), "by": "the reboot", "atMs": 1});
    put(&world, keys::drain(&name("host2")), drain).await;
    let refused = world.operate("DELETE", "/v1/hosts/host2/drain", "").await;
    assert_eq!(refused.status, StatusCode::CONFLICT);
    assert_eq!(refused.body["detail"], "host2 is drained for its reboot, which is under way");
    let ended = world.ask(admin, "POST", "/v1/maintenance/end", "").await.ok();
    assert_eq!(ended["drained"], json!(["host2"]), "whoever ends it learns what is left");
    world.operate("DELETE", "/v1/hosts/host2/drain", "").await.ok();
}

#[tokio::test]
async fn what_cannot_be_is_refused_before_any_host_is_touched() {
    let Some(world) = three().await else { return };
    let admin = world.token(Role::Admin);
    let refused = async |body: &str| {
        let answer = world.ask(admin, "POST", "/v1/maintenance", body.to_owned()).await;
        answer.body["detail"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(
        refused(r#"{"work": "reboot", "hosts": ["nowhere"]}"#).await,
        "there is no host `nowhere`"
    );
    assert_eq!(
        refused(r#"{"work": "reboot", "hosts": ["host1", "host1"]}"#).await,
        "host1 is named twice"
    );
    // One of an older version would be waited for in vain.
    put(&world, keys::host_status(&name("host3")), json!({"session": 1})).await;
    assert!(refused(r#"{"work": "upgrade"}"#).await.starts_with("host3 has not said"));
    assert!(world.state.current().await.unwrap().maintenance.is_none());
}
