//! Which cluster a command speaks to, and what it says when there is none.

use crate::{
    Person,
    fake::{Fake, ok},
};
use serde_json::json;
use std::{os::unix::net::UnixListener, path::Path};

/// A socket that a daemon left behind.
fn stale(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    drop(UnixListener::bind(path).unwrap());
    assert!(path.exists());
}

fn lab(person: &Person, sockets: &[&Path]) {
    let lab = person.home.path().join("lab");
    std::fs::create_dir_all(&lab).unwrap();
    std::fs::write(lab.join("context.json"), json!({ "sockets": sockets }).to_string()).unwrap();
}

fn version() -> Fake {
    Fake::new(|_, _| ok(&json!({"version": "7.7.7"})))
}

#[test]
fn sockets_of_dead_daemons_are_passed_over() {
    let (person, fake) = (Person::anybody(), version());
    let dead = person.home.path().join("dead.sock");
    stale(&dead);
    stale(&person.home.path().join("run/api.sock"));
    lab(&person, &[&dead, &fake.socket]);
    assert!(person.run(&["version"]).out.contains("daemon 7.7.7"));
}

#[test]
fn without_any_daemon_it_is_said_what_was_tried() {
    let person = Person::anybody();
    let none = person.run(&["status"]);
    let dead = person.home.path().join("dead.sock");
    stale(&dead);
    stale(&person.home.path().join("run/api.sock"));
    lab(&person, &[&dead]);
    let stale = person.run(&["status"]);
    assert_eq!((none.code, stale.code), (5, 5));
    insta::assert_snapshot!(format!("{}{}", none.err, stale.err));
}

#[test]
fn saved_clusters_are_spoken_to_and_kept_private() {
    let person = Person::anybody();
    let pin = "ab".repeat(32);
    let add = ["context", "add", "prod", "--address", "127.0.0.1:1", "--fingerprint", &pin];
    let added = person.say("me.secret\n", &[&add[..], &["--token-stdin"]].concat());
    assert_eq!((added.code, added.err.as_str()), (0, ""));
    let config = person.home.path().join("config/haven");
    for file in ["contexts.yaml", "prod.token"] {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(config.join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    let unused = person.run(&["status"]);
    let chosen = person.run(&["--context", "prod", "status"]);
    let wrong = person.run(&["status", "--context", "tset"]);
    assert_eq!(person.run(&["context", "use", "prod"]).code, 0);
    let used = person.run(&["status"]);
    assert_eq!((unused.code, chosen.code, wrong.code, used.code), (5, 5, 3, 5));
    assert!(!unused.err.contains("127.0.0.1:1"), "{}", unused.err);
    assert_eq!(chosen.err, used.err);
    let list = person.run(&["context", "ls", "-o", "json"]);
    let said = format!("{}{}{}{}", added.out, used.err, wrong.err, list.out);
    insta::assert_snapshot!(said);
    assert_eq!(person.run(&["context", "rm", "prod"]).code, 0);
    assert!(!config.join("prod.token").exists());
}

#[test]
fn a_server_that_takes_the_connection_and_says_nothing_is_given_up() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let person = Person::anybody()
        .with("HAVEN_ADDRESS", &address)
        .with("HAVEN_FINGERPRINT", &"ab".repeat(32));
    let begin = std::time::Instant::now();
    let ended = person.run(&["status"]);
    assert!(begin.elapsed().as_secs() < 20);
    assert_eq!(ended.code, 5);
    insta::assert_snapshot!(ended.err.replace(&address, "HOST1"));
}

#[test]
fn half_an_address_and_bad_words_are_bad_input() {
    let person = Person::anybody().with("HAVEN_ADDRESS", "10.0.0.1:7443");
    let half = person.run(&["status"]);
    let person = Person::anybody();
    let kind = person.run(&["get", "machines"]);
    let name = person.run(&["vm", "show", "../tokens"]);
    let reference = person.run(&["explain", "web"]);
    let file = person.run(&["apply", "-f", "nowhere.yaml"]);
    let password =
        person.run(&["init", "--address", "10.0.0.1", "--power-password-file", "/nowhere/p"]);
    let disk = person.file("d.raw", "abc");
    let sum = person.run(&["image", "import", "x", &disk, "--checksum", &"0".repeat(64)]);
    let all = [half, kind, name, reference, file, password, sum];
    assert!(all.iter().all(|one| one.code == 2), "{all:?}");
    insta::assert_snapshot!(all.map(|one| one.err).join(""));
}
