//! A store that is stuck stops no healthy cluster's VMs (DESIGN.md section 4, docs/decisions/0015-failsafe.md).
//!
//! A host that could not renew for half of what its guard waits for asks the daemon of *every* other host, over the
//! network that the store uses too. If each promises to close no session of this host for the next 2 s, nobody can
//! recover its VMs meanwhile, and the guard may hold out for 1.8 s from when the question was sent. One host that does
//! not answer is enough for no: it may be the one that carries out a recovery, behind a partition.
//!
//! Whom to ask is what this host knew when the store last took renewals, and whomever the others know.

use crate::guard::Guard;
use async_trait::async_trait;
use haven_model::{
    Event, Name, ObjectRef, Severity, Snapshot, Timers,
    failsafe::{HELD, PromiseAnswer, PromiseQuestion},
    keys,
    object::Kind,
};
use haven_store::{
    clock::{Clock, Mono},
    contact::Contact,
    raw::{EtcdStore, Op},
};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{sync::watch, task::JoinSet};

/// Asks other hosts' daemons.
#[async_trait]
pub trait Promisers: Send + Sync {
    /// What the daemon of `host` answers.
    ///
    /// # Errors
    /// In words, when it does not.
    async fn ask(&self, host: &Name, question: &PromiseQuestion) -> Result<PromiseAnswer, String>;
}

/// Nobody answers.
pub struct NoPromisers;

#[async_trait]
impl Promisers for NoPromisers {
    async fn ask(&self, _host: &Name, _: &PromiseQuestion) -> Result<PromiseAnswer, String> {
        Err("this host asks nobody".into())
    }
}

/// How often the others are asked. A promise that is held for 1.8 s may so be missed twice.
const ROUND: Duration = Duration::from_millis(500);
/// How long a daemon has for its answer.
const ANSWER: Duration = Duration::from_millis(450);

/// What is renewed: the session, and the store's revisions of the last two renewals that it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Renewed {
    /// The session.
    pub session: u64,
    /// The revision of the last.
    pub last: i64,
    /// That of the one before.
    pub before: i64,
}

impl Renewed {
    /// A renewal was taken at `revision`.
    pub fn again(earlier: Option<Self>, session: u64, revision: i64) -> Self {
        match earlier.filter(|earlier| earlier.session == session) {
            Some(earlier) if earlier.last == revision => earlier,
            Some(earlier) => Self { session, last: revision, before: earlier.last },
            None => Self { session, last: revision, before: revision },
        }
    }
}

/// The asker.
pub(super) struct Failsafe {
    pub me: Name,
    pub store: EtcdStore,
    pub live: watch::Receiver<Arc<Snapshot>>,
    pub promisers: Arc<dyn Promisers>,
    pub contact: Contact,
    pub guard: Arc<dyn Guard>,
    pub timers: watch::Receiver<Timers>,
    pub renewed: watch::Receiver<Option<Renewed>>,
    /// The last deadline that the guard accepted, `CLOCK_BOOTTIME` ns.
    pub accepted_ns: Arc<AtomicU64>,
    /// No deadline that the guard was ever told is later, `CLOCK_BOOTTIME` ns.
    pub told_ns: Arc<AtomicU64>,
    pub clock: Clock,
    pub wall_ms: Arc<dyn Fn() -> i64 + Send + Sync>,
}

/// Half of what the guard waits for: so long may the store be silent before anybody asks.
pub(super) fn long(timers: &Timers) -> Duration {
    Duration::from_millis(timers.guard.0 / 2)
}

impl Failsafe {
    /// Never ends.
    pub async fn run(self) {
        // Since when the guard lives by promises.
        let mut since: Option<Mono> = None;
        let mut why_not = String::new();
        loop {
            let begun = self.clock.now();
            let (long, silence) = (long(&self.timers.borrow()), self.contact.silence());
            if let Some(left) = long.checked_sub(silence).filter(|left| !left.is_zero()) {
                why_not.clear();
                if let Some(since) = since.take() {
                    self.tell(begun.since(since) + long).await;
                }
                self.clock.sleep(left).await;
                continue;
            }
            match self.round().await {
                Ok(true) if since.is_none() => {
                    since = Some(begun);
                    tracing::warn!(
                        "the store is stuck and all other hosts answer: the VMs here run on without it"
                    );
                }
                Ok(_) => {}
                Err(why) => {
                    if why != why_not {
                        tracing::warn!(
                            why,
                            "the store is stuck, and this host has no promise to run on"
                        );
                    }
                    why_not = why;
                }
            }
            self.clock.sleep_until(begun.plus(ROUND)).await;
        }
    }

