//! Actions that change nothing in the store: reading a renewal record linearizably, switching a host off.
//!
//! Each runs as a task of its own, so that a dead power controller never holds up a plan. Its result is an
//! observation, and its end wakes the manager.

use super::observe::Observer;
use async_trait::async_trait;
use haven_model::{Action, Name, Snapshot, host::PowerSpec, keys};
use haven_store::{clock::Clock, raw::EtcdStore};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::Notify;

/// Switches a host's power off.
#[async_trait]
pub trait Power: Send + Sync {
    /// Returns only when the power was read back as off.
    ///
    /// # Errors
    /// A sentence when that could not be reached or read.
    async fn off(&self, host: &Name, power: &PowerSpec) -> Result<(), String>;
}

/// How long after a failed power-off the next try may follow.
const POWER_RETRY: Duration = Duration::from_secs(1);

type InFlight = Arc<Mutex<BTreeSet<String>>>;

/// Runs effects, each at most once at a time.
pub struct Effects {
    store: EtcdStore,
    power: Arc<dyn Power>,
    clock: Clock,
    in_flight: InFlight,
    done: Arc<Notify>,
}

impl Effects {
    /// Nothing in flight.
    #[must_use]
    pub fn new(store: EtcdStore, power: Arc<dyn Power>, clock: Clock) -> Self {
        Self { store, power, clock, in_flight: InFlight::default(), done: Arc::new(Notify::new()) }
    }

    /// Resolves when an effect has ended since the last call.
    pub async fn finished(&self) {
        self.done.notified().await;
    }

    /// Starts an action that is an effect, unless the same is in flight.
    pub fn start(&self, action: &Action, observer: &Observer, snapshot: &Snapshot) {
        match action {
            Action::ConfirmLease { host, revision } => {
                self.confirm(host.clone(), *revision, observer.clone());
            }
            Action::PowerOff { host, session } => {
                let Some(power) = snapshot.hosts.get(host).and_then(|h| h.spec.power.clone())
                else {
                    return;
                };
                self.power_off(host.clone(), *session, power, observer.clone());
            }
            _ => {}
        }
    }

    /// Begins a named effect; false when it is in flight already.
    fn begin(&self, name: &str) -> bool {
        self.in_flight.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned())
    }

    fn end(in_flight: &InFlight, name: &str, done: &Notify) {
        in_flight.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        done.notify_one();
    }

    fn confirm(&self, host: Name, revision: i64, observer: Observer) {
        let name = format!("confirm {host} {revision}");
        if !self.begin(&name) {
            return;
        }
        let (store, clock) = (self.store.clone(), self.clock.clone());
        let (in_flight, done) = (Arc::clone(&self.in_flight), Arc::clone(&self.done));
        tokio::spawn(async move {
            match store.get(&keys::lease(&host)).await {
                Ok(Some(record)) if record.mod_revision == revision => {
                    observer.confirm(&host, revision);
                }
                Ok(_) => tracing::debug!(%host, "its lease was renewed after all"),
                Err(error) => {
                    tracing::debug!(%host, %error, "could not confirm the lease");
                    clock.sleep(Duration::from_millis(50)).await;
                }
            }
            Self::end(&in_flight, &name, &done);
        });
    }

    fn power_off(&self, host: Name, session: u64, power: PowerSpec, observer: Observer) {
        let name = format!("power off {host} {session}");
        if !self.begin(&name) {
            return;
        }
        let (driver, clock) = (Arc::clone(&self.power), self.clock.clone());
        let (in_flight, done) = (Arc::clone(&self.in_flight), Arc::clone(&self.done));
        tokio::spawn(async move {
            match driver.off(&host, &power).await {
                Ok(()) => {
                    tracing::warn!(%host, "its power was read back as off");
                    observer.powered_off_at(&host, session);
                }
                Err(why) => {
                    tracing::warn!(%host, why, "it could not be switched off; its lease will expire instead");
                    clock.sleep(POWER_RETRY).await;
                }
            }
            Self::end(&in_flight, &name, &done);
        });
    }
}
