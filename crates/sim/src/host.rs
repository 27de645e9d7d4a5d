//! One simulated host: its machine, its guard, and its daemon made of the product's own parts.

use crate::{
    cluster::{Broken, Shared},
    failing::{Failing, SimUplinks},
    net::{Net, Power},
    path::StorePath,
    promises::{Answerer, SimPromisers},
    surroundings::{PowerSwitch, SimMachine, SimMeter, SimPower, SimProber, SimStorage},
    wire::SimWire,
};
use haven_control::manager::{
    self, ManagerConfig,
    observe::{ObservedSince, Observer},
    promises::Promises,
};
use haven_host::{
    agent::{self, AgentParts, HostFacts, StoreMember, lease, remains::HostRemains},
    balance::fake::FakeBalance,
    guard::{
        Guard,
        fake::{FakeGuard, Rules},
        nothing::NothingToGuard,
    },
    heartbeat::{self, HeartbeatConfig},
    network::fake::{FakeAddress, FakeNetwork},
    storage::mirrored::fake::{FakeKeptCopies, FakePieces, FakeReplicas},
    vm::{driver::VmDriver, fake::FakeVmDriver, fake_migration::Copies},
};
use haven_model::{Name, Snapshot, Timers, keys};
use haven_store::{
    clock::{Clock, Mono, Run},
    contact::Contact,
    live::{LiveConfig, LiveCopy},
    pki::Authority,
    raw::EtcdStore,
    seal::ClusterKey,
};
use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Memory of every simulated host.
pub const MEMORY: u64 = 4 << 30;
/// How long QEMU takes to start.
const START: Duration = Duration::from_millis(120);
/// From power to a running daemon.
const BOOT: Duration = Duration::from_secs(4);

/// What exists while a host is on.
struct Machine {
    clock: Clock,
    guard: Arc<FakeGuard>,
    /// Drives the guard.
    run: watch::Sender<Run>,
}

/// What exists while its daemon lives.
struct Daemon {
    run: watch::Sender<Run>,
    cancel: CancellationToken,
    /// A daemon with a member of the store tells its id here; kept, since an ended channel means an ended daemon.
    _member: watch::Sender<StoreMember>,
}

/// A host.
pub struct SimHost {
    name: Name,
    address: Ipv4Addr,
    rate: f64,
    dir: PathBuf,
    shared: Arc<Shared>,
    machine: Option<Machine>,
    daemon: Option<Daemon>,
    boots: u64,
    /// It votes and runs nothing: it has no agent, no guard and no watchdog.
    witness: bool,
}

impl SimHost {
    /// A host that is off. Its clock runs at `rate`.
    #[must_use]
    pub fn new(number: u8, rate: f64, witness: bool, shared: &Arc<Shared>) -> Self {
        let name = Name::new(format!("host{number}")).expect("a good name");
        let dir = shared.dir.join(name.as_str());
        Self {
            address: Ipv4Addr::new(10, 88, 0, number),
            name,
            rate,
            dir,
            shared: Arc::clone(shared),
            machine: None,
            daemon: None,
            boots: 0,
            witness,
        }
    }

    fn set_power(&self, power: Power) {
        self.shared.net.set_power(self.name.as_str(), power);
        self.shared.judge.power(self.name.as_str(), power);
    }

    /// Switches it on; its daemon runs.
    pub async fn power_on(&mut self) {
        if self.machine.is_some() {
            return;
        }
        // The run directory does not survive a reboot.
        let _ = std::fs::remove_dir_all(&self.dir);
        let _ = std::fs::create_dir_all(&self.dir);
        self.boots += 1;
        let (run, runs) = watch::channel(Run::Running);
        let clock = Clock::simulated(self.rate);
        let world = Arc::clone(&self.shared.world);
        let rules = Rules {
            compares_sessions: self.shared.broken != Some(Broken::Sessions),
            takes_addresses: self.shared.broken != Some(Broken::Addresses),
        };
        let has = (world, Arc::clone(&self.shared.segment));
        let guard = FakeGuard::spawn(self.name.as_str(), has, clock.driven_by(runs), rules);
        self.machine = Some(Machine { clock, guard, run });
        self.set_power(Power::On);
        self.start_daemon().await;
    }

