//! A simulated cluster: its hosts, what they share, and what a person does with it.

use crate::{
    host::{SimHost, booting},
    judge::Judge,
    net::{Net, Power},
    promises,
    surroundings::PowerSwitch,
    wire,
};
use haven_host::{
    network::fake::Segment,
    vm::{fake::World, fake_mirrors::Careless},
};
use haven_model::{
    ClusterSpec, Drain, Migration, MigrationOptions, Name, Observations, ProofKind,
    RebalancePolicy, Timers,
    cluster::SHORTEST_WINDOW,
    keys, manifest,
    object::Object,
    volume::{Volume, VolumeRef},
};
use haven_plan::tolerance::maintenance::in_turn;
use haven_store::{
    memory::{Direct, MemoryEtcd},
    raw::{Compare, EtcdStore, Op},
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

/// What all hosts share.
pub struct Shared {
    /// Who reaches whom.
    pub net: Arc<Net>,
    /// The store.
    pub etcd: MemoryEtcd,
    /// What runs.
    pub world: Arc<World>,
    /// Who holds which address.
    pub segment: Arc<Segment>,
    /// Who listens for heartbeats.
    pub wires: Arc<wire::Segment>,
    /// Which daemons answer hosts that cannot renew.
    pub promisers: Arc<promises::Answering>,
    /// Checks everything.
    pub judge: Arc<Judge>,
    /// The hosts' run directories.
    pub dir: PathBuf,
    /// Cuts power.
    pub switch: OnceLock<Weak<dyn PowerSwitch>>,
    /// What is broken on purpose.
    pub broken: Option<Broken>,
    incarnations: AtomicU64,
    begun: Instant,
}

impl Shared {
    /// A number larger than every one before.
    pub fn incarnation(&self) -> u64 {
        self.incarnations.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The wall clock that people read.
    #[must_use]
    pub fn wall(&self) -> Arc<dyn Fn() -> i64 + Send + Sync> {
        let begun = self.begun;
        Arc::new(move || {
            1_700_000_000_000 + i64::try_from(begun.elapsed().as_millis()).unwrap_or(0)
        })
    }
}

/// What a cluster is made with.
#[derive(Clone, Debug)]
pub struct Setup {
    /// How many hosts.
    pub hosts: u8,
    /// The last of them is a witness.
    pub witness: bool,
    /// Decides everything.
    pub seed: u64,
    /// Hosts are reset by a watchdog when they are paused.
    pub watchdog: bool,
    /// Hosts have a power controller.
    pub power_control: bool,
    /// Clocks run unevenly by up to so many percent, slower or faster.
    pub clock_skew_percent: f64,
    /// What is applied at the beginning.
    pub manifest: String,
    /// What becomes of loads that are uneven.
    pub rebalance: RebalancePolicy,
    /// Which proofs suffice.
    pub fencing: Vec<ProofKind>,
    /// What is broken on purpose, to show that the judge finds it.
    pub broken: Option<Broken>,
}

/// Parts that a test breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Broken {
    /// Managers wait for only a third of a record's time, so that the guards' deadlines come too late.
    Deadlines,
    /// Managers judge records by the cluster's timers of the moment, and not by the time that each record states.
    Timers,
    /// The guards take starts that began in an earlier session.
    Sessions,
    /// The guards leave service addresses where they are.
    Addresses,
    /// Hosts that cannot renew take silence for a promise.
    Silence,
    /// Daemons forget what they promised.
    Promises,
    /// Live migrations go on without waiting for the change of the owner.
    Switchover,
    /// A power-off is believed without reading it back.
    Power,
    /// The store takes placements and leases over others than those that were read, so that no epoch is checked.
    Comparisons,
    /// Guests that were handed over still write to the disks of their old host.
    Disks,
    /// A write to a mirrored disk is acknowledged when one replica lacks it.
    Threshold,
    /// A process goes on without a replica that failed before the store says that it counts no more.
    Consent,
}

impl Broken {
    fn of_mirrors(self) -> Option<Careless> {
        match self {
            Broken::Threshold => Some(Careless::Threshold),
            Broken::Consent => Some(Careless::Consent),
            _ => None,
        }
    }
}

/// A cluster.
pub struct Cluster {
    /// What its hosts share.
    pub shared: Arc<Shared>,
    hosts: Mutex<Vec<Arc<tokio::sync::Mutex<SimHost>>>>,
    setup: Setup,
    pub(crate) person: EtcdStore,
    /// Records that no version here can read, by key below the root, as they were before.
    garbled: Mutex<BTreeMap<String, Vec<u8>>>,
}

/// What no version here can read.
const GARBLED: &str = "{\"written-by\":\"a newer version\"}";

/// How long a host is off when it restarts.
const RESTART: Duration = Duration::from_secs(8);

/// How long a copy on a host without watchdog may overlap after waking.
const GRACE: Duration = Duration::from_millis(50);

impl Cluster {
    /// Makes it, switches all hosts on and applies the manifest.
    ///
    /// # Errors
    /// When the manifest is wrong.
    pub async fn start(setup: Setup) -> anyhow::Result<Arc<Self>> {
        let names: Vec<String> = (1..=setup.hosts).map(|i| format!("host{i}")).collect();
        let net = Net::new(&names, setup.seed);
        let grace = if setup.watchdog { Duration::ZERO } else { GRACE };
        let segment: Arc<Segment> = Arc::default();
        let judge = Arc::new(Judge::new(grace, Arc::clone(&segment)));
        let (seen, heard) = (Arc::clone(&judge), Arc::clone(&judge));
        let world = Arc::new(World::witnessed(Arc::new(move |host, vm, epoch, started| {
            heard.world(host, vm, epoch, started);
        })));
        if let Some(careless) = setup.broken.and_then(Broken::of_mirrors) {
            world.mirrors.set_careless(careless);
        }
        let of_replicas = Arc::clone(&world);
        let witness: haven_store::memory::Witness = Arc::new(move |revision, events| {
            let changes = changes(events);
            seen.transaction(revision, &changes);
            changes.iter().for_each(|change| counted(&of_replicas, change));
        });
        let careless = match setup.broken {
            Some(Broken::Comparisons) => vec![keys::PLACEMENTS.to_owned(), keys::LEASES.to_owned()],
            _ => vec![],
        };
        let etcd = MemoryEtcd::careless(Some(witness), careless);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("haven-sim-{}-{number}", std::process::id()));
        let shared = Arc::new(Shared {
            net,
            world,
            segment,
            wires: Arc::default(),
            promisers: Arc::default(),
            judge,
            dir,
            switch: OnceLock::new(),
            broken: setup.broken,
            incarnations: AtomicU64::new(0),
            begun: Instant::now(),
            etcd,
        });
        let person = EtcdStore::over(shared.etcd.channel(Arc::new(Direct))).await?;
        let skew = setup.clock_skew_percent / 100.0;
        let hosts = (1..=setup.hosts)
            .map(|i| {
                let unit = shared.net.random(2001) as f64 / 1000.0 - 1.0;
                Arc::new(tokio::sync::Mutex::new(SimHost::new(
                    i,
                    1.0 + skew * unit,
                    setup.witness && i == setup.hosts,
                    &shared,
                )))
            })
            .collect();
        let cluster = Arc::new(Self {
            shared,
            hosts: Mutex::new(hosts),
            setup: setup.clone(),
            person,
            garbled: Mutex::default(),
        });
        let switch: Arc<dyn PowerSwitch> = Arc::clone(&cluster) as _;
        let _ = cluster.shared.switch.set(Arc::downgrade(&switch));
        cluster.found().await?;
        for host in cluster.all() {
            host.lock().await.power_on().await;
        }
        Ok(cluster)
    }

    fn all(&self) -> Vec<Arc<tokio::sync::Mutex<SimHost>>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The host of this name.
    ///
    /// # Panics
    /// When there is none; scenarios are checked before they run.
    #[must_use]
    pub fn host(&self, name: &str) -> Arc<tokio::sync::Mutex<SimHost>> {
        let number: usize = name.trim_start_matches("host").parse().unwrap_or(0);
        self.all().into_iter().nth(number.wrapping_sub(1)).expect("the scenario names its hosts")
    }

    /// Names of all hosts.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        (1..=self.setup.hosts).map(|i| format!("host{i}")).collect()
    }

    /// Writes what `haven init`, `haven join` and `haven apply` would have written.
    async fn found(&self) -> anyhow::Result<()> {
        let spec = ClusterSpec {
            name: "sim".into(),
            rebalance: self.setup.rebalance,
            fencing: self.setup.fencing.clone(),
            rebalance_window: SHORTEST_WINDOW,
            ..ClusterSpec::default()
        };
        let put = |key: &str, value: Vec<u8>| vec![Op::Put(key.into(), value.into())];
        self.person.txn(vec![], put(keys::CLUSTER, serde_json::to_vec(&spec)?)).await?;
        let mut text = String::new();
        for (i, host) in self.names().iter().enumerate() {
            let power = if self.setup.power_control { "power: {url: \"sim:\"}\n" } else { "" };
            let last = i + 1 == usize::from(self.setup.hosts);
            let witness = if self.setup.witness && last { "witness: true\n" } else { "" };
            text.push_str(&format!(
                "kind: Host\nname: {host}\naddress: 10.88.0.{}\n{power}{witness}---\n",
                i + 1
            ));
        }
        self.apply(&text).await?;
        self.apply(&self.setup.manifest).await
    }

    /// Applies a manifest as a person does, straight to the store.
    ///
    /// # Errors
    /// When it is wrong.
    pub async fn apply(&self, text: &str) -> anyhow::Result<()> {
        let manifests = manifest::parse(&[("scenario".into(), text.into())])
            .map_err(|problems| anyhow::anyhow!("the manifest is wrong: {problems:?}"))?;
        for manifest in manifests {
            let mut object = manifest.object;
            let key = keys::object(&object.reference());
            loop {
                let there = self.person.get(&key).await?;
                let compare = match &there {
                    None => Compare::Absent(key.clone()),
                    Some(kv) => Compare::ModRevision(key.clone(), kv.mod_revision),
                };
                let wall = (self.shared.wall())();
                let old = there
                    .and_then(|kv| serde_json::from_slice::<serde_json::Value>(&kv.value).ok());
                keep_meta(&mut object, old.as_ref(), wall, self.shared.incarnation());
                let ops = vec![Op::Put(key.clone(), object.to_store().into())];
                if self.person.txn(vec![compare], ops).await?.succeeded {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Changes an object's JSON as a person does with `haven vm stop`, `scale` or `delete`. Nothing when it is gone.
    pub async fn change(&self, key: &str, change: impl Fn(&mut serde_json::Value)) {
        while let Ok(Some(kv)) = self.person.get(key).await {
            if kv.value == GARBLED.as_bytes() {
                return;
            }
            let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(&kv.value) else {
                return;
            };
            change(&mut value);
            let generation = value["meta"]["generation"].as_u64().unwrap_or(0) + 1;
            value["meta"]["generation"] = generation.into();
            if self.is_too_much(key, &value) {
                return self.shared.judge.note(&format!("refused: {key} would be too much"));
            }
            let compare = vec![Compare::ModRevision(key.into(), kv.mod_revision)];
            let ops = vec![Op::Put(key.into(), value.to_string().into_bytes().into())];
            if self.person.txn(compare, ops).await.is_ok_and(|outcome| outcome.succeeded) {
                return;
            }
        }
    }

    /// Whether the API would refuse a change.
    fn is_too_much(&self, key: &str, value: &serde_json::Value) -> bool {
        let mut snapshot = self.shared.judge.read(|facts| facts.snapshot.clone());
        let before = snapshot.clone();
        snapshot.apply(key, Some((value.to_string().as_bytes(), 0)));
        let path = key.strip_prefix(keys::ROOT).and_then(|path| path.strip_prefix("spec/"));
        let object = path.and_then(|path| snapshot.object(&path.parse().ok()?));
        let wanted: Vec<_> = object.into_iter().map(|(object, _)| object).collect();
        haven_plan::admit(&before, &Observations::default(), &wanted).is_some()
    }

    /// Moves a VM live as a person does, `postcopy` or not. Nothing when it has no host.
    pub async fn migrate(&self, vm: &str, to: Option<&str>, postcopy: bool) {
        let vm = name(vm);
        let owner = self.shared.judge.read(|facts| {
            facts.snapshot.placements.get(&vm).map(|placement| placement.host.clone())
        });
        let Some(from) = owner else { return };
        let number = self.shared.incarnation();
        let migration = Migration {
            id: format!("m{number}"),
            from,
            to: to.map(name),
            options: MigrationOptions { postcopy, ..MigrationOptions::default() },
            by: "a person".into(),
            at_ms: (self.shared.wall())(),
            drain: None,
            balances: false,
            outcome: None,
        };
        let Ok(value) = serde_json::to_vec(&migration) else { return };
        let _ = self.person.txn(vec![], vec![Op::Put(keys::migration(&vm), value.into())]).await;
    }

    /// Takes a move back as a person does.
    pub async fn cancel_migration(&self, vm: &str) {
        let key = keys::migration(&name(vm));
        while let Ok(Some(kv)) = self.person.get(&key).await {
            let Ok(migration) = serde_json::from_slice::<Migration>(&kv.value) else { return };
            if migration.outcome.is_some() {
                return;
            }
            let ended = migration.ended((self.shared.wall())(), false, "taken back".into());
            let Ok(value) = serde_json::to_vec(&ended) else { return };
            let compare = vec![Compare::ModRevision(key.clone(), kv.mod_revision)];
            let ops = vec![Op::Put(key.clone(), value.into())];
            if self.person.txn(compare, ops).await.is_ok_and(|outcome| outcome.succeeded) {
                return;
            }
        }
    }

    /// Drains a host as a person does. Nothing when it is drained already.
    pub async fn drain(&self, host: &str) {
        let drain = Drain {
            id: format!("d{}", self.shared.incarnation()),
            by: "a person".into(),
            at_ms: (self.shared.wall())(),
            drained_ms: None,
            bringing_back: false,
        };
        let key = keys::drain(&name(host));
        let Ok(value) = serde_json::to_vec(&drain) else { return };
        let ops = vec![Op::Put(key.clone(), value.into())];
        let _ = self.person.txn(vec![Compare::Absent(key)], ops).await;
    }

    /// Restarts all hosts, one after another, as a person asks for with `haven host reboot --rolling`.
    pub async fn reboot_all(&self) {
        let now = (self.shared.wall())();
        let in_turn = self.shared.judge.read(|facts| in_turn(&facts.snapshot));
        let turn =
            |host: &Name| serde_json::json!({"host": host, "phase": "waiting", "sinceMs": now});
        let record = serde_json::json!({
            "id": format!("r{}", self.shared.incarnation()), "work": "reboot", "by": "a person", "atMs": now,
            "hosts": in_turn.iter().map(turn).collect::<Vec<_>>(),
        });
        let there = self.person.get(keys::MAINTENANCE).await.ok().flatten();
        let compare = match &there {
            None => Compare::Absent(keys::MAINTENANCE.into()),
            Some(kv) => Compare::ModRevision(keys::MAINTENANCE.into(), kv.mod_revision),
        };
        let ops = vec![Op::Put(keys::MAINTENANCE.into(), record.to_string().into())];
        let _ = self.person.txn(vec![compare], ops).await;
    }

    /// Ends that.
    pub async fn end_reboots(&self) {
        let _ = self.person.txn(vec![], vec![Op::Delete(keys::MAINTENANCE.into())]).await;
    }

    /// Ends the drain of a host as a person does.
    pub async fn undrain(&self, host: &str, bring_back: bool) {
        let key = keys::drain(&name(host));
        while let Ok(Some(kv)) = self.person.get(&key).await {
            let Ok(drain) = serde_json::from_slice::<Drain>(&kv.value) else { return };
            let op = if bring_back {
                let back = Drain { bringing_back: true, ..drain };
                let Ok(value) = serde_json::to_vec(&back) else { return };
                Op::Put(key.clone(), value.into())
            } else {
                Op::Delete(key.clone())
            };
            let compare = vec![Compare::ModRevision(key.clone(), kv.mod_revision)];
            if self.person.txn(compare, vec![op]).await.is_ok_and(|outcome| outcome.succeeded) {
                return;
            }
        }
    }

    /// Changes the cluster's timers as a person does with `haven edit cluster`.
    pub async fn set_timers(&self, timers: &Timers) {
        if let Err(error) = timers.check() {
            self.shared.judge.accuse(format!("the scenario is wrong: {error}"));
        }
        while let Ok(Some(kv)) = self.person.get(keys::CLUSTER).await {
            let Ok(spec) = serde_json::from_slice::<ClusterSpec>(&kv.value) else { return };
            let spec = ClusterSpec { timers: timers.clone(), ..spec };
            let Ok(value) = serde_json::to_vec(&spec) else { return };
            let compare = vec![Compare::ModRevision(keys::CLUSTER.into(), kv.mod_revision)];
            let ops = vec![Op::Put(keys::CLUSTER.into(), value.into())];
            if self.person.txn(compare, ops).await.is_ok_and(|outcome| outcome.succeeded) {
                return;
            }
        }
    }

    /// A newer version writes a record that no daemon here can read: `placement/vm/db-1`, say. Nothing when it is not
    /// there.
    pub async fn garble(&self, path: &str) {
        let key = format!("{}{path}", keys::ROOT);
        while let Ok(Some(kv)) = self.person.get(&key).await {
            if kv.value == GARBLED.as_bytes() {
                return;
            }
            let compare = vec![Compare::ModRevision(key.clone(), kv.mod_revision)];
            let ops = vec![Op::Put(key.clone(), GARBLED.into())];
            if self.person.txn(compare, ops).await.is_ok_and(|outcome| outcome.succeeded) {
                let mut garbled = self.garbled.lock().unwrap_or_else(PoisonError::into_inner);
                garbled.insert(path.to_owned(), kv.value.to_vec());
                return;
            }
        }
    }

    /// Every record is again as it was before it could not be read.
    pub async fn ungarble(&self) {
        let all = std::mem::take(&mut *self.garbled.lock().unwrap_or_else(PoisonError::into_inner));
        for (path, value) in all {
            let key = format!("{}{path}", keys::ROOT);
            match self.person.get(&key).await {
                Ok(Some(kv)) if kv.value == GARBLED.as_bytes() => {
                    // Who could read it would have removed it with its VM.
                    let op = if self.has_vm_of(&path, &value).await {
                        Op::Put(key, value.into())
                    } else {
                        Op::Delete(key)
                    };
                    let _ = self.person.txn(vec![], vec![op]).await;
                }
                _ => self.shared.judge.accuse(format!(
                    "unreadable: {path} was written or deleted by somebody who could not read it"
                )),
            }
        }
    }

    /// Whether the VM is still there whose volume's record this is; true for all other records.
    async fn has_vm_of(&self, path: &str, value: &[u8]) -> bool {
        let Some(of) =
            format!("{}{path}", keys::ROOT).strip_prefix(keys::VOLUMES).and_then(VolumeRef::parse)
        else {
            return true;
        };
        let key = keys::object(&haven_model::ObjectRef::new(haven_model::object::Kind::Vm, of.vm));
        let vm = self.person.get(&key).await.ok().flatten();
        let uid = |bytes: &[u8], pointer: &str| {
            let read: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
            read.pointer(pointer).cloned()
        };
        vm.is_some_and(|vm| uid(&vm.value, "/meta/uid") == uid(value, "/vmUid"))
    }

    /// Kills a daemon and lets its supervisor start it again.
    pub async fn restart_daemon(self: &Arc<Self>, name: &str) {
        let host = self.host(name);
        let boot = {
            let mut host = host.lock().await;
            host.kill_daemon();
            host.boots()
        };
        let pause = Duration::from_millis(200 + self.shared.net.random(800));
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let mut host = host.lock().await;
            if host.boots() == boot {
                host.start_daemon().await;
            }
        });
    }

    /// Pauses a host; its watchdog resets it, where there is one.
    pub async fn pause(self: &Arc<Self>, name: &str) {
        let host = self.host(name);
        let (boot, resets_in, witness) = {
            let mut host = host.lock().await;
            let resets_in = host.resets_in();
            host.set_paused(true);
            (host.boots(), resets_in, host.is_witness())
        };
        if !self.setup.watchdog || witness {
            return;
        }
        let (cluster, name) = (Arc::clone(self), name.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(resets_in).await;
            let mut host = host.lock().await;
            let still = cluster.shared.net.power(&name) == Power::Paused && host.boots() == boot;
            if still {
                cluster.shared.judge.note(&format!("the watchdog resets {name}"));
                host.power_off();
                tokio::time::sleep(booting()).await;
                host.power_on().await;
            }
        });
    }

    /// Lets a paused host go on.
    pub async fn resume(&self, name: &str) {
        self.host(name).lock().await.set_paused(false);
    }

    /// Switches on what is off.
    pub async fn power_on_all(&self) {
        for name in self.names() {
            self.host(&name).lock().await.power_on().await;
        }
    }

    /// A person gives guests back what was taken from them: what nobody has open is not brought up to date.
    async fn attach_all(&self) {
        let vms: Vec<Name> = self.shared.judge.read(|facts| {
            let vms = facts.snapshot.vms.iter();
            let lacks = vms.filter(|(_, vm)| vm.spec.disks.iter().any(|disk| disk.detached));
            lacks.map(|(name, _)| name.clone()).collect()
        });
        for vm in vms {
            let attach = |object: &mut serde_json::Value| {
                let disks = object.pointer_mut("/spec/disks").and_then(|d| d.as_array_mut());
                disks.into_iter().flatten().for_each(|disk| disk["detached"] = false.into());
            };
            self.change(&format!("{}{vm}", keys::objects(haven_model::object::Kind::Vm)), attach)
                .await;
        }
    }

    /// Everything is mended: the network, the power, the store, and what people did.
    pub async fn mend(&self) {
        self.shared.judge.note("everything is mended");
        self.shared.net.heal();
        self.ungarble().await;
        self.end_reboots().await;
        for name in self.names() {
            self.undrain(&name, false).await;
        }
        self.attach_all().await;
        for name in self.names() {
            let host = self.host(&name);
            let mut host = host.lock().await;
            host.set_paused(false);
            host.set_daemon_hung(false);
            host.power_on().await;
            host.start_daemon().await;
        }
    }
}

