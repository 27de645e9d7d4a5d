//! The same cases against the in-process etcd and against a real one, so that the two can be trusted to agree. Every
//! case runs through Haven's own store client. Each returns what it saw; both must see the same, and what is right.

use crate::etcd::Etcd;
use etcd_client::{Client, CompactionOptions, ConnectOptions, EventType, WatchOptions};
use haven_store::{
    memory::{Direct, MemoryEtcd},
    raw::{Compare, EtcdStore, Op, StoreConfig, StoreError},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{sync::Arc, time::Duration};

/// One store under test: through Haven's client, and through etcd-client's own.
struct Under {
    name: &'static str,
    store: EtcdStore,
    raw: Client,
}

impl Under {
    async fn memory() -> Self {
        let etcd = MemoryEtcd::default();
        let path = || etcd.channel(Arc::new(Direct));
        let options = Some(ConnectOptions::new().with_require_leader(true));
        Self {
            name: "in-process",
            store: EtcdStore::over(path()).await.expect("a client"),
            raw: Client::from_channel(path(), options).await.expect("a client"),
        }
    }

    async fn real(etcd: &Etcd) -> Self {
        let endpoints = vec![etcd.url()];
        Self {
            name: "real",
            store: EtcdStore::connect(StoreConfig { endpoints, tls: None })
                .await
                .expect("a client"),
            raw: Client::connect([etcd.url()], None).await.expect("a client"),
        }
    }

    async fn revision(&self) -> i64 {
        self.store.range("/nothing/", None, 1, 0).await.expect("a read").revision
    }

    async fn put(&self, key: &str, value: &str) -> i64 {
        let outcome = self.store.txn(vec![], vec![put(key, value)]).await.expect("a write");
        outcome.revision
    }
}

fn put(key: &str, value: &str) -> Op {
    Op::Put(key.into(), value.as_bytes().to_vec().into())
}

/// What was seen, with revisions counted from the case's beginning.
type Seen = Vec<String>;

async fn versions(under: &Under) -> Seen {
    let mut seen = Vec::new();
    let base = under.revision().await;
    for value in ["a", "b", "c"] {
        under.put("/versions/k", value).await;
    }
    for again in [false, true] {
        let kv = under.store.get("/versions/k").await.expect("a read").expect("it is there");
        seen.push(format!(
            "{:?} created {} written {} version {}",
            kv.value,
            kv.create_revision - base,
            kv.mod_revision - base,
            kv.version
        ));
        if !again {
            let ops = vec![Op::DeletePrefix("/versions/".into())];
            under.store.txn(vec![], ops).await.expect("a delete");
            assert_eq!(under.store.get("/versions/k").await.expect("a read"), None);
            under.put("/versions/k", "d").await;
        }
    }
    assert!(seen[0].contains("created 1 written 3 version 3"), "{seen:?}");
    assert!(seen[1].contains("created 5 written 5 version 1"), "{seen:?}");
    seen
}

async fn comparisons(under: &Under) -> Seen {
    let written = under.put("/compare/k", "v").await;
    let key = || "/compare/k".to_owned();
    let cases = [
        (Compare::ModRevision(key(), written), true),
        (Compare::ModRevision(key(), written - 1), false),
        (Compare::ModRevision(key(), written + 1), false),
        (Compare::Absent(key()), false),
        (Compare::Absent("/compare/none".into()), true),
        (Compare::ModRevision("/compare/none".into(), 0), true),
        (Compare::Value(key(), "v".into()), true),
        (Compare::Value(key(), "w".into()), false),
        (Compare::Value("/compare/none".into(), "".into()), false),
    ];
    let mut seen = Vec::new();
    for (compare, holds) in cases {
        let before = under.revision().await;
        let ops = vec![put("/compare/out", "1"), Op::Delete("/compare/out2".into())];
        let outcome = under.store.txn(vec![compare.clone()], ops).await.expect("a transaction");
        assert_eq!(outcome.succeeded, holds, "{compare:?} against {}", under.name);
        let after = under.revision().await;
        assert_eq!(outcome.revision, after, "the answer carries the revision after it");
        seen.push(format!("{holds} {}", after - before));
    }
    let both = vec![Compare::Absent("/compare/none".into()), Compare::Absent(key())];
    let outcome =
        under.store.txn(both, vec![put("/compare/no", "1")]).await.expect("a transaction");
    assert!(!outcome.succeeded, "all comparisons must hold");
    assert_eq!(under.store.get("/compare/no").await.expect("a read"), None);
    seen
}

async fn what_writes_nothing_costs_no_revision(under: &Under) -> Seen {
    let before = under.revision().await;
    let none = vec![Op::Delete("/void/none".into()), Op::DeletePrefix("/void/".into())];
    let outcome = under.store.txn(vec![], none).await.expect("a transaction");
    assert!(outcome.succeeded);
    assert_eq!(under.revision().await, before);
    let two = vec![put("/void/a", "1"), put("/void/b", "2")];
    under.store.txn(vec![], two).await.expect("a transaction");
    assert_eq!(under.revision().await, before + 1, "one transaction is one revision");
    vec![]
}

async fn refusals(under: &Under) -> Seen {
    let twice = vec![put("/refuse/k", "1"), put("/refuse/k", "2")];
    let error = under.store.txn(vec![], twice).await.expect_err("one key twice");
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    let covered = vec![put("/refuse/k", "1"), Op::DeletePrefix("/refuse/".into())];
    let error = under.store.txn(vec![], covered).await.expect_err("a key and its prefix");
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    let many = (0..129).map(|i| put(&format!("/refuse/{i}"), "1")).collect();
    let error = under.store.txn(vec![], many).await.expect_err("too many operations");
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    assert_eq!(under.store.get("/refuse/k").await.expect("a read"), None, "nothing was done");
    vec![]
}

async fn pages(under: &Under) -> Seen {
    for i in 0..7 {
        under.put(&format!("/pages/{i}"), "x").await;
    }
    under.put("/pages0", "not under the prefix").await;
    let first = under.store.range("/pages/", None, 3, 0).await.expect("a page");
    under.put("/pages/35", "later").await;
    let mut seen: Seen = first.kvs.iter().map(|kv| kv.key.clone()).collect();
    assert!(first.more);
    let (mut after, mut more) = (first.kvs.last().expect("a key").key.clone(), true);
    while more {
        let page = under.store.range("/pages/", Some(&after), 3, first.revision).await;
        let page = page.expect("a page of the past");
        seen.extend(page.kvs.iter().map(|kv| kv.key.clone()));
        more = page.more;
        after = page.kvs.last().expect("a key").key.clone();
    }
    assert_eq!(seen, (0..7).map(|i| format!("/pages/{i}")).collect::<Vec<_>>());
    let last = under.store.last("/pages/", None, 2).await.expect("the last").kvs;
    seen.extend(last.iter().map(|kv| kv.key.clone()));
    assert!(seen.ends_with(&["/pages/6".into(), "/pages/5".into()]), "{seen:?}");
    // Further back, to the first; what lies beside the prefix is none of it.
    under.put("/pagea", "beside").await;
    let older = under.store.last("/pages/", Some("/pages/2"), 9).await.expect("the first");
    seen.extend(older.kvs.iter().map(|kv| kv.key.clone()));
    assert!(seen.ends_with(&["/pages/1".into(), "/pages/0".into()]) && !older.more, "{seen:?}");
    let keys = ["/pages/1".to_owned(), "/pages/none".to_owned(), "/pages/35".to_owned()];
    let many = under.store.get_many(&keys).await.expect("several");
    assert_eq!(many.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true]);
    seen
}

