//! Tests of [`super::snapshot`]: what a newer version wrote, and what nobody can read.

use crate::{
    Snapshot,
    name::{Name, ObjectRef},
    object::{Kind, Object},
};
use serde_json::{Value, json};

/// One record of every kind that stands in the store.
fn records() -> Vec<(&'static str, Value)> {
    let meta = |name: &str| json!({"name": name, "uid": "u1", "generation": 1});
    let stored = |name: &str, spec: Value| json!({"meta": meta(name), "spec": spec});
    let disk = json!({"name": "root", "size": "1GiB", "pool": "fast", "image": "tiny"});
    let vm = json!({"memory": "128MiB", "image": "tiny", "disks": [disk],
        "networks": [{"network": "front"}], "affinity": {"apart": {"app": "web"}}});
    let check = json!({"mode": "http", "port": 80});
    let service = json!({"replicas": 2, "template": {"spec": vm}, "check": check,
        "update": {"maxSurge": 1}, "spread": {"by": "host"},
        "frontend": {"address": "10.0.0.9", "port": 80, "mode": "http"}});
    let power = json!({"url": "http://x", "user": "u", "password": "p"});
    let file = json!({"sha256": "ab", "size": "1MiB"});
    let nic = json!({"network": "front", "ip": "10.1.0.10", "mac": "52:54:00:00:00:01"});
    vec![
        ("cluster", json!({"name": "c", "timers": {"lease": "6s"}})),
        ("manager", json!({"term": 1, "holder": "host1", "session": 1})),
        ("spec/host/host1", stored("host1", json!({"address": "10.0.0.1", "power": power}))),
        ("spec/pool/fast", stored("fast", json!({"driver": "local", "path": "/srv"}))),
        ("spec/image/tiny", stored("tiny", json!({"disk": file}))),
        ("spec/network/front", stored("front", json!({"subnet": "10.1.0.0/24"}))),
        ("spec/vm/web", stored("web", vm)),
        ("spec/service/web", stored("web", service)),
        ("leases/host1", json!({"session": 1, "count": 2})),
        (
            "lost/host1",
            json!({"session": 1, "proof": "lease-expired", "at_ms": 1, "last_heard_ms": 1, "incident": 1}),
        ),
        ("placement/vm/web", json!({"host": "host1", "epoch": 1, "slot": 1, "nics": [nic]})),
        ("placement/frontend/web", json!({"holder": "host1", "epoch": 1, "candidates": []})),
        ("status/host/host1", json!({"session": 1, "cpus": 2})),
        (
            "status/vm/web",
            json!({"host": "host1", "session": 1, "epoch": 1, "generation": 1, "phase": "running",
            "sinceMs": 1, "restarts": 0, "message": ""}),
        ),
    ]
}

fn key(path: &str) -> String {
    format!("{}{path}", crate::keys::ROOT)
}

fn apply(snapshot: &mut Snapshot, path: &str, value: &Value, revision: i64) {
    snapshot.apply(&key(path), Some((value.to_string().as_bytes(), revision)));
}

/// The record with a field of a newer version in each of its objects.
fn newer(value: &Value) -> Value {
    match value {
        // Labels are free words: what stands there is no field.
        Value::Object(object) => object
            .iter()
            .map(|(k, v)| (k.clone(), if k == "apart" { v.clone() } else { newer(v) }))
            .chain([("later".to_owned(), json!({"deep": [1]}))])
            .collect(),
        Value::Array(list) => list.iter().map(newer).collect(),
        other => other.clone(),
    }
}

fn without_revisions(snapshot: &Snapshot) -> Value {
    serde_json::to_value(snapshot).unwrap()
}

#[test]
fn fields_of_a_newer_version_are_passed_over_in_every_kind_of_record() {
    let (mut plain, mut tolerant) = (Snapshot::default(), Snapshot::default());
    for (path, value) in records() {
        apply(&mut plain, path, &value, 7);
        apply(&mut tolerant, path, &newer(&value), 7);
    }
    assert!(plain.unreadable.is_empty(), "{:?}", plain.unreadable);
    assert!(tolerant.unreadable.is_empty(), "{:?}", tolerant.unreadable);
    assert_eq!(without_revisions(&plain), without_revisions(&tolerant));
    let tables = [plain.vms.len(), plain.services.len(), plain.placements.len(), plain.hosts.len()];
    assert_eq!(tables, [1; 4]);
}

#[test]
fn an_object_that_is_changed_keeps_the_fields_of_a_newer_version() {
    for (path, value) in records() {
        let Some(of) = path.strip_prefix("spec/") else { continue };
        let mut snapshot = Snapshot::default();
        apply(&mut snapshot, path, &newer(&value), 7);
        let (mut object, _) = snapshot.object(&of.parse().unwrap()).unwrap();
        let written =
            |object: &Object| -> Value { serde_json::from_slice(&object.to_store()).unwrap() };
        assert_eq!(written(&object), newer(&value), "{path}: unchanged");
        object.meta_mut().deleting = true;
        object.meta_mut().generation = 2;
        let mut wanted = newer(&value);
        wanted["meta"]["deleting"] = json!(true);
        wanted["meta"]["generation"] = json!(2);
        let now = written(&object);
        let kept = |value: &Value| value.to_string().matches("\"later\"").count();
        assert_eq!(kept(&now), kept(&wanted), "{path}: {now}");
        // What this version adds are only defaults that it spells out.
        let mut again = Snapshot::default();
        apply(&mut again, path, &now, 8);
        let (again, _) = again.object(&of.parse().unwrap()).unwrap();
        assert!(again.same_spec(&object) && again.meta().deleting);
    }
}