    /// Asks everybody once; true when the guard's deadline was moved on by it.
    async fn round(&self) -> Result<bool, String> {
        let Some(renewed) = *self.renewed.borrow() else { return Ok(false) };
        let sent_ns = self.clock.boottime_ns();
        if sent_ns >= self.accepted_ns.load(Ordering::Acquire) {
            return Ok(false);
        }
        let known: BTreeSet<Name> = {
            let live = self.live.borrow();
            // The store may have stopped right after it took the last renewal, before it told of it.
            if live.revision < renewed.before {
                return Err(
                    "this host's view of the cluster is older than its last renewals".into()
                );
            }
            live.hosts.keys().cloned().collect()
        };
        self.all_promise(known, renewed.session).await?;
        let held_ns = u64::try_from(HELD.duration().as_nanos()).unwrap_or(0);
        let deadline_ns = sent_ns.saturating_add(held_ns);
        if deadline_ns <= self.accepted_ns.load(Ordering::Acquire) {
            return Ok(false);
        }
        self.told_ns.fetch_max(deadline_ns, Ordering::AcqRel);
        let extended = self.guard.extend(renewed.session, deadline_ns).await;
        extended.map_err(|error| crate::agent::chain(&error))?;
        self.accepted_ns.fetch_max(deadline_ns, Ordering::AcqRel);
        Ok(true)
    }

    /// Asks these hosts, and those that they know beside.
    async fn all_promise(&self, known: BTreeSet<Name>, session: u64) -> Result<(), String> {
        let question = PromiseQuestion { host: self.me.clone(), session };
        let mut asked = BTreeSet::from([self.me.clone()]);
        let mut next: BTreeSet<Name> = known.difference(&asked).cloned().collect();
        while !next.is_empty() {
            let mut questions = JoinSet::new();
            for host in &next {
                let (promisers, host) = (Arc::clone(&self.promisers), host.clone());
                let (question, clock) = (question.clone(), self.clock.clone());
                questions.spawn(async move {
                    let answer = tokio::select! {
                        biased;
                        answer = promisers.ask(&host, &question) => answer,
                        () = clock.sleep(ANSWER) => Err("it does not answer".into()),
                    };
                    (host, answer)
                });
            }
            asked.append(&mut next);
            while let Some(answered) = questions.join_next().await {
                let (host, answer) = answered.map_err(|error| error.to_string())?;
                let answer = answer.map_err(|why| format!("{host}: {why}"))?;
                if !answer.promised {
                    return Err(format!("{host}: {}", answer.why));
                }
                next.extend(answer.hosts.into_iter().filter(|host| !asked.contains(host)));
            }
        }
        Ok(())
    }

    /// Writes down that this host ran on without the store.
    async fn tell(&self, span: Duration) {
        let (at_ms, me) = ((self.wall_ms)(), &self.me);
        let message = format!(
            "the store took no renewal of {me} for {:.1} s; its VMs ran on because every other host answered and promised not to recover them",
            span.as_secs_f64()
        );
        tracing::warn!("{message}");
        let event = Event {
            id: format!("{at_ms:014}-000000-{me}"),
            at_ms,
            object: ObjectRef::new(Kind::Host, me.clone()),
            severity: Severity::Warning,
            message,
            by: format!("agent on {me}"),
        };
        let value = serde_json::to_vec(&event).expect("an event is plain data");
        let op = Op::Put(keys::event(&event.id), value.into());
        // An event that the store does not take is in this host's log.
        let _ = self.store.txn(vec![], vec![op]).await;
    }
}
