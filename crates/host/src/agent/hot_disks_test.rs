//! Disks that come, go and grow while their guest runs, over fakes, in virtual time.

use super::{
    fixture::{Fixture, name},
    storage::VolumeName,
};
use haven_model::{
    Bytes, keys,
    object::Kind,
    vm::{DISKS, DiskState},
    volume::{Volume, VolumeRef},
};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

/// A host that has said what it is, with a lease that the store knows.
async fn world() -> Fixture {
    let fixture = Fixture::new().await;
    fixture.put(&keys::lease(&name("host1")), &json!({"session": 1, "count": 1})).await;
    fixture
}

fn disk(called: &str, slot: u8, gib: u64) -> Value {
    json!({"name": called, "pool": "fast", "size": format!("{gib}GiB"), "slot": slot})
}

fn spec(disks: &[Value]) -> Value {
    json!({"memory": "64MiB", "networks": [{"network": "good"}], "disks": disks})
}

fn has(fixture: &Fixture) -> Vec<(String, u64)> {
    let disks = fixture.world.plugged("host1", "web");
    disks.into_iter().map(|(name, bytes)| (name, bytes >> 30)).collect()
}

fn named(disks: &[(&str, u64)]) -> Vec<(String, u64)> {
    disks.iter().map(|(name, gib)| ((*name).to_owned(), *gib)).collect()
}

/// What is said of how it is started.
fn settled(fixture: &Fixture, disks: &[Value]) -> bool {
    let wanted: haven_model::VmSpec = serde_json::from_value(spec(disks)).unwrap();
    fixture.status("web").unwrap().started_with.get(DISKS) == wanted.hardware().get(DISKS)
}