#[test]
fn what_is_changed_wins_over_what_stood_there() {
    let mut snapshot = Snapshot::default();
    let disk = |name: &str| json!({"name": name, "size": "1GiB", "pool": "fast", "later": 1});
    let nic = json!({"network": "front", "later": 1});
    let record = json!({"meta": {"name": "web", "uid": "u", "generation": 1, "labels": {"a": "1", "b": "2"}},
        "spec": {"memory": "1GiB", "userData": "x", "disks": [disk("root")], "networks": [nic], "later": 1}});
    apply(&mut snapshot, "spec/vm/web", &record, 3);
    let (mut object, _) = snapshot.object(&"vm/web".parse().unwrap()).unwrap();
    let Object::Vm(vm) = &mut object else { panic!("a VM") };
    vm.meta.labels.remove("a");
    vm.spec.user_data = None;
    vm.spec.cpus = 4;
    vm.spec.disks.clear();
    let now: Value = serde_json::from_slice(&object.to_store()).unwrap();
    assert_eq!(now["meta"]["labels"], json!({"b": "2"}));
    assert_eq!((&now["spec"]["cpus"], &now["spec"]["later"]), (&json!(4), &json!(1)));
    assert!(now["spec"].get("userData").is_none() && now["spec"].get("disks").is_none(), "{now}");
    assert_eq!(now["spec"]["networks"], json!([{"network": "front", "later": 1}]));
}

#[test]
fn a_record_that_cannot_be_read_is_noted_until_it_can_or_goes() {
    let mut snapshot = Snapshot::default();
    for (path, value) in records() {
        apply(&mut snapshot, path, &value, 7);
    }
    for (path, value) in records() {
        let before = without_revisions(&snapshot);
        apply(&mut snapshot, path, &json!("of another age"), 8);
        assert_eq!(snapshot.unreadable.get(path), Some(&8), "{path}");
        let kept = path.starts_with("spec/") || path == "cluster";
        let mut now = without_revisions(&snapshot);
        now["unreadable"] = json!({});
        assert_eq!(now == before, kept, "{path}: a spec stays as it was read last, nothing else");
        apply(&mut snapshot, path, &value, 9);
        assert!(snapshot.unreadable.is_empty(), "{path}");
    }
    apply(&mut snapshot, "spec/vm/web", &json!(1), 10);
    snapshot.apply(&key("spec/vm/web"), None);
    assert!(snapshot.unreadable.is_empty() && snapshot.vms.is_empty());
}

#[test]
fn what_cannot_be_read_is_found_by_its_object() {
    let mut snapshot = Snapshot::default();
    let vm = |name: &str| ObjectRef::new(Kind::Vm, Name::new(name).unwrap());
    apply(&mut snapshot, "placement/vm/web", &json!(1), 3);
    assert_eq!(snapshot.unreadable_of(&vm("web")), Some("placement/vm/web"));
    assert_eq!(snapshot.unreadable_of(&vm("we")), None);
    assert_eq!(snapshot.unreadable_under("placement/vm/"), Some("placement/vm/web"));
    assert_eq!(snapshot.unreadable_under("placement/frontend/"), None);
    assert_eq!(snapshot.unreadable_under("spec/"), None);
}

#[test]
fn what_a_host_said_in_an_earlier_session_is_not_taken_for_what_is_so() {
    let mut snapshot = Snapshot::default();
    for (path, value) in records() {
        apply(&mut snapshot, path, &value, 7);
    }
    let web = Name::new("web").unwrap();
    let told = |snapshot: &Snapshot| snapshot.told_of(&web).is_some();
    assert!(told(&snapshot));
    apply(&mut snapshot, "leases/host1", &json!({"session": 1, "count": 9, "closed": true}), 8);
    assert!(!told(&snapshot), "its session is closed");
    apply(&mut snapshot, "leases/host1", &json!({"session": 2, "count": 0}), 9);
    assert!(!told(&snapshot), "it is back, and has not said anything of the VM yet");
    let status = json!({"host": "host1", "session": 2, "epoch": 1, "generation": 1,
        "phase": "starting", "sinceMs": 1});
    apply(&mut snapshot, "status/vm/web", &status, 10);
    assert!(told(&snapshot));
    let placement = json!({"host": "host1", "epoch": 2, "slot": 1, "nics": []});
    apply(&mut snapshot, "placement/vm/web", &placement, 11);
    assert!(!told(&snapshot), "it was placed anew");
}
