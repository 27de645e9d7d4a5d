//! The timers that this host lives by: those of the cluster's spec, as the live copy shows them.

use haven_model::{Snapshot, Timers};
use std::sync::Arc;
use tokio::sync::watch;

/// The timers in a spec, if it has some that are safe.
fn safe(snapshot: &Snapshot) -> Option<Timers> {
    let spec = snapshot.cluster.as_ref()?;
    match spec.timers.check() {
        Ok(()) => Some(spec.timers.clone()),
        Err(error) => {
            tracing::error!(%error, "this host keeps the timers that it has; mend them with `haven edit cluster`");
            None
        }
    }
}

/// Follows them until the live copy ends. Before the live copy shows a spec they are the defaults, and unsafe ones
/// are never taken over: the API refuses to write such.
#[must_use]
pub fn follow(mut live: watch::Receiver<Arc<Snapshot>>) -> watch::Receiver<Timers> {
    let mut spec = live.borrow_and_update().cluster.as_ref().map(|spec| spec.revision);
    let (out, timers) = watch::channel(safe(&live.borrow()).unwrap_or_default());
    tokio::spawn(async move {
        while live.changed().await.is_ok() {
            let snapshot = Arc::clone(&live.borrow_and_update());
            let now = snapshot.cluster.as_ref().map(|spec| spec.revision);
            if std::mem::replace(&mut spec, now) == now {
                continue;
            }
            let Some(found) = safe(&snapshot) else { continue };
            out.send_if_modified(|shown| {
                let differs = *shown != found;
                if differs {
                    tracing::info!(timers = ?found, "this host lives by these timers now");
                    *shown = found;
                }
                differs
            });
        }
    });
    timers
}
