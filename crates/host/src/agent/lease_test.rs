//! The second line behind the guard, and a host without a guard, in virtual time.

use super::failsafe::NoPromisers;
use super::lease::{LeaseConfig, Remains, Session, run, second_line};
use crate::guard::{Guard, GuardError, GuardStatus, Registration};
use async_trait::async_trait;
use haven_model::{Lease, Name, Timers, keys};
use haven_store::{
    clock::Clock,
    contact::Contact,
    memory::{Direct, MemoryEtcd},
    raw::EtcdStore,
};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Notes when it was asked to end everything; something stays the first three times.
struct Noted {
    clock: Clock,
    at_ns: Mutex<Vec<u64>>,
}

#[async_trait]
impl Remains for Noted {
    async fn cleared(&self) -> bool {
        let mut at = self.at_ns.lock().unwrap();
        at.push(self.clock.boottime_ns());
        at.len() > 3
    }
}

const MS: u64 = 1_000_000;

#[tokio::test(start_paused = true)]
async fn what_a_frozen_guard_leaves_ends_at_the_last_deadline_that_it_accepted() {
    let clock = Clock::simulated(1.0);
    let remains = Arc::new(Noted { clock: clock.clone(), at_ns: Mutex::default() });
    let accepted = Arc::new(AtomicU64::new(4_400 * MS));
    let seen: Arc<dyn Remains> = Arc::clone(&remains) as _;
    let (told, session) = watch::channel(Some(Session { number: 1, since_revision: 1 }));
    let task = tokio::spawn(second_line(clock.clone(), seen, Arc::clone(&accepted), told));
    // Deadlines that move on in time cost nothing.
    for beat in 1..=4u64 {
        clock.sleep(Duration::from_millis(500)).await;
        accepted.store((4_400 + beat * 500) * MS, Ordering::Release);
    }
    clock.sleep(Duration::from_millis(4_400)).await;
    assert!(remains.at_ns.lock().unwrap().is_empty(), "the last deadline has not passed");
    assert!(session.borrow().is_some());
    clock.sleep(Duration::from_millis(200)).await;
    let at = remains.at_ns.lock().unwrap().clone();
    let late_ms = (at[0] - 6_400 * MS) / MS;
    assert!((20..25).contains(&late_ms), "it acted {late_ms} ms after the deadline");
    assert!(at.len() >= 4, "it did not give up while something was left");
    assert_eq!(*session.borrow(), None, "nothing is started any more, and addresses are let go");
    task.abort();
}

/// A guard that can be taken away.
struct Sick {
    clock: Clock,
    gone: AtomicBool,
    deadline_ns: AtomicU64,
}

impl Sick {
    fn answer(&self) -> Result<(), GuardError> {
        match self.gone.load(Ordering::Acquire) {
            true => Err(GuardError::Gone(std::io::ErrorKind::NotFound.into())),
            false => Ok(()),
        }
    }
}

#[async_trait]
impl Guard for Sick {
    async fn extend(&self, _session: u64, deadline_ns: u64) -> Result<(), GuardError> {
        self.answer()?;
        self.deadline_ns.fetch_max(deadline_ns, Ordering::AcqRel);
        Ok(())
    }
    async fn register(&self, _start: &Registration<'_>) -> Result<(), GuardError> {
        self.answer()
    }
    async fn unregister(&self, _vm: &str) -> Result<(), GuardError> {
        self.answer()
    }
    async fn hold(&self, _label: &str) -> Result<(), GuardError> {
        self.answer()
    }
    async fn release(&self, _label: &str) -> Result<(), GuardError> {
        self.answer()
    }
    async fn status(&self) -> Result<GuardStatus, GuardError> {
        self.answer()?;
        let deadline_ns = self.deadline_ns.load(Ordering::Acquire);
        Ok(GuardStatus { deadline_ns, live: 0, fired: 0 })
    }
    async fn replace(&self) {}
}

