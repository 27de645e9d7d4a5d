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

fn nas(change: impl FnOnce(String) -> String) -> String {
    change(
        "kind: Pool\nname: nas\ndriver: nfs\nnfs:\n  server: 10.0.0.9\n  path: /srv/vms\n".into(),
    )
}

#[tokio::test]
async fn a_pool_of_a_filer_is_asked_and_stays_the_directory_that_it_is() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1"]).await;
    refused(&world.apply(&nas(same)).await, "it runs an older Haven");
    world.speak(&["host1"]).await;
    let gluster = |servers: &str, volume: &str, more: &str| {
        format!(
            "kind: Pool\nname: bricks\ndriver: gluster\ngluster:\n  servers: {servers}\n  volume: {volume}\n{more}"
        )
    };
    let wrong = [
        (nas(|text| text + "path: /x\n"), "has no directory on hosts"),
        (nas(|text| text + "replicas: 2\n"), "belongs to mirrored pools"),
        (nas(|text| text.replace("driver: nfs", "driver: shared")), "`nfs` belongs to pools with"),
        (nas(|text| text.replace("10.0.0.9", "a b")), "no address and no name"),
        (nas(|text| text.replace("10.0.0.9", "-x")), "no address and no name"),
        (nas(|text| text.replace("/srv/vms", "srv")), "no directory of a server"),
        (nas(|text| text.replace("/srv/vms", "/srv/../x")), "no directory of a server"),
        (nas(|text| text.replace("/srv/vms", "\"/srv/a?uid=0\"")), "no directory of a server"),
        (nas(|text| text.replace("/srv/vms", "/nowhere")), "nobody answers at /nowhere"),
        ("kind: Pool\nname: nas\ndriver: nfs\n".into(), "does not say which NFS server"),
        (gluster("[]", "vm", ""), "`servers` names none"),
        (gluster("[10.0.0.1]", "-vm", ""), "no name of a Gluster volume"),
        (gluster("[10.0.0.1]", "vm", "  directory: x\n"), "no directory of a volume"),
        (gluster("[10.0.0.1]", "vm", "nfs: {server: a, path: /b}\n"), "and nothing else"),
    ];
    for (manifest, why) in &wrong {
        refused(&world.apply(manifest).await, why);
    }
    let key = keys::object(&ObjectRef::new(Kind::Pool, name("nas")));
    assert!(world.state.store.get(&key).await.unwrap().is_none(), "nothing was changed");
    world.apply(&nas(same)).await.ok();
    world.apply(&gluster("[10.0.0.1, 10.0.0.2]", "vm", "")).await.ok();
    let shown = world.operate("GET", "/v1/objects/pool/nas", "").await.ok();
    assert_eq!(shown["columns"]["path"], "/srv/vms of the NFS server 10.0.0.9");
    assert_eq!(shown["spec"]["nfs"]["mark"], "-srv-vms");
    // A mark that people write is not believed.
    let marked = nas(|text| text + "  mark: other\n");
    for again in [nas(same), marked] {
        assert_eq!(world.apply(&again).await.ok()[0]["outcome"], "unchanged");
    }
    let moved = nas(|text| text.replace("10.0.0.9", "10.0.0.10"));
    assert_eq!(world.apply(&moved).await.ok()[0]["outcome"], "changed");
    let other = nas(|text| text.replace("/srv/vms", "/srv/other"));
    refused(&world.apply(&other).await, "another directory than the one that the pool is in");
    let twice = nas(|text| text.replace("name: nas", "name: two"));
    refused(&world.apply(&twice).await, "is the pool `nas` already");
    let volume = gluster("[10.0.0.1]", "other", "");
    refused(&world.apply(&volume).await, "a pool cannot be changed once it is there");
    let away = "kind: Pool\nname: nas\ndriver: shared\npath: /srv\n";
    refused(&world.apply(away).await, "a pool cannot be changed once it is there");
}

#[tokio::test]
async fn what_disks_on_nfs_servers_cannot_do_is_refused() {
    let Some(world) = World::start().await else { return };
    world.hosts(&["host1"]).await;
    world.speak(&["host1"]).await;
    world.apply(&nas(same)).await.ok();
    world.apply("kind: Target\nname: box\ndirectory: /backups\n").await.ok();
    let vm = |more: &str, disk: &str| {
        format!(
            "kind: VM\nname: web\nmemory: 64MiB\n{more}disks: [{{name: root, size: 1GiB, pool: nas{disk}}}]\n"
        )
    };
    refused(&world.apply(&vm("backup: {to: box}\n", "")).await, "are not backed up yet");
    refused(&world.apply(&vm("snapshot: {every: 1h, keep: 2}\n", "")).await, "keep no snapshots");
    let kept = world.apply(&vm("isolation: keep\n", "")).await;
    refused(&kept, "cannot be shut to a host that is not heard");
    let from = ", backup: {target: box, vm: a, id: b, disk: root}";
    refused(&world.apply(&vm("", from)).await, "of an NFS server does not take that yet");
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
