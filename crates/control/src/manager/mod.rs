//! The manager: the one daemon that holds the manager lease. It reads a snapshot, plans, commits.
//!
//! ```text
//!   a change, a timer, an effect's end ──► wake
//!        snapshot + observations ──► plan (pure) ──► check ──► commit, one transaction per action
//!                                                                 each compares the manager's record
//! ```
//!
//! What it promises: waking carries no input, so no signal can be lost; a commit that fails ends the round and the
//! next round reads everything again; after a round it waits until its live copy shows what it wrote, so it never
//! plans on a past of its own making. Failover is this same loop.
//!
//! Rejected: a queue of events (state would live in the queue), and one large transaction per plan (etcd bounds the
//! number of operations, and one stale comparison would hold up everything else).

pub mod commit;
pub mod effects;
pub mod observe;
pub mod promises;
pub mod retention;
pub mod sealing;
pub mod term;

#[cfg(test)]
mod commit_test;
#[cfg(test)]
mod manager_test;
#[cfg(test)]
mod promises_test;
#[cfg(test)]
mod retention_test;
#[cfg(test)]
mod term_test;

use commit::{Author, commit_of, event_of, json, put_event};
use effects::Effects;
use haven_model::{Action, Name, ObjectRef, Observations, Plan, Planned, Snapshot, keys};
use haven_store::{
    clock::{Clock, Mono},
    raw::{Compare, EtcdStore, Op, StoreError},
    seal::ClusterKey,
};
use observe::Observer;
use promises::{Promises, long};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use term::{Candidate, Stand, stand};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

/// What the manager stands on.
pub struct ManagerConfig {
    /// This host.
    pub me: Name,
    /// The store.
    pub store: EtcdStore,
    /// The live copy.
    pub live: watch::Receiver<Arc<Snapshot>>,
    /// Notified when it does not show what it should.
    pub stale: Arc<Notify>,
    /// What this daemon observed of renewal records.
    pub observer: Observer,
    /// Hosts suspected by the heartbeats.
    pub suspected: watch::Receiver<BTreeSet<Name>>,
    /// This host's open session.
    pub session: watch::Receiver<Option<u64>>,
    /// What this daemon promised to hosts that cannot renew.
    pub promises: Promises,
    /// Controls power.
    pub power: Arc<dyn effects::Power>,
    /// Under which secrets are sealed; nothing on a host that cannot derive it.
    pub secrets: Option<ClusterKey>,
    /// This daemon's clock.
    pub clock: Clock,
    /// Wall clock, milliseconds since 1970, for what people read.
    pub wall_ms: Arc<dyn Fn() -> i64 + Send + Sync>,
}

/// With a slow store the last commits of a plan would rest on what was so long ago; what is left over is planned anew.
const OLD: Duration = Duration::from_secs(1);
/// The longest that a manager sleeps: the net under lost wake-ups.
const NET: Duration = Duration::from_secs(5);
/// The pause after a commit that something overtook, in which the live copy learns of it.
const OVERTAKEN: Duration = Duration::from_millis(20);
/// How long a round waits at once for the live copy to show its own commits. A plan on a past of the manager's own making
/// could do the same to two things at once, each of which it may do to one.
const CATCH_UP: Duration = Duration::from_secs(5);
/// A live copy that is later than so much is made anew: its watch may hang on a member of the store that died.
const STALE: Duration = Duration::from_millis(500);
/// The pause while the live copy still does not show them; each of its changes ends it.
const LAGS: Duration = Duration::from_millis(500);

/// How often old events and audit entries are taken out.
const PRUNE: Duration = Duration::from_secs(1800);

struct Manager {
    config: ManagerConfig,
    effects: Effects,
    events: u64,
    /// When old events are taken out next.
    next_prune: Mono,
    /// Objects whose last commit the store did not take.
    refused: BTreeSet<ObjectRef>,
    /// A commit was sent and its outcome is not known.
    doubt: bool,
    /// The revision of the last commit that is known. Nothing is planned on a copy that does not show it yet.
    own: i64,
}

/// Runs until `cancel`. Manages whenever this host holds the manager lease.
pub async fn run(config: ManagerConfig, cancel: CancellationToken) {
    let effects =
        Effects::new(config.store.clone(), Arc::clone(&config.power), config.clock.clone());
    // Not right at the start: then there are better things to do.
    let next_prune = config.clock.now().plus(PRUNE);
    let refused = BTreeSet::new();
    let mut manager =
        Manager { config, effects, events: 0, next_prune, refused, doubt: false, own: 0 };
    while !cancel.is_cancelled() {
        let pause = manager.round().await;
        manager.wait(pause, &cancel).await;
    }
}

