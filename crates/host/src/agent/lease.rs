//! The renewal record of this host, and the guard's deadline that follows from it (DESIGN.md section 4).
//!
//! ```text
//!   note the time ──► renew in the store ──► acknowledged ──► guard's deadline = noted time + D
//!                          │
//!                          ├─ refused, record closed or of another session ──► the session is over: no VM may run
//!                          └─ outcome unknown ──► read the record before the next renewal
//! ```
//!
//! The guard is the first line. The second is here: when the last deadline that the guard accepted passes, this task
//! ends the VMs too, so that a frozen guard (which accepts none) lets nothing run past its deadline, and closes the
//! session to the rest of the agent: nothing is started, and service addresses are let go. A guard that is silent is
//! ended before that, and its supervisor starts it again. A host whose deadline has passed renews again only once
//! nothing is left and its guard answers: one that renews and can run nothing would keep its VMs from everybody.
//!
//! Why it is safe: a recovery commits only if the record still has the revision that stood unchanged for `T`. If it
//! commits, no later renewal was or will be acknowledged, so the last deadline given to the guard was noted before
//! that revision was seen, plus `D`, which is less than seen plus `T`.
//!
//! The timers may change at any time, and hosts learn of it at different moments. So `T` is no constant that both
//! sides look up: every renewal states in its record the `T` that it is to be judged by. It is the `T` of the timers
//! that the host lives by, or longer, as long as the guard may still hold a deadline that longer timers gave it (the
//! guard's deadline never moves back, and a daemon that resumes a session takes the last record's `T` for that
//! deadline). So a longer `T` is waited out from the first renewal under it, before the guard is told the longer
//! deadline; a shorter one counts once nothing of the longer one is left.
//!
//! While the store is stuck as a whole the deadline may move on by other hosts' promises (`failsafe.rs`).
//!
//! Rejected: judging by the cluster's spec (a host that has not seen a change yet, or a guard that was told a longer
//! deadline before it, would be taken for dead while its VMs run), and moving the guard's deadline back (a guard that
//! hangs in that moment would keep the old one).

use super::failsafe::{Failsafe, Promisers, Renewed, long};
use crate::guard::{Guard, GuardError};
use haven_model::{Lease, Name, Snapshot, Timers, keys};
use haven_store::{
    clock::Clock,
    contact::Contact,
    raw::{Compare, EtcdStore, Op, StoreError},
};
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A host's open session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// Its number.
    pub number: u64,
    /// The store's revision at which this daemon opened or resumed it. Nothing may be started on a live copy that
    /// is older: it could show an owner of before.
    pub since_revision: i64,
}

/// Tells whether nothing of a former session is left, and ends what is.
#[async_trait::async_trait]
pub trait Remains: Send + Sync {
    /// Kills every VM of this host. True once none is left.
    async fn cleared(&self) -> bool;
}

/// What the lease task stands on.
pub struct LeaseConfig {
    /// This host.
    pub me: Name,
    /// The store.
    pub store: EtcdStore,
    /// The guard of this host.
    pub guard: Arc<dyn Guard>,
    /// Ends what a former session left.
    pub remains: Arc<dyn Remains>,
    /// The cluster's timers.
    pub timers: watch::Receiver<Timers>,
    /// Where the session's number is kept while the host is up; must not survive a reboot. `None` in the simulator.
    pub session_file: Option<PathBuf>,
    /// The live copy: whom to ask while the store is stuck.
    pub live: watch::Receiver<Arc<Snapshot>>,
    /// Asks them.
    pub promisers: Arc<dyn Promisers>,
    /// How the renewals fare.
    pub contact: Contact,
    /// This daemon's clock.
    pub clock: Clock,
    /// Wall clock, milliseconds since 1970, for what people read.
    pub wall_ms: Arc<dyn Fn() -> i64 + Send + Sync>,
}

/// What this task knows of its own record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    session: u64,
    count: u64,
    revision: i64,
}

/// A guard is ended, to be started again by its supervisor, when it did not answer and does not so much later either.
/// Its successor must feed the watchdog within 2 s of the last feed: up to 0.5 s pass until the first question, 0.2 s
/// with each unanswered one, and 0.2 s until it is started.
const SILENT: Duration = Duration::from_millis(400);
/// A daemon that starts asks for the guard's deadline; so long may the guard take to be there.
const GUARD_PATIENCE: Duration = Duration::from_secs(2);
/// Nanoseconds of a millisecond.
const MS: u64 = 1_000_000;
/// The second line acts so long after the guard should have, and again after as long.
const SECOND_LINE: Duration = Duration::from_millis(20);

