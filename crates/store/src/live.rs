//! The live copy: everything under a prefix, kept current by list and watch.
//!
//! ```text
//!   list at revision R ──► watch from R+1 ──► fold each batch ──► publish
//!        ▲                                         │
//!        └── compacted, stream lost, no leader ◄───┘   (what was known stays visible meanwhile)
//! ```
//!
//! It also notes when this process last saw each record under some prefixes change (the renewal records): leases are
//! judged by the observer's clock. A list that shows an unchanged revision keeps the old time, so a lost watch never
//! makes a dead host look alive.

use crate::{
    clock::{Clock, Mono},
    raw::{EtcdStore, RawKv, StoreError, is_compacted},
};
use etcd_client::{EventType, WatchOptions};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

/// Something that is built key by key.
pub trait Fold: Clone + Default + Send + Sync + 'static {
    /// Applies one key with its value and revision, or its deletion. True when somebody waits for such a change.
    fn apply(&mut self, key: &str, value: Option<(&[u8], i64)>) -> bool;
    /// Notes the store's revision up to which it is complete.
    fn set_revision(&mut self, revision: i64);
}

impl Fold for haven_model::Snapshot {
    fn apply(&mut self, key: &str, value: Option<(&[u8], i64)>) -> bool {
        haven_model::Snapshot::apply(self, key, value) == haven_model::Change::Changed
    }
    fn set_revision(&mut self, revision: i64) {
        self.revision = revision;
    }
}

/// At which revision, and since when by this process' clock, a record has stood unchanged.
type Observed = Arc<Mutex<BTreeMap<String, (i64, Mono)>>>;

/// A handle to the live copy.
#[derive(Clone)]
pub struct LiveCopy<S> {
    state: watch::Receiver<Arc<S>>,
    connected: watch::Receiver<bool>,
    observed: Observed,
    stale: Arc<Notify>,
}

/// What to follow.
#[derive(Clone, Debug)]
pub struct LiveConfig {
    /// Prefix of all keys.
    pub prefix: String,
    /// Prefixes of the records whose changes are noted with their time.
    pub observed: Vec<String>,
}

/// A watch that brings nothing for so long is asked for its progress.
const QUIET: Duration = Duration::from_secs(2);
/// And is given up when it does not answer for so long.
const SILENT: Duration = Duration::from_secs(2);

impl<S: Fold> LiveCopy<S> {
    /// Starts following until `cancel`.
    #[must_use]
    pub fn spawn(
        store: EtcdStore,
        config: LiveConfig,
        clock: Clock,
        cancel: CancellationToken,
    ) -> Self {
        let (state_out, state) = watch::channel(Arc::new(S::default()));
        let (connected_out, connected) = watch::channel(false);
        let observed = Observed::default();
        let stale = Arc::new(Notify::new());
        let follower = Follower {
            store,
            config,
            clock,
            state: state_out,
            connected: connected_out,
            observed: Arc::clone(&observed),
            stale: Arc::clone(&stale),
            keys: BTreeSet::new(),
        };
        tokio::spawn(follower.run(cancel));
        Self { state, connected, observed, stale }
    }

    /// To be notified by whoever knows of something that should be shown by now and is not: the copy is then made anew
    /// at once, and not only when its watch is found to be dead.
    #[must_use]
    pub fn stale(&self) -> Arc<Notify> {
        Arc::clone(&self.stale)
    }

    /// The contents; wakes on changes that somebody waits for.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<Arc<S>> {
        self.state.clone()
    }

    /// Whether it is current as far as is known.
    #[must_use]
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.connected.clone()
    }

    /// At which revision and since when an observed record has stood unchanged.
    #[must_use]
    pub fn observed(&self, key: &str) -> Option<(i64, Mono)> {
        self.observed.lock().unwrap_or_else(PoisonError::into_inner).get(key).copied()
    }
}

struct Follower<S> {
    store: EtcdStore,
    config: LiveConfig,
    clock: Clock,
    state: watch::Sender<Arc<S>>,
    connected: watch::Sender<bool>,
    observed: Observed,
    stale: Arc<Notify>,
    /// The keys applied so far, so that a new list can delete what is gone.
    keys: BTreeSet<String>,
}

/// Why following ended.
enum End {
    /// List again at once.
    Again,
    /// The member does not answer: use another one.
    Failed(usize),
}

