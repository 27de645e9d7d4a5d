//! What this daemon observed that does not stand in the store: for how long each renewal record stood unchanged by
//! its own clock, which of them a linearizable read confirmed, which hosts were read as powered off.
//!
//! Every daemon keeps these at all times, so that a new manager acts on them at once and starts no timer over.

use haven_model::{Name, Snapshot, keys, plan::LeaseAge};
use haven_store::clock::{Clock, Mono};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Tells at which revision and since when the record under a key has stood unchanged in this daemon's eyes.
pub type ObservedSince = Arc<dyn Fn(&str) -> Option<(i64, Mono)> + Send + Sync>;

#[derive(Default)]
struct Found {
    /// Per host the revision that was confirmed.
    confirmed: BTreeMap<Name, i64>,
    /// Per host the session it had when its power was read as off.
    powered_off: BTreeMap<Name, u64>,
}

/// Cheap to clone; all clones see the same.
#[derive(Clone)]
pub struct Observer {
    since: ObservedSince,
    clock: Clock,
    found: Arc<Mutex<Found>>,
}

impl Observer {
    /// Reads observation times through `since`.
    #[must_use]
    pub fn new(since: ObservedSince, clock: Clock) -> Self {
        Self { since, clock, found: Arc::default() }
    }

    /// The age of every renewal record.
    #[must_use]
    pub fn lease_ages(&self, snapshot: &Snapshot) -> BTreeMap<Name, LeaseAge> {
        let now = self.clock.now();
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        snapshot
            .leases
            .keys()
            .filter_map(|host| {
                let (revision, at) = (self.since)(&keys::lease(host))?;
                let unchanged_ms = now.0.saturating_sub(at.0) / 1_000_000;
                let confirmed = found.confirmed.get(host) == Some(&revision);
                Some((host.clone(), LeaseAge { revision, unchanged_ms, confirmed }))
            })
            .collect()
    }

    /// For how many milliseconds the manager's record has stood unchanged: writing it is a sign of life too.
    #[must_use]
    pub fn manager_age_ms(&self) -> Option<u64> {
        let (_, at) = (self.since)(keys::MANAGER)?;
        Some(self.clock.now().0.saturating_sub(at.0) / 1_000_000)
    }

    /// Hosts read as off, with their session then.
    #[must_use]
    pub fn powered_off(&self) -> BTreeMap<Name, u64> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).powered_off.clone()
    }

    pub(super) fn confirm(&self, host: &Name, revision: i64) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.confirmed.insert(host.clone(), revision);
    }

    pub(super) fn powered_off_at(&self, host: &Name, session: u64) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.powered_off.insert(host.clone(), session);
    }
}
