//! Rehearsals over the API: viewers may, nothing is written, and what is asked wrongly is told.

use super::{auth::Role, testing::World};
use axum::http::StatusCode;

const VM: &str = "kind: VM
name: db
memory: 64MiB
";

#[tokio::test]
async fn a_viewer_rehearses_and_nothing_is_written() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1", "host2"]).await;
    world.apply(VM).await.ok();
    let before = world.state.current().await.unwrap().revision;
    for path in ["/v1/rehearse/fail?hosts=host1,host2", "/v1/rehearse/drain?hosts=host1"] {
        let told = world.ask(world.token(Role::Viewer), "GET", path, "").await.ok();
        assert!(told["figures"].as_str().unwrap().starts_with("nothing was measured"), "{told}");
    }
    let now = world.state.store.get("/haven/spec/vm/db").await.unwrap();
    assert!(now.is_some());
    assert_eq!(world.state.current().await.unwrap().revision, before);
}

#[tokio::test]
async fn what_cannot_be_rehearsed_is_told() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1", "host2"]).await;
    world.apply(VM).await.ok();
    let detail = async |path: &str| {
        let answer = world.operate("GET", path, "").await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.body);
        answer.body["detail"].as_str().unwrap().to_owned()
    };
    assert_eq!(detail("/v1/rehearse/fail?hosts=nowhere").await, "there is no host `nowhere`");
    assert_eq!(detail("/v1/rehearse/fail?hosts=").await, "no host is named");
    let two = detail("/v1/rehearse/drain?hosts=host1,host2").await;
    assert_eq!(two, "one host is drained at a time in a rehearsal");
    assert_eq!(detail("/v1/rehearse/fire?hosts=host1").await, "`fire` cannot be rehearsed");
}