impl<S: Fold> Follower<S> {
    async fn run(mut self, cancel: CancellationToken) {
        let mut pause = Duration::from_millis(50);
        loop {
            let followed = tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                end = self.follow() => end,
            };
            self.connected.send_replace(false);
            match followed {
                Ok(End::Again) => pause = Duration::from_millis(50),
                Ok(End::Failed(index)) => self.store.rotate(index),
                Err(error) => tracing::debug!(%error, "the live copy cannot list"),
            }
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = self.clock.sleep(pause) => {}
            }
            pause = (pause * 2).min(Duration::from_millis(400));
        }
    }

    /// Lists, then watches until something ends it.
    async fn follow(&mut self) -> Result<End, StoreError> {
        let list = self.store.all(&self.config.prefix).await?;
        self.reset(list.revision, &list.kvs);
        let (index, mut client) = self.store.client();
        let options = WatchOptions::new().with_prefix().with_start_revision(list.revision + 1);
        let opened = client.watch(self.config.prefix.as_str(), Some(options));
        let Ok(Ok(mut stream)) = tokio::time::timeout(SILENT, opened).await else {
            return Ok(End::Failed(index));
        };
        self.connected.send_replace(true);
        let mut asked = false;
        loop {
            let patience = if asked { SILENT } else { QUIET };
            let message = tokio::select! {
                biased;
                message = tokio::time::timeout(patience, stream.message()) => message,
                () = self.stale.notified() => return Ok(End::Again),
            };
            let message = match message {
                Err(_) if asked => return Ok(End::Failed(index)),
                Err(_) => {
                    asked = true;
                    if stream.request_progress().await.is_err() {
                        return Ok(End::Failed(index));
                    }
                    continue;
                }
                Ok(message) => message,
            };
            asked = false;
            match message {
                Ok(Some(response)) if response.canceled() => return Ok(End::Again),
                Ok(Some(response)) => self.batch(&response),
                Ok(None) => return Ok(End::Failed(index)),
                Err(error) if is_compacted(&error) => return Ok(End::Again),
                Err(error) => {
                    tracing::debug!(%error, "the watch ended");
                    return Ok(End::Failed(index));
                }
            }
        }
    }

    /// The contents are exactly `kvs` at `revision`.
    fn reset(&mut self, revision: i64, kvs: &[RawKv]) {
        let mut state = S::clone(&self.state.borrow());
        let now: BTreeSet<String> = kvs.iter().map(|kv| kv.key.clone()).collect();
        for gone in self.keys.difference(&now) {
            state.apply(gone, None);
            self.observe(gone, None);
        }
        for kv in kvs {
            state.apply(&kv.key, Some((&kv.value, kv.mod_revision)));
            self.observe(&kv.key, Some(kv.mod_revision));
        }
        self.keys = now;
        state.set_revision(revision);
        self.state.send_replace(Arc::new(state));
    }

    fn batch(&mut self, response: &etcd_client::WatchResponse) {
        let mut changes = Vec::with_capacity(response.events().len());
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            let Ok(key) = kv.key_str() else { continue };
            let put = event.event_type() == EventType::Put;
            self.observe(key, put.then(|| kv.mod_revision()));
            if put {
                self.keys.insert(key.to_owned());
            } else {
                self.keys.remove(key);
            }
            changes.push((key, put.then(|| (kv.value(), kv.mod_revision()))));
        }
        // A mere answer about progress does not count: etcd before 3.5.8 sends it ahead of events that it covers.
        let revision = response
            .header()
            .filter(|_| !changes.is_empty())
            .map(etcd_client::ResponseHeader::revision);
        // A mere renewal is visible at once and wakes nobody. Nor is all copied for it, as long as nobody holds what is
        // shown: renewals come twice a second from every host.
        self.state.send_if_modified(|shown| {
            let state = Arc::make_mut(shown);
            let mut wake = false;
            for (key, value) in changes {
                wake |= state.apply(key, value);
            }
            if let Some(revision) = revision {
                state.set_revision(revision);
            }
            wake
        });
    }

    fn observe(&self, key: &str, revision: Option<i64>) {
        if !self.config.observed.iter().any(|prefix| key.starts_with(prefix)) {
            return;
        }
        let mut observed = self.observed.lock().unwrap_or_else(PoisonError::into_inner);
        match revision {
            None => {
                observed.remove(key);
            }
            Some(revision) => {
                let known = observed.get(key).is_some_and(|(known, _)| *known == revision);
                if !known {
                    observed.insert(key.to_owned(), (revision, self.clock.now()));
                }
            }
        }
    }
}
