//! The services of the in-process etcd as gRPC names them: `KV` and `Watch`.

use super::{
    Path, Shared,
    kv::{Happened, Keys, Refusal, Store, of_range},
};
use etcd_client::proto::{
    PbCompactionRequest, PbCompactionResponse, PbCompare, PbDeleteRequest, PbDeleteResponse,
    PbEvent, PbKvService, PbPutRequest, PbPutResponse, PbRangeRequest, PbRangeResponse,
    PbRangeStreamResponse, PbResponseHeader, PbResponseOp, PbTargetUnion, PbTxnOpRequest,
    PbTxnOpResponse, PbTxnRequest, PbTxnRequestOp, PbTxnResponse, PbWatchRequest,
    PbWatchRequestUnion, PbWatchResponse, PbWatchService,
};
use std::{cmp::Ordering, collections::BTreeMap, pin::Pin, sync::Arc};
use tokio::sync::{broadcast, mpsc};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

/// Most operations of one transaction, as `etcd --max-txn-ops` has it by default.
const MAX_OPS: usize = 128;

#[derive(Clone)]
pub(super) struct Member {
    pub(super) shared: Arc<Shared>,
    pub(super) path: Arc<dyn Path>,
}

fn status(refusal: &Refusal) -> Status {
    match refusal {
        Refusal::Compacted => {
            Status::out_of_range("etcdserver: mvcc: required revision has been compacted")
        }
        Refusal::Future => {
            Status::out_of_range("etcdserver: mvcc: required revision is a future revision")
        }
        Refusal::DuplicateKey => {
            Status::invalid_argument("etcdserver: duplicate key given in txn request")
        }
    }
}

fn header(store: &Store) -> Option<PbResponseHeader> {
    Some(PbResponseHeader { revision: store.revision, ..PbResponseHeader::default() })
}

fn range(store: &Store, request: &PbRangeRequest) -> Result<PbRangeResponse, Refusal> {
    let keys = Keys { key: request.key.clone(), end: request.range_end.clone() };
    let mut kvs = store.range(&keys, request.revision)?;
    // Descending; the target of every sort that Haven asks for is the key.
    if request.sort_order == 2 {
        kvs.reverse();
    }
    let count = i64::try_from(kvs.len()).unwrap_or(i64::MAX);
    let limit = usize::try_from(request.limit).unwrap_or(0);
    let more = limit > 0 && kvs.len() > limit;
    if more {
        kvs.truncate(limit);
    }
    Ok(PbRangeResponse { header: header(store), kvs, more, count })
}

fn holds(store: &Store, compare: &PbCompare) -> bool {
    let kv = store.get(&compare.key);
    let number = |wanted: i64, of: i64| of.cmp(&wanted);
    let ordering = match &compare.target_union {
        Some(PbTargetUnion::Version(v)) => number(*v, kv.map_or(0, |kv| kv.version)),
        Some(PbTargetUnion::CreateRevision(v)) => number(*v, kv.map_or(0, |kv| kv.create_revision)),
        Some(PbTargetUnion::ModRevision(v)) => number(*v, kv.map_or(0, |kv| kv.mod_revision)),
        Some(PbTargetUnion::Value(v)) => match kv {
            // A comparison with the value of a key that does not exist never holds.
            None => return false,
            Some(kv) => kv.value.cmp(v),
        },
        _ => return false,
    };
    match compare.result {
        0 => ordering == Ordering::Equal,
        1 => ordering == Ordering::Greater,
        2 => ordering == Ordering::Less,
        _ => ordering != Ordering::Equal,
    }
}

fn operate(store: &mut Store, op: &PbTxnRequestOp) -> Result<PbResponseOp, Refusal> {
    let response = match &op.request {
        Some(PbTxnOpRequest::RequestRange(request)) => {
            Some(PbTxnOpResponse::ResponseRange(range(store, request)?))
        }
        Some(PbTxnOpRequest::RequestPut(request)) => {
            store.put(&request.key, request.value.clone())?;
            Some(PbTxnOpResponse::ResponsePut(PbPutResponse::default()))
        }
        Some(PbTxnOpRequest::RequestDeleteRange(request)) => {
            let keys = Keys { key: request.key.clone(), end: request.range_end.clone() };
            let gone = store.delete(&keys)?;
            let deleted = i64::try_from(gone.len()).unwrap_or(i64::MAX);
            Some(PbTxnOpResponse::ResponseDeleteRange(PbDeleteResponse {
                deleted,
                ..PbDeleteResponse::default()
            }))
        }
        _ => None,
    };
    Ok(PbResponseOp { response })
}