    /// Everything of it is gone at once.
    pub fn power_off(&mut self) {
        let Some(machine) = self.machine.take() else { return };
        machine.run.send_replace(Run::Dead);
        self.end_daemon();
        self.set_power(Power::Off);
        self.shared.world.set_frozen(self.name.as_str(), false);
        self.shared.world.kill_all(self.name.as_str());
        self.shared.world.mirrors.end_serving(self.name.as_str());
        self.shared.segment.drop_host(self.name.as_str());
    }

    /// Kills the daemon; guard and VMs go on.
    pub fn kill_daemon(&mut self) {
        self.shared.judge.note(&format!("the daemon of {} was killed", self.name));
        self.end_daemon();
    }

    fn end_daemon(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            self.shared.world.cut_ways(self.name.as_str());
            daemon.run.send_replace(Run::Dead);
            daemon.cancel.cancel();
        }
    }

    /// Its daemon alone executes nothing, or goes on; guard, VMs and what the kernel answers for go on.
    pub fn set_daemon_hung(&self, hung: bool) {
        let Some(daemon) = &self.daemon else { return };
        let host = self.shared.net.power(self.name.as_str()).run();
        daemon.run.send_replace(if hung { Run::Paused } else { host });
    }

    /// Stops everything in it, or lets it go on.
    pub fn set_paused(&mut self, paused: bool) {
        let Some(machine) = &self.machine else { return };
        let (power, run) =
            if paused { (Power::Paused, Run::Paused) } else { (Power::On, Run::Running) };
        if self.shared.net.power(self.name.as_str()) == power {
            return;
        }
        self.shared.world.set_frozen(self.name.as_str(), paused);
        if paused {
            machine.run.send_replace(run);
            self.daemon.iter().for_each(|daemon| _ = daemon.run.send_replace(run));
            self.set_power(power);
        } else {
            self.set_power(power);
            machine.run.send_replace(run);
            self.daemon.iter().for_each(|daemon| _ = daemon.run.send_replace(run));
        }
    }

    /// How long after now its watchdog resets it, if nothing in it executes any more.
    #[must_use]
    pub fn resets_in(&self) -> Duration {
        self.machine.as_ref().map_or(Duration::ZERO, |machine| machine.guard.resets_in())
    }

    /// Whether it only votes.
    #[must_use]
    pub fn is_witness(&self) -> bool {
        self.witness
    }

    /// Whether it is on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.machine.is_some()
    }

    /// How often it was switched on: tells one boot from another.
    #[must_use]
    pub fn boots(&self) -> u64 {
        self.boots
    }

    /// Starts the daemon, as its supervisor does.
    pub async fn start_daemon(&mut self) {
        let Some(machine) = &self.machine else { return };
        if self.daemon.is_some() {
            return;
        }
        let (run, runs) = watch::channel(self.shared.net.power(self.name.as_str()).run());
        let clock = machine.clock.driven_by(runs);
        let guard = self.guard(machine, &clock);
        let cancel = CancellationToken::new();
        let path = StorePath {
            host: self.name.to_string(),
            net: Arc::clone(&self.shared.net),
            clock: clock.clone(),
        };
        let channel = self.shared.etcd.channel(Arc::new(path));
        let Ok(store) = EtcdStore::over(channel).await else { return };
        let live = LiveCopy::<Snapshot>::spawn(
            store.clone(),
            LiveConfig {
                prefix: keys::ROOT.into(),
                observed: vec![keys::LEASES.into(), keys::MANAGER.into()],
            },
            clock.clone(),
            cancel.clone(),
        );
        let (told, heard) = heartbeat::channels();
        let (session_out, session) = watch::channel(None);
        let (member_out, member) = watch::channel(StoreMember::default());
        let timers = agent::timers::follow(live.state());
        let vms = self.vms(&clock, &guard);
        self.heartbeat(&live, timers.clone(), told, &clock, &cancel);
        let contact = Contact::new(clock.clone());
        let promises = Promises::new(clock.clone(), contact.clone());
        let answers =
            Answerer { promises: promises.clone(), live: live.state(), clock: clock.clone() };
        self.shared.promisers.begin(self.name.as_str(), answers);
        tokio::spawn(lease::run(
            lease::LeaseConfig {
                me: self.name.clone(),
                store: store.clone(),
                guard: Arc::clone(&guard),
                remains: Arc::new(HostRemains { guard, vms: Arc::clone(&vms) }),
                timers,
                session_file: Some(self.dir.join("session")),
                live: live.state(),
                promisers: Arc::new(SimPromisers {
                    host: self.name.to_string(),
                    net: Arc::clone(&self.shared.net),
                    clock: clock.clone(),
                    answering: Arc::clone(&self.shared.promisers),
                    credulous: self.shared.broken == Some(Broken::Silence),
                }),
                contact,
                clock: clock.clone(),
                wall_ms: self.shared.wall(),
            },
            session_out,
            cancel.clone(),
        ));
        let mut parts = self.parts(&store, &live, &heard, &session, vms, &clock);
        parts.store_member = member;
        self.agent(parts, &cancel);
        tokio::spawn(manager::run(
            self.manager(store, &live, heard.suspected, session, promises, &clock),
            cancel.clone(),
        ));
        self.daemon = Some(Daemon { run, cancel, _member: member_out });
    }

    fn guard(&self, machine: &Machine, clock: &Clock) -> Arc<dyn Guard> {
        match self.witness {
            true => Arc::new(NothingToGuard::default()),
            false => machine.guard.handle(clock.clone()),
        }
    }

    fn agent(&self, parts: AgentParts, cancel: &CancellationToken) {
        let parts = Arc::new(parts);
        if self.witness {
            tokio::spawn(agent::status::run(parts, cancel.clone()));
        } else {
            tokio::spawn(agent::run(parts, cancel.clone()));
        }
    }

    fn vms(&self, clock: &Clock, guard: &Arc<dyn haven_host::guard::Guard>) -> Arc<dyn VmDriver> {
        let net = Arc::clone(&self.shared.net);
        Arc::new(FakeVmDriver {
            host: self.name.to_string(),
            world: Arc::clone(&self.shared.world),
            guard: Arc::clone(guard),
            start_takes: START,
            clock: clock.clone(),
            fails: Arc::new(move || net.start_fails()),
            copies: match self.shared.broken {
                Some(broken @ (Broken::Switchover | Broken::Disks)) => {
                    Arc::new(Careless { net: Arc::clone(&self.shared.net), broken })
                }
                _ => Arc::clone(&self.shared.net) as _,
            },
        })
    }

    fn heartbeat(
        &self,
        live: &LiveCopy<Snapshot>,
        timers: watch::Receiver<Timers>,
        told: heartbeat::Told,
        clock: &Clock,
        cancel: &CancellationToken,
    ) {
        let shared = &self.shared;
        let wire =
            SimWire::new(self.name.as_str(), self.address, &shared.net, clock, &shared.wires);
        let (hosts_out, hosts) = watch::channel(std::collections::BTreeMap::new());
        let mut state = live.state();
        tokio::spawn(async move {
            loop {
                let now = Arc::clone(&state.borrow_and_update());
                let addresses = now.hosts.iter().map(|(n, h)| (n.clone(), h.spec.address));
                hosts_out.send_replace(addresses.collect());
                if state.changed().await.is_err() {
                    return;
                }
            }
        });
        let config = HeartbeatConfig {
            me: self.name.clone(),
            key: [7; 32],
            hosts,
            timers,
            start: (shared.incarnation() << 32) | 1,
            clock: clock.clone(),
        };
        tokio::spawn(heartbeat::run(config, Arc::new(wire), told, cancel.clone()));
    }

    fn parts(
        &self,
        store: &EtcdStore,
        live: &LiveCopy<Snapshot>,
        heard: &heartbeat::Heard,
        session: &watch::Receiver<Option<lease::Session>>,
        vms: Arc<dyn VmDriver>,
        clock: &Clock,
    ) -> AgentParts {
        let shared = Arc::clone(&self.shared);
        let (net, talks) = (&shared.net, Arc::clone(&shared.net));
        let address = FakeAddress {
            host: self.name.to_string(),
            segment: Arc::clone(&shared.segment),
            reaches: Arc::new(move |a, b| talks.talk(a, b)),
            clock: clock.clone(),
        };
        AgentParts {
            me: self.name.clone(),
            store: store.clone(),
            live: live.state(),
            heard: heard.clone(),
            session: session.clone(),
            vms,
            network: Arc::new(Failing { driver: FakeNetwork, net: Arc::clone(net) }),
            uplinks: Arc::new(SimUplinks { host: self.name.to_string(), net: Arc::clone(net) }),
            cut_off: agent::CutOff::default(),
            address: Arc::new(Failing { driver: address, net: Arc::clone(net) }),
            balance: Arc::new(Failing { driver: FakeBalance::default(), net: Arc::clone(net) }),
            secrets: Some(secrets()),
            storage: Arc::new(SimStorage {
                host: self.name.to_string(),
                net: Arc::clone(net),
                world: Arc::clone(&self.shared.world),
            }),
            replicas: Arc::new(FakeReplicas {
                host: self.name.to_string(),
                world: Arc::clone(&shared.world),
                clock: clock.clone(),
                fails: {
                    let net = Arc::clone(net);
                    Arc::new(move || net.driver_fails())
                },
            }),
            kept: Arc::new(FakeKeptCopies {
                host: self.name.to_string(),
                world: Arc::clone(&shared.world),
                clock: clock.clone(),
            }),
            pieces: Arc::new(FakePieces { world: Arc::clone(&shared.world), clock: clock.clone() }),
            tunnel: Arc::new(agent::tunnel::NoTunnel),
            machine: Arc::new(SimMachine {
                host: self.name.to_string(),
                switch: shared.switch.get().cloned(),
                net: Arc::clone(net),
            }),
            meter: Arc::new(SimMeter { now_ms: shared.wall() }),
            prober: Arc::new(SimProber {
                host: self.name.to_string(),
                judge: Arc::clone(&shared.judge),
                clock: clock.clone(),
            }),
            facts: watch::channel(Some(HostFacts {
                cpus: 8,
                memory_bytes: MEMORY,
                boot_id: self.boots.to_string(),
                ..HostFacts::default()
            }))
            .1,
            clock: clock.clone(),
            wall_ms: shared.wall(),
            problems: Arc::default(),
            store_member: watch::channel(StoreMember::default()).1,
        }
    }

    /// Since when each renewal record has stood unchanged; a broken manager takes it for longer.
    fn observed(&self, live: &LiveCopy<Snapshot>, clock: &Clock) -> ObservedSince {
        let (copy, clock, state) = (live.clone(), clock.clone(), live.state());
        let Some(broken) = self.shared.broken else {
            return Arc::new(move |key| copy.observed(key));
        };
        Arc::new(move |key| {
            let (revision, at) = copy.observed(key)?;
            let age = clock.now().0.saturating_sub(at.0);
            let snapshot = state.borrow();
            let lease = key.strip_prefix(keys::LEASES).and_then(|host| snapshot.leases.get(host));
            let times = match (broken, lease) {
                (Broken::Deadlines, _) => 3.0,
                (Broken::Timers, Some(lease)) => {
                    lease.ttl_ms as f64 / snapshot.cluster_spec().timers.lease.0 as f64
                }
                _ => 1.0,
            };
            let longer = (age as f64 * times) as u64;
            Some((revision, Mono(clock.now().0.saturating_sub(longer))))
        })
    }

    fn manager(
        &self,
        store: EtcdStore,
        live: &LiveCopy<Snapshot>,
        suspected: watch::Receiver<BTreeSet<Name>>,
        mut session: watch::Receiver<Option<lease::Session>>,
        promises: Promises,
        clock: &Clock,
    ) -> ManagerConfig {
        let (number_out, number) = watch::channel(None);
        tokio::spawn(async move {
            loop {
                number_out.send_replace(session.borrow_and_update().map(|s| s.number));
                if session.changed().await.is_err() {
                    return;
                }
            }
        });
        let observer = Observer::new(self.observed(live, clock), clock.clone());
        let switch: Weak<dyn PowerSwitch> =
            self.shared.switch.get().cloned().unwrap_or_else(|| {
                let none: Weak<NoSwitch> = Weak::new();
                none
            });
        ManagerConfig {
            me: self.name.clone(),
            store,
            live: live.state(),
            stale: live.stale(),
            observer,
            promises: match self.shared.broken {
                Some(Broken::Promises) => forgetful(clock, promises, live.state()),
                _ => promises,
            },
            suspected,
            session: number,
            power: Arc::new(SimPower {
                net: Arc::clone(&self.shared.net),
                clock: clock.clone(),
                switch,
                reads_back: self.shared.broken != Some(Broken::Power),
            }),
            secrets: Some(secrets()),
            clock: clock.clone(),
            wall_ms: self.shared.wall(),
        }
    }
}

