//! Tests of [`super::retention`].

use super::retention::keep_newest;
use haven_store::{
    memory::{Direct, MemoryEtcd},
    raw::{EtcdStore, Op},
};
use std::sync::Arc;

#[tokio::test]
async fn the_newest_are_kept_and_neighbours_are_left_alone() {
    let etcd = MemoryEtcd::default();
    let store = EtcdStore::over(etcd.channel(Arc::new(Direct))).await.unwrap();
    let put = |key: String| Op::Put(key, "x".into());
    let mut ops: Vec<Op> = (0..30).map(|i| put(format!("/haven/events/{i:04}"))).collect();
    ops.push(put("/haven/event".into()));
    ops.push(put("/haven/manager".into()));
    store.txn(vec![], ops).await.unwrap();
    keep_newest(&store, "/haven/events/", 10).await.unwrap();
    let left: Vec<String> = etcd.peek_all("/haven/").into_iter().map(|(key, ..)| key).collect();
    let mut expected: Vec<String> = (20..30).map(|i| format!("/haven/events/{i:04}")).collect();
    expected.insert(0, "/haven/event".into());
    expected.push("/haven/manager".into());
    assert_eq!(left, expected);
    let revision = etcd.revision();
    keep_newest(&store, "/haven/events/", 10).await.unwrap();
    assert_eq!(etcd.revision(), revision, "nothing to do costs nothing");
}
