//! Watches the uplinks of this host: what guests in bridges and services' addresses are reached by.
//!
//! What has had no link for [`LOST`] is told to the cluster, which then moves guests and addresses to hosts where it
//! has one; and it is taken back only after [`WELL`], so that a loose cable does not send them back and forth.

use super::{AgentParts, wanted};
use crate::network::uplink::Uplink;
use haven_model::ObjectRef;
use haven_store::clock::Mono;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// So long without a link is a loss.
const LOST: Duration = Duration::from_secs(1);
/// So long with one is none any more.
const WELL: Duration = Duration::from_secs(10);
/// The least time between two looks, however many cards change.
const LOOK: Duration = Duration::from_millis(100);
/// The net under lost wake-ups.
const NET: Duration = Duration::from_secs(30);

/// The networks and services whose uplinks here are cut, as this host told last.
#[derive(Default)]
pub struct CutOff(Mutex<BTreeSet<ObjectRef>>);

impl CutOff {
    /// All of them.
    #[must_use]
    pub fn list(&self) -> BTreeSet<ObjectRef> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One uplink that was or is without a link.
struct Seen {
    /// Since when it is as it is now.
    since: Mono,
    /// Why it has none now; nothing when it has one again.
    why: Option<String>,
    /// It is told as lost.
    told: bool,
}

/// Looks until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let mut live = parts.live.clone();
    let mut seen: BTreeMap<Uplink, Seen> = BTreeMap::new();
    let mut last = BTreeMap::new();
    while !cancel.is_cancelled() {
        let wanted = wanted::uplinks(&live.borrow_and_update());
        let uplinks: BTreeSet<Uplink> = wanted.values().cloned().collect();
        let mut pause = NET;
        if !uplinks.is_empty() || !seen.is_empty() {
            match parts.uplinks.cut(&uplinks).await {
                Ok(cut) => {
                    parts.solved("uplinks");
                    let next = step(&mut seen, &uplinks, &cut, parts.clock.now());
                    pause = next.map_or(NET, |next| next.min(NET));
                    last = tell(&parts, &wanted, &seen, &last);
                }
                Err(error) => parts.problem("uplinks", &error),
            }
        }
        // Much of the store changes that has nothing to do with uplinks.
        let mut news = live.clone();
        let other = async {
            while news.changed().await.is_ok() {
                if wanted::uplinks(&news.borrow_and_update()) != wanted {
                    return;
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = other => {}
            () = parts.uplinks.changed(), if !uplinks.is_empty() => {}
            () = parts.clock.sleep(pause) => {}
        }
        parts.clock.sleep(LOOK).await;
    }
}

/// Takes in one look; how long until the next one is due whatever happens.
fn step(
    seen: &mut BTreeMap<Uplink, Seen>,
    wanted: &BTreeSet<Uplink>,
    cut: &BTreeMap<Uplink, String>,
    now: Mono,
) -> Option<Duration> {
    seen.retain(|uplink, _| wanted.contains(uplink));
    for (uplink, why) in cut {
        let fresh = || Seen { since: now, why: None, told: false };
        let entry = seen.entry(uplink.clone()).or_insert_with(fresh);
        if entry.why.is_none() {
            entry.since = now;
        }
        entry.why = Some(why.clone());
    }
    let mut next = None;
    seen.retain(|uplink, entry| {
        if !cut.contains_key(uplink) && entry.why.take().is_some() {
            entry.since = now;
        }
        let steady = now.since(entry.since);
        let (lasts, told) = match entry.why {
            Some(_) => (LOST, true),
            None if !entry.told => return false,
            None => (WELL, false),
        };
        if steady >= lasts {
            entry.told = told;
            return told;
        }
        if entry.told != told {
            let rest = lasts.saturating_sub(steady);
            next = Some(next.map_or(rest, |next: Duration| next.min(rest)));
        }
        true
    });
    next
}

/// Tells what is cut off: to the cluster, and in words to people. Returns what was told, by object.
fn tell(
    parts: &AgentParts,
    wanted: &BTreeMap<ObjectRef, Uplink>,
    seen: &BTreeMap<Uplink, Seen>,
    last: &BTreeMap<ObjectRef, String>,
) -> BTreeMap<ObjectRef, String> {
    let lost = |uplink: &Uplink| seen.get(uplink).filter(|entry| entry.told);
    let now: BTreeMap<ObjectRef, String> = wanted
        .iter()
        .filter_map(|(object, uplink)| Some((object, lost(uplink)?)))
        .map(|(object, entry)| {
            // One that has come back stays told for a while, with what was wrong.
            let before = || last.get(object).cloned().unwrap_or_default();
            (object.clone(), entry.why.clone().unwrap_or_else(before))
        })
        .collect();
    let objects: BTreeSet<ObjectRef> = now.keys().cloned().collect();
    *parts.cut_off.0.lock().unwrap_or_else(PoisonError::into_inner) = objects;
    let part = |object: &ObjectRef| format!("uplink of {object}");
    for object in last.keys().filter(|object| !now.contains_key(*object)) {
        parts.solved(&part(object));
    }
    for (object, why) in &now {
        if parts.problems.set(&part(object), Some(why.clone())) {
            tracing::warn!(%object, why, "is cut off from the world on this host");
        }
    }
    now
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_told_after_a_second_and_taken_back_after_ten() {
        let uplink = || Uplink::Bridge("br0".into());
        let wanted: BTreeSet<Uplink> = [uplink()].into();
        let mut seen = BTreeMap::new();
        let mut look = |at_ms: u64, cut: bool| {
            let cut = if cut { [(uplink(), "eth1".to_owned())].into() } else { BTreeMap::new() };
            let now = Mono(0).plus(Duration::from_millis(at_ms));
            let next = step(&mut seen, &wanted, &cut, now);
            (seen.values().any(|entry| entry.told), next.map(|next| next.as_millis()))
        };
        assert_eq!(look(0, false), (false, None));
        assert_eq!(look(1_000, true), (false, Some(1_000)));
        // One that is back within the second was no loss.
        assert_eq!(look(1_900, false), (false, None));
        assert_eq!(look(2_000, true), (false, Some(1_000)));
        assert_eq!(look(3_000, true), (true, None));
        assert_eq!(look(60_000, true), (true, None));
        assert_eq!(look(61_000, false), (true, Some(10_000)));
        // It goes again before it was well for long enough.
        assert_eq!(look(66_000, true), (true, None));
        assert_eq!(look(67_000, false), (true, Some(10_000)));
        assert_eq!(look(76_900, false), (true, Some(100)));
        assert_eq!(look(77_000, false), (false, None));
    }

    #[test]
    fn what_nobody_asks_for_any_more_is_forgotten() {
        let uplink = Uplink::Near("10.0.0.9".parse().unwrap());
        let mut seen = BTreeMap::new();
        let cut = [(uplink.clone(), "eth1".to_owned())].into();
        let wanted: BTreeSet<Uplink> = [uplink].into();
        step(&mut seen, &wanted, &cut, Mono(0));
        step(&mut seen, &wanted, &cut, Mono(0).plus(LOST));
        assert!(seen.values().any(|entry| entry.told));
        step(&mut seen, &BTreeSet::new(), &BTreeMap::new(), Mono(0).plus(LOST));
        assert!(seen.is_empty());
    }
}