/// The observations of a daemon at this moment: what a plan or an explanation needs beside the snapshot.
#[must_use]
pub fn observations(
    snapshot: &Snapshot,
    observer: &Observer,
    promises: &Promises,
    suspected: &BTreeSet<Name>,
    now_ms: i64,
) -> Observations {
    Observations {
        now_ms,
        leases: observer.lease_ages(snapshot),
        suspected: suspected.clone(),
        powered_off: observer.powered_off(),
        promised: promises.standing(snapshot),
    }
}

impl Manager {
    /// One round: how long to sleep after it unless something changes.
    async fn round(&mut self) -> Duration {
        let snapshot = Arc::clone(&self.config.live.borrow_and_update());
        let suspected = self.config.suspected.borrow_and_update().clone();
        let session = *self.config.session.borrow_and_update();
        if snapshot.revision == 0 {
            return NET;
        }
        self.config.promises.note(&snapshot);
        match self.stand(&snapshot, session) {
            Stand::Manage { term, record_revision } => {
                let author = Author { me: self.config.me.clone(), term, record_revision };
                if self.doubt {
                    return self.settle(&snapshot, &author).await;
                }
                self.manage(&snapshot, &suspected, &author).await
            }
            Stand::Take { record, replaces, unchanged } => {
                let mut compares = vec![if replaces == 0 {
                    Compare::Absent(keys::MANAGER.into())
                } else {
                    Compare::ModRevision(keys::MANAGER.into(), replaces)
                }];
                compares
                    .extend(unchanged.map(|(host, revision)| {
                        Compare::ModRevision(keys::lease(&host), revision)
                    }));
                let term = record.term;
                let ops = vec![Op::Put(keys::MANAGER.into(), json(&record).into())];
                match self.config.store.txn(compares, ops).await {
                    Ok(outcome) if outcome.succeeded => {
                        tracing::info!(term, "this host manages the cluster now");
                        self.catch_up(outcome.revision).await;
                        Duration::ZERO
                    }
                    Ok(outcome) => {
                        self.catch_up(outcome.revision).await;
                        Duration::from_millis(50)
                    }
                    Err(error) => {
                        tracing::debug!(%error, "could not take the manager lease");
                        Duration::from_millis(100)
                    }
                }
            }
            Stand::Wait { again_ms } => Duration::from_millis(again_ms).min(NET),
        }
    }

    fn stand(&self, snapshot: &Snapshot, session: Option<u64>) -> Stand {
        let timers = snapshot.cluster_spec().timers.clone();
        let ages = self.config.observer.lease_ages(snapshot);
        let manager_ms = self.config.observer.manager_age_ms().unwrap_or(u64::MAX);
        let holder_unchanged = snapshot
            .manager
            .as_ref()
            .and_then(|record| ages.get(&record.holder))
            .map(|age| (age.revision, age.unchanged_ms.min(manager_ms)));
        // The first in line is the first by name that is not the holder; each next one tries a little later.
        let rank = snapshot
            .leases
            .keys()
            .filter(|host| snapshot.manager.as_ref().is_none_or(|m| m.holder != **host))
            .position(|host| *host == self.config.me)
            .unwrap_or(0);
        stand(
            snapshot,
            &Candidate {
                me: &self.config.me,
                session,
                holder_unchanged,
                timeout_ms: timers.manager.0,
                stagger_ms: 40 * rank as u64,
            },
        )
    }

