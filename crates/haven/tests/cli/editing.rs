//! `haven edit`: what was typed is never lost, and never written over somebody else's change.

use crate::{
    Person,
    fake::{Fake, no, ok, vm},
};
use std::{os::unix::fs::PermissionsExt, path::PathBuf};

/// What is left of drafts.
fn drafts(person: &Person) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(person.home.path()).unwrap().flatten();
    let drafts =
        entries.map(|e| e.path()).filter(|p| p.display().to_string().contains("haven-edit"));
    drafts.collect()
}

/// The kept path is random; the rest of the words is not.
fn steady(text: &str) -> String {
    let words = text.split_inclusive(' ');
    words
        .map(|word| match word.find("haven-edit-") {
            Some(at) => {
                let rest = word[at..].split_once(".yaml").unwrap().1;
                format!("{}haven-edit-RANDOM.yaml{rest}", &word[..at])
            }
            None => word.to_owned(),
        })
        .collect()
}

#[test]
fn an_editor_that_changes_nothing_writes_nothing() {
    let fake = Fake::new(|_, _| ok(&vm(42, 1)));
    let person = Person::at(&fake.socket);
    let ended = person.run(&["edit", "vm/web"]);
    assert_eq!((ended.code, ended.out.as_str()), (0, "vm/web unchanged\n"));
    assert_eq!(fake.lines(), ["GET /v1/objects/vm/web"]);
    assert!(drafts(&person).is_empty());
}

#[test]
fn a_change_goes_with_the_version_that_was_read() {
    let fake = Fake::new(|_, _| ok(&vm(42, 2)));
    let person = Person::at(&fake.socket).with("EDITOR", "sed -i 's/cpus: 2/cpus: 4/'");
    let ended = person.run(&["edit", "vm/web"]);
    assert_eq!((ended.code, ended.out.as_str()), (0, "vm/web changed\n"), "{}", ended.err);
    let asked = fake.asked.lock().unwrap();
    assert_eq!(asked[1].line(), "PUT /v1/objects/vm/web");
    assert_eq!(asked[1].body["resourceVersion"], 42);
    assert_eq!(asked[1].body["spec"]["cpus"], 4);
    assert!(drafts(&person).is_empty());
}

#[test]
fn over_somebody_elses_change_both_are_shown_and_the_text_is_kept() {
    let fake = Fake::new(|asked, before| match (asked.method.as_str(), before) {
        ("PUT", _) => no(409, "vm/web was changed meanwhile: you saw version 42, it is at 50", ""),
        (_, 0) => ok(&vm(42, 1)),
        _ => ok(&vm(50, 8)),
    });
    let person = Person::at(&fake.socket).with("EDITOR", "sed -i 's/128MiB/256MiB/'");
    let ended = person.run(&["edit", "vm/web"]);
    assert_eq!(ended.code, 4);
    let left = drafts(&person);
    assert_eq!(left.len(), 1);
    assert!(ended.err.contains(left[0].file_name().unwrap().to_str().unwrap()), "{}", ended.err);
    assert_eq!(std::fs::metadata(&left[0]).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(std::fs::read_to_string(&left[0]).unwrap().contains("memory: 256MiB"));
    insta::assert_snapshot!(steady(&ended.err));
}

#[test]
fn a_text_that_cannot_be_read_is_kept_and_shown_with_its_place() {
    let fake = Fake::new(|_, _| ok(&vm(42, 1)));
    let person = Person::at(&fake.socket).with("EDITOR", "sed -i 's/128MiB/much/'");
    let ended = person.run(&["edit", "vm/web"]);
    assert_eq!(ended.code, 2, "{}", ended.err);
    assert_eq!(fake.lines(), ["GET /v1/objects/vm/web"]);
    assert_eq!(drafts(&person).len(), 1);
    insta::assert_snapshot!(steady(&ended.err));
}

#[test]
fn another_name_and_a_broken_editor_are_refused() {
    let fake = Fake::new(|_, _| ok(&vm(42, 1)));
    let other = Person::at(&fake.socket).with("EDITOR", "sed -i 's/name: web/name: wob/'");
    let broken = Person::at(&fake.socket).with("EDITOR", "false");
    let (other, broken) = (other.run(&["edit", "vm/web"]), broken.run(&["edit", "vm/web"]));
    assert_eq!((other.code, broken.code), (2, 2));
    insta::assert_snapshot!(steady(&format!("{}{}", other.err, broken.err)));
    assert!(fake.lines().iter().all(|line| line.starts_with("GET")));
}

fn cluster(version: i64) -> serde_json::Value {
    let spec = haven_model::ClusterSpec::default();
    serde_json::json!({"resourceVersion": version, "spec": spec})
}

#[test]
fn the_clusters_own_spec_is_shown_and_edited_like_an_object() {
    let fake = Fake::new(|_, _| ok(&cluster(42)));
    let person = Person::at(&fake.socket).with("EDITOR", "sed -i 's/voters: 3/voters: 5/'");
    let shown = person.run(&["get", "cluster", "-o", "yaml"]);
    assert!(shown.out.contains("lease: 5s") && shown.out.contains("voters: 3"), "{}", shown.out);
    let ended = person.run(&["edit", "cluster"]);
    assert_eq!((ended.code, ended.out.as_str()), (0, "cluster changed\n"), "{}", ended.err);
    let asked = fake.asked.lock().unwrap();
    assert_eq!(asked[2].line(), "PUT /v1/cluster");
    assert_eq!(asked[2].body["resourceVersion"], 42);
    assert_eq!(asked[2].body["spec"]["voters"], 5);
    assert!(drafts(&person).is_empty());
}

#[test]
fn a_clusters_spec_that_is_refused_is_kept_and_goes_out_again_from_where_it_lies() {
    let fake = Fake::new(|asked, before| match (asked.method.as_str(), before) {
        ("PUT", 0) => no(422, "guard (4400ms) + margin (400ms) must not exceed lease (4s)", ""),
        _ => ok(&cluster(42)),
    });
    let person = Person::at(&fake.socket).with("EDITOR", "sed -i 's/lease: 5s/lease: 4s/'");
    let ended = person.run(&["edit", "cluster"]);
    assert_eq!(ended.code, 2, "{}", ended.err);
    assert!(ended.err.contains("must not exceed lease"), "{}", ended.err);
    let kept = drafts(&person).pop().unwrap();
    let again = format!("cp {}", kept.display());
    let file = kept.file_name().unwrap().display();
    let way = format!("EDITOR='cp HOME/{file}' haven edit cluster");
    assert!(ended.err.contains(&way), "{}", ended.err);
    let person = person.with("EDITOR", &again);
    let ended = person.run(&["edit", "cluster"]);
    assert_eq!((ended.code, ended.out.as_str()), (0, "cluster changed\n"), "{}", ended.err);
    let asked = fake.asked.lock().unwrap();
    assert_eq!(asked.last().unwrap().body["spec"]["timers"]["lease"], "4s");
}
