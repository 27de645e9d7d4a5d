//! The giver's side of failsafe: what this daemon promised to hosts that cannot renew, and the closes of sessions that
//! it has sent (docs/decisions/0015-failsafe.md).
//!
//! A close that was sent may be carried out by the store long after its sender gave up on it. It compares the lease
//! record as it stood, so it is over once that record is another one. Therefore no promise is given while a close of
//! this daemon compares the record as it still stands, nor while one of the daemon before it might: not before this
//! daemon has seen the host renew.

use haven_model::{
    Name, ProofKind, Snapshot,
    failsafe::{PROMISE, PromiseAnswer, PromiseQuestion},
};
use haven_store::{
    clock::{Clock, Mono},
    contact::Contact,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// So long after a silence of the store a daemon still promises: others may come back to the store later than it did.
const STILL: Duration = Duration::from_secs(5);
/// What a close waits for beyond a promise, after a silence of the store: a daemon that knows of a host for a moment
/// only may not know whom others have promised to.
const SETTLED: Duration = Duration::from_millis(500);

#[derive(Default)]
struct Inner {
    /// The revision of each lease record when this daemon saw it first.
    first: BTreeMap<Name, i64>,
    /// Until when no session of a host is closed.
    given: BTreeMap<Name, Mono>,
    /// The revision of the lease record that a close compares which was sent and not refused.
    closing: BTreeMap<Name, i64>,
}

struct Ledger {
    clock: Clock,
    contact: Contact,
    started: Mono,
    inner: Mutex<Inner>,
}

/// What a daemon promised. Cheap to clone; all clones see the same.
#[derive(Clone)]
pub struct Promises(Arc<Ledger>);

/// A silence of the store that counts, by the cluster's timers: half of what the guard waits for.
#[must_use]
pub fn long(snapshot: &Snapshot) -> Duration {
    Duration::from_millis(snapshot.cluster_spec().timers.guard.0 / 2)
}

impl Promises {
    /// Of a daemon that begins now.
    #[must_use]
    pub fn new(clock: Clock, contact: Contact) -> Self {
        let started = clock.now();
        Self(Arc::new(Ledger { clock, contact, started, inner: Mutex::default() }))
    }

    /// Notes which lease records there are.
    pub fn note(&self, snapshot: &Snapshot) {
        let mut inner = self.0.inner.lock().unwrap_or_else(PoisonError::into_inner);
        for (host, lease) in &snapshot.leases {
            inner.first.entry(host.clone()).or_insert(lease.revision);
        }
    }

    /// Answers a host that cannot renew.
    #[must_use]
    pub fn answer(&self, question: &PromiseQuestion, snapshot: &Snapshot) -> PromiseAnswer {
        let hosts = snapshot.hosts.keys().cloned().collect();
        match self.promise(question, snapshot) {
            Ok(()) => PromiseAnswer { promised: true, why: String::new(), hosts },
            Err(why) => PromiseAnswer { promised: false, why: why.to_owned(), hosts },
        }
    }

    fn promise(&self, question: &PromiseQuestion, snapshot: &Snapshot) -> Result<(), &'static str> {
        let host = &question.host;
        let lease = snapshot.leases.get(host).ok_or("it knows no lease of this host")?;
        if lease.closed || lease.session != question.session {
            return Err("the session is closed");
        }
        if self.0.contact.trouble(long(snapshot)).is_none_or(|ago| ago > STILL) {
            return Err("its store works");
        }
        let mut inner = self.0.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.first.get(host).is_none_or(|first| *first == lease.revision) {
            return Err("it was started anew and has not seen this host renew since");
        }
        if inner.closing.get(host) == Some(&lease.revision) {
            return Err("it is closing the session");
        }
        let until = self.0.clock.now().plus(PROMISE.duration());
        inner.given.insert(host.clone(), until);
        Ok(())
    }

    /// How long no session of a host may be closed by this daemon, if not at once.
    fn left(&self, inner: &Inner, host: &Name, long: Duration) -> Option<Duration> {
        let now = self.0.clock.now();
        // A daemon that begins knows nothing of what the one before it promised.
        let begun = self.0.started.plus(PROMISE.duration());
        let given = inner.given.get(host).copied().unwrap_or_default();
        let settled = PROMISE.duration() + SETTLED;
        let trouble = self.0.contact.trouble(long).and_then(|ago| settled.checked_sub(ago));
        let left = given.max(begun).since(now).max(trouble.unwrap_or_default());
        (!left.is_zero()).then_some(left)
    }

    /// Per host for how many milliseconds its session may not be closed.
    #[must_use]
    pub fn standing(&self, snapshot: &Snapshot) -> BTreeMap<Name, u64> {
        let inner = self.0.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let ms = |left: Duration| u64::try_from(left.as_millis()).unwrap_or(u64::MAX) + 1;
        let left = |host: &Name| self.left(&inner, host, long(snapshot)).map(ms);
        snapshot.leases.keys().filter_map(|host| Some((host.clone(), left(host)?))).collect()
    }

    /// A close that compares the lease record of this revision is about to be sent; false when it may not be. What is
    /// promised is that the host may run on: to one that has no power nobody owes that.
    #[must_use]
    pub fn begin_close(
        &self,
        host: &Name,
        revision: i64,
        proof: ProofKind,
        long: Duration,
    ) -> bool {
        let mut inner = self.0.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if proof == ProofKind::LeaseExpired && self.left(&inner, host, long).is_some() {
            return false;
        }
        inner.closing.insert(host.clone(), revision);
        true
    }

    /// The store refused that close for good.
    pub fn refused(&self, host: &Name, revision: i64) {
        let mut inner = self.0.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.closing.get(host) == Some(&revision) {
            inner.closing.remove(host);
        }
    }
}
