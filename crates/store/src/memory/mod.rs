//! An etcd in this process, for unit tests and the simulator: the real etcd-client speaks to it, with no socket and no
//! clock but tokio's, so that virtual time drives it.
//!
//! It is one linearizable state machine. What a cluster of members adds (delay, silence, lost answers, no leader) lies
//! on the [`Path`] between a client and it. The conformance suite (`tests/with_etcd/conformance.rs`) runs the same cases against
//! it and against a real etcd.
//!
//! Not here, because Haven uses none of it: etcd's leases, authentication, locks, nested transactions.

mod kv;
mod service;

pub use etcd_client::proto::PbEvent as Event;
use etcd_client::{
    Channel,
    proto::{PbEvent, PbKvServer, PbWatchServer},
};
use kv::Store;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::broadcast;
use tonic::{Status, service::Routes};
use tower::{ServiceExt, util::BoxCloneSyncService};

/// What lies between one client and the store.
#[async_trait::async_trait]
pub trait Path: Send + Sync + 'static {
    /// Returns when a request has arrived at a member that can serve it.
    ///
    /// # Errors
    /// What that member answers instead; nothing was done then.
    async fn arrive(&self) -> Result<(), Status>;
    /// Returns when the answer, or the next batch of a watch, has come back.
    ///
    /// # Errors
    /// How the connection ended; what was asked for was done nevertheless.
    async fn come_back(&self) -> Result<(), Status>;
    /// Whether a transaction that was sent is carried out once the member can, also when its sender has given up on it
    /// by then.
    fn lingers(&self) -> bool {
        false
    }
}

/// Nothing in between.
pub struct Direct;

#[async_trait::async_trait]
impl Path for Direct {
    async fn arrive(&self) -> Result<(), Status> {
        Ok(())
    }
    async fn come_back(&self) -> Result<(), Status> {
        Ok(())
    }
}

/// Called with every transaction that wrote something, at the instant at which it is done: its revision and events.
pub type Witness = Arc<dyn Fn(i64, &[PbEvent]) + Send + Sync>;

/// One transaction's events, for the watchers.
type Batch = Arc<Vec<kv::Happened>>;

struct Shared {
    store: Mutex<Store>,
    batches: broadcast::Sender<Batch>,
    witness: Option<Witness>,
    /// Comparisons of keys that begin so hold whatever stands there: broken on purpose.
    careless_of: Vec<String>,
}

impl Shared {
    fn store(&self) -> std::sync::MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The store. Cheap to clone; all clones are the same one.
#[derive(Clone)]
pub struct MemoryEtcd(Arc<Shared>);

impl Default for MemoryEtcd {
    fn default() -> Self {
        Self::new(None)
    }
}

impl MemoryEtcd {
    /// An empty store.
    #[must_use]
    pub fn new(witness: Option<Witness>) -> Self {
        Self::careless(witness, Vec::new())
    }

    /// A store that takes every comparison of a key that begins with one of `of` for one that holds, to show that a test
    /// finds what comes of it.
    #[must_use]
    pub fn careless(witness: Option<Witness>, of: Vec<String>) -> Self {
        let (store, batches) = (Mutex::new(Store::new()), broadcast::channel(4096).0);
        Self(Arc::new(Shared { store, batches, witness, careless_of: of }))
    }

    /// A connection for the real etcd-client.
    #[must_use]
    pub fn channel(&self, path: Arc<dyn Path>) -> Channel {
        let service = service::Member { shared: Arc::clone(&self.0), path };
        let routes = Routes::new(PbKvServer::new(service.clone()))
            .add_service(PbWatchServer::new(service))
            .prepare();
        let routes = ServiceExt::<tonic::codegen::http::Request<tonic::body::Body>>::map_err(
            routes,
            |never| match never {},
        );
        Channel::Custom(BoxCloneSyncService::new(routes))
    }

    /// The value of a key now, past every path: what a judge reads.
    #[must_use]
    pub fn peek(&self, key: &str) -> Option<Vec<u8>> {
        self.0.store().get(key.as_bytes()).map(|kv| kv.value)
    }

    /// Everything under a prefix now, past every path.
    #[must_use]
    pub fn peek_all(&self, prefix: &str) -> Vec<(String, Vec<u8>, i64)> {
        let mut end = prefix.as_bytes().to_vec();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        let keys = kv::Keys { key: prefix.as_bytes().to_vec(), end };
        let kvs = self.0.store().range(&keys, 0).unwrap_or_default();
        kvs.into_iter()
            .map(|kv| (String::from_utf8_lossy(&kv.key).into_owned(), kv.value, kv.mod_revision))
            .collect()
    }

    /// The revision now.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.0.store().revision
    }
}
