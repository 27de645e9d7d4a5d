//! Power control of a host on the command line, against the real API.

use crate::{Ended, Person, real::Api};

/// The whole of what a command said, once it ended as it should.
fn said(ended: &Ended, code: i32, words: &str) -> String {
    let text = format!("{}{}", ended.out, ended.err);
    assert_eq!(ended.code, code, "{text}");
    assert!(text.contains(words), "`{words}` is not in:\n{text}");
    assert!(!text.contains("hush") && !text.contains("sealed:v1"), "{text}");
    text
}

#[test]
fn a_password_is_never_shown_and_what_get_prints_can_be_applied() {
    let Some(api) = Api::start() else { return };
    let person = Person::at(&api.socket());
    let host = |name: &str, power: &str| {
        let head = "kind: Host\nname: host1\naddress: 10.0.0.1\nreservedMemory: 512MiB\npower:\n";
        person.file(name, &format!("{head}{power}"))
    };
    let agent = |address: &str, password: &str, option: &str| {
        format!(
            "  driver: agent\n  agent: fence_ipmilan\n  address: {address}\n  user: haven\n  \
             password: {password}\n  options:\n    {option}\n"
        )
    };
    let apply = |file: &str, code: i32, words: &str| {
        said(&person.run(&["apply", "-f", file]), code, words);
    };
    let test = |code: i32, words: &str| {
        said(&person.run(&["host", "fence", "test", "host1"]), code, words);
    };
    test(4, "nothing controls the power of host1");
    said(&person.run(&["host", "fence", "test", "host9"]), 3, "no host/host9");
    let unverified = host("tls.yaml", "  url: https://10.0.0.9\n  password: hushed\n");
    let ended = person.run(&["apply", "-f", &unverified]);
    assert_eq!(ended.code, 2, "{}", ended.err);
    assert!(ended.err.contains("how the controller's certificate is verified"), "{}", ended.err);
    let program = host("program.yaml", &agent("10.0.0.9", "hush", "ipmitool_path: /bin/sh"));
    apply(&program, 2, "as root of the hosts");
    let first = host("first.yaml", &agent("10.0.0.9", "hush", "lanplus: '1'"));
    apply(&first, 0, "host/host1               changed");
    apply(&first, 0, "host/host1               unchanged");
    let elsewhere = host("elsewhere.yaml", &agent("10.0.0.66", "sealed", "lanplus: '1'"));
    apply(&elsewhere, 2, "does not go elsewhere");
    let printed = person.run(&["get", "host/host1", "-o", "yaml"]);
    let printed = person.file("printed.yaml", &said(&printed, 0, "password: sealed"));
    assert_eq!(said(&person.run(&["diff", "-f", &printed]), 0, ""), "");
    apply(&printed, 0, "host/host1               unchanged");
    test(4, "no other host");
}