/// The pause before a step that cannot wait for the next renewal's time; not nothing, so that no error makes a hot loop.
const AT_ONCE: Duration = Duration::from_millis(10);

struct LeaseTask {
    config: LeaseConfig,
    out: watch::Sender<Option<Session>>,
    held: Option<Held>,
    /// The outcome of the last write is unknown: read before writing again.
    doubt: bool,
    /// The last deadline that the guard accepted, `CLOCK_BOOTTIME` ns.
    accepted_ns: Arc<AtomicU64>,
    /// No deadline that the guard was ever told is later, whether it answered or not, `CLOCK_BOOTTIME` ns.
    told_ns: Arc<AtomicU64>,
    /// What is held, for whoever asks the other hosts.
    shown: watch::Sender<Option<Renewed>>,
    /// When the last renewal that the store took was sent, `CLOCK_BOOTTIME` ns.
    renewed_ns: u64,
    /// Since when the guard does not answer.
    unguarded: Option<haven_store::clock::Mono>,
    /// The session that a former daemon of this boot left in the run directory.
    remembered: Option<u64>,
}

/// Keeps the lease until `cancel`; tells the session through `out`. On `cancel` it only stops renewing: the VMs run
/// on under the guard until the next daemon resumes the session or the deadline passes.
pub async fn run(
    config: LeaseConfig,
    out: watch::Sender<Option<Session>>,
    cancel: CancellationToken,
) {
    let remembered = config.session_file.as_ref().and_then(|path| {
        std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok())
    });
    let found_ns = found_deadline(&config).await;
    let accepted_ns = Arc::new(AtomicU64::new(found_ns));
    let second = second_line(
        config.clock.clone(),
        Arc::clone(&config.remains),
        Arc::clone(&accepted_ns),
        out.clone(),
    );
    let told_ns = Arc::new(AtomicU64::new(found_ns));
    let (shown, renewed) = watch::channel(None);
    let failsafe = Failsafe {
        me: config.me.clone(),
        store: config.store.clone(),
        live: config.live.clone(),
        promisers: Arc::clone(&config.promisers),
        contact: config.contact.clone(),
        guard: Arc::clone(&config.guard),
        timers: config.timers.clone(),
        renewed,
        accepted_ns: Arc::clone(&accepted_ns),
        told_ns: Arc::clone(&told_ns),
        clock: config.clock.clone(),
        wall_ms: Arc::clone(&config.wall_ms),
    };
    let task = LeaseTask {
        config,
        out,
        held: None,
        doubt: false,
        accepted_ns,
        told_ns,
        shown,
        renewed_ns: 0,
        unguarded: None,
        remembered,
    };
    tokio::select! {
        biased;
        () = task.keep(cancel) => {}
        () = second => {}
        () = failsafe.run() => {}
    }
}

/// The deadline as an earlier daemon left it. With a guard that does not answer it counts as passed.
async fn found_deadline(config: &LeaseConfig) -> u64 {
    let until = config.clock.now().plus(GUARD_PATIENCE);
    loop {
        match config.guard.status().await {
            Ok(status) => return status.deadline_ns,
            Err(_) if config.clock.now() < until => {
                config.clock.sleep(Duration::from_millis(50)).await;
            }
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "no guard: what runs here ends"
                );
                return 0;
            }
        }
    }
}

/// Ends what the guard should have ended, and the session with it.
pub(super) async fn second_line(
    clock: Clock,
    remains: Arc<dyn Remains>,
    accepted_ns: Arc<AtomicU64>,
    out: watch::Sender<Option<Session>>,
) {
    let slack_ns = u64::try_from(SECOND_LINE.as_nanos()).unwrap_or(0);
    loop {
        let due_ns = accepted_ns.load(Ordering::Acquire).saturating_add(slack_ns);
        match due_ns.saturating_sub(clock.boottime_ns()) {
            0 => {
                out.send_if_modified(|session| session.take().is_some());
                // With nothing left here there is nothing to do until the deadline moves on again.
                let pause = if remains.cleared().await { 25 } else { 1 };
                clock.sleep(SECOND_LINE * pause).await;
            }
            left => clock.sleep(Duration::from_nanos(left)).await,
        }
    }
}

