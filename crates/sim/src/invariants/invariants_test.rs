//! Every invariant can be broken: for each, a history that it passes and the smallest ones that it refuses.

use crate::{judge::Judge, net::Power};
use haven_host::network::{
    address::AddressDriver,
    fake::{FakeAddress, Segment},
};
use haven_model::{Name, keys, object::Kind};
use serde_json::{Value, json};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// A history as the judge hears it.
struct History {
    judge: Judge,
    revision: i64,
    segment: Arc<Segment>,
}

impl History {
    /// Two hosts with 1 GiB each that are on, in session 1; `grace` as in [`Judge::new`].
    fn with_grace(grace: Duration) -> Self {
        let segment = Arc::new(Segment::default());
        let mut history =
            Self { judge: Judge::new(grace, Arc::clone(&segment)), revision: 0, segment };
        for host in ["host1", "host2"] {
            history.judge.power(host, Power::On);
            let status = json!({"session": 1, "memory": "1GiB", "cpus": 8});
            history.write(&[
                (keys::lease(&name(host)), json!({"session": 1, "count": 1})),
                (keys::host_status(&name(host)), status),
                object(Kind::Host, host, json!({"address": "10.88.0.1", "reservedMemory": "0B"})),
            ]);
        }
        history
    }

    fn new() -> Self {
        Self::with_grace(Duration::ZERO)
    }

    /// One transaction.
    fn write(&mut self, records: &[(String, Value)]) {
        self.revision += 1;
        let event = |(key, value): &(String, Value)| {
            let value = (!value.is_null()).then(|| value.to_string().into_bytes());
            (key.clone(), value, self.revision)
        };
        let events: Vec<_> = records.iter().map(event).collect();
        self.judge.transaction(self.revision, &events);
    }

    /// A VM is made and placed.
    fn vm(&mut self, vm: &str, spec: Value, host: &str) {
        self.write(&[object(Kind::Vm, vm, spec), placed(vm, host, 1)]);
    }

    fn starts(&self, host: &str, vm: &str, epoch: u64) {
        self.judge.world(host, vm, epoch, true);
    }

    fn ends(&self, host: &str, vm: &str) {
        self.judge.world(host, vm, 1, false);
    }

    /// What is broken until now.
    fn broken(&self) -> Vec<String> {
        self.judge.verdict().1
    }

    /// What is broken at the end.
    fn broken_at_end(&self) -> Vec<String> {
        self.judge.end();
        self.broken()
    }
}

fn object(kind: Kind, called: &str, spec: Value) -> (String, Value) {
    let meta = json!({"name": called, "uid": called, "generation": 1});
    (format!("{}{called}", keys::objects(kind)), json!({"meta": meta, "spec": spec}))
}

fn placed(vm: &str, host: &str, epoch: u64) -> (String, Value) {
    let placement = json!({"host": host, "epoch": epoch, "slot": 1, "nics": []});
    (keys::placement(&name(vm)), placement)
}

fn closed(host: &str) -> [(String, Value); 2] {
    let proof = json!({"session": 1, "proof": "lease-expired", "at_ms": 1, "last_heard_ms": 1, "incident": 1});
    [
        (keys::lease(&name(host)), json!({"session": 1, "count": 9, "closed": true})),
        (keys::lost(&name(host)), proof),
    ]
}

fn small() -> Value {
    json!({"memory": "64MiB"})
}

