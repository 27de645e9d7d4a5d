//! Looks at the room in the pools, and tells it when it has changed by so much that somebody would want to know.

use super::{AgentParts, own_record::OwnRecord};
use haven_model::{Name, PoolSpec, keys, pool::HostRooms};
use haven_store::raw::Op;
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// Between two looks.
const RHYTHM: Duration = Duration::from_secs(30);
/// After a word that the store did not take.
const AGAIN: Duration = Duration::from_secs(5);

/// Looks until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let (mut told, mut written) = (OwnRecord::default(), None);
    let mut live = parts.live.clone();
    while !cancel.is_cancelled() {
        live.borrow_and_update();
        let pools = pools(&parts);
        let pause =
            if tell(&parts, &pools, &mut told, &mut written).await { RHYTHM } else { AGAIN };
        let mut news = live.clone();
        let others = async {
            while news.changed().await.is_ok() {
                if self::pools(&parts) != pools {
                    return;
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = others => {}
            () = parts.clock.sleep(pause) => {}
        }
    }
}

fn pools(parts: &AgentParts) -> Vec<(Name, PoolSpec)> {
    let live = parts.live.borrow();
    live.pools.iter().map(|(name, pool)| (name.clone(), pool.spec.clone())).collect()
}

/// Tells how it is, if that is news; false when it is to be tried again soon.
async fn tell(
    parts: &AgentParts,
    pools: &[(Name, PoolSpec)],
    told: &mut OwnRecord,
    written: &mut Option<HostRooms>,
) -> bool {
    let Some(session) = parts.current_session() else { return false };
    let specs: Vec<PoolSpec> = pools.iter().map(|(_, spec)| spec.clone()).collect();
    parts.storage.settle(&specs).await;
    let mut rooms = HostRooms { session: session.number, ..HostRooms::default() };
    // One that hangs holds up none of the others.
    let asked = pools.iter().map(|(_, pool)| parts.storage.room(pool));
    let answers = futures::future::join_all(asked).await;
    for ((name, _), answer) in pools.iter().zip(answers) {
        match answer {
            Ok(Some(room)) => _ = rooms.pools.insert(name.clone(), room),
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, pool = %name, "its room is not known"),
        }
    }
    let live = Arc::clone(&parts.live.borrow());
    let there = live.rooms.get(&parts.me).map(|rooms| rooms.revision);
    // Who has no pool has nothing to tell.
    let stands = match &written {
        Some(before) => !rooms.differs(before) && !told.overwritten(&live, there),
        None => rooms.pools.is_empty() && there.is_none(),
    };
    if stands {
        return true;
    }
    let key = keys::host_rooms(&parts.me);
    let value = serde_json::to_vec(&rooms).expect("rooms are plain data");
    let compare = told.compare(&live, key.clone(), there).into_iter().collect();
    match parts.store.txn(compare, vec![Op::Put(key, value.into())]).await {
        Ok(outcome) if outcome.succeeded => {
            told.written(outcome.revision);
            *written = Some(rooms);
            true
        }
        Ok(_) => false,
        Err(error) => {
            tracing::debug!(%error, "the room of this host's pools could not be written");
            false
        }
    }
}
