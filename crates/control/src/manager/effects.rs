//! Actions that change nothing in the store: reading a renewal record linearizably, reading a host's power and
//! switching it off.
//!
//! Each runs as a task of its own, so that a dead power controller never holds up a plan. Its result is an
//! observation, and its end wakes the manager.

use super::observe::Observer;
use async_trait::async_trait;
use haven_model::{Action, Name, PowerProblem, PowerSpec, PowerState, Snapshot, keys};
use haven_store::{clock::Clock, raw::EtcdStore};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::Notify;

/// Reads and switches a host's power. Passwords come as they stand in the store.
#[async_trait]
pub trait Power: Send + Sync {
    /// Reads it, and touches nothing.
    ///
    /// # Errors
    /// When it could not be reached or read.
    async fn state(&self, host: &Name, power: &PowerSpec) -> Result<PowerState, PowerProblem>;
    /// Returns only when the power was read back as off.
    ///
    /// # Errors
    /// When it could not be reached or read.
    async fn off(&self, host: &Name, power: &PowerSpec) -> Result<(), PowerProblem>;
}

/// How long after a failed power-off the next try may follow.
const POWER_RETRY: Duration = Duration::from_secs(1);
/// How long after a read that found a host on, or nothing, it is read again.
const READ_AGAIN: Duration = Duration::from_millis(250);
/// Drivers have deadlines of their own; one that forgets them is given up after this, and asked anew.
const POWER_DEADLINE: Duration = Duration::from_secs(120);

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
            Action::ReadPower { host, session } => {
                self.seek(Seek::Read, host, *session, observer, snapshot);
            }
            Action::PowerOff { host, session } => {
                self.seek(Seek::Cut, host, *session, observer, snapshot);
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

    /// The two ways run beside each other: a read that hangs holds up no power cut.
    fn seek(&self, how: Seek, host: &Name, session: u64, observer: &Observer, snapshot: &Snapshot) {
        let Some(power) = snapshot.hosts.get(host).and_then(|h| h.spec.power.clone()) else {
            return;
        };
        let name = format!("{how:?} {host} {session}");
        if !self.begin(&name) {
            return;
        }
        let (driver, clock) = (Arc::clone(&self.power), self.clock.clone());
        let (in_flight, done) = (Arc::clone(&self.in_flight), Arc::clone(&self.done));
        let (host, observer) = (host.clone(), observer.clone());
        tokio::spawn(async move {
            let asked = async {
                // A host that says it is off is told to go off nonetheless: some controllers call one off that sleeps.
                if how == Seek::Read && driver.state(&host, &power).await? == PowerState::On {
                    return Ok(false);
                }
                driver.off(&host, &power).await.map(|()| true)
            };
            let answer = tokio::select! {
                biased;
                answer = asked => answer,
                () = clock.sleep(POWER_DEADLINE) => Err(PowerProblem {
                    message: format!("the power controller of {host} gave no answer within {POWER_DEADLINE:?}"),
                    hint: "`haven host fence test` asks it again".into(),
                }),
            };
            match (answer, how) {
                (Ok(true), _) => {
                    tracing::warn!(%host, "its power was read back as off");
                    observer.powered_off_at(&host, session);
                }
                (Ok(false), _) => clock.sleep(READ_AGAIN).await,
                (Err(why), Seek::Read) => {
                    tracing::debug!(%host, %why, "its power cannot be read");
                    clock.sleep(READ_AGAIN).await;
                }
                (Err(why), Seek::Cut) => {
                    tracing::warn!(%host, %why, "it could not be switched off; its lease will expire instead");
                    clock.sleep(POWER_RETRY).await;
                }
            }
            Self::end(&in_flight, &name, &done);
        });
    }
}

/// How a proof by power is sought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seek {
    /// Only if the host is off already.
    Read,
    /// Whatever it does.
    Cut,
}