/// Nothing is left as soon as the guard says so.
#[async_trait]
impl Remains for Sick {
    async fn cleared(&self) -> bool {
        self.clock.pass().await;
        self.answer().is_ok()
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_whose_guard_is_gone_renews_no_longer_than_its_last_deadline() {
    let clock = Clock::simulated(1.0);
    let etcd = MemoryEtcd::default();
    let store = EtcdStore::over(etcd.channel(Arc::new(Direct))).await.unwrap();
    let guard = Arc::new(Sick {
        clock: clock.clone(),
        gone: AtomicBool::new(false),
        deadline_ns: AtomicU64::new(0),
    });
    let (out, session) = watch::channel(None);
    let config = LeaseConfig {
        me: Name::new("host1").unwrap(),
        store,
        guard: Arc::clone(&guard) as _,
        remains: Arc::clone(&guard) as _,
        timers: watch::channel(Timers::default()).1,
        session_file: None,
        live: watch::channel(Arc::default()).1,
        promisers: Arc::new(NoPromisers),
        contact: Contact::new(clock.clone()),
        clock: clock.clone(),
        wall_ms: Arc::new(|| 0),
    };
    let task = tokio::spawn(run(config, out, CancellationToken::new()));
    let count = || {
        let value = etcd.peek(&keys::lease(&Name::new("host1").unwrap()))?;
        Some(serde_json::from_slice::<Lease>(&value).ok()?.count)
    };
    clock.sleep(Duration::from_secs(3)).await;
    let before = count().unwrap();
    assert!(before >= 4 && session.borrow().is_some());
    guard.gone.store(true, Ordering::Release);
    clock.sleep(Duration::from_secs(5)).await;
    let (at, told) = (count().unwrap(), *session.borrow());
    assert!(at > before, "until the deadline it goes on: the guard may come back");
    assert_eq!(told, None);
    clock.sleep(Duration::from_secs(5)).await;
    assert_eq!(count().unwrap(), at, "for the others it is lost, and its VMs are not held back");
    guard.gone.store(false, Ordering::Release);
    clock.sleep(Duration::from_secs(2)).await;
    assert!(count().unwrap() > at);
    let since = session.borrow().map(|now| now.since_revision);
    assert!(
        since > Some(i64::try_from(at).unwrap()),
        "what it starts now, it starts by a newer copy"
    );
    task.abort();
}

/// A lease task over a store in memory, and the other ends of what it stands on.
struct Kept {
    clock: Clock,
    etcd: MemoryEtcd,
    guard: Arc<Sick>,
    timers: watch::Sender<Timers>,
    directory: tempfile::TempDir,
}

impl Kept {
    fn new() -> Self {
        let clock = Clock::simulated(1.0);
        let guard = Arc::new(Sick {
            clock: clock.clone(),
            gone: AtomicBool::new(false),
            deadline_ns: AtomicU64::new(0),
        });
        let directory = tempfile::tempdir().unwrap();
        let timers = watch::channel(Timers::default()).0;
        Self { clock, etcd: MemoryEtcd::default(), guard, timers, directory }
    }

    /// A daemon's task.
    async fn daemon(&self) -> tokio::task::JoinHandle<()> {
        let config = LeaseConfig {
            me: Name::new("host1").unwrap(),
            store: EtcdStore::over(self.etcd.channel(Arc::new(Direct))).await.unwrap(),
            guard: Arc::clone(&self.guard) as _,
            remains: Arc::clone(&self.guard) as _,
            timers: self.timers.subscribe(),
            session_file: Some(self.directory.path().join("session")),
            live: watch::channel(Arc::default()).1,
            promisers: Arc::new(NoPromisers),
            contact: Contact::new(self.clock.clone()),
            clock: self.clock.clone(),
            wall_ms: Arc::new(|| 0),
        };
        tokio::spawn(run(config, watch::channel(None).0, CancellationToken::new()))
    }

    fn lease(&self) -> Lease {
        let value = self.etcd.peek(&keys::lease(&Name::new("host1").unwrap())).unwrap();
        serde_json::from_slice(&value).unwrap()
    }

    /// What the record leaves beyond the guard's deadline, and that deadline from now, milliseconds. Every renewal is
    /// at most as old as the last look, so the record runs out no earlier than its `T` from then.
    fn spare_ms(&self, seen_ns: u64) -> (i64, u64) {
        let deadline_ns = self.guard.deadline_ns.load(Ordering::Acquire);
        let left_ms = deadline_ns.saturating_sub(seen_ns) / MS;
        (self.lease().ttl_ms as i64 - left_ms as i64, left_ms)
    }
}

fn long() -> Timers {
    let [lease, guard, renew, margin] =
        [20_000, 17_000, 1000, 2000].map(haven_model::units::Millis);
    Timers { lease, guard, renew, margin, ..Timers::default() }
}

#[tokio::test(start_paused = true)]
async fn at_every_instant_of_a_change_the_record_outlasts_the_guards_deadline() {
    let kept = Kept::new();
    let task = kept.daemon().await;
    kept.clock.sleep(Duration::from_secs(2)).await;
    assert_eq!(kept.lease().ttl_ms, 5000);
    let (mut longest, mut shortened_at) = (0, None);
    for step in 0..4_000u64 {
        match step {
            500 => drop(kept.timers.send_replace(long())),
            1_500 => drop(kept.timers.send_replace(Timers::default())),
            _ => {}
        }
        kept.clock.sleep(Duration::from_millis(10)).await;
        let now_ns = kept.clock.boottime_ns();
        let (spare, left) = kept.spare_ms(now_ns);
        assert!(spare >= 400, "step {step}: {left} ms left, {:?}", kept.lease());
        longest = longest.max(kept.lease().ttl_ms);
        if step > 1_500 && shortened_at.is_none() && kept.lease().ttl_ms == 5000 {
            shortened_at = Some(step);
        }
    }
    assert_eq!(longest, 20_000, "the longer timers counted without a restart");
    let waited = shortened_at.expect("and the shorter ones in the end") - 1_500;
    assert!(
        (1_000..1_400).contains(&waited),
        "they count once no longer deadline is left: {waited}"
    );
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_resumes_under_shorter_timers_waits_for_the_longer_deadline_of_the_last() {
    let kept = Kept::new();
    kept.timers.send_replace(long());
    let first = kept.daemon().await;
    kept.clock.sleep(Duration::from_secs(3)).await;
    first.abort();
    kept.timers.send_replace(Timers::default());
    // The guard does not tell the new daemon which deadline it was given.
    kept.guard.gone.store(true, Ordering::Release);
    let before = kept.lease().count;
    let second = kept.daemon().await;
    kept.clock.sleep(Duration::from_millis(2_500)).await;
    assert!(kept.lease().count > before, "it has resumed the session");
    let (spare, left) = kept.spare_ms(kept.clock.boottime_ns());
    assert!(left > 10_000 && spare >= 400, "{left} ms left, {:?}", kept.lease());
    second.abort();
}
