//! Snapshots over the API: asked for, shown, reverted to, removed; what is refused with a sentence.

use super::testing::{Answer, World, name};
use axum::http::StatusCode;
use haven_model::{
    Placement,
    backup::BackupRun,
    keys,
    vm_snapshot::{MOST_SNAPSHOTS, VmSnapshot},
};
use haven_store::raw::Op;
use serde_json::{Value, json};

const ALL: &str = "/v1/vms/db/snapshots";
const BASE: &str = "kind: Pool\nname: fast\ndriver: local\npath: /pools/fast\n---\nkind: VM\nname: db\nmemory: 64MiB\ndisks: [{name: root, size: 1GiB, pool: fast}, {name: data, size: 2GiB, pool: fast}]\n";

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

async fn place(world: &World, more: Value) {
    world.speak(&["host1"]).await;
    let placement = Placement::new(name("host1"), 1, 0, Vec::new());
    let mut placement = serde_json::to_value(placement).unwrap();
    placement.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
    write(world, keys::placement(&name("db")), &placement).await;
}

/// Its host says what it does.
async fn told(world: &World, phase: &str) {
    let vm = world.operate("GET", "/v1/objects/vm/db", "").await.ok();
    let generation = vm["meta"]["generation"].as_u64().unwrap();
    told_of(world, phase, generation).await;
}

/// The same, of what was asked of it at that time.
async fn told_of(world: &World, phase: &str, generation: u64) {
    write(world, keys::lease(&name("host1")), &json!({"session": 1, "count": 1})).await;
    let status = json!({"host": "host1", "session": 1, "epoch": 1, "generation": generation, "phase": phase, "since_ms": 1,
        "sinceMs": 1, "restarts": 0, "resets": 0, "message": ""});
    write(world, keys::vm_status(&name("db")), &status).await;
}

async fn uid(world: &World) -> String {
    let vm = world.operate("GET", "/v1/objects/vm/db", "").await.ok();
    vm["uid"].as_str().or(vm["meta"]["uid"].as_str()).unwrap().to_owned()
}

/// Its host carries out what is wanted: it stands otherwise.
async fn becomes(world: &World, called: &str, state: &str) {
    let key = keys::vm_snapshot(&uid(world).await, &name(called));
    let there = world.state.store.get(&key).await.unwrap().unwrap();
    let mut record: Value = serde_json::from_slice(&there.value).unwrap();
    record["state"] = state.into();
    write(world, key, &record).await;
}

async fn ask(world: &World, body: Value) -> Answer {
    world.operate("POST", ALL, body.to_string()).await
}

fn says(answer: &Answer, words: &str) {
    let detail = answer.body["detail"].as_str().unwrap_or_default();
    assert!(!answer.status.is_success() && detail.contains(words), "{words}: {answer:?}");
}

#[tokio::test]
async fn one_is_asked_for_once_shown_and_removed() {
    let Some(world) = world().await else { return };
    says(&ask(&world, json!({})).await, "host1 has not said that it knows snapshots");
    world.speak(&["host1"]).await;
    says(&ask(&world, json!({})).await, "db has no host");
    place(&world, json!({})).await;
    let taken = ask(&world, json!({"name": "before"})).await.ok();
    assert_eq!((&taken["name"], &taken["snapshot"]["state"]), (&json!("before"), &json!("wanted")));
    assert_eq!(
        taken["snapshot"]["disks"][1],
        json!({"name": "data", "pool": "fast", "size": "2GiB"})
    );
    assert_eq!(taken["waiting"], "its host host1 is away");
    let twice = ask(&world, json!({"name": "before"})).await;
    assert_eq!(twice.status, StatusCode::CONFLICT);
    says(&twice, "db has a snapshot `before` already, which is wanted");
    // One that failed gives its name to the next try.
    becomes(&world, "before", "failed").await;
    let again = ask(&world, json!({"name": "before", "disks": ["data"]})).await.ok();
    assert_ne!(again["snapshot"]["id"], taken["snapshot"]["id"]);
    assert_eq!(again["snapshot"]["disks"].as_array().unwrap().len(), 1);
    let unnamed = [ask(&world, json!({})).await.ok(), ask(&world, json!({})).await.ok()];
    assert_eq!(unnamed[0]["name"].as_str().unwrap().len(), "20261130-084321".len());
    assert_ne!(unnamed[0]["name"], unnamed[1]["name"]);
    let all = world.operate("GET", ALL, "").await.ok();
    assert_eq!(all[0], world.operate("GET", ALL, "").await.ok()[0]);
    assert_eq!(all.as_array().unwrap().len(), 3);
    let gone = world.operate("DELETE", &format!("{ALL}/before"), "").await.ok();
    assert_eq!(gone["snapshot"]["state"], "going");
    let none = world.operate("DELETE", &format!("{ALL}/nothing"), "").await;
    assert_eq!(none.status, StatusCode::NOT_FOUND);
    for i in 0..MOST_SNAPSHOTS {
        let mut record: VmSnapshot = serde_json::from_value(taken["snapshot"].clone()).unwrap();
        record.id = format!("s{i}");
        let key = keys::vm_snapshot(&uid(&world).await, &name(&format!("s{i}")));
        write(&world, key, &serde_json::to_value(record).unwrap()).await;
    }
    says(&ask(&world, json!({"name": "more"})).await, "db has 64 snapshots, and no more are kept");
}

