//! Tests of [`super::certificate`].

use super::{certificate::Renewal, setup::HostFile};
use haven_host::agent::Problems;
use haven_store::{
    certificate::Chain,
    pki::{self, Authority, Current, PkiDir},
    raw::{EtcdStore, Identity, StoreConfig},
};
use std::{sync::Arc, time::Duration};

const DAY_MS: i64 = 86_400_000;

/// A host whose certificate is good for so long from now.
async fn host(directory: &std::path::Path, life: Duration) -> Renewal {
    let pki = PkiDir(directory.join("pki"));
    let authority = Authority::create("test").unwrap();
    let (key, request) = pki::request("host1").unwrap();
    let address = [127, 0, 0, 1].into();
    let certificate = authority.sign_for(&request, "host1", &[address], life).unwrap();
    let identity = Identity { ca: authority.certificate.clone(), certificate, key };
    pki.save(&identity, Some(&authority.key)).unwrap();
    let host = HostFile {
        name: "host1".parse().unwrap(),
        address: [127, 0, 0, 1].into(),
        cluster: None,
        power: None,
        witness: false,
        heartbeat: "00".repeat(32),
        voters: Vec::new(),
        initial_cluster: None,
    };
    // Nobody is there; nothing is asked.
    let endpoints = vec!["https://127.0.0.1:1".to_owned()];
    let config = StoreConfig { endpoints, tls: Some(identity.clone()) };
    let store = EtcdStore::connect(config).await.unwrap();
    let (current, in_use) = (Current::new(&identity).unwrap(), identity.certificate);
    Renewal { pki, host, current, in_use, store, problems: Arc::new(Problems::default()) }
}

fn ends_ms(renewal: &Renewal) -> i64 {
    Chain::read(&renewal.pki.load().unwrap().certificate).unwrap().facts().ends_ms
}

#[tokio::test]
async fn a_failed_renewal_is_told_until_one_works() {
    let directory = tempfile::tempdir().unwrap();
    let mut renewal = host(directory.path(), Duration::from_secs(600)).await;
    let now = super::wall_ms();
    let key = std::fs::read_to_string(renewal.pki.ca_key()).unwrap();
    std::fs::remove_file(renewal.pki.ca_key()).unwrap();
    renewal.look(now).await;
    let told = renewal.problems.list();
    assert!(told[0].starts_with("certificate of this host: it cannot be renewed: "), "{told:?}");
    assert!(ends_ms(&renewal) < now + DAY_MS, "the old one stays");
    std::fs::write(renewal.pki.ca_key(), key).unwrap();
    renewal.look(now).await;
    assert!(ends_ms(&renewal) > now + 820 * DAY_MS);
    assert_eq!(renewal.problems.list(), [""; 0]);
    assert_eq!(renewal.in_use, renewal.pki.load().unwrap().certificate);
    let before = ends_ms(&renewal);
    renewal.look(now + 500 * DAY_MS).await;
    assert_eq!(ends_ms(&renewal), before, "more than a third is left");
    renewal.look(now + 560 * DAY_MS).await;
    assert!(ends_ms(&renewal) >= before && renewal.problems.list().is_empty());
}