/// A list that is larger than gRPC's own limit of 4 MiB comes whole.
async fn long_lists(under: &Under) -> Seen {
    let value = "x".repeat(30_000);
    for i in 0..300 {
        under.put(&format!("/long/{i:03}"), &value).await;
    }
    let all = under.store.all("/long/").await.expect("all of it").kvs;
    assert_eq!(all.len(), 300);
    let range = vec![Op::DeleteRange("/long/".into(), "/long/299".into())];
    under.store.txn(vec![], range).await.expect("a range deleted");
    let left = under.store.all("/long/").await.expect("what is left").kvs;
    left.into_iter().map(|kv| kv.key).collect()
}

async fn watching(under: &Under) -> Seen {
    let base = under.revision().await;
    under.put("/watch/a", "1").await;
    let mut client = under.raw.clone();
    let options = WatchOptions::new().with_prefix().with_start_revision(base + 1);
    let mut stream = client.watch("/watch/", Some(options)).await.expect("a watch");
    under.put("/watched", "not under the prefix").await;
    let three = vec![put("/watch/b", "2"), put("/watch/c", "3"), Op::Delete("/watch/a".into())];
    under.store.txn(vec![], three).await.expect("a transaction");
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let message = tokio::time::timeout(Duration::from_secs(5), stream.message()).await;
        let message = message.expect("in time").expect("no error").expect("not ended");
        let header = message.header().map_or(0, etcd_client::ResponseHeader::revision) - base;
        let mut batch: Vec<String> = Vec::new();
        for event in message.events() {
            let kv = event.kv().expect("a key");
            let what = if event.event_type() == EventType::Put { "put" } else { "delete" };
            let key = kv.key_str().expect("text");
            let at = kv.mod_revision() - base;
            batch.push(format!(
                "{what} {key} v{} c{} @{at}",
                kv.version(),
                kv.create_revision().max(base) - base
            ));
        }
        assert!(batch.is_empty() || header >= 1, "a batch carries a revision");
        // One transaction comes whole; how many transactions come at once is not promised.
        seen.extend(batch);
    }
    assert_eq!(seen[0], "put /watch/a v1 c1 @1");
    assert!(seen.contains(&"delete /watch/a v0 c0 @3".to_owned()), "{seen:?}");
    stream.request_progress().await.expect("asked");
    let message = tokio::time::timeout(Duration::from_secs(5), stream.message()).await;
    let message = message.expect("in time").expect("no error").expect("not ended");
    assert!(message.events().is_empty() && !message.canceled(), "an answer about progress");
    assert!(message.header().expect("a header").revision() >= base + 3);
    seen
}

