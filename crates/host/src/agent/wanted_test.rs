//! Tests of [`super::wanted`]: what a member is for the balancer, and what a certificate.

use super::wanted::frontends;
use crate::balance::driver::{MemberState, TlsWanted};
use haven_model::{Name, Snapshot, keys, service::TlsVersion};
use haven_store::{
    pki::Authority,
    seal::{ClusterKey, Plain},
    testing::Signer,
};
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
    frontends(snapshot, &me, &BTreeSet::new(), None)[0].members[0].state
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

/// A service with members of these templates, all ready, and this split; each member's state and weight.
fn weights(templates: &[&str], traffic: &Value) -> Vec<(MemberState, u32)> {
    let mut snapshot = one_member(None);
    snapshot.vms.clear();
    put(
        &mut snapshot,
        "placement/frontend/web",
        &json!({"holder": "host1", "epoch": 1, "candidates": [], "traffic": traffic}),
    );
    for (i, template) in templates.iter().enumerate() {
        let vm = format!("web-{:02}", i + 1);
        let spec = json!({"memory": "128MiB", "networks": [{"network": "front"}]});
        let meta = json!({"name": vm, "uid": vm, "generation": 1, "owner": "service/web",
            "labels": {"haven/template": template.trim_start_matches('-')}});
        put(&mut snapshot, &format!("spec/vm/{vm}"), &json!({"meta": meta, "spec": spec}));
        let nic = json!({"network": "front", "ip": format!("10.1.0.{}", 10 + i), "mac": "52:54:00:00:00:01"});
        let placement = json!({"host": "host1", "epoch": 1, "slot": i, "nics": [nic]});
        put(&mut snapshot, &format!("placement/vm/{vm}"), &placement);
        // One whose template is written with a dash does not run.
        let phase = if template.starts_with('-') { "stopped" } else { "running" };
        let status = json!({"host": "host1", "session": 1, "epoch": 1, "generation": 1, "phase": phase,
            "sinceMs": 1, "restarts": 0, "message": ""});
        put(&mut snapshot, &format!("status/vm/{vm}"), &status);
    }
    let me = Name::new("host1").unwrap();
    let frontends = frontends(&snapshot, &me, &BTreeSet::new(), None);
    frontends[0].members.iter().map(|member| (member.state, member.weight)).collect()
}

#[test]
fn all_share_evenly_while_nothing_is_split() {
    assert_eq!(weights(&["a", "b"], &json!({})), [(MemberState::Ready, 100); 2]);
}

#[test]
fn each_template_gets_its_percentage_whatever_the_number_of_its_members() {
    for (old, new, percent) in
        [(3, 1, 10), (3, 2, 10), (1, 3, 50), (9, 1, 1), (2, 1, 99), (50, 2, 5)]
    {
        let mut templates = vec!["old"; old];
        templates.extend(vec!["new"; new]);
        let weights = weights(&templates, &json!({"new": percent}));
        assert!(
            weights.iter().all(|(state, weight)| {
                *state == MemberState::Ready && (1..=256).contains(weight)
            })
        );
        let sum =
            |part: &[(MemberState, u32)]| part.iter().map(|(_, w)| f64::from(*w)).sum::<f64>();
        let share = 100.0 * sum(&weights[old..]) / sum(&weights);
        let wrong = (share - f64::from(percent)).abs();
        assert!(wrong < 0.6, "{old} old, {new} new, {percent} % wanted: {share} %");
    }
}

#[test]
fn a_member_that_does_not_serve_leaves_its_part_to_its_like() {
    let weights = weights(&["old", "-old", "new", "-new"], &json!({"new": 20}));
    let [(_, old), (down, _), (_, new), _] = weights[..] else { panic!("{weights:?}") };
    assert_eq!(down, MemberState::Down);
    assert_eq!((old, new), (256, 64));
}