fn only(broken: &[String], invariant: &str) {
    assert!(
        !broken.is_empty() && broken.iter().all(|what| what.starts_with(invariant)),
        "{broken:?} should be of {invariant}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_recovery_with_proof_is_right() {
    let mut history = History::new();
    history.vm("web", small(), "host1");
    history.starts("host1", "web", 1);
    history.judge.power("host1", Power::Off);
    history.ends("host1", "web");
    history.write(&closed("host1"));
    history.write(&[placed("web", "host2", 2)]);
    history.starts("host2", "web", 2);
    assert_eq!(history.broken(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn two_runners_are_found_and_a_paused_one_is_none() {
    let mut history = History::new();
    history.vm("web", small(), "host1");
    history.starts("host1", "web", 1);
    history.judge.power("host1", Power::Paused);
    history.write(&closed("host1"));
    history.write(&[placed("web", "host2", 2)]);
    history.starts("host2", "web", 2);
    assert_eq!(history.broken(), [""; 0]);
    history.judge.power("host1", Power::On);
    only(&history.broken(), "one runner");
}

#[tokio::test(start_paused = true)]
async fn a_copy_on_a_host_that_woke_has_its_grace_and_no_more() {
    for (overlap, is_broken) in [(40, false), (60, true)] {
        let mut history = History::with_grace(Duration::from_millis(50));
        history.vm("web", small(), "host1");
        history.starts("host1", "web", 1);
        history.judge.power("host1", Power::Paused);
        history.write(&closed("host1"));
        history.write(&[placed("web", "host2", 2)]);
        history.starts("host2", "web", 2);
        history.judge.power("host1", Power::On);
        tokio::time::sleep(Duration::from_millis(overlap)).await;
        history.ends("host1", "web");
        assert_eq!(!history.broken().is_empty(), is_broken, "{:?}", history.broken());
        if is_broken {
            only(&history.broken(), "one runner");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_of_owner_without_a_proof_is_found() {
    let mut history = History::new();
    history.vm("web", small(), "host1");
    history.write(&[placed("web", "host2", 2)]);
    only(&history.broken(), "proof");
    // Closed, and nobody wrote why.
    let mut history = History::new();
    history.vm("web", small(), "host1");
    history.write(&closed("host1")[..1]);
    history.write(&[placed("web", "host2", 2)]);
    only(&history.broken(), "proof");
}

#[tokio::test(start_paused = true)]
async fn a_proof_that_is_not_true_is_found() {
    let mut history = History::new();
    history.vm("web", small(), "host1");
    history.starts("host1", "web", 1);
    history.write(&closed("host1"));
    only(&history.broken(), "proof");
    // It runs nothing and answers for an address.
    let mut history = History::new();
    let address = FakeAddress {
        host: "host1".into(),
        segment: Arc::clone(&history.segment),
        reaches: Arc::new(|_, _| true),
        clock: haven_store::clock::Clock::real(),
    };
    address.hold(&BTreeSet::from(["10.88.0.100".parse().unwrap()])).await.unwrap();
    history.write(&closed("host1"));
    only(&history.broken(), "proof");
    // Let go of while it runs.
    let mut history = History::new();
    history.vm("web", small(), "host1");
    history.starts("host1", "web", 1);
    let (key, _) = placed("web", "host1", 1);
    history.write(&[(key, Value::Null)]);
    only(&history.broken(), "proof");
}

#[tokio::test(start_paused = true)]
async fn epochs_that_fall_and_starts_under_old_ones_are_found() {
    let mut history = History::new();
    history.vm("web", small(), "host1");
    history.write(&[placed("web", "host1", 3)]);
    history.starts("host1", "web", 3);
    assert_eq!(history.broken(), [""; 0]);
    history.ends("host1", "web");
    history.starts("host1", "web", 2);
    only(&history.broken(), "epochs");
    let mut history = History::new();
    history.vm("web", small(), "host1");
    history.starts("host2", "web", 1);
    only(&history.broken(), "epochs");
    let mut history = History::new();
    history.vm("web", small(), "host1");
    history.write(&[placed("web", "host1", 0)]);
    only(&history.broken(), "epochs");
}

#[tokio::test(start_paused = true)]
async fn two_managers_of_a_term_and_sessions_that_come_back_are_found() {
    let manager = |term: u64, holder: &str| {
        let record = json!({"term": term, "holder": holder, "session": 1});
        [(keys::MANAGER.to_owned(), record)]
    };
    for (second, is_broken) in
        [(manager(2, "host2"), false), (manager(1, "host2"), true), (manager(0, "host1"), true)]
    {
        let mut history = History::new();
        history.write(&manager(1, "host1"));
        history.write(&second);
        assert_eq!(!history.broken().is_empty(), is_broken, "{second:?}: {:?}", history.broken());
        if is_broken {
            only(&history.broken(), "one manager");
        }
    }
    let lease =
        |session: u64| (keys::lease(&name("host1")), json!({"session": session, "count": 1}));
    for (session, is_broken) in [(2, false), (1, true), (0, true)] {
        let mut history = History::new();
        history.write(&closed("host1"));
        history.write(&[lease(session)]);
        assert_eq!(!history.broken().is_empty(), is_broken, "{session}: {:?}", history.broken());
        if is_broken {
            only(&history.broken(), "one manager");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn memory_that_is_promised_twice_is_found() {
    let mut history = History::new();
    history.vm("half", json!({"memory": "512MiB"}), "host1");
    history.vm("rest", json!({"memory": "512MiB"}), "host1");
    assert_eq!(history.broken(), [""; 0]);
    history.vm("more", json!({"memory": "1MiB"}), "host1");
    only(&history.broken(), "capacity");
}

#[tokio::test(start_paused = true)]
async fn wishes_that_are_passed_over_are_found() {
    let mut history = History::new();
    let wish = json!({"memory": "64MiB", "affinity": {"hosts": {"disk": "fast"}}});
    history.vm("web", wish.clone(), "host1");
    only(&history.broken(), "wishes");
    let mut history = History::new();
    let (key, mut host) = object(Kind::Host, "host1", json!({"address": "10.88.0.1"}));
    host["meta"]["labels"] = json!({"disk": "fast"});
    history.write(&[(key, host)]);
    history.vm("web", wish, "host1");
    assert_eq!(history.broken(), [""; 0]);
    // Beside one that it must be apart from.
    let (key, mut other) = object(Kind::Vm, "other", small());
    other["meta"]["labels"] = json!({"app": "db"});
    let readable = [(key.clone(), other.clone())];
    history.write(&[(key.clone(), other), placed("other", "host1", 1)]);
    let apart = json!({"memory": "64MiB", "affinity": {"apart": {"app": "db"}}});
    history.vm("away", apart.clone(), "host2");
    assert_eq!(history.broken(), [""; 0]);
    // A plan may be from before that one could be read, and is not from long before.
    history.write(&[(key, json!("written by a newer version"))]);
    history.write(&readable);
    history.vm("sooner", apart.clone(), "host1");
    assert_eq!(history.broken(), [""; 0]);
    tokio::time::advance(Duration::from_secs(4)).await;
    history.vm("beside", apart, "host1");
    only(&history.broken(), "wishes");
}

#[tokio::test(start_paused = true)]
async fn what_is_wanted_and_does_not_run_at_the_end_is_found() {
    let mut history = History::new();
    history.vm("web", small(), "host1");
    let status = json!({"host": "host1", "session": 1, "epoch": 1, "generation": 1,
        "phase": "running", "sinceMs": 1});
    history.write(&[(keys::vm_status(&name("web")), status)]);
    history.starts("host1", "web", 1);
    assert_eq!(history.broken_at_end(), [""; 0]);
    history.ends("host1", "web");
    only(&history.broken_at_end(), "convergence");
}

#[tokio::test(start_paused = true)]
async fn what_is_left_behind_at_the_end_is_found() {
    let mut history = History::new();
    history.write(&[placed("gone", "host1", 1)]);
    only(&history.broken_at_end(), "orphans");
    let history = History::new();
    history.judge.world("host1", "gone", 1, true);
    let orphans = |what: &String| what.starts_with("orphans: gone runs on host1");
    assert!(history.broken_at_end().iter().any(orphans), "{:?}", history.broken());
    let mut history = History::new();
    let held = json!({"holder": "host1", "epoch": 1, "candidates": []});
    history.write(&[(keys::frontend(&name("web")), held)]);
    only(&history.broken_at_end(), "orphans");
}

#[tokio::test(start_paused = true)]
async fn traffic_that_is_taken_from_too_many_is_found() {
    let labels = |drains: bool| {
        let mut labels = json!({"haven/template": "old"});
        if drains {
            labels["haven/drain"] = "1".into();
        }
        labels
    };
    let member = |vm: &str, drains: bool| {
        let (key, mut member) = object(Kind::Vm, vm, small());
        member["meta"]["owner"] = "service/web".into();
        member["meta"]["labels"] = labels(drains);
        (key, member)
    };
    let begin = || {
        let mut history = History::new();
        let service = json!({"replicas": 2, "template": {"spec": small()}});
        history.write(&[object(Kind::Service, "web", service)]);
        for vm in ["web-1", "web-2"] {
            let status = json!({"host": "host1", "session": 1, "epoch": 1, "generation": 1,
                "phase": "running", "sinceMs": 1, "ready": true});
            let told = (keys::vm_status(&name(vm)), status);
            history.write(&[member(vm, false), placed(vm, "host1", 1), told]);
            history.starts("host1", vm, 1);
        }
        history
    };
    // One that becomes ill by itself is nobody's doing.
    let mut history = begin();
    tokio::time::advance(Duration::from_secs(4)).await;
    history.write(&[(keys::vm_status(&name("web-1")), Value::Null)]);
    assert_eq!(history.broken(), [""; 0]);
    let renewed = || (keys::lease(&name("host1")), json!({"session": 1, "count": 9}));
    let mut history = begin();
    tokio::time::advance(Duration::from_secs(4)).await;
    history.write(&[renewed()]);
    history.write(&[member("web-2", true)]);
    only(&history.broken(), "traffic");
    // One that has ended and could not tell gets nothing that could be taken from it.
    let mut history = begin();
    tokio::time::advance(Duration::from_secs(4)).await;
    history.write(&[renewed()]);
    history.ends("host1", "web-2");
    history.write(&[member("web-2", true)]);
    assert_eq!(history.broken(), [""; 0]);
    // A host that nobody has heard for a while, or that is off, has no member to lose.
    let mut history = begin();
    tokio::time::advance(Duration::from_secs(4)).await;
    history.write(&[member("web-2", true)]);
    assert_eq!(history.broken(), [""; 0]);
    let mut history = begin();
    tokio::time::advance(Duration::from_secs(4)).await;
    history.judge.power("host1", Power::Off);
    history.write(&[renewed()]);
    history.write(&[member("web-2", true)]);
    assert_eq!(history.broken(), [""; 0]);
    // So it is when their template gets nothing.
    let mut history = begin();
    tokio::time::advance(Duration::from_secs(4)).await;
    history.write(&[renewed()]);
    let held = json!({"holder": "host1", "epoch": 1, "candidates": [], "traffic": {"old": 0}});
    history.write(&[(keys::frontend(&name("web")), held)]);
    only(&history.broken(), "traffic");
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_finds_no_place_after_a_loss_that_could_be_made_up_for_is_found() {
    for (full, moves, disturbed, is_broken) in [
        (false, true, false, false),
        (false, false, false, true),
        // Nobody said that it could.
        (true, false, false, false),
        // Something else keeps it waiting.
        (false, false, true, false),
    ] {
        let mut history = History::new();
        if full {
            history.vm("other-1", json!({"memory": "700MiB"}), "host2");
        }
        history.vm("web", json!({"memory": "700MiB"}), "host1");
        history.judge.power("host1", Power::Off);
        history.write(&closed("host1"));
        tokio::time::advance(Duration::from_secs(1)).await;
        if moves {
            history.write(&[placed("web", "host2", 2)]);
        }
        if disturbed {
            history.judge.disturb();
        }
        tokio::time::advance(Duration::from_secs(3)).await;
        history.write(&[object(Kind::Vm, "other", small())]);
        match is_broken {
            true => only(&history.broken(), "reserve"),
            false => assert_eq!(history.broken(), [""; 0]),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_comes_before_what_it_starts_after_is_found() {
    let status = |phase: &str| {
        let status = json!({"host": "host1", "session": 1, "epoch": 1, "generation": 1, "phase": phase, "sinceMs": 1});
        (keys::vm_status(&name("db")), status)
    };
    let app = || object(Kind::Vm, "app", json!({"memory": "64MiB", "after": ["vm/db"]}));
    for (phase, waits_s, is_broken) in [
        ("starting", 0, true),
        ("running", 0, false),
        ("starting", 290, true),
        ("starting", 301, false),
    ] {
        let mut history = History::new();
        history.vm("db", small(), "host1");
        history.write(&[status("starting")]);
        history.write(&[app()]);
        history.write(&[(keys::wait(&name("app")), json!({"since_ms": 1}))]);
        history.write(&[status(phase)]);
        tokio::time::advance(Duration::from_secs(waits_s)).await;
        let mut placement = placed("app", "host2", 1);
        placement.1["slot"] = 2.into();
        history.write(&[placement]);
        match is_broken {
            true => only(&history.broken(), "order"),
            false => assert_eq!(history.broken(), [""; 0], "{phase} {waits_s}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn moves_for_balance_that_come_too_often_or_too_early_are_found() {
    let begin = |vm: &str, outcome: Value| {
        let mut record =
            json!({"id": vm, "from": "host1", "by": "balancing", "atMs": 1, "balances": true});
        if !outcome.is_null() {
            record["outcome"] = outcome;
        }
        (keys::migration(&name(vm)), record)
    };
    let moved = || json!({"atMs": 2, "moved": true, "message": ""});
    let start = || {
        let mut history = History::new();
        history.write(&[(keys::CLUSTER.into(), json!({"name": "sim", "rebalanceWindow": "10s"}))]);
        history.vm("web", small(), "host1");
        history.vm("db", small(), "host1");
        history
    };
    // One after the other, with time between them.
    let mut history = start();
    history.write(&[begin("web", Value::Null)]);
    history.write(&[begin("web", moved())]);
    tokio::time::sleep(Duration::from_secs(10)).await;
    history.write(&[begin("db", Value::Null)]);
    history.write(&[begin("db", moved())]);
    assert_eq!(history.broken(), [""; 0]);
    // The same VM again.
    tokio::time::sleep(Duration::from_secs(20)).await;
    history.write(&[begin("web", Value::Null)]);
    only(&history.broken(), "balance");
    // The next one at once.
    let mut history = start();
    history.write(&[begin("web", Value::Null)]);
    history.write(&[begin("web", moved())]);
    history.write(&[begin("db", Value::Null)]);
    only(&history.broken(), "balance");
    // One whose record is gone is nobody's to wait for.
    let mut history = start();
    history.write(&[begin("web", Value::Null)]);
    history.write(&[begin("web", moved())]);
    history.write(&[(keys::migration(&name("web")), Value::Null)]);
    history.write(&[begin("db", Value::Null)]);
    assert_eq!(history.broken(), [""; 0]);
    // While another VM is still to be recovered.
    let mut history = start();
    history.judge.power("host1", Power::Off);
    history.write(&closed("host1"));
    history.vm("new", small(), "host2");
    history.write(&[begin("new", Value::Null)]);
    only(&history.broken(), "balance");
}
