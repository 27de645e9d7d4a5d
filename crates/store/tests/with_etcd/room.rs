//! A store that ran full, and what a member says of itself.

use crate::etcd::Etcd;
use haven_store::raw::{EtcdStore, Op, StoreConfig, StoreError};

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
async fn a_member_that_hangs_or_is_gone_says_nothing_of_itself() {
    let Some(mut etcd) = Etcd::start("silent") else {
        println!("skipped: needs etcd");
        return;
    };
    let url = etcd.url();
    let config = StoreConfig { endpoints: vec![url.clone()], tls: None };
    let store = EtcdStore::connect(config).await.unwrap();
    assert!(store.state_of(&url).await.unwrap().is_some());
    let pid = nix::unistd::Pid::from_raw(etcd.child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    assert!(store.state_of(&url).await.is_err());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    assert!(store.state_of(&url).await.unwrap().is_some());
    etcd.child.kill().unwrap();
    etcd.child.wait().unwrap();
    assert!(store.state_of(&url).await.is_err());
}
