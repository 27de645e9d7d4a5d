//! The live copy over a real cluster of three members: a compaction, a frozen member, the loss of the leader.

use crate::etcd::Etcd;
use etcd_client::Client;
use haven_store::{
    clock::Clock,
    live::{Fold, LiveConfig, LiveCopy},
    raw::{EtcdStore, Op, StoreConfig},
};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

#[derive(Clone, Debug, Default)]
struct Copy {
    keys: BTreeMap<String, String>,
    revision: i64,
}

impl Fold for Copy {
    fn apply(&mut self, key: &str, value: Option<(&[u8], i64)>) -> bool {
        match value {
            Some((value, _)) => {
                self.keys.insert(key.into(), String::from_utf8_lossy(value).into_owned())
            }
            None => self.keys.remove(key),
        };
        true
    }
    fn set_revision(&mut self, revision: i64) {
        self.revision = revision;
    }
}

/// Writes a key that nothing else writes: a write of unknown outcome is sent again, and the first may still come.
async fn write(store: &EtcdStore, key: &str, value: &str) {
    let until = Instant::now() + Duration::from_secs(10);
    let op = || vec![Op::Put(key.into(), value.as_bytes().to_vec().into())];
    while let Err(error) = store.txn(vec![], op()).await {
        assert!(Instant::now() < until, "no write in 10 s: {error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn shows(live: &LiveCopy<Copy>, key: &str, value: &str) -> Duration {
    let begin = Instant::now();
    let mut state = live.state();
    let wanted = |copy: &Arc<Copy>| copy.keys.get(key).is_some_and(|v| v == value);
    let shown = tokio::time::timeout(Duration::from_secs(10), state.wait_for(wanted)).await;
    assert!(shown.is_ok(), "the live copy does not show {key}={value} within 10 s");
    begin.elapsed()
}

async fn leader_of(members: &[Etcd]) -> usize {
    for (i, member) in members.iter().enumerate() {
        let mut client = Client::connect([member.url()], None).await.expect("a client");
        if let Ok(status) = client.status().await
            && status.header().map(etcd_client::ResponseHeader::member_id) == Some(status.leader())
        {
            return i;
        }
    }
    panic!("three live members have a leader");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_live_copy_survives_compaction_a_frozen_member_and_the_loss_of_the_leader() {
    let Some(mut members) = Etcd::cluster("live", 3) else {
        println!("skipped: needs etcd, the package etcd-server");
        return;
    };
    let leader = leader_of(&members).await;
    members.rotate_left(leader);
    // The copy uses the leader first, the writer the others.
    let urls: Vec<String> = members.iter().map(Etcd::url).collect();
    let connect = async |endpoints: &[String]| {
        let config = StoreConfig { endpoints: endpoints.to_vec(), tls: None };
        EtcdStore::connect(config).await.expect("a client")
    };
    let (reader, writer) = (connect(&urls).await, connect(&urls[1..]).await);
    let cancel = CancellationToken::new();
    let config = LiveConfig { prefix: "/live/".into(), observed: vec!["/live/l".into()] };
    let live: LiveCopy<Copy> = LiveCopy::spawn(reader, config, Clock::real(), cancel.clone());
    write(&writer, "/live/1", "x").await;
    shows(&live, "/live/1", "x").await;

    write(&writer, "/live/2", "x").await;
    shows(&live, "/live/2", "x").await;

    // What its watch would have brought is gone from the store: only a list tells it, also what was deleted.
    members[0].pause();
    write(&writer, "/live/0", "x").await;
    writer.txn(vec![], vec![Op::Delete("/live/2".into())]).await.expect("deleted");
    write(&writer, "/live/3", "x").await;
    let head = writer.all("/live/").await.expect("a read").revision;
    writer.compact(head).await.expect("compacted");
    println!("with its member frozen (the leader): {:?}", shows(&live, "/live/3", "x").await);
    let copy = Arc::clone(&live.state().borrow());
    assert_eq!(copy.keys.keys().collect::<Vec<_>>(), ["/live/0", "/live/1", "/live/3"]);
    assert!(copy.revision >= head);
    members[0].resume();
    write(&writer, "/live/4", "x").await;
    shows(&live, "/live/4", "x").await;

    let leader = leader_of(&members).await;
    members[leader].child.kill().expect("etcd is this test's child");
    write(&writer, "/live/5", "x").await;
    println!("with the leader killed: {:?}", shows(&live, "/live/5", "x").await);
    let there = writer.all("/live/").await.expect("a read").kvs;
    let there: Vec<String> = there.into_iter().map(|kv| kv.key).collect();
    assert_eq!(there.len(), 5);
    assert_eq!(live.state().borrow().keys.keys().cloned().collect::<Vec<_>>(), there);
    cancel.cancel();
}
