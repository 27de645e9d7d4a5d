//! Who has disks in Ceph open, over fakes, in virtual time: nobody runs beside somebody who may still write.

use super::fixture::{Fixture, name};
use haven_model::{
    clients::{DiskClients, OpenDisk, ShutDisks},
    keys,
    object::Kind,
};
use serde_json::json;

async fn world() -> Fixture {
    let fixture = Fixture::new().await;
    fixture.put(&keys::lease(&name("host1")), &json!({"session": 1, "count": 1})).await;
    let rbd = json!({"monitors": ["10.0.0.1"], "user": "haven", "key": "sealed", "pool": "vm"});
    fixture.object(Kind::Pool, "ceph", json!({"driver": "rbd", "rbd": rbd})).await;
    fixture
}

async fn vm(fixture: &Fixture) {
    let disk = json!({"name": "root", "pool": "ceph", "size": "1GiB"});
    fixture.vm("web", "good", json!({"disks": [disk], "isolation": "keep"})).await;
}

fn record(fixture: &Fixture) -> DiskClients {
    serde_json::from_value(fixture.peek(&keys::clients(&name("web"))).unwrap()).unwrap()
}

fn open(host: &str, client: &str) -> OpenDisk {
    let client = client.to_owned();
    OpenDisk { disk: name("root"), pool: name("ceph"), host: name(host), client }
}

async fn put(fixture: &Fixture, record: &DiskClients) {
    fixture.put(&keys::clients(&name("web")), &serde_json::to_value(record).unwrap()).await;
}

fn shut(fixture: &Fixture) -> Vec<String> {
    fixture.disks.ceph.lock().unwrap().shut.iter().cloned().collect()
}

#[tokio::test(start_paused = true)]
async fn a_vm_starts_once_all_before_it_are_shut_out_and_its_client_is_noted() {
    let mut fixture = world().await;
    let old = DiskClients {
        vm_uid: "u-web".into(),
        open: vec![open("host2", "10.0.0.2:0/7")],
        ..DiskClients::default()
    };
    put(&fixture, &old).await;
    let volume = Fixture::volume("web", "u-web");
    fixture.disks.ceph.lock().unwrap().open.insert(volume, ["10.0.0.3:0/9".to_owned()].into());
    fixture.disks.ceph.lock().unwrap().refuses = Some("Ceph does not answer".into());
    vm(&fixture).await;
    fixture.start();
    fixture.pass(5).await;
    assert!(!fixture.runs("web"), "somebody may still write");
    assert!(fixture.status("web").unwrap().message.contains("Ceph does not answer"));
    assert_eq!(record(&fixture).begins, [name("host1")].into());
    assert_eq!(record(&fixture).open, old.open);
    fixture.disks.ceph.lock().unwrap().refuses = None;
    fixture.pass(40).await;
    assert!(fixture.runs("web"));
    assert_eq!(shut(&fixture), ["10.0.0.2:0/7", "10.0.0.3:0/9"], "noted, and unknown");
    let now = record(&fixture);
    assert!(now.knows(&name("root"), &name("host1")), "{now:?}");
    assert_eq!(now.open, [open("host1", "10.0.0.1:0/1")]);
}

#[tokio::test(start_paused = true)]
async fn a_process_whose_disks_are_shut_is_ended_and_begins_anew_here_if_it_stays() {
    let mut fixture = world().await;
    vm(&fixture).await;
    fixture.start();
    fixture.pass(5).await;
    assert_eq!(fixture.world.starts()["web"], 1);
    put(&fixture, &record(&fixture).shut_by(name("host2"))).await;
    fixture.pass(5).await;
    assert_eq!(fixture.world.starts()["web"], 2);
    assert_eq!(shut(&fixture), ["10.0.0.1:0/1"], "it was not said that this was done");
    let now = record(&fixture);
    assert!(now.shut.is_none());
    assert_eq!(now.open, [open("host1", "10.0.0.1:0/2")]);
    // A daemon that starts anew leaves it as it is.
    fixture.end().await;
    fixture.start();
    fixture.pass(5).await;
    assert_eq!((fixture.world.starts()["web"], record(&fixture)), (2, now));
}

#[tokio::test(start_paused = true)]
async fn the_host_that_is_asked_shuts_the_disks_of_another_and_says_so() {
    let mut fixture = world().await;
    let asked = DiskClients {
        vm_uid: "u-web".into(),
        open: vec![open("host2", "10.0.0.2:0/7"), open("host2", "10.0.0.2:0/8")],
        shut: Some(ShutDisks { by: name("host1"), done: false }),
        ..DiskClients::default()
    };
    put(&fixture, &asked).await;
    fixture.disks.ceph.lock().unwrap().refuses = Some("Ceph does not answer".into());
    let parts = fixture.start();
    fixture.pass(5).await;
    assert!(!record(&fixture).is_shut());
    assert!(parts.problems.list().iter().any(|what| what.contains("Ceph does not answer")));
    fixture.disks.ceph.lock().unwrap().refuses = None;
    fixture.pass(5).await;
    assert!(record(&fixture).is_shut());
    assert_eq!(shut(&fixture), ["10.0.0.2:0/7", "10.0.0.2:0/8"]);
    assert_eq!(parts.problems.list(), [""; 0]);
    // Another one's is left to it.
    let other = DiskClients { open: vec![open("host2", "10.0.0.2:0/9")], ..asked };
    put(&fixture, &other.shut_by(name("host3"))).await;
    fixture.pass(15).await;
    assert!(!record(&fixture).is_shut() && shut(&fixture).len() == 2);
}
