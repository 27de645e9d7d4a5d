//! Keeps the networks of this host as the snapshot wants them.
//!
//! VM tasks wait until the networks of their cards were applied at the revision of their placement before they start a
//! guest. A network that cannot be made keeps no VM waiting that has no card in it. What is here for a record that
//! cannot be read stays as it is, and nothing else waits for it.

use super::{AgentParts, chain, wanted};
use crate::network::driver::{LeftAlone, NetworkWanted};
use haven_model::Name;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The net under lost wake-ups, and the rhythm in which the machine is compared with what is wanted.
const NET: Duration = Duration::from_secs(10);
/// The pause after the first failure; it doubles with each, up to [`NET`].
const RETRY: Duration = Duration::from_millis(500);

/// How the networks of this host stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks {
    /// They are in place as of this revision of the store, but for those that failed.
    pub revision: i64,
    /// Why nothing can be done at all, if so.
    pub broken: Option<String>,
    /// Those that could not be made, with the reason.
    pub failed: BTreeMap<String, String>,
}

impl Networks {
    /// What a VM placed at `revision` with cards in `names` still lacks, for people.
    #[must_use]
    pub fn lacks(&self, revision: i64, names: &[Name]) -> Option<String> {
        if names.is_empty() {
            return None;
        }
        if self.revision < revision {
            let why = self.broken.as_deref().unwrap_or("this host has not come to it yet");
            return Some(format!("the networks of this host are not ready: {why}"));
        }
        let (name, why) = names.iter().find_map(|name| self.failed.get_key_value(name.as_str()))?;
        Some(format!("the network `{name}` cannot be made on this host: {why}"))
    }
}

/// Applies until `cancel`; `applied` tells how the networks stand.
pub async fn run(
    parts: Arc<AgentParts>,
    applied: watch::Sender<Networks>,
    cancel: CancellationToken,
) {
    let mut live = parts.live.clone();
    let mut last: Option<(Vec<NetworkWanted>, LeftAlone)> = None;
    let (mut due, mut failures) = (parts.clock.now(), 0u32);
    while !cancel.is_cancelled() {
        let snapshot = Arc::clone(&live.borrow_and_update());
        let networks =
            (wanted::networks(&snapshot, &parts.me), wanted::left_alone(&snapshot, &parts.me));
        // Most changes of the snapshot do not touch the networks; those cost nothing. The timer compares anyway.
        if last.as_ref() != Some(&networks) || parts.clock.now() >= due {
            if last.as_ref() != Some(&networks) {
                failures = 0;
            }
            let well = apply(&parts, &networks, snapshot.revision, &applied).await;
            failures = if well { 0 } else { failures + 1 };
            let pause = if well { NET } else { RETRY.saturating_mul(1 << (failures - 1).min(5)) };
            due = parts.clock.now().plus(pause.min(NET));
            last = Some(networks);
        } else {
            applied.send_if_modified(|now| {
                // What is wanted did not change, so it stands at this revision as it did before.
                let newer = now.broken.is_none() && now.revision < snapshot.revision;
                if newer {
                    now.revision = snapshot.revision;
                }
                newer
            });
        }
        let rest = due.since(parts.clock.now());
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            _ = live.changed() => {}
            () = parts.clock.sleep(rest) => {}
        }
    }
}

/// Applies once and tells; true when all is in place.
async fn apply(
    parts: &AgentParts,
    (networks, left_alone): &(Vec<NetworkWanted>, LeftAlone),
    revision: i64,
    applied: &watch::Sender<Networks>,
) -> bool {
    let before = applied.borrow().clone();
    let now = match parts.network.apply(networks, left_alone).await {
        Ok(failed) => {
            parts.solved("network");
            for (name, error) in &failed {
                parts.problem(&part(name), error);
            }
            let failed = failed.iter().map(|(name, error)| (name.clone(), chain(error))).collect();
            Networks { revision, broken: None, failed }
        }
        Err(error) => {
            parts.problem("network", &error);
            Networks { broken: Some(chain(&error)), ..before.clone() }
        }
    };
    let failing = |state: &Networks| state.failed.keys().cloned().collect::<BTreeSet<_>>();
    for name in failing(&before).difference(&failing(&now)) {
        parts.solved(&part(name));
    }
    let well = now.broken.is_none() && now.failed.is_empty();
    applied.send_replace(now);
    well
}

/// Under which a network's failure stands among this host's problems.
fn part(network: &str) -> String {
    format!("network {network}")
}