#[test]
fn members_of_a_template_that_gets_nothing_drain() {
    let states = |traffic: Value| {
        let weights = weights(&["old", "old", "new", "-new"], &traffic);
        weights.into_iter().map(|(state, _)| state).collect::<Vec<_>>()
    };
    let (ready, drain, down) = (MemberState::Ready, MemberState::Drain, MemberState::Down);
    assert_eq!(states(json!({"new": 0})), [ready, ready, drain, down]);
    assert_eq!(states(json!({"new": 100})), [drain, drain, ready, down]);
}

/// The TLS of the one frontend, once its service asks for it with the certificate `shop`.
/// Two members, of which the first is being moved: this stands in the store of it. The state of both.
fn while_one_moves(placement: &Value, told: &Value, other_ready: bool) -> [MemberState; 2] {
    let check = json!({"mode": "http", "port": 80});
    let mut snapshot = one_member(Some(&check));
    let vm = snapshot.vms["web-1"].value.clone();
    let mut second = serde_json::to_value(&*vm).unwrap();
    second["meta"]["name"] = json!("web-2");
    put(&mut snapshot, "spec/vm/web-2", &second);
    for host in ["host2", "host3"] {
        put(&mut snapshot, &format!("leases/{host}"), &json!({"session": 1, "count": 2}));
    }
    let nic = |ip: &str| json!({"network": "front", "ip": ip, "mac": "52:54:00:00:00:01"});
    let mut first = json!({"host": "host1", "epoch": 1, "slot": 1, "nics": [nic("10.1.0.10")]});
    first.as_object_mut().unwrap().extend(placement.as_object().unwrap().clone());
    put(&mut snapshot, "placement/vm/web-1", &first);
    let second = json!({"host": "host3", "epoch": 1, "slot": 2, "nics": [nic("10.1.0.11")]});
    put(&mut snapshot, "placement/vm/web-2", &second);
    let status = |host: &str, ready: bool| {
        json!({"host": host, "session": 1, "epoch": 1, "generation": 1,
        "phase": "running", "sinceMs": 1, "restarts": 0, "message": "", "ready": ready, "readyMs": 5})
    };
    put(&mut snapshot, "status/vm/web-1", &status("host1", true));
    put(&mut snapshot, "status/vm/web-2", &status("host3", other_ready));
    if !told.is_null() {
        put(&mut snapshot, "status/migration/web-1/host1", told);
    }
    assert!(snapshot.unreadable.is_empty(), "{:?}", snapshot.unreadable);
    let me = Name::new("host1").unwrap();
    let frontends = frontends(&snapshot, &me, &BTreeSet::new(), None);
    [frontends[0].members[0].state, frontends[0].members[1].state]
}

#[test]
fn a_member_that_changes_its_host_gets_nothing_new_while_another_serves() {
    use MemberState::{Drain, Ready};
    let to = json!({"movingTo": {"host": "host2", "migration": "m1"}});
    let told = |phase: &str, left: Option<u64>| {
        let progress = left
            .map(|left| json!({"total": 900, "left": left, "sent": 100, "rate": 100, "rounds": 1}));
        json!({"attempt": 1, "session": 1, "phase": phase, "progress": progress, "message": ""})
    };
    let state = |told: &Value| while_one_moves(&to, told, true);
    assert_eq!(state(&Value::Null), [Ready, Ready]);
    assert_eq!(state(&told("preparing", None)), [Ready, Ready]);
    assert_eq!(state(&told("copying", None)), [Drain, Ready]);
    // Eight seconds are left: it serves as ever.
    assert_eq!(state(&told("copying", Some(800))), [Ready, Ready]);
    assert_eq!(state(&told("copying", Some(100))), [Drain, Ready]);
    assert_eq!(state(&told("stopped", Some(0))), [Drain, Ready]);
    assert_eq!(state(&told("failed", None)), [Ready, Ready]);
    // The other one is not well: late answers are better than none.
    assert_eq!(while_one_moves(&to, &told("stopped", Some(0)), false), [Ready, Ready]);
    let from = json!({"host": "host2", "epoch": 2, "movedFrom": {"host": "host1", "session": 1, "attempt": 1}});
    assert_eq!(while_one_moves(&from, &told("handed-over", None), true), [Drain, Ready]);
}

