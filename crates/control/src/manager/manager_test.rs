//! Tests of the manager's commits, with a store that refuses some.

use super::{
    Manager, ManagerConfig, commit::Author, effects::Effects, effects::Power, observe::Observer,
    promises::Promises,
};
use async_trait::async_trait;
use haven_model::{
    Bytes, Name, ObjectRef, Plan, PowerProblem, PowerSpec, PowerState, keys, object::Kind,
};
use haven_plan::testing::{World, name, vm_spec};
use haven_store::{
    clock::Clock,
    contact::Contact,
    memory::{MemoryEtcd, Path},
    raw::{EtcdStore, Op, StoreError},
};
use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::watch;
use tonic::Status;

/// Refuses or takes each request as it was told to; takes all that it was told nothing of. Each takes so many milliseconds.
#[derive(Default)]
struct Moody(Mutex<VecDeque<bool>>, AtomicU64);

#[async_trait]
impl Path for Moody {
    async fn arrive(&self) -> Result<(), Status> {
        tokio::time::sleep(Duration::from_millis(self.1.load(Ordering::Relaxed))).await;
        let takes = self.0.lock().unwrap().pop_front().unwrap_or(true);
        let no = || Status::invalid_argument("etcdserver: request is too large");
        if takes { Ok(()) } else { Err(no()) }
    }
    async fn come_back(&self) -> Result<(), Status> {
        Ok(())
    }
}

struct NoPower;

#[async_trait]
impl Power for NoPower {
    async fn state(&self, _: &Name, _: &PowerSpec) -> Result<PowerState, PowerProblem> {
        Err(PowerProblem { message: "there is none".into(), hint: String::new() })
    }
    async fn off(&self, _: &Name, _: &PowerSpec) -> Result<(), PowerProblem> {
        Err(PowerProblem { message: "there is none".into(), hint: String::new() })
    }
}

struct Fixture {
    etcd: MemoryEtcd,
    path: Arc<Moody>,
    manager: Manager,
    author: Author,
    world: World,
}

impl Fixture {
    /// A manager with so many VMs to place.
    async fn new(vms: &[&str]) -> Self {
        let (etcd, path) = (MemoryEtcd::default(), Arc::new(Moody::default()));
        let store = EtcdStore::over(etcd.channel(Arc::clone(&path) as _)).await.unwrap();
        let ops = vec![Op::Put(keys::MANAGER.into(), "me".into())];
        let record_revision = store.txn(vec![], ops).await.unwrap().revision;
        let clock = Clock::real();
        let config = ManagerConfig {
            me: name("host1"),
            store: store.clone(),
            live: watch::channel(Arc::default()).1,
            stale: Arc::default(),
            promises: Promises::new(clock.clone(), Contact::new(clock.clone())),
            observer: Observer::new(Arc::new(|_| None), clock.clone()),
            suspected: watch::channel(BTreeSet::new()).1,
            session: watch::channel(Some(1)).1,
            power: Arc::new(NoPower),
            secrets: None,
            clock: clock.clone(),
            wall_ms: Arc::new(|| 1),
        };
        let effects = Effects::new(store, Arc::new(NoPower), clock.clone());
        let (next_prune, refused) = (clock.now(), BTreeSet::new());
        let mut world = World::new(3, Bytes::gib(8));
        for vm in vms {
            world.vm(vm, vm_spec(Bytes::mib(64)));
        }
        Self {
            etcd,
            path,
            manager: Manager {
                config,
                effects,
                events: 0,
                next_prune,
                refused,
                doubt: false,
                own: 0,
            },
            author: Author { me: name("host1"), term: 1, record_revision },
            world,
        }
    }

