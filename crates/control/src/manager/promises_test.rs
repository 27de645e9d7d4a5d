//! Tests of [`super::promises`]: a promise and a close of the same session exclude each other.

use super::promises::Promises;
use haven_model::{
    Bytes, Lease, ProofKind, Snapshot, Versioned,
    failsafe::{PROMISE, PromiseQuestion},
};
use haven_plan::testing::{World, name};
use haven_store::{clock::Clock, contact::Contact};
use std::{sync::Arc, time::Duration};

const LONG: Duration = Duration::from_millis(2200);

struct Fixture {
    clock: Clock,
    contact: Contact,
    promises: Promises,
    snapshot: Snapshot,
}

impl Fixture {
    /// A daemon that has seen both hosts renew, and whose store is stuck.
    async fn stuck() -> Self {
        let clock = Clock::simulated(1.0);
        let contact = Contact::new(clock.clone());
        let promises = Promises::new(clock.clone(), contact.clone());
        let snapshot = World::new(2, Bytes::gib(8)).snapshot;
        let mut it = Self { clock, contact, promises, snapshot };
        it.promises.note(&it.snapshot);
        it.renewed();
        it.clock.sleep(Duration::from_secs(3)).await;
        it
    }

    fn lease(&self) -> Versioned<Lease> {
        self.snapshot.leases[&name("host1")].clone()
    }

    /// This daemon sees that host1 has renewed.
    fn renewed(&mut self) {
        let old = self.lease();
        let lease = Lease { count: old.count + 1, ..(*old.value).clone() };
        let new = Versioned { revision: old.revision + 1, value: Arc::new(lease) };
        self.snapshot.leases.insert(name("host1"), new);
    }

    fn asks(&self) -> Result<(), String> {
        let session = self.lease().session;
        let question = PromiseQuestion { host: name("host1"), session };
        let answer = self.promises.answer(&question, &self.snapshot);
        assert_eq!(answer.hosts.len(), 2, "{answer:?}");
        if answer.promised { Ok(()) } else { Err(answer.why) }
    }

    fn closes(&self) -> bool {
        self.closes_by(ProofKind::LeaseExpired)
    }

    fn closes_by(&self, proof: ProofKind) -> bool {
        self.promises.begin_close(&name("host1"), self.lease().revision, proof, LONG)
    }

    /// The store takes renewals of this daemon again, for so many seconds.
    async fn works(&self, seconds: u64) {
        self.contact.acknowledged(LONG);
        for _ in 0..seconds {
            self.clock.sleep(Duration::from_secs(1)).await;
            self.contact.acknowledged(LONG);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_closed_while_a_promise_stands() {
    let it = Fixture::stuck().await;
    it.works(3).await;
    assert_eq!(it.asks(), Ok(()), "others may still be without the store");
    assert!(!it.closes());
    assert!(it.promises.standing(&it.snapshot)[&name("host1")] > 1900);
    it.clock.sleep(PROMISE.duration() - Duration::from_millis(1)).await;
    assert!(!it.closes());
    it.clock.sleep(Duration::from_millis(2)).await;
    assert!(it.closes());
}

#[tokio::test(start_paused = true)]
async fn nothing_is_promised_while_a_close_may_still_be_carried_out() {
    let mut it = Fixture::stuck().await;
    it.works(3).await;
    assert!(it.closes());
    assert_eq!(it.asks(), Err("it is closing the session".into()));
    // Its outcome stays unknown: for as long as the record that it compares stands, it may be carried out.
    it.clock.sleep(Duration::from_secs(600)).await;
    assert_eq!(it.asks(), Err("it is closing the session".into()));
    it.renewed();
    assert_eq!(it.asks(), Ok(()), "what it compared is no more");
}

#[tokio::test(start_paused = true)]
async fn no_promise_holds_up_the_close_of_a_host_without_power_and_none_follows_it() {
    let it = Fixture::stuck().await;
    assert_eq!(it.asks(), Ok(()));
    assert!(!it.closes());
    assert!(it.closes_by(ProofKind::PoweredOff));
    assert_eq!(it.asks(), Err("it is closing the session".into()));
}

#[tokio::test(start_paused = true)]
async fn a_close_that_was_refused_is_over() {
    let it = Fixture::stuck().await;
    it.works(3).await;
    assert!(it.closes());
    it.promises.refused(&name("host1"), it.lease().revision);
    assert_eq!(it.asks(), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_was_started_anew_neither_promises_nor_closes_at_once() {
    let mut it = Fixture::stuck().await;
    it.promises = Promises::new(it.clock.clone(), it.contact.clone());
    it.promises.note(&it.snapshot);
    assert!(it.asks().unwrap_err().contains("started anew"));
    it.works(1).await;
    assert!(!it.closes(), "the daemon before it may have promised");
    it.renewed();
    assert_eq!(it.asks(), Ok(()), "no close of the daemon before it can be carried out any more");
}

#[tokio::test(start_paused = true)]
async fn a_daemon_whose_store_works_promises_nothing() {
    let it = Fixture::stuck().await;
    it.works(6).await;
    assert_eq!(it.asks(), Err("its store works".into()));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_closed_right_after_a_silence_of_the_store() {
    let it = Fixture::stuck().await;
    assert!(!it.closes(), "it lasts");
    it.works(1).await;
    assert!(!it.closes());
    it.works(2).await;
    assert!(it.closes());
}

#[tokio::test(start_paused = true)]
async fn a_session_that_is_closed_or_of_before_gets_no_promise() {
    let mut it = Fixture::stuck().await;
    let question = PromiseQuestion { host: name("host1"), session: it.lease().session + 1 };
    assert!(!it.promises.answer(&question, &it.snapshot).promised);
    let old = it.lease();
    let closed = Lease { closed: true, ..(*old.value).clone() };
    let new = Versioned { revision: old.revision + 1, value: Arc::new(closed) };
    it.snapshot.leases.insert(name("host1"), new);
    assert_eq!(it.asks(), Err("the session is closed".into()));
}
