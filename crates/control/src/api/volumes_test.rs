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

fn vm(disks: &str) -> String {
    format!(
        "kind: Pool\nname: fast\ndriver: local\npath: /fast\n---\nkind: VM\nname: web\nmemory: 64MiB\ndisks:\n{disks}"
    )
}

const ROOT: &str = "- {name: root, size: 1GiB, pool: fast}\n";
const LOGS: &str = "- {name: logs, size: 2GiB, pool: fast, detached: true}\n";

async fn slots(world: &World) -> Vec<(String, Option<u64>)> {
    let shown = world.operate("GET", "/v1/objects/vm/web", "").await.ok();
    let disks = shown["spec"]["disks"].as_array().unwrap().iter();
    disks.map(|disk| (disk["name"].as_str().unwrap().to_owned(), disk["slot"].as_u64())).collect()
}

fn named(slots: &[(&str, Option<u64>)]) -> Vec<(String, Option<u64>)> {
    slots.iter().map(|(name, slot)| ((*name).to_owned(), *slot)).collect()
}

#[tokio::test]
async fn disks_get_ports_once_all_hosts_know_of_them_and_keep_them() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1", "host2"]).await;
    world.apply(&vm(ROOT)).await.ok();
    assert_eq!(slots(&world).await, named(&[("root", None)]));
    let early = world.apply(&vm(&format!("{ROOT}{LOGS}"))).await;
    assert!(early.body.to_string().contains("knows of disks that come and go"), "{}", early.body);
    world.speak(&["host1", "host2"]).await;
    world.apply(&vm(&format!("{ROOT}{LOGS}"))).await.ok();
    // What was there before is where its guest knows it.
    assert_eq!(slots(&world).await, named(&[("root", None), ("logs", Some(1))]));
    let again = world.apply(&vm(&format!("{ROOT}{LOGS}"))).await.ok();
    assert_eq!(again[1]["outcome"], "unchanged", "{again}");
    let other = "- {name: tmp, size: 1GiB, pool: fast}\n";
    world.apply(&vm(&format!("{other}{ROOT}{LOGS}"))).await.ok();
    assert_eq!(slots(&world).await, named(&[("tmp", Some(2)), ("root", None), ("logs", Some(1))]));
    for (disks, words) in [
        (
            format!("{ROOT}{other}"),
            "the disk `logs` of web is left out, and is not removed by that",
        ),
        (
            format!("{ROOT}{other}{}", LOGS.replace('}', ", slot: 7}")),
            "the disk `logs` of web keeps the port that it has",
        ),
        (
            format!("{ROOT}{other}{LOGS}- {{name: a, size: 1GiB, pool: fast, slot: 15}}\n"),
            "there is no port 15 for the disk `a`",
        ),
        (
            format!(
                "{ROOT}{other}{LOGS}- {{name: a, size: 1GiB, pool: fast, slot: 3}}\n- {{name: b, size: 1GiB, pool: fast, slot: 3}}\n"
            ),
            "the port 3 is given to two disks",
        ),
    ] {
        let refused = world.apply(&vm(&disks)).await;
        assert_eq!(refused.status, StatusCode::UNPROCESSABLE_ENTITY);
        assert!(refused.body.to_string().contains(words), "{words}: {}", refused.body);
    }
}