    async fn manage(
        &mut self,
        snapshot: &Snapshot,
        suspected: &BTreeSet<Name>,
        author: &Author,
    ) -> Duration {
        if snapshot.revision < self.own {
            tracing::debug!(shows = snapshot.revision, own = self.own, "the live copy lags behind");
            return LAGS;
        }
        let now_ms = (self.config.wall_ms)();
        let seen = {
            let ManagerConfig { observer, promises, .. } = &self.config;
            observations(snapshot, observer, promises, suspected, now_ms)
        };
        let (plan, left_out) = haven_plan::sound(snapshot, haven_plan::plan(snapshot, &seen));
        for broken in &left_out {
            let why = &broken.why;
            tracing::error!(%why, "a part of the plan breaks an invariant and is not carried out; this is a defect of Haven");
        }
        match self.carry_out(snapshot, &plan, author, now_ms).await {
            Ok(Some(revision)) => {
                self.catch_up(revision).await;
                Duration::ZERO
            }
            Ok(None) if self.config.clock.now() >= self.next_prune => {
                self.next_prune = self.config.clock.now().plus(PRUNE);
                if let Err(error) = retention::prune(&self.config.store).await {
                    tracing::debug!(%error, "old events could not be taken out");
                }
                Duration::ZERO
            }
            Ok(None) if self.sealed(snapshot, author).await => Duration::ZERO,
            Ok(None) => plan.wake_after_ms.map_or(NET, Duration::from_millis).min(NET),
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a commit failed; planning again"
                );
                self.doubt = true;
                Duration::from_millis(100)
            }
        }
    }

    /// A commit that was given up on may still be carried out, beside one of the next plan, which does not know of it.
    /// Every commit compares the manager's record: once that is written anew, those sent before are done or never will
    /// be.
    async fn settle(&mut self, snapshot: &Snapshot, author: &Author) -> Duration {
        let Some(record) = &snapshot.manager else { return Duration::ZERO };
        let compares = vec![Compare::ModRevision(keys::MANAGER.into(), author.record_revision)];
        let ops = vec![Op::Put(keys::MANAGER.into(), json(&*record.value).into())];
        match self.config.store.txn(compares, ops).await {
            Ok(outcome) => {
                self.doubt = !outcome.succeeded;
                self.catch_up(outcome.revision).await;
                Duration::ZERO
            }
            Err(error) => {
                tracing::debug!(%error, "what became of a commit is not known yet");
                Duration::from_millis(100)
            }
        }
    }

    /// Seals one secret that an earlier version left in the clear; whether there was one.
    async fn sealed(&mut self, snapshot: &Snapshot, author: &Author) -> bool {
        let Some(secrets) = &self.config.secrets else { return false };
        match sealing::seal_one(&self.config.store, secrets, snapshot, author).await {
            Ok(Some(revision)) => {
                self.catch_up(revision).await;
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::debug!(%error, "a password could not be sealed yet");
                false
            }
        }
    }

    /// Commits the actions in order; the revision of the last commit, if there was any.
    async fn carry_out(
        &mut self,
        snapshot: &Snapshot,
        plan: &Plan,
        author: &Author,
        now_ms: i64,
    ) -> Result<Option<i64>, StoreError> {
        let (mut last, mut refused) = (None, None);
        let made = self.config.clock.now();
        // What the store did not take last time comes last, so that it keeps nothing else from being done.
        let mut actions: Vec<&Planned> = plan.actions.iter().collect();
        actions.sort_by_key(|planned| self.refused.contains(&planned.object));
        for planned in actions {
            if last.is_some() && self.config.clock.now().since(made) > OLD {
                break;
            }
            let Some(commit) = commit_of(planned, snapshot, author) else {
                self.effects.start(&planned.action, &self.config.observer, snapshot);
                continue;
            };
            if !self.may_send(planned, snapshot) {
                // It was promised after the plan was made; the next plan knows.
                last = last.or(Some(0));
                continue;
            }
            let mut ops = commit.ops;
            self.events += 1;
            if let Some(event) = event_of(planned, snapshot, author, now_ms, self.events) {
                ops.push(put_event(&event));
            }
            let outcome = match self.config.store.txn(commit.compares, ops).await {
                // One commit that the store will not have must not keep the others from being made.
                Err(error @ StoreError::Refused { .. }) => {
                    tracing::error!(object = %planned.object, error = &error as &dyn std::error::Error, "the store refuses a commit");
                    self.refused.insert(planned.object.clone());
                    refused = Some(error);
                    continue;
                }
                outcome => outcome?,
            };
            if !outcome.succeeded {
                self.not_done(planned);
                tracing::debug!(object = %planned.object, "overtaken by a change; planning again");
                self.refused.insert(planned.object.clone());
                self.config.clock.sleep(OVERTAKEN).await;
                last = last.or(Some(0));
                break;
            }
            self.refused.remove(&planned.object);
            last = Some(outcome.revision);
            tracing::info!(object = %planned.object, reason = %planned.reason, "committed");
        }
        match (last, refused) {
            (None, Some(error)) => Err(error),
            (last, _) => Ok(last),
        }
    }

    /// Whether no promise stands against an action; a close of a session stands against promises from now on.
    fn may_send(&self, planned: &Planned, snapshot: &Snapshot) -> bool {
        let Action::CloseSession { host, lease_revision, lost } = &planned.action else {
            return true;
        };
        self.config.promises.begin_close(host, *lease_revision, lost.proof, long(snapshot))
    }

    /// The store took none of an action, for good.
    fn not_done(&self, planned: &Planned) {
        if let Action::CloseSession { host, lease_revision, .. } = &planned.action {
            self.config.promises.refused(host, *lease_revision);
        }
    }

    /// Waits until the live copy shows `revision`, or a while.
    async fn catch_up(&mut self, revision: i64) {
        self.own = self.own.max(revision);
        let mut live = self.config.live.clone();
        for patience in [STALE, CATCH_UP] {
            tokio::select! {
                biased;
                _ = live.wait_for(|snapshot| snapshot.revision >= revision) => return,
                () = self.config.clock.sleep(patience) => {}
            }
            self.config.stale.notify_one();
        }
    }

    async fn wait(&mut self, pause: Duration, cancel: &CancellationToken) {
        if pause.is_zero() {
            return;
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            _ = self.config.live.changed() => {}
            _ = self.config.suspected.changed() => {}
            _ = self.config.session.changed() => {}
            () = self.effects.finished() => {}
            () = self.config.clock.sleep(pause) => {}
        }
    }
}
