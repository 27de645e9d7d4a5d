//! Tests of [`super::wanted`]: what a member is for the balancer.

use super::wanted::frontends;
use crate::balance::driver::MemberState;
use haven_model::{Name, Snapshot, keys};
use serde_json::{Value, json};
use std::collections::BTreeSet;

fn put(snapshot: &mut Snapshot, path: &str, value: &Value) {
    snapshot.apply(&format!("{}{path}", keys::ROOT), Some((value.to_string().as_bytes(), 1)));
}

/// A service with one member on host1, and its address there.
fn one_member(check: Option<&Value>) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let vm = json!({"memory": "128MiB", "image": "tiny", "networks": [{"network": "front"}], "check": check});
    let service = json!({"replicas": 1, "template": {"spec": vm}, "check": check,
        "frontend": {"address": "10.0.0.9", "port": 80, "mode": "http"}});
    let nic = json!({"network": "front", "ip": "10.1.0.10", "mac": "52:54:00:00:00:01"});
    let owner = json!("service/web");
    let object = |name: &str, owner: Value, spec: Value| json!({"meta": {"name": name, "uid": name, "generation": 1, "owner": owner}, "spec": spec});
    let host = object("host1", Value::Null, json!({"address": "10.0.0.1"}));
    put(&mut snapshot, "spec/host/host1", &host);
    put(&mut snapshot, "leases/host1", &json!({"session": 1, "count": 2}));
    put(&mut snapshot, "spec/service/web", &object("web", Value::Null, service));
    put(&mut snapshot, "spec/vm/web-1", &object("web-1", owner, vm));
    let placement = json!({"host": "host1", "epoch": 1, "slot": 1, "nics": [nic]});
    put(&mut snapshot, "placement/vm/web-1", &placement);
    let frontend = json!({"holder": "host1", "epoch": 1, "candidates": []});
    put(&mut snapshot, "placement/frontend/web", &frontend);
    assert!(snapshot.unreadable.is_empty(), "{:?}", snapshot.unreadable);
    snapshot
}

fn state(snapshot: &mut Snapshot, ready: Option<bool>, ready_ms: Option<i64>) -> MemberState {
    let status = json!({"host": "host1", "session": 1, "epoch": 1, "generation": 1, "phase": "running",
        "sinceMs": 1, "restarts": 0, "message": "", "ready": ready, "readyMs": ready_ms});
    put(snapshot, "status/vm/web-1", &status);
    let me = Name::new("host1").unwrap();
    frontends(snapshot, &me, &BTreeSet::new())[0].members[0].state
}

#[test]
fn a_member_that_boots_gets_nothing_until_it_has_answered_once() {
    let check = json!({"mode": "http", "port": 80});
    let mut snapshot = one_member(Some(&check));
    assert_eq!(state(&mut snapshot, None, None), MemberState::Down);
    assert_eq!(state(&mut snapshot, Some(false), None), MemberState::Down);
    assert_eq!(state(&mut snapshot, Some(true), Some(5)), MemberState::Ready);
    // Whether it is well later is for HAProxy's own checks to say: it may only have more to do than it can.
    assert_eq!(state(&mut snapshot, Some(false), Some(5)), MemberState::Ready);
}

#[test]
fn a_member_without_a_check_gets_its_share_once_it_runs() {
    assert_eq!(state(&mut one_member(None), None, None), MemberState::Ready);
}
