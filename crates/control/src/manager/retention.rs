//! Events and audit entries are kept up to a number; the manager takes the oldest out once in a while.

use haven_model::keys;
use haven_store::raw::{EtcdStore, Op, StoreError};

/// How many of each are kept.
const KEPT: [(&str, i64); 2] = [(keys::EVENTS, 10_000), (keys::AUDIT, 20_000)];

/// Takes out what is too many. Keys of both sort by time.
///
/// # Errors
/// When the store cannot be reached; the next call does the rest.
pub async fn prune(store: &EtcdStore) -> Result<(), StoreError> {
    for (prefix, kept) in KEPT {
        keep_newest(store, prefix, kept).await?;
    }
    Ok(())
}

pub(super) async fn keep_newest(
    store: &EtcdStore,
    prefix: &str,
    kept: i64,
) -> Result<(), StoreError> {
    let newest = store.last(prefix, None, kept + 1).await?.kvs;
    if i64::try_from(newest.len()).unwrap_or(i64::MAX) <= kept {
        return Ok(());
    }
    let Some(oldest_kept) = newest.iter().rev().nth(1) else { return Ok(()) };
    let range = Op::DeleteRange(prefix.to_owned(), oldest_kept.key.clone());
    store.txn(vec![], vec![range]).await.map(|_| ())
}