#[tokio::test]
async fn a_disk_is_encrypted_from_its_beginning_or_never_and_its_key_goes_with_it() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1", "host2"]).await;
    let (safe, logs) =
        (ROOT.replace('}', ", encrypted: true}"), LOGS.replace('}', ", encrypted: true}"));
    let refused = async |disks: &str, words: &str| {
        let refused = world.apply(&vm(disks)).await;
        assert_eq!(refused.status, StatusCode::UNPROCESSABLE_ENTITY, "{words}");
        assert!(refused.body.to_string().contains(words), "{words}: {}", refused.body);
    };
    refused(&safe, "has not said that it can encrypt disks").await;
    world.speak(&["host1", "host2"]).await;
    refused(&safe.replace("1GiB", "1000B"), "in sectors of 512 bytes").await;
    world.apply(&vm(&format!("{safe}{logs}"))).await.ok();
    let shown = world.operate("GET", "/v1/volumes/web.root", "").await.ok();
    assert_eq!(shown["encrypted"], true);
    refused(&format!("{ROOT}{logs}"), "the disk `root` of web was made encrypted, and stays so")
        .await;
    let plain = "- {name: tmp, size: 1GiB, pool: fast}\n";
    world.apply(&vm(&format!("{safe}{logs}{plain}"))).await.ok();
    let shown = world.operate("GET", "/v1/volumes/web.tmp", "").await.ok();
    assert!(shown["encrypted"].is_null(), "{shown}");
    let changed = plain.replace('}', ", encrypted: true}");
    refused(&format!("{safe}{logs}{changed}"), "was made not encrypted, and stays so").await;
    let uid = world.operate("GET", "/v1/objects/vm/web", "").await.ok();
    let uid = uid["meta"]["uid"].as_str().unwrap().to_owned();
    let keys_of = [keys::disk_key(&uid, &name("root")), keys::disk_key(&uid, &name("logs"))];
    for key in &keys_of {
        let put = Op::Put(key.clone(), br#"{"sealed":"sealed:v1:x"}"#.as_slice().into());
        world.state.store.txn(vec![], vec![put]).await.unwrap();
    }
    let removed = world.operate("DELETE", "/v1/volumes/web.logs", "").await;
    assert_eq!(removed.status, StatusCode::NO_CONTENT);
    let there = world.state.store.get_many(&keys_of).await.unwrap();
    assert!(there[0].is_some() && there[1].is_none(), "the key of one disk went with that disk");
    // Nobody gets one to see, sealed or not.
    let all = world.operate("GET", "/v1/volumes", "").await.ok().to_string();
    assert!(!all.contains("sealed"), "{all}");
}

#[tokio::test]
async fn only_a_disk_that_is_detached_is_removed_and_its_name_is_not_given_again() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1", "host2"]).await;
    world.speak(&["host1", "host2"]).await;
    world.apply(&vm(&format!("{ROOT}{LOGS}"))).await.ok();
    let remove = async |name: &str| {
        let removed = world.operate("DELETE", &format!("/v1/volumes/{name}"), "").await;
        (removed.status, removed.body["detail"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(remove("web.nothing").await.0, StatusCode::NOT_FOUND);
    assert_eq!(remove("nobody.logs").await.0, StatusCode::NOT_FOUND);
    let attached = remove("web.root").await;
    assert_eq!(attached.0, StatusCode::CONFLICT);
    assert_eq!(attached.1, "web.root is attached to web; nothing was removed");
    let shown = world.operate("GET", "/v1/volumes/web.logs", "").await.ok();
    assert_eq!((&shown["state"], &shown["size"]), (&json!("detached"), &json!("2GiB")));
    // A process that is being started may have it.
    let put = async |key: String, value: serde_json::Value| {
        let op = Op::Put(key, value.to_string().into());
        world.state.store.txn(vec![], vec![op]).await.unwrap();
    };
    let placement = Placement::new(name("host1"), 1, 0, Vec::new());
    put(keys::placement(&name("web")), serde_json::to_value(placement).unwrap()).await;
    put(keys::lease(&name("host1")), json!({"session": 1, "count": 1})).await;
    let status = |phase: &str| json!({"host": "host1", "session": 1, "epoch": 1, "generation": 1, "phase": phase, "sinceMs": 1});
    put(keys::vm_status(&name("web")), status("starting")).await;
    let starting = remove("web.logs").await;
    assert_eq!(starting.0, StatusCode::CONFLICT, "{starting:?}");
    assert!(starting.1.contains("web is starting"), "{starting:?}");
    // Nor does it count what its host said before it knew of the disk.
    let mut early = status("stopped");
    early["generation"] = json!(0);
    put(keys::vm_status(&name("web")), early).await;
    assert_eq!(remove("web.logs").await.0, StatusCode::CONFLICT);
    put(keys::vm_status(&name("web")), status("stopped")).await;
    assert_eq!(remove("web.logs").await.0, StatusCode::NO_CONTENT);
    assert_eq!(slots(&world).await, named(&[("root", Some(0))]));
    let of = VolumeRef { vm: name("web"), disk: name("logs") };
    let gone = world.state.store.get(&keys::gone(&of)).await.unwrap();
    assert!(gone.is_some_and(|gone| gone.value.windows(4).any(|text| text == b"fast")));
    let again = world.apply(&vm(&format!("{ROOT}{LOGS}"))).await;
    assert!(
        again.body.to_string().contains("had a disk `logs` that was removed"),
        "{}",
        again.body
    );
}
