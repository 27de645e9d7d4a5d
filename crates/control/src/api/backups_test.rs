//! Backups over the API: where they go, asked for once, shown, ended; what is refused with a sentence.

use super::testing::{World, name};
use axum::http::StatusCode;
use haven_model::{ObjectRef, Placement, keys, object::Kind};
use haven_store::raw::Op;
use serde_json::json;

const RUN: &str = "/v1/vms/web/backup";
const VERIFICATION: &str = "/v1/targets/nas/verification";
const BASE: &str = "kind: Pool\nname: local\ndriver: local\npath: /pools/local\n---\nkind: VM\nname: web\nmemory: 64MiB\ndisks: [{name: root, size: 1GiB, pool: local}]\n";
const NAS: &str = "kind: Target\nname: nas\ndirectory: /backups\n";
const BUCKET: &str = "kind: Target\nname: far\ns3:\n  endpoint: https://s3.example.net\n  bucket: haven\n  accessKey: AK\n  secretKey: KEY\n";

async fn world() -> Option<World> {
    let world = World::start().await?;
    world.hosts(&["host1"]).await;
    world.apply(BASE).await.ok();
    Some(world)
}

async fn place(world: &World, vm: &str) {
    let placement = serde_json::to_vec(&Placement::new(name("host1"), 1, 0, Vec::new())).unwrap();
    let put = Op::Put(keys::placement(&name(vm)), placement.into());
    world.state.store.txn(vec![], vec![put]).await.unwrap();
}

#[tokio::test]
async fn a_backup_is_asked_for_once_shown_and_ended() {
    let Some(world) = world().await else { return };
    let ask = async |body: &str| world.operate("POST", RUN, body.to_owned()).await;
    assert_eq!(
        ask("{}").await.body["detail"],
        "there is no target yet, so backups could go nowhere"
    );
    assert_eq!(ask("{\"to\": \"nas\"}").await.status, StatusCode::NOT_FOUND);
    world.apply(NAS).await.ok();
    let older = ask("{}").await;
    assert!(older.body["detail"].as_str().unwrap().contains("runs an older Haven"), "{older:?}");
    world.speak(&["host1"]).await;
    assert_eq!(ask("{}").await.body["detail"], "web has no host that could read its disks");
    place(&world, "web").await;
    let begun = ask("{}").await.ok();
    assert_eq!((&begun["vm"], &begun["run"]["to"]), (&json!("web"), &json!("nas")));
    let twice = ask("{}").await;
    assert_eq!(twice.status, StatusCode::CONFLICT);
    assert_eq!(twice.body["detail"], "web is being backed up to nas already");
    let all = world.operate("GET", "/v1/backups", "").await.ok();
    assert_eq!(all[0]["run"]["id"], begun["run"]["id"]);
    assert_eq!(world.operate("GET", RUN, "").await.ok(), all[0]);
    let ended = world.operate("DELETE", RUN, "").await.ok();
    assert!(ended["run"]["outcome"]["message"].as_str().unwrap().ends_with("ended it"));
    assert_eq!(world.operate("DELETE", RUN, "").await.status, StatusCode::NOT_FOUND);
    world.apply(BUCKET).await.ok();
    let which = ask("{}").await;
    assert_eq!(which.body["detail"], "there are several targets: far, nas");
    world.apply("kind: VM\nname: bare\nmemory: 64MiB\n").await.ok();
    place(&world, "bare").await;
    let nothing = world.operate("POST", "/v1/vms/bare/backup", "{\"to\": \"nas\"}").await;
    assert!(nothing.body["detail"].as_str().unwrap().starts_with("bare has no disk"));
}

#[tokio::test]
async fn a_target_is_one_place_and_its_key_is_never_shown() {
    let Some(world) = world().await else { return };
    world.speak(&["host1"]).await;
    let wrong = [
        ("kind: Target\nname: a\n", "it does not say where backups go"),
        ("kind: Target\nname: a\ndirectory: backups\n", "which is not absolute"),
        (&format!("{BUCKET}directory: /x\n"), "is a directory or a bucket, and not both"),
        (&BUCKET.replace("https://s3.example.net", "s3.example.net"), "is no server's address"),
        (&BUCKET.replace("bucket: haven", "bucket: ''"), "`bucket` is empty"),
        (&BUCKET.replace("KEY", "sealed"), "has none yet"),
    ];
    for (manifest, why) in wrong {
        let refused = world.apply(manifest).await;
        assert_eq!(refused.status, StatusCode::UNPROCESSABLE_ENTITY, "{manifest}");
        assert!(refused.body.to_string().contains(why), "{why}: {}", refused.body);
    }
    world.apply(BUCKET).await.ok();
    let shown = world.operate("GET", "/v1/objects/target/far", "").await.ok();
    assert_eq!(shown["spec"]["s3"]["secretKey"], "sealed");
    assert_eq!(shown["columns"]["place"], "https://s3.example.net/haven");
    let stored = async || {
        let key = keys::object(&ObjectRef::new(Kind::Target, name("far")));
        String::from_utf8(world.state.store.get(&key).await.unwrap().unwrap().value.to_vec())
            .unwrap()
    };
    let first = stored().await;
    assert!(!first.contains("KEY"), "{first}");
    let again = world.apply(&BUCKET.replace("KEY", "sealed")).await.ok();
    assert_eq!(again[0]["outcome"], "unchanged");
    assert_eq!(stored().await, first);
    let away = BUCKET.replace("KEY", "sealed").replace("s3.example.net", "mine.example.net");
    let away = world.apply(&away).await;
    assert!(
        away.body.to_string().contains("the server or the id of the key is another one"),
        "{away:?}"
    );
    assert_eq!(stored().await, first);
    let used = world.apply(&format!("{BASE}backup: {{to: far, every: 1s}}\n")).await;
    assert!(used.body.to_string().contains("more often than backups are made"), "{}", used.body);
    let nowhere = world.apply(&format!("{BASE}backup: {{to: tape}}\n")).await;
    assert!(nowhere.body.to_string().contains("target `tape` does not exist"), "{}", nowhere.body);
    let both = BASE.replace(
        "pool: local}",
        "pool: local, image: i, backup: {target: far, vm: a, id: b, disk: root}}",
    );
    let both = world.apply(&both).await;
    assert!(
        both.body.to_string().contains("made from an image and from a backup"),
        "{}",
        both.body
    );
}

