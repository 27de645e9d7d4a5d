//! This host's member of the store: started, promoted from learner to voter, replaced when its host is lost for long.

mod keep;
mod rules;
#[cfg(test)]
mod rules_test;

pub use keep::keep;

use super::setup::HostFile;
use crate::paths::Paths;
use haven_model::{
    Bytes, ClusterSpec, HostSpec, Meta, Name, keys,
    object::{Kind, Stored},
};
use haven_store::{
    pki::PkiDir,
    raw::{Compare, EtcdStore, Op},
    server::{self, MemberConfig},
};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// This host's member as its daemon runs it.
pub struct Own {
    paths: Paths,
    pki: PkiDir,
    host: HostFile,
    running: Option<CancellationToken>,
    ended: LastEnd,
    cancel: CancellationToken,
}

/// How this host's member ended last, in words, if it did by itself.
#[derive(Clone, Default)]
pub struct LastEnd(Arc<Mutex<Option<String>>>);

impl LastEnd {
    fn note(&self, how: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(how);
    }

    /// The words.
    pub fn said(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Own {
    /// Starts the member if this host runs one.
    pub fn start(paths: &Paths, host: &HostFile, pki: PkiDir, cancel: CancellationToken) -> Self {
        let mut own = Self {
            paths: paths.clone(),
            pki,
            host: host.clone(),
            running: None,
            ended: LastEnd::default(),
            cancel,
        };
        own.run();
        own
    }

    fn data(&self) -> std::path::PathBuf {
        self.paths.state.join("etcd")
    }

    fn run(&mut self) {
        let Some(initial_cluster) = self.host.initial_cluster.clone() else {
            return;
        };
        let config = MemberConfig {
            name: self.host.name.to_string(),
            address: self.host.address,
            data: self.data(),
            log: self.paths.log.join("etcd.log"),
            pki: self.pki.clone(),
            existing: !self.host.begins_a_cluster(),
            initial_cluster,
        };
        let stop = self.cancel.child_token();
        self.running = Some(stop.clone());
        let ended = self.ended.clone();
        let note = move |how: String| {
            tracing::error!("{how}");
            ended.note(how);
        };
        tokio::spawn(server::supervise(config, note, stop));
    }

    /// How the member ended last, now and later.
    pub fn last_end(&self) -> LastEnd {
        self.ended.clone()
    }

    /// Begins a member that joins these others, with nothing of an older one.
    fn begin(&mut self, initial_cluster: String) -> anyhow::Result<()> {
        self.put_aside()?;
        self.host.initial_cluster = Some(initial_cluster);
        self.host.save(&self.paths)?;
        self.run();
        Ok(())
    }

    /// Ends the member and moves its data aside: it was taken out of the store.
    async fn forget(&mut self) -> anyhow::Result<()> {
        if let Some(running) = self.running.take() {
            running.cancel();
            // Its supervisor kills it at once; the files must not be written when they are moved.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        self.host.initial_cluster = None;
        self.host.save(&self.paths)?;
        self.put_aside()
    }

    /// Moves the data of a member that is no more out of the way.
    fn put_aside(&self) -> anyhow::Result<()> {
        let old = self.paths.state.join("etcd.removed");
        if old.exists() {
            std::fs::remove_dir_all(&old)?;
        }
        if self.data().exists() {
            std::fs::rename(self.data(), &old)?;
        }
        Ok(())
    }
}

/// Questions in vain after which a person is told.
const PATIENCE: u32 = 10;

/// Writes what `haven init` decided, once; asks until the store answers, and tells `waiting` why it does not.
pub async fn register(
    store: &EtcdStore,
    host: &HostFile,
    member: &LastEnd,
    waiting: &watch::Sender<Option<String>>,
) -> anyhow::Result<()> {
    let (mut asked, mut told) = (0u32, String::new());
    loop {
        let result = match &host.cluster {
            Some(cluster) => first(store, host, cluster).await,
            None => store.get(keys::CLUSTER).await.map(|_| ()),
        };
        match result {
            Ok(()) => return Ok(()),
            Err(error) => {
                asked += 1;
                let mut why = haven_host::agent::chain(&error);
                if let Some(ended) = member.said() {
                    why = format!("{why}; this host's own member does not run: {ended}");
                }
                waiting.send_replace(Some(why.clone()));
                // A cluster that starts as a whole has no quorum for some seconds.
                if asked >= PATIENCE && why != told {
                    tracing::warn!(
                        "this host waits for the store, of which more than half of the voters must run: {why}"
                    );
                    told = why;
                }
            }
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
        host_record(&host.name, host.address, host.power.clone(), host.witness),
    ];
    store.txn(vec![Compare::Absent(keys::CLUSTER.into())], ops).await.map(|_| ())
}

/// The operation that writes a new host.
pub fn host_record(
    name: &Name,
    address: std::net::Ipv4Addr,
    power: Option<haven_model::host::PowerSpec>,
    witness: bool,
) -> Op {
    let meta = Meta::new(name.clone(), uuid::Uuid::now_v7().to_string(), super::wall_ms());
    let reserved_memory = Bytes::mib(512);
    let spec = HostSpec { address, power, cordoned: false, witness, reserved_memory };
    let value = serde_json::to_vec(&Stored { meta, spec }).expect("a host is plain data");
    Op::Put(format!("{}{name}", keys::objects(Kind::Host)), value.into())
}
