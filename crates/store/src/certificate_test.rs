//! Tests of [`super::certificate`].

use super::{
    certificate::{CertificateError, Chain, Key},
    seal::Plain,
    testing::{Signed, Signer},
};

fn key(text: &str) -> Result<Key, CertificateError> {
    Key::read(&Plain::new(text.into()))
}

#[test]
fn a_chain_says_whose_it_is_and_until_when() {
    let ca = Signer::new("Test authority");
    let Signed { leaf, key: secret } = ca.sign("shop.test", 90);
    let chain =
        Chain::read(&format!("whatever stands before\n{leaf}\n{}", ca.certificate)).unwrap();
    let facts = chain.facts();
    assert_eq!((facts.subject.as_str(), facts.issuer.as_str()), ("shop.test", "Test authority"));
    assert_eq!(facts.names, ["shop.test", "127.0.0.1"]);
    assert_eq!((facts.ends_ms - facts.begins_ms) / 86_400_000, 490);
    key(&secret).unwrap().belongs_to(&chain).unwrap();
    // What is written for the balancer is the same, without the words around it.
    let again = Chain::read(&chain.pem()).unwrap();
    assert_eq!((again.fingerprint(), again.pem()), (chain.fingerprint(), chain.pem()));
    assert!(chain.pem().starts_with("-----BEGIN CERTIFICATE-----\n"));
    let kept = key(&secret).unwrap().pem();
    assert!(key(kept.expose()).unwrap() == key(&secret).unwrap());
    assert_ne!(Chain::read(&leaf).unwrap().fingerprint(), chain.fingerprint());
}

#[test]
fn what_is_wrong_with_a_chain_is_said() {
    let (ca, other) = (Signer::new("Test authority"), Signer::new("Another"));
    let Signed { leaf, key: secret } = ca.sign("shop.test", 90);
    let wrong = |text: &str| Chain::read(text).unwrap_err();
    assert_eq!(wrong("nothing"), CertificateError::NoCertificate);
    assert_eq!(wrong(&format!("{leaf}{secret}")), CertificateError::KeyInChain);
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    assert!(matches!(
        wrong(&format!("{leaf}{broken}")),
        CertificateError::Unreadable { number: 2, .. }
    ));
    let cut = leaf.replace("-----END CERTIFICATE-----", "");
    assert!(matches!(wrong(&cut), CertificateError::Unreadable { number: 1, .. }));
    assert_eq!(
        wrong(&format!("{}{leaf}", ca.certificate)).to_string(),
        "the chain is not in order: certificate 1 (`Test authority`) is signed by `Test authority`, and the next is `shop.test`"
    );
    assert!(matches!(
        wrong(&format!("{leaf}{}", other.certificate)),
        CertificateError::Order { number: 1, .. }
    ));
}

#[test]
fn what_is_wrong_with_a_key_is_said() {
    let ca = Signer::new("Test authority");
    let Signed { leaf, key: secret } = ca.sign("shop.test", 90);
    let other = ca.sign("shop.test", 90).key;
    let chain = Chain::read(&leaf).unwrap();
    let wrong = |text: &str| key(text).err();
    assert_eq!(wrong(&leaf), Some(CertificateError::NoKey));
    assert_eq!(wrong("sealed:v1:AAAA"), Some(CertificateError::NoKey));
    let encrypted = secret.replace("PRIVATE", "ENCRYPTED PRIVATE");
    assert_eq!(wrong(&encrypted), Some(CertificateError::Passphrase));
    assert_eq!(
        key(&other).unwrap().belongs_to(&chain),
        Err(CertificateError::OtherKey { subject: "shop.test".into() })
    );
    let garbage = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    let unusable = key(garbage).unwrap().belongs_to(&chain);
    assert!(matches!(unusable, Err(CertificateError::UnusableKey { .. })));
}