#[test]
fn a_member_that_has_moved_gets_nothing_new_before_it_has_answered() {
    use MemberState::{Drain, Ready};
    let mut snapshot = one_member(Some(&json!({"mode": "http", "port": 80})));
    for (vm, unproven) in [("web-1", true), ("web-2", false)] {
        let mut object = serde_json::to_value(&*snapshot.vms["web-1"].value).unwrap();
        object["meta"]["name"] = json!(vm);
        put(&mut snapshot, &format!("spec/vm/{vm}"), &object);
        let placement = serde_json::to_value(&*snapshot.placements["web-1"].value).unwrap();
        put(&mut snapshot, &format!("placement/vm/{vm}"), &placement);
        let status = json!({"host": "host1", "session": 1, "epoch": 1, "generation": 1, "phase": "running",
            "sinceMs": 1, "message": "", "ready": true, "readyMs": 5, "unproven": unproven});
        put(&mut snapshot, &format!("status/vm/{vm}"), &status);
    }
    assert!(snapshot.unreadable.is_empty(), "{:?}", snapshot.unreadable);
    let me = Name::new("host1").unwrap();
    let frontends = frontends(&snapshot, &me, &BTreeSet::new(), None);
    let states: Vec<_> = frontends[0].members.iter().map(|member| member.state).collect();
    assert_eq!(states, [Drain, Ready]);
}

fn tls(snapshot: &mut Snapshot, secrets: Option<&ClusterKey>) -> TlsWanted {
    let service = json!({"replicas": 1, "template": {"spec": {"memory": "128MiB"}},
        "frontend": {"address": "10.0.0.9", "port": 443,
            "tls": {"certificate": "shop", "minVersion": "1.3"}}});
    let meta = json!({"name": "web", "uid": "web", "generation": 2});
    put(snapshot, "spec/service/web", &json!({"meta": meta, "spec": service}));
    let me = Name::new("host1").unwrap();
    let mut wanted = frontends(snapshot, &me, &BTreeSet::new(), secrets);
    wanted.remove(0).tls.unwrap()
}

fn certificate(snapshot: &mut Snapshot, chain: &str, key: &str) {
    let meta = json!({"name": "shop", "uid": "shop", "generation": 1});
    let spec = json!({"chain": chain, "key": key});
    put(snapshot, "spec/certificate/shop", &json!({"meta": meta, "spec": spec}));
}

