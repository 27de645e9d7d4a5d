//! Keeps the networks of this host as the snapshot wants them.
//!
//! VM tasks wait until the network of their placement's revision was applied before they start a guest.

use super::{AgentParts, wanted};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The net under lost wake-ups, and the rhythm in which the machine is compared with what is wanted.
const NET: Duration = Duration::from_secs(10);
/// The pause after a failure.
const RETRY: Duration = Duration::from_millis(500);

/// Applies until `cancel`; `applied` tells up to which revision of the store the networks are in place.
pub async fn run(parts: Arc<AgentParts>, applied: watch::Sender<i64>, cancel: CancellationToken) {
    let mut live = parts.live.clone();
    let mut last: Option<Vec<crate::network::driver::NetworkWanted>> = None;
    while !cancel.is_cancelled() {
        let snapshot = Arc::clone(&live.borrow_and_update());
        let mut pause = NET;
        let networks = wanted::networks(&snapshot, &parts.me);
        // Most changes of the snapshot do not touch the networks; those cost nothing. The timer compares anyway.
        let timer = last.is_none();
        if timer || last.as_ref() != Some(&networks) {
            match parts.network.apply(&networks).await {
                Ok(()) => {
                    parts.solved("network");
                    last = Some(networks);
                }
                Err(error) => {
                    parts.problem("network", &error);
                    last = None;
                    pause = RETRY;
                }
            }
        }
        if last.is_some() {
            applied.send_replace(snapshot.revision);
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            _ = live.changed() => {}
            () = parts.clock.sleep(pause) => { last = None; }
        }
    }
}
