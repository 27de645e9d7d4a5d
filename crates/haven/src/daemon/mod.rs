//! The daemon: puts the parts of a host together and runs them.
//!
//! ```text
//!   etcd member ─ store ─ live copy ─┬─ lease ──► guard
//!   heartbeats ──────────────────────┼─ agent
//!                                    ├─ manager
//!                                    └─ API (unix socket, TLS)
//! ```

mod certificate;
#[cfg(test)]
mod certificate_test;
pub mod local;
pub mod members;
pub mod pieces;
mod power;
pub mod setup;
#[cfg(test)]
mod setup_test;
mod start;
#[cfg(test)]
mod start_test;
mod tunnel;

use crate::paths::Paths;
use haven_control::{
    api::{ApiState, InviteFacts, serve},
    manager::{self, ManagerConfig, observe::Observer, promises::Promises},
};
use haven_host::{
    agent::{self, AgentParts, HostFacts, Problems, StoreMember, lease},
    balance::haproxy::HaproxyDriver,
    guard::{Guard, client::GuardClient, nothing::NothingToGuard},
    health::NetProber,
    heartbeat::{self, HeartbeatConfig, UdpWire},
    machine::command::Commands,
    monitor::proc::ProcMeter,
    network::{address::LinuxAddress, linux::LinuxNetwork, uplink::LinuxUplinks},
    storage::{
        backup::target::Targets,
        files::FileStorage,
        gluster::GlusterMounts,
        images::ImageStore,
        mirrored::{daemon::StorageDaemons, kept::KeptFiles},
        nfs::volumes::NfsPools,
        pools::Pools,
        rbd::volumes::RbdPools,
    },
    vm::{
        driver::VmDriver,
        probe,
        qemu::{QemuConfig, QemuDriver},
        scope,
    },
};
use haven_model::{Name, Snapshot, Timers, keys};
use haven_store::{
    clock::Clock,
    contact::Contact,
    live::{LiveConfig, LiveCopy},
    pki::{self, Current, PkiDir},
    raw::{EtcdStore, StoreConfig},
    seal::ClusterKey,
    server,
};
use power::Powers;
use setup::HostFile;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;
use tunnel::Tunnels;

/// Port of the API.
pub const API_PORT: u16 = 7443;
/// How long the end of the daemon waits for its parts. With `SHUTDOWN` in `main.rs` it stays under 2 s.
const END: Duration = Duration::from_millis(1_200);

fn wall_ms() -> i64 {
    haven_control::api::auth::now_ms()
}

/// Changes at every boot. A lab host shares its kernel with others; it is told which boot of its own it is.
fn boot_id() -> String {
    let kernel = || std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    std::env::var("HAVEN_BOOT_ID").unwrap_or_else(|_| kernel()).trim().into()
}

fn facts(state: &std::path::Path, witness: bool) -> HostFacts {
    // A witness runs no guest, and needs nothing for it.
    let found = if witness { probe::HostCheck::default() } else { probe::check(state) };
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib: u64 = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    // A lab host shares its machine; it is told how much of it is its own.
    let memory_bytes = std::env::var("HAVEN_MEMORY_MIB")
        .ok()
        .and_then(|text| text.parse::<u64>().ok())
        .map_or(kib << 10, |mib| mib << 20);
    HostFacts {
        cpus: std::thread::available_parallelism()
            .map_or(1, |n| u32::try_from(n.get()).unwrap_or(1)),
        memory_bytes,
        kvm: found.kvm,
        qemu: found.qemu,
        boot_id: boot_id(),
        version: env!("CARGO_PKG_VERSION").into(),
        problems: found.problems,
    }
}