#[tokio::test]
async fn what_cannot_be_kept_is_refused_with_a_sentence() {
    let Some(world) = world().await else { return };
    place(&world, json!({})).await;
    says(&ask(&world, json!({"disks": ["swap"]})).await, "db has no disk `swap`");
    place(
        &world,
        json!({"movingTo": {"host": "host2", "migration": "m", "options": {}, "restart": false}}),
    )
    .await;
    says(&ask(&world, json!({})).await, "db is being moved");
    place(&world, json!({})).await;
    let run = BackupRun::new(&uid(&world).await, name("nas"), "root".into(), 1, None);
    let backup = keys::backup(&name("db"));
    write(&world, backup.clone(), &serde_json::to_value(&run).unwrap()).await;
    says(&ask(&world, json!({})).await, "db is being backed up to nas");
    let ended = run.ended(2, true, String::new());
    write(&world, backup, &serde_json::to_value(&ended).unwrap()).await;
    ask(&world, json!({})).await.ok();
    let mixed = "kind: VM\nname: mixed\nmemory: 64MiB\ndisks: [{name: root, size: 1GiB, pool: fast}, {name: data, size: 1GiB, pool: both}]\n";
    world.hosts(&["host2"]).await;
    world.speak(&["host1", "host2"]).await;
    world.apply("kind: Pool\nname: both\ndriver: mirrored\npath: /pools/both\n").await.ok();
    world.apply(mixed).await.ok();
    let placement = serde_json::to_value(Placement::new(name("host1"), 1, 1, Vec::new())).unwrap();
    write(&world, keys::placement(&name("mixed")), &placement).await;
    let mixed =
        async |body: &str| world.operate("POST", "/v1/vms/mixed/snapshots", body.to_owned()).await;
    // A host that does not know of it would open what its replica held before.
    world.speak_up_to(&["host2"], haven_model::host::SNAPSHOTS).await;
    let older = "the disk `data` of mixed lives in the mirrored pool `both`, and host2 has not said that it knows snapshots of such disks";
    says(&mixed("{}").await, older);
    mixed("{\"disks\": [\"root\"]}").await.ok();
    world.speak(&["host2"]).await;
    mixed("{}").await.ok();
    world.apply("kind: VM\nname: bare\nmemory: 64MiB\n").await.ok();
    let placement = serde_json::to_value(Placement::new(name("host1"), 1, 2, Vec::new())).unwrap();
    write(&world, keys::placement(&name("bare")), &placement).await;
    says(&world.operate("POST", "/v1/vms/bare/snapshots", "{}").await, "bare has no disk");
    let reader = world.token(super::auth::Role::Viewer);
    let read = world.ask(reader, "POST", ALL, "{}".to_owned()).await;
    assert_eq!(read.status, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn a_mirrored_disk_is_reverted_where_its_host_has_a_copy() {
    let Some(world) = world().await else { return };
    world.speak(&["host1"]).await;
    world.hosts(&["host2"]).await;
    world.speak(&["host2"]).await;
    world.apply("kind: Pool\nname: both\ndriver: mirrored\npath: /pools/both\n").await.ok();
    let twin = "kind: VM\nname: twin\nrunning: false\nmemory: 64MiB\ndisks: [{name: data, size: 1GiB, pool: both}]\n";
    world.apply(twin).await.ok();
    let placement = serde_json::to_value(Placement::new(name("host1"), 1, 1, Vec::new())).unwrap();
    write(&world, keys::placement(&name("twin")), &placement).await;
    let status = json!({"host": "host1", "session": 1, "epoch": 1, "generation": 9, "phase": "stopped", "sinceMs": 1, "restarts": 0, "message": ""});
    write(&world, keys::vm_status(&name("twin")), &status).await;
    write(&world, keys::lease(&name("host1")), &json!({"session": 1, "count": 1})).await;
    let all = "/v1/vms/twin/snapshots";
    let taken = world.operate("POST", all, "{\"name\": \"one\"}".to_owned()).await.ok();
    let vm = world.operate("GET", "/v1/objects/vm/twin", "").await.ok();
    let uid = vm["uid"].as_str().or(vm["meta"]["uid"].as_str()).unwrap();
    let revert = async |copies: Value| {
        let mut record = taken["snapshot"].clone();
        (record["state"], record["disks"][0]["copies"]) = (json!("there"), copies);
        write(&world, keys::vm_snapshot(uid, &name("one")), &record).await;
        world.operate("POST", &format!("{all}/one/revert"), "{}".to_owned()).await
    };
    says(&revert(json!([])).await, "no host has a copy of the disk `data` of twin any more");
    let elsewhere =
        "host1 has no copy yet of the disk `data` of twin as it was in `one`; host2 has one";
    says(&revert(json!(["host2"])).await, elsewhere);
    world.speak_up_to(&["host2"], haven_model::host::SNAPSHOTS).await;
    let older = "host2 has not said that it knows snapshots of mirrored disks";
    says(&revert(json!(["host1"])).await, older);
    world.speak(&["host2"]).await;
    let back = revert(json!(["host1"])).await.ok();
    assert_eq!(back["snapshot"]["state"], "reverting");
}

#[tokio::test]
async fn only_what_is_whole_is_reverted_to_and_only_at_rest() {
    let Some(world) = world().await else { return };
    place(&world, json!({})).await;
    ask(&world, json!({"name": "first"})).await.ok();
    let revert = async |of: &str, body: Value| {
        world.operate("POST", &format!("{ALL}/{of}/revert"), body.to_string()).await
    };
    says(&revert("first", json!({})).await, "the snapshot `first` of db is wanted");
    becomes(&world, "first", "there").await;
    says(&revert("first", json!({})).await, "db shall run");
    world.operate("POST", "/v1/vms/db/stop", "").await.ok();
    says(&revert("first", json!({})).await, "it is not known whether db has come to its end");
    told(&world, "stopping").await;
    says(&revert("first", json!({})).await, "db has not come to its end yet");
    // An end before it was started and told to stop once more.
    told_of(&world, "stopped", 0).await;
    says(&revert("first", json!({})).await, "db has not come to its end yet");
    told(&world, "stopped").await;
    ask(&world, json!({"name": "next"})).await.ok();
    says(&revert("first", json!({})).await, "the snapshot `next` of db is not taken yet");
    becomes(&world, "next", "failed").await;
    says(&revert("first", json!({"disks": ["swap"]})).await, "`first` is not of the disk `swap`");
    let one = revert("first", json!({"disks": ["data"]})).await.ok();
    assert_eq!(
        (&one["snapshot"]["state"], &one["snapshot"]["back"]),
        (&json!("reverting"), &json!(["data"]))
    );
    says(&ask(&world, json!({})).await, "being made what they were in `first`");
    let rm = world.operate("DELETE", &format!("{ALL}/first"), "").await;
    says(&rm, "the disks of db are being made what they were in `first`");
    // What does not come to its end gives way to a snapshot of all that it would have changed.
    let key = |uid: &str, of: &str| keys::vm_snapshot(uid, &name(of));
    let uid = uid(&world).await;
    for (of, disks) in [
        ("second", json!([{"name": "root", "pool": "fast", "size": "1GiB"}])),
        ("third", json!([{"name": "data", "pool": "fast", "size": "1GiB"}])),
        ("moved", json!([{"name": "data", "pool": "slow", "size": "1GiB"}])),
    ] {
        let mut record = one["snapshot"].clone();
        (record["id"], record["state"], record["disks"]) = (of.into(), "there".into(), disks);
        record["back"] = json!([]);
        write(&world, key(&uid, of), &record).await;
    }
    says(
        &revert("second", json!({})).await,
        "the disk `data` of db is being made what it was in `first`",
    );
    says(&revert("moved", json!({})).await, "db has no disk `data` in the pool `slow` any more");
    let third = revert("third", json!({})).await.ok();
    assert_eq!(third["snapshot"]["state"], "reverting");
    let all = world.operate("GET", ALL, "").await.ok();
    let first = all.as_array().unwrap().iter().find(|of| of["name"] == "first").unwrap();
    assert_eq!(
        (&first["snapshot"]["state"], &first["snapshot"]["message"]),
        (&json!("there"), &json!("given up for `third`"))
    );
}
