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

#[cfg(test)]
mod tests {
    use super::follow;
    use haven_model::{ClusterSpec, Snapshot, Timers, snapshot::Versioned, units::Millis};
    use std::sync::Arc;
    use tokio::sync::watch;

    fn with(revision: i64, timers: Timers) -> Arc<Snapshot> {
        let spec = ClusterSpec { timers, ..ClusterSpec::default() };
        let cluster = Some(Versioned { revision, value: Arc::new(spec) });
        Arc::new(Snapshot { cluster, ..Snapshot::default() })
    }

    #[tokio::test]
    async fn a_change_is_followed_and_an_unsafe_one_or_a_lost_spec_is_not() {
        let (copy, live) = watch::channel(Arc::new(Snapshot::default()));
        let mut timers = follow(live);
        assert_eq!(*timers.borrow_and_update(), Timers::default());
        let longer = Timers { lease: Millis(6000), ..Timers::default() };
        copy.send_replace(with(1, longer.clone()));
        timers.changed().await.unwrap();
        assert_eq!(*timers.borrow_and_update(), longer);
        copy.send_replace(with(2, Timers { lease: Millis(4500), ..Timers::default() }));
        tokio::task::yield_now().await;
        copy.send_replace(Arc::new(Snapshot::default()));
        tokio::task::yield_now().await;
        drop(copy);
        assert!(timers.changed().await.is_err(), "nothing was told until the live copy ended");
        assert_eq!(*timers.borrow(), longer);
    }
}