/// A manager's promises that know of none given, and of no trouble with the store. `given` are those of its daemon.
fn forgetful(clock: &Clock, given: Promises, live: watch::Receiver<Arc<Snapshot>>) -> Promises {
    let contact = Contact::new(clock.clone());
    let promises = Promises::new(clock.clone(), contact.clone());
    let clock = clock.clone();
    tokio::spawn(async move {
        loop {
            contact.acknowledged(Duration::from_secs(2));
            given.note(&live.borrow());
            clock.sleep(Duration::from_millis(500)).await;
        }
    });
    promises
}

/// Copies that leave out one thing.
struct Careless {
    net: Arc<Net>,
    broken: Broken,
}

impl Copies for Careless {
    fn reach(&self, from: &str, to: &str) -> bool {
        self.net.reach(from, to)
    }
    fn takes(&self) -> Duration {
        self.net.takes()
    }
    fn follows(&self) -> Duration {
        self.net.follows()
    }
    fn breaks(&self) -> Option<bool> {
        self.net.breaks()
    }
    fn torn_answers(&self) -> bool {
        self.net.torn_answers()
    }
    fn waits(&self) -> bool {
        self.broken != Broken::Switchover
    }
    fn exchanges(&self) -> bool {
        self.broken != Broken::Disks
    }
}

/// Stands for a switch before there is one.
struct NoSwitch;

impl PowerSwitch for NoSwitch {
    fn off(&self, _host: &str) -> bool {
        false
    }
    fn restart(&self, _host: &str) {}
}

/// How long a host boots.
#[must_use]
pub fn booting() -> Duration {
    BOOT
}

/// The cluster's key. All simulated clusters have the same one: making one takes time, and nothing is kept secret here.
fn secrets() -> ClusterKey {
    static KEY: OnceLock<Authority> = OnceLock::new();
    let authority =
        KEY.get_or_init(|| Authority::create("simulated").expect("an authority can be made"));
    ClusterKey::derive(authority).expect("a key can be derived")
}
