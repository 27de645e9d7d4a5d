//! Reads and transactions on etcd, with deadlines, over any of its members.
//!
//! The first endpoint is preferred (the member of the same host); a call that fails there for reasons of transport
//! goes to the next. A write whose outcome is unknown is never sent again by itself: it is returned as
//! [`StoreError::Unknown`] and the caller reads before it decides.

use bytes::Bytes;
use etcd_client::{
    Client, ConnectOptions, DeleteOptions, GetOptions, KeyValue, SortOrder, SortTarget, Txn, TxnOp,
    TxnOpResponse,
};
use futures::{StreamExt, stream::FuturesUnordered};
use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

/// What the store could not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Nothing was done.
    #[error(
        "the store cannot be reached or has no quorum; `haven status` shows which hosts are missing"
    )]
    Unavailable {
        /// What the last member tried said.
        #[source]
        source: Box<etcd_client::Error>,
    },
    /// No answer in time; a write may or may not have been done.
    #[error("the store did not answer within {0:?}; whether the change was made is not known")]
    Unknown(Duration),
    /// The revision asked for is gone.
    #[error("the store has compacted the revision that was asked for")]
    Compacted,
    /// Refused for another reason.
    #[error("the store refused the request")]
    Refused {
        /// What etcd said.
        #[source]
        source: Box<etcd_client::Error>,
    },
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawKv {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Bytes,
    /// Revision of the last write.
    pub mod_revision: i64,
    /// Revision of the first write.
    pub create_revision: i64,
    /// Writes since then.
    pub version: i64,
}

impl From<&KeyValue> for RawKv {
    fn from(kv: &KeyValue) -> Self {
        Self {
            key: String::from_utf8_lossy(kv.key()).into_owned(),
            value: Bytes::copy_from_slice(kv.value()),
            mod_revision: kv.mod_revision(),
            create_revision: kv.create_revision(),
            version: kv.version(),
        }
    }
}

/// What must hold for a transaction to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key was last written at this revision.
    ModRevision(String, i64),
    /// There is no such key.
    Absent(String),
    /// The key has this value.
    Value(String, Bytes),
}

impl Compare {
    fn to_etcd(&self) -> etcd_client::Compare {
        use etcd_client::CompareOp::Equal;
        match self {
            Compare::ModRevision(key, revision) => {
                etcd_client::Compare::mod_revision(key.as_str(), Equal, *revision)
            }
            Compare::Absent(key) => etcd_client::Compare::create_revision(key.as_str(), Equal, 0),
            Compare::Value(key, value) => {
                etcd_client::Compare::value(key.as_str(), Equal, value.to_vec())
            }
        }
    }
}

/// What a transaction does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Write.
    Put(String, Bytes),
    /// Delete one key.
    Delete(String),
    /// Delete all keys that begin so.
    DeletePrefix(String),
    /// Delete from the first key on, up to the second, which stays.
    DeleteRange(String, String),
}

