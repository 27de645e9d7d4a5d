//! A store that ran full, and what a member says of itself.

use crate::etcd::Etcd;
use haven_store::{
    raw::{EtcdStore, Op, StoreConfig, StoreError},
    upkeep::Upkeep,
};

#[tokio::test]
async fn a_full_store_takes_writes_again_once_old_revisions_are_forgotten() {
    let Some(etcd) = Etcd::limited("room", 8 << 20) else {
        println!("skipped: needs etcd");
        return;
    };
    let url = etcd.url();
    let config = StoreConfig { endpoints: vec![url.clone()], tls: None };
    let store = EtcdStore::connect(config).await.unwrap();
    let write = || store.txn(vec![], vec![Op::Put("one".into(), vec![7; 256 << 10].into())]);
    let mut revision = 0;
    let refused = loop {
        match write().await {
            Ok(outcome) => revision = outcome.revision,
            Err(error) => break error,
        }
        assert!(revision < 1000, "the quota is never reached");
    };
    assert!(matches!(refused, StoreError::Refused { .. }), "{refused}");
    let state = store.state_of(&url).await.unwrap().unwrap();
    assert!(state.full && state.leads && !state.corrupt, "{state:?}");
    store.make_room(revision - 1).await.unwrap();
    write().await.unwrap();
    let state = store.state_of(&url).await.unwrap().unwrap();
    assert!(!state.full && state.used < 4 << 20, "{state:?}");
    assert!(!store.nearly_full());
    assert_eq!(store.state_of("http://127.0.0.1:1").await.unwrap(), None);
}

#[tokio::test]
async fn old_revisions_are_forgotten_by_themselves_and_their_room_is_given_back() {
    let Some(etcd) = Etcd::start("upkeep") else {
        println!("skipped: needs etcd");
        return;
    };
    let url = etcd.url();
    let config = StoreConfig { endpoints: vec![url.clone()], tls: None };
    let store = EtcdStore::connect(config).await.unwrap();
    let mut client = etcd_client::Client::connect([url], None).await.unwrap();
    let write = async |times: usize| {
        let mut revision = 0;
        for _ in 0..times {
            let op = vec![Op::Put("one".into(), vec![7; 64 << 10].into())];
            revision = store.txn(vec![], op).await.unwrap().revision;
        }
        revision
    };
    let mut upkeep = Upkeep::new(50, 1 << 20);
    let young = write(40).await;
    assert!(!upkeep.run(&store, young).await.unwrap(), "nothing is too old yet");
    let newest = write(200).await;
    let before = client.status().await.unwrap().db_size();
    assert!(upkeep.run(&store, newest).await.unwrap());
    assert!(!upkeep.run(&store, newest).await.unwrap(), "once is enough");
    let mut read = async |revision: i64| {
        let at = etcd_client::GetOptions::new().with_revision(revision);
        client.get("one", Some(at)).await.map_err(|error| error.to_string())
    };
    let gone = read(newest - 51).await.unwrap_err();
    assert!(gone.contains("compacted"), "{gone}");
    assert_eq!(read(newest - 50).await.unwrap().kvs().len(), 1, "the newest 50 can be read");
    // The room comes back with one of the next rounds.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while client.status().await.unwrap().db_size() > before / 2 {
        assert!(std::time::Instant::now() < until, "the file stays at {before} bytes");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        let newest = write(10).await;
        upkeep.run(&store, newest).await.unwrap();
    }
}

#[tokio::test]
async fn a_member_that_hangs_or_is_gone_says_nothing_of_itself() {
    let Some(mut etcd) = Etcd::start("silent") else {
        println!("skipped: needs etcd");
        return;
    };
    let url = etcd.url();
    let config = StoreConfig { endpoints: vec![url.clone()], tls: None };
    let store = EtcdStore::connect(config).await.unwrap();
    assert!(store.state_of(&url).await.unwrap().is_some());
    etcd.pause();
    assert!(store.state_of(&url).await.is_err());
    etcd.resume();
    assert!(store.state_of(&url).await.unwrap().is_some());
    etcd.child.kill().unwrap();
    etcd.child.wait().unwrap();
    assert!(store.state_of(&url).await.is_err());
}