#[tokio::test(start_paused = true)]
async fn a_disk_comes_grows_goes_and_is_told_each_time_and_nothing_is_started_anew() {
    let mut fixture = world().await;
    let root = disk("root", 0, 1);
    fixture.vm("web", "good", json!({"disks": [root]})).await;
    let parts = fixture.start();
    fixture.pass(5).await;
    assert!(fixture.status("web").unwrap().ports);
    let logs = disk("logs", 1, 2);
    fixture.object(Kind::Vm, "web", spec(&[root.clone(), logs.clone()])).await;
    fixture.pass(3).await;
    assert_eq!(has(&fixture), named(&[("root", 1), ("logs", 2)]));
    assert!(settled(&fixture, &[root.clone(), logs]));
    let larger = disk("logs", 1, 3);
    fixture.object(Kind::Vm, "web", spec(&[root.clone(), larger.clone()])).await;
    fixture.pass(3).await;
    assert_eq!(has(&fixture), named(&[("root", 1), ("logs", 3)]));
    assert!(settled(&fixture, &[root.clone(), larger.clone()]));
    // A daemon that starts anew knows it, too, and does nothing.
    fixture.end().await;
    let parts_again = fixture.start();
    drop(parts);
    fixture.pass(5).await;
    assert!(settled(&fixture, &[root.clone(), larger.clone()]));
    let mut gone = larger;
    gone["detached"] = json!(true);
    fixture.object(Kind::Vm, "web", spec(&[root.clone(), gone.clone()])).await;
    fixture.pass(3).await;
    assert_eq!(has(&fixture), named(&[("root", 1)]));
    assert!(settled(&fixture, &[root, gone]));
    let live = parts_again.live.borrow().clone();
    let spec = &live.vms["web"].spec;
    assert_eq!(live.disk_state(&name("web"), &spec.disks[0]), DiskState::Attached);
    assert_eq!(live.disk_state(&name("web"), &spec.disks[1]), DiskState::Detached);
    assert_eq!(fixture.world.starts()["web"], 1);
    assert_eq!(fixture.world.local_disks.lost(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_keeps_a_disk_is_told_of_and_asked_until_it_lets_go() {
    let mut fixture = world().await;
    let (root, mut logs) = (disk("root", 0, 1), disk("logs", 1, 1));
    fixture.vm("web", "good", json!({"disks": [root, logs]})).await;
    let parts = fixture.start();
    fixture.pass(5).await;
    fixture.world.plugged.set_deaf("host1", "web", true);
    logs["detached"] = json!(true);
    fixture.object(Kind::Vm, "web", spec(&[root, logs])).await;
    fixture.pass(20).await;
    let status = fixture.status("web").unwrap();
    assert!(status.disks_change, "{status:?}");
    assert!(status.message.contains("has not let its disk `logs` go"), "{}", status.message);
    let live = parts.live.borrow().clone();
    let object = &live.vms["web"];
    assert_eq!(live.disk_state(&name("web"), &object.spec.disks[1]), DiskState::Changing);
    assert_eq!(live.pending(&name("web")), [""; 0], "it needs no start for that");
    assert_eq!(live.pending_machine(&name("web")), [DISKS], "it does not move meanwhile");
    fixture.world.plugged.set_deaf("host1", "web", false);
    fixture.pass(5).await;
    assert_eq!(has(&fixture), named(&[("root", 1)]));
    let status = fixture.status("web").unwrap();
    assert!(!status.disks_change && status.message.is_empty(), "{status:?}");
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_cannot_be_made_ready_keeps_nothing_else_waiting_and_is_told() {
    let mut fixture = world().await;
    let root = disk("root", 0, 1);
    fixture.vm("web", "good", json!({"disks": [root]})).await;
    fixture.start();
    fixture.pass(5).await;
    fixture.disks.hangs.store(true, Ordering::Release);
    let mut limited = root.clone();
    limited["limits"] = json!({"iops": 7});
    let logs = disk("logs", 1, 2);
    fixture.object(Kind::Vm, "web", spec(&[limited.clone(), logs.clone()])).await;
    fixture.pass(15).await;
    let status = fixture.status("web").unwrap();
    assert!(status.message.contains("its disk `logs` is made ready"), "{}", status.message);
    // It is given up when it is not wanted any more.
    let mut gone = logs.clone();
    gone["detached"] = json!(true);
    fixture.object(Kind::Vm, "web", spec(&[limited.clone(), gone])).await;
    fixture.pass(5).await;
    assert_eq!(fixture.status("web").unwrap().message, "");
    assert_eq!(fixture.world.limits("host1", "web", 50).unwrap().iops, Some(7));
    fixture.disks.hangs.store(false, Ordering::Release);
    fixture.object(Kind::Vm, "web", spec(&[limited, logs])).await;
    fixture.pass(5).await;
    assert_eq!(has(&fixture), named(&[("root", 1), ("logs", 2)]));
}

#[tokio::test(start_paused = true)]
async fn a_process_without_ports_is_left_as_it_is_and_that_is_said() {
    let mut fixture = world().await;
    // An older host is in the cluster.
    fixture.object(Kind::Host, "host2", json!({"address": "10.0.0.2"})).await;
    let root = json!({"name": "root", "pool": "fast", "size": "1GiB"});
    fixture.vm("web", "good", json!({"disks": [root]})).await;
    let parts = fixture.start();
    fixture.pass(5).await;
    assert!(fixture.runs("web") && !fixture.status("web").unwrap().ports);
    let logs = disk("logs", 1, 2);
    fixture.object(Kind::Vm, "web", spec(&[root, logs])).await;
    fixture.pass(10).await;
    assert_eq!(has(&fixture), named(&[("root", 1)]));
    let live = parts.live.borrow().clone();
    assert_eq!(live.pending(&name("web")), [DISKS]);
    let logs = &live.vms["web"].spec.disks[1];
    assert_eq!(live.disk_state(&name("web"), logs), DiskState::NextStart);
}

fn twin() -> VolumeRef {
    VolumeRef { vm: name("web"), disk: name("twin") }
}

fn record(fixture: &Fixture) -> Volume {
    serde_json::from_value(fixture.peek(&keys::volume(&twin())).unwrap()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_mirrored_disk_is_opened_by_a_run_of_its_own_and_closed_whole() {
    const VOLUME: &str = "web.twin.u-web";
    let mut fixture = world().await;
    fixture.object(Kind::Pool, "twins", json!({"driver": "mirrored", "path": "/twins"})).await;
    fixture.object(Kind::Host, "host1", json!({"address": "10.0.0.1"})).await;
    fixture.object(Kind::Host, "host2", json!({"address": "10.0.0.2"})).await;
    fixture.put(&keys::lease(&name("host2")), &json!({"session": 1, "count": 1})).await;
    let volume =
        Volume::new("u-web".into(), name("twins"), Bytes::gib(1), [name("host1"), name("host2")]);
    let volume = Volume { run: 3, ..volume };
    fixture.put(&keys::volume(&twin()), &serde_json::to_value(volume).unwrap()).await;
    for host in ["host1", "host2"] {
        fixture.world.mirrors.make(host, VOLUME);
    }
    fixture.disks.here.lock().unwrap().insert(VolumeName::parse(VOLUME).unwrap());
    fixture.world.mirrors.own("host1", VOLUME, 3).unwrap();
    let serves = async |fixture: &Fixture, run: u64| {
        let instance = fixture.world.mirrors.serve("host2", VOLUME, run).unwrap();
        let told = json!({"session": 1, "is": "served", "run": run, "port": 1, "instance": instance, "boot": "b"});
        fixture.put(&keys::replica_status(&twin(), &name("host2")), &told).await;
    };
    let root = disk("root", 0, 1);
    let mut with =
        json!({"name": "twin", "pool": "twins", "size": "1GiB", "slot": 1, "detached": true});
    fixture.vm("web", "good", json!({"disks": [root, with]})).await;
    fixture.start();
    fixture.pass(5).await;
    assert!(fixture.runs("web"), "{:?}", fixture.status("web"));
    assert_eq!(record(&fixture).run, 3, "nobody opens what is detached");
    with["detached"] = json!(false);
    fixture.object(Kind::Vm, "web", spec(&[root.clone(), with.clone()])).await;
    fixture.pass(2).await;
    let now = record(&fixture);
    assert_eq!((now.run, now.clean), (4, false));
    assert_eq!(has(&fixture), named(&[("root", 1)]), "the other replica is waited for");
    serves(&fixture, 4).await;
    fixture.pass(4).await;
    assert_eq!(has(&fixture), named(&[("root", 1), ("twin", 1)]));
    assert!(fixture.world.mirrors.acknowledged() > 0, "its guest writes to it");
    with["detached"] = json!(true);
    fixture.object(Kind::Vm, "web", spec(&[root.clone(), with.clone()])).await;
    fixture.pass(4).await;
    let now = record(&fixture);
    assert_eq!((now.run, now.clean, now.counted().count()), (4, true, 2));
    // Neither lacks anything for the next run.
    with["detached"] = json!(false);
    fixture.object(Kind::Vm, "web", spec(&[root.clone(), with.clone()])).await;
    fixture.pass(2).await;
    serves(&fixture, 5).await;
    fixture.pass(4).await;
    let now = record(&fixture);
    assert_eq!((now.run, now.clean, now.counted().count()), (5, false, 2));
    // It grows with a run of its own, and its guest stands until that is open.
    with["size"] = json!("2GiB");
    fixture.object(Kind::Vm, "web", spec(&[root.clone(), with.clone()])).await;
    fixture.pass(4).await;
    let now = record(&fixture);
    assert_eq!((now.run, now.clean, now.size), (6, false, Bytes::gib(2)));
    assert_eq!(has(&fixture), named(&[("root", 1), ("twin", 1)]));
    let said = fixture.status("web").unwrap().message;
    assert!(said.contains("its guest stands meanwhile"), "{said}");
    let before = fixture.world.mirrors.acknowledged();
    serves(&fixture, 6).await;
    fixture.pass(4).await;
    assert_eq!(has(&fixture), named(&[("root", 1), ("twin", 2)]));
    assert!(settled(&fixture, &[root, with]));
    assert_eq!(fixture.status("web").unwrap().message, "");
    assert!(fixture.world.mirrors.acknowledged() > before, "its guest writes on");
    assert_eq!(record(&fixture).counted().count(), 2);
    assert_eq!(fixture.world.mirrors.lost(), [""; 0]);
    assert_eq!(fixture.world.starts()["web"], 1);
}

#[tokio::test(start_paused = true)]
async fn what_was_removed_is_removed_here_and_not_as_long_as_its_vm_names_it() {
    let mut fixture = world().await;
    let (root, mut logs) = (disk("root", 0, 1), disk("logs", 1, 1));
    fixture.vm("web", "good", json!({"disks": [root, logs]})).await;
    fixture.start();
    fixture.pass(5).await;
    logs["detached"] = json!(true);
    fixture.object(Kind::Vm, "web", spec(&[root.clone(), logs])).await;
    fixture.pass(5).await;
    let of = VolumeRef { vm: name("web"), disk: name("logs") };
    let file = VolumeName::parse("web.logs.u-web").unwrap();
    let here = |fixture: &Fixture| fixture.disks.here.lock().unwrap().contains(&file);
    let gone = json!({"vmUid": "u-web", "pool": "fast", "by": "ada", "atMs": 1});
    fixture.put(&keys::gone(&of), &gone).await;
    fixture.pass(5).await;
    assert!(here(&fixture), "its VM names it");
    fixture.object(Kind::Vm, "web", spec(&[root])).await;
    fixture.pass(5).await;
    assert!(!here(&fixture));
    assert!(fixture.runs("web"));
}
