//! `haven certificate …` against the real API.

use crate::{
    Person,
    real::{Api, transcript},
};
use haven_store::{
    certificate::Chain,
    testing::{Signed, Signer},
};

/// What differs from run to run has a word in its place.
fn masked(text: &str, signed: &[&Signed]) -> String {
    let mut text = text.to_owned();
    for (i, one) in signed.iter().enumerate() {
        let chain = Chain::read(&one.leaf).unwrap();
        let ends = jiff::Timestamp::from_millisecond(chain.facts().ends_ms).unwrap();
        let day = ends.strftime("%Y-%m-%d").to_string();
        text = text.replace(&chain.fingerprint(), &format!("FINGERPRINT{i}"));
        text = text.replace(&day, &format!("YEAR-MO-D{i}"));
        text = text.replace(one.leaf.trim_end(), &format!("LEAF{i}"));
        let indented = one.leaf.trim_end().replace('\n', "\n  ");
        text = text.replace(&indented, &format!("LEAF{i}"));
    }
    text
}

#[test]
fn certificates_are_added_replaced_listed_and_their_keys_never_shown() {
    let Some(api) = Api::start() else { return };
    let person = Person::at(&api.socket());
    let ca = Signer::new("Test authority");
    let (one, two) = (ca.sign("shop.test", 90), ca.sign("shop.test", 12));
    let ended = ca.sign("shop.test", -3);
    let file = |name: &str, text: &str| person.file(name, text);
    let (chain, key) = (file("chain.pem", &one.leaf), file("key.pem", &one.key));
    let (second, other) = (file("second.pem", &two.leaf), file("other.pem", &two.key));
    let (old, old_key) = (file("old.pem", &ended.leaf), file("old-key.pem", &ended.key));
    let add = |chain, key| ["certificate", "add", "shop", "--chain", chain, "--key", key];
    let web = "kind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\n\
               kind: Service\nname: web\nreplicas: 0\ntemplate: {spec: {memory: 64MiB, networks: [{network: front}]}}\n\
               frontend: {address: 10.0.0.100, port: 443, tls: {certificate: shop, minVersion: 1.3}}\n";
    let web = file("web.yaml", web);
    let text = transcript(
        &person,
        &[
            (&["apply", "-f", &web], "does not exist"),
            (&add(&chain, &other), "does not belong"),
            (&add(&old, &old_key), "ended"),
            (&add("/nowhere", &key), "cannot be read"),
            (&add(&chain, &key), "created"),
            (&["certificate", "ls"], "valid"),
            (&add(&chain, &key), "unchanged"),
            (&["apply", "-f", &web], "created"),
            (&["service", "ls", "-o", "wide"], "shop"),
            (&add(&second, &other), "changed"),
            (&["certificate", "ls"], "service/web"),
            (&["certificate", "show", "shop"], "used"),
            (&["certificate", "show", "shop", "-o", "yaml"], "kind"),
            (&["status"], "certificate shop"),
            (&["certificate", "rm", "shop"], "deleting"),
            (&["certificate", "ls"], "deleting"),
            (&["certificate", "show", "none"], "no certificate/none"),
        ],
    );
    for secret in [&one.key, &two.key, &ended.key] {
        let core = secret.lines().nth(1).unwrap();
        assert!(!text.contains(core) && !text.contains("sealed:"), "{text}");
    }
    insta::assert_snapshot!(masked(&text, &[&one, &two, &ended]));
}

#[test]
fn what_get_prints_of_a_certificate_is_what_apply_diff_and_edit_take() {
    let Some(api) = Api::start() else { return };
    let person = Person::at(&api.socket());
    let one = Signer::new("Test authority").sign("shop.test", 90);
    let (chain, key) = (person.file("chain.pem", &one.leaf), person.file("key.pem", &one.key));
    let add = person.run(&["certificate", "add", "shop", "--chain", &chain, "--key", &key]);
    assert_eq!((add.code, add.out.as_str()), (0, "certificate/shop created\n"), "{}", add.err);
    let shown =
        crate::real::until(&person, &["get", "certificate/shop", "-o", "yaml"], |e| e.code == 0);
    assert!(shown.out.ends_with("key: sealed\n"), "{}", shown.out);
    let manifest = person.file("shop.yaml", &shown.out);
    let same = person.run(&["diff", "-f", &manifest]);
    assert_eq!((same.code, same.out.as_str()), (0, ""), "{}", same.err);
    let labelled = person.file("more.yaml", &format!("labels: {{team: a}}\n{}", shown.out));
    let differs = person.run(&["diff", "-f", &labelled]);
    assert_eq!(differs.code, 1, "{}", differs.err);
    assert!(
        differs.out.contains("+  team: a") && !differs.out.contains("sealed:"),
        "{}",
        differs.out
    );
    // An editor sees no key, and what it leaves stays.
    let person = person.with("EDITOR", "sed -i 's/^name: shop/name: shop\\nlabels: {team: b}/'");
    let edited = person.run(&["edit", "certificate/shop"]);
    assert_eq!(
        (edited.code, edited.out.as_str()),
        (0, "certificate/shop changed\n"),
        "{}",
        edited.err
    );
    let again = person.run(&["certificate", "add", "shop", "--chain", &chain, "--key", &key]);
    assert_eq!(again.out, "certificate/shop unchanged\n", "its labels stay; {}", again.err);
}