impl Op {
    fn to_etcd(&self) -> TxnOp {
        match self {
            Op::Put(key, value) => TxnOp::put(key.as_str(), value.to_vec(), None),
            Op::Delete(key) => TxnOp::delete(key.as_str(), None),
            Op::DeleteRange(from, to) => {
                let range = DeleteOptions::new().with_range(to.as_bytes());
                TxnOp::delete(from.as_str(), Some(range))
            }
            Op::DeletePrefix(key) => {
                TxnOp::delete(key.as_str(), Some(DeleteOptions::new().with_prefix()))
            }
        }
    }
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxnOutcome {
    /// Every comparison held and everything was done.
    pub succeeded: bool,
    /// The store's revision after it.
    pub revision: i64,
}

/// One page of a range.
#[derive(Clone, Debug)]
pub struct Page {
    /// In order of keys.
    pub kvs: Vec<RawKv>,
    /// The revision at which it was read.
    pub revision: i64,
    /// There are more behind the last.
    pub more: bool,
}

/// How to reach the members.
#[derive(Clone, Debug, Default)]
pub struct StoreConfig {
    /// `https://10.0.0.1:7379` and so on; the preferred one first.
    pub endpoints: Vec<String>,
    /// PEM: the cluster's CA, this host's certificate and its key. Absent only in tests.
    pub tls: Option<Identity>,
}

/// A certificate with its key and the CA that signed it, PEM.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The CA's certificate.
    pub ca: String,
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

/// So many calls in a row go unanswered before another member is used.
const PATIENCE: usize = 3;
/// A call's deadline.
const DEADLINE: Duration = Duration::from_secs(1);

struct Members {
    clients: Vec<Client>,
    endpoints: Vec<String>,
}

/// A handle to the store. Cheap to clone.
#[derive(Clone)]
pub struct EtcdStore {
    members: Arc<RwLock<Members>>,
    current: Arc<AtomicUsize>,
    /// Calls in a row that the member in use did not answer.
    unanswered: Arc<AtomicUsize>,
    tls: Arc<RwLock<Option<Identity>>>,
    /// A member said that the store is nearly full.
    pub(crate) nearly_full: Arc<AtomicBool>,
}

fn options(tls: Option<&Identity>) -> ConnectOptions {
    let options = ConnectOptions::new()
        .with_keep_alive(Duration::from_secs(1), Duration::from_secs(1))
        .with_keep_alive_while_idle(true)
        .with_connect_timeout(Duration::from_millis(500))
        .with_require_leader(true);
    let Some(identity) = tls else { return options };
    use etcd_client::{Certificate, TlsOptions};
    let tls = TlsOptions::new()
        .ca_certificate(Certificate::from_pem(&identity.ca))
        .identity(etcd_client::Identity::from_pem(&identity.certificate, &identity.key));
    options.with_tls(tls)
}

async fn clients(endpoints: &[String], tls: Option<&Identity>) -> Result<Vec<Client>, StoreError> {
    let mut clients = Vec::new();
    for endpoint in endpoints {
        let client = Client::connect([endpoint], Some(options(tls)))
            .await
            .map_err(|source| StoreError::Refused { source: Box::new(source) })?;
        clients.push(client);
    }
    Ok(clients)
}

impl EtcdStore {
    /// Makes a handle; connections are made when first used.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when an endpoint or a certificate cannot be read.
    pub async fn connect(config: StoreConfig) -> Result<Self, StoreError> {
        let clients = clients(&config.endpoints, config.tls.as_ref()).await?;
        let members = Members { clients, endpoints: config.endpoints };
        Ok(Self {
            members: Arc::new(RwLock::new(members)),
            current: Arc::default(),
            unanswered: Arc::default(),
            tls: Arc::new(RwLock::new(config.tls)),
            nearly_full: Arc::default(),
        })
    }

    /// A handle over a connection that exists already: the simulator's.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when the client cannot be made.
    pub async fn over(channel: etcd_client::Channel) -> Result<Self, StoreError> {
        let options = ConnectOptions::new().with_require_leader(true);
        let client = Client::from_channel(channel, Some(options))
            .await
            .map_err(|source| StoreError::Refused { source: Box::new(source) })?;
        let members = Members { clients: vec![client], endpoints: vec!["memory".into()] };
        Ok(Self {
            members: Arc::new(RwLock::new(members)),
            current: Arc::default(),
            unanswered: Arc::default(),
            tls: Arc::default(),
            nearly_full: Arc::default(),
        })
    }

    /// Uses other endpoints from now on: members came or went.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when an endpoint cannot be read.
    pub async fn set_endpoints(&self, endpoints: Vec<String>) -> Result<(), StoreError> {
        if self.members.read().unwrap_or_else(PoisonError::into_inner).endpoints == endpoints {
            return Ok(());
        }
        let clients = clients(&endpoints, self.tls().as_ref()).await?;
        *self.members.write().unwrap_or_else(PoisonError::into_inner) =
            Members { clients, endpoints };
        self.current.store(0, Ordering::Relaxed);
        Ok(())
    }