/// Waits until this host belongs to a cluster, then runs until a signal ends it.
pub async fn run() -> anyhow::Result<()> {
    let paths = Paths::from_env();
    std::fs::create_dir_all(&paths.run)?;
    let mut told = false;
    let host = loop {
        if let Some(host) = HostFile::load(&paths)? {
            break host;
        }
        if !told {
            tracing::info!("this host belongs to no cluster yet: run `haven init` or `haven join`");
            told = true;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    };
    let began = std::time::Instant::now();
    let cancel = CancellationToken::new();
    let stop = cancel.clone();
    tokio::spawn(async move {
        use tokio::signal::unix::{SignalKind, signal};
        if let (Ok(mut term), Ok(mut int)) =
            (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
        {
            tokio::select! {
                biased;
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        }
        stop.cancel();
    });
    Daemon { paths, host, cancel, clock: Clock::real(), began }.run().await
}

struct Daemon {
    paths: Paths,
    host: HostFile,
    cancel: CancellationToken,
    clock: Clock,
    began: std::time::Instant,
}

impl Daemon {
    async fn run(self) -> anyhow::Result<()> {
        let pki = PkiDir(self.paths.state.join("pki"));
        let identity = certificate::at_start(&pki, &self.host)?;
        let (current, in_use) = (Current::new(&identity)?, identity.certificate.clone());
        let own = members::Own::start(&self.paths, &self.host, pki.clone(), self.cancel.clone());
        let config = StoreConfig { endpoints: self.host.endpoints(), tls: Some(identity) };
        let store = EtcdStore::connect(config).await?;
        let (live, observer) = self.observe(&store);
        let state = live.state();
        if !self.reached(&store, &state, own.last_end()).await? {
            return Ok(());
        }
        let (told, heard) = heartbeat::channels();
        let (session_out, session) = watch::channel(None);
        let (member_out, store_member) = watch::channel(StoreMember::default());
        let problems = Arc::new(Problems::default());
        let guard = self.guard();
        let vms = self.vms(&guard);
        let mut tasks = tokio::task::JoinSet::new();
        // First of all: the VMs of this host live by it.
        let timers = agent::timers::follow(state.clone());
        let contact = Contact::new(self.clock.clone());
        let promises = Promises::new(self.clock.clone(), contact.clone());
        let peers = local::Peers::new(&current, self.host.name.clone(), state.clone())?;
        tasks.spawn(lease::run(
            self.lease(&store, timers.clone(), (&guard, &vms), &state, (peers, contact)),
            session_out,
            self.cancel.clone(),
        ));
        tokio::spawn(start::tell_first(session.clone(), self.began));
        tasks.spawn(self.heartbeat(state.clone(), timers, told, &problems).await?);
        let parts = self
            .parts(
                store.clone(),
                state.clone(),
                heard.clone(),
                session.clone(),
                store_member,
                &current,
                (Arc::clone(&guard), Arc::clone(&vms)),
                Arc::clone(&problems),
            )
            .await?;
        if self.host.witness {
            tasks.spawn(agent::status::run(Arc::clone(&parts), self.cancel.clone()));
        } else {
            tasks.spawn(agent::run(Arc::clone(&parts), self.cancel.clone()));
        }
        tasks.spawn(manager::run(
            self.manager(&store, &live, (&observer, &promises), &heard.suspected, &session),
            self.cancel.clone(),
        ));
        tasks.spawn(members::keep(
            store.clone(),
            state.clone(),
            own,
            member_out,
            Arc::clone(&problems),
            self.cancel.clone(),
        ));
        let api =
            self.api(&store, &state, (observer, promises), heard.suspected, &vms, &current)?;
        self.serve(api, &current, &problems, &mut tasks)?;
        let renewal =
            certificate::Renewal { pki, host: self.host.clone(), current, in_use, store, problems };
        tasks.spawn(renewal.keep(self.clock.clone(), self.cancel.clone()));
        self.cancel.cancelled().await;
        tracing::info!("the daemon ends; the VMs run on under the guard");
        tokio::time::timeout(END, async { while tasks.join_next().await.is_some() {} }).await.ok();
        Ok(())
    }

    /// The live copy, and since when each renewal record stands unchanged in it.
    fn observe(&self, store: &EtcdStore) -> (LiveCopy<Snapshot>, Observer) {
        let config = LiveConfig {
            prefix: keys::ROOT.into(),
            observed: vec![keys::LEASES.into(), keys::MANAGER.into()],
        };
        let live: LiveCopy<Snapshot> =
            LiveCopy::spawn(store.clone(), config, self.clock.clone(), self.cancel.clone());
        let observed = live.clone();
        let since = Arc::new(move |key: &str| observed.observed(key));
        (live, Observer::new(since, self.clock.clone()))
    }

    /// Waits until the store answers and the live copy shows it; false if the daemon is to end before.
    async fn reached(
        &self,
        store: &EtcdStore,
        state: &watch::Receiver<Arc<Snapshot>>,
        member: members::LastEnd,
    ) -> anyhow::Result<bool> {
        let (waiting_out, waiting) = watch::channel(None);
        let reached = async {
            members::register(store, &self.host, &member, &waiting_out).await?;
            // The timers that the lease lives by stand in the live copy; with others a VM could run twice.
            start::loaded(state.clone()).await
        };
        let socket = self.paths.run.join("api.sock");
        let telling = serve::serve_waiting(&socket, &self.host.name, waiting, self.cancel.clone());
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Ok(false),
            done = reached => done.map(|()| true),
            Err(error) = telling => {
                Err(anyhow::Error::from(error).context(format!("{} cannot be made", socket.display())))
            }
        }
    }

    /// The API, to root of this host and to everybody else.
    fn serve(
        &self,
        api: ApiState,
        current: &Current,
        problems: &Arc<Problems>,
        tasks: &mut tokio::task::JoinSet<()>,
    ) -> anyhow::Result<()> {
        let (socket, cancel) = (self.paths.run.join("api.sock"), self.cancel.clone());
        let unix = api.clone();
        tasks.spawn(async move {
            if let Err(error) = serve::serve_unix(&socket, unix, cancel).await {
                tracing::error!(%error, "the API's socket cannot be served");
            }
        });
        let tls = Arc::new(current.server_config()?);
        let (address, cancel) =
            (SocketAddr::from((self.host.address, API_PORT)), self.cancel.clone());
        let problems = Arc::clone(problems);
        tasks.spawn(async move {
            tokio::select! {
                biased;
                () = cancel.cancelled() => {}
                listener = start::opened(start::Port::api(address), &problems, TcpListener::bind) => {
                    let _ = serve::serve_listener(listener, tls, api, cancel.clone()).await;
                }
            }
        });
        Ok(())
    }

    /// The key under which secrets are sealed. Without it this host runs VMs and serves what has no secret.
    fn secrets(&self) -> Option<ClusterKey> {
        let key = ClusterKey::of_host(&PkiDir(self.paths.state.join("pki")));
        key.inspect_err(|error| tracing::error!("{}", agent::chain(error))).ok()
    }

    fn guard(&self) -> Arc<dyn Guard> {
        if self.host.witness {
            return Arc::new(NothingToGuard::default());
        }
        Arc::new(GuardClient::new(self.paths.run.join("guard.sock")))
    }

    fn vms(&self, guard: &Arc<dyn Guard>) -> Arc<dyn VmDriver> {
        let config = QemuConfig {
            program: "qemu-system-x86_64".into(),
            run_dir: self.paths.run.join("vms"),
            log_dir: self.paths.log.join("vms"),
            scopes: scope::wanted(),
        };
        Arc::new(QemuDriver::new(config, Arc::clone(guard)))
    }

    #[expect(clippy::too_many_arguments, reason = "it gathers what the daemon made, once")]
    async fn parts(
        &self,
        store: EtcdStore,
        live: watch::Receiver<Arc<Snapshot>>,
        heard: heartbeat::Heard,
        session: watch::Receiver<Option<lease::Session>>,
        store_member: watch::Receiver<StoreMember>,
        current: &Current,
        (guard, vms): (Arc<dyn Guard>, Arc<dyn VmDriver>),
        problems: Arc<Problems>,
    ) -> anyhow::Result<Arc<AgentParts>> {
        let address = LinuxAddress::new(self.paths.run.join("addresses.json"))?.guarded_by(guard);
        let images = ImageStore::new(self.paths.state.join("images"));
        let peers = local::Peers::new(current, self.host.name.clone(), live.clone())?;
        let (pieces_live, targets_live) = (live.clone(), live.clone());
        Ok(Arc::new(AgentParts {
            me: self.host.name.clone(),
            store,
            live,
            heard,
            session,
            vms,
            network: Arc::new(LinuxNetwork::new(self.host.address)?),
            uplinks: Arc::new(LinuxUplinks::new()?),
            cut_off: Default::default(),
            address: Arc::new(address),
            balance: Arc::new(HaproxyDriver::new(self.paths.run.join("haproxy"))),
            secrets: self.secrets(),
            storage: Arc::new(Pools {
                rbd: self.rbd_pools(&targets_live),
                nfs: NfsPools,
                gluster: self.gluster_mounts(),
                files: FileStorage::new(
                    images,
                    self.paths.run.join("vms"),
                    Arc::new(peers.clone()),
                    Targets::new(targets_live, self.secrets()),
                ),
            }),
            replicas: Arc::new(StorageDaemons::new(
                "qemu-storage-daemon".into(),
                self.paths.run.join("replicas"),
            )),
            kept: Arc::new(KeptFiles),
            pieces: Arc::new(pieces::ReplicaPieces {
                me: self.host.name.clone(),
                live: pieces_live,
                peers: peers.clone(),
            }),
            tunnel: Arc::new(Tunnels::new(self.paths.run.join("vms"), peers)),
            machine: Arc::new(Commands {
                own: "/etc/haven".into(),
                run: self.paths.run.join("work"),
            }),
            meter: Arc::new(ProcMeter::new()),
            prober: Arc::new(NetProber),
            facts: {
                let (state, witness) = (self.paths.state.clone(), self.host.witness);
                start::in_background(move || facts(&state, witness))
            },
            clock: self.clock.clone(),
            wall_ms: Arc::new(wall_ms),
            problems,
            store_member,
        }))
    }

    async fn heartbeat(
        &self,
        mut live: watch::Receiver<Arc<Snapshot>>,
        timers: watch::Receiver<Timers>,
        told: heartbeat::Told,
        problems: &Arc<Problems>,
    ) -> anyhow::Result<impl Future<Output = ()> + Send + use<>> {
        let address_of = |snapshot: &Snapshot| -> BTreeMap<Name, Ipv4Addr> {
            snapshot.hosts.iter().map(|(name, host)| (name.clone(), host.spec.address)).collect()
        };
        let (hosts_out, hosts) = watch::channel(address_of(&live.borrow()));
        tokio::spawn(async move {
            while live.changed().await.is_ok() {
                let now = address_of(&live.borrow_and_update());
                hosts_out.send_if_modified(|shown| std::mem::replace(shown, now.clone()) != now);
            }
        });
        let config = HeartbeatConfig {
            me: self.host.name.clone(),
            key: self.host.heartbeat_key()?,
            hosts,
            timers,
            start: start::number(self.paths.state.clone(), wall_ms()).await,
            clock: self.clock.clone(),
        };
        let address = SocketAddr::from((self.host.address, heartbeat::PORT));
        let (problems, cancel) = (Arc::clone(problems), self.cancel.clone());
        Ok(async move {
            let port = start::Port::heartbeat(address);
            let wire = tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                wire = start::opened(port, &problems, UdpWire::bind) => wire,
            };
            heartbeat::run(config, Arc::new(wire), told, cancel).await;
        })
    }

    fn lease(
        &self,
        store: &EtcdStore,
        timers: watch::Receiver<Timers>,
        (guard, vms): (&Arc<dyn Guard>, &Arc<dyn VmDriver>),
        live: &watch::Receiver<Arc<Snapshot>>,
        (peers, contact): (local::Peers, Contact),
    ) -> lease::LeaseConfig {
        lease::LeaseConfig {
            me: self.host.name.clone(),
            store: store.clone(),
            guard: Arc::clone(guard),
            remains: Arc::new(agent::remains::HostRemains {
                guard: Arc::clone(guard),
                vms: Arc::clone(vms),
            }),
            timers,
            session_file: Some(self.paths.run.join("session")),
            live: live.clone(),
            promisers: Arc::new(peers),
            contact,
            clock: self.clock.clone(),
            wall_ms: Arc::new(wall_ms),
        }
    }

    fn manager(
        &self,
        store: &EtcdStore,
        live: &LiveCopy<Snapshot>,
        (observer, promises): (&Observer, &Promises),
        suspected: &watch::Receiver<BTreeSet<Name>>,
        session: &watch::Receiver<Option<lease::Session>>,
    ) -> ManagerConfig {
        let (number_out, number) = watch::channel(None);
        let mut session = session.clone();
        tokio::spawn(async move {
            loop {
                number_out.send_replace(session.borrow_and_update().map(|s| s.number));
                if session.changed().await.is_err() {
                    return;
                }
            }
        });
        ManagerConfig {
            me: self.host.name.clone(),
            store: store.clone(),
            live: live.state(),
            stale: live.stale(),
            observer: observer.clone(),
            promises: promises.clone(),
            suspected: suspected.clone(),
            session: number,
            power: Arc::new(Powers::new(self.secrets())),
            secrets: self.secrets(),
            clock: self.clock.clone(),
            wall_ms: Arc::new(wall_ms),
        }
    }

    /// The Gluster volumes that this host mounts.
    fn gluster_mounts(&self) -> GlusterMounts {
        GlusterMounts::new(self.paths.run.join("gluster"), self.paths.log.clone())
    }

    /// The pools of Ceph clusters, as this host reaches them.
    fn rbd_pools(&self, live: &watch::Receiver<Arc<Snapshot>>) -> RbdPools {
        RbdPools::new(live.clone(), self.secrets(), self.paths.run.join("rbd"))
    }

    fn api(
        &self,
        store: &EtcdStore,
        live: &watch::Receiver<Arc<Snapshot>>,
        (observer, promises): (Observer, Promises),
        suspected: watch::Receiver<BTreeSet<Name>>,
        vms: &Arc<dyn VmDriver>,
        current: &Current,
    ) -> anyhow::Result<ApiState> {
        let (seen_live, given) = (live.clone(), promises.clone());
        Ok(ApiState {
            me: self.host.name.clone(),
            store: store.clone(),
            live: live.clone(),
            seen: Arc::new(move || {
                manager::observations(
                    &seen_live.borrow(),
                    &observer,
                    &given,
                    &suspected.borrow(),
                    wall_ms(),
                )
            }),
            promises,
            local: Arc::new(local::Local::new(
                &self.paths,
                &self.host,
                current,
                store.clone(),
                Arc::clone(vms),
                live.clone(),
                (
                    Targets::new(live.clone(), self.secrets()),
                    self.rbd_pools(live),
                    self.gluster_mounts(),
                ),
            )?),
            power: Arc::new(Powers::new(self.secrets())),
            secrets: self.secrets(),
            invite: Arc::new(InviteFacts { fingerprint: pki::fingerprint(current.ca())? }),
        })
    }
}

/// Where the members of these hosts are reached, this host's own first.
pub fn endpoints(own: Ipv4Addr, others: &[Ipv4Addr]) -> Vec<String> {
    let mut all = vec![own];
    all.extend(others.iter().filter(|other| **other != own));
    all.into_iter().map(server::client_url).collect()
}
