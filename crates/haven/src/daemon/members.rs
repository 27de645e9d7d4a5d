//! This host's member of the store: started, promoted from learner to voter, kept in order.

use super::setup::HostFile;
use crate::paths::Paths;
use haven_host::agent::Problems;
use haven_model::{
    Bytes, ClusterSpec, HostSpec, Meta, Name, Snapshot, keys,
    object::{Kind, Stored},
};
use haven_store::{
    pki::PkiDir,
    raw::{Compare, EtcdStore, Op},
    server::{self, MemberConfig},
};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Starts this host's member if it runs one.
pub fn start(
    paths: &Paths,
    host: &HostFile,
    pki: PkiDir,
    _problems: Arc<Problems>,
    cancel: CancellationToken,
) {
    let Some(initial_cluster) = host.initial_cluster.clone() else {
        return;
    };
    let config = MemberConfig {
        name: host.name.to_string(),
        address: host.address,
        data: paths.state.join("etcd"),
        log: paths.log.join("etcd.log"),
        pki,
        existing: host.cluster.is_none(),
        initial_cluster,
    };
    tokio::spawn(server::supervise(
        config,
        |problem| {
            if let Some(problem) = problem {
                tracing::error!("{problem}");
            }
        },
        cancel,
    ));
}

/// Writes what `haven init` decided, once; asks until the store answers.
pub async fn register(store: &EtcdStore, host: &HostFile) -> anyhow::Result<()> {
    loop {
        let result = match &host.cluster {
            Some(cluster) => first(store, host, cluster).await,
            None => store.get(keys::CLUSTER).await.map(|_| ()),
        };
        match result {
            Ok(()) => return Ok(()),
            Err(error) => tracing::debug!(%error, "the store is not there yet"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn first(
    store: &EtcdStore,
    host: &HostFile,
    cluster: &str,
) -> Result<(), haven_store::raw::StoreError> {
    let spec = ClusterSpec { name: cluster.to_owned(), ..ClusterSpec::default() };
    let value = serde_json::to_vec(&spec).expect("a cluster spec is plain data");
    let ops = vec![
        Op::Put(keys::CLUSTER.into(), value.into()),
        host_record(&host.name, host.address, host.power.clone()),
    ];
    store.txn(vec![Compare::Absent(keys::CLUSTER.into())], ops).await.map(|_| ())
}

/// The operation that writes a new host.
pub fn host_record(
    name: &Name,
    address: std::net::Ipv4Addr,
    power: Option<haven_model::host::PowerSpec>,
) -> Op {
    let meta = Meta::new(name.clone(), uuid::Uuid::now_v7().to_string(), super::wall_ms());
    let spec = HostSpec { address, power, cordoned: false, reserved_memory: Bytes::mib(512) };
    let value = serde_json::to_vec(&Stored { meta, spec }).expect("a host is plain data");
    Op::Put(format!("{}{name}", keys::objects(Kind::Host)), value.into())
}

/// How often a learner is looked after, and the members when nothing is under way.
const LOOK: (Duration, Duration) = (Duration::from_millis(300), Duration::from_secs(10));
/// Revisions that stay readable behind the newest.
const KEPT_REVISIONS: i64 = 10_000;
/// A member's file is defragmented when so much of it, in bytes, and more than half of it is unused.
const FRAGMENTED: i64 = 100 << 20;

/// Promotes this host's learner, keeps the store's endpoints current, compacts and defragments.
pub async fn keep(
    store: EtcdStore,
    live: watch::Receiver<Arc<Snapshot>>,
    host: HostFile,
    member: watch::Sender<Option<u64>>,
    cancel: CancellationToken,
) {
    let mut compacted = 0;
    while !cancel.is_cancelled() {
        let mut pause = LOOK.1;
        match store.members().await {
            Err(error) => {
                tracing::debug!(%error, "the members cannot be listed");
                pause = LOOK.0;
            }
            Ok(members) => {
                let mine = members.iter().find(|m| m.name == host.name.as_str());
                if mine.is_none() && host.initial_cluster.is_some() {
                    // It was added and has not told its name yet: it is just starting.
                    pause = LOOK.0;
                }
                if let Some(learner) = mine.filter(|m| m.learner) {
                    pause = LOOK.0;
                    match store.promote(learner.id).await {
                        Ok(()) => tracing::info!("this host's member of the store votes now"),
                        Err(error) => {
                            tracing::debug!(error = %haven_host::agent::chain(&error), "not yet a voter")
                        }
                    }
                }
                member.send_if_modified(|now| {
                    let next = mine.filter(|m| !m.learner).map(|m| m.id);
                    std::mem::replace(now, next) != next
                });
                endpoints(&store, &members, &host).await;
            }
        }
        let snapshot = Arc::clone(&live.borrow());
        let manages = snapshot.manager.as_ref().is_some_and(|m| m.holder == host.name);
        let until = snapshot.revision - KEPT_REVISIONS;
        if manages && until > compacted + KEPT_REVISIONS / 10 {
            match store.compact(until).await {
                Ok(()) => compacted = until,
                Err(error) => tracing::debug!(%error, "the store could not be compacted"),
            }
            if let Ok((size, used)) = store.size().await
                && size - used > FRAGMENTED
                && size > 2 * used
                && let Err(error) = store.defragment().await
            {
                tracing::warn!(%error, "the store's file could not be defragmented");
            }
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// The store is reached over its voters, this host's own first.
async fn endpoints(store: &EtcdStore, members: &[server::Member], host: &HostFile) {
    let ip = |url: &str| -> Option<std::net::Ipv4Addr> {
        url.strip_prefix("https://")?.rsplit_once(':')?.0.parse().ok()
    };
    let voters: Vec<_> =
        members.iter().filter(|m| !m.learner).filter_map(|m| ip(&m.peer_url)).collect();
    if voters.is_empty() {
        return;
    }
    let all = if voters.contains(&host.address) {
        super::endpoints(host.address, &voters)
    } else {
        voters.iter().map(|ip| server::client_url(*ip)).collect()
    };
    if let Err(error) = store.set_endpoints(all).await {
        tracing::warn!(%error, "the members' addresses cannot be used");
    }
}
