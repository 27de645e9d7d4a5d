//! Shuts disks in Ceph to the clients of a host that is not heard, when the plan asks this host for it
//! (docs/decisions/0024-storage-fenced.md).

use crate::agent::{AgentParts, storage::StorageFailure};
use futures::future::try_join_all;
use haven_model::{
    Name, Snapshot, Versioned,
    clients::{DiskClients, ShutDisks},
    keys,
};
use haven_store::raw::{Compare, Op};
use std::{sync::Arc, time::Duration};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// After something that failed.
const AGAIN: Duration = Duration::from_secs(1);
/// The net under lost wake-ups.
const NET: Duration = Duration::from_secs(10);

/// So many clients are shut out at once: each is a program, on a host that is about to start what the lost one had.
static TURNS: Semaphore = Semaphore::const_new(4);

/// The VMs whose disks this host is to shut.
fn asked(live: &Snapshot, me: &Name) -> Vec<(Name, Versioned<DiskClients>)> {
    let mine = |shut: &ShutDisks| shut.by == *me && !shut.done;
    let all = live.clients.iter().filter(|(_, of)| of.shut.as_ref().is_some_and(mine));
    all.map(|(vm, of)| (vm.clone(), of.clone())).collect()
}

/// Shuts until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let mut live = parts.live.clone();
    while !cancel.is_cancelled() {
        let now = Arc::clone(&live.borrow_and_update());
        let mut pause = NET;
        let asked = asked(&now, &parts.me);
        let work = asked.iter().map(|(vm, record)| shut(&parts, &now, vm, record));
        let work = async {
            for (done, (vm, _)) in futures::future::join_all(work).await.into_iter().zip(&asked) {
                match done {
                    Ok(()) => parts.solved(&format!("the disks of {vm} in Ceph")),
                    Err(failure) => {
                        parts.problem(&format!("the disks of {vm} in Ceph"), &failure);
                        pause = AGAIN;
                    }
                }
            }
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = work => {}
        }
        let others = live.wait_for(|live| {
            let wanted = self::asked(live, &parts.me);
            wanted
                .iter()
                .any(|(vm, of)| !asked.iter().any(|(a, b)| a == vm && b.revision == of.revision))
        });
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            _ = others => {}
            () = parts.clock.sleep(pause) => {}
        }
    }
}

/// Shuts the disks of one VM, and says so. Every client that is noted is refused by the cluster of its pool from then on.
async fn shut(
    parts: &AgentParts,
    live: &Snapshot,
    vm: &Name,
    record: &Versioned<DiskClients>,
) -> Result<(), StorageFailure> {
    let says = |what: String| StorageFailure { what };
    let clients = record.open.iter().map(async |open| {
        let pool = live.pools.get(&open.pool);
        let pool = pool.ok_or_else(|| says(format!("the pool `{}` is not known", open.pool)))?;
        let _turn = TURNS.acquire().await;
        parts.storage.shut_client(&pool.spec, &open.client).await
    });
    try_join_all(clients).await?;
    let done = DiskClients {
        shut: Some(ShutDisks { by: parts.me.clone(), done: true }),
        ..(*record.value).clone()
    };
    let key = keys::clients(vm);
    let compare = vec![Compare::ModRevision(key.clone(), record.revision)];
    let value = serde_json::to_vec(&done).expect("a record is plain data");
    let wrote = parts.store.txn(compare, vec![Op::Put(key, value.into())]).await;
    let wrote = wrote.map_err(|error| {
        says(format!("that the disks of {vm} are shut could not be written: {error}"))
    })?;
    if wrote.succeeded {
        let open: Vec<_> = record.open.iter().map(|one| one.client.as_str()).collect();
        tracing::info!(%vm, ?open, "its disks in Ceph are shut to what had them open");
    }
    Ok(())
}