/// A transaction that writes one key twice is refused before anything of it is done.
fn check(ops: &[PbTxnRequestOp]) -> Result<(), Status> {
    if ops.len() > MAX_OPS {
        return Err(Status::invalid_argument("etcdserver: too many operations in txn request"));
    }
    let mut puts: Vec<&[u8]> = Vec::new();
    let deletes: Vec<Keys> = ops
        .iter()
        .filter_map(|op| match &op.request {
            Some(PbTxnOpRequest::RequestDeleteRange(r)) => {
                Some(Keys { key: r.key.clone(), end: r.range_end.clone() })
            }
            _ => None,
        })
        .collect();
    for op in ops {
        if let Some(PbTxnOpRequest::RequestPut(put)) = &op.request {
            if puts.contains(&put.key.as_slice()) || deletes.iter().any(|d| d.contain(&put.key)) {
                return Err(status(&Refusal::DuplicateKey));
            }
            puts.push(&put.key);
        }
    }
    Ok(())
}

impl Member {
    /// Does something to the store at one instant, and lets watchers and witness know.
    fn apply<T>(
        &self,
        work: impl FnOnce(&mut Store) -> Result<T, Refusal>,
    ) -> Result<(T, Option<PbResponseHeader>), Status> {
        let mut store = self.shared.store();
        store.begin();
        let result = work(&mut store).map_err(|refusal| status(&refusal))?;
        let happened = store.end();
        let header = header(&store);
        // Under the lock, so that no watcher sees batches in another order.
        if !happened.is_empty() {
            if let Some(witness) = &self.shared.witness {
                let events: Vec<PbEvent> = happened.iter().map(|(_, e)| e.clone()).collect();
                witness(store.revision, &events);
            }
            let _ = self.shared.batches.send(Arc::new(happened));
        }
        Ok((result, header))
    }

    async fn answer<T>(&self, result: T) -> Result<Response<T>, Status> {
        self.path.come_back().await?;
        Ok(Response::new(result))
    }
}

#[async_trait::async_trait]
impl PbKvService for Member {
    type RangeStreamStream =
        Pin<Box<dyn Stream<Item = Result<PbRangeStreamResponse, Status>> + Send>>;

    async fn range(
        &self,
        request: Request<PbRangeRequest>,
    ) -> Result<Response<PbRangeResponse>, Status> {
        self.path.arrive().await?;
        let result = range(&self.shared.store(), request.get_ref()).map_err(|r| status(&r))?;
        self.answer(result).await
    }

    async fn range_stream(
        &self,
        _request: Request<PbRangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        Err(Status::unimplemented("etcd of Debian has no RangeStream"))
    }

    async fn put(&self, request: Request<PbPutRequest>) -> Result<Response<PbPutResponse>, Status> {
        self.path.arrive().await?;
        let put = request.into_inner();
        let ((), header) = self.apply(|store| store.put(&put.key, put.value))?;
        self.answer(PbPutResponse { header, prev_kv: None }).await
    }

    async fn delete_range(
        &self,
        request: Request<PbDeleteRequest>,
    ) -> Result<Response<PbDeleteResponse>, Status> {
        self.path.arrive().await?;
        let delete = request.into_inner();
        let keys = Keys { key: delete.key, end: delete.range_end };
        let (gone, header) = self.apply(|store| store.delete(&keys))?;
        let deleted = i64::try_from(gone.len()).unwrap_or(i64::MAX);
        self.answer(PbDeleteResponse { header, deleted, prev_kvs: Vec::new() }).await
    }

    async fn txn(&self, request: Request<PbTxnRequest>) -> Result<Response<PbTxnResponse>, Status> {
        let (member, txn) = (self.clone(), request.into_inner());
        let lingers = member.path.lingers();
        let carry_out = async move {
            member.path.arrive().await?;
            check(&txn.success)?;
            check(&txn.failure)?;
            let careless_of = member.shared.careless_of.clone();
            let careless = |compare: &PbCompare| {
                careless_of.iter().any(|of| compare.key.starts_with(of.as_bytes()))
            };
            member.apply(|store| {
                let holds = |compare: &PbCompare| careless(compare) || holds(store, compare);
                let succeeded = txn.compare.iter().all(holds);
                let ops = if succeeded { &txn.success } else { &txn.failure };
                let responses =
                    ops.iter().map(|op| operate(store, op)).collect::<Result<_, _>>()?;
                Ok((succeeded, responses))
            })
        };
        let gone = |error: tokio::task::JoinError| Status::internal(error.to_string());
        let carried_out =
            if lingers { tokio::spawn(carry_out).await.map_err(gone)? } else { carry_out.await };
        let ((succeeded, responses), header) = carried_out?;
        self.answer(PbTxnResponse { header, succeeded, responses }).await
    }

    async fn compact(
        &self,
        request: Request<PbCompactionRequest>,
    ) -> Result<Response<PbCompactionResponse>, Status> {
        self.path.arrive().await?;
        let revision = request.get_ref().revision;
        let ((), header) = self.apply(|store| store.compact(revision))?;
        self.answer(PbCompactionResponse { header }).await
    }
}