static NUMBER: AtomicU64 = AtomicU64::new(0);

impl PowerSwitch for Cluster {
    fn off(&self, name: &str) -> bool {
        let host = self.host(name);
        // While the watchdog or a person switches it, the controller refuses.
        match host.try_lock() {
            Ok(mut host) => {
                host.power_off();
                true
            }
            Err(_) => false,
        }
    }

    fn restart(&self, name: &str) {
        let host = self.host(name);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            host.lock().await.power_off();
            tokio::time::sleep(RESTART).await;
            host.lock().await.power_on().await;
        });
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.shared.dir);
    }
}

fn changes(events: &[haven_store::memory::Event]) -> Vec<crate::judge::etcd_event::Event> {
    events
        .iter()
        .filter_map(|event| {
            let kv = event.kv.as_ref()?;
            let key = String::from_utf8_lossy(&kv.key).into_owned();
            Some((key, (event.r#type == 0).then(|| kv.value.clone()), kv.mod_revision))
        })
        .collect()
}

/// Tells whose replicas of a volume count from now on.
fn counted(world: &World, (key, value, _): &crate::judge::etcd_event::Event) {
    let Some(of) = key.strip_prefix(keys::VOLUMES).and_then(VolumeRef::parse) else { return };
    let record = value.as_ref().and_then(|value| serde_json::from_slice::<Volume>(value).ok());
    let Some(record) = record else {
        return world.mirrors.forget_counted(&format!("{of}."));
    };
    let hosts = record.counted().map(ToString::to_string).collect();
    if let Some(based) = &record.based {
        world.mirrors.set_based(&format!("{of}.{}", record.vm_uid), &based.copy, based.run);
    }
    world.mirrors.set_counted(&format!("{of}.{}", record.vm_uid), hosts);
}

/// An object that exists keeps its uid and counts its generation; a new one gets both.
fn keep_meta(object: &mut Object, old: Option<&serde_json::Value>, wall: i64, number: u64) {
    let meta = object.meta_mut();
    match old {
        None => {
            meta.uid = format!("00000000-0000-0000-0000-{number:012}");
            meta.generation = 1;
            meta.created_ms = wall;
        }
        Some(old) => {
            meta.uid = old["meta"]["uid"].as_str().unwrap_or_default().into();
            meta.generation = old["meta"]["generation"].as_u64().unwrap_or(0) + 1;
            meta.created_ms = old["meta"]["created_ms"].as_i64().unwrap_or(0);
        }
    }
}

/// A name that is known to be one.
#[must_use]
pub fn name(text: &str) -> Name {
    Name::new(text).expect("a name that the simulator made")
}
