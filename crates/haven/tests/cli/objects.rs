//! Manifests and objects against a played daemon.

use crate::{
    Person,
    fake::{Fake, no, ok, service, vm},
};
use serde_json::json;

const SERVICE: &str =
    "kind: Service\nname: hello\nreplicas: 3\ntemplate:\n  spec:\n    memory: 128MiB\n";

#[test]
fn apply_waits_for_the_rollout_and_not_for_old_members() {
    let applied = |outcome: &str| json!([{"object": "service/hello", "outcome": outcome, "before": "", "after": "", "generation": 2}]);
    let fake = Fake::new(move |asked, before| match (asked.method.as_str(), before) {
        ("POST", _) => ok(&applied("changed")),
        // The daemon has not seen the change; then nothing has begun; then it is under way; then one old is left.
        (_, 0) => ok(&service(1, "3/3 ready", "3/3")),
        (_, 1) => ok(&service(2, "3/3 ready", "0/3, 3 going")),
        (_, 2) => ok(&service(2, "4/3 ready", "1/3, 3 going")),
        (_, 3) => ok(&service(2, "4/3 ready", "3/3, 1 going")),
        _ => ok(&service(2, "3/3 ready", "3/3")),
    });
    let person = Person::at(&fake.socket);
    let ended = person.say(SERVICE, &["apply", "-f", "-", "--wait"]);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert_eq!(fake.lines().iter().filter(|l| l.starts_with("GET")).count(), 5);
    let (before, _) = ended.out.split_once("all of it runs").unwrap();
    insta::assert_snapshot!(before);
}

#[test]
fn promote_waits_for_the_rest_and_tells_a_refusal() {
    let staged = |state: &str, updated: &str, step: Option<&str>| {
        let mut item = service(3, state, updated);
        item["spec"]["update"] = json!({"strategy": "canary"});
        if let Some(step) = step {
            item["columns"]["step"] = step.into();
        }
        item
    };
    let fake = Fake::new(move |asked, before| match (asked.method.as_str(), before) {
        ("POST", 0) => ok(&staged("4/3 ready", "1/3, 3 going", None)),
        ("POST", _) => no(409, "the new members of hello are not all ready yet", "wait"),
        (_, 0) => {
            ok(&staged("4/3 ready", "1/3, 3 going", Some("1 of 3 members are new and ready")))
        }
        _ => ok(&staged("3/3 ready", "3/3", None)),
    });
    let person = Person::at(&fake.socket);
    let ended = person.run(&["service", "promote", "hello", "--wait"]);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert_eq!(fake.lines()[0], "POST /v1/services/hello/promote");
    let (before, _) = ended.out.split_once("all of it runs").unwrap();
    assert_eq!(
        before,
        "service/hello: 4/3 ready\nwaiting for service/hello: 4/3 ready; updated 1/3, 3 going; 1 of 3 members are new and ready\n"
    );
    let refused = person.run(&["service", "promote", "hello"]);
    assert_eq!(refused.code, 4, "{}", refused.err);
    assert!(refused.err.contains("are not all ready yet"), "{}", refused.err);
}

#[test]
fn what_the_cluster_has_no_room_for_is_refused_or_told() {
    let why = "the loss of 1 host would leave VMs without a place: host2 lost: its 6 GiB do not fit on host3 (2 GiB free) and host1 (1.5 GiB free): db-1 (4 GiB) finds no place";
    let fake = Fake::new(move |_, before| match before {
        0 => no(
            422,
            &format!("this is too much for the cluster, and nothing was changed: {why}"),
            "ask for less",
        ),
        _ => ok(&json!([
            {"object": "vm/db-1", "outcome": "created", "before": "", "after": "", "generation": 1, "warning": why},
            {"object": "vm/db-2", "outcome": "created", "before": "", "after": "", "generation": 1, "warning": why},
        ])),
    });
    let person = Person::at(&fake.socket);
    let refused = person.say(SERVICE, &["apply", "-f", "-"]);
    let told = person.say(SERVICE, &["apply", "-f", "-"]);
    assert_eq!((refused.code, told.code), (2, 0), "{}", told.err);
    insta::assert_snapshot!(format!("{}{}\n{}{}", refused.out, refused.err, told.out, told.err));
}

#[test]
fn a_wait_that_ends_too_soon_says_why() {
    let fake = Fake::new(move |asked, _| match asked.path.as_str() {
        "/v1/apply" => ok(
            &json!([{"object": "service/hello", "outcome": "changed", "before": "", "after": "", "generation": 2}]),
        ),
        path if path.starts_with("/v1/explain") => ok(&json!(["waiting: no host has 128MiB free"])),
        _ => ok(&service(2, "2/3 ready", "2/3")),
    });
    let person = Person::at(&fake.socket);
    let ended = person.say(SERVICE, &["apply", "-f", "-", "--wait", "--timeout", "0"]);
    assert_eq!(ended.code, 1);
    insta::assert_snapshot!(ended.err);
}

