//! An agent over fakes and a store in memory, for tests in virtual time.

use super::{
    AgentParts, HostFacts, StoreMember,
    lease::Session,
    storage::{
        CopyFrom, SeedWanted, SnapshotStep, Storage, StorageFailure, VolumeName, VolumeReady,
        VolumeWanted,
    },
};
use crate::{
    balance::fake::FakeBalance,
    guard::fake::{FakeGuard, Rules},
    health::{Prober, Target},
    heartbeat,
    machine::{Machine, Outcome},
    monitor::{Meter, Stalled, Used},
    network::{
        driver::{LeftAlone, NetworkDriver, NetworkError, NetworkWanted},
        fake::{FakeAddress, FakeUplinks, Segment},
    },
    storage::mirrored::fake::{FakeKeptCopies, FakePieces, FakeReplicas},
    vm::{
        driver::RunningVm,
        fake::{FakeVmDriver, World},
        snapshots::Keeps,
    },
};
use async_trait::async_trait;
use haven_model::{
    HostStatus, Name, ObjectRef, Placement, PoolDriverKind, PoolSpec, Snapshot, VmStatus,
    image::ImageFile, keys, maintenance::Work, object::Kind, placement::NicAddress, pool::PoolRoom,
};
use haven_store::{
    clock::Clock,
    live::{LiveConfig, LiveCopy},
    memory::{Direct, MemoryEtcd},
    pki::Authority,
    raw::{EtcdStore, Op},
    seal::{ClusterKey, Plain},
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A name.
pub fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// A Ceph cluster that knows clients.
#[derive(Default)]
pub struct Ceph {
    /// By which each volume is open.
    pub open: BTreeMap<VolumeName, BTreeSet<String>>,
    /// Those that were shut out.
    pub shut: BTreeSet<String>,
    /// Why nobody can be shut out.
    pub refuses: Option<String>,
    /// Tells one from the next.
    next: u64,
}

/// Volumes that are names; a step may hang or fail.
#[derive(Default)]
pub struct Disks {
    /// What this host has.
    pub here: Mutex<BTreeSet<VolumeName>>,
    /// What was put aside.
    pub aside: Mutex<Vec<VolumeName>>,
    /// Volumes are never ready.
    pub hangs: AtomicBool,
    /// The cluster of pools that are Ceph's.
    pub ceph: Mutex<Ceph>,
    /// Nothing is copied that nobody waits for.
    pub keeps_room: AtomicBool,
    /// Why volumes cannot be made.
    pub refuses: Mutex<Option<String>>,
    /// Where what they hold stands.
    pub world: OnceLock<Arc<World>>,
    /// Disks that were made from others, one after another.
    pub copies: Mutex<Vec<VolumeName>>,
    /// Steps with snapshots in volumes that nobody has open, one after another.
    pub steps: Mutex<Vec<(String, SnapshotStep)>>,
}

impl Disks {
    /// A disk that holds what a snapshot in another one keeps.
    fn copy(&self, wanted: &VolumeWanted, from: &CopyFrom) {
        let world = self.world.get().unwrap();
        let (of, disk) = (from.name.vm.as_str(), from.name.disk.as_str());
        let kept = world.kept.content(of, disk, &from.tag).expect("the snapshot is there");
        let (vm, called) = (wanted.name.vm.as_str(), wanted.name.disk.to_string());
        let mut now = world.disks.content(vm);
        now.retain(|(disk, _)| *disk != called);
        now.push((called, kept));
        world.disks.put(vm, now);
        self.copies.lock().unwrap().push(wanted.name.clone());
    }
}

#[async_trait]
impl Storage for Disks {
    async fn volume(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
    ) -> Result<VolumeReady, StorageFailure> {
        if self.hangs.load(Ordering::Acquire) {
            std::future::pending::<()>().await;
        }
        if let Some(what) = self.refuses.lock().unwrap().clone() {
            return Err(StorageFailure { what });
        }
        if pool.driver == PoolDriverKind::Rbd {
            // That of the process that is started next.
            let mut ceph = self.ceph.lock().unwrap();
            ceph.next += 1;
            let client = format!("10.0.0.1:0/{}", ceph.next);
            ceph.open.entry(wanted.name.clone()).or_default().insert(client);
        }
        let made = self.here.lock().unwrap().insert(wanted.name.clone());
        if let Some(from) = wanted.copy.as_ref().filter(|_| made) {
            self.copy(wanted, from);
        }
        Ok(VolumeReady {
            path: wanted.name.to_string().into(),
            format: "raw".into(),
            rbd: None,
            filer: None,
        })
    }
    async fn has_volume(
        &self,
        _pool: &PoolSpec,
        name: &VolumeName,
        _owner_uid: u32,
    ) -> Result<Option<PathBuf>, StorageFailure> {
        let in_ceph = self.ceph.lock().unwrap().open.contains_key(name);
        let there = in_ceph || self.here.lock().unwrap().contains(name);
        Ok(there.then(|| name.to_string().into()))
    }
    async fn grow(
        &self,
        _pool: &PoolSpec,
        _name: &VolumeName,
        _size_bytes: u64,
        _key: Option<&Plain>,
    ) -> Result<(), StorageFailure> {
        Ok(())
    }
    async fn keeps(
        &self,
        _pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<Option<Keeps>, StorageFailure> {
        let (vm, disk) = (name.vm.as_str(), name.disk.as_str());
        let world = self.world.get().unwrap();
        let here = self.here.lock().unwrap().contains(name);
        let content = world.disks.content(vm).into_iter().find(|(of, _)| of == disk);
        let size = content.map_or(0, |(_, content)| content.len() as u64);
        Ok(here.then(|| world.kept.of(vm, disk, size)))
    }
    async fn snapshot(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        step: SnapshotStep,
        snapshot: &str,
        _key: Option<&Plain>,
    ) -> Result<(), StorageFailure> {
        let (vm, disk) = (name.vm.as_str(), name.disk.as_str());
        let world = self.world.get().unwrap();
        let in_ceph = pool.driver == PoolDriverKind::Rbd;
        let runs = world.running_on("host1").iter().any(|(running, _)| running == vm);
        assert!(!runs || in_ceph && step != SnapshotStep::Revert);
        // Ceph puts nothing back that somebody has open; neither is anything kept at rest then.
        let open = self.ceph.lock().unwrap().open.get(name).is_some_and(|who| !who.is_empty());
        assert!(!open || runs || step == SnapshotStep::Remove, "{name} is open");
        if let Some(what) = world.kept.refusal(disk) {
            return Err(StorageFailure { what });
        }
        self.steps.lock().unwrap().push((disk.to_owned(), step));
        let mut now = world.disks.content(vm);
        let (_, holds) = now.iter_mut().find(|(of, _)| of == disk).unwrap();
        match step {
            SnapshotStep::Take => {
                assert!(
                    world.kept.content(vm, disk, snapshot).is_none(),
                    "one of that name is there"
                );
                world.kept.keep(vm, disk, snapshot, (7, holds.clone()));
            }
            SnapshotStep::Revert => {
                *holds = world.kept.content(vm, disk, snapshot).unwrap();
                world.disks.put(vm, now);
            }
            SnapshotStep::Remove => assert!(world.kept.drop_kept(vm, disk, snapshot)),
        }
        Ok(())
    }
    async fn disk_secret(
        &self,
        _vm: &str,
        disk: &Name,
        _key: &Plain,
        _owner_uid: u32,
    ) -> Result<PathBuf, StorageFailure> {
        Ok(PathBuf::from(format!("{disk}.luks")))
    }
    async fn volume_keys(
        &self,
        _vm: &str,
        _disk: &Name,
        _key: &Plain,
        _owner_uid: u32,
    ) -> Result<PathBuf, StorageFailure> {
        Ok(PathBuf::from("keys"))
    }
    async fn delete_volume(
        &self,
        _pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<(), StorageFailure> {
        self.here.lock().unwrap().remove(name);
        Ok(())
    }
    async fn volumes(&self, _pool: &PoolSpec) -> Result<Vec<VolumeName>, StorageFailure> {
        Ok(self.here.lock().unwrap().iter().cloned().collect())
    }
    async fn put_aside(
        &self,
        _pool: &PoolSpec,
        names: &[VolumeName],
    ) -> Result<(), StorageFailure> {
        self.here.lock().unwrap().retain(|name| !names.contains(name));
        self.aside.lock().unwrap().extend(names.iter().cloned());
        Ok(())
    }
    async fn clients(
        &self,
        _pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<BTreeSet<String>, StorageFailure> {
        Ok(self.ceph.lock().unwrap().open.get(name).cloned().unwrap_or_default())
    }
    async fn shut_out(
        &self,
        _pool: &PoolSpec,
        name: &VolumeName,
        noted: &BTreeSet<String>,
        shut: &BTreeSet<String>,
    ) -> Result<(), StorageFailure> {
        let mut ceph = self.ceph.lock().unwrap();
        if let Some(what) = ceph.refuses.clone() {
            return Err(StorageFailure { what });
        }
        let open = ceph.open.remove(name).unwrap_or_default();
        assert!(shut.is_subset(&ceph.shut));
        ceph.shut.extend(open.into_iter().chain(noted.iter().cloned()));
        Ok(())
    }
    async fn shut_client(&self, _pool: &PoolSpec, client: &str) -> Result<(), StorageFailure> {
        let mut ceph = self.ceph.lock().unwrap();
        if let Some(what) = ceph.refuses.clone() {
            return Err(StorageFailure { what });
        }
        ceph.shut.insert(client.to_owned());
        Ok(())
    }
    async fn room(&self, _pool: &PoolSpec) -> Result<Option<PoolRoom>, StorageFailure> {
        Ok(None)
    }
    async fn image_file(&self, _file: &ImageFile) -> Result<PathBuf, StorageFailure> {
        Ok(PathBuf::from("image"))
    }
    async fn copy_image(&self, _file: &ImageFile) -> Result<(), StorageFailure> {
        let why = || StorageFailure { what: "a tenth is kept free".into() };
        if self.keeps_room.load(Ordering::Acquire) { Err(why()) } else { Ok(()) }
    }
    async fn seed(&self, _wanted: &SeedWanted) -> Result<PathBuf, StorageFailure> {
        Ok(PathBuf::from("seed"))
    }
    async fn forget(&self, _vm: &str) -> Result<(), StorageFailure> {
        Ok(())
    }
    async fn images(&self) -> BTreeSet<String> {
        BTreeSet::new()
    }
}

/// Networks of which some cannot be made; counts how often each was tried.
#[derive(Default)]
pub struct Wires {
    /// Those that fail.
    pub bad: Mutex<BTreeSet<String>>,
    /// How often anything was applied.
    pub tries: Mutex<u32>,
    /// What was wanted last.
    pub last: Mutex<(Vec<NetworkWanted>, LeftAlone)>,
}

#[async_trait]
impl NetworkDriver for Wires {
    async fn apply(
        &self,
        wanted: &[NetworkWanted],
        left_alone: &LeftAlone,
    ) -> Result<BTreeMap<String, NetworkError>, NetworkError> {
        *self.last.lock().unwrap() = (wanted.to_vec(), left_alone.clone());
        *self.tries.lock().unwrap() += 1;
        let bad = self.bad.lock().unwrap();
        let failed = wanted.iter().filter(|network| bad.contains(&network.name));
        Ok(failed
            .map(|network| {
                let error =
                    NetworkError { what: "it needs br9".into(), why: "no such bridge".into() };
                (network.name.clone(), error)
            })
            .collect())
    }
}

/// Guests that all answer, or none.
#[derive(Default)]
pub struct Answers(pub AtomicBool);

#[async_trait]
impl Prober for Answers {
    async fn probe(&self, _target: &Target) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Nothing takes anything.
struct Idle;

#[async_trait]
impl Machine for Idle {
    async fn begin(&self, _work: Work, _id: &str) -> std::io::Result<()> {
        Ok(())
    }
    async fn outcome(&self, _id: &str) -> Outcome {
        Outcome::Done
    }
}

impl Meter for Idle {
    fn used(&self, _vm: &RunningVm) -> std::io::Result<Option<Used>> {
        Ok(Some(Used::default()))
    }
    fn stalled(&self) -> Option<Stalled> {
        None
    }
}

/// One host with an agent, whose daemon can be ended and started anew.
pub struct Fixture {
    etcd: MemoryEtcd,
    /// The store.
    pub store: EtcdStore,
    /// What runs.
    pub world: Arc<World>,
    guard: Arc<FakeGuard>,
    /// Its volumes.
    pub disks: Arc<Disks>,
    /// Its networks.
    pub wires: Arc<Wires>,
    /// What leads out of it.
    pub uplinks: Arc<FakeUplinks>,
    /// Its guests.
    pub answers: Arc<Answers>,
    /// Its balancer.
    pub balance: Arc<FakeBalance>,
    /// Under which secrets are sealed.
    pub secrets: ClusterKey,
    /// Its session.
    pub session: watch::Sender<Option<Session>>,
    clock: Clock,
    daemon: Option<CancellationToken>,
    heard: (heartbeat::Told, heartbeat::Heard),
    /// Its member of the store: none.
    member: watch::Sender<StoreMember>,
}

impl Fixture {
    /// A host with an open session and no daemon; a local pool, and the networks `good` and `bad`.
    pub async fn new() -> Self {
        let etcd = MemoryEtcd::default();
        let store = EtcdStore::over(etcd.channel(Arc::new(Direct))).await.unwrap();
        let clock = Clock::simulated(1.0);
        let world = Arc::new(World::default());
        let rules = Rules { compares_sessions: false, takes_addresses: true };
        let guard =
            FakeGuard::spawn("host1", (Arc::clone(&world), Arc::default()), clock.clone(), rules);
        let keeper = guard.handle(clock.clone());
        let (ticks, until) = (clock.clone(), Duration::from_secs(3600));
        let deadline = ticks.boottime_ns() + u64::try_from(until.as_nanos()).unwrap();
        keeper.extend(1, deadline).await.unwrap();
        let session = watch::channel(Some(Session { number: 1, since_revision: 0 })).0;
        let fixture = Self {
            etcd,
            store,
            world,
            guard,
            disks: Arc::default(),
            wires: Arc::default(),
            uplinks: Arc::default(),
            answers: Arc::default(),
            balance: Arc::default(),
            secrets: ClusterKey::derive(&Authority::create("test").unwrap()).unwrap(),
            session,
            clock,
            daemon: None,
            heard: heartbeat::channels(),
            member: watch::channel(StoreMember::default()).0,
        };
        assert!(fixture.disks.world.set(Arc::clone(&fixture.world)).is_ok());
        fixture.object(Kind::Pool, "fast", json!({"driver": "local", "path": "/pools/fast"})).await;
        for (network, subnet) in [("good", "10.1.0.0/24"), ("bad", "10.2.0.0/24")] {
            fixture.object(Kind::Network, network, json!({"subnet": subnet})).await;
        }
        fixture
    }

    /// Writes an object whose uid is `u-NAME`.
    pub async fn object(&self, kind: Kind, called: &str, spec: Value) {
        let meta = json!({"name": called, "uid": format!("u-{called}"), "generation": 1});
        self.put(
            &keys::object(&ObjectRef::new(kind, name(called))),
            &json!({"meta": meta, "spec": spec}),
        )
        .await;
    }

    /// Writes a VM with a disk and a card in `network`, placed on this host.
    pub async fn vm(&self, called: &str, network: &str, more: Value) {
        let mut spec = json!({"memory": "64MiB", "networks": [{"network": network}],
            "disks": [{"name": "root", "pool": "fast", "size": "1GiB"}]});
        spec.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
        self.object(Kind::Vm, called, spec).await;
        self.place(called, network, "host1", 1).await;
    }

    /// Places a VM.
    pub async fn place(&self, called: &str, network: &str, host: &str, epoch: u64) {
        let nics = vec![NicAddress::new(name(network), "10.1.0.9".parse().unwrap())];
        let placement = Placement::new(name(host), epoch, 1, nics);
        self.put(&keys::placement(&name(called)), &serde_json::to_value(placement).unwrap()).await;
    }

    /// Writes anything.
    pub async fn put(&self, key: &str, value: &Value) {
        let value = serde_json::to_vec(value).unwrap();
        self.store.txn(vec![], vec![Op::Put(key.into(), value.into())]).await.unwrap();
    }

    /// Deletes anything.
    pub async fn delete(&self, key: &str) {
        self.store.txn(vec![], vec![Op::Delete(key.into())]).await.unwrap();
    }

    /// What stands in the store of a VM.
    pub fn status(&self, vm: &str) -> Option<VmStatus> {
        let value = self.etcd.peek(&keys::vm_status(&name(vm)))?;
        Some(serde_json::from_slice(&value).unwrap())
    }

    /// What stands at a key of the store.
    pub fn peek(&self, key: &str) -> Option<Value> {
        Some(serde_json::from_slice(&self.etcd.peek(key)?).unwrap())
    }

    /// Whether a VM runs here.
    pub fn runs(&self, vm: &str) -> bool {
        self.world.running_on("host1").iter().any(|(running, _)| running == vm)
    }

    /// A volume of the disk `root`.
    pub fn volume(vm: &str, uid: &str) -> VolumeName {
        VolumeName::parse(&format!("{vm}.root.{uid}")).unwrap()
    }

    /// Starts the daemon's agent.
    pub fn start(&mut self) -> Arc<AgentParts> {
        let cancel = CancellationToken::new();
        let live = LiveCopy::<Snapshot>::spawn(
            self.store.clone(),
            LiveConfig { prefix: keys::ROOT.into(), observed: vec![] },
            self.clock.clone(),
            cancel.clone(),
        );
        let guard = self.guard.handle(self.clock.clone());
        let vms = FakeVmDriver {
            host: "host1".into(),
            world: Arc::clone(&self.world),
            guard,
            start_takes: Duration::from_millis(10),
            clock: self.clock.clone(),
            fails: Arc::new(|| false),
            copies: Arc::new(crate::vm::fake_migration::GoodCopies),
        };
        let parts = Arc::new(AgentParts {
            me: name("host1"),
            store: self.store.clone(),
            live: live.state(),
            heard: self.heard.1.clone(),
            session: self.session.subscribe(),
            vms: Arc::new(vms),
            network: Arc::clone(&self.wires) as _,
            uplinks: Arc::clone(&self.uplinks) as _,
            cut_off: super::CutOff::default(),
            address: Arc::new(FakeAddress {
                host: "host1".into(),
                segment: Arc::new(Segment::default()),
                reaches: Arc::new(|_, _| true),
                clock: self.clock.clone(),
            }),
            balance: Arc::clone(&self.balance) as _,
            secrets: Some(self.secrets.clone()),
            storage: Arc::clone(&self.disks) as _,
            replicas: Arc::new(FakeReplicas {
                host: "host1".into(),
                world: Arc::clone(&self.world),
                clock: self.clock.clone(),
                fails: Arc::new(|| false),
            }),
            kept: Arc::new(FakeKeptCopies {
                host: "host1".into(),
                world: Arc::clone(&self.world),
                clock: self.clock.clone(),
            }),
            pieces: Arc::new(FakePieces {
                world: Arc::clone(&self.world),
                clock: self.clock.clone(),
            }),
            tunnel: Arc::new(crate::agent::tunnel::NoTunnel),
            machine: Arc::new(Idle),
            meter: Arc::new(Idle),
            prober: Arc::clone(&self.answers) as _,
            facts: watch::channel(Some(HostFacts::default())).1,
            clock: self.clock.clone(),
            wall_ms: Arc::new(|| 1),
            problems: Arc::default(),
            store_member: self.member.subscribe(),
        });
        tokio::spawn(super::run(Arc::clone(&parts), cancel.clone()));
        self.daemon = Some(cancel);
        parts
    }

    /// Ends the daemon; the VMs run on.
    pub async fn end(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            daemon.cancel();
        }
        self.pass(1).await;
    }

    /// What the host's status in the store says is wrong.
    pub fn told(&self) -> Vec<String> {
        let value = self.etcd.peek(&keys::host_status(&name("host1"))).unwrap_or_default();
        serde_json::from_slice::<HostStatus>(&value)
            .map(|status| status.problems)
            .unwrap_or_default()
    }

    /// Waits.
    pub async fn pass(&self, seconds: u64) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
}