    fn tls(&self) -> Option<Identity> {
        self.tls.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Shows members another certificate on all connections that are made from now on; what is under way goes on over
    /// those that there are.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when the certificate cannot be read.
    pub async fn show(&self, identity: Identity) -> Result<(), StoreError> {
        *self.tls.write().unwrap_or_else(PoisonError::into_inner) = Some(identity);
        loop {
            let endpoints =
                self.members.read().unwrap_or_else(PoisonError::into_inner).endpoints.clone();
            let clients = clients(&endpoints, self.tls().as_ref()).await?;
            let mut members = self.members.write().unwrap_or_else(PoisonError::into_inner);
            // Members may have come or gone meanwhile.
            if members.endpoints == endpoints {
                *members = Members { clients, endpoints };
                return Ok(());
            }
        }
    }

    /// How many members it knows.
    pub(crate) fn count(&self) -> usize {
        self.members.read().unwrap_or_else(PoisonError::into_inner).clients.len()
    }

    /// The clients of all members.
    pub(crate) fn clients(&self) -> Vec<Client> {
        self.members.read().unwrap_or_else(PoisonError::into_inner).clients.clone()
    }

    /// The client of the member at an endpoint.
    pub(crate) fn client_of(&self, endpoint: &str) -> Option<Client> {
        let members = self.members.read().unwrap_or_else(PoisonError::into_inner);
        let index = members.endpoints.iter().position(|one| one == endpoint)?;
        members.clients.get(index).cloned()
    }

    /// The client of the member in use, with its number.
    pub(crate) fn client(&self) -> (usize, Client) {
        let members = self.members.read().unwrap_or_else(PoisonError::into_inner);
        let index = self.current.load(Ordering::Relaxed) % members.clients.len();
        (index, members.clients[index].clone())
    }

    /// The member `failed` does not answer: use the next one, unless somebody else moved on already.
    pub(crate) fn rotate(&self, failed: usize) {
        let next = (failed + 1) % self.count().max(1);
        let _ = self.current.compare_exchange(failed, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// A call to member `index` was not answered, or there is no leader now. A member that waits for an election is
    /// as good as any other, and the next one may be dead: only several such calls in a row make it worth leaving.
    pub(crate) fn stalled(&self, index: usize) {
        if self.unanswered.fetch_add(1, Ordering::Relaxed) + 1 >= PATIENCE {
            self.unanswered.store(0, Ordering::Relaxed);
            self.rotate(index);
        }
    }

    /// One key, read linearizably.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] after every member was tried.
    pub async fn get(&self, key: &str) -> Result<Option<RawKv>, StoreError> {
        let page = self.read(key, None).await?;
        Ok(page.kvs.into_iter().next())
    }

    /// One key, read linearizably, asked of all members at once; the member that answers first is the one in use from
    /// now on. For whoever cannot wait until a member that hangs is given up: a host that renews its lease.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when all members refused, [`StoreError::Unknown`] when none answered in time.
    pub async fn get_from_any(&self, key: &str) -> Result<Option<RawKv>, StoreError> {
        let ask = |(index, client): (usize, Client)| async move {
            let mut client = client.kv_client();
            (index, tokio::time::timeout(DEADLINE, client.get(key, None)).await)
        };
        let mut asked: FuturesUnordered<_> =
            self.clients().into_iter().enumerate().map(ask).collect();
        let mut refused = None;
        while let Some((index, answer)) = asked.next().await {
            match answer {
                Ok(Ok(response)) => {
                    self.current.store(index, Ordering::Relaxed);
                    self.unanswered.store(0, Ordering::Relaxed);
                    return Ok(response.kvs().first().map(RawKv::from));
                }
                Ok(Err(error)) => refused = Some(error),
                Err(_) => {}
            }
        }
        Err(match refused {
            Some(error) => StoreError::Unavailable { source: Box::new(error) },
            None => StoreError::Unknown(DEADLINE),
        })
    }

    /// Up to `limit` keys under `prefix` that come behind `after`, at `revision` (0: now), read linearizably.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] when that revision is gone; otherwise as [`EtcdStore::get`].
    pub async fn range(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: i64,
        revision: i64,
    ) -> Result<Page, StoreError> {
        let start =
            after.map_or_else(|| prefix.as_bytes().to_vec(), |key| [key.as_bytes(), &[0]].concat());
        let options = GetOptions::new()
            .with_range(end_of(prefix))
            .with_limit(limit)
            .with_revision(revision)
            .with_sort(SortTarget::Key, SortOrder::Ascend);
        self.read(start, Some(options)).await
    }

    /// The last `limit` keys under `prefix`, or the last of those that come ahead of `before`; the last first.
    ///
    /// # Errors
    /// As [`EtcdStore::get`].
    pub async fn last(
        &self,
        prefix: &str,
        before: Option<&str>,
        limit: i64,
    ) -> Result<Page, StoreError> {
        let end = before.map_or_else(|| end_of(prefix), |key| key.as_bytes().to_vec());
        let options = GetOptions::new()
            .with_range(end)
            .with_limit(limit)
            .with_sort(SortTarget::Key, SortOrder::Descend);
        self.read(prefix, Some(options)).await
    }

    /// Every key under `prefix` at one revision.
    ///
    /// # Errors
    /// As [`EtcdStore::get`].
    pub async fn all(&self, prefix: &str) -> Result<Page, StoreError> {
        let mut whole = self.range(prefix, None, PAGE, 0).await?;
        while whole.more {
            let after = whole.kvs.last().map(|kv| kv.key.clone());
            let page = self.range(prefix, after.as_deref(), PAGE, whole.revision).await?;
            whole.more = page.more;
            whole.kvs.extend(page.kvs);
        }
        Ok(whole)
    }

    async fn read(
        &self,
        key: impl Into<Vec<u8>>,
        options: Option<GetOptions>,
    ) -> Result<Page, StoreError> {
        let key = key.into();
        let mut last = None;
        for _ in 0..self.count().max(1) {
            let (index, client) = self.client();
            let mut client = client.kv_client().max_decoding_message_size(LARGEST_PAGE);
            match tokio::time::timeout(DEADLINE, client.get(key.clone(), options.clone())).await {
                Ok(Ok(response)) => {
                    let revision =
                        response.header().map_or(0, etcd_client::ResponseHeader::revision);
                    let kvs = response.kvs().iter().map(RawKv::from).collect();
                    return Ok(Page { kvs, revision, more: response.more() });
                }
                Ok(Err(error)) if is_compacted(&error) => return Err(StoreError::Compacted),
                Ok(Err(error)) => last = Some(StoreError::Unavailable { source: Box::new(error) }),
                Err(_) => {
                    self.stalled(index);
                    return Err(StoreError::Unknown(DEADLINE));
                }
            }
            self.rotate(index);
        }
        Err(last.unwrap_or(StoreError::Unknown(DEADLINE)))
    }

    /// Does all of `ops` if all of `compares` hold, else nothing.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] when it may have been done; the caller must read before it tries again.
    pub async fn txn(
        &self,
        compares: Vec<Compare>,
        ops: Vec<Op>,
    ) -> Result<TxnOutcome, StoreError> {
        let txn = Txn::new()
            .when(compares.iter().map(Compare::to_etcd).collect::<Vec<_>>())
            .and_then(ops.iter().map(Op::to_etcd).collect::<Vec<_>>());
        let (index, mut client) = self.client();
        match tokio::time::timeout(DEADLINE, client.txn(txn)).await {
            Ok(Ok(response)) => {
                self.unanswered.store(0, Ordering::Relaxed);
                Ok(TxnOutcome {
                    succeeded: response.succeeded(),
                    revision: response.header().map_or(0, etcd_client::ResponseHeader::revision),
                })
            }
            Ok(Err(error)) => {
                if leaderless(&error) {
                    self.stalled(index);
                } else {
                    self.rotate(index);
                }
                Err(if was_refused(&error) {
                    StoreError::Refused { source: Box::new(error) }
                } else {
                    tracing::debug!(%error, "a transaction ended without an answer");
                    StoreError::Unknown(DEADLINE)
                })
            }
            Err(_) => {
                self.stalled(index);
                Err(StoreError::Unknown(DEADLINE))
            }
        }
    }

    /// Reads several keys at one revision.
    ///
    /// # Errors
    /// As [`EtcdStore::txn`].
    pub async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<RawKv>>, StoreError> {
        let gets = keys.iter().map(|key| TxnOp::get(key.as_str(), None)).collect::<Vec<_>>();
        let (index, mut client) = self.client();
        match tokio::time::timeout(DEADLINE, client.txn(Txn::new().and_then(gets))).await {
            Ok(Ok(response)) => Ok(response
                .op_responses()
                .into_iter()
                .map(|answer| match answer {
                    TxnOpResponse::Get(get) => get.kvs().first().map(RawKv::from),
                    _ => None,
                })
                .collect()),
            Ok(Err(error)) => {
                self.rotate(index);
                Err(StoreError::Unavailable { source: Box::new(error) })
            }
            Err(_) => {
                self.rotate(index);
                Err(StoreError::Unknown(DEADLINE))
            }
        }
    }
}

/// Keys of one page of [`EtcdStore::all`].
const PAGE: i64 = 250;
/// A page may be so large, bytes; gRPC's own limit of 4 MiB would refuse a few hundred VMs with long user data.
const LARGEST_PAGE: usize = 512 << 20;

/// The first key behind all that begin with `prefix`.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

pub(crate) fn is_compacted(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status)
        if status.code() == tonic::Code::OutOfRange && status.message().contains("compacted"))
}

/// The member answers and waits for a leader.
fn leaderless(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status)
        if status.message().contains("leader") || status.message().contains("request timed out"))
}

/// etcd itself said no, so nothing was done.
fn was_refused(error: &etcd_client::Error) -> bool {
    use tonic::Code;
    matches!(error, etcd_client::Error::GRpcStatus(status)
        if matches!(status.code(), Code::InvalidArgument | Code::FailedPrecondition | Code::PermissionDenied
            | Code::Unauthenticated | Code::ResourceExhausted | Code::OutOfRange))
}
