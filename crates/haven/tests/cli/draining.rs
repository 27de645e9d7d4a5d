//! Drains and rehearsals against a played daemon.

use crate::{
    Person,
    fake::{Answer, Fake, ok},
};
use serde_json::{Value, json};

fn view(state: &str, left: &Value, moved: &Value) -> Answer {
    let drain = json!({"id": "d1", "by": "alice", "atMs": 1});
    ok(&json!({"state": state, "drain": drain, "left": left, "moved": moved, "resting": [],
        "away": [], "addresses": [], "quorum": null}))
}

#[test]
fn a_drain_is_followed_until_the_host_is_empty() {
    let fake = Fake::new(|asked, before| match (asked.method.as_str(), before) {
        ("POST", _) => view("draining", &json!([]), &json!([])),
        (_, 0 | 1) => {
            let left = json!([{"vm": "web", "to": "host2", "why": "web is being moved from host1 to host2: host2 makes ready"}]);
            view("draining", &left, &json!([]))
        }
        _ => view("drained", &json!([]), &json!(["web"])),
    });
    let ended = Person::at(&fake.socket).run(&["host", "drain", "host1", "--wait"]);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert_eq!(fake.lines()[0], "POST /v1/hosts/host1/drain");
    let (before, _) = ended.out.split_once(" (").unwrap();
    assert_eq!(
        before,
        "host1 takes nothing new, and what runs there leaves\nweb is being moved from host1 to host2: host2 makes ready\nhost1 is drained: 1 VM moved"
    );
}

#[test]
fn what_blocks_is_told_and_the_drain_stands() {
    let fake = Fake::new(|_, _| {
        let left = json!([{"vm": "db", "why": "waiting: db keeps host1 from being drained: its disk `root` lives in the local pool `scratch`; stop or delete it"}]);
        view("draining", &left, &json!([]))
    });
    let person = Person::at(&fake.socket);
    let ended = person.run(&["host", "drain", "host1", "--wait", "--timeout", "1"]);
    assert_eq!(ended.code, 1);
    insta::assert_snapshot!(ended.err);
}

#[test]
fn a_drain_that_is_broken_off_says_that_it_stands() {
    let fake = Fake::new(|_, _| {
        let left = json!([{"vm": "web", "to": "host2", "why": "web is being moved"}]);
        view("draining", &left, &json!([]))
    });
    let person = Person::at(&fake.socket);
    let child = person.command(&["host", "drain", "host1", "--wait"]).spawn().unwrap();
    while fake.lines().len() < 3 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130));
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(
        said.ends_with("the drain of host1 stands; `haven host undrain host1` ends it\n"),
        "{said}"
    );
}

#[test]
fn the_end_of_a_drain_waits_for_what_comes_back() {
    let gone = || ok(&json!({"state": "online", "drain": null}));
    let fake = Fake::new(move |asked, before| match (asked.method.as_str(), before) {
        ("GET", n) if n > 1 => gone(),
        _ => {
            let drain = json!({"id": "d1", "by": "alice", "atMs": 1, "bringingBack": true});
            let away = json!([{"vm": "web", "why": "web comes back from host2 to host1"}]);
            ok(&json!({"state": "online", "drain": drain, "away": away}))
        }
    });
    let person = Person::at(&fake.socket);
    let ended = person.run(&["host", "undrain", "host1", "--bring-back", "--wait"]);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert_eq!(fake.lines()[0], "DELETE /v1/hosts/host1/drain?bringBack=true");
    let (before, _) = ended.out.split_once(" (").unwrap();
    insta::assert_snapshot!(before);
}

#[test]
fn a_rehearsal_asks_for_its_hosts_and_prints_what_it_is_told() {
    let fake = Fake::new(|_, _| {
        ok(
            &json!({"steps": [], "vms": [{"vm": "web", "from": "host1", "to": "host2", "afterMs": 6100}],
            "endsAfterMs": 6100, "figures": "nothing was measured here yet"}),
        )
    });
    let ended = Person::at(&fake.socket).run(&["rehearse", "fail", "host1", "host3"]);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert_eq!(fake.lines(), ["GET /v1/rehearse/fail?hosts=host1,host3"]);
    insta::assert_snapshot!(ended.out);
}
