//! Work on hosts and balance against a played daemon.

use crate::{
    Person,
    fake::{Answer, Fake, no, ok},
};
use serde_json::{Value, json};

fn view(phases: [&str; 2], stopped: &Value, ended: &Value, now: &Value) -> Answer {
    let turn = |host: &str, phase: &str| json!({"host": host, "phase": phase, "sinceMs": 1});
    ok(
        &json!({"maintenance": {"id": "m1", "work": "reboot", "by": "alice", "atMs": 1, "stopped": stopped,
        "hosts": [turn("host2", phases[0]), turn("host1", phases[1])], "endedMs": ended}, "now": now}),
    )
}

#[test]
fn a_rolling_reboot_is_followed_to_its_end_also_while_the_asked_host_restarts() {
    let (none, now) = (Value::Null, |text: &str| json!(format!("waiting: {text}")));
    let fake = Fake::new(move |asked, before| match (asked.method.as_str(), before) {
        ("POST", _) => view(["waiting", "waiting"], &none, &none, &none),
        (_, 0 | 1) => view(
            ["working", "waiting"],
            &none,
            &none,
            &now("the reboot of host2 is under way: it is drained"),
        ),
        (_, 2) => no(503, "the store has no quorum", "wait"),
        (_, 3) => view(
            ["done", "working"],
            &none,
            &none,
            &now("the reboot of host1 is under way: it is drained"),
        ),
        _ => view(["done", "done"], &none, &json!(9), &none),
    });
    let ended = Person::at(&fake.socket).run(&["host", "reboot", "--rolling"]);
    assert_eq!(ended.code, 0, "{} {}", ended.out, ended.err);
    assert_eq!(fake.lines()[0], "POST /v1/maintenance");
    let (before, _) = ended.out.rsplit_once(" (").unwrap();
    assert_eq!(
        before,
        "reboot of host2, host1, one after another\nthe reboot of host2 is under way: it is drained\nthe reboot of host1 is under way: it is drained\nthe reboot is over: 2 hosts are done"
    );
}

#[test]
fn where_it_stops_is_told_with_what_to_do() {
    let fake = Fake::new(|_, _| {
        let why = json!("the reboot of host2 failed: its command ended with code 1");
        view(["working", "waiting"], &why, &Value::Null, &Value::Null)
    });
    let person = Person::at(&fake.socket);
    let ended = person.run(&["host", "reboot", "host2", "host1"]);
    assert_eq!(ended.code, 1);
    insta::assert_snapshot!(ended.err);
    let shown = person.run(&["host", "maintenance"]);
    assert_eq!(shown.code, 0);
    insta::assert_snapshot!(shown.out);
}

#[test]
fn hosts_are_named_or_all_of_them_are_meant() {
    let fake =
        Fake::new(|_, _| view(["waiting", "waiting"], &Value::Null, &Value::Null, &Value::Null));
    let person = Person::at(&fake.socket);
    assert_eq!(person.run(&["host", "reboot"]).code, 2);
    assert_eq!(person.run(&["host", "upgrade", "host1", "--rolling"]).code, 2);
    assert!(fake.lines().is_empty(), "{:?}", fake.lines());
    let asked = person.run(&["host", "upgrade", "host1", "--no-wait"]);
    assert_eq!(asked.code, 0, "{}", asked.err);
    assert!(asked.out.ends_with("`haven host maintenance` tells how it stands\n"), "{}", asked.out);
}

#[test]
fn moves_for_balance_are_shown_and_only_then_made() {
    let fake = Fake::new(|asked, _| match asked.path.as_str() {
        "/v1/balance" => {
            let host = |host: &str, cpu: u32, after: u32| json!({"host": host, "cpu": cpu, "cpuAfter": after, "memory": 100, "memoryAfter": 100});
            let step = json!({"vm": "mail", "from": "host1", "to": "host2", "gain": 400,
                "reason": "mail is to move from host1 to host2 for balance: the CPUs of host1 are 90 % busy"});
            ok(
                &json!({"policy": "advise", "hosts": [host("host1", 900, 500), host("host2", 100, 500)], "moves": [step]}),
            )
        }
        _ => {
            let outcome =
                json!({"atMs": 9, "moved": true, "message": "mail was moved from host1 to host2"});
            let migration =
                json!({"id": "m1", "from": "host1", "by": "alice", "atMs": 1, "outcome": outcome});
            ok(&json!({"migration": migration, "host": "host2"}))
        }
    });
    let person = Person::at(&fake.socket);
    let shown = person.run(&["rebalance", "--dry-run"]);
    assert_eq!((shown.code, fake.lines()), (0, vec!["GET /v1/balance".to_owned()]));
    insta::assert_snapshot!(shown.out);
    let made = person.run(&["rebalance"]);
    assert_eq!(made.code, 0, "{}", made.err);
    assert_eq!(fake.lines()[1], "POST /v1/balance");
    assert!(made.out.contains("mail was moved from host1 to host2"), "{}", made.out);
}