#[test]
fn a_frontends_certificate_is_opened_or_it_is_said_why_not() {
    let authority = |name: &str| Authority::create(name).unwrap();
    let secrets = ClusterKey::derive(&authority("test")).unwrap();
    let (ca, shop) = (Signer::new("Test authority"), "certificate/shop".parse().unwrap());
    let (one, two) = (ca.sign("shop.test", 90), ca.sign("shop.test", 90));
    let sealed = |key: &str| secrets.seal(&shop, &Plain::new(key.into())).unwrap();
    let mut snapshot = one_member(None);
    let why = |tls: TlsWanted| tls.identity.unwrap_err();
    assert_eq!(why(tls(&mut snapshot, Some(&secrets))), "there is no certificate/shop");
    let chain = format!("{}{}", one.leaf, ca.certificate);
    certificate(&mut snapshot, &chain, &sealed(&one.key));
    let wanted = tls(&mut snapshot, Some(&secrets));
    assert_eq!((wanted.certificate.as_str(), wanted.min_version), ("shop", TlsVersion::V13));
    let first = wanted.identity.unwrap();
    assert!(first.key.expose().starts_with("-----BEGIN PRIVATE KEY-----\n"));
    assert_eq!(first.chain.matches("BEGIN CERTIFICATE").count(), 2);
    assert!(!format!("{first:?}").contains("PRIVATE"));
    // Another chain is another certificate, also for the same key.
    let renewed = ca.renew(&one, "shop.test", 180);
    certificate(&mut snapshot, &renewed.leaf, &sealed(&one.key));
    let second = tls(&mut snapshot, Some(&secrets)).identity.unwrap();
    assert!(second.fingerprint != first.fingerprint && second.key == first.key);
    let other = ClusterKey::derive(&authority("other")).unwrap();
    assert!(
        why(tls(&mut snapshot, Some(&other)))
            .starts_with("the secret of certificate/shop does not open")
    );
    assert!(why(tls(&mut snapshot, None)).starts_with("this host has no key"));
    certificate(&mut snapshot, &one.leaf, &sealed(&two.key));
    assert!(why(tls(&mut snapshot, Some(&secrets))).contains("does not belong"));
    certificate(&mut snapshot, &one.leaf, &one.key);
    assert!(why(tls(&mut snapshot, Some(&secrets))).contains("is not sealed"));
    // One of a newer version is not taken for one that is not there.
    let newer = json!({"meta": {"name": "blog"}, "spec": 7});
    snapshot.apply("/haven/spec/certificate/shop", None);
    put(&mut snapshot, "spec/certificate/shop", &newer);
    assert!(why(tls(&mut snapshot, Some(&secrets))).contains("cannot be read: update this host"));
}

#[test]
fn who_gave_an_address_up_serves_it_on_and_holds_it_no_more_by_right() {
    use super::wanted::{addresses, given_up};
    let mut snapshot = one_member(None);
    let moved = json!({"holder": "host2", "epoch": 2, "candidates": ["host2"], "from": "host1"});
    put(&mut snapshot, "placement/frontend/web", &moved);
    let me = Name::new("host1").unwrap();
    assert!(addresses(&snapshot, &me).is_empty());
    assert_eq!(given_up(&snapshot, &me).len(), 1);
    assert_eq!(frontends(&snapshot, &me, &BTreeSet::new(), None).len(), 1);
    let other = json!({"holder": "host2", "epoch": 2, "candidates": ["host2"]});
    put(&mut snapshot, "placement/frontend/web", &other);
    assert!(given_up(&snapshot, &me).is_empty());
    assert!(frontends(&snapshot, &me, &BTreeSet::new(), None).is_empty());
}

/// Nothing of a VM is on the host where it will only start anew.
#[test]
fn a_vm_that_restarts_elsewhere_leaves_here_and_is_nothing_there_yet() {
    use super::{
        vm_step::Wanted,
        wanted::{my_vms, vm},
    };
    let mut snapshot = one_member(None);
    let placement = json!({"host": "host1", "epoch": 1, "slot": 1, "nics": [],
        "movingTo": {"host": "host2", "migration": "m1", "restart": true}});
    put(&mut snapshot, "placement/vm/web-1", &placement);
    let (here, there) = (Name::new("host1").unwrap(), Name::new("host2").unwrap());
    let web = Name::new("web-1").unwrap();
    assert_eq!(vm(&snapshot, &here, &web), Wanted::Leave { attempt: 1 });
    assert_eq!(vm(&snapshot, &there, &web), Wanted::NotMine);
    assert_eq!(my_vms(&snapshot, &there).count(), 0);
}