#[test]
fn too_much_is_refused_before_it_is_sent() {
    let person = Person::anybody();
    let part = "# \n".repeat(200_000);
    person.file("a.yaml", &part);
    let file = person.file("b.yaml", &part);
    let directory = file.trim_end_matches("/b.yaml");
    let together = person.run(&["apply", "-f", directory]);
    assert_eq!(together.code, 2, "{}", together.err);
    assert!(together.err.contains("1200000 bytes long together"), "{}", together.err);
    assert!(together.err.contains("hint: apply them in several steps"), "{}", together.err);
    let large = person.file("large.txt", &"# \n".repeat(4 << 20));
    let one = person.run(&["apply", "-f", &large]);
    assert_eq!(one.code, 2, "{}", one.err);
    assert!(one.err.contains("large.txt is 12582912 bytes long"), "{}", one.err);
}

#[test]
fn diff_is_unified_and_its_exit_code_tells() {
    let change = |before: &str, after: &str, outcome: &str| json!([{"object": "vm/web", "outcome": outcome, "before": before, "after": after, "generation": 1}]);
    let fake = Fake::new(move |_, before| match before {
        0 => ok(&change("a: 1\nb: 2\n", "a: 1\nb: 3\n", "changed")),
        _ => ok(&change("a: 1\n", "a: 1\n", "unchanged")),
    });
    let person = Person::at(&fake.socket);
    let changed = person.say(SERVICE, &["diff", "-f", "-"]);
    let same = person.say(SERVICE, &["diff", "-f", "-"]);
    assert_eq!((changed.code, same.code), (1, 0));
    assert_eq!((changed.err.as_str(), same.out.as_str()), ("", ""));
    assert_eq!(
        changed.out,
        "--- vm/web now\n+++ vm/web after apply\n@@ -1,2 +1,2 @@\n a: 1\n-b: 2\n+b: 3\n"
    );
}

#[test]
fn delete_takes_what_files_name_in_the_right_order() {
    let fake = Fake::new(|asked, _| match asked.path.as_str() {
        "/v1/objects/service/hello" => no(404, "there is no service/hello", ""),
        _ => ok(&vm(1, 1)),
    });
    let person = Person::at(&fake.socket);
    std::fs::create_dir(person.home.path().join("m")).unwrap();
    person.file("m/a.yaml", "kind: Network\nname: front\nsubnet: 10.77.0.0/24\n");
    person.file("m/b.yml", &format!("{SERVICE}---\nkind: VM\nname: web\nmemory: 1GiB\n"));
    let directory = person.home.path().join("m").display().to_string();
    let ended = person.run(&["delete", "-f", &directory]);
    assert_eq!(ended.code, 0, "{}", ended.err);
    let lines = [
        "DELETE /v1/objects/service/hello",
        "DELETE /v1/objects/vm/web",
        "DELETE /v1/objects/network/front",
    ];
    assert_eq!(fake.lines(), lines);
    insta::assert_snapshot!(ended.out);
    // By name, what is not there is an error.
    assert_eq!(person.run(&["delete", "service/hello"]).code, 3);
    assert_eq!(person.run(&["delete"]).code, 2);
    assert_eq!(person.run(&["delete", "vm/a", "-f", "x"]).code, 2);
}

#[test]
fn cordon_writes_over_the_version_it_read_and_tries_again() {
    let host = |version: i64| {
        json!({
            "resourceVersion": version, "kind": "Host",
            "meta": {"name": "host1", "uid": "u", "generation": 1, "created_ms": 1},
            "spec": {"address": "10.0.0.1"}, "state": "online", "columns": {},
        })
    };
    let fake = Fake::new(move |asked, before| match (asked.method.as_str(), before) {
        ("PUT", 0) => no(409, "changed meanwhile", ""),
        ("PUT", _) => ok(&host(9)),
        (_, n) => ok(&host(5 + i64::try_from(n).unwrap())),
    });
    let ended = Person::at(&fake.socket).run(&["host", "cordon", "host1"]);
    assert_eq!((ended.code, ended.out.as_str()), (0, "host/host1 cordoned\n"), "{}", ended.err);
    let asked = fake.asked.lock().unwrap();
    let puts: Vec<_> = asked.iter().filter(|a| a.method == "PUT").collect();
    assert_eq!(puts[1].body["resourceVersion"], 6);
    assert_eq!(puts[1].body["spec"]["cordoned"], true);
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let items: Vec<_> = (0..20_000).map(|_| vm(1, 1)).collect();
    let fake = Fake::new(move |_, _| ok(&json!({ "items": items })));
    let person = Person::at(&fake.socket);
    let mut child = person.command(&["vm", "ls", "-o", "json"]).spawn().unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "");
}
