//! `haven events --follow`: over breaks of the connection, and never an end that looks like success.

use crate::{
    Person,
    fake::{Answer, Fake, no, ok},
};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};

fn event(id: &str) -> Value {
    json!({
        "id": id, "at_ms": 1_790_000_000_000_i64, "object": "vm/web", "severity": "info",
        "message": format!("event {id}"), "by": "test",
    })
}

fn page(ids: &[&str]) -> Answer {
    let items: Vec<Value> = ids.iter().map(|id| event(id)).collect();
    ok(&json!({"items": items}))
}

#[test]
fn a_broken_stream_is_opened_again_and_no_event_is_missed_or_doubled() {
    let fake = Fake::new(|asked, before| match (asked.path.as_str(), before) {
        // The stream brings one event and breaks; while it is broken, events 3 and 4 happen.
        ("/v1/events/follow", 0) => (200, format!("data: {}\n\n: alive\n\n", event("2"))),
        ("/v1/events/follow", _) => (200, format!("data: {}\n\n", event("5"))),
        (path, 0) if path.starts_with("/v1/events?limit=1") => page(&["1"]),
        _ => page(&["0", "1", "2", "3", "4"]),
    });
    let person = Person::at(&fake.socket);
    let args = ["events", "--follow", "--limit", "1", "-o", "json"];
    let mut child = person.command(&args).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ids: Vec<String> = lines
        .map_while(Result::ok)
        .filter_map(|line| serde_json::from_str::<Value>(&line).ok())
        .map(|event| event["id"].as_str().unwrap().to_owned())
        .take(5)
        .collect();
    assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(ids, ["1", "2", "3", "4", "5"]);
}

#[test]
fn a_refusal_ends_it_with_an_error() {
    let fake = Fake::new(|_, _| no(403, "this needs the role viewer", "ask an admin"));
    let ended = Person::at(&fake.socket).run(&["events", "--follow"]);
    assert_eq!(ended.code, 1);
    assert!(ended.err.contains("this needs the role viewer"), "{}", ended.err);
}

#[test]
fn a_cluster_that_is_not_there_ends_it_at_once() {
    let person = Person::anybody().with("HAVEN_SOCKET", "/nowhere/api.sock");
    assert_eq!(person.run(&["events", "--follow"]).code, 5);
}

/// The screen is drawn anew each second, and goes on over a second in which nobody answers.
#[test]
fn the_status_that_is_watched_goes_on_when_the_asked_host_dies() {
    let fake = Fake::new(|asked, before| match (asked.path.as_str(), before) {
        ("/v1/status", 1) => no(503, "host1 waits for the store", "start the other hosts"),
        ("/v1/status", n) => ok(&json!({
            "cluster": "lab", "headline": format!("look {n}"), "hosts": [], "services": [],
            "voters": [3, 3], "vms": [0, 0], "down": [], "risks": [], "survivable": 1,
            "incidents": [],
        })),
        _ => ok(&json!({"version": "0"})),
    });
    let mut child = Person::at(&fake.socket).command(&["status", "--watch"]).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let wanted = ["look 0", "host1 waits for the store", "look 2"];
    let seen: Vec<String> = lines
        .map_while(Result::ok)
        .filter(|line| wanted.iter().any(|words| line.contains(words)))
        .take(3)
        .collect();
    assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
    child.kill().unwrap();
    child.wait().unwrap();
    for (line, words) in seen.iter().zip(wanted) {
        // Each begins on an empty screen.
        assert!(line.starts_with("\u{1b}[2J\u{1b}[H") && line.contains(words), "{seen:?}");
    }
}