/// Its word `Listening` stands until the attempt is taken back, so its process stays as long.
#[test]
fn a_host_that_waits_for_a_guest_waits_until_the_attempt_is_taken_back() {
    use super::{vm_step::Wanted, wanted::vm};
    let mut snapshot = one_member(None);
    let (there, web) = (Name::new("host2").unwrap(), Name::new("web-1").unwrap());
    let mut placement = json!({"host": "host1", "epoch": 1, "slot": 1, "nics": [],
        "movingTo": {"host": "host2", "migration": "m1"}});
    put(&mut snapshot, "placement/vm/web-1", &placement);
    let waits = Wanted::Receive { epoch: 2, attempt: 1 };
    assert_eq!(vm(&snapshot, &there, &web), waits);
    let mut object = serde_json::to_value(&*snapshot.vms["web-1"].value).unwrap();
    object["spec"]["running"] = json!(false);
    put(&mut snapshot, "spec/vm/web-1", &object);
    assert!(snapshot.unreadable.is_empty(), "{:?}", snapshot.unreadable);
    assert_eq!(vm(&snapshot, &there, &web), waits);
    object["meta"]["deleting"] = json!(true);
    put(&mut snapshot, "spec/vm/web-1", &object);
    assert_eq!(vm(&snapshot, &there, &web), waits);
    placement.as_object_mut().unwrap().remove("movingTo");
    put(&mut snapshot, "placement/vm/web-1", &placement);
    assert_eq!(vm(&snapshot, &there, &web), Wanted::NotMine);
}

/// What is sent to a guest waits where it will run on, from when it is stopped; it is led back when it does not move.
#[test]
fn a_guest_that_is_stopped_on_its_way_is_reached_where_it_will_run_on() {
    let mut snapshot = one_member(None);
    for (host, address) in [("host2", "10.0.0.2"), ("host3", "10.0.0.3")] {
        let object = json!({"meta": {"name": host, "uid": host, "generation": 1}, "spec": {"address": address}});
        put(&mut snapshot, &format!("spec/host/{host}"), &object);
    }
    let front = json!({"meta": {"name": "front", "uid": "n", "generation": 1}, "spec": {"driver": "overlay", "subnet": "10.1.0.0/24", "vni": 7}});
    put(&mut snapshot, "spec/network/front", &front);
    let nic = json!({"network": "front", "ip": "10.1.0.10", "mac": "52:54:00:00:00:01"});
    let placement = json!({"host": "host1", "epoch": 1, "slot": 1, "nics": [nic],
        "movingTo": {"host": "host2", "migration": "m1"}});
    put(&mut snapshot, "placement/vm/web-1", &placement);
    assert!(snapshot.unreadable.is_empty(), "{:?}", snapshot.unreadable);
    // Which of the three have a port that it is sent to, and where the others send.
    let ways = |snapshot: &Snapshot| {
        ["host1", "host2", "host3"].map(|host| {
            let network = super::wanted::networks(snapshot, &Name::new(host).unwrap()).remove(0);
            let here = network.local.iter().any(|port| !port.idle);
            (here, network.remote.first().map(|remote| remote.host.octets()[3]))
        })
    };
    let before = [(true, None), (false, Some(1)), (false, Some(1))];
    let after = [(false, Some(2)), (true, None), (false, Some(2))];
    assert_eq!(ways(&snapshot), before);
    for (phase, expected) in
        [("copying", before), ("stopped", after), ("failed", before), ("stopped", after)]
    {
        let told = json!({"attempt": 1, "session": 1, "phase": phase, "message": ""});
        put(&mut snapshot, "status/migration/web-1/host1", &told);
        assert_eq!(ways(&snapshot), expected, "{phase}");
    }
    // The word of another attempt, and of a host that was lost, is none.
    let told = json!({"attempt": 9, "session": 1, "phase": "stopped", "message": ""});
    put(&mut snapshot, "status/migration/web-1/host1", &told);
    assert_eq!(ways(&snapshot), before);
    let told = json!({"attempt": 1, "session": 1, "phase": "stopped", "message": ""});
    put(&mut snapshot, "status/migration/web-1/host1", &told);
    put(&mut snapshot, "leases/host1", &json!({"session": 1, "count": 2, "closed": true}));
    assert_eq!(ways(&snapshot), before);
}