/// Resolves when the timers were changed; never once nobody can change them any more.
async fn changed(timers: &mut watch::Receiver<Timers>) {
    if timers.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

impl LeaseTask {
    async fn keep(mut self, cancel: CancellationToken) {
        let task = &mut self;
        let mut timers = task.config.timers.clone();
        let mut next = task.config.clock.now();
        while !cancel.is_cancelled() {
            let pause = task.beat().await;
            let held = task.held;
            task.shown.send_modify(|shown| {
                *shown = held.map(|held| Renewed::again(*shown, held.session, held.revision));
            });
            // Renewals keep their rhythm whatever a round trip takes, and never pile up after a stall.
            let now = task.config.clock.now();
            next = if pause.is_zero() { now } else { next.plus(pause).max(now) };
            tokio::select! {
                biased;
                () = cancel.cancelled() => {}
                // At once, so that all hosts live by new timers at about the same time.
                () = changed(&mut timers) => next = task.config.clock.now(),
                () = task.config.clock.sleep_until(next) => {}
            }
        }
    }

    /// One renewal, or one step towards an open session; how long until the next.
    async fn beat(&mut self) -> Duration {
        let timers = self.config.timers.borrow().clone();
        let result = match (self.held, self.doubt) {
            (Some(_), true) => match self.resolve_doubt().await {
                // What was written did not reach the guard, and its deadline comes nearer.
                Ok(()) if self.held.is_some() => return AT_ONCE,
                done => done,
            },
            (Some(_), false) if self.expired() && !self.config.remains.cleared().await => {
                tracing::error!(
                    "the guard's deadline has passed; nothing is renewed until all VMs have ended and the guard answers"
                );
                Ok(())
            }
            (Some(held), false) => self.renew(held, &timers).await,
            (None, _) => self.open(&timers).await,
        };
        match result {
            Ok(()) if self.doubt => AT_ONCE,
            Ok(()) => timers.renew.duration(),
            Err(error) => {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "the store did not take a renewal"
                );
                Duration::from_millis(100)
            }
        }
    }

    /// Whether the last deadline that the guard accepted has passed.
    fn expired(&self) -> bool {
        self.config.clock.boottime_ns() >= self.accepted_ns.load(Ordering::Acquire)
    }

    /// Tells the session that is held, unless the guard did not accept its deadline. A session that was told before is
    /// not told again.
    fn tell(&self) {
        let Some(held) = self.held.filter(|_| !self.expired()) else { return };
        self.out.send_if_modified(|told| {
            let news = told.is_none_or(|told| told.number != held.session);
            if news {
                *told = Some(Session { number: held.session, since_revision: held.revision });
            }
            news
        });
    }

    fn key(&self) -> String {
        keys::lease(&self.config.me)
    }

    async fn read(&self) -> Result<Option<(Lease, i64)>, StoreError> {
        let record = self.config.store.get_from_any(&self.key()).await?;
        Ok(record.and_then(|kv| Some((serde_json::from_slice(&kv.value).ok()?, kv.mod_revision))))
    }

    /// Writes a renewal of these numbers; what then stands in the store, unless the comparison failed.
    async fn write(
        &mut self,
        (session, count): (u64, u64),
        compare: Compare,
        timers: &Timers,
    ) -> Result<Option<Held>, StoreError> {
        let sent_ns = self.config.clock.boottime_ns();
        let deadline_ns = sent_ns.saturating_add(timers.guard.0.saturating_mul(MS));
        let latest_ns = deadline_ns.max(self.told_ns.load(Ordering::Acquire));
        let ttl_ms = timers.ttl_ms(latest_ns.saturating_sub(sent_ns).div_ceil(MS));
        let lease = Lease { session, count, closed: false, ttl_ms };
        let value = serde_json::to_vec(&lease).expect("a lease is plain data");
        let result =
            self.config.store.txn(vec![compare], vec![Op::Put(self.key(), value.into())]).await;
        let outcome = match result {
            Ok(outcome) => outcome,
            Err(error) => {
                self.doubt = true;
                return Err(error);
            }
        };
        if !outcome.succeeded {
            return Ok(None);
        }
        self.told_ns.fetch_max(latest_ns, Ordering::AcqRel);
        self.config.contact.acknowledged(long(timers));
        self.extend(session, deadline_ns).await;
        self.tell_late(sent_ns, timers);
        Ok(Some(Held { session, count, revision: outcome.revision }))
    }

    /// Says when more than half of what the guard waits for went by between two renewals.
    fn tell_late(&mut self, sent_ns: u64, timers: &Timers) {
        let gap_ms = sent_ns.saturating_sub(std::mem::replace(&mut self.renewed_ns, sent_ns)) / MS;
        if gap_ms > timers.guard.0 / 2 && gap_ms < timers.guard.0 {
            let left = timers.guard.0 - gap_ms;
            tracing::warn!(
                "the store took no renewal for {gap_ms} ms; with {left} ms more the guard would have ended all VMs"
            );
        }
    }

    /// Moves the guard's deadline on. A guard that does not answer for a while is ended, to be started again; until
    /// then the accepted deadline stands still and the second line watches it.
    async fn extend(&mut self, session: u64, deadline_ns: u64) {
        let error = match self.config.guard.extend(session, deadline_ns).await {
            Ok(()) => {
                self.accepted_ns.fetch_max(deadline_ns, Ordering::AcqRel);
                self.unguarded = None;
                return;
            }
            Err(error) => error,
        };
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "the guard did not take the new deadline"
        );
        if matches!(error, GuardError::Refused { .. }) {
            return;
        }
        let now = self.config.clock.now();
        if now.since(*self.unguarded.get_or_insert(now)) >= SILENT {
            self.unguarded = None;
            self.config.guard.replace().await;
        }
    }

    async fn renew(&mut self, held: Held, timers: &Timers) -> Result<(), StoreError> {
        let compare = Compare::ModRevision(self.key(), held.revision);
        match self.write((held.session, held.count + 1), compare, timers).await? {
            Some(now) => {
                self.held = Some(now);
                self.tell();
            }
            None => self.doubt = true,
        }
        Ok(())
    }

    /// The record is not as this task left it: either a write of its own was applied after all, or the session is
    /// over.
    async fn resolve_doubt(&mut self) -> Result<(), StoreError> {
        let record = self.read().await?;
        self.doubt = false;
        let Some(held) = self.held else { return Ok(()) };
        match record {
            Some((lease, revision)) if lease.session == held.session && !lease.closed => {
                self.held = Some(Held { session: lease.session, count: lease.count, revision });
            }
            _ => {
                tracing::error!(
                    session = held.session,
                    "this host's session was closed: its VMs end now"
                );
                self.held = None;
                self.remembered = None;
                self.out.send_replace(None);
                self.config.remains.cleared().await;
            }
        }
        Ok(())
    }

    /// Resumes the session of a former daemon of this boot, or opens a new one once nothing is left of the old.
    async fn open(&mut self, timers: &Timers) -> Result<(), StoreError> {
        self.doubt = false;
        let record = self.read().await?;
        if let Some((lease, _)) = record.as_ref().filter(|(lease, _)| !lease.closed) {
            self.may_be_told(lease);
        }
        if let Some((lease, revision)) = &record
            && !lease.closed
            && self.remembered == Some(lease.session)
        {
            let compare = Compare::ModRevision(self.key(), *revision);
            let numbers = (lease.session, lease.count + 1);
            if let Some(held) = self.write(numbers, compare, timers).await? {
                self.opened(held, "resumed");
            }
            return Ok(());
        }
        if !self.config.remains.cleared().await {
            tracing::warn!(
                "VMs of an earlier session are still ending; no new session before that"
            );
            return Ok(());
        }
        let (session, compare) = match &record {
            Some((lease, revision)) => {
                (lease.session + 1, Compare::ModRevision(self.key(), *revision))
            }
            None => (1, Compare::Absent(self.key())),
        };
        if let Some(held) = self.write((session, 0), compare, timers).await? {
            self.opened(held, "opened");
        }
        Ok(())
    }

    /// A former daemon wrote this record. What it told the guard is known only by what the record states: no later
    /// than its `T` from now, less the margin, which is at least a twentieth of it.
    fn may_be_told(&mut self, lease: &Lease) {
        let left_ns = (lease.ttl_ms - lease.ttl_ms / 20).saturating_mul(MS);
        let latest_ns = self.config.clock.boottime_ns().saturating_add(left_ns);
        self.told_ns.fetch_max(latest_ns, Ordering::AcqRel);
    }

    fn opened(&mut self, held: Held, how: &str) {
        tracing::info!(session = held.session, "session {how}");
        self.held = Some(held);
        self.remembered = Some(held.session);
        if let Some(path) = &self.config.session_file
            && let Err(error) = std::fs::write(path, held.session.to_string())
        {
            tracing::warn!(%error, path = %path.display(), "the session could not be noted; a restart of the daemon will end the VMs");
        }
        self.tell();
    }
}
