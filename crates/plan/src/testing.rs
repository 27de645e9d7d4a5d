//! Worlds for tests: hosts, VMs and services in a line each. Also used by the benchmark and the simulator.

use haven_model::{
    Bytes, HostSpec, HostStatus, Lease, LostSession, Meta, Name, NetworkSpec, ObjectRef,
    Observations, Placement, ProofKind, ServiceSpec, Snapshot, Versioned, VmPhase, VmSpec,
    VmStatus,
    host::SPEAKS,
    network::NetworkKind,
    object::Stored,
    plan::LeaseAge,
    service::{SpreadSpec, VmTemplate},
};
use std::{collections::BTreeMap, sync::Arc};

/// A name.
///
/// # Panics
/// When it is not one.
#[must_use]
pub fn name(text: &str) -> Name {
    Name::new(text).expect("a test gives a good name")
}

/// A record at a revision.
pub fn at<T>(revision: i64, value: T) -> Versioned<T> {
    Versioned { revision, value: Arc::new(value) }
}

/// A spec with a fresh meta.
pub fn stored<T>(of: &str, spec: T) -> Stored<T> {
    Stored { meta: Meta::new(name(of), format!("uid-{of}"), 0), spec }
}

/// A renewal record of session 1 under the default timers.
#[must_use]
pub fn lease(closed: bool) -> Lease {
    Lease { session: 1, count: 9, closed, ttl_ms: haven_model::Timers::default().lease.0 }
}

/// A VM of so much memory.
#[must_use]
pub fn vm_spec(memory: Bytes) -> VmSpec {
    serde_json::from_value(serde_json::json!({ "memory": memory })).expect("a VM needs only memory")
}

/// A world being built.
#[derive(Clone, Default)]
pub struct World {
    /// What the store has.
    pub snapshot: Snapshot,
    /// What the observer saw.
    pub seen: Observations,
}

impl World {
    /// `hosts` hosts named `host1`… with 8 CPUs and so much memory, all online.
    #[must_use]
    pub fn new(hosts: usize, memory: Bytes) -> Self {
        let mut world = Self::default();
        world.snapshot.revision = 1000;
        world.seen.now_ms = 1_000_000;
        for i in 1..=hosts {
            world.host(&format!("host{i}"), memory);
        }
        world
    }

    /// Adds an online host.
    pub fn host(&mut self, host: &str, memory: Bytes) {
        let address = std::net::Ipv4Addr::from(0x0a58_0000 + self.snapshot.hosts.len() as u32 + 1);
        let spec = HostSpec {
            address,
            power: None,
            cordoned: false,
            witness: false,
            reserved_memory: Bytes(0),
        };
        self.snapshot.hosts.insert(name(host), at(1, stored(host, spec)));
        self.snapshot.leases.insert(name(host), at(900, lease(false)));
        let status = HostStatus { session: 1, cpus: 8, memory, ..HostStatus::default() };
        self.snapshot.host_status.insert(name(host), at(2, status));
        self.seen
            .leases
            .insert(name(host), LeaseAge { revision: 900, unchanged_ms: 100, confirmed: false });
    }

    /// All hosts understand all that this version does.
    pub fn current(&mut self) {
        for status in self.snapshot.host_status.values_mut() {
            let now = HostStatus { speaks: SPEAKS, ..(*status.value).clone() };
            *status = at(status.revision, now);
        }
    }

    /// Adds a network 10.77.0.0/24.
    pub fn network(&mut self, network: &str) {
        let subnet = "10.77.0.0/24".parse().expect("a good subnet");
        let spec = NetworkSpec {
            driver: NetworkKind::Overlay,
            subnet,
            nat: true,
            vni: None,
            bridge: None,
            nameservers: Vec::new(),
            mtu: 1450,
        };
        self.snapshot.networks.insert(name(network), at(3, stored(network, spec)));
    }

    /// Adds a VM that is not placed.
    pub fn vm(&mut self, vm: &str, spec: VmSpec) {
        self.snapshot.vms.insert(name(vm), at(4, stored(vm, spec)));
    }

    /// Places a VM and lets it run.
    pub fn run(&mut self, vm: &str, host: &str) {
        let slot = self.snapshot.placements.len() as u32;
        let placement = Placement::new(name(host), 1, slot, Vec::new());
        self.snapshot.placements.insert(name(vm), at(5, placement));
        self.report(vm, VmPhase::Running, Some(true));
    }

    /// Its host reports a VM.
    pub fn report(&mut self, vm: &str, phase: VmPhase, ready: Option<bool>) {
        let placement = &self.snapshot.placements[vm];
        let before = self.snapshot.told_of(&name(vm)).filter(|_| ready == Some(true));
        let since = before.and_then(|status| status.ready_since_ms).unwrap_or(self.seen.now_ms);
        let status = VmStatus {
            host: placement.host.clone(),
            session: 1,
            epoch: placement.epoch,
            generation: 1,
            phase,
            since_ms: 0,
            started_ms: Some(self.seen.now_ms),
            ready,
            ready_ms: ready.map(|_| self.seen.now_ms),
            ready_since_ms: ready.filter(|ready| *ready).map(|_| since),
            unproven: false,
            restarts: 0,
            failures: 0,
            hung: 0,
            heard: false,
            idle: false,
            started_with: BTreeMap::new(),
            disks_change: false,
            ports: false,
            resets: 0,
            message: String::new(),
        };
        self.snapshot.vm_status.insert(name(vm), at(6, status));
    }

    /// Adds a service of VMs of 128 MiB.
    pub fn service(&mut self, service: &str, replicas: u32) {
        let spec = ServiceSpec {
            replicas,
            template: VmTemplate { labels: BTreeMap::new(), spec: vm_spec(Bytes::mib(128)) },
            spread: SpreadSpec::default(),
            check: None,
            update: Box::default(),
            frontend: None,
            restarts: 0,
            promoted: None,
        };
        self.snapshot.services.insert(name(service), at(7, stored(service, spec)));
    }

    /// A host has not renewed for so long.
    pub fn silent(&mut self, host: &str, unchanged_ms: u64, confirmed: bool) {
        let revision = self.snapshot.leases[host].revision;
        self.seen.leases.insert(name(host), LeaseAge { revision, unchanged_ms, confirmed });
    }

    /// A host's session was closed.
    pub fn lost(&mut self, host: &str, proof: ProofKind) {
        self.snapshot.leases.insert(name(host), at(950, lease(true)));
        let lost =
            LostSession { session: 1, proof, at_ms: 900_000, last_heard_ms: 895_000, incident: 1 };
        self.snapshot.lost.insert(name(host), at(950, lost));
    }

    /// A reference.
    #[must_use]
    pub fn reference(text: &str) -> ObjectRef {
        text.parse().expect("a test gives a good reference")
    }
}