async fn compaction(under: &Under) -> Seen {
    let old = under.put("/compact/k", "1").await;
    under.put("/compact/k", "2").await;
    under.put("/compact/gone", "2").await;
    under.store.txn(vec![], vec![Op::Delete("/compact/gone".into())]).await.expect("a delete");
    let now = under.revision().await;
    let mut client = under.raw.clone();
    client.compact(now, Some(CompactionOptions::new().with_physical())).await.expect("compacted");
    let error = under.store.range("/compact/", None, 10, old).await.expect_err("the past is gone");
    assert!(matches!(error, StoreError::Compacted), "{error:?}");
    let page = under.store.range("/compact/", None, 10, now).await.expect("the present is there");
    assert_eq!(page.kvs.len(), 1);
    let options = WatchOptions::new().with_prefix().with_start_revision(old);
    let mut stream = client.watch("/compact/", Some(options)).await.expect("a watch");
    loop {
        let message = tokio::time::timeout(Duration::from_secs(5), stream.message()).await;
        let message = message.expect("in time").expect("no error").expect("not ended");
        if message.canceled() {
            assert!(message.compact_revision() >= now, "it says from where on");
            break;
        }
        assert!(message.events().is_empty(), "nothing of the past is told");
    }
    vec![]
}

/// Both do the same random transactions; every answer and the whole contents agree after each.
async fn random(left: &Under, right: &Under) {
    for seed in 0..20 {
        let (base_left, base_right) = (left.revision().await, right.revision().await);
        let mut random = StdRng::seed_from_u64(seed);
        let prefix = format!("/random/{seed}/");
        for step in 0..40 {
            let mut ops = Vec::new();
            let mut used = std::collections::BTreeSet::new();
            for _ in 0..random.random_range(0..4) {
                let key = format!("{prefix}{}", random.random_range(0..6));
                if used.insert(key.clone()) {
                    ops.push(match random.random_range(0..3) {
                        0 => Op::Delete(key),
                        _ => put(&key, &format!("{step}")),
                    });
                }
            }
            let key = format!("{prefix}{}", random.random_range(0..6));
            let offset = random.random_range(-1..40);
            let kind = random.random_range(0..4);
            let compare = |base: i64| match kind {
                0 => vec![Compare::Absent(key.clone())],
                1 => vec![Compare::ModRevision(key.clone(), base + offset)],
                2 => vec![Compare::Value(key.clone(), offset.to_string().into_bytes().into())],
                _ => vec![],
            };
            let a = left.store.txn(compare(base_left), ops.clone()).await.expect("left");
            let b = right.store.txn(compare(base_right), ops.clone()).await.expect("right");
            assert_eq!(
                (a.succeeded, a.revision - base_left),
                (b.succeeded, b.revision - base_right),
                "seed {seed} step {step}: {:?} {ops:?}",
                compare(0)
            );
        }
        let contents = async |under: &Under, base: i64| {
            let page = under.store.all(&prefix).await.expect("all of it");
            let line = |kv: haven_store::raw::RawKv| {
                (kv.key, kv.value, kv.mod_revision - base, kv.create_revision - base, kv.version)
            };
            page.kvs.into_iter().map(line).collect::<Vec<_>>()
        };
        assert_eq!(contents(left, base_left).await, contents(right, base_right).await);
    }
}

#[tokio::test]
async fn both_etcds_answer_alike() {
    let memory = Under::memory().await;
    let real_etcd = Etcd::start("conformance");
    let real = match &real_etcd {
        Some(etcd) => Some(Under::real(etcd).await),
        None => None,
    };
    macro_rules! case {
        ($case:ident) => {{
            let ours = $case(&memory).await;
            if let Some(real) = &real {
                assert_eq!($case(real).await, ours, "{}: real and in-process", stringify!($case));
            }
        }};
    }
    case!(versions);
    case!(comparisons);
    case!(what_writes_nothing_costs_no_revision);
    case!(refusals);
    case!(pages);
    case!(long_lists);
    case!(watching);
    case!(compaction);
    if let Some(real) = &real {
        random(&memory, real).await;
    } else {
        println!(
            "skipped: needs etcd, the package etcd-server (the real half of the conformance suite)"
        );
    }
}