    /// Carries out the plan for these VMs while the store takes and refuses what it is told to.
    async fn round(&mut self, vms: &[&str], takes: &[bool]) -> Result<Option<i64>, StoreError> {
        let mut plan: Plan = haven_plan::plan(&self.world.snapshot, &self.world.seen);
        plan.actions.retain(|planned| vms.contains(&planned.object.name.as_str()));
        assert_eq!(plan.actions.len(), vms.len(), "{plan:?}");
        self.path.0.lock().unwrap().extend(takes);
        self.manager.carry_out(&self.world.snapshot, &plan, &self.author, 1).await
    }

    fn placed(&self) -> Vec<String> {
        let all = self.etcd.peek_all("/haven/placement/vm/");
        all.into_iter().map(|(key, ..)| key.rsplit('/').next().unwrap().to_owned()).collect()
    }

    fn refused(&self) -> Vec<String> {
        self.manager.refused.iter().map(ToString::to_string).collect()
    }
}

#[tokio::test]
async fn what_the_store_refuses_holds_up_nothing_else_and_comes_last_until_it_is_taken() {
    let mut fixture = Fixture::new(&["a", "b", "c", "d"]).await;
    // The first is refused, the others are made in the same round.
    let done = fixture.round(&["a", "b", "c"], &[false]).await.unwrap();
    assert!(done.is_some());
    assert_eq!(fixture.placed(), ["b", "c"]);
    assert_eq!(fixture.refused(), ["vm/a"]);
    // Next time it is behind what is new, so that this is made although the store is in trouble again.
    fixture.round(&["a", "d"], &[true, false]).await.unwrap();
    assert_eq!(fixture.placed(), ["b", "c", "d"]);
    assert_eq!(fixture.refused(), ["vm/a"]);
    // Alone and refused it is an error, after which the manager pauses; taken it is like any other.
    let refused = fixture.round(&["a"], &[false]).await;
    assert!(matches!(refused, Err(StoreError::Refused { .. })), "{refused:?}");
    fixture.round(&["a"], &[]).await.unwrap();
    assert_eq!(fixture.placed(), ["a", "b", "c", "d"]);
    assert_eq!(fixture.refused(), [""; 0]);
}

#[tokio::test]
async fn what_somebody_overtook_comes_last_and_the_round_ends() {
    let mut fixture = Fixture::new(&["a", "b"]).await;
    let store = fixture.manager.config.store.clone();
    store.txn(vec![], vec![Op::Put(keys::placement(&name("a")), "{}".into())]).await.unwrap();
    fixture.round(&["a", "b"], &[]).await.unwrap();
    assert_eq!(fixture.placed(), ["a"], "everything is read again before more is done");
    assert!(fixture.manager.refused.contains(&ObjectRef::new(Kind::Vm, name("a"))));
    fixture.round(&["a", "b"], &[]).await.unwrap();
    assert_eq!(fixture.placed(), ["a", "b"]);
}

#[tokio::test]
async fn of_a_plan_that_has_become_old_the_rest_is_planned_anew() {
    let mut fixture = Fixture::new(&["a", "b", "c", "d"]).await;
    fixture.path.1.store(600, Ordering::Relaxed);
    let done = fixture.round(&["a", "b", "c", "d"], &[]).await.unwrap();
    assert!(done.is_some());
    assert_eq!(fixture.placed(), ["a", "b"], "two commits take longer than a second");
}

#[tokio::test]
async fn nothing_is_planned_on_a_copy_that_does_not_show_its_own_commits() {
    let mut fixture = Fixture::new(&["a"]).await;
    fixture.world.snapshot.revision = 5;
    fixture.manager.own = 6;
    let (snapshot, author) = (fixture.world.snapshot.clone(), fixture.author.clone());
    let pause = fixture.manager.manage(&snapshot, &BTreeSet::new(), &author).await;
    assert_eq!((pause, fixture.placed()), (super::LAGS, vec![]));
    fixture.manager.own = 5;
    fixture.manager.manage(&snapshot, &BTreeSet::new(), &author).await;
    assert_eq!(fixture.placed(), ["a"]);
}