#[tokio::test]
async fn a_backup_is_made_a_vm_again_under_a_free_name() {
    let Some(world) = world().await else { return };
    world.speak(&["host1"]).await;
    world.apply(NAS).await.ok();
    let list = world.operate("GET", "/v1/targets/nas/backups", "").await.ok();
    assert_eq!(list["backups"][0]["vm"], "old");
    assert!(list["backups"][0]["object"].is_null(), "its spec may hold what others shall not read");
    let none = world.operate("GET", "/v1/targets/nas/backups?vm=web", "").await.ok();
    assert_eq!(none["backups"], json!([]));
    let ask = async |body: serde_json::Value| {
        world.operate("POST", "/v1/restore", body.to_string()).await
    };
    let taken = ask(json!({"target": "nas", "vm": "old", "name": "web"})).await;
    assert_eq!(taken.body["detail"], "there is a VM `web` already");
    let lost = ask(json!({"target": "nas", "vm": "old", "backup": "b9"})).await;
    assert_eq!(lost.status, StatusCode::NOT_FOUND);
    assert!(lost.body["detail"].as_str().unwrap().contains("backup `b9` of `old`"), "{lost:?}");
    let pool = ask(json!({"target": "nas", "vm": "old", "name": "new", "pool": "fast"})).await;
    assert!(pool.body.to_string().contains("pool `fast` does not exist"), "{}", pool.body);
    let made =
        ask(json!({"target": "nas", "vm": "old", "name": "new", "stopped": true})).await.ok();
    assert_eq!((&made[0]["object"], &made[0]["outcome"]), (&json!("vm/new"), &json!("created")));
    let shown = world.operate("GET", "/v1/objects/vm/new", "").await.ok();
    let disk = json!({
        "name": "root", "size": "1GiB", "pool": "local", "slot": 0,
        "backup": {"target": "nas", "vm": "old", "id": "20261130T021500Z", "disk": "root"},
    });
    assert_eq!(shown["spec"]["disks"], json!([disk]));
    assert_eq!(
        (&shown["spec"]["running"], &shown["meta"]["labels"]["app"]),
        (&json!(false), &json!("shop"))
    );
    // It is not made yet, and would never be without it.
    let needed = world.operate("DELETE", "/v1/targets/nas/backups/old/20261130T021500Z", "").await;
    assert_eq!(needed.body["detail"], "new is being made from that backup");
    let place = "/v1/targets/nas/backups/old/newest/file?at=root:/etc/hosts";
    let file = world.operate("GET", place, "").await;
    assert_eq!(file.status, StatusCode::OK);
    let wrong = world.operate("GET", "/v1/targets/nas/backups/old/newest/file?at=x", "").await;
    assert_eq!(wrong.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn backups_are_compared_once_at_a_time() {
    let Some(world) = world().await else { return };
    world.speak(&["host1"]).await;
    world.apply(NAS).await.ok();
    let ask = async |body: &str| world.operate("POST", VERIFICATION, body.to_owned()).await;
    let unknown = ask("{\"vm\": \"web\"}").await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND, "{unknown:?}");
    let begun = ask("{}").await.ok();
    assert_eq!(ask("{}").await.body["detail"], "the backups in nas are being compared already");
    assert_eq!(world.operate("GET", VERIFICATION, "").await.ok()["id"], begun["id"]);
    let ended = world.operate("DELETE", VERIFICATION, "").await.ok();
    assert_eq!(ended["outcome"]["well"], false);
    assert_eq!(world.operate("DELETE", VERIFICATION, "").await.status, StatusCode::NOT_FOUND);
    let status = world.operate("POST", "/v1/targets/nas/mark", "").await.status;
    assert_eq!(status, StatusCode::FORBIDDEN, "that is an administrator's to say");
}