/// Something went out to one client's watch connection.
type Sent = Result<PbWatchResponse, Status>;

/// All watches of one connection.
struct Watching {
    member: Member,
    /// By id: its keys, and the revision up to which it was told from the log.
    watches: BTreeMap<i64, (Keys, i64)>,
    next: i64,
    out: mpsc::Sender<Sent>,
}

#[async_trait::async_trait]
impl PbWatchService for Member {
    type WatchStream = ReceiverStream<Sent>;

    async fn watch(
        &self,
        request: Request<Streaming<PbWatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.path.arrive().await?;
        let (out, stream) = mpsc::channel(256);
        let watching = Watching { member: self.clone(), watches: BTreeMap::new(), next: 0, out };
        tokio::spawn(watching.serve(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl Watching {
    async fn serve(mut self, mut requests: Streaming<PbWatchRequest>) {
        let mut batches = self.member.shared.batches.subscribe();
        loop {
            let done = tokio::select! {
                biased;
                // The client hung up.
                () = self.out.closed() => return,
                request = requests.next() => match request {
                    Some(Ok(request)) => self.request(request, &mut batches).await,
                    _ => return,
                },
                batch = batches.recv() => match batch {
                    Ok(batch) => self.batch(&batch).await,
                    // So far behind that batches were dropped: etcd would catch up; this one hangs up.
                    Err(_) => Err(Status::unavailable("etcdserver: watcher too far behind")),
                },
            };
            if let Err(status) = done {
                let _ = self.out.send(Err(status)).await;
                return;
            }
        }
    }

    async fn send(&self, response: PbWatchResponse) -> Result<(), Status> {
        self.member.path.come_back().await?;
        self.out.send(Ok(response)).await.map_err(|_| Status::cancelled("the client is gone"))
    }

    async fn batch(&self, happened: &[Happened]) -> Result<(), Status> {
        let revision = happened.last().map_or(0, |(revision, _)| *revision);
        for (watch_id, (keys, told)) in &self.watches {
            let events = of_range(happened, keys);
            if revision > *told && !events.is_empty() {
                let header = Some(PbResponseHeader { revision, ..PbResponseHeader::default() });
                self.send(PbWatchResponse {
                    header,
                    watch_id: *watch_id,
                    events,
                    ..PbWatchResponse::default()
                })
                .await?;
            }
        }
        Ok(())
    }

    async fn request(
        &mut self,
        request: PbWatchRequest,
        batches: &mut broadcast::Receiver<super::Batch>,
    ) -> Result<(), Status> {
        self.member.path.arrive().await?;
        match request.request_union {
            Some(PbWatchRequestUnion::CreateRequest(create)) => {
                let keys = Keys { key: create.key, end: create.range_end };
                self.create(keys, create.start_revision, batches).await
            }
            Some(PbWatchRequestUnion::CancelRequest(cancel)) => {
                self.watches.remove(&cancel.watch_id);
                let header = header(&self.member.shared.store());
                self.send(PbWatchResponse {
                    header,
                    watch_id: cancel.watch_id,
                    canceled: true,
                    ..PbWatchResponse::default()
                })
                .await
            }
            _ => {
                // Progress: everything before it has gone out, so what waits goes first.
                let header = header(&self.member.shared.store());
                while let Ok(batch) = batches.try_recv() {
                    self.batch(&batch).await?;
                }
                self.send(PbWatchResponse { header, watch_id: -1, ..PbWatchResponse::default() })
                    .await
            }
        }
    }

    async fn create(
        &mut self,
        keys: Keys,
        from: i64,
        batches: &mut broadcast::Receiver<super::Batch>,
    ) -> Result<(), Status> {
        let watch_id = self.next;
        self.next += 1;
        // What happened up to this instant comes from the log, everything later as batches.
        while let Ok(batch) = batches.try_recv() {
            self.batch(&batch).await?;
        }
        let (past, header, compacted, now) = {
            let store = self.member.shared.store();
            let past = if from > 0 { store.since(&keys, from) } else { Ok(Vec::new()) };
            (past, header(&store), store.compacted, store.revision)
        };
        let created = PbWatchResponse { header, watch_id, created: true, ..Default::default() };
        self.send(created.clone()).await?;
        let Ok(past) = past else {
            return self
                .send(PbWatchResponse {
                    created: false,
                    canceled: true,
                    compact_revision: compacted,
                    ..created
                })
                .await;
        };
        self.watches.insert(watch_id, (keys, now));
        let events: Vec<PbEvent> = past.into_iter().map(|(_, event)| event).collect();
        if !events.is_empty() {
            let header = Some(PbResponseHeader { revision: now, ..PbResponseHeader::default() });
            self.send(PbWatchResponse { header, watch_id, events, ..Default::default() }).await?;
        }
        Ok(())
    }
}
